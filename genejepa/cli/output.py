"""Output files of a command, and what may not be overwritten."""

from __future__ import annotations

import io
import os
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from genejepa._constants import UNS_KEY
from genejepa.bundle import is_bundle, remove_bundle, require_own
from genejepa.errors import ConfigError
from genejepa.files import output_file, replacing, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.model import GeneJEPA

MODEL: Final = "model"
WORLD: Final = "world model"
CHECKPOINT: Final = "checkpoint"
CELLS, PROBE, REPORT = "cells.h5ad", "probe.csv", "report.html"
_COMPRESSIONS: Final = ("gzip", "lzf")
"""Those that every build of the HDF5 library can write."""


def check_directory(path: Path, *, cells: Path, overwrite: bool, resume: bool) -> None:
    """Refuse, before anything is read, an output directory in which a file would be replaced that may not be.

    Parameters
    ----------
    cells
        File with the cells, which may lie in that directory.
    overwrite
        Replace what is there.
    resume
        Replace what an earlier call has written.

    Raises
    ------
    ConfigError
        If it is a file, or holds something that may not be replaced.
    FileExistsError
        If something else than a model, a checkpoint and files is in their places.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, expected a directory.", fix="give another name to --out.")
    for name in (MODEL, CHECKPOINT):
        require_own(path / name, kind=name, overwrite=True)
    present = [name for name in (CELLS, PROBE, REPORT) if output_file(path / name).exists()]
    if overwrite:
        return
    if not resume and path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path} is not empty.", fix="give another name to --out, or pass --overwrite.")
    # The cells are written first, so that the others are of that call as well.
    if present and (is_same(cells, path / CELLS) or not _are_of_model(path / CELLS, path / MODEL)):
        raise ConfigError(
            f"{path / present[0]} is there, and was not written by the training to be resumed.",
            fix="give another name to --out, or pass --overwrite to replace it.",
        )


def remove_outputs(path: Path, *, cells: Path) -> None:
    """Remove what an earlier call has written, but the cells that are now the input."""
    for name in (MODEL, CHECKPOINT):
        remove_bundle(path / name)
    for name in (CELLS, PROBE, REPORT):
        if not is_same(cells, path / name):
            output_file(path / name).unlink(missing_ok=True)


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file or directory, also to one that is not there yet."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _are_of_model(cells: Path, directory: Path) -> bool:
    """Whether a file of cells was embedded by the model of a directory."""
    import h5py

    from genejepa.model import GeneJEPA

    try:
        with h5py.File(cells) as file:
            found = file[f"uns/{UNS_KEY}/model_id"].asstr()[()]
    except (OSError, RuntimeError, KeyError, AttributeError, TypeError):
        return False
    return is_bundle(directory) and bool(found == GeneJEPA.load(directory).model_id)


def is_complete(path: Path, model: GeneJEPA, options: Mapping[str, Any], *, any_batch_size: bool) -> bool:
    """Whether an output directory holds the result of training ``model``, which is not trained yet.

    Parameters
    ----------
    options
        Options of the run; those that change the result have to be those of the result.
    any_batch_size
        Take a result of any batch size.

    Raises
    ------
    ConfigError
        If the result there is of other cells or settings.
    """
    from genejepa.model import GeneJEPA

    if not is_bundle(path / MODEL) or is_bundle(path / CHECKPOINT):
        return False
    found = GeneJEPA.load(path / MODEL)
    assert found.record is not None  # it was loaded
    if found.record.interrupted:
        return False
    before, now = _settings_of(found), _settings_of(model)
    before |= {"precision": found.record.precision, "threads": found.record.threads}
    now |= {name: options[name] for name in ("precision", "threads") if options[name] not in (None, "auto")}
    names = now.keys() - ({"batch_size"} if any_batch_size else set())
    names -= {"labels_key"} if now["labels_key"] is None else set()  # labels change no model
    changes = [
        f"{name} was {before[name]!r} and is {now[name]!r}" for name in sorted(names) if before[name] != now[name]
    ]
    if found.genes != model.genes or not _are_equal(found.normalizer.arrays(), model.normalizer.arrays()):
        changes.append("the counts, genes or batches are others")
    if changes:
        raise ConfigError(
            f"{path} is complete, and not of these cells and settings: {'; '.join(changes)}.",
            fix="give another name to --out, or leave --resume out and pass --overwrite.",
        )
    return True


def _are_equal(one: Mapping[str, NDArray[np.float32]], other: Mapping[str, NDArray[np.float32]]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def _settings_of(model: GeneJEPA) -> dict[str, Any]:
    """All settings of a model by name."""
    settings = {name: value for section in model.config.to_dict().values() for name, value in section.items()}
    chosen = {"gene_symbols": model.gene_symbols, "allow_fractional": model.allow_fractional}
    return {**settings, **asdict(model.registration), **chosen}


def check_output(path: Path, *, overwrite: bool, others: Iterable[Path | None] = ()) -> None:
    """Refuse an output file that exists, unless it may be overwritten, or that cannot be one.

    Parameters
    ----------
    overwrite
        Replace what is there.
    others
        What the command reads, or also writes, and this file may not replace.

    Raises
    ------
    ConfigError
        If it is a directory, exists, is one of the others, or its directory does not exist.
    FileExistsError
        If it is a device, a pipe or a socket.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a directory, expected a file name.", fix="add a file name.")
    if any(other is not None and is_same(path, other) for other in others):
        raise ConfigError(f"{path} is read, or named for something else, by this command.", fix="give another name.")
    target = output_file(path)
    if target.exists() and not overwrite:
        raise ConfigError(f"{path} exists.", fix="give another name, or pass --overwrite.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} does not exist.", fix=f"mkdir -p {shlex.quote(str(target.parent))}")


def check_world(path: Path, *, overwrite: bool) -> None:
    """Refuse a directory for a world model that holds one, unless it may be overwritten, or something else.

    Raises
    ------
    ConfigError
        If it holds a world model.
    FileExistsError
        If it holds something else, or is a file.
    """
    require_own(path, kind=WORLD, overwrite=True)
    if is_bundle(path) and not overwrite:
        raise ConfigError(f"{path} holds a world model.", fix="give another name to --save-world, or pass --overwrite.")


def compression_of(path: Path) -> str | None:
    """How the arrays of an h5ad file are compressed; None for a zarr directory, or if they are not."""
    import h5py

    if path.is_dir():
        return None
    with h5py.File(path) as file:
        found = file.visititems(lambda _, item: getattr(item, "compression", None))
    return found if found in _COMPRESSIONS else None


def write_cells(adata: AnnData, path: Path, *, compression: str | None = None) -> None:
    """Write an h5ad file so that a reader sees the old content or the new one, never a part of it.

    Raises
    ------
    OSError
        If it cannot be written, such as :class:`genejepa.errors.OutOfDiskError`; the old file is as it was.
    """
    import h5py
    from anndata.io import write_elem

    with replacing(output_file(path)) as temporary, _PatientFile(temporary, "w+b") as file:
        try:
            with h5py.File(file, "w") as store:
                write_elem(store, "/", adata, dataset_kwargs={"compression": compression} if compression else {})
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
    write_atomically(output_file(path), "".join(parts).encode())
