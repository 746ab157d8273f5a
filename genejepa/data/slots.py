"""Where things are in an AnnData: counts, columns of ``obs`` and embeddings, with errors that name what there is."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from genejepa.errors import ConfigError, DataError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

_N_LISTED = 20

SEPARATOR = "+"
"""Joins the parts of a combination of actions, as in ``KLF1+GATA1``; their order does not matter."""


@dataclass(frozen=True)
class CountSlot:
    """The slot of an AnnData that counts are read from.

    Parameters
    ----------
    layer
        Key of ``layers``; None for ``X``.
    use_raw
        Read ``raw.X``, which may have more genes than ``X``.

    Raises
    ------
    ConfigError
        If both are given.
    """

    layer: str | None = None
    use_raw: bool = False

    def __post_init__(self) -> None:
        if self.use_raw and self.layer is not None:
            raise ConfigError(
                f"`layer` is {self.layer!r} and `use_raw` is True, expected one of them.",
                fix=f"pass layer={self.layer!r} or use_raw=True, not both.",
            )

    @property
    def name(self) -> str:
        """Name for messages: ``X``, ``layers['<layer>']`` or ``raw.X``."""
        if self.use_raw:
            return "raw.X"
        return "X" if self.layer is None else f"layers[{self.layer!r}]"

    @property
    def argument(self) -> str:
        """How to ask for this slot, such as ``layer='counts'``."""
        return "use_raw=True" if self.use_raw else f"layer={self.layer!r}"

    @property
    def table(self) -> str:
        """Name of the table of genes, for messages."""
        return "raw.var" if self.use_raw else "var"

    def var(self, adata: AnnData) -> pd.DataFrame:
        """Table of the genes of this slot."""
        table: pd.DataFrame = adata.raw.var if self.use_raw else adata.var
        return table


def parts_of(label: str, control: str | None) -> tuple[str, ...]:
    """Different parts of an action such as ``"A+B"``, sorted; the control is no part of it, and has none itself.

    A name such as ``"CD3+"``, of which a part would be empty, is that of a single action.
    """
    label, control = label.strip(), None if control is None else control.strip()
    parts = [part.strip() for part in label.split(SEPARATOR)]
    if not all(parts) or label == control:
        parts = [label]
    return tuple(sorted({part for part in parts if part != control}))


def missing_key(slot: str, key: object, existing: Iterable[object], *, argument: str = "") -> MissingKeyError:
    """Error for a key that does not exist, with those that do and the one that was probably meant."""
    names = [str(name) for name in existing]
    listed = ", ".join(map(repr, names[:_N_LISTED])) + (", ..." if len(names) > _N_LISTED else "")
    close = get_close_matches(str(key), names, n=1)
    problem = f"`{slot}[{key!r}]`{argument and f' ({argument})'} does not exist, found {listed or 'none'}"
    if close:
        return MissingKeyError(f"{problem}; did you mean {close[0]!r}?", fix=f"pass {close[0]!r}.")
    return MissingKeyError(f"{problem}.", fix="pass one of these names." if names else f"fill `adata.{slot}` first.")


def obs_column(adata: AnnData, key: str) -> pd.Series[Any]:
    """Return a column of ``obs``.

    Raises
    ------
    MissingKeyError
        If it does not exist.
    DataError
        If several columns have this name.
    """
    if key not in adata.obs:
        raise missing_key("obs", key, adata.obs.columns)
    column: Any = adata.obs[key]
    if column.ndim != 1:
        raise DataError(
            f"`obs` has {column.shape[1]} columns named {key!r}, expected one.",
            fix="adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]",
        )
    found: pd.Series[Any] = column
    return found


def as_text(value: object) -> str:
    """Text of a name; bytes, as old HDF5 files give them, are decoded, and escaped where they are not UTF-8."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def read_embedding(adata: AnnData, use_rep: str) -> NDArray[np.float64]:
    """Return ``obsm[use_rep]`` as a dense array of finite numbers, shape (n_cells, dim)."""
    from scipy.sparse import issparse

    if use_rep not in adata.obsm:
        raise missing_key("obsm", use_rep, adata.obsm)
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
