from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from genejepa.config import MaskConfig
from genejepa.data import loader
from genejepa.data.loader import StepDataset
from genejepa.data.normalization import Normalizer, Thinning
from genejepa.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from genejepa.data.panel import PanelCounts

N_OBS, N_GENES, BATCH_SIZE = 200, 20, 40


@pytest.fixture
def dense(rng: np.random.Generator) -> NDArray[np.float32]:
    """Counts of cells of different depth, with an empty cell."""
    rates = rng.gamma(1.0, 4.0, size=N_GENES)[None] * rng.lognormal(0.0, 0.5, size=(N_OBS, 1))
    drawn = rng.poisson(rates).astype(np.float32)
    drawn[4] = 0
    return drawn


@pytest.fixture
def counts(dense: NDArray[np.float32], as_panel: Callable[[NDArray[np.float32]], PanelCounts]) -> PanelCounts:
    return as_panel(dense)


@pytest.fixture
def normalizer(counts: PanelCounts) -> Normalizer:
    return Normalizer.fit(counts, transform="sqrt")


def make_dataset(
    counts: PanelCounts, *, seed: int = 0, rank: int = 0, world_size: int = 1, **masks: Any
) -> StepDataset:
    return StepDataset(
        counts,
        Normalizer.fit(counts, transform="sqrt"),
        masks=MaskConfig(n_blocks=4, **masks),
        batch_size=BATCH_SIZE,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


# Loss of molecules


def test_a_thinned_cell_loses_molecules_and_only_them(
    counts: PanelCounts,
    dense: NDArray[np.float32],
    normalizer: Normalizer,
    as_panel: Callable[[NDArray[np.float32]], PanelCounts],
    rng: np.random.Generator,
) -> None:
    kept = np.where(np.arange(N_OBS) % 2, 0.3, 1.0)
    everything = np.arange(N_OBS)
    values, found = normalizer.dense(counts, everything, thinning=Thinning(kept, rng))
    assert (found <= dense).all()
    assert (found >= 0).all()
    np.testing.assert_array_equal(found, np.rint(found))
    lost = np.any(found < dense, axis=1)
    assert lost.shape == (N_OBS,)
    assert lost[1::2].mean() > 0.9
    assert not lost[::2].any()
    expected, _ = normalizer.dense(as_panel(found), everything)  # cells that never had the lost molecules
    np.testing.assert_allclose(values, expected, atol=1e-5)
    np.testing.assert_array_equal(values[::2], normalizer.dense(counts, everything)[0][::2])


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_molecules_are_lost_independently_with_the_given_share(share: float, rng: np.random.Generator) -> None:
    n = 20_000
    found = Thinning(np.full(n, share), rng).apply(np.arange(n), np.full(n, 10.0, dtype=np.float32))
    deviation = np.sqrt(10 * share * (1 - share))  # binomial
    assert abs(found.mean() - 10 * share) < 5 * deviation / np.sqrt(n)
    assert found.std() == pytest.approx(deviation, rel=0.05)


def test_thinning_leaves_its_input_alone(counts: PanelCounts, normalizer: Normalizer, rng: np.random.Generator) -> None:
    before = counts.data.copy()
    normalizer.dense(counts, np.arange(N_OBS), thinning=Thinning(np.full(N_OBS, 0.1), rng))
    np.testing.assert_array_equal(counts.data, before)


def test_a_cell_that_loses_all_molecules_is_an_empty_cell(
    counts: PanelCounts, normalizer: Normalizer, rng: np.random.Generator
) -> None:
    values, found = normalizer.dense(counts, np.array([0, 4]), thinning=Thinning(np.full(2, 1e-12), rng))
    assert not found.any()
    np.testing.assert_array_equal(values[0], values[1])
    assert np.isfinite(values).all()


# Training steps


def thinned_cells(dataset: StepDataset, step: int) -> NDArray[np.bool_]:
    batch = dataset[step]
    changed: NDArray[np.bool_] = (batch["values"] != batch["whole_values"]).any(1).numpy()
    assert not (changed & ~batch["thinned"].numpy()).any()  # a thinned cell may keep all its molecules by chance
    return changed


def test_targets_and_counts_are_those_of_whole_cells(
    counts: PanelCounts, dense: NDArray[np.float32], normalizer: Normalizer
) -> None:
    dataset = make_dataset(counts)
    batch = dataset[2]
    cells = dataset.cells(2)
    np.testing.assert_array_equal(batch["whole_values"], normalizer.dense(counts, cells)[0])
    np.testing.assert_array_equal(batch["counts"], dense[cells])
    assert 0 < thinned_cells(dataset, 2).sum() < BATCH_SIZE  # the others are equal to the bit


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_the_given_share_of_the_cells_is_thinned(counts: PanelCounts, fraction: float) -> None:
    dataset = make_dataset(counts, thinned_fraction=fraction, min_depth=0.01)
    share = np.mean([thinned_cells(dataset, step) for step in range(50)])
    assert share == pytest.approx(fraction, abs=0.06)  # a cell may keep all its molecules by chance


def test_without_thinning_the_views_read_the_very_same_values(counts: PanelCounts) -> None:
    batch = make_dataset(counts, thinned_fraction=0.0)[0]
    assert batch["values"].data_ptr() == batch["whole_values"].data_ptr()
    assert torch.equal(batch["values"], batch["whole_values"])


def test_fractional_values_are_not_thinned(counts: PanelCounts) -> None:
    corrected = replace(counts, data=np.where(np.arange(len(counts.data)) % 3, counts.data, 0.9 * counts.data))
    assert make_dataset(corrected, thinned_fraction=1.0)[0]["thinned"].all()
    expected = replace(counts, data=0.37 * counts.data)  # no molecules that could be lost
    batch = make_dataset(expected, thinned_fraction=1.0)[0]
    assert not batch["thinned"].any()
    assert torch.equal(batch["values"], batch["whole_values"])


def test_depths_are_log_uniform(counts: PanelCounts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NDArray[np.float64]] = []

    def recorded(kept: NDArray[np.float64], rng: np.random.Generator) -> Thinning:
        seen.append(kept)
        return Thinning(kept, rng)

    monkeypatch.setattr(loader, "Thinning", recorded)
    dataset = make_dataset(counts, min_depth=0.1)
    for step in range(100):
        dataset[step]
    kept = np.concatenate(seen)
    thinned = np.log(kept)
    assert len(thinned) == pytest.approx(0.5 * 100 * BATCH_SIZE, rel=0.06)
    assert thinned.min() >= np.log(0.1)
    quantiles = np.quantile(thinned, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles, np.log(0.1) * np.array([0.75, 0.5, 0.25]), atol=0.12)


def test_thinning_is_a_function_of_seed_step_and_rank(
    counts: PanelCounts, global_rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    with global_rng_untouched():
        dataset = make_dataset(counts)
        first = dataset[3]["values"]
        for step in (7, 0):
            dataset[step]
        assert torch.equal(dataset[3]["values"], first)
        assert torch.equal(make_dataset(counts)[3]["values"], first)
    one_epoch_later = 3 + dataset.steps_per_epoch
    patterns = [
        thinned_cells(dataset, 3),
        thinned_cells(dataset, one_epoch_later),
        thinned_cells(make_dataset(counts, seed=1), 3),
    ]
    assert len({pattern.tobytes() for pattern in patterns}) == 3
    shares = [make_dataset(counts, rank=rank, world_size=2) for rank in range(2)]
    assert not np.array_equal(thinned_cells(shares[0], 3), thinned_cells(shares[1], 3))


@pytest.mark.parametrize("settings", [{"thinned_fraction": 1.1}, {"thinned_fraction": -0.1}, {"min_depth": 0.0}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        replace(MaskConfig(), **settings)  # type: ignore[arg-type]  # numbers by name
