from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest

from genejepa.config import Transform
from genejepa.data import batches
from genejepa.data.batches import BatchScaling
from genejepa.data.normalization import Normalizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from genejepa.data.panel import PanelCounts

N_OBS, N_GENES = 300, 25
NAMES = ("one", "two", "three")
EVERYTHING = np.arange(N_OBS)

each_transform = pytest.mark.parametrize("transform", get_args(Transform))


@pytest.fixture
def dense(rng: np.random.Generator) -> NDArray[np.float32]:
    """Counts of three batches of different size, whose genes differ in mean and in spread."""
    mean = rng.gamma(2.0, 2.0, size=N_GENES) * rng.lognormal(0.0, 0.5, size=(3, N_GENES))
    spread = rng.uniform(0.1, 1.0, size=(3, N_GENES))
    code = codes_of_cells()
    drawn = rng.poisson(mean[code] * rng.lognormal(0.0, spread[code])).astype(np.float32)
    drawn[:, 3] = 0
    drawn[code == 1, 8] = 0
    return drawn


def codes_of_cells() -> NDArray[np.int64]:
    return np.repeat(np.arange(3), [150, 100, 50])[np.random.default_rng(3).permutation(N_OBS)]


@pytest.fixture
def counts(dense: NDArray[np.float32], as_panel: Callable[[NDArray[np.float32]], PanelCounts]) -> PanelCounts:
    return replace(as_panel(dense), batch=codes_of_cells())


def fitted(counts: PanelCounts, transform: Transform = "sqrt", names: tuple[str, ...] = NAMES) -> Normalizer:
    normalizer = Normalizer.fit(counts, transform=transform)
    return replace(normalizer, batches=BatchScaling.fit(counts, normalizer, names))


def plain(normalizer: Normalizer) -> Normalizer:
    return replace(normalizer, batches=None)


def unknown(counts: PanelCounts) -> PanelCounts:
    return replace(counts, batch=None)


@each_transform
@pytest.mark.parametrize("chunk", [4096, 7], ids=["one chunk", "chunks of 7"])
def test_values_follow_the_definition(
    counts: PanelCounts, transform: Transform, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_CHUNK", chunk)
    normalizer = fitted(counts, transform)
    before = plain(normalizer).dense(unknown(counts), EVERYTHING)[0].astype(np.float64)
    code = codes_of_cells()
    deviations = np.stack([before[code == b].std(axis=0) for b in range(3)])
    shares = np.bincount(code) / N_OBS
    pooled = np.sqrt((shares[:, None] * deviations**2).sum(axis=0))
    expected = before.copy()
    for b in range(3):
        own = expected[code == b]
        expected[code == b] = (own - own.mean(axis=0)) * (pooled + 0.3) / (deviations[b] + 0.3)
    values, _ = normalizer.dense(counts, EVERYTHING)
    np.testing.assert_allclose(values, np.clip(expected, -10, 10), atol=1e-4)


@each_transform
def test_batches_have_no_mean_of_their_own_and_spread_alike(counts: PanelCounts, transform: Transform) -> None:
    normalizer = fitted(counts, transform)
    before, _ = plain(normalizer).dense(unknown(counts), EVERYTHING)
    after, _ = normalizer.dense(counts, EVERYTHING)
    code = codes_of_cells()

    def by_batch(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        parts = [values[code == b] for b in range(3)]
        return np.stack([part.mean(axis=0) for part in parts]), np.stack([part.std(axis=0) for part in parts])

    (mean_before, deviation_before), (mean_after, deviation_after) = by_batch(before), by_batch(after)
    assert np.abs(mean_before).max() > 0.5
    assert np.abs(mean_after).max() < 1e-3
    varies = deviation_before.min(axis=0) > 0.3
    assert varies.sum() > 10
    ratio_before = deviation_before.max(axis=0)[varies] / deviation_before.min(axis=0)[varies]
    ratio_after = deviation_after.max(axis=0)[varies] / deviation_after.min(axis=0)[varies]
    # Not quite equal: 0.3 is added to the deviations before they are divided.
    assert np.log(ratio_after).max() < 0.5 * np.log(ratio_before).max()


def test_a_gene_that_is_constant_in_a_batch_is_not_blown_up(counts: PanelCounts) -> None:
    scaling = fitted(counts).batches
    assert scaling is not None
    assert np.isfinite(scaling.gain).all()
    assert scaling.gain[:, 3] == pytest.approx(1.0)  # a gene without any count
    values, _ = fitted(counts).dense(counts, EVERYTHING)
    assert np.abs(values[codes_of_cells() == 1, 8]).max() < 1e-4  # a gene without counts in this batch


def test_a_cell_of_unknown_batch_is_left_as_it_is(counts: PanelCounts) -> None:
    normalizer = fitted(counts)
    expected, _ = plain(normalizer).dense(unknown(counts), EVERYTHING)
    np.testing.assert_array_equal(normalizer.dense(unknown(counts), EVERYTHING)[0], expected)
    some = replace(counts, batch=np.where(EVERYTHING % 2, -1, counts.batch_of(EVERYTHING)))
    values, _ = normalizer.dense(some, EVERYTHING)
    np.testing.assert_array_equal(values[1::2], expected[1::2])
    np.testing.assert_array_equal(values[::2], normalizer.dense(counts, EVERYTHING)[0][::2])


def test_order_of_the_batches_changes_nothing(counts: PanelCounts) -> None:
    order = [2, 0, 1]
    other = replace(counts, batch=np.argsort(order)[codes_of_cells()])
    names = tuple(NAMES[b] for b in order)
    expected, _ = fitted(counts).dense(counts, EVERYTHING)
    found, _ = fitted(other, names=names).dense(other, EVERYTHING)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_batch_is_no_correction(counts: PanelCounts) -> None:
    alone = replace(counts, batch=np.zeros(N_OBS, dtype=np.int64))
    normalizer = fitted(alone, names=("one",))
    expected, _ = plain(normalizer).dense(unknown(alone), EVERYTHING)
    np.testing.assert_allclose(normalizer.dense(alone, EVERYTHING)[0], expected, atol=1e-3)


@pytest.mark.parametrize("keep", [None, np.arange(N_GENES) % 3 > 0], ids=["all genes", "some genes"])
def test_stored_counts_add_to_the_zeros_of_their_batch(counts: PanelCounts, keep: NDArray[np.bool_] | None) -> None:
    normalizer = fitted(counts)
    index = np.array([5, 250, 5, 13, 100])
    stored = normalizer.sparse(counts, index, keep=keep)
    np.testing.assert_array_equal(stored.batch, codes_of_cells()[index])
    values = normalizer.zero_values[codes_of_cells()[index]].copy()
    np.add.at(values, (stored.rows, stored.genes), stored.excess)
    expected, _ = normalizer.dense(counts, index, keep=keep)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert normalizer.zero_values.shape == (4, N_GENES)
    assert np.ptp(normalizer.zero_values, axis=0).max() > 0.1


def test_adjusted_values_are_clipped(
    counts: PanelCounts, as_panel: Callable[[NDArray[np.float32]], PanelCounts]
) -> None:
    outliers = np.diag(np.full(N_GENES, 1e6)).astype(np.float32)
    for code in range(3):
        cells = replace(as_panel(outliers), batch=np.full(N_GENES, code))
        values, _ = fitted(counts).dense(cells, np.arange(N_GENES))
        assert np.abs(values).max() <= 10.0


def test_frequencies_are_those_of_the_batch_and_of_all_cells(counts: PanelCounts, dense: NDArray[np.float32]) -> None:
    normalizer = fitted(counts)
    scaling = normalizer.batches
    assert scaling is not None
    np.testing.assert_allclose(scaling.frequency.sum(axis=1), 1.0, atol=1e-5)
    assert (scaling.frequency > 0).all()
    np.testing.assert_array_equal(scaling.frequency[-1], normalizer.frequency)
    for b in range(3):
        own = dense[codes_of_cells() == b]
        np.testing.assert_allclose(scaling.frequency[b], own.sum(axis=0) / own.sum(), atol=2e-3)


def test_names_become_rows_and_strangers_minus_one(counts: PanelCounts) -> None:
    scaling = fitted(counts).batches
    assert scaling is not None
    np.testing.assert_array_equal(scaling.codes(["three", "four", "one", "nan"]), [2, -1, 0, -1])
    assert scaling.codes([]).shape == (0,)


def test_names_and_rows_must_fit(counts: PanelCounts) -> None:
    scaling = fitted(counts).batches
    assert scaling is not None
    with pytest.raises(ValueError, match=r"2 batches need 3 rows, found \[4, 4, 4\]"):
        replace(scaling, names=("one", "two"))


def test_a_subset_of_the_cells_keeps_its_batches(counts: PanelCounts) -> None:
    chosen = np.array([7, 2, 299])
    normalizer = fitted(counts)
    found, _ = normalizer.dense(counts.subset(chosen), np.arange(3))
    np.testing.assert_array_equal(found, normalizer.dense(counts, chosen)[0])
