from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

import genejepa
from genejepa._constants import MODEL_FORMAT_VERSION
from genejepa._lightning import Callback
from genejepa.bundle import MANIFEST, read_bundle, write_bundle
from genejepa.errors import (
    CheckpointWarning,
    ConfigError,
    DataError,
    DataWarning,
    GeneMismatchError,
    ModelFileError,
    ModelVersionError,
    NotFittedError,
    OutOfDiskError,
)
from genejepa.model import GeneJEPA
from genejepa.query import Matching, Query
from genejepa.train.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from genejepa._lightning import LightningModule, Trainer

FEW_GENES = "ignore:.*genes of the model:genejepa.errors.DataWarning"


class Failing(Callback):
    """Breaks a training before its first step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ZeroDivisionError


FILES = ["config.json", "genes.csv", "tensors.safetensors"]


@pytest.fixture(scope="module")
def trained(
    make_adata: Callable[..., anndata.AnnData], tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> GeneJEPA:
    """Model of 40 of the 80 genes of ``adata``; tests do not change it."""
    model = GeneJEPA(make_adata(), **tiny_settings)
    model.train(**tiny_training)
    return model


@pytest.fixture(scope="module")
def vectors(trained: GeneJEPA) -> NDArray[np.float32]:
    return trained.get_latent_representation()


@pytest.fixture
def saved(trained: GeneJEPA, tmp_path: Path) -> Path:
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def run_python(code: str, *arguments: str) -> str:
    """Output of a program in a new process."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Reproducibility

TRAIN_IN_ANOTHER_PROCESS = """
import json, sys
import anndata, numpy as np
from genejepa.model import GeneJEPA
path, settings, training = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = GeneJEPA(anndata.read_h5ad(path + "/cells.h5ad"), **settings)
model.train(**training)
model.save(path + "/model")
np.save(path + "/vectors.npy", model.get_latent_representation())
print(model.weights_sha256())
"""


def test_another_process_makes_the_same_weights_and_its_file_the_same_vectors(
    trained: GeneJEPA,
    vectors: NDArray[np.float32],
    adata: anndata.AnnData,
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
    tmp_path: Path,
) -> None:
    adata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = [str(tmp_path), json.dumps(tiny_settings), json.dumps(tiny_training)]
    printed = run_python(TRAIN_IN_ANOTHER_PROCESS, *arguments)
    assert printed.strip() == trained.weights_sha256()
    loaded = GeneJEPA.load(tmp_path / "model", adata)
    assert loaded.weights_sha256() == trained.weights_sha256()
    there = np.load(tmp_path / "vectors.npy")
    np.testing.assert_array_equal(loaded.get_latent_representation(), there)
    np.testing.assert_array_equal(vectors, there)


@pytest.mark.parametrize("change", [{}, {"num_workers": 2}], ids=["again", "two workers"])
def test_equal_seeds_give_equal_weights(
    change: dict[str, Any],
    trained: GeneJEPA,
    adata: anndata.AnnData,
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(987)  # the state of the caller's generator has no influence
        model = GeneJEPA(adata, **tiny_settings)
        model.train(**{**tiny_training, **change})
    assert model.weights_sha256() == trained.weights_sha256()
    assert model.model_id == trained.model_id


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"precision": "bad"}, ConfigError),
        ({"callbacks": [Failing()]}, ZeroDivisionError),
        ({"checkpoint_dir": __file__, "resume": True}, OSError),
    ],
    ids=["setting", "callback", "directory"],
)
def test_a_training_that_fails_at_once_leaves_no_trace(
    options: dict[str, Any],
    error: type[Exception],
    trained: GeneJEPA,
    adata: anndata.AnnData,
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
) -> None:
    model = GeneJEPA(adata, **tiny_settings)
    before = model.config
    with pytest.raises(error):
        model.train(**tiny_training | {"seed": 5, "max_epochs": 7} | options)
    assert model.config == before
    assert not model.is_trained
    model.train(**tiny_training)
    assert model.weights_sha256() == trained.weights_sha256()


def test_a_finished_training_is_not_resumed(trained: GeneJEPA, tiny_training: dict[str, Any]) -> None:
    before = trained.weights_sha256()
    trained.train(**tiny_training, resume=True)
    assert trained.weights_sha256() == before


def test_a_last_checkpoint_that_fails_costs_no_model(
    adata: anndata.AnnData,
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OutOfDiskError("the disk is full.", fix="make room.")

    monkeypatch.setattr(TrainingState, "save", full)
    model = GeneJEPA(adata, **tiny_settings)
    with pytest.warns(CheckpointWarning, match=r"(?s)last checkpoint.*the disk is full.*Fix: make room"):
        model.train(**tiny_training, checkpoint_dir=tmp_path / "checkpoint")
    assert model.is_trained


def test_different_seeds_give_different_weights(
    trained: GeneJEPA, adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    model = GeneJEPA(adata, **tiny_settings, seed=1)
    model.train(**tiny_training)
    assert model.weights_sha256() != trained.weights_sha256()


def test_a_second_training_goes_on(
    trained: GeneJEPA, adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    model = GeneJEPA(adata, **tiny_settings)
    model.train(**tiny_training)
    model.train(**{**tiny_training, "learning_rate": 0.0})
    assert model.jepa is not None
    assert trained.jepa is not None
    expected = trained.jepa.encoder.state_dict()
    for name, weight in model.jepa.encoder.state_dict().items():
        assert torch.equal(weight, expected[name]), name


# Embedding


@pytest.mark.parametrize("size", [1, 2, 7, 32, 59])
def test_batch_size_changes_no_bit(trained: GeneJEPA, vectors: NDArray[np.float32], size: int) -> None:
    chunks = np.array_split(np.arange(60), range(size, 60, size))
    parts = [trained.get_latent_representation(indices=chunk) for chunk in chunks]
    np.testing.assert_array_equal(np.concatenate(parts), vectors)


# Three steps do not spread the vectors of the perceptron, whose start is random.
@pytest.mark.filterwarnings("ignore::genejepa.errors.CollapseWarning", FEW_GENES)
@pytest.mark.parametrize("encoder", ["gene_tokens", "mlp"])
@pytest.mark.parametrize("missing", [False, True], ids=["all genes", "missing genes"])
def test_batch_mates_and_order_change_no_bit(
    encoder: str,
    missing: bool,
    adata: anndata.AnnData,
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
) -> None:
    model = GeneJEPA(adata, **{**tiny_settings, "encoder": encoder})
    model.train(**{**tiny_training, "max_epochs": 1})
    cells = adata[:, ~np.isin(adata.var_names, model.genes[:5])].copy() if missing else adata
    whole = model.get_latent_representation(cells)
    assert whole.shape == (60, 8)
    assert whole.dtype == np.float32
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(model.get_latent_representation(cells[order].copy()), whole[order])
    np.testing.assert_array_equal(model.get_latent_representation(cells[10:15].copy()), whole[10:15])


@pytest.mark.parametrize("indices", [[5, 3, 59, 3], np.arange(10, 20), [7]], ids=["list", "range", "one"])
def test_indices_select_cells(trained: GeneJEPA, vectors: NDArray[np.float32], indices: Any) -> None:
    np.testing.assert_array_equal(trained.get_latent_representation(indices=indices), vectors[indices])


def test_no_cells_give_no_vectors(trained: GeneJEPA) -> None:
    found = trained.get_latent_representation(indices=[])
    assert found.shape == (0, 8)
    assert found.dtype == np.float32


def test_other_genes_and_their_order_change_no_bit(
    trained: GeneJEPA, vectors: NDArray[np.float32], adata: anndata.AnnData
) -> None:
    rng = np.random.default_rng(0)
    strangers = anndata.AnnData(sparse.csr_matrix(rng.poisson(5.0, size=(60, 9)).astype(np.float32)))
    strangers.var_names = [f"stranger{i}" for i in range(9)]
    strangers.obs_names = adata.obs_names
    mixed = anndata.concat([adata, strangers], axis=1)
    mixed = mixed[:, rng.permutation(mixed.n_vars)].copy()
    np.testing.assert_array_equal(trained.get_latent_representation(mixed), vectors)
    only_panel = mixed[:, np.isin(mixed.var_names, trained.genes)].copy()
    np.testing.assert_array_equal(trained.get_latent_representation(only_panel), vectors)


@pytest.mark.parametrize("kind", ["dense", "csr", "csc", "view", "float64", "int64"])
def test_storage_of_the_counts_changes_no_bit(
    kind: str, trained: GeneJEPA, vectors: NDArray[np.float32], adata: anndata.AnnData
) -> None:
    dense = adata.X.toarray()
    stored: dict[str, Any] = {
        "dense": dense,
        "csr": sparse.csr_matrix(dense),
        "csc": sparse.csc_matrix(dense),
        "view": dense,
        "float64": dense.astype(np.float64),
        "int64": sparse.csr_matrix(dense.astype(np.int64)),
    }
    other = anndata.AnnData(stored[kind], obs=adata.obs, var=adata.var)
    other = other[:] if kind == "view" else other
    np.testing.assert_array_equal(trained.get_latent_representation(other), vectors)


@pytest.mark.filterwarnings(FEW_GENES)
def test_missing_genes_are_not_zeros(trained: GeneJEPA, adata: anndata.AnnData) -> None:
    """Row 50: a gene that was not measured is absent, which is not zero."""
    gone = np.isin(adata.var_names, trained.genes[:10])
    absent = adata[:, ~gone].copy()
    zero = adata.copy()
    zero.X = sparse.csr_matrix(np.where(gone, 0, zero.X.toarray()).astype(np.float32))
    found = trained.get_latent_representation(absent)
    assert np.isfinite(found).all()
    assert np.abs(found - trained.get_latent_representation(zero)).max() > 0.01


@pytest.mark.filterwarnings(FEW_GENES)
def test_missing_genes_have_no_influence(trained: GeneJEPA, adata: anndata.AnnData) -> None:
    absent = adata[:, ~np.isin(adata.var_names, trained.genes[:10])].copy()
    found = trained.get_latent_representation(absent)
    keep = torch.tensor([gene in set(absent.var_names) for gene in trained.genes])
    (counts,) = Query(absent, trained._trained(), Matching()).blocks()
    values, _ = trained.normalizer.dense(counts, np.arange(60), keep=keep.numpy())
    values[:, ~keep.numpy()] = np.nan
    assert trained.jepa is not None
    with torch.no_grad():
        expected = trained.jepa.encoder(torch.from_numpy(values), keep)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.filterwarnings(FEW_GENES)
def test_cells_given_to_load_are_embedded_as_any_others(trained: GeneJEPA, adata: anndata.AnnData, saved: Path) -> None:
    absent = adata[:, ~np.isin(adata.var_names, trained.genes[:10])].copy()
    expected = trained.get_latent_representation(absent)
    loaded = GeneJEPA.load(saved, absent)
    np.testing.assert_array_equal(loaded.get_latent_representation(), expected)
    np.testing.assert_array_equal(loaded.get_latent_representation(absent), expected)


def test_few_matching_genes_are_warned_of_and_hardly_any_refused(trained: GeneJEPA, adata: anndata.AnnData) -> None:
    def with_panel_genes(n: int) -> anndata.AnnData:
        return adata[:, ~np.isin(adata.var_names, trained.genes[n:])].copy()

    with pytest.warns(DataWarning, match=r"15 of the 40 genes"):
        assert trained.get_latent_representation(with_panel_genes(15), min_overlap=0.1).shape == (60, 8)
    with pytest.raises(GeneMismatchError, match=r"(?s)3 of the 40 genes.*Fix:"):
        trained.get_latent_representation(with_panel_genes(3))
    assert trained.gene_report(with_panel_genes(25)).n_matched == 25


def test_a_cell_without_counts_has_a_finite_vector(
    trained: GeneJEPA, vectors: NDArray[np.float32], adata: anndata.AnnData
) -> None:
    dense = adata.X.toarray()
    dense[[4, 8]] = 0
    adata.X = sparse.csr_matrix(dense)
    with pytest.warns(DataWarning, match="2 of 60 cells have no counts"):
        trained.embed(adata)
    found = adata.obsm["X_genejepa"]
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[4], found[8])
    np.testing.assert_array_equal(np.delete(found, [4, 8], axis=0), np.delete(vectors, [4, 8], axis=0))
    np.testing.assert_array_equal(np.flatnonzero(adata.obs["genejepa_empty"]), [4, 8])
    filled = adata[:4].copy()
    trained.embed(filled)
    assert "genejepa_empty" not in filled.obs


def test_cells_without_counts_are_not_trained_on(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    """Row 10: the weights are those of a training without them."""
    dense = adata.X.toarray()
    dense[[4, 8]] = 0
    adata.X = sparse.csr_matrix(dense)
    with pytest.warns(DataWarning, match="2 of 60 cells have no counts over the genes of the model; they are not"):
        model = GeneJEPA(adata, **tiny_settings)
    model.train(**tiny_training)
    without = GeneJEPA(adata[np.delete(np.arange(60), [4, 8])].copy(), **tiny_settings)
    without.train(**tiny_training)
    assert model.weights_sha256() == without.weights_sha256()
    assert model.get_latent_representation().shape == (60, 8)


def test_embedding_draws_no_random_numbers_and_keeps_the_model(
    trained: GeneJEPA,
    adata: anndata.AnnData,
    global_rng_untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    before = trained.weights_sha256()
    with global_rng_untouched():
        trained.get_latent_representation(adata)
    assert trained.weights_sha256() == before


# The caller's AnnData


def matrix_hash(matrix: Any) -> str:
    arrays = [matrix.data, matrix.indices, matrix.indptr] if sparse.issparse(matrix) else [np.asarray(matrix)]
    return hashlib.sha256(b"".join(repr((a.dtype, a.shape)).encode() + a.tobytes() for a in arrays)).hexdigest()


def deep_hash(adata: anndata.AnnData) -> dict[str, str]:
    """Hash of every slot of an AnnData."""
    slots = {f"layers[{key}]": matrix_hash(matrix) for key, matrix in adata.layers.items()}
    for name in ("obsm", "varm", "obsp", "varp"):
        slots |= {f"{name}[{key}]": matrix_hash(matrix) for key, matrix in getattr(adata, name).items()}
    slots |= {f"uns[{key}]": hashlib.sha256(pickle.dumps(entry)).hexdigest() for key, entry in adata.uns.items()}
    frames = {"obs": adata.obs, "var": adata.var}
    slots |= {name: hashlib.sha256(frame.to_csv().encode()).hexdigest() for name, frame in frames.items()}
    return {**slots, "X": matrix_hash(adata.X), "raw": str(adata.raw), "view": str(adata.is_view)}


def test_only_our_keys_are_written(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    adata.layers["other"] = adata.X.copy()
    adata.obsm["X_pca"] = np.ones((60, 3))
    adata.uns["mine"] = {"colours": ["red"]}
    before = deep_hash(adata)
    options = {key: tiny_training[key] for key in ("accelerator", "precision", "threads")}
    model = genejepa.fit(adata, **tiny_settings, train_options=options, max_epochs=1, progress_bar=False)
    after = deep_hash(adata)
    assert set(after) - set(before) == {"obsm[X_genejepa]", "uns[genejepa]"}
    assert {slot: after[slot] for slot in before} == before
    np.testing.assert_array_equal(adata.obsm["X_genejepa"], model.get_latent_representation())
    assert adata.uns["genejepa"]["model_id"] == model.model_id

    again = genejepa.embed(adata, model, key_added="X_other", copy=True)
    assert again is not None
    assert deep_hash(adata) == after
    np.testing.assert_array_equal(again.obsm["X_other"], adata.obsm["X_genejepa"])
    assert genejepa.embed(adata, model, key_added="X_other") is None
    assert set(deep_hash(adata)) - set(after) == {"obsm[X_other]"}


def test_making_training_and_reading_a_model_change_nothing(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    before = deep_hash(adata)
    model = GeneJEPA(adata, **tiny_settings)
    model.train(**{**tiny_training, "max_epochs": 1})
    model.get_latent_representation()
    model.get_latent_representation(adata)
    model.get_latent_representation(adata.copy())
    assert deep_hash(adata) == before


def test_embedding_record_survives_a_file(trained: GeneJEPA, adata: anndata.AnnData, tmp_path: Path) -> None:
    GeneJEPA.setup_anndata(adata, labels_key="cell_type")
    trained.embed(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(read.obsm["X_genejepa"], adata.obsm["X_genejepa"])
    assert read.uns["genejepa"]["model_id"] == trained.model_id
    assert read.uns["genejepa"]["setup"]["labels_key"] == "cell_type"


@pytest.mark.filterwarnings("default::UserWarning", "default::DeprecationWarning", "default::FutureWarning")
def test_an_anndata_set_up_for_scvi_tools_is_understood(
    trained: GeneJEPA,
    vectors: NDArray[np.float32],
    adata: anndata.AnnData,
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
) -> None:
    scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")
    adata.layers["counts"] = adata.X.copy()
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()))
    with pytest.raises(DataError, match="`X`"):
        GeneJEPA(adata, **tiny_settings)
    scvi.model.SCVI.setup_anndata(adata, layer="counts", labels_key="cell_type")
    before = deep_hash(adata)
    model = GeneJEPA(adata, **tiny_settings)
    model.train(**tiny_training)
    assert deep_hash(adata) == before
    assert model.registration.layer == "counts"
    assert model.registration.labels_key == "cell_type"
    assert model.weights_sha256() == trained.weights_sha256()
    np.testing.assert_array_equal(model.get_latent_representation(), vectors)
    np.testing.assert_array_equal(trained.get_latent_representation(adata), vectors)


def test_layer_of_the_training_is_looked_for_in_other_data(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    adata.layers["counts"] = adata.X.copy()
    other = adata.copy()
    other.X = sparse.csr_matrix(np.log1p(other.X.toarray()))
    GeneJEPA.setup_anndata(adata, layer="counts")
    model = GeneJEPA(adata, **tiny_settings)
    model.train(**{**tiny_training, "max_epochs": 1})
    expected = model.get_latent_representation()
    np.testing.assert_array_equal(model.get_latent_representation(other), expected)
    np.testing.assert_array_equal(model.get_latent_representation(other, layer="counts"), expected)


# Refusals


@pytest.mark.parametrize(
    "use",
    [
        lambda model, _path: model.get_latent_representation(),
        lambda model, path: model.save(path / "model"),
        lambda model, _path: model.weights_sha256(),
        lambda model, _path: model.model_id,
        lambda model, _path: model.history,
        lambda model, _path: model.embed(model.adata),
    ],
    ids=["latent", "save", "hash", "id", "history", "embed"],
)
def test_an_untrained_model_says_so(
    use: Callable[[GeneJEPA, Path], object],
    adata: anndata.AnnData,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    model = GeneJEPA(adata, **tiny_settings)
    assert not model.is_trained
    assert "not trained" in repr(model)
    with pytest.raises(NotFittedError, match=r"(?s)not trained.*Fix: call `model.train\(\)` first"):
        use(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "X_genejepa" not in adata.obsm


def test_a_loaded_model_without_cells_says_so(saved: Path) -> None:
    model = GeneJEPA.load(saved)
    with pytest.raises(DataError, match=r"(?s)no cells were given.*Fix: pass `adata`"):
        model.get_latent_representation()
    with pytest.raises(NotFittedError, match=r"(?s)holds no training cells.*Fix: make a new"):
        model.train()


def test_too_few_cells_are_refused(adata: anndata.AnnData, tiny_settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="has 3 cells; training needs at least 4"):
        GeneJEPA(adata[:3].copy(), **tiny_settings)


def test_four_cells_are_enough(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    model = GeneJEPA(adata[:4].copy(), **tiny_settings)
    model.train(**{**tiny_training, "max_epochs": 1})
    assert np.isfinite(model.get_latent_representation()).all()


# Files


def test_a_loaded_model_is_the_saved_one(
    trained: GeneJEPA, vectors: NDArray[np.float32], adata: anndata.AnnData, saved: Path
) -> None:
    loaded = GeneJEPA.load(saved)
    assert sorted(contents(saved)) == FILES
    assert loaded.weights_sha256() == trained.weights_sha256()
    assert loaded.config == trained.config
    assert loaded.genes == trained.genes
    assert loaded.record == trained.record
    assert loaded.registration == trained.registration
    assert loaded.history.equals(trained.history)
    assert loaded.normalizer.median_depth == trained.normalizer.median_depth
    np.testing.assert_array_equal(loaded.normalizer.mean, trained.normalizer.mean)
    np.testing.assert_array_equal(loaded.normalizer.scale, trained.normalizer.scale)
    np.testing.assert_array_equal(loaded.normalizer.frequency, trained.normalizer.frequency)
    np.testing.assert_array_equal(loaded.get_latent_representation(adata), vectors)


def test_loading_and_saving_again_gives_equal_files(saved: Path, tmp_path: Path) -> None:
    GeneJEPA.load(saved).save(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(saved)


def test_loading_leaves_the_generators_alone(
    saved: Path, global_rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    torch.rand(1)  # so that a seed set by loading would show
    with global_rng_untouched():
        GeneJEPA.load(saved)


def test_files_hold_no_pickle(saved: Path) -> None:
    files = contents(saved)
    tensors = files["tensors.safetensors"]
    header = int.from_bytes(tensors[:8], "little")
    entries = json.loads(tensors[8 : 8 + header])
    end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    assert len(tensors) == 8 + header + end  # header and numbers, and nothing else
    json.loads(files["config.json"])
    json.loads((saved / MANIFEST).read_bytes())
    files["genes.csv"].decode()
    for name, data in files.items():
        assert data[:2] not in {b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}, name


def contents(path: Path) -> dict[str, bytes]:
    return read_bundle(path, kind="model", version=MODEL_FORMAT_VERSION)


def stored(path: Path, name: str) -> Path:
    """The file that holds a part of a model."""
    stem, suffix = name.split(".")
    (found,) = path.glob(f"{stem}-*.{suffix}")
    return found


def replace_part(path: Path, name: str, data: bytes) -> None:
    """Give a part of a model other content, and the manifest the hash of that."""
    write_bundle(path, contents(path) | {name: data}, kind="model", version=MODEL_FORMAT_VERSION, overwrite=True)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads(contents(path)["config.json"])
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    replace_part(path, "config.json", json.dumps(config).encode())


def edit_normalization(path: Path, **changes: Any) -> None:
    numbers = json.loads(contents(path)["config.json"])["normalization"]
    edit_config(path, normalization=numbers | changes)


def edit_genes(path: Path, lines: slice, *, extra: str = "") -> None:
    text = contents(path)["genes.csv"].decode().splitlines(keepends=True)
    replace_part(path, "genes.csv", ("".join(text[lines]) + extra).encode())


def set_version(path: Path, version: int) -> None:
    write_bundle(path, contents(path), kind="model", version=version, overwrite=True)


def shorten(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "no config": lambda path: stored(path, "config.json").unlink(),
    "no weights": lambda path: stored(path, "tensors.safetensors").unlink(),
    "no genes": lambda path: stored(path, "genes.csv").unlink(),
    "short manifest": lambda path: shorten(path / MANIFEST, 200),
    "short config": lambda path: shorten(stored(path, "config.json"), 200),
    "short weights": lambda path: shorten(stored(path, "tensors.safetensors"), 2000),
    "genes of another length": lambda path: shorten(stored(path, "genes.csv"), 0),
    "genes without rows": lambda path: edit_genes(path, slice(1)),
    "short genes": lambda path: edit_genes(path, slice(-1)),
    "genes with words": lambda path: edit_genes(path, slice(-1), extra="a,b,c,d\n"),
    "a gene twice": lambda path: edit_genes(path, slice(-1), extra="gene0,0.0,1.0,0.1\ngene0,0.0,1.0,0.1\n"),
    "genes of another table": lambda path: replace_part(path, "genes.csv", b"symbol,x\na,1\n"),
    "binary genes": lambda path: replace_part(path, "genes.csv", bytes(range(256))),
    "binary config": lambda path: replace_part(path, "config.json", bytes(range(256))),
    "empty config": lambda path: replace_part(path, "config.json", b""),
    "config is a list": lambda path: replace_part(path, "config.json", b"[1]"),
    "weights are text": lambda path: replace_part(path, "tensors.safetensors", b"weights"),
    "older format": lambda path: set_version(path, 3),
    "newer format": lambda path: set_version(path, 5),
    "no settings": lambda path: edit_config(path, settings=None),
    "settings are a list": lambda path: edit_config(path, settings=[]),
    "settings hold a list": lambda path: edit_config(path, settings={"model": []}),
    "unknown setting": lambda path: edit_config(path, settings={"model": {"colour": 1}}),
    "other sizes": lambda path: edit_config(path, settings={"model": {"embedding_dim": 9}}),
    "a thousand million layers": lambda path: edit_config(path, settings={"model": {"n_layers": 10**9}}),
    "a very wide network": lambda path: edit_config(path, settings={"model": {"dim": 8 * 10**12}}),
    "no training record": lambda path: edit_config(path, training=None),
    "training record is a list": lambda path: edit_config(path, training=[]),
    "no normalisation": lambda path: edit_config(path, normalization=None),
    "depth is a word": lambda path: edit_normalization(path, median_depth="deep"),
    "depth is a list": lambda path: edit_normalization(path, median_depth=[1]),
    "depth is negative": lambda path: edit_normalization(path, median_depth=-1.0),
    "batches without numbers": lambda path: edit_normalization(path, batches=["one", "two"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_model_is_reported(damage: Callable[[Path], object], saved: Path) -> None:
    damage(saved)
    with pytest.raises(ModelFileError, match=r"(?s)model.*Fix: "):
        GeneJEPA.load(saved)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_path_that_is_no_model_is_reported(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ModelFileError, match=r"(?s)expected the directory of a model.*Fix: give the directory"):
        GeneJEPA.load(tmp_path / name)


def test_a_newer_format_names_both_versions(saved: Path) -> None:
    set_version(saved, 7)
    with pytest.raises(ModelVersionError, match=r"(?s)in format 7; this is .* reads format 4.*Fix: pip install"):
        GeneJEPA.load(saved)


def test_a_model_is_overwritten_only_on_request_and_files_beside_it_never(trained: GeneJEPA, saved: Path) -> None:
    (saved / "note.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(FileExistsError, match=r"(?s)is not empty.*Fix:.*overwrite=True"):
        trained.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    stored(saved, "genes.csv").write_text("damaged")
    trained.save(saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_directory_of_somebody_else_is_never_touched(trained: GeneJEPA, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"(?s)not of genejepa: it holds 'thesis.tex'.*Fix:"):
        trained.save(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_new_and_empty_directories_are_filled(trained: GeneJEPA, tmp_path: Path) -> None:
    trained.save(tmp_path / "new" / "model")
    (tmp_path / "empty").mkdir()
    trained.save(str(tmp_path / "empty"))
    assert GeneJEPA.load(str(tmp_path / "empty")).model_id == GeneJEPA.load(tmp_path / "new" / "model").model_id


def test_a_file_is_not_replaced_by_a_directory(trained: GeneJEPA, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not a directory"):
        trained.save(tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


# Imports


def test_import_loads_no_large_package() -> None:
    code = """
import sys
import genejepa
large = {"torch", "scanpy", "anndata", "scvi", "lightning", "pytorch_lightning", "numpy", "pandas", "scipy"}
print(sorted(large & set(sys.modules)))
"""
    assert run_python(code).strip() == "[]"


NEURAL_CORE = """
import builtins, importlib, pkgutil, sys
real_import = builtins.__import__
allowed = {"genejepa", "numpy", "torch", "pytorch_lightning"} | set(sys.stdlib_module_names)
used = set()

def watched(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    root = name.partition(".")[0]
    if importer.partition(".")[0] == "genejepa" and level == 0:
        used.add(root)
        if root not in allowed:
            raise ImportError(f"{importer} imports {name}")
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = watched
names = ["genejepa.config", "genejepa.jepa", "genejepa.encode", "genejepa.data.loader", "genejepa.data.masking",
         "genejepa.data.panel", "genejepa.data.normalization", "genejepa.data.axes"]
for package in ("genejepa.nn", "genejepa.objectives", "genejepa.train"):
    names.append(package)
    path = importlib.import_module(package).__path__
    names += [module.name for module in pkgutil.iter_modules(path, package + ".")]
for name in names:
    importlib.import_module(name)
assert {"numpy", "torch", "pytorch_lightning"} <= used, used
absent = {"anndata", "scanpy", "scvi", "pandas", "sklearn", "typer", "safetensors", "h5py", "lightning"}
print(sorted(absent & set(sys.modules)), len(names))
"""


def test_neural_core_needs_numpy_torch_and_lightning_only() -> None:
    loaded, n_modules = run_python(NEURAL_CORE).rsplit(maxsplit=1)
    assert loaded == "[]"
    assert int(n_modules) > 15
