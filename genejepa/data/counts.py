"""Reading counts from an AnnData and refusing what is not counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from genejepa.data.panel import PanelCounts
from genejepa.errors import DataError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import NDArray

_CHUNK_VALUES = 1 << 20
"""Stored values looked at in one step: 8 MiB of float64, so that a scan needs little memory."""

_LARGEST_COUNT = 2.0**53
"""Largest float64 below which every whole number is exact."""

_NOISE = 1e-4
"""Distance from a whole number that is put down to rounding noise."""


def slot_name(layer: str | None) -> str:
    """Name of the AnnData slot that counts are read from.

    Parameters
    ----------
    layer
        Key of ``layers``, or None for ``X``.

    Returns
    -------
    ``"X"`` or ``"layers['<layer>']"``.
    """
    return "X" if layer is None else f"layers[{layer!r}]"


def read_counts(adata: AnnData, *, layer: str | None = None) -> sparse.csr_matrix:
    """Read a count matrix as CSR without changing the AnnData.

    Sparse input is never made dense. A CSR matrix is not copied: the result shares its arrays, so it must not
    be written to. Dense and backed matrices are converted in blocks of rows.

    Parameters
    ----------
    adata
        Annotated data, in memory, backed or a view.
    layer
        Key of ``layers`` to read; None reads ``X``.

    Returns
    -------
    Matrix of shape ``(n_obs, n_vars)`` with the stored values and their dtype. The sparse structure has been
    checked, the values have not: see :func:`check_counts`.

    Raises
    ------
    MissingKeyError
        If the layer does not exist.
    DataError
        If the slot is empty, is not a matrix of real numbers, or has a damaged sparse structure.
    """
    slot = slot_name(layer)
    if layer is not None and layer not in adata.layers:
        raise MissingKeyError(
            f"`{slot}` does not exist; `layers` has {sorted(adata.layers)}",
            fix="pass the name of an existing layer, or layer=None to read `X`.",
        )
    return _as_csr(adata.X if layer is None else adata.layers[layer], slot=slot)


def _as_csr(matrix: Any, *, slot: str) -> sparse.csr_matrix:
    """Convert any matrix that an AnnData can hold to CSR, sharing the arrays where it is CSR already."""
    if matrix is None:
        raise DataError(f"`{slot}` is empty (None), expected counts", fix=f"fill `adata.{slot}` or pass layer=...")
    if isinstance(matrix, np.ma.MaskedArray) and np.ma.is_masked(matrix):
        raise DataError(
            f"`{slot}` has {int(np.ma.getmaskarray(matrix).sum())} masked entries, expected a plain array",
            fix=f"adata.{slot} = adata.{slot}.filled(0), if a masked entry means no count.",
        )
    if hasattr(matrix, "to_memory"):  # sparse matrix of a backed AnnData
        matrix = matrix.to_memory()
    elif hasattr(matrix, "compute"):  # dask array
        matrix = matrix.compute()
    if np.dtype(matrix.dtype).kind not in "biuf":
        raise DataError(f"`{slot}` has dtype {matrix.dtype}, expected numbers", fix="convert it to float32.")
    if not sparse.issparse(matrix):
        return _dense_to_csr(matrix)
    if matrix.format not in ("csr", "csc"):
        raise DataError(
            f"`{slot}` is a sparse matrix of format {matrix.format!r}, expected 'csr' or 'csc'",
            fix=f"adata.{slot} = adata.{slot}.tocsr()",
        )
    _check_structure(matrix, slot=slot)
    return _share(matrix if matrix.format == "csr" else matrix.tocsr())


def _share(matrix: Any) -> sparse.csr_matrix:
    """Wrap the arrays of a CSR matrix in a new object, so that scipy sets no flags on the original."""
    # The constructor would copy 64-bit indices to 32 bit; assigning the arrays does not.
    shared = sparse.csr_matrix(matrix.shape, dtype=matrix.dtype)
    size = int(matrix.indptr[-1])
    # Room behind the last entry may hold anything, and scipy's column indexing reads it as entries.
    shared.data = matrix.data if len(matrix.data) == size else matrix.data[:size]
    shared.indices = matrix.indices if len(matrix.indices) == size else matrix.indices[:size]
    shared.indptr = matrix.indptr
    return shared


def _dense_to_csr(matrix: Any) -> sparse.csr_matrix:
    """Convert a dense array or HDF5 data set to CSR, a block of rows at a time."""
    n_obs, n_vars = matrix.shape
    dtype = np.dtype(np.float32) if matrix.dtype == np.float16 else matrix.dtype  # scipy has no sparse float16
    step = max(1, _CHUNK_VALUES // max(n_vars, 1))
    blocks = [
        sparse.csr_matrix(np.asarray(matrix[start : start + step]), dtype=dtype) for start in range(0, n_obs, step)
    ]
    if not blocks:
        return sparse.csr_matrix((n_obs, n_vars), dtype=dtype)
    return blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")


def _check_structure(matrix: Any, *, slot: str) -> None:
    """Refuse a CSR or CSC matrix whose indices would make compiled code read outside of its arrays."""
    n_major, n_minor = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    indptr, indices = matrix.indptr, matrix.indices
    fix = "read the matrix again from its source; this one was damaged when it was built or stored."
    if len(indptr) != n_major + 1 or indptr[0] != 0:
        raise DataError(
            f"`{slot}`.indptr has length {len(indptr)} and starts at {indptr[:1].tolist()}, "
            f"expected length {n_major + 1} and start 0",
            fix=fix,
        )
    decreasing = np.flatnonzero(indptr[1:] < indptr[:-1])
    if len(decreasing):
        raise DataError(
            f"`{slot}`.indptr decreases at {len(decreasing)} places, first after position {decreasing[0]}",
            fix=fix,
        )
    if indptr[-1] > min(len(indices), len(matrix.data)):
        raise DataError(
            f"`{slot}`.indptr ends at {indptr[-1]}, but there are {len(indices)} indices and {len(matrix.data)} values",
            fix=fix,
        )
    for start, stop in _chunks(int(indptr[-1])):
        chunk = indices[start:stop]
        if chunk.min() < 0 or chunk.max() >= n_minor:
            bad = np.flatnonzero((chunk < 0) | (chunk >= n_minor))
            raise DataError(
                f"`{slot}`.indices has {len(bad)} or more values outside of 0..{n_minor - 1}, "
                f"first {chunk[bad[0]]} at position {start + bad[0]}",
                fix=fix,
            )


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive chunks that cover ``range(size)``."""
    for start in range(0, size, _CHUNK_VALUES):
        yield start, min(start + _CHUNK_VALUES, size)


@dataclass
class _Offence:
    """Values of one kind that are not counts: how many, and where the first is stored."""

    n: int = 0
    first: int = -1

    def add(self, bad: NDArray[np.bool_], *, start: int) -> None:
        """Add the marked values of the chunk that begins at stored value ``start``."""
        n = int(np.count_nonzero(bad))
        if n and not self.n:
            self.first = start + int(bad.argmax())
        self.n += n


@dataclass
class _Scan:
    """What a pass over all stored values has found."""

    invalid: _Offence
    negative: _Offence
    fractional: _Offence
    n_values: int
    largest: float
    largest_deviation: float

    @property
    def is_counts(self) -> bool:
        """Whether every stored value is a whole number, zero or positive."""
        return not (self.invalid.n or self.negative.n or self.fractional.n)


def _scan(values: NDArray[Any]) -> _Scan:
    """Look at every stored value once, in chunks."""
    scan = _Scan(_Offence(), _Offence(), _Offence(), n_values=len(values), largest=0.0, largest_deviation=0.0)
    if values.dtype.kind in "bu":
        return scan
    for start, stop in _chunks(len(values)):
        chunk = values[start:stop]
        if chunk.dtype.kind == "f":
            valid = np.abs(chunk) <= _LARGEST_COUNT  # false for NaN
            scan.invalid.add(~valid, start=start)
            chunk = np.where(valid, chunk, 0)
            deviation = np.abs(chunk - np.rint(chunk))
            scan.fractional.add(deviation > 0, start=start)
            scan.largest_deviation = max(scan.largest_deviation, float(deviation.max()))
        scan.negative.add(chunk < 0, start=start)
        scan.largest = max(scan.largest, float(chunk.max()))
    return scan


def check_counts(matrix: sparse.csr_matrix, *, slot: str, adata: AnnData) -> None:
    """Refuse a matrix that does not hold counts, naming what it seems to hold instead.

    All stored values are looked at, in chunks; nothing is sampled.

    Parameters
    ----------
    matrix
        Matrix of shape ``(n_obs, n_vars)``, as :func:`read_counts` returns it.
    slot
        Where it comes from, as :func:`slot_name` spells it.
    adata
        The AnnData it comes from; used for the names in messages and to find counts in another slot.

    Raises
    ------
    DataError
        If there are no cells or no genes, if the sparse structure is damaged, or if a value is NaN, infinite,
        negative or fractional.
    """
    n_obs, n_vars = matrix.shape
    if n_obs == 0 or n_vars == 0:
        raise DataError(
            f"`{slot}` has {n_obs} cells and {n_vars} genes, expected at least one of each",
            fix="check the filters that were applied to `adata`.",
        )
    _check_structure(matrix, slot=slot)
    scan = _scan(matrix.data[: matrix.indptr[-1]])
    if scan.is_counts:
        return
    offence, what = _worst(scan)
    first = _describe(matrix, offence.first, adata=adata)
    raise DataError(
        f"`{slot}` holds {offence.n} {what} among {scan.n_values} stored values, expected counts; "
        f"the first is {first}. {_guess(scan)}",
        fix=_fix(scan, slot=slot, adata=adata),
    )


def _worst(scan: _Scan) -> tuple[_Offence, str]:
    """Pick the kind of offence to report, with its name in the singular or plural."""
    kinds = (
        (scan.invalid, "NaN, infinite or over-large (> 2^53) value"),
        (scan.negative, "negative value"),
        (scan.fractional, "fractional value"),
    )
    offence, what = next(kind for kind in kinds if kind[0].n)
    return offence, what if offence.n == 1 else what + "s"


def _describe(matrix: sparse.csr_matrix, position: int, *, adata: AnnData) -> str:
    """Value, cell and gene of a stored value."""
    row = int(np.searchsorted(matrix.indptr, position, side="right")) - 1
    column = int(matrix.indices[position])
    value = matrix.data[position].item()
    return f"{value:.6g} in cell {str(adata.obs_names[row])!r}, gene {str(adata.var_names[column])!r}"


def _guess(scan: _Scan) -> str:
    """Say in words what values that are not counts look like."""
    if scan.invalid.n:
        return "Counts are never missing or infinite."
    if scan.negative.n and scan.fractional.n:
        return "It looks scaled (z-scored) or otherwise centred."
    if scan.negative.n:
        return "Counts are never negative: something was subtracted, or an integer type overflowed."
    if scan.largest_deviation <= _NOISE:
        return f"It looks like counts with rounding noise (at most {scan.largest_deviation:.1g} off)."
    if scan.largest < 20:
        return f"It looks log-normalised (largest value {scan.largest:.4g})."
    if scan.fractional.n < scan.n_values / 2:
        return "Most values are whole: it looks like corrected counts (CellBender, SoupX, RSEM, Alevin)."
    return f"It looks normalised without log: FPKM, TPM or CPM (largest value {scan.largest:.4g})."


def _fix(scan: _Scan, *, slot: str, adata: AnnData) -> str:
    """Say where counts are, or how to make them."""
    found = _find_counts(adata, skip=slot)
    if found is not None:
        return found
    if scan.invalid.n:
        return "remove the cells or genes that hold these values, or set the values to 0 if they mean no count."
    noise = scan.largest_deviation <= _NOISE
    if scan.negative.n or not (noise or scan.fractional.n < scan.n_values / 2):
        return "load the raw counts, e.g. into adata.layers['counts'], and pass layer='counts'."
    return f"round explicitly: adata.layers['counts'] = np.rint(adata.{slot}), and pass layer='counts'."


def _find_counts(adata: AnnData, *, skip: str) -> str | None:
    """Tell how to use another slot that holds counts; None if there is none."""
    for layer in adata.layers:
        if slot_name(layer) != skip and _holds_counts(adata.layers[layer]):
            return f"`layers[{layer!r}]` holds counts: pass layer={layer!r}."
    if skip != "X" and _holds_counts(adata.X):
        return "`X` holds counts: pass layer=None."
    raw = adata.raw
    if raw is not None and adata.var_names.isin(raw.var_names).all() and _holds_counts(raw.X):
        copied = "adata.layers['counts'] = adata.raw[:, adata.var_names].X"
        return f"`.raw` holds counts: {copied}, and pass layer='counts'."
    return None


def _holds_counts(matrix: Any) -> bool:
    """Whether a matrix can be read, has a value other than zero, and holds only counts."""
    try:
        values = _as_csr(matrix, slot="X")
    except DataError:
        return False
    scan = _scan(values.data)
    return scan.is_counts and bool(values.data.any())


def panel_counts(matrix: sparse.csr_matrix, columns: NDArray[np.int64]) -> PanelCounts:
    """Restrict counts to a gene panel, in canonical order.

    Entries that are stored twice are added up, and explicit zeros are dropped. The result depends only on the
    counts of the panel genes, bit for bit: not on the order of the genes in ``matrix`` nor on other genes.

    Parameters
    ----------
    matrix
        Counts of shape ``(n_obs, n_vars)``, not changed.
    columns
        For each panel gene its column of ``matrix``, or -1 if it is absent, shape ``(n_genes,)``.

    Returns
    -------
    Counts of ``n_obs`` cells over ``len(columns)`` genes; an absent gene has no entry.

    Raises
    ------
    DataError
        If a column is used twice or does not exist.
    """
    columns = np.asarray(columns, dtype=np.int64)
    positions = np.flatnonzero(columns >= 0)
    present = columns[positions]
    if len(np.unique(present)) != len(present) or (len(present) and present.max() >= matrix.shape[1]):
        raise DataError(
            f"`columns` must hold distinct columns below {matrix.shape[1]}, or -1",
            fix="take them from match_genes or select_panel.",
        )
    matrix = _share(matrix)
    panel = matrix[:, present]
    if np.may_share_memory(panel.data, matrix.data) or np.may_share_memory(panel.indices, matrix.indices):
        panel = panel.copy()  # the next steps work in place
    panel.data = panel.data.astype(np.float32, copy=False)
    panel.sum_duplicates()
    panel.eliminate_zeros()
    return PanelCounts(
        indptr=panel.indptr.astype(np.int64),
        indices=positions.astype(np.int32)[panel.indices],
        data=panel.data,
        n_genes=len(columns),
    )
