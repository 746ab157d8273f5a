"""Picture of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from genejepa.errors import DataError
from genejepa.pl._style import PALETTE, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["training"]

_LABELS: Final = {
    "loss": "Loss (sum of the terms)",
    "prediction": "Prediction error",
    "diversity": "Diversity term",
    "invariance": "Invariance term",
    "depth": "Depth term",
    "information": "Information term",
    "effective_rank": "Effective rank",
    "mean_cosine": "Mean cosine between cells",
    "learning_rate": "Learning rate",
}
_N_COLUMNS: Final = 3
_MAX_PLAIN_POINTS: Final = 150


class HasHistory(Protocol):
    """An object that keeps the history of its training, such as a model."""

    @property
    def history(self) -> Any:
        """Table with one row per logged step."""


def training(history: pd.DataFrame | HasHistory, *, figure: Figure | None = None) -> Figure:
    """Draw loss, objectives and collapse diagnostics of a training run, each in a panel of its own.

    Parameters
    ----------
    history
        Table with one row per logged step, or an object with such a table as ``history``. Drawn are those
        of the columns ``loss``, ``prediction``, ``diversity``, ``invariance``, ``depth``, ``information``,
        ``effective_rank``, ``mean_cosine`` and ``learning_rate`` that exist, against ``step``, else
        ``epoch``, else the row. Missing values are skipped. Long curves are drawn pale, with a running
        median over a fortieth of their points on top.
    figure
        Empty figure to draw on; a new one by default.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Raises
    ------
    DataError
        If no column that can be drawn has a finite value.

    Examples
    --------
    >>> import pandas as pd
    >>> from matplotlib.figure import Figure
    >>> import genejepa.pl
    >>> history = pd.DataFrame({"step": [1, 2, 3], "loss": [2.0, 1.0, 0.5]})
    >>> [ax.get_ylabel() for ax in genejepa.pl.training(history, figure=Figure()).axes]
    ['Loss (sum of the terms)']
    """
    import pandas as pd

    table = history if isinstance(history, pd.DataFrame) else getattr(history, "history", None)
    if not isinstance(table, pd.DataFrame):
        raise DataError(
            f"`history` is of type {type(history).__name__}, expected a DataFrame or an object with one as `.history`.",
            fix="Pass a trained model or the table of its history.",
        )
    shown = [name for name in _LABELS if name in table and np.isfinite(table[name].astype(float)).any()]
    if not shown:
        raise DataError(
            f"`history` has no values to draw: {len(table)} rows, columns "
            f"{', '.join(map(str, table.columns)) or 'none'}; expected any of {', '.join(_LABELS)}.",
            fix="Train the model first.",
        )
    n_columns = min(_N_COLUMNS, len(shown))
    n_rows = -(-len(shown) // n_columns)
    figure = new_figure(3.6 * n_columns, 2.5 * n_rows) if figure is None else figure
    axis_label, x = _horizontal(table)
    for i, name in enumerate(shown):
        ax = figure.add_subplot(n_rows, n_columns, i + 1)
        _draw_curve(ax, x, table[name].astype(float))
        ax.set_ylabel(_LABELS[name])
        if i + n_columns >= len(shown):
            ax.set_xlabel(axis_label)
        if name == "effective_rank":
            ax.set_ylim(bottom=0)
    return figure


def _horizontal(table: pd.DataFrame) -> tuple[str, pd.Series[Any]]:
    """Return label and values of the horizontal axis."""
    for name in ("step", "epoch"):
        if name in table:
            return name.capitalize(), table[name].astype(float)
    return "Row of the history", table.index.to_series().reset_index(drop=True).astype(float)


def _draw_curve(ax: Axes, x: pd.Series[Any], y: pd.Series[Any]) -> None:
    """Draw the finite values of one column."""
    from matplotlib.ticker import MaxNLocator

    known = np.isfinite(y.to_numpy()) & np.isfinite(x.to_numpy())
    horizontal, values = x.to_numpy()[known], y[known]
    long = len(values) > _MAX_PLAIN_POINTS
    marker = "o" if len(values) <= 30 else ""
    ax.plot(
        horizontal,
        values.to_numpy(),
        color=PALETTE[0],
        alpha=0.3 if long else 1.0,
        linewidth=0.8 if long else 1.5,
        marker=marker,
        markersize=3,
    )
    if long:
        median = values.rolling(max(5, len(values) // 40), center=True, min_periods=1).median()
        ax.plot(horizontal, median.to_numpy(), color=PALETTE[0], linewidth=1.6)
        # The first, huge values would else press the rest of the curve flat.
        low, high = np.quantile(values, [0.0, 0.99])
        if high > low:
            ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
    ax.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
