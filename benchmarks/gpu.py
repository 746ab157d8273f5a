"""Training speed on generated counts: cells per second, model FLOP utilisation, peak memory.

    python benchmarks/gpu.py                      # GPU if there is one, else a tiny run on the CPU
    python benchmarks/gpu.py --sizes small large --output benchmarks/results/gpu.csv

Needs torch, numpy and pytorch-lightning only. For a small and a large configuration it trains with and without
bfloat16 and with and without compilation, through the same code as ``genejepa.fit``. The model FLOPs of a step are
counted by torch on one forward and backward pass; utilisation divides them by the published dense bfloat16 peak of
the GPU, or, for other devices, by the rate of a large 32-bit matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from genejepa._lightning import Callback
from genejepa.config import GeneJEPAConfig
from genejepa.data.loader import StepDataset
from genejepa.data.normalization import Normalizer
from genejepa.data.panel import PanelCounts
from genejepa.jepa import JEPA
from genejepa.train.module import JEPAModule
from genejepa.train.runner import RunOptions, train

if TYPE_CHECKING:
    from genejepa._lightning import LightningModule, Trainer

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 peaks in FLOP/s as the maker gives them."""

WARMUP_STEPS = 10


@dataclass(frozen=True)
class Size:
    """Generated data and the network trained on it."""

    n_cells: int
    n_genes: int
    settings: dict[str, Any]


SIZES = {
    "tiny": Size(2_000, 500, {"batch_size": 128, "target_steps": 30}),
    "small": Size(50_000, 2_000, {"batch_size": 1024, "target_steps": 100}),
    "large": Size(
        100_000,
        8_192,
        {
            "batch_size": 4096,
            "target_steps": 40,
            "dim": 256,
            "n_latents": 16,
            "n_layers": 6,
            "embedding_dim": 256,
        },
    ),
}


def generated_counts(n_cells: int, n_genes: int, *, seed: int = 0, density: float = 0.1) -> PanelCounts:
    """Sparse counts with ten expression programs; about ``density`` of the entries are positive."""
    rng = np.random.default_rng(seed)
    programs = rng.gamma(0.5, size=(10, n_genes))
    programs *= density / programs.mean(1, keepdims=True)
    indptr, indices, data = [np.zeros(1, np.int64)], [], []
    for start in range(0, n_cells, 5_000):
        n = min(5_000, n_cells - start)
        counts = rng.poisson(programs[rng.integers(10, size=n)]).astype(np.float32)
        rows, genes = np.nonzero(counts)
        indptr.append(indptr[-1][-1] + np.cumsum(np.bincount(rows, minlength=n)))
        indices.append(genes.astype(np.int32))
        data.append(counts[rows, genes])
    return PanelCounts(np.concatenate(indptr), np.concatenate(indices), np.concatenate(data), n_genes)


class StepClock(Callback):
    """Time after every step, with the device finished."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, _trainer: Trainer, _module: LightningModule, *_args: object) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def step_flops(config: GeneJEPAConfig, counts: PanelCounts, normalizer: Normalizer) -> float:
    """FLOPs of one training step, forward and backward, counted on the CPU with a small batch and scaled up."""
    batch_size = 64
    dataset = StepDataset(counts, normalizer, masks=config.masks, batch_size=batch_size, seed=0)
    jepa = JEPA(counts.n_genes, config.model, torch.from_numpy(np.log(normalizer.frequency))[None])
    module = JEPAModule(
        jepa,
        objectives=config.objectives,
        train_config=config.train,
        total_steps=1,
        median_depth=normalizer.median_depth,
    )
    with FlopCounterMode(display=False) as counter:
        module.weighted_loss(dataset[0]).backward()
    return counter.get_total_flops() * config.train.batch_size / batch_size


def measured_peak(n: int = 2048, repeats: int = 5) -> float:
    """Rate of a large 32-bit matrix product on the CPU, FLOP/s."""
    a = torch.randn(n, n)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        _ = a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def device_peak(name: str) -> tuple[float, str]:
    """Peak FLOP/s of the device and where the figure comes from."""
    for key, peak in PEAK_BF16.items():
        if key in name:
            return peak, "published bfloat16"
    return measured_peak(), "measured float32 product"


def peak_memory_gb(*, cuda: bool) -> float:
    """Peak memory: allocated on the GPU, or resident of the process."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run(size_name: str, *, precision: str, compile_network: bool, workers: int) -> dict[str, Any]:
    """Train one configuration and measure it."""
    cuda = torch.cuda.is_available()
    size = SIZES[size_name]
    config = GeneJEPAConfig().updated(**size.settings)
    counts = generated_counts(size.n_cells, size.n_genes)
    normalizer = Normalizer.fit(counts, transform=config.model.transform)
    torch.manual_seed(0)
    jepa = JEPA(counts.n_genes, config.model, torch.from_numpy(np.log(normalizer.frequency))[None])
    clock = StepClock()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    options = RunOptions(
        precision=precision,
        compile=compile_network,
        num_workers=workers,
        progress_bar=False,
        callbacks=[clock],
    )
    result = train(jepa, counts, normalizer, config=config, options=options)
    steps = len(clock.times) - 1 - WARMUP_STEPS
    seconds = (clock.times[-1] - clock.times[WARMUP_STEPS]) / steps
    device = torch.cuda.get_device_name() if cuda else f"CPU, {result.threads} threads"
    peak, source = device_peak(device)
    return {
        "device": device,
        "torch": torch.__version__,
        "size": size_name,
        "genes": size.n_genes,
        "batch": config.train.batch_size,
        "parameters": sum(p.numel() for p in jepa.parameters() if p.requires_grad),
        "precision": result.precision,
        "compiled": compile_network,
        "steps_timed": steps,
        "ms_per_step": round(1e3 * seconds, 2),
        "cells_per_s": round(config.train.batch_size / seconds),
        "mfu_percent": round(100 * step_flops(config, counts, normalizer) / seconds / peak, 2),
        "peak_flops_source": source,
        "peak_memory_gb": round(peak_memory_gb(cuda=cuda), 2),
    }


def main() -> None:
    """Parse the command line, run and print."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default_sizes = ["small", "large"] if cuda else ["tiny"]
    parser.add_argument("--sizes", nargs="+", default=default_sizes, choices=list(SIZES))
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled runs")
    parser.add_argument("--workers", type=int, default=8 if cuda else 0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for size in args.sizes:
        for precision in args.precisions:
            for compiled in (False,) if args.no_compile else (False, True):
                row = run(size, precision=precision, compile_network=compiled, workers=args.workers)
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
                rows.append(row)
    if args.output:
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
