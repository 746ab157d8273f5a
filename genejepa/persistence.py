"""Files: atomic writes, and the directory that holds a model.

A model directory has ``model.safetensors`` (weights and normalisation arrays), ``config.json`` (settings, genes'
source, training record) and ``genes.csv`` (the panel in order). Nothing is pickled, so loading runs no code.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genejepa._constants import CONFIG_FILE, GENES_FILE, MODEL_FORMAT_VERSION, WEIGHTS_FILE
from genejepa.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

_GENE_COLUMNS = ("gene", "mean", "scale", "frequency")


@dataclass(frozen=True)
class StoredModel:
    """Content of a model directory.

    Attributes
    ----------
    config
        Parsed ``config.json``.
    tensors
        Weights by name.
    genes
        Panel in order.
    gene_numbers : (n_genes, 3), float32
        Mean, scale and frequency of each gene; see :class:`genejepa.data.normalization.Normalizer`.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    genes: list[str]
    gene_numbers: NDArray[np.float32]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, and put it in the place of ``path`` when the block ends without an error.

    A reader sees the old content or the new one, never a part of it: the temporary file lies in the same directory,
    is flushed to disk and renamed; the directory entry is flushed too. The file gets the permissions that ``umask``
    allows.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(temporary)
        with Path(temporary).open("r+b") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # noqa: PTH101  # mkstemp gives 0600, unreadable to colleagues
        os.replace(temporary, path)  # noqa: PTH105  # both are names, not Path objects
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes by :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def save_model(dir_path: Path, stored: StoredModel, *, overwrite: bool = False) -> None:
    """Write a model directory; the configuration comes last, so an incomplete directory is recognised.

    Raises
    ------
    FileExistsError
        If the directory holds files and ``overwrite`` is False.
    """
    from safetensors.torch import save as tensors_to_bytes

    if dir_path.exists() and not dir_path.is_dir():
        raise FileExistsError(f"{dir_path} exists and is not a directory")
    if dir_path.is_dir() and any(dir_path.iterdir()) and not overwrite:
        raise FileExistsError(f"{dir_path} is not empty.\nFix: choose another name, or pass `overwrite=True`.")
    config = {"format": "genejepa", "format_version": MODEL_FORMAT_VERSION, **stored.config}
    config_bytes = json.dumps(config, indent=2, allow_nan=False).encode()
    dir_path.mkdir(parents=True, exist_ok=True)
    (dir_path / CONFIG_FILE).unlink(missing_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in stored.tensors.items()}
    write_atomically(dir_path / WEIGHTS_FILE, tensors_to_bytes(contiguous))
    write_atomically(dir_path / GENES_FILE, _genes_to_csv(stored))
    write_atomically(dir_path / CONFIG_FILE, config_bytes)


def load_model(dir_path: Path) -> StoredModel:
    """Read a model directory.

    Raises
    ------
    ModelFileError
        If a file is missing or damaged, or has another format version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_from_bytes

    config = _read_config(dir_path)
    try:
        tensors = tensors_from_bytes((dir_path / WEIGHTS_FILE).read_bytes())
    except SafetensorError as error:
        raise _damaged(dir_path / WEIGHTS_FILE, str(error)) from error
    except FileNotFoundError as error:
        raise _damaged(dir_path / WEIGHTS_FILE, "the file is missing") from error
    genes, numbers = _read_genes(dir_path / GENES_FILE)
    return StoredModel(config, tensors, genes, numbers)


def _read_config(dir_path: Path) -> dict[str, Any]:
    path = dir_path / CONFIG_FILE
    if not path.is_file():
        raise ModelFileError(
            f"{dir_path} is not a model directory: it has no {CONFIG_FILE}.",
            fix="give the directory that `model.save(...)` or `genejepa fit -o ...` wrote.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(config, dict) or config.get("format") != "genejepa":
        raise _damaged(path, "it does not describe a genejepa model")
    version = config.get("format_version")
    if version != MODEL_FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {version!r}; this genejepa reads version {MODEL_FORMAT_VERSION}.",
            fix="install the version of genejepa named in the file's `version` entry.",
        )
    return config


def _genes_to_csv(stored: StoredModel) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_GENE_COLUMNS)
    # repr of a float32 as a Python float is exact, so that reading returns the same bits
    for gene, numbers in zip(stored.genes, stored.gene_numbers.tolist(), strict=True):
        writer.writerow([gene, *map(repr, numbers)])
    return text.getvalue().encode()


def _read_genes(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
        if tuple(rows[0]) != _GENE_COLUMNS:
            raise ValueError(f"the header is {rows[0]}")
        genes = [row[0] for row in rows[1:]]
        numbers = np.array([[float(text) for text in row[1:]] for row in rows[1:]], dtype=np.float32)
        if numbers.shape != (len(genes), len(_GENE_COLUMNS) - 1):
            raise ValueError(f"the numbers have the shape {numbers.shape}")
    except (ValueError, IndexError, OSError) as error:
        raise _damaged(path, str(error)) from error
    return genes, numbers


def _damaged(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(f"{path} cannot be read: {reason}.", fix="save the model again, or copy it again.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a directory
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
