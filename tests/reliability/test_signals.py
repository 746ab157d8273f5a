"""Ctrl-C and SIGTERM: whatever the moment, the training ends soon, is usable, and goes on with the same bits."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from genejepa._lightning import Callback
from genejepa.bundle import is_bundle
from genejepa.model import GeneJEPA
from genejepa.train.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from genejepa._lightning import LightningModule, Trainer
    from tests.reliability.conftest import Child, Children, Profile

TERMINATED = 128 + signal.SIGTERM
N_STEPS = 36
"""Steps of the job ``train``."""

MOST_SECONDS = {signal.SIGINT: 5.0, signal.SIGTERM: 10.0}
NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: signal.Signals(n).name)


@pytest.fixture(scope="module")
def reference(
    children: Children, fingerprint: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """Fingerprint of the last checkpoint, and SHA-256 of the weights, of the job ``train`` that nobody disturbs."""
    directory = tmp_path_factory.mktemp("undisturbed")
    child = children.run("train", checkpoint_dir=directory)
    return fingerprint(directory), child.event("trained")["sha256"]


# At every place in the loop, in this process


class Disturber(Callback):
    """Sends signals to this process from one hook of the training loop, once."""

    def __init__(self, hook: str, numbers: list[signal.Signals], *, after: int) -> None:
        self.numbers, self.after = numbers, after
        setattr(self, hook, self._disturb)

    def _disturb(self, _trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if int(pl_module.steps_done) >= self.after:  # type: ignore[arg-type]  # a number
            while self.numbers:
                signal.raise_signal(self.numbers.pop())


EARLY = ("setup", "on_fit_start", "on_train_start")
WITHIN = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_train_epoch_end",
)
LATE = ("on_train_end", "on_fit_end", "teardown")


@pytest.fixture(scope="module")
def undisturbed(jobs: ModuleType, fingerprint: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("undisturbed")
    jobs.make_model().train(max_epochs=3, checkpoint_dir=directory, **jobs.TRAINING)
    return fingerprint(directory)


@pytest.mark.parametrize("hook", [*EARLY, *WITHIN, *LATE])
@NUMBERS
def test_a_signal_at_any_place_of_the_loop_ends_the_training_between_two_steps(
    hook: str,
    number: signal.Signals,
    jobs: ModuleType,
    undisturbed: str,
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    options = {**jobs.TRAINING, "max_epochs": 3, "checkpoint_dir": tmp_path, "checkpoint_minutes": None}
    model = jobs.make_model()
    disturber = Disturber(hook, [number], after=0 if hook in EARLY else 4)
    code, names = trained_under(model, callbacks=[disturber], **options)
    assert not disturber.numbers, "no signal was sent"
    assert code == (TERMINATED if number == signal.SIGTERM else None)
    is_finished = TrainingState.load(tmp_path).is_finished
    assert is_finished is (hook in LATE)
    assert names == (["TrainingInterruptedWarning"] if number == signal.SIGINT and not is_finished else [])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert np.isfinite(model.get_latent_representation()).all()
    other = jobs.make_model()
    for resumed in (model, other):
        assert trained_under(resumed, resume=True, **options) == (None, [])
        assert fingerprint(tmp_path) == undisturbed
    assert model.weights_sha256() == other.weights_sha256()


@pytest.mark.parametrize("hook", [*EARLY, *WITHIN])
def test_a_second_ctrl_c_at_any_place_of_the_loop_leaves_a_usable_model(
    hook: str, jobs: ModuleType, undisturbed: str, fingerprint: Callable[[Path], str], tmp_path: Path
) -> None:
    options = {**jobs.TRAINING, "max_epochs": 3, "checkpoint_dir": tmp_path, "checkpoint_steps": 2}
    model = jobs.make_model()
    disturber = Disturber(hook, [signal.SIGINT, signal.SIGINT], after=0 if hook in EARLY else 4)
    code, names = trained_under(model, callbacks=[disturber], **options)
    assert not disturber.numbers
    assert (code, names) == (None, ["TrainingInterruptedWarning"])
    assert model.is_trained is (hook not in EARLY)
    if model.is_trained:
        assert np.isfinite(model.get_latent_representation()).all()
    trained_under(model, resume=True, **options)  # from the last checkpoint
    assert fingerprint(tmp_path) == undisturbed


def trained_under(model: GeneJEPA, **options: Any) -> tuple[int | str | None, list[str]]:
    """Exit code, if the training has ended the process, and names of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.train(**options)
        except SystemExit as error:
            return error.code, [warning.category.__name__ for warning in caught]
    return None, [warning.category.__name__ for warning in caught]


# At random moments, in other processes


def steps_done(child: Child) -> int:
    return max((int(event["step"]) for event in child.events("step")), default=0)


def test_ctrl_c_at_random_moments_leaves_a_usable_model_that_goes_on(
    children: Children,
    reference: tuple[str, str],
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
    profile: Profile,
    record_figure: Callable[[str, Any], None],
) -> None:
    rng = np.random.default_rng(0)
    n_signals = profile.pick(fast=3, slow=10, nightly=30)
    seconds: list[float] = []
    for number in range(3 * n_signals):
        directory = tmp_path / str(number)
        child = children.start(
            "train", checkpoint_dir=directory / "checkpoint", model_dir=str(directory / "model"), go_on=True
        )
        child.wait_for("begin")
        time.sleep(rng.uniform(0.0, 0.3))
        sent = child.send(signal.SIGINT)
        code = child.wait()
        if steps_done(child) == N_STEPS and code != 0:
            continue  # the signal came after the last step, as a plain Ctrl-C
        assert code == 0, child.output()
        trained = child.event("trained")
        assert trained["time"] - sent < MOST_SECONDS[signal.SIGINT]
        assert trained["interrupted"]
        assert [name for name, _ in child.events("warnings")[0]["found"]] == ["TrainingInterruptedWarning"]
        assert child.event("used")["n_cells"] == 60
        saved = GeneJEPA.load(directory / "model")
        assert saved.weights_sha256() == trained["sha256"]
        assert (fingerprint(directory / "checkpoint"), child.event("resumed")["sha256"]) == reference
        seconds.append(trained["time"] - sent)
        if len(seconds) == n_signals:
            break
    assert len(seconds) == n_signals
    record_figure("SIGINT at random moments", n_signals)
    record_figure("most seconds from SIGINT to the return of train", round(max(seconds), 2))


def test_sigterm_at_random_moments_writes_a_checkpoint_and_exits_with_143(
    children: Children,
    reference: tuple[str, str],
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
    profile: Profile,
    record_figure: Callable[[str, Any], None],
) -> None:
    rng = np.random.default_rng(1)
    n_signals = profile.pick(fast=3, slow=10, nightly=30)
    seconds: list[float] = []
    for number in range(3 * n_signals):
        directory = tmp_path / str(number)
        # No checkpoint but the one that the signal asks for.
        child = children.start("train", checkpoint_dir=directory, checkpoint_steps=None)
        child.wait_for("begin")
        time.sleep(rng.uniform(0.0, 0.3))
        sent = child.send(signal.SIGTERM)
        code = child.wait()
        if steps_done(child) == N_STEPS and code == -signal.SIGTERM:
            continue  # the signal came after the training
        assert code == TERMINATED, child.output()
        seconds.append(time.monotonic() - sent)
        assert TrainingState.load(directory).step == steps_done(child)
        resumed = children.run("train", checkpoint_dir=directory)
        assert (fingerprint(directory), resumed.event("trained")["sha256"]) == reference
        if len(seconds) == n_signals:
            break
    assert len(seconds) == n_signals
    assert max(seconds) < MOST_SECONDS[signal.SIGTERM]
    record_figure("SIGTERM at random moments", n_signals)
    record_figure("most seconds from SIGTERM to the end of the process", round(max(seconds), 2))


def test_the_first_ctrl_c_waits_for_the_step_and_the_second_does_not(
    children: Children, reference: tuple[str, str], fingerprint: Callable[[Path], str], tmp_path: Path
) -> None:
    child = children.start("train", checkpoint_dir=tmp_path, pause_after=6, go_on=True)
    child.wait_for("pause")
    child.send(signal.SIGINT)
    time.sleep(0.2)
    assert not child.events("trained")
    sent = child.send(signal.SIGINT)
    child.wait_for("trained", seconds=MOST_SECONDS[signal.SIGINT])
    trained = child.event("trained")
    assert trained["time"] - sent < MOST_SECONDS[signal.SIGINT]
    assert (trained["steps"], trained["interrupted"]) == (6, True)
    child.wait_for("used", seconds=10.0)
    assert child.wait() == 0, child.output()
    assert (fingerprint(tmp_path), child.event("resumed")["sha256"]) == reference


# Workers


def members(child: Child) -> list[int]:
    """Processes of the session of a child that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, session = fields[0], int(fields[3])
        if session == child.pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def check_no_orphans(child: Child, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and members(child):
        time.sleep(0.05)
    assert members(child) == []


@pytest.mark.slow
@pytest.mark.parametrize("to", ["process", "group"])
@pytest.mark.parametrize("when", ["begin", "start of the workers"])
@NUMBERS
def test_workers_end_with_the_training(
    number: signal.Signals,
    to: str,
    when: str,
    children: Children,
    reference: tuple[str, str],
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
) -> None:
    """A terminal and most schedulers send the signal to the workers as well."""
    child = children.start("train", checkpoint_dir=tmp_path, num_workers=2)
    if when == "begin":
        child.wait_for("begin")
    else:
        wait_for_members(child, n=3)
    assert len(members(child)) >= 3
    (os.killpg if to == "group" else os.kill)(child.pid, number)
    code = child.wait(seconds=30.0)
    assert code == (TERMINATED if number == signal.SIGTERM else 0), child.output()
    check_no_orphans(child, seconds=5.0)
    resumed = children.run("train", checkpoint_dir=tmp_path)
    assert (fingerprint(tmp_path), resumed.event("trained")["sha256"]) == reference


def wait_for_members(child: Child, *, n: int) -> None:
    end = time.monotonic() + 60.0
    while len(members(child)) < n:
        assert time.monotonic() < end, child.output()
        time.sleep(0.02)


@pytest.mark.slow
def test_workers_of_a_killed_process_end_by_themselves(children: Children, tmp_path: Path) -> None:
    child = children.start("train", checkpoint_dir=tmp_path, num_workers=2, max_epochs=1000)
    child.wait_for("step")
    assert len(members(child)) >= 3
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    check_no_orphans(child, seconds=15.0)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_training_with_an_error(children: Children, tmp_path: Path) -> None:
    child = children.start("train", checkpoint_dir=tmp_path, num_workers=2, max_epochs=1000)
    child.wait_for("step", at_least=9)
    workers = [pid for pid in members(child) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert child.wait(seconds=30.0) == 1
    assert re.search(rf"DataLoader worker \(pid(\(s\))? {workers[0]}\)", child.output())
    check_no_orphans(child, seconds=5.0)
    assert TrainingState.load(tmp_path).step >= 4


# The command line


@pytest.fixture(scope="module")
def cells(jobs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    jobs.make_adata().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def fit_arguments(cells: Path, jobs: ModuleType) -> list[str]:
    settings = {name: value for name, value in jobs.SETTINGS.items() if name not in ("mask_var", "batch_size")}
    options = ["--mask-var", "panel", "--batch-size", "20", "--max-epochs", "40", "--threads", "1"]
    options += ["--precision", "32-true", "--accelerator", "cpu", "--checkpoint-minutes", "0", "--resume"]
    return ["fit", str(cells), *options, *(f"--set={name}={value}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def model_id(children: Children, fit_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Identifier of the model that an undisturbed call makes."""
    out = tmp_path_factory.mktemp("fit") / "out"
    children.run("command_line", arguments=[*fit_arguments, "-o", str(out)])
    return GeneJEPA.load(out / "model").model_id


@NUMBERS
def test_the_command_line_resumes_after_a_signal(
    number: signal.Signals, children: Children, fit_arguments: list[str], model_id: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    child = children.start("command_line", arguments=[*fit_arguments, "-o", str(out)])
    while not is_bundle(out / "checkpoint"):
        assert child.is_running(), child.output()
        time.sleep(0.005)
    sent = child.send(number)
    assert child.wait() == 128 + number, child.output()
    assert time.monotonic() - sent < MOST_SECONDS[number]
    assert 0 < TrainingState.load(out / "checkpoint").step < 120
    if number == signal.SIGINT:
        assert "--resume" in child.output()
        assert GeneJEPA.load(out / "model").model_id != model_id
    assert "Traceback" not in child.output()
    children.run("command_line", arguments=[*fit_arguments, "-o", str(out)])
    assert GeneJEPA.load(out / "model").model_id == model_id
    assert sorted(path.name for path in out.iterdir()) == ["cells.h5ad", "model", "report.html"]
    again = children.run("command_line", arguments=[*fit_arguments, "-o", str(out)])
    assert "Nothing to resume" in again.output()


# A notebook

IN_THE_KERNEL = """
import importlib.util, warnings
spec = importlib.util.spec_from_file_location("_child", {child!r})
jobs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jobs)
from genejepa._lightning import Callback
class Teller(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            print("three steps are done", flush=True)
def train(**options):
    model.train(max_epochs=4000, checkpoint_steps=None, callbacks=[Teller()], **jobs.TRAINING, **options)
model = jobs.make_model()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_interrupting_a_notebook_leaves_a_usable_model(
    jobs: ModuleType, monkeypatch: pytest.MonkeyPatch, record_figure: Callable[[str, Any], None]
) -> None:
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        assert run_cell(client, IN_THE_KERNEL.format(child=str(jobs.__file__))) == ("ok", "")
        times: list[float] = []

        def interrupt(text: str) -> None:
            if "three steps are done" in text and not times:
                times.append(time.monotonic())
                manager.interrupt_kernel()

        status, text = run_cell(client, "train()", listen=interrupt)
        seconds = time.monotonic() - times[0]
        assert status == "ok", text
        assert "TrainingInterruptedWarning" in text
        assert seconds < MOST_SECONDS[signal.SIGINT]
        status, text = run_cell(client, "print(model.record.interrupted, model.get_latent_representation().shape)")
        assert (status, text.strip()) == ("ok", "True (60, 8)")
        record_figure("seconds from the interruption of a notebook to the return of train", round(seconds, 2))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run_cell(client: Any, code: str, *, listen: Callable[[str], None] = lambda _: None) -> tuple[str, str]:
    """Status of a cell, and what it has printed; ``listen`` is told all of it whenever there is more."""
    request = client.execute(code)
    text = ""
    while True:
        message = client.get_iopub_msg(timeout=120)
        if message["parent_header"].get("msg_id") != request:
            continue
        if message["content"].get("execution_state") == "idle":
            break
        text += message["content"].get("text", "")
        listen(text)
    reply = client.get_shell_msg(timeout=60)
    return str(reply["content"]["status"]), text
