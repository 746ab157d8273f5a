"""SIGKILL: whatever the moment, a restart loses at most one interval and ends with the same bits."""

from __future__ import annotations

import itertools
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from genejepa import files
from genejepa.errors import ModelFileError
from genejepa.train.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.reliability.conftest import Child, Children, Profile

INTERVAL = 4
"""Steps between two checkpoints of the job ``train``."""

N_FILES = 3
"""Files of a checkpoint: state, tensors, manifest."""

LAST = len(files.MOMENTS)


@pytest.fixture(scope="module")
def reference(
    children: Children, fingerprint: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """Fingerprint of the last checkpoint, and SHA-256 of the weights, of a training that nobody disturbs."""
    directory = tmp_path_factory.mktemp("undisturbed")
    child = children.run("train", checkpoint_dir=directory / "checkpoint")
    assert child.event("trained")["steps"] == 36
    return fingerprint(directory / "checkpoint"), child.event("trained")["sha256"]


@pytest.fixture(scope="module")
def states(children: Children, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one training."""
    directory = tmp_path_factory.mktemp("states")
    for n_epochs in (1, 2):
        children.run("train", checkpoint_dir=directory / str(n_epochs), max_epochs=n_epochs)
    return directory / "1", directory / "2"


def first_step(child: Child) -> int:
    """Steps that were done when the training began; all of them if there was nothing to do."""
    begun = child.events("begin")
    return int(begun[0]["step"] if begun else child.event("trained")["steps"])


def lost_steps(before: Child, after: Child) -> int:
    """Steps that were done before a kill, and have to be done again."""
    done = max((int(event["step"]) for event in before.events("step")), default=first_step(before))
    return done - first_step(after)


def names_in(directory: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in directory.iterdir()}


# While a checkpoint is written


def kill_points(n_files: int) -> list[Any]:
    """Every moment of the writing of every file; after the last one, the removal of the old files."""
    points = [
        pytest.param([file, moment], id=f"file {file}, {name}")
        for file in range(n_files)
        for moment, name in enumerate(files.MOMENTS)
    ]
    return [*points, pytest.param([n_files - 1, LAST], id="cleaning up")]


@pytest.mark.parametrize("kill_at", kill_points(N_FILES))
def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new_one(
    children: Children,
    states: tuple[Path, Path],
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
    kill_at: list[int],
) -> None:
    old, new = states
    target = tmp_path / "checkpoint"
    shutil.copytree(old, target)
    child = children.start("save_state", source=new, target=target, kill_at=kill_at)
    assert child.wait() == -signal.SIGKILL
    is_replaced = tuple(kill_at) >= (N_FILES - 1, files.MOMENTS.index("replaced"))
    assert fingerprint(target) == fingerprint(new if is_replaced else old)
    TrainingState.load(old).save(target)
    assert fingerprint(target) == fingerprint(old)
    assert names_in(target) == {".lock", "manifest.json", "state", "tensors"}
    assert len(list(target.iterdir())) == 4


def test_control_a_plain_write_that_is_killed_leaves_nothing_that_can_be_read(
    children: Children, states: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = states
    target = tmp_path / "checkpoint"
    shutil.copytree(old, target)
    kill_at = [N_FILES - 1, files.MOMENTS.index("written")]  # in the middle of the manifest
    child = children.start("save_state", source=new, target=target, kill_at=kill_at, plain=True)
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(ModelFileError):
        TrainingState.load(target)


@pytest.mark.parametrize(
    "kill_at",
    [
        pytest.param([1, 1], id="the first checkpoint"),
        pytest.param([5, 2], id="the second checkpoint"),
        pytest.param([5, LAST], id="cleaning up"),
        *(pytest.param(point.values[0], id=f"all: {point.id}", marks=pytest.mark.slow) for point in kill_points(6)),
    ],
)
def test_a_training_that_is_killed_in_a_checkpoint_ends_with_the_same_bits(
    children: Children,
    reference: tuple[str, str],
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
    kill_at: list[int],
) -> None:
    first = children.start("train", checkpoint_dir=tmp_path, kill_at=kill_at)
    assert first.wait() == -signal.SIGKILL
    second = children.run("train", checkpoint_dir=tmp_path)
    assert 0 <= lost_steps(first, second) <= INTERVAL
    assert (fingerprint(tmp_path), second.event("trained")["sha256"]) == reference


def test_a_training_that_is_killed_again_after_its_restart_ends_with_the_same_bits(
    children: Children,
    reference: tuple[str, str],
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
    profile: Profile,
    record_figure: Callable[[str, Any], None],
) -> None:
    rng = np.random.default_rng(0)
    n_pairs = profile.pick(fast=1, slow=15, nightly=60)
    for pair in range(n_pairs):
        directory = tmp_path / str(pair)
        runs: list[Child] = []
        for _ in range(2):
            point = [int(rng.integers(2 * N_FILES)), int(rng.integers(LAST))]
            runs.append(children.start("train", checkpoint_dir=directory, kill_at=point))
            assert runs[-1].wait() == -signal.SIGKILL
        runs.append(children.run("train", checkpoint_dir=directory))
        assert all(lost_steps(*pair_of_runs) <= INTERVAL for pair_of_runs in itertools.pairwise(runs))
        assert (fingerprint(directory), runs[-1].event("trained")["sha256"]) == reference
    record_figure("pairs of kills", n_pairs)


# At any moment


def test_a_training_that_is_killed_at_random_moments_ends_with_the_same_bits(
    children: Children,
    reference: tuple[str, str],
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
    profile: Profile,
    record_figure: Callable[[str, Any], None],
) -> None:
    rng = np.random.default_rng(1)
    n_kills = profile.pick(fast=3, slow=20, nightly=200)
    killed: list[Child] = []
    rounds, lost, left = 0, [0], 0
    while len(killed) < n_kills:
        directory = tmp_path / str(rounds)
        before: Child | None = None
        while True:
            child = children.start("train", checkpoint_dir=directory)
            child.wait_for("begin", "trained")
            if before is not None:
                assert first_step(child) >= first_step(before)
                lost.append(lost_steps(before, child))
            is_last = len(killed) == n_kills
            if not is_last:
                time.sleep(rng.uniform(0.0, 0.5))
                child.send(signal.SIGKILL)
            code = child.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL, child.output()
            killed.append(child)
            left += sum(path.suffix == ".tmp" for path in directory.glob(".*"))
            before = child
        assert (fingerprint(directory), child.event("trained")["sha256"]) == reference
        assert not list(directory.glob(".*.tmp"))
        rounds += 1
    assert max(lost) <= INTERVAL
    record_figure("random kills", len(killed))
    record_figure("trainings finished after random kills", rounds)
    record_figure("most steps lost by a kill", max(lost))
    record_figure("steps between checkpoints", INTERVAL)
    record_figure("temporary files left by kills, and removed", left)


@pytest.mark.parametrize("plain", [False, True], ids=["genejepa", "control: plain writes"])
def test_a_writer_that_is_killed_at_random_moments(
    children: Children,
    states: tuple[Path, Path],
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
    profile: Profile,
    record_figure: Callable[[str, Any], None],
    plain: bool,
) -> None:
    rng = np.random.default_rng(2)
    whole = {fingerprint(state) for state in states}
    n_kills = profile.pick(fast=20, slow=100, nightly=500)
    n_damaged = 0
    target = tmp_path / "checkpoint"
    shutil.copytree(states[0], target)
    for _ in range(n_kills):
        child = children.start("save_states", sources=states, target=target, plain=plain)
        child.wait_for("written")
        time.sleep(rng.uniform(0.0, 0.02))
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        try:
            assert fingerprint(target) in whole
        except ModelFileError:
            n_damaged += 1
    record_figure(f"checkpoints damaged by {n_kills} kills of a writer", n_damaged)
    assert (n_damaged > 0) is plain
