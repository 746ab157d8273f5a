"""Directories that belong together: a manifest with the SHA-256 of every file, replaced last and at once.

Models and checkpoints are such directories. The files carry a part of their hash in their names, so that a new
version never overwrites the old one; which version is valid is decided by ``manifest.json`` alone. A reader, or a
process that starts after a crash, therefore finds the old version or the new one. Files are text, or arrays in the
safetensors format; nothing is pickled, so reading runs no code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import re
import stat
import warnings
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

from genejepa._version import __version__
from genejepa.errors import DataError, ModelFileError, ModelVersionError, OutOfMemoryError
from genejepa.files import disk_errors, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MANIFEST: Final = "manifest.json"
MORE_MEMORY: Final = "use a computer with more memory, or end other programs."
_FORMAT: Final = "genejepa"
_LOCK: Final = ".lock"
_LOCK_SECONDS: Final = 60.0
_LARGEST_MANIFEST: Final = 1 << 16
_LARGEST: Final = {".json": 1 << 21, ".csv": 1 << 24}
"""Bytes of the largest file that is read: real ones have a hundredth of it, and parsed they take much more memory."""

_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_VERSION: Final = re.compile(r"[0-9A-Za-z.+-]{1,40}")

_STORED: Final = re.compile(r"(config|genes|state|tensors|world)-[0-9a-f]{16}\.(json|csv|safetensors)")
_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{8}-\d+-.+\.tmp")
_ATTEMPTS: Final = 20
"""Times a reader starts again when a writer was faster."""


def write_bundle(
    directory: Path, files: Mapping[str, bytes], *, kind: str, version: int, overwrite: bool = False
) -> None:
    """Write or replace a directory as a whole.

    Parameters
    ----------
    files
        Content by name, such as ``config.json``.
    kind, version
        What the directory is, and the version of its format.
    overwrite
        Replace an earlier bundle.

    Raises
    ------
    FileExistsError
        If the directory holds a bundle and ``overwrite`` is False, or files but no bundle. Files beside a bundle are
        left alone.
    DataError
        If a file is so large that it would be refused when it is read.
    OSError
        If a file cannot be written; an earlier bundle is as it was.
    """
    require_own(directory, kind=kind, overwrite=overwrite)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        require_own(directory, kind=kind, overwrite=overwrite)  # another writer may have been faster
        _remove_others(directory, keep=_stored_names(_present(directory)))  # room, should a writer have been killed
        entries = {}
        for name, data in files.items():
            if len(data) > (largest := _LARGEST.get(PurePath(name).suffix, len(data))):
                raise DataError(
                    f"{directory / name} would have {len(data):,} bytes, expected at most {largest:,}.",
                    fix="train on fewer genes or batches, or give them shorter names.",
                )
            digest = hashlib.sha256(data).hexdigest()
            stem, _, suffix = name.partition(".")
            stored_as = f"{stem}-{digest[:16]}.{suffix}"
            write_atomically(directory / stored_as, data)
            entries[name] = {"stored_as": stored_as, "size": len(data), "sha256": digest}
        body = {"format": _FORMAT, "kind": kind, "format_version": version, "written_by": __version__, "files": entries}
        write_atomically(directory / MANIFEST, _manifest_bytes(body))
        _remove_others(directory, keep={str(entry["stored_as"]) for entry in entries.values()})


def read_bundle(directory: Path, *, kind: str, version: int) -> dict[str, bytes]:
    """Read a directory that :func:`write_bundle` wrote, and check every byte.

    Returns
    -------
    Content by name.

    Raises
    ------
    ModelVersionError
        If the format has another version.
    ModelFileError
        If the directory is missing, incomplete, damaged, or of another kind.
    OutOfMemoryError
        If it does not fit into memory.
    """
    for _ in range(_ATTEMPTS):
        manifest, written = _manifest_of(directory, kind=kind)
        try:
            return _read_files(directory, manifest, kind=kind, version=version)
        except ModelFileError:
            # A writer may have replaced the bundle since the manifest was read; then the new one counts.
            if _manifest_of(directory, kind=kind)[1] == written:
                raise
    raise damaged(directory, f"it was replaced {_ATTEMPTS} times while it was read")


def remove_bundle(directory: Path) -> None:
    """Remove a bundle, manifest first so that no half of it is left, and the directory if nothing else is in it.

    A directory of somebody else is left alone.
    """
    if not is_bundle(directory) or _foreign_names(directory):
        return
    (directory / MANIFEST).unlink()
    _remove_others(directory, keep=set())
    (directory / _LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        directory.rmdir()


def require_own(directory: Path, *, kind: str, overwrite: bool) -> None:
    """Refuse a place where a bundle may not be written.

    Raises
    ------
    FileExistsError
        As :func:`write_bundle`.
    """
    if not directory.is_dir():
        if directory.exists():
            raise FileExistsError(f"{directory} exists and is not a directory.\nFix: choose another name.")
        return
    if foreign := _foreign_names(directory):
        raise FileExistsError(
            f"{directory} is not empty, and not of genejepa: it holds {foreign[0]!r}. Nothing was changed.\n"
            "Fix: choose an empty or a new directory."
        )
    found = (_present(directory) or {}).get("kind", kind)
    if found != kind:
        raise FileExistsError(f"{directory} holds a {found}, not a {kind}.\nFix: choose another directory.")
    if _names(directory) and not overwrite:
        raise FileExistsError(f"{directory} is not empty.\nFix: choose another name, or pass `overwrite=True`.")


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {_LOCK}


def _foreign_names(directory: Path) -> list[str]:
    """Files that show that a directory is somebody else's; none beside a manifest of ours, where others may be."""
    present = _present(directory)
    if present is not None and present.get("format") == _FORMAT:
        return []
    names = _names(directory)
    ours = {name for name in names if _STORED.fullmatch(name) or _TEMPORARY.fullmatch(name)}
    if present is None and ours:
        ours |= {MANIFEST}  # damaged, or not written yet
    return sorted(names - ours)


def _present(directory: Path) -> dict[str, Any] | None:
    """What the manifest says; None if there is none, or none that can be read."""
    try:
        body: dict[str, Any] = parse_json(_read_file(directory / MANIFEST, size=None), directory / MANIFEST)
    except ModelFileError:
        return None
    return body


def is_bundle(directory: Path) -> bool:
    """Whether a directory holds a manifest."""
    return (directory / MANIFEST).is_file()


def parse_json(data: bytes, path: Path) -> Any:
    """Parse JSON that has to be one object, whose keys do not repeat and whose numbers are finite."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_int64,
        )
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__}, expected an object")
    return value


def damaged(path: Path, reason: str) -> ModelFileError:
    """Error for a file that cannot be used."""
    return ModelFileError(f"{path} cannot be read: {reason}.", fix="save it again, or copy it again from its source.")


# Writing ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other writers out; where the file system has no locks, go on without."""
    from filelock import FileLock, Timeout

    lock = FileLock(directory / _LOCK, timeout=_LOCK_SECONDS)
    try:
        # Where there are no locks, the library takes a file as a lock, and says so.
        with disk_errors(directory), warnings.catch_warnings(action="ignore"):
            lock.acquire()
    except Timeout as error:
        raise TimeoutError(
            f"another process has been writing to {directory} for {_LOCK_SECONDS:.0f} s.\n"
            f"Fix: wait for it, or remove {directory / _LOCK} if there is none."
        ) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _stored_names(manifest: Mapping[str, Any] | None) -> set[str]:
    """Files that a manifest lists, as far as it is one of ours."""
    try:
        return {str(entry["stored_as"]) for entry in (manifest or {})["files"].values()}
    except (AttributeError, KeyError, TypeError):
        return set()


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The manifest, whose last entry is the SHA-256 of all others."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=2) + "\n").encode()


def _remove_others(directory: Path, *, keep: set[str]) -> None:
    """Remove the files of earlier versions, and what stopped writers have left."""
    for path in list(directory.iterdir()):
        if path.name not in keep and (_STORED.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name)):
            path.unlink(missing_ok=True)


# Reading ----------------------------------------------------------------------------------------------


def _manifest_of(directory: Path, *, kind: str) -> tuple[bytes, tuple[int, int]]:
    """The manifest, and what tells it from one of the same content that was written later."""
    try:
        mode = directory.stat().st_mode
    except OSError as error:
        found = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be looked at ({error.strerror})"
        raise ModelFileError(
            f"{directory} {found}, expected the directory of a {kind}.", fix=_where_from(kind)
        ) from error
    if not stat.S_ISDIR(mode):
        raise ModelFileError(f"{directory} is a file, expected the directory of a {kind}.", fix=_where_from(kind))
    if not is_bundle(directory):
        raise ModelFileError(
            f"{directory} is not the directory of a {kind}: it has no {MANIFEST}.", fix=_where_from(kind)
        )
    try:
        status = (directory / MANIFEST).stat()  # before reading: a newer manifest must not look like the one read
    except OSError as error:
        raise damaged(directory / MANIFEST, str(error)) from error
    return _read_file(directory / MANIFEST, size=None), (status.st_ino, status.st_mtime_ns)


def _where_from(kind: str) -> str:
    if kind == "world model":
        return "give the directory that `world.save(...)` wrote."
    if kind == "model":
        return "give the directory that `model.save(...)` or `genejepa fit -o ...` wrote."
    return "give the directory that was passed as `checkpoint_dir`."


def _read_files(directory: Path, manifest: bytes, *, kind: str, version: int) -> dict[str, bytes]:
    path = directory / MANIFEST
    body = parse_json(manifest, path)
    if body.get("format") != _FORMAT:
        raise damaged(path, "it was not written by genejepa")
    if body.get("kind") != kind:
        raise ModelFileError(
            f"{directory} holds a {str(body.get('kind'))[:20]}, expected a {kind}.", fix=_where_from(kind)
        )
    _check_version(path, body, version=version)
    digest = body.pop("sha256", None)
    # The same bytes again, or something was changed after writing.
    if _manifest_bytes(body) != manifest:
        raise damaged(path, f"its content does not agree with its checksum {str(digest)[:16]!r}")
    return {name: _read_checked(directory, entry) for name, entry in _entries(path, body)}


def _check_version(path: Path, body: Mapping[str, Any], *, version: int) -> None:
    found, writer = body.get("format_version"), body.get("written_by")
    if found == version:
        return
    known = isinstance(writer, str) and _VERSION.fullmatch(writer)  # the file may be anybody's, and Fix is pasted
    raise ModelVersionError(
        f"{path} was written by genejepa {writer if known else 'of an unknown version'} in format {str(found)[:20]}; "
        f"this is genejepa {__version__}, which reads format {version}.",
        fix=f"pip install genejepa=={writer}" if known else "fit and save the model again.",
    )


def _entries(path: Path, body: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Files of a manifest, whose names lead nowhere else."""
    files = body.get("files")
    if not isinstance(files, dict) or not files:
        raise damaged(path, "it lists no files")
    for name, entry in files.items():
        known = isinstance(entry, dict) and set(entry) == {"stored_as", "size", "sha256"}
        if not known or not isinstance(entry["stored_as"], str) or not _STORED.fullmatch(entry["stored_as"]):
            raise damaged(path, f"its entry of {name!r} is not one that genejepa writes")
    return list(files.items())


def _read_checked(directory: Path, entry: Mapping[str, Any]) -> bytes:
    path = directory / entry["stored_as"]
    data = _read_file(path, size=entry["size"])
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        raise damaged(path, f"its SHA-256 starts with {found[:16]}, the manifest has {str(entry['sha256'])[:16]}")
    return data


def _read_file(path: Path, *, size: int | None) -> bytes:
    """Bytes of a regular file in its place, of a known size or not too large."""
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode) and path.resolve(strict=True).parent == path.parent.resolve():
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise damaged(path, "it is not a regular file of this directory")
        if size is not None and status.st_size != size:
            raise damaged(path, f"it has {status.st_size:,} bytes, the manifest has {size!r}")
        largest = _LARGEST_MANIFEST if path.name == MANIFEST else _LARGEST.get(path.suffix)
        if largest is not None and status.st_size > largest:
            raise damaged(path, f"it has {status.st_size:,} bytes, and no such file has more than {largest:,}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise damaged(path, "the file is missing") from error
    except (OSError, RuntimeError) as error:  # a directory, no permission, a loop of links
        raise damaged(path, str(error)) from error
    except MemoryError as error:
        raise OutOfMemoryError(f"memory has run out while reading {path}.", fix=MORE_MEMORY) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _int64(text: str) -> int:
    if not -(2**63) <= (number := int(text)) < 2**63:
        raise ValueError(f"{text[:20]}... is too large a number")
    return number
