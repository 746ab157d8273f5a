"""Two-view baselines of scSSL-Bench: a perceptron that gives two randomly masked views of a cell similar vectors.

Network, optimiser and weights are those of the benchmark: Ovcharenko et al. 2025, ICML, arXiv:2506.10031. It found
SimCLR and VICReg to be the best generic methods for cell types, and random masking the best augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genejepa.bench.interface import Embed, FitOptions, Method
from genejepa.bench.linear import Normaliser
from genejepa.train.devices import cpu_threads

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""Of the projected vectors, (batch, dim), of two views; row ``i`` of both belongs to cell ``i``."""

HIDDEN_DIM: Final = 128
EMBEDDING_DIM: Final = 64
EPOCHS: Final = 200
BATCH_SIZE: Final = 256
LEARNING_RATE: Final = 1e-4
WEIGHT_DECAY: Final = 1e-6
MASKED_SHARE: Final = 0.5
"""Of the genes of a view. Their preset is 0.2; probes of three data sets were better or equal at 0.5, except for SimCLR
on one of them."""
TEMPERATURE: Final = 0.5


def log_values(cells: AnnData, normaliser: Normaliser) -> Tensor:
    """log1p of counts at the median depth of the fit, (n_obs, n_genes), not centred; missing genes are 0."""
    values = normaliser(cells) + normaliser.mean
    return torch.from_numpy(np.where(normaliser.measured(cells), values, np.float32(0)))


def nt_xent_loss(first: Tensor, second: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """Cross-entropy of finding a view's partner among all other views of the batch, of either kind.

    References
    ----------
    Chen et al. 2020, SimCLR, arXiv:2002.05709, eq. 1.
    """
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(first)))


def vicreg_loss(z: Tensor, *, covariance_weight: float = 0.04) -> Tensor:
    """Variance hinge and off-diagonal covariance of a batch.

    Parameters
    ----------
    z : (batch, dim)
    covariance_weight
        1/25, the published ratio of the covariance to the variance weight.

    References
    ----------
    Bardes, Ponce & LeCun 2022, VICReg, arXiv:2105.04906, eqs. 1-4.
    """
    z = z.float()
    variance = F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return variance + covariance_weight * off_diagonal / z.shape[1]


def vicreg_pair_loss(first: Tensor, second: Tensor) -> Tensor:
    """Distance of the views, and variance and covariance of each, weighed 5, 5 and 1.

    References
    ----------
    Bardes, Ponce & LeCun 2022, VICReg, arXiv:2105.04906, eq. 6.
    """
    spread = vicreg_loss(first, covariance_weight=1 / 5) + vicreg_loss(second, covariance_weight=1 / 5)
    return 5 * F.mse_loss(first, second) + 5 * spread


def train_encoder(values: Tensor, loss: PairLoss, *, projected_dim: int, seed: int) -> nn.Module:
    """Train the perceptron on masked views; in evaluation mode it maps values to (batch, EMBEDDING_DIM).

    Parameters
    ----------
    values : (n_obs, n_genes)
    projected_dim
        Length of the vectors that the loss sees; the embedding is what is projected.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(
            *_layer(values.shape[1], HIDDEN_DIM), nn.Linear(HIDDEN_DIM, EMBEDDING_DIM), nn.BatchNorm1d(EMBEDDING_DIM)
        )
        projector = nn.Sequential(*_layer(EMBEDDING_DIM, EMBEDDING_DIM), nn.Linear(EMBEDDING_DIM, projected_dim))
    network = nn.Sequential(encoder, projector)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    n_batches = math.ceil(len(values) / BATCH_SIZE)
    for _ in range(EPOCHS):
        # Batches of nearly equal size: a small last one would have few negatives and a poor covariance.
        for index in torch.randperm(len(values), generator=generator).tensor_split(n_batches):
            cells = values[index]
            optimizer.zero_grad()
            loss(network(masked(cells, generator)), network(masked(cells, generator))).backward()
            optimizer.step()
    return encoder.eval()


def masked(values: Tensor, generator: torch.Generator) -> Tensor:
    """Values of which each is set to 0 with probability `MASKED_SHARE`."""
    return values * torch.empty_like(values).bernoulli_(1 - MASKED_SHARE, generator=generator)


def _layer(n_in: int, n_out: int) -> tuple[nn.Module, ...]:
    return nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU()


def _two_view_method(name: str, loss: PairLoss, *, projected_dim: int) -> Method:
    def fit(cells: AnnData, options: FitOptions) -> Embed:
        normaliser = Normaliser.fit(cells, transform="log", unit_variance=False)
        values = log_values(cells, normaliser)
        with cpu_threads(options.threads):
            encoder = train_encoder(values, loss, projected_dim=projected_dim, seed=options.seed)

        def embed(query: AnnData) -> NDArray[np.float32]:
            with cpu_threads(options.threads), torch.no_grad():
                vectors: NDArray[np.float32] = encoder(log_values(query, normaliser)).numpy()
            return vectors

        return embed

    return Method(name, fit)


METHODS: tuple[Method, ...] = (
    _two_view_method("SimCLR", nt_xent_loss, projected_dim=EMBEDDING_DIM),
    _two_view_method("VICReg", vicreg_pair_loss, projected_dim=4 * EMBEDDING_DIM),
)
