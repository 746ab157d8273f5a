"""Training of the transition network: which cells it sees in which step, its objectives, and how far it is believed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from genejepa._arithmetic import plain_arithmetic
from genejepa._lightning import LightningModule, Trainer
from genejepa.train.devices import cpu_threads

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from genejepa.world.futures import FutureShares
    from genejepa.world.network import TransitionNetwork

_TRANSITIONS_PER_STEP = 32
_PAIRS_PER_STEP, _FEWEST_PAIRS = 512, 16
_STREAM = 9
"""Keeps the random numbers of these batches apart from those of other uses."""

_SET, _INVERSE, _ROLLOUT = 1.0, 0.1, 0.5
"""Weights of the distance of populations, of inverse dynamics and of two-step predictions; the match counts 1."""

_LEARNING_RATE, _WEIGHT_DECAY = 5e-3, 0.05


@dataclass(frozen=True, eq=False)
class Example:
    """Matched cells of one transition.

    Attributes
    ----------
    before, after : (n, dim)
    future : (n,)
        Number of the future of each pair.
    chance : (n, n_codes)
        Chances of the futures for the mode that each cell before is in.
    weight : (n,)
        Sums to 1.
    parts
        Names of what was done.
    action : (n_actions,)
        Its vector.
    duration
        In the unit of the model.
    kind
        Number of the action among those of the training.
    followers
        Numbers of the transitions that start from where this one ends.
    """

    before: Tensor
    after: Tensor
    future: Tensor
    chance: Tensor
    weight: NDArray[np.float64]
    parts: tuple[str, ...]
    action: Tensor
    duration: float
    kind: int
    followers: tuple[int, ...]

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Numbers of pairs, (n,), drawn with their weights."""
        return np.minimum(np.searchsorted(self._cumulative, rng.random(n)), len(self.weight) - 1)

    @cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        return np.cumsum(self.weight)


class Steps(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Batches by step; what is in one depends on the seed and the step alone."""

    def __init__(self, examples: Sequence[Example], shares: FutureShares, *, n_steps: int, seed: int) -> None:
        self.examples, self.n_steps, self.seed = examples, n_steps, seed
        self.logits = [torch.from_numpy(shares.logits(example.parts)) for example in examples]

    def __len__(self) -> int:
        return self.n_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """A few transitions, with as many pairs of cells of each, and for some a transition that follows."""
        if not 0 <= step < self.n_steps:
            raise IndexError(step)
        rng = np.random.default_rng([self.seed, _STREAM, step])
        n = min(_TRANSITIONS_PER_STEP, len(self.examples))
        n_pairs = max(_PAIRS_PER_STEP // n, _FEWEST_PAIRS)
        parts = []
        for number in rng.choice(len(self.examples), n, replace=False):
            example = self.examples[number]
            pairs = example.draw(n_pairs, rng)
            next_number = rng.choice(example.followers) if example.followers else number
            follower = self.examples[next_number]
            ends = follower.draw(n_pairs, rng)
            parts.append(
                {
                    "before": example.before[pairs],
                    "after": example.after[pairs],
                    "future": example.future[pairs],
                    "chance": example.chance[pairs],
                    "action": example.action,
                    "logits": self.logits[number],
                    "duration": torch.tensor(example.duration),
                    "kind": torch.tensor(example.kind),
                    "has_follower": torch.tensor(bool(example.followers)),
                    "next_action": follower.action,
                    "next_logits": self.logits[next_number],
                    "next_duration": torch.tensor(follower.duration),
                    "next_after": follower.after[ends],
                }
            )
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


class TransitionModule(LightningModule):
    """Objectives of a transition network.

    With states in units of their deviation: the squared distance of each predicted cell to the one it is matched with,
    in the future that this is; the cross entropy of the probabilities of the futures; the energy distance of the
    predicted population to the one after (as in STATE, Adduri et al. 2025), also after two steps where one transition
    follows another; and the cross entropy of an action told from the mean states before and after, of which the one
    after is predicted, so that predictions keep what tells actions apart (inverse dynamics).

    Parameters
    ----------
    network
    n_kinds
        Number of different actions.
    """

    def __init__(self, network: TransitionNetwork, *, n_kinds: int, n_steps: int) -> None:
        super().__init__()
        self.network, self.n_kinds, self.n_steps = network, n_kinds, n_steps
        dim = len(network.centre)
        self.inverse = nn.Sequential(nn.Linear(2 * dim, 64), nn.SiLU(), nn.Linear(64, n_kinds))

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Weighted sum of the objectives."""
        network = self.network
        n, n_pairs, dim = batch["before"].shape
        before, after = batch["before"].flatten(0, 1), batch["after"].flatten(0, 1)
        action = batch["action"].repeat_interleave(n_pairs, 0)
        duration = batch["duration"].repeat_interleave(n_pairs)
        future = batch["future"].flatten()
        flat = network.of_future(before, action, duration, future)
        loss = ((flat - after) / network.scale).square().mean()
        # Not the future of the pair: which cell of a mode goes where is decided by transport, and is no knowledge.
        likely = network.log_prior(before, action, batch["logits"].repeat_interleave(n_pairs, 0))
        loss = loss + nn.functional.cross_entropy(likely, batch["chance"].flatten(0, 1))
        predicted = flat.view(n, n_pairs, dim)
        loss = loss + _SET * set_distance(predicted, batch["after"], network.scale).mean()
        if self.n_kinds > 1:
            loss = loss + _INVERSE * self._inverse_loss(batch, predicted)
        follows = batch["has_follower"]
        if bool(follows.any()):
            following = (batch[name][follows] for name in ("next_action", "next_logits", "next_duration"))
            second = self._second_step(predicted[follows], *following)
            loss = loss + _ROLLOUT * set_distance(second, batch["next_after"][follows], network.scale).mean()
        return loss

    def _inverse_loss(self, batch: dict[str, Tensor], predicted: Tensor) -> Tensor:
        before = batch["before"].mean(1).repeat(2, 1)
        after = torch.cat([batch["after"].mean(1), predicted.mean(1)])
        told = self.inverse(torch.cat([before, after], -1) / self.network.scale)
        return 2 * nn.functional.cross_entropy(told, batch["kind"].repeat(2))

    def _second_step(self, states: Tensor, action: Tensor, logits: Tensor, duration: Tensor) -> Tensor:
        """Most probable futures, (n, n_pairs, dim), of predicted states."""
        n, n_pairs, dim = states.shape
        z, actions = states.flatten(0, 1), action.repeat_interleave(n_pairs, 0)
        likely = self.network.log_prior(z, actions, logits.repeat_interleave(n_pairs, 0)).argmax(-1)
        after = self.network.of_future(z, actions, duration.repeat_interleave(n_pairs), likely)
        return after.view(n, n_pairs, dim)

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine to zero."""
        return adamw_with_cosine(self, _LEARNING_RATE, weight_decay=_WEIGHT_DECAY, n_steps=self.n_steps)


def adamw_with_cosine(module: nn.Module, learning_rate: float, *, weight_decay: float, n_steps: int) -> dict[str, Any]:
    """AdamW, its learning rate on a cosine to zero over the steps, as Lightning wants them."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def set_distance(predicted: Tensor, true: Tensor, scale: Tensor) -> Tensor:
    """Energy distance, (n,), of sets (n, n_cells, dim), over the root of the dimension (Szekely & Rizzo 2013)."""
    x, y = predicted / scale, true / scale

    def mean_distance(a: Tensor, b: Tensor) -> Tensor:
        squared: Tensor = a.square().sum(-1)[..., None] + b.square().sum(-1)[..., None, :] - 2 * a @ b.transpose(-1, -2)
        return squared.clamp_min(1e-6).sqrt().mean((-1, -2))  # the root has no slope at 0

    distance: Tensor = (2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)) / x.shape[-1] ** 0.5
    return distance


def train_network(
    network: TransitionNetwork, examples: Sequence[Example], shares: FutureShares, *, n_steps: int, seed: int
) -> None:
    """Train a network in place, with the shares of the futures as what the probabilities of these start from."""
    if n_steps == 0:
        return
    kinds = 1 + max(example.kind for example in examples)
    with cpu_threads(1), plain_arithmetic(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = TransitionModule(network, n_kinds=kinds, n_steps=n_steps)
        batches = torch.utils.data.DataLoader(
            Steps(examples, shares, n_steps=n_steps, seed=seed), batch_size=None, shuffle=False
        )
        run_steps(module, batches)
    network.eval()


def run_steps(module: LightningModule, batches: Iterable[Any]) -> None:
    """Train a module in place, one step for each batch, on the CPU and without a word.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C. Lightning makes it a SystemExit, which would end a notebook.
    """
    from genejepa.train.runner import quiet_lightning

    with quiet_lightning():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
        )
        try:
            trainer.fit(module, batches)
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):  # somebody else's exit
                raise
            raise KeyboardInterrupt from error


@dataclass
class Belief:
    """How far a network is right about transitions that it has not seen; summed over networks.

    Attributes
    ----------
    with_truth, with_itself
        Products of the perceptron's correction with what the rest of the network leaves unexplained, and with itself.
    by_state, by_action
        Cross entropy of the probabilities of the futures, with and without their dependence on the state.
    """

    with_truth: float = 0.0
    with_itself: float = 0.0
    by_state: float = 0.0
    by_action: float = 0.0

    @property
    def gate(self) -> float:
        """Least-squares factor of the correction, within [0, 1]."""
        return float(np.clip(self.with_truth / self.with_itself, 0.0, 1.0)) if self.with_itself > 0 else 0.0

    @property
    def prior_gate(self) -> float:
        """1 if probabilities that depend on the state are the better ones."""
        return float(self.by_state < self.by_action)

    @plain_arithmetic()
    @torch.no_grad()
    def add(self, network: TransitionNetwork, example: Example, shares: FutureShares) -> None:
        """Look at one transition that was left out."""
        n = len(example.before)
        action, duration = example.action.expand(n, -1), torch.full((n,), example.duration)
        weight = torch.from_numpy(example.weight).float()
        rows = torch.arange(n)
        correction = network.correction(example.before, action, duration, example.future)
        left = example.after - network.starts(example.before, action, duration)[rows, example.future]
        self.with_truth += float(weight @ (left * correction).sum(-1))
        self.with_itself += float(weight @ correction.square().sum(-1))
        logits = torch.from_numpy(shares.logits(example.parts)).expand(n, -1)
        self.by_state -= float(weight @ (example.chance * network.log_prior(example.before, action, logits)).sum(-1))
        self.by_action -= float(weight @ (example.chance * logits).sum(-1))
