"""Random AnnData from a seed, each with what it means: plain arrays and lists that no code of genejepa has touched."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import tempfile
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Rng = np.random.Generator
    Container = Callable[[NDArray[Any], Rng], Any]

ID_OF = {
    "ACTB": "ENSG00000075624",
    "CD3E": "ENSG00000198851",
    "CD4": "ENSG00000010610",
    "GAPDH": "ENSG00000111640",
    "HLA-A": "ENSG00000206503",
    "MS4A1": "ENSG00000156738",
    "NKG7": "ENSG00000105374",
    "SEPTIN2": "ENSG00000168385",
    "TP53": "ENSG00000141510",
}
DATES = {"SEPTIN2": ("2-Sep", "Sep-02", "2024-09-02 00:00:00")}
PANEL = ("ACTB", "CD3E", "CD4", ID_OF["GAPDH"], "HLA-A", "MS4A1", "NKG7", "SEPTIN2", "TP53", "Å-gène")
"""Genes of the model: symbols, an identifier, and a name with letters that Unicode can write in two ways."""

DONORS = ("A", "B")
"""Batches of the training."""

_STRANGERS = ("LYZ", "MT.CO1", "naïve", "🧬", "a/b", "ENSG00000000003.15", "Gm1992", "1-Mar", "x" * 300, "'; --")


@dataclass(frozen=True)
class Case:
    """An AnnData and its meaning, as far as it is looked at.

    Attributes
    ----------
    arguments
        Slot to ask for: arguments of ``get_latent_representation``; empty if the AnnData itself says which.
    slot, table
        Names of the slot and of its table of genes.
    kind, container
        What the values are, and what holds them.
    readable
        Whether the slot exists and can be read.
    counts : (n_obs, n_vars), float64
        Values, where entries that are stored twice are added up.
    dtype
        Type they are stored with.
    names, n_names
        Names of the genes, and how many each has.
    is_gene
        Whether ``feature_types`` leaves each column.
    batch_key
        Batch column that the AnnData declares.
    obs
        Columns of ``obs``; None for a missing value.
    """

    adata: anndata.AnnData
    arguments: dict[str, Any]
    slot: str
    table: str
    kind: str
    container: str
    readable: bool
    counts: NDArray[np.float64]
    dtype: np.dtype[Any]
    names: list[Any]
    n_names: int
    is_gene: list[bool]
    batch_key: str | None
    obs: dict[str, list[Any]]


# Values -------------------------------------------------------------------------------------------------


def _counts(rng: Rng, shape: tuple[int, int]) -> NDArray[np.float64]:
    counts = rng.poisson(rng.choice([0.3, 3.0, 30.0]), size=shape).astype(np.float64)
    if rng.random() < 0.3:
        counts[rng.random(shape[0]) < 0.3] = 0
    if rng.random() < 0.2:
        counts[:, rng.random(shape[1]) < 0.5] = 0
    return counts


def _counts_and(*others: float) -> Callable[[Rng, tuple[int, int]], NDArray[np.float64]]:
    """Counts, with another value in one or two places."""

    def draw(rng: Rng, shape: tuple[int, int]) -> NDArray[np.float64]:
        counts = _counts(rng, shape)
        for _ in range(rng.integers(1, 3) if counts.size else 0):
            counts[rng.integers(shape[0]), rng.integers(shape[1])] = rng.choice(others)
        return counts

    return draw


def _corrected(rng: Rng, shape: tuple[int, int]) -> NDArray[np.float64]:
    return np.where(rng.random(shape) < 0.15, 0.93, 1.0) * _counts(rng, shape)


def _log_normalised(rng: Rng, shape: tuple[int, int]) -> NDArray[np.float64]:
    counts = _counts(rng, shape)
    return np.asarray(np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1)))


def _noisy(rng: Rng, shape: tuple[int, int]) -> NDArray[np.float64]:
    counts = _counts(rng, shape)
    nothing = rng.choice([0.0, -0.0, 1e-310])
    return np.where(counts == 0, nothing, counts * (1 + 1e-7 * rng.uniform(-1, 1, size=shape)))


_FLOATS = ("f4", "f8", "g", ">f4", ">f8")
_INTEGERS = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4")

VALUES: dict[str, tuple[int, Sequence[str], Callable[[Rng, tuple[int, int]], NDArray[np.float64]]]] = {
    "counts": (50, ("f2", *_FLOATS, *_FLOATS, *_INTEGERS), _counts),
    "ones": (3, ("?", "u1", "f4"), lambda rng, shape: np.minimum(_counts(rng, shape), 1)),
    "hundreds": (4, ("f2", "f4", "u2"), lambda rng, shape: 100 * _counts(rng, shape)),
    "millions": (3, ("f4", "f8", "i8", "u8"), lambda rng, shape: 1e7 * _counts(rng, shape)),
    "corrected": (5, ("f2", *_FLOATS), _corrected),
    "noisy": (4, ("f4", "f8"), _noisy),
    "noise": (1, ("f4", "f8"), lambda _, shape: np.full(shape, 5e-5)),
    "fractional": (3, _FLOATS, lambda rng, shape: 0.37 * _counts(rng, shape)),
    "log-normalised": (4, _FLOATS, _log_normalised),
    "scaled": (2, _FLOATS, lambda rng, shape: rng.normal(size=shape)),
    "negative": (5, ("f2", *_FLOATS, "i1", "i4", "i8"), _counts_and(-1.0, -5.0)),
    "NaN": (5, ("f2", *_FLOATS), _counts_and(np.nan)),
    "infinite": (5, ("f2", *_FLOATS), _counts_and(np.inf, -np.inf)),
    "huge": (3, _FLOATS, _counts_and(1e30, 2.0**54)),
    "zero": (3, (*_FLOATS, *_INTEGERS), lambda _, shape: np.zeros(shape)),
}
"""Weight, types and generator of each kind of values."""


# Containers ---------------------------------------------------------------------------------------------


def _strided(stored: NDArray[Any], _: Rng) -> NDArray[Any]:
    view = np.zeros((2 * stored.shape[0], 3 * stored.shape[1]), dtype=stored.dtype)[::-2, ::3]
    view[...] = stored
    return view


def _read_only(stored: NDArray[Any], _: Rng) -> NDArray[Any]:
    array = stored.copy()
    array.setflags(write=False)
    return array


def _memory_mapped(stored: NDArray[Any], _: Rng) -> NDArray[Any]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(stored.tobytes() or b"nothing")
        file.flush()
        return np.memmap(file.name, dtype=stored.dtype, mode="r", shape=stored.shape) if stored.size else stored


def _messy(stored: NDArray[Any], rng: Rng) -> sparse.csr_matrix:
    """CSR with explicit zeros, entries in any order, counts in two parts, indices of 64 bits and spare room."""
    can_part = bool(np.isfinite(stored).all() and (stored == np.rint(stored)).all())
    rows, columns, values = [], [], []
    for (i, j), value in np.ndenumerate(stored):
        parts = [1, value - 1] if can_part and value > 1 else [value] if value != 0 or rng.random() < 0.2 else []
        rows += [i] * len(parts)
        columns += [j] * len(parts)
        values += parts
    order = np.lexsort((rng.random(len(rows)), rows))
    spare = [10**6] * rng.integers(3)
    index = rng.choice(["i4", "i8"])
    matrix = sparse.csr_matrix(stored.shape, dtype=stored.dtype)
    matrix.indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(stored)))]).astype(index)
    matrix.indices = np.array([*(columns[k] for k in order), *spare], dtype=index)
    matrix.data = np.array([*(values[k] for k in order), *np.ones(len(spare))], dtype=stored.dtype)
    return matrix


def _zarr(stored: NDArray[Any], rng: Rng) -> Any:
    """Array or sparse matrix in a zarr store that was opened for reading only."""
    import zarr

    store = zarr.storage.MemoryStore()
    form = rng.choice(["array", "csr_matrix", "csc_matrix"]) if _fits_scipy(stored.dtype) else "array"
    matrix = stored if form == "array" else getattr(sparse, form)(stored)
    anndata.io.write_elem(zarr.open_group(store, mode="w"), "X", matrix)
    element = zarr.open_group(store, mode="r")["X"]
    return element if form == "array" else anndata.io.sparse_dataset(element)


def _dask(stored: NDArray[Any], rng: Rng) -> Any:
    import dask.array

    lazy = dask.array.from_array(  # type: ignore[no-untyped-call]
        stored, chunks=(max(1, stored.shape[0] // 2), max(1, stored.shape[1]))
    )
    return lazy.map_blocks(sparse.csr_matrix) if _fits_scipy(stored.dtype) and rng.random() < 0.5 else lazy


def _fits_scipy(dtype: np.dtype[Any]) -> bool:
    """Whether scipy has sparse matrices of this type."""
    return dtype.isnative and dtype != np.float16


_DENSE: dict[str, Container] = {
    "C": lambda stored, _: np.ascontiguousarray(stored),
    "F": lambda stored, _: np.asfortranarray(stored),
    "strided": _strided,
    "read-only": _read_only,
    "memory-mapped": _memory_mapped,
    "matrix": lambda stored, _: np.asmatrix(stored),
    "masked, without a mask": lambda stored, _: np.ma.MaskedArray(stored, mask=False),
    "objects": lambda stored, _: stored.astype(np.float64).astype(object),
}
_SPARSE: dict[str, Container] = {
    "csr": lambda stored, _: sparse.csr_matrix(stored),
    "csc": lambda stored, _: sparse.csc_matrix(stored),
    "csr_array": lambda stored, _: sparse.csr_array(stored),
    "csc_array": lambda stored, _: sparse.csc_array(stored),
    "messy csr": _messy,
    "messy csc": lambda stored, rng: _messy(stored.T, rng).T,
}
_LAZY: dict[str, Container] = {
    name: function for name, function in (("zarr", _zarr), ("dask", _dask)) if importlib.util.find_spec(name)
}
_ON_DISK = ("C", "csr", "csc")
_ONLY_X = ("matrix", "coo", "lil")
"""Refused or converted by anndata in a layer."""


def _damaged(stored: NDArray[Any], rng: Rng) -> Any:
    """Sparse matrix whose arrays do not fit together."""
    matrix = _SPARSE[rng.choice(["csr", "csc", "csr_array", "csc_array"])](stored, rng)
    ways = ["start", "end", "length", "type"] + ["index", "negative", "decreasing", "short"] * (matrix.nnz > 0)
    way = rng.choice(ways)
    if way == "start":
        matrix.indptr[0] += 1
    elif way == "end":
        matrix.indptr[-1] += 10**6
    elif way == "length":
        matrix.indptr = np.append(matrix.indptr, matrix.indptr[-1])
    elif way == "type":
        matrix.indices = matrix.indices.astype(np.float64)
    elif way == "decreasing":
        matrix.indptr[-2] = 10**6
    elif way == "short":
        matrix.indices = matrix.indices[:-1]
    else:
        matrix.indices[rng.integers(matrix.nnz)] = -1 if way == "negative" else 10**6
    return matrix


_UNREADABLE: dict[str, Container] = {
    "damaged": _damaged,
    "damaged, too": _damaged,
    "absent": lambda _stored, _: None,
    "coo": lambda stored, _: sparse.coo_matrix(stored),
    "lil": lambda stored, _: sparse.lil_matrix(stored),
    "masked": lambda stored, _: np.ma.MaskedArray(stored, mask=True) if stored.size else stored.astype("U8"),
    "complex": lambda stored, _: stored.astype(np.complex64),
    "text": lambda stored, _: stored.astype("U8"),
}


# Names and cells ----------------------------------------------------------------------------------------


def _spelled(rng: Rng, gene: str) -> str:
    """A gene under one of its names, or in lower case."""
    symbol = next((symbol for symbol, gene_id in ID_OF.items() if gene_id == gene), gene)
    ways = [gene, f" {gene}\t", unicodedata.normalize("NFD", gene), gene.replace("-", "."), gene.lower(), symbol]
    if symbol in ID_OF:
        ways += [ID_OF[symbol], f"{ID_OF[symbol]}.{rng.integers(1, 9)}"]
    ways += DATES.get(gene, ())
    return ways[rng.integers(len(ways))]


def _names(rng: Rng, n_vars: int) -> list[Any]:
    share = rng.choice([1.0, 0.9, 0.5, 0.2, 0.0], p=[0.5, 0.25, 0.1, 0.1, 0.05])
    odd = rng.choice([0.0, 0.3])
    genes = [_spelled(rng, gene) if rng.random() < odd else gene for gene in PANEL if rng.random() < share]
    strangers = [*_STRANGERS, *(f"gene{j}" for j in range(n_vars))]
    genes += [strangers[j] for j in rng.permutation(len(strangers))[: max(0, n_vars - len(genes))]]
    names: list[Any] = [genes[j] for j in rng.permutation(len(genes))[:n_vars]]
    mishap = rng.choice(["none", "twice", "rivals", "blank", "number", "bytes"], p=[0.76, 0.06, 0.06, 0.04, 0.04, 0.04])
    if mishap == "bytes":
        return [name.encode() for name in names]
    if mishap == "none" or n_vars < 2:
        return names
    one, other = rng.choice(n_vars, size=2, replace=False)
    if mishap == "twice":
        names[one] = names[other]
    elif mishap == "rivals":
        gene = PANEL[rng.integers(len(PANEL))]
        names[one], names[other] = _spelled(rng, gene), _spelled(rng, gene)
    else:
        names[one] = 7 if mishap == "number" else ["", "  ", None, np.nan][rng.integers(4)]
    return names


def _batches(rng: Rng, n_obs: int) -> Any:
    values = np.array([DONORS[i] for i in rng.integers(len(DONORS), size=n_obs)], dtype=object)
    kind = rng.choice(["known"] * 5 + ["category", "unseen", "missing", "mixed", "numbers", "booleans", "each"])
    if kind == "category":
        return pd.Categorical(values, categories=["unused", *reversed(DONORS)])
    if kind == "numbers":
        return rng.choice([0.0, 1.5], size=n_obs)
    if kind == "booleans":
        return rng.random(n_obs) < 0.5
    if kind == "each":
        return [f"of cell {i}" for i in range(n_obs)]
    some = rng.random(n_obs) < 0.3
    values[some] = {"known": values[some], "unseen": "", "missing": None, "mixed": 1}[str(kind)]
    return values


# AnnData ------------------------------------------------------------------------------------------------


def draw(seed: int, directory: Path) -> Case:
    """The AnnData of a seed; one that is backed has its file in ``directory``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata and numpy warn of much that is meant here
        return _draw(np.random.default_rng([seed, 2026]), directory)


def _draw(rng: Rng, directory: Path) -> Case:
    n_obs = int(rng.choice([0, 1, 3, 25, int(rng.integers(4, 13))], p=[0.02, 0.03, 0.03, 0.07, 0.85]))
    n_vars = int(rng.choice([0, 1, int(rng.integers(2, 9)), int(rng.integers(10, 17))], p=[0.02, 0.02, 0.11, 0.85]))
    kind, stored = _draw_values(rng, (n_obs, n_vars))
    container, matrix = _draw_container(rng, stored)
    names = _names(rng, n_vars)
    types = (
        [str(name) for name in rng.choice(["Gene Expression"] * 4 + ["Peaks"], size=n_vars)]
        if rng.random() < 0.1
        else None
    )
    obs = pd.DataFrame({"lab": _batches(rng, n_obs)}, index=[f"cell{i}" for i in range(n_obs)])
    if rng.random() < 0.9:
        obs["donor"] = _batches(rng, n_obs)
    n_names = 2 if rng.random() < 0.01 else 1
    slot = "X" if container in _ONLY_X else str(rng.choice(["X", "layer", "raw"], p=[0.6, 0.25, 0.15]))
    adata = _filled(rng, matrix, slot=slot, names=names, n_names=n_names, types=types, obs=obs)
    batch_key = str(rng.choice(["donor", "lab", "nothing"])) if rng.random() < 0.3 else None
    _declare(adata, slot=slot, batch_key=batch_key)
    has_text_names = n_names == 1 and all(isinstance(name, str) for name in names)
    # a file holds neither text beside numbers nor a column of None
    can_be_written = all(not any(type(value) is int for value in obs[key]) for key in obs)
    can_be_written &= all(not n_obs or any(value is not None for value in obs[key]) for key in obs)
    if container in _ON_DISK and has_text_names and can_be_written and rng.random() < 0.2:
        container += ", backed"
        adata.write_h5ad(directory / "cells.h5ad")
        adata = anndata.read_h5ad(directory / "cells.h5ad", backed="r")
    rows, columns = np.arange(n_obs), np.arange(n_vars)
    # anndata copies and converts the raw part of a view at once
    can_be_viewed = slot != "raw" or (has_text_names and container in _DENSE | _SPARSE)
    if can_be_viewed and rng.random() < 0.25:
        adata, rows, columns = _view(rng, adata)
        columns = np.arange(n_vars) if slot == "raw" else columns
    by_arguments = slot != "X" and rng.random() < 0.5
    return Case(
        adata=adata,
        arguments={} if not by_arguments else {"layer": "counts"} if slot == "layer" else {"use_raw": True},
        slot={"X": "X", "layer": "layers['counts']", "raw": "raw.X"}[slot],
        table="raw.var" if slot == "raw" else "var",
        kind=kind,
        container=container,
        readable=container not in _UNREADABLE,
        counts=stored.astype(np.float64)[np.ix_(rows, columns)],
        dtype=np.dtype(np.float64) if container == "objects" else stored.dtype,
        names=[names[j] for j in columns],
        n_names=n_names,
        is_gene=_are_genes(None if types is None else [types[j] for j in columns], len(columns)),
        batch_key=batch_key,
        obs={str(key): [None if pd.isna(value) else value for value in obs[key].iloc[rows]] for key in obs},
    )


def _are_genes(types: list[str] | None, n_vars: int) -> list[bool]:
    """Which columns are genes; all of them if none is marked so."""
    if types is None or "Gene Expression" not in types:
        return n_vars * [True]
    return [kind == "Gene Expression" for kind in types]


def _draw_values(rng: Rng, shape: tuple[int, int]) -> tuple[str, NDArray[Any]]:
    weights = np.array([weight for weight, *_ in VALUES.values()])
    kind = str(rng.choice(list(VALUES), p=weights / weights.sum()))
    _, dtypes, generate = VALUES[kind]
    return kind, generate(rng, shape).astype(dtypes[int(rng.integers(len(dtypes)))])


def _draw_container(rng: Rng, stored: NDArray[Any]) -> tuple[str, Any]:
    families = [_DENSE]
    if _fits_scipy(stored.dtype):
        families += [_SPARSE, _SPARSE]
    if stored.dtype.char != "g" and rng.random() < 0.1:
        families = [_LAZY or _DENSE]
    if rng.random() < 0.12:
        families = [_UNREADABLE]
        stored = stored if _fits_scipy(stored.dtype) else stored.astype(np.float64)
    family = families[rng.integers(len(families))]
    container = str(rng.choice(list(family)))
    return container, family[container](stored, rng)


def _filled(
    rng: Rng,
    matrix: Any,
    *,
    slot: str,
    names: list[Any],
    n_names: int,
    types: list[str] | None,
    obs: pd.DataFrame,
) -> anndata.AnnData:
    """AnnData with this very matrix in a slot, and something else in the others: ``AnnData(...)`` would convert it."""
    var = pd.DataFrame({} if types is None else {"feature_types": types}, index=[f"g{j}" for j in range(len(names))])
    shape = (len(obs), len(names))
    adata = anndata.AnnData(np.zeros(shape, dtype=np.float32), obs=obs, var=var)
    index = pd.Index(names, dtype=object)
    if n_names == 2:
        index = pd.MultiIndex.from_arrays([names, names])
    if slot == "raw":
        if matrix is not None:
            adata.raw = adata
            adata.raw._X = matrix
            adata.raw._var.index = index
    else:
        adata._var.index = index
    if slot == "layer" and matrix is not None:
        adata._layers["counts"] = matrix
    if slot == "X":
        adata._X = matrix
    if slot != "X" and rng.random() < 0.3:
        adata._X = None
    if rng.random() < 0.2:
        other = _damaged(np.ones(shape), rng) if rng.random() < 0.3 else rng.poisson(2.0, size=shape)
        adata._layers["other"] = other
    return adata


def _declare(adata: anndata.AnnData, *, slot: str, batch_key: str | None) -> None:
    """Write down which slots to use, as ``setup_anndata`` does, which would refuse some."""
    if slot != "X" or batch_key is not None:
        layer, use_raw = "counts" if slot == "layer" else "", "True" if slot == "raw" else ""
        setup = {"layer": layer, "use_raw": use_raw, "batch_key": batch_key or "", "labels_key": ""}
        adata.uns["genejepa"] = {"setup": setup}


def _view(rng: Rng, adata: anndata.AnnData) -> tuple[anndata.AnnData, NDArray[np.int64], NDArray[np.int64]]:
    """A view, perhaps of a view, and which rows and columns it looks at."""
    rows, columns = np.arange(adata.n_obs), np.arange(adata.n_vars)
    for _ in range(2 if rng.random() < 0.2 and not adata.isbacked else 1):
        row, column = _index(rng, len(rows)), _index(rng, len(columns))
        adata, rows, columns = adata[row, column], rows[row], columns[column]
    return adata, rows, columns


def _index(rng: Rng, size: int) -> Any:
    kind = rng.choice(["all", "some", "order", "mask"])
    if kind == "all":
        return slice(None)
    if kind == "some":
        return slice(int(rng.integers(3)), None, int(rng.integers(1, 3)))
    return rng.permutation(size) if kind == "order" else rng.random(size) < 0.8


# Fingerprint --------------------------------------------------------------------------------------------


def fingerprint(adata: anndata.AnnData) -> dict[str, str]:
    """Hash of every slot of an AnnData and, of a view, of what it looks at; no matrix is indexed or converted."""
    whole = adata._adata_ref if adata.is_view else adata
    found = {"is_view": str(adata.is_view), "obs": _hash(whole.obs), "var": _hash(whole.var)}
    if adata.isbacked:
        found["file"] = hashlib.sha256(Path(adata.filename).read_bytes()).hexdigest()
    else:
        found["X"] = _hash(whole._X)
        found |= {f"layers[{key!r}]": _hash(matrix) for key, matrix in whole._layers.items()}
    if whole.raw is not None:
        found |= {"raw.X": _hash(whole.raw._X), "raw.var": _hash(whole.raw.var)}
    found |= {f"uns[{key!r}]": _hash(entry) for key, entry in whole.uns.items()}
    for name in ("obsm", "varm", "obsp", "varp"):
        found |= {f"{name}[{key!r}]": _hash(entry) for key, entry in getattr(whole, name).items()}
    return found


def _hash(value: Any) -> str:
    """SHA-256 of a table, a matrix with its types and layout, or anything else that can be pickled."""
    if sparse.issparse(value) and value.format in ("csr", "csc"):
        return _hash([type(value).__name__, value.shape, *map(_layout, (value.data, value.indices, value.indptr))])
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _hash([type(value).__name__, *_layout(value)])
    is_lazy = type(value).__module__.partition(".")[0] in ("anndata", "dask", "zarr")
    return hashlib.sha256(repr(type(value)).encode() if is_lazy else pickle.dumps(value)).hexdigest()


def _layout(array: NDArray[Any]) -> tuple[object, ...]:
    return array.dtype.str, array.shape, array.strides, array.flags.writeable, np.asarray(array).tobytes()
