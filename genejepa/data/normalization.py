"""From counts to the values the encoder reads: depth, variance stabilisation, centring; fixed at training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genejepa.config import Transform
    from genejepa.data.panel import PanelCounts

_CLIP = 10.0
"""Values beyond this many common deviations are clipped: they are outliers of the input, not of biology."""

_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Median-depth normalisation, variance stabilisation, centring per gene, and one common scale.

    ``value = clip((f(count * median_depth / depth) - mean[g]) / scale, -10, 10)`` with ``f`` = sqrt or log1p.
    The common scale keeps the relative variances of genes, which carry signal; unit variance per gene would
    raise noise genes to the level of markers.

    Attributes
    ----------
    transform
        ``sqrt`` (Freeman & Tukey 1950 without the offset: variance of a Poisson count made constant) or ``log1p``.
    median_depth
        Median over training cells of the counts within the panel.
    mean : (n_genes,), float32
        Mean transformed value over the training cells.
    scale
        Root of the mean variance of the transformed genes.
    frequency : (n_genes,), float32
        Share of each gene in all training counts; sums to 1.
    """

    transform: Transform
    median_depth: float
    mean: NDArray[np.float32]
    scale: float
    frequency: NDArray[np.float32]

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
            value = _stabilised(data, median_depth / depth[index][rows], transform).astype(np.float64)
            totals += np.bincount(genes, data, counts.n_genes)
            sums += np.bincount(genes, value, counts.n_genes)
            squares += np.bincount(genes, value**2, counts.n_genes)
        mean = sums / counts.n_obs
        variance = np.maximum(squares / counts.n_obs - mean**2, 0)
        scale = float(np.sqrt(variance.mean())) or 1.0
        # Half a count keeps the log frequency of a gene without counts finite.
        frequency = (totals + 0.5) / (totals + 0.5).sum()
        return cls(transform, median_depth, mean.astype(np.float32), scale, frequency.astype(np.float32))

    def dense(
        self, counts: PanelCounts, index: NDArray[np.integer], *, keep: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values and counts of some cells over the whole panel.

        Parameters
        ----------
        index : (n,)
            Cell positions.
        keep : (n_genes,)
            Genes that were measured. Depth is counted over them and compared with the median depth that the
            training cells would have had over the same genes, so that absent genes do not look like shallow cells.

        Returns
        -------
        values : (n, n_genes)
            Entries of genes outside ``keep`` are meaningless and must be masked.
        counts : (n, n_genes)
        """
        rows, genes, data = counts.rows(index)
        if keep is not None:
            measured = keep[genes]
            rows, genes, data = rows[measured], genes[measured], data[measured]
        depth = np.bincount(rows, data, len(index))
        share = 1.0 if keep is None else float(self.frequency[keep].sum())
        factor = self.median_depth * share / np.maximum(depth, 1.0)
        dense_counts = np.zeros((len(index), counts.n_genes), dtype=np.float32)
        dense_counts[rows, genes] = data
        centre = self.mean / np.float32(self.scale)
        values = np.repeat(-centre[None], len(index), axis=0)
        stabilised = _stabilised(data, factor[rows], self.transform) / self.scale - centre[genes]
        values[rows, genes] = np.clip(stabilised, -_CLIP, _CLIP)
        return values, dense_counts


def cell_depth(counts: PanelCounts) -> NDArray[np.float64]:
    """Counts of each cell within the panel, (n_obs,)."""
    rows = np.repeat(np.arange(counts.n_obs), np.diff(counts.indptr))
    return np.bincount(rows, counts.data, counts.n_obs).astype(np.float64)


def _stabilised(
    data: NDArray[np.float32], factor: NDArray[np.float64], transform: Transform
) -> NDArray[np.float32]:
    scaled = (data * factor).astype(np.float32)
    return np.sqrt(scaled) if transform == "sqrt" else np.log1p(scaled)
