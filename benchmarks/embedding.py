"""Linear, kNN and few-shot macro-F1 of genejepa, PCA and scVI on the same cells and genes.

    OMP_NUM_THREADS=1 python benchmarks/embedding.py --datasets pbmc_facs pbmc3k --seeds 3 --ablations pbmc_facs

Writes ``benchmarks/results/embedding.csv`` (one row per data set, method and seed) and prints a summary. scVI is
trained once per data set and size (seed 0) and kept in ``benchmarks/cache``; genejepa is trained ``--seeds`` times.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from _common import (
    DATASETS,
    DEVELOPMENT_DATA,
    MEASURES,
    RESULTS,
    Embedding,
    pca_embeddings,
    probe,
    read,
    scvi_embedding,
)

import genejepa
from genejepa.objectives import effective_rank

if TYPE_CHECKING:
    from anndata import AnnData

ABLATIONS: dict[str, dict[str, Any]] = {
    "genejepa, likelihood only": {"prediction": 0.0, "invariance": 0.0, "diversity": 0.0},
    "genejepa, JEPA terms only": {"information": 0.0},
    "genejepa, MLP encoder": {"encoder": "mlp"},
    "genejepa, symmetric target": {"target": "symmetric"},
}


def genejepa_embedding(adata: AnnData, *, seed: int, threads: int, settings: dict[str, Any]) -> Embedding:
    """Train genejepa with its defaults, apart from ``settings``."""
    import time

    adata = adata.copy()
    started = time.perf_counter()
    model = genejepa.fit(adata, seed=seed, progress_bar=False, train_options={"threads": threads}, **settings)
    fitted = time.perf_counter()
    Z = model.get_latent_representation()
    return Embedding(Z, fitted - started, time.perf_counter() - fitted)


def panel_of(adata: AnnData) -> AnnData:
    """The cells over the panel that genejepa chooses by default."""
    return adata[:, genejepa.GeneJEPA(adata).genes].copy()


def run(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods on one data set."""
    adata, labels_key = read(name, args.data)
    labels = adata.obs[labels_key]
    rows: list[dict[str, Any]] = []

    def add(method: str, embedding: Embedding, seed: int) -> None:
        row = {
            "dataset": name,
            "method": method,
            "seed": seed,
            **probe(embedding.Z, labels),
            "effective_rank": effective_rank(torch.from_numpy(embedding.Z)),
            "fit_seconds": embedding.fit_seconds,
            "embed_seconds": embedding.embed_seconds,
        }
        rows.append(row)
        print(" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)

    arms: dict[str, dict[str, Any]] = {"genejepa": {}}
    if name in args.ablations:
        arms |= ABLATIONS
    for method, settings in arms.items():
        for seed in range(args.seeds):
            embedding = genejepa_embedding(adata, seed=seed, threads=args.threads, settings=settings)
            add(method, embedding, seed)
    if not args.skip_baselines:
        panel = panel_of(adata)
        for method, embedding in pca_embeddings(panel).items():
            add(method, embedding, 0)
        for n_latent in args.scvi:
            add(f"scVI-{n_latent}", scvi_embedding(panel, n_latent=n_latent, seed=0), 0)
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of each method, with the distance of genejepa to the best baseline."""
    means = table.groupby(["dataset", "method"], sort=False)[[*MEASURES, "effective_rank", "fit_seconds"]].mean()
    lines = []
    for name, group in means.groupby(level=0, sort=False):
        group = group.droplevel(0)
        baselines = group[~group.index.str.startswith("genejepa")]
        if len(baselines):
            margin = group.loc["genejepa", list(MEASURES)] - baselines[list(MEASURES)].max()
            group.loc["genejepa minus best baseline", list(MEASURES)] = margin
        lines.append(pd.concat({name: group}))
    return pd.concat(lines).round(4)


def main() -> None:
    """Parse the command line, run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--ablations", nargs="*", default=[], help="data sets that get the ablations too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scvi", type=int, nargs="*", default=[10, 50], help="latent sizes; none to leave out")
    parser.add_argument("--skip-baselines", action="store_true")
    parser.add_argument("--data", type=Path, default=DEVELOPMENT_DATA)
    parser.add_argument("--output", type=Path, default=RESULTS / "embedding.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for name in args.datasets for row in run(name, args)]
    table = pd.DataFrame(rows)
    args.output.parent.mkdir(exist_ok=True)
    table.to_csv(args.output, index=False, float_format="%.5f")
    print(summary(table).to_string())


if __name__ == "__main__":
    main()
