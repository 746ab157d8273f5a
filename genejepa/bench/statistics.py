"""Statistics over the tables of :func:`genejepa.benchmark`, of one data set or of several under each other.

Tables of several data sets have a column ``dataset`` and, if cells carry several kinds of labels, a column
``labels``. Methods are compared on means over seeds, across data sets, with the tests that Demšar (2006, Statistical
comparisons of classifiers over multiple data sets, JMLR 7:1-30) recommends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from genejepa.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

Measure = tuple[str, str, str]
"""Task, setting and metric."""

MEASURES: Final[tuple[Measure, ...]] = (
    ("linear", "all", "macro_f1"),
    ("knn", "all", "macro_f1"),
    ("few_shot", "5", "macro_f1"),
)

_DATA: Final = ("dataset", "labels", "labels_from_clustering", "regime")
_MEASURE: Final = ("task", "setting", "metric")
_LESS_IS_BETTER: Final = ("cost", "leak")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every value.

    Parameters
    ----------
    table
        Rows of :func:`genejepa.benchmark`, of one or several data sets.

    Returns
    -------
    pandas.DataFrame
        One row per data set, labels, regime, method and measure, in their order in the table: ``mean``, ``sd`` (over
        seeds, with n - 1; missing for one seed), ``n_seeds``, the mean bounds ``ci_low`` and ``ci_high`` of the
        intervals over cells, and the mean ``n_cells``.
    """
    keys = [key for key in (*_DATA, "method", *_MEASURE) if key in table]
    groups = table.groupby(keys, sort=False, dropna=False, observed=True)
    return groups.agg(
        mean=("value", "mean"),
        sd=("value", "std"),
        n_seeds=("seed", "nunique"),
        ci_low=("ci_low", "mean"),
        ci_high=("ci_high", "mean"),
        n_cells=("n_cells", "mean"),
    ).reset_index()


def average_rank(table: pd.DataFrame, *, measures: Collection[Measure] = MEASURES) -> pd.DataFrame:
    """Rank the methods in every cell (data set × labels × regime × measure) by their mean, and average the ranks.

    Parameters
    ----------
    table
        Rows of :func:`genejepa.benchmark`, of one or several data sets.
    measures
        Task, setting and metric of the measures that count; of each, more must be better.

    Returns
    -------
    pandas.DataFrame
        ``method``, ``rank`` (1 is best, ties share their mean rank) and ``n_cells``, the number of cells with a value
        of the method, best first. A method that lacks a value in any cell is not ranked, since ranks among fewer
        methods are smaller.

    Raises
    ------
    genejepa.errors.DataError, genejepa.errors.ConfigError
        If no row holds a measure; if less is better in one.
    """
    values = _cells(table, measures)
    complete = values.loc[:, values.notna().all()]
    ranks = complete.rank(axis=1, ascending=False).mean().reindex(values.columns)
    out = pd.DataFrame({"method": values.columns, "rank": ranks.to_numpy(), "n_cells": values.count().to_numpy()})
    return out.sort_values("rank", kind="stable", ignore_index=True)


def paired_tests(table: pd.DataFrame, method: str, *, measures: Collection[Measure] = MEASURES) -> pd.DataFrame:
    """Test a method against every other across data sets (Wilcoxon signed-rank, two-sided).

    A pair is one data set: several kinds of labels of the same cells are averaged, being no independent evidence.
    Pairs without a difference are left out of the test, but counted.

    Parameters
    ----------
    table
        Rows of :func:`genejepa.benchmark` for several data sets, told apart by the column ``dataset``.
    method
        Name of the method to test.
    measures
        As in :func:`average_rank`.

    Returns
    -------
    pandas.DataFrame
        Per regime, measure and ``other`` method: ``n_pairs``, ``median_difference`` (positive: ``method`` is better),
        ``p`` and ``p_holm``, corrected for the number of other methods in the same measure (Holm 1979).

    Raises
    ------
    genejepa.errors.DataError, genejepa.errors.ConfigError
        If there is no column ``dataset`` or no row with a measure; if the method has no rows.
    """
    if "dataset" not in table:
        raise DataError(
            "The table has no column `dataset`, expected one: a paired test needs several data sets.",
            fix='join tables of several data sets, each with table["dataset"] = name.',
        )
    values = _cells(table, measures)
    _check_method(method, values)
    keys = [key for key in ("regime", *_MEASURE) if key in values.index.names]
    out = []
    for names, cells in values.groupby(level=keys, sort=False):
        paired = cells.groupby(level="dataset", sort=False).mean()
        rows = []
        for other in values.columns.drop(method):
            difference = (paired[method] - paired[other]).dropna().to_numpy()
            if len(difference):
                row = {"other": other, "n_pairs": len(difference), "median_difference": np.median(difference)}
                rows.append(dict(zip(keys, names, strict=True)) | row | {"p": _signed_rank(difference)})
        tested = pd.DataFrame(rows)
        out.append(tested.assign(p_holm=_holm(tested["p"].to_numpy())) if rows else tested)
    return pd.concat(out, ignore_index=True)


def against_best(
    table: pd.DataFrame, method: str, baselines: Collection[str], *, measures: Collection[Measure] = MEASURES
) -> pd.DataFrame:
    """Compare a method in every cell (data set × labels × regime × measure) with the best of the baselines there.

    Parameters
    ----------
    table
        Rows of :func:`genejepa.benchmark`, of one or several data sets.
    method
        Name of the method to compare.
    baselines
        Names of the others; those without a value in a cell do not count there.
    measures
        As in :func:`average_rank`.

    Returns
    -------
    pandas.DataFrame
        Per cell: ``value`` of the method, ``best``, ``best_value`` and ``difference`` (positive: the method is
        better). The best of many baselines is chosen on the same scores, which favours it.

    Raises
    ------
    genejepa.errors.DataError, genejepa.errors.ConfigError
        If no row holds a measure; if the method or a baseline has no rows.
    """
    values = _cells(table, measures)
    for name in (method, *baselines):
        _check_method(name, values)
    others = values[[name for name in baselines if name != method]].dropna(how="all")
    own = values.loc[others.index, method]
    best = others.max(axis=1)
    out = pd.DataFrame(
        {"value": own, "best": others.idxmax(axis=1), "best_value": best, "difference": own - best}, index=others.index
    )
    return out.reset_index()


def _cells(table: pd.DataFrame, measures: Collection[Measure]) -> pd.DataFrame:
    """Means over seeds, rows: data set, labels, regime and measure; columns: methods."""
    wanted = [(task, str(setting), metric) for task, setting, metric in measures]
    lower = [measure for measure in wanted if measure[0] in _LESS_IS_BETTER]
    if lower:
        raise ConfigError(f"Less is better in {lower[0]}.", fix="pass measures of which more is better.")
    means = summary(table)
    means["setting"] = means["setting"].astype(str)
    means = means[pd.MultiIndex.from_frame(means[list(_MEASURE)]).isin(wanted)]
    if means.empty:
        raise DataError(f"The table has no rows for any of {wanted}.", fix="run these tasks, or pass other measures.")
    methods = means["method"].unique()
    index = [key for key in (*_DATA, *_MEASURE) if key in means]
    return means.pivot(index=index, columns="method", values="mean")[methods].rename_axis(columns=None)


def _check_method(name: str, values: pd.DataFrame) -> None:
    if name not in values:
        raise ConfigError(
            f"The table has no rows of {name!r}, found {', '.join(map(repr, values.columns))}.",
            fix="pass the name of a method of the table.",
        )


def _signed_rank(difference: NDArray[np.float64]) -> float:
    """Two-sided p-value of the signed-rank test; 1 without any difference."""
    nonzero = difference[difference != 0]
    return float(wilcoxon(nonzero).pvalue) if len(nonzero) else 1.0


def _holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """P-values corrected for their number, step by step from the smallest (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(corrected, 1.0)
    return out
