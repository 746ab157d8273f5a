"""Rows 54 to 84 of the catalogue of bad input: what holds the matrix, and types of numbers."""

from __future__ import annotations

import hashlib
import pickle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import genejepa
from genejepa.data.containers import _Dense
from genejepa.data.counts import check_counts, open_counts, panel_counts
from genejepa.data.inputs import as_anndata
from genejepa.data.slots import CountSlot
from genejepa.errors import DataError, DataWarning, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

N_OBS, N_VARS = 30, 17
X = CountSlot()


def dense_counts() -> NDArray[np.float32]:
    """Counts with an empty cell and an empty gene."""
    values = np.random.default_rng(0).poisson(1.5, size=(N_OBS, N_VARS)).astype(np.float32)
    values[3] = 0
    values[:, 5] = 0
    return values


def adata_of(matrix: Any) -> anndata.AnnData:
    """AnnData with this very matrix: ``AnnData(...)`` refuses or converts some."""
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_OBS)])
    adata = anndata.AnnData(
        np.zeros((N_OBS, N_VARS)), obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(N_VARS)])
    )
    adata._X = matrix
    return adata


def matrix_bytes(matrix: Any) -> bytes:
    """Stored arrays of a matrix, with their types and memory layout."""
    if matrix is None:
        return b"none"
    arrays = [matrix.data, matrix.indices, matrix.indptr] if sparse.issparse(matrix) else [np.asarray(matrix)]
    layout = [(type(matrix).__name__, a.dtype.str, a.shape, a.strides, a.flags.writeable) for a in arrays]
    return repr(layout).encode() + b"".join(a.tobytes() for a in arrays)


def fingerprint(adata: anndata.AnnData) -> str:
    """Hash of everything in an AnnData."""
    parts = [matrix_bytes(adata.X), *(k.encode() + matrix_bytes(v) for k, v in sorted(adata.layers.items()))]
    parts += [pickle.dumps(adata.obs), pickle.dumps(adata.var), repr(dict(adata.uns)).encode()]
    parts += [repr((sorted(adata.obsm), sorted(adata.varm), sorted(adata.obsp), adata.is_view)).encode()]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def strided(values: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = np.zeros((2 * values.shape[0], 3 * values.shape[1]), dtype=np.float32)
    wide[::-2, ::3] = values
    return wide[::-2, ::3]


def read_only(values: Any) -> Any:
    values = values.copy()
    for array in [values.data, values.indices, values.indptr] if sparse.issparse(values) else [values]:
        array.setflags(write=False)
    return values


def memory_mapped(values: NDArray[np.float32]) -> Any:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(values.tobytes())
        file.flush()
        return np.memmap(file.name, dtype=np.float32, mode="r", shape=values.shape)


def messy(values: NDArray[np.float32]) -> sparse.csr_matrix:
    """The same counts as CSR with unsorted indices, repeated entries, explicit zeros and spare room."""
    rng = np.random.default_rng(1)
    indptr, indices, data = [0], [], []
    for row in values:
        entries = [(j, v) for j, v in enumerate(row) if v] + [(0, 0.0), (7, 0.0)]
        entries += [(j, 1.0) for j, v in entries if v > 1]
        entries = [(j, v - 1 if v > 1 else v) for j, v in entries]
        order = rng.permutation(len(entries))
        indices += [entries[k][0] for k in order]
        data += [entries[k][1] for k in order]
        indptr.append(len(indices))
    matrix = sparse.csr_matrix(values.shape, dtype=np.float32)
    matrix.indptr = np.array(indptr, dtype=np.int64)
    matrix.indices = np.array([*indices, 99, 99], dtype=np.int64)
    matrix.data = np.array([*data, np.nan, -1], dtype=np.float32)
    np.testing.assert_array_equal(matrix.toarray(), values)
    return matrix


def long_indices(values: NDArray[np.float32]) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix(values)
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    return matrix


CONTAINERS: dict[str, Callable[[NDArray[np.float32]], Any]] = {
    "row 54: dense, C": np.ascontiguousarray,
    "row 54: dense, F": np.asfortranarray,
    "row 54: dense, strided, negative": strided,
    "row 55: csr_matrix": sparse.csr_matrix,
    "row 56: csc_matrix": sparse.csc_matrix,
    "row 57: csr_array": sparse.csr_array,
    "row 57: csc_array": sparse.csc_array,
    "row 59: np.matrix": np.asmatrix,
    "row 60: masked, without a mask": lambda x: np.ma.MaskedArray(x, mask=np.zeros_like(x, dtype=bool)),
    "row 68: int8": lambda x: x.astype(np.int8),
    "row 68: int16, csr": lambda x: sparse.csr_matrix(x.astype(np.int16)),
    "row 68: int32": lambda x: x.astype(np.int32),
    "row 68: int64, csc": lambda x: sparse.csc_matrix(x.astype(np.int64)),
    "row 68: uint8": lambda x: x.astype(np.uint8),
    "row 68: uint16": lambda x: x.astype(np.uint16),
    "row 68: uint32, csr": lambda x: sparse.csr_matrix(x.astype(np.uint32)),
    "row 68: uint64": lambda x: x.astype(np.uint64),
    "row 69: float16": lambda x: x.astype(np.float16),
    "row 70: float64": lambda x: x.astype(np.float64),
    "row 70: long double": lambda x: x.astype(np.longdouble),
    "row 70: long double, csc": lambda x: sparse.csc_matrix(x.astype(np.longdouble)),
    "row 71: big-endian floats": lambda x: x.astype(">f4"),
    "row 71: big-endian integers": lambda x: x.astype(">i4"),
    "row 77: read-only": read_only,
    "row 77: read-only csr": lambda x: read_only(sparse.csr_matrix(x)),
    "row 77: read-only csc": lambda x: read_only(sparse.csc_matrix(x)),
    "row 77: memory map": memory_mapped,
    "rows 78-80: explicit zeros, unsorted, repeated": messy,
    "row 82: int64 indices": long_indices,
}


# anndata warns of a layer that is a np.matrix, wherever it is read.
SLOTS = [
    (name, slot)
    for name in CONTAINERS
    for slot in ("X", "layer", "raw", "view")
    if (name, slot) != ("row 59: np.matrix", "layer")
]


def panel_of(adata: anndata.AnnData, slot: CountSlot = X) -> Any:
    counts = check_counts(open_counts(adata, slot), adata=adata)
    matrix = counts.to_csr()
    assert isinstance(matrix, sparse.csr_matrix)
    assert matrix.shape == counts.shape == (adata.n_obs, adata.n_vars)
    assert sum(
        len(panel_counts(b, np.arange(b.shape[1]), b.shape[1]).data) for _, b in counts.blocks()
    ) == np.count_nonzero(matrix.toarray())
    return panel_counts(matrix, np.arange(matrix.shape[1]), matrix.shape[1])


def assert_same_panel(one: Any, other: Any) -> None:
    for name in ("indptr", "indices", "data"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert one.n_genes == other.n_genes


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(("name", "slot"), SLOTS)
def test_every_container_gives_the_same_panel_and_is_not_changed(
    name: str, slot: str, global_rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    adata, place = adata_of(CONTAINERS[name](dense_counts())), X
    if slot == "layer":
        place = CountSlot("counts")
        adata.layers._data["counts"] = adata.X
    if slot == "raw":
        place = CountSlot(use_raw=True)
        adata.raw = adata
    if slot in ("layer", "raw"):
        adata._X = np.zeros((N_OBS, N_VARS), dtype=np.float32)
    whole = adata
    if slot == "view":
        adata = adata[np.arange(N_OBS), np.arange(N_VARS)]
    before = fingerprint(whole)
    with global_rng_untouched():
        panel = panel_of(adata, place)
    assert_same_panel(panel, panel_of(adata_of(sparse.csr_matrix(dense_counts()))))
    assert fingerprint(whole) == before
    assert adata.is_view == (slot == "view")


@pytest.fixture(scope="module")
def cells(make_adata: Callable[..., anndata.AnnData]) -> anndata.AnnData:
    return make_adata()


@pytest.fixture(scope="module")
def model(cells: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]) -> genejepa.GeneJEPA:
    trained = genejepa.GeneJEPA(cells, **tiny_settings)
    trained.train(**tiny_training)
    return trained


@pytest.fixture(scope="module")
def vectors(model: genejepa.GeneJEPA, cells: anndata.AnnData) -> NDArray[np.float32]:
    return model.get_latent_representation(cells)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_vectors(
    name: str, model: genejepa.GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32]
) -> None:
    adata = cells.copy()
    adata._X = CONTAINERS[name](cells.X.toarray())
    np.testing.assert_array_equal(model.get_latent_representation(adata), vectors)


@pytest.fixture(params=["csr_matrix", "csc_matrix", "dense"])
def stored(request: pytest.FixtureRequest, cells: anndata.AnnData, tmp_path: Path) -> Path:
    """The cells as h5ad and zarr, with their counts in a layer and raw too, and something else in them."""
    adata = cells.copy()
    adata.X = adata.X.toarray() if request.param == "dense" else getattr(sparse, request.param)(adata.X)
    adata.layers["counts"] = adata.X
    adata.raw = adata
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def backed(stored: Path) -> Iterator[anndata.AnnData]:
    adata = anndata.read_h5ad(stored, backed="r")
    yield adata
    adata.file.close()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in blocks of a few cells."""
    monkeypatch.setattr("genejepa.data.containers._BLOCK_VALUES", 500)
    monkeypatch.setattr("genejepa.data.containers._COLUMN_BLOCK_VALUES", 700)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mode", ["r", "r+"], ids=["row 63: backed r", "row 64: backed r+"])
def test_backed(
    mode: str, stored: Path, model: genejepa.GeneJEPA, vectors: NDArray[np.float32], tiny_settings: Any
) -> None:
    content = stored.read_bytes()
    adata = anndata.read_h5ad(stored, backed=mode)
    for options in ({}, {"layer": "counts"}, {"use_raw": True}):
        np.testing.assert_array_equal(model.get_latent_representation(adata, **options), vectors)
    assert len(list(open_counts(adata, X).blocks())) > 2
    assert genejepa.GeneJEPA(adata, **tiny_settings).genes == model.genes
    model.embed(adata)
    np.testing.assert_array_equal(adata.obsm["X_genejepa"], vectors)
    assert adata.isbacked
    adata.file.close()
    assert stored.read_bytes() == content


@pytest.mark.usefixtures("small_blocks")
def test_view_of_backed(backed: anndata.AnnData, model: genejepa.GeneJEPA, vectors: NDArray[np.float32]) -> None:
    """Row 67: can be read in any order, in blocks; cannot be written to."""
    order = np.random.default_rng(0).permutation(60)[:41]
    genes = np.random.default_rng(1).permutation(80)
    for index in (order, slice(5, 50), np.arange(60) % 3 == 0):
        np.testing.assert_array_equal(model.get_latent_representation(backed[index]), vectors[index])
    np.testing.assert_array_equal(model.get_latent_representation(backed[order, genes]), vectors[order])
    np.testing.assert_array_equal(model.get_latent_representation(backed[order], use_raw=True), vectors[order])
    with pytest.raises(DataError, match=r"(?s)view.*\nFix: .*to_memory"):
        model.embed(backed[order])


def test_view_in_memory(model: genejepa.GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32]) -> None:
    """Row 66: embedding a view makes it a copy, without a warning, and leaves the whole as it is."""
    before = fingerprint(cells)
    view = cells[10:30, ::-1]
    np.testing.assert_array_equal(model.get_latent_representation(view), vectors[10:30])
    assert view.is_view
    model.embed(view)
    np.testing.assert_array_equal(view.obsm["X_genejepa"], vectors[10:30])
    assert fingerprint(cells) == before


def test_file_that_is_gone(stored: Path) -> None:
    """Row 65: an error that names the file."""
    backed = anndata.read_h5ad(stored, backed="r")
    counts = open_counts(backed, X)
    backed.file.close()
    with pytest.raises(DataError, match=rf"`X` of {stored} cannot be read"):
        counts.rows(0, 5)
    stored.unlink()
    with pytest.raises(DataError, match=rf"`X` of {stored} cannot be read"):
        open_counts(backed, X)


@pytest.mark.filterwarnings("ignore:zarr v3:UserWarning", "ignore:Consolidated metadata:UserWarning")
@pytest.mark.usefixtures("small_blocks")
def test_zarr(cells: anndata.AnnData, model: genejepa.GeneJEPA, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    """Row 62: arrays and sparse matrices of a zarr store are read block by block."""
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    group = zarr.open_group(tmp_path / "cells.zarr", mode="w")
    for name, matrix in (("csr", cells.X), ("csc", cells.X.tocsc()), ("dense", cells.X.toarray())):
        anndata.io.write_elem(group, name, matrix)
        stored = group[name] if name == "dense" else anndata.io.sparse_dataset(group[name])
        adata = anndata.AnnData(stored, obs=cells.obs, var=cells.var)
        assert len(list(open_counts(adata, X).blocks())) > 2
        np.testing.assert_array_equal(model.get_latent_representation(adata), vectors)
        np.testing.assert_array_equal(model.get_latent_representation(adata[7:31]), vectors[7:31])


@pytest.mark.parametrize("error", [EOFError("cut off"), IndexError(), TypeError("no chunk")], ids=repr)
@pytest.mark.parametrize("when", ["opened", "read"])
def test_whatever_a_container_raises(error: Exception, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 65: a chunk of a zarr store that is cut off, a mistake in a dask graph."""
    adata = adata_of(dense_counts())

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(*(("genejepa.data.counts.open_rows", fail) if when == "opened" else (_Dense, "between", fail)))
    message = rf"`X` cannot be read \(any more\): {str(error) or 'IndexError'}\nFix: "
    with pytest.raises(DataError, match=message) as caught:
        open_counts(adata, X).rows(0, 5)
    assert caught.value.__cause__ is error


def test_a_warning_that_is_an_error_stays_a_warning() -> None:
    adata = adata_of(dense_counts().astype(object))
    with pytest.raises(DataWarning, match="numbers as Python objects"):  # warnings are errors in these tests
        open_counts(adata, X)


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("genejepa.data.containers._Dense.between", lambda adata: open_counts(adata, X).rows(0, 5)),
        ("scipy.sparse.vstack", lambda adata: open_counts(adata, X).to_csr()),
        ("genejepa.data.counts._panel_rows", genejepa.GeneJEPA),
        ("genejepa.data.genes._expressed_genes", genejepa.GeneJEPA),
        ("torch.svd_lowrank", lambda adata: genejepa.GeneJEPA(adata[adata.X.any(1)]).train()),
    ],
    ids=["rows", "all rows", "panel", "choice of genes", "principal axes"],
)
def test_memory_that_runs_out(
    where: str, call: Callable[[anndata.AnnData], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("Unable to allocate 7 TiB.\nIt is much.")

    monkeypatch.setattr(where, fail)
    message = r"memory has run out while [\w `]+: Unable to allocate 7 TiB\.\nFix: \w+"
    with pytest.raises(OutOfMemoryError, match=message):
        call(adata_of(dense_counts()))


def test_lazily_read_tables() -> None:
    """Row 62: ``read_lazy`` leaves obs on disk; the error says how to read it."""
    adata: Any = SimpleNamespace(obs=SimpleNamespace(), var=pd.DataFrame(), X=None, is_view=False)
    with pytest.raises(DataError, match=r"`obs` is a SimpleNamespace, read lazily.*\nFix: adata = adata\.to_memory"):
        open_counts(adata, X)


@pytest.mark.parametrize("kind", ["dense", "csr_matrix", "csr_array"])
def test_dask(kind: str, model: genejepa.GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32]) -> None:
    """Row 61: dense and sparse chunks are computed one after the other."""
    dask_array = pytest.importorskip("dask.array", reason="dask is not installed")
    values = cells.X.toarray()
    lazy = dask_array.from_array(values, chunks=(17, 80))
    if kind != "dense":
        lazy = lazy.map_blocks(getattr(sparse, kind), dtype=values.dtype)
    adata = anndata.AnnData(lazy, obs=cells.obs, var=cells.var)
    assert len(list(open_counts(adata, X).blocks())) > 2
    np.testing.assert_array_equal(model.get_latent_representation(adata), vectors)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(model.get_latent_representation(adata[order]), vectors[order])


class _Unreadable:
    """Array of which numpy cannot make one."""

    shape, dtype = (N_OBS, N_VARS), np.dtype(np.float32)

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise RuntimeError("lost connection")


class _OnAnotherDevice(_Unreadable):
    def get(self) -> NDArray[Any]:
        return dense_counts()


def of_objects(value: object) -> NDArray[np.object_]:
    values = dense_counts().astype(object)
    values[2, 2] = value
    return values


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "row 58: coo": (lambda: sparse.coo_matrix(dense_counts()), r"format 'coo'.*\nFix: adata.X = adata.X.tocsr\(\)"),
    "row 58: lil": (lambda: sparse.lil_matrix(dense_counts()), "format 'lil'"),
    "row 58: dok": (lambda: sparse.dok_matrix(dense_counts()), "format 'dok'"),
    "row 58: bsr": (lambda: sparse.bsr_matrix(dense_counts()), "format 'bsr'"),
    "row 60: masked entries": (
        lambda: np.ma.MaskedArray(dense_counts(), mask=np.eye(N_OBS, N_VARS, dtype=bool)),
        rf"`X` has {N_VARS} masked entries, expected a plain array",
    ),
    "row 72: complex": (lambda: dense_counts().astype(np.complex64), "`X` has dtype complex64, expected numbers"),
    "row 72: complex, sparse": (lambda: sparse.csr_matrix(dense_counts().astype(complex)), "`X` has dtype complex128"),
    "row 73: text": (lambda: dense_counts().astype("U3"), "`X` has dtype <U3"),
    "row 73: text among numbers": (lambda: of_objects("7"), r"dtype object, .* not all numbers: there is text"),
    "row 73: things among numbers": (lambda: of_objects([1]), "dtype object, and its values are not all numbers"),
    "row 74: nullable, with missing values": (
        lambda: pd.DataFrame(of_objects(pd.NA)).astype("Int32"),
        "dtype object, and its values are not all numbers",
    ),
    "row 83: on another device": (
        _OnAnotherDevice,
        r"_OnAnotherDevice, which numpy .*\nFix: adata.X = adata.X.get\(\)",
    ),
    "row 84: cannot be read": (_Unreadable, r"`X` is a _Unreadable, which numpy cannot read: lost connection"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(DataError, match=r"(?s)" + message) as caught:
        open_counts(adata_of(make()), X)
    assert caught.value.fix
    if name.startswith("row 84"):
        assert isinstance(caught.value.__cause__, RuntimeError)


ACCEPTED: dict[str, Callable[[], Any]] = {
    "row 74: sparse DataFrame": lambda: pd.DataFrame(dense_counts()).astype(pd.SparseDtype(np.float32, 0.0)),
    "row 74: DataFrame": lambda: pd.DataFrame(dense_counts()),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    matrix = ACCEPTED[name]()
    adata = adata_of(matrix)
    panel = panel_of(adata)
    assert_same_panel(panel, panel_of(adata_of(dense_counts())))


def test_layer_from_a_table() -> None:
    """Row 74: anndata turns a DataFrame into an array where it is assigned."""
    adata = adata_of(np.zeros((N_OBS, N_VARS)))
    adata.layers["counts"] = pd.DataFrame(dense_counts(), index=adata.obs_names, columns=adata.var_names)
    assert_same_panel(panel_of(adata, CountSlot("counts")), panel_of(adata_of(dense_counts())))


def csr_of_objects() -> sparse.csr_matrix:
    matrix = sparse.csr_matrix(dense_counts())
    matrix.data = matrix.data.astype(object)
    return matrix


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: dense_counts().astype(object), id="row 73: dense"),
        pytest.param(csr_of_objects, id="row 73: csr"),
        pytest.param(lambda: pd.DataFrame(dense_counts().astype(int)).astype("Int32"), id="row 74: nullable"),
    ],
)
def test_numbers_as_objects(make: Callable[[], Any]) -> None:
    adata = adata_of(make())
    with pytest.warns(DataWarning, match="`X` holds numbers as Python objects"):
        panel = panel_of(adata)
    assert_same_panel(panel, panel_of(adata_of(dense_counts())))


def test_none_among_numbers() -> None:
    """Row 73: None is a missing value."""
    adata = adata_of(of_objects(None))
    with pytest.warns(DataWarning, match="Python objects"), pytest.raises(DataError, match="`X` holds 1 NaN among"):
        panel_of(adata)


def test_torch_tensor() -> None:
    """Row 83: a tensor in the memory of the computer is read."""
    torch = pytest.importorskip("torch")
    adata = adata_of(torch.from_numpy(dense_counts()))
    assert_same_panel(panel_of(adata), panel_of(adata_of(dense_counts())))


def test_sums_of_small_integers_do_not_overflow() -> None:
    """Row 68: 300 entries of 1 in 8 bits are 300 counts, in a column or in several of one gene."""
    matrix = sparse.csr_matrix((1, 300), dtype=np.uint8)
    matrix.indptr, matrix.indices = np.array([0, 300]), np.arange(300)
    matrix.data = np.ones(300, dtype=np.uint8)
    assert panel_counts(matrix, np.zeros(300, dtype=np.int64), 1).data.tolist() == [300]
    matrix.indices = np.zeros(300, dtype=np.int64)
    assert panel_counts(matrix, np.arange(300), 300).data.tolist() == [300]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(
            pd.DataFrame({"a": [1]}), r"expected an AnnData .*got DataFrame.*\nFix: .*AnnData\(df\)", id="row 75: table"
        ),
        pytest.param(np.ones((2, 2)), "expected an AnnData or a path, got ndarray", id="row 75: array"),
        pytest.param(sparse.csr_matrix((2, 2)), "got csr_matrix", id="row 75: sparse"),
        pytest.param(None, "got NoneType", id="row 75: None"),
        pytest.param(SimpleNamespace(mod={"rna": 1, "atac": 2}), r"\nFix: pass mdata\['rna'\]", id="row 76: MuData"),
        pytest.param(
            SimpleNamespace(tables={"table": 1}), r"\nFix: pass sdata.tables\['table'\]", id="row 76: SpatialData"
        ),
    ],
)
def test_no_anndata(data: object, message: str) -> None:
    with pytest.raises(DataError, match=r"(?s)" + message):
        as_anndata(data)


def test_mudata() -> None:
    """Row 76: the real class."""
    mudata = pytest.importorskip("mudata", reason="mudata is not installed")
    with mudata.set_options(pull_on_update=False):
        both = mudata.MuData(
            {"rna": adata_of(dense_counts())[:, :9].copy(), "adt": adata_of(dense_counts())[:, 9:].copy()}
        )
    with pytest.raises(DataError, match=r"got a MuData with the parts \['rna', 'adt'\].*\nFix: pass mdata\['rna'\]"):
        as_anndata(both)


def test_path_instead_of_an_anndata(
    stored: Path, cells: anndata.AnnData, model: genejepa.GeneJEPA, vectors: NDArray[np.float32]
) -> None:
    """Row 75: a path is read; an AnnData passes through."""
    assert as_anndata(cells) is cells
    for path in (stored, str(stored)):
        np.testing.assert_array_equal(model.get_latent_representation(path), vectors)


DAMAGE = {
    "index too high": (
        "indices",
        9,
        10**6,
        r"`X`\.indices has 1 or more values outside of .* first 1000000 at position 9",
    ),
    "negative index": ("indices", 9, -1, r"`X`\.indices has 1 or more values outside of .* first -1 at position 9"),
    "indptr decreases": ("indptr", 4, 10**5, r"`X`\.indptr decreases at 1 places"),
    "indptr beyond the end": ("indptr", -1, 10**5, r"`X`\.indptr ends at 100000"),
    "indptr starts late": ("indptr", 0, 1, r"`X`\.indptr has length .* starts at \[1\]"),
}


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_sparse_structure(damage: str, kind: Any) -> None:
    """Row 81: found before compiled code runs, also through a view."""
    attribute, position, value, message = DAMAGE[damage]
    matrix = kind(dense_counts())
    getattr(matrix, attribute)[position] = value
    adata = adata_of(matrix)
    for looked_at in (adata, adata[3:9], adata[:, [2, 1]]):
        with pytest.raises(DataError, match=message):
            open_counts(looked_at, X)


@pytest.mark.parametrize("attribute", ["indices", "data", "indptr"])
def test_arrays_of_wrong_length_or_type(attribute: str) -> None:
    """Row 81: too short an array, or indices that are no integers."""
    matrix = sparse.csr_matrix(dense_counts())
    setattr(matrix, attribute, getattr(matrix, attribute)[:-1])
    with pytest.raises(DataError, match=r"`X`\.indptr (ends at|has length)"):
        open_counts(adata_of(matrix), X)
    if attribute != "data":
        matrix = sparse.csr_matrix(dense_counts())
        setattr(matrix, attribute, getattr(matrix, attribute).astype(np.float64))
        with pytest.raises(DataError, match=r"expected integers"):
            open_counts(adata_of(matrix), X)


@pytest.mark.parametrize("stored", ["csr_matrix", "csc_matrix"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file(damage: str, stored: Path) -> None:
    """Row 81: the same in a backed file, in the block that has it."""
    import h5py

    attribute, position, value, message = DAMAGE[damage]
    with h5py.File(stored, "r+") as file:
        array = file[f"X/{attribute}"]
        array[position if position >= 0 else len(array) - 1] = value
    backed = anndata.read_h5ad(stored, backed="r")
    for looked_at in (backed, backed[::2]):
        with pytest.raises(DataError, match=message):
            check_counts(open_counts(looked_at, X), adata=backed)
    backed.file.close()
