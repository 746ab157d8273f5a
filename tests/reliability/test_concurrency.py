"""Concurrency: many processes write one directory, others read it, and every version that is read is a whole one."""

from __future__ import annotations

import copy
import errno
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest

from genejepa import errors
from genejepa.model import GeneJEPA

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from tests.reliability.conftest import Children, Profile

N_WRITERS, N_READERS = 8, 2


def test_readers_find_one_whole_model_while_eight_processes_write(
    children: Children,
    jobs: ModuleType,
    tmp_path: Path,
    profile: Profile,
    record_figure: Callable[[str, Any], None],
) -> None:
    """Row 110: concurrent writers."""
    n_saves = profile.pick(fast=10, slow=50, nightly=200)
    model = jobs.make_model()
    model.train(max_epochs=1, **jobs.TRAINING)
    source, target, stop = tmp_path / "source", tmp_path / "target", tmp_path / "stop"
    for directory in (source, target):
        model.save(directory)
    readers = [children.start("load_models", source=target, stop=stop) for _ in range(N_READERS)]
    writers = [
        children.start("save_models", source=source, target=target, change=0.01 * (i + 1), n_times=n_saves)
        for i in range(N_WRITERS)
    ]
    for writer in writers:
        assert writer.wait() == 0, writer.output()
    stop.touch()
    for reader in readers:
        assert reader.wait() == 0, reader.output()
    written = {writer.event("ready")["sha256"] for writer in writers}
    assert len(written) == N_WRITERS
    found = [reader.event("found")["models"] for reader in readers]
    assert set().union(*found) <= {model.weights_sha256(), *written}
    assert all(len(models) > 2 for models in found), "the readers have seen too few versions"
    assert GeneJEPA.load(target).weights_sha256() in written
    assert not list(target.glob(".*.tmp"))
    assert len(list(target.iterdir())) == 5  # manifest, lock, settings, genes, weights
    record_figure("models written at once", N_WRITERS * n_saves)
    record_figure("whole models read meanwhile", sum(sum(models.values()) for models in found))


def test_threads_may_write_one_directory(jobs: ModuleType, tmp_path: Path) -> None:
    """Row 110: concurrent writers of one process."""
    models = [jobs.make_model(seed=seed) for seed in range(4)]
    for model in models:
        model.train(max_epochs=1, **jobs.TRAINING)
    errors: list[BaseException] = []

    def save(model: GeneJEPA) -> None:
        try:
            for _ in range(10):
                model.save(tmp_path / "model", overwrite=True)
                GeneJEPA.load(tmp_path / "model")
        except BaseException as error:  # noqa: BLE001  # a thread has nobody else to tell
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert GeneJEPA.load(tmp_path / "model").weights_sha256() in {model.weights_sha256() for model in models}


ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GeneJEPAError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_reaches_another_process(kind: type[errors.GeneJEPAError]) -> None:
    """A pool of processes sends errors as pickles, and waits for ever for one that cannot be read."""
    error = kind("`X` holds nothing.", fix="fill it.")
    if isinstance(error, OSError):
        error.errno = errno.ENOSPC
    error.add_note("while testing")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is kind
        assert str(other) == str(error) == "`X` holds nothing.\nFix: fill it."
        assert (other.problem, other.fix, other.__notes__) == (error.problem, error.fix, ["while testing"])
        assert getattr(other, "errno", None) == getattr(error, "errno", None)
