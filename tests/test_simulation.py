"""The simulated cells obey scanpy's equations, and what is said about them is true."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scanpy.tools._sim import GRNsim

from genejepa import simulation
from genejepa.errors import ConfigError
from genejepa.simulation import Landscape, Regulation

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from anndata import AnnData
    from numpy.typing import NDArray

FATES = ["erythroid", "megakaryocyte", "monocyte", "granulocyte"]
ACTIONS = ["Gata2 up", "Gata2 down", "EKLF up", "Fli1 up", "Pu.1 up", "Gfi1 up"]


@pytest.fixture(scope="module")
def myeloid() -> Regulation:
    return Regulation.of("krumsiek11")


@pytest.fixture(scope="module")
def known(myeloid: Regulation) -> Landscape:
    return simulation.landscape(myeloid, FATES, ACTIONS, horizon=2, n_cells=24)


@pytest.fixture(scope="module")
def explored(myeloid: Regulation) -> AnnData:
    return simulation.explore(
        myeloid, FATES[:2], ["EKLF up", "Fli1 up"], n_steps=2, n_trajectories=6, n_cells=25, n_genes=60, seed=3
    )


def alike(first: NDArray[Any], second: NDArray[Any]) -> bool:
    return bool(np.abs(first.mean(0) - second.mean(0)).max() < 0.1)


@pytest.mark.parametrize("name", ["krumsiek11", "toggleswitch"])
@pytest.mark.filterwarnings("ignore:Exception ignored in.*sim_models:pytest.PytestUnraisableExceptionWarning")
def test_steps_are_those_of_scanpy(name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    # scanpy seeds the global generator and leaves its files open
    monkeypatch.setattr(np.random, "seed", lambda _: None)
    model, scanpys = Regulation.of(name), GRNsim(model=name, params={"seed": 0})
    assert list(model.genes) == list(scanpys.varNames)
    starts = rng.random((3, len(model.genes)))
    expected = starts.copy()
    for _ in range(100):
        expected += [scanpys.Xdiff_hill(state) for state in expected]
    found = model.advance(starts, "none", 100 * model.time_step)
    assert np.abs(found - starts).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "fates"),
    [("krumsiek11", [*FATES, "megakaryocyte without Gata2"]), ("toggleswitch", ["0 high", "1 high"])],
)
def test_cells_end_in_the_known_states_wherever_they_start(
    name: str, fates: list[str], rng: np.random.Generator
) -> None:
    model = Regulation.of(name)
    cells = model.advance(rng.random((800, len(model.genes))), "none", 25)
    ends = np.stack([model.start(fate, 30, rng=rng).mean(0) for fate in fates])
    distances = np.abs(cells[:, None] - ends).max(2)
    assert (distances.min(1) < 0.1).mean() > 0.95
    assert set(distances.argmin(1)[distances.min(1) < 0.1]) == set(range(len(fates)))


def test_progenitors_take_several_fates(myeloid: Regulation, rng: np.random.Generator) -> None:
    cells = myeloid.act(myeloid.start("progenitor", 60, rng=rng), "none", rng=rng)
    shares = (cells[:, [myeloid.genes.index(gene) for gene in ("EKLF", "Fli1", "EgrNab")]] > 0.5).mean(0)
    assert (shares > 0.05).all()
    assert 0.95 < shares.sum() <= 1


def test_named_populations_stay_as_they_are(myeloid: Regulation, rng: np.random.Generator) -> None:
    names = [name for name in myeloid.starts if name != "progenitor"]
    before = np.stack([myeloid.start(name, 20, rng=rng) for name in names])
    after = myeloid.act(before.reshape(-1, len(myeloid.genes)), "none", rng=rng).reshape(before.shape)
    for (one, old), (two, new) in itertools.product(zip(names, before, strict=True), zip(names, after, strict=True)):
        assert alike(old, new) == (one == two), (one, two)


@pytest.mark.parametrize(("action", "level"), [("cJun down", 0.0), ("EKLF up", 1.0)])
def test_a_gene_is_held_while_the_action_lasts_and_then_free(
    myeloid: Regulation, action: str, level: float, rng: np.random.Generator
) -> None:
    gene = myeloid.genes.index(action.split()[0])
    cells = myeloid.start("monocyte", 10, rng=rng)
    acted = myeloid.advance(cells, action, 1, rng=rng, noise=0.01)
    assert (acted[:, gene] == level).all()
    assert not (cells[:, gene] == level).any() or level == 1.0
    later = myeloid.advance(acted, "none", 5)
    assert np.abs(later[:, gene] - level).min() > 0.9


def test_cells_may_have_an_action_each(myeloid: Regulation, rng: np.random.Generator) -> None:
    cells = rng.random((3, len(myeloid.genes)))
    actions = ["Gata1 up", "none", "Pu.1 down"]
    together = myeloid.advance(cells, actions, 3)
    alone = [myeloid.advance(cells[i : i + 1], action, 3)[0] for i, action in enumerate(actions)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sequence", "end"),
    [
        (["Fli1 up", "Gata2 down"], "megakaryocyte without Gata2"),
        (["Gata2 down", "Fli1 up"], "granulocyte"),
    ],
)
def test_outcomes_depend_on_the_order_of_actions(
    myeloid: Regulation, sequence: list[str], end: str, rng: np.random.Generator
) -> None:
    found = simulation.outcome(myeloid, "erythroid", sequence, n_cells=40)
    assert alike(found, myeloid.start(end, 40, rng=rng))


def test_shortest_sequences_are_those_of_trying_everything(myeloid: Regulation, known: Landscape) -> None:
    rng = np.random.default_rng(7)
    sequences = list(itertools.product(ACTIONS, repeat=2))
    cells = np.tile(myeloid.start("monocyte", 20, rng=rng), (len(sequences), 1))
    halfway, ends = [], cells
    for step in range(2):
        ends = myeloid.act(ends, [sequence[step] for sequence in sequences for _ in range(20)], rng=rng)
        halfway.append(ends.reshape(len(sequences), 20, -1))
    n_far = 0
    for fate in FATES:
        goal = known.populations[known.starts[fate]]
        one = {(sequence[0],) for sequence, at in zip(sequences, halfway[0], strict=True) if alike(at, goal)}
        two = {sequence for sequence, at in zip(sequences, halfway[1], strict=True) if alike(at, goal)}
        if fate == "monocyte":
            assert known.shortest("monocyte", known.starts[fate]) == [()]
        else:
            assert set(known.shortest("monocyte", known.starts[fate])) == (one or two)
            n_far += not one
    assert n_far == 2


def test_what_is_out_of_reach_has_no_sequence(myeloid: Regulation) -> None:
    known = simulation.landscape(myeloid, ["monocyte", "erythroid"], ["Gata2 up", "EKLF up"], horizon=1, n_cells=20)
    assert known.shortest("monocyte", known.starts["erythroid"]) == []


def test_half_of_the_problems_need_more_than_one_action(known: Landscape) -> None:
    problems = simulation.draw_problems(known, 10, seed=1)
    lengths = [{len(sequence) for sequence in problem.sequences} for problem in problems]
    assert all(len(each) == 1 for each in lengths)
    assert sum(each == {1} for each in lengths) == 5
    assert sum(each == {2} for each in lengths) == 5
    assert len({(problem.start, problem.goal.tobytes()) for problem in problems}) == 10
    assert all(problem.goal.std(0).max() < 0.2 for problem in problems)


def test_problems_are_solved_by_their_sequences(myeloid: Regulation, known: Landscape) -> None:
    rng = np.random.default_rng(11)
    solved = [
        (problem, sequence) for problem in simulation.draw_problems(known, 10, seed=1) for sequence in problem.sequences
    ]
    cells = np.concatenate([known.populations[known.starts[problem.start]] for problem, _ in solved])
    for step in range(2):
        actions = [(*sequence, "none")[step] for _, sequence in solved]
        cells = myeloid.act(cells, np.repeat(actions, 24).tolist(), rng=rng)
    for (problem, sequence), end in zip(solved, cells.reshape(len(solved), 24, -1), strict=True):
        assert alike(end, problem.goal), (problem.start, sequence)


def test_trajectories_have_one_action_at_a_time(explored: AnnData) -> None:
    assert explored.shape == (6 * 3 * 25, 60)
    groups = explored.obs.groupby(["trajectory", "time"], observed=True)
    assert (groups.size() == 25).all()
    assert (groups["action"].nunique() == 1).all()
    assert set(explored.obs["time"]) == {0, 1, 2}
    assert (explored.obs["action"][explored.obs["time"] == 0] == "none").all()
    assert set(explored.obs["action"][explored.obs["time"] > 0]) == {"EKLF up", "Fli1 up"}


def test_the_last_action_decides_where_explored_cells_are(explored: AnnData) -> None:
    counts = explored.to_df()
    for action, gene, other in [("EKLF up", "EKLF", "Fli1"), ("Fli1 up", "Fli1", "EKLF")]:
        acted = counts[explored.obs["action"] == action]
        assert acted[gene].mean() > 5 * acted[other].mean() > 0
    first = counts[(explored.obs["time"] == 0) & (explored.obs["start"] == "erythroid")]
    assert first["EKLF"].mean() > 5 * first["Fli1"].mean()


def test_no_cell_is_measured_twice(explored: AnnData) -> None:
    assert len(np.unique(explored.obsm["regulators"], axis=0)) == explored.n_obs


def test_equal_seeds_give_equal_cells(
    global_rng_untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    model = Regulation.of("toggleswitch")

    def draw(seed: int) -> NDArray[Any]:
        found: NDArray[Any] = simulation.explore(
            model, ["0 high"], model.actions, n_steps=1, n_trajectories=3, n_cells=4, seed=seed
        ).X.toarray()
        return found

    with global_rng_untouched():
        one, same, other = draw(0), draw(0), draw(1)
    assert (one == same).all()
    assert (one != other).any()


def test_counts_look_like_those_of_sequenced_cells(myeloid: Regulation) -> None:
    states = myeloid.start("erythroid", 400, rng=np.random.default_rng(0))
    one, two = (simulation.observe(myeloid, states, rng=np.random.default_rng(seed)) for seed in (1, 2))
    counts = one.X.toarray()
    assert (counts == np.round(counts)).all()
    assert 2700 < np.median(counts.sum(1)) < 3300
    assert list(one.var_names[: len(myeloid.genes)]) == list(myeloid.genes)
    # the further genes are regulated in the same way in every call
    assert np.corrcoef(counts.mean(0), two.X.toarray().mean(0))[0, 1] > 0.99
    monocytes = myeloid.start("monocyte", 400, rng=np.random.default_rng(0))
    other = simulation.observe(myeloid, monocytes, rng=np.random.default_rng(3)).X.toarray()
    targets = slice(len(myeloid.genes), None)
    changes = np.abs(np.log((counts.mean(0) + 0.1) / (other.mean(0) + 0.1)))[targets]
    assert (changes > np.log(1.5)).mean() > 0.3


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.9])
def test_branches_have_their_fractions(fraction: float) -> None:
    adata = simulation.branching(1500, (fraction, 1 - fraction), seed=2)
    before, after = (adata[adata.obs["time"] == time] for time in (0, 1))
    assert before.n_obs == after.n_obs == 1500
    assert (before.obs["branch"] == "").all()
    assert (after.obs["branch"] == "0 high").mean() == pytest.approx(fraction, abs=0.035)
    assert set(after.obs["branch"]) == {"0 high", "1 high"}
    high = after[after.obs["branch"] == "0 high"].to_df()
    assert high["0"].mean() > 20 * high["1"].mean()
    # nothing in the state of a progenitor tells much about its fate
    assert before.obsm["regulators"].std(0).max() < 0.02


def test_a_single_fate_has_one_branch() -> None:
    adata = simulation.single_fate(200)
    before, after = (adata[adata.obs["time"] == time] for time in (0, 1))
    assert (before.obs["branch"] == "").all()
    assert (after.obs["branch"] == "0 high").all()
    assert np.abs(before.obsm["regulators"].mean(0) - 0.18).max() < 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: Regulation.of("paul15"), "model 'paul15' is unknown"),
        (lambda m: m.start("neuron", 2, rng=np.random.default_rng(0)), "start 'neuron' is unknown"),
        (lambda m: m.advance(np.zeros((2, 11)), "Sox2 up", 1), "action 'Sox2 up' is unknown"),
        (lambda m: m.advance(np.zeros((2, 11)), ["none"], 1), "1 actions for 2 cells"),
        (lambda m: simulation.outcome(m, "monocyte", ["Gata1"], n_cells=1), "action 'Gata1' is unknown"),
        (lambda m: simulation.explore(m, [], ["none"]), "`starts`"),
        (lambda m: simulation.explore(m, "monocyte", ["none"]), "`starts`"),
        (lambda m: simulation.explore(m, ["monocyte"], []), "`actions`"),
        (lambda m: simulation.explore(m, ["monocyte"], ["none"], n_steps=0), "`n_steps` is 0"),
        (lambda m: simulation.landscape(m, ["monocyte"], ["none"], horizon=0), "`horizon` is 0"),
        (lambda m: simulation.observe(m, np.zeros((1, 11)), n_genes=11, rng=np.random.default_rng(0)), "`n_genes`"),
        (lambda _: simulation.branching(10, (0.3, 0.6)), "`fractions`"),
        (lambda _: simulation.branching(10, (1.0, 0.0)), "`fractions`"),
        (lambda _: simulation.branching(0), "`n_cells` is 0"),
        (lambda _: simulation.single_fate(0), "`n_cells` is 0"),
    ],
)
def test_what_cannot_be_done_is_said(myeloid: Regulation, call: Callable[[Regulation], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(myeloid)


def test_too_many_problems_are_refused(known: Landscape) -> None:
    with pytest.raises(ConfigError, match="one action away"):
        simulation.draw_problems(known, 1000)
    with pytest.raises(ConfigError, match="start 'neuron' is unknown"):
        known.shortest("neuron", 0)
