"""From what a user hands over to an AnnData, with errors that say what a file seems to be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genejepa._memory import memory_errors
from genejepa.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

_SIGNATURES = {
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file that is damaged, cut off or not an h5ad", "copy or download the file again."),
    b"\x1f\x8b": ("compressed by gzip", "gunzip it first."),
    b"PK\x03\x04": ("a zip archive (.zip, .npz, .zarr.zip)", "unpack it first."),
    b"\x80": ("a Python pickle, which is not opened, because that could run any code", "write it again as h5ad."),
    b"<": ("HTML or XML: a failed download?", "download the file again."),
    b"RDX": ("an R object", "write it as h5ad in R, for example with anndataR."),
    b"%%MatrixMarket": ("a Matrix Market file", "adata = scanpy.read_10x_mtx(folder)"),
}

_GROUPS = {
    "row_attrs": ("a loom file", "adata = anndata.io.read_loom({path!r})"),
    "mod": ("an h5mu file of several modalities", "adata = mudata.read_h5mu({path!r})['rna']"),
    "matrix": ("a 10x Genomics HDF5 file", "adata = scanpy.read_10x_h5({path!r})"),
}
"""What HDF5 files with these groups are; a loom file has a matrix, too."""


def as_anndata(data: object) -> AnnData:
    """Return an AnnData as it is, or read the one at a path.

    Parameters
    ----------
    data
        An AnnData, or the path of an h5ad file or of a zarr directory.

    Raises
    ------
    FileNotFoundError
        If nothing is at the path.
    DataError
        If it is neither, or the file cannot be read.
    """
    from anndata import AnnData

    if isinstance(data, AnnData):
        return data
    if isinstance(data, str | os.PathLike):
        return read_cells(data)
    for attribute, what in (("mod", "mdata"), ("tables", "sdata.tables")):
        parts: Any = getattr(data, attribute, None)
        if hasattr(parts, "keys"):
            names = [str(name) for name in parts]
            chosen = "rna" if "rna" in names or not names else names[0]
            raise DataError(
                f"expected an AnnData, got a {type(data).__name__} with the parts {names}.",
                fix=f"pass {what}[{chosen!r}]",
            )
    kind = type(data).__name__
    raise DataError(
        f"expected an AnnData or a path, got {kind}.",
        fix="adata = anndata.AnnData(df)"
        if kind == "DataFrame"
        else "adata = anndata.AnnData(matrix), with obs and var.",
    )


def read_cells(path: str | os.PathLike[str], *, backed: bool = False) -> AnnData:
    """Read an h5ad file or a zarr directory.

    Parameters
    ----------
    path
        File or directory; ``~`` is the home directory.
    backed
        Leave ``X`` of an h5ad file on disk.

    Raises
    ------
    FileNotFoundError
        If nothing is at the path.
    PermissionError
        If it may not be read.
    DataError
        If it cannot be read as an AnnData.
    OutOfMemoryError
        If it does not fit into memory.
    """
    import anndata

    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist.")
    stored_as_zarr = file.is_dir() and any((file / name).exists() for name in (".zgroup", "zarr.json"))
    if file.is_dir() and not stored_as_zarr:
        raise DataError(f"{file} is a directory, expected an h5ad file.", fix="give the name of the file in it.")
    on_disk = "" if stored_as_zarr else f", or leave X on disk: adata = anndata.read_h5ad({str(file)!r}, backed='r')"
    try:
        with memory_errors(f"reading {file}", fix=f"store fewer cells in it{on_disk}"):
            adata: AnnData = (
                anndata.read_zarr(file) if stored_as_zarr else anndata.read_h5ad(file, backed="r" if backed else None)
            )
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make anndata raise anything
        raise _unreadable(file, error) from error
    return adata


def _unreadable(path: Path, error: Exception) -> DataError:
    """Error for a file that is no h5ad, with a guess at what it is."""
    if path.is_dir():
        return DataError(f"{path} cannot be read as zarr: {error}", fix="write it again with `adata.write_zarr(...)`.")
    size = path.stat().st_size
    if not size:
        return DataError(f"{path} is not a readable h5ad: it is empty (0 bytes).", fix="copy or download it again.")
    what, fix = _guess(path)
    return DataError(f"{path} is not a readable h5ad ({size:,} bytes): it looks like {what}. {error}", fix=fix)


def _guess(path: Path) -> tuple[str, str]:
    """Say what a file looks like, and what to do about it."""
    with path.open("rb") as file:
        start = file.read(512)
    for group, (what, fix) in _GROUPS.items() if start.startswith(b"\x89HDF") else ():
        if group in _groups_of(path):
            return what, fix.format(path=str(path))
    for signature, guess in _SIGNATURES.items():
        if start.lstrip().startswith(signature):
            return guess
    if start.isascii():
        return "text, such as a CSV file", f"adata = anndata.io.read_csv({str(path)!r})"
    return "something else, or damaged at its start", "copy or download the file again."


def _groups_of(path: Path) -> list[str]:
    """Names at the top of an HDF5 file; none if it is damaged."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return [str(name) for name in file]
    except (OSError, RuntimeError, KeyError):
        return []
