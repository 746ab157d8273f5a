"""Counts of a gene panel as plain numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class PanelCounts:
    """Counts of ``n_obs`` cells over a panel of ``n_genes`` genes, in canonical compressed rows.

    Canonical means: within a cell the gene positions increase strictly and no stored count is zero. Two data
    sets with the same counts therefore have identical arrays, whatever the order of their genes was.

    Parameters
    ----------
    indptr
        Row boundaries, shape ``(n_obs + 1,)``: cell ``i`` owns the entries ``indptr[i]:indptr[i + 1]``.
    indices
        Panel position of each stored count, shape ``(nnz,)``, in ``0..n_genes - 1``.
    data
        Stored counts (molecules or reads), shape ``(nnz,)``, all positive.
    n_genes
        Number of genes of the panel, including genes that were not measured.
    batch
        Batch of each cell, shape ``(n_obs,)``: a row of :class:`genejepa.data.batches.BatchScaling`, or -1 if it is
        unknown. None: all are.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    data: NDArray[np.float32]
    n_genes: int
    batch: NDArray[np.int64] | None = None

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1

    def rows(self, index: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """Gather the stored counts of some cells.

        Parameters
        ----------
        index
            Cell positions, shape ``(n,)``, in ``0..n_obs - 1``; any order, repeats allowed.

        Returns
        -------
        Three arrays of equal length, sorted by the first and then by the second: the position in ``index`` of
        the cell, the panel position of the gene, and the count. They are copies.

        Raises
        ------
        IndexError
            If a position is negative or at least ``n_obs``, or if ``index`` is not an integer vector.
        """
        index = np.asarray(index)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise IndexError(f"`index` must be a vector of integers, found {index.dtype} of shape {index.shape}")
        if index.size and (index.min() < 0 or index.max() >= self.n_obs):
            raise IndexError(f"`index` spans {index.min()}..{index.max()}, there are {self.n_obs} cells")
        index = index.astype(np.int64, copy=False)
        starts = self.indptr[index]
        lengths = self.indptr[index + 1] - starts
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        # Entry k of row r sits at starts[r] + k; `ends - lengths` is where row r begins in the output.
        entries = np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
        row_ids = np.repeat(np.arange(len(index), dtype=np.int64), lengths)
        return row_ids, self.indices[entries], self.data[entries]

    @classmethod
    def concatenate(cls, parts: Sequence[PanelCounts]) -> PanelCounts:
        """Counts of the cells of one part after those of another; there has to be one part or more."""
        starts = np.cumsum([0, *(int(part.indptr[-1]) for part in parts[:-1])])
        ends = [part.indptr[1:] + start for part, start in zip(parts, starts, strict=True)]
        batches = [part.batch for part in parts if part.batch is not None]
        return cls(
            np.concatenate([np.zeros(1, dtype=np.int64), *ends]),
            np.concatenate([part.indices for part in parts]),
            np.concatenate([part.data for part in parts]),
            parts[0].n_genes,
            np.concatenate(batches) if batches else None,
        )

    def subset(self, index: NDArray[np.integer]) -> PanelCounts:
        """Counts of some cells, in the order of ``index``, shape ``(n,)``."""
        rows, genes, data = self.rows(index)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(index)))]).astype(np.int64)
        return PanelCounts(indptr, genes, data, self.n_genes, None if self.batch is None else self.batch[index])

    def batch_of(self, index: NDArray[np.integer]) -> NDArray[np.int64]:
        """Batch of some cells, shape ``(n,)``; -1 where it is unknown."""
        return np.full(len(index), -1, dtype=np.int64) if self.batch is None else self.batch[index]
