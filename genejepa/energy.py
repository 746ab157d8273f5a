r"""Energy: how badly the halves of a cell predict it, compared with cells that are known to be real.

The genes are halved a few times, always in the same ways. From the vector of each half the predictor gives the vector
of the other half and that of the whole cell; the target encoder gives what they are. With the mean :math:`\mu` and the
covariance :math:`\Sigma` that a residual :math:`r` has over reference cells, the energy of a cell is the mean over
halvings, halves and both predictions of

.. math:: (r - \mu)^\top \Sigma^{-1} (r - \mu) / \text{dim},

about 1 for a cell like those of the reference. An energy in a latent space is that of LeCun 2022, "A path towards
autonomous machine intelligence", sec. 4.4; the covariance makes values of different gene sets comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from genejepa._arithmetic import plain_arithmetic
from genejepa.data.normalization import cell_depth
from genejepa.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from genejepa.data.normalization import Normalizer
    from genejepa.data.panel import PanelCounts
    from genejepa.jepa import JEPA

_HALVES_STREAM = 8
"""Keeps the random numbers of halvings apart from those of other uses."""

_ROWS = 256
"""Cells per pass, always, so that the energy of a cell does not depend on its batch mates; see ``encode.py``."""

Residuals = Callable[["JEPA", "list[Tensor]", "Tensor"], "Tensor"]
"""Residuals of several kinds, (n_kinds, n, dim), from values, a list of (n, n_genes), and the halves of the genes."""

_AMBIENT = 0.05
"""Share of the molecules that may be of any gene, so that no gene is impossible: free RNA, and overconfidence."""

_MOST_REFERENCE_CELLS = 2000
_FEWEST_REFERENCE_CELLS = 20


@dataclass(frozen=True, eq=False)
class ResidualScale:
    """Mean and inverse covariance of residuals of reference cells.

    Attributes
    ----------
    mean : (dim,)
    precision : (dim, dim)
        Of the covariance shrunk by Ledoit & Wolf (2004, doi:10.1016/S0047-259X(03)00096-4), which is regular for any
        number of cells.
    """

    mean: NDArray[np.float64]
    precision: NDArray[np.float64]

    @classmethod
    def fit(cls, residuals: NDArray[np.float64]) -> ResidualScale:
        """Estimate from residuals, (n, dim)."""
        from sklearn.covariance import ledoit_wolf

        covariance, _ = ledoit_wolf(residuals)
        return cls(residuals.mean(0), np.linalg.pinv(covariance, hermitian=True))

    def energy(self, residuals: NDArray[np.float64]) -> NDArray[np.float64]:
        """Squared Mahalanobis distance over the dimension, (n,), of residuals (n, dim)."""
        centred = residuals - self.mean
        distances: NDArray[np.float64] = np.einsum("ni,ij,nj->n", centred, self.precision, centred)
        distances /= centred.shape[1]
        return distances


class EnergyFunction:
    """Energies of cells over the genes that these and the reference have in common.

    Parameters
    ----------
    jepa, normalizer
        Of a trained model.
    reference
        Cells that are known to be real. At most 2,000 of them, evenly spread, are used.
    keep : (n_genes,)
        Genes that these cells and those to be looked at have; None for all.
    n_masks
        Number of halvings.

    Raises
    ------
    ConfigError
        If ``n_masks`` is no whole number of at least 1.
    DataError
        If the reference has less than 20 cells with counts, or there are less than two genes.
    """

    def __init__(
        self,
        jepa: JEPA,
        normalizer: Normalizer,
        reference: PanelCounts,
        *,
        keep: NDArray[np.bool_] | None = None,
        n_masks: int = 8,
    ) -> None:
        if isinstance(n_masks, bool) or not isinstance(n_masks, int | np.integer) or n_masks < 1:
            raise ConfigError(f"`n_masks` is {n_masks!r}.", fix="give a whole number of at least 1.")
        self.jepa, self.normalizer = jepa.eval(), normalizer
        self.keep = np.ones(reference.n_genes, dtype=bool) if keep is None else keep
        genes = np.flatnonzero(self.keep)
        if len(genes) < 2:
            raise DataError(
                f"the cells have {len(genes)} genes of the model in common; each half of them needs one.",
                fix="pass cells, and a reference, with more genes of the model.",
            )
        real = np.flatnonzero(cell_depth(reference) > 0)
        if len(real) < _FEWEST_REFERENCE_CELLS:
            raise DataError(
                f"the reference has {len(real)} cells with counts, expected at least {_FEWEST_REFERENCE_CELLS}.",
                fix="pass more cells that are known to be real as `reference`.",
            )
        self.halvings = [_halves(genes, reference.n_genes, number) for number in range(n_masks)]
        spread = np.linspace(0, len(real) - 1, min(len(real), _MOST_REFERENCE_CELLS)).round().astype(np.int64)
        self._reference = reference.subset(real[spread])

    def cells(self, counts: PanelCounts) -> NDArray[np.float32]:
        """Energy of every cell, (n_obs,)."""
        return self._energies(_cell_residuals, self._cell_scales, counts)

    def pairs(self, first: PanelCounts, second: PanelCounts) -> NDArray[np.float32]:
        """Energy of taking one half of the genes from a cell and the other half from its partner, (n_obs,).

        Each half predicts the whole cell; the residual is the difference of what they predict. In the reference both
        halves are of one cell.
        """
        return self._energies(_pair_residuals, self._pair_scales, first, second)

    def surprise(self, counts: PanelCounts) -> NDArray[np.float32]:
        """How much more of each gene there is than the other half of the genes lets expect, (n_obs, n_kept).

        The Poisson deviance residual (Townes et al. 2019, doi:10.1186/s13059-019-1861-6), averaged over the halvings,
        less its mean over the reference and divided by its deviation there, which is taken to be at least 1. Expected
        counts are those of the multinomial read-out of the vector of the half that lacks the gene, with one molecule in
        twenty drawn from all cells. The Pearson residual would be ruled by single molecules of the rarest genes.
        """
        mean, deviation = self._gene_scale
        residuals = self._gene_residuals(counts)
        residuals -= mean
        residuals /= deviation
        return residuals

    @cached_property
    def _cell_scales(self) -> list[list[ResidualScale]]:
        return self._scales(_cell_residuals, self._reference)

    @cached_property
    def _pair_scales(self) -> list[list[ResidualScale]]:
        return self._scales(_pair_residuals, self._reference, self._reference)

    @cached_property
    def _gene_scale(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        residuals = self._gene_residuals(self._reference)
        return residuals.mean(0), np.maximum(residuals.std(0), 1.0)

    def _scales(self, residuals_of: Residuals, *sources: PanelCounts) -> list[list[ResidualScale]]:
        """Scales of every kind of residual, for every halving."""
        found: list[list[NDArray[np.float64]]] = [[] for _ in self.halvings]
        for n, values in self._passes(*sources):
            for parts, halves in zip(found, self.halvings, strict=True):
                parts.append(self._residuals(residuals_of, values, halves)[:, :n])
        return [[ResidualScale.fit(kind) for kind in np.concatenate(parts, axis=1)] for parts in found]

    def _energies(
        self, residuals_of: Residuals, scales: list[list[ResidualScale]], *sources: PanelCounts
    ) -> NDArray[np.float32]:
        """Mean energy over halvings and kinds of residuals, (n_obs,)."""
        energies = [np.empty(0)]
        for n, values in self._passes(*sources):
            terms = [
                scale.energy(kind)[:n]
                for halves, kinds in zip(self.halvings, scales, strict=True)
                for scale, kind in zip(kinds, self._residuals(residuals_of, values, halves), strict=True)
            ]
            energies.append(np.mean(terms, axis=0))
        return np.concatenate(energies).astype(np.float32)

    @plain_arithmetic()
    @torch.no_grad()
    def _residuals(self, residuals_of: Residuals, values: list[Tensor], halves: Tensor) -> NDArray[np.float64]:
        """Residuals of one pass, (n_kinds, _ROWS, dim)."""
        return residuals_of(self.jepa, values, halves).double().numpy()

    def _passes(self, *sources: PanelCounts) -> Iterator[tuple[int, list[Tensor]]]:
        """Normalised values of the same cells of every source, each (_ROWS, n_genes), and how many are not filling."""
        for start in range(0, sources[0].n_obs, _ROWS):
            index = np.arange(start, min(start + _ROWS, sources[0].n_obs))
            filled = np.resize(index, _ROWS)
            values = [self.normalizer.dense(counts, filled, keep=self.keep)[0] for counts in sources]
            yield len(index), [torch.from_numpy(array) for array in values]

    @plain_arithmetic()
    @torch.no_grad()
    def _gene_residuals(self, counts: PanelCounts) -> NDArray[np.float32]:
        """Deviance residuals of the measured genes, averaged over the halvings, (n_obs, n_kept)."""
        residuals = np.zeros((counts.n_obs, counts.n_genes), dtype=np.float32)
        done = 0
        for n, (values,) in self._passes(counts):
            index = np.arange(done, done + n)
            _, observed = self.normalizer.dense(counts, index, keep=self.keep)
            expected_log = self.jepa.readout.expected(torch.from_numpy(counts.batch_of(index)))
            for halves in self.halvings:
                views = self.jepa.encoder.views(values, halves, _two_views(len(values)))[:, :n]
                for view, hidden in zip(views, halves.flip(0), strict=True):
                    genes = hidden[hidden < counts.n_genes].numpy()
                    told = (expected_log + self.jepa.readout(view))[:, genes].softmax(-1)
                    share = ((1 - _AMBIENT) * told + _AMBIENT * expected_log[:, genes].softmax(-1)).double().numpy()
                    expected = observed[:, genes].sum(1, keepdims=True) * share
                    residuals[np.ix_(index, genes)] += _deviance(observed[:, genes], expected) / len(self.halvings)
            done += n
        return residuals[:, self.keep]


def _deviance(observed: NDArray[np.float32], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signed roots of the Poisson deviance of counts; 0 where nothing was there and nothing was expected."""
    ratio = np.maximum(observed, 1e-12) / np.maximum(expected, 1e-12)
    deviance = 2 * (np.where(observed > 0, observed * np.log(ratio), 0.0) - (observed - expected))
    found: NDArray[np.float64] = np.sign(observed - expected) * np.sqrt(np.maximum(deviance, 0.0))
    return found


def _halves(genes: NDArray[np.int64], n_genes: int, number: int) -> Tensor:
    """Random halves of some genes, (2, size), the same in every call; ``n_genes`` fills the shorter one."""
    order = np.random.default_rng([_HALVES_STREAM, number]).permutation(genes)
    halves = np.full((2, -(-len(order) // 2)), n_genes)
    for row, part in zip(halves, np.array_split(order, 2), strict=True):
        row[: len(part)] = part
    return torch.from_numpy(halves)


def _two_views(n: int) -> Tensor:
    """Membership of each half in the view of that half alone, (2, n, 2)."""
    return torch.eye(2)[:, None].expand(2, n, 2)


def _cell_residuals(jepa: JEPA, values: list[Tensor], halves: Tensor) -> Tensor:
    """Predicted minus true vectors, (4, n, dim): of the other half and of the whole cell, from each half."""
    (whole,) = values
    seen = _two_views(len(whole))
    hidden = seen.flip(0)
    views = jepa.encoder.views(whole, halves, seen)
    cell, others = jepa.target_encoder.targets(whole, halves, hidden)
    predicted = jepa.predictor(views, jepa.predictor.set_queries(halves, hidden))
    return torch.cat([predicted - others, jepa.predictor(views) - cell])


def _pair_residuals(jepa: JEPA, values: list[Tensor], halves: Tensor) -> Tensor:
    """Differences of the whole cells that a half of the first and the other half of the second predict, (2, n, dim)."""
    first, second = (jepa.predictor(jepa.encoder.views(v, halves, _two_views(len(v)))) for v in values)
    return torch.stack([first[0] - second[1], first[1] - second[0]])
