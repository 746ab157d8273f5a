"""The command line: ``genejepa fit``, ``embed``, ``probe`` and ``info``.

Everything heavy is imported inside the functions, so that ``genejepa --help`` answers at once.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, ParamSpec

import typer

from genejepa._constants import CONFIG_FILE, OBSM_KEY, UNS_KEY
from genejepa._version import __version__
from genejepa.config import GeneJEPAConfig, TrainConfig
from genejepa.errors import CollapseWarning, ConfigError, DataError, GeneJEPAError, TrainingInterruptedWarning

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from genejepa.model import GeneJEPA

__all__ = ["app", "main"]

P = ParamSpec("P")

_EXIT_ERROR: Final = 2
_MODEL, _CELLS, _PROBE, _REPORT = "model", "cells.h5ad", "probe.csv", "report.html"
_DEFAULTS: Final = TrainConfig()
_MIN_CLASS_SIZE: Final = 10
_MAX_LEVELS: Final = 200
_PROBE_TITLES: Final = {"linear": "linear", "knn": "nearest neighbours", "few_shot": "few-shot"}

app = typer.Typer(
    name="genejepa",
    help="A joint-embedding predictive world model of the transcriptome, for single cells in h5ad files.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Example: genejepa fit cells.h5ad -o out --labels-key cell_type",
)


class Accelerator(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"
    mps = "mps"


class Precision(StrEnum):
    """Arithmetic of the training; embedding is always in 32 bits."""

    auto = "auto"
    full = "32-true"
    bfloat16 = "bf16-mixed"
    half = "16-mixed"


class Probe(StrEnum):
    """Kind of probe."""

    linear = "linear"
    knn = "knn"
    few_shot = "few-shot"
    every = "all"


CellsFile = Annotated[Path, typer.Argument(metavar="CELLS.h5ad", help="Cells with raw counts.")]
Layer = Annotated[str | None, typer.Option(help="Layer with the raw counts.", show_default="X")]
LabelsKey = Annotated[str | None, typer.Option(help="Column of obs with labels: for probes only.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote.")]


def main() -> None:
    """Run the command line."""
    app()


def _plain_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors that a user can mend into a message on stderr and exit code 2, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                command(*args, **kwargs)
            except (GeneJEPAError, OSError) as error:
                typer.echo(f"Error: {error}", err=True)
                raise typer.Exit(_EXIT_ERROR) from error

    return wrapped


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """Write a warning to stderr, without the line of code if it is one of ours."""
    if issubclass(category, CollapseWarning):
        return  # the monitor logs it as well, and the log goes to stderr
    own = issubclass(category, TrainingInterruptedWarning)
    text = f"Warning: {message}" if own else warnings.formatwarning(message, category, filename, lineno)
    typer.echo(text.rstrip(), err=True)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# Commands ---------------------------------------------------------------------------------------------


@app.command(epilog="Example: genejepa fit cells.h5ad -o out --labels-key cell_type --set information=8")
@_plain_errors
def fit(
    cells: CellsFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")],
    layer: Layer = None,
    batch_key: Annotated[
        str | None, typer.Option(help="Column of obs with the batch to correct for, such as the technology.")
    ] = None,
    labels_key: LabelsKey = None,
    n_genes: Annotated[int, typer.Option(min=0, help="Highly variable genes to use; 0 for all expressed ones.")] = 2000,
    mask_var: Annotated[str | None, typer.Option(help="Column of var that marks the genes instead.")] = None,
    gene_symbols: Annotated[
        str | None, typer.Option(help="Column of var with gene names.", show_default="var_names")
    ] = None,
    max_epochs: Annotated[
        int | None, typer.Option(help="Passes over the cells.", show_default="about 400 steps")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Cells per step.", show_default=str(_DEFAULTS.batch_size))
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything random.", show_default=str(_DEFAULTS.seed))
    ] = None,
    accelerator: Annotated[Accelerator, typer.Option(help="Where to train.")] = Accelerator.auto,
    devices: Annotated[str, typer.Option(help="How many devices, or which: 2, or 0,1.")] = "1",
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the training.")] = Precision.auto,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="by a quick timing")] = None,
    early_stopping: Annotated[
        bool,
        typer.Option("--early-stopping", help="Hold out a tenth of the cells; stop when they gain no more."),
    ] = False,
    overwrite: Overwrite = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting, such as information=8; can be repeated."),
    ] = None,
) -> None:
    """Train a model on raw counts and embed the cells.

    Writes into the directory: model/ (for `genejepa embed`), cells.h5ad (the cells with the embedding in
    obsm), report.html, and with --labels-key probe.csv. Ctrl-C ends the training early and still writes.
    """
    chosen = _parse_settings(settings or [])
    given = {"max_epochs": max_epochs, "batch_size": batch_size, "seed": seed}
    chosen |= {name: value for name, value in given.items() if value is not None}
    GeneJEPAConfig().updated(**chosen)  # mistakes shall show before any file is read
    _check_accelerator(accelerator)
    _prepare_directory(out, overwrite=overwrite)
    adata = _read_cells(cells)

    import genejepa

    model = genejepa.fit(
        adata,
        layer=layer,
        batch_key=batch_key,
        labels_key=labels_key,
        n_genes=n_genes or None,
        mask_var=mask_var,
        gene_symbols=gene_symbols,
        progress_bar=sys.stdout.isatty(),
        train_options={
            "accelerator": accelerator.value,
            "devices": int(devices) if devices.isdecimal() else devices,
            "precision": precision.value,
            "threads": threads,
            "early_stopping": early_stopping,
        },
        **chosen,  # type: ignore[arg-type]  # the configuration has checked the values
    )
    _write_outputs(out, adata, model, source=cells.name)


@app.command(epilog="Example: genejepa embed others.h5ad --model out/model -o embedded.h5ad")
@_plain_errors
def embed(
    cells: CellsFile,
    model: Annotated[Path, typer.Option(help="Directory of a saved model, such as out/model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: the cells with the embedding.")],
    layer: Layer = None,
    key_added: Annotated[str, typer.Option(help="Name of the embedding in obsm.")] = OBSM_KEY,
    overwrite: Overwrite = False,
) -> None:
    """Embed other cells with a trained model.

    Genes are matched by name. Their order does not matter, further genes are ignored, and missing genes count
    as not measured, not as zero.
    """
    _refuse_existing(out, overwrite=overwrite)
    adata = _read_cells(cells)

    from genejepa.model import GeneJEPA

    trained = GeneJEPA.load(model)
    match = trained.gene_report(adata)
    trained.embed(adata, layer=layer, key_added=key_added)
    _write_cells(adata, out)
    _echo_facts(
        {
            "Cells": f"{adata.n_obs:,}",
            "Genes": f"{match.n_matched:,} of the model's {len(trained.genes):,} found by name",
            "Embedding": f"obsm[{key_added!r}], {trained.embedding_dim} dimensions",
            "Written": str(out),
        }
    )


@app.command(epilog="Example: genejepa probe embedded.h5ad --labels-key cell_type --kind all --output table.csv")
@_plain_errors
def probe(
    cells: Annotated[Path, typer.Argument(metavar="EMBEDDED.h5ad", help="Cells with an embedding in obsm.")],
    labels_key: Annotated[str, typer.Option(help="Column of obs with the classes.")],
    use_rep: Annotated[str, typer.Option(help="Embedding in obsm.")] = OBSM_KEY,
    groups_key: Annotated[
        str | None, typer.Option(help="Column of obs, such as the donor, never split between folds.")
    ] = None,
    kind: Annotated[Probe, typer.Option(help="Probe to run.")] = Probe.linear,
    seed: Annotated[int, typer.Option(help="Seed of folds and draws.")] = 0,
    output: Annotated[Path | None, typer.Option(help="CSV file for the whole table.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score how well simple classifiers read labels off an embedding.

    linear: logistic regression. knn: vote of the 15 nearest cells. few-shot: logistic regression on 5
    labelled cells per class. Scores are on cells that the classifier has not seen, with 95 % intervals.
    """
    if output is not None:
        _refuse_existing(output, overwrite=overwrite)
    adata = _read_cells(cells, backed=True)
    kinds = [name for name in Probe if name is not Probe.every] if kind is Probe.every else [kind]
    tables = [
        _run_probe(name, adata, labels_key=labels_key, use_rep=use_rep, groups_key=groups_key, seed=seed)
        for name in kinds
    ]
    for table in tables:
        _print_scores(table)
    if output is not None:
        _write_tables(tables, output)
        typer.echo(f"Written: {output}")


@app.command(epilog="Example: genejepa info out/model")
@_plain_errors
def info(
    path: Annotated[Path, typer.Argument(metavar="MODEL_OR_H5AD", help="Model directory or h5ad file.")],
) -> None:
    """Tell what a model directory or an h5ad file holds.

    For an h5ad file this includes which slots hold raw counts, and which columns can serve as labels.
    """
    if path.is_dir():
        _describe_model(path)
    else:
        _describe_cells(path)


# Reading ----------------------------------------------------------------------------------------------


def _parse_settings(entries: Sequence[str]) -> dict[str, object]:
    """Read ``name=value`` pairs; a value is JSON where it can be, else text."""
    settings: dict[str, object] = {}
    for entry in entries:
        name, separator, text = entry.partition("=")
        if not separator:
            raise ConfigError(f"`--set {entry}` has no value.", fix=f"write --set {name}=VALUE.")
        try:
            settings[name.strip()] = json.loads(text)
        except ValueError:
            settings[name.strip()] = text.strip()
    return settings


def _check_accelerator(accelerator: Accelerator) -> None:
    """Refuse an accelerator that this machine does not have."""
    if accelerator in (Accelerator.auto, Accelerator.cpu):
        return
    import torch

    on_gpu = accelerator is Accelerator.gpu
    if not (torch.cuda.is_available() if on_gpu else torch.backends.mps.is_available()):
        raise ConfigError(
            f"`--accelerator {accelerator}` was asked for, but torch finds none here.",
            fix="leave the option out, or install a build of torch for your device.",
        )


def _read_cells(path: Path, *, backed: bool = False) -> AnnData:
    """Read an h5ad file; ``backed`` leaves X on disk."""
    if not path.is_file():
        raise DataError(
            f"{path} {'is a directory' if path.is_dir() else 'does not exist'}.",
            fix="give the name of an h5ad file.",
        )
    from anndata import read_h5ad

    try:
        adata: AnnData = read_h5ad(path, backed="r" if backed else None)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as h5ad: {error}",
            fix="write it again with `adata.write_h5ad(...)`; for a 10x file use `scanpy.read_10x_h5` first.",
        ) from error
    return adata


# Writing ----------------------------------------------------------------------------------------------


def _prepare_directory(path: Path, *, overwrite: bool) -> None:
    """Make the output directory; refuse one that holds something, unless that may be overwritten."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, expected a directory.", fix="give another name to --out.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConfigError(f"{path} is not empty.", fix="give another name to --out, or pass --overwrite.")
    path.mkdir(parents=True, exist_ok=True)


def _refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse an output file that exists, unless it may be overwritten, or whose directory does not exist."""
    if path.is_dir():
        raise ConfigError(f"{path} is a directory, expected a file name.", fix="add a file name.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists.", fix="give another name, or pass --overwrite.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} does not exist.", fix=f"mkdir -p {path.parent}")


def _write_cells(adata: AnnData, path: Path) -> None:
    """Write an h5ad file so that a reader sees the old content or the new one, never a part of it."""
    from genejepa.persistence import replacing

    with replacing(path) as temporary:
        adata.write_h5ad(temporary)


def _write_tables(tables: Sequence[pd.DataFrame], path: Path) -> None:
    """Write the tables of probes as one CSV file."""
    from genejepa.persistence import write_atomically

    # Not pandas.concat: it compares the records that tables carry along.
    parts = [table.to_csv(index=False, header=not i) for i, table in enumerate(tables)]
    write_atomically(path, "".join(parts).encode())


def _write_outputs(out: Path, adata: AnnData, model: GeneJEPA, *, source: str) -> None:
    """Write everything that `genejepa fit` leaves, the dearest first, and sum it up."""
    from genejepa.report import build_report

    registration = model.registration
    model.save(out / _MODEL, overwrite=True)
    _write_cells(adata, out / _CELLS)
    tables, notes = _fit_probes(adata, registration.labels_key, seed=model.config.train.seed)
    (out / _PROBE).unlink(missing_ok=True)  # scores of an earlier call are not those of this model
    if tables:
        _write_tables(tables, out / _PROBE)
    facts = _training_facts(adata, model)
    build_report(
        out / _REPORT,
        adata=adata,
        facts={"Data": source, **facts, "Model": model.model_id},
        history=model.history,
        labels_key=registration.labels_key,
        probe_tables=tables,
        layer=registration.layer,
        notes=notes,
        seed=model.config.train.seed,
    )
    for table in tables:
        facts[f"Macro-F1, {_PROBE_TITLES[_probe_name(table)]}"] = _score_text(_overall(table, "macro_f1"))
    written = [_MODEL, _CELLS, *([_PROBE] if tables else []), _REPORT]
    _echo_facts({**facts, "Written": ", ".join(str(out / name) for name in written)})


def _training_facts(adata: AnnData, model: GeneJEPA) -> dict[str, str]:
    """Collect what the summary and the report say about a training."""
    record = model.record
    assert record is not None  # it was trained just now
    return {
        "Cells": f"{adata.n_obs:,}",
        "Genes": f"{len(model.genes):,} of {adata.n_vars:,}",
        "Training": _duration(record.steps, record.seconds, interrupted=record.interrupted),
        "Arithmetic": f"{record.precision}, CPU threads: {record.threads}, seed {model.config.train.seed}",
        "Effective rank": f"{record.effective_rank:.1f} of {model.embedding_dim}",
    }


def _duration(steps: int, seconds: float, *, interrupted: bool) -> str:
    """Length of a training in words."""
    ending = " (interrupted)" if interrupted else ""
    return f"{steps:,} step{'s' if steps != 1 else ''} in {seconds:.0f} s{ending}"


# Probes -----------------------------------------------------------------------------------------------


def _run_probe(kind: Probe, adata: AnnData, **options: Any) -> pd.DataFrame:
    """Run one probe; the options are those that all probes have."""
    from genejepa import evaluate

    probes: dict[Probe, Callable[..., pd.DataFrame]] = {
        Probe.linear: evaluate.linear_probe,
        Probe.knn: evaluate.knn_probe,
        Probe.few_shot: evaluate.few_shot_probe,
    }
    return probes[kind](adata, **options)


def _fit_probes(adata: AnnData, labels_key: str | None, *, seed: int) -> tuple[list[pd.DataFrame], list[str]]:
    """Tables of all probes, and why some could not be run: a training is not lost for want of labels."""
    tables, notes = [], []
    for kind in (Probe.linear, Probe.knn, Probe.few_shot) if labels_key is not None else ():
        try:
            tables.append(_run_probe(kind, adata, labels_key=labels_key, seed=seed))
        except DataError as error:
            notes.append(f"The {kind.value} probe was not run: {error.problem}")
            typer.echo(f"Warning: {notes[-1]}\nFix: {error.fix}", err=True)
    return tables, notes


def _probe_name(table: pd.DataFrame) -> str:
    return str(table["probe"].iloc[0])


def _overall(table: pd.DataFrame, metric: str) -> pd.Series[Any]:
    """Row of a measure over all classes."""
    return table.loc[(table["metric"] == metric) & (table["label"] == "all")].iloc[0]


def _score_text(row: pd.Series[Any]) -> str:
    """Value with its 95 % interval, which is missing for a single draw."""
    text = f"{row['value']:.3f}"
    if row["ci_low"] == row["ci_low"]:
        text += f" ({row['ci_low']:.3f} to {row['ci_high']:.3f})"
    return text


def _print_scores(table: pd.DataFrame) -> None:
    """Print the overall measures of a probe, and the F1 of every class."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"Probe: {_PROBE_TITLES[_probe_name(table)]}", title_justify="left")
    shown.add_column("measure")
    shown.add_column("class")
    shown.add_column("value (95 % interval)")
    shown.add_column("cells", justify="right")
    for _, row in table.iterrows():
        if row["label"] == "all" or row["metric"] == "f1":
            name = str(row["metric"]).replace("_", " ")
            shown.add_row(name, str(row["label"]), _score_text(row), f"{int(row['n_cells']):,}")
    Console().print(shown, markup=False)
    dropped: dict[str, int] = table.attrs["probe"]["dropped_classes"]
    if dropped:
        names = ", ".join(f"{name} ({n} cells)" for name, n in dropped.items())
        typer.echo(f"Left out, as they have too few cells: {names}")


# Descriptions -----------------------------------------------------------------------------------------


def _describe_model(path: Path) -> None:
    """Print what a model directory holds."""
    from genejepa.persistence import load_model

    nested = path / _MODEL
    stored = load_model(nested if not (path / CONFIG_FILE).is_file() and nested.is_dir() else path)
    config, training = stored.config, stored.config["training"]
    _echo_facts(
        {
            "Panel": f"{len(stored.genes):,} genes",
            "Embedding": f"{config['settings']['model']['embedding_dim']} dimensions",
            "Written by": f"genejepa {config['version']}",
            "Genes": ", ".join(stored.genes[:6]) + (", ..." if len(stored.genes) > 6 else ""),
            **{name: value or "none" for name, value in config["registration"].items()},
            "Trained on": f"{training['n_cells']:,} cells",
            "Training": _duration(training["steps"], training["seconds"], interrupted=training["interrupted"]),
            "Arithmetic": f"{training['precision']}, CPU threads: {training['threads']}",
            "Effective rank": f"{training['effective_rank']:.1f}",
        }
    )
    for section, values in config["settings"].items():
        typer.echo(f"\nSettings: {section}")
        _echo_facts({f"  {name}": str(value) for name, value in values.items()})


def _describe_cells(path: Path) -> None:
    """Print what an h5ad file holds."""
    adata = _read_cells(path, backed=True)
    slots = {name: _counts_verdict(adata, layer) for name, layer in _slots(adata).items()}
    record = adata.uns.get(UNS_KEY, {})
    facts = {
        "Cells": f"{adata.n_obs:,}",
        "Genes": f"{adata.n_vars:,}, such as {', '.join(map(str, adata.var_names[:4]))}",
        **slots,
        "Usable as labels": "; ".join(_label_columns(adata)) or "no column of obs",
        "obsm": ", ".join(f"{key} ({adata.obsm[key].shape[1]})" for key in adata.obsm) or "none",
    }
    if "model_id" in record:
        facts["Embedded by"] = f"model {record['model_id']}, genejepa {record.get('version', '?')}"
    _echo_facts(facts)


def _slots(adata: AnnData) -> dict[str, str | None]:
    """Names of the slots that can hold counts, each with its layer."""
    layers: dict[str, str | None] = {f"layers[{name!r}]": str(name) for name in adata.layers}
    return {"X": None, **layers}


def _counts_verdict(adata: AnnData, layer: str | None) -> str:
    """Say whether a slot holds raw counts, else what is wrong with it."""
    from genejepa.data.counts import check_counts, read_counts, slot_name

    try:
        matrix = read_counts(adata, layer=layer)
        check_counts(matrix, slot=slot_name(layer), adata=adata)
    except DataError as error:
        return f"not raw counts: {error.problem}"
    return "raw counts"


def _label_columns(adata: AnnData) -> list[str]:
    """Columns of obs with at least two levels that a probe would keep."""
    found = []
    for name, column in adata.obs.items():
        if column.dtype.kind in "fc":
            continue
        sizes = column.value_counts()
        sizes = sizes[sizes > 0]
        if len(sizes) <= _MAX_LEVELS and int((sizes >= _MIN_CLASS_SIZE).sum()) > 1:
            found.append(f"{name} ({len(sizes)} levels of {sizes.min():,} to {sizes.max():,} cells)")
    return found


def _echo_facts(facts: Mapping[str, str]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}{value}")
