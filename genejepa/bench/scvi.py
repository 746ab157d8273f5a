"""scVI, and scVI with a joint-embedding objective on thinned views, as methods of the benchmark."""

from __future__ import annotations

import logging
import os
import random
import warnings
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from genejepa.bench.interface import Method
from genejepa.bench.linear import over_genes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

    from genejepa.bench.interface import Embed, FitOptions

MIN_DEPTH: Final = 10.0
"""Smallest expected number of counts of a thinned view."""

JOINT_WEIGHT: Final = 100.0
"""Weight of :func:`cross_correlation_loss` beside the evidence lower bound, which is in nats per cell."""

OFF_DIAGONAL: Final = 0.01
"""Weight of the correlations that should be 0, relative to those that should be 1."""

_ENVIRONMENT: Final = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "XLA_FLAGS")
"""Variables that scvi-tools sets when it is given a seed."""

_LOGGERS: Final = ("scvi", "lightning.fabric", "lightning.pytorch")


def fit_scvi(
    adata: AnnData, options: FitOptions, *, n_latent: int, thinned: bool = False, max_epochs: int | None = None
) -> Embed:
    """Train scVI with the defaults of scvi-tools (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2).

    Parameters
    ----------
    adata
        Raw counts, (n_obs, n_genes), sparse rows. Not changed.
    n_latent
        Latent dimensions.
    thinned
        Add the joint-embedding objective of Svensson (2026, doi:10.64898/2026.02.11.705441): every cell of a
        minibatch is encoded once more after :func:`thin`, and `JOINT_WEIGHT` times :func:`cross_correlation_loss` of
        the two latent samples is added to the loss. Forms and weights are the published ones.
    max_epochs
        None takes the default of scvi-tools: 400, or fewer for more than 20,000 cells.

    Returns
    -------
    Function that gives posterior means, (n_obs, n_latent). Genes that are missing count as zeros, as in
    ``prepare_query_anndata`` of scvi-tools.
    """
    genes = adata.var_names.copy()
    batch = None if options.batch_key is None else adata.obs[options.batch_key].astype(str).to_numpy()
    with _session(options):
        model_class = _model_class(thinned=thinned)
        fitted = _cells(over_genes(adata, genes), batch)
        model_class.setup_anndata(fitted, batch_key=None if batch is None else "batch")
        model = model_class(fitted, n_latent=n_latent)
        model.train(max_epochs=max_epochs, accelerator="cpu", enable_progress_bar=False, logger=False)

    def embed(other: AnnData) -> NDArray[np.float32]:
        # scvi-tools asks for a batch that it knows, but the encoder of a default scVI does not read it.
        query = _cells(over_genes(other, genes), None if batch is None else batch[0])
        with _session(options):
            return np.asarray(model.get_latent_representation(query), dtype=np.float32)

    return embed


def thin(counts: Tensor) -> Tensor:
    """Keep molecules at random, so that the expected depth of a cell is log-uniform between `MIN_DEPTH` and its own.

    Parameters
    ----------
    counts : (n, n_genes)
        Counts of cells. A cell with at most `MIN_DEPTH` counts stays as it is.

    Returns
    -------
    (n, n_genes), drawn with torch's global generator.
    """
    depth = counts.sum(1, keepdim=True).clamp(min=MIN_DEPTH)
    share = (MIN_DEPTH / depth) ** torch.rand_like(depth)  # (n, 1)
    return torch.binomial(counts, share.expand_as(counts).contiguous())


def cross_correlation_loss(first: Tensor, second: Tensor) -> Tensor:
    """Distance of the correlations between the dimensions of two views from the identity (Zbontar et al. 2021).

    ``sum_i (1 - C_ii)^2 + OFF_DIAGONAL sum_(i != j) C_ij^2``, where ``C_ij`` correlates dimension i of the first view
    and j of the second over cells (Barlow Twins, arXiv:2103.03230). Sums over dimensions, not means.

    Parameters
    ----------
    first, second : (n, dim)
        Two views of the same cells, at least two.
    """
    first, second = ((z - z.mean(0)) / (z.std(0, correction=0) + 1e-8) for z in (first, second))
    correlation = first.T @ second / len(first)  # (dim, dim)
    same = correlation.diagonal()
    different = correlation.square().sum() - same.square().sum()
    return (1 - same).square().sum() + OFF_DIAGONAL * different


def _cells(counts: sparse.csr_matrix, batch: NDArray[np.str_] | str | None) -> AnnData:
    """A new AnnData, since scvi-tools writes into the one that it is given."""
    import anndata
    import pandas as pd

    obs = pd.DataFrame(index=pd.RangeIndex(counts.shape[0]).astype(str))
    if batch is not None:
        obs["batch"] = batch
    return anndata.AnnData(counts, obs=obs)


def _model_class(*, thinned: bool) -> Any:
    """A new subclass of ``SCVI``: scvi-tools keeps all cells that a class has seen as long as the class lives."""
    from scvi import REGISTRY_KEYS
    from scvi.model import SCVI
    from scvi.module import VAE

    class ThinnedVAE(VAE):  # type: ignore[misc]  # scvi-tools has no types
        def loss(self, tensors: Any, inference_outputs: Any, generative_outputs: Any, kl_weight: Any = 1.0) -> Any:
            out = super().loss(tensors, inference_outputs, generative_outputs, kl_weight)
            if self.training:  # validation reports the bound alone
                view = {**tensors, REGISTRY_KEYS.X_KEY: thin(tensors[REGISTRY_KEYS.X_KEY])}
                shallow = self.inference(**self._get_inference_input(view))
                out.loss = out.loss + JOINT_WEIGHT * cross_correlation_loss(inference_outputs["z"], shallow["z"])
            return out

    class Model(SCVI):  # type: ignore[misc]
        _module_cls = ThinnedVAE if thinned else VAE

    return Model


@contextmanager
def _session(options: FitOptions) -> Iterator[None]:
    """Seed and silence scvi-tools within the block, and leave no trace of it in the process."""
    import scvi

    loggers = {logging.getLogger(name): logging.ERROR for name in _LOGGERS}
    levels = {logger: logger.level for logger in loggers}
    environment = {name: os.environ.get(name) for name in _ENVIRONMENT}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # kept to be restored
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    seed, threads = scvi.settings.seed, torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Advice about the number of workers, and about a minibatch size that scvi-tools itself has chosen.
        warnings.simplefilter("ignore")
        try:
            for logger, level in loggers.items():
                logger.setLevel(level)
            torch.set_num_threads(options.threads)
            scvi.settings.seed = options.seed
            yield
        finally:
            scvi.settings.seed = seed
            torch.set_num_threads(threads)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for name, value in environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            for logger, level in levels.items():
                logger.setLevel(level)


METHODS: Final = (
    Method("scVI-10", partial(fit_scvi, n_latent=10), uses_batch=True),
    Method("scVI-50", partial(fit_scvi, n_latent=50), uses_batch=True),
    Method("scVI-10 thinned", partial(fit_scvi, n_latent=10, thinned=True), uses_batch=True),
)
"""All variants of scVI."""
