"""The two calls most users need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from genejepa._constants import OBSM_KEY
from genejepa.data.inputs import as_anndata
from genejepa.data.setup import Registration, require_writable
from genejepa.model import GeneJEPA
from genejepa.query import require_key

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.data.matching import GeneMapping


def fit(
    adata: AnnData,
    *,
    layer: str | None = None,
    use_raw: bool = False,
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
    layer, use_raw, batch_key, labels_key
        As in :meth:`genejepa.GeneJEPA.setup_anndata`, but for this training only; a ``batch_key`` is corrected for.
        Leave all of them out for an AnnData that is set up already, also for scvi-tools.
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
    require_writable(adata)
    require_key(key_added)
    given = Registration(layer, batch_key, labels_key, use_raw=use_raw)
    model = GeneJEPA(
        adata,
        n_genes=n_genes,
        mask_var=mask_var,
        gene_symbols=gene_symbols,
        registration=None if given == Registration() else given,
        **settings,
    )
    model.train(max_epochs=max_epochs, seed=seed, progress_bar=progress_bar, **(train_options or {}))
    model.write_embedding(adata, key_added=key_added)
    return model


def embed(
    adata: AnnData | str | Path,
    model: GeneJEPA | str | Path,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    key_added: str = OBSM_KEY,
    gene_mapping: GeneMapping = "names",
    duplicates: Literal["error", "sum"] = "error",
    min_overlap: float = 0.5,
    copy: bool = False,
) -> AnnData | None:
    """Embed other cells with a trained model.

    Parameters
    ----------
    adata
        Raw counts. Genes are matched by name; their order does not matter, extra genes are ignored, and missing
        genes count as not measured. Of a model trained with a ``batch_key``, cells whose batch is not known to it
        are embedded without correction, with a warning.
    model
        A model, or the directory of a saved one.
    layer, use_raw, gene_mapping, duplicates, min_overlap
        As in :meth:`genejepa.GeneJEPA.get_latent_representation`.
    key_added
        Where in ``obsm`` the embedding goes.
    copy
        Return a changed copy, in memory, instead of writing into ``adata``, which may then be a path.

    Returns
    -------
    None, or the copy. Written: ``adata.obsm["X_genejepa"]``, (n_obs, 64) float32, ``adata.uns["genejepa"]``, and if
    some cells have no counts over the genes of the model, ``adata.obs["genejepa_empty"]``, named after ``key_added``.
    """
    if not isinstance(model, GeneJEPA):
        model = GeneJEPA.load(model)
    cells = _copied(as_anndata(adata)) if copy else adata
    model.embed(
        cells,
        layer=layer,
        use_raw=use_raw,
        key_added=key_added,
        gene_mapping=gene_mapping,
        duplicates=duplicates,
        min_overlap=min_overlap,
    )
    return cells if copy else None


def _copied(adata: AnnData) -> AnnData:
    return adata.to_memory() if adata.isbacked else adata.copy()
