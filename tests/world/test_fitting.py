"""Fitting as a whole: what is left out is not looked at, and cells keep to their populations and futures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from genejepa.world import fitting
from genejepa.world.actions import Action, ActionSpace
from genejepa.world.fast import FastDynamics
from genejepa.world.fitting import Fitting
from genejepa.world.futures import FutureShares
from genejepa.world.linear import folds_of
from genejepa.world.transitions import Population, Transition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genejepa.world.network import TransitionNetwork

DIM = 5


class NoDecoder:
    """Nothing is decoded here."""


def cloud(rng: np.random.Generator, n: int, *, at: tuple[float, ...] = (0.0,)) -> NDArray[np.float32]:
    centre = np.zeros(DIM)
    centre[: len(at)] = at
    states: NDArray[np.float32] = (rng.normal(size=(n, DIM)) + centre).astype(np.float32)
    return states


def fitting_of(
    groups: Sequence[tuple[str, NDArray[np.float32], Sequence[tuple[Action, NDArray[np.float32]]]]],
    *,
    n_steps: int = 0,
) -> Fitting:
    """Groups of cells before, and after some actions."""
    states, pairs, n = [], [], 0

    def population(group: str, action: Action, cells: NDArray[np.float32]) -> Population:
        nonlocal n
        states.append(cells)
        n += len(cells)
        return Population(group, action, None, np.arange(n - len(cells), n))

    for group, before, ends in groups:
        source = population(group, Action(), before)
        pairs += [Transition(source, population(group, action, after), None) for action, after in ends]
    space = ActionSpace.of([pair.action for pair in pairs], has_time=False, gene_vectors={})
    every = np.concatenate(states)
    decoder: Any = NoDecoder()
    return Fitting(decoder, every, every, pairs, space, most_futures=8, n_steps=n_steps, seed=0)


def bent(z: NDArray[np.float32]) -> NDArray[np.float32]:
    """A change that no linear start has: as far as the state is from 0."""
    after: NDArray[np.float32] = z + 3 * np.abs(z)
    return after


A, B = Action(("A",)), Action(("B",))


def networks(own: Fitting) -> list[TransitionNetwork]:
    """What is trained without each fold."""
    groups = [pair.group for pair in own.pairs]
    found = []
    for training, _ in own._splits(folds_of(groups, most=3)):
        found.append(own._trained(training, *own._linear(training), FutureShares.of_examples(training)))
    return found


@pytest.mark.parametrize("splits", [False, True])
def test_what_is_left_out_changes_nothing(splits: bool, rng: np.random.Generator) -> None:
    """Else the network would be judged by groups that it knows, in part."""

    def ends(before: NDArray[np.float32], by: float) -> NDArray[np.float32]:
        way = np.where(np.arange(len(before)) % 2, 12.0, -12.0) if splits else np.zeros(len(before))
        after: NDArray[np.float32] = (before + by + way[:, None] * np.eye(DIM)[1]).astype(np.float32)
        return after

    befores = [cloud(rng, 60, at=(3.0 * k,)) for k in range(3)]
    found = []
    for last in (10.0, -20.0):
        shifts = (0.0, 5.0, last)
        groups = [(f"g{k}", b, [(A, ends(b, shift))]) for k, (b, shift) in enumerate(zip(befores, shifts, strict=True))]
        own = fitting_of(groups, n_steps=2)
        assert own.n_futures == 1 + splits
        found.append(networks(own))
    for fold in range(3):
        same = [
            np.array_equal(one, other)
            for one, other in zip(*(each[fold].state_dict().values() for each in found), strict=True)
        ]
        assert all(same) == (fold == 2)


def test_what_holds_in_groups_that_were_left_out_is_believed(rng: np.random.Generator) -> None:
    """Five groups, as the data sets of the field have them."""
    groups: list[Any] = []
    for k in range(5):
        before = cloud(rng, 150, at=(0.5 * k, -0.3 * k))
        groups.append((f"g{k}", before, [(A, bent(before))]))
    own = fitting_of(groups, n_steps=150)
    gate = own._belief(folds_of([name for name, *_ in groups], most=3)).gate
    assert gate > 0.5


def test_cells_are_drawn_once_for_a_population(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls of two kinds, more than are used, each of which has one future under both actions."""
    monkeypatch.setattr(fitting, "MOST_CELLS", 100)
    before = np.concatenate([cloud(rng, 200), cloud(rng, 200, at=(30.0,))])[rng.permutation(400)]
    first = before[:, :1] < 15
    ends = [(action, np.where(first, before + 5, before - 5).astype(np.float32)) for action in (A, B)]
    own = fitting_of([("g", before, ends)])
    assert own.n_futures == 1
    assert all(len(cells) == 100 for cells in own.chosen.values())
    assert len(own.chosen) == 3


def test_futures_of_one_action_are_the_same_for_all_doses(rng: np.random.Generator) -> None:
    """Six in ten go right after the low dose, and four in ten after the high one."""
    before = cloud(rng, 300)
    ends = []
    for dose, n_right in ((5.0, 180), (10.0, 120)):
        way = np.where(np.arange(300) < n_right, 15.0, -15.0)
        ends.append((Action(("B",), dose), (cloud(rng, 300) + way[:, None] * np.eye(DIM)[0]).astype(np.float32)))
    own = fitting_of([("g", before, ends)])
    assert own.n_futures == 2
    right = [{int(k) for k in e.future[e.after[:, 0] > 0]} for e in own.examples]
    assert right[0] == right[1]
    assert len(right[0]) == 1
    (code,) = right[0]
    assert FutureShares.of_examples(own.examples).of(("B",))[code] == pytest.approx(0.5, abs=0.02)
    linear = own._linear(own.examples)[1]
    for dose in (5.0, 10.0):
        vector = own.space.encode(Action(("B",), dose))
        moved = own.features(before.astype(np.float64), vector, 1.0) @ linear[code]
        assert moved[:, 0].mean() > 8


def test_what_a_minority_of_groups_does_is_no_future(rng: np.random.Generator) -> None:
    """One type of four splits: which of its ends another type would go to, nobody knows."""
    groups: list[Any] = []
    for k in range(4):
        before = cloud(rng, 120)
        way = np.where(np.arange(120) % 3, 12.0, -12.0) if k == 3 else np.full(120, 4.0)
        groups.append((f"g{k}", before, [(A, (before + way[:, None] * np.eye(DIM)[0]).astype(np.float32))]))
    many, one = fitting_of(groups), fitting_of(groups[3:])
    assert many.n_futures == one.n_futures == 2
    assert many._keep_usual_futures()
    assert not one._keep_usual_futures()
    assert (many.n_futures, one.n_futures) == (1, 2)
    assert not any(example.future.any() for example in many.examples)
    assert all(bool((example.chance == 1).all()) for example in many.examples)


SHARES = FutureShares({("A",): np.array([1.0, 0.0]), ("B",): np.array([0.4, 0.6]), ("C",): np.array([0.5, 0.5])})


@pytest.mark.parametrize(
    ("parts", "shares"),
    [
        (("A",), (1.0, 0.0)),
        (("B",), (0.4, 0.6)),
        (("A", "B"), (0.4, 0.6)),
        (("B", "C"), (0.4, 0.6)),
        (("A", "D"), (1.0, 0.0)),
        (("D",), (1.0, 0.0)),
        ((), (1.0, 0.0)),
    ],
)
def test_shares_of_futures(parts: tuple[str, ...], shares: tuple[float, ...]) -> None:
    np.testing.assert_allclose(SHARES.of(parts), shares)
    logits = SHARES.logits(parts)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(np.exp(logits).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(logits), shares, atol=2e-3)


def test_plans_draw_futures_anew_in_each_step(rng: np.random.Generator) -> None:
    """After two steps, each to the left or to the right, a quarter of the cells are at either end."""
    before = cloud(rng, 200) * 0.1
    way = np.where(np.arange(200) % 2, 12.0, -12.0)
    own = fitting_of([("g", before, [(A, (before + way[:, None] * np.eye(DIM)[0]).astype(np.float32))])])
    shares = FutureShares.of_examples(own.examples)
    network = own._trained(own.examples, *own._linear(own.examples), shares)
    fast = FastDynamics(network, own.space.encode(A)[None], shares.logits(("A",))[None], seed=0)
    import torch

    ways = fast.imagined(torch.from_numpy(before[:100]), [0, 0])
    ends = np.round(ways[-1][:, 0] / 24).astype(int)
    assert set(ends.tolist()) == {-1, 0, 1}
    assert (ends == 0).mean() == pytest.approx(0.5, abs=0.15)
    np.testing.assert_array_equal(ways, fast.imagined(torch.from_numpy(before[:100]), [0, 0]))
