"""Files: an error or a kill at any moment leaves the old content or the new one, and nothing else."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from genejepa import files
from genejepa.cli.output import _PatientFile
from genejepa.errors import CheckpointWarning, ConfigError, OutOfDiskError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from tests.reliability.conftest import Children

OLD, NEW = b"the old content", b"the new content, which is longer"
FULL = (errno.ENOSPC, errno.EDQUOT)
ERRNOS = (*FULL, errno.EIO, errno.EACCES, errno.EROFS)
OPERATIONS = ("open", "write", "fsync", "replace", "directory fsync")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "file.txt"
    files.write_atomically(target, OLD)
    return target


def neighbours(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


# One file


def test_every_file_passes_all_moments_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    monkeypatch.setattr(files, "reached", passed.append)
    files.write_atomically(path, NEW)
    assert tuple(passed) == files.MOMENTS
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("moment", files.MOMENTS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_at_any_moment_leaves_old_or_new(
    path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: type[BaseException]
) -> None:
    def reached(name: str) -> None:
        if name == moment:
            raise error

    monkeypatch.setattr(files, "reached", reached)
    with pytest.raises(error):
        files.write_atomically(path, NEW)
    is_replaced = files.MOMENTS.index(moment) >= files.MOMENTS.index("replaced")
    assert path.read_bytes() == (NEW if is_replaced else OLD)
    assert neighbours(path) == ["file.txt"]


def test_an_error_of_the_writer_leaves_the_old_file(path: Path) -> None:
    def write_half() -> None:
        with files.replacing(path) as temporary:
            temporary.write_bytes(NEW[:5])
            raise ValueError("the writer")

    with pytest.raises(ValueError, match="the writer"):
        write_half()
    assert path.read_bytes() == OLD
    assert neighbours(path) == ["file.txt"]


@pytest.mark.parametrize("moment", range(len(files.MOMENTS)), ids=files.MOMENTS)
def test_a_kill_at_any_moment_leaves_old_or_new_and_the_next_write_clears_up(
    path: Path, children: Children, moment: int
) -> None:
    child = children.start("save_one", path=path, text=NEW.decode(), kill_at=[0, moment])
    assert child.wait() == -signal.SIGKILL
    is_replaced = moment >= files.MOMENTS.index("replaced")
    assert path.read_bytes() == (NEW if is_replaced else OLD)
    assert len(neighbours(path)) == (1 if is_replaced else 2)
    files.write_atomically(path, b"the third content")
    assert path.read_bytes() == b"the third content"
    assert neighbours(path) == ["file.txt"]


def test_what_a_living_process_writes_is_not_removed(path: Path) -> None:
    with files.replacing(path) as temporary:
        temporary.write_bytes(NEW)
        files.write_atomically(path, b"another writer")
        assert path.read_bytes() == b"another writer"
    assert path.read_bytes() == NEW
    assert neighbours(path) == ["file.txt"]


def of_another_computer(path: Path) -> Path:
    """Temporary file of this target as another computer names it."""
    with files.replacing(path) as temporary:
        temporary.write_bytes(OLD)
        target, _, _ = temporary.name.rpartition(".")[0].rpartition(".")
    foreign = path.with_name(f"{target}.00000000-1-abc.tmp")
    foreign.write_bytes(b"")
    return foreign


def test_what_another_computer_writes_is_kept_for_a_day(path: Path) -> None:
    foreign = of_another_computer(path)
    files.write_atomically(path, NEW)
    assert foreign.exists()
    yesterday = time.time() - 25 * 3600
    os.utime(foreign, (yesterday, yesterday))
    files.write_atomically(path, NEW)
    assert not foreign.exists()


@pytest.mark.parametrize(
    "name", ["[ab]*.txt", "a.txt.b", 250 * "x" + ".txt", 120 * "é" + ".txt", "zelltypen für α.h5ad", " ", "-rf"]
)
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Row 104: names that are long, not ASCII, or patterns; what others have left stays."""
    target, others = tmp_path / name, [tmp_path / "ab.txt", tmp_path / "a.txt"]
    abandoned = [of_another_computer(path) for path in (target, *others)]
    for temporary in abandoned:
        os.utime(temporary, (0, 0))
    files.write_atomically(target, NEW)
    assert target.read_bytes() == NEW
    assert [temporary.exists() for temporary in abandoned] == [False, True, True]


def test_a_link_stays_a_link_and_what_it_leads_to_is_replaced(tmp_path: Path, jobs: ModuleType) -> None:
    """Row 104: an output that lies on another disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for name, write in jobs.outputs().items():
        (tmp_path / name).symlink_to(disk / name)
        for _ in range(2):  # what it leads to is not there, then it is
            write(tmp_path / name)
            assert (tmp_path / name).is_symlink(), name
            assert (disk / name).stat().st_size > 0, name
    assert sorted(path.name for path in disk.iterdir()) == sorted(jobs.outputs())


@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "link to a fifo"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, jobs: ModuleType, kind: str) -> None:
    """Row 104: a device as output, which a superuser could replace."""
    path = tmp_path / "target"
    elsewhere = tmp_path / "elsewhere" / "fifo"
    elsewhere.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(elsewhere)
        path.symlink_to(elsewhere)
    before = path.stat()
    for write in (lambda path: files.write_atomically(path, NEW), *jobs.outputs().values()):
        with pytest.raises((FileExistsError, ConfigError), match=r"(is not a regular file|is a folder).*\nFix: "):
            write(path)
    assert path.stat() == before
    assert neighbours(path) == ["elsewhere", "target"]


def test_a_file_system_that_loses_bytes_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda file, data: write(file, data[:-1]))
    with pytest.raises(OSError, match="has not kept what was written") as caught:
        files.write_atomically(path, NEW)
    assert caught.value.errno == errno.EIO
    assert path.read_bytes() == OLD
    assert neighbours(path) == ["file.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)], ids="umask {:o}".format)
@pytest.mark.parametrize("kind", ["model", "checkpoint", "h5ad", "csv", "report"])
def test_files_get_the_permissions_that_umask_allows(
    kind: str, umask: int, mode: int, writers: dict[str, Callable[[int], None]], target: Path, jobs: ModuleType
) -> None:
    before = os.umask(umask)
    try:
        writers[kind](0)
        assert {stat.S_IMODE(file.stat().st_mode) for file in jobs.files_below(target)} == {mode}
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)


def test_the_umask_of_other_threads_is_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(_: int) -> int:
        raise AssertionError

    monkeypatch.setattr(os, "umask", changed)
    files.write_atomically(path, NEW)


# Faults of the file system, for every writer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writers")


@pytest.fixture(scope="session")
def writers(jobs: ModuleType, folder: Path) -> dict[str, Callable[[int], None]]:
    """Writers of every kind of file; each takes 0 or 1, and writes the old or the new content to ``target``."""
    made: dict[str, Callable[[int], None]] = jobs.writers(folder / "target")
    return made


@pytest.fixture
def target(folder: Path) -> Iterator[Path]:
    path = folder / "target"
    yield path
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def leave_half(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"half")


class Fault:
    """Makes an operation of the file system fail once, after it was done ``skip`` times."""

    def __init__(self, patch: pytest.MonkeyPatch, operation: str, number: int, *, skip: int) -> None:
        self.number, self.skip = number, skip
        self.has_fired = False
        if operation == "open":
            self._patch(patch, os, "open", when=lambda path, *_: str(path).endswith(".tmp"))
        elif operation == "write":
            self._patch(patch, Path, "write_bytes", before=lambda file, _: leave_half(file))
            self._patch_h5ad(patch)
        elif operation == "replace":
            self._patch(patch, os, "replace")
        else:
            is_asked = stat.S_ISDIR if operation == "directory fsync" else stat.S_ISREG
            self._patch(patch, os, "fsync", when=lambda file: is_asked(os.fstat(file).st_mode))

    def _patch_h5ad(self, patch: pytest.MonkeyPatch) -> None:
        write = _PatientFile.write

        def failing(file: _PatientFile, data: Any) -> int:
            if not self.has_fired:
                self.has_fired = self.skip == 0
                self.skip -= 1
                if self.has_fired:  # what the operating system answers ends up here
                    file.error = OSError(self.number, os.strerror(self.number))
            return write(file, data)

        patch.setattr(_PatientFile, "write", failing)

    def _patch(
        self,
        patch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        *,
        when: Callable[..., bool] = lambda *_, **__: True,
        before: Callable[..., object] = lambda *_, **__: None,
    ) -> None:
        original = getattr(owner, name)

        def failing(*args: Any, **options: Any) -> Any:
            if not self.has_fired and when(*args):
                if self.skip == 0:
                    self.has_fired = True
                    before(*args)
                    raise OSError(self.number, os.strerror(self.number))
                self.skip -= 1
            return original(*args, **options)

        patch.setattr(owner, name, failing)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", ["model", "checkpoint", "h5ad", "csv", "report"])
def test_a_fault_at_any_operation_leaves_old_or_new(
    kind: str,
    operation: str,
    writers: dict[str, Callable[[int], None]],
    target: Path,
    jobs: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    record_figure: Callable[[str, Any], None],
) -> None:
    """Rows 104 and 109: permission denied, and a file system that is full, over quota, failing or read-only."""
    write = writers[kind]
    write(1)
    new = jobs.content_of(target)
    n_faults = 0
    for number, skip in faults():
        write(0)
        old = jobs.content_of(target)
        assert old != new
        error = None
        with monkeypatch.context() as patch:
            fault = Fault(patch, operation, number, skip=skip)
            try:
                write(1)
            except OSError as caught:
                error = caught
        if not fault.has_fired:
            assert skip > 0, f"{operation} was never asked for"
            assert error is None
            continue
        n_faults += 1
        found = jobs.content_of(target)
        assert old.items() <= found.items() or (operation == "directory fsync" and new.items() <= found.items())
        assert not list(target.parent.rglob("*.tmp"))
        check_error(error, number, target)
    assert n_faults >= len(ERRNOS)
    record_figure(f"faults injected at {operation} of {kind}", n_faults)


def faults() -> Iterator[tuple[int, int]]:
    """Every error number at the first operation, and a full disk at each later one of the largest bundle."""
    yield from ((number, 0) for number in ERRNOS)
    yield from zip(itertools.repeat(errno.ENOSPC), range(1, 4))


def check_error(error: OSError | None, number: int, target: Path) -> None:
    if number in FULL:
        assert isinstance(error, OutOfDiskError)
        text = str(error)
        assert str(target) in text
        assert os.strerror(number) in text
        assert " MB are free on this disk" in text
        assert "\nFix: make room" in text
    else:
        assert error is not None
        assert error.errno == number


# Before a training


def test_check_writable_makes_the_directory_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b", n_bytes=1)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_check_writable_warns_where_there_is_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_190_000))
    with pytest.warns(CheckpointWarning, match=r"has 1\.2 MB free, and about 1\.2 MB are needed\.\nFix: make room"):
        files.check_writable(tmp_path, n_bytes=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_210_000))
    files.check_writable(tmp_path, n_bytes=1_000_000)  # a warning would be an error


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.__getitem__)
def test_check_writable_finds_a_disk_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutOfDiskError if number in FULL else OSError, match=os.strerror(number)):
        files.check_writable(tmp_path, n_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_check_writable_refuses_a_file(path: Path) -> None:
    with pytest.raises(FileExistsError):
        files.check_writable(path, n_bytes=1)
