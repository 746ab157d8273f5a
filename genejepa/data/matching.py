"""Finding the genes of a panel in another data set by name."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genejepa.data.genes import check_unique
from genejepa.errors import GeneMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ERROR_FRACTION = 0.1
"""Share of panel genes below which the two sets of names are taken to be different kinds of names."""

_ENSEMBL = re.compile(r"ENS[A-Z]*[EGPTR]\d{6,}(\.\d+)?")
_N_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Where the genes of a panel are in another data set.

    Parameters
    ----------
    columns
        For each panel gene its column in the data, or -1 if it is absent, shape ``(n_genes,)``.
    n_matched
        Number of panel genes found.
    fraction
        Share of panel genes found, 0 to 1.
    missing
        Names of the panel genes not found, in panel order.
    """

    columns: NDArray[np.int64]
    n_matched: int
    fraction: float
    missing: list[str]


def match_genes(
    panel_names: Sequence[str] | NDArray[np.object_],
    query_names: Sequence[str] | NDArray[np.object_],
    *,
    min_fraction: float = 0.5,
) -> GeneMatch:
    """Find the genes of a panel in a data set by name.

    Names must be equal, with regard to case. If both sides are Ensembl identifiers and not all are found,
    they are compared without their version (``ENSG00000141510.18`` equals ``ENSG00000141510``).

    Parameters
    ----------
    panel_names
        Distinct gene names of the model, shape ``(n_genes,)``.
    query_names
        Gene names of the data, shape ``(n_vars,)``.
    min_fraction
        Share of panel genes below which a warning is given.

    Returns
    -------
    The column of every panel gene.

    Raises
    ------
    DataError
        If the name of a panel gene occurs more than once in the data.
    GeneMismatchError
        If less than 10 % of the panel genes are found.

    Warns
    -----
    UserWarning
        If less than ``min_fraction`` of the panel genes are found.
    """
    panel = np.array([*panel_names], dtype=object)
    query = np.array([*query_names], dtype=object)
    columns = _lookup(panel, query)
    if (columns < 0).any() and _are_ensembl(panel) and _are_ensembl(query):
        columns = _lookup(_without_version(panel), _without_version(query))
    found = columns >= 0
    n_matched = int(found.sum())
    fraction = n_matched / max(len(panel), 1)
    if fraction < _ERROR_FRACTION:
        raise _mismatch_error(panel, query, n_matched=n_matched)
    if fraction < min_fraction:
        warnings.warn(
            f"only {n_matched} of the {len(panel)} genes of the model ({fraction:.0%}) are in the data; the "
            f"others count as not measured, e.g. {panel[~found][:_N_EXAMPLES].tolist()}. "
            "The embedding may be poor.",
            UserWarning,
            stacklevel=2,
        )
    return GeneMatch(columns=columns, n_matched=n_matched, fraction=fraction, missing=panel[~found].tolist())


def _lookup(panel: NDArray[np.object_], query: NDArray[np.object_]) -> NDArray[np.int64]:
    """Column of each panel name in ``query``, or -1."""
    position = {name: column for column, name in enumerate(query)}
    columns = np.fromiter((position.get(name, -1) for name in panel), dtype=np.int64, count=len(panel))
    if len(position) < len(query):
        check_unique(query, columns[columns >= 0])
    return columns


def _are_ensembl(names: NDArray[np.object_]) -> bool:
    """Whether most names are Ensembl identifiers."""
    return 2 * sum(_ENSEMBL.fullmatch(name) is not None for name in names) > len(names)


def _without_version(names: NDArray[np.object_]) -> NDArray[np.object_]:
    """Ensembl identifiers without their version; other names as they are."""
    stripped = np.empty_like(names)
    stripped[:] = [name.split(".")[0] if _ENSEMBL.fullmatch(name) else name for name in names]
    return stripped


def _mismatch_error(panel: NDArray[np.object_], query: NDArray[np.object_], *, n_matched: int) -> GeneMismatchError:
    """Error for two sets of names that do not fit, with a guess at the reason."""
    folded = len({n.casefold() for n in panel} & {n.casefold() for n in query})
    unversioned = len({n.rsplit(".", 1)[0] for n in panel} & {n.rsplit(".", 1)[0] for n in query})
    kinds = [("Ensembl identifiers" if _are_ensembl(names) else "gene symbols") for names in (panel, query)]
    if kinds[0] != kinds[1]:
        fix = (
            f"the model has {kinds[0]} and the data {kinds[1]}: pass gene_symbols='<column>' with the "
            f"column of `var` that holds {kinds[0]}."
        )
    elif folded > max(n_matched, unversioned) and folded >= _ERROR_FRACTION * len(panel):
        fix = f"{folded} would match if case were ignored: check the species, or rename the genes."
    elif unversioned > n_matched and unversioned >= _ERROR_FRACTION * len(panel):
        fix = f"{unversioned} would match without the part after the last dot: remove it from the names."
    else:
        fix = "check that the species and the kind of gene names are those of the model."
    return GeneMismatchError(
        f"`var_names` has {n_matched} of the {len(panel)} genes of the model, expected at least "
        f"{_ERROR_FRACTION:.0%}; the model has {panel[:_N_EXAMPLES].tolist()}, "
        f"the data {query[:_N_EXAMPLES].tolist()}",
        fix=fix,
    )
