from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from genejepa.config import MaskConfig
from genejepa.data.axes import principal_axes
from genejepa.data.masking import Masks, draw_masks
from genejepa.data.normalization import Normalizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from genejepa.data.panel import PanelCounts

N_GENES, N_CELLS = 45, 12
MODULES = np.arange(64) % 4

only_modules = MaskConfig(n_blocks=8, module_fraction=1.0)
only_random = MaskConfig(n_blocks=8, module_fraction=0.0)

both_kinds = pytest.mark.parametrize("config", [only_modules, only_random], ids=["modules", "random"])


def draw(
    config: MaskConfig, *, n_genes: int = N_GENES, batch_size: int = N_CELLS, seed: int = 0, step: int = 0
) -> Masks:
    loadings = np.random.default_rng(7).standard_normal((n_genes, 5)).astype(np.float32)
    return draw_masks(config, loadings=loadings, batch_size=batch_size, seed=seed, step=step)


def equal(first: Masks, second: Masks) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("blocks", "views", "targets"))


@both_kinds
def test_masks_are_a_function_of_seed_and_step(
    config: MaskConfig, global_rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    with global_rng_untouched():
        first = draw(config, seed=3, step=9)
        draw(config, seed=3, step=10)
        assert equal(first, draw(config, seed=3, step=9))


@both_kinds
@pytest.mark.parametrize(("seed", "step"), [(3, 10), (4, 9), (9, 3)])
def test_masks_differ_between_seeds_and_steps(config: MaskConfig, seed: int, step: int) -> None:
    first, other = draw(config, seed=3, step=9), draw(config, seed=seed, step=step)
    assert not np.array_equal(first.blocks, other.blocks)
    assert not np.array_equal(first.views, other.views)


@both_kinds
@pytest.mark.parametrize("n_genes", [5, 8, 45, 64], ids="{} genes".format)
def test_blocks_partition_the_panel_evenly(config: MaskConfig, n_genes: int) -> None:
    for step in range(5):
        blocks = draw(config, n_genes=n_genes, step=step).blocks
        assert blocks.shape[0] == 8
        assert blocks.dtype == np.int64
        assert np.array_equal(np.sort(blocks[blocks < n_genes]), np.arange(n_genes))
        assert blocks.max() <= n_genes
        sizes = (blocks < n_genes).sum(axis=1)
        assert sizes.max() - sizes.min() <= 1
        filled = np.arange(blocks.shape[1])[None] < sizes[:, None]
        assert np.array_equal(blocks < n_genes, filled)  # empty places come last


def test_second_view_complements_the_first() -> None:
    views = draw(only_random).views
    assert views.shape == (2, N_CELLS, 8)
    assert np.array_equal(views[1], ~views[0])


def test_cells_of_a_batch_see_different_blocks() -> None:
    assert len(np.unique(draw(only_random).views[0], axis=0)) > N_CELLS // 2


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


@pytest.mark.parametrize("n_targets", [1, 2, 3])
def test_targets_deal_out_all_hidden_blocks(n_targets: int) -> None:
    config = MaskConfig(n_blocks=16, n_targets=n_targets)  # every view hides five blocks at least
    masks = draw(config, batch_size=50)
    assert masks.targets.shape == (2, n_targets, 50, 16)
    assert not (masks.targets & masks.views[:, None]).any()
    assert np.array_equal(masks.targets.sum(axis=1), ~masks.views)  # each hidden block once: disjoint, complete
    sizes = masks.targets.sum(axis=-1)
    assert (sizes.max(axis=1) - sizes.min(axis=1)).max() <= 1
    assert sizes.min() >= 1


def test_more_targets_than_hidden_blocks_repeat_some() -> None:
    config = MaskConfig(n_blocks=4, n_targets=6, min_keep=0.5, max_keep=0.75)
    masks = draw(config, batch_size=50)
    assert masks.targets.shape == (2, 6, 50, 4)
    assert not (masks.targets & masks.views[:, None]).any()
    assert np.array_equal(masks.targets.any(axis=1), ~masks.views)
    assert (masks.targets.sum(axis=-1) == 1).all()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_share_of_steps_with_modules(fraction: float) -> None:
    config = MaskConfig(n_blocks=2, module_fraction=fraction)
    # Two modules that one direction separates: a step with modules never mixes them.
    loadings = np.array([[1.0]] * 20 + [[-1.0]] * 20, dtype=np.float32)
    halves = [
        {
            frozenset(block.tolist())
            for block in draw_masks(config, loadings=loadings, batch_size=2, seed=0, step=s).blocks
        }
        for s in range(100)
    ]
    pure = {frozenset(range(20)), frozenset(range(20, 40))}
    assert np.mean([half == pure for half in halves]) == pytest.approx(fraction, abs=0.2)


@pytest.fixture
def planted(rng: np.random.Generator) -> NDArray[np.float32]:
    """Counts of 200 cells over 64 genes in four modules, each with an activity of its own."""
    activity = rng.lognormal(0.0, 0.8, size=(200, 4))
    return rng.poisson(3.0 * activity[:, MODULES]).astype(np.float32)


def mean_correlation_within(blocks: NDArray[np.int64], correlation: NDArray[np.float64]) -> float:
    return float(np.mean([correlation[np.ix_(b, b)][~np.eye(len(b), dtype=bool)].mean() for b in blocks]))


def test_module_blocks_are_more_correlated_than_random_ones(
    planted: NDArray[np.float32], as_panel: Callable[[NDArray[np.float32]], PanelCounts]
) -> None:
    counts = as_panel(planted)
    normalizer = Normalizer.fit(counts, transform="sqrt")
    loadings = principal_axes(counts, normalizer, n_components=16, seed=0).module_loadings()
    values, _ = normalizer.dense(counts, np.arange(counts.n_obs))
    correlation: NDArray[np.float64] = np.asarray(np.corrcoef(values, rowvar=False))

    def average(config: MaskConfig) -> float:
        steps = [draw_masks(config, loadings=loadings, batch_size=2, seed=0, step=step) for step in range(10)]
        return float(np.mean([mean_correlation_within(masks.blocks, correlation) for masks in steps]))

    assert average(only_modules) > average(only_random) + 0.2
