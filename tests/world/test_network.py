"""The network corrects the linear start, no further than it is right about what it has not seen."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from genejepa.world import training
from genejepa.world.futures import FutureShares
from genejepa.world.linear import Features
from genejepa.world.network import TransitionNetwork
from genejepa.world.planning import energy_distance
from genejepa.world.training import (
    Belief,
    Example,
    Steps,
    TransitionModule,
    run_steps,
    set_distance,
    train_network,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

    Seeded = Callable[[Callable[[], Any]], Any]

DIM, N_ACTIONS = 4, 2
ACTIONS = torch.eye(N_ACTIONS)


def features_of(seed: int = 0) -> Features:
    states = np.random.default_rng(seed).normal(0.5, 1.5, (100, DIM)).astype(np.float32)
    return Features.of(states, n_actions=N_ACTIONS)


def logits_of(*shares: float, n: int = 7) -> Tensor:
    """Log probabilities of futures for so many cells."""
    return torch.tensor(shares).log().expand(n, -1)


def shares_of(n_codes: int = 1) -> FutureShares:
    """All futures of the action are equally frequent."""
    return FutureShares({("act",): np.full(n_codes, 1 / n_codes)})


def network_of(*, n_codes: int = 1, seed: int = 0) -> TransitionNetwork:
    """Network whose linear start is random, and whose perceptron has just been born."""
    rng = torch.Generator().manual_seed(seed)
    n_features = N_ACTIONS * (1 + DIM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = 0.3 * torch.randn(n_features, DIM, generator=rng)
        apart = 2.0 * torch.randn(n_codes, n_features, DIM, generator=rng) * (n_codes > 1)
        return TransitionNetwork(features_of(), linear, linear + apart, hidden=128)


def awaken(network: TransitionNetwork) -> TransitionNetwork:
    """Give the perceptron something to say."""
    rng = torch.Generator().manual_seed(1)
    for layer in (network.correction_out, network.prior_out):
        layer.weight.data.normal_(generator=rng)
        layer.bias.data.normal_(generator=rng)
    return network


def states_of(n: int, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)) + 0.5


def first_of(z: Tensor) -> Tensor:
    """The first future for every state."""
    return torch.zeros(len(z), dtype=torch.int64)


@pytest.fixture(autouse=True)
def _without_gradients_elsewhere() -> Iterator[None]:
    """What the tests compute themselves needs no gradient; training has to turn it on."""
    with torch.no_grad():
        yield


@pytest.mark.parametrize("duration", [0.5, 1.0, 3.0])
def test_it_starts_as_the_linear_start(duration: float) -> None:
    network, features = network_of(), features_of()
    z = states_of(7)
    for action in ACTIONS:
        after = network(z, action.expand(7, -1), torch.full((7,), duration))
        told = features(z.double().numpy(), action.double().numpy(), duration) @ network.coefficients.double().numpy()
        np.testing.assert_allclose(after[:, 0], z + torch.from_numpy(told), rtol=1e-5, atol=1e-5)


def test_futures_start_as_their_own_linear_starts() -> None:
    network, features = network_of(n_codes=3), features_of()
    z = states_of(7)
    after = network(z, ACTIONS[:1].expand(7, -1), torch.ones(7))
    rows = features(z.double().numpy(), np.array([1.0, 0.0]), 1.0)
    for k in range(3):
        told = rows @ network.by_future[k].double().numpy()
        np.testing.assert_allclose(after[:, k], z + torch.from_numpy(told), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_codes", [1, 3])
def test_an_action_of_no_strength_changes_nothing(n_codes: int) -> None:
    network = awaken(network_of(n_codes=n_codes))
    z = states_of(7)
    for action, duration in ((torch.zeros(7, N_ACTIONS), torch.ones(7)), (torch.ones(7, N_ACTIONS), torch.zeros(7))):
        after = network(z, action, duration)
        assert torch.equal(after, z[:, None].expand(-1, n_codes, -1))


def test_a_correction_that_is_not_believed_is_not_used() -> None:
    network = network_of(n_codes=2)
    z, action, duration = states_of(7), ACTIONS[:1].expand(7, -1), torch.ones(7)
    linear = network(z, action, duration)
    awaken(network)
    believed = network(z, action, duration)
    network.gate.fill_(0.5)
    half = network(z, action, duration)
    network.gate.zero_()
    assert torch.equal(network(z, action, duration), linear)
    assert (believed - linear).abs().mean() > 0.1
    torch.testing.assert_close(half, (believed + linear) / 2)


def test_chances_that_depend_on_the_state_are_used_if_they_are_believed() -> None:
    network = awaken(network_of(n_codes=2))
    z, action, logits = states_of(7), ACTIONS[:1].expand(7, -1), logits_of(0.7, 0.3)
    assert network.chances(z, action, logits).std(0).max() > 0.01
    network.prior_gate.zero_()
    torch.testing.assert_close(network.chances(z, action, logits), torch.tensor([[0.7, 0.3]]).expand(7, -1))


@pytest.mark.parametrize(
    ("shares", "chances"),
    [
        ((0.5, 0.5), (0.5, 0.5)),
        ((0.85, 0.09, 0.06), (1.0, 0.0, 0.0)),
        ((0.55, 0.36, 0.09), (0.6043956, 0.3956044, 0.0)),
        ((0.11, 0.89), (0.11, 0.89)),
    ],
)
def test_what_hardly_ever_happens_is_no_future(shares: tuple[float, ...], chances: tuple[float, ...]) -> None:
    network = network_of(n_codes=len(shares))
    found = network.chances(states_of(3), ACTIONS[:1].expand(3, -1), logits_of(*shares, n=3))
    torch.testing.assert_close(found, torch.tensor([chances]).expand(3, -1))


def test_chances_sum_to_one() -> None:
    network = awaken(network_of(n_codes=5))
    found = network.chances(states_of(200), ACTIONS[1:].expand(200, -1), logits_of(*[0.2] * 5, n=200))
    torch.testing.assert_close(found.sum(1), torch.ones(200))
    assert found[found > 0].min() >= 0.1
    assert (found == 0).any()


def test_a_cell_does_not_depend_on_the_others() -> None:
    network = awaken(network_of(n_codes=2))
    z, action, duration = states_of(7), ACTIONS[:1].expand(7, -1), torch.ones(7)
    whole = network(z, action, duration)
    torch.testing.assert_close(network(z[2:3], action[:1], duration[:1]), whole[2:3])


# Training


def bend(z: Tensor) -> Tensor:
    """A change that is not linear."""
    return (z[:, :1] - 0.5).abs().expand_as(z)


def examples_of(*, follows: bool = False, n: int = 80, seed: int = 10, n_codes: int = 1) -> list[Example]:
    """Two actions that do the same, always in the first future."""
    found = []
    for number, action in enumerate(ACTIONS):
        z = states_of(n, seed=seed + number)
        after = z + bend(z)
        followers = (1 - number,) if follows else ()
        chance = torch.eye(n_codes)[first_of(z)]
        found.append(
            Example(z, after, first_of(z), chance, np.full(n, 1 / n), ("act",), action, 1.0, number, followers)
        )
    return found


def error(network: TransitionNetwork, examples: list[Example]) -> float:
    """Mean squared error of the first future."""
    n = len(examples[0].weight)
    parts = [network(own.before, own.action.expand(n, -1), torch.ones(n))[:, 0] - own.after for own in examples]
    return float(torch.cat(parts).square().mean())


def test_training_learns_what_is_not_linear() -> None:
    """Cells that were not trained on are predicted better than by the best linear start."""
    network, examples = network_of(), examples_of(n=400)
    features = features_of()
    rows = [features(own.before.numpy(), own.action.double().numpy(), 1.0) for own in examples]
    change = np.concatenate([(own.after - own.before).numpy() for own in examples])
    network.by_future[0] = torch.from_numpy(np.linalg.lstsq(np.concatenate(rows), change, rcond=None)[0])
    new = examples_of(seed=20)
    linear = error(network, new)
    train_network(network, examples, shares_of(), n_steps=100, seed=0)
    assert error(network, new) < 0.3 * linear
    assert not network.training


def test_no_steps_leave_everything_as_it_is() -> None:
    network = network_of()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    train_network(network, examples_of(), shares_of(), n_steps=0, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_training_keeps_the_linear_start() -> None:
    network = network_of(n_codes=2)
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    train_network(network, examples_of(n_codes=2), shares_of(2), n_steps=3, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.named_buffers())
    assert network.correction_out.weight.any()


def test_equal_seeds_give_equal_weights(global_rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
    found = []
    for seed in (0, 0, 1):
        network = network_of(n_codes=2)
        with global_rng_untouched():
            train_network(network, examples_of(follows=True, n_codes=2), shares_of(2), n_steps=5, seed=seed)
        found.append(network.correction_out.weight.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def module_of(network: TransitionNetwork, make_seeded: Seeded) -> TransitionModule:
    made: TransitionModule = make_seeded(lambda: TransitionModule(network, n_kinds=2, n_steps=1))
    return made


def test_inverse_dynamics_reach_the_prediction(make_seeded: Seeded) -> None:
    """With true states alone, which do not move, actions could be told apart and nothing would be learnt from it."""
    network = network_of()
    module = module_of(network, make_seeded)
    batch = Steps(examples_of(), shares_of(), n_steps=1, seed=0)[0]
    action = batch["action"].repeat_interleave(batch["before"].shape[1], 0)
    with torch.enable_grad():
        predicted = network(batch["before"].flatten(0, 1), action, torch.ones(len(action)))[:, 0]
        module._inverse_loss(batch, predicted.view_as(batch["before"])).backward()
    gradient = network.correction_out.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 1e-4


def test_two_steps_are_compared_with_what_followed(make_seeded: Seeded, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of()
    module = module_of(network, make_seeded)
    batch = Steps(examples_of(follows=True), shares_of(), n_steps=1, seed=0)[0]
    assert batch["has_follower"].tolist() == [True, True]
    assert torch.equal(batch["next_action"], 1 - batch["action"])
    n_pairs = batch["before"].shape[1]
    once = network(
        batch["before"].flatten(0, 1), batch["action"].repeat_interleave(n_pairs, 0), torch.ones(2 * n_pairs)
    )
    twice = network(once[:, 0], batch["next_action"].repeat_interleave(n_pairs, 0), torch.ones(2 * n_pairs))[:, 0]
    own = set_distance(twice.view_as(batch["before"]), batch["next_after"], network.scale).mean()
    with_it = module.training_step(batch, 0)
    weight = training._ROLLOUT
    monkeypatch.setattr(training, "_ROLLOUT", 0.0)
    torch.testing.assert_close(with_it - module.training_step(batch, 0), weight * own)


def test_what_nothing_follows_has_no_second_step(make_seeded: Seeded, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(network_of(), make_seeded)
    batch = Steps(examples_of(), shares_of(), n_steps=1, seed=0)[0]
    loss = module.training_step(batch, 0)
    monkeypatch.setattr(training, "_ROLLOUT", 1e6)
    assert torch.equal(module.training_step(batch, 0), loss)


def test_batches_depend_on_the_seed_and_the_step_alone() -> None:
    steps = Steps(examples_of(follows=True), shares_of(), n_steps=4, seed=3)
    assert len(steps) == 4
    late = steps[3]
    for name, value in Steps(examples_of(follows=True), shares_of(), n_steps=9, seed=3)[3].items():
        assert torch.equal(value, late[name])
    assert not torch.equal(steps[2]["before"], late["before"])
    with pytest.raises(IndexError):
        steps[4]


def test_pairs_are_drawn_by_their_weight() -> None:
    example = examples_of()[0]
    weight = np.zeros(80)
    weight[[3, 5]] = 0.75, 0.25
    drawn = Steps(
        [replace(example, weight=weight)],
        shares_of(),
        n_steps=1,
        seed=0,
    )[0]
    rows = {int((example.before == row).all(1).nonzero().item()) for row in drawn["before"][0]}
    assert rows == {3, 5}
    for before, after in zip(drawn["before"][0], drawn["after"][0], strict=True):
        torch.testing.assert_close(after, before + bend(before[None])[0])


def test_distance_of_sets() -> None:
    x, y = states_of(30)[None], states_of(40, seed=1)[None] + 1
    scale = torch.tensor(2.0)
    apart = set_distance(x, y, scale)
    torch.testing.assert_close(
        apart.double(), energy_distance(x / scale, y[0] / scale) ** 2 / DIM**0.5, atol=1e-3, rtol=1e-3
    )
    assert set_distance(x, x, scale).abs() < 1e-5
    with torch.enable_grad():
        moved = x.clone().requires_grad_()
        set_distance(moved, x, scale).sum().backward()
    assert moved.grad is not None
    assert moved.grad.isfinite().all()


# How far the network is believed


@pytest.mark.parametrize(("factor", "gate"), [(1.0, 1.0), (2.0, 0.5), (4.0, 0.25), (0.5, 1.0), (-1.0, 0.0)])
def test_a_correction_is_believed_as_far_as_it_helps(factor: float, gate: float) -> None:
    """The gate is the factor, between 0 and 1, with which the correction would have been best."""
    network = awaken(network_of())
    z, action, duration = states_of(50), ACTIONS[:1].expand(50, -1), torch.ones(50)
    corrected = network.correction(z, action, duration, first_of(z))
    after = z + network.linear(z, action, duration) + corrected / factor
    weight = np.full(50, 0.02)
    example = Example(z, after, first_of(z), torch.ones(len(z), 1), weight, ("act",), ACTIONS[0], 1.0, 0, ())
    belief = Belief()
    belief.add(network, example, shares_of())
    assert belief.gate == pytest.approx(gate, rel=1e-4)


def test_without_evidence_nothing_is_believed() -> None:
    assert Belief().gate == 0
    assert Belief().prior_gate == 0
    belief = Belief()
    belief.add(network_of(), examples_of()[0], shares_of())
    assert belief.gate == 0


@pytest.mark.parametrize("is_right", [True, False])
def test_chances_by_state_are_believed_if_they_are_the_better_ones(is_right: bool) -> None:
    """States above the mean go one way and the others the other way, or so the network says."""
    network = network_of(n_codes=2)
    network.by_future.copy_(network.coefficients)
    network.by_future[0, 0] += 10.0
    network.by_future[1, 0] -= 10.0
    hidden = network.prior[0]
    assert isinstance(hidden, torch.nn.Linear)
    hidden.weight.zero_()
    hidden.bias.zero_()
    hidden.weight[0, 0] = 5.0
    network.prior_out.weight[0, 0] = 3.0
    z = states_of(200)
    high = network.log_prior(z, ACTIONS[:1].expand(200, -1), torch.zeros(200, 2)).argmax(-1) == 0
    way = torch.where(high == is_right, 10.0, -10.0)
    after = z + network.linear(z, ACTIONS[:1].expand(200, -1), torch.ones(200)) + way[:, None]
    belief = Belief()
    belief.add(
        network,
        Example(
            z,
            after,
            (~(high == is_right)).long(),
            torch.nn.functional.one_hot((~(high == is_right)).long(), 2).float(),
            np.full(200, 0.005),
            ("act",),
            ACTIONS[0],
            1.0,
            0,
            (),
        ),
        shares_of(2),
    )
    assert belief.prior_gate == is_right


# Interruptions


class Interrupted(TransitionModule):
    """Somebody presses Ctrl-C, or another part of the program ends it."""

    error: BaseException = KeyboardInterrupt()

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        if number == 2:
            raise self.error
        return super().training_step(batch, number)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), RuntimeError("broken")], ids=lambda e: type(e).__name__
)
def test_what_ends_a_training_is_what_the_caller_sees(error: BaseException) -> None:
    """Ctrl-C stays Ctrl-C, and the next one still counts."""
    before = signal.getsignal(signal.SIGINT)
    module = Interrupted(network_of(), n_kinds=2, n_steps=5)
    module.error = error
    steps = Steps(examples_of(), shares_of(), n_steps=5, seed=0)
    with torch.enable_grad(), pytest.raises(type(error)) as caught:
        run_steps(module, torch.utils.data.DataLoader(steps, batch_size=None))
    assert signal.getsignal(signal.SIGINT) is before
    assert caught.value.args == error.args
