"""Gene blocks and masks, drawn on the CPU as a pure function of (seed, step).

A step cuts the panel into ``n_blocks`` nearly equal blocks. In some steps they are co-expression modules (hard:
no correlated neighbour of a hidden gene is left visible), in the others random sets (which keep the statistics of
the visible part those of the whole). The blocks are shared by the batch; which of them a view sees is drawn per
cell. Genes have no grid: modules are to a cell what spatial blocks are to an image (Assran et al. 2023,
arXiv:2301.08243, sec. 3).
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
    """Blocks of a step and the views and targets of its cells.

    Attributes
    ----------
    blocks : (n_blocks, block_size), int64
        Gene positions; ``n_genes`` marks an empty place at the end of a shorter block.
    views : (2, batch, n_blocks), bool
        True where the view sees the block; the second view is the complement of the first.
    targets : (2, n_targets, batch, n_blocks), bool
        Target blocks of each view, none of which it sees.
    """

    blocks: NDArray[np.int64]
    views: NDArray[np.bool_]
    targets: NDArray[np.bool_]


def draw_masks(config: MaskConfig, *, loadings: NDArray[np.float32], batch_size: int, seed: int, step: int) -> Masks:
    """Draw the masks of one training step.

    Parameters
    ----------
    loadings : (n_genes, n_components)
        Principal axes of the genes; genes with similar rows are co-expressed.
    seed, step
        The result depends on nothing else, so that any process can draw any step.
    """
    rng = np.random.default_rng([seed, _MASK_STREAM, step])
    if rng.random() < config.module_fraction:
        order = _module_order(loadings, config.n_blocks, rng)
    else:
        order = rng.permutation(len(loadings))
    blocks = _padded_blocks(order, config.n_blocks)

    n_blocks = config.n_blocks
    keep = rng.uniform(config.min_keep, config.max_keep, size=batch_size)
    n_visible = np.clip(np.round(keep * n_blocks), 1, n_blocks - 1)
    rank = _random_ranks(rng, (batch_size, n_blocks))
    first = rank < n_visible[:, None]
    views = np.stack([first, ~first])
    return Masks(blocks, views, _draw_targets(rng, ~views, config.n_targets))


def _draw_targets(rng: np.random.Generator, hidden: NDArray[np.bool_], n_targets: int) -> NDArray[np.bool_]:
    """Deal the hidden blocks of each view and cell out to ``n_targets`` disjoint targets.

    One target takes all hidden blocks. With more targets than hidden blocks, the last targets repeat the first.
    """
    rank = _random_ranks(rng, hidden.shape, among=hidden)
    n_hidden = hidden.sum(-1)
    targets = []
    for t in range(n_targets):
        share = np.minimum(n_targets, n_hidden)
        targets.append(hidden & (rank % share[..., None] == (t % share)[..., None]))
    return np.stack(targets, axis=1)


def _random_ranks(
    rng: np.random.Generator, shape: tuple[int, ...], among: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Random ranks 0, 1, ... along the last axis; entries outside ``among`` rank last."""
    noise = rng.random(shape)
    if among is not None:
        noise = np.where(among, noise, 2.0)
    return noise.argsort(-1).argsort(-1)


def _module_order(loadings: NDArray[np.float32], n_blocks: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Order genes so that consecutive equal chunks are co-expression modules.

    Halves the genes along a random direction of loading space, then each half along another, and so on: a random
    projection tree (Dasgupta & Freund 2008, doi:10.1145/1374376.1374452). New directions at every step give new,
    balanced modules without a clustering to fit or to store.
    """

    def split(genes: NDArray[np.int64], n_leaves: int) -> list[NDArray[np.int64]]:
        if n_leaves == 1:
            return [genes]
        along = loadings[genes] @ rng.standard_normal(loadings.shape[1])
        ordered = genes[np.argsort(along, kind="stable")]
        half = len(genes) // 2
        return split(ordered[:half], n_leaves // 2) + split(ordered[half:], n_leaves // 2)

    return np.concatenate(split(np.arange(len(loadings)), n_blocks))


def _padded_blocks(order: NDArray[np.int64], n_blocks: int) -> NDArray[np.int64]:
    n_genes = len(order)
    blocks = np.full((n_blocks, -(-n_genes // n_blocks)), n_genes, dtype=np.int64)
    for row, genes in zip(blocks, np.array_split(order, n_blocks), strict=True):
        row[: len(genes)] = genes
    return blocks
