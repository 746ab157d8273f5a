"""Output files of a command, and what may not be overwritten."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

from genejepa.errors import ConfigError
from genejepa.files import replacing, write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData


MODEL: Final = "model"
CHECKPOINT: Final = "checkpoint"
CELLS, PROBE, REPORT = "cells.h5ad", "probe.csv", "report.html"


def prepare_directory(path: Path, *, overwrite: bool) -> None:
    """Make the output directory; refuse one that holds something, unless that may be overwritten."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, expected a directory.", fix="give another name to --out.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConfigError(f"{path} is not empty.", fix="give another name to --out, or pass --overwrite.")
    path.mkdir(parents=True, exist_ok=True)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse an output file that exists, unless it may be overwritten, or whose directory does not exist."""
    if path.is_dir():
        raise ConfigError(f"{path} is a directory, expected a file name.", fix="add a file name.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists.", fix="give another name, or pass --overwrite.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} does not exist.", fix=f"mkdir -p {path.parent}")


def write_cells(adata: AnnData, path: Path) -> None:
    """Write an h5ad file so that a reader sees the old content or the new one, never a part of it.

    Raises
    ------
    OSError
        If it cannot be written, such as :class:`genejepa.errors.OutOfDiskError`; the old file is as it was.
    """
    import h5py
    from anndata.io import write_elem

    with replacing(path) as temporary, _PatientFile(temporary, "w+b") as file:
        try:
            with h5py.File(file, "w") as store:
                write_elem(store, "/", adata)
        finally:
            if file.error is not None:
                raise file.error


class _PatientFile(io.FileIO):
    """A file that takes everything and keeps the first error for later.

    The HDF5 library cannot close a file that it cannot write to, and the process dies of that when it ends.

    Attributes
    ----------
    error
        The first error; what was written after it is lost.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or pretend to."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while self.error is None and len(left):
                left = left[super().write(left) :]  # a disk that is nearly full takes a part
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size, or pretend to."""
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
        return self.tell() if size is None else size

    def readinto(self, buffer: Any) -> int:
        """Read; what was lost reads as zeros."""
        n_read = super().readinto(buffer) or 0
        if self.error is None:
            return n_read
        memoryview(buffer).cast("B")[n_read:] = bytes(len(memoryview(buffer).cast("B")) - n_read)
        return len(memoryview(buffer).cast("B"))


def write_tables(tables: Sequence[pd.DataFrame], path: Path) -> None:
    """Write the tables of probes as one CSV file."""
    # Not pandas.concat: it compares the records that tables carry along.
    parts = [table.to_csv(index=False, header=not i) for i, table in enumerate(tables)]
    write_atomically(path, "".join(parts).encode())
