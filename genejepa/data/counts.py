"""Reading counts from an AnnData and refusing what is not counts."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from genejepa._memory import memory_errors
from genejepa.data.containers import Rows, csr_of, open_rows
from genejepa.data.panel import PanelCounts
from genejepa.data.scan import KINDS, TINY, Scan
from genejepa.data.slots import CountSlot, missing_key
from genejepa.errors import DataError, DataWarning, GeneJEPAError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

_LARGEST_EXACT = {np.dtype(np.float16): 2.0**11, np.dtype(np.float32): 2.0**24}
"""Largest number below which these types hold every whole number."""

_SMALLER = "take fewer cells, or keep the counts as a sparse matrix."

_FEW_COUNTS = 10
"""Median counts of a cell below which it says little; and then ones alone are no surprise."""

_MANY_VALUES = 1000
"""Stored values from which on it is odd that all are one."""

_PANEL_VALUES = 1 << 22
"""Stored values that a panel is taken from in one step."""


@dataclass(frozen=True, eq=False)
class CountMatrix:
    """A slot of an AnnData, opened for reading; nothing of the AnnData is changed.

    Attributes
    ----------
    slot
        Where the matrix is.
    obs_names, var
        Names of the cells, and the table of the genes of this slot.
    source
        The matrix, or that which a view looks at.
    obs_index, var_index
        Rows and columns of the source that are looked at; None for all.
    filename
        File of a backed AnnData.
    rounded
        Whether values are rounded where they are read, see :func:`check_counts`.
    """

    slot: CountSlot
    obs_names: pd.Index[Any]
    var: pd.DataFrame
    source: Rows
    obs_index: NDArray[np.int64] | None = None
    var_index: NDArray[np.int64] | None = None
    filename: object = None
    rounded: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return len(self.obs_names), len(self.var)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values as they are stored."""
        return self.source.dtype

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Cells ``start`` to ``stop``, (stop - start, n_vars), of checked structure; not to be written to.

        Values have the type they are stored with, but float16 becomes float32, long double becomes float64, and the
        order of bytes is that of this machine.

        Raises
        ------
        DataError
            If the sparse structure is damaged, or the file cannot be read.
        OutOfMemoryError
            If memory runs out.
        """
        with _reading(self.slot, self.filename):
            if self.obs_index is None:
                block = self.source.between(start, stop)
            else:
                block = self.source.at(self.obs_index[start:stop])
            if self.var_index is not None:
                block = block[:, self.var_index]
            return csr_of(block.shape, np.rint(block.data), block.indices, block.indptr) if self.rounded else block

    def blocks(self) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Consecutive blocks of about four million values, each with the position of its first cell."""
        n_obs, step = self.shape[0], self.source.block_rows
        for start in range(0, n_obs, step):
            yield start, self.rows(start, min(start + step, n_obs))

    def to_csr(self) -> sparse.csr_matrix:
        """All cells; shares the arrays of a CSR matrix in memory, unless it is looked at through a view or rounded."""
        if self.source.shared or not self.shape[0]:
            return self.rows(0, self.shape[0])
        with memory_errors(f"reading `{self.slot.name}`", fix=_SMALLER):
            return sparse.vstack([block for _, block in self.blocks()], format="csr")


def open_counts(adata: AnnData, slot: CountSlot) -> CountMatrix:
    """Open a slot of an AnnData for reading.

    Sparse matrices are never made dense, and a matrix on disk is never read as a whole. Of a view, only the cells
    and genes looked at are read.

    Parameters
    ----------
    adata
        Annotated data, in memory, backed or a view.
    slot
        Where to read.

    Returns
    -------
    The matrix. The sparse structure of a matrix in memory has been checked, that of others is when they are read;
    the values have not been looked at, see :func:`check_counts`.

    Raises
    ------
    MissingKeyError
        If the slot does not exist.
    DataError
        If the slot is empty, is not a matrix of real numbers, has a damaged sparse structure, or is in a file that
        cannot be read.

    Warns
    -----
    DataWarning
        If the numbers are stored as Python objects.
    """
    _check_tables(adata)
    whole = _whole(adata)
    with _reading(slot, adata.filename):
        matrix = _stored_matrix(whole, slot)
        if matrix is None:
            raise DataError(
                f"`{slot.name}` is empty (None), expected counts",
                fix=_where_counts(adata, skip=slot) or f"fill `adata.{slot.name}`, or pass layer=...",
            )
        source = open_rows(matrix, name=slot.name)
    expected = (whole.n_obs, len(slot.var(whole)))
    if source.shape != expected:
        raise DataError(
            f"`{slot.name}` has shape {source.shape}, expected {expected}",
            fix=f"assign a matrix with a row for each cell and a column for each gene to adata.{slot.name}",
        )
    return CountMatrix(
        slot=slot,
        obs_names=adata.obs_names,
        var=slot.var(adata),
        source=source,
        obs_index=_positions(adata._oidx, expected[0]) if adata.is_view else None,
        var_index=_positions(adata._vidx, expected[1]) if adata.is_view and not slot.use_raw else None,
        filename=adata.filename,
    )


def _check_tables(adata: AnnData) -> None:
    """Refuse an AnnData whose tables are not in memory."""
    import pandas as pd

    for name in ("obs", "var"):
        table = getattr(adata, name)
        if not isinstance(table, pd.DataFrame):
            raise DataError(
                f"`{name}` is a {type(table).__name__}, read lazily; expected a DataFrame",
                fix="adata = adata.to_memory()",
            )


@contextmanager
def _reading(slot: CountSlot, filename: object) -> Iterator[None]:
    """Turn errors of a file that is damaged, closed or gone, or of a lazy array, into one that names the slot."""
    try:
        with memory_errors(f"reading `{slot.name}`", fix=_SMALLER):
            yield
    except (GeneJEPAError, Warning):  # a warning that somebody wants raised
        raise
    except Exception as error:  # what holds the matrix can raise anything
        raise DataError(
            f"`{slot.name}`{f' of {filename}' if filename else ''} cannot be read (any more): "
            f"{str(error) or type(error).__name__}",
            fix="open the file again; if that does not help, copy it from its source.",
        ) from error


def _whole(adata: AnnData) -> AnnData:
    """What a view looks at: anndata would index it, in compiled code, before its structure is checked."""
    return adata._adata_ref if adata.is_view else adata


def _stored_matrix(adata: AnnData, slot: CountSlot) -> Any:
    """Matrix of a slot, as it is."""
    if slot.use_raw:
        if adata.raw is None:
            raise MissingKeyError("`raw` does not exist.", fix="leave use_raw out to read `X`.")
        return adata.raw.X
    if slot.layer is None:
        try:
            return adata.X
        except KeyError:  # a backed file without X
            return None
    if slot.layer not in adata.layers:
        raise missing_key("layers", slot.layer, adata.layers)
    return adata.layers[slot.layer]


def _positions(index: Any, size: int) -> NDArray[np.int64] | None:
    """Positions that the index of a view stands for; None for all in order."""
    every = np.arange(size)
    positions = every[index]
    return None if np.array_equal(positions, every) else positions


def _scan(counts: CountMatrix, used: NDArray[np.bool_] | None = None) -> Scan:
    """Look at every value once, a block of cells after the other."""
    scan = Scan()
    used = np.ones(counts.shape[1], dtype=bool) if used is None else used
    for start, block in counts.blocks():

        def describe(position: int, start: int = start, block: sparse.csr_matrix = block) -> str:
            row = start + int(np.searchsorted(block.indptr, position, side="right")) - 1
            cell, gene = str(counts.obs_names[row]), str(counts.var.index[block.indices[position]])
            return f"{block.data[position].item():.6g} in cell {cell!r}, gene {gene!r}"

        scan.add(block, used, describe)
    return scan


def check_counts(
    counts: CountMatrix,
    *,
    adata: AnnData,
    used: NDArray[np.bool_] | None = None,
    allow_fractional: bool = False,
) -> CountMatrix:
    """Refuse a matrix that does not hold counts, naming what it seems to hold instead.

    All values are looked at, a block of cells after the other; nothing is sampled.

    Parameters
    ----------
    counts
        Matrix of shape ``(n_obs, n_vars)``. No cells are no mistake.
    adata
        The AnnData it comes from; used to find counts in another slot.
    used
        Columns that matter, shape ``(n_vars,)``; None for all. What is wrong in others only is a warning.
    allow_fractional
        Accept any finite values that are not negative, such as expected counts.

    Returns
    -------
    The matrix to read the counts from: values are rounded as they are read if they are counts but for rounding noise
    of at most 1e-4.

    Raises
    ------
    DataError
        If there are no genes, no count at all, or a value is NaN, infinite, beyond 2^53, negative or fractional.
        Fractional values are accepted, with a warning, if they are fewer than the whole ones.

    Warns
    -----
    DataWarning
        If values are fractional or have rounding noise, if they are fractional although another slot holds counts, if
        values are not counts in columns that do not matter, if counts are too large for their type or for float32, all
        one, or fewer than 10 in most cells.
    """
    slot, (n_obs, n_vars) = counts.slot.name, counts.shape
    if n_vars == 0:
        raise DataError(
            f"`{slot}` has {n_obs} cells and 0 genes, expected at least one gene",
            fix="check the filters that were applied to `adata`.",
        )
    scan = _scan(counts, used)
    accepted = allow_fractional or scan.has_noise_only or scan.looks_corrected
    if scan.worst is not None and not (scan.worst == "fractional" and accepted):
        raise _refusal(scan, counts.slot, adata)
    rounded = scan.has_noise_only and not allow_fractional
    if n_obs and (not scan.n_positive or (rounded and scan.largest < 0.5)):
        genes = "" if used is None else f" in the {int(np.count_nonzero(used))} genes that are used"
        raise DataError(
            f"`{slot}` holds no count above zero{genes}, in any of {n_obs} cells",
            fix=_where_counts(adata, skip=counts.slot) or "check that the right cells and the right layer are used.",
        )
    for message in _remarks(scan, counts, allow_fractional=allow_fractional):
        warnings.warn(message, DataWarning, stacklevel=2)
    if allow_fractional and scan.worst == "fractional":
        better = _where_counts(adata, skip=counts.slot)
        if better is not None:
            n = scan.offences["fractional"].n
            message = f"`{slot}` holds {n} fractional values. {scan.looks_like}\nFix: {better}"
            warnings.warn(message, DataWarning, stacklevel=2)
    return replace(counts, rounded=rounded)


def _remarks(scan: Scan, counts: CountMatrix, *, allow_fractional: bool) -> Iterator[str]:
    """What is odd about values that are accepted as counts."""
    slot, fractional = counts.slot.name, scan.offences["fractional"]
    if scan.n_elsewhere:
        yield (
            f"`{slot}` holds {scan.n_elsewhere} values that are not counts (NaN, infinite, negative or fractional), "
            "all of them in genes that are not used"
        )
    if fractional.n and not allow_fractional:
        if not scan.has_noise_only:
            yield (
                f"`{slot}` holds {fractional.n} fractional values among {scan.n_positive}, such as corrected or "
                "expected counts (CellBender, SoupX, RSEM); they are used as they are. The first is "
                f"{fractional.first}"
            )
        elif scan.largest_deviation > TINY:
            yield (
                f"`{slot}` holds {fractional.n} values with rounding noise of at most "
                f"{scan.largest_deviation:.1g}; they are rounded. The first is {fractional.first}"
            )
    exact = _LARGEST_EXACT.get(counts.dtype, _LARGEST_EXACT[np.dtype(np.float32)])
    if scan.largest > exact:
        yield (
            f"`{slot}` holds values up to {scan.largest:.6g}; above {exact:.0f} not every whole number can be kept in "
            f"{'float16' if counts.dtype == np.float16 else 'float32'}, so counts are inexact"
        )
    median = float(np.median(scan.cell_totals)) if counts.shape[0] else _FEW_COUNTS
    if median < _FEW_COUNTS:
        yield f"`{slot}` has a median of {median:.3g} counts in a cell: are these empty droplets, or few genes?"
    elif scan.largest == 1 and not fractional.n and scan.n_positive >= _MANY_VALUES:
        yield f"`{slot}` looks binarised: all of its {scan.n_positive} values are 1, expected counts"


def _refusal(scan: Scan, slot: CountSlot, adata: AnnData) -> DataError:
    """Error for a matrix that does not hold counts."""
    assert scan.worst is not None
    offences = scan.offences[scan.worst]
    plural = "s" if offences.n != 1 and scan.worst != "nan" else ""
    return DataError(
        f"`{slot.name}` holds {offences.n} {KINDS[scan.worst]}{plural} among {scan.n_values} values, expected counts; "
        f"the first is {offences.first}. {scan.looks_like}",
        fix=_where_counts(adata, skip=slot) or _repair(scan, slot),
    )


def _repair(scan: Scan, slot: CountSlot) -> str:
    """Tell what to do if no slot holds counts."""
    if scan.worst in ("nan", "infinite"):
        sums = f"np.asarray(adata.{slot.name}.sum(axis=1)).ravel()"
        return f"adata = adata[np.isfinite({sums})].copy()  # leaves out the cells with such values"
    return "load the raw counts, e.g. into adata.layers['counts'], and pass layer='counts'."


def _where_counts(adata: AnnData, *, skip: CountSlot) -> str | None:
    """Tell how to use another slot that holds counts; None if there is none."""
    found = next((slot for slot in count_slots(adata) if slot != skip and holds_counts(adata, slot)), None)
    if found is None:
        return None
    if found == CountSlot():
        return (
            f"leave `layer` and `use_raw` out: `X` holds counts. If `{skip.name}` is still read then, declare `X` "
            "first: genejepa.GeneJEPA.setup_anndata(adata)"
        )
    return f"pass {found.argument}: `{found.name}` holds counts."


def count_slots(adata: AnnData) -> list[CountSlot]:
    """Slots that can hold counts: layers, ``X`` and ``raw.X``, as far as they are filled."""
    slots = [CountSlot(layer=layer) for layer in adata.layers]
    with _reading(CountSlot(), adata.filename):
        slots += [CountSlot()] if _stored_matrix(_whole(adata), CountSlot()) is not None else []
    return slots + ([CountSlot(use_raw=True)] if adata.raw is not None else [])


def holds_counts(adata: AnnData, slot: CountSlot) -> bool:
    """Whether a slot can be read, has a value other than zero, and holds only whole numbers from zero on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            scan = _scan(open_counts(adata, slot))
    except DataError:
        return False
    return scan.worst is None and scan.n_positive > 0


def columns_to_genes(columns: NDArray[np.int64], n_vars: int) -> NDArray[np.int64]:
    """Position in a panel of each of ``n_vars`` columns, -1 for the others, (n_vars,), for a panel of given columns."""
    genes = np.full(n_vars, -1, dtype=np.int64)
    genes[columns] = np.arange(len(columns))
    return genes


@memory_errors("taking the genes of the model", fix="take fewer cells, or a smaller `n_genes`.")
def panel_counts(matrix: sparse.csr_matrix, gene_of_column: NDArray[np.int64], n_genes: int) -> PanelCounts:
    """Restrict counts to a gene panel, in canonical order.

    Counts of columns of the same gene, and entries that are stored twice, are added up in float64; explicit zeros are
    dropped. The result depends only on the counts of the panel genes, bit for bit: not on the order of the columns of
    ``matrix`` nor on the columns of other genes.

    Parameters
    ----------
    matrix
        Counts of shape ``(n_obs, n_vars)``, of checked structure. Not changed.
    gene_of_column
        Panel position of each column, in ``0..n_genes - 1``, or -1 for a gene that is not in the panel, shape
        ``(n_vars,)``.
    n_genes
        Size of the panel.

    Returns
    -------
    Counts of ``n_obs`` cells over ``n_genes`` genes; a gene that no column has has no entry.

    Raises
    ------
    DataError
        If ``gene_of_column`` has another length, or positions outside of the panel.
    OutOfMemoryError
        If memory runs out.
    """
    gene_of_column = np.asarray(gene_of_column, dtype=np.int64)
    if gene_of_column.shape != (matrix.shape[1],) or (gene_of_column >= n_genes).any() or (gene_of_column < -1).any():
        raise DataError(
            f"`gene_of_column` has shape {gene_of_column.shape}, expected ({matrix.shape[1]},) and values of "
            f"-1..{n_genes - 1}",
            fix="take it from match_genes or columns_to_genes.",
        )
    step = max(1, _PANEL_VALUES * matrix.shape[0] // max(int(matrix.indptr[-1]), 1))
    indptr, indices, data = [np.zeros(1, dtype=np.int64)], [], []
    for start in range(0, matrix.shape[0], step):
        lengths, genes, values = _panel_rows(matrix, start, min(start + step, matrix.shape[0]), gene_of_column, n_genes)
        indptr.append(indptr[-1][-1] + np.cumsum(lengths))
        indices.append(genes)
        data.append(values)
    return PanelCounts(
        indptr=np.concatenate(indptr),
        indices=np.concatenate([np.empty(0, dtype=np.int32), *indices]),
        data=np.concatenate([np.empty(0, dtype=np.float32), *data]),
        n_genes=n_genes,
    )


def _panel_rows(
    matrix: sparse.csr_matrix, start: int, stop: int, gene_of_column: NDArray[np.int64], n_genes: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Number of counts of some cells, and their panel positions and values, in canonical order."""
    span = slice(int(matrix.indptr[start]), int(matrix.indptr[stop]))
    genes = gene_of_column[matrix.indices[span]]
    kept = genes >= 0
    rows = np.repeat(np.arange(stop - start), np.diff(matrix.indptr[start : stop + 1]))[kept]
    keys, values = rows * n_genes + genes[kept], matrix.data[span][kept].astype(np.float64)
    order = np.argsort(keys, kind="stable")
    if (np.diff(keys[order]) == 0).any():
        order = np.lexsort((values, keys))  # so that a sum does not depend on the order of its terms
    keys, values = keys[order], values[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    sums = (np.add.reduceat(values, first) if len(first) else values).astype(np.float32)
    keys, sums = keys[first][sums != 0], sums[sums != 0]
    rows, genes = np.divmod(keys, max(n_genes, 1))
    return np.bincount(rows, minlength=stop - start), genes.astype(np.int32), sums
