"""What the benchmark suite runs: data sets, kinds of labels, and jobs."""

from __future__ import annotations

import re
from typing import Final, NamedTuple


class DataSet(NamedTuple):
    """A file of cells and what is known about them.

    ``labels`` maps each label column to whether its labels come from clustering the same counts. With ``groups_key``,
    such as donors in which the labels are nested, the only probe is one that keeps each group in one fold.
    """

    file: str
    source: str
    n_cells: int
    labels: dict[str, bool]
    batch_key: str | None = None
    groups_key: str | None = None


DATASETS: Final = {
    "pbmc_facs": DataSet("pbmc_facs_zheng2017.h5ad", "Zheng et al. 2017", 3874, {"facs_celltype": False}),
    "pbmc3k": DataSet("pbmc3k_10x.h5ad", "10x Genomics 2016", 2638, {"cell_type": True}),
    "pbmc_3tech": DataSet("pbmc_3tech_symphony.h5ad", "Korsunsky et al. 2019", 1200, {"cell_type": True}, "tech"),
    "pancreas_5tech": DataSet("pancreas_5tech_panc8small.h5ad", "Stuart et al. 2019", 500, {"cell_type": True}, "tech"),
    "kang_1556": DataSet(
        "kang_ifnb_labelled_1556.h5ad", "Kang et al. 2018", 1556, {"cell_type": True, "condition": False}, "donor"
    ),
    "kang_2k": DataSet(
        "kang_ifnb_2k.h5ad", "Kang et al. 2018", 2000, {"cell_type_transferred": True, "condition": False}
    ),
    "endocrinogenesis": DataSet(
        "endocrinogenesis_e15_2kgenes.h5ad", "Bastidas-Ponce et al. 2019", 3696, {"cell_type": True}
    ),
    "paul15": DataSet("paul15_hematopoiesis.h5ad", "Paul et al. 2015", 2730, {"cell_type": True}),
    "skin_ctcl": DataSet(
        "skin_ctcl_6donors_1800.h5ad", "Gaydosik et al. 2019", 1800, {"condition": False}, "sample", "sample"
    ),
}

MODEL: Final = "genejepa"
REFERENCE: Final = "PCA-50 sqrt"
HARMONY: Final = "Harmony"
PCAS: Final = tuple(f"PCA-{n} {kind}" for kind in ("log", "log unit", "sqrt", "sqrt unit") for n in (50, 30))
SCVI: Final = ("scVI-10", "scVI-50", "scVI-10 thinned")
TWO_VIEWS: Final = ("SimCLR", "VICReg")
ABLATIONS: Final = ("genejepa, likelihood only", "genejepa, JEPA only", "genejepa, MLP encoder")
OTHER_ENCODERS: Final = ("untrained encoder", "GeneJEPA objective")
NO_BATCH_KEY: Final = "genejepa, no batch key"
"""genejepa beside methods that are told the batch, without being told."""

OWN: Final = (MODEL, *ABLATIONS, *OTHER_ENCODERS, NO_BATCH_KEY)
"""Rows that run code of genejepa, and have to run again when it changes."""
BASELINES: Final = ("HVG", *PCAS, *SCVI, *TWO_VIEWS, *OTHER_ENCODERS)

SEEDS: Final = (0, 1, 2)
MANY_SEEDS: Final = (MODEL, ABLATIONS[0], NO_BATCH_KEY, HARMONY)
"""These run with all seeds on all cells; everything else runs once, with the first."""

TRANSDUCTIVE: Final = ("HVG", *PCAS, *SCVI, *TWO_VIEWS, *OTHER_ENCODERS, *ABLATIONS, MODEL)
WITHOUT_CELL_TYPES: Final = ("HVG", *PCAS, "scVI-10", OTHER_ENCODERS[0], ABLATIONS[0], MODEL)
WITH_BATCH: Final = (REFERENCE, HARMONY, "scVI-10", NO_BATCH_KEY, MODEL)
INDUCTIVE: Final = ("HVG", "PCA-50 log", "PCA-30 sqrt", REFERENCE, "PCA-30 sqrt unit", "scVI-10", MODEL)
BATCH_DATASETS: Final = ("pbmc_3tech", "pancreas_5tech")
ONLY_ON: Final = {
    ("transductive", "scVI-50"): ("pbmc_facs", "pbmc_3tech", "pancreas_5tech", "kang_1556"),
    ("inductive", "scVI-10"): ("pbmc_3tech", "pancreas_5tech", "kang_1556", "kang_2k"),
}
"""Slow methods that run on some data sets only, so that the suite takes less than 90 minutes."""

_SECONDS: Final = {
    "scVI-10": (5.0, 0.075),
    "scVI-50": (5.0, 0.075),
    "scVI-10 thinned": (5.0, 0.11),
    "SimCLR": (3.0, 0.012),
    "VICReg": (3.0, 0.012),
    "HVG": (5.0, 0.015),
    "GeneJEPA objective": (16.0, 0.002),
    "untrained encoder": (5.0, 0.002),
    "genejepa, MLP encoder": (48.0, 0.002),
} | dict.fromkeys((MODEL, NO_BATCH_KEY, ABLATIONS[0], ABLATIONS[1]), (32.0, 0.002))
"""Rough seconds of a job on one core, scores included: of its own, and per cell."""


class Job(NamedTuple):
    """One method on one data set; ``corrected`` if it is told the batch, and genes are chosen within batches."""

    dataset: str
    regime: str
    corrected: bool
    method: str
    seed: int

    @property
    def batch(self) -> str:
        """Name of ``corrected`` in files and tables."""
        return "batch" if self.corrected else "plain"

    @property
    def key(self) -> str:
        """Name of the job and of its files."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", self.method).strip("-")
        return f"{self.dataset}.{self.regime}.{self.batch}.{slug}.{self.seed}"

    @property
    def seconds(self) -> float:
        """Expected duration on one core."""
        own, per_cell = _SECONDS.get(self.method, (5.0, 0.002))
        return own + per_cell * DATASETS[self.dataset].n_cells


def all_jobs() -> list[Job]:
    """Everything that the suite runs, in the order of the tables."""
    out = []
    for name, dataset in DATASETS.items():
        out += _jobs_of(name, "transductive", WITHOUT_CELL_TYPES if dataset.groups_key else TRANSDUCTIVE)
        if name in BATCH_DATASETS:
            out += _jobs_of(name, "transductive", WITH_BATCH, corrected=True)
        if dataset.groups_key is None:
            out += _jobs_of(name, "inductive", INDUCTIVE)
    return out


def _jobs_of(dataset: str, regime: str, methods: tuple[str, ...], *, corrected: bool = False) -> list[Job]:
    out = []
    for method in methods:
        if dataset in ONLY_ON.get((regime, method), DATASETS):
            seeds = SEEDS if method in MANY_SEEDS and regime == "transductive" else SEEDS[:1]
            out += [Job(dataset, regime, corrected, method, seed) for seed in seeds]
    return out
