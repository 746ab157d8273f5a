"""Writing files so that an interruption at any moment leaves the old content or the new one.

Everything that genejepa writes goes through :func:`replacing`: a temporary file beside the target, flushed to the
disk, checked, and renamed. What becomes of a process that is killed in between is tried out at each of
:data:`MOMENTS`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import secrets
import shutil
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from genejepa.errors import CheckpointWarning, OutOfDiskError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

MOMENTS: Final = ("created", "written", "flushed", "replaced", "directory flushed")
"""What :func:`reached` is called with, in this order, for every file."""

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_FOR_DIRECTORIES: Final = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)
"""What some network file systems say to the flushing of a directory."""

_HEADROOM: Final = 1.2
"""Free space wanted, in sizes of the files to come: the old ones are there until the new ones are complete."""

_ABANDONED_SECONDS: Final = 24 * 3600.0


def reached(moment: str) -> None:
    """Pass one of :data:`MOMENTS`; does nothing, and is where a test stops the process."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, and put it in the place of ``path`` when the block ends without an error.

    A reader sees the old content or the new one, never a part of it: the temporary file lies in the same directory,
    is flushed to the disk and renamed; the directory entry is flushed too. The file gets the permissions that
    ``umask`` allows. After an error the old file is as it was and the temporary one is gone; what a killed process
    left is removed by the next call for the same file. A link is itself replaced; see :func:`output_file`.

    Raises
    ------
    FileExistsError
        If a directory, a device, a pipe or a socket is at ``path``.
    OutOfDiskError
        If the disk is full or a quota used up.
    OSError
        If the directory cannot be written to, or the block has left no file.
    """
    _require_regular(path)
    _remove_abandoned(path)
    with disk_errors(path):
        temporary = path.with_name(f"{_prefix(path, os.getpid())}{secrets.token_hex(4)}.tmp")
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))  # less what umask forbids
        try:
            reached("created")
            yield temporary
            reached("written")
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            reached("flushed")
            os.replace(temporary, path)  # noqa: PTH105  # the one call that tests make fail
            reached("replaced")
            _flush_directory(path.parent)
            reached("directory flushed")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes by :func:`replacing`, and read them again before they replace the old ones.

    Raises
    ------
    OSError
        If the bytes on the disk are others than those written; the old file is as it was.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)
        if temporary.read_bytes() != data:
            raise OSError(errno.EIO, "the file system has not kept what was written", str(path))


def output_file(path: Path) -> Path:
    """Where a file that the user has named is written: where a link leads, so that the link stays.

    Raises
    ------
    FileExistsError
        If a directory, a device, a pipe or a socket is there.
    """
    target = Path(os.path.realpath(path))  # unlike Path.resolve, it takes links that lead in a circle
    _require_regular(target)
    return target


def _require_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} exists and is not a regular file.\nFix: give the name of a file.")


def check_writable(directory: Path, *, n_bytes: int) -> None:
    """Make a directory, and find out before a long computation whether its result can be written there.

    Parameters
    ----------
    n_bytes
        Size of the files to come.

    Raises
    ------
    OSError
        If a file cannot be made, written and removed there.

    Warns
    -----
    CheckpointWarning
        If less than 1.2 times ``n_bytes`` is free.
    """
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"genejepa")
            file.flush()
            os.fsync(file.fileno())
    free = shutil.disk_usage(directory).free
    if free < _HEADROOM * n_bytes:
        warnings.warn(
            f"{directory} has {_megabytes(free)} free, and about {_megabytes(int(_HEADROOM * n_bytes))} are needed.\n"
            "Fix: make room, or choose another disk.",
            CheckpointWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Give errors of a full disk our class and message."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutOfDiskError) or error.errno not in _FULL:
            raise
        directory = path if path.is_dir() else path.parent
        free = shutil.disk_usage(directory).free
        full = OutOfDiskError(
            f"{path} cannot be written: {error.strerror}. {_megabytes(free)} are free on this disk; what was there "
            "before is as it was.",
            fix="make room (or raise the quota), or write to another disk.",
        )
        full.errno = error.errno
        raise full from error


def _prefix(path: Path, pid: int) -> str:
    """Start of the name of a temporary file: which file, and which process of which computer writes it."""
    return f"{_of_target(path)}{zlib.crc32(platform.node().encode()):08x}-{pid}-"


def _of_target(path: Path) -> str:
    """Start of the names of all temporary files of a target; short, as the longest name of a file is 255 bytes."""
    readable = "".join(c for c in path.name if c.isascii() and (c.isalnum() or c in "._-"))
    return f".{readable[:40]}-{zlib.crc32(path.name.encode('utf-8', 'surrogateescape')):08x}."


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of this target whose process is gone, or that nobody has touched for a day."""
    here = _prefix(path, 0).removesuffix("0-")
    for temporary in path.parent.glob(f"{_of_target(path)}*.tmp"):
        pid = temporary.name.removeprefix(here).partition("-")[0]
        with contextlib.suppress(OSError):  # another process may be doing the same, or it is not ours to remove
            gone = temporary.name.startswith(here) and pid.isdecimal() and not _is_alive(int(pid))
            if gone or time.time() - temporary.stat().st_mtime > _ABANDONED_SECONDS:
                temporary.unlink()
                logger.info("removed %s, left by a process that was stopped", temporary)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 does not ask there, it stops
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def _flush_directory(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a directory
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_FOR_DIRECTORIES:
            raise
    finally:
        os.close(handle)
