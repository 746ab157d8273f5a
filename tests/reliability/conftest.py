"""Profiles, figures and child processes of the reliability tests.

``GENEJEPA_PROFILE`` says how long they may take: ``fast`` (the default, part of every test run), ``slow`` (minutes)
or ``nightly`` (up to an hour). ``GENEJEPA_FIGURES`` names a file to which measured figures are appended, one JSON
object a line.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from genejepa.train.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

HERE = Path(__file__).parent


# Profiles and figures


FIGURES = pytest.StashKey[dict[str, Any]]()
SHOWN = {
    "rows of the catalogue tested": "rows of the catalogue tested",
    "rows set aside": "set aside",
    "checks": "checks of an embedder",
    "cases": "random AnnData",
    "failures": "of them failed",
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how much was tried."""
    figures = config.stash.get(FIGURES, {})
    shown = [f"{figures[name]} {words}" for name, words in SHOWN.items() if name in figures]
    if shown:
        terminalreporter.write_line(f"reliability: {', '.join(shown)}")


@dataclass(frozen=True)
class Profile:
    """How long the tests may take."""

    name: Literal["fast", "slow", "nightly"]

    def pick(self, *, fast: int, slow: int, nightly: int) -> int:
        """The number for this profile."""
        return {"fast": fast, "slow": slow, "nightly": nightly}[self.name]


def chosen_profile() -> Profile:
    name = os.environ.get("GENEJEPA_PROFILE", "fast")
    if name not in ("fast", "slow", "nightly"):
        raise pytest.UsageError(f"GENEJEPA_PROFILE is {name!r}; use fast, slow or nightly")
    return Profile(name)  # type: ignore[arg-type]  # one of the three


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests of this folder that are marked ``slow`` to the longer profiles."""
    if chosen_profile().name != "fast":
        return
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="only with GENEJEPA_PROFILE=slow or nightly"))


@pytest.fixture(scope="session")
def profile() -> Profile:
    """Profile of this run; ``profile.pick(fast=2, slow=20, nightly=200)`` gives a number."""
    return chosen_profile()


@pytest.fixture
def record_figure(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Append a measured figure, with its name and that of the test, to the file that GENEJEPA_FIGURES names."""

    def record(name: str, value: Any) -> None:
        request.config.stash.setdefault(FIGURES, {})[name] = value
        path = os.environ.get("GENEJEPA_FIGURES")
        if path:
            line = json.dumps({"test": request.node.nodeid, "name": name, "value": value})
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    return record


# Child processes


class Child:
    """A process that runs a job of ``_child.py``."""

    def __init__(self, children: Children, pid: int, log: Path) -> None:
        self.children, self.pid, self.log = children, pid, log
        self.code: int | None = None

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the child has reported under this name so far."""
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["event"] == name]

    def event(self, name: str) -> dict[str, Any]:
        """The last report of this name."""
        found = self.events(name)
        assert found, f"no {name!r} in the log; {self.output()}"
        return found[-1]

    def wait_for(self, *names: str, at_least: int = 1, seconds: float = 60.0) -> None:
        """Wait until the child has reported one of ``names`` so often."""
        end = time.monotonic() + seconds
        while True:
            is_running = self.is_running()  # asked before: a last report may come just before the end
            if any(len(self.events(name)) >= at_least for name in names):
                return
            assert is_running, f"the child has ended before {names}; {self.output()}"
            assert time.monotonic() < end, f"no {names} after {seconds} s; {self.output()}"
            time.sleep(0.002)

    def is_running(self) -> bool:
        """Whether the child has not ended yet."""
        stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii")  # there until somebody has waited for it
        return stat.rpartition(")")[2].split()[0] != "Z"

    def send(self, number: int) -> float:
        """Send a signal, and return the time."""
        os.kill(self.pid, number)
        return time.monotonic()

    def wait(self, *, seconds: float = 120.0) -> int:
        """Wait for the end, and return the exit code, or the negative number of the signal that has ended it."""
        if self.code is None:
            self.code = self.children.ask(wait=self.pid, seconds=seconds)["code"]
            if self.code is None:
                self.send(signal.SIGKILL)
                self.children.ask(wait=self.pid, seconds=10.0)
                pytest.fail(f"the child still runs after {seconds} s; {self.output()}")
        return self.code

    def output(self) -> str:
        """What the child has printed, for messages."""
        path = Path(f"{self.log}.txt")
        return path.read_text(encoding="utf-8", errors="replace")[-3000:] if path.exists() else "no output"


class Children:
    """Starts children; see ``_child.py``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[Child] = []
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error", str(HERE / "_child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
        )
        assert self._read() == {"ready": True}

    def start(self, job: str, **options: Any) -> Child:
        """Start a job."""
        log = self.directory / f"{len(self.started)}.jsonl"
        child = Child(self, self.ask(job=job, log=str(log), options=options)["pid"], log)
        self.started.append(child)
        return child

    def run(self, job: str, **options: Any) -> Child:
        """Run a job to its end, which has to be a good one."""
        child = self.start(job, **options)
        assert child.wait() == 0, child.output()
        return child

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request, default=str) + "\n")
        self._server.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def close(self) -> None:
        for child in self.started:
            with contextlib.suppress(ProcessLookupError):
                if child.code is None:
                    child.send(signal.SIGKILL)
        self._server.communicate(timeout=30)


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """Starts child processes that run jobs of ``_child.py``, each in a hundredth of a second."""
    started = Children(tmp_path_factory.mktemp("children"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def jobs() -> ModuleType:
    """What is in ``_child.py``, for tests that need no child."""
    spec = importlib.util.spec_from_file_location("_child", HERE / "_child.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def public_path() -> Iterator[Path]:
    """Empty directory that every user of the computer can reach; that of ``tmp_path`` is private."""
    path = Path(tempfile.mkdtemp(prefix="genejepa-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


# Checkpoints


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[Path], str]:
    """SHA-256 of everything in a checkpoint but the time: step, history, counters, weights and moments."""

    def hashed(directory: Path) -> str:
        state = TrainingState.load(directory)
        digest = hashlib.sha256(json.dumps([state.step, state.stopped, state.rows, state.counters]).encode())
        for name, tensor in sorted(state.tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    return hashed
