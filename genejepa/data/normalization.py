"""From counts to the values the encoder reads: depth, variance stabilisation, noise scale; fixed at training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genejepa.config import Transform
    from genejepa.data.batches import BatchScaling
    from genejepa.data.panel import PanelCounts

_CLIP = 10.0
"""Values beyond this many common deviations are clipped: they are outliers of the input, not of biology."""

_CHUNK = 4096

_LEAST_SPREAD = 1e-3
"""Deviation, in units of sampling noise, below which the cells are all alike and rounding is all that differs."""

_LARGE_MEAN = 50.0
"""Counts above which the deviation of a transformed Poisson count is taken from the delta method."""


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Median-depth normalisation, variance stabilisation, centring, and scaling by sampling noise.

    ``value = clip((f(count * median_depth / depth) - mean[g]) / scale[g], -10, 10)`` with ``f`` = sqrt or log1p.
    ``scale[g]`` is proportional to the deviation that Poisson sampling alone would give gene ``g``
    (:func:`sampling_deviation`). One unit is then the same amount of noise for every gene, and what exceeds it is
    expression: markers keep their large variance, which unit variance per gene would take from them, and genes of low
    mean are not drowned, as they are without a scale.

    Attributes
    ----------
    transform
        ``sqrt`` (makes the variance of a Poisson count nearly constant: Bartlett 1936, doi:10.2307/2983678) or
        ``log1p``.
    median_depth
        Median over training cells of the counts within the panel.
    mean : (n_genes,), float32
        Mean transformed value over the training cells.
    scale : (n_genes,), float32
        Sampling deviations, times one factor that makes the mean variance of the values 1.
    frequency : (n_genes,), float32
        Share of each gene in all training counts; sums to 1.
    batches
        Adjustment of the values by batch, after the clipping above; they are clipped again. None: no adjustment.
    """

    transform: Transform
    median_depth: float
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    frequency: NDArray[np.float32]
    batches: BatchScaling | None = None

    @classmethod
    def fit(cls, counts: PanelCounts, *, transform: Transform) -> Normalizer:
        """Estimate depth, means and scale on training cells in one pass over the stored counts."""
        depth = cell_depth(counts)
        positive = depth[depth > 0]
        median_depth = float(np.median(positive)) if len(positive) else 1.0
        totals = np.zeros(counts.n_genes)
        sums = np.zeros(counts.n_genes)
        squares = np.zeros(counts.n_genes)
        for start in range(0, counts.n_obs, _CHUNK):
            index = np.arange(start, min(start + _CHUNK, counts.n_obs))
            rows, genes, data = counts.rows(index)
            value = _stabilised(data, depth_factor(depth[index], median_depth)[rows], transform).astype(np.float64)
            totals += np.bincount(genes, data, counts.n_genes)
            sums += np.bincount(genes, value, counts.n_genes)
            squares += np.bincount(genes, value**2, counts.n_genes)
        mean = sums / counts.n_obs
        variance = np.maximum(squares / counts.n_obs - mean**2, 0)
        # Half a count keeps the log frequency of a gene without counts finite.
        frequency = (totals + 0.5) / (totals + 0.5).sum()
        noise = sampling_deviation(frequency * median_depth, transform)
        spread = np.sqrt(np.mean(variance / noise**2))
        scale = noise * (spread if spread > _LEAST_SPREAD else 1.0)
        return cls(
            transform,
            median_depth,
            mean.astype(np.float32),
            scale.astype(np.float32),
            frequency.astype(np.float32),
        )

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """All numbers by name, for a hash of the model."""
        own = {"median_depth": np.array([self.median_depth], dtype=np.float32)}
        own |= {name: getattr(self, name) for name in ("mean", "scale", "frequency")}
        if self.batches is not None:
            own |= {f"batches.{name}": getattr(self.batches, name) for name in ("centre", "gain", "frequency")}
        return {f"normalizer.{name}": array for name, array in own.items()}

    @cached_property
    def zero_values(self) -> NDArray[np.float32]:
        """Value of a gene without counts, (n_batches + 1, n_genes); the last row is for an unknown batch."""
        values: NDArray[np.float32] = np.clip(-self.mean / self.scale, -_CLIP, _CLIP)[None]
        if self.batches is not None:
            values = np.clip((values - self.batches.centre) * self.batches.gain, -_CLIP, _CLIP)
        return values

    def sparse(
        self,
        counts: PanelCounts,
        index: NDArray[np.integer],
        *,
        keep: NDArray[np.bool_] | None = None,
        thinning: Thinning | None = None,
    ) -> SparseValues:
        """Values of some cells where they differ from :attr:`zero_values`.

        Parameters
        ----------
        index : (n,)
            Cell positions.
        keep : (n_genes,)
            Genes that were measured. Depth is counted over them and compared with the median depth that the
            training cells would have had over the same genes, so that absent genes do not look like shallow cells.
        thinning
            Molecules are lost at random before anything else; None keeps all.
        """
        rows, genes, data = counts.rows(index)
        if thinning is not None:
            data = thinning.apply(rows, data)
        if keep is not None:
            measured = keep[genes]
            rows, genes, data = rows[measured], genes[measured], data[measured]
        depth = np.bincount(rows, data, len(index))
        share = 1.0 if keep is None else float(self.frequency[keep].sum())
        factor = depth_factor(depth, self.median_depth * share)
        stabilised = _stabilised(data, factor[rows], self.transform)
        value = np.clip((stabilised - self.mean[genes]) / self.scale[genes], -_CLIP, _CLIP)
        batch = counts.batch_of(index)
        if self.batches is None:
            return SparseValues(rows, genes, value - self.zero_values[0, genes], data, batch)
        at = (batch[rows], genes)
        value = np.clip((value - self.batches.centre[at]) * self.batches.gain[at], -_CLIP, _CLIP)
        return SparseValues(rows, genes, value - self.zero_values[at], data, batch)

    def dense(
        self,
        counts: PanelCounts,
        index: NDArray[np.integer],
        *,
        keep: NDArray[np.bool_] | None = None,
        thinning: Thinning | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values and counts of some cells over the whole panel, both (n, n_genes).

        Parameters as in :meth:`sparse`. Values of genes outside ``keep`` are meaningless and must be masked.
        """
        stored = self.sparse(counts, index, keep=keep, thinning=thinning)
        dense_counts = np.zeros((len(index), counts.n_genes), dtype=np.float32)
        dense_counts[stored.rows, stored.genes] = stored.counts
        values = self.zero_values[stored.batch if self.batches is not None else np.zeros(len(index), dtype=np.int64)]
        values[stored.rows, stored.genes] += stored.excess
        return values, dense_counts


@dataclass(frozen=True, eq=False)
class SparseValues:
    """Stored counts of a batch and what they add to the value of a zero.

    Attributes
    ----------
    rows, genes : (n_stored,), integer
        Cell of the batch and gene of the panel, sorted by cell.
    excess, counts : (n_stored,), float32
        Value minus the value of a zero of the same batch, and the count.
    batch : (n,), integer
        Batch of each cell; the row of :attr:`Normalizer.zero_values` to start from.
    """

    rows: NDArray[np.int64]
    genes: NDArray[np.int32]
    excess: NDArray[np.float32]
    counts: NDArray[np.float32]
    batch: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Thinning:
    """Random loss of molecules: what a cell would look like if it had been sequenced less deeply.

    Of independent Poisson counts, binomial thinning gives independent Poisson counts with smaller means.

    Attributes
    ----------
    kept : (n,)
        Share of the molecules of each cell that is kept, in expectation.
    rng
        Source of the draws.
    """

    kept: NDArray[np.float64]
    rng: np.random.Generator

    def apply(self, rows: NDArray[np.int64], counts: NDArray[np.float32]) -> NDArray[np.float32]:
        """Thinned counts, (n_stored,), of stored counts and the cells they belong to."""
        n = np.rint(counts).astype(np.int64)
        return self.rng.binomial(n, self.kept[rows]).astype(np.float32)


def sampling_deviation(mean_counts: NDArray[np.float64], transform: Transform) -> NDArray[np.float64]:
    """Standard deviation of ``f(n)`` for Poisson counts ``n`` of given means.

    Parameters
    ----------
    mean_counts : (n_genes,)
        Expected counts of each gene in a cell of median depth.

    Returns
    -------
    (n_genes,), not below the value at a mean of 0.001 counts: rarer genes would turn single counts into outliers.
    """
    mean = np.maximum(mean_counts, 1e-3)
    small = np.minimum(mean, _LARGE_MEAN)[:, None]
    n = np.arange(4 * int(_LARGE_MEAN))
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(n[1:]))])
    probability = np.exp(n * np.log(small) - small - log_factorial)  # (n_genes, counts)
    value = np.sqrt(n) if transform == "sqrt" else np.log1p(n)
    exact = np.sqrt(probability @ value**2 - (probability @ value) ** 2)
    # For large means the delta method: the slope of f at the mean times the deviation of the count.
    slope = 0.5 / np.sqrt(mean) if transform == "sqrt" else 1 / (1 + mean)
    return np.where(mean < _LARGE_MEAN, exact, slope * np.sqrt(mean))


def cell_depth(counts: PanelCounts) -> NDArray[np.float64]:
    """Counts of each cell within the panel, (n_obs,)."""
    rows = np.repeat(np.arange(counts.n_obs), np.diff(counts.indptr))
    return np.bincount(rows, counts.data, counts.n_obs).astype(np.float64)


def depth_factor(depth: NDArray[np.number[Any]], target: float) -> NDArray[np.float64]:
    """What to multiply the counts of cells with, to bring them to a depth; cells without counts have no use for it."""
    return target / np.where(depth > 0, depth, 1.0)


def _stabilised(data: NDArray[np.float32], factor: NDArray[np.float64], transform: Transform) -> NDArray[np.float32]:
    scaled = (data * factor).astype(np.float32)
    return np.sqrt(scaled) if transform == "sqrt" else np.log1p(scaled)
