"""Equal seeds give equal models: over containers, workers, processes, hash seeds and, for embedding, threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from genejepa.model import GeneJEPA
from tests.reliability._elsewhere import CONTAINERS, train, train_and_embed

if TYPE_CHECKING:
    from collections.abc import Callable

    import anndata

HERE = Path(__file__).parent
LEVELS: dict[str, tuple[Any, ...]] = {
    "container": CONTAINERS,
    "num_workers": (0, 1, 2),
    "threads": (1, 2),
    "hash_seed": ("0", "1", "random"),
    "cores": ("1", "2"),
}
"""Conditions of a training. Workers are always spawned; ``cores`` is the number of threads by default."""

FAST = (("dense", 1, 1, "0", "2"), ("backed h5ad", 2, 1, "random", "1"), ("zarr", 0, 2, "1", "2"))
"""With those in this process, every level is there."""


def pairwise() -> list[dict[str, Any]]:
    """Few runs in which any two levels meet; each is one with most of the pairs that are missing."""
    every = [dict(zip(LEVELS, levels, strict=True)) for levels in product(*LEVELS.values())]
    missing = {pair for run in every for pair in pairs_of(run)}
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda run: len(missing & pairs_of(run))))
        missing -= pairs_of(chosen[-1])
    return chosen


def pairs_of(run: dict[str, Any]) -> set[Any]:
    return set(combinations(run.items(), 2))


@pytest.fixture(scope="module")
def runs(
    profile: Any,
    make_adata: Callable[..., anndata.AnnData],
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """Conditions and results of trainings, two of them in this process."""
    path = tmp_path_factory.mktemp("runs")
    adata = make_adata()
    adata.X = adata.X.toarray()
    adata.write_h5ad(path / "cells.h5ad")
    train("class", adata, tiny_settings, tiny_training).save(path / "model")

    def task(run: dict[str, Any]) -> dict[str, Any]:
        training = tiny_training | {"num_workers": run["num_workers"], "threads": run["threads"]}
        directory = path / str(len(list(path.iterdir())))
        directory.mkdir()
        places = {"cells": str(path / "cells.h5ad"), "model": str(path / "model"), "directory": str(directory)}
        return {**places, "container": run["container"], "settings": tiny_settings, "training": training}

    before = torch.get_num_threads()
    here = [dict(zip(LEVELS, ("csr", 0, threads, "here", "here"), strict=True)) for threads in (1, 2)]
    done = [run | train_and_embed(**task(run)) for run in here]
    torch.set_num_threads(before)
    others = [dict(zip(LEVELS, levels, strict=True)) for levels in FAST] if profile.name == "fast" else pairwise()
    tasks = [task(run) for run in others]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return done + [run | found for run, found in zip(others, pool.map(elsewhere, others, tasks), strict=True)]


def elsewhere(run: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """The result of a training in another process."""
    path = Path(task["directory"]) / "task.json"
    path.write_text(json.dumps({"job": "train_and_embed", **task}), encoding="utf-8")
    numbers = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), run["cores"])
    done = subprocess.run(
        [sys.executable, HERE / "_elsewhere.py", path],
        env={**os.environ, **numbers, "PYTHONHASHSEED": run["hash_seed"]},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("threads", LEVELS["threads"])
@pytest.mark.parametrize("what", ["weights", "vectors", "vectors_by_saved"])
def test_equal_threads_give_equal_bits(what: str, threads: int, runs: list[dict[str, Any]]) -> None:
    """Nothing but the number of threads makes a difference to weights and vectors."""
    found = {str(run): run[what] for run in runs if run["threads"] == threads}
    assert len(found) > 1
    assert len({str(value) for value in found.values()}) == 1, found


def test_threads_hardly_change_vectors(runs: list[dict[str, Any]], record_figure: Callable[[str, Any], None]) -> None:
    """One model gives the same vectors, to 1e-5, with every number of threads."""
    vectors = [np.array(run["vectors_by_saved"], dtype=np.float32) for run in runs]
    difference = max(float(np.abs(other - vectors[0]).max()) for other in vectors)
    record_figure("runs", len(runs))
    record_figure("largest difference over threads", difference)
    assert vectors[0].shape == (60, 8)
    assert difference <= 1e-5


def test_all_conditions_were_there(runs: list[dict[str, Any]], profile: Any) -> None:
    """The control: every level was tried, and hash seeds had the effect that they have."""
    for name, levels in LEVELS.items():
        assert set(levels) <= {run[name] for run in runs}
    hashes = {run["hash_seed"]: run["hash"] for run in runs}
    assert len({hashes[seed] for seed in LEVELS["hash_seed"]}) == 3
    if profile.name != "fast":
        met = {pair for run in runs for pair in pairs_of({name: run[name] for name in LEVELS})}
        assert all(pairs_of(dict(zip(LEVELS, levels, strict=True))) <= met for levels in product(*LEVELS.values()))


def test_another_seed_gives_another_model(
    runs: list[dict[str, Any]],
    make_adata: Callable[..., anndata.AnnData],
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
) -> None:
    """The control: a hash that is equal says something."""
    model = GeneJEPA(make_adata(), **tiny_settings)
    model.train(**tiny_training | {"seed": 1})
    assert model.weights_sha256() not in {run["weights"] for run in runs}
