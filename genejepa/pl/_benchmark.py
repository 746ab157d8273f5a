"""Picture of a comparison of methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from genejepa.errors import DataError
from genejepa.pl._style import PALETTE, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["benchmark"]


class _Panel(NamedTuple):
    """What a panel shows."""

    title: str
    task: str
    setting: str
    metric: str = "macro_f1"
    label: str = "Macro-F1"


_PANELS: Final = (
    _Panel("Linear probe", "linear", "all"),
    _Panel("Nearest neighbours", "knn", "all"),
    _Panel("Five labelled cells per class", "few_shot", "5"),
    _Panel("Shallow cells (25 % of counts)", "depth", "0.25"),
    _Panel("Few genes (20 % of panel)", "genes", "0.2"),
    _Panel("Left-out batch", "transfer", "mean"),
    _Panel("Batch integration", "integration", "all", "total", "scib-metrics total"),
    _Panel("Leiden clusters", "clustering", "leiden", "ari", "Adjusted Rand index"),
)
_UNITS: Final = ("dataset", "labels")
_OWN: Final = "genejepa"
_ACCENT: Final = PALETTE[3]
_OTHERS: Final = "#555555"
_N_COLUMNS: Final = 4


def benchmark(table: pd.DataFrame, *, regime: str | None = None, figure: Figure | None = None) -> Figure:
    """Draw how well each method does in each task, one panel per task; right is better.

    Dots are means over seeds, also written on the right. For one data set, lines are the mean 95 % intervals over
    cells. For several data sets (column ``dataset``), small dots are data sets and the large dot is their mean, hollow
    if the method has no value for some of them: it is then not comparable. Methods are in the order of their mean
    distance from the median method, the best on top; genejepa is in colour. Axes do not start at 0.

    Parameters
    ----------
    table
        Rows of :func:`genejepa.benchmark`, of one or several data sets.
    regime
        Regime to draw; the first of the table by default.
    figure
        Empty figure to draw on; a new one by default.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Raises
    ------
    DataError
        If the table has nothing that can be drawn.
    """
    regime = regime if regime is not None else str(table["regime"].iloc[0]) if len(table) else "transductive"
    rows = table[table["regime"] == regime]
    shown = [(panel, values) for panel in _PANELS if len(values := _values(rows, panel))]
    if not shown:
        raise DataError(
            f"The table has {len(rows)} rows of the regime {regime!r} and none of a task that can be drawn: "
            f"{', '.join(panel.task for panel in _PANELS)}.",
            fix="pass the table of genejepa.benchmark with some of these tasks.",
        )
    methods = _best_first([values for panel, values in shown if panel.metric == shown[0][0].metric])
    methods += sorted({name for _, values in shown for name in values["method"]} - set(methods))
    n_columns = min(_N_COLUMNS, len(shown))
    n_rows = -(-len(shown) // n_columns)
    if figure is None:
        width = 0.6 + 0.07 * max(map(len, methods)) + 2.5 * n_columns
        figure = new_figure(width, (0.9 + 0.24 * len(methods)) * n_rows + 0.3)
    for i, (panel, values) in enumerate(shown):
        ax = figure.add_subplot(n_rows, n_columns, i + 1)
        _draw_panel(ax, values, methods)
        ax.set(title=panel.title, xlabel=panel.label)
        ax.title.set_fontsize("medium")
        ax.set_yticks(range(len(methods)), methods if i % n_columns == 0 else [])
        for name in ax.get_yticklabels():
            if name.get_text() == _OWN:
                name.set(color=_ACCENT, fontweight="bold")
    if "labels_from_clustering" in rows and rows["labels_from_clustering"].any():
        some = "Labels" if rows["labels_from_clustering"].all() else "Labels of some data sets"
        note = f"{some} come from clustering the same counts: this favours principal components."
        figure.supxlabel(note, fontsize="small", color=_OTHERS)
    return figure


def _values(rows: pd.DataFrame, panel: _Panel) -> pd.DataFrame:
    """Mean value and bounds of what a panel shows, per method and data set (a method is one row without)."""
    wanted = (rows["task"] == panel.task) & (rows["setting"] == panel.setting) & (rows["metric"] == panel.metric)
    found = rows[wanted].dropna(subset="value")
    units = [key for key in _UNITS if key in found]
    return found.groupby(["method", *units], sort=False)[["value", "ci_low", "ci_high"]].mean().reset_index()


def _best_first(panels: list[pd.DataFrame]) -> list[str]:
    """Order methods by their mean distance from the median method of each panel and data set."""
    import pandas as pd

    values = pd.concat([values.assign(panel=i) for i, values in enumerate(panels)])
    units = [key for key in ("panel", *_UNITS) if key in values]
    median = values.groupby(units, dropna=False)["value"].transform("median")
    distance = (values["value"] - median).groupby(values["method"], sort=False).mean()
    return [str(name) for name in distance.sort_values(ascending=False, kind="stable").index]


def _draw_panel(ax: Axes, values: pd.DataFrame, methods: list[str]) -> None:
    """Draw one row per method, the first on top, with its mean in figures."""
    n_values = values["method"].value_counts()
    comparable = n_values == n_values.max()
    best = values.groupby("method")["value"].mean()[comparable].max()
    for y, method in enumerate(methods):
        own = values[values["method"] == method]
        color = _ACCENT if method == _OWN else _OTHERS
        mean = own["value"].mean()
        if n_values.max() > 1:
            ax.plot(own["value"], np.full(len(own), y), "o", color=color, alpha=0.35, markersize=3, markeredgewidth=0)
        elif len(own):
            ax.plot(own[["ci_low", "ci_high"]].iloc[0], [y, y], color=color, linewidth=1.6, alpha=0.6)
        if len(own):
            face = color if comparable[method] else "white"
            ax.plot(mean, y, "o", color=color, markerfacecolor=face, markersize=6.5)
        ax.text(
            1.01,
            y,
            f"{mean:.3f}" if len(own) else "–",
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize="x-small",
            color=color,
            fontweight="bold" if len(own) and comparable[method] and mean == best else "normal",
        )
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.grid(visible=True, axis="x", color="#DDDDDD", linewidth=0.6)
    ax.grid(visible=True, axis="y", color="#EEEEEE", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.locator_params(axis="x", nbins=4)
    ax.spines[["top", "right", "left"]].set_visible(False)
