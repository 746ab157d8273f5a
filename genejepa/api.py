"""The two calls most users need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from genejepa._constants import OBSM_KEY
from genejepa.model import GeneJEPA

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from anndata import AnnData
    from numpy.typing import NDArray


def fit(
    adata: AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    n_genes: int | None = 2000,
    mask_var: str | NDArray[np.bool_] | None = None,
    gene_symbols: str | None = None,
    key_added: str = OBSM_KEY,
    train_options: dict[str, Any] | None = None,
    seed: int = 0,
    max_epochs: int | None = None,
    progress_bar: bool = True,
    **settings: Any,
) -> GeneJEPA:
    """Train a model on the raw counts of ``adata`` and write the embedding into it.

    Parameters
    ----------
    adata
        Raw counts, (n_obs, n_vars).
    layer, batch_key, labels_key
        As in :meth:`genejepa.GeneJEPA.setup_anndata`; a ``batch_key`` is corrected for. Leave them out for an AnnData
        that is set up already, also for scvi-tools.
    n_genes, mask_var, gene_symbols, **settings
        As in :class:`genejepa.GeneJEPA`.
    key_added
        Where in ``obsm`` the embedding goes.
    train_options
        Further arguments of :meth:`genejepa.GeneJEPA.train`, such as ``{"accelerator": "gpu"}``.
    seed, max_epochs, progress_bar
        As in :meth:`genejepa.GeneJEPA.train`.

    Returns
    -------
    The trained model. Also written: ``adata.obsm["X_genejepa"]``, (n_obs, 64) float32, and
    ``adata.uns["genejepa"]``.

    Examples
    --------
    >>> import genejepa
    >>> adata = genejepa.datasets.pbmc3k()[:300].copy()
    >>> model = genejepa.fit(adata, n_genes=200, max_epochs=1, progress_bar=False)
    >>> adata.obsm["X_genejepa"].shape
    (300, 64)
    """
    if any(key is not None for key in (layer, batch_key, labels_key)):
        GeneJEPA.setup_anndata(adata, layer=layer, batch_key=batch_key, labels_key=labels_key)
    model = GeneJEPA(adata, n_genes=n_genes, mask_var=mask_var, gene_symbols=gene_symbols, **settings)
    model.train(max_epochs=max_epochs, seed=seed, progress_bar=progress_bar, **(train_options or {}))
    model.write_embedding(adata, model.get_latent_representation(), key_added=key_added)
    return model


def embed(
    adata: AnnData,
    model: GeneJEPA | str | Path,
    *,
    layer: str | None = None,
    key_added: str = OBSM_KEY,
    copy: bool = False,
) -> AnnData | None:
    """Embed other cells with a trained model.

    Parameters
    ----------
    adata
        Raw counts. Genes are matched by name; their order does not matter, extra genes are ignored, and missing
        genes count as not measured. Of a model trained with a ``batch_key``, cells whose batch is not known to it
        are embedded without correction, with a warning in the log.
    model
        A model, or the directory of a saved one.
    layer
        Layer with raw counts; None takes what is declared for ``adata``, else what the training used.
    key_added
        Where in ``obsm`` the embedding goes.
    copy
        Return a changed copy instead of writing into ``adata``.

    Returns
    -------
    None, or the copy. Written: ``adata.obsm["X_genejepa"]``, (n_obs, 64) float32, and ``adata.uns["genejepa"]``.
    """
    if not isinstance(model, GeneJEPA):
        model = GeneJEPA.load(model)
    adata = adata.copy() if copy else adata
    model.embed(adata, layer=layer, key_added=key_added)
    return adata if copy else None
