"""Picture of a predicted change of expression against the observed one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from genejepa.errors import ConfigError, DataError, GeneMismatchError
from genejepa.evaluate._transition import pearson
from genejepa.pl._beside import write_beside
from genejepa.pl._style import PALETTE, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["transition"]

_OTHERS: Final = "#888888"
_NAMED: Final = PALETTE[3]


def transition(
    predicted: AnnData, observed: AnnData, control: AnnData, *, n_names: int = 10, ax: Axes | None = None
) -> Axes:
    """Draw the predicted change of the mean of every gene against the observed one.

    Changes are those from the mean of the control cells. The order of the genes does not matter.

    Parameters
    ----------
    predicted : (n_predicted, n_genes)
        Predicted log1p-normalised expression in ``X``.
    observed : (n_observed, n_genes)
        Real cells after the action, in the same units.
    control : (n_control, n_genes)
        Real cells without it, in the same units.
    n_names
        Number of genes that are named: those with the largest observed change, up or down.
    ax
        Axes to draw on; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes with the picture: a dot per gene, and a line where both changes are equal. The title gives Pearson's
        correlation over all genes, ``delta_pearson`` of :func:`genejepa.evaluate.transition`: 0 for a prediction
        without change, undefined if nothing was observed to change.

    Raises
    ------
    ConfigError
        If `n_names` is no whole number of at least 0.
    GeneMismatchError
        If the three do not have the same genes, or names are repeated.
    DataError
        If one has no cells, or values that are not finite.

    Examples
    --------
    >>> import anndata as ad, numpy as np
    >>> from matplotlib.figure import Figure
    >>> import genejepa.pl
    >>> control = ad.AnnData(np.zeros((2, 3)))
    >>> observed, predicted = ad.AnnData(np.tile([0.0, 1, 2], (2, 1))), ad.AnnData(np.tile([0.0, 2, 1], (2, 1)))
    >>> genejepa.pl.transition(predicted, observed, control, ax=Figure().subplots()).get_title()
    'Pearson 0.50 over 3 genes'
    """
    if not isinstance(n_names, int | np.integer) or n_names < 0:
        raise ConfigError(f"`n_names` is {n_names!r}, expected a whole number of at least 0.", fix="pass n_names=10.")
    after, before, imagined = (
        _mean(adata, observed, name)
        for adata, name in [(observed, "observed"), (control, "control"), (predicted, "predicted")]
    )
    real, guess = after - before, imagined - before
    if ax is None:
        ax = new_axes(5.2, 5.2)
    named = np.argsort(-np.abs(real), kind="stable")[:n_names]
    rest = np.setdiff1d(np.arange(len(real)), named)
    size = float(np.clip(24_000 / len(real), 6.0, 30.0))
    ax.axhline(0, color="#DDDDDD", linewidth=0.8, zorder=0)
    ax.axvline(0, color="#DDDDDD", linewidth=0.8, zorder=0)
    ax.axline((0, 0), slope=1, color="#555555", linestyle=":", zorder=1)
    ax.scatter(real[rest], guess[rest], s=size, c=_OTHERS, alpha=0.5, linewidths=0, rasterized=True)
    ax.scatter(real[named], guess[named], s=max(size, 16.0), c=_NAMED, linewidths=0, zorder=3)
    low, high = _limits(np.concatenate([real, guess]))
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal", title=_title(guess, real))
    ax.set(xlabel="Observed change of the mean", ylabel="Predicted change of the mean")
    ax.title.set_fontsize("medium")
    ax.spines[["top", "right"]].set_visible(False)
    points = np.stack([real, guess], axis=1)
    names = observed.var_names[named].astype(str).tolist()
    write_beside(ax, points[named], names, avoid=np.empty((0, 2)), cloud=points[rest])
    return ax


def _mean(adata: AnnData, observed: AnnData, name: str) -> NDArray[np.float64]:
    """Mean of ``X`` over the cells, (n_genes,), in the order of the observed genes."""
    from scipy.sparse import issparse

    if not adata.var_names.is_unique:
        repeated = adata.var_names[adata.var_names.duplicated()]
        raise GeneMismatchError(
            f"`{name}.var_names` has {len(repeated)} repeated names, {repeated[:3].tolist()}, expected unique ones.",
            fix=f"{name}.var_names_make_unique()",
        )
    if len(odd := adata.var_names.symmetric_difference(observed.var_names)):
        raise GeneMismatchError(
            f"`{name}.var_names` and `observed.var_names` differ in {len(odd)} genes, {odd[:3].tolist()}, expected the "
            "same genes.",
            fix=f"genes = observed.var_names.intersection({name}.var_names), then take [:, genes] of all three.",
        )
    values: Any = adata.to_memory().X if adata.isbacked else adata.X
    if values is None or 0 in adata.shape:
        raise DataError(
            f"`{name}` has {adata.n_obs} cells, {adata.n_vars} genes and {'no' if values is None else 'an'} `X`, "
            "expected log1p-normalised expression in `X`.",
            fix="pass an AnnData with cells, and their values in `X`.",
        )
    bad = int((~np.isfinite(values.data if issparse(values) else values)).sum())
    if bad:
        raise DataError(
            f"`{name}.X` has {bad} NaN or infinite values, expected finite ones.",
            fix="leave out these cells or genes; log1p of a value below -1 is NaN.",
        )
    means = np.asarray(values.mean(axis=0, dtype=np.float64), dtype=np.float64).ravel()
    ordered: NDArray[np.float64] = means[adata.var_names.get_indexer(observed.var_names)]
    return ordered


def _limits(changes: NDArray[np.float64]) -> tuple[float, float]:
    """Common limits of both axes, with room for names."""
    low, high = min(0.0, float(changes.min())), max(0.0, float(changes.max()))
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _title(guess: NDArray[np.float64], real: NDArray[np.float64]) -> str:
    """Correlation and number of genes."""
    found = pearson(guess, real)
    if np.isnan(found):
        return f"Pearson undefined (no observed change) over {len(real):,} genes"
    return f"Pearson {found:.2f} over {len(real):,} genes"
