"""The comparison of methods on the cells of a user."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from genejepa._version import __version__
from genejepa.bench.interface import Embed, FitOptions, Method
from genejepa.bench.methods import DEFAULT_METHODS, HARMONY, METHODS, REFERENCE
from genejepa.bench.run import fit_and_embed, hold_out, panel_of
from genejepa.bench.tasks import TASKS, score
from genejepa.bench.views import FULL
from genejepa.data.slots import obs_column
from genejepa.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.bench.run import Run

Regime = Literal["transductive", "inductive"]
Fit = Callable[["AnnData", FitOptions], Embed]

_COSTS = ("fit_seconds", "embed_seconds", "peak_mb")
_PACKAGES = ("torch", "scanpy", "scikit-learn", "scvi-tools")
_STRESS_TASKS = {"depth", "genes"}


def benchmark(
    adata: AnnData,
    *,
    labels_key: str,
    batch_key: str | None = None,
    methods: Sequence[str | Method | Fit] | None = None,
    seeds: int | Sequence[int] = 3,
    n_genes: int | None = 2000,
    tasks: Collection[str] | None = None,
    regimes: Sequence[Regime] = ("transductive",),
    threads: int = 1,
    labels_from_clustering: bool = False,
    progress_bar: bool = True,
) -> pd.DataFrame:
    """Compare embeddings of the same cells, over the same genes, by what they are good for.

    Folds, labelled cells, thinned cells and held-out cells are the same for all methods and seeds; a seed changes the
    method only.

    Parameters
    ----------
    adata
        Raw counts, (n_obs, n_vars), in ``X`` or the registered layer. Not changed.
    labels_key
        Column of ``obs`` with the classes to find, such as the cell type. No method sees it.
    batch_key
        Column of ``obs`` with the batch. Genes are chosen within batches, methods that can correct for it do, and
        mixing and transfer between batches are measured.
    methods
        Names in :data:`genejepa.bench.METHODS`, a :class:`genejepa.bench.Method`, or a function that takes raw
        counts and :class:`genejepa.bench.FitOptions` and returns a function from counts to an array (n_obs, dim) of
        float32. None takes a quick and honest set: genes, principal components, scVI and genejepa, and with a batch
        Harmony.
    seeds
        Number of seeds, or the seeds. Methods without randomness run once.
    n_genes
        Size of the panel of highly variable genes; None takes all expressed genes.
    tasks
        Names in :data:`genejepa.bench.TASKS`; None for all that the data allow.
    regimes
        ``"transductive"``: methods are fitted on all cells, without labels. ``"inductive"``: methods and panel see
        80 % of the cells of each class, and probes are tested on the others; a method that cannot embed new cells,
        such as Harmony, is left out there.
    threads
        CPU threads of every method.
    labels_from_clustering
        Declare that the labels come from clustering the same counts. They then favour methods like that clustering,
        mostly PCA, and every row says so.
    progress_bar
        Show progress.

    Returns
    -------
    pandas.DataFrame
        One row per ``method``, ``seed``, ``regime``, ``task``, ``setting`` and ``metric`` with ``value``, its 95 %
        interval ``ci_low`` to ``ci_high`` over cells (missing where there is none), ``n_cells`` and
        ``labels_from_clustering``. The task ``"cost"`` holds ``fit_seconds``, ``embed_seconds`` and ``peak_mb``.
        ``attrs["benchmark"]`` records the settings and the versions of packages.

    Raises
    ------
    genejepa.errors.MissingKeyError, genejepa.errors.DataError
        If a column does not exist; if there are no raw counts, or classes are too few or too small.
    genejepa.errors.ConfigError
        If a method, task or regime is unknown, or cannot be used like this.
    genejepa.errors.MissingPackageError
        If a package of the extra ``bench`` is not installed.

    Examples
    --------
    >>> import genejepa
    >>> adata = genejepa.datasets.pbmc3k()[:300].copy()
    >>> table = genejepa.benchmark(
    ...     adata,
    ...     labels_key="cell_type",
    ...     methods=["HVG", "PCA-50 sqrt"],
    ...     tasks=["knn"],
    ...     n_genes=200,
    ...     labels_from_clustering=True,
    ...     progress_bar=False,
    ... )
    >>> sorted(table["method"].unique())
    ['HVG', 'PCA-50 sqrt']
    """
    for key in (labels_key, batch_key):
        if key is not None:
            obs_column(adata, key)
    chosen = _resolve(methods, batch_key)
    asked = TASKS if tasks is None else tuple(tasks)
    _check_names("tasks", asked, TASKS)
    _check_names("regimes", regimes, get_args(Regime))
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    jobs = _jobs(chosen, numbers, regimes)
    tables = []
    for regime in regimes:
        held_out = hold_out(adata.obs[labels_key]) if regime == "inductive" else None
        cells = panel_of(adata, n_genes=n_genes, batch_key=batch_key, held_out=held_out)
        reference = _reference(cells, held_out) if batch_key is not None and "integration" in asked else None
        depth = np.asarray(cells.X.sum(axis=1), dtype=np.float32).ravel()
        for method, seed in _tracked([job[1:] for job in jobs if job[0] == regime], regime, show=progress_bar):
            run = fit_and_embed(
                method,
                cells,
                seed=seed,
                batch_key=batch_key,
                threads=threads,
                held_out=held_out,
                stress=not _STRESS_TASKS.isdisjoint(asked),
            )
            scores = score(
                run,
                cells.obs,
                labels_key=labels_key,
                batch_key=batch_key,
                tasks=asked,
                reference=reference,
                depth=depth,
            )
            for rows in (scores, _costs(run, cells.n_obs)):
                if len(rows):  # without rows, no column has a type
                    tables.append(_with_keys(rows, method=method.name, seed=seed, regime=regime))
    out = pd.concat(tables, ignore_index=True)
    out["labels_from_clustering"] = labels_from_clustering
    out.attrs["benchmark"] = {
        "versions": {"genejepa": __version__} | {name: version(name) for name in _PACKAGES},
        "n_cells": adata.n_obs,
        "n_genes": n_genes,
        "labels_key": labels_key,
        "batch_key": batch_key,
        "labels_from_clustering": labels_from_clustering,
        "seeds": numbers,
        "threads": threads,
    }
    return out


def _resolve(methods: Sequence[str | Method | Fit] | None, batch_key: str | None) -> list[Method]:
    """Return the methods that names and functions stand for."""
    if methods is None:
        methods = DEFAULT_METHODS if batch_key is None else (*DEFAULT_METHODS, HARMONY)
    chosen = [_as_method(entry) for entry in methods]
    names = [method.name for method in chosen]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"`methods` is {names}, expected at least one, and each once.", fix="pass methods with different names."
        )
    if batch_key is None and HARMONY in names:
        raise ConfigError(
            f"{HARMONY!r} corrects for a batch, and `batch_key` is None.",
            fix="pass batch_key=..., or leave this method out.",
        )
    return chosen


def _as_method(entry: str | Method | Fit) -> Method:
    if isinstance(entry, Method):
        return entry
    if isinstance(entry, str):
        _check_names("methods", [entry], METHODS)
        return METHODS[entry]
    name = getattr(entry, "__name__", None)
    if not callable(entry) or name is None:
        raise ConfigError(
            f"`methods` holds {entry!r}, expected a name, a Method, or a function.",
            fix="wrap it: genejepa.bench.Method(name, fit).",
        )
    return Method(name, entry, uses_batch=True)  # whether it does is up to the function


def _check_names(argument: str, names: Iterable[str], known: Collection[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"`{argument}` has {unknown[0]!r}, expected some of {', '.join(map(repr, known))}.",
            fix="correct the name.",
        )


def _jobs(methods: list[Method], seeds: list[int], regimes: Sequence[Regime]) -> list[tuple[Regime, Method, int]]:
    """What to run: regime, method and seed."""
    if not seeds or not regimes:
        raise ConfigError("`seeds` or `regimes` is empty, expected at least one.", fix="leave it at its default.")
    possible = [(r, m) for r, m in product(regimes, methods) if r == "transductive" or m.new_cells]
    for method in methods:
        if all(method is not m for _, m in possible):
            raise ConfigError(
                f"{method.name!r} cannot embed cells that it was not fitted on, as regimes={list(regimes)} asks.",
                fix='leave this method out, or add the regime "transductive".',
            )
    return [(regime, method, seed) for regime, method in possible for seed in (seeds if method.random else [0])]


def _reference(cells: AnnData, held_out: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Embedding before integration, (n_obs, dim)."""
    return fit_and_embed(METHODS[REFERENCE], cells, held_out=held_out, stress=False).views[FULL]


def _tracked(jobs: list[tuple[Method, int]], regime: str, *, show: bool) -> Iterable[tuple[Method, int]]:
    """Yield the jobs behind a progress bar."""
    from tqdm import tqdm

    bar = tqdm(jobs, disable=not show, unit="run")
    for method, seed in bar:
        bar.set_description(f"{regime}: {method.name}, seed {seed}")
        yield method, seed


def _costs(run: Run, n_cells: int) -> pd.DataFrame:
    """Time and memory as rows of the table."""
    rows: list[dict[str, Any]] = [
        {"task": "cost", "setting": "all", "metric": metric, "value": getattr(run, metric)} for metric in _COSTS
    ]
    return pd.DataFrame(rows).assign(ci_low=np.nan, ci_high=np.nan, n_cells=n_cells)


def _with_keys(rows: pd.DataFrame, **keys: object) -> pd.DataFrame:
    """Put columns that hold one value each before the others."""
    return pd.concat([pd.DataFrame(keys, index=rows.index), rows], axis=1)
