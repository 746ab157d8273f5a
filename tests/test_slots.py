"""Which slots of an AnnData are read and written by training and embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pytest
from scipy import sparse

import genejepa
from genejepa.errors import ConfigError, DataError, DataWarning, GeneMismatchError
from genejepa.model import GeneJEPA

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def trained(
    make_adata: Callable[..., anndata.AnnData], tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> GeneJEPA:
    """Model of counts in ``layers['counts']``."""
    cells = make_adata()
    cells.layers["counts"] = cells.X
    GeneJEPA.setup_anndata(cells, layer="counts")
    model = GeneJEPA(cells, **tiny_settings)
    model.train(**tiny_training)
    return model


@pytest.fixture
def fit(tiny_settings: dict[str, Any], tiny_training: dict[str, Any]) -> Callable[..., GeneJEPA]:
    """``genejepa.fit`` of a tiny model."""

    def fitted(adata: anndata.AnnData, **options: Any) -> GeneJEPA:
        return genejepa.fit(adata, train_options=tiny_training, max_epochs=1, **tiny_settings | options)

    tiny_training = {name: value for name, value in tiny_training.items() if name not in ("max_epochs", "progress_bar")}
    tiny_settings = {"progress_bar": False, **tiny_settings}
    return fitted


def test_a_declared_x_is_read_although_the_training_had_a_layer(trained: GeneJEPA, adata: anndata.AnnData) -> None:
    adata.layers["counts"] = adata.X[::-1].copy()
    assert trained.get_latent_representation(adata).tobytes() != trained.get_latent_representation().tobytes()
    GeneJEPA.setup_anndata(adata)
    np.testing.assert_array_equal(trained.get_latent_representation(adata), trained.get_latent_representation())


def test_a_refused_fit_leaves_nothing_behind(fit: Callable[..., GeneJEPA], adata: anndata.AnnData) -> None:
    adata.layers["log"] = np.log1p(adata.X.toarray())
    with pytest.raises(DataError, match=r"`layers\['log'\]` holds"):
        fit(adata, layer="log")
    assert not adata.uns
    assert fit(adata).is_trained


def test_slots_given_to_a_fit_are_for_this_training_only(fit: Callable[..., GeneJEPA], adata: anndata.AnnData) -> None:
    assert fit(adata, batch_key="batch").registration.batch_key == "batch"
    assert fit(adata).registration.batch_key is None
    GeneJEPA.setup_anndata(adata, batch_key="batch")
    assert fit(adata).registration.batch_key == "batch"


def test_a_slot_without_cells_is_refused(trained: GeneJEPA) -> None:
    for options in ({"layer": "counts"}, {"use_raw": True}):
        with pytest.raises(ConfigError, match="without `adata`"):
            trained.get_latent_representation(**options)


def test_the_gene_report_is_about_the_slot_that_is_read(trained: GeneJEPA, adata: anndata.AnnData) -> None:
    adata.raw = adata
    few = adata[:, np.isin(adata.var_names, trained.genes[:15])].copy()
    assert trained.gene_report(few).n_matched == 15
    assert trained.gene_report(few, use_raw=True).n_matched == 40
    with pytest.raises(GeneMismatchError, match=r"Fix: pass use_raw=True .*`raw.var` has 40 of the genes"):
        trained.embed(few)
    assert "use_raw=True" in str(genejepa.check(few, model=trained))
    trained.embed(few, use_raw=True)
    np.testing.assert_array_equal(few.obsm["X_genejepa"], trained.get_latent_representation())


@pytest.mark.parametrize("order", [slice(None, None, -1), slice(0, 59)], ids=["reversed", "one less"])
def test_vectors_are_written_to_the_cells_of_the_training_only(
    order: slice, trained: GeneJEPA, adata: anndata.AnnData
) -> None:
    with pytest.raises(DataError, match="`obs_names`"):
        trained.write_embedding(adata[order].copy())
    trained.write_embedding(adata)
    np.testing.assert_array_equal(adata.obsm["X_genejepa"], trained.get_latent_representation())


@pytest.mark.parametrize("key", ["", "a/b", ".", None])
def test_a_key_that_no_file_can_hold_is_refused(
    key: Any, trained: GeneJEPA, fit: Callable[..., GeneJEPA], adata: anndata.AnnData
) -> None:
    for write in (trained.embed, trained.write_embedding, fit):
        with pytest.raises(ConfigError, match="`key_added`"):
            write(adata, key_added=key)
    assert not adata.obsm


def test_marks_of_empty_cells_belong_to_a_key(trained: GeneJEPA, adata: anndata.AnnData) -> None:
    values = adata.X.toarray()
    empty = adata.copy()
    values[[4, 8]] = 0
    empty.X = sparse.csr_matrix(values)
    with pytest.warns(DataWarning, match="no counts"):
        trained.embed(empty, key_added="X_some")
    empty.X = adata.X
    trained.embed(empty)
    assert "genejepa_empty" not in empty.obs
    assert np.flatnonzero(empty.obs["some_empty"]).tolist() == [4, 8]
    trained.embed(empty, key_added="X_some")
    assert "some_empty" not in empty.obs


def test_copies_of_cells_on_disk_are_embedded(trained: GeneJEPA, adata: anndata.AnnData, tmp_path: Path) -> None:
    adata.write_h5ad(tmp_path / "cells.h5ad")
    before = (tmp_path / "cells.h5ad").read_bytes()
    for cells in (adata, anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r"), tmp_path / "cells.h5ad"):
        copied = genejepa.embed(cells, trained, copy=True)
        assert copied is not None
        np.testing.assert_array_equal(copied.obsm["X_genejepa"], trained.get_latent_representation())
    assert not adata.obsm
    assert (tmp_path / "cells.h5ad").read_bytes() == before
    with pytest.raises(DataError, match="expected an AnnData to write to"):
        genejepa.embed(tmp_path / "cells.h5ad", trained)


def test_set_up_of_what_cannot_be_written_to(adata: anndata.AnnData, tmp_path: Path) -> None:
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(DataError, match="view of a file"):
        GeneJEPA.setup_anndata(backed[:5], batch_key="batch")
    with pytest.raises(DataError, match="expected an AnnData"):
        GeneJEPA.setup_anndata(tmp_path / "cells.h5ad")


@pytest.mark.parametrize("indices", [3, slice(5), "all", [0.5], [[0]], None.__class__])
def test_odd_positions_are_refused(indices: Any, trained: GeneJEPA) -> None:
    with pytest.raises(ConfigError, match="`indices`"):
        trained.get_latent_representation(indices=indices)


@pytest.mark.parametrize("share", ["0.5", -0.1, 2, True, None])
def test_an_overlap_is_a_share(share: Any, trained: GeneJEPA, adata: anndata.AnnData) -> None:
    with pytest.raises(ConfigError, match="`min_overlap`"):
        trained.get_latent_representation(adata, min_overlap=share)


def test_batches_that_cannot_be_compared(adata: anndata.AnnData, tiny_settings: dict[str, Any]) -> None:
    adata.obs["batch"] = [[1], [2]] * 30
    GeneJEPA.setup_anndata(adata, batch_key="batch")
    with pytest.raises(DataError, match=r"`obs\['batch'\]` holds values that cannot be compared"):
        GeneJEPA(adata, **tiny_settings)


def test_weights_that_give_no_finite_vectors_are_noticed(
    trained: GeneJEPA, adata: anndata.AnnData, tmp_path: Path
) -> None:
    trained.save(tmp_path / "model")
    loaded = GeneJEPA.load(tmp_path / "model")
    assert loaded.jepa is not None
    for parameter in loaded.jepa.parameters():
        parameter.data *= 1e38
    with pytest.raises(DataError, match="vectors of 60 of 60 cells are not finite"):
        loaded.get_latent_representation(adata)
