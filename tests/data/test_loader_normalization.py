from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
import torch
from scipy import stats

from genejepa.config import MaskConfig, Transform
from genejepa.data import normalization
from genejepa.data.loader import Batch, StepDataset, StepSampler, step_loader
from genejepa.data.normalization import Normalizer, cell_depth, sampling_deviation

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from genejepa.data.panel import PanelCounts

N_OBS, N_GENES = 23, 30

each_transform = pytest.mark.parametrize("transform", get_args(Transform))


@pytest.fixture
def dense(rng: np.random.Generator) -> NDArray[np.float32]:
    """Counts of cells of different depth, with an empty cell and an empty gene."""
    rates = rng.gamma(1.0, 2.0, size=N_GENES)[None] * rng.lognormal(0.0, 0.5, size=(N_OBS, 1))
    drawn = rng.poisson(rates).astype(np.float32)
    drawn[4] = 0
    drawn[:, 9] = 0
    return drawn


@pytest.fixture
def counts(dense: NDArray[np.float32], as_panel: Callable[[NDArray[np.float32]], PanelCounts]) -> PanelCounts:
    return as_panel(dense)


def make_dataset(
    counts: PanelCounts, *, batch_size: int = 7, seed: int = 0, rank: int = 0, world_size: int = 1
) -> StepDataset:
    return StepDataset(
        counts,
        Normalizer.fit(counts, transform="sqrt"),
        masks=MaskConfig(n_blocks=4),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        "values": batch["values"],
        "whole_values": batch["whole_values"],
        "batch": batch["batch"],
        "counts": batch["counts"],
        "blocks": batch["blocks"],
        "views": batch["views"],
        "step": batch["step"],
    }


def equal(first: Batch, second: Batch) -> bool:
    others = tensors(second)
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors(first).items())


# Loader


@pytest.mark.parametrize("batch_size", [2, 7, 22, 23, 100])
def test_every_cell_is_visited_in_every_epoch(counts: PanelCounts, batch_size: int) -> None:
    dataset = make_dataset(counts, batch_size=batch_size)
    size = min(batch_size, N_OBS)
    assert len(dataset) == -(-N_OBS // size)
    for epoch in range(3):
        steps = range(epoch * len(dataset), (epoch + 1) * len(dataset))
        batches = [dataset.cells(step) for step in steps]
        assert {len(cells) for cells in batches} == {size}
        visited = np.concatenate(batches)
        assert np.array_equal(np.sort(visited[:N_OBS]), np.arange(N_OBS))  # what follows fills up the last batch
        assert visited.min() >= 0
        assert visited.max() < N_OBS


def test_every_epoch_has_an_order_of_its_own(counts: PanelCounts) -> None:
    dataset = make_dataset(counts, batch_size=N_OBS)
    orders = {dataset.cells(step).tobytes() for step in range(5)}
    orders.add(make_dataset(counts, batch_size=N_OBS, seed=1).cells(0).tobytes())
    assert len(orders) == 6


def test_a_batch_is_a_function_of_its_step(
    counts: PanelCounts, global_rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    with global_rng_untouched():
        forward = make_dataset(counts)
        ahead = {step: forward[step] for step in range(9)}
        backward = make_dataset(counts)
        for step in (8, 0, 5, 5, 2):
            assert equal(backward[step], ahead[step])
    assert not equal(ahead[0], ahead[1])


def test_a_batch_holds_the_cells_of_its_step(counts: PanelCounts, dense: NDArray[np.float32]) -> None:
    dataset = make_dataset(counts)
    batch = dataset[3]
    np.testing.assert_array_equal(batch["counts"].numpy(), dense[dataset.cells(3)])
    assert int(batch["step"]) == 3
    assert batch["values"].shape == (7, N_GENES)
    assert batch["views"].shape == (2, 7, 4)
    assert batch["values"].dtype == batch["views"].dtype == torch.float32


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_of_the_ranks_are_disjoint_and_complete(counts: PanelCounts, world_size: int) -> None:
    whole = make_dataset(counts)
    shares = [make_dataset(counts, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 3, 5):
        batch = whole[step]
        parts = [share[step] for share in shares]
        place = [np.arange(7)[rank::world_size] for rank in range(world_size)]
        assert np.array_equal(np.sort(np.concatenate(place)), np.arange(7))
        assert sum(len(part["values"]) for part in parts) == 7
        for part, rows in zip(parts, place, strict=True):
            assert torch.equal(part["blocks"], batch["blocks"])
            assert torch.equal(part["whole_values"], batch["whole_values"][rows])
            assert torch.equal(part["counts"], batch["counts"][rows])
            assert torch.equal(part["views"], batch["views"][:, rows])


def test_sampler_counts_steps_over_epochs() -> None:
    sampler = StepSampler(4)
    assert len(sampler) == 4
    assert list(sampler) == [0, 1, 2, 3]
    sampler.set_epoch(2)
    assert list(sampler) == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("first_step", "epochs"),
    [(0, [[0, 1, 2, 3], [4, 5, 6, 7]]), (4, [[4, 5, 6, 7], [8, 9, 10, 11]]), (6, [[6, 7], [8, 9, 10, 11]])],
    ids=["start", "end of an epoch", "within an epoch"],
)
def test_sampler_begins_where_a_training_was_stopped(first_step: int, epochs: list[list[int]]) -> None:
    sampler = StepSampler(4, first_step=first_step)
    for epoch, steps in enumerate(epochs):
        sampler.set_epoch(epoch)
        assert list(sampler) == steps


def epochs_of(dataset: StepDataset, *, num_workers: int) -> list[Batch]:
    loader = step_loader(dataset, num_workers=num_workers)
    batches: list[Batch] = []
    for epoch in range(2):
        assert isinstance(loader.sampler, StepSampler)
        loader.sampler.set_epoch(epoch)
        batches.extend(loader)
    return batches


def test_workers_change_nothing(counts: PanelCounts) -> None:
    dataset = make_dataset(counts, batch_size=12)
    alone = epochs_of(dataset, num_workers=0)
    shared = epochs_of(dataset, num_workers=2)
    assert [int(batch["step"]) for batch in alone] == [0, 1, 2, 3]
    assert len(shared) == len(alone)
    assert all(equal(first, second) for first, second in zip(shared, alone, strict=True))


# Normalisation


def stabilise(scaled: NDArray[np.float64], transform: Transform) -> NDArray[np.float64]:
    stable: NDArray[np.float64] = np.sqrt(scaled) if transform == "sqrt" else np.log(1.0 + scaled)
    return stable


def poisson_deviation(mean_counts: NDArray[np.float64], transform: Transform) -> NDArray[np.float64]:
    """Deviation of transformed Poisson counts, by summing over the distribution."""
    n = np.arange(5000)
    probability = stats.poisson.pmf(n[:, None], np.maximum(mean_counts, 1e-3))
    value = stabilise(n.astype(np.float64), transform)[:, None]
    mean = (probability * value).sum(axis=0)
    deviation: NDArray[np.float64] = np.sqrt((probability * (value - mean) ** 2).sum(axis=0))
    return deviation


def naive_values(
    train: NDArray[np.float32],
    cells: NDArray[np.float32],
    transform: Transform,
    keep: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Values by the definition, over dense matrices in 64 bits."""
    counts = train.astype(np.float64)
    depth = counts.sum(axis=1)
    median = np.median(depth[depth > 0])
    frequency = (counts.sum(axis=0) + 0.5) / (counts.sum(axis=0) + 0.5).sum()
    stable = stabilise(counts / np.maximum(depth, 1)[:, None] * median, transform)
    noise = poisson_deviation(frequency * median, transform)
    scale = noise * np.sqrt((stable / noise).var(axis=0).mean())
    chosen = cells.astype(np.float64)
    if keep is not None:
        chosen, median = chosen * keep, median * frequency[keep].sum()
    scaled = chosen / np.maximum(chosen.sum(axis=1), 1)[:, None] * median
    values: NDArray[np.float64] = np.clip((stabilise(scaled, transform) - stable.mean(axis=0)) / scale, -10, 10)
    return values


@each_transform
def test_sampling_deviation_is_that_of_transformed_poisson_counts(transform: Transform) -> None:
    small = np.array([1e-3, 0.02, 0.5, 1.0, 7.0, 49.0])
    large = np.array([50.0, 80.0, 1000.0])
    found = sampling_deviation(np.concatenate([small, large]), transform)
    np.testing.assert_allclose(found[:6], poisson_deviation(small, transform), rtol=1e-6)
    np.testing.assert_allclose(found[6:], poisson_deviation(large, transform), rtol=0.02)


@each_transform
def test_sampling_deviation_of_rare_genes_has_a_floor(transform: Transform) -> None:
    found = sampling_deviation(np.array([0.0, 1e-9, 1e-3]), transform)
    assert found[0] == found[1] == found[2] > 0


@each_transform
@pytest.mark.parametrize("chunk", [4096, 5], ids=["one chunk", "chunks of 5"])
def test_values_follow_the_definition(
    counts: PanelCounts,
    dense: NDArray[np.float32],
    transform: Transform,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(normalization, "_CHUNK", chunk)
    normalizer = Normalizer.fit(counts, transform=transform)
    index = np.array([3, 0, 4, 22, 3])
    values, found = normalizer.dense(counts, index)
    np.testing.assert_allclose(values, naive_values(dense, dense[index], transform), atol=1e-5)
    np.testing.assert_array_equal(found, dense[index])
    assert values.dtype == found.dtype == np.float32


@each_transform
def test_training_values_are_centred_with_a_mean_variance_of_one(counts: PanelCounts, transform: Transform) -> None:
    values, _ = Normalizer.fit(counts, transform=transform).dense(counts, np.arange(N_OBS))
    np.testing.assert_allclose(values.mean(axis=0), 0.0, atol=1e-5)
    assert float(values.var(axis=0).mean()) == pytest.approx(1.0, rel=1e-4)
    assert values.var(axis=0).max() > 2 * values.var(axis=0)[values.var(axis=0) > 0].min()


def test_one_rule_for_the_depth_of_cells_whose_values_add_up_to_less_than_one(
    dense: NDArray[np.float32], as_panel: Callable[[NDArray[np.float32]], PanelCounts]
) -> None:
    small = as_panel(dense[dense.sum(1) > 0] / np.float32(2**13))
    assert cell_depth(small).max() < 1
    values, _ = Normalizer.fit(small, transform="sqrt").dense(small, np.arange(small.n_obs))
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)


@each_transform
def test_rounding_is_not_taken_for_variation(
    transform: Transform, as_panel: Callable[[NDArray[np.float32]], PanelCounts]
) -> None:
    alike = as_panel(np.outer(np.arange(1000) % 59 + 1, np.arange(1, 31)).astype(np.float32))  # they differ in depth
    normalizer = Normalizer.fit(alike, transform=transform)
    noise = sampling_deviation(normalizer.frequency.astype(np.float64) * normalizer.median_depth, transform)
    np.testing.assert_allclose(normalizer.scale, noise, rtol=1e-4)


@each_transform
def test_absent_genes_do_not_look_like_a_shallow_cell(
    counts: PanelCounts, dense: NDArray[np.float32], transform: Transform
) -> None:
    keep = np.arange(N_GENES) % 3 > 0
    values, found = Normalizer.fit(counts, transform=transform).dense(counts, np.arange(N_OBS), keep=keep)
    expected = naive_values(dense, dense, transform, keep)
    np.testing.assert_allclose(values[:, keep], expected[:, keep], atol=1e-5)
    np.testing.assert_array_equal(found[:, keep], dense[:, keep])


@each_transform
def test_counts_of_absent_genes_have_no_influence(
    counts: PanelCounts,
    dense: NDArray[np.float32],
    as_panel: Callable[[NDArray[np.float32]], PanelCounts],
    transform: Transform,
) -> None:
    keep = np.arange(N_GENES) % 2 > 0
    changed = as_panel(np.where(keep, dense, 1000.0).astype(np.float32))
    normalizer = Normalizer.fit(counts, transform=transform)
    expected, _ = normalizer.dense(counts, np.arange(N_OBS), keep=keep)
    found, _ = normalizer.dense(changed, np.arange(N_OBS), keep=keep)
    np.testing.assert_array_equal(found[:, keep], expected[:, keep])


def test_keeping_all_genes_is_no_subset(counts: PanelCounts) -> None:
    normalizer = Normalizer.fit(counts, transform="sqrt")
    expected, _ = normalizer.dense(counts, np.arange(N_OBS))
    found, _ = normalizer.dense(counts, np.arange(N_OBS), keep=np.ones(N_GENES, dtype=bool))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@each_transform
@pytest.mark.parametrize("keep", [None, np.arange(N_GENES) < 9], ids=["all genes", "some genes"])
def test_an_empty_cell_is_finite(counts: PanelCounts, transform: Transform, keep: NDArray[np.bool_] | None) -> None:
    values, found = Normalizer.fit(counts, transform=transform).dense(counts, np.array([4]), keep=keep)
    assert np.isfinite(values).all()
    assert not found.any()


@each_transform
@pytest.mark.parametrize("factor", [2, 30], ids="counts times {}".format)
def test_depth_is_removed(
    counts: PanelCounts,
    dense: NDArray[np.float32],
    as_panel: Callable[[NDArray[np.float32]], PanelCounts],
    transform: Transform,
    factor: int,
) -> None:
    normalizer = Normalizer.fit(counts, transform=transform)
    expected, _ = normalizer.dense(counts, np.arange(N_OBS))
    found, _ = normalizer.dense(as_panel(factor * dense), np.arange(N_OBS))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@each_transform
def test_outliers_are_clipped(
    counts: PanelCounts, as_panel: Callable[[NDArray[np.float32]], PanelCounts], transform: Transform
) -> None:
    outlier = np.zeros((1, N_GENES), dtype=np.float32)
    outlier[0, int(np.argmin(counts_of(counts)))] = 1e6
    normalizer = Normalizer.fit(counts, transform=transform)
    values, _ = normalizer.dense(as_panel(outlier), np.array([0]))
    assert np.abs(values).max() <= 10.0


def counts_of(counts: PanelCounts) -> NDArray[np.float64]:
    return np.bincount(counts.indices, counts.data, counts.n_genes).astype(np.float64)


def test_frequencies_are_shares_of_all_counts(counts: PanelCounts, dense: NDArray[np.float32]) -> None:
    frequency = Normalizer.fit(counts, transform="sqrt").frequency
    assert float(frequency.sum()) == pytest.approx(1.0, abs=1e-6)
    assert (frequency > 0).all()  # so that their logarithm is finite
    np.testing.assert_allclose(frequency, dense.sum(axis=0) / dense.sum(), atol=2e-3)


def test_data_without_counts_is_finite(as_panel: Callable[[NDArray[np.float32]], PanelCounts]) -> None:
    nothing = as_panel(np.zeros((3, 5), dtype=np.float32))
    values, _ = Normalizer.fit(nothing, transform="sqrt").dense(nothing, np.arange(3))
    assert np.isfinite(values).all()


def test_depth_of_a_cell_is_its_sum(counts: PanelCounts, dense: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(cell_depth(counts), dense.sum(axis=1))
