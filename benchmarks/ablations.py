"""What each part of the default contributes: one part is taken out, or replaced, at a time.

    OMP_NUM_THREADS=1 python benchmarks/ablations.py --datasets pbmc_facs pbmc_3tech paul15 --seeds 1

Writes ``benchmarks/results/ablations.csv`` (one row per arm, data set and seed, in points of macro-F1) and prints the
mean difference to the default over data sets. Rows that are in the file already are not run again, unless --fresh.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from _common import DEVELOPMENT_DATA, RESULTS, read
from _data import DATASETS

from genejepa.bench import fit_and_embed, panel_of, score
from genejepa.bench.ours import arm

ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "no thinning": {"thinned_fraction": 0.0},
    "no linear path": {"n_axes": 0},
    "diversity instead of likelihood": {"information": 0.0, "diversity": 0.2},
    "no prediction": {"prediction": 0.0},
    "no invariance": {"invariance": 0.0},
    "no depth term": {"depth": 0.0},
    "with diversity": {"diversity": 0.2},
    "log1p values": {"transform": "log1p"},
    "four latents": {"n_latents": 4},
    "two blocks": {"n_layers": 2},
    "800 steps": {"target_steps": 800},
}
MEASURES = {
    "linear": ("linear", "all"),
    "knn": ("knn", "all"),
    "few_shot": ("few_shot", "5"),
    "shallow": ("depth", "0.25"),
}


def measure(dataset: str, name: str, seed: int, data_dir: Path) -> dict[str, Any]:
    """Points of macro-F1 of one arm, on the first label column."""
    adata, labels_key = read(dataset, data_dir)
    cells = panel_of(adata)
    run = fit_and_embed(arm(name, **ARMS[name]), cells, seed=seed)
    table = score(run, cells.obs, labels_key=labels_key, tasks=("linear", "knn", "few_shot", "depth"))
    values = table[table["metric"] == "macro_f1"].set_index(["task", "setting"])["value"]
    points = {key: 100 * float(values[at]) for key, at in MEASURES.items()}
    return {"dataset": dataset, "arm": name, "seed": seed, **points, "fit_seconds": run.fit_seconds}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean difference of each arm to the default, over the data sets and seeds that both have."""
    points = table.set_index(["dataset", "seed", "arm"])[list(MEASURES)].unstack("arm")
    lines = {}
    for name in [name for name in ARMS if name in set(table["arm"])]:
        difference = points.xs(name, axis=1, level="arm") - points.xs("default", axis=1, level="arm")
        lines[name] = difference.mean() if name != "default" else points.xs("default", axis=1, level="arm").mean()
    return pd.DataFrame(lines).T.round(1)


def main() -> None:
    """Parse the command line, run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["pbmc_facs", "pbmc_3tech", "paul15"], choices=list(DATASETS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="forget the rows of the file")
    parser.add_argument("--data", type=Path, default=DEVELOPMENT_DATA)
    parser.add_argument("--output", type=Path, default=RESULTS / "ablations.csv")
    args = parser.parse_args()
    rows = [] if args.fresh or not args.output.exists() else pd.read_csv(args.output).to_dict("records")
    done = {(row["dataset"], row["arm"], row["seed"]) for row in rows}
    for name in args.arms:
        for dataset in args.datasets:
            for seed in range(args.seeds):
                if (dataset, name, seed) not in done:
                    rows.append(measure(dataset, name, seed, args.data))
                    pd.DataFrame(rows).to_csv(args.output, index=False, float_format="%.3f")
                    print(rows[-1], flush=True)
    print(summary(pd.DataFrame(rows)).to_string())


if __name__ == "__main__":
    main()
