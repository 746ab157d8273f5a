"""Normalised expression, its principal components, and Harmony, as methods of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA

from genejepa.bench.interface import Method
from genejepa.errors import ConfigError, DataError, GeneMismatchError, MissingPackageError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.bench.interface import Embed, FitOptions

Transform = Literal["log", "sqrt"]

_CLIP: Final = 10.0
"""Values of unit variance are clipped here, so that a gene of few cells does not become a component."""


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Median-depth normalisation, ``log1p`` or square root, centring, and unit variance if asked for.

    Attributes
    ----------
    counts
        Counts of the fitted cells, (n_obs, n_genes): they give the median depth over any genes.
    genes
        Names of the genes.
    mean, scale : (n_genes,), float32
        Of the transformed values of the fitted cells; ``scale`` is None for values that are centred only.
    """

    transform: Transform
    counts: sparse.csr_matrix
    genes: pd.Index
    mean: NDArray[np.float32]
    scale: NDArray[np.float32] | None

    @classmethod
    def fit(cls, adata: AnnData, *, transform: Transform, unit_variance: bool) -> Normaliser:
        """Take depth, means and deviations from cells of raw counts in ``X``."""
        genes = adata.var_names.copy()
        counts = over_genes(adata, genes)
        values = _stabilised(counts, _median_depth(counts), transform)
        scale = values.std(0) + np.float32(1e-8) if unit_variance else None
        return cls(transform, counts, genes, values.mean(0), scale)

    def measured(self, adata: AnnData) -> NDArray[np.bool_]:
        """Which genes of the fit other cells have, (n_genes,)."""
        return np.asarray(self.genes.isin(adata.var_names))

    def __call__(self, adata: AnnData) -> NDArray[np.float32]:
        """Values of cells, (n_obs, n_genes).

        Depth is brought to the median depth that the fitted cells had over the genes that these cells have. A gene
        that they lack takes its mean, which is 0.
        """
        measured = self.measured(adata)
        median_depth = _median_depth(self.counts[:, measured])
        values = _stabilised(over_genes(adata, self.genes), median_depth, self.transform) - self.mean
        if self.scale is not None:
            values = np.clip(values / self.scale, -_CLIP, _CLIP)
        values[:, ~measured] = 0
        return values


def fit_expression(adata: AnnData, options: FitOptions) -> Embed:
    """Embed cells as their normalised expression, (n_obs, n_genes): see :class:`Normaliser`."""
    return Normaliser.fit(adata, transform="sqrt", unit_variance=False)


def fit_pca(
    adata: AnnData, options: FitOptions, *, n_components: int, transform: Transform, unit_variance: bool
) -> Embed:
    """Principal components of normalised expression.

    Cells that lack genes get the expected scores given the genes that they have, in the Gaussian model behind PCA
    (Tipping & Bishop 1999, doi:10.1111/1467-9868.00196). With all genes these are the scores themselves.

    Parameters
    ----------
    adata
        Raw counts, (n_obs, n_genes), sparse rows. Not changed.
    n_components
        At most; never more than genes, or than cells less one.
    transform, unit_variance
        See :class:`Normaliser`.
    """
    normaliser = Normaliser.fit(adata, transform=transform, unit_variance=unit_variance)
    values = normaliser(adata)
    n = min(n_components, adata.n_obs - 1, adata.n_vars)
    pca = PCA(n, svd_solver="randomized", random_state=0).fit(values)
    variance = pca.explained_variance_.astype(np.float64)
    # Of a direction that no component describes. The floor keeps the equations below solvable if there is none.
    rest = (values.var(0, ddof=1).sum() - variance.sum()) / max(adata.n_vars - n, 1)
    noise = max(float(rest), 1e-6 * float(variance.max()))

    def embed(cells: AnnData) -> NDArray[np.float32]:
        measured = normaliser.measured(cells)
        centred = (normaliser(cells) - pca.mean_)[:, measured]
        loadings = pca.components_[:, measured].astype(np.float64)  # (n, n_measured)
        # E[scores | measured] = V (G (V - s I) + s I)^-1 W x, with V variances, s noise, G = W W^T. If all is
        # measured, G = I, and this is W x.
        system = loadings @ loadings.T * (variance - noise) + noise * np.eye(n)
        weights = variance[:, None] * np.linalg.solve(system, loadings)
        return np.asarray(centred @ weights.T, dtype=np.float32)

    return embed


def fit_harmony(adata: AnnData, options: FitOptions) -> Embed:
    """Correct 50 principal components for the batch (Korsunsky et al. 2019, doi:10.1038/s41592-019-0619-0).

    Harmony moves the cells that it is given and says nothing about others: the returned function only knows the
    fitted ones.

    Raises
    ------
    genejepa.errors.ConfigError
        If there is no ``batch_key``.
    genejepa.errors.MissingPackageError
        If harmonypy is not installed.
    """
    if options.batch_key is None:
        raise ConfigError(
            "Harmony corrects for a batch, and `batch_key` is None.",
            fix="pass batch_key=..., or leave 'Harmony' out of `methods`.",
        )
    try:
        import harmonypy
    except ImportError as error:
        raise MissingPackageError("harmonypy is not installed.", fix="pip install 'genejepa[bench]'") from error
    scores = fit_pca(adata, options, n_components=50, transform="sqrt", unit_variance=False)(adata)
    result = harmonypy.run_harmony(
        scores,
        adata.obs[[options.batch_key]],
        options.batch_key,
        verbose=False,
        random_state=options.seed,
        ncores=options.threads,
    )
    fitted, cell_names, genes = over_genes(adata, adata.var_names), adata.obs_names.copy(), adata.var_names.copy()
    Z = np.asarray(result.Z_corr, dtype=np.float32)  # (n_obs, n_components)

    def embed(cells: AnnData) -> NDArray[np.float32]:
        # Names alone do not tell: thinned cells keep theirs.
        if not cells.obs_names.equals(cell_names) or (over_genes(cells, genes) != fitted).nnz:
            raise DataError(
                "Harmony was asked for cells or counts that it was not fitted on.",
                fix="fit it on all cells that are to be compared.",
            )
        return Z.copy()

    return embed


def over_genes(adata: AnnData, genes: pd.Index) -> sparse.csr_matrix:
    """Counts of ``X`` over ``genes``, (n_obs, len(genes)), matched by name; a gene that is missing has no counts.

    Raises
    ------
    genejepa.errors.GeneMismatchError
        If no gene occurs.
    """
    column = genes.get_indexer(adata.var_names)  # of the result, -1 for a gene that is not wanted
    known = np.flatnonzero(column >= 0)
    if not len(known):
        raise GeneMismatchError(
            f"None of the {len(genes)} genes of the fit is among the {adata.n_vars} genes of `adata`.",
            fix="use the same gene names in `var_names` as for the fit.",
        )
    ones = np.ones(len(known), dtype=np.float32)
    choice = sparse.csr_matrix((ones, (known, column[known])), shape=(adata.n_vars, len(genes)))
    counts: sparse.csr_matrix = sparse.csr_matrix(adata.X, dtype=np.float32) @ choice
    return counts


def _median_depth(counts: sparse.csr_matrix) -> float:
    """Median of the counts per cell; at least 1, lest a panel that most cells do not express turns all to zero."""
    return max(float(np.median(np.asarray(counts.sum(1)))), 1.0)


def _stabilised(counts: sparse.csr_matrix, median_depth: float, transform: Transform) -> NDArray[np.float32]:
    """Transformed dense values, (n_obs, n_genes), of cells brought to one depth."""
    dense = counts.toarray()
    scaled = dense * (median_depth / np.maximum(dense.sum(1, keepdims=True), 1))
    values: NDArray[np.float32] = np.log1p(scaled) if transform == "log" else np.sqrt(scaled)
    return values


def _pca(n_components: int, transform: Transform, *, unit_variance: bool) -> Method:
    name = f"PCA-{n_components} {transform}{' unit' if unit_variance else ''}"
    fit = partial(fit_pca, n_components=n_components, transform=transform, unit_variance=unit_variance)
    return Method(name, fit, random=False)


METHODS: Final = (
    Method("HVG", fit_expression, random=False),
    *(
        _pca(n, transform, unit_variance=unit)
        for transform in ("log", "sqrt")
        for unit in (False, True)
        for n in (50, 30)
    ),
    Method("Harmony", fit_harmony, new_cells=False, uses_batch=True),
)
"""The linear methods."""
