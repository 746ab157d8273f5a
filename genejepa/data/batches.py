"""What the genes of each batch look like, so that values can be taken relative to their batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genejepa.data.normalization import Normalizer
    from genejepa.data.panel import PanelCounts

_FLOOR = 0.3
"""Added to deviations before they are divided: a gene that hardly varies in a batch is not blown up."""

_MIN_CELLS = 10
"""Cells of a batch below which its means and deviations are noise, and it is left as it is."""

_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class BatchScaling:
    """Mean, gain and frequency of every gene in every batch.

    The value of a gene becomes ``(value - centre[batch]) * gain[batch]``: location and scale are adjusted per batch
    and gene, as in ComBat (Johnson, Li & Rabinovic 2007, doi:10.1093/biostatistics/kxj037) without its shrinkage.
    The last row of each array stands for a cell of unknown batch, which is left as it is; so batch -1 needs no case.
    A batch of fewer than ten cells is left as it is, too.

    Attributes
    ----------
    names
        Batches, in the order of the rows.
    centre : (n_batches + 1, n_genes), float32
        Mean of the values in the batch.
    gain : (n_batches + 1, n_genes), float32
        Deviation within batches, pooled, divided by that in this batch, both plus 0.3.
    frequency : (n_batches + 1, n_genes), float32
        Share of each gene in the counts of the batch; the last row is that of all cells.
    """

    names: tuple[str, ...]
    centre: NDArray[np.float32]
    gain: NDArray[np.float32]
    frequency: NDArray[np.float32]

    def __post_init__(self) -> None:
        found = [len(array) for array in (self.centre, self.gain, self.frequency)]
        if found != 3 * [len(self.names) + 1]:
            raise ValueError(f"{len(self.names)} batches need {len(self.names) + 1} rows, found {found}")

    @classmethod
    def fit(cls, counts: PanelCounts, normalizer: Normalizer, names: tuple[str, ...]) -> BatchScaling:
        """Estimate from cells with known batches, ``counts.batch`` in 0..len(names) - 1."""
        n = len(names)
        sums, squares, totals = np.zeros((3, n, counts.n_genes))
        plain = replace(counts, batch=None)
        for start in range(0, counts.n_obs, _CHUNK):
            index = np.arange(start, min(start + _CHUNK, counts.n_obs))
            values, dense_counts = normalizer.dense(plain, index)
            batch = counts.batch_of(index)
            for code in np.unique(batch):
                members = values[batch == code].astype(np.float64)
                sums[code] += members.sum(0)
                squares[code] += (members**2).sum(0)
                totals[code] += dense_counts[batch == code].sum(0)
        sizes = np.bincount(counts.batch_of(np.arange(counts.n_obs)), minlength=n)[:, None]
        sizes = np.maximum(sizes, 1)  # a batch may have nothing but cells without counts
        mean = sums / sizes
        variance = np.maximum(squares / sizes - mean**2, 0)
        pooled = np.sqrt((variance * sizes).sum(0) / counts.n_obs)
        gain = (pooled + _FLOOR) / (np.sqrt(variance) + _FLOOR)
        small = sizes[:, 0] < _MIN_CELLS
        mean[small], gain[small] = 0.0, 1.0
        frequency = (totals + 0.5) / (totals + 0.5).sum(1, keepdims=True)
        genes = counts.n_genes
        return cls(
            names,
            np.vstack([mean, np.zeros(genes)]).astype(np.float32),
            np.vstack([gain, np.ones(genes)]).astype(np.float32),
            np.vstack([frequency, normalizer.frequency]).astype(np.float32),
        )

    def codes(self, batches: Sequence[str]) -> NDArray[np.int64]:
        """Rows of batch names, (n,); -1 for a name that is not known."""
        row = {name: i for i, name in enumerate(self.names)}
        return np.array([row.get(name, -1) for name in batches], dtype=np.int64)
