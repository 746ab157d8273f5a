"""Reading a column of ``obs`` or an embedding of ``obsm``, with errors that name what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from genejepa.errors import DataError, MissingKeyError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray


def obs_column(adata: AnnData, key: str) -> pd.Series[Any]:
    """Return a column of ``obs``."""
    if key not in adata.obs:
        found = ", ".join(repr(str(name)) for name in adata.obs.columns) or "none"
        raise MissingKeyError(
            f"`obs[{key!r}]` does not exist, found {found}.",
            fix="Pass the name of an existing column of adata.obs.",
        )
    column: pd.Series[Any] = adata.obs[key]
    return column


def read_embedding(adata: AnnData, use_rep: str) -> NDArray[np.float64]:
    """Return ``obsm[use_rep]`` as a dense array of finite numbers, shape (n_cells, dim)."""
    from scipy.sparse import issparse

    if use_rep not in adata.obsm:
        raise MissingKeyError(
            f"`obsm[{use_rep!r}]` does not exist, found {', '.join(map(repr, adata.obsm)) or 'none'}.",
            fix="Write the embedding into adata.obsm first, or pass the use_rep of an existing one.",
        )
    stored: Any = adata.obsm[use_rep]
    return finite_matrix(stored.toarray() if issparse(stored) else stored, name=f"obsm[{use_rep!r}]")


def finite_matrix(values: Any, *, name: str) -> NDArray[np.float64]:
    """Return `values` as a matrix with one row per cell, or raise if a value is not finite."""
    Z = np.asarray(values, dtype=np.float64)
    if Z.ndim != 2 or Z.size == 0:
        raise DataError(
            f"`{name}` has shape {Z.shape}, expected (n_cells, dim) with at least one of each.",
            fix="Pass an embedding with one row per cell.",
        )
    bad = int((~np.isfinite(Z)).any(axis=1).sum())
    if bad:
        raise DataError(
            f"`{name}` has NaN or infinite values in {bad} of {len(Z)} cells, expected finite numbers.",
            fix="Compute the embedding again, or leave these cells out.",
        )
    return Z
