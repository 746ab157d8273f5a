"""Disks that are full, too small or read-only: a clear error, and what was there is as it was."""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from genejepa.errors import CheckpointWarning, OutOfDiskError
from genejepa.model import GeneJEPA
from genejepa.train.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

    from tests.reliability.conftest import Children

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# Files may not be larger than a limit


@pytest.mark.parametrize("writer", ["model", "checkpoint", "h5ad", "csv", "report"])
def test_no_size_of_the_disk_damages_what_was_there(
    writer: str,
    children: Children,
    tmp_path: Path,
    record_figure: Callable[[str, Any], None],
) -> None:
    """Row 109: twenty limits, from none of the file to more than all of it."""
    child = children.run("write_under_limits", directory=tmp_path, writer=writer, n_limits=20)
    tries = child.events("tried")
    assert len(tries) == 20
    for tried in tries:
        fits = tried["limit"] >= tried["largest"]
        assert tried["content"] == ("new" if fits else "old"), tried
        assert tried["rubbish"] == [], tried
        if fits:
            assert tried["error"] is None, tried
        else:
            assert tried["error"] == "OutOfDiskError", tried
            assert "OSError" in tried["classes"]
            assert str(tmp_path / "target") in tried["message"]
            assert " MB are free on this disk" in tried["message"]
            assert "\nFix: make room" in tried["message"]
    assert {tried["content"] for tried in tries} == {"old", "new"}
    record_figure(f"sizes of the disk tried with {writer}", len(tries))


def test_a_checkpoint_that_does_not_fit_is_warned_of_and_the_training_goes_on(
    children: Children, tmp_path: Path, jobs: ModuleType
) -> None:
    child = children.run("train_under_limits", checkpoint_dir=tmp_path, limits=[1000, None], failing_from=3)
    trained = child.event("trained")
    assert trained["error"] is None
    assert (trained["steps"], trained["interrupted"]) == (12, False)
    found = child.event("warnings")["found"]
    assert [name for name, _ in found] == ["CheckpointWarning", "CheckpointWarning"]
    for (_, message), step in zip(found, (4, 6), strict=True):
        assert f"The checkpoint of step {step} could not be written; the training goes on." in message
        assert str(tmp_path) in message
        assert "\nFix: make room" in message
    assert TrainingState.load(tmp_path).step == 12
    model = jobs.make_model()
    model.train(max_epochs=4, **jobs.TRAINING)
    assert trained["sha256"] == model.weights_sha256()


def test_a_last_checkpoint_that_does_not_fit_is_warned_of_and_the_model_is_there(
    children: Children, tmp_path: Path, jobs: ModuleType
) -> None:
    child = children.run("train_under_limits", checkpoint_dir=tmp_path, limits=[1000, 1000], failing_from=3)
    trained = child.event("trained")
    assert trained["error"] is None
    assert (trained["steps"], trained["interrupted"], trained["n_vectors"]) == (12, False, 60)
    found = child.event("warnings")["found"]
    assert [name for name, _ in found] == 6 * ["CheckpointWarning"]  # the last step's, and the one of the end
    assert found[-1][1].startswith("The last checkpoint could not be written; the model is usable.")
    assert str(tmp_path) in found[-1][1]
    assert "\nFix: make room" in found[-1][1]
    assert TrainingState.load(tmp_path).step == 2
    model = jobs.make_model()
    model.train(max_epochs=4, checkpoint_dir=tmp_path, resume=True, **jobs.TRAINING)
    assert trained["sha256"] == model.weights_sha256()


# A disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Fill a disk up to some free bytes, and return the file that does so."""
    filler = disk / "filler"
    status = os.statvfs(disk)
    filler.write_bytes(bytes(status.f_bavail * status.f_frsize - leave))
    return filler


@AS_ROOT
def test_a_full_disk_is_told_and_room_is_enough_to_go_on(small_disk: Path, jobs: ModuleType) -> None:
    """Row 109: a full disk."""
    model = jobs.make_model()
    model.train(max_epochs=1, **jobs.TRAINING)
    model.save(small_disk / "model")
    before = model.weights_sha256()
    filler = fill(small_disk, leave=20_000)
    model.train(max_epochs=1, **jobs.TRAINING)
    for directory in (small_disk / "model", small_disk / "other"):
        with pytest.raises(
            OutOfDiskError, match=r"(?s)cannot be written: No space left.* MB are free.*\nFix: make"
        ) as e:
            model.save(directory, overwrite=True)
        assert e.value.errno == errno.ENOSPC
    assert GeneJEPA.load(small_disk / "model").weights_sha256() == before
    filler.unlink()
    for directory in (small_disk / "model", small_disk / "other"):
        model.save(directory, overwrite=True)
        assert GeneJEPA.load(directory).weights_sha256() == model.weights_sha256()


@AS_ROOT
def test_a_failed_checkpoint_leaves_its_room_to_the_next(small_disk: Path, jobs: ModuleType) -> None:
    directory = small_disk / "checkpoint"
    jobs.make_model().train(max_epochs=1, checkpoint_dir=directory, **jobs.TRAINING)
    first = TrainingState.load(directory)
    sizes = {path.name.partition("-")[0]: in_pages(path.stat().st_size) for path in directory.iterdir()}
    # Enough for state and tensors, and nothing for the manifest.
    filler = fill(small_disk, leave=sizes["state"] + sizes["tensors"])
    for change in (1.0, 2.0, 3.0):
        tensors = {name: tensor + change for name, tensor in first.tensors.items()}
        other = replace(first, seconds=change, tensors=tensors)
        with pytest.raises(OutOfDiskError, match=r"manifest\.json cannot be written"):
            other.save(directory)
        assert same_tensors(TrainingState.load(directory), first)
    filler.unlink()
    other.save(directory)
    assert same_tensors(TrainingState.load(directory), other)


def same_tensors(one: TrainingState, other: TrainingState) -> bool:
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def in_pages(n_bytes: int) -> int:
    """Bytes that a file of this size takes on the small disk."""
    page = os.sysconf("SC_PAGESIZE")
    return -(-n_bytes // page) * page


@AS_ROOT
def test_little_room_is_warned_of_before_a_training(small_disk: Path, jobs: ModuleType) -> None:
    fill(small_disk, leave=100_000)
    model = jobs.make_model()
    with pytest.warns(CheckpointWarning) as caught:
        model.train(max_epochs=1, checkpoint_dir=small_disk / "checkpoint", **jobs.TRAINING)
    assert "has 0.1 MB free, and about 0." in str(caught[0].message)
    assert "The last checkpoint could not be written" in str(caught[-1].message)
    assert np.isfinite(model.get_latent_representation()).all()


# A directory that may only be read


@AS_ROOT
def test_a_directory_that_may_only_be_read(children: Children, public_path: Path, jobs: ModuleType) -> None:
    """Rows 104 and 109: no permission to write; a training fails before its first step, and embedding needs none."""
    model = jobs.make_model()
    model.train(max_epochs=1, **jobs.TRAINING)
    model.save(public_path / "model")
    jobs.make_adata().write_h5ad(public_path / "cells.h5ad")
    before = jobs.content_of(public_path)
    child = children.run("write_as_nobody", directory=public_path)
    tries = {tried["what"]: tried for tried in child.events("tried")}
    assert set(tries) == {"train", "save", "replace", "h5ad", "load", "embed"}
    for name in ("train", "save", "replace", "h5ad"):
        assert tries[name]["error"] == "PermissionError", tries[name]
        assert str(public_path) in tries[name]["message"]
    assert child.events("step") == []
    for name in ("load", "embed"):
        assert tries[name]["error"] is None, tries[name]
    assert jobs.content_of(public_path) == before
    assert sorted(path.name for path in public_path.iterdir()) == ["cells.h5ad", "model"]


@AS_ROOT
def test_a_file_system_that_may_only_be_read(small_disk: Path, jobs: ModuleType) -> None:
    """Row 109: a read-only file system."""
    model = jobs.make_model()
    model.train(max_epochs=1, **jobs.TRAINING)
    model.save(small_disk / "model")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for directory in (small_disk / "model", small_disk / "other"):
        with pytest.raises(OSError, match="Read-only file system"):
            model.save(directory, overwrite=True)
    with pytest.raises(OSError, match="Read-only file system"):
        model.train(max_epochs=1, checkpoint_dir=small_disk / "checkpoint", **jobs.TRAINING)
    assert GeneJEPA.load(small_disk / "model").weights_sha256() == model.weights_sha256()
