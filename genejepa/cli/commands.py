"""The command line: ``genejepa check``, ``fit``, ``embed``, ``probe`` and ``info``.

Everything heavy is imported inside the functions, so that ``genejepa --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from genejepa._constants import OBSM_KEY
from genejepa._version import __version__
from genejepa.bundle import is_bundle, remove_bundle
from genejepa.cli.describe import describe_cells, describe_model, echo_facts, training_facts
from genejepa.cli.errors import EXIT_ERROR, EXIT_INTERRUPTED, plain_errors
from genejepa.cli.output import (
    CELLS,
    CHECKPOINT,
    MODEL,
    PROBE,
    REPORT,
    prepare_directory,
    refuse_existing,
    write_cells,
    write_tables,
)
from genejepa.cli.probes import (
    PROBE_TITLES,
    Probe,
    fit_probes,
    overall,
    print_scores,
    probe_name,
    run_probe,
    score_text,
)
from genejepa.config import GeneJEPAConfig, TrainConfig
from genejepa.data.inputs import read_cells
from genejepa.errors import ConfigError, DeviceError
from genejepa.files import check_writable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from genejepa.model import GeneJEPA

__all__ = ["app"]

_DEFAULTS: Final = TrainConfig()

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


class GeneMapping(StrEnum):
    """How gene names may differ from those of the model."""

    exact = "exact"
    names = "names"
    orthologs = "orthologs"


CellsFile = Annotated[Path, typer.Argument(metavar="CELLS.h5ad", help="Cells with raw counts.")]
Layer = Annotated[str | None, typer.Option(help="Layer with the raw counts.", show_default="X")]
UseRaw = Annotated[bool, typer.Option("--use-raw", help="Take counts and genes from raw.")]
BatchKey = Annotated[
    str | None, typer.Option(help="Column of obs with the batch to correct for, such as the technology.")
]
GeneSymbols = Annotated[str | None, typer.Option(help="Column of var with gene names.", show_default="var_names")]
LabelsKey = Annotated[str | None, typer.Option(help="Column of obs with labels: for probes only.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote.")]


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


@app.command(epilog="Example: genejepa check cells.h5ad --batch-key donor --model out/model")
@plain_errors
def check(
    cells: CellsFile,
    layer: Layer = None,
    use_raw: UseRaw = False,
    batch_key: BatchKey = None,
    labels_key: LabelsKey = None,
    gene_symbols: GeneSymbols = None,
    model: Annotated[Path | None, typer.Option(help="Model that shall embed these cells.")] = None,
) -> None:
    """Look for everything that would go wrong, before any training.

    Exit code 0 if the cells can be used, 2 if not.
    """
    import genejepa

    report = genejepa.check(
        read_cells(cells, backed=True),
        layer=layer,
        use_raw=use_raw,
        batch_key=batch_key,
        labels_key=labels_key,
        gene_symbols=gene_symbols,
        model=model,
    )
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(EXIT_ERROR)


@app.command(epilog="Example: genejepa fit cells.h5ad -o out --labels-key cell_type --set information=8")
@plain_errors
def fit(
    cells: CellsFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")],
    layer: Layer = None,
    use_raw: UseRaw = False,
    batch_key: BatchKey = None,
    labels_key: LabelsKey = None,
    n_genes: Annotated[int, typer.Option(min=0, help="Highly variable genes to use; 0 for all expressed ones.")] = 2000,
    mask_var: Annotated[str | None, typer.Option(help="Column of var that marks the genes instead.")] = None,
    gene_symbols: GeneSymbols = None,
    allow_fractional: Annotated[
        bool, typer.Option("--allow-fractional", help="Take values that are no counts, such as FPKM.")
    ] = False,
    max_epochs: Annotated[
        int | None, typer.Option(help="Passes over the cells.", show_default="about 400 steps")
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="Cells per step; auto: fewer if memory runs out.", show_default=str(_DEFAULTS.batch_size)),
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a training that was stopped; start if there is none.")
    ] = False,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.0, help="Minutes between checkpoints.")] = 1.0,
    overwrite: Overwrite = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting, such as information=8; can be repeated."),
    ] = None,
) -> None:
    """Train a model on raw counts and embed the cells.

    Writes into the directory: model/ (for `genejepa embed`), cells.h5ad (the cells with the embedding in
    obsm), report.html, and with --labels-key probe.csv. While it trains, checkpoint/ holds what --resume needs
    after Ctrl-C, a time limit or a crash.
    """
    chosen = _parse_settings(settings or [])
    adapt = batch_size == "auto"
    given = {"max_epochs": max_epochs, "batch_size": None if adapt else _whole(batch_size), "seed": seed}
    chosen |= {name: value for name, value in given.items() if value is not None}
    GeneJEPAConfig().updated(**chosen)  # mistakes shall show before any file is read
    _check_accelerator(accelerator)
    if resume and is_bundle(out / MODEL) and not is_bundle(out / CHECKPOINT):
        typer.echo(f"Nothing to resume: {out} is complete.")
        return
    prepare_directory(out, overwrite=overwrite or resume)
    check_writable(out, n_bytes=cells.stat().st_size if cells.is_file() else 0)
    adata = read_cells(cells)
    if not resume:
        remove_bundle(out / MODEL)  # until there is a new one, --resume must not take the old one for the result

    import genejepa

    model = genejepa.fit(
        adata,
        layer=layer,
        use_raw=use_raw,
        batch_key=batch_key,
        labels_key=labels_key,
        n_genes=n_genes or None,
        mask_var=mask_var,
        gene_symbols=gene_symbols,
        allow_fractional=allow_fractional,
        progress_bar=sys.stdout.isatty(),
        train_options={
            "accelerator": accelerator.value,
            "devices": int(devices) if devices.isdecimal() else devices,
            "precision": precision.value,
            "threads": threads,
            "early_stopping": early_stopping,
            "checkpoint_dir": out / CHECKPOINT,
            "checkpoint_minutes": checkpoint_minutes,
            "resume": resume,
            **({"batch_size": "auto"} if adapt else {}),
        },
        **chosen,  # type: ignore[arg-type]  # the configuration has checked the values
    )
    assert model.record is not None  # it was trained just now
    if model.record.interrupted:
        model.save(out / MODEL, overwrite=True)
        typer.echo(
            f"Stopped; {out / MODEL} holds the model as it is. To go on, repeat the command with --resume.", err=True
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    _write_outputs(out, adata, model, source=cells.name)
    remove_bundle(out / CHECKPOINT)


@app.command(epilog="Example: genejepa embed others.h5ad --model out/model -o embedded.h5ad")
@plain_errors
def embed(
    cells: CellsFile,
    model: Annotated[Path, typer.Option(help="Directory of a saved model, such as out/model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: the cells with the embedding.")],
    layer: Layer = None,
    use_raw: UseRaw = False,
    gene_mapping: Annotated[
        GeneMapping,
        typer.Option(help="exact names; names: also identifiers and damaged names; orthologs: also human and mouse."),
    ] = GeneMapping.names,
    sum_duplicates: Annotated[bool, typer.Option("--sum-duplicates", help="Add up the columns of one gene.")] = False,
    min_overlap: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Smallest share of the training counts that the genes found have.")
    ] = 0.5,
    key_added: Annotated[str, typer.Option(help="Name of the embedding in obsm.")] = OBSM_KEY,
    overwrite: Overwrite = False,
) -> None:
    """Embed other cells with a trained model.

    Genes are matched by name. Their order does not matter, further genes are ignored, and missing genes count
    as not measured, not as zero.
    """
    refuse_existing(out, overwrite=overwrite)
    adata = read_cells(cells)

    from genejepa.model import GeneJEPA

    trained = GeneJEPA.load(model)
    duplicates: Literal["error", "sum"] = "sum" if sum_duplicates else "error"
    trained.embed(
        adata,
        layer=layer,
        use_raw=use_raw,
        key_added=key_added,
        gene_mapping=gene_mapping.value,
        duplicates=duplicates,
        min_overlap=min_overlap,
    )
    write_cells(adata, out)
    report = trained.gene_report(adata, gene_mapping=gene_mapping.value, duplicates=duplicates)
    echo_facts(
        {
            "Cells": f"{adata.n_obs:,}",
            "Genes": f"{report.n_matched:,} of the model's {len(trained.genes):,} found by name",
            "Embedding": f"obsm[{key_added!r}], {trained.embedding_dim} dimensions",
            "Written": str(out),
        }
    )


@app.command(epilog="Example: genejepa probe embedded.h5ad --labels-key cell_type --kind all --output table.csv")
@plain_errors
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
        refuse_existing(output, overwrite=overwrite)
    adata = read_cells(cells, backed=True)
    kinds = [name for name in Probe if name is not Probe.every] if kind is Probe.every else [kind]
    tables = [
        run_probe(name, adata, labels_key=labels_key, use_rep=use_rep, groups_key=groups_key, seed=seed)
        for name in kinds
    ]
    for table in tables:
        print_scores(table)
    if output is not None:
        write_tables(tables, output)
        typer.echo(f"Written: {output}")


@app.command(epilog="Example: genejepa info out/model")
@plain_errors
def info(
    path: Annotated[Path, typer.Argument(metavar="MODEL_OR_H5AD", help="Model directory or h5ad file.")],
) -> None:
    """Tell what a model directory or an h5ad file holds.

    For an h5ad file this includes which slots hold raw counts, and which columns can serve as labels.
    """
    if path.is_dir():
        describe_model(path)
    else:
        describe_cells(path)


# What commands share ---------------------------------------------------------------------------------


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
        raise DeviceError(
            f"`--accelerator {accelerator}` was asked for, but torch finds none here.",
            fix="leave the option out, or install a build of torch for your device.",
        )


def _whole(text: str | None) -> int | None:
    """Number of a --batch-size."""
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise ConfigError(f"`--batch-size` is {text!r}.", fix="give a whole number, or auto.")


def _write_outputs(out: Path, adata: AnnData, model: GeneJEPA, *, source: str) -> None:
    """Write everything that `genejepa fit` leaves, the dearest first, and sum it up."""
    from genejepa.report import build_report

    registration = model.registration
    model.save(out / MODEL, overwrite=True)
    write_cells(adata, out / CELLS)
    tables, notes = fit_probes(adata, registration.labels_key, seed=model.config.train.seed)
    (out / PROBE).unlink(missing_ok=True)  # scores of an earlier call are not those of this model
    if tables:
        write_tables(tables, out / PROBE)
    genes = f"{len(model.genes):,} of {adata.n_vars:,}"
    facts = {"Cells": f"{adata.n_obs:,}", "Genes": genes, **training_facts(model)}
    build_report(
        out / REPORT,
        adata=adata,
        facts={"Data": source, **facts, "Model": model.model_id},
        history=model.history,
        labels_key=registration.labels_key,
        probe_tables=tables,
        layer=registration.layer,
        use_raw=registration.use_raw,
        notes=notes,
        seed=model.config.train.seed,
    )
    for table in tables:
        facts[f"Macro-F1, {PROBE_TITLES[probe_name(table)]}"] = score_text(overall(table, "macro_f1"))
    written = [MODEL, CELLS, *([PROBE] if tables else []), REPORT]
    echo_facts({**facts, "Written": ", ".join(str(out / name) for name in written)})
