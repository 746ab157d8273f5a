"""Searches find sequences that are known to be the shortest, count what they step, and refuse what makes no sense."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance as scipy_energy_distance
from torch import Tensor

from genejepa.errors import ConfigError, DataError
from genejepa.world import planning
from genejepa.world.planning import Candidate, Search, energy_distance, search

if TYPE_CHECKING:
    from genejepa.world.planning import Dynamics

COST = 0.01
N_CELLS = 8
NOISE = 0.1
Word = tuple[int, ...]


class Hidden:
    """Cells around the points of hidden states; an action moves all of them as it moves the state."""

    def __init__(self, points: Tensor, table: list[list[int]]) -> None:
        self.points, self.table = points, torch.tensor(table)
        self.n_stepped = 0

    @property
    def n_actions(self) -> int:
        return len(self.table)

    def step(self, populations: Tensor, actions: Tensor, depth: int, /) -> Tensor:
        self.n_stepped += len(populations)
        here = torch.cdist(populations.mean(1), self.points).argmin(1)
        return populations + (self.points[self.table[actions, here]] - self.points[here])[:, None]

    def cells(self, state: int, rng: np.random.Generator) -> Tensor:
        noise = NOISE * rng.normal(size=(N_CELLS, self.points.shape[1]))
        return self.points[state] + torch.from_numpy(noise).float()

    def shortest(self, start: int, horizon: int) -> dict[int, Word]:
        """Shortest sequence to every state within reach, the first of equally short ones."""
        words: dict[int, Word] = {start: ()}
        last = [start]
        for _ in range(horizon):
            reached = []
            for state, action in itertools.product(last, range(self.n_actions)):
                after = int(self.table[action, state])
                if after not in words:
                    words[after] = (*words[state], action)
                    reached.append(after)
            last = reached
        return words


class Macro:
    """Exact effect of some sequences of actions of equal length."""

    def __init__(self, fast: Hidden, words: list[Word]) -> None:
        self.fast, self.words = Hidden(fast.points, fast.table.tolist()), torch.tensor(words)
        self.n_stepped = 0

    @property
    def n_actions(self) -> int:
        return len(self.words)

    def step(self, populations: Tensor, actions: Tensor, depth: int, /) -> Tensor:
        self.n_stepped += len(populations)
        for position in range(self.words.shape[1]):
            populations = self.fast.step(populations, self.words[actions, position], position)
        return populations


class Problem(NamedTuple):
    dynamics: Hidden
    start: Tensor
    goal: Tensor
    shortest: Word


def maze(size: int = 5) -> Hidden:
    """A grid with walls, in 8 dimensions: four moves, and a quarter turn about the centre."""
    walls = {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1)}
    nodes = [node for node in itertools.product(range(size), repeat=2) if node not in walls]
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 2)))[0].T
    moved = [[(x + dx, y + dy) for x, y in nodes] for dx, dy in [(1, 0), (-1, 0), (0, 1), (0, -1)]]
    moved.append([(y, size - 1 - x) for x, y in nodes])
    index = {node: number for number, node in enumerate(nodes)}
    table = [[index.get(after, number) for number, after in enumerate(row)] for row in moved]
    return Hidden(torch.from_numpy(2 * np.array(nodes) @ axes).float(), table)


def shuffle(n_items: int = 6) -> Hidden:
    """Orders of items, each item a coordinate: swaps of neighbours, and a turn of all of them."""
    orders = list(itertools.permutations(range(n_items)))
    moves = [(*range(i), i + 1, i, *range(i + 2, n_items)) for i in range(n_items - 1)]
    moves.append((n_items - 1, *range(n_items - 1)))
    index = {order: number for number, order in enumerate(orders)}
    table = [[index[tuple(order[i] for i in move)] for order in orders] for move in moves]
    return Hidden(torch.tensor(orders).float() - (n_items - 1) / 2, table)


MAZE, SHUFFLE = maze(), shuffle()


def draw(world: Hidden, number: int, lengths: tuple[int, ...]) -> Problem:
    """Random start, and a goal at a distance of so many actions."""
    rng = np.random.default_rng(number)
    dynamics = Hidden(world.points, world.table.tolist())
    far: list[tuple[int, Word]] = []
    while not far:
        start = int(rng.integers(len(world.points)))
        words = world.shortest(start, max(lengths))
        far = [(state, word) for state, word in words.items() if len(word) in lengths]
    state, word = far[rng.integers(len(far))]
    return Problem(dynamics, dynamics.cells(start, rng), dynamics.cells(state, rng), word)


def draw_macro(number: int) -> tuple[Problem, Macro]:
    """Random start, and a goal six actions away that two of eight macro-actions lead to."""
    rng = np.random.default_rng(number)
    dynamics = Hidden(SHUFFLE.points, SHUFFLE.table.tolist())
    start = int(rng.integers(len(dynamics.points)))
    shortest = {state: word for state, word in SHUFFLE.shortest(start, 6).items() if len(word) == 6}
    ends: list[int] = []
    while not ends:
        words = [tuple(word) for word in rng.integers(dynamics.n_actions, size=(8, 3)).tolist()]
        ends = []
        for first, second in itertools.product(words, repeat=2):
            state = start
            for action in first + second:
                state = int(dynamics.table[action, state])
            if state in shortest:
                ends.append(state)
    end = ends[rng.integers(len(ends))]
    problem = Problem(dynamics, dynamics.cells(start, rng), dynamics.cells(end, rng), shortest[end])
    return problem, Macro(dynamics, words)


def solved(found: Search, problem: Problem) -> bool:
    """Whether the best sequence leads to the goal, and no shorter one does."""
    best = found.candidates[0]
    return len(best.actions) == len(problem.shortest) and best.distances[-1] < 4 * NOISE


@pytest.mark.parametrize("n_cells", [1, 7, 40])
def test_energy_distance_is_that_of_scipy_in_one_dimension(rng: np.random.Generator, n_cells: int) -> None:
    populations, goal = rng.normal(size=(5, n_cells, 1)), rng.normal(1, 2, size=(30, 1))
    found = energy_distance(torch.from_numpy(populations), torch.from_numpy(goal))
    np.testing.assert_allclose(found, [scipy_energy_distance(x[:, 0], goal[:, 0]) for x in populations], rtol=1e-9)


def test_energy_distance_is_the_formula_in_chunks_of_any_size(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    populations, goal = rng.normal(size=(9, 20, 4)), rng.normal(1, 2, size=(30, 4))
    expected = [np.sqrt(2 * cdist(x, goal).mean() - cdist(x, x).mean() - cdist(goal, goal).mean()) for x in populations]
    for values in (1, 1300, 10**6):
        monkeypatch.setattr(planning, "_CHUNK_VALUES", values)
        found = energy_distance(torch.from_numpy(populations).float().requires_grad_(), torch.from_numpy(goal).float())
        assert not found.requires_grad
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_population_has_no_distance_to_itself_in_another_order(rng: np.random.Generator) -> None:
    cells = torch.from_numpy(rng.normal(100, 1, size=(50, 3))).float()
    assert energy_distance(cells[None].flip(1), cells).item() < 1e-3


@pytest.mark.parametrize("world", [MAZE, SHUFFLE], ids=["maze", "shuffle"])
@pytest.mark.parametrize("number", range(4))
def test_looking_at_all_sequences_finds_the_first_of_the_shortest(world: Hidden, number: int) -> None:
    problem = draw(world, number, (2, 3, 4))
    found = search(*problem[:3], horizon=4, action_cost=COST, method="exhaustive")
    assert found.candidates[0].actions == problem.shortest
    every = sum(world.n_actions**length for length in range(1, 5))
    assert found.n_evaluations == problem.dynamics.n_stepped == every


def test_the_way_may_lead_away_from_the_goal_first() -> None:
    line = torch.tensor([[0.0], [-2.0], [1.0], [-3.0]])
    gate = Hidden(line, [[2 if state == 3 else state for state in range(4)], [1, 3, 2, 3]])
    rng = np.random.default_rng(0)
    start, goal = gate.cells(0, rng), gate.cells(2, rng)
    for method in ("exhaustive", "cross_entropy"):
        best = search(gate, start, goal, horizon=4, action_cost=COST, method=method).candidates[0]
        assert best.actions == (1, 1, 0)
        assert best.distances[3] < best.distances[0] < best.distances[1] < best.distances[2]


def test_candidates_say_what_they_cost_best_first_and_once() -> None:
    problem = draw(MAZE, 0, (3,))
    found = search(*problem[:3], horizon=3, action_cost=COST, n_best=10_000)
    assert found.method == "exhaustive"
    assert len(found.candidates) == len({c.actions for c in found.candidates}) == found.n_evaluations + 1
    costs = [candidate.cost for candidate in found.candidates]
    np.testing.assert_allclose(costs, sorted(costs), atol=1e-5)
    for candidate in found.candidates[::17]:
        population, distances = problem.start[None], []
        for action in (None, *candidate.actions):
            if action is not None:
                population = problem.dynamics.step(population, torch.tensor([action]), 0)
            distances.append(energy_distance(population, problem.goal).item())
        np.testing.assert_allclose(candidate.distances, distances, atol=1e-5)
        assert candidate.cost == pytest.approx(candidate.distances[-1] + COST * len(candidate.actions))
    assert len(search(*problem[:3], horizon=3, action_cost=COST, n_best=4).candidates) == 4


def test_doing_nothing_is_best_where_the_goal_is_the_start() -> None:
    problem = draw(MAZE, 0, (3,))
    for method in ("exhaustive", "cross_entropy"):
        found = search(problem.dynamics, problem.start, problem.start, horizon=3, action_cost=0.0, method=method)
        assert found.candidates[0] == Candidate((), 0.0, (0.0,))


def test_equal_costs_are_ordered_by_length_and_then_by_action_numbers() -> None:
    twins = Hidden(torch.tensor([[0.0], [5.0]]), [[0, 1], [1, 1], [1, 1]])
    start, goal = twins.points[:1].expand(3, -1), twins.points[1:].expand(3, -1)
    found = search(twins, start, goal, horizon=2, action_cost=0.0, n_best=6)
    assert [candidate.actions for candidate in found.candidates] == [(1,), (2,), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_dear_action_is_not_worth_its_while() -> None:
    problem = draw(MAZE, 0, (3,))
    assert search(*problem[:3], horizon=3, action_cost=100.0).candidates[0].actions == ()


def test_cross_entropy_finds_the_shortest_nearly_always() -> None:
    n_solved = 0
    for number in range(50):
        horizon = 4 + number % 3
        problem = draw((MAZE, SHUFFLE)[number % 2], number, tuple(range(4, horizon + 1)))
        found = search(*problem[:3], horizon=horizon, action_cost=COST, method="cross_entropy")
        assert found.n_evaluations == problem.dynamics.n_stepped
        n_solved += solved(found, problem)
    assert n_solved >= 45


class Turns:
    """Permutes the coordinates of cells, among 40,320 orders: swaps of neighbours, and a turn of all of them."""

    n_actions = 8

    def step(self, populations: Tensor, actions: Tensor, depth: int, /) -> Tensor:
        moves = torch.tensor([[*range(i), i + 1, i, *range(i + 2, 8)] for i in range(7)] + [[7, *range(7)]])
        return populations.gather(2, moves[actions][:, None].expand(-1, populations.shape[1], -1))


def test_learning_where_to_look_beats_chance_among_many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(number: int) -> tuple[int, bool]:
        rng = np.random.default_rng(number)
        centre = torch.linspace(-2, 2, 8)[None, None]
        goal = centre
        for action in rng.integers(8, size=6):
            goal = Turns().step(goal, torch.tensor([action]), 0)
        start, goal = (x[0] + torch.from_numpy(NOISE * rng.normal(size=(N_CELLS, 8))).float() for x in (centre, goal))
        found = search(Turns(), start, goal, horizon=6, action_cost=COST)
        assert found.method == "cross_entropy"
        return found.n_evaluations, found.candidates[0].distances[-1] < 4 * NOISE

    learnt = np.sum([plan(number) for number in range(6)], axis=0)
    monkeypatch.setattr(planning, "_shares", lambda elites, before: before)
    chance = np.sum([plan(number) for number in range(6)], axis=0)
    assert learnt[0] < 0.8 * chance[0]
    assert learnt[1] >= max(5, chance[1] + 2)


def test_no_sequence_is_stepped_twice() -> None:
    problem = draw(SHUFFLE, 2, (5,))
    chains = torch.zeros(N_CELLS, 6)
    seen: Counter[tuple[float, ...]] = Counter()

    class Recorder:
        """Writes the actions into the population."""

        n_actions = 6

        def step(self, populations: Tensor, actions: Tensor, depth: int, /) -> Tensor:
            after = populations.roll(1, dims=2)
            after[:, :, 0] = actions[:, None] + 1.0
            seen.update(tuple(row) for row in after[:, 0].tolist())
            return after

    found = search(Recorder(), chains, problem.goal, horizon=5, action_cost=COST, method="cross_entropy")
    assert found.n_evaluations == len(seen) > 300
    assert set(seen.values()) == {1}


def test_too_little_memory_costs_evaluations_but_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(MAZE, 3, (4,))
    results = []
    for chunk, kept in ((2**22, 2**28), (5 * problem.start.numel(), 2**28), (1, 40 * problem.start.numel())):
        monkeypatch.setattr(planning, "_CHUNK_VALUES", chunk)
        monkeypatch.setattr(planning, "_KEPT_VALUES", kept)
        problem.dynamics.n_stepped = 0
        found = search(*problem[:3], horizon=4, action_cost=COST)
        assert found.n_evaluations == problem.dynamics.n_stepped
        results.append(found)
    full, chunked, small = results
    assert full.n_evaluations == chunked.n_evaluations == 780 < small.n_evaluations
    for other in (chunked, small):
        assert [c.actions for c in other.candidates] == [c.actions for c in full.candidates]


def test_sub_goals_save_evaluations_and_lose_no_success() -> None:
    evaluations, n_solved = np.zeros(2, dtype=int), np.zeros(2, dtype=int)
    for number in range(10):
        problem, slow = draw_macro(number)
        sampled = search(*problem[:3], horizon=6, action_cost=COST, method="cross_entropy")
        problem.dynamics.n_stepped = 0
        found = search(*problem[:3], horizon=6, action_cost=COST, method="hierarchical", slow=slow, span=3)
        assert found.n_evaluations == problem.dynamics.n_stepped + slow.n_stepped
        assert slow.n_stepped >= 8 + 8**2
        evaluations += [sampled.n_evaluations, found.n_evaluations]
        n_solved += [solved(sampled, problem), solved(found, problem)]
    assert n_solved[1] >= max(n_solved[0], 9)
    assert evaluations[1] <= evaluations[0] / 3


def test_sub_goals_lead_over_three_segments_although_the_slow_model_errs() -> None:
    rng = np.random.default_rng(0)
    steps = [[min(state + 1, 11) for state in range(12)], [max(state - 1, 0) for state in range(12)]]
    line = Hidden(torch.arange(12.0)[:, None], steps)
    start, goal = line.cells(1, rng), line.cells(9, rng)

    class Biased(Macro):
        def step(self, populations: Tensor, actions: Tensor, depth: int, /) -> Tensor:
            return super().step(populations, actions, depth) + 0.3

    slow = Biased(line, [(0, 0, 0), (1, 1, 1), (0, 1, 0)])
    found = search(line, start, goal, horizon=9, action_cost=COST, method="hierarchical", slow=slow, span=3)
    assert found.candidates[0].actions == (0,) * 8
    assert len(found.candidates[0].distances) == 9


@pytest.mark.parametrize("method", ["cross_entropy", "hierarchical"])
def test_equal_seeds_give_equal_results(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, slow = draw_macro(3)
    monkeypatch.setattr(planning, "_MOST_SEQUENCES", 100)  # segments are sampled as well

    def run(seed: int) -> Search:
        return search(*problem[:3], horizon=6, action_cost=COST, method=method, slow=slow, span=3, seed=seed)

    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    first = run(0)
    assert run(0) == first
    assert run(1) != first
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]  # noqa: NPY002


def test_what_is_not_finite_comes_last() -> None:
    class Explosive(Hidden):
        def step(self, populations: Tensor, actions: Tensor, depth: int, /) -> Tensor:
            after = super().step(populations, actions, depth)
            after[actions == 1] = torch.nan
            return after

    world = Explosive(torch.tensor([[0.0], [5.0]]), [[1, 1], [0, 0]])
    start, goal = world.points[:1].expand(3, -1), world.points[1:].expand(3, -1)
    found = search(world, start, goal, horizon=2, action_cost=0.0, n_best=10)
    assert found.candidates[0].actions == (0,)
    assert [c.actions for c in found.candidates if c.cost == np.inf] == [(1,), (0, 1), (1, 0), (1, 1)]
    assert found.candidates[-1].actions == (1, 1)


@pytest.mark.parametrize(("action_cost", "n_evaluations"), [(0.1, 2), (0.0, 2 + 4 + 8 + 16)])
def test_actions_that_alone_cost_more_than_the_best_are_not_tried(action_cost: float, n_evaluations: int) -> None:
    """One action reaches the goal, and costs 0.1: no longer sequence can be better."""
    world = Hidden(torch.tensor([[0.0], [5.0]]), [[1, 0], [1, 0]])
    start, goal = world.points[:1].expand(3, -1), world.points[1:].expand(3, -1)
    found = search(world, start, goal, horizon=4, action_cost=action_cost, method="exhaustive")
    assert found.candidates[0].actions == (0,)
    assert found.n_evaluations == n_evaluations


@pytest.fixture(scope="module")
def easy() -> Problem:
    return draw(MAZE, 0, (2,))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "greedy"}, "`method` is 'greedy'"),
        ({"horizon": 0}, "`horizon` is 0"),
        ({"horizon": 1.5}, "`horizon` is 1.5"),
        ({"n_best": 0}, "`n_best` is 0"),
        ({"seed": -1}, "`seed` is -1"),
        ({"action_cost": -0.1}, "`action_cost` is -0.1"),
        ({"action_cost": float("nan")}, "`action_cost` is nan"),
        ({"method": "hierarchical", "span": 1}, "no `slow`"),
        ({"method": "hierarchical", "slow": MAZE}, "`span` is None"),
        ({"method": "hierarchical", "slow": MAZE, "span": 0}, "`span` is 0"),
        ({"method": "hierarchical", "slow": MAZE, "span": 2}, "expected a shorter span"),
    ],
)
def test_wrong_settings_are_refused(easy: Problem, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(*easy[:3], **{"horizon": 2, "action_cost": COST} | wrong)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (torch.zeros(4, 3), r"`goal` has shape \(4, 3\)"),
        (torch.zeros(8), r"`goal` has shape \(8,\)"),
        (torch.zeros(0, 8), r"`goal` has shape \(0, 8\)"),
        (torch.full((4, 8), torch.nan), "`goal` has 4 of 4 cells"),
    ],
)
def test_wrong_populations_are_refused(easy: Problem, goal: Tensor, message: str) -> None:
    dynamics: Dynamics = easy.dynamics
    with pytest.raises(DataError, match=message):
        search(dynamics, easy.start, goal, horizon=2, action_cost=COST)
