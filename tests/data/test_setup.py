from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest

from genejepa.data.setup import Registration, batch_codes, register, registration_of
from genejepa.errors import DataError, MissingKeyError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def adata() -> anndata.AnnData:
    counts = np.random.default_rng(0).poisson(3, size=(12, 5)).astype(np.float32)
    obs = pd.DataFrame({"donor": ["b", "a", "c"] * 4, "kind": ["x", None] * 6}, index=[f"cell{i}" for i in range(12)])
    return anndata.AnnData(counts, obs=obs, layers={"counts": counts.copy()})


ALL: dict[str, Any] = {"layer": "counts", "batch_key": "donor", "labels_key": "kind"}


@pytest.mark.parametrize(
    "keys", [{}, {"layer": "counts"}, {"batch_key": "donor"}, ALL, {"use_raw": True, "batch_key": "donor"}], ids=str
)
def test_record_survives_a_file(adata: anndata.AnnData, keys: dict[str, Any], tmp_path: Path) -> None:
    adata.raw = adata
    registration = register(adata, **keys)
    assert registration == Registration(**keys)
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert registration_of(anndata.read_h5ad(tmp_path / "x.h5ad")) == registration
    assert registration_of(adata) == registration
    assert registration_of(adata.copy()) == registration
    assert registration_of(adata[:4]) == registration


def test_only_the_record_is_written(adata: anndata.AnnData) -> None:
    adata.uns["genejepa"] = {"version": "0"}
    before = adata.copy()
    register(adata, batch_key="donor")
    setup = {"layer": "", "batch_key": "donor", "labels_key": "", "use_raw": ""}
    assert adata.uns == {"genejepa": {"version": "0", "setup": setup}}
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    np.testing.assert_array_equal(adata.X, before.X)
    assert list(adata.layers) == ["counts"]
    assert not adata.obsm


def test_foreign_content_is_not_overwritten(adata: anndata.AnnData) -> None:
    adata.uns["genejepa"] = "mine"
    with pytest.raises(DataError, match=r"`uns\['genejepa'\]` holds a str"):
        register(adata)
    assert adata.uns["genejepa"] == "mine"
    assert registration_of(adata) == Registration()


def test_registering_again_replaces(adata: anndata.AnnData) -> None:
    register(adata, **ALL)
    register(adata)
    assert registration_of(adata) == Registration()


def test_without_a_record(adata: anndata.AnnData) -> None:
    assert registration_of(adata) == Registration(None, None, None)
    assert adata.uns == {}
    adata.uns["genejepa"] = {"version": "0"}
    assert registration_of(adata) == Registration()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer": "raw"}, r"`layers\['raw'\]` \(layer\) does not exist, found 'counts'\."),
        ({"batch_key": "sample"}, r"`obs\['sample'\]` \(batch_key\) does not exist, found 'donor', 'kind'\."),
        ({"labels_key": "type"}, r"`obs\['type'\]` \(labels_key\) does not exist"),
        ({"layer": ""}, r"`layers\[''\]` \(layer\) does not exist"),
    ],
    ids=["layer", "batch", "labels", "empty"],
)
def test_missing_keys(adata: anndata.AnnData, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(MissingKeyError, match=message):
        register(adata, **keys)
    assert adata.uns == {}


def test_recorded_key_that_is_gone(adata: anndata.AnnData) -> None:
    register(adata, layer="counts")
    del adata.layers["counts"]
    with pytest.raises(MissingKeyError, match=r"`layers\['counts'\]`"):
        registration_of(adata)


def test_record_of_an_older_version_is_read(adata: anndata.AnnData) -> None:
    adata.uns["genejepa"] = {"setup": {"layer": "counts", "batch_key": "", "labels_key": ""}}
    assert registration_of(adata) == Registration(layer="counts")


@pytest.mark.parametrize("record", ["counts", {"layer": 3}, {"layer": None}], ids=str)
def test_damaged_record(adata: anndata.AnnData, record: Any) -> None:
    adata.uns["genejepa"] = {"setup": record}
    with pytest.raises(DataError, match=r"`uns\['genejepa'\]\['setup'\]` is .*\nFix: call setup_anndata"):
        registration_of(adata)


def test_batch_codes_of_no_cells() -> None:
    adata = anndata.AnnData(np.ones((3, 2), dtype=np.float32))
    for values in ([1.5, 2.5, 2.5], ["a", "b", "b"], pd.Categorical(["a", "b", "b"])):
        adata.obs["batch"] = values
        codes, names = batch_codes(adata[:0], "batch")
        assert codes.shape == (0,)
        assert codes.dtype == np.int64
        assert names == []


def test_batch_codes_of_a_missing_column(adata: anndata.AnnData) -> None:
    with pytest.raises(MissingKeyError, match=r"`obs\['batch'\]`"):
        batch_codes(adata, "batch")


def test_import_is_light() -> None:
    code = (
        "import sys, genejepa.data, genejepa.data.panel, genejepa.data.setup;"
        "heavy = {'scvi', 'scanpy', 'anndata', 'torch', 'pandas', 'scipy'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "import genejepa.data.counts, genejepa.data.genes;"
        "heavy = {'scvi', 'scanpy', 'anndata', 'torch', 'pandas'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_registration_of_another_process_warns(adata: anndata.AnnData) -> None:
    adata.uns["_scvi_uuid"] = "e5d0"
    adata.uns["_scvi_manager_uuid"] = "77aa"
    with pytest.warns(UserWarning, match="registered with scvi-tools in another process.*setup_anndata"):
        assert registration_of(adata) == Registration()


@pytest.mark.filterwarnings("default::UserWarning", "default::DeprecationWarning", "default::FutureWarning")
def test_registration_of_scvi_tools_is_understood(adata: anndata.AnnData) -> None:
    scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")
    adata.obs["kind"] = "x"
    scvi.model.SCVI.setup_anndata(adata, layer="counts", batch_key="donor", labels_key="kind")
    assert registration_of(adata) == Registration(**ALL)
    assert registration_of(adata.copy()) == Registration(**ALL)

    scvi.model.LinearSCVI.setup_anndata(adata, layer="counts")  # the last one counts
    assert registration_of(adata) == Registration(layer="counts")

    scvi.model.SCVI.setup_anndata(adata, batch_key="donor")
    assert registration_of(adata) == Registration(batch_key="donor")

    register(adata, labels_key="kind")  # our own record comes first
    assert registration_of(adata) == Registration(labels_key="kind")
