"""Rows of a matrix, as CSR, whatever holds the matrix: numpy, scipy, dask, an HDF5 file or a zarr store.

Compiled code trusts the structure of a sparse matrix, and crashes where it is wrong. So it is checked here, before
anything is done with it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from genejepa.errors import DataError, DataWarning

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK_VALUES = 1 << 22
"""Values read in one step: 32 MiB of float64, so that a scan needs little memory."""

_COLUMN_BLOCK_VALUES = 1 << 24
"""The same for a file that is stored by columns: every block of rows needs a pass over the file."""

_DAMAGED = "read the matrix again from its source; this one was damaged when it was built or stored."


class Rows(ABC):
    """Reads rows of a matrix.

    Attributes
    ----------
    name
        Slot of the matrix, for messages.
    shape, dtype
        Of the matrix, as it is stored.
    shared
        Whether rows are in memory and given without a copy.
    block_rows
        Rows to read in one step.
    """

    shared = False

    def __init__(self, name: str, shape: tuple[int, int], dtype: np.dtype[Any], *, block_rows: int) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.block_rows = block_rows

    @abstractmethod
    def between(self, start: int, stop: int) -> sparse.csr_matrix:
        """Rows ``start`` to ``stop``. They may share memory with the matrix and must not be written to."""

    def at(self, positions: NDArray[np.int64]) -> sparse.csr_matrix:
        """Rows at ``positions``, in any order, by reading runs of neighbouring rows."""
        if not len(positions):
            return self.between(0, 0)
        order = np.argsort(positions, kind="stable")
        ordered = positions[order]
        ends = np.flatnonzero(np.diff(ordered // self.block_rows)) + 1
        runs = [self.between(run[0], run[-1] + 1)[run - run[0]] for run in np.split(ordered, ends)]
        return sparse.vstack(runs, format="csr")[np.argsort(order)]


class _Dense(Rows):
    """A numpy array."""

    def __init__(self, name: str, matrix: NDArray[Any]) -> None:
        super().__init__(
            name, matrix.shape, matrix.dtype, block_rows=_average_rows(matrix.shape[0], matrix.size, _BLOCK_VALUES)
        )
        self.matrix = np.asarray(matrix)

    def between(self, start: int, stop: int) -> sparse.csr_matrix:
        return _dense_rows(self.matrix[start:stop])

    def at(self, positions: NDArray[np.int64]) -> sparse.csr_matrix:
        return _dense_rows(self.matrix[positions])


class _Sparse(Rows):
    """A CSR matrix in memory, of checked structure."""

    shared = True

    def __init__(self, name: str, matrix: sparse.csr_matrix, *, dtype: np.dtype[Any]) -> None:
        super().__init__(
            name, matrix.shape, dtype, block_rows=_average_rows(matrix.shape[0], matrix.nnz, _BLOCK_VALUES)
        )
        self.matrix = matrix

    def between(self, start: int, stop: int) -> sparse.csr_matrix:
        m = self.matrix
        first, last = m.indptr[start], m.indptr[stop]
        return csr_of(
            (stop - start, self.shape[1]), m.data[first:last], m.indices[first:last], m.indptr[start : stop + 1] - first
        )

    def at(self, positions: NDArray[np.int64]) -> sparse.csr_matrix:
        return self.matrix[positions]


class _Dask(Rows):
    """A dask array of dense or sparse chunks, computed in this thread, a chunk after the other."""

    def __init__(self, name: str, matrix: Any) -> None:
        super().__init__(name, matrix.shape, matrix.dtype, block_rows=max(1, matrix.chunksize[0]))
        self.matrix = matrix

    def between(self, start: int, stop: int) -> sparse.csr_matrix:
        block = self.matrix[start:stop].compute(scheduler="synchronous")
        return _checked_csr(block, name=self.name) if sparse.issparse(block) else _dense_rows(block)


class _StoredDense(Rows):
    """A data set of an HDF5 file or a zarr store."""

    def __init__(self, name: str, matrix: Any) -> None:
        shape = matrix.shape if len(matrix.shape) != 1 else (matrix.shape[0], 1)
        super().__init__(name, shape, matrix.dtype, block_rows=_average_rows(shape[0], matrix.size, _BLOCK_VALUES))
        self.matrix = matrix

    def between(self, start: int, stop: int) -> sparse.csr_matrix:
        return _dense_rows(np.asarray(self.matrix[start:stop]).reshape(stop - start, self.shape[1]))


class _StoredSparse(Rows):
    """A sparse matrix of an HDF5 file or a zarr store; only the row or column boundaries are kept in memory."""

    def __init__(self, name: str, matrix: Any) -> None:
        self.by_rows = matrix.format == "csr"
        self.indices, self.data = matrix.group["indices"], matrix.group["data"]
        self.indptr = np.asarray(matrix.group["indptr"][...])
        n_obs, n_vars = matrix.shape
        _check_indptr(self.indptr, n_obs if self.by_rows else n_vars, self.indices, self.data, name=name)
        n_wanted = _BLOCK_VALUES if self.by_rows else _COLUMN_BLOCK_VALUES
        block_rows = _average_rows(n_obs, int(self.indptr[-1]), n_wanted)
        super().__init__(name, (n_obs, n_vars), self.data.dtype, block_rows=block_rows)

    def between(self, start: int, stop: int) -> sparse.csr_matrix:
        return self._read_rows(start, stop) if self.by_rows else self._pick_rows(start, stop)

    def _read_rows(self, start: int, stop: int) -> sparse.csr_matrix:
        indices, data = self._entries(start, stop, n_minor=self.shape[1])
        indptr = self.indptr[start : stop + 1] - self.indptr[start]
        return csr_of((stop - start, self.shape[1]), data, indices, indptr)

    def _pick_rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Rows of a matrix that is stored by columns, by going through all of it."""
        n_vars = self.shape[1]
        step = _average_rows(n_vars, int(self.indptr[-1]), _BLOCK_VALUES)
        empty = np.empty(0, dtype=np.int64)
        parts: list[tuple[NDArray[Any], ...]] = [(empty, empty, np.empty(0, dtype=_native(self.dtype)))]
        for first in range(0, n_vars, step):
            last = min(first + step, n_vars)
            rows, data = self._entries(first, last, n_minor=self.shape[0])
            wanted = (rows >= start) & (rows < stop)
            columns = np.repeat(np.arange(first, last), np.diff(self.indptr[first : last + 1]))
            parts.append((rows[wanted] - start, columns[wanted], data[wanted]))
        rows, columns, data = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(rows, kind="stable")
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=stop - start))])
        return csr_of((stop - start, n_vars), data[order], columns[order], indptr)

    def _entries(self, first: int, last: int, *, n_minor: int) -> tuple[NDArray[np.integer], NDArray[Any]]:
        """Indices and values of some rows of a CSR, or columns of a CSC matrix."""
        span = slice(int(self.indptr[first]), int(self.indptr[last]))
        indices, data = np.asarray(self.indices[span]), np.asarray(self.data[span])
        _check_indices(indices, n_minor, name=self.name, offset=span.start)
        return indices, data.astype(_native(data.dtype), copy=False)


def open_rows(matrix: Any, *, name: str) -> Rows:
    """Open any matrix that an AnnData can hold.

    Parameters
    ----------
    matrix
        Matrix of numbers. Not changed.
    name
        Slot of the matrix, for messages.

    Raises
    ------
    DataError
        If it is not a matrix of real numbers, has masked entries, is sparse in another format than CSR or CSC, or has
        a damaged sparse structure.

    Warns
    -----
    DataWarning
        If the numbers are stored as Python objects.
    """
    library = type(matrix).__module__.partition(".")[0]
    if sparse.issparse(matrix):
        csr = _checked_csr(matrix, name=name)
        return _Sparse(name, csr, dtype=csr.dtype)
    if hasattr(matrix, "group") and hasattr(matrix, "format"):  # as anndata.io.sparse_dataset gives it
        rows: Rows = _StoredSparse(name, matrix)
    elif library == "dask":
        rows = _Dask(name, matrix)
    elif library in ("h5py", "zarr"):
        rows = _StoredDense(name, matrix)
    else:
        rows = _Dense(name, _as_array(matrix, name=name))
    _check_dtype(rows.dtype, name=name)
    return rows


def csr_of(
    shape: tuple[int, int], data: NDArray[Any], indices: NDArray[np.integer], indptr: NDArray[np.integer]
) -> sparse.csr_matrix:
    """CSR matrix of these very arrays: nothing is copied, and scipy sets no flags on another matrix."""
    # The constructor would copy 64-bit indices to 32 bit; assigning the arrays does not.
    matrix = sparse.csr_matrix(shape, dtype=data.dtype)
    matrix.data, matrix.indices, matrix.indptr = data, _as_index(indices), _as_index(indptr)
    return matrix


def _as_index(array: NDArray[np.integer]) -> NDArray[np.integer]:
    """Scipy's compiled code knows two types of indices."""
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


def _average_rows(n_rows: int, n_values: int, n_wanted: int) -> int:
    """How many rows hold ``n_wanted`` of the values on average, at least 1."""
    return max(1, n_wanted * n_rows // max(n_values, 1))


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Type to compute in: scipy has no sparse float16, and none of foreign byte order."""
    if dtype.kind == "f" and dtype.itemsize not in (4, 8):
        return np.dtype(np.float32 if dtype.itemsize == 2 else np.float64)
    return dtype.newbyteorder("=")


def _check_dtype(dtype: np.dtype[Any], *, name: str) -> None:
    """Refuse what is not real numbers."""
    if np.dtype(dtype).kind not in "biuf":
        raise DataError(
            f"`{name}` has dtype {dtype}, expected numbers", fix=f"adata.{name} = adata.{name}.astype('float32')"
        )


def _as_array(matrix: Any, *, name: str) -> NDArray[Any]:
    """Numpy array of at least one dimension less than a matrix needs: anndata may give one gene as a vector."""
    try:
        array = np.asanyarray(matrix)
    except Exception as error:
        raise DataError(
            f"`{name}` is a {type(matrix).__name__}, which numpy cannot read: {error}",
            fix=f"adata.{name} = adata.{name}.get()"
            if hasattr(matrix, "get")
            else f"adata.{name} = scipy.sparse.csr_matrix(...), or a numpy array.",
        ) from error
    if np.ma.is_masked(array):
        raise DataError(
            f"`{name}` has {int(np.ma.getmaskarray(array).sum())} masked entries, expected a plain array",
            fix=f"adata.{name} = adata.{name}.filled(0), if a masked entry means no count.",
        )
    return _numbers(array.reshape(-1, 1) if array.ndim == 1 else array, name=name)


def _numbers(values: NDArray[Any], *, name: str) -> NDArray[Any]:
    """Numbers of an array of Python objects, as float64; other arrays as they are."""
    if values.dtype != object:
        return values
    try:
        if any(isinstance(value, str | bytes) for value in values.flat):
            raise TypeError("there is text among them")
        numbers: NDArray[Any] = values.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"`{name}` has dtype object, and its values are not all numbers: {error}",
            fix=f"adata.{name} = adata.{name}.astype('float32'), after text and missing values are replaced.",
        ) from error
    warnings.warn(
        f"`{name}` holds numbers as Python objects; they are read as float64. "
        f"Faster: adata.{name} = adata.{name}.astype('float32').",
        DataWarning,
        stacklevel=2,
    )
    return numbers


def _dense_rows(block: NDArray[Any]) -> sparse.csr_matrix:
    """CSR of a block of a dense matrix."""
    values = np.asarray(block)
    return sparse.csr_matrix(values.astype(_native(values.dtype), copy=False))


def _checked_csr(matrix: Any, *, name: str) -> sparse.csr_matrix:
    """CSR of a sparse matrix in memory, of the same arrays where it is CSR already."""
    if matrix.format not in ("csr", "csc"):
        raise DataError(
            f"`{name}` is a sparse matrix of format {matrix.format!r}, expected 'csr' or 'csc'",
            fix=f"adata.{name} = adata.{name}.tocsr()",
        )
    n_major, n_minor = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    _check_indptr(matrix.indptr, n_major, matrix.indices, matrix.data, name=name)
    size = int(matrix.indptr[-1])
    # Room behind the last entry may hold anything, and scipy's column indexing reads it as entries.
    indices, data = (array if len(array) == size else array[:size] for array in (matrix.indices, matrix.data))
    for start in range(0, size, _BLOCK_VALUES):
        _check_indices(indices[start : start + _BLOCK_VALUES], n_minor, name=name, offset=start)
    data = _numbers(data, name=name)
    _check_dtype(data.dtype, name=name)
    major = csr_of((n_major, n_minor), data.astype(_native(data.dtype), copy=False), indices, matrix.indptr)
    # The transpose of a CSC matrix is a CSR matrix of the same arrays.
    return major if matrix.format == "csr" else major.T.tocsr()


def _check_indptr(indptr: NDArray[Any], n_major: int, indices: Any, data: Any, *, name: str) -> None:
    """Refuse row (or column) boundaries that lie outside of the arrays."""
    if indptr.dtype.kind not in "iu" or indices.dtype.kind not in "iu":
        raise DataError(
            f"`{name}`.indptr and .indices have dtypes {indptr.dtype} and {indices.dtype}, expected integers",
            fix=_DAMAGED,
        )
    if len(indptr) != n_major + 1 or indptr[0] != 0:
        raise DataError(
            f"`{name}`.indptr has length {len(indptr)} and starts at {indptr[:1].tolist()}, "
            f"expected length {n_major + 1} and start 0",
            fix=_DAMAGED,
        )
    decreasing = np.flatnonzero(indptr[1:] < indptr[:-1])
    if len(decreasing):
        raise DataError(
            f"`{name}`.indptr decreases at {len(decreasing)} places, first after position {decreasing[0]}",
            fix=_DAMAGED,
        )
    n_indices, n_values = indices.shape[0], data.shape[0]
    if indptr[-1] > min(n_indices, n_values):
        raise DataError(
            f"`{name}`.indptr ends at {indptr[-1]}, but there are {n_indices} indices and {n_values} values",
            fix=_DAMAGED,
        )


def _check_indices(indices: NDArray[Any], n_minor: int, *, name: str, offset: int) -> None:
    """Refuse column (or row) indices that do not exist; ``offset`` is the position of the first one."""
    if len(indices) and (indices.min() < 0 or indices.max() >= n_minor):
        bad = np.flatnonzero((indices < 0) | (indices >= n_minor))
        raise DataError(
            f"`{name}`.indices has {len(bad)} or more values outside of 0..{n_minor - 1}, "
            f"first {indices[bad[0]]} at position {offset + bad[0]}",
            fix=_DAMAGED,
        )
