from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

mpl.use("Agg")

from genejepa import pl
from genejepa.errors import DataError
from genejepa.pl._benchmark import _ACCENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHTS = {"low": 0.2, "genejepa": 0.9, "middle": 0.5}


def make_table(*, offset: float = 0.0) -> pd.DataFrame:
    measures = [("linear", "all", "macro_f1"), ("depth", "0.25", "macro_f1"), ("integration", "all", "total")]
    rows = [
        (method, seed, "transductive", *measure, height + offset + 0.01 * seed, height - 0.05, height + 0.05)
        for (method, height), seed, measure in product(HEIGHTS.items(), range(3), measures)
        if (method, measure[0]) != ("middle", "depth")
    ]
    columns = ["method", "seed", "regime", "task", "setting", "metric", "value", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=columns)


def names(ax: Axes) -> list[str]:
    return [name.get_text() for name in ax.get_yticklabels()]


def dots(ax: Axes) -> list[tuple[float, float]]:
    """Positions of the large dots."""
    return [
        (np.asarray(line.get_xdata())[0].item(), np.asarray(line.get_ydata())[0].item())
        for line in ax.lines
        if line.get_marker() == "o" and line.get_markersize() > 5
    ]


def test_one_data_set() -> None:
    figure = pl.benchmark(make_table(), figure=Figure())
    assert [ax.get_title() for ax in figure.axes] == [
        "Linear probe",
        "Shallow cells (25 % of counts)",
        "Batch integration",
    ]
    assert [ax.get_xlabel() for ax in figure.axes] == ["Macro-F1", "Macro-F1", "scib-metrics total"]
    first, second, _ = figure.axes
    assert names(first) == ["genejepa", "middle", "low"]
    assert dots(first) == [pytest.approx((0.91, 0)), pytest.approx((0.51, 1)), pytest.approx((0.21, 2))]
    assert dots(second) == [pytest.approx((0.91, 0)), pytest.approx((0.21, 2))]
    intervals = [list(line.get_xdata()) for line in first.lines if line.get_marker() != "o"]  # type: ignore[arg-type]
    assert intervals[0] == pytest.approx([0.85, 0.95])
    assert first.yaxis_inverted()
    assert [text.get_text() for text in first.texts] == ["0.910", "0.510", "0.210"]
    assert [text.get_text() for text in second.texts] == ["0.910", "–", "0.210"]
    assert [text.get_fontweight() for text in first.texts] == ["bold", "normal", "normal"]
    figure.draw_without_rendering()


def test_only_genejepa_is_in_colour() -> None:
    first = pl.benchmark(make_table(), figure=Figure()).axes[0]
    colored = [name.get_text() for name in first.get_yticklabels() if same_color(name.get_color(), _ACCENT)]
    assert colored == ["genejepa"]
    heights = {tuple(np.asarray(line.get_ydata())) for line in first.lines if same_color(line.get_color(), _ACCENT)}
    assert heights == {(0,), (0, 0)}


def test_several_data_sets() -> None:
    table = pd.concat([make_table().assign(dataset="one"), make_table(offset=0.04).assign(dataset="two")])
    first = pl.benchmark(table, figure=Figure()).axes[0]
    assert dots(first)[0] == pytest.approx((0.93, 0))
    small = [line for line in first.lines if line.get_markersize() < 5]
    assert list(small[0].get_xdata()) == pytest.approx([0.91, 0.95])  # type: ignore[arg-type]
    assert len(first.lines) == 6


def test_mean_over_fewer_data_sets_is_hollow() -> None:
    other = make_table(offset=0.04).assign(dataset="two")
    table = pd.concat([make_table().assign(dataset="one"), other[other["method"] != "middle"]])
    first = pl.benchmark(table, figure=Figure()).axes[0]
    faces = [line.get_markerfacecolor() for line in first.lines if line.get_markersize() > 5]
    assert [face == "white" for face in faces] == [False, True, False]


def test_labels_from_clustering_are_noted() -> None:
    assert pl.benchmark(make_table(), figure=Figure()).get_supxlabel() == ""
    note = pl.benchmark(make_table().assign(labels_from_clustering=True), figure=Figure()).get_supxlabel()
    assert note.startswith("Labels come from clustering")


def test_regime() -> None:
    table = pd.concat([make_table(), make_table(offset=0.05).assign(regime="inductive")])
    assert dots(pl.benchmark(table, figure=Figure()).axes[0])[0] == pytest.approx((0.91, 0))
    assert dots(pl.benchmark(table, regime="inductive", figure=Figure()).axes[0])[0] == pytest.approx((0.96, 0))


def test_new_figure() -> None:
    from matplotlib import pyplot as plt

    figure = pl.benchmark(make_table())
    assert plt.fignum_exists(figure.number)
    plt.close(figure)


def test_errors() -> None:
    with pytest.raises(DataError, match="0 rows of the regime 'inductive'"):
        pl.benchmark(make_table(), regime="inductive")
    with pytest.raises(DataError, match="none of a task"):
        pl.benchmark(make_table().assign(task="cost"))
    with pytest.raises(DataError, match="0 rows"):
        pl.benchmark(make_table()[:0])
