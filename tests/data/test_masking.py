from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from genejepa.config import MaskConfig
from genejepa.data.masking import Masks, draw_masks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

N_GENES, N_CELLS = 45, 12
EIGHT = MaskConfig(n_blocks=8)


def draw(
    config: MaskConfig, *, n_genes: int = N_GENES, batch_size: int = N_CELLS, seed: int = 0, step: int = 0
) -> Masks:
    return draw_masks(config, n_genes=n_genes, batch_size=batch_size, seed=seed, step=step)


def equal(first: Masks, second: Masks) -> bool:
    return np.array_equal(first.blocks, second.blocks) and np.array_equal(first.views, second.views)


def test_masks_are_a_function_of_seed_and_step(
    global_rng_untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    with global_rng_untouched():
        first = draw(EIGHT, seed=3, step=9)
        draw(EIGHT, seed=3, step=10)
        assert equal(first, draw(EIGHT, seed=3, step=9))


@pytest.mark.parametrize(("seed", "step"), [(3, 10), (4, 9), (9, 3)])
def test_masks_differ_between_seeds_and_steps(seed: int, step: int) -> None:
    first, other = draw(EIGHT, seed=3, step=9), draw(EIGHT, seed=seed, step=step)
    assert not np.array_equal(first.blocks, other.blocks)
    assert not np.array_equal(first.views, other.views)


@pytest.mark.parametrize("n_genes", [5, 8, 45, 64], ids="{} genes".format)
def test_blocks_partition_the_panel_evenly(n_genes: int) -> None:
    for step in range(5):
        blocks = draw(EIGHT, n_genes=n_genes, step=step).blocks
        assert blocks.shape[0] == 8
        assert blocks.dtype == np.int64
        assert np.array_equal(np.sort(blocks[blocks < n_genes]), np.arange(n_genes))
        assert blocks.max() <= n_genes
        sizes = (blocks < n_genes).sum(axis=1)
        assert sizes.max() - sizes.min() <= 1
        filled = np.arange(blocks.shape[1])[None] < sizes[:, None]
        assert np.array_equal(blocks < n_genes, filled)  # empty places come last


def test_second_view_complements_the_first() -> None:
    views = draw(EIGHT).views
    assert views.shape == (2, N_CELLS, 8)
    assert np.array_equal(views[1], ~views[0])


def test_cells_of_a_batch_see_different_blocks() -> None:
    assert len(np.unique(draw(EIGHT).views[0], axis=0)) > N_CELLS // 2


@pytest.mark.parametrize(
    ("low", "high", "fewest", "most"),
    [(0.3, 0.7, 5, 11), (0.5, 0.5, 8, 8), (0.0, 1.0, 1, 15), (0.0, 0.0, 1, 1), (1.0, 1.0, 15, 15)],
    ids=["default", "half", "any", "least", "most"],
)
def test_first_view_keeps_a_share_within_bounds(low: float, high: float, fewest: int, most: int) -> None:
    config = MaskConfig(n_blocks=16, min_keep=low, max_keep=high)
    visible = draw(config, batch_size=400).views[0].sum(axis=1)
    assert (visible.min(), visible.max()) == (fewest, most)
    assert visible.mean() == pytest.approx((fewest + most) / 2, abs=0.7)


def test_every_block_is_seen_equally_often() -> None:
    config = MaskConfig(n_blocks=8, min_keep=0.5, max_keep=0.5)
    seen = draw(config, batch_size=2000).views[0].mean(axis=0)
    np.testing.assert_allclose(seen, 0.5, atol=0.06)  # five standard errors


def test_blocks_are_random_sets() -> None:
    blocks = np.stack([draw(EIGHT, n_genes=64, step=step).blocks for step in range(400)])  # (step, block, place)
    block_of_gene = np.argsort(blocks.reshape(400, 64), axis=1) // 8
    together = (block_of_gene[:, :, None] == block_of_gene[:, None]).mean(axis=0)[~np.eye(64, dtype=bool)]
    assert together.mean() == pytest.approx(7 / 63)
    np.testing.assert_allclose(together, 7 / 63, atol=0.08)  # five standard errors


def test_any_number_of_blocks_from_two_partitions_the_panel() -> None:
    for n_blocks in (2, 3, 10):
        masks = draw(MaskConfig(n_blocks=n_blocks))
        assert np.array_equal(np.sort(masks.blocks[masks.blocks < N_GENES]), np.arange(N_GENES))
        assert masks.views.shape == (2, N_CELLS, n_blocks)
        assert masks.views.any(axis=-1).all()
