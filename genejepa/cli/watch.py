"""Reading cells without waiting for ever: on a damaged file the HDF5 library can hang, deaf to every interruption."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import warnings
from typing import TYPE_CHECKING

from genejepa.data.inputs import read_cells
from genejepa.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData


def read_watched(path: Path, *, seconds: float, backed: bool = False) -> AnnData:
    """Read cells, as :func:`genejepa.data.inputs.read_cells`, after a look at the file in another process.

    Raises
    ------
    DataError
        If the HDF5 library does not come back from the file within ``seconds``, or crashes on it.
    """
    file = path.expanduser()
    if file.is_file():
        _require_answer(file, seconds=seconds)
    return read_cells(file, backed=backed)


def _require_answer(path: Path, *, seconds: float) -> None:
    """Let a child process open everything in an HDF5 file, and end it if it does not end by itself."""
    import multiprocessing

    # A fork takes a hundredth of a second; on other systems it is not safe, or there is none.
    can_fork = sys.platform == "linux"
    context = multiprocessing.get_context("fork") if can_fork else multiprocessing.get_context("spawn")
    child = context.Process(target=_open_everything, args=(path, seconds), daemon=True)
    with warnings.catch_warnings():
        # Python and, if it is loaded, jax warn of threads, whose locks the child has no use for.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        child.start()
    try:
        child.join(seconds)
        is_late = child.is_alive()
    finally:
        child.kill()
        child.join()
    fix = f"copy the file again, or try: h5repack {shlex.quote(str(path))} repaired.h5ad"
    if is_late:
        raise DataError(
            f"{path} could not be opened in {seconds:g} s: it is so damaged that the HDF5 library hangs, or its disk "
            "is very slow.",
            fix=f"{fix}; for a slow disk, give --read-timeout more than {seconds:g}.",
        )
    if child.exitcode is not None and child.exitcode < 0:
        raise DataError(f"{path} is damaged: the HDF5 library has crashed on it (signal {-child.exitcode}).", fix=fix)


def _open_everything(path: Path, seconds: float) -> None:
    """Read all that is in an HDF5 file but the values of its arrays; errors are left to those who read it."""
    import h5py

    def look_at(_: str, item: h5py.HLObject) -> None:
        dict(item.attrs)
        if isinstance(item, h5py.Dataset) and item.chunks is not None:
            item.id.get_num_chunks()

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C would have to wait for the library
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)  # should the parent be killed
    with contextlib.suppress(Exception), h5py.File(path) as file:
        look_at("", file)
        file.visititems(look_at)
