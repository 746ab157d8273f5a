"""Everything that is wrong, odd or worth knowing about cells, in one report before any training."""

from __future__ import annotations

import warnings
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from genejepa._constants import MIN_CELLS, MIN_GENES
from genejepa._html import table_html
from genejepa.data.counts import check_counts, count_slots, holds_counts, open_counts
from genejepa.data.genes import check_unique, gene_names, is_gene, names_slot
from genejepa.data.inputs import as_anndata
from genejepa.data.setup import Registration, batch_codes, registration_of
from genejepa.data.slots import obs_column
from genejepa.errors import GeneJEPAError
from genejepa.query import Matching, Trained, genes_of, require_genes, slot_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.data.counts import CountMatrix
    from genejepa.data.slots import CountSlot
    from genejepa.model import GeneJEPA

__all__ = ["CheckReport", "Finding", "check"]

T = TypeVar("T")

Level = Literal["error", "warning", "info"]

_LEVELS: tuple[Level, ...] = ("error", "warning", "info")
_LONGEST = 200


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes
    ----------
    level
        ``error``: genejepa refuses these cells. ``warning``: it takes them, but they may not be what they seem.
    where
        Slot or subject.
    message
        What was found and what was expected.
    fix
        What can be done about it; empty if nothing need be done.
    """

    level: Level
    where: str
    message: str
    fix: str = ""


@dataclass(frozen=True)
class CheckReport:
    """All findings, errors first; shown as text by ``print`` and as a table in a notebook."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self._number("error")

    def __str__(self) -> str:
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.level:<9}{finding.where}: {finding.message}")
            lines += [f"{'':<9}Fix: {finding.fix}"] if finding.fix else []
        return "\n".join([*lines, self._summary()])

    def _repr_html_(self) -> str:
        import pandas as pd

        columns = [field.name for field in fields(Finding)]
        return table_html(self._summary(), pd.DataFrame([astuple(f) for f in self.findings], columns=columns))

    def _number(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)

    def _summary(self) -> str:
        counts = [(self._number("error"), "error"), (self._number("warning"), "warning")]
        return ", ".join(f"{n or 'no'} {name}{'s' if n != 1 else ''}" for n, name in counts) + "."


class _Findings:
    """Collects findings; errors and warnings of a function become some."""

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def add(self, level: Level, where: str, message: str, fix: str = "") -> None:
        finding = Finding(level, where, message, fix)
        if finding not in self.found:  # two checks may stumble over one thing
            self.found.append(finding)

    def run(self, where: str, function: Callable[[], T]) -> T | None:
        """Result of a function; None if it raised an error of genejepa, which becomes a finding."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = function()
            except GeneJEPAError as error:
                self.add("error", where, error.problem, error.fix)
                result = None
        for warning in caught:
            if not issubclass(warning.category, UserWarning):  # nothing that users could do about it
                continue
            self.add("warning", where, str(warning.message))
        return result

    def report(self) -> CheckReport:
        return CheckReport(tuple(sorted(self.found, key=lambda finding: _LEVELS.index(finding.level))))


def check(
    data: AnnData | str | os.PathLike[str],
    *,
    layer: str | None = None,
    use_raw: bool = False,
    batch_key: str | None = None,
    labels_key: str | None = None,
    n_genes: int | None = 2000,
    gene_symbols: str | None = None,
    allow_fractional: bool = False,
    model: GeneJEPA | str | os.PathLike[str] | None = None,
) -> CheckReport:
    """Look at everything that a training, or the embedding by a model, would look at.

    Nothing is changed, and no check stops at the first error.

    Parameters
    ----------
    data
        Cells, or the path of an h5ad file or a zarr directory.
    layer, use_raw, batch_key, labels_key
        As in :meth:`genejepa.GeneJEPA.setup_anndata`. Without any of them, what is recorded in ``data`` is used.
    n_genes, gene_symbols, allow_fractional
        As in :class:`genejepa.GeneJEPA`. Not looked at if there is a model, which has its own.
    model
        A trained model, or its directory: its genes are looked for, and only their values must be counts.

    Returns
    -------
    CheckReport
        What was found: ``report.ok`` is False if there is an error.

    Raises
    ------
    FileNotFoundError
        If nothing is at a path.
    ConfigError
        If ``use_raw`` is given together with a layer.

    Examples
    --------
    >>> import genejepa
    >>> adata = genejepa.datasets.pbmc3k()[:100].copy()
    >>> genejepa.check(adata).ok
    True
    """
    findings = _Findings()
    registration = Registration(layer, batch_key, labels_key, use_raw=use_raw)
    adata = findings.run("data", lambda: as_anndata(data))
    if adata is None:
        return findings.report()
    if registration == Registration():
        registration = findings.run("uns", lambda: registration_of(adata)) or registration
    _check_cells(findings, adata, training=model is None)
    batch_key = registration.batch_key
    if model is None:
        _check_training(
            findings, adata, registration.slot, gene_symbols, n_genes=n_genes, allow_fractional=allow_fractional
        )
    else:
        trained = findings.run("model", lambda: _loaded(model)._trained())
        if trained is not None:
            _check_query(findings, adata, trained, Matching(layer, use_raw))
            if batch_key is None and trained.registration.batch_key in adata.obs:
                batch_key = trained.registration.batch_key
    _list_slots(findings, adata)
    if batch_key is not None:
        _check_batches(findings, adata, batch_key, training=model is None)
    if registration.labels_key is not None:
        _check_labels(findings, adata, registration.labels_key)
    return findings.report()


def _loaded(model: GeneJEPA | str | os.PathLike[str]) -> GeneJEPA:
    """A model, read from its directory if that is given."""
    from genejepa.model import GeneJEPA

    return model if isinstance(model, GeneJEPA) else GeneJEPA.load(Path(model))


def _check_cells(findings: _Findings, adata: AnnData, *, training: bool) -> None:
    """Look at the number of cells and their names."""
    findings.add("info", "size", f"{adata.n_obs:,} cells, {adata.n_vars:,} genes")
    if training and adata.n_obs < MIN_CELLS:
        fix = "train on more cells, then embed these with `genejepa.embed`."
        findings.add("error", "size", f"training needs at least {MIN_CELLS} cells, found {adata.n_obs}", fix)
    n_repeated = int(adata.obs_names.duplicated().sum())
    if n_repeated:
        message = f"{n_repeated} names of cells are repeated; cells are told apart by position"
        findings.add("warning", "obs_names", message, "adata.obs_names_make_unique()")


def _check_training(
    findings: _Findings,
    adata: AnnData,
    slot: CountSlot,
    gene_symbols: str | None,
    *,
    n_genes: int | None,
    allow_fractional: bool,
) -> None:
    """Look at counts and genes as a training does."""
    counts = findings.run(slot.name, lambda: open_counts(adata, slot))
    if counts is None:
        return
    where = names_slot(gene_symbols, slot.table)
    names = findings.run(where, lambda: gene_names(counts.var, gene_symbols=gene_symbols, table=slot.table))
    checked = findings.run(slot.name, lambda: check_counts(counts, adata=adata, allow_fractional=allow_fractional))
    genes = _genes(findings, counts)
    chosen = None  # known if all are
    if checked is not None:
        expressed = np.flatnonzero(_describe_counts(findings, checked, genes, training=True))
        chosen = expressed if n_genes is None or len(expressed) <= n_genes else None
    if names is not None:
        _check_unique(findings, np.where(genes, names, ""), chosen, where)


def _check_query(findings: _Findings, adata: AnnData, trained: Trained, matching: Matching) -> None:
    """Look at counts and genes as a model does that embeds them."""
    slot = findings.run("uns", lambda: slot_of(adata, trained.registration, matching))
    counts = None if slot is None else findings.run(slot.name, lambda: open_counts(adata, slot))
    if slot is None or counts is None:
        return
    where = names_slot(trained.symbols_in(counts.var), slot.table)
    _genes(findings, counts)
    report = findings.run(where, lambda: genes_of(counts.var, trained, matching, slot=slot))
    if report is None:
        return
    findings.add("info", where, str(report))
    findings.run(where, lambda: require_genes(adata, report, trained, matching, slot=slot))
    used = report.gene_of_column >= 0
    allow_fractional = trained.allow_fractional
    checked = findings.run(
        slot.name, lambda: check_counts(counts, adata=adata, used=used, allow_fractional=allow_fractional)
    )
    if checked is not None:
        _describe_counts(findings, checked, used, training=False)


def _genes(findings: _Findings, counts: CountMatrix) -> NDArray[np.bool_]:
    """Which columns are genes, (n_vars,)."""
    genes = is_gene(counts.var)
    if not genes.all():
        where = f"{counts.slot.table}['feature_types']"
        findings.add("warning", where, f"{int((~genes).sum())} columns are no genes; they are not used")
    return genes


def _check_unique(
    findings: _Findings,
    names: NDArray[np.object_],
    chosen: NDArray[np.int64] | None,
    where: str,
) -> None:
    """Look for repeated names, which the genes of a model must not have."""
    if chosen is not None:
        findings.run(where, lambda: check_unique(names, chosen, slot=where))
        return
    unique, sizes = np.unique(names[names != ""], return_counts=True)
    if (sizes > 1).any():
        repeated = ", ".join(f"{name!r} x{n}" for name, n in zip(unique, sizes, strict=True) if n > 1)
        message = (
            f"{int((sizes > 1).sum())} names are repeated; a training that chooses such a gene is refused: {repeated}"
        )
        findings.add("warning", where, _shortened(message), "adata.var_names_make_unique()")


def _describe_counts(
    findings: _Findings, counts: CountMatrix, used: NDArray[np.bool_], *, training: bool
) -> NDArray[np.bool_]:
    """Tell how many counts cells and genes have, in the columns that are used; return which have some, (n_vars,)."""
    totals: list[NDArray[Any]] = [np.empty(0)]
    expressed = np.zeros(len(used), dtype=bool)
    for _, block in counts.blocks():
        values = np.where(used[block.indices], block.data, 0)
        rows = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
        totals.append(np.bincount(rows, weights=values, minlength=block.shape[0]))
        expressed[block.indices[values != 0]] = True
    total = np.concatenate(totals)
    where, n_empty = counts.slot.name, int((total == 0).sum())
    if len(total):
        low, middle, high = (f"{value:,.0f}" for value in np.quantile(total, [0, 0.5, 1]))
        message = f"raw counts, {low} to {high} in a cell, median {middle}; {int(expressed.sum()):,} genes have some"
        findings.add("info", where, message)
    for found, least, what in ((len(total) - n_empty, MIN_CELLS, "cells"), (int(expressed.sum()), MIN_GENES, "genes")):
        if training and found < least:
            fix = "check the filters that were applied, and that the right slot is used."
            findings.add("error", where, f"training needs at least {least} {what} with counts, found {found}", fix)
    if n_empty:
        fix = "scanpy.pp.filter_cells(adata, min_counts=1)"
        findings.add("warning", where, f"{n_empty} cells have no counts; they all get the same vector", fix)
    return expressed


def _list_slots(findings: _Findings, adata: AnnData) -> None:
    """Tell which slots hold counts."""
    slots = findings.run("slots", lambda: count_slots(adata)) or []
    good = [slot.name for slot in slots if holds_counts(adata, slot)]
    message = f"raw counts are in {', '.join(good) or 'no slot'}, of {', '.join(slot.name for slot in slots) or 'none'}"
    findings.add("info", "slots", message)


def _check_batches(findings: _Findings, adata: AnnData, key: str, *, training: bool) -> None:
    """Look at the batches."""
    batches = findings.run(f"obs[{key!r}]", lambda: batch_codes(adata, key, training=training))
    if batches is None:
        return
    codes, names = batches
    sizes = np.bincount(codes, minlength=len(names))
    if len(names) == 1:
        message = f"all cells are of the batch {names[0]!r}: there is nothing to correct"
        findings.add("warning", f"obs[{key!r}]", message, "leave batch_key out.")
    elif len(names) > 1:
        message = f"{len(names)} batches of {sizes.min():,} to {sizes.max():,} cells"
        findings.add("info", f"obs[{key!r}]", message)


def _check_labels(findings: _Findings, adata: AnnData, key: str) -> None:
    """Look at the labels, which no training sees: what is wrong with them is at most a warning."""
    where = f"obs[{key!r}]"
    labels = findings.run(where, lambda: obs_column(adata, key))
    if labels is None:
        return
    sizes = labels.value_counts()
    sizes, n_missing = sizes[sizes > 0], int(labels.isna().sum())
    findings.add("info", where, f"{len(sizes)} classes, {n_missing:,} cells without a label")
    if len(sizes) < 2:
        fix = "pass a labels_key with two classes or more, or None; the training needs no labels."
        findings.add("warning", where, f"found {len(sizes)} classes: probes need at least 2", fix)
    single = [str(name) for name in sizes.index[sizes == 1]]
    if single:
        message = f"{len(single)} classes have one cell only, which probes leave out: {', '.join(map(repr, single))}"
        findings.add("warning", where, _shortened(message))


def _shortened(message: str) -> str:
    """At most 200 characters of a message that ends with a list."""
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."
