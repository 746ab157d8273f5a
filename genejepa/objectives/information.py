"""Information: the likelihood of a cell's counts given its vector, in nats.

A squared error on standardised values counts sampling noise as information; a count likelihood weighs itself by
depth, because shallow cells have few nats to give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from genejepa.config import Likelihood


def information_loss(
    logits: Tensor,
    counts: Tensor,
    log_frequency: Tensor,
    *,
    likelihood: Likelihood = "multinomial",
    log_dispersion: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood of cells relative to "every cell is the average cell", in nats per cell.

    Parameters
    ----------
    logits : (batch, n_genes)
        Log fold change of each gene's expression over its mean frequency, from the cell vector.
    counts : (batch, n_genes)
        Raw counts.
    log_frequency : (n_genes,) or (batch, n_genes)
        Log of the mean share of each gene in the counts, of the whole data or of the cell's batch; sums to 1 before
        the log.
    likelihood
        ``multinomial``: counts given their total. ``poisson``: rates ``total * exp(log_frequency + logits)``.
        ``negative_binomial``: mean ``total * softmax``, dispersion per gene (Lopez et al. 2018, scVI,
        doi:10.1038/s41592-018-0229-2).
    log_dispersion : (n_genes,)
        Log inverse dispersion, for the negative binomial.
    weight : (batch,)
        Factor of each cell's nats; None: 1.

    Returns
    -------
    Scalar: 0 for a vector that says nothing, negative for one that informs about the counts.
    """
    logits = logits.float()
    total = counts.sum(1, keepdim=True)
    if likelihood == "multinomial":
        # log p - log p0 = sum counts * logits - total * log sum_g frequency * exp(logits)
        normaliser = torch.logsumexp(logits + log_frequency, 1) - torch.logsumexp(log_frequency, -1)
        nats = total[:, 0] * normaliser - (counts * logits).sum(1)
        return _weighted_mean(nats, weight)
    if likelihood == "poisson":
        mean0 = total * log_frequency.exp()
        excess = mean0 * torch.expm1(logits.clamp(max=20.0)) - counts * logits
        return _weighted_mean(excess.sum(1), weight)
    if log_dispersion is None:
        raise ValueError("negative_binomial needs log_dispersion")
    mean = total * F.softmax(logits + log_frequency, dim=1)
    mean0 = total * log_frequency.exp()
    theta = log_dispersion.exp()
    gain = _nb_log_prob(counts, mean, theta) - _nb_log_prob(counts, mean0, theta.detach())
    return _weighted_mean(-gain.sum(1), weight)


def _weighted_mean(nats: Tensor, weight: Tensor | None) -> Tensor:
    return (nats if weight is None else weight * nats).mean()


def _nb_log_prob(counts: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """Log-probability of a negative binomial with inverse dispersion ``theta``."""
    eps = 1e-8
    log_sum = torch.log(theta + mean + eps)
    return (
        theta * (torch.log(theta + eps) - log_sum)
        + counts * (torch.log(mean + eps) - log_sum)
        + torch.lgamma(counts + theta)
        - torch.lgamma(theta)
        - torch.lgamma(counts + 1)
    )
