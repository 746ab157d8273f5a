"""World models in directories: loaded ones predict the same bits, and what was changed is refused."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from genejepa.bundle import write_bundle
from genejepa.errors import ExtrapolationWarning, ModelFileError
from genejepa.model import GeneJEPA
from genejepa.persistence import json_to_bytes, model_to_files
from genejepa.world.model import WorldModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anndata import AnnData

    Fit = Callable[..., WorldModel]


@pytest.fixture
def saved(world: WorldModel, tmp_path: Path) -> Path:
    world.save(tmp_path / "world")
    return tmp_path / "world"


def file_of(directory: Path, start: str) -> Path:
    (found,) = directory.glob(f"{start}*")
    return found


def test_a_loaded_world_predicts_the_same_bits(saved: Path, world: WorldModel, untreated: AnnData) -> None:
    loaded = WorldModel.load(saved)
    assert loaded.is_fitted
    assert loaded.actions == world.actions
    assert loaded.model.weights_sha256() == world.model.weights_sha256()
    for action in "AB":
        first, second = (own.predict(untreated, action) for own in (world, loaded))
        np.testing.assert_array_equal(first.X, second.X)
        np.testing.assert_array_equal(first.obsm["X_genejepa"], second.obsm["X_genejepa"])
        np.testing.assert_array_equal(first.obs["genejepa_energy"], second.obs["genejepa_energy"])
    known = [own._known().known for own in (world, loaded)]
    assert known[0].largest == known[1].largest
    np.testing.assert_array_equal(known[0].states, known[1].states)
    plans = [own.plan(untreated, untreated, horizon=2) for own in (world, loaded)]
    assert plans[0].sequences == plans[1].sequences
    np.testing.assert_array_equal(plans[0].costs, plans[1].costs)


@pytest.mark.parametrize("keys", ["dose", "time", "genes"])
def test_everything_that_was_learnt_is_kept(
    keys: str, fit: Fit, perturbed: AnnData, untreated: AnnData, tmp_path: Path
) -> None:
    cells = perturbed.copy()
    condition = cells.obs["condition"].astype(str)
    arguments: dict[str, dict[str, Any]] = {
        "dose": {"dose_key": "number"},
        "time": {"time_key": "number", "action_key": None, "control": None},
        "genes": {},
    }
    cells.obs["number"] = condition.map({"ctrl": 0, "A": 2, "B": 5}).astype(float)
    if keys == "genes":
        cells.obs["condition"] = condition.replace({"A": "gene50", "B": "gene60"})
    fitted = fit(cells, max_steps=2, **arguments[keys])
    fitted.save(tmp_path / "world")
    loaded = WorldModel.load(tmp_path / "world")
    asked: dict[str, dict[str, Any]] = {
        "dose": {"action": "A", "dose": 3.0},
        "time": {"duration": 9.0},
        "genes": {"action": "gene51"},
    }
    found = []
    for own in (fitted, loaded):
        with pytest.warns(ExtrapolationWarning) as warned:
            found.append((own.predict(untreated, **asked[keys]).X, [str(w.message) for w in warned]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_saving_again_needs_permission(saved: Path, world: WorldModel) -> None:
    with pytest.raises(FileExistsError):
        world.save(saved)
    world.save(saved, overwrite=True)
    loaded = WorldModel.load(saved)
    loaded.save(saved.parent / "copy")
    for path in saved.iterdir():
        if path.suffix in (".csv", ".safetensors"):
            assert (saved.parent / "copy" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("part", ["world*.json", "world*.safetensors", "tensors", "genes", "config", "manifest"])
def test_a_changed_byte_is_refused(part: str, saved: Path) -> None:
    path = file_of(saved, part)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=re.escape(str(saved))):
        WorldModel.load(saved)


@pytest.mark.parametrize("part", ["world*.json", "world*.safetensors", "tensors", "manifest"])
def test_a_missing_file_is_refused(part: str, saved: Path) -> None:
    file_of(saved, part).unlink()
    with pytest.raises(ModelFileError):
        WorldModel.load(saved)


def test_worlds_and_models_are_not_mixed_up(saved: Path, model: GeneJEPA, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    with pytest.raises(ModelFileError, match="world model"):
        WorldModel.load(tmp_path / "model")
    with pytest.raises(ModelFileError, match="world model"):
        GeneJEPA.load(saved)
    with pytest.raises(ModelFileError):
        WorldModel.load(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        WorldModel.load(saved).save(tmp_path / "model", overwrite=True)


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["A"]},
        {"names": None},
        {"unit": "x"},
        {"unit": None},
        {"keys": {"action": "condition"}},
        {"keys": {"unknown": 1}},
        {"facts": 3},
        {"seen": 3},
        {"largest_dose": ["x"]},
        {"longest": []},
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(change: dict[str, Any], saved: Path, model: GeneJEPA) -> None:
    """Well formed, with the right hashes, and not written by genejepa."""
    numbers = json.loads(file_of(saved, "world*.json").read_bytes())
    arrays = file_of(saved, "world*.safetensors").read_bytes()
    for changed in ({}, change):
        files = {
            **model_to_files(model.to_stored()),
            "world.json": json_to_bytes(numbers | changed),
            "world.safetensors": arrays,
        }
        write_bundle(saved, files, kind="world model", version=1, overwrite=True)
        if not changed:
            assert WorldModel.load(saved).is_fitted
    with pytest.raises(ModelFileError):
        WorldModel.load(saved)
