"""Finding the genes of a model in another data set: by name, never by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, get_args

import numpy as np

from genejepa.data.gene_report import GeneReport, quote, quote_first, require_overlap
from genejepa.data.gene_search import GeneMapping, GeneSearch, clean_name, stable_id
from genejepa.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["GeneMapping", "GeneReport", "match_genes", "require_overlap"]

Duplicates = Literal["error", "sum"]

_N_EXAMPLES: Final = 3


def match_genes(
    panel: Sequence[str] | NDArray[np.object_],
    query: Sequence[str] | NDArray[np.object_],
    *,
    frequency: NDArray[np.floating] | None = None,
    mapping: GeneMapping = "names",
    duplicates: Duplicates = "error",
    var: pd.DataFrame | None = None,
    slot: str = "var_names",
) -> GeneReport:
    """Find the genes of a model in a data set by name.

    Equal names always belong together. A gene is found in another way only if there is one answer: no other panel gene
    and no other name of the data may fit as well. What is found does not depend on the order of the names. That few
    genes are found, or none, is no error here, see :func:`require_overlap`.

    Parameters
    ----------
    panel
        Distinct gene names of the model, shape ``(n_panel,)``.
    query
        Gene names of the data, shape ``(n_vars,)``; an empty one is not a gene.
    frequency
        Share of each panel gene in the training counts, shape ``(n_panel,)``; None: all are equal.
    mapping
        ``exact``: names that are equal, apart from white space at the ends and the form of Unicode characters.
        ``names``: then Ensembl identifiers in another version, identifiers and symbols (GENCODE), and names that R or
        a spreadsheet changed. ``orthologs``: then one-to-one orthologs of human and mouse, and names in another case;
        between the two species, genes with such an ortholog are not compared by case.
    duplicates
        ``error``, or ``sum`` to give all columns of a gene its position.
    var
        Table of the genes of the data, to say which of its columns would find more genes.
    slot
        Where ``query`` comes from, for messages: ``var_names``, ``var['symbol']``, or one of ``raw.var``.

    Returns
    -------
    The panel gene of every column, and how each panel gene was found.

    Raises
    ------
    ConfigError
        If ``mapping`` or ``duplicates`` is unknown.
    DataError
        If several columns are the same panel gene and ``duplicates`` is ``error``.
    """
    mappings = get_args(GeneMapping)
    _check_choice("gene_mapping", mapping, mappings)
    _check_choice("duplicates", duplicates, get_args(Duplicates))
    search = GeneSearch(panel, query)
    n_used = mappings.index(mapping) + 1
    for used in mappings[:n_used]:
        search.apply(used)
    gene_of_column = np.array(search.gene_of_column, dtype=np.int64)
    if duplicates == "error":
        _refuse_duplicates(gene_of_column, [*panel], [*query], slot=slot)
    how, found = np.array(search.how, dtype=object), search.found
    would_match = _columns_that_find_more(search, var, slot=slot) | _mappings_that_find_more(search, mappings[n_used:])
    return GeneReport(
        gene_of_column=gene_of_column,
        panel=[str(name) for name in panel],
        names=[str(name) for name in query],
        how=how,
        mass=_mass(found, frequency),
        would_match=would_match,
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        fix = " or ".join(f"{name}={choice!r}" for choice in choices)
        raise ConfigError(f"`{name}` is {value!r}, expected one of {choices}", fix=f"pass {fix}.")


def _refuse_duplicates(gene_of_column: NDArray[np.int64], panel: list[str], query: list[str], *, slot: str) -> None:
    """Refuse several columns of one panel gene."""
    counts = np.bincount(gene_of_column[gene_of_column >= 0], minlength=len(panel))
    repeated = np.flatnonzero(counts > 1).tolist()
    if not repeated:
        return
    listed = ", ".join(f"{quote(panel[gene])} x{counts[gene]}" for gene in repeated[:_N_EXAMPLES])
    columns = np.flatnonzero(gene_of_column == repeated[0]).tolist()
    names = [query[column] for column in columns]
    fix = "pass duplicates='sum' to add them up"
    if len(set(names)) == 1 and not slot.startswith("raw."):
        fix += f", or keep the first of each: adata = adata[:, ~adata.{slot}.duplicated()].copy()"
    raise DataError(
        f"`{slot}` has {len(repeated)} genes of the model more than once: {listed}; the first is "
        f"{quote_first(names)} at positions {columns[:_N_EXAMPLES]}; expected each once",
        fix=fix,
    )


def _mass(found: NDArray[np.bool_], frequency: NDArray[np.floating] | None) -> float:
    """Share of the training counts that the genes found had."""
    weight = np.ones(len(found)) if frequency is None else np.asarray(frequency, dtype=np.float64)
    return float(weight[found].sum() / weight.sum()) if weight.any() else 0.0


def _mappings_that_find_more(search: GeneSearch, unused: Sequence[GeneMapping]) -> dict[str, int]:
    """How many more genes each mapping would find, if more than the one before it; `search` is used up."""
    n_matched = n_before = int(search.found.sum())
    more: dict[str, int] = {}
    for mapping in unused:
        search.apply(mapping)
        n_found = int(search.found.sum())
        if n_found > n_before:
            more[mapping] = n_found - n_matched
        n_before = n_found
    return more


def _columns_that_find_more(search: GeneSearch, var: pd.DataFrame | None, *, slot: str) -> dict[str, int]:
    """How many more genes each column of ``var`` with text would find, by equal names or identifiers."""
    table = "raw.var" if slot.startswith("raw.") else "var"
    more: dict[str, int] = {}
    n_matched = int(search.found.sum())
    if var is None or n_matched == len(search.panel):
        return more
    for column, values in var.items():
        if values.dtype.kind == "O":
            names = {clean_name(str(value)) for value in values}
            ids = {stable_id(name) for name in names} - {""}
            n_found = sum(name in names or stable_id(name) in ids for name in search.panel)
            if n_found > n_matched:
                more[f"{table}[{column!r}]"] = n_found - n_matched
    return more
