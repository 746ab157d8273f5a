"""Picture of planned sequences of actions."""

from __future__ import annotations

from itertools import pairwise
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from genejepa.errors import ConfigError, DataError
from genejepa.pl._beside import write_beside
from genejepa.pl._style import PALETTE, figure_of, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from numpy.typing import NDArray

    from genejepa.world.plan import Plan

    Floats = NDArray[np.float64]

__all__ = ["plan"]

_START: Final = "#777777"
_GOAL: Final = PALETTE[1]
_LINES: Final = tuple(color for color in PALETTE if color != _GOAL)
_TEXT: Final = "#1A1A1A"
_WIDTH: Final = 24
"""Letters in a line of a name."""
_GAP: Final = 5.0
"""Pixels between two names, and between a name and what it names."""


def plan(plan: Plan, *, n_best: int = 3, rank: int = 1, figure: Figure | None = None) -> Figure:
    """Draw where a planned sequence is imagined to lead, and how near the best sequences come to the goal.

    Left: cells of the start, of the goal, and imagined after each action, in the two leading principal components of
    all of them. Arrows join the means of the populations, each with the name of its action. What is apart in the
    space of the model may lie together in two components; the labels of the axes give their share of the variance.
    Right: energy distance to the goal before any action and after each, one line per sequence, labelled by its rank
    and its actions; dots go on from the end of a sequence to its label.

    Parameters
    ----------
    plan
        Result of planning, with sequences of actions and imagined populations.
    n_best
        Number of sequences on the right, the best first; fewer if there are fewer.
    rank
        Rank of the sequence on the left, from 1; on the right its line is thick, and added if it is not there.
    figure
        Empty figure to draw on; a new one by default.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Raises
    ------
    ConfigError
        If `n_best` is no whole number of at least 1, or there is no sequence of this rank.
    DataError
        If states or distances are not finite, or states have less than two dimensions.
    """
    n_sequences = len(plan.sequences)
    if not isinstance(n_best, int | np.integer) or n_best < 1:
        raise ConfigError(f"`n_best` is {n_best!r}, expected a whole number of at least 1.", fix="pass n_best=3.")
    if rank not in range(1, n_sequences + 1):
        raise ConfigError(
            f"`rank` is {rank!r}, and the plan has {n_sequences} sequences; expected a rank from 1.", fix="pass rank=1."
        )
    ranks = sorted({*range(1, min(n_best, n_sequences) + 1), rank})
    color = _LINES[ranks.index(rank) % len(_LINES)]
    points, goal, shares = _project(plan, rank)
    names = [_name(shown, plan.sequences[shown - 1]) for shown in ranks]
    if figure is None:
        figure = new_figure(10.5, max(4.4, 0.9 + 0.17 * sum(name.count("\n") + 1.5 for name in names)))
    left, right = figure.subplots(1, 2)
    # Labels of the right panel take room from the left one, and must come before what is placed in it by pixels.
    _draw_distances(right, plan, dict(zip(ranks, names, strict=True)), rank)
    _draw_states(left, points, goal, shares, plan.sequences[rank - 1], color)
    return figure


def _project(plan: Plan, rank: int) -> tuple[Floats, Floats, Floats]:
    """Two components of the populations, (n_actions + 1, n_cells, 2), of the goal, and the shares of the variance."""
    from sklearn.decomposition import PCA

    populations, goal = np.asarray(plan.populations[rank - 1], dtype=np.float64), np.asarray(plan.goal, np.float64)
    dim = populations.shape[-1]
    cells = np.concatenate([goal, populations.reshape(-1, dim)])
    bad = int((~np.isfinite(cells)).any(1).sum())
    if bad:
        raise DataError(
            f"the populations of rank {rank} and `plan.goal` have {bad} of {len(cells)} states that are not finite, "
            "expected none.",
            fix="plan from and to finite states, or pass the rank of another sequence.",
        )
    if min(cells.shape) < 2:
        raise DataError(
            f"there are {len(cells)} states of {dim} dimensions, expected at least 2 of each.",
            fix="plan with a model of more dimensions, and with more cells.",
        )
    # Of states that are all equal the share of the variance is 0 / 0.
    with np.errstate(invalid="ignore"):
        pca = PCA(2, svd_solver="full").fit(cells)
    points: Floats = pca.transform(cells)
    shares: Floats = np.nan_to_num(pca.explained_variance_ratio_)
    return points[len(goal) :].reshape(*populations.shape[:2], 2), points[: len(goal)], shares


def _draw_states(ax: Axes, points: Floats, goal: Floats, shares: Floats, actions: tuple[str, ...], color: str) -> None:
    """Draw clouds of start, goal and imagined cells, and the way of the mean."""
    size = float(np.clip(9_000 / len(goal), 3.0, 20.0))
    for cells, shade, alpha in [
        (goal, _GOAL, 0.6),
        (points[0], _START, 0.6),
        *((imagined, color, 0.25) for imagined in points[1:]),
    ]:
        ax.scatter(cells[:, 0], cells[:, 1], s=size, c=shade, alpha=alpha, linewidths=0, rasterized=True)
    means, end = points.mean(1), goal.mean(0)
    arrow = {"arrowstyle": "-|>", "color": _TEXT, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    for before, after in pairwise(means):
        ax.annotate("", after, before, arrowprops=arrow)
    ax.plot(*means.T, "o", color=_TEXT, markersize=4, zorder=4)
    ax.plot(*end, "X", color=_GOAL, markeredgecolor=_TEXT, markersize=9, zorder=4)
    ax.set(
        xlabel=f"PC 1 ({100 * shares[0]:.0f} % of variance)",
        ylabel=f"PC 2 ({100 * shares[1]:.0f} %)",
        xticks=[],
        yticks=[],
    )
    everything = np.concatenate([goal, *points])
    low, high = everything.min(0), everything.max(0)
    reach = 0.6 * float((high - low).max()) or 1.0
    (x, y) = (low + high) / 2
    ax.set(xlim=(x - reach, x + reach), ylim=(y - reach, y + reach), aspect="equal")
    ax.spines[["top", "right"]].set_visible(False)
    steps = np.linspace(means[:-1], means[1:], 15)
    write_beside(
        ax,
        np.concatenate([means[:1], end[None], steps[7]]),
        ["start", "goal", *("\n".join(_lines(action)) for action in actions)],
        avoid=np.concatenate([means, *steps]),
        cloud=everything,
    )


def _lines(name: str) -> list[str]:
    """Lines of a long name."""
    return wrap(name, _WIDTH, break_on_hyphens=False)


def _draw_distances(ax: Axes, plan: Plan, names: dict[int, str], rank: int) -> None:
    """Draw the distance to the goal against the number of actions, for ranks with their names."""
    from matplotlib.ticker import MaxNLocator

    lines = {shown: np.asarray(plan.distances[shown - 1], dtype=np.float64) for shown in names}
    bad = [shown for shown, line in lines.items() if not np.isfinite(line).all()]
    if bad:
        raise DataError(
            f"`plan.distances` are not finite for {len(bad)} of {len(lines)} sequences, of rank {bad[:3]}.",
            fix="plan with fewer actions, or pass a smaller n_best or another rank.",
        )
    last = max(1, *(len(line) - 1 for line in lines.values()))
    labels = []
    for i, (shown, line) in enumerate(lines.items()):
        color, chosen = _LINES[i % len(_LINES)], shown == rank
        style: dict[str, Any] = {"color": color, "clip_on": False, "zorder": 4 if chosen else 3}
        ax.plot(line, "o-", linewidth=2.6 if chosen else 1.4, markersize=6 if chosen else 4, **style)
        ax.plot([len(line) - 1, last], line[[-1, -1]], ":", linewidth=1.2, **style)
        labels.append(_label(ax, names[shown], float(line[-1]), color, bold=chosen))
    ax.set(xlabel="Actions taken", ylabel="Energy distance to the goal", xlim=(0, last))
    ax.set_ylim(0, 1.05 * max(line.max() for line in lines.values()) or 1.0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    _part(ax, labels)


def _name(rank: int, actions: tuple[str, ...]) -> str:
    """Rank and actions of a sequence: in one line if they fit, else each action in lines of its own."""
    name = f"{rank}. {' > '.join(actions) or 'nothing'}"
    if len(name) <= _WIDTH:
        return name
    heads = [f"{rank}. {actions[0]}", *(f"> {action}" for action in actions[1:])]
    return "\n".join(line for head in heads for line in _lines(head))


def _label(ax: Axes, name: str, height: float, color: str, *, bold: bool) -> Annotation:
    """Write a name right of the axes, joined to the edge at its height."""
    return ax.annotate(
        name,
        (1, height),
        (1.07, height),
        xycoords=ax.get_yaxis_transform(),
        textcoords=ax.get_yaxis_transform(),
        va="center",
        fontsize="small",
        fontweight="bold" if bold else "normal",
        color=_TEXT,
        annotation_clip=False,
        arrowprops={
            "arrowstyle": "-",
            "color": color,
            "linestyle": ":",
            "linewidth": 1.2,
            "relpos": (0, 0.5),
            "shrinkA": 2,
            "shrinkB": 0,
        },
    )


def _part(ax: Axes, labels: list[Annotation]) -> None:
    """Move labels up until none covers another, and down again from the top of the axes."""
    from matplotlib.text import Text

    figure_of(ax).draw_without_rendering()
    x = labels[0].get_position()[0]
    wanted = ax.transData.transform([(0, label.get_position()[1]) for label in labels])[:, 1]
    # The extent of an annotation includes its line.
    half = np.array([Text.get_window_extent(label).height for label in labels]) / 2
    order = np.argsort(wanted, kind="stable")
    y, half = wanted[order], half[order] + _GAP / 2
    y[0] = max(y[0], ax.bbox.y0 + half[0])
    for i in range(1, len(y)):
        y[i] = max(y[i], y[i - 1] + half[i - 1] + half[i])
    y[-1] = min(y[-1], ax.bbox.y1 - half[-1])
    for i in range(len(y) - 2, -1, -1):
        y[i] = min(y[i], y[i + 1] - half[i + 1] - half[i])
    to_data = ax.transData.inverted()
    for i, height in zip(order, y, strict=True):
        labels[i].set_position((x, to_data.transform((0, height))[1]))
