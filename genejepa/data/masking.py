"""Gene blocks and views, drawn on the CPU as a pure function of (seed, step).

A step cuts the panel into ``n_blocks`` nearly equal random blocks. They are shared by the batch; which of them a view
sees is drawn per cell. Blocks of co-expressed genes, which would be to a cell what spatial blocks are to an image
(Assran et al. 2023, arXiv:2301.08243, sec. 3), are worse: a program whose genes are all in one view cannot be
predicted from the other, and training removes it from the vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genejepa.config import MaskConfig

_MASK_STREAM = 1
"""Keeps the random numbers of masks apart from those of other uses of the same seed and step."""


@dataclass(frozen=True)
class Masks:
    """Blocks of a step and the views of its cells.

    Attributes
    ----------
    blocks : (n_blocks, block_size), int64
        Gene positions; ``n_genes`` marks an empty place at the end of a shorter block.
    views : (2, batch, n_blocks), bool
        True where the view sees the block; the second view is the complement of the first.
    """

    blocks: NDArray[np.int64]
    views: NDArray[np.bool_]


def draw_masks(config: MaskConfig, *, n_genes: int, batch_size: int, seed: int, step: int) -> Masks:
    """Draw the masks of one training step.

    Parameters
    ----------
    seed, step
        The draw depends on no other state, so that any process can draw any step.
    """
    rng = np.random.default_rng([seed, _MASK_STREAM, step])
    n_blocks = config.n_blocks
    blocks = _padded_blocks(rng.permutation(n_genes), n_blocks)
    keep = rng.uniform(config.min_keep, config.max_keep, size=batch_size)
    n_visible = np.clip(np.round(keep * n_blocks), 1, n_blocks - 1)
    rank = rng.random((batch_size, n_blocks)).argsort(-1).argsort(-1)
    first = rank < n_visible[:, None]
    return Masks(blocks, np.stack([first, ~first]))


def _padded_blocks(order: NDArray[np.int64], n_blocks: int) -> NDArray[np.int64]:
    n_genes = len(order)
    blocks = np.full((n_blocks, -(-n_genes // n_blocks)), n_genes, dtype=np.int64)
    for row, genes in zip(blocks, np.array_split(order, n_blocks), strict=True):
        row[: len(genes)] = genes
    return blocks
