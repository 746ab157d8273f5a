"""The command line: ``genejepa check``, ``fit``, ``embed``, ``energy``, ``predict``, ``plan``, ``probe`` and ``info``.

Everything heavy is imported inside the functions, so that ``genejepa --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from genejepa._constants import OBSM_KEY
from genejepa._version import __version__
from genejepa.bundle import is_bundle, remove_bundle
from genejepa.cli.describe import describe_cells, describe_model, echo_facts, training_facts
from genejepa.cli.errors import EXIT_ERROR, EXIT_INTERRUPTED, plain_errors
from genejepa.cli.options import (
    READ_TIMEOUT,
    BatchKey,
    CellsFile,
    GeneSymbols,
    LabelsKey,
    Layer,
    Overwrite,
    ReadTimeout,
    UseRaw,
)
from genejepa.cli.output import (
    CELLS,
    CHECKPOINT,
    MODEL,
    PROBE,
    REPORT,
    check_directory,
    check_output,
    compression_of,
    is_complete,
    remove_outputs,
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
from genejepa.cli.watch import read_watched
from genejepa.cli.world import plan, predict
from genejepa.config import GeneJEPAConfig, TrainConfig
from genejepa.errors import ConfigError
from genejepa.files import check_writable, output_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    read_timeout: ReadTimeout = READ_TIMEOUT,
) -> None:
    """Look for everything that would go wrong, before any training.

    Exit code 0 if the cells can be used, 2 if not.
    """
    import genejepa

    report = genejepa.check(
        read_watched(cells, seconds=read_timeout, backed=True),
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
    read_timeout: ReadTimeout = READ_TIMEOUT,
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
    cells = cells.expanduser()
    adapt = batch_size == "auto"
    given = {"max_epochs": max_epochs, "batch_size": None if adapt else _whole(batch_size), "seed": seed}
    chosen = _parse_settings(settings or []) | {name: value for name, value in given.items() if value is not None}
    options: dict[str, Any] = {
        "accelerator": accelerator.value,
        "devices": _device_list(devices),
        "precision": precision.value,
        "threads": threads,
        "early_stopping": early_stopping,
        "checkpoint_minutes": checkpoint_minutes,
    }
    GeneJEPAConfig().updated(**chosen)  # mistakes shall show before any file is read
    check_directory(out, cells=cells, overwrite=overwrite, resume=resume)
    if not cells.exists():
        raise FileNotFoundError(f"{cells} does not exist.")
    _check_run(options)
    adata = read_watched(cells, seconds=read_timeout)
    model = _new_model(
        adata,
        registration={"layer": layer, "use_raw": use_raw, "batch_key": batch_key, "labels_key": labels_key},
        n_genes=n_genes or None,
        mask_var=mask_var,
        gene_symbols=gene_symbols,
        allow_fractional=allow_fractional,
        **chosen,
    )
    if resume and is_complete(out, model, options, any_batch_size=adapt):
        typer.echo(f"Nothing to resume: {out} is complete.")
        return
    check_writable(out, n_bytes=sys.getsizeof(adata))
    compression = compression_of(cells)
    if not resume:
        remove_outputs(out, cells=cells)
    _train(model, out, resume=resume, batch_size="auto" if adapt else None, **options)
    _write_outputs(out, adata, model, source=cells.name, compression=compression)
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
    read_timeout: ReadTimeout = READ_TIMEOUT,
) -> None:
    """Embed other cells with a trained model.

    Genes are matched by name. Their order does not matter, further genes are ignored, and missing genes count
    as not measured, not as zero.
    """
    cells = cells.expanduser()
    check_output(out, overwrite=overwrite)
    adata = read_watched(cells, seconds=read_timeout)

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
    write_cells(adata, out, compression=compression_of(cells))
    report = trained.gene_report(
        adata, layer=layer, use_raw=use_raw, gene_mapping=gene_mapping.value, duplicates=duplicates
    )
    echo_facts(
        {
            "Cells": f"{adata.n_obs:,}",
            "Genes": f"{report.n_matched:,} of the model's {len(trained.genes):,} found by name",
            "Embedding": f"obsm[{key_added!r}], {trained.embedding_dim} dimensions",
            "Written": str(out),
        }
    )


@app.command(
    epilog="Example: genejepa energy others.h5ad --model out/model --reference out/cells.h5ad -o energies.h5ad"
)
@plain_errors
def energy(
    cells: CellsFile,
    model: Annotated[Path, typer.Option(help="Directory of a saved model, such as out/model.")],
    reference: Annotated[Path, typer.Option(help="Cells known to be real, such as those of the training.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: the cells with their energies.")],
    layer: Layer = None,
    use_raw: UseRaw = False,
    key_added: Annotated[str, typer.Option(help="Name of the column in obs.")] = "energy",
    overwrite: Overwrite = False,
    read_timeout: ReadTimeout = READ_TIMEOUT,
) -> None:
    """Tell how badly the halves of each cell predict it: high for doublets and unknown kinds of cell.

    Energies have a mean of 1 over the reference.
    """
    cells = cells.expanduser()
    check_output(out, overwrite=overwrite)
    adata = read_watched(cells, seconds=read_timeout)

    import numpy as np

    from genejepa.data.setup import require_writable
    from genejepa.model import GeneJEPA
    from genejepa.query import require_key

    require_writable(adata)
    require_key(key_added)
    known = read_watched(reference, seconds=read_timeout)
    energies = GeneJEPA.load(model).energy(adata, reference=known, layer=layer, use_raw=use_raw)
    adata.obs[key_added] = energies
    write_cells(adata, out, compression=compression_of(cells))
    spread = ", ".join(f"{level:g} %: {np.percentile(energies, level):.2f}" for level in (5, 50, 95, 99))
    echo_facts({"Cells": f"{adata.n_obs:,}", "Energies": f"{spread} (reference: mean 1)", "Written": str(out)})


app.command(
    epilog="Example: genejepa predict cells.h5ad --model out/model --action-key condition --control ctrl "
    "--group-key cell_type --action stim -o predicted.h5ad"
)(predict)
app.command(
    epilog="Example: genejepa plan cells.h5ad --world out/world --start cell_type=HSC --goal cell_type=monocyte "
    "-o plan.csv"
)(plan)


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
    read_timeout: ReadTimeout = READ_TIMEOUT,
) -> None:
    """Score how well simple classifiers read labels off an embedding.

    linear: logistic regression. knn: vote of the 15 nearest cells. few-shot: logistic regression on 5
    labelled cells per class. Scores are on cells that the classifier has not seen, with 95 % intervals.
    """
    if output is not None:
        check_output(output, overwrite=overwrite)
    adata = read_watched(cells, seconds=read_timeout, backed=True)
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
    read_timeout: ReadTimeout = READ_TIMEOUT,
) -> None:
    """Tell what a model directory or an h5ad file holds.

    For an h5ad file this includes which slots hold raw counts, and which columns can serve as labels.
    """
    if path.is_dir():
        describe_model(path)
    else:
        describe_cells(path, read_timeout=read_timeout)


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


def _whole(text: str | None) -> int | None:
    """Number of a --batch-size."""
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise ConfigError(f"`--batch-size` is {text!r}.", fix="give a whole number, or auto.")


def _device_list(text: str) -> int | list[int] | str:
    """Devices of a --devices: a number of them, their numbers, or all that there are."""
    if text == "auto":
        return text
    try:
        return [int(part) for part in text.rstrip(",").split(",")] if "," in text else int(text)
    except ValueError:
        raise ConfigError(
            f"`--devices` is {text!r}.", fix="give a number such as 2, a list such as 0,1, or auto."
        ) from None


def _check_run(options: Mapping[str, Any]) -> None:
    """Refuse what this machine does not have, before any file is read."""
    from genejepa.train.devices import resolve_accelerator
    from genejepa.train.runner import RunOptions

    RunOptions(**options)
    resolve_accelerator(options["accelerator"])


def _new_model(adata: AnnData, *, registration: Mapping[str, Any], **options: Any) -> GeneJEPA:
    """Model of the cells, before its training: everything that can be wrong with them is found here."""
    from genejepa.data.setup import Registration, require_writable
    from genejepa.model import GeneJEPA

    require_writable(adata)
    given = Registration(**registration)
    return GeneJEPA(adata, registration=None if given == Registration() else given, **options)


def _train(model: GeneJEPA, out: Path, *, resume: bool, **options: Any) -> None:
    """Train, and end the process with the exit code of Ctrl-C if that has ended the training."""
    try:
        model.train(checkpoint_dir=out / CHECKPOINT, resume=resume, progress_bar=sys.stdout.isatty(), **options)
    except ConfigError as error:
        if not is_bundle(out / CHECKPOINT):
            raise
        fix = "repeat the call that was stopped, or leave --resume out and pass --overwrite to begin anew."
        raise ConfigError(error.problem, fix=fix) from error
    assert model.record is not None  # it was trained just now
    if model.record.interrupted:
        model.save(out / MODEL, overwrite=True)
        typer.echo(
            f"Stopped; {out / MODEL} holds the model as it is. To go on, repeat the command with --resume.", err=True
        )
        raise typer.Exit(EXIT_INTERRUPTED)


def _write_outputs(out: Path, adata: AnnData, model: GeneJEPA, *, source: str, compression: str | None) -> None:
    """Write everything that `genejepa fit` leaves, the dearest first, and sum it up."""
    from genejepa.report import build_report

    registration = model.registration
    model.save(out / MODEL, overwrite=True)
    model.write_embedding(adata)
    write_cells(adata, out / CELLS, compression=compression)
    tables, notes = fit_probes(adata, registration.labels_key, seed=model.config.train.seed)
    output_file(out / PROBE).unlink(missing_ok=True)  # scores of an earlier call are not those of this model
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
