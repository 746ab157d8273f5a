from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from genejepa.data.counts import (
    check_counts,
    columns_to_genes,
    count_slots,
    holds_counts,
    open_counts,
    panel_counts,
)
from genejepa.data.slots import CountSlot
from genejepa.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genejepa.data.panel import PanelCounts

N_OBS, N_VARS = 30, 17
REAL_DATA = Path(os.environ.get("GENEJEPA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
X = CountSlot()


def dense_counts() -> NDArray[np.float32]:
    """Counts with an empty cell and an empty gene."""
    values = np.random.default_rng(0).poisson(1.5, size=(N_OBS, N_VARS)).astype(np.float32)
    values[3] = 0
    values[:, 5] = 0
    return values


def make_adata(matrix: Any) -> anndata.AnnData:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(matrix.shape[0])])
    var = pd.DataFrame(index=[f"gene{j}" for j in range(matrix.shape[1])])
    return anndata.AnnData(matrix, obs=obs, var=var)


def whole_panel() -> PanelCounts:
    return panel_counts(sparse.csr_matrix(dense_counts()), np.arange(N_VARS), N_VARS)


def dense_of(panel: PanelCounts) -> NDArray[np.float32]:
    matrix = sparse.csr_matrix((panel.data, panel.indices, panel.indptr), shape=(panel.n_obs, panel.n_genes))
    dense: NDArray[np.float32] = matrix.toarray()
    return dense


def assert_same_panel(one: PanelCounts, other: PanelCounts) -> None:
    for name in ("indptr", "indices", "data"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert one.n_genes == other.n_genes


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array], ids=["csr_matrix", "csr_array"])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_csr_is_shared_and_not_copied(kind: Any, index_dtype: type[np.signedinteger[Any]]) -> None:
    adata = make_adata(kind(dense_counts()))
    adata.X.indices, adata.X.indptr = adata.X.indices.astype(index_dtype), adata.X.indptr.astype(index_dtype)
    matrix = open_counts(adata, X).to_csr()
    for name in ("data", "indices"):
        assert np.shares_memory(getattr(matrix, name), getattr(adata.X, name))
        assert getattr(matrix, name).dtype == getattr(adata.X, name).dtype


def test_flags_of_the_users_matrix_are_not_changed() -> None:
    adata = make_adata(sparse.csr_matrix(dense_counts()))
    before = dict(adata.X.__dict__)
    counts = check_counts(open_counts(adata, X), adata=adata)
    panel_counts(counts.to_csr(), np.arange(N_VARS)[::-1], N_VARS)
    assert dict(adata.X.__dict__).keys() == before.keys()


@pytest.mark.parametrize("kind", [sparse.csc_matrix, sparse.csr_array, sparse.csr_matrix])
def test_sparse_input_is_never_made_dense(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adata = make_adata(kind(dense_counts()))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("made dense")

    for other in (sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array, sparse.coo_matrix):
        monkeypatch.setattr(other, "toarray", refuse)
        monkeypatch.setattr(other, "todense", refuse)
    matrix = check_counts(open_counts(adata, X), adata=adata).to_csr()
    panel_counts(matrix, np.arange(N_VARS), N_VARS)


@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix], ids=["dense", "csr", "csc"])
@pytest.mark.parametrize("n_values", [1, 50, 1 << 22])
def test_blocks_cover_all_cells_in_order(n_values: int, kind: Any, view: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genejepa.data.containers._BLOCK_VALUES", n_values)
    adata, expected = make_adata(kind(dense_counts())), dense_counts()
    if view:
        order = np.random.default_rng(1).permutation(N_OBS)[:19]
        adata, expected = adata[order, ::-2], expected[order, ::-2]
    counts = open_counts(adata, X)
    starts, blocks = zip(*counts.blocks(), strict=True)
    np.testing.assert_array_equal(np.vstack([block.toarray() for block in blocks]), expected)
    np.testing.assert_array_equal(np.cumsum([0, *(block.shape[0] for block in blocks)])[:-1], starts)
    assert len(blocks) == {1: len(expected), 1 << 22: 1}.get(n_values, len(blocks))
    np.testing.assert_array_equal(counts.rows(3, 11).toarray(), expected[3:11])
    np.testing.assert_array_equal(counts.to_csr().toarray(), expected)
    assert counts.shape == expected.shape
    assert counts.obs_names.equals(adata.obs_names)
    assert counts.var.index.equals(adata.var_names)


def test_a_matrix_of_another_shape_is_refused() -> None:
    adata = make_adata(dense_counts())
    adata._X = dense_counts()[:, 1:]
    with pytest.raises(DataError, match=rf"`X` has shape \({N_OBS}, {N_VARS - 1}\), expected \({N_OBS}, {N_VARS}\)"):
        open_counts(adata, X)


def test_slots_that_hold_counts() -> None:
    adata = make_adata(np.log1p(dense_counts()))
    adata.raw = make_adata(dense_counts())
    adata.layers["counts"], adata.layers["soft"] = dense_counts(), dense_counts() + 0.25
    slots = {slot.name: holds_counts(adata, slot) for slot in count_slots(adata)}
    assert slots == {"layers['counts']": True, "layers['soft']": False, "X": False, "raw.X": True}
    assert [slot.argument for slot in count_slots(adata)] == [
        "layer='counts'",
        "layer='soft'",
        "layer=None",
        "use_raw=True",
    ]


def test_panel_reorders_and_leaves_absent_genes_empty() -> None:
    genes = np.full(N_VARS, -1)
    genes[[11, 0, 16, 5]] = [0, 2, 3, 4]
    panel = panel_counts(sparse.csr_matrix(dense_counts()), genes, 6)
    expected = np.zeros((N_OBS, 6), dtype=np.float32)
    expected[:, [0, 2, 3, 4]] = dense_counts()[:, [11, 0, 16, 5]]
    np.testing.assert_array_equal(dense_of(panel), expected)
    assert (panel.n_obs, panel.n_genes) == (N_OBS, 6)
    assert (panel.data > 0).all()
    inside = np.ones(len(panel.indices), dtype=bool)
    inside[panel.indptr[:-1][np.diff(panel.indptr) > 0]] = False
    assert (np.diff(panel.indices)[inside[1:]] > 0).all()


@pytest.mark.parametrize("n_values", [1, 40, 1 << 22])
def test_panel_does_not_depend_on_the_order_of_columns_nor_on_other_genes(
    n_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 48 and 49: bit for bit, also for sums of fractions over columns of one gene."""
    monkeypatch.setattr("genejepa.data.counts._PANEL_VALUES", n_values)
    rng = np.random.default_rng(2)
    values = dense_counts() * rng.uniform(0.9, 1.1, size=(N_OBS, N_VARS))
    genes = np.arange(N_VARS) % 5 - 1
    panel = panel_counts(sparse.csr_matrix(values), genes, 4)
    np.testing.assert_allclose(
        dense_of(panel), np.stack([values[:, genes == g].sum(1) for g in range(4)], 1), rtol=1e-6
    )
    for _ in range(5):
        order = rng.permutation(N_VARS)
        further = np.hstack([rng.uniform(size=(N_OBS, 3)), values[:, order]])
        shuffled = panel_counts(sparse.csr_matrix(further), np.r_[-1, -1, -1, genes[order]], 4)
        assert_same_panel(shuffled, panel)


@pytest.mark.parametrize(
    "genes", [[0] * (N_VARS - 1), [4] * N_VARS, [-2] * N_VARS], ids=["too-few", "too-high", "too-low"]
)
def test_panel_refuses_positions(genes: list[int]) -> None:
    with pytest.raises(DataError, match=r"`gene_of_column` has shape .*, expected \(17,\) and values of -1\.\.3"):
        panel_counts(sparse.csr_matrix(dense_counts()), np.array(genes), 4)


@pytest.mark.parametrize("shape", [(0, 4), (3, 4)])
def test_panel_without_counts(shape: tuple[int, int]) -> None:
    panel = panel_counts(sparse.csr_matrix(shape), np.arange(4), 4)
    assert panel.indptr.tolist() == [0] * (shape[0] + 1)
    assert [a.dtype.name for a in (panel.indptr, panel.indices, panel.data)] == ["int64", "int32", "float32"]


def test_columns_to_genes() -> None:
    assert columns_to_genes(np.array([3, 1]), 5).tolist() == [-1, 1, -1, 0, -1]


@pytest.mark.parametrize(
    "index",
    [[], [3], [0, 1, 2], [29, 0, 3, 3, 14], list(range(N_OBS))],
    ids=["none", "empty-cell", "first", "repeats", "all"],
)
def test_rows_are_those_of_each_cell(index: list[int]) -> None:
    panel = whole_panel()
    row_ids, columns, values = panel.rows(np.array(index))
    found = np.zeros((len(index), N_VARS), dtype=np.float32)
    found[row_ids, columns] = values
    np.testing.assert_array_equal(found, dense_counts()[index])
    assert [a.dtype.name for a in (row_ids, columns, values)] == ["int64", "int32", "float32"]
    assert (np.diff(row_ids * N_VARS + columns) > 0).all()
    values[:] = 0
    np.testing.assert_array_equal(panel.data, whole_panel().data)


@pytest.mark.parametrize(
    "index", [[-1], [N_OBS], [0.5], [[1]], [True]], ids=["negative", "high", "float", "2d", "bool"]
)
def test_rows_refuses_positions(index: list[Any]) -> None:
    with pytest.raises(IndexError):
        whole_panel().rows(np.array(index))


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
        check_counts(open_counts(adata, X), adata=adata)


@pytest.mark.parametrize("file", ["pbmc3k_10x.h5ad", "kang_ifnb_2k.h5ad", "pancreas_5tech_panc8small.h5ad"])
def test_published_counts(file: str) -> None:
    if not (REAL_DATA / file).exists():
        pytest.skip(f"{file} is not present")
    adata = anndata.read_h5ad(REAL_DATA / file)
    check_counts(open_counts(adata, X), adata=adata)
