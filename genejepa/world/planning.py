"""Search for the sequence of discrete actions that takes a population of cells closest to another one."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, product, takewhile
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from genejepa._arithmetic import plain_arithmetic
from genejepa.config import LARGEST_NUMPY_SEED, at_least
from genejepa.errors import ConfigError, DataError
from genejepa.world.actions import is_finite_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["Candidate", "Dynamics", "Method", "Search", "energy_distance", "search"]

Actions: TypeAlias = tuple[int, ...]
Method: TypeAlias = Literal["exhaustive", "cross_entropy", "hierarchical"]

_MOST_SEQUENCES: Final = 10_000
"""Up to so many sequences all of them are looked at."""

_N_SAMPLES: Final = 300
_N_ROUNDS: Final = 30
_N_ELITES: Final = 30
_SMOOTHING: Final = 0.05
_MOMENTUM: Final = 0.1

_N_AGREE: Final = 2
"""Sampling ends when it has settled on the same sequence so many times."""

_N_SUBGOALS: Final = 3
"""Different first sub-goals from which a hierarchical search goes on."""

_N_AHEAD: Final = 2
"""Macro-actions that a hierarchical search looks ahead: to a sub-goal and beyond."""

_RESOLUTION: Final = 1e-6
"""Costs that differ by less than this part of the first distance are equal: less is rounding."""

_CHUNK_VALUES: Final = 2**22
"""Numbers in the populations that are stepped, or in the distances that are computed, at a time."""

_KEPT_VALUES: Final = 2**28
"""Numbers in the imagined populations that are kept, 1 GiB."""


class Dynamics(Protocol):
    """What an action does to a population of cells."""

    @property
    def n_actions(self) -> int:
        """Number of actions; they are numbered from 0."""

    def step(self, populations: Tensor, actions: Tensor, depth: int, /) -> Tensor:
        """Populations after one action each, (n, n_cells, dim), of populations (n, n_cells, dim) and actions (n,).

        ``depth`` actions were taken before: what is drawn may depend on it, so that draws of different steps are
        independent, and those of one step the same for all sequences.
        """


@dataclass(frozen=True)
class Candidate:
    """A sequence of actions and where it is imagined to lead.

    Attributes
    ----------
    actions
        Numbers of the actions, in their order.
    cost
        Last distance plus the cost of the actions; infinite if the imagined population is not finite.
    distances
        Energy distances to the goal, before any action and after each.
    """

    actions: Actions
    cost: float
    distances: tuple[float, ...]


@dataclass(frozen=True)
class Search:
    """Result of a search.

    Attributes
    ----------
    candidates
        Different sequences, the best first.
    n_evaluations
        Number of populations that were stepped, by all dynamics together; what slow dynamics were taught with before
        is not in it.
    method
        How the sequences were searched.
    """

    candidates: tuple[Candidate, ...]
    n_evaluations: int
    method: Method


@torch.no_grad()
def energy_distance(populations: Tensor, goal: Tensor) -> Tensor:
    """Energy distance of populations to one goal (Székely & Rizzo 2013, doi:10.1016/j.jspi.2013.03.018, equation 2.5).

    The root of twice the mean distance between cells of both, less the mean distances within each. A cell and itself
    are a pair as well, so that a population has distance 0 to itself.

    Parameters
    ----------
    populations : (n, n_cells, dim)
    goal : (m, dim)

    Returns
    -------
    torch.Tensor
        Distances, (n,), of 64 bits.
    """
    n, n_cells, _ = populations.shape
    width = max(1, _CHUNK_VALUES // (n_cells * max(n_cells, len(goal))))
    within_goal = _mean_distance(goal[None], goal[None])
    squared = torch.empty(n, dtype=torch.float64, device=populations.device)
    for start in range(0, n, width):
        chunk = populations[start : start + width]
        between = _mean_distance(chunk, goal.expand(len(chunk), -1, -1))
        squared[start : start + width] = 2 * between - _mean_distance(chunk, chunk) - within_goal
    return squared.clamp(min=0).sqrt()


def _mean_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean distance over all pairs of cells, (n,); by differences, as products would spoil small distances."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mean((1, 2), dtype=torch.float64)


class _Tree:
    """Imagined populations by the actions that lead to them; none is stepped again while it is kept."""

    def __init__(self, dynamics: Dynamics, start: Tensor, horizon: int) -> None:
        self.dynamics, self.horizon = dynamics, horizon
        self.n_evaluations = 0
        self.width = max(1, _CHUNK_VALUES // start.numel())
        self._most_kept = _KEPT_VALUES // start.numel()
        self._start = start
        self._kept: dict[Actions, Tensor] = {}

    def populations(self, sequences: Sequence[Actions]) -> Tensor:
        """Populations after different sequences of one length, (n, n_cells, dim)."""
        found = {actions: self._kept[actions] for actions in sequences if actions in self._kept}
        missing = [actions for actions in sequences if actions and actions not in found]
        if missing:
            parents = list(dict.fromkeys(actions[:-1] for actions in missing))
            rows = {actions: row for row, actions in enumerate(parents)}
            before = self.populations(parents)[[rows[actions[:-1]] for actions in missing]]
            last = torch.tensor([actions[-1] for actions in missing], device=before.device)
            made = dict(zip(missing, self.dynamics.step(before, last, len(missing[0]) - 1), strict=True))
            self.n_evaluations += len(missing)
            self._keep(made)
            found |= made
        return torch.stack([found.get(actions, self._start) for actions in sequences])

    def _keep(self, made: dict[Actions, Tensor]) -> None:
        """Keep populations that can be stepped on; what was kept goes when there is no more room."""
        if len(self._kept) + len(made) > self._most_kept:
            self._kept.clear()
        self._kept |= {actions: population for actions, population in made.items() if len(actions) < self.horizon}


class _Costs:
    """Costs of the sequences looked at so far, and of their beginnings, for one goal.

    Only sequences that begin with the root are of interest.
    """

    def __init__(
        self, tree: _Tree, goal: Tensor, action_cost: float, root: Actions = (), *, prunes: bool = True
    ) -> None:
        self.tree, self.goal, self.action_cost, self.root, self.prunes = tree, goal, action_cost, root, prunes
        self._distances: dict[Actions, float] = {}
        self._least = np.inf
        self.visit([()])
        self._resolution = _RESOLUTION * self._distances[()]

    def visit(self, sequences: Iterable[Actions]) -> None:
        """Compute what is not known of sequences and of their beginnings."""
        wanted = {actions[:depth] for actions in sequences for depth in range(len(actions) + 1)}
        by_length = sorted(wanted - self._distances.keys(), key=lambda actions: (len(actions), actions))
        for _, new in groupby(by_length, key=len):
            for chunk in _chunks(list(new), self.tree.width):
                distances = energy_distance(self.tree.populations(chunk), self.goal).nan_to_num(torch.inf, torch.inf)
                self._distances.update(zip(chunk, distances.tolist(), strict=True))
                own = [self._cost(actions) for actions in chunk if actions[: len(self.root)] == self.root]
                self._least = min([self._least, *own])

    def longest(self, most: int, *, distance: float = 0.0) -> int:
        """Actions, at most `most`, in a sequence that could still be the best one if it came this close to the goal."""
        if not self.prunes or self.action_cost == 0 or not np.isfinite(self._least):
            return most
        return min(most, int(np.ceil((self._least - distance) / self.action_cost)) - 1)

    def order(self, actions: Actions) -> tuple[float, int, Actions]:
        """What sequences are sorted by: cost, number of actions, actions."""
        cost = self._cost(actions)
        coarse = round(cost / self._resolution) if self._resolution and np.isfinite(cost) else cost
        return coarse, len(actions), actions

    def best(self, n: int | None = None) -> list[Actions]:
        """The best sequences of those looked at; None for all."""
        rooted = [actions for actions in self._distances if actions[: len(self.root)] == self.root]
        return heapq.nsmallest(len(rooted) if n is None else n, rooted, key=self.order)

    def candidate(self, actions: Actions) -> Candidate:
        """A sequence that was looked at."""
        distances = tuple(self._distances[actions[:depth]] for depth in range(len(actions) + 1))
        return Candidate(actions, self._cost(actions), distances)

    def _cost(self, actions: Actions) -> float:
        return self._distances[actions] + self.action_cost * len(actions)


def _chunks(sequences: Sequence[Actions], width: int) -> Iterator[Sequence[Actions]]:
    for start in range(0, len(sequences), width):
        yield sequences[start : start + width]


def search(
    dynamics: Dynamics,
    start: Tensor,
    goal: Tensor,
    *,
    horizon: int,
    action_cost: float,
    method: Method | Literal["auto"] = "auto",
    slow: Dynamics | None = None,
    span: int | None = None,
    n_best: int = 10,
    seed: int = 0,
) -> Search:
    """Search for the sequences of up to `horizon` actions that lead from one population to another.

    Parameters
    ----------
    dynamics
        Imagines what an action does.
    start, goal : (n_cells, dim), (m, dim)
        Populations; all that is imagined has as many cells as the start.
    horizon
        Most actions in a sequence. Shorter ones are looked at as well, and so is doing nothing.
    action_cost
        What an action costs, in units of the energy distance. The cost of a sequence is its last distance plus that of
        its actions; ties are broken by fewer actions, then by their numbers.
    method
        ``"exhaustive"`` looks at all sequences but those whose actions alone cost more than the best one found.

        ``"cross_entropy"`` (Rubinstein 1999, doi:10.1023/A:1010091220143) draws from shares of the actions at each
        step, to stop being one of them, and sets these to the shares among the best sequences drawn. Once these are all
        the same it starts afresh, as shares of single steps may settle on a sequence that is not the best.

        ``"hierarchical"`` searches macro-actions first. What the first of them leads to is a sub-goal of the actions
        (LeCun 2022, "A path towards autonomous machine intelligence", section 4.7). Macro-actions are searched again
        from where the actions arrive; the last actions aim at the goal itself. A goal that no sequence of
        macro-actions comes near may be missed. It starts with all sequences of up to `span` actions, and ends there if
        longer ones would not pay even if they came as near as other cells of the goal would be.

        ``"auto"`` is exhaustive for up to 10,000 sequences, else it uses cross-entropy.
    slow, span
        For the hierarchical search: dynamics whose actions stand for `span` actions each, and that number.
    n_best
        Most sequences to return.
    seed
        Of the cross-entropy method. Equal seeds give equal results.

    Returns
    -------
    Search
        The best sequences of those looked at.

    Raises
    ------
    ConfigError
        If a number is out of range, the method is unknown, or the hierarchical one lacks `slow` or `span`.
    DataError
        If a population has another shape, or a value that is not finite.
    """
    check_search(method, horizon=horizon, span=span, action_cost=action_cost, n_best=n_best, seed=seed)
    if method == "hierarchical" and slow is None:
        raise ConfigError(
            "the hierarchical search has no `slow`, expected dynamics of macro-actions.",
            fix="pass slow and span, or method='auto'.",
        )
    _check_populations(start, goal)
    if method == "auto":
        few = _n_sequences(dynamics.n_actions, horizon) <= _MOST_SEQUENCES
        method = "exhaustive" if few else "cross_entropy"
    with plain_arithmetic(start.device.type), torch.no_grad():
        costs = _Costs(_Tree(dynamics, start, horizon), goal.to(start), action_cost)
        n_slow = 0
        if method == "exhaustive":
            _exhaust(costs, [()], horizon)
        elif method == "cross_entropy":
            _sample(costs, (), horizon, seed)
        elif slow is not None and span is not None:
            n_slow = _climb(costs, slow, (), span, seed, near=_nearest(goal, len(start)))
        candidates = tuple(costs.candidate(actions) for actions in costs.best(n_best))
    return Search(candidates, costs.tree.n_evaluations + n_slow, method)


def check_search(method: str, *, horizon: int, span: int | None, action_cost: float, n_best: int, seed: int) -> None:
    """Refuse what :func:`search` cannot do.

    Raises
    ------
    ConfigError
        If a number is out of range, the method is unknown, or the hierarchical one has no shorter `span`.
    """
    at_least("n_best", n_best, 1)
    at_least("seed", seed, 0, high=LARGEST_NUMPY_SEED)
    at_least("horizon", horizon, 1)
    if not is_finite_number(action_cost) or action_cost < 0:
        raise ConfigError(
            f"`action_cost` is {action_cost!r}, expected a number of at least 0.", fix="pass action_cost=0.0."
        )
    if method not in ("auto", *get_args(Method)):
        names = ", ".join(map(repr, ("auto", *get_args(Method))))
        raise ConfigError(f"`method` is {method!r}, expected one of {names}.", fix="pass method='auto'.")
    if method == "hierarchical" and at_least("span", span, 1) >= horizon:
        raise ConfigError(
            f"`span` is {span} and `horizon` is {horizon}, expected a shorter span.",
            fix=f"pass horizon={int(span or 0) + 1} or more, or method='auto'.",
        )


def _check_populations(start: Tensor, goal: Tensor) -> None:
    for name, population in (("start", start), ("goal", goal)):
        if population.ndim != 2 or not population.numel() or population.shape[1] != start.shape[-1]:
            raise DataError(
                f"`{name}` has shape {tuple(population.shape)} and `start` {tuple(start.shape)}, expected "
                "(n_cells, dim) with at least one cell and the same dim.",
                fix="pass the latents of the cells of both, from one model.",
            )
        bad = int((~population.isfinite()).any(1).sum())
        if bad:
            raise DataError(
                f"`{name}` has {bad} of {len(population)} cells with values that are not finite, expected none.",
                fix=f"{name} = {name}[{name}.isfinite().all(1)]",
            )


def _nearest(goal: Tensor, n_cells: int) -> float:
    """Energy distance that so many other cells of the population of the goal would have to it, on average."""
    m = len(goal)
    if m < 2:
        return 0.0
    between = float(_mean_distance(goal[None], goal[None])) * m / (m - 1)
    return float(np.sqrt((1 / n_cells + 1 / m) * between))


def _n_sequences(n_actions: int, horizon: int) -> int:
    """Number of sequences of one to `horizon` actions."""
    return sum(n_actions**length for length in range(1, horizon + 1))


def _explore(costs: _Costs, root: Actions, n_more: int, seed: int) -> None:
    """Look at sequences that go on from a root by up to `n_more` actions: at all of them where they are few."""
    if _n_sequences(costs.tree.dynamics.n_actions, n_more) <= _MOST_SEQUENCES:
        _exhaust(costs, [root], len(root) + n_more)
    else:
        _sample(costs, root, n_more, seed)


def _exhaust(costs: _Costs, roots: Sequence[Actions], horizon: int) -> None:
    """Look at all sequences that go on from roots of equal length, some roots after the others to save memory."""
    n_actions = costs.tree.dynamics.n_actions
    for chunk in _chunks(roots, max(1, costs.tree.width // n_actions)):
        if len(chunk[0]) >= costs.longest(horizon):  # the actions alone would cost more than the best sequence
            return
        longer = [(*root, action) for root, action in product(chunk, range(n_actions))]
        costs.visit(longer)
        _exhaust(costs, longer, horizon)


def _sample(costs: _Costs, root: Actions, n_more: int, seed: int) -> None:
    """Look at the sequences that the cross-entropy method draws."""
    rng = np.random.default_rng(seed)
    n_choices = costs.tree.dynamics.n_actions + 1
    uniform = np.full((n_more, n_choices), 1 / n_choices)
    shares, ends = uniform, Counter[Actions]()
    for _ in range(_N_ROUNDS):
        most = costs.longest(len(root) + n_more)
        drawn = [(*root, *actions)[: max(most, len(root))] for actions in _draw(shares, rng)]
        costs.visit(drawn)
        elites = heapq.nsmallest(_N_ELITES, drawn, key=costs.order)
        if elites[0] != elites[-1]:
            chosen = _shares([actions[len(root) :] for actions in elites], shares)
            shares = _MOMENTUM * shares + (1 - _MOMENTUM) * chosen
            continue
        ends[elites[0]] += 1
        if ends[elites[0]] == _N_AGREE:
            return
        shares = uniform


def _draw(shares: NDArray[np.float64], rng: np.random.Generator) -> list[Actions]:
    """Sequences by the shares of the choices at each step, (n_steps, n_actions + 1); the last choice is to stop."""
    stop = shares.shape[1] - 1
    choices = (rng.random((_N_SAMPLES, len(shares), 1)) > shares.cumsum(1)[:, :-1]).sum(2).tolist()
    return [tuple(takewhile(lambda choice: choice != stop, row)) for row in choices]


def _shares(elites: Sequence[Actions], before: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smoothed shares of the choices at each step among the sequences that get there; as before if none does."""
    counts = np.zeros_like(before)
    for actions in elites:
        for step, choice in enumerate((*actions, -1)[: len(before)]):
            counts[step, choice] += 1
    n_there = counts.sum(1, keepdims=True)
    shares = np.divide(counts, n_there, out=before.copy(), where=n_there > 0)
    smoothed: NDArray[np.float64] = (1 - _SMOOTHING) * shares + _SMOOTHING / before.shape[1]
    return smoothed


def _climb(costs: _Costs, slow: Dynamics, root: Actions, span: int, seed: int, *, near: float) -> int:
    """Look at sequences that go on from a root by way of sub-goals; how many populations the slow dynamics stepped.

    Nothing is gone on with if longer sequences could not be the best ones even if they came as near as `near`.
    """
    left = costs.tree.horizon - len(root)
    _explore(costs, root, min(span, left), seed)
    if costs.longest(costs.tree.horizon, distance=near) <= len(root) + span:
        return 0
    subgoals, n_slow = _subgoals(costs, slow, root, span, seed)
    tried = {root}
    for subgoal in subgoals:
        way = _Costs(costs.tree, subgoal, costs.action_cost, root)
        _explore(way, root, span, seed)
        reached = way.best(1)[0]
        if reached not in tried:
            tried.add(reached)
            n_slow += _climb(costs, slow, reached, span, seed, near=near)
        # The first choice matters most; further ones would multiply.
        if len(tried) > (1 if root else _N_SUBGOALS):
            break
    return n_slow


def _subgoals(costs: _Costs, slow: Dynamics, root: Actions, span: int, seed: int) -> tuple[Tensor, int]:
    """What the first macro-actions of plans of several lead to, the best plan first, and the populations stepped."""
    n_macros = min(_N_AHEAD, -(-(costs.tree.horizon - len(root)) // span))
    tree = _Tree(slow, costs.tree.populations([root])[0], n_macros)
    # Slow dynamics are not exact: that one macro-action seems to do is no reason not to look at several.
    plans = _Costs(tree, costs.goal, costs.action_cost * span, prunes=False)
    _explore(plans, (), n_macros, seed)
    firsts = dict.fromkeys(plan[:1] for plan in plans.best(None) if len(plan) > 1)
    return tree.populations(list(firsts)), tree.n_evaluations
