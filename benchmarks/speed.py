"""Time of ``genejepa.fit`` against scVI's default training, and of embedding all cells, in one run.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --threads 1

Both get the same cells, genes and threads. ``fit`` is timed whole: reading and checking counts, choosing genes,
training, embedding. scVI is timed on the panel that is already chosen: ``train()`` only. One short training of each
comes first, so that neither pays for imports and compilation. Prints and writes ``benchmarks/results/speed.csv``.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from _common import DEVELOPMENT_DATA, RESULTS, read

import genejepa

if TYPE_CHECKING:
    from collections.abc import Callable


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """Shortest of some repeats."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.min(times))


def main() -> None:
    """Parse the command line, run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="pbmc_facs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DEVELOPMENT_DATA)
    args = parser.parse_args()
    import scvi

    warnings.simplefilter("ignore")  # notices about devices and workers
    scvi.settings.verbosity = logging.ERROR
    torch.set_num_threads(args.threads)
    adata, _ = read(args.dataset, args.data)
    options = {"progress_bar": False, "train_options": {"threads": args.threads}}

    warm = genejepa.fit(adata.copy(), max_epochs=1, **options)
    panel = adata[:, warm.genes].copy()
    scvi.model.SCVI.setup_anndata(panel)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    scvi.model.SCVI(panel).train(max_epochs=1, **quiet)

    cells = adata.copy()
    started = time.perf_counter()
    model = genejepa.fit(cells, **options)
    fit_seconds = time.perf_counter() - started
    peer = scvi.model.SCVI(panel)
    started = time.perf_counter()
    peer.train(**quiet)
    scvi_seconds = time.perf_counter() - started

    torch.set_num_threads(args.threads)  # scVI's trainer may have changed it
    row = {
        "dataset": args.dataset,
        "threads": args.threads,
        "genejepa_fit_s": fit_seconds,
        "of_which_training_s": model.record.seconds if model.record else float("nan"),
        "precision": model.record.precision if model.record else "",
        "scvi_train_s": scvi_seconds,
        "scvi_over_genejepa": scvi_seconds / fit_seconds,
        "genejepa_embed_s": best_seconds(model.get_latent_representation, 9),
        "scvi_embed_s": best_seconds(peer.get_latent_representation, 9),
    }
    RESULTS.mkdir(exist_ok=True)
    table = pd.DataFrame([row])
    table.to_csv(RESULTS / "speed.csv", index=False, float_format="%.4f")
    print(table.T.to_string(header=False))


if __name__ == "__main__":
    main()
