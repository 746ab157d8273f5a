"""From states back to expression, and whether a state is one that a cell could have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from genejepa._arithmetic import plain_arithmetic
from genejepa.data.normalization import depth_factor
from genejepa.data.panel import PanelCounts
from genejepa.energy import ResidualScale

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genejepa.model import GeneJEPA

_LARGE = 100.0
"""Expected counts above which the mean of log1p is taken from the delta method."""

_CHUNK = 1024


class Decoder:
    """Expression of states, by the count read-out of a trained model as it is now.

    Expression is ``log1p`` of counts scaled to the median depth that the training cells have over the genes of the
    model; what is decoded is its mean over Poisson counts, so that it compares with that of cells.
    """

    def __init__(self, model: GeneJEPA) -> None:
        assert model.jepa is not None
        self.model = model
        self.weights_sha256 = model.weights_sha256()
        self.median_depth = model.normalizer.median_depth
        readout = model.jepa.readout
        self._weight = readout.linear.weight.detach().numpy().astype(np.float64)
        self._offset = (readout.linear.bias + readout.log_frequency[-1]).detach().numpy().astype(np.float64)

    def counts(self, states: NDArray[np.floating]) -> NDArray[np.float64]:
        """Expected counts, (n, n_genes), of cells of median depth in the given states, (n, dim)."""
        logits = states @ self._weight.T + self._offset
        logits -= logits.max(1, keepdims=True)
        share = np.exp(logits)
        counts: NDArray[np.float64] = self.median_depth * share / share.sum(1, keepdims=True)
        return counts

    def expression(self, states: NDArray[np.floating]) -> NDArray[np.float64]:
        """Expected log expression, (n, n_genes), of states (n, dim)."""
        means, expected = _log1p_of_poisson()
        found: NDArray[np.float64] = np.interp(self.counts(states), means, expected)
        return found

    def profiles(self, counts: PanelCounts, keep: NDArray[np.bool_] | None) -> NDArray[np.float32]:
        """Observed log expression, (n, n_genes); 0 for genes that were not measured."""
        rows, genes, data = counts.rows(np.arange(counts.n_obs))
        if keep is not None:
            rows, genes, data = rows[keep[genes]], genes[keep[genes]], data[keep[genes]]
        share = 1.0 if keep is None else float(self.model.normalizer.frequency[keep].sum())
        depth = np.bincount(rows, data, counts.n_obs)
        values = np.zeros((counts.n_obs, counts.n_genes), dtype=np.float32)
        values[rows, genes] = np.log1p(data * depth_factor(depth, self.median_depth * share)[rows])
        return values

    @plain_arithmetic()
    @torch.no_grad()
    def residuals(self, states: NDArray[np.floating]) -> NDArray[np.float64]:
        """States that the encoder gives the decoded expression, minus the states, (n, dim)."""
        parts = [np.empty((0, states.shape[1]))]
        for start in range(0, len(states), _CHUNK):
            chunk = states[start : start + _CHUNK]
            counts = self.counts(chunk).astype(np.float32)
            n, n_genes = counts.shape
            panel = PanelCounts(
                np.arange(n + 1, dtype=np.int64) * n_genes,
                np.tile(np.arange(n_genes, dtype=np.int32), n),
                counts.ravel(),
                n_genes,
            )
            parts.append(self.model.encode_panel(panel).astype(np.float64) - chunk)
        return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class PlausibleStates:
    """Which states are like those of cells.

    The energy of a state is how far the encoder's view of its decoded expression is from it, as a squared Mahalanobis
    distance over the dimension: about 1 for states of cells. The decoder and the encoder agree where there are cells,
    and nothing makes them agree elsewhere.

    Attributes
    ----------
    scale
        Of the residuals of known cells.
    """

    scale: ResidualScale

    @classmethod
    def fit(cls, decoder: Decoder, states: NDArray[np.floating]) -> PlausibleStates:
        """From states of cells, (n, dim)."""
        scale = ResidualScale.fit(decoder.residuals(states))
        # to 32 bits, as files have it, so that a loaded one gives the same energies
        mean, precision = (array.astype(np.float32).astype(np.float64) for array in (scale.mean, scale.precision))
        return cls(ResidualScale(mean, precision))

    def energy(self, decoder: Decoder, states: NDArray[np.floating]) -> NDArray[np.float32]:
        """Energy of states, (n,), from (n, dim)."""
        return self.scale.energy(decoder.residuals(states)).astype(np.float32)


def gene_vectors_of(model: GeneJEPA) -> dict[str, NDArray[np.float64]]:
    """Identity of each gene: what it is to the predictor and to the read-out, each of unit mean square."""
    assert model.jepa is not None
    parts = [model.jepa.predictor.gene_queries.detach().numpy(), model.jepa.readout.linear.weight.detach().numpy()]
    vectors = np.concatenate([part / np.sqrt(np.square(part).mean()) for part in parts], 1, dtype=np.float64)
    return dict(zip(model.genes, vectors, strict=True))


@cache
def _log1p_of_poisson() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of Poisson counts, and the mean of log1p of such counts; to interpolate."""
    from scipy.stats import poisson

    means = np.concatenate([[0.0], np.geomspace(1e-4, 1e6, 600)])
    n = np.arange(4 * int(_LARGE))
    small = means[means < _LARGE]
    exact = poisson.pmf(n, small[:, None]) @ np.log1p(n)
    large = means[means >= _LARGE]
    return means, np.concatenate([exact, np.log1p(large) - 0.5 * large / (1 + large) ** 2])
