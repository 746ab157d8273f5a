"""What a model directory holds: configuration, genes and weights, as bytes and back.

The files are ``config.json`` (settings, slots, training record), ``genes.csv`` (the panel in order, with the numbers
of the normalisation) and ``tensors.safetensors`` (weights). See :mod:`genejepa.bundle` for how they lie on the disk.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from genejepa._constants import MODEL_FORMAT_VERSION
from genejepa.bundle import MORE_MEMORY, damaged, parse_json, read_bundle, write_bundle
from genejepa.data.batches import BatchScaling
from genejepa.data.normalization import Normalizer
from genejepa.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

_KIND = "model"
_CONFIG, _GENES, _TENSORS = "config.json", "genes.csv", "tensors.safetensors"
_GENE_COLUMNS = ("gene", "mean", "scale", "frequency")
_BATCHES = "batches."
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_BATCH_ARRAYS = ("centre", "gain", "frequency")


@dataclass(frozen=True)
class StoredModel:
    """Content of a model directory.

    Attributes
    ----------
    config
        ``config.json``: settings, slots, training record.
    genes
        Panel in order.
    normalizer
        Normalisation over the panel.
    weights
        Weights of the network by name.
    """

    config: dict[str, Any]
    genes: list[str]
    normalizer: Normalizer
    weights: dict[str, Tensor]


def save_model(directory: Path, stored: StoredModel, *, overwrite: bool = False) -> None:
    """Write a model directory; an earlier model there is replaced at once.

    Raises
    ------
    FileExistsError
        If the directory holds a model and ``overwrite`` is False, or files but no model.
    DataError
        If the name of a gene cannot be encoded.
    OSError
        If it cannot be written, such as :class:`genejepa.errors.OutOfDiskError`.
    """
    write_bundle(directory, model_to_files(stored), kind=_KIND, version=MODEL_FORMAT_VERSION, overwrite=overwrite)


def model_to_files(stored: StoredModel) -> dict[str, bytes]:
    """Content of the files of a model by name; errors as in :func:`save_model`."""
    normalizer = stored.normalizer
    numbers: dict[str, Any] = {"median_depth": normalizer.median_depth, "batches": None}
    tensors = dict(stored.weights)
    if normalizer.batches is not None:
        numbers["batches"] = list(normalizer.batches.names)
        tensors |= {_BATCHES + name: _tensor(getattr(normalizer.batches, name)) for name in _BATCH_ARRAYS}
    return {
        _CONFIG: json_to_bytes({**stored.config, "normalization": numbers}),
        _GENES: _genes_to_csv(stored.genes, normalizer),
        _TENSORS: tensors_to_bytes(tensors),
    }


def load_model(directory: Path) -> StoredModel:
    """Read a model directory; nothing in it is executed.

    Raises
    ------
    ModelFileError
        If it is not a complete model directory of this format, or a byte of it was changed.
    OutOfMemoryError
        If it does not fit into memory.
    """
    return model_from_files(read_bundle(directory, kind=_KIND, version=MODEL_FORMAT_VERSION), directory)


def model_from_files(files: Mapping[str, bytes], directory: Path) -> StoredModel:
    """Inverse of :func:`model_to_files`; errors as in :func:`load_model`."""
    for name in (_CONFIG, _GENES, _TENSORS):
        if name not in files:
            raise damaged(directory / name, "the file is missing")
    config = parse_json(files[_CONFIG], directory / _CONFIG)
    tensors = tensors_from_bytes(files[_TENSORS], directory / _TENSORS)
    genes, numbers = _genes_from_csv(files[_GENES], directory / _GENES)
    try:
        normalizer = _normalizer(config, numbers, tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(directory / _CONFIG, f"its normalisation is not a possible one ({error!r})") from error
    return StoredModel(config, genes, normalizer, weights=tensors)


def _normalizer(config: Mapping[str, Any], numbers: NDArray[np.float32], tensors: dict[str, Tensor]) -> Normalizer:
    """Normalisation from ``config.json``, the columns of ``genes.csv`` and the tensors of the batches; takes these."""
    stored = config["normalization"]
    median_depth = stored["median_depth"]
    if not isinstance(median_depth, float) or not 0 < median_depth <= _LARGEST_FLOAT:
        raise ValueError(f"median depth {median_depth!r}")
    batches = None
    if stored["batches"] is not None:
        names = tuple(stored["batches"])
        arrays = {name: tensors.pop(_BATCHES + name).numpy() for name in _BATCH_ARRAYS}
        batches = BatchScaling(names=names, **arrays)
        expected = (len(names) + 1, len(numbers))
        possible = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        possible = possible and all(array.shape == expected for array in arrays.values())
        if not possible or min(arrays["frequency"].min(), arrays["gain"].min()) <= 0:
            raise ValueError(f"batches {names}")
    mean, scale, frequency = np.ascontiguousarray(numbers.T)
    transform = config["settings"]["model"]["transform"]
    return Normalizer(transform, median_depth, mean, scale, frequency, batches)


def json_to_bytes(values: Mapping[str, Any]) -> bytes:
    """JSON text; numbers that are not finite are refused."""
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors of any device in the safetensors format."""
    from safetensors.torch import save

    return bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def tensors_from_bytes(data: bytes, path: Path) -> dict[str, Tensor]:
    """Inverse of :func:`tensors_to_bytes`.

    Raises
    ------
    ModelFileError
        If the bytes are not safetensors, a type is not float32, or a number is not finite.
    OutOfMemoryError
        If the tensors do not fit into memory.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from genejepa._memory import memory_errors

    size = int.from_bytes(data[:8], "little")
    parse_json(data[8 : 8 + size], path)  # safetensors takes the last of two entries of one name
    try:
        with memory_errors("reading a model", fix=MORE_MEMORY):
            tensors: dict[str, Tensor] = load(data)
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name!r} has the type {tensor.dtype}, expected float32")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name!r} holds values that are not finite")
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    return tensors


def _tensor(array: NDArray[np.float32]) -> Tensor:
    import torch

    return torch.from_numpy(array)


def _genes_to_csv(genes: Sequence[str], normalizer: Normalizer) -> bytes:
    text = io.StringIO()
    # All names in quotes: a line may end within a name, and by default only some of such names are quoted.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(_GENE_COLUMNS)
    # A Python float is written by its repr, which is exact for a float32, so that reading returns the same bits.
    columns = np.stack([normalizer.mean, normalizer.scale, normalizer.frequency], axis=1)
    for gene, numbers in zip(genes, columns.tolist(), strict=True):
        writer.writerow([gene, *numbers])
    try:
        return text.getvalue().encode()
    except UnicodeEncodeError as error:
        names = [gene for gene in genes if gene.encode(errors="ignore").decode() != gene]
        raise DataError(
            f"{len(names)} of {len(genes)} gene names cannot be encoded as UTF-8; the first is {names[0]!r}.",
            fix="rename these genes in the AnnData, and train again.",
        ) from error


def _genes_from_csv(data: bytes, path: Path) -> tuple[list[str], NDArray[np.float32]]:
    try:
        # Line by line: the text as a whole takes four bytes a character.
        rows = csv.reader(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline=""), strict=True)
        if tuple(next(rows, ())) != _GENE_COLUMNS:
            raise ValueError(f"its header is not {','.join(_GENE_COLUMNS)}")
        genes, values = [], []
        for row in rows:
            if len(row) != len(_GENE_COLUMNS):
                raise ValueError(f"line {rows.line_num} has {len(row)} fields, expected {len(_GENE_COLUMNS)}")
            genes.append(row[0])
            values.append([float(text) for text in row[1:]])
        numbers = np.array(values).reshape(len(genes), len(_GENE_COLUMNS) - 1)
        if not genes:
            raise ValueError("it has no genes")
        if len(set(genes)) != len(genes) or not all(gene.strip() for gene in genes):
            raise ValueError("a gene has no name, or a name that occurs twice")
        smallest, largest = np.finfo(np.float32).tiny, np.finfo(np.float32).max
        if not (np.abs(numbers) <= largest).all() or not (numbers[:, 1:] >= smallest).all():
            raise ValueError("a mean, scale or frequency is not a possible one")
    except (ValueError, IndexError, csv.Error) as error:
        raise damaged(path, str(error)) from error
    return genes, numbers.astype(np.float32)
