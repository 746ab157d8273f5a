"""A model told of batches mixes them, keeps cell types apart, and says so when it cannot know a batch."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.spatial.distance import cdist

from genejepa._constants import MODEL_FORMAT_VERSION
from genejepa.bundle import read_bundle, write_bundle
from genejepa.encode import encode_cells
from genejepa.errors import DataWarning, ModelFileError
from genejepa.model import GeneJEPA
from genejepa.query import Matching, Query

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

N_OBS, N_VARS = 180, 80
EPOCHS = 10


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Three types in each of two batches; in one, genes are caught with factors of their own, and others leak in."""
    rng = np.random.default_rng(1)
    kind, two = np.arange(N_OBS) % 3, np.arange(N_OBS) % 2 == 0
    rates = rng.gamma(2.0, 0.4, size=N_VARS) * np.where(np.arange(N_VARS) // 20 == kind[:, None], 6.0, 1.0)
    changed = rates * rng.lognormal(0.0, 0.7, size=N_VARS) + rng.gamma(0.5, 1.0, size=N_VARS)
    rates = np.where(two[:, None], changed, rates) * rng.lognormal(0.0, 0.3, size=(N_OBS, 1))
    batch = np.where(two, "two", "one")
    obs = pd.DataFrame(
        {"cell_type": np.array(["alpha", "beta", "gamma"])[kind], "batch": batch, "shuffled": rng.permutation(batch)},
        index=[f"cell{i}" for i in range(N_OBS)],
    )
    var = pd.DataFrame(index=[f"gene{j}" for j in range(N_VARS)])
    return anndata.AnnData(sparse.csr_matrix(rng.poisson(rates).astype(np.float32)), obs=obs, var=var)


@pytest.fixture(scope="module")
def fit(
    cells: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> Callable[..., GeneJEPA]:
    def make(*, batch_key: str | None, **settings: Any) -> GeneJEPA:
        adata = cells.copy()
        GeneJEPA.setup_anndata(adata, batch_key=batch_key)
        model = GeneJEPA(adata, **{**tiny_settings, "n_genes": 60, "batch_size": 60, **settings})
        model.train(**{**tiny_training, "max_epochs": EPOCHS})
        return model

    return make


@pytest.fixture(scope="module")
def told(fit: Callable[..., GeneJEPA]) -> GeneJEPA:
    """Model that knows the batches; tests do not change it."""
    return fit(batch_key="batch")


@pytest.fixture(scope="module")
def untold(fit: Callable[..., GeneJEPA]) -> GeneJEPA:
    return fit(batch_key=None)


def neighbour_accuracy(vectors: NDArray[np.float32], labels: Any, n_neighbours: int = 10) -> float:
    """Share of the cells whose label most of their neighbours have."""
    codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)[1]
    distances = cdist(vectors, vectors)
    np.fill_diagonal(distances, np.inf)
    nearest = codes[np.argsort(distances, axis=1)[:, :n_neighbours]]
    votes = np.stack([(nearest == code).sum(axis=1) for code in range(codes.max() + 1)], axis=1)
    return float((votes.argmax(axis=1) == codes).mean())


def uncorrected(model: GeneJEPA, adata: anndata.AnnData) -> NDArray[np.float32]:
    """Vectors by the same weights from values that are not adjusted."""
    assert model.jepa is not None
    (counts,) = Query(adata, model._trained(), Matching()).blocks()
    normalizer = replace(model.normalizer, batches=None)
    return encode_cells(model.jepa.encoder, replace(counts, batch=None), normalizer, index=np.arange(adata.n_obs))


# Correction


def test_batches_mix_and_types_stay_apart(told: GeneJEPA, untold: GeneJEPA, cells: anndata.AnnData) -> None:
    with_key, without = told.get_latent_representation(), untold.get_latent_representation()
    assert neighbour_accuracy(without, cells.obs["batch"]) > 0.9
    assert neighbour_accuracy(with_key, cells.obs["batch"]) < 0.65  # chance is 0.5
    assert neighbour_accuracy(with_key, cells.obs["cell_type"]) > 0.9


def test_random_batches_take_hardly_anything(
    fit: Callable[..., GeneJEPA], untold: GeneJEPA, cells: anndata.AnnData
) -> None:
    shuffled = fit(batch_key="shuffled").get_latent_representation()
    expected = neighbour_accuracy(untold.get_latent_representation(), cells.obs["cell_type"])
    assert expected > 0.9
    assert neighbour_accuracy(shuffled, cells.obs["cell_type"]) > expected - 0.05


def test_batches_of_one_type_each_lose_what_sets_the_types_apart(
    fit: Callable[..., GeneJEPA], untold: GeneJEPA, cells: anndata.AnnData
) -> None:
    lost = fit(batch_key="cell_type").get_latent_representation()
    kept = untold.get_latent_representation()
    assert neighbour_accuracy(lost, cells.obs["cell_type"]) < neighbour_accuracy(kept, cells.obs["cell_type"]) - 0.2


def test_alignment_is_recorded_for_batches_only(told: GeneJEPA, untold: GeneJEPA) -> None:
    alignment = told.history["alignment"]
    assert np.isfinite(alignment).all()
    assert (alignment > 0).all()
    assert "alignment" not in untold.history


def test_names_of_the_batches_do_not_matter(
    told: GeneJEPA, cells: anndata.AnnData, tiny_settings: dict[str, Any]
) -> None:
    renamed = cells.copy()
    renamed.obs["batch"] = renamed.obs["batch"].map({"one": "2", "two": "1"})
    GeneJEPA.setup_anndata(renamed, batch_key="batch")
    model = GeneJEPA(renamed, **{**tiny_settings, "n_genes": 60, "batch_size": 60})
    assert model.genes == told.genes
    found, _ = model.normalizer.dense(model._counts, np.arange(N_OBS))  # type: ignore[arg-type]  # it has its cells
    values, _ = told.normalizer.dense(told._counts, np.arange(N_OBS))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, values, atol=1e-5)


# Embedding


@pytest.mark.parametrize("missing", [False, True], ids=["all genes", "missing genes"])
def test_batch_mates_and_order_change_no_bit(told: GeneJEPA, cells: anndata.AnnData, missing: bool) -> None:
    adata = cells[:, ~np.isin(cells.var_names, told.genes[:5])].copy() if missing else cells
    whole = told.get_latent_representation(adata)
    order = np.random.default_rng(0).permutation(N_OBS)
    np.testing.assert_array_equal(told.get_latent_representation(adata[order].copy()), whole[order])
    np.testing.assert_array_equal(told.get_latent_representation(adata[10:15].copy()), whole[10:15])
    one_batch = adata[(adata.obs["batch"] == "two").to_numpy()].copy()
    rows = np.flatnonzero(adata.obs["batch"] == "two")
    np.testing.assert_array_equal(told.get_latent_representation(one_batch), whole[rows])
    if not missing:
        np.testing.assert_array_equal(told.get_latent_representation(), whole)


@pytest.mark.parametrize("missing", [False, True], ids=["all genes", "missing genes"])
def test_stored_counts_give_the_vectors_of_all_values(told: GeneJEPA, cells: anndata.AnnData, missing: bool) -> None:
    keep = ~np.isin(told.genes, told.genes[:5]) if missing else None
    (counts,) = Query(cells, told._trained(), Matching()).blocks()
    counts = replace(counts, batch=np.where(np.arange(N_OBS) % 5 == 0, -1, counts.batch_of(np.arange(N_OBS))))
    assert set(counts.batch_of(np.arange(N_OBS))) == {-1, 0, 1}
    assert told.jepa is not None
    found = encode_cells(told.jepa.encoder, counts, told.normalizer, index=np.arange(N_OBS), keep=keep)
    values, _ = told.normalizer.dense(counts, np.arange(N_OBS), keep=keep)
    with torch.no_grad():
        mask = None if keep is None else torch.from_numpy(keep)
        expected = told.jepa.encoder(torch.from_numpy(values), mask)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_missing_column_is_told_and_nothing_corrected(told: GeneJEPA, cells: anndata.AnnData) -> None:
    expected = uncorrected(told, cells)
    without = cells.copy()
    del without.obs["batch"]
    with pytest.warns(DataWarning, match="no column 'batch': the cells are embedded without batch correction"):
        found = told.get_latent_representation(without)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - told.get_latent_representation()).max() > 0.1


def test_unknown_batches_are_told_and_not_corrected(told: GeneJEPA, cells: anndata.AnnData) -> None:
    expected = np.where(np.arange(N_OBS)[:, None] < 30, uncorrected(told, cells), told.get_latent_representation())
    other = cells.copy()
    other.obs["batch"] = np.where(np.arange(N_OBS) < 30, "new", other.obs["batch"].astype(str))
    with pytest.warns(DataWarning, match="30 of 180 cells are of a batch that the training did not have"):
        found = told.get_latent_representation(other)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_known_batches_and_models_without_batches_give_no_warning(
    told: GeneJEPA, untold: GeneJEPA, cells: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    told.get_latent_representation(cells)
    untold.get_latent_representation(cells)
    assert not caplog.records


def test_another_column_can_be_declared(told: GeneJEPA, cells: anndata.AnnData) -> None:
    other = cells.copy()
    other.obs["technology"] = other.obs.pop("batch")
    GeneJEPA.setup_anndata(other, batch_key="technology")
    np.testing.assert_array_equal(told.get_latent_representation(other), told.get_latent_representation())


# Files


def test_a_loaded_model_corrects_to_the_same_bits(told: GeneJEPA, cells: anndata.AnnData, tmp_path: Path) -> None:
    told.save(tmp_path / "first")
    loaded = GeneJEPA.load(tmp_path / "first", cells)
    np.testing.assert_array_equal(loaded.get_latent_representation(), told.get_latent_representation())
    assert loaded.weights_sha256() == told.weights_sha256()
    expected, found = told.normalizer.batches, loaded.normalizer.batches
    assert expected is not None
    assert found is not None
    assert found.names == expected.names == ("one", "two")
    for name in ("centre", "gain", "frequency"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    loaded.save(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("batches", [None, ["one"], ["one", "one"], 3, ["one", 2]])
def test_batches_that_do_not_fit_the_file_are_reported(told: GeneJEPA, tmp_path: Path, batches: object) -> None:
    told.save(tmp_path / "model")
    format_of: Any = {"kind": "model", "version": MODEL_FORMAT_VERSION}
    files = read_bundle(tmp_path / "model", **format_of)
    config = json.loads(files["config.json"])
    config["normalization"]["batches"] = batches
    write_bundle(tmp_path / "model", files | {"config.json": json.dumps(config).encode()}, overwrite=True, **format_of)
    with pytest.raises(ModelFileError, match=r"(?s)cannot be read.*Fix:"):
        GeneJEPA.load(tmp_path / "model")


# Training


def test_equal_seeds_give_equal_weights(told: GeneJEPA, fit: Callable[..., GeneJEPA]) -> None:
    assert fit(batch_key="batch").weights_sha256() == told.weights_sha256()


def test_bfloat16_and_held_out_cells_work_with_batches(
    cells: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    adata = cells.copy()
    GeneJEPA.setup_anndata(adata, batch_key="batch")
    model = GeneJEPA(adata, **tiny_settings)
    model.train(**{**tiny_training, "precision": "bf16-mixed"}, early_stopping=True)
    assert np.isfinite(model.history["alignment"]).all()
    assert np.isfinite(model.get_latent_representation()).all()


def test_a_batch_of_one_cell_and_a_single_batch_can_be_trained(
    cells: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    for names in (["only"] * N_OBS, ["alone", *["others"] * (N_OBS - 1)]):
        adata = cells.copy()
        adata.obs["batch"] = names
        GeneJEPA.setup_anndata(adata, batch_key="batch")
        model = GeneJEPA(adata, **tiny_settings)
        model.train(**{**tiny_training, "max_epochs": 1})
        assert np.isfinite(model.get_latent_representation()).all()
        assert (model.history["alignment"] == 0).all()
