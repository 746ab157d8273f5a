"""Folders and data sets shared by the benchmark scripts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
from _data import DATASETS

import genejepa

if TYPE_CHECKING:
    from anndata import AnnData

HERE = Path(__file__).resolve().parent
DEVELOPMENT_DATA = HERE.parent.parent / "shared" / "data"
RESULTS = HERE / "results"
CACHE = HERE / "cache"


def read(name: str, data_dir: Path) -> tuple[AnnData, str]:
    """A data set and the name of its first label column."""
    return ad.read_h5ad(data_dir / DATASETS[name].file), next(iter(DATASETS[name].labels))


def trained(cells: AnnData, seed: int, **settings: Any) -> genejepa.GeneJEPA:
    """A model trained on the cells as they are set up."""
    model = genejepa.GeneJEPA(cells, **settings)
    model.train(seed=seed, progress_bar=False)
    return model
