"""The slow predictor says at once what the fast one says in several steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from genejepa.world import slow
from genejepa.world.slow import SlowDynamics, learn_slow

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from anndata import AnnData
    from torch import Tensor

    from genejepa.world.model import WorldModel

SPAN = 3


class Pull:
    """Each action takes cells half the way to a place of its own: order matters."""

    places = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    n_actions = 3

    def step(self, populations: Tensor, actions: Tensor, _depth: int, /) -> Tensor:
        return 0.5 * (populations + self.places[actions][:, None])


def states_of(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def after(z: Tensor, sequences: Tensor) -> Tensor:
    """States after a sequence of actions each."""
    for step in range(sequences.shape[1]):
        z = Pull().step(z[:, None], sequences[:, step], step)[:, 0]
    return z


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "_N_STEPS", 200)
    monkeypatch.setattr(slow, "_N_SEQUENCES", 200)


@pytest.fixture(scope="module")
def learnt() -> SlowDynamics:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slow, "_N_STEPS", 300)
        patch.setattr(slow, "_N_SEQUENCES", 300)
        patch.setattr(slow, "_N_MACROS", 48)
        return learn_slow(Pull(), states_of(200), span=SPAN, seed=0)


@torch.no_grad()
def test_it_has_learnt_several_steps(learnt: SlowDynamics) -> None:
    z = states_of(300, seed=5)
    sequences = torch.from_numpy(np.random.default_rng(5).integers(3, size=(300, SPAN)))
    truth = after(z, sequences)
    found = learnt.network(z, learnt.network.macros(sequences))
    assert (found - truth).square().mean() < 0.03 * (truth - truth.mean(0)).square().mean()


@torch.no_grad()
def test_macro_actions_stand_for_sequences(learnt: SlowDynamics) -> None:
    """There are no more of them than sequences, and each does what one of these does."""
    assert learnt.n_actions == len(learnt.library) == 27
    z = states_of(6, seed=6)
    ends = learnt.step(z.expand(27, -1, -1), torch.arange(27))
    assert ends.shape == (27, 6, 3)
    every = torch.cartesian_prod(*[torch.arange(3)] * SPAN)
    truth = torch.stack([after(z, sequence.expand(6, -1)) for sequence in every])
    apart = torch.cdist(ends.flatten(1), truth.flatten(1))
    assert len(set(apart.argmin(1).tolist())) > 20
    assert apart.min(1).values.max() < 0.5 * torch.cdist(truth.flatten(1), truth.flatten(1)).mean()


class Split(Pull):
    """One action, after which the cells of a population go both ways, one as many as the other."""

    n_actions = 1

    def step(self, populations: Tensor, actions: Tensor, _depth: int, /) -> Tensor:
        n_cells = populations.shape[1]
        way = torch.where(torch.arange(n_cells) < n_cells / 2, 5.0, -5.0)
        return populations + way[:, None]


@torch.no_grad()
def test_where_cells_go_several_ways_the_mean_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "_N_STEPS", 300)
    z = states_of(100)
    after = learn_slow(Split(), z, span=1, seed=0).step(z[None], torch.tensor([0]))[0]
    assert (after - z).mean().abs() < 1.5  # of cells that are stepped alone all would go one way


def test_a_large_library_is_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "_N_MACROS", 5)
    monkeypatch.setattr(slow, "_MOST_SEQUENCES", 10)
    monkeypatch.setattr(slow, "_N_STEPS", 3)
    assert 1 <= learn_slow(Pull(), states_of(50), span=SPAN, seed=0).n_actions <= 5


def test_equal_seeds_give_equal_predictors(
    monkeypatch: pytest.MonkeyPatch, global_rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    monkeypatch.setattr(slow, "_N_STEPS", 3)
    with global_rng_untouched():
        libraries = [learn_slow(Pull(), states_of(50), span=2, seed=seed).library for seed in (0, 0, 1)]
    assert torch.equal(libraries[0], libraries[1])
    assert not torch.equal(libraries[0], libraries[2])


def test_ctrl_c_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(slow._SlowModule, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn_slow(Pull(), states_of(50), span=2, seed=0)


@pytest.mark.filterwarnings("ignore:Extrapolation. no transition:genejepa.errors.ExtrapolationWarning")
def test_a_hierarchical_plan_of_a_world(
    world: WorldModel, untreated: AnnData, draw_cells: Callable[..., AnnData]
) -> None:
    """Sub-goals lead to cells that two actions lead to."""
    both = {"A": 1.3, "B": 1.3}
    goal = draw_cells([(own, both, {}) for own in ("alpha", "beta", "gamma")], n=30, seed=9)
    plan = world.plan(untreated, goal, ["A", "B"], horizon=3, method="hierarchical", span=2)
    assert plan.method == "hierarchical"
    assert set(plan.best) == {"A", "B"}
    assert plan.distances[0][-1] < 0.5 * plan.distances[0][0]
    assert plan.n_evaluations > 2**2  # the macro-actions alone
