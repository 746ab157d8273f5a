"""The smallest model that can be trained: a few kilobytes, so that every bit of its files can be tried."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from pathlib import Path

    from genejepa.model import GeneJEPA


def cells(n_obs: int = 8) -> anndata.AnnData:
    """Raw counts of three genes."""
    counts = np.random.default_rng(0).poisson(9.0, size=(n_obs, 3)).astype(np.float32)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_obs)])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=["ACTB", "CD3E", "NKG7"]))


def smallest_settings() -> dict[str, Any]:
    """Arguments of ``GeneJEPA(cells(), **smallest_settings())``."""
    sizes = ("embedding_dim", "n_latents", "dim", "n_heads", "predictor_dim", "n_slices")
    return {"n_genes": None, **dict.fromkeys(sizes, 1), "n_layers": 0, "n_axes": 0, "n_blocks": 2, "batch_size": 4}


def training() -> dict[str, Any]:
    """Arguments of ``model.train(**training())``: two steps, the same on every machine."""
    return {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true", "threads": 1, "progress_bar": False}


def save_smallest_model(directory: Path, *, checkpoint_dir: Path | None = None) -> GeneJEPA:
    """Train the smallest model and save it."""
    from genejepa.errors import CollapseWarning
    from genejepa.model import GeneJEPA

    model = GeneJEPA(cells(), **smallest_settings())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # one dimension is all it has
        model.train(**training(), checkpoint_dir=checkpoint_dir)
    model.save(directory)
    return model
