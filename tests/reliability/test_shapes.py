"""Rows 21 to 32 of the catalogue of bad input: few cells or genes, and very many."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import genejepa
from genejepa.data.containers import open_rows
from genejepa.data.counts import check_counts, open_counts, panel_counts
from genejepa.data.slots import CountSlot
from genejepa.errors import DataError, DataWarning

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    MakeAnnData = Callable[..., anndata.AnnData]


@pytest.fixture(scope="module")
def cells(make_adata: MakeAnnData) -> anndata.AnnData:
    return make_adata()


@pytest.fixture(scope="module")
def model(cells: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]) -> genejepa.GeneJEPA:
    trained = genejepa.GeneJEPA(cells, **tiny_settings)
    trained.train(**tiny_training)
    return trained


@pytest.fixture(scope="module")
def vectors(model: genejepa.GeneJEPA, cells: anndata.AnnData) -> NDArray[np.float32]:
    return model.get_latent_representation(cells)


@pytest.mark.parametrize(
    ("n_obs", "message"),
    [
        pytest.param(0, r"has 0 cells", id="row 21: no cells"),
        pytest.param(1, r"1 cell.* at least", id="row 24: one cell"),
    ],
)
def test_too_few_cells_to_train(n_obs: int, message: str, cells: anndata.AnnData, tiny_settings: Any) -> None:
    with pytest.raises(DataError, match=message):
        genejepa.GeneJEPA(cells[:n_obs].copy(), **tiny_settings)


def test_embedding_of_no_cells(model: genejepa.GeneJEPA, cells: anndata.AnnData) -> None:
    """Row 22: an empty array of the right shape and type."""
    for empty in (cells[:0], cells[:0].copy(), anndata.AnnData(np.empty((0, cells.n_vars)), var=cells.var)):
        found = model.get_latent_representation(empty)
        assert found.shape == (0, model.embedding_dim)
        assert found.dtype == np.float32


def test_no_genes(model: genejepa.GeneJEPA, cells: anndata.AnnData) -> None:
    """Row 23: an error in training and embedding."""
    for kind in (np.empty, sparse.csr_matrix):
        with pytest.raises(DataError, match="`X` has 5 cells and 0 genes"):
            genejepa.GeneJEPA(anndata.AnnData(kind((5, 0))))
    with pytest.raises(DataError, match="gene"):
        model.get_latent_representation(cells[:, :0])


def test_one_cell_is_embedded_as_among_others(
    model: genejepa.GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32]
) -> None:
    """Row 25: to the last bit."""
    for i in (0, 17, 59):
        np.testing.assert_array_equal(model.get_latent_representation(cells[i]), vectors[[i]])


def test_one_gene(cells: anndata.AnnData, tiny_settings: dict[str, Any]) -> None:
    """Row 26: an error that says how many genes a training needs."""
    with pytest.raises(DataError, match=r"(?s)1 gene.* at least \d+"), pytest.warns(DataWarning, match="median"):
        genejepa.GeneJEPA(cells[:, :1].copy(), **tiny_settings)


def test_fewer_genes_than_the_model_has(model: genejepa.GeneJEPA, cells: anndata.AnnData) -> None:
    """Rows 27 and 50: genes that were not measured are left out; that is not the same as zero."""
    measured = np.isin(cells.var_names, model.genes[: len(model.genes) // 2])
    outside = ~np.isin(cells.var_names, model.genes)
    with pytest.warns(DataWarning, match="genes of the model"):
        found = model.get_latent_representation(cells[:, measured], min_overlap=0.1)
    with pytest.warns(DataWarning, match="genes of the model"):
        further = model.get_latent_representation(cells[:, measured | outside], min_overlap=0.1)
    np.testing.assert_array_equal(further, found)
    assert np.isfinite(found).all()
    zeros = cells.copy()
    zeros.X = sparse.csr_matrix(cells.X.toarray() * measured)
    as_zeros = model.get_latent_representation(zeros)
    assert (np.abs(as_zeros - found).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize(
    ("n_obs", "batch_size"),
    [
        pytest.param(7, 256, id="row 28: fewer cells than a batch"),
        pytest.param(21, 20, id="row 28: one cell left over"),
        pytest.param(5, 4, id="row 28: one cell left over, small batches"),
    ],
)
def test_sizes_that_do_not_fit_the_batch(
    n_obs: int, batch_size: int, cells: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    trained = genejepa.GeneJEPA(cells[:n_obs].copy(), **tiny_settings | {"batch_size": batch_size})
    trained.train(**tiny_training)
    assert trained.record is not None
    assert trained.record.steps == 2 * -(-n_obs // min(n_obs, batch_size))
    assert np.isfinite(trained.get_latent_representation()).all()


def test_more_values_than_32_bits_can_count() -> None:
    """Row 29: a stored matrix of 2^31 and some values, of which only the last row is real."""
    first = 2**31 + 7

    def repeated(value: np.generic) -> NDArray[Any]:
        return np.lib.stride_tricks.as_strided(np.array([value]), (first + 3,), (0,), writeable=False)

    arrays = {
        "indptr": np.array([0, 5, first, first + 3]),
        "indices": repeated(np.int32(2)),
        "data": repeated(np.float32(4)),
    }
    rows = open_rows(SimpleNamespace(format="csr", shape=(3, 6), group=arrays), name="X")
    panel = panel_counts(rows.between(2, 3), np.arange(6), 6)
    assert panel.indices.tolist() == [2]
    assert panel.data.tolist() == [12.0]
    assert panel.indptr.dtype == np.int64
    arrays["indptr"][-1] += 1
    with pytest.raises(DataError, match=rf"`X`.indptr ends at {first + 4}, but there are {first + 3} indices"):
        open_rows(SimpleNamespace(format="csr", shape=(3, 6), group=arrays), name="X")


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_memory_does_not_grow_with_the_number_of_cells(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 31: a file is checked and read in blocks, whole or through a view."""
    monkeypatch.setattr("genejepa.data.containers._BLOCK_VALUES", 1 << 14)
    monkeypatch.setattr("genejepa.data.containers._COLUMN_BLOCK_VALUES", 1 << 14)
    rng = np.random.default_rng(0)
    values = rng.poisson(0.5, size=(40_000, 50)).astype(np.float32)
    anndata.AnnData(kind(values)).write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    size = (tmp_path / "x.h5ad").stat().st_size
    assert size > 6_000_000
    some = np.arange(40_000) % 3 > 0
    for adata, expected in ((backed, values), (backed[some], values[some])):
        tracemalloc.start()
        counts = check_counts(open_counts(adata, CountSlot()), adata=adata)
        n_values = sum(len(panel_counts(block, np.arange(50), 50).data) for _, block in counts.blocks())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_values == np.count_nonzero(expected)
        assert peak < size / 2
    backed.file.close()


@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=["vector", "column"])
def test_one_gene_as_a_vector(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Row 32: numpy and HDF5 may hold a single column as a vector."""
    import h5py

    values = np.array([30.0, 0, 12, 17]).reshape(shape)
    adata = anndata.AnnData(np.ones((4, 1)), obs=pd.DataFrame(index=list("abcd")))
    adata._X = values
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for matrix in (values, file.create_dataset("X", data=values)):
            adata._X = matrix
            counts = check_counts(open_counts(adata, CountSlot()), adata=adata)
            assert counts.to_csr().toarray().tolist() == [[30], [0], [12], [17]]
    adata._X = np.ones(3)
    with pytest.raises(DataError, match=r"`X` has shape \(3, 1\), expected \(4, 1\)"):
        open_counts(adata, CountSlot())
