"""What an embedding is good for: scores of one run in all tasks of the benchmark."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from scipy.sparse import SparseEfficiencyWarning
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeCV
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, r2_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from genejepa.bench.integration import MIN_CELLS, integration_scores
from genejepa.bench.views import FULL
from genejepa.errors import ConfigError, DataError, MissingKeyError
from genejepa.evaluate._folds import draw_cells
from genejepa.evaluate._tables import bootstrap_counts, confusion, cross_validated_table, few_shot_table, scores
from genejepa.evaluate.predict import (
    Draw,
    fit_few_shot,
    fit_linear,
    predict_few_shot,
    predict_knn,
    predict_linear,
    predict_linear_views,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from genejepa.bench.run import Run
    from genejepa.evaluate._folds import Codes

TASKS: Final = ("linear", "knn", "few_shot", "depth", "genes", "clustering", "transfer", "integration", "leak")
"""Names of the tasks."""

_COLUMNS: Final = ["task", "setting", "metric", "value", "ci_low", "ci_high", "n_cells"]
_MIN_CLASS: Final = 10
_MIN_HELD_OUT: Final = 3
_MIN_TRANSFER: Final = 5
_SHOTS: Final = (1, 5, 10, 50)
_INDUCTIVE_SHOTS: Final = 5
_N_DRAWS: Final = 10
_N_NEIGHBORS: Final = 15
_RIDGE_PENALTIES: Final = tuple(np.logspace(-1, 5, 7))

_Row: TypeAlias = tuple[str, str, str, float, float, float, int]
"""One row of the table, in the order of `_COLUMNS`."""


class _Cells(NamedTuple):
    """Positions of the cells of usable classes, their class codes, and the names of the classes."""

    rows: Codes
    codes: Codes
    classes: list[str]


def score(
    run: Run,
    obs: pd.DataFrame,
    *,
    labels_key: str,
    batch_key: str | None = None,
    seed: int = 0,
    tasks: Collection[str] = TASKS,
    reference: NDArray[np.float32] | None = None,
    depth: NDArray[np.float32] | None = None,
) -> pd.DataFrame:
    """Score the embeddings of one run. Tasks that the run or the data do not allow are left out.

    Unlabelled cells, and classes with fewer than 10 cells, take no part, except in ``leak``. Probes are those of
    :mod:`genejepa.evaluate`. If the run has held-out cells, only probes are scored: they are fitted on the other cells
    and tested on these, over classes with at least 10 cells to fit on and 3 to test.

    ==============  =========================  =================================================================
    task            setting                    what is measured
    ==============  =========================  =================================================================
    linear, knn     all                        five-fold logistic regression; vote of the 15 nearest cells
    few_shot        labelled cells per class   logistic regression on 1, 5, 10 or 50 cells of every class that has
                                               more; mean of 10 draws (held-out cells: 5 labelled cells only)
    depth, genes    share that is kept         the models of ``linear``, tested on the worse views of their test cells
    clustering      kmeans, leiden             k-means with the true number of classes; Leiden on 15 neighbours at
                                               resolution 1
    transfer        batch left out, or mean    logistic regression fitted on the other batches, with inner folds by
                                               batch; macro-F1 over classes with 5 cells or more on both sides
    integration     all                        :func:`genejepa.bench.integration.integration_scores`
    leak            depth, batch               cross-validated R² of a ridge regression of log counts; balanced
                                               accuracy of the linear probe for the batch
    ==============  =========================  =================================================================

    Parameters
    ----------
    run
        Embeddings, with the cells in the order of `obs`.
    obs
        Annotation of the cells. Not changed.
    labels_key, batch_key
        Columns of `obs` with class and batch. Cells without a batch are left out of the tasks about batches.
    seed
        Of folds, draws, clusterings and bootstraps.
    tasks
        Names in `TASKS`.
    reference
        Embedding before any integration, (n_obs, dim), for ``integration``.
    depth
        Counts per cell, (n_obs,), for ``leak``; None leaves that row out.

    Returns
    -------
    Columns ``task``, ``setting``, ``metric``, ``value``, ``ci_low``, ``ci_high`` and ``n_cells``. Intervals are those
    of :mod:`genejepa.evaluate` (bootstrap over cells, few-shot Student over draws); clustering, integration, leak of
    depth and the mean of transfer have none.

    Raises
    ------
    genejepa.errors.MissingKeyError, genejepa.errors.DataError
        If a column does not exist; if there are fewer than two usable classes, or arrays do not fit together.
    genejepa.errors.ConfigError
        If a task is unknown, or ``integration`` lacks `reference`.
    genejepa.errors.MissingPackageError
        If ``integration`` is asked for and scib-metrics is not installed.
    """
    unknown = set(tasks) - set(TASKS)
    if unknown:
        raise ConfigError(
            f"`tasks` has {min(unknown)!r}, expected some of {', '.join(map(repr, TASKS))}.", fix="Correct the name."
        )
    for name, array in {**run.views, "reference": reference, "depth": depth}.items():
        if array is not None and len(array) != len(obs):
            raise DataError(
                f"{name!r} has {len(array)} rows, expected {len(obs)}, one per row of `obs`.",
                fix="Pass the obs, reference and depth of the cells of the run.",
            )
    labels = _column(obs, labels_key)
    # One thread: the arrays are small, and more threads are slower when another program uses the cores.
    with threadpool_limits(1):
        if run.held_out is None:
            rows = _probe_all(run, labels, tasks, seed)
            if "leak" in tasks and depth is not None:
                rows.append(_leak_of_depth(run.views[FULL], depth, seed))
            if batch_key is not None:
                rows += _score_batches(run.views[FULL], labels, _column(obs, batch_key), tasks, seed, reference)
        else:
            rows = _probe_held_out(run, run.held_out, labels, tasks, seed)
    table = pd.DataFrame(rows, columns=_COLUMNS)
    order = table["task"].map(TASKS.index)
    return table.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)


def _column(obs: pd.DataFrame, key: str) -> pd.Categorical:
    if key not in obs:
        found = ", ".join(repr(str(name)) for name in obs.columns) or "none"
        raise MissingKeyError(f"`obs[{key!r}]` does not exist, found {found}.", fix="Pass the name of a column of obs.")
    return pd.Categorical(obs[key])


def _cells_of(labels: pd.Categorical, usable: NDArray[np.bool_]) -> _Cells:
    """Return the cells of classes that are `usable`, (n_classes,)."""
    rows = np.flatnonzero(np.isin(labels.codes, np.flatnonzero(usable)))
    codes = np.unique(labels.codes[rows], return_inverse=True)[1]
    return _Cells(rows, codes, [str(name) for name in labels.categories[usable]])


def _sizes(labels: pd.Categorical) -> NDArray[np.intp]:
    """Count the cells of every class, (n_classes,)."""
    return np.bincount(labels.codes[labels.codes >= 0], minlength=len(labels.categories))


def _require_classes(cells: _Cells) -> _Cells:
    if len(cells.classes) < 2:
        raise DataError(
            f"The labels have {len(cells.classes)} usable classes, expected at least 2 with {_MIN_CLASS} cells each.",
            fix="Pass the labels_key of a column with classes.",
        )
    return cells


def _probe_all(run: Run, labels: pd.Categorical, tasks: Collection[str], seed: int) -> list[_Row]:
    """Score the tasks about classes on all cells, by cross-validation."""
    sizes = _sizes(labels)
    cells = _require_classes(_cells_of(labels, sizes >= _MIN_CLASS))
    Z = run.views[FULL][cells.rows]
    rows: list[_Row] = []
    if views := _views_for(run, tasks):
        thinned = {name: run.views[name][cells.rows] for name in views}
        for name, predicted in predict_linear_views(Z, thinned, cells.codes, seed=seed).items():
            rows += _predicted_rows(*views[name], cells, predicted, seed)
    if "knn" in tasks:
        predicted = predict_knn(Z, cells.codes, seed=seed, n_neighbors=_N_NEIGHBORS)
        rows += _predicted_rows("knn", "all", cells, predicted, seed)
    if "few_shot" in tasks:
        for n in _SHOTS:
            some = _cells_of(labels, sizes >= max(_MIN_CLASS, n + 1))
            if len(some.classes) >= 2:
                draws = predict_few_shot(
                    run.views[FULL][some.rows], some.codes, n_per_class=n, n_draws=_N_DRAWS, seed=seed
                )
                rows += _few_shot_rows(n, some, draws)
    if "clustering" in tasks:
        rows += _clustering(Z, cells, seed)
    return rows


def _probe_held_out(
    run: Run, held_out: NDArray[np.bool_], labels: pd.Categorical, tasks: Collection[str], seed: int
) -> list[_Row]:
    """Fit the probes on the cells of the fit, and test them on the held-out ones."""
    sizes, held_out_sizes = _sizes(labels[~held_out]), _sizes(labels[held_out])
    cells = _require_classes(_cells_of(labels, (sizes >= _MIN_CLASS) & (held_out_sizes >= _MIN_HELD_OUT)))
    test = held_out[cells.rows]
    known, tested = cells.codes[~test], cells._replace(rows=cells.rows[test], codes=cells.codes[test])
    Z = run.views[FULL][cells.rows].astype(np.float64)
    rows: list[_Row] = []
    if views := _views_for(run, tasks):
        predict = fit_linear(Z[~test], known, seed=seed)
        for name, task_and_setting in views.items():
            predicted = predict(run.views[name][tested.rows].astype(np.float64))
            rows += _predicted_rows(*task_and_setting, tested, predicted, seed)
    if "knn" in tasks:
        model = KNeighborsClassifier(n_neighbors=_N_NEIGHBORS).fit(Z[~test], known)
        rows += _predicted_rows("knn", "all", tested, model.predict(Z[test]), seed)
    if "few_shot" in tasks:
        draws = []
        for draw in range(_N_DRAWS):
            rng = np.random.default_rng([seed, draw])
            drawn, _ = draw_cells(known, None, n_per_class=_INDUCTIVE_SHOTS, rng=rng)
            predict = fit_few_shot(Z[~test][drawn], known[drawn], rng=rng)
            draws.append(Draw(np.flatnonzero(~test)[drawn], np.flatnonzero(test), predict(Z[test])))
        rows += _few_shot_rows(_INDUCTIVE_SHOTS, cells, draws)
    return rows


def _score_batches(
    Z: NDArray[np.float32],
    labels: pd.Categorical,
    batches: pd.Categorical,
    tasks: Collection[str],
    seed: int,
    reference: NDArray[np.float32] | None,
) -> list[_Row]:
    """Score the tasks about batches."""
    cells = _cells_of(labels, _sizes(labels) >= _MIN_CLASS)
    known = batches.codes[cells.rows] >= 0
    cells = cells._replace(rows=cells.rows[known], codes=cells.codes[known])
    batch_of = batches.codes[cells.rows].astype(np.intp)
    rows: list[_Row] = []
    if np.unique(batch_of).size >= 2:
        if "transfer" in tasks:
            rows += _transfer(Z[cells.rows], cells, batch_of, [str(level) for level in batches.categories], seed)
        if "integration" in tasks and cells.rows.size >= MIN_CELLS:
            rows += _integration(Z, cells, batch_of, reference)
    if "leak" in tasks:
        levels = _cells_of(batches, _sizes(batches) >= _MIN_CLASS)
        if len(levels.classes) >= 2:
            predicted = predict_linear(Z[levels.rows], levels.codes, seed=seed)
            found = _predicted_rows("leak", "batch", levels, predicted, seed)
            rows += [row for row in found if row[2] == "balanced_accuracy"]
    return rows


def _views_for(run: Run, tasks: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return task and setting of every embedding that the models of the linear probe are asked about."""
    asked = {name: ("linear", "all") if name == FULL else _split_name(name) for name in run.views}
    return {name: (task, setting) for name, (task, setting) in asked.items() if task in tasks}


def _split_name(view: str) -> tuple[str, str]:
    task, _, setting = view.partition(" ")
    return task, setting


def _predicted_rows(task: str, setting: str, cells: _Cells, predicted: Codes, seed: int) -> list[_Row]:
    """Score one prediction per cell."""
    record = {"name": task, "classes": cells.classes}
    return _overall(task, setting, cross_validated_table(cells.codes, predicted, seed=seed, record=record))


def _few_shot_rows(n_per_class: int, cells: _Cells, draws: list[Draw]) -> list[_Row]:
    record = {"name": "few_shot", "classes": cells.classes}
    return _overall("few_shot", str(n_per_class), few_shot_table(cells.codes, draws, record=record))


def _overall(task: str, setting: str, table: pd.DataFrame) -> list[_Row]:
    """Return the rows of a table of a probe that are about all classes."""
    columns = table.loc[table["label"] == "all", _COLUMNS[2:]]
    return [(task, setting, *values) for values in columns.itertuples(index=False)]


def _without_interval(task: str, setting: str, metric: str, value: float, n_cells: int) -> _Row:
    return task, setting, metric, value, np.nan, np.nan, n_cells


def _clustering(Z: NDArray[np.float32], cells: _Cells, seed: int) -> list[_Row]:
    """Compare clusters with classes."""
    with warnings.catch_warnings():
        # A collapsed embedding has fewer distinct points than clusters: it is to be scored, not refused.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", SparseEfficiencyWarning)
        kmeans = KMeans(len(cells.classes), n_init=10, random_state=seed).fit_predict(Z)
        leiden = _leiden(Z, seed)
    rows: list[_Row] = []
    for name, clusters in (("kmeans", kmeans), ("leiden", leiden)):
        ari = adjusted_rand_score(cells.codes, clusters)
        nmi = normalized_mutual_info_score(cells.codes, clusters)
        rows.append(_without_interval("clustering", name, "ari", ari, len(Z)))
        rows.append(_without_interval("clustering", name, "nmi", nmi, len(Z)))
    return rows


def _leiden(Z: NDArray[np.float32], seed: int) -> NDArray[Any]:
    """Cluster cells as scanpy does by default."""
    import scanpy as sc
    from anndata import AnnData

    adata = AnnData(obsm={"Z": Z})
    sc.pp.neighbors(adata, n_neighbors=15, use_rep="Z", random_state=seed)
    sc.tl.leiden(adata, resolution=1.0, random_state=seed, flavor="igraph", n_iterations=2, directed=False)
    return np.asarray(adata.obs["leiden"])


def _transfer(Z: NDArray[np.float32], cells: _Cells, batches: Codes, levels: list[str], seed: int) -> list[_Row]:
    """Fit on all batches but one, and test on that one."""
    Z, n_classes = Z.astype(np.float64), len(cells.classes)
    rows: list[_Row] = []
    for level in np.unique(batches):
        inside = batches == level
        fitted = np.bincount(cells.codes[~inside], minlength=n_classes) >= _MIN_TRANSFER
        shared = fitted & (np.bincount(cells.codes[inside], minlength=n_classes) >= _MIN_TRANSFER)
        if shared.sum() < 2:
            continue
        train, test = ~inside & fitted[cells.codes], inside & shared[cells.codes]
        predict = fit_linear(Z[train], cells.codes[train], batches[train], seed=seed)
        counts = confusion(cells.codes[test], predict(Z[test]), n_classes)
        _, per_class = scores(np.concatenate([counts[None], bootstrap_counts(counts, seed=seed)]))
        f1 = per_class[:, 2, shared].mean(axis=1)
        interval = np.quantile(f1[1:], [0.025, 0.975])
        rows.append(("transfer", levels[level], "macro_f1", f1[0], *interval, int(test.sum())))
    if rows:
        mean = float(np.mean([row[3] for row in rows]))
        rows.append(_without_interval("transfer", "mean", "macro_f1", mean, sum(row[6] for row in rows)))
    return rows


def _integration(
    Z: NDArray[np.float32], cells: _Cells, batches: Codes, reference: NDArray[np.float32] | None
) -> list[_Row]:
    if reference is None:
        raise ConfigError(
            "`reference` is None, and the task 'integration' compares with an embedding before integration.",
            fix="Pass reference=..., such as principal components, or leave the task out.",
        )
    found = integration_scores(Z[cells.rows], reference[cells.rows], labels=cells.codes, batches=batches)
    return [_without_interval("integration", "all", name, value, cells.rows.size) for name, value in found.items()]


def _leak_of_depth(Z: NDArray[np.float32], depth: NDArray[np.float32], seed: int) -> _Row:
    """Predict log counts of all cells from standardised dimensions."""
    target = np.log1p(depth.astype(np.float64))
    model = make_pipeline(StandardScaler(), RidgeCV(_RIDGE_PENALTIES))
    folds = KFold(5, shuffle=True, random_state=seed)
    predicted = cross_val_predict(model, Z.astype(np.float64), target, cv=folds)
    return _without_interval("leak", "depth", "r2", r2_score(target, predicted), len(Z))
