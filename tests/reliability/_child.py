"""Child processes of the reliability tests: a server that forks one for every job, and the jobs.

The server imports everything heavy once, while it has a single thread, so that a child starts at once; each child is
an ordinary process in a session of its own, which can be killed, signalled and limited. A child writes what happens to
a log, one JSON object a line, by unbuffered writes that a SIGKILL does not lose.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import anndata

    from genejepa._lightning import Callback
    from genejepa.model import GeneJEPA
    from genejepa.train.state import TrainingState

SETTINGS: dict[str, Any] = {
    "mask_var": "panel",  # a choice of genes by their variance would take longer than the training
    "embedding_dim": 8,
    "n_latents": 2,
    "dim": 16,
    "n_heads": 4,
    "n_layers": 1,
    "predictor_dim": 16,
    "n_blocks": 8,
    "n_slices": 16,
    "batch_size": 20,
    "dropout": 0.2,
}
TRAINING: dict[str, Any] = {"accelerator": "cpu", "precision": "32-true", "threads": 1, "progress_bar": False}
NOBODY = 65534


class Report:
    """Append what happens to the log."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __call__(self, event: str, **facts: Any) -> None:
        line = json.dumps({"event": event, "time": time.monotonic(), **facts}) + "\n"
        os.write(self._file, line.encode())


# Jobs ---------------------------------------------------------------------------------------------------


def train(
    report: Report,
    *,
    checkpoint_dir: str,
    max_epochs: int = 12,
    kill_at: list[int] | None = None,
    pause_after: int | None = None,
    go_on: bool = False,
    model_dir: str | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Train with checkpoints, and resume what is there.

    Parameters
    ----------
    kill_at
        Numbers of the file and of the moment of its writing at which this process kills itself.
    pause_after
        Number of the step after which the next one takes twenty seconds.
    go_on
        If the training was interrupted, use the model, then resume in this process.
    """
    if kill_at is not None:
        _kill_at(*kill_at)
    model = make_model(**(settings or {}))
    arguments: dict[str, Any] = {
        "max_epochs": max_epochs,
        "checkpoint_dir": checkpoint_dir,
        "checkpoint_minutes": None,
        "checkpoint_steps": 4,
        "resume": True,
        **TRAINING,
        **options,
    }
    with _warnings_reported(report):
        model.train(callbacks=[_watcher(report, pause_after)], **arguments)
    _report_model(report, "trained", model)
    if go_on:
        vectors = model.get_latent_representation()
        if model_dir is not None:
            model.save(model_dir)
        report("used", n_cells=len(vectors), norm=float((vectors**2).sum()))
        model.train(callbacks=[_watcher(report)], **arguments)
        _report_model(report, "resumed", model)


def save_one(report: Report, *, path: str, text: str, kill_at: list[int]) -> None:
    """Write a text file, and be killed while doing so."""
    from genejepa import files

    _kill_at(*kill_at)
    files.write_atomically(Path(path), text.encode())
    report("written")


def save_state(report: Report, *, source: str, target: str, kill_at: list[int], plain: bool = False) -> None:
    """Copy a checkpoint over another one, and be killed while doing so."""
    from genejepa.train.state import TrainingState

    state = TrainingState.load(Path(source))
    if plain:
        _write_plainly()
    _kill_at(*kill_at)
    state.save(Path(target))
    report("written")


def save_states(report: Report, *, sources: list[str], target: str, plain: bool) -> None:
    """Write several checkpoints in turn to one place, on a slow disk, until somebody kills this process."""
    from genejepa import files
    from genejepa.train.state import TrainingState

    states = [TrainingState.load(Path(source)) for source in sources]
    if plain:
        _write_plainly()
    files.reached = lambda moment: time.sleep(0.003 if moment == "written" else 0.0)
    while True:
        for state in states:
            state.save(Path(target))
            report("written")


def save_models(report: Report, *, source: str, target: str, change: float, n_times: int) -> None:
    """Save a model that differs from those of other writers, again and again."""
    import torch

    model = _load(source)
    assert model.jepa is not None
    with torch.no_grad():
        for weight in model.jepa.parameters():
            weight.add_(change)
    report("ready", sha256=model.weights_sha256())
    for _ in range(n_times):
        model.save(target, overwrite=True)
    report("done")


def load_models(report: Report, *, source: str, stop: str) -> None:
    """Load a model that others replace, until there is a file ``stop``; count how often each was found."""
    found: dict[str, int] = {}
    while not Path(stop).exists():
        sha256 = _load(source).weights_sha256()
        found[sha256] = found.get(sha256, 0) + 1
    report("found", models=found)


def write_under_limits(report: Report, *, directory: str, writer: str, n_limits: int) -> None:
    """Try to replace a file of every kind while no file may be larger than a limit."""
    target = Path(directory) / "target"
    write = writers(target)[writer]
    write(1)
    new = content_of(target)
    largest = max(len(data) for data in new.values())
    write(0)
    old = content_of(target)
    for i in range(n_limits):
        limit = round(1.1 * largest * i / (n_limits - 1))
        error = None
        with _limited(resource.RLIMIT_FSIZE, limit):
            try:
                write(1)
            except Exception as caught:  # noqa: BLE001  # whatever it is, the test judges it
                error = caught
        found = content_of(target)
        state = "new" if found == new else "old" if old.items() <= found.items() else "neither"
        rubbish = [path.name for path in files_below(Path(directory)) if path.suffix == ".tmp"]
        orphans = sorted(found.keys() - old.keys()) if state == "old" else []
        facts = {"limit": limit, "largest": largest, "content": state, "rubbish": rubbish, "orphans": orphans}
        report("tried", **facts, **_described(error))
        write(0)


def train_under_limits(report: Report, *, checkpoint_dir: str, limits: list[int | None], failing_from: int) -> None:
    """Train where from a step on no file may be larger than a limit, and go on where there is none."""
    from genejepa._lightning import Callback

    class FillDisk(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == failing_from:
                _set_limit(resource.RLIMIT_FSIZE, limits[0])
            if trainer.global_step == failing_from + 4:
                _set_limit(resource.RLIMIT_FSIZE, limits[1])

    model = make_model()
    error = None
    with _warnings_reported(report):
        try:
            model.train(
                max_epochs=4,
                checkpoint_dir=checkpoint_dir,
                checkpoint_minutes=None,
                checkpoint_steps=2,
                callbacks=[FillDisk()],
                **TRAINING,
            )
        except OSError as caught:
            error = caught
        _set_limit(resource.RLIMIT_FSIZE, None)  # the log is a file, too
    _report_model(report, "trained", model, n_vectors=len(model.get_latent_representation()), **_described(error))


def write_as_nobody(report: Report, *, directory: str) -> None:
    """Do everything that writes in a directory that this user may only read."""
    import anndata

    from genejepa.cli.output import write_cells

    cells = make_adata()
    model = make_model()
    model.train(max_epochs=1, **TRAINING)  # whatever is imported late is imported here, where it can be read
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    folder = Path(directory)
    steps: list[int] = []
    attempts: dict[str, Callable[[], object]] = {
        "train": lambda: model.train(
            max_epochs=2, checkpoint_dir=folder / "checkpoint", callbacks=[_watcher(report)], **TRAINING
        ),
        "save": lambda: model.save(folder / "other"),
        "replace": lambda: model.save(folder / "model", overwrite=True),
        "h5ad": lambda: write_cells(cells, folder / "cells.h5ad"),
        "load": lambda: _load(str(folder / "model")).weights_sha256(),
        "embed": lambda: _load(str(folder / "model")).embed(anndata.AnnData(cells.X.copy(), var=cells.var)),
    }
    for name, attempt in attempts.items():
        error = None
        try:
            attempt()
        except Exception as caught:  # noqa: BLE001  # whatever it is, the test judges it
            error = caught
        report("tried", what=name, steps=steps, **_described(error))


def train_in_little_memory(report: Report, *, megabytes: int, batch_size: int | Literal["auto"], n_obs: int) -> None:
    """Train while the process may take only so much more memory."""
    from genejepa.errors import CollapseWarning

    warnings.simplefilter("ignore", CollapseWarning)  # of few steps with whatever batches there is memory for
    model = make_model(n_obs=n_obs, n_vars=2000)
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGESIZE")
    error = None
    with _limited(resource.RLIMIT_AS, size + megabytes * 1_000_000):
        try:
            model.train(max_epochs=1, batch_size=batch_size, **TRAINING)
        except Exception as caught:  # noqa: BLE001  # whatever it is, the test judges it
            error = caught
    report("trained", is_trained=model.is_trained, batch_size=model.config.train.batch_size, **_described(error))


def command_line(report: Report, *, arguments: list[str]) -> None:
    """Run the command line; its exit code is that of this process."""
    from genejepa.cli import main
    from genejepa.pl import _embedding

    _embedding._umap = lambda Z, **_: Z[:, :2].astype("f8")  # the real one takes a minute
    sys.argv = ["genejepa", *arguments]
    report("begin")
    main()


# What jobs share ----------------------------------------------------------------------------------------


def make_adata(*, n_obs: int = 60, n_vars: int = 80) -> anndata.AnnData:
    import anndata
    import numpy as np
    from scipy import sparse

    rng = np.random.default_rng(0)
    rates = rng.gamma(2.0, 0.4, size=(1, n_vars)) * rng.lognormal(0.0, 0.5, size=(n_obs, 1))
    adata = anndata.AnnData(sparse.csr_matrix(rng.poisson(rates).astype(np.float32)))
    adata.obs_names = [f"cell{i}" for i in range(n_obs)]
    adata.var_names = [f"gene{j}" for j in range(n_vars)]
    adata.var["panel"] = np.arange(n_vars) % 2 == 0
    return adata


def make_model(*, n_obs: int = 60, n_vars: int = 80, **settings: Any) -> GeneJEPA:
    from genejepa.model import GeneJEPA

    return GeneJEPA(make_adata(n_obs=n_obs, n_vars=n_vars), **{**SETTINGS, **settings})


def _load(path: str) -> GeneJEPA:
    from genejepa.model import GeneJEPA

    return GeneJEPA.load(path)


def _watcher(report: Report, pause_after: int | None = None) -> Callback:
    """Report where a training begins and every step that is done; and make one step a long one."""
    from genejepa._lightning import Callback

    class Watcher(Callback):
        def on_train_start(self, _trainer: Any, pl_module: Any) -> None:
            report("begin", step=pl_module.steps_done)

        def on_train_batch_start(self, _trainer: Any, pl_module: Any, *_: Any) -> None:
            if pl_module.steps_done == pause_after:
                report("pause")
                time.sleep(20.0)

        def on_train_batch_end(self, _trainer: Any, pl_module: Any, *_: Any) -> None:
            report("step", step=pl_module.steps_done)

    return Watcher()


def _report_model(report: Report, event: str, model: GeneJEPA, **facts: Any) -> None:
    assert model.record is not None
    record = {"steps": model.record.steps, "interrupted": model.record.interrupted}
    report(event, sha256=model.weights_sha256(), **record, **facts)


@contextlib.contextmanager
def _warnings_reported(report: Report) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            report("warnings", found=[[warning.category.__name__, str(warning.message)] for warning in caught])


def _described(error: BaseException | None) -> dict[str, Any]:
    classes = [] if error is None else [cls.__name__ for cls in type(error).__mro__]
    return {"error": classes[0] if classes else None, "classes": classes, "message": str(error or "")}


def _kill_at(n_files: int, moment: int) -> None:
    """Be killed at a moment of the writing of the file with this number; after the last, when the first is removed."""
    from genejepa import files

    at, passed = moment, {"files": 0}

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def reached(moment: str) -> None:
        if (passed["files"], files.MOMENTS.index(moment)) == (n_files, at):
            kill()
        passed["files"] += moment == files.MOMENTS[-1]

    files.reached = reached
    if at == len(files.MOMENTS):
        unlink = Path.unlink

        def killed_unlink(path: Path, missing_ok: bool = False) -> None:
            unlink(path, missing_ok=missing_ok)
            if passed["files"] > n_files:
                kill()

        Path.unlink = killed_unlink  # type: ignore[assignment,method-assign]


def _write_plainly() -> None:
    """The control: write in place, as a program does that thinks of no interruption."""
    from genejepa import bundle, files

    def write(path: Path, data: bytes) -> None:
        files.reached("created")
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            files.reached("written")
            file.write(data[len(data) // 2 :])
        for moment in files.MOMENTS[2:]:
            files.reached(moment)

    bundle.write_atomically = write  # type: ignore[attr-defined]


def writers(target: Path) -> dict[str, Callable[[int], None]]:
    """Writers of every kind of file; each is given 0 or 1, and writes the old or the new content."""
    from genejepa.cli.output import write_cells, write_tables
    from genejepa.report import write_report

    cells = [make_adata(n_obs=n) for n in (60, 61)]
    models, states = [], []
    for n_epochs in (1, 2):
        model = make_model()
        model.train(max_epochs=n_epochs, checkpoint_dir=target.parent / "elsewhere", **TRAINING)
        models.append(model)
        states.append(_state(target.parent / "elsewhere"))
    return {
        "model": lambda i: models[i].save(target, overwrite=True),
        "checkpoint": lambda i: states[i].save(target),
        "h5ad": lambda i: write_cells(cells[i], target),
        "csv": lambda i: write_tables([cells[i].to_df()], target),
        "report": lambda i: _ignore(write_report(target, title=f"Report {i}", facts={"Cells": "60 " * (100 + i)})),
    }


def outputs() -> dict[str, Callable[[Path], None]]:
    """Writers of the files that a user names."""
    from genejepa.cli.output import write_cells, write_tables
    from genejepa.report import write_report

    cells = make_adata(n_obs=4, n_vars=3)
    return {
        "h5ad": lambda path: write_cells(cells, path),
        "csv": lambda path: write_tables([cells.to_df()], path),
        "report": lambda path: _ignore(write_report(path, title="Report", facts={})),
    }


def _ignore(_: object) -> None:
    return


def _state(directory: Path) -> TrainingState:
    from genejepa.train.state import TrainingState

    return TrainingState.load(directory)


def files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name != ".lock")


def content_of(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files_below(target)}


@contextlib.contextmanager
def _limited(kind: int, limit: int) -> Iterator[None]:
    _set_limit(kind, limit)
    try:
        yield
    finally:
        _set_limit(kind, None)


def _set_limit(kind: int, limit: int | None) -> None:
    most = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if limit is None else limit, most))


# Server -------------------------------------------------------------------------------------------------

JOBS: dict[str, Callable[..., None]] = {
    job.__name__: job
    for job in (
        train,
        save_one,
        save_state,
        save_states,
        save_models,
        load_models,
        write_under_limits,
        train_under_limits,
        write_as_nobody,
        train_in_little_memory,
        command_line,
    )
}


def serve() -> None:
    """Answer requests on stdin: ``job``, ``log`` and ``options`` fork a child, ``wait`` and ``seconds`` wait for it."""
    import filelock
    import safetensors.torch
    import scanpy

    import genejepa.cli.commands
    import genejepa.model
    import genejepa.report

    assert all([filelock, safetensors.torch, scanpy, genejepa.cli.commands, genejepa.model, genejepa.report])
    n_threads = len(list(Path("/proc/self/task").iterdir()))
    assert n_threads == 1, f"{n_threads} threads: a fork would lose them and what they hold"
    gc.freeze()  # else a child copies all of this memory when it is cleaned up
    _answer(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _answer(code=_wait(request["wait"], request["seconds"]))
            continue
        pid = os.fork()
        if pid == 0:
            _become_child(request["log"])
            JOBS[request["job"]](Report(request["log"]), **request["options"])
            return
        _answer(pid=pid)


def _become_child(log: str) -> None:
    """A session of its own, signals as in a new process, and output to a file."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(f"{log}.txt", os.O_WRONLY | os.O_CREAT, 0o600)
    for file, stream in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(file, stream)


def _wait(pid: int, seconds: float) -> int | None:
    """Exit code of a child, the negative signal if one has ended it, or None if it is still there."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def _answer(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
