"""Fit one method on one data set, embed its cells and worse views of them, and measure time and memory."""

from __future__ import annotations

import gc
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from genejepa.bench.interface import FitOptions
from genejepa.bench.views import FULL, stress_views
from genejepa.data.counts import check_counts, columns_to_genes, open_counts, panel_counts
from genejepa.data.genes import gene_names, resolve_panel
from genejepa.data.setup import batch_codes, registration_of
from genejepa.errors import ConfigError, DataError, MissingPackageError
from genejepa.files import output_file, replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.bench.interface import Method

_SAMPLING_SECONDS: Final = 0.01
_METADATA: Final = ("method", "seed", "fit_seconds", "embed_seconds", "peak_mb", "batch_key")
_VIEW: Final = "view:"


@dataclass(frozen=True, eq=False)
class Run:
    """What one fitted method made of one data set.

    Attributes
    ----------
    method, seed
        Name of the method, and the seed it was given.
    views
        Embeddings, (n_obs, dim), of all cells as they are (``"full"``) and, if asked for, of the views of
        :func:`genejepa.bench.views.stress_views`, under their names there.
    fit_seconds, embed_seconds
        Seconds of the fit, and of the embedding of ``"full"``.
    peak_mb
        Largest resident memory of the process during these two, minus that before, in 10^6 bytes. Memory that an
        earlier run has left to the process is reused without being seen: only a new process gives the true figure.
    batch_key
        Column of ``obs`` that the method was told to correct for.
    held_out
        Cells, (n_obs,), that the method was not fitted on; None if it was fitted on all.
    """

    method: str
    seed: int
    views: dict[str, NDArray[np.float32]]
    fit_seconds: float
    embed_seconds: float
    peak_mb: float
    batch_key: str | None
    held_out: NDArray[np.bool_] | None

    def save(self, path: str | Path) -> None:
        """Write to an ``.npz`` file; one that exists is replaced as a whole or not at all."""
        arrays: dict[str, Any] = {_VIEW + name: Z for name, Z in self.views.items()}
        arrays["metadata"] = np.array(json.dumps({name: getattr(self, name) for name in _METADATA}))
        if self.held_out is not None:
            arrays["held_out"] = self.held_out
        with replacing(output_file(Path(path))) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Raises
        ------
        genejepa.errors.DataError
            If the file holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                metadata = json.loads(str(file["metadata"]))
                views = {name.removeprefix(_VIEW): file[name] for name in file.files if name.startswith(_VIEW)}
                held_out = file["held_out"] if "held_out" in file.files else None
            return cls(views=views, held_out=held_out, **metadata)
        except (AttributeError, BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a saved run: {error}", fix="delete the file and run again.") from error


def hold_out(labels: pd.Series[Any], *, share: float = 0.2, seed: int = 0) -> NDArray[np.bool_]:
    """Mark a random share of the cells of every label, and of those without one, shape (n_obs,)."""
    rng = np.random.default_rng([seed, 13])
    codes = np.asarray(labels.astype("category").cat.codes)
    held_out = np.zeros(len(codes), dtype=bool)
    for code in np.unique(codes):
        members = rng.permutation(np.flatnonzero(codes == code))
        held_out[members[: round(share * len(members))]] = True
    return held_out


def panel_of(
    adata: AnnData,
    *,
    n_genes: int | None = 2000,
    batch_key: str | None = None,
    held_out: NDArray[np.bool_] | None = None,
) -> AnnData:
    """Raw counts over the panel of genes that genejepa would choose, for all methods alike.

    Parameters
    ----------
    adata
        Raw counts, (n_obs, n_vars), in ``X`` or the registered layer. Not changed.
    n_genes
        Size of the panel; None takes all expressed genes.
    batch_key
        Column of ``obs`` with the batch, within which genes shall vary.
    held_out
        Cells, (n_obs,), that do not take part in the choice; they are returned all the same.

    Returns
    -------
    New AnnData of all cells with the counts in ``X`` (sparse rows, float32), the same ``obs``, and nothing else.

    Raises
    ------
    genejepa.errors.DataError
        If the slot does not hold raw counts, or a batch or gene name is missing.
    """
    import anndata
    import pandas as pd
    from scipy import sparse

    counts = check_counts(open_counts(adata, registration_of(adata).slot), adata=adata)
    matrix, var = counts.to_csr(), counts.var
    voters = np.ones(adata.n_obs, dtype=bool) if held_out is None else ~held_out
    batch = None if batch_key is None else batch_codes(adata[voters], batch_key)[0]
    votes = matrix if held_out is None else matrix[voters]
    columns = resolve_panel(votes, var, n_genes=n_genes, batch=batch, table=counts.slot.table)
    panel = panel_counts(matrix, columns_to_genes(columns, matrix.shape[1]), len(columns))
    X = sparse.csr_matrix((panel.data, panel.indices, panel.indptr), shape=(panel.n_obs, panel.n_genes))
    return anndata.AnnData(X, obs=adata.obs.copy(), var=pd.DataFrame(index=gene_names(var)[columns]))


def fit_and_embed(
    method: Method,
    cells: AnnData,
    *,
    seed: int = 0,
    batch_key: str | None = None,
    threads: int = 1,
    held_out: NDArray[np.bool_] | None = None,
    stress: bool = True,
) -> Run:
    """Fit a method and embed all cells.

    Parameters
    ----------
    method
        What to fit.
    cells
        Raw counts over the panel, as :func:`panel_of` returns them. Not changed.
    seed
        Of the method. The worse views are the same for every seed.
    batch_key
        Column of ``obs`` with the batch; only a method that uses it is told.
    threads
        CPU threads for torch, BLAS and OpenMP; the old limits are restored.
    held_out
        Cells, (n_obs,), that are embedded but not fitted on; None fits on all cells.
    stress
        Embed worse views of the cells, too, if the method can embed new cells. Their time is not counted.

    Raises
    ------
    genejepa.errors.ConfigError
        If cells are held out from a method that cannot embed new cells.
    genejepa.errors.DataError
        If an embedding is not finite, not float32, or has not one row per cell.
    genejepa.errors.MissingPackageError
        If psutil is not installed.
    """
    if held_out is not None and not method.new_cells:
        raise ConfigError(
            f"{method.name!r} cannot embed cells that it was not fitted on.",
            fix="Leave this method out of the inductive regime.",
        )
    told = batch_key if method.uses_batch else None
    fitted = (cells if held_out is None else cells[~held_out]).copy()
    with _limited_threads(threads), _PeakMemory() as memory:
        start = time.perf_counter()
        embed = method.fit(fitted, FitOptions(seed=seed, batch_key=told, threads=threads))
        middle = time.perf_counter()
        views = {FULL: _checked(embed(fitted if held_out is None else cells.copy()), method.name, cells.n_obs)}
        end = time.perf_counter()
    if stress and method.new_cells:
        with _limited_threads(threads):
            for name, view in stress_views(cells).items():
                views[name] = _checked(embed(view), method.name, cells.n_obs)
    return Run(method.name, seed, views, middle - start, end - middle, memory.peak_mb, told, held_out)


def _checked(Z: Any, method: str, n_obs: int) -> NDArray[np.float32]:
    """Return an embedding, or raise if a method did not keep to the interface."""
    if not isinstance(Z, np.ndarray) or Z.dtype != np.float32 or Z.ndim != 2 or len(Z) != n_obs or Z.shape[1] == 0:
        found = f"{Z.dtype} of shape {Z.shape}" if isinstance(Z, np.ndarray) else f"a {type(Z).__name__}"
        raise DataError(
            f"The method {method!r} returned {found}, expected an array of float32 of shape ({n_obs}, dim).",
            fix="Return one row per cell: np.asarray(Z, dtype=np.float32).",
        )
    bad = int((~np.isfinite(Z)).any(axis=1).sum())
    if bad:
        raise DataError(
            f"The method {method!r} returned NaN or infinite values in {bad} of {n_obs} cells.",
            fix="Leave this method out, or make it return finite numbers, also for cells with few counts.",
        )
    return Z


@contextmanager
def _limited_threads(threads: int) -> Iterator[None]:
    """Let torch, BLAS and OpenMP use so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


class _PeakMemory:
    """Follows the resident memory of the process within a block."""

    peak_mb: float = 0.0

    def __enter__(self) -> _PeakMemory:
        try:
            import psutil
        except ImportError as error:
            raise MissingPackageError(
                "psutil, which measures memory, is not installed.", fix="pip install 'genejepa[bench]'"
            ) from error
        gc.collect()
        self._process = psutil.Process()
        self._start = self._largest = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.peak_mb = (self._largest - self._start) / 1e6

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLING_SECONDS):
            self._look()

    def _look(self) -> None:
        self._largest = max(self._largest, self._process.memory_info().rss)
