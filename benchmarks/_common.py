"""Data sets, baselines and tables shared by the benchmark scripts."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from genejepa import evaluate

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
DEVELOPMENT_DATA = HERE.parent.parent / "shared" / "data"
RESULTS = HERE / "results"
CACHE = HERE / "cache"

DATASETS = {
    "pbmc_facs": ("pbmc_facs_zheng2017.h5ad", "facs_celltype"),
    "pbmc3k": ("pbmc3k_10x.h5ad", "cell_type"),
    "pbmc_3tech": ("pbmc_3tech_symphony.h5ad", "cell_type"),
    "kang_1556": ("kang_ifnb_labelled_1556.h5ad", "cell_type"),
    "endocrinogenesis": ("endocrinogenesis_e15_2kgenes.h5ad", "cell_type"),
    "paul15": ("paul15_hematopoiesis.h5ad", "cell_type"),
}

MEASURES = ("linear", "knn", "few_shot")


class Embedding(NamedTuple):
    """An embedding, (n_obs, dim), with the seconds that fitting and embedding took."""

    Z: NDArray[np.float32]
    fit_seconds: float
    embed_seconds: float


def read(name: str, data_dir: Path) -> tuple[AnnData, str]:
    """A data set and the name of its label column."""
    file, labels_key = DATASETS[name]
    return ad.read_h5ad(data_dir / file), labels_key


def normalised(counts: NDArray[np.float32], *, transform: str, unit_variance: bool) -> NDArray[np.float32]:
    """Median-depth normalised, transformed and centred values of dense panel counts, (n_obs, n_genes)."""
    depth = counts.sum(1, keepdims=True)
    scaled = counts / np.maximum(depth, 1) * np.median(depth)
    values = np.log1p(scaled) if transform == "log" else np.sqrt(scaled)
    values = values - values.mean(0)
    if unit_variance:
        values = np.clip(values / (values.std(0) + 1e-8), -10, 10)
    return values


def pca_embeddings(panel: AnnData) -> dict[str, Embedding]:
    """PCA-50 and PCA-30 of log and square root, with and without unit variance."""
    from sklearn.decomposition import PCA

    counts = np.asarray(panel.X.todense(), dtype=np.float32)
    out = {}
    for transform in ("log", "sqrt"):
        for unit in (False, True):
            started = time.perf_counter()
            values = normalised(counts, transform=transform, unit_variance=unit)
            Z = PCA(50, svd_solver="randomized", random_state=0).fit_transform(values)
            seconds = time.perf_counter() - started
            for n in (50, 30):
                out[f"PCA-{n} {transform}{' unit' if unit else ''}"] = Embedding(Z[:, :n], seconds, 0.0)
    return out


def scvi_embedding(panel: AnnData, *, n_latent: int, seed: int, cache: bool = True) -> Embedding:
    """Default scVI on the panel; kept in ``benchmarks/cache`` because it is slow."""
    import logging
    import warnings

    import scvi

    genes = hashlib.sha256("\n".join(panel.var_names).encode()).hexdigest()[:12]
    path = CACHE / f"scvi{n_latent}_seed{seed}_{panel.n_obs}x{panel.n_vars}_{genes}.npz"
    if cache and path.exists():
        stored = np.load(path)
        return Embedding(stored["Z"], float(stored["fit_seconds"]), float(stored["embed_seconds"]))
    scvi.settings.verbosity = logging.ERROR
    scvi.settings.seed = seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices about devices and workers
        scvi.model.SCVI.setup_anndata(panel)
        started = time.perf_counter()
        model = scvi.model.SCVI(panel, n_latent=n_latent)
        model.train(accelerator="cpu", enable_progress_bar=False, logger=False)
        trained = time.perf_counter()
        Z = model.get_latent_representation()
    result = Embedding(Z, trained - started, time.perf_counter() - trained)
    if cache:
        CACHE.mkdir(exist_ok=True)
        np.savez(path, Z=Z, fit_seconds=result.fit_seconds, embed_seconds=result.embed_seconds)
    return result


def probe(Z: NDArray[np.float32], labels: pd.Series) -> dict[str, float]:
    """Macro-F1 of the three probes."""
    obs = pd.DataFrame({"label": labels.astype(str).to_numpy()}, index=labels.index)
    adata = ad.AnnData(obs=obs, obsm={"Z": np.asarray(Z)})
    tables = {
        "linear": evaluate.linear_probe(adata, labels_key="label", use_rep="Z"),
        "knn": evaluate.knn_probe(adata, labels_key="label", use_rep="Z"),
        "few_shot": evaluate.few_shot_probe(adata, labels_key="label", use_rep="Z"),
    }
    return {name: float(t.loc[t["metric"] == "macro_f1", "value"].iloc[0]) for name, t in tables.items()}
