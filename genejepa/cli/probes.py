"""Running probes and printing their scores."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import typer

from genejepa.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from anndata import AnnData

PROBE_TITLES: Final = {"linear": "linear", "knn": "nearest neighbours", "few_shot": "few-shot"}


class Probe(StrEnum):
    """Kind of probe."""

    linear = "linear"
    knn = "knn"
    few_shot = "few-shot"
    every = "all"


def run_probe(kind: Probe, adata: AnnData, **options: Any) -> pd.DataFrame:
    """Run one probe; the options are those that all probes have."""
    from genejepa import evaluate

    probes: dict[Probe, Callable[..., pd.DataFrame]] = {
        Probe.linear: evaluate.linear_probe,
        Probe.knn: evaluate.knn_probe,
        Probe.few_shot: evaluate.few_shot_probe,
    }
    return probes[kind](adata, **options)


def fit_probes(adata: AnnData, labels_key: str | None, *, seed: int) -> tuple[list[pd.DataFrame], list[str]]:
    """Tables of all probes, and why some could not be run: a training is not lost for want of labels."""
    tables, notes = [], []
    for kind in (Probe.linear, Probe.knn, Probe.few_shot) if labels_key is not None else ():
        try:
            tables.append(run_probe(kind, adata, labels_key=labels_key, seed=seed))
        except DataError as error:
            notes.append(f"The {kind.value} probe was not run: {error.problem}")
            typer.echo(f"Warning: {notes[-1]}\nFix: {error.fix}", err=True)
    return tables, notes


def probe_name(table: pd.DataFrame) -> str:
    """Name of the probe that made a table."""
    return str(table["probe"].iloc[0])


def overall(table: pd.DataFrame, metric: str) -> pd.Series[Any]:
    """Row of a measure over all classes."""
    return table.loc[(table["metric"] == metric) & (table["label"] == "all")].iloc[0]


def score_text(row: pd.Series[Any]) -> str:
    """Value with its 95 % interval, which is missing for a single draw."""
    text = f"{row['value']:.3f}"
    if row["ci_low"] == row["ci_low"]:
        text += f" ({row['ci_low']:.3f} to {row['ci_high']:.3f})"
    return text


def print_scores(table: pd.DataFrame) -> None:
    """Print the overall measures of a probe, and the F1 of every class."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"Probe: {PROBE_TITLES[probe_name(table)]}", title_justify="left")
    shown.add_column("measure")
    shown.add_column("class")
    shown.add_column("value (95 % interval)")
    shown.add_column("cells", justify="right")
    for _, row in table.iterrows():
        if row["label"] == "all" or row["metric"] == "f1":
            name = str(row["metric"]).replace("_", " ")
            shown.add_row(name, str(row["label"]), score_text(row), f"{int(row['n_cells']):,}")
    Console().print(shown, markup=False)
    dropped: dict[str, int] = table.attrs["probe"]["dropped_classes"]
    if dropped:
        names = ", ".join(f"{name} ({n} cells)" for name, n in dropped.items())
        typer.echo(f"Left out, as they have too few cells: {names}")
