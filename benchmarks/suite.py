"""All methods on all data sets: tables in benchmarks/results, the document docs/benchmark.md and its figure.

    make benchmark                                                        # everything that is not in the cache
    python benchmarks/suite.py --only 'pancreas_5tech.transductive.*'     # some jobs
    python benchmarks/suite.py --plan                                     # list the jobs and do nothing

A job fits one method on one data set, embeds the cells, and scores the embedding. Both results are kept in
``benchmarks/cache``: an interrupted suite goes on where it stopped. Rows that run genejepa itself run again when its
model changes, and scores are computed again when the scoring changes.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import gc
import hashlib
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import report
from _common import CACHE, DEVELOPMENT_DATA, HERE, RESULTS, read
from _data import DATASETS, MODEL, NO_BATCH_KEY, OWN, REFERENCE, Job, all_jobs

import genejepa

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.bench import Run

PACKAGE = HERE.parent / "genejepa"
MODEL_CODE = ("config.py", "encode.py", "jepa.py", "model.py", "data", "nn", "objectives", "train")
SCORING_CODE = ("bench/tasks.py", "bench/integration.py", "evaluate")

WIDEST_KEPT = 500
"""Wider embeddings take less time to compute again than room to keep."""

PLAIN_TASKS = ("linear", "knn", "few_shot", "depth", "genes", "clustering", "transfer", "leak")
BATCH_TASKS = ("linear", "knn", "transfer", "integration", "leak")
PROBES = ("linear", "knn", "few_shot", "depth", "genes")

KEYS = ["dataset", "labels", "labels_from_clustering", "method", "seed", "regime", "batch"]
VALUES = ["task", "setting", "metric", "value", "ci_low", "ci_high", "n_cells"]
COSTS = ["fit_seconds", "embed_seconds", "peak_mb"]
PACKAGES = ("torch", "scvi-tools", "scanpy", "scikit-learn", "scib-metrics", "harmonypy", "numpy")


class Files(NamedTuple):
    """Where the results of a job are kept; a change of the code that makes them changes the name."""

    embedding: Path
    scores: Path
    cost: Path


def files_of(job: Job, *, cache: Path = CACHE) -> Files:
    """Files of a job with the code as it is now."""
    stem = f"{job.key}.{digest(MODEL_CODE)}" if job.method in OWN else job.key
    scoring = digest(SCORING_CODE, f"{DATASETS[job.dataset]}{tasks_of(job)}")
    return Files(cache / f"{stem}.npz", cache / f"{stem}.{scoring}.csv", cache / f"{stem}.cost.csv")


@lru_cache
def digest(names: tuple[str, ...], settings: str = "") -> str:
    """Eight characters that change when these files or folders of the package change."""
    found = hashlib.sha256(settings.encode())
    for name in names:
        path = PACKAGE / name
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(ast.dump(without_docstrings(source)).encode())
    return found.hexdigest()[:8]


def without_docstrings(source: Path) -> ast.Module:
    """Syntax tree of a file, in which neither comments nor docstrings count as a change."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [
                part
                for part in node.body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant | ast.JoinedStr))
            ]
    return tree


def tasks_of(job: Job) -> tuple[str, ...]:
    """What an embedding is scored on."""
    if DATASETS[job.dataset].groups_key is not None:
        return ("leak",)
    if job.corrected:
        return BATCH_TASKS
    # A thousand genes are no embedding that anybody would cluster.
    return PROBES if job.regime == "inductive" or job.method == "HVG" else PLAIN_TASKS


def is_done(files: Files) -> bool:
    """Whether the scores are there and not older than the embedding."""
    if not files.scores.exists() or not files.cost.exists():
        return False
    return not files.embedding.exists() or files.scores.stat().st_mtime >= files.embedding.stat().st_mtime


def work(job: Job, files: Files, data_dir: Path) -> float:
    """Embed and score, unless it is done, and return the seconds that it took."""
    started = time.perf_counter()
    files.embedding.parent.mkdir(exist_ok=True)
    cells = cells_of(job.dataset, job.regime, corrected=job.corrected, data_dir=data_dir)
    run = embedded(job, files.embedding, cells)
    cost = pd.DataFrame(
        [{**{name: getattr(run, name) for name in COSTS}, "n_cells": cells.n_obs, "n_genes": cells.n_vars}]
    )
    write(cost, files.cost)
    write(scored(job, run, cells), files.scores)
    return time.perf_counter() - started


@lru_cache(maxsize=8)
def cells_of(dataset: str, regime: str, *, corrected: bool, data_dir: Path) -> AnnData:
    """Counts over the panel; in the inductive regime, obs has the column ``held_out``."""
    from genejepa.bench import hold_out, panel_of

    adata, labels_key = read(dataset, data_dir)
    held_out = hold_out(adata.obs[labels_key]) if regime == "inductive" else None
    cells = panel_of(adata, batch_key=DATASETS[dataset].batch_key if corrected else None, held_out=held_out)
    if held_out is not None:
        cells.obs["held_out"] = held_out
    return cells


def embedded(job: Job, path: Path, cells: AnnData) -> Run:
    """Load the embedding, or make and keep it."""
    from genejepa.bench import METHODS, Run, fit_and_embed

    if path.exists():
        return Run.load(path)
    release_memory()
    run = fit_and_embed(
        METHODS[MODEL if job.method == NO_BATCH_KEY else job.method],
        cells,
        seed=job.seed,
        batch_key=DATASETS[job.dataset].batch_key if job.corrected and job.method != NO_BATCH_KEY else None,
        threads=1,
        held_out=cells.obs["held_out"].to_numpy() if "held_out" in cells.obs else None,
        stress=not job.corrected,
    )
    if run.views["full"].shape[1] <= WIDEST_KEPT:
        run.save(path)
    return run


def release_memory() -> None:
    """Give memory that earlier jobs have freed back to the system, lest a method reuse it and seem to need none."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def scored(job: Job, run: Run, cells: AnnData) -> pd.DataFrame:
    """Scores for every label column."""
    from genejepa.bench import METHODS, fit_and_embed, score

    dataset, tasks, tables = DATASETS[job.dataset], tasks_of(job), []
    reference = None
    if "integration" in tasks:
        reference = fit_and_embed(METHODS[REFERENCE], cells, stress=False).views["full"]
    for labels_key in dataset.labels:
        table = score(
            run,
            cells.obs,
            labels_key=labels_key,
            batch_key=dataset.batch_key,
            tasks=tasks,
            reference=reference,
            depth=depths(cells),
        )
        if dataset.groups_key is not None:
            probe = group_probe(run.views["full"], cells.obs, labels_key, dataset.groups_key)
            table = pd.concat([table, probe], ignore_index=True)
        tables.append(table.assign(labels=labels_key))
        tasks = tuple(task for task in tasks if task != "leak")  # the same for all labels
    return pd.concat(tables, ignore_index=True)


def depths(cells: AnnData) -> NDArray[np.float32]:
    """Counts per cell over the panel, (n_obs,)."""
    import numpy as np

    return np.asarray(cells.X.sum(axis=1), dtype=np.float32).ravel()


def group_probe(Z: NDArray[np.float32], obs: pd.DataFrame, labels_key: str, groups_key: str) -> pd.DataFrame:
    """Linear probe with whole groups left out, two at a time of six."""
    from anndata import AnnData

    from genejepa.evaluate import linear_probe

    adata = AnnData(obs=obs, obsm={"Z": Z})
    table = linear_probe(adata, labels_key=labels_key, use_rep="Z", groups_key=groups_key, n_splits=3)
    return table[table["label"] == "all"].assign(task="left_out_groups", setting=groups_key)[VALUES]


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table as a whole or not at all."""
    from genejepa.files import replacing

    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.5f")


def run_all(jobs: Iterable[Job], *, workers: int, data_dir: Path) -> dict[Job, BaseException]:
    """Run jobs in worker processes, the longest first; return the errors of those that failed."""
    jobs = sorted(jobs, key=lambda job: -job.seconds)
    errors: dict[Job, BaseException] = {}
    spawn = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=load_libraries) as pool:
        futures: dict[Future[float], Job] = {pool.submit(work, job, files_of(job), data_dir): job for job in jobs}
        try:
            for i, future in enumerate(as_completed(futures), start=1):
                job, error = futures[future], future.exception()
                if error is not None:
                    errors[job] = error
                outcome = f"{future.result():.1f} s" if error is None else f"failed: {error!r}"
                print(
                    f"[{i}/{len(jobs)}, {(time.perf_counter() - started) / 60:.1f} min] {job.key}: {outcome}",
                    flush=True,
                )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return errors


def load_libraries() -> None:
    """Import what the methods import when they are first used, lest the first job pays for it in time and memory."""
    import harmonypy  # noqa: F401
    import scanpy  # noqa: F401
    import scvi
    import torch

    import genejepa.bench.tasks  # noqa: F401

    scvi.model.SCVI  # noqa: B018  # loaded on access
    torch.set_num_threads(1)


def collect(jobs: Iterable[Job]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and costs of the jobs that are done."""
    scores, costs = [], []
    for job in jobs:
        files = files_of(job)
        if not is_done(files):
            continue
        keys: dict[str, Any] = {
            "dataset": job.dataset,
            "method": job.method,
            "seed": job.seed,
            "regime": job.regime,
            "batch": job.batch,
        }
        table = pd.read_csv(files.scores, dtype={"setting": str}).assign(**keys)
        clustered = table["labels"].map(DATASETS[job.dataset].labels)
        scores.append(table.assign(labels_from_clustering=clustered)[[*KEYS, *VALUES]])
        costs.append(pd.read_csv(files.cost).assign(**keys)[[*keys, "n_cells", "n_genes", *COSTS]])
    if not scores:
        raise SystemExit("There are no results yet: run some jobs.")
    return pd.concat(scores, ignore_index=True), pd.concat(costs, ignore_index=True)


def environment(workers: int) -> pd.DataFrame:
    """What the jobs ran on."""
    values = {
        "cpu": processor(),
        "processes": str(workers),
        "threads per process": os.environ["OMP_NUM_THREADS"],
        "python": platform.python_version(),
        "genejepa": genejepa.__version__,
        **{name: version(name) for name in PACKAGES},
    }
    return pd.DataFrame({"name": list(values), "value": list(values.values())})


def processor() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    """Parse the command line, run, write and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEVELOPMENT_DATA, help="folder with the data sets")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="jobs whose key matches, such as '*.plain.PCA*'")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--fresh", action="store_true", help="ignore the cache")
    parser.add_argument("--score-only", action="store_true", help="score the embeddings of the cache, fit nothing")
    parser.add_argument("--report-only", action="store_true", help="write tables and document from the cache")
    parser.add_argument("--plan", action="store_true", help="print the jobs and their expected time, and stop")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the worker processes, which load their libraries later
    chosen = [job for job in all_jobs() if fnmatch(job.key, args.only)]
    if args.fresh:
        for job in chosen:
            for path in files_of(job):
                path.unlink(missing_ok=True)
    pending = [job for job in chosen if not is_done(files_of(job))]
    if args.score_only:
        pending = [job for job in pending if files_of(job).embedding.exists()]
    if args.plan:
        for job in pending:
            print(f"{job.seconds:6.0f} s  {job.key}")
        minutes = sum(job.seconds for job in pending) / args.workers / 60
        print(f"{len(pending)} jobs, about {minutes:.0f} min in {args.workers} processes")
        return
    errors = {}
    if pending and not args.report_only:
        errors = run_all(pending, workers=args.workers, data_dir=args.data)
        write(environment(args.workers), RESULTS / "environment.csv")
    scores, costs = collect(all_jobs())
    write(scores, RESULTS / "scores.csv")
    write(costs, RESULTS / "cost.csv")
    report.main()
    for job, error in errors.items():
        print(f"failed: {job.key}: {error!r}", file=sys.stderr)
    raise SystemExit(len(errors) > 0)


if __name__ == "__main__":
    main()
