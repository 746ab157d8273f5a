"""Pictures of plans and of predicted changes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

mpl.use("Agg")

from genejepa import evaluate, pl
from genejepa.errors import ConfigError, DataError, GeneMismatchError
from genejepa.pl._beside import write_beside
from genejepa.pl._style import figure_of
from genejepa.world.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox
    from numpy.typing import NDArray

SHIFTS = {"right": [4.0, 0, 0, 0], "up": [0, 3.0, 0, 0], "idle": [0.0, 0, 0, 0]}
LONG = "knock-out of the receptor IFNAR1 and of STAT2 (10 nM for 24 hours)"


def make_plan(*sequences: tuple[str, ...], shifts: dict[str, list[float]] = SHIFTS) -> Plan:
    """Populations of 40 cells that actions move, all in the plane of the first two of four dimensions."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(40, 4)) * [1, 0.7, 0, 0]
    goal = rng.normal(size=(30, 4)) * [1, 0.7, 0, 0] + [4, 3, 0, 0]
    populations = [
        start + np.cumsum([[0.0] * 4, *(shifts[action] for action in actions)], axis=0)[:, None]
        for actions in sequences
    ]
    distances = [np.linalg.norm(states.mean(1) - goal.mean(0), axis=1) for states in populations]
    return Plan(
        sequences=list(sequences),
        costs=np.array([way[-1] for way in distances]),
        distances=distances,
        populations=[states.astype(np.float32) for states in populations],
        goal=goal.astype(np.float32),
        method="exhaustive",
        n_evaluations=9,
        unlike=np.zeros(len(sequences)),
    )


def draw(plan: Plan, **arguments: Any) -> tuple[Axes, Axes]:
    left, right = pl.plan(plan, figure=Figure(figsize=(10.5, 6), layout="constrained"), **arguments).axes
    return left, right


def names(ax: Axes) -> list[str]:
    """What is written in or beside the axes, lines joined."""
    return [text.get_text().replace("\n", " ") for text in ax.texts if text.get_text()]


def boxes(ax: Axes) -> list[Bbox]:
    """Places of all that is written, without the lines of annotations."""
    figure_of(ax).draw_without_rendering()
    return [Text.get_window_extent(text) for text in ax.texts if text.get_text()]


def arrows(ax: Axes) -> NDArray[np.float64]:
    """Start and end of each arrow, (n, 2, 2)."""
    found = [text for text in ax.texts if isinstance(text, Annotation) and not text.get_text()]
    return np.array([[arrow.xyann, arrow.xy] for arrow in found]).reshape(-1, 2, 2)


def clouds(ax: Axes) -> list[NDArray[np.float64]]:
    return [np.asarray(dots.get_offsets()) for dots in ax.collections]


def line_points(line: Line2D) -> NDArray[np.float64]:
    return np.asarray(line.get_xydata(), dtype=np.float64)


def cloud_color(ax: Axes) -> tuple[float, float, float]:
    """Colour of the population that was imagined last."""
    r, g, b, _ = np.asarray(ax.collections[-1].get_facecolor())[0].tolist()
    return r, g, b


def assert_apart(found: list[Bbox]) -> None:
    assert len(found) > 1
    assert not any(box.overlaps(other) for i, box in enumerate(found) for other in found[:i])


def test_arrows_join_the_means_of_the_populations() -> None:
    left, _ = draw(make_plan(("right", "up"), ("right",)))
    goal, *states = clouds(left)
    assert [len(cells) for cells in (goal, *states)] == [30, 40, 40, 40]
    means = np.array([cells.mean(0) for cells in states])
    np.testing.assert_allclose(arrows(left), np.stack([means[:-1], means[1:]], 1), atol=1e-6)
    # The populations lie in a plane, which two components keep.
    np.testing.assert_allclose(np.linalg.norm(np.diff(means, axis=0), axis=1), [4, 3], rtol=1e-4)
    np.testing.assert_allclose(line_points(left.lines[1])[0], goal.mean(0), atol=1e-6)
    shares = [int(label.split("(")[1].split(" %")[0]) for label in (left.get_xlabel(), left.get_ylabel())]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert shares[0] > shares[1]


def test_names_are_beside_what_they_name() -> None:
    left, _ = draw(make_plan(("right", "up")))
    assert names(left) == ["start", "goal", "right", "up"]
    ways = left.transData.transform(arrows(left).reshape(-1, 2)).reshape(-1, 2, 2)
    goal = left.transData.transform(clouds(left)[0].mean(0))
    places = [ways[0, 0], goal, ways[0].mean(0), ways[1].mean(0)]
    shown = boxes(left)
    assert_apart(shown)
    on_arrows = np.concatenate([np.linspace(start, end, 15) for start, end in ways])
    for box, place in zip(shown, places, strict=True):
        assert not any(box.contains(*point) for point in [*on_arrows, goal])
        assert np.linalg.norm(np.clip(place, box.min, box.max) - place) < 100
    middle = [
        int(np.argmin([np.linalg.norm((np.asarray(box.min) + box.max) / 2 - place) for place in places]))
        for box in shown
    ]
    assert middle == [0, 1, 2, 3]


def test_lines_are_the_distances_of_the_best_sequences() -> None:
    plan = make_plan(("right", "up"), ("right",), (), ("idle", "idle"))
    left, right = draw(plan, n_best=3)
    assert names(right) == ["1. right > up", "2. right", "3. nothing"]
    solid, dotted = right.lines[::2], right.lines[1::2]
    for line, on, distances in zip(solid, dotted, plan.distances, strict=False):
        np.testing.assert_allclose(line_points(line), np.stack([np.arange(len(distances)), distances], 1))
        np.testing.assert_allclose(line_points(on), [[len(distances) - 1, distances[-1]], [2, distances[-1]]])
    assert len({line.get_color() for line in solid}) == 3
    assert len(solid) == 3
    assert right.get_ylim()[0] == 0
    widths = [line.get_linewidth() for line in solid]
    assert widths[0] > widths[1] == widths[2]
    assert same_color(cloud_color(left), to_rgb(solid[0].get_color()))


def test_a_sequence_of_any_rank_is_drawn_and_added() -> None:
    plan = make_plan(("right", "up"), ("right",), ("up",), ("idle", "up"))
    left, right = draw(plan, n_best=1, rank=4)
    assert names(left) == ["start", "goal", "idle", "up"]
    assert names(right) == ["1. right > up", "4. idle > up"]
    assert right.lines[2].get_linewidth() > right.lines[0].get_linewidth()
    assert same_color(cloud_color(left), to_rgb(right.lines[2].get_color()))
    assert names(draw(plan, n_best=99)[1])[-1] == "4. idle > up"


def test_doing_nothing() -> None:
    left, right = draw(make_plan(()))
    assert names(left) == ["start", "goal"]
    assert arrows(left).size == 0
    assert names(right) == ["1. nothing"]
    assert right.get_xlim() == (0, 1)


@pytest.mark.parametrize("n_best", [2, 5])
def test_long_names_stay_readable(n_best: int) -> None:
    shifts = {LONG: [2.0, 1, 0, 0], "A" * 50: [1.0, -1, 0, 0]}
    other = "A" * 50
    plan = make_plan((LONG, other, LONG), (LONG,), (other, LONG), (), (other,), shifts=shifts)
    figure = pl.plan(plan, n_best=n_best)
    left, right = figure.axes
    assert names(left)[2] == LONG
    assert names(right)[0].startswith(f"1. {LONG} > AAA")
    for ax in (left, right):
        assert_apart(boxes(ax))
    # All is on the figure, names of states are in their axes, and there is room for the lines.
    for box, within in [(b, left.bbox) for b in boxes(left)] + [(b, figure.bbox) for b in boxes(right)]:
        assert within.x0 - 1 <= box.x0 < box.x1 <= within.x1 + 1
        assert within.y0 - 1 <= box.y0 < box.y1 <= within.y1 + 1
    assert right.bbox.width > 0.25 * figure.bbox.width
    assert all(right.bbox.y0 - 1 <= box.y0 < box.y1 <= right.bbox.y1 + 1 for box in boxes(right))


def test_labels_of_equal_distances_are_apart() -> None:
    _, right = draw(make_plan(("right",), ("idle", "right"), ("right", "idle"), ("idle", "idle", "right")), n_best=4)
    assert_apart(boxes(right))


def test_a_long_label_of_a_small_distance_does_not_leave_the_axes() -> None:
    _, right = draw(make_plan(("right", "up", "idle", "idle", "idle")))
    assert line_points(right.lines[0])[-1, 1] < 0.5
    assert "\n" in right.texts[0].get_text()
    assert boxes(right)[0].y0 >= right.bbox.y0


def test_states_that_are_all_equal() -> None:
    plan = make_plan(("idle",))
    still = replace(
        plan, goal=np.ones((3, 4), np.float32), populations=[np.ones((2, 3, 4), np.float32)], distances=[np.zeros(2)]
    )
    left, right = draw(still)
    assert left.get_xlabel() == "PC 1 (0 % of variance)"
    assert right.get_ylim() == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"rank": 0}, "`rank` is 0"), ({"rank": 3}, "`rank` is 3.*2 sequences"), ({"n_best": 0}, "`n_best` is 0")],
)
def test_ranks_that_do_not_exist(arguments: dict[str, int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        draw(make_plan(("right",), ()), **arguments)


def test_plans_that_cannot_be_drawn() -> None:
    plan = make_plan(("right",), ())
    spoilt = plan.goal.copy()
    spoilt[2, 1] = np.nan
    with pytest.raises(DataError, match="1 of 110 states that are not finite"):
        draw(replace(plan, goal=spoilt))
    with pytest.raises(DataError, match=r"1 of 2 sequences, of rank \[2\]"):
        draw(replace(plan, distances=[plan.distances[0], np.array([np.inf])]))
    flat = [states[..., :1] for states in plan.populations]
    with pytest.raises(DataError, match="of 1 dimensions"):
        draw(replace(plan, goal=plan.goal[:, :1], populations=flat))


GENES = [f"gene{i}" for i in range(60)]


@pytest.fixture
def cells() -> tuple[ad.AnnData, ad.AnnData, ad.AnnData]:
    """Predicted, observed and control cells; the observed change of gene i is i / 10 - 2, up to noise."""
    rng = np.random.default_rng(1)
    var, changes = pd.DataFrame(index=GENES), np.arange(60) / 10 - 2
    control = rng.normal(3, 0.05, size=(50, 60))
    observed = rng.normal(3, 0.05, size=(40, 60)) + changes
    predicted = rng.normal(3, 0.05, size=(30, 60)) + 0.5 * changes + rng.normal(0, 0.5, size=60)
    made = [ad.AnnData(values.astype(np.float32), var=var) for values in (predicted, observed, control)]
    return made[0], made[1], made[2]


def transition(*cells: ad.AnnData, **arguments: Any) -> Axes:
    return pl.transition(*cells, ax=Figure(figsize=(5, 5)).subplots(), **arguments)


def changes(cells: tuple[ad.AnnData, ad.AnnData, ad.AnnData]) -> NDArray[np.float64]:
    """Observed and predicted changes of all genes, (n_genes, 2)."""
    guess, real, before = (np.asarray(each.X, dtype=np.float64).mean(0) for each in cells)
    return np.stack([real - before, guess - before], 1)


def test_a_dot_per_gene_at_its_changes(cells: tuple[ad.AnnData, ad.AnnData, ad.AnnData]) -> None:
    predicted, observed, control = cells
    expected = changes(cells)
    ax = transition(predicted, observed, control, n_names=3)
    rest, named = clouds(ax)
    np.testing.assert_allclose(named, expected[[59, 58, 57]], atol=1e-5)
    np.testing.assert_allclose(rest, expected[:57], atol=1e-5)
    assert names(ax) == ["gene59", "gene58", "gene57"]
    identity: Any = ax.lines[2]
    assert (identity.get_xy1(), identity.get_slope()) == ((0, 0), 1)
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlim()[0] < expected.min() < expected.max() < ax.get_xlim()[1]
    assert ax.get_xlabel().startswith("Observed")
    assert ax.get_ylabel().startswith("Predicted")


def test_the_correlation_is_that_of_the_evaluation(cells: tuple[ad.AnnData, ad.AnnData, ad.AnnData]) -> None:
    predicted, observed, control = cells
    for adata, label in zip(cells, ["stim", "stim", "ctrl"], strict=True):
        adata.obs["condition"] = label
    table = evaluate.transition(predicted, observed, control, action_key="condition", control="ctrl")
    expected = float(table["delta_pearson"]["model"])
    assert 0.5 < expected < 0.95
    assert transition(*cells).get_title() == f"Pearson {expected:.2f} over 60 genes"
    assert transition(control, observed, control).get_title() == "Pearson 0.00 over 60 genes"
    assert "undefined (no observed change)" in transition(predicted, control, control).get_title()


def test_genes_are_matched_by_name_and_matrices_may_be_sparse(
    cells: tuple[ad.AnnData, ad.AnnData, ad.AnnData],
) -> None:
    predicted, observed, control = cells
    predicted.X, control.X = sp.csr_matrix(predicted.X), sp.csc_matrix(control.X)
    shuffled = np.random.default_rng(2).permutation(60)
    first, second = transition(*cells), transition(predicted[:, shuffled], observed, control[:, shuffled[::-1]])
    assert first.get_title() == second.get_title()
    for one, other in zip(clouds(first), clouds(second), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_genes_that_fall_are_named_too(cells: tuple[ad.AnnData, ad.AnnData, ad.AnnData]) -> None:
    predicted, observed, control = cells
    observed.X[:, 7] -= 20
    assert names(transition(predicted, observed, control, n_names=2)) == ["gene7", "gene59"]


@pytest.mark.parametrize("crowd", [False, True])
def test_names_cover_neither_names_nor_named_dots(
    cells: tuple[ad.AnnData, ad.AnnData, ad.AnnData], *, crowd: bool
) -> None:
    predicted, observed, control = cells
    if crowd:
        for adata in (predicted, observed):
            adata.X[:, 45:] = control.X.mean(0)[45:] + 4 + 0.02 * np.arange(15)
    ax = transition(*cells, n_names=12)
    shown, dots = boxes(ax), ax.transData.transform(clouds(ax)[1])
    assert len(shown) == len(dots) == 12
    assert_apart(shown)
    for box in shown:
        assert not any(box.contains(*dot) for dot in dots)
        assert ax.bbox.x0 <= box.x0 < box.x1 <= ax.bbox.x1
        assert ax.bbox.y0 <= box.y0 < box.y1 <= ax.bbox.y1
    # A name is near its dot, or a line leads there.
    ends = [ax.transData.transform(line_points(line)[0]) for line in ax.lines[3:]]
    near = [np.linalg.norm(np.clip(dot, box.min, box.max) - dot) < 12 for box, dot in zip(shown, dots, strict=True)]
    joined = [any(np.allclose(dot, end) for end in ends) for dot in dots]
    assert all(a != b for a, b in zip(near, joined, strict=True))
    assert any(joined) or not crowd


def written(*, anchors: list[list[float]], avoid: list[list[float]], cloud: list[list[float]]) -> Axes:
    """Axes from 0 to 1 with the names n0, n1, ... beside places."""
    ax = Figure(figsize=(4, 4)).subplots()
    points = [np.array(each, dtype=np.float64).reshape(-1, 2) for each in (anchors, avoid, cloud)]
    write_beside(ax, points[0], [f"n{i}" for i in range(len(anchors))], avoid=points[1], cloud=points[2])
    return ax


def test_a_name_stands_where_the_cloud_is_thin() -> None:
    left_half = [[x, y] for x in np.linspace(0.3, 0.51, 30) for y in np.linspace(0.3, 0.7, 60)]
    ax = written(anchors=[[0.5, 0.5]], avoid=[], cloud=left_half)
    assert ax.transData.inverted().transform(boxes(ax)[0].min)[0] > 0.51
    assert not ax.lines


def test_a_line_to_a_name_crosses_no_other_name() -> None:
    wall = [[x, y] for x in np.linspace(0.35, 0.65, 40) for y in np.linspace(0.4, 0.6, 40)]
    ax = written(anchors=[[0.5, 0.5]] * 9, avoid=wall, cloud=[])
    shown = boxes(ax)
    assert_apart(shown)
    assert len(ax.lines) == 9
    for i, line in enumerate(ax.lines):
        start, end = ax.transData.transform(line_points(line))
        way = np.linspace(start, end, 50)
        assert not any(box.contains(*point) for j, box in enumerate(shown) if j != i for point in way)


def test_no_names(cells: tuple[ad.AnnData, ad.AnnData, ad.AnnData]) -> None:
    assert names(transition(*cells, n_names=0)) == []
    assert len(names(transition(*(each[:, :4] for each in cells), n_names=10))) == 4
    with pytest.raises(ConfigError, match="`n_names` is -1"):
        transition(*cells, n_names=-1)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_cells_that_cannot_be_compared(cells: tuple[ad.AnnData, ad.AnnData, ad.AnnData], position: int) -> None:
    name = ["predicted", "observed", "control"][position]

    def spoilt(adata: ad.AnnData) -> list[ad.AnnData]:
        return [adata if i == position else each for i, each in enumerate(cells)]

    with pytest.raises(GeneMismatchError, match=r"differ in 1 genes, \['gene59'\]"):
        transition(*spoilt(cells[position][:, :59]))
    twice = cells[position].copy()
    twice.var_names = [*GENES[:59], "gene0"]
    with pytest.raises(GeneMismatchError, match=rf"(?s)`{name}.var_names` has 1 repeated.*Fix: {name}.var_names_make"):
        transition(*spoilt(twice))
    with pytest.raises(DataError, match=f"`{name}` has 0 cells"):
        transition(*spoilt(cells[position][:0]))
    with pytest.raises(DataError, match=f"`{name}` has .* and no `X`"):
        transition(*spoilt(ad.AnnData(obs=cells[position].obs, var=cells[position].var)))
    cells[position].X[3, 4] = np.inf
    with pytest.raises(DataError, match=f"`{name}.X` has 1 NaN or infinite"):
        transition(*spoilt(cells[position]))
