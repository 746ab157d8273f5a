"""Mixing of batches and conservation of biology, measured by scib-metrics."""

from __future__ import annotations

import gc
import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from genejepa.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MIN_CELLS: Final = 91
"""scib-metrics looks at 90 neighbours, the cell among them."""


def integration_scores(
    Z: NDArray[np.float32], reference: NDArray[np.float32], *, labels: NDArray[np.intp], batches: NDArray[np.intp]
) -> dict[str, float]:
    """All default metrics of ``scib_metrics.benchmark.Benchmarker`` and their aggregates (Luecken et al. 2022).

    Parameters
    ----------
    Z
        Embedding, (n_cells, dim), of at least `MIN_CELLS` cells.
    reference
        Embedding of the same cells before any integration, (n_cells, dim'), to which ``pcr_comparison`` compares.
    labels, batches
        Class and batch, (n_cells,).

    Returns
    -------
    Metrics by their names in scib-metrics, in snake case, each between 0 and 1, 1 best. A metric that is undefined for
    these classes is NaN, and left out of the aggregates.

    Raises
    ------
    genejepa.errors.MissingPackageError
        If scib-metrics is not installed.

    References
    ----------
    Luecken et al. 2022, doi:10.1038/s41592-021-01336-8.
    """
    from anndata import AnnData

    with _contained():
        try:
            from scib_metrics.benchmark import Benchmarker
        except ImportError as error:
            raise MissingPackageError(
                "scib-metrics, which measures integration, is not installed.", fix="pip install 'genejepa[bench]'"
            ) from error
        obs = pd.DataFrame(
            {"label": labels.astype(str), "batch": batches.astype(str)}, index=np.arange(len(Z)).astype(str)
        )
        benchmarker = Benchmarker(
            AnnData(obs=obs, obsm={"Z": Z, "reference": reference}),
            batch_key="batch",
            label_key="label",
            embedding_obsm_keys=["Z"],
            pre_integrated_embedding_obsm_key="reference",
            progress_bar=False,
        )
        benchmarker.prepare(neighbor_computer=_neighbors)
        benchmarker.benchmark()
        table = benchmarker.get_results()
    return {name.lower().replace(" ", "_"): float(value) for name, value in table.loc["Z"].items()}


def _neighbors(Z: NDArray[np.float32], n_neighbors: int) -> Any:
    """Exact neighbours: for cells this few they take less time than to compile an approximate search."""
    from scib_metrics.nearest_neighbors import NeighborsResults

    distances, indices = NearestNeighbors(n_neighbors=n_neighbors - 1).fit(Z).kneighbors()
    # The cell itself comes first, at a distance of exactly 0: a rounding error would pass for its nearest neighbour.
    return NeighborsResults(
        indices=np.column_stack([np.arange(len(Z)), indices]),
        distances=np.column_stack([np.zeros(len(Z), dtype=distances.dtype), distances]),
    )


@contextmanager
def _contained() -> Iterator[None]:
    """Silence scib-metrics, make it deterministic, and leave no trace of it.

    It warns of and logs what its scores say anyway (a batch effect that grew, a class too small for a metric), draws
    from the global generator, and collects garbage before every metric. Where large libraries are loaded that costs
    more than the metrics, so objects that exist already are kept out of these collections.
    """
    logger = logging.getLogger("scib_metrics.metrics")
    level, state = logger.level, np.random.get_state()  # noqa: NPY002
    logger.setLevel(logging.WARNING)
    np.random.seed(0)  # noqa: NPY002
    gc.freeze()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        gc.unfreeze()
        np.random.set_state(state)  # noqa: NPY002
        logger.setLevel(level)
