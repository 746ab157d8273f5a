from __future__ import annotations

import ast
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import sparse

from genejepa import datasets
from genejepa.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def adata() -> AnnData:
    return datasets.pbmc3k()


def test_pbmc3k_shape_and_names(adata: AnnData) -> None:
    assert adata.shape == (2638, 13713)
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    assert {"CD3D", "MS4A1", "LYZ", "NKG7", "PPBP"} <= set(adata.var_names)


def test_pbmc3k_holds_counts(adata: AnnData) -> None:
    assert sparse.issparse(adata.X)
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    assert adata.X.has_sorted_indices
    assert adata.X.data.min() == 1
    assert adata.X.data.max() == 419
    np.testing.assert_array_equal(adata.X.data, np.round(adata.X.data))


def test_pbmc3k_has_no_empty_cell_or_gene(adata: AnnData) -> None:
    assert np.asarray(adata.X.sum(axis=1)).min() > 0
    assert np.asarray(adata.X.sum(axis=0)).min() > 0


def test_pbmc3k_labels(adata: AnnData) -> None:
    assert list(adata.obs.columns) == ["cell_type"]
    assert adata.obs["cell_type"].dtype == "category"
    assert not adata.obs["cell_type"].isna().any()
    sizes = adata.obs["cell_type"].value_counts()
    assert len(sizes) == 9
    assert sizes["Naive CD4 T"] == 697
    assert sizes["Platelet"] == 14


def test_pbmc3k_labels_belong_to_these_cells(adata: AnnData) -> None:
    # a permutation of the labels would keep all the counts above
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    for gene, cell_type in [("MS4A1", "B"), ("PPBP", "Platelet"), ("FCER1A", "DC")]:
        share = adata[:, gene].X.toarray().ravel() / totals
        inside = (adata.obs["cell_type"] == cell_type).to_numpy()
        assert share[inside].mean() > 10 * share[~inside].mean()


def test_pbmc3k_states_its_source(adata: AnnData) -> None:
    source = adata.uns["source"]
    assert "10x Genomics" in source["data"]
    assert "CC BY 4.0" in source["licence"]
    assert not any(value.startswith("/") for value in source.values())


def test_pbmc3k_returns_a_new_object(adata: AnnData) -> None:
    other = datasets.pbmc3k()
    other.obs["cell_type"] = "changed"
    other.X.data[:] = 0
    assert adata.obs["cell_type"].nunique() == 9
    assert adata.X.data.min() == 1


def test_readme_states_the_checksum_and_size() -> None:
    content = (REPOSITORY / "data" / "pbmc3k.h5ad").read_bytes()
    readme = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(content).hexdigest() in readme
    assert f"{len(content):,} bytes" in readme


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "pbmc3k.h5ad"
    damaged.write_bytes(b"not the file")
    with pytest.raises(DataError, match="damaged") as caught:
        datasets._read_verified([damaged], datasets._PBMC3K_SHA256)
    assert hashlib.sha256(b"not the file").hexdigest() in caught.value.problem
    assert "Fix:" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "pbmc3k.h5ad"
    with pytest.raises(DataError, match="not found") as caught:
        datasets._read_verified([missing], datasets._PBMC3K_SHA256)
    assert str(missing) in caught.value.problem


def test_second_place_is_used_when_the_first_is_empty(tmp_path: Path) -> None:
    places = [tmp_path / "pbmc3k.h5ad", REPOSITORY / "data" / "pbmc3k.h5ad"]
    assert datasets._read_verified(list(places), datasets._PBMC3K_SHA256).n_obs == 2638


def test_module_imports_no_third_party_package() -> None:
    tree = ast.parse(Path(datasets.__file__).read_text(encoding="utf-8"))
    modules = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    allowed = sys.stdlib_module_names | {"genejepa"}
    assert {module.split(".")[0] for module in modules} <= allowed
