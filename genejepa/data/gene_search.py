"""The ways to find the genes of a model among the names of a data set, from equal names to orthologs."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from genejepa.data.gene_tables import ortholog_pairs, species_of, symbols_by_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

GeneMapping = Literal["exact", "names", "orthologs"]

NOT_FOUND: Final = ("missing", "ambiguous")

_ENSEMBL: Final = re.compile(r"(ENS[A-Z]*[EGPTR]\d{6,})(?:\.\d+)?")
_R_REPLACES: Final = re.compile(r"[\W_]")

_DATE_GENE: Final = re.compile(r"([a-z]+)(\d{1,2})")
_MONTH_OF_GENE: Final = {"march": 3, "marchf": 3, "sep": 9, "sept": 9, "septin": 9, "dec": 12, "delec": 12}
_DATES: Final = (
    re.compile(r"(?P<day>\d{1,2})-(?P<month>[a-z]{3})"),
    re.compile(r"(?P<month>[a-z]{3})-(?P<day>\d{1,2})"),
    re.compile(r"\d{4}-(?P<month>\d\d)-(?P<day>\d\d)(?: 00:00:00)?"),
)
_MONTHS: Final = {"mar": 3, "03": 3, "sep": 9, "09": 9, "dec": 12, "12": 12}
_OF_TWO_GENES: Final = ("3/1", "3/2")
"""Dates that a spreadsheet makes of two genes each: MARCH1 and MARC1, MARCH2 and MARC2."""


class GeneSearch:
    """The genes of a model among the names of a data set, found step by step.

    Parameters
    ----------
    panel
        Names of the genes of the model.
    query
        Names of the data; an empty one is not a gene.

    Attributes
    ----------
    gene_of_column
        Panel position of each name of the data, or -1.
    how
        The step that found each panel gene, or ``missing`` or ``ambiguous``.
    """

    def __init__(self, panel: Sequence[str] | NDArray[np.object_], query: Sequence[str] | NDArray[np.object_]) -> None:
        self.panel = [clean_name(name) for name in panel]
        self.query = [clean_name(name) for name in query]
        self.gene_of_column = [-1] * len(self.query)
        self.how = ["missing"] * len(self.panel)

    @property
    def found(self) -> NDArray[np.bool_]:
        """Whether each panel gene was found, (n_panel,)."""
        return np.array([how not in NOT_FOUND for how in self.how], dtype=bool)

    def apply(self, mapping: GeneMapping) -> None:
        """Look for the genes that are still missing in the ways that a mapping adds to those before it."""
        if "missing" not in self.how:
            return
        if mapping == "exact":
            self._find("exact", self.panel, self.query)
        elif mapping == "names":
            self._apply_names()
        else:
            self._apply_orthologs()

    def _apply_names(self) -> None:
        panel_ids = [stable_id(name) for name in self.panel]
        query_ids = [stable_id(name) for name in self.query]
        self._find("version", panel_ids, query_ids)
        self._find("ensembl", [_symbol(gene_id) for gene_id in panel_ids], _without(self.query, query_ids))
        self._find("ensembl", _without(self.panel, panel_ids), [_symbol(gene_id) for gene_id in query_ids])
        self._find("r_name", [_r_name(name) for name in self.panel], [_r_name(name) for name in self.query])
        self._find("date", [_date_of_gene(name) for name in self.panel], [_date(name) for name in self.query])

    def _apply_orthologs(self) -> None:
        # The table comes first, as equal letters can mislead: human GSTM3 is the ortholog of mouse Gstm5.
        panel = [stable_id(name) or name for name in self.panel]
        query = [stable_id(name) or name for name in self.query]
        panel_species, query_species = species_of(panel), species_of(query)
        if panel_species and query_species and panel_species != query_species:
            panel_pairs = [ortholog_pairs(panel_species).get(name, "") for name in panel]
            query_pairs = [ortholog_pairs(query_species).get(name, "") for name in query]
            self._find("ortholog", panel_pairs, query_pairs)
            panel, query = _without(panel, panel_pairs), _without(query, query_pairs)
        self._find("case", [name.casefold() for name in panel], [name.casefold() for name in query])

    def _find(self, how: str, panel_keys: list[str], query_keys: list[str]) -> None:
        """Find missing genes by equal keys; an empty key is equal to none.

        A key that belongs to several panel genes, found or not, or to different names of the data, makes its missing
        genes ambiguous. Versions of an Ensembl identifier are one name.
        """
        genes = defaultdict(list)
        for position, key in enumerate(panel_keys):
            genes[key].append(position)
        wanted = {key for key, found in zip(panel_keys, self.how, strict=True) if key and found == "missing"}
        columns = defaultdict(list)
        for column, key in enumerate(query_keys):
            if key in wanted:
                columns[key].append(column)
        for key, candidates in columns.items():
            free = [column for column in candidates if self.gene_of_column[column] < 0]
            one_name = len({stable_id(self.query[column]) or self.query[column] for column in candidates}) == 1
            if free and one_name and len(genes[key]) == 1:
                self.how[genes[key][0]] = how
                for column in free:
                    self.gene_of_column[column] = genes[key][0]
            elif free:
                for position in genes[key]:
                    if self.how[position] == "missing":
                        self.how[position] = "ambiguous"


def clean_name(name: str) -> str:
    """Put a name in the Unicode form NFC, without white space at its ends."""
    return (name if name.isascii() else unicodedata.normalize("NFC", name)).strip()


def stable_id(name: str) -> str:
    """Ensembl identifier without its version; empty for any other name."""
    match = _ENSEMBL.fullmatch(name)
    return match[1] if match else ""


def _without(names: list[str], excluded: list[str]) -> list[str]:
    """Names, empty where ``excluded`` is not."""
    return ["" if other else name for name, other in zip(names, excluded, strict=True)]


def _symbol(gene_id: str) -> str:
    """Symbol of a human or mouse Ensembl identifier without version; empty for any other name."""
    if gene_id.startswith("ENSG"):
        return symbols_by_id("human").get(gene_id, "")
    if gene_id.startswith("ENSMUSG"):
        return symbols_by_id("mouse").get(gene_id, "")
    return ""


def _r_name(name: str) -> str:
    """Name as ``make.names`` of R writes it, and with dots for underscores, which Seurat replaces by dashes."""
    mangled = _R_REPLACES.sub(".", name)
    return f"X{mangled}" if mangled[:1].isdigit() else mangled


def _date_of_gene(name: str) -> str:
    """Month and day that a spreadsheet takes a symbol for, as in ``9/2`` for ``SEPT2``; empty for other names."""
    match = _DATE_GENE.fullmatch(name.casefold())
    if match is None or match[1] not in _MONTH_OF_GENE:
        return ""
    return f"{_MONTH_OF_GENE[match[1]]}/{int(match[2])}"


def _date(name: str) -> str:
    """Month and day that a name is a date of; empty for other names, and for the dates of two genes."""
    if "-" not in name:
        return ""
    for pattern in _DATES:
        match = pattern.fullmatch(name.casefold())
        if match and match["month"] in _MONTHS:
            found = f"{_MONTHS[match['month']]}/{int(match['day'])}"
            return "" if found in _OF_TWO_GENES else found
    return ""
