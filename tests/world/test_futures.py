"""Futures: as many as there are separate places to which cells of one place go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from genejepa.world.futures import futures_of, modes_of
from genejepa.world.transitions import match

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

DIM = 6


def cloud(rng: np.random.Generator, n: int, *, at: float | tuple[float, ...] = 0.0) -> NDArray[np.float64]:
    """Normal cells around a place on the first axes."""
    centre = np.zeros(DIM)
    centre[: np.size(at)] = at
    return rng.normal(size=(n, DIM)) + centre


def skewed(rng: np.random.Generator) -> NDArray[np.float64]:
    return np.column_stack([rng.gamma(1.5, 2.0, 400), rng.normal(size=(400, DIM - 1))])


def flat(rng: np.random.Generator) -> NDArray[np.float64]:
    return np.column_stack([rng.uniform(-6, 6, 400), rng.normal(size=(400, DIM - 1))])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [lambda rng: cloud(rng, 400), skewed, flat], ids=["normal", "skewed", "flat"])
def test_one_population_has_one_mode(shape: Callable[[np.random.Generator], NDArray[np.float64]], seed: int) -> None:
    states = shape(np.random.default_rng(seed))
    assert set(modes_of(states, most=8, seed=seed).tolist()) == {0}


@pytest.mark.parametrize("places", [(0, 9), (0, 9, -9), ((0, 0), (9, 0), (0, 9), (9, 9))])
def test_separate_places_are_modes(places: tuple[float | tuple[float, ...], ...], rng: np.random.Generator) -> None:
    sizes = [150 + 60 * number for number in range(len(places))]
    truth = np.repeat(np.arange(len(places)), sizes)
    order = rng.permutation(len(truth))
    states = np.concatenate([cloud(rng, n, at=at) for n, at in zip(sizes, places, strict=True)])[order]
    found = modes_of(states, most=8, seed=0)
    pairs = set(zip(found.tolist(), truth[order].tolist(), strict=True))
    assert len(pairs) == len(set(found.tolist())) == len(places)


def test_a_gap_is_needed(rng: np.random.Generator) -> None:
    """Where two clouds touch, one cannot tell where one ends."""
    near = np.concatenate([cloud(rng, 200), cloud(rng, 200, at=2.5)])
    assert modes_of(near, most=8, seed=0).max() == 0


def test_stragglers_are_no_mode(rng: np.random.Generator) -> None:
    states = np.concatenate([cloud(rng, 280), cloud(rng, 20, at=12.0)])
    assert modes_of(states, most=8, seed=0).max() == 0
    states = np.concatenate([cloud(rng, 240), cloud(rng, 60, at=12.0)])
    assert np.bincount(modes_of(states, most=8, seed=0)).tolist() in ([240, 60], [60, 240])


@pytest.mark.parametrize("n", [1, 3, 9, 10, 25])
def test_few_cells(n: int, rng: np.random.Generator) -> None:
    assert modes_of(cloud(rng, n), most=8, seed=0).tolist() == [0] * n


def test_cells_that_are_all_the_same() -> None:
    assert modes_of(np.ones((50, DIM), dtype=np.float32), most=8, seed=0).tolist() == [0] * 50


def test_no_more_than_allowed(rng: np.random.Generator) -> None:
    states = np.concatenate([cloud(rng, 100, at=9.0 * k) for k in range(3)])
    assert modes_of(states, most=1, seed=0).max() == 0
    assert modes_of(states, most=2, seed=0).max() <= 1


def futures(
    *transitions: tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]], most: int = 8
) -> list[list[set[int]]]:
    """For every transition, the futures that cells of each cloud before have."""
    before = [np.concatenate(clouds).astype(np.float32) for clouds, _ in transitions]
    after = [np.concatenate(clouds).astype(np.float32) for _, clouds in transitions]
    pairs = [match(b, a, np.random.default_rng(0)) for b, a in zip(before, after, strict=True)]
    first, second = ([modes_of(states, most=8, seed=0) for states in side] for side in (before, after))
    labels = [label for label, _ in futures_of(pairs, first, second, before, after, most=most)]
    found = []
    for (clouds, _), own, label in zip(transitions, pairs, labels, strict=True):
        origin = np.repeat(np.arange(len(clouds)), [len(cells) for cells in clouds])[own.before]
        found.append([set(label[origin == number].tolist()) for number in range(len(clouds))])
    return found


def test_types_that_go_their_own_ways_have_one_future(rng: np.random.Generator) -> None:
    before = [cloud(rng, 100), cloud(rng, 100, at=20.0)]
    after = [cloud(rng, 100, at=(0.0, 6.0)), cloud(rng, 100, at=(20.0, -6.0))]
    assert futures((before, after)) == [[{0}, {0}]]


def test_a_type_that_splits_has_two(rng: np.random.Generator) -> None:
    after = [cloud(rng, 70, at=9.0), cloud(rng, 130, at=-9.0)]
    assert futures(([cloud(rng, 200)], after)) == [[{0, 1}]]


def test_only_the_type_that_splits_has_two(rng: np.random.Generator) -> None:
    before = [cloud(rng, 200), cloud(rng, 200, at=(0.0, 60.0))]
    after = [cloud(rng, 100, at=9.0), cloud(rng, 100, at=-9.0), cloud(rng, 200, at=(0.0, 60.0))]
    ((split, single),) = futures((before, after))
    assert split == {0, 1}
    assert len(single) == 1


def test_futures_are_numbered_by_where_they_end(rng: np.random.Generator) -> None:
    """Two cultures split with different shares, so the most frequent end of one is the rarer one of the other."""
    labels = []
    for left, right in ((140, 60), (60, 140)):
        before, after = cloud(rng, 200), [cloud(rng, left, at=9.0), cloud(rng, right, at=-9.0)]
        labels.append((before, np.concatenate(after)))
    pairs = [match(b.astype(np.float32), a.astype(np.float32), rng) for b, a in labels]
    first, second = ([modes_of(states, most=8, seed=0) for states in side] for side in zip(*labels, strict=True))
    told = futures_of(pairs, first, second, [b for b, _ in labels], [a for _, a in labels], most=8)
    found = [own for own, _ in told]
    for (own, chance), p in zip(told, pairs, strict=True):
        shares = np.bincount(own, p.weight, 8)
        np.testing.assert_allclose(chance, np.broadcast_to(shares, chance.shape))  # the same for every cell of a mode
    ends = [
        {(int(k), bool(a[j, 0] > 0)) for k, j in zip(own, p.after, strict=True)}
        for own, p, (_, a) in zip(found, pairs, labels, strict=True)
    ]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 2
    for own, p, share in zip(found, pairs, (0.7, 0.3), strict=True):
        (code,) = {k for k, on_right in ends[0] if on_right}
        assert p.weight[own == code].sum() == pytest.approx(share, abs=0.02)


def test_two_ends_are_two_futures_even_if_both_are_near_the_same_known_one(rng: np.random.Generator) -> None:
    known = ([cloud(rng, 200)], [cloud(rng, 100, at=9.0), cloud(rng, 100, at=-9.0)])
    moved = ([cloud(rng, 200)], [cloud(rng, 100, at=10.0), cloud(rng, 100, at=1.0)])
    assert futures(known, moved) == [[{0, 1}], [{0, 1}]]


def test_no_more_futures_than_allowed(rng: np.random.Generator) -> None:
    after = [cloud(rng, 100, at=12.0 * k) for k in (-1, 0, 1)]
    assert futures(([cloud(rng, 300)], after), most=3) == [[{0, 1, 2}]]
    assert futures(([cloud(rng, 300)], after), most=2) == [[{0, 1}]]
