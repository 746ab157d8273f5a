"""Cost of a training step with the gene-token encoder and with a 512-512 perceptron.

    OMP_NUM_THREADS=1 python benchmarks/encoder_cost.py --threads 1

Whole steps (views, targets, whole cell, objectives, backward, optimiser, moving average), the two encoders in turn,
so that a change of the machine's load hits both. The accuracy of both is in ``scores.csv``: methods "genejepa"
and "genejepa, MLP encoder".
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _common import DEVELOPMENT_DATA, RESULTS, read

import genejepa
from genejepa.config import GeneJEPAConfig
from genejepa.data.loader import StepDataset
from genejepa.jepa import JEPA
from genejepa.nn.ema import update_average
from genejepa.train.module import JEPAModule


def main() -> None:
    """Parse the command line, run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--data", type=Path, default=DEVELOPMENT_DATA)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = genejepa.GeneJEPA(read("pbmc_facs", args.data)[0])
    counts, normalizer = model._counts, model.normalizer
    rows = []
    for precision in ("32-true", "bf16-mixed"):
        arms = {}
        for kind in ("gene_tokens", "mlp"):
            config = GeneJEPAConfig().updated(encoder=kind)
            jepa = JEPA(counts.n_genes, config.model, torch.from_numpy(np.log(normalizer.frequency))[None]).train()
            module = JEPAModule(
                jepa,
                objectives=config.objectives,
                train_config=config.train,
                total_steps=args.steps,
                median_depth=normalizer.median_depth,
            )
            arms[kind] = (module, module.configure_optimizers()["optimizer"])
        dataset = StepDataset(counts, normalizer, masks=config.masks, batch_size=config.train.batch_size, seed=0)
        times: dict[str, list[float]] = {kind: [] for kind in arms}
        for step in range(args.steps):
            batch = dataset[step]
            for kind, (module, optimizer) in arms.items():
                started = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                    loss = module.weighted_loss(batch)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(module.jepa.parameters(), 1.0)
                optimizer.step()
                update_average(module.jepa.target_encoder, module.jepa.encoder, 0.99)
                times[kind].append(time.perf_counter() - started)
        median = {kind: 1e3 * float(np.median(values[5:])) for kind, values in times.items()}
        rows.append(
            {
                "precision": precision,
                "threads": args.threads,
                "gene_tokens_ms": median["gene_tokens"],
                "mlp_ms": median["mlp"],
                "ratio": median["gene_tokens"] / median["mlp"],
            }
        )
    table = pd.DataFrame(rows)
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / "encoder_cost.csv", index=False, float_format="%.3f")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
