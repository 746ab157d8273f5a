"""Report of the genes of a model that a data set has, and the verdict on it."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from genejepa.data.gene_search import NOT_FOUND
from genejepa.errors import ConfigError, DataWarning, GeneMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_LEAST_GENES: Final = 50
_LEAST_SHARE: Final = 0.1
"""Genes that must be found, whatever their share of the counts: 50, or a tenth of a panel of less than 500."""

_GOOD_MASS: Final = 0.9
"""Share of the training counts below which missing genes are warned of."""

_N_EXAMPLES: Final = 3
_LONGEST_NAME: Final = 40

_HOW: Final = {
    "exact": "equal names",
    "version": "Ensembl identifiers without version",
    "ensembl": "Ensembl identifier and symbol",
    "r_name": "names changed by R",
    "date": "names changed by a spreadsheet",
    "ortholog": "one-to-one orthologs",
    "case": "names in another case",
    "missing": "missing",
    "ambiguous": "ambiguous, so missing",
}

_KINDS: Final = {
    "human Ensembl identifiers": re.compile(r"ENSG\d{6,}(\.\d+)?"),
    "mouse Ensembl identifiers": re.compile(r"ENSMUSG\d{6,}(\.\d+)?"),
    "Ensembl identifiers": re.compile(r"ENS[A-Z]*\d{6,}(\.\d+)?"),
    "numbers": re.compile(r"\d+"),
    "mouse-like gene symbols": re.compile(r"[A-Z](?=.*[a-z])[^A-Z]+"),
}
_KIND_SHARE: Final = 0.6
"""Share of the names that must look like a kind."""


@dataclass(frozen=True, eq=False)
class GeneReport:
    """Which genes of a model a data set has, and how each was found.

    Parameters
    ----------
    gene_of_column
        Panel position of each column of the data, or -1, shape ``(n_vars,)``. Several columns have the same position
        only if duplicates are added up.
    panel
        Names of the genes of the model.
    names
        Names of the genes of the data.
    how
        How each panel gene was found, shape ``(n_panel,)``: ``exact``, ``version`` (of an Ensembl identifier),
        ``ensembl`` (identifier and symbol), ``r_name`` (``HLA.A`` for ``HLA-A``), ``date`` (``2-Sep`` for ``SEPT2``),
        ``ortholog`` or ``case``; or not: ``missing``, or ``ambiguous`` if there is more than one answer.
    mass
        Share of the training counts that the genes found had, 0 to 1.
    would_match
        What would find more genes, and how many more: mappings that were not used, as ``"orthologs"``, and columns of
        ``var``, as ``"var['gene_symbols']"``.
    """

    gene_of_column: NDArray[np.int64]
    panel: list[str]
    names: list[str]
    how: NDArray[np.object_]
    mass: float
    would_match: dict[str, int]

    @property
    def found(self) -> NDArray[np.bool_]:
        """Whether each panel gene was found, (n_panel,)."""
        return ~np.isin(self.how, NOT_FOUND)

    @property
    def n_matched(self) -> int:
        """Number of panel genes found."""
        return int(self.found.sum())

    @property
    def missing(self) -> list[str]:
        """Names of the panel genes not found, in panel order."""
        return [name for name, found in zip(self.panel, self.found, strict=True) if not found]

    def to_frame(self) -> pd.DataFrame:
        """One row for each panel gene: its name, its name in the data, and how it was found.

        A gene not found has None for its name in the data; different names that are added up are joined by ``+``.
        """
        import pandas as pd

        names = self._names_found()
        found_as = ["+".join(sorted(names[position])) or None for position in range(len(self.panel))]
        return pd.DataFrame({"gene": self.panel, "found_as": pd.Series(found_as, dtype=object), "how": self.how})

    def _names_found(self) -> dict[int, set[str]]:
        """Names in the data of each panel position; none for a gene not found."""
        names: dict[int, set[str]] = defaultdict(set)
        for column in np.flatnonzero(self.gene_of_column >= 0).tolist():
            names[int(self.gene_of_column[column])].add(self.names[column])
        return names

    def _genes_by_how(self) -> dict[str, list[str]]:
        """Names of the panel genes by how they were found, in the order of `_HOW`."""
        genes: dict[str, list[str]] = {how: [] for how in _HOW}
        for name, how in zip(self.panel, self.how.tolist(), strict=True):
            genes[how].append(name)
        return {how: names for how, names in genes.items() if names}

    def _facts(self) -> list[str]:
        """How much was found, and what would find more, best first."""
        share = f"{self.n_matched:,} of the {len(self.panel):,} genes of the model, with {self.mass:.1%} of its counts"
        best = sorted(self.would_match.items(), key=lambda item: (-item[1], item[0]))
        return [share, *(f"{_source(name)} would find {count:,} more" for name, count in best)]

    def __str__(self) -> str:
        share, *hints = self._facts()
        ways = (
            f"{_HOW[how]}: {len(names):,}, e.g. {quote_first(names)}" for how, names in self._genes_by_how().items()
        )
        return "\n  ".join([share, *ways, *hints])

    def _repr_html_(self) -> str:
        import pandas as pd

        from genejepa._html import table_html

        ways = [(_HOW[how], len(names), quote_first(names)) for how, names in self._genes_by_how().items()]
        return table_html("; ".join(self._facts()), pd.DataFrame(ways, columns=["found by", "genes", "examples"]))


def require_overlap(report: GeneReport, *, min_overlap: float = 0.5, slot: str = "var_names") -> None:
    """Refuse a data set that has too few genes of a model, and warn of one that has few or damaged names.

    Parameters
    ----------
    report
        Genes found.
    min_overlap
        Smallest share of the training counts that the genes found must have, 0 to 1.
    slot
        Where the names come from, for the messages.

    Raises
    ------
    ConfigError
        If ``min_overlap`` is not between 0 and 1.
    GeneMismatchError
        If the genes found had less than ``min_overlap`` of the training counts, or are less than 50 (of a panel of
        less than 500: less than a tenth).

    Warns
    -----
    DataWarning
        If the genes found had less than 90 % of the training counts; if names were changed by R or a spreadsheet; or
        if names differ in the form of their Unicode characters.
    """
    if isinstance(min_overlap, bool) or not isinstance(min_overlap, int | float) or not 0 <= min_overlap <= 1:
        problem = f"`min_overlap` is {min_overlap!r}, expected a share from 0 to 1"
        raise ConfigError(problem, fix="pass min_overlap=0.5.")
    least = min(_LEAST_GENES, max(1, int(_LEAST_SHARE * len(report.panel))))
    if report.mass < min_overlap or report.n_matched < least:
        raise _mismatch_error(report, min_overlap=min_overlap, least=least, slot=slot)
    for problem in (_few_genes(report), _damaged_names(report), _other_characters(report)):
        if problem:
            warnings.warn(f"`{slot}` has {problem}", DataWarning, stacklevel=4)
    genes = report._genes_by_how()
    for how in ("version", "ensembl"):
        if how in genes:
            logger.info("%d genes were found by %s, e.g. %s", len(genes[how]), _HOW[how], quote_first(genes[how]))


def _mismatch_error(report: GeneReport, *, min_overlap: float, least: int, slot: str) -> GeneMismatchError:
    """Error for names that do not fit, with what would fit better."""
    share, *hints = report._facts()
    return GeneMismatchError(
        f"`{slot}` has {share}, expected at least {min_overlap:.0%} of the counts and {least} genes. "
        f"The model has {_kind(report.panel)}, the data {_kind(report.names)}" + "".join(f"; {hint}" for hint in hints),
        fix=_overlap_fix(report, least=least, slot=slot),
    )


def _overlap_fix(report: GeneReport, *, least: int, slot: str) -> str:
    """What to do about names that do not fit."""
    n_needed = least - report.n_matched
    best = max(sorted(report.would_match), key=lambda source: report.would_match[source], default="")
    helps = best != "" and report.would_match[best] >= n_needed
    if helps and _is_column(best):
        target = "raw.var.index" if slot == "raw.var_names" else slot
        return f"adata.{target} = adata.{best}.astype(str)"
    arguments = [_source(best)] if helps else []
    if n_needed <= 0:
        floor = math.floor(100 * report.mass) / 100
        arguments.append(f"min_overlap={floor:g} if the other genes were truly not measured")
    if arguments:
        return f"pass {', or '.join(arguments)}."
    return "check that the species and the kind of gene names are those of the model."


def _few_genes(report: GeneReport) -> str:
    """What to warn of if genes with many counts are missing, else nothing."""
    if report.mass >= _GOOD_MASS:
        return ""
    share, *hints = report._facts()
    text = f"only {share}; the others count as not measured, e.g. {quote_first(report.missing)}"
    return "; ".join([text, *hints])


def _damaged_names(report: GeneReport) -> str:
    """What to warn of if names were changed on their way, else nothing."""
    names = report._names_found()
    damaged = [
        f"{quote(min(names[position]))} for {quote(report.panel[position])}"
        for position, how in enumerate(report.how)
        if how in ("r_name", "date")
    ]
    if not damaged:
        return ""
    listed = ", ".join(damaged[:_N_EXAMPLES])
    return (
        f"{len(damaged)} names that R or a spreadsheet has changed: {listed}; other names may be damaged beyond repair"
    )


def _other_characters(report: GeneReport) -> str:
    """What to warn of if names are equal only after Unicode normalisation, else nothing."""
    names = report._names_found()
    other = [
        gene
        for position, (gene, how) in enumerate(zip(report.panel, report.how, strict=True))
        if how == "exact" and gene.strip() not in {name.strip() for name in names[position]}
    ]
    if not other:
        return ""
    return (
        f"{len(other)} names that equal those of the model only after Unicode normalisation (NFC): {quote_first(other)}"
    )


def _kind(names: Sequence[str]) -> str:
    """What the names of a data set look like, with the first of them."""
    given = [name.strip() for name in names if name.strip()]
    if not given:
        return "no gene names"
    enough = _KIND_SHARE * len(given)
    kinds = (kind for kind, pattern in _KINDS.items() if sum(map(bool, map(pattern.fullmatch, given))) > enough)
    return f"{next(kinds, 'gene symbols')} such as {quote_first(given)}"


def _is_column(source: str) -> bool:
    """Whether a key of `would_match` is a column, not a mapping."""
    return source.endswith("]")


def _source(name: str) -> str:
    """A key of `would_match` as the user writes it."""
    return name if _is_column(name) else f"gene_mapping={name!r}"


def quote_first(names: Sequence[str]) -> str:
    """The first names, quoted."""
    return ", ".join(quote(name) for name in names[:_N_EXAMPLES])


def quote(name: str) -> str:
    """A name, quoted, without the end of an overlong one."""
    return repr(name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}...")
