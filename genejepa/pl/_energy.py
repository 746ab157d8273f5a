"""Picture of the energies of groups of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from genejepa.data.slots import obs_column
from genejepa.errors import DataError
from genejepa.pl._style import PALETTE, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["energy"]

_REAL: Final = 1.0
"""Mean energy of the reference cells."""


def energy(adata: AnnData, *, key: str = "energy", groupby: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw how energies spread in every group of cells: median, quartiles, and the middle 90 %.

    Parameters
    ----------
    adata
        Cells with their energies in ``obs[key]``, as in ``adata.obs["energy"] = model.energy(adata)``.
    groupby
        Column of ``obs`` with the group of every cell, such as the sample; None for one group. Cells without a group
        are left out.
    ax
        Axes to draw on; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes with the picture; groups are sorted by their medians, the highest on top. The energy axis is
        logarithmic; a line marks the 1 of cells like those of the reference.

    Raises
    ------
    MissingKeyError
        If a column does not exist.
    DataError
        If the energies are not positive numbers, or there is no cell with a group.
    """
    import pandas as pd
    from matplotlib.ticker import LogLocator, NullLocator

    values = pd.to_numeric(obs_column(adata, key).astype(object), errors="coerce").to_numpy(dtype=np.float64)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        raise DataError(
            f"`obs[{key!r}]` holds {int(bad.sum())} values that are not positive numbers, expected energies.",
            fix=f"adata.obs[{key!r}] = model.energy(adata)",
        )
    groups = _groups(adata, values, groupby)
    names = sorted(groups, key=lambda name: float(np.median(groups[name])))
    if not names:
        raise DataError("there is no cell to draw.", fix="pass cells with a group.")
    ax = ax or new_axes(5.2, 1.4 + 0.36 * len(names))
    ax.boxplot(
        [groups[name] for name in names],
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": PALETTE[5], "edgecolor": "#333333"},
        medianprops={"color": "#333333", "linewidth": 2},
    )
    ax.axvline(_REAL, color="#888888", linestyle=":", zorder=0)
    ax.set_yticks(range(1, len(names) + 1), [f"{name} ({len(groups[name]):,})" for name in names])
    ax.set(xscale="log", xlabel="Energy (reference: 1)")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _groups(
    adata: AnnData, values: np.ndarray[tuple[int], np.dtype[np.float64]], groupby: str | None
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Energies by the name of the group."""
    if groupby is None:
        return {"all cells": values} if len(values) else {}
    labels = obs_column(adata, groupby)
    names = labels.astype(str).to_numpy()
    return {str(name): values[(names == name) & labels.notna().to_numpy()] for name in np.unique(names[labels.notna()])}
