"""Embed cells with a trained encoder: 32-bit, deterministic, independent of batch mates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from genejepa._arithmetic import plain_arithmetic
from genejepa.nn.attention import add_excess, read_dense
from genejepa.nn.encoder import GeneTokenEncoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from genejepa.data.normalization import Normalizer
    from genejepa.data.panel import PanelCounts
    from genejepa.nn.encoder import CellEncoder

_ROWS = 256
"""Cells per pass, always: products of few rows take other kernels and round otherwise, so that the last bits of a
cell's vector would depend on its batch mates."""


@plain_arithmetic()
@torch.no_grad()
def encode_cells(
    encoder: CellEncoder,
    counts: PanelCounts,
    normalizer: Normalizer,
    *,
    index: NDArray[np.integer],
    keep: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Cell vectors, (len(index), embedding_dim).

    Parameters
    ----------
    index
        Positions of the cells.
    keep : (n_genes,)
        Genes that were measured; None for all.
    """
    encoder.eval()
    if isinstance(encoder, GeneTokenEncoder):
        one_pass = _gene_token_pass(encoder, counts, normalizer, keep)
    else:
        one_pass = _dense_pass(encoder, counts, normalizer, keep)
    vectors = np.empty((len(index), encoder.embedding_dim), dtype=np.float32)
    for start in range(0, len(index), _ROWS):
        cells = index[start : start + _ROWS]
        vectors[start : start + _ROWS] = one_pass(np.resize(cells, _ROWS)).numpy()[: len(cells)]
    return vectors


def _gene_token_pass(
    encoder: GeneTokenEncoder, counts: PanelCounts, normalizer: Normalizer, keep: NDArray[np.bool_] | None
) -> Callable[[NDArray[np.integer]], Tensor]:
    """Encoder of a fixed number of cells, from their stored counts only."""
    tables = encoder.tables()
    keep_mask = None if keep is None else torch.from_numpy(keep)
    zeros = read_dense(tables, torch.from_numpy(normalizer.zero_values), keep_mask)

    def one_pass(cells: NDArray[np.integer]) -> Tensor:
        stored = normalizer.sparse(counts, cells, keep=keep)
        offsets = np.searchsorted(stored.rows, np.arange(len(cells)))
        arrays = (stored.genes.astype(np.int64), stored.excess, offsets)
        base = zeros if normalizer.batches is None else zeros.rows(torch.from_numpy(stored.batch))
        read = add_excess(base, tables, *map(torch.from_numpy, arrays))
        return encoder.vectors(encoder.latents_of(read))

    return one_pass


def _dense_pass(
    encoder: CellEncoder, counts: PanelCounts, normalizer: Normalizer, keep: NDArray[np.bool_] | None
) -> Callable[[NDArray[np.integer]], Tensor]:
    """Encoder of a fixed number of cells, from all values of the panel."""
    keep_mask = None if keep is None else torch.from_numpy(keep)

    def one_pass(cells: NDArray[np.integer]) -> Tensor:
        values, _ = normalizer.dense(counts, cells, keep=keep)
        vectors: Tensor = encoder(torch.from_numpy(values), keep_mask)
        return vectors

    return one_pass
