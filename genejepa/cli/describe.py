"""What a model directory or an h5ad file holds, in two columns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import typer

from genejepa._constants import UNS_KEY
from genejepa.bundle import is_bundle
from genejepa.cli.output import MODEL
from genejepa.cli.watch import read_watched
from genejepa.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from genejepa.data.slots import CountSlot
    from genejepa.model import GeneJEPA

_MIN_CLASS_SIZE: Final = 10
_MAX_LEVELS: Final = 200


def describe_model(path: Path) -> None:
    """Print what a model directory holds, or the one in the directory that `genejepa fit` wrote."""
    from genejepa.model import GeneJEPA

    nested = path / MODEL
    model = GeneJEPA.load(nested if not is_bundle(path) and nested.is_dir() else path)
    echo_facts(
        {
            "Panel": f"{len(model.genes):,} genes",
            "Embedding": f"{model.embedding_dim} dimensions",
            "Model": model.model_id,
            "Genes": ", ".join(model.genes[:6]) + (", ..." if len(model.genes) > 6 else ""),
            **{name: str(value or "none") for name, value in asdict(model.registration).items()},
            **training_facts(model),
        }
    )
    for section, values in model.config.to_dict().items():
        typer.echo(f"\nSettings: {section}")
        echo_facts({f"  {name}": str(value) for name, value in values.items()})


def training_facts(model: GeneJEPA) -> dict[str, str]:
    """How a model was trained."""
    record = model.record
    assert record is not None  # it was trained or loaded
    steps = f"{record.steps:,} step{'s' if record.steps != 1 else ''} in {record.seconds:.0f} s"
    return {
        "Trained on": f"{record.n_cells:,} cells",
        "Training": steps + (" (interrupted)" if record.interrupted else ""),
        "Arithmetic": f"{record.precision}, CPU threads: {record.threads}, seed {model.config.train.seed}",
        "Effective rank": f"{record.effective_rank:.1f} of {model.embedding_dim}",
    }


def describe_cells(path: Path, *, read_timeout: float) -> None:
    """Print what an h5ad file holds."""
    from genejepa.data.counts import count_slots

    adata = read_watched(path, seconds=read_timeout, backed=True)
    slots = {slot.name: _counts_verdict(adata, slot) for slot in count_slots(adata)}
    record = adata.uns.get(UNS_KEY)
    facts = {
        "Cells": f"{adata.n_obs:,}",
        "Genes": f"{adata.n_vars:,}, such as {', '.join(map(str, adata.var_names[:4]))}",
        **slots,
        "Usable as labels": "; ".join(_label_columns(adata)) or "no column of obs",
        "obsm": ", ".join(f"{key} ({'x'.join(map(str, value.shape[1:]))})" for key, value in adata.obsm.items())
        or "none",
    }
    if isinstance(record, Mapping) and "model_id" in record:
        facts["Embedded by"] = f"model {record['model_id']}, genejepa {record.get('version', '?')}"
    echo_facts(facts)


def _counts_verdict(adata: AnnData, slot: CountSlot) -> str:
    """Say whether a slot holds raw counts, else what is wrong with it."""
    from genejepa.data.counts import check_counts, open_counts

    with warnings.catch_warnings(record=True, action="always") as doubts:
        try:
            check_counts(open_counts(adata, slot), adata=adata)
        except DataError as error:
            return f"not raw counts: {error.problem}"
    return "; ".join(["raw counts", *(str(doubt.message) for doubt in doubts)])


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


def echo_facts(facts: Mapping[str, str]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        typer.echo(printable(f"{name:<{width}}{value}"))


def printable(text: str) -> str:
    """Text in which what would change the terminal, as names of a file can, is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
