"""Picture of what a probe confuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from genejepa.errors import DataError
from genejepa.pl._style import figure_of, new_axes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["probe"]

_TITLES: Final = {"linear": "Linear probe", "knn": "Nearest-neighbour probe", "few_shot": "Few-shot probe"}
_MAX_ANNOTATED: Final = 20


def probe(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the confusion matrix of a probe, in per cent of the cells of each true class.

    Parameters
    ----------
    table
        Table returned by a probe of `genejepa.evaluate`, with its ``attrs``.
    ax
        Axes to draw on; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes with the picture; its title gives the macro-averaged F1 and its 95 % interval.

    Raises
    ------
    DataError
        If the table does not come from a probe.
    """
    record: dict[str, Any] | None = table.attrs.get("probe")
    if record is None or "confusion" not in record:
        raise DataError(
            "`table.attrs['probe']` does not exist, expected the record that a probe writes there.",
            fix="Pass the table as one probe returned it; joining tables loses the record.",
        )
    classes: list[str] = record["classes"]
    counts = np.asarray(record["confusion"], dtype=np.float64)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n = len(classes)
    if ax is None:
        side = 2.4 + 0.42 * n + 0.06 * max(map(len, classes))
        ax = new_axes(side + 0.8, side)
    image = ax.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    ax.set_xticks(range(n), classes, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(n), classes)
    ax.tick_params(length=0)
    ax.set(xlabel="Predicted class", ylabel="True class", title=_title(table, record))
    ax.spines[:].set_visible(False)
    if n <= _MAX_ANNOTATED:
        _write_percent(ax, percent)
    bar = figure_of(ax).colorbar(image, ax=ax, shrink=0.6, pad=0.02)
    bar.set_label("Cells of the true class (%)")
    bar.outline.set_visible(False)
    return ax


def _title(table: pd.DataFrame, record: dict[str, Any]) -> str:
    """Name the probe and its macro-averaged F1."""
    row = table.loc[(table["metric"] == "macro_f1") & (table["label"] == "all")].iloc[0]
    title = f"{_TITLES.get(record['name'], record['name'])}: macro-F1 {row['value']:.2f}"
    if np.isfinite(row["ci_low"]):
        title += f" ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
    return title


def _write_percent(ax: Axes, percent: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Write the values of at least half a per cent into their fields."""
    for (i, j), value in np.ndenumerate(percent):
        if value >= 0.5:
            color = "white" if value > 55 else "#1A1A1A"
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize="small", color=color)
