"""Identifiers, symbols and orthologs of human and mouse genes, from tables that come with the package."""

from __future__ import annotations

import csv
import functools
import gzip
from collections import Counter
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Species = Literal["human", "mouse"]
_SPECIES: tuple[Species, Species] = ("human", "mouse")

_SPECIES_SHARE = 0.1
"""Share of names that must be known genes of a species; below, agreement is chance."""


@functools.cache
def symbols_by_id(species: Species) -> Mapping[str, str]:
    """Symbol of every Ensembl gene that has one: GENCODE v48 for human, vM37 for mouse.

    Returns
    -------
    Symbols by Ensembl identifier without version. A few hundred symbols are those of several genes.
    """
    return MappingProxyType(dict(_rows(f"{species}_genes")))


@functools.cache
def ortholog_pairs(species: Species) -> Mapping[str, str]:
    """Human and mouse one-to-one orthologs (Ensembl BioMart), by the names of the genes of one species.

    Returns
    -------
    The human identifier of the pair, by the Ensembl identifier and by the symbol of the gene of ``species``: the two
    genes of a pair have the same value, one in each of the two mappings. A symbol of several genes is left out.
    """
    symbols = symbols_by_id(species)
    n_genes = Counter(symbols.values())
    pairs = {}
    for human_id, mouse_id, _ in _rows("orthologs"):
        gene_id = human_id if species == "human" else mouse_id
        pairs[gene_id] = human_id
        symbol = symbols.get(gene_id, "")
        if n_genes[symbol] == 1:
            pairs[symbol] = human_id
    return MappingProxyType(pairs)


def species_of(names: Iterable[str]) -> Species | None:
    """Species that knows most of the names; None if neither knows a tenth of them, or both equally many.

    Parameters
    ----------
    names
        Symbols and Ensembl identifiers without version. Those with a one-to-one ortholog count.
    """
    distinct = set(names)
    human, mouse = (len(ortholog_pairs(species).keys() & distinct) for species in _SPECIES)
    if human == mouse or max(human, mouse) < _SPECIES_SHARE * len(distinct):
        return None
    return "human" if human > mouse else "mouse"


def _rows(table: str) -> Iterator[list[str]]:
    """Rows of a table without its header."""
    content = (resources.files("genejepa") / "data" / "tables" / f"{table}.csv.gz").read_bytes()
    rows = csv.reader(gzip.decompress(content).decode().splitlines())
    next(rows)
    return rows
