"""Principal axes of the panel genes: start of the encoder's value tables and linear path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from genejepa._arithmetic import plain_arithmetic
from genejepa._memory import memory_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genejepa.data.normalization import Normalizer
    from genejepa.data.panel import PanelCounts

_LEAST_SPREAD = 1e-3
"""Deviation below which coordinates are rounding, as those of cells that are all alike, and are not blown up."""

_MAX_CELLS = 8192
"""Axes are estimated on at most this many cells: 64 MB of values for 2,000 genes, whatever the data size."""


@dataclass(frozen=True, eq=False)
class PrincipalAxes:
    """Leading principal axes of the normalised values.

    Attributes
    ----------
    axes : (n_genes, n_components)
        Orthonormal columns, by falling variance.
    deviations : (n_components,)
        Standard deviation of the cells along each axis.
    values : (n_cells, n_genes)
        Values of the cells, at most 8,192, that the axes were estimated on.
    """

    axes: NDArray[np.float32]
    deviations: NDArray[np.float32]
    values: NDArray[np.float32]

    def start_tables(self, dim: int, *, seed: int) -> NDArray[np.float32]:
        """Value tables, (n_genes, min(dim, n_components)), that span the axes.

        A random rotation spreads every axis over all columns and hence over all attention heads; the entries have
        root mean square 1.
        """
        axes = self.axes[:, :dim]
        rng = np.random.default_rng([seed, 4])
        rotation, _ = np.linalg.qr(rng.standard_normal((axes.shape[1], axes.shape[1])))
        rotated = axes @ rotation.astype(np.float32)
        return np.ascontiguousarray(rotated / np.sqrt(np.mean(rotated**2)))

    def coordinates(self, n_axes: int, dim: int, *, seed: int) -> NDArray[np.float32]:
        """Coordinates of ``values`` along the leading axes, turned at random into ``dim`` dimensions, (n_cells, dim).

        All dimensions then vary about alike, distances stay those of the leading axes, and the mean variance is 1.
        """
        scores = self.values @ self.axes[:, : min(n_axes, dim)]
        scores -= scores.mean(0)
        rng = np.random.default_rng([seed, 7])
        rotation, _ = np.linalg.qr(rng.standard_normal((dim, scores.shape[1])))
        turned = scores @ rotation.T.astype(np.float32)
        return np.asarray(turned / max(float(turned.std()), _LEAST_SPREAD), dtype=np.float32)

    def spread(self, tables: NDArray[np.float32]) -> float:
        """Root mean square over cells of the products ``values @ tables``; not below 0.001."""
        along = (self.axes.T @ tables) * self.deviations[:, None]
        return max(float(np.sqrt(np.mean(np.sum(along**2, axis=0)))), _LEAST_SPREAD)


@memory_errors("looking for the principal axes", fix="take a smaller `n_genes`.")
@plain_arithmetic()
def principal_axes(counts: PanelCounts, normalizer: Normalizer, *, n_components: int, seed: int) -> PrincipalAxes:
    """Estimate axes by a randomised singular value decomposition (Halko et al. 2011, arXiv:0909.4061).

    Values are centred already, so no mean is taken out.

    Raises
    ------
    OutOfMemoryError
        If memory runs out.
    """
    n = min(counts.n_obs, _MAX_CELLS)
    index = np.sort(np.random.default_rng([seed, 5]).permutation(counts.n_obs)[:n])
    values = normalizer.dense(counts, index)[0]
    k = min(n_components, *values.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # svd_lowrank draws from the global generator
        _, singular, axes = torch.svd_lowrank(torch.from_numpy(values), q=min(k + 8, *values.shape), niter=2)
    return PrincipalAxes(axes[:, :k].contiguous().numpy(), (singular[:k] / np.sqrt(n)).numpy(), values)
