from __future__ import annotations

import hashlib
import os
import pickle
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from genejepa.data.counts import check_counts, panel_counts, read_counts, slot_name
from genejepa.errors import DataError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from genejepa.data.panel import PanelCounts

N_OBS, N_VARS = 30, 17
REAL_DATA = Path(os.environ.get("GENEJEPA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def dense_counts() -> NDArray[np.float32]:
    """Counts with an empty cell and an empty gene."""
    values = np.random.default_rng(0).poisson(0.7, size=(N_OBS, N_VARS)).astype(np.float32)
    values[3] = 0
    values[:, 5] = 0
    return values


def make_adata(matrix: Any) -> anndata.AnnData:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(matrix.shape[0])])
    var = pd.DataFrame(index=[f"gene{j}" for j in range(matrix.shape[1])])
    return anndata.AnnData(matrix, obs=obs, var=var)


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


def global_random_state() -> bytes:
    """State of the global generators of Python and numpy."""
    return pickle.dumps((random.getstate(), np.random.get_state()))  # noqa: NPY002


def strided(values: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = np.zeros((2 * values.shape[0], 3 * values.shape[1]), dtype=np.float32)
    wide[::-2, ::3] = values
    return wide[::-2, ::3]


def read_only(values: Any) -> Any:
    values = values.copy()
    for array in [values.data, values.indices, values.indptr] if sparse.issparse(values) else [values]:
        array.setflags(write=False)
    return values


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


CONTAINERS: dict[str, Callable[[NDArray[np.float32]], Any]] = {
    "dense-C": np.ascontiguousarray,
    "dense-F": np.asfortranarray,
    "dense-strided": strided,
    "dense-read-only": read_only,
    "dense-float64": lambda x: x.astype(np.float64),
    "dense-float16": lambda x: x.astype(np.float16),
    "dense-int32": lambda x: x.astype(np.int32),
    "dense-uint8": lambda x: x.astype(np.uint8),
    "dense-masked": lambda x: np.ma.MaskedArray(x, mask=np.zeros_like(x, dtype=bool)),
    "csr_matrix": sparse.csr_matrix,
    "csr_matrix-int64": lambda x: sparse.csr_matrix(x.astype(np.int64)),
    "csr_matrix-read-only": lambda x: read_only(sparse.csr_matrix(x)),
    "csr_matrix-messy": messy,
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "csc_matrix-read-only": lambda x: read_only(sparse.csc_matrix(x)),
    "csc_array": sparse.csc_array,
}


def assert_same_panel(one: PanelCounts, other: PanelCounts) -> None:
    for name in ("indptr", "indices", "data"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert one.n_genes == other.n_genes


def panel_reference() -> PanelCounts:
    return panel_counts(sparse.csr_matrix(dense_counts()), np.arange(N_VARS))


# Slicing a matrix with spare room writes outside of memory in scipy before genejepa sees the view.
SLOTS = [(c, s) for c in CONTAINERS for s in ("X", "layer", "view") if (c, s) != ("csr_matrix-messy", "view")]


@pytest.mark.parametrize(("name", "slot"), SLOTS)
def test_every_container_gives_the_same_panel_and_is_not_changed(name: str, slot: str) -> None:
    container = CONTAINERS[name]
    if slot == "layer":
        adata, layer = make_adata(np.zeros((N_OBS, N_VARS), dtype=np.float32)), "counts"
        adata.layers["counts"] = container(dense_counts())
    else:
        adata, layer = make_adata(container(dense_counts())), None
    if slot == "view":
        adata = adata[np.arange(N_OBS), np.arange(N_VARS)]
    before, random_before = fingerprint(adata), global_random_state()

    matrix = read_counts(adata, layer=layer)
    check_counts(matrix, slot=slot_name(layer), adata=adata)
    panel = panel_counts(matrix, np.arange(N_VARS))

    assert_same_panel(panel, panel_reference())
    assert isinstance(matrix, sparse.csr_matrix)
    assert matrix.shape == (N_OBS, N_VARS)
    assert fingerprint(adata) == before
    assert global_random_state() == random_before


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array], ids=["csr_matrix", "csr_array"])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_csr_is_shared_and_not_copied(kind: Any, index_dtype: type[np.signedinteger[Any]]) -> None:
    adata = make_adata(kind(dense_counts()))
    adata.X.indices, adata.X.indptr = adata.X.indices.astype(index_dtype), adata.X.indptr.astype(index_dtype)
    matrix = read_counts(adata)
    assert matrix.data is adata.X.data
    assert matrix.indices is adata.X.indices
    assert matrix.indptr is adata.X.indptr


def test_flags_of_the_users_matrix_are_not_changed() -> None:
    adata = make_adata(sparse.csr_matrix(dense_counts()))
    before = dict(adata.X.__dict__)
    matrix = read_counts(adata)
    panel_counts(matrix, np.arange(N_VARS)[::-1])
    assert matrix is not adata.X
    assert dict(adata.X.__dict__).keys() == before.keys()


@pytest.mark.parametrize("container", ["csc_matrix", "csr_array", "csr_matrix"])
def test_sparse_input_is_never_made_dense(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adata = make_adata(CONTAINERS[container](dense_counts()))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("made dense")

    for kind in (sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array, sparse.coo_matrix):
        monkeypatch.setattr(kind, "toarray", refuse)
        monkeypatch.setattr(kind, "todense", refuse)
    matrix = read_counts(adata)
    check_counts(matrix, slot="X", adata=adata)
    panel_counts(matrix, np.arange(N_VARS))


def test_dense_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genejepa.data.counts._CHUNK_VALUES", 4 * N_VARS)
    adata = make_adata(np.asfortranarray(dense_counts()))
    np.testing.assert_array_equal(read_counts(adata).toarray(), dense_counts())


@pytest.mark.parametrize("container", ["dense-C", "csr_matrix", "csc_matrix"])
@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
def test_backed(container: str, layer: str | None, view: bool, tmp_path: Path) -> None:
    source = make_adata(CONTAINERS[container](dense_counts()))
    source.layers["counts"] = source.X.copy()
    source.write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    adata = backed[4:20] if view else backed
    matrix = read_counts(adata, layer=layer)
    np.testing.assert_array_equal(matrix.toarray(), dense_counts()[4:20] if view else dense_counts())
    assert backed.isbacked
    backed.file.close()


def test_missing_layer_lists_the_existing_ones() -> None:
    adata = make_adata(dense_counts())
    adata.layers["spliced"] = dense_counts()
    with pytest.raises(MissingKeyError, match=r"`layers\['counts'\]` does not exist.*'spliced'.*\nFix: "):
        read_counts(adata, layer="counts")


def test_empty_slot() -> None:
    adata = anndata.AnnData(shape=(3, 4))
    with pytest.raises(DataError, match=r"`X` is empty"):
        read_counts(adata)


@pytest.mark.parametrize("dtype", [object, np.complex64, "U3"], ids=["object", "complex", "string"])
def test_numbers_that_are_not_real_are_refused(dtype: Any) -> None:
    adata = make_adata(dense_counts())
    adata._X = dense_counts().astype(dtype)
    with pytest.raises(DataError, match=r"`X` has dtype"):
        read_counts(adata)


def test_masked_entries_are_refused() -> None:
    adata = make_adata(dense_counts())
    adata._X = np.ma.MaskedArray(dense_counts(), mask=np.eye(N_OBS, N_VARS, dtype=bool))
    with pytest.raises(DataError, match=rf"`X` has {N_VARS} masked"):
        read_counts(adata)


def test_other_sparse_formats_are_refused() -> None:
    adata = make_adata(dense_counts())
    adata._X = sparse.coo_matrix(dense_counts())
    with pytest.raises(DataError, match=r"`X` is a sparse matrix of format 'coo'"):
        read_counts(adata)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("kind", [np.zeros, sparse.csr_matrix], ids=["dense", "csr"])
def test_no_cells_or_no_genes(shape: tuple[int, int], kind: Any) -> None:
    adata = make_adata(kind(shape))
    with pytest.raises(DataError, match=rf"`X` has {shape[0]} cells and {shape[1]} genes"):
        check_counts(read_counts(adata), slot="X", adata=adata)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("kind", ["csr_matrix", "csc_matrix", "dense-C"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.nan, r"1 NaN, infinite .* value among"),
        (np.inf, r"1 NaN, infinite .* value among"),
        (-np.inf, r"1 NaN, infinite .* value among"),
        (1e30, r"1 NaN, infinite or over-large"),
        (-5, r"1 negative value among .* first is -5 in cell 'cell21', gene 'gene11'\. Counts are never neg"),
        (2.5, r"1 fractional value among .* first is 2\.5 in cell 'cell21', gene 'gene11'"),
    ],
    ids=["nan", "inf", "-inf", "huge", "negative", "fraction"],
)
def test_one_bad_value_is_found_and_named(
    bad: float, message: str, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genejepa.data.counts._CHUNK_VALUES", chunk)
    values = dense_counts()
    values[21, 11] = bad
    adata = make_adata(CONTAINERS[kind](values))
    with pytest.raises(DataError, match=r"(?s)`X` holds " + message) as caught:
        check_counts(read_counts(adata), slot="X", adata=adata)
    assert "cell 'cell21', gene 'gene11'" in str(caught.value)
    assert "\nFix: " in str(caught.value)


def log_normalise(values: NDArray[Any]) -> NDArray[Any]:
    logged: NDArray[Any] = np.log1p(values / np.maximum(values.sum(1, keepdims=True), 1) * 1e4)
    return logged


KINDS: dict[str, tuple[Callable[[NDArray[Any]], NDArray[Any]], str]] = {
    "log": (log_normalise, r"looks log-normalised \(largest value"),
    "scaled": (lambda x: x - x.mean(0) - 0.25, "looks scaled"),
    "cpm": (lambda x: np.expm1(log_normalise(x)) * 100 + 0.25 * (x > 0), "normalised without log: FPKM"),
    "noise": (lambda x: x * (1 + 1e-6), "counts with rounding noise"),
    "corrected": (lambda x: 30 * x + 0.5 * (np.arange(N_VARS) == 2), "looks like corrected counts"),
    "integer-overflow": (lambda x: (x - 2).astype(np.int32), "never negative"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_guess(kind: str) -> None:
    transform, message = KINDS[kind]
    values = transform(dense_counts().astype(np.float64))
    adata = make_adata(values)
    with pytest.raises(DataError, match=message):
        check_counts(read_counts(adata), slot="X", adata=adata)


def test_rounding_as_the_message_says_repairs() -> None:
    adata = make_adata(sparse.csr_matrix(dense_counts() * np.float32(1.00001)))
    with pytest.raises(DataError, match=r"Fix: round explicitly: (.*), and pass") as caught:
        check_counts(read_counts(adata), slot="X", adata=adata)
    statement = str(caught.value).split("explicitly: ")[1].split(", and pass")[0]
    exec(statement, {"adata": adata, "np": np})
    check_counts(read_counts(adata, layer="counts"), slot="layers['counts']", adata=adata)


def test_fix_names_the_layer_with_counts() -> None:
    adata = make_adata(log_normalise(dense_counts()))
    adata.layers["zeros"] = np.zeros_like(dense_counts())
    adata.layers["text"] = dense_counts().astype(str)
    adata.layers["umi"] = sparse.csc_matrix(dense_counts())
    with pytest.raises(DataError, match=r"Fix: .*pass layer='umi'"):
        check_counts(read_counts(adata), slot="X", adata=adata)


def test_fix_names_x_with_counts() -> None:
    adata = make_adata(dense_counts())
    adata.layers["log"] = log_normalise(dense_counts())
    with pytest.raises(DataError, match=r"`layers\['log'\]` holds .*\nFix: `X` holds counts: pass layer=None"):
        check_counts(read_counts(adata, layer="log"), slot=slot_name("log"), adata=adata)


def test_fix_for_raw_repairs() -> None:
    whole = make_adata(dense_counts())
    whole.raw = whole
    adata = whole[:, [3, 1, 7]].copy()
    adata.X = log_normalise(adata.X)
    with pytest.raises(DataError, match=r"`\.raw` holds counts") as caught:
        check_counts(read_counts(adata), slot="X", adata=adata)
    statement = str(caught.value).split("holds counts: ")[1].split(", and pass")[0]
    exec(statement, {"adata": adata})
    np.testing.assert_array_equal(read_counts(adata, layer="counts").toarray(), dense_counts()[:, [3, 1, 7]])


def damaged(kind: Any, attribute: str, position: int, value: int) -> Any:
    matrix = kind(dense_counts())
    getattr(matrix, attribute)[position] = value
    return matrix


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array])
@pytest.mark.parametrize(
    ("attribute", "position", "value", "message"),
    [
        ("indices", 9, 10**6, r"`X`\.indices has 1 or more values outside of .* first 1000000 at position 9"),
        ("indices", 9, -1, r"`X`\.indices has 1 or more values outside of .* first -1 at position 9"),
        ("indptr", 4, 10**5, r"`X`\.indptr decreases at 1 places"),
        ("indptr", -1, 10**5, r"`X`\.indptr ends at 100000"),
        ("indptr", 0, 1, r"`X`\.indptr has length .* starts at \[1\]"),
    ],
    ids=["index-high", "index-negative", "indptr-decreases", "indptr-end", "indptr-start"],
)
def test_damaged_sparse_structure(kind: Any, attribute: str, position: int, value: int, message: str) -> None:
    adata = make_adata(dense_counts())
    adata._X = damaged(kind, attribute, position, value)
    with pytest.raises(DataError, match=message):
        read_counts(adata)


def test_check_counts_validates_the_structure_itself() -> None:
    adata = make_adata(dense_counts())
    with pytest.raises(DataError, match=r"`X`\.indices"):
        check_counts(damaged(sparse.csr_matrix, "indices", 0, 99), slot="X", adata=adata)


def test_panel_reorders_and_leaves_absent_genes_empty() -> None:
    values = dense_counts()
    columns = np.array([11, -1, 0, 16, 5, -1])
    panel = panel_counts(messy(values), columns)
    expected = np.where(columns >= 0, values[:, columns], 0)
    found = sparse.csr_matrix((panel.data, panel.indices, panel.indptr), shape=(panel.n_obs, panel.n_genes))
    np.testing.assert_array_equal(found.toarray(), expected)
    assert (panel.n_obs, panel.n_genes) == (N_OBS, 6)
    assert (panel.data > 0).all()
    inside = np.ones(len(panel.indices), dtype=bool)
    inside[panel.indptr[:-1][np.diff(panel.indptr) > 0]] = False
    assert (np.diff(panel.indices)[inside[1:]] > 0).all()


def test_panel_does_not_depend_on_gene_order() -> None:
    values, columns = dense_counts(), np.array([4, 9, 2, 15])
    order = np.random.default_rng(2).permutation(N_VARS)
    shuffled = panel_counts(sparse.csr_matrix(values[:, order]), np.argsort(order)[columns])
    assert_same_panel(shuffled, panel_counts(sparse.csr_matrix(values), columns))


def test_panel_sums_repeated_entries_beyond_the_range_of_their_type() -> None:
    matrix = sparse.csr_matrix((1, 1), dtype=np.uint8)
    matrix.indptr, matrix.indices = np.array([0, 2], dtype=np.int32), np.array([0, 0], dtype=np.int32)
    matrix.data = np.array([200, 200], dtype=np.uint8)
    assert panel_counts(matrix, np.array([0])).data.tolist() == [400]


@pytest.mark.parametrize("columns", [[1, 1], [0, N_VARS]], ids=["twice", "outside"])
def test_panel_refuses_columns(columns: list[int]) -> None:
    with pytest.raises(DataError, match="distinct columns below 17"):
        panel_counts(sparse.csr_matrix(dense_counts()), np.array(columns))


@pytest.mark.parametrize(
    "index",
    [[], [3], [0, 1, 2], [29, 0, 3, 3, 14], list(range(N_OBS))],
    ids=["none", "empty-cell", "first", "repeats", "all"],
)
def test_rows_are_those_of_each_cell(index: list[int]) -> None:
    panel = panel_reference()
    row_ids, columns, values = panel.rows(np.array(index))
    found = np.zeros((len(index), N_VARS), dtype=np.float32)
    found[row_ids, columns] = values
    np.testing.assert_array_equal(found, dense_counts()[index])
    assert [a.dtype.name for a in (row_ids, columns, values)] == ["int64", "int32", "float32"]
    assert (np.diff(row_ids * N_VARS + columns) > 0).all()
    values[:] = 0
    np.testing.assert_array_equal(panel.data, panel_reference().data)


@pytest.mark.parametrize(
    "index", [[-1], [N_OBS], [0.5], [[1]], [True]], ids=["negative", "high", "float", "2d", "bool"]
)
def test_rows_refuses_positions(index: list[Any]) -> None:
    with pytest.raises(IndexError):
        panel_reference().rows(np.array(index))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("hsmm_myoblast_trapnell2014_fpkm.h5ad", "normalised without log: FPKM"),
        ("a549_dex_scicar_lognorm.h5ad", "looks log-normalised"),
    ],
)
def test_published_matrices_that_are_not_counts(file: str, message: str) -> None:
    if not (REAL_DATA / file).exists():
        pytest.skip(f"{file} is not present")
    adata = anndata.read_h5ad(REAL_DATA / file)
    with pytest.raises(DataError, match=message):
        check_counts(read_counts(adata), slot="X", adata=adata)


@pytest.mark.parametrize("file", ["pbmc3k_10x.h5ad", "kang_ifnb_2k.h5ad", "pancreas_5tech_panc8small.h5ad"])
def test_published_counts(file: str) -> None:
    if not (REAL_DATA / file).exists():
        pytest.skip(f"{file} is not present")
    adata = anndata.read_h5ad(REAL_DATA / file)
    check_counts(read_counts(adata), slot="X", adata=adata)
