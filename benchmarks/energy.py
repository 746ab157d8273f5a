"""What the energies of a trained model tell: doublets, unknown kinds of cell, and halves of cells that belong together.

    OMP_NUM_THREADS=2 python benchmarks/energy.py

On sorted blood cells (labels that do not come from the RNA), with three seeds of split and model. A model is trained on
80 % of the cells, and everything is judged on the others by the area under the ROC curve:

- doublets: sums of two held-out cells of different kinds, thinned to half, against held-out cells;
- unknown kind: all cells of a kind that the training did not have, against held-out cells of the others;
- halves: both halves of the genes from one held-out cell, against halves of two cells of the same kind.

Beside it: the mean distance to the 15 nearest training cells, in the embedding and in 50 principal components, and the
error of reconstruction from these. Prints and writes ``benchmarks/results/energy.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from _common import DEVELOPMENT_DATA, RESULTS, read, trained
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    import genejepa

DATASET = "pbmc_facs"
LABEL = "facs_subpop"
SEEDS = (0, 1, 2)
METHODS = ("energy", "kNN in embedding", "kNN in PCA", "PCA error")


def auc(real: NDArray[Any], odd: NDArray[Any]) -> float:
    """Area under the ROC curve of telling odd cells from real ones."""
    return float(roc_auc_score(np.r_[np.zeros(len(real)), np.ones(len(odd))], np.r_[real, odd]))


def doublets(cells: ad.AnnData, kinds: NDArray[Any], rng: np.random.Generator) -> ad.AnnData:
    """As many sums of two cells of different kinds as there are cells, every molecule kept with probability 1/2."""
    pairs = rng.integers(len(kinds), size=(20 * len(kinds), 2))
    pairs = pairs[kinds[pairs[:, 0]] != kinds[pairs[:, 1]]][: len(kinds)]
    counts = cells.X.tocsr()
    both = (counts[pairs[:, 0]] + counts[pairs[:, 1]]).tocsr()
    both.data = rng.binomial(both.data.astype(np.int64), 0.5).astype(np.float32)
    return ad.AnnData(both, var=cells.var)


def partners(kinds: NDArray[Any]) -> NDArray[np.int64]:
    """For every cell the next one of its kind."""
    found = np.arange(len(kinds))
    for kind in np.unique(kinds):
        found[kinds == kind] = np.roll(np.flatnonzero(kinds == kind), -1)
    return found


def scores_of(model: genejepa.GeneJEPA, training: ad.AnnData) -> dict[str, Callable[[ad.AnnData], NDArray[Any]]]:
    """Scores that are to be high for odd cells."""

    def values(cells: ad.AnnData) -> NDArray[Any]:
        counts = cells[:, model.genes].X.toarray()
        normalised = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1) * np.median(training_depth))
        return normalised - mean

    training_depth = np.asarray(training[:, model.genes].X.sum(1)).ravel()
    mean = 0.0
    mean = values(training).mean(0)
    pca = PCA(50, random_state=0).fit(values(training))
    neighbours = NearestNeighbors(n_neighbors=15).fit(pca.transform(values(training)))
    embedded = NearestNeighbors(n_neighbors=15).fit(model.get_latent_representation())
    return {
        "energy": model.energy,
        "kNN in embedding": lambda cells: embedded.kneighbors(model.get_latent_representation(cells))[0].mean(1),
        "kNN in PCA": lambda cells: neighbours.kneighbors(pca.transform(values(cells)))[0].mean(1),
        "PCA error": lambda cells: ((values(cells) - pca.inverse_transform(pca.transform(values(cells)))) ** 2).mean(1),
    }


def run(adata: ad.AnnData, kinds: NDArray[Any], seed: int) -> list[dict[str, Any]]:
    """All scores of a seed."""
    rng = np.random.default_rng(seed)
    is_training = np.isin(np.arange(adata.n_obs), rng.permutation(adata.n_obs)[: int(0.8 * adata.n_obs)])
    held_out, held_out_kinds = adata[~is_training].copy(), kinds[~is_training]
    training = adata[is_training].copy()
    model = trained(training, seed)
    rows = []
    mixed = doublets(held_out, held_out_kinds, rng)
    for name, score in scores_of(model, training).items():
        rows.append({"task": "doublets", "method": name, "auroc": auc(score(held_out), score(mixed))})
    own = model.energy(held_out, partner=held_out)
    other = model.energy(held_out, partner=held_out[partners(held_out_kinds)].copy())
    rows.append({"task": "halves of one kind", "method": "energy", "auroc": auc(own, other)})
    for kind in np.unique(kinds):
        known = adata[is_training & (kinds != kind)].copy()
        without = trained(known, seed)
        real, odd = held_out[held_out_kinds != kind].copy(), adata[kinds == kind].copy()
        for name, score in scores_of(without, known).items():
            rows.append({"task": f"unknown: {kind}", "method": name, "auroc": auc(score(real), score(odd))})
    return [{**row, "seed": seed} for row in rows]


def main() -> None:
    """Parse the command line, run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEVELOPMENT_DATA)
    args = parser.parse_args()
    adata, _ = read(DATASET, args.data)
    kinds = adata.obs[LABEL].astype(str).to_numpy()
    table = pd.DataFrame([row for seed in SEEDS for row in run(adata, kinds, seed)])
    RESULTS.mkdir(exist_ok=True)
    table.round(4).to_csv(RESULTS / "energy.csv", index=False)
    means = table.groupby(["task", "method"])["auroc"].agg(["mean", "std"]).round(3)
    shown = means["mean"].map("{:.3f}".format) + " ± " + means["std"].map("{:.3f}".format)
    print(shown.unstack("method")[list(METHODS)].fillna("").to_string())


if __name__ == "__main__":
    main()
