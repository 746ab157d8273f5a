"""Worse views of the same cells: fewer molecules, or fewer genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from anndata import AnnData

FULL: Final = "full"
DEPTHS: Final = (0.5, 0.25, 0.1)
"""Shares of the molecules that are kept."""
GENE_SHARES: Final = (0.5, 0.2)
"""Shares of the panel that is measured."""


def stress_views(adata: AnnData, *, seed: int = 0) -> dict[str, AnnData]:
    """The cells thinned to `DEPTHS` (``depth 0.5`` ...), and over `GENE_SHARES` of the genes (``genes 0.5`` ...).

    Every method gets the same views: they depend on ``seed`` and the counts only.
    """
    views = {f"depth {share:g}": thinned(adata, share, seed=seed) for share in DEPTHS}
    return views | {f"genes {share:g}": with_share_of_genes(adata, share, seed=seed) for share in GENE_SHARES}


def thinned(adata: AnnData, share: float, *, seed: int = 0) -> AnnData:
    """Copy in which every molecule of ``X`` is kept with probability ``share``: a cell sequenced less deeply."""
    rng = np.random.default_rng([seed, 11, round(1000 * share)])
    counts = sparse.csr_matrix(adata.X, copy=True)
    counts.sort_indices()
    counts.data = rng.binomial(counts.data.astype(np.int64), share).astype(np.float32)
    counts.eliminate_zeros()
    out = adata.copy()
    out.X = counts
    return out


def with_share_of_genes(adata: AnnData, share: float, *, seed: int = 0) -> AnnData:
    """Copy with a random share of the genes, in their order: a smaller panel was measured."""
    rng = np.random.default_rng([seed, 12, round(1000 * share)])
    genes = np.sort(rng.permutation(adata.n_vars)[: max(1, round(share * adata.n_vars))])
    return adata[:, genes].copy()
