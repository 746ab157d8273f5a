"""Cells of an AnnData as a trained model reads them: which slot, which genes, which batches; block by block."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
from scipy.sparse import csr_matrix

from genejepa._constants import OBSM_KEY, UNS_KEY
from genejepa.data.counts import check_counts, open_counts, panel_counts
from genejepa.data.genes import gene_names, is_gene, names_slot
from genejepa.data.matching import match_genes, require_overlap
from genejepa.data.panel import PanelCounts
from genejepa.data.setup import batch_codes, declared_registration, registration_of
from genejepa.data.slots import CountSlot
from genejepa.errors import ConfigError, DataError, DataWarning, GeneMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.data.matching import GeneMapping, GeneReport
    from genejepa.data.normalization import Normalizer
    from genejepa.data.setup import Registration


@dataclass(frozen=True)
class Matching:
    """How cells of other data are read.

    Attributes
    ----------
    layer, use_raw
        Slot with the counts; None and False take what is declared for the AnnData, else the slot of the training.
    gene_mapping
        ``exact``: equal names. ``names``: further, Ensembl identifiers with and without version, identifiers and
        symbols, names mangled by R or a spreadsheet; only where there is one answer. ``orthologs``: further, names in
        another case, and human and mouse one-to-one orthologs.
    duplicates
        ``error``, or ``sum`` to add up the columns of one gene.
    min_overlap
        Smallest share that the genes found may have in the counts of the training.
    """

    layer: str | None = None
    use_raw: bool = False
    gene_mapping: GeneMapping = "names"
    duplicates: Literal["error", "sum"] = "error"
    min_overlap: float = 0.5


class MatchingOptions(TypedDict, total=False):
    """Arguments of :class:`Matching`."""

    layer: str | None
    use_raw: bool
    gene_mapping: GeneMapping
    duplicates: Literal["error", "sum"]
    min_overlap: float


@dataclass(frozen=True)
class Trained:
    """What a trained model knows about its cells and genes.

    Attributes
    ----------
    genes
        Panel in order.
    gene_symbols
        Column of ``var`` that named them; None for ``var_names``.
    registration
        Slots of the training.
    allow_fractional
        Whether values need not be whole numbers.
    normalizer
        Normalisation, with the batches of the training.
    """

    genes: list[str]
    gene_symbols: str | None
    registration: Registration
    allow_fractional: bool
    normalizer: Normalizer

    def symbols_in(self, var: pd.DataFrame) -> str | None:
        """Column of a table of genes that has the names of the training; None for its index."""
        return self.gene_symbols if self.gene_symbols in var else None


class Query:
    """Cells of an AnnData over the genes of a trained model; all values have been looked at.

    Attributes
    ----------
    report
        Which genes were found.
    n_obs
        Number of cells.
    """

    def __init__(self, adata: AnnData, trained: Trained, matching: Matching) -> None:
        slot = slot_of(adata, trained.registration, matching)
        counts = open_counts(adata, slot)
        self.report: GeneReport = genes_of(counts.var, trained, matching, slot=slot)
        require_genes(adata, self.report, trained, matching, slot=slot)
        used = self.report.gene_of_column >= 0
        self._counts = check_counts(counts, adata=adata, used=used, allow_fractional=trained.allow_fractional)
        self.n_obs = counts.shape[0]
        self._n_genes = len(trained.genes)
        self._batch = _known_batches(adata, trained)

    @property
    def keep(self) -> NDArray[np.bool_] | None:
        """Genes that were measured, (n_genes,); None for all."""
        found = self.report.found
        return None if found.all() else found

    def counts(self) -> PanelCounts:
        """Counts of all cells."""
        nobody = panel_counts(
            csr_matrix((0, len(self.report.gene_of_column))), self.report.gene_of_column, self._n_genes
        )
        return PanelCounts.concatenate([nobody, *self.blocks()])

    def blocks(self) -> Iterator[PanelCounts]:
        """Counts of consecutive cells, as many as are read at once."""
        for start, matrix in self._counts.blocks():
            panel = panel_counts(matrix, self.report.gene_of_column, self._n_genes)
            yield replace(panel, batch=None if self._batch is None else self._batch[start : start + panel.n_obs])


def genes_of(var: pd.DataFrame, trained: Trained, matching: Matching, *, slot: CountSlot) -> GeneReport:
    """Which genes of the model the table of genes of a slot has."""
    symbols = trained.symbols_in(var)
    names = gene_names(var, gene_symbols=symbols, table=slot.table)
    return match_genes(
        trained.genes,
        np.where(is_gene(var), names, ""),  # an antibody may have the name of a gene
        frequency=trained.normalizer.frequency,
        mapping=matching.gene_mapping,
        duplicates=matching.duplicates,
        var=var,
        slot=names_slot(symbols, slot.table),
    )


def require_genes(adata: AnnData, report: GeneReport, trained: Trained, matching: Matching, *, slot: CountSlot) -> None:
    """Refuse cells that have too few genes of the model, and say so if ``raw`` has more.

    Errors and warnings as in :func:`genejepa.data.matching.require_overlap`.
    """
    where = names_slot(trained.symbols_in(slot.var(adata)), slot.table)
    try:
        require_overlap(report, min_overlap=matching.min_overlap, slot=where)
    except GeneMismatchError as error:
        raw = CountSlot(use_raw=True)
        found = None
        if slot != raw and adata.raw is not None:
            with contextlib.suppress(DataError):
                found = genes_of(adata.raw.var, trained, matching, slot=raw)
        if found is None or found.mass <= report.mass:
            raise
        fix = f"pass use_raw=True if `raw.X` holds counts: `raw.var` has {found.n_matched} of the genes."
        raise GeneMismatchError(error.problem, fix=fix) from None


def slot_of(adata: AnnData, registration: Registration, matching: Matching) -> CountSlot:
    """Slot to read: the one asked for, else the one declared for the cells, else the layer of the training.

    ``raw`` is never read unless it is asked for or declared: many keep log-normalised values there.
    """
    if matching.layer is not None or matching.use_raw:
        return CountSlot(matching.layer, matching.use_raw)
    declared = declared_registration(adata)
    if declared is not None:
        return declared.slot
    return registration.slot if registration.layer in adata.layers else CountSlot()


def require_key(key_added: str) -> None:
    """Refuse, before anything is computed, a key that an h5ad file cannot hold.

    Raises
    ------
    ConfigError
        If it is no text, empty, or has a slash.
    """
    if not isinstance(key_added, str) or not key_added.strip(".") or "/" in key_added:
        raise ConfigError(
            f"`key_added` is {key_added!r}, expected a name without a slash.", fix=f"pass key_added={OBSM_KEY!r}."
        )


def empty_key(key_added: str) -> str:
    """Column of ``obs`` that marks cells without counts: ``genejepa_empty`` for ``X_genejepa``."""
    return f"{key_added.removeprefix('X_')}_empty"


def write_results(
    adata: AnnData,
    vectors: NDArray[np.float32],
    *,
    empty: NDArray[np.bool_],
    key_added: str,
    record: dict[str, object],
) -> None:
    """Write vectors, the mark of empty cells if there are any, and the record: all that genejepa adds to an AnnData."""
    from anndata import ImplicitModificationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)  # a view becomes a copy, as is wanted
        adata.obsm[key_added] = vectors
        if empty.any():
            adata.obs[empty_key(key_added)] = empty
        elif empty_key(key_added) in adata.obs:
            del adata.obs[empty_key(key_added)]
        adata.uns[UNS_KEY] = record


def _known_batches(adata: AnnData, trained: Trained) -> NDArray[np.int64] | None:
    """Batch of each cell, (n_obs,), -1 for one that the training did not have; None for a model without batches."""
    batches = trained.normalizer.batches
    if batches is None:
        return None
    key = registration_of(adata).batch_key or trained.registration.batch_key
    if key is None or key not in adata.obs:
        warnings.warn(
            f"`obs` has no column {key!r}: the cells are embedded without batch correction.", DataWarning, stacklevel=4
        )
        return None
    own, names = batch_codes(adata, key, training=False)
    codes = batches.codes(names)[own]
    if n_unknown := int((codes < 0).sum()):
        warnings.warn(
            f"{n_unknown} of {len(codes)} cells are of a batch that the training did not have "
            f"(it had {', '.join(map(repr, batches.names[:5]))}); they are embedded without correction.",
            DataWarning,
            stacklevel=4,
        )
    return codes
