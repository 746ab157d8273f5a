"""What the probes are given, checked: numbers, arrays, and the cells of an AnnData."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genejepa.data.slots import finite_matrix, obs_column, read_embedding
from genejepa.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import ArrayLike, NDArray


def check_arrays(
    Z: ArrayLike, labels: ArrayLike, groups: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[Any], NDArray[np.intp] | None]:
    """Return embedding, class codes, classes and group codes of arrays that fit together."""
    Z = finite_matrix(Z, name="Z")
    for name, values in (("labels", labels), ("groups", groups)):
        if values is not None and np.shape(values) != (len(Z),):
            raise DataError(
                f"`{name}` has shape {np.shape(values)}, expected ({len(Z)},), one entry per row of `Z`.",
                fix=f"Pass {name} in the order of the cells of the embedding.",
            )
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    if classes.size < 2:
        raise DataError(
            f"`labels` has {classes.size} class, expected at least 2.",
            fix="Pass labels with at least two classes.",
        )
    return Z, codes, classes, None if groups is None else np.unique(groups, return_inverse=True)[1]


def read_cells(
    adata: AnnData, labels_key: str, use_rep: str, groups_key: str | None, *, min_class_size: int
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.intp] | None, dict[str, Any]]:
    """Return embedding, class codes and group codes of the cells to use, and a record of what was read.

    Unlabelled cells, small classes and classes of one group are left out. A code is a position in
    ``record["classes"]``.
    """
    labels = pd.Categorical(obs_column(adata, labels_key))
    codes, names = np.asarray(labels.codes), [str(name) for name in labels.categories]
    Z = read_embedding(adata, use_rep)
    groups = None if groups_key is None else _group_codes(adata, groups_key, labelled=codes >= 0)
    sizes = np.bincount(codes[codes >= 0], minlength=len(names))
    usable = sizes >= min_class_size
    if groups is not None:
        for code in range(len(names)):
            usable[code] &= np.unique(groups[codes == code]).size > 1
    if usable.sum() < 2:
        found = ", ".join(f"{name} ({size})" for name, size in zip(names, sizes, strict=True))
        raise DataError(
            f"`obs[{labels_key!r}]` has {usable.sum()} usable classes, expected at least 2 with at least "
            f"{min_class_size} cells each{'' if groups is None else ' in at least 2 groups'}; found "
            f"{len(names)} classes: {shorten(found, 200)}.",
            fix="Pass the labels_key of a column with classes, or a smaller min_class_size.",
        )
    kept = np.isin(codes, np.flatnonzero(usable))
    record = {
        "labels_key": labels_key,
        "use_rep": use_rep,
        "groups_key": groups_key,
        "min_class_size": min_class_size,
        "classes": [names[code] for code in np.flatnonzero(usable)],
        "dropped_classes": {names[code]: int(sizes[code]) for code in np.flatnonzero(~usable & (sizes > 0))},
        "n_unlabelled": int((codes < 0).sum()),
    }
    new_codes = np.unique(codes[kept], return_inverse=True)[1]
    return Z[kept], new_codes, None if groups is None else groups[kept], record


def _group_codes(adata: AnnData, key: str, *, labelled: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return groups as integers; labelled cells must have one."""
    codes = np.asarray(pd.Categorical(obs_column(adata, key)).codes, dtype=np.intp)
    missing = int((codes[labelled] < 0).sum())
    if missing:
        raise DataError(
            f"`obs[{key!r}]` is missing for {missing} labelled cells, expected a group for each of them.",
            fix=f"Leave out cells without a group: adata[adata.obs[{key!r}].notna()].",
        )
    return codes
