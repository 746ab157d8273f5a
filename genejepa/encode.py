"""Embed cells with a trained encoder: 32-bit, deterministic, independent of batch mates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genejepa.data.normalization import Normalizer
    from genejepa.data.panel import PanelCounts
    from genejepa.nn.encoder import CellEncoder

_ROWS = 256
"""Cells per pass, always: products of few rows take other kernels and round otherwise, so that the last bits of a
cell's vector would depend on its batch mates."""


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
    keep_mask = None if keep is None else torch.from_numpy(keep)
    vectors = []
    for start in range(0, len(index), _ROWS):
        cells = index[start : start + _ROWS]
        values, _ = normalizer.dense(counts, np.resize(cells, _ROWS), keep=keep)
        vectors.append(encoder(torch.from_numpy(values), keep_mask)[: len(cells)])
    if not vectors:
        return np.empty((0, encoder.embedding_dim), dtype=np.float32)
    return torch.cat(vectors).numpy()
