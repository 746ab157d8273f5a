"""Distances between two populations of cells, each given by its cells as rows of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genejepa.data.slots import finite_matrix
from genejepa.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

__all__ = ["energy_distance", "median_distance", "mmd", "wasserstein"]

_ROWS = 1000
"""Rows of the matrix of distances that are held at a time."""


def energy_distance(x: ArrayLike, y: ArrayLike) -> float:
    """Energy distance, 2 E|x − y| − E|x − x'| − E|y − y'|, with Euclidean distances.

    The U-statistic: x and x' are never the same cell. It is unbiased, so that samples of different sizes compare, and
    may be slightly negative for equal populations.

    Parameters
    ----------
    x : (n, d)
    y : (m, d)
        Cells of the two populations; at least two of each.

    Returns
    -------
    float
        In the units of the values. A `DataError` says why arrays cannot be used.

    References
    ----------
    Székely & Rizzo 2013, doi:10.1016/j.jspi.2013.03.018.

    Examples
    --------
    >>> energy_distance([[0.0], [2.0]], [[3.0], [5.0]])
    2.0
    """
    x, y = _check_pair(x, y, fewest=2)
    return 2 * _mean_of_pairs(x, y) - _mean_of_pairs(x) - _mean_of_pairs(y)


def mmd(x: ArrayLike, y: ArrayLike, *, bandwidth: float | None = None) -> float:
    """Squared maximum mean discrepancy with the Gaussian kernel exp(−|x − y|² / (2 bandwidth²)).

    The unbiased estimate (Gretton et al. 2012, eq. 3), which may be slightly negative for equal populations.

    Parameters
    ----------
    x : (n, d)
    y : (m, d)
        Cells of the two populations; at least two of each.
    bandwidth
        Width of the kernel, in the units of the values; None for the median distance between cells of both
        populations together. Values compare only between calls with the same one.

    Returns
    -------
    float
        At most 2. A `DataError` says why arrays cannot be used, a `ConfigError` that the bandwidth is not positive.

    References
    ----------
    Gretton et al. 2012, "A kernel two-sample test", JMLR 13:723-773, eq. 3 and sec. 8.

    Examples
    --------
    >>> round(mmd([[0.0], [0.0]], [[1.0], [1.0]], bandwidth=1.0), 4)  # 2 - 2 exp(-1/2)
    0.7869
    """
    x, y = _check_pair(x, y, fewest=2)
    width = median_distance(np.concatenate([x, y])) if bandwidth is None else bandwidth
    if not 0 < width < np.inf:
        raise ConfigError(
            f"The bandwidth is {width}, expected a positive number.",
            fix="pass a positive bandwidth; the median distance is 0 if most cells are equal.",
        )

    def kernel(distances: NDArray[np.float64]) -> NDArray[np.float64]:
        similar: NDArray[np.float64] = np.exp(-0.5 * (distances / width) ** 2)
        return similar

    # A cell is as similar as can be to itself, 1, which is not to be counted.
    return _mean_of_pairs(x, of=kernel) + _mean_of_pairs(y, of=kernel) - 2 * _mean_of_pairs(x, y, of=kernel)


def wasserstein(x: ArrayLike, y: ArrayLike) -> float:
    """1-Wasserstein distance: the least mean Euclidean way that takes the cells of one population to the other.

    The exact distance between the two samples (Peyré & Cuturi 2019, doi:10.1561/2200000073, sec. 2.3), by the network
    simplex of POT. Samples of equal populations have a positive distance, the larger the smaller they are and the more
    dimensions there are, so compare samples of equal sizes.

    Parameters
    ----------
    x : (n, d)
    y : (m, d)
        Cells of the two populations. Time and memory grow with n m; a thousand of each take about a second.

    Returns
    -------
    float
        In the units of the values. A `DataError` says why arrays cannot be used.

    Examples
    --------
    >>> wasserstein([[0.0], [2.0]], [[3.0], [5.0]])
    3.0
    """
    import ot
    from scipy.spatial.distance import cdist

    x, y = _check_pair(x, y, fewest=1)
    return float(ot.emd2([], [], cdist(x, y), numItermax=10_000_000))


def median_distance(x: ArrayLike) -> float:
    """Median Euclidean distance between different rows of ``x``, (n, d), of which there must be two."""
    from scipy.spatial.distance import pdist

    cells, _ = _check_pair(x, x, fewest=2)
    return float(np.median(pdist(cells)))


def _check_pair(x: ArrayLike, y: ArrayLike, *, fewest: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two matrices of finite numbers with as many columns, and at least ``fewest`` rows."""
    x, y = finite_matrix(x, name="x"), finite_matrix(y, name="y")
    if x.shape[1] != y.shape[1]:
        raise DataError(
            f"`x` has {x.shape[1]} columns and `y` has {y.shape[1]}, expected the same number.",
            fix="pass both populations in the same space.",
        )
    if min(len(x), len(y)) < fewest:
        raise DataError(
            f"`x` has {len(x)} cells and `y` has {len(y)}, expected at least {fewest} of each.",
            fix="pass populations of more cells.",
        )
    return x, y


def _mean_of_pairs(
    x: NDArray[np.float64],
    y: NDArray[np.float64] | None = None,
    *,
    of: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda distances: distances,
) -> float:
    """Mean of a function of the distance, over pairs of a row of x and one of y, or of different rows of x."""
    from scipy.spatial.distance import cdist

    other = x if y is None else y
    total = sum(float(of(cdist(x[start : start + _ROWS], other)).sum()) for start in range(0, len(x), _ROWS))
    if y is not None:
        return total / (len(x) * len(y))
    return (total - len(x) * float(of(np.zeros(1))[0])) / (len(x) * (len(x) - 1))
