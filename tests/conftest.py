"""Small data and settings for all tests, and a guard for the global random generators."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from genejepa.data.panel import PanelCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

N_PROGRAMS = 3
GENES_PER_PROGRAM = 20


def draw_counts(n_obs: int, n_vars: int, *, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Counts with one program of 20 genes per cell type, and the type of every cell."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n_obs) % N_PROGRAMS
    rates = rng.gamma(2.0, 0.4, size=n_vars)[None] * rng.lognormal(0.0, 0.3, size=(n_obs, 1))
    program = np.arange(n_vars) // GENES_PER_PROGRAM
    rates = np.where(program[None] == kind[:, None], 6.0 * rates, rates)
    return rng.poisson(rates).astype(np.float32), kind


@pytest.fixture(scope="session")
def make_adata() -> Callable[..., anndata.AnnData]:
    """Make an AnnData of raw counts with three programs of 20 genes; equal seeds give equal data."""

    def make(*, n_obs: int = 60, n_vars: int = 80, seed: int = 0) -> anndata.AnnData:
        counts, kind = draw_counts(n_obs, n_vars, seed=seed)
        obs = pd.DataFrame(
            {
                "cell_type": pd.Categorical(np.array(["alpha", "beta", "gamma"])[kind]),
                "batch": pd.Categorical(np.where(np.arange(n_obs) % 2, "one", "two")),
            },
            index=[f"cell{i}" for i in range(n_obs)],
        )
        var = pd.DataFrame(index=[f"gene{j}" for j in range(n_vars)])
        return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)

    return make


@pytest.fixture
def adata(make_adata: Callable[..., anndata.AnnData]) -> anndata.AnnData:
    """60 cells of three types and two batches, 80 genes, raw counts in ``X``."""
    return make_adata()


@pytest.fixture(scope="session")
def as_panel() -> Callable[[NDArray[np.float32]], PanelCounts]:
    """Turn a dense matrix of counts into the rows a model reads."""

    def convert(dense: NDArray[np.float32]) -> PanelCounts:
        rows, genes = np.nonzero(dense)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
        return PanelCounts(
            indptr.astype(np.int64),
            genes.astype(np.int32),
            dense[rows, genes].astype(np.float32),
            dense.shape[1],
        )

    return convert


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    """Arguments of ``GeneJEPA(adata, **tiny_settings)`` for a model that trains in a moment."""
    return {
        "n_genes": 40,
        "embedding_dim": 8,
        "n_latents": 2,
        "dim": 16,
        "n_heads": 4,
        "n_layers": 1,
        "predictor_dim": 16,
        "n_blocks": 8,
        "n_slices": 16,
        "batch_size": 20,
    }


@pytest.fixture(scope="session")
def tiny_training() -> dict[str, Any]:
    """Arguments of ``model.train(**tiny_training)``: two epochs, the same on every machine."""
    return {
        "max_epochs": 2,
        "accelerator": "cpu",
        "precision": "32-true",
        "threads": 1,
        "progress_bar": False,
    }


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded numpy generator."""
    return np.random.default_rng(0)


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded torch generator."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_seeded() -> Callable[[Callable[[], Any]], Any]:
    """Call a function that draws from torch's global generator under a fixed seed, and leave no trace."""

    def make(build: Callable[[], Any]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    return make


def global_rng_state() -> tuple[Any, ...]:
    """State of the generators of Python, numpy and torch, comparable with ``==``."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # the global generator is what is watched
    return (
        random.getstate(),
        (name, np.asarray(keys).tobytes(), *rest),
        torch.get_rng_state().numpy().tobytes(),
    )


@pytest.fixture
def global_rng_untouched() -> Callable[[], AbstractContextManager[None]]:
    """Context manager that fails if the block draws from, or seeds, a global generator."""

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        before = global_rng_state()
        yield
        for name, old, new in zip(("random", "numpy", "torch"), before, global_rng_state(), strict=True):
            assert old == new, f"the global generator of {name} has changed"

    return guard
