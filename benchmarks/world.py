"""What the world model predicts, beside the simple baselines that usually win; three seeds of everything.

    OMP_NUM_THREADS=1 python benchmarks/world.py

- perturbation: interferon on blood cells (Kang et al. 2018). The stimulated cells of a cell type, or of a donor, are
  left out of the training of the encoder and of the transitions, and predicted from the controls.
- time: a stage of endocrinogenesis (ordered clusters) or an hour of myoblast differentiation (FPKM) is left out, and
  predicted from the stage before. The last one is extrapolated.
- futures: a simulated switch that splits cells 30 to 70, and one that does not split them; judged on new cells.
- planning: 50 pairs of start and goal in a simulated network of eleven genes, whose best sequences are known, at
  horizon 3, and searches at horizon 6.
- cost: seconds for encoder, transitions and a plan of the interferon data.

Prints the tables and writes ``benchmarks/results/world_*.csv``. ``energy.py`` measures the energies.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from _common import DEVELOPMENT_DATA, RESULTS, read, trained
from sklearn.metrics import normalized_mutual_info_score

import genejepa
from genejepa import simulation
from genejepa.errors import DataWarning, ExtrapolationWarning

if TYPE_CHECKING:
    from collections.abc import Iterator

SEEDS = (0, 1, 2)
MEASURES = ["delta_pearson", "delta_pearson_top", "energy_distance", "wasserstein"]
KANG = {"kang_1556": "cell_type", "kang_2k": "cell_type_transferred"}
STAGES = {
    "endocrinogenesis": ("endocrinogenesis_e15_2kgenes.h5ad", "stage_order"),
    "hsmm": ("hsmm_myoblast_trapnell2014_fpkm.h5ad", "Hours"),
}
ACTIONS = [
    *("Gata2 up", "Gata2 down", "Gata1 up", "EKLF up", "Fli1 up"),
    *("Cebpa up", "Cebpa down", "Pu.1 up", "EgrNab up", "Gfi1 up"),
]
N_PROBLEMS = 50


# Perturbation -----------------------------------------------------------------------------------------


def left_out(adata: ad.AnnData, dataset: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """What is left out, the column of the groups, and the stimulated cells of it."""
    stimulated = (adata.obs["condition"] == "stim").to_numpy()
    for kind in sorted(adata.obs["cell_type"].unique()):
        yield f"type: {kind}", "cell_type", stimulated & (adata.obs["cell_type"] == kind).to_numpy()
    if dataset == "kang_1556":
        for donor in sorted(adata.obs["donor"].unique()):
            yield f"donor: {donor}", "type_and_donor", stimulated & (adata.obs["donor"] == donor).to_numpy()


def perturbation(data_dir: Path, seed: int) -> list[dict[str, Any]]:
    rows = []
    for dataset, label in KANG.items():
        adata, _ = read(dataset, data_dir)
        adata.obs["cell_type"] = adata.obs[label].astype(str)
        if "donor" in adata.obs:
            adata.obs["donor"] = adata.obs["donor"].astype(str)
            adata.obs["type_and_donor"] = adata.obs["cell_type"] + ", " + adata.obs["donor"]
        for what, group_key, hidden in left_out(adata, dataset):
            seen = adata[~hidden].copy()
            start = time.perf_counter()
            model = trained(seen, seed)
            keys = {"action_key": "condition", "control": "ctrl", "group_key": group_key}
            world = genejepa.WorldModel(model).fit(seen, **keys, seed=seed)
            seconds = time.perf_counter() - start
            plain = genejepa.WorldModel(model).fit(seen, **keys, seed=seed, max_steps=0)
            training, observed = world.expression(seen), world.expression(adata[hidden].copy())
            for group in sorted(observed.obs[group_key].unique()):
                before = seen[(seen.obs[group_key] == group) & (seen.obs["condition"] == "ctrl")].copy()
                truth = observed[observed.obs[group_key] == group]
                table = genejepa.evaluate.transition(world.predict(before, "stim"), truth, training, **keys)
                linear = genejepa.evaluate.transition(plain.predict(before, "stim"), truth, training, **keys)
                table.loc["model, linear start only"] = linear.loc["model"]
                facts = {"dataset": dataset, "left_out": what, "group": group, "seed": seed, "seconds": seconds}
                facts |= {"gate": world.facts["gate"], "futures": world.facts["n_futures"]}
                rows += [{**facts, "method": name, **table.loc[name]} for name in table.index]
    return rows


# Time -------------------------------------------------------------------------------------------------


def stages(data_dir: Path, seed: int) -> list[dict[str, Any]]:
    rows = []
    for dataset, (file, key) in STAGES.items():
        adata = ad.read_h5ad(data_dir / file)
        adata.obs["time"] = adata.obs[key].astype(float)
        moments = sorted(adata.obs["time"].unique())
        for moment in moments[1:]:
            seen, hidden = adata[adata.obs["time"] != moment].copy(), adata[adata.obs["time"] == moment].copy()
            model = trained(seen, seed, allow_fractional=dataset == "hsmm")
            world = genejepa.WorldModel(model).fit(seen, time_key="time", seed=seed)
            earlier = max(other for other in moments if other < moment)
            before = seen[seen.obs["time"] == earlier].copy()
            predicted = world.predict(before, duration=moment - earlier)
            table = genejepa.evaluate.transition(
                predicted, world.expression(hidden), world.expression(seen), time_key="time"
            )
            task = "extrapolation" if moment == moments[-1] else "interpolation"
            facts = {"dataset": dataset, "left_out": moment, "task": task, "seed": seed}
            facts |= {"gate": world.facts["gate"], "futures": world.facts["n_futures"]}
            rows += [{**facts, "method": name, **table.loc[name]} for name in table.index]
    return rows


# Futures ----------------------------------------------------------------------------------------------


def futures(seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, simulate in (("splits", simulation.branching), ("does not split", simulation.single_fate)):
        cells = simulate(800, seed=seed)
        world = genejepa.WorldModel(trained(cells, seed)).fit(cells, time_key="time", seed=seed)
        new = simulate(800, seed=100 + seed)
        before, after = new[new.obs["time"] == 0].copy(), new[new.obs["time"] == 1].copy()
        n = world.facts["n_futures"]
        predicted = world.predict(before, n_futures=n)
        chance = predicted.obs.groupby("genejepa_future", observed=True)["genejepa_probability"].sum() / before.n_obs
        states = world.model.get_latent_representation(after)
        places = np.stack(
            [
                predicted.obsm["X_genejepa"][(predicted.obs["genejepa_future"] == k).to_numpy()].mean(0)
                for k in chance.index
            ]
        )
        nearest = ((states[:, None] - places) ** 2).sum(-1).argmin(1)
        branch = after.obs["branch"].astype(str).to_numpy()
        shares = np.sort(pd.Series(branch).value_counts(normalize=True).to_numpy())[::-1]
        ranked = np.sort(chance.to_numpy())[::-1]
        size = max(len(shares), len(ranked))
        error = np.abs(np.pad(shares, (0, size - len(shares))) - np.pad(ranked, (0, size - len(ranked)))).max()
        rows.append(
            {
                "simulation": name,
                "seed": seed,
                "futures": n,
                "largest_probability": ranked[0],
                "largest_error": error,
                "nmi": normalized_mutual_info_score(branch, nearest) if len(shares) > 1 else np.nan,
            }
        )
    return rows


# Planning ---------------------------------------------------------------------------------------------


def planning(seed: int, n_trajectories: int, n_cells: int) -> list[dict[str, Any]]:
    regulation = simulation.Regulation.of("krumsiek11")
    starts = regulation.starts[1:]  # the first one, the progenitor, gives mixtures
    cells = simulation.explore(
        regulation, starts, ACTIONS, n_steps=2, n_trajectories=n_trajectories, n_cells=n_cells, seed=seed
    )
    model = trained(cells, seed)
    begun = time.perf_counter()
    world = genejepa.WorldModel(model).fit(
        cells, action_key="action", control="none", group_key="trajectory", time_key="time", seed=seed
    )
    seconds = time.perf_counter() - begun
    landscape = simulation.landscape(regulation, starts, ACTIONS, horizon=3, seed=100 + seed)
    rng = np.random.default_rng([seed, 200])
    rows = []
    for number, problem in enumerate(simulation.draw_problems(landscape, N_PROBLEMS, seed=seed)):
        start = simulation.observe(regulation, regulation.start(problem.start, 100, rng=rng), rng=rng)
        goal = simulation.observe(regulation, problem.goal, rng=rng)
        for method, horizon in (("exhaustive", 3), ("cross_entropy", 6), ("hierarchical", 6)):
            begun = time.perf_counter()
            plan = world.plan(start, goal, ACTIONS, horizon=horizon, method=method, n_cells=50, seed=seed)
            rows.append(
                {
                    "seed": seed,
                    "problem": number,
                    "n_needed": len(problem.sequences[0]),
                    "method": method,
                    "horizon": horizon,
                    "first": plan.best in {tuple(sequence) for sequence in problem.sequences},
                    "reached": reached(regulation, problem, plan.best, seed=seed),
                    "n_actions": len(plan.best),
                    "n_evaluations": plan.n_evaluations,
                    "seconds": time.perf_counter() - begun,
                    "fit_seconds": seconds,
                    "gate": world.facts["gate"],
                }
            )
    return rows


def reached(
    regulation: simulation.Regulation, problem: simulation.Problem, actions: tuple[str, ...], *, seed: int
) -> bool:
    """Whether the sequence, carried out in the simulator, ends where the goal is: all gene means within 0.1."""
    end = simulation.outcome(regulation, problem.start, actions, seed=1000 + seed)
    return bool(np.abs(end.mean(0) - problem.goal.mean(0)).max() < 0.1)


# Cost -------------------------------------------------------------------------------------------------


def cost(data_dir: Path, seed: int) -> list[dict[str, Any]]:
    rows = []
    for dataset, label in KANG.items():
        adata, _ = read(dataset, data_dir)
        adata.obs["cell_type"] = adata.obs[label].astype(str)
        begun = time.perf_counter()
        model = trained(adata, seed)
        encoded = time.perf_counter()
        world = genejepa.WorldModel(model).fit(
            adata, action_key="condition", control="ctrl", group_key="cell_type", seed=seed
        )
        fitted = time.perf_counter()
        stimulated = (adata.obs["condition"] == "stim").to_numpy()
        plan = world.plan(adata[~stimulated].copy(), adata[stimulated].copy(), horizon=3, seed=seed)
        rows.append(
            {
                "dataset": dataset,
                "seed": seed,
                "threads": torch.get_num_threads(),
                "encoder_seconds": encoded - begun,
                "fit_seconds": fitted - encoded,
                "plan_seconds": time.perf_counter() - fitted,
                "plan": " > ".join(plan.best),
            }
        )
    return rows


# Tables -----------------------------------------------------------------------------------------------


def print_perturbation(table: pd.DataFrame) -> None:
    for by in ("type", "donor"):
        part = table[table["left_out"].str.startswith(by)]
        means = part.groupby(["dataset", "group", "method"], sort=False)[MEASURES].mean()
        print(f"\nLeft-out {by}, mean over seeds")
        for measure in MEASURES:
            print(measure)
            print(means[measure].unstack(["dataset", "group"]).round(3).to_string())
        others = ["no change", "mean shift", "linear"]
        for (dataset), own in means.groupby("dataset"):
            wide = own.loc[dataset].unstack("method")
            for measure, sign in (("delta_pearson", 1), ("delta_pearson_top", 1), ("energy_distance", -1)):
                wins = (sign * wide[measure]["model"]).to_numpy() > (sign * wide[measure][others]).max(
                    axis=1
                ).to_numpy()
                print(f"{dataset}: {measure} better than {', '.join(others)} in {wins.sum()} of {len(wins)}")


def print_time(table: pd.DataFrame) -> None:
    means = table.groupby(["dataset", "task", "left_out", "method"], sort=False)["wasserstein"].mean()
    print("\nW1 to the left-out stage, mean over seeds")
    print(means.unstack(["dataset", "task", "left_out"]).round(2).to_string())
    print(
        means.groupby(["dataset", "task", "method"], sort=False)
        .mean()
        .unstack(["dataset", "task"])
        .round(2)
        .to_string()
    )


def print_planning(table: pd.DataFrame) -> None:
    print("\nPlanning")
    shown = table.groupby(["seed", "method"])[["first", "reached", "n_evaluations", "seconds", "fit_seconds"]].mean()
    print(shown.round(3).to_string())
    print(table.pivot_table(index="method", columns="n_needed", values="first").round(3).to_string())


def main() -> None:
    """Parse the command line, run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEVELOPMENT_DATA)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parts = ("perturbation", "time", "futures", "planning", "cost")
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--trajectories", type=int, default=900)
    parser.add_argument("--cells", type=int, default=12, help="cells of each trajectory and time")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    warnings.simplefilter("ignore", ExtrapolationWarning)  # leaving out what is predicted is the purpose
    warnings.simplefilter("ignore", DataWarning)
    measured = {
        "perturbation": (lambda seed: perturbation(args.data, seed), print_perturbation),
        "time": (lambda seed: stages(args.data, seed), print_time),
        "futures": (futures, lambda table: print("\nFutures\n" + table.round(3).to_string(index=False))),
        "cost": (
            lambda seed: cost(args.data, seed),
            lambda table: print("\nCost\n" + table.round(1).to_string(index=False)),
        ),
        "planning": (lambda seed: planning(seed, args.trajectories, args.cells), print_planning),
    }
    for name in args.only:
        measure, show = measured[name]
        table = pd.DataFrame([row for seed in args.seeds for row in measure(seed)])
        table.round(4).to_csv(RESULTS / f"world_{name}.csv", index=False)
        show(table)


if __name__ == "__main__":
    main()
