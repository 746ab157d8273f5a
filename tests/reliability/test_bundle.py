"""Directories: a loss of power at any moment leaves the old version or the new one."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from genejepa import bundle, files
from genejepa.bundle import MANIFEST, is_bundle, read_bundle, remove_bundle, write_bundle
from genejepa.errors import DataError, ModelFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

OLD = {"config.json": b'{"a": 1}', "genes.csv": b"gene\nCD4\n", "tensors.safetensors": b"\x01" * 40}
NEW = {"config.json": b'{"a": 2}', "genes.csv": b"gene\nCD4\n", "tensors.safetensors": b"\x02" * 40}


def write(directory: Path, content: dict[str, bytes], *, kind: str = "model") -> None:
    write_bundle(directory, content, kind=kind, version=1, overwrite=True)


def read(directory: Path) -> dict[str, bytes] | None:
    """Content of a bundle; None where there is none."""
    if not is_bundle(directory):
        return None
    try:
        return read_bundle(directory, kind="model", version=1)
    except ModelFileError as error:
        return {"damaged": str(error).encode()}


# A loss of power
#
# A process that is killed loses nothing that it has written. A computer that stops loses what was not flushed: of the
# content of a file anything, and of the changes of a directory any, in any order. So everything that is done to a
# directory is recorded, and whatever may be left of it after each operation is laid out and read.


class Operation(NamedTuple):
    """Something done to a directory: to a file (a number that stays when it is renamed), or to a name."""

    what: str
    name: str = ""
    file: int = -1
    data: bytes = b""
    target: str = ""


class Recorder:
    """Records what is done to the files of a directory.

    Attributes
    ----------
    before
        Content by name at the start.
    log
        What was done since then.
    """

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
        self.before = {name: (directory / name).read_bytes() for name in names}
        self.file_of = {name: number for number, name in enumerate(names)}
        self.log: list[Operation] = []
        self._patch(patch, os, "open", self._opened)
        self._patch(patch, Path, "write_bytes", self._written)
        self._patch(patch, os, "fsync", self._flushed)
        self._patch(patch, os, "replace", self._renamed)
        self._patch(patch, Path, "unlink", self._removed)

    @staticmethod
    def _patch(patch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            note(result, *args)
            return result

        patch.setattr(owner, name, noted)

    def _opened(self, _: object, path: Path | str, *__: object) -> None:
        if not isinstance(path, Path) or path.suffix != ".tmp":  # the lock, or a directory to flush
            return
        name = path.name
        self.file_of[name] = 1 + max(self.file_of.values(), default=0)
        self.log.append(Operation("create", name, self.file_of[name]))

    def _written(self, _: object, path: Path, data: bytes) -> None:
        self.log.append(Operation("write", file=self.file_of[path.name], data=data))

    def _flushed(self, _: object, handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            self.log.append(Operation("flush directory"))
        else:
            name = Path(f"/proc/self/fd/{handle}").readlink().name
            self.log.append(Operation("flush", file=self.file_of[name]))

    def _renamed(self, _: object, source: Path, target: Path) -> None:
        file = self.file_of.pop(source.name)
        self.file_of[target.name] = file
        self.log.append(Operation("rename", source.name, file, target=target.name))

    def _removed(self, _: object, path: Path) -> None:
        if path.name in self.file_of:  # else there was nothing to remove
            self.log.append(Operation("remove", path.name, self.file_of.pop(path.name)))

    def left_after_a_kill(self, n_done: int) -> dict[str, bytes]:
        """Content by name after some operations, if nothing is lost."""
        return self._content(self.log[:n_done], lost=(), cut=1.0)

    def left_after_a_loss_of_power(self, n_done: int) -> Iterator[dict[str, bytes]]:
        """Every content by name that may be left after some operations."""
        done = self.log[:n_done]
        flushed = max((i for i, op in enumerate(done) if op.what == "flush directory"), default=-1)
        unsafe = [i for i, op in enumerate(done) if i > flushed and op.what in ("create", "rename", "remove")]
        for choice in range(2 ** len(unsafe)):
            # The last ones first: what was done last is lost, or is all that is kept.
            lost = {i for k, i in enumerate(reversed(unsafe)) if choice >> k & 1}
            for cut in (1.0, 0.5, 0.0):
                yield self._content(done, lost=lost, cut=cut)

    def _content(self, done: Sequence[Operation], *, lost: set[int] | tuple[()], cut: float) -> dict[str, bytes]:
        names = {name: number for number, name in enumerate(self.before)}
        data = dict(enumerate(self.before.values()))
        flushed: set[int] = set(data)
        for i, op in enumerate(done):
            if op.what == "write":
                data[op.file] = op.data
                flushed.discard(op.file)
            elif op.what == "flush":
                flushed.add(op.file)
            elif i in lost or op.what == "flush directory":
                continue
            elif op.what == "create":
                names[op.name] = op.file
            else:
                names.pop(op.name, None)
                if op.what == "rename":
                    names[op.target] = op.file
        whole = {
            file: content if file in flushed else content[: int(cut * len(content))] for file, content in data.items()
        }
        return {name: whole.get(file, b"") for name, file in names.items()}


@pytest.fixture
def laid_out(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Make a directory with this content."""

    def lay_out(content: dict[str, bytes]) -> Path:
        directory = tmp_path / "after"
        directory.mkdir(exist_ok=True)
        for path in directory.iterdir():
            path.unlink()
        for name, data in content.items():
            (directory / name).write_bytes(data)
        return directory

    return lay_out


def recorded(directory: Path, content: dict[str, bytes]) -> Recorder:
    """Write a bundle, and record how."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(directory, patch)
        write(directory, content)
    return recorder


@pytest.mark.parametrize("old", [OLD, None], ids=["replaced", "new"])
def test_a_loss_of_power_leaves_the_old_version_or_the_new_one(
    tmp_path: Path,
    laid_out: Callable[[dict[str, bytes]], Path],
    old: dict[str, bytes] | None,
    record_figure: Callable[[str, Any], None],
) -> None:
    directory = tmp_path / "model"
    if old is not None:
        write(directory, old)
    recorder = recorded(directory, NEW)
    outcomes: list[dict[str, bytes] | None] = []
    for n_done in range(len(recorder.log) + 1):
        for content in recorder.left_after_a_loss_of_power(n_done):
            outcomes.append(read(laid_out(content)))
            assert outcomes[-1] in (old, NEW), (recorder.log[:n_done], sorted(content))
    assert old in outcomes
    assert NEW in outcomes
    record_figure("states after a loss of power", len(outcomes))


def test_what_was_saved_stays_saved(tmp_path: Path, laid_out: Callable[[dict[str, bytes]], Path]) -> None:
    write(tmp_path / "model", OLD)
    recorder = recorded(tmp_path / "model", NEW)
    left = list(recorder.left_after_a_loss_of_power(len(recorder.log)))
    assert len(left) > 3  # the removal of old files need not last
    assert all(read(laid_out(content)) == NEW for content in left)


def test_the_recorder_sees_everything(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    write(directory, OLD)
    recorder = recorded(directory, NEW)
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert recorder.left_after_a_kill(len(recorder.log)) == found
    counts = {what: [op.what for op in recorder.log].count(what) for what in {op.what for op in recorder.log}}
    assert counts == {"create": 4, "write": 4, "flush": 4, "rename": 4, "flush directory": 4, "remove": 2}


def test_after_a_kill_the_next_write_clears_up(tmp_path: Path, laid_out: Callable[[dict[str, bytes]], Path]) -> None:
    directory = tmp_path / "model"
    write(directory, OLD)
    recorder = recorded(directory, NEW)
    expected = {path.name for path in directory.iterdir()}
    for n_done in range(len(recorder.log) + 1):
        after = laid_out(recorder.left_after_a_kill(n_done))
        assert read(after) in (OLD, NEW)
        write(after, NEW)
        assert {path.name for path in after.iterdir()} == expected


def no_flush(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", lambda _: None)


def no_flush_of_files(patch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    patch.setattr(os, "fsync", lambda file: fsync(file) if stat.S_ISDIR(os.fstat(file).st_mode) else None)


def no_flush_of_the_directory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "_flush_directory", lambda _: None)


def manifest_first(patch: pytest.MonkeyPatch) -> None:
    waiting: list[tuple[Path, bytes]] = []

    def write_first(path: Path, data: bytes) -> None:
        waiting.append((path, data))
        if path.name == MANIFEST:
            while waiting:
                files.write_atomically(*waiting.pop())

    patch.setattr(bundle, "write_atomically", write_first)


@pytest.mark.parametrize("mistake", [no_flush, no_flush_of_files, no_flush_of_the_directory, manifest_first])
def test_control_without_one_of_the_precautions_neither_is_left(
    tmp_path: Path,
    laid_out: Callable[[dict[str, bytes]], Path],
    mistake: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "model", OLD)
    with monkeypatch.context() as patch:
        recorder = Recorder(tmp_path / "model", patch)
        mistake(patch)  # on top of the recorder, which does not see what is left out
        write(tmp_path / "model", NEW)
    outcomes = (
        read(laid_out(content))
        for n_done in reversed(range(len(recorder.log) + 1))
        for content in recorder.left_after_a_loss_of_power(n_done)
    )
    assert any(outcome not in (OLD, NEW) for outcome in outcomes)


# Readers and writers


def test_a_reader_takes_the_version_that_has_replaced_the_one_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", OLD)
    replaced_while_reading(monkeypatch, lambda: write(tmp_path / "model", NEW))
    assert read(tmp_path / "model") == NEW


def test_a_reader_finds_a_version_that_has_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model", OLD)
    replaced_while_reading(
        monkeypatch, lambda: write(tmp_path / "model", NEW), after=lambda: write(tmp_path / "model", OLD)
    )
    assert read(tmp_path / "model") == OLD


def replaced_while_reading(
    patch: pytest.MonkeyPatch, change: Callable[[], None], *, after: Callable[[], None] = lambda: None
) -> None:
    """Let another writer be at work when the first file is read for the first time."""
    read_checked = bundle._read_checked
    calls: list[int] = []

    def reading(directory: Path, entry: dict[str, Any]) -> bytes:
        calls.append(1)
        if len(calls) > 1:
            return read_checked(directory, entry)
        change()
        try:
            return read_checked(directory, entry)
        finally:
            after()

    patch.setattr(bundle, "_read_checked", reading)


def test_a_damaged_bundle_is_not_read_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model", OLD)
    next((tmp_path / "model").glob("tensors-*")).write_bytes(b"\x03" * 40)
    n_reads: list[int] = []
    manifest_of = bundle._manifest_of

    def counted(*args: Any, **kwargs: Any) -> Any:
        n_reads.append(1)
        return manifest_of(*args, **kwargs)

    monkeypatch.setattr(bundle, "_manifest_of", counted)
    with pytest.raises(ModelFileError, match=r"tensors-.*SHA-256.*\nFix: "):
        read_bundle(tmp_path / "model", kind="model", version=1)
    assert len(n_reads) == 2


def test_a_writer_that_waits_in_vain_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 110: another writer that does not end."""
    write(tmp_path / "model", OLD)
    monkeypatch.setattr(bundle, "_LOCK_SECONDS", 0.2)
    with (tmp_path / "model" / ".lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match=r"another process has been writing to .*model for .*\nFix: "):
            write(tmp_path / "model", NEW)
        assert read(tmp_path / "model") == OLD
    write(tmp_path / "model", NEW)
    assert read(tmp_path / "model") == NEW


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.__getitem__)
def test_a_file_system_without_locks_is_written_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Row 109: a network file system without locks."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for content in (OLD, NEW):
        write(tmp_path / "model", content)
        assert read(tmp_path / "model") == content


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_others_is_left_as_it_is(tmp_path: Path, overwrite: bool) -> None:
    """Row 110: overwriting a directory that genejepa has not written."""
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "data").mkdir()
    with pytest.raises(FileExistsError, match=r"not of genejepa: it holds 'data'\. Nothing was.*\nFix: choose"):
        write_bundle(tmp_path, NEW, kind="model", version=1, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "notes.txt"]


FOREIGN = {
    "an application": b'{"name": "My app", "start_url": "/"}',
    "a list": b'["a.js"]',
    "too large": b'{"a": "' + bytes(1 << 17).replace(b"\0", b"a") + b'"}',
}


@pytest.mark.parametrize("beside", [[], ["index.html"]], ids=["alone", "with others"])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_manifest_of_others_is_left_as_it_is(tmp_path: Path, content: bytes, beside: list[str]) -> None:
    """Row 110: the name is not ours alone."""
    for name in beside:
        (tmp_path / name).write_text("mine", encoding="utf-8")
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(FileExistsError, match=r"not of genejepa: it holds '(manifest\.json|index\.html)'.*\nFix: "):
        write(tmp_path, NEW)
    remove_bundle(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([MANIFEST, *beside])


def test_a_bundle_whose_manifest_is_damaged_can_be_replaced(tmp_path: Path) -> None:
    write(tmp_path / "model", OLD)
    (tmp_path / "model" / MANIFEST).write_bytes(b"")
    write(tmp_path / "model", NEW)
    assert read(tmp_path / "model") == NEW


def test_a_manifest_that_comes_and_goes_is_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model", OLD)
    stat_of = Path.stat

    def vanished(path: Path, **options: Any) -> os.stat_result:
        if path.name == MANIFEST:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return stat_of(path, **options)

    monkeypatch.setattr(bundle, "is_bundle", lambda _: True)
    monkeypatch.setattr(Path, "stat", vanished)
    with pytest.raises(ModelFileError, match=r"manifest\.json cannot be read: .*No such file.*\nFix: "):
        read_bundle(tmp_path / "model", kind="model", version=1)


def test_files_that_could_not_be_read_are_not_written(tmp_path: Path) -> None:
    write(tmp_path / "model", OLD)
    with pytest.raises(DataError, match=r"genes\.csv would have 16,777,217 bytes, expected at most .*\nFix: "):
        write(tmp_path / "model", {**NEW, "genes.csv": bytes((1 << 24) + 1)})
    assert read(tmp_path / "model") == OLD


def test_a_bundle_is_not_replaced_unless_asked_for(tmp_path: Path) -> None:
    """Row 110: overwriting a model."""
    write(tmp_path / "model", OLD)
    with pytest.raises(FileExistsError, match=r"is not empty.*\nFix: choose another name, or pass `overwrite=True`"):
        write_bundle(tmp_path / "model", NEW, kind="model", version=1)
    assert read(tmp_path / "model") == OLD


def test_a_bundle_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    """Row 110: a checkpoint in the place of a model."""
    write(tmp_path / "model", OLD)
    with pytest.raises(FileExistsError, match=r"holds a model, not a checkpoint\.\nFix: "):
        write(tmp_path / "model", NEW, kind="checkpoint")
    assert read(tmp_path / "model") == OLD


def test_removing_a_bundle_leaves_the_files_of_others(tmp_path: Path) -> None:
    write(tmp_path / "one", OLD)
    remove_bundle(tmp_path / "one")
    assert not (tmp_path / "one").exists()
    write(tmp_path / "two", OLD)
    (tmp_path / "two" / "notes.txt").write_text("mine", encoding="utf-8")
    remove_bundle(tmp_path / "two")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["notes.txt"]
    remove_bundle(tmp_path / "none")


def test_removing_a_bundle_never_leaves_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model", OLD)
    unlink = Path.unlink
    complete: list[bool] = []

    def watched(path: Path, missing_ok: bool = False) -> None:
        complete.append(is_bundle(tmp_path / "model") and read(tmp_path / "model") == OLD)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    remove_bundle(tmp_path / "model")
    assert complete[0]
    assert not any(complete[1:])
