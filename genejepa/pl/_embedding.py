"""Picture of an embedding in two dimensions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from genejepa._constants import OBSM_KEY
from genejepa.data.slots import obs_column, read_embedding
from genejepa.errors import ConfigError, DataError
from genejepa.pl._names import write_names
from genejepa.pl._style import MISSING_COLOR, category_style, figure_of, new_axes

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

__all__ = ["embedding"]

LegendLoc = Literal["right", "on data", "none"]
Floats = NDArray[np.float64]

_MIN_CELLS: Final = 10
_LEGEND_ROWS: Final = 18


def embedding(
    adata: AnnData,
    *,
    color: str | None = None,
    use_rep: str = OBSM_KEY,
    legend_loc: LegendLoc = "right",
    title: str | None = None,
    n_neighbors: int = 15,
    min_dist: float = 0.5,
    point_size: float | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the cells by a UMAP of their embedding.

    The neighbour graph and the UMAP are computed anew from the embedding; an existing ``obsm["X_umap"]`` is
    neither used nor replaced. A UMAP keeps neighbourhoods: distances between far groups, and the sizes of
    groups, carry no meaning.

    Parameters
    ----------
    adata
        Annotated data with an embedding in ``obsm``; it is not changed.
    color
        Column of ``obs``. Numbers get a colour bar; anything else, truth values included, a legend.
    use_rep
        Key of ``obsm`` with the embedding, shape (n_cells, dim).
    legend_loc
        Where the names of categories stand: in a legend right of the axes, at the medians of their cells, or
        nowhere.
    title
        Title of the axes; the name of the column by default.
    n_neighbors
        Neighbours of each cell in the graph.
    min_dist
        Smallest distance between points in the UMAP, in its units.
    point_size
        Area of a point in square typographic points; by default it shrinks with the number of cells.
    seed
        Seed of the UMAP and of the order in which cells are drawn.
    ax
        Axes to draw on; those of a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes with the picture.

    Raises
    ------
    MissingKeyError
        If `use_rep` or `color` does not exist.
    DataError
        If there are fewer than 10 cells, or the embedding is not finite.
    ConfigError
        If `legend_loc` is unknown.

    References
    ----------
    McInnes, Healy & Melville (2018), UMAP: uniform manifold approximation and projection for dimension
    reduction, arXiv:1802.03426.
    """
    if legend_loc not in get_args(LegendLoc):
        raise ConfigError(
            f"`legend_loc` is {legend_loc!r}, expected one of {', '.join(map(repr, get_args(LegendLoc)))}.",
            fix='Pass legend_loc="right".',
        )
    values = None if color is None else obs_column(adata, color)
    Z = read_embedding(adata, use_rep).astype(np.float32)
    if len(Z) < _MIN_CELLS:
        raise DataError(
            f"`obsm[{use_rep!r}]` has {len(Z)} cells, expected at least {_MIN_CELLS} for a UMAP.",
            fix="Pass an AnnData with more cells.",
        )
    points = _umap(Z, n_neighbors=n_neighbors, min_dist=min_dist, seed=seed)
    if ax is None:
        ax = new_axes(5.2 + _side_width(values, legend_loc), 4.8)
    size = point_size if point_size is not None else float(np.clip(24_000 / len(points), 2.0, 30.0))
    order = np.random.default_rng(seed).permutation(len(points))
    ax.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title if title is not None else (color or f"{len(points):,} cells"))
    if values is None:
        _dots(ax, points[order], s=size, c=category_style(0)[0])
    elif _is_numeric(values):
        _draw_numbers(ax, points, values.to_numpy(dtype=np.float64, na_value=np.nan), order, size=size)
    else:
        _draw_categories(ax, points, values, order, size=size, legend_loc=legend_loc)
    return ax


def _is_numeric(values: pd.Series[Any]) -> bool:
    """Tell whether a column holds numbers, as against categories, text or truth values."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return is_numeric_dtype(values.dtype) and not is_bool_dtype(values.dtype)


def _side_width(values: pd.Series[Any] | None, legend_loc: LegendLoc) -> float:
    """Estimate the width in inches that a legend or a colour bar needs right of the axes."""
    if values is None:
        return 0.0
    if _is_numeric(values):
        return 0.8
    names = values.dropna().astype(str).unique()
    if legend_loc != "right" or len(names) == 0:
        return 0.0
    return -(-(len(names) + 1) // _LEGEND_ROWS) * (0.4 + 0.085 * max(map(len, names)))


def _umap(Z: NDArray[np.float32], *, n_neighbors: int, min_dist: float, seed: int) -> Floats:
    """Lay cells out in two dimensions, shape (n_cells, 2)."""
    import anndata as ad
    import pandas as pd
    import scanpy as sc

    # A new object takes what scanpy writes, so that the one of the user stays as it is.
    cells = ad.AnnData(obs=pd.DataFrame(index=[str(i) for i in range(len(Z))]), obsm={"rep": Z})
    with warnings.catch_warnings():
        # UMAP says that it computes on one thread because a seed is given, which is intended here.
        warnings.filterwarnings("ignore", message="n_jobs value .* overridden", category=UserWarning)
        n_neighbors = min(n_neighbors, len(Z) - 1)
        sc.pp.neighbors(cells, n_neighbors=n_neighbors, use_rep="rep", random_state=seed)
        # The spectral start needs more cells than the few of a toy example.
        init = "spectral" if len(Z) > 50 else "random"
        sc.tl.umap(cells, min_dist=min_dist, random_state=seed, init_pos=init)
    return np.asarray(cells.obsm["X_umap"], dtype=np.float64)


def _dots(ax: Axes, points: Floats, **style: Any) -> PathCollection:
    """Draw cells as dots."""
    return ax.scatter(points[:, 0], points[:, 1], linewidths=0, rasterized=True, **style)


def _draw_numbers(ax: Axes, points: Floats, values: Floats, order: NDArray[np.intp], *, size: float) -> None:
    """Draw cells coloured by a number, with a colour bar."""
    known = np.isfinite(values[order])
    missing, present = order[~known], order[known]
    _dots(ax, points[missing], s=size, c=MISSING_COLOR)
    dots = _dots(ax, points[present], s=size, c=values[present], cmap="viridis")
    bar = figure_of(ax).colorbar(dots, ax=ax, shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    if missing.size:
        bar.ax.set_xlabel(f"grey: no value\n({missing.size:,} cells)", fontsize="x-small")


def _draw_categories(
    ax: Axes,
    points: Floats,
    values: pd.Series[Any],
    order: NDArray[np.intp],
    *,
    size: float,
    legend_loc: LegendLoc,
) -> None:
    """Draw cells coloured by category, with a legend or with names on the data."""
    import pandas as pd

    categorical = pd.Categorical(values)
    codes, names = np.asarray(categorical.codes), [str(name) for name in categorical.categories]
    used = np.unique(codes[codes >= 0])
    # Categories without cells count here, so that colours are the same for a part of the cells.
    colors, markers = np.array([category_style(i) for i in range(len(names))]).reshape(-1, 2).T
    _dots(ax, points[codes < 0], s=size, c=MISSING_COLOR)
    for marker in dict.fromkeys(markers[used]):
        shown = order[np.isin(codes[order], np.flatnonzero(markers == marker))]
        _dots(ax, points[shown], s=size, c=colors[codes[shown]], marker=marker)
    if legend_loc == "right":
        entries = [(names[code], colors[code], markers[code]) for code in used]
        if (codes < 0).any():
            entries.append((f"no label ({(codes < 0).sum():,} cells)", MISSING_COLOR, "o"))
        _legend_right(ax, entries)
    elif legend_loc == "on data" and used.size:
        medians = [np.median(points[codes == code], axis=0) for code in used]
        write_names(ax, np.array(medians), [names[code] for code in used])


def _legend_right(ax: Axes, entries: list[tuple[str, str, str]]) -> None:
    """Write name, colour and marker of each category right of the axes."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="none", marker=marker, color=color, markersize=6, label=name)
        for name, color, marker in entries
    ]
    ax.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize="small",
        handletextpad=0.2,
        ncols=-(-len(handles) // _LEGEND_ROWS),
    )
