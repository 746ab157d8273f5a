"""Information: the likelihood of a cell's counts given its vector, in nats.

A squared error on standardised values counts sampling noise as information; a count likelihood weighs itself by
depth, because shallow cells have few nats to give.
"""

from __future__ import annotations

import torch
from torch import Tensor


def information_loss(logits: Tensor, counts: Tensor, log_frequency: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean negative multinomial log-likelihood relative to "every cell is the average cell", in nats per cell.

    Parameters
    ----------
    logits : (batch, n_genes)
        Log fold change of each gene's expression over its mean frequency, from the cell vector.
    counts : (batch, n_genes)
        Raw counts.
    log_frequency : (n_genes,) or (batch, n_genes)
        Log of the mean share of each gene in the counts, of the whole data or of the cell's batch; sums to 1 before
        the log.
    weight : (batch,)
        Factor of each cell's nats; None: 1.

    Returns
    -------
    Scalar: 0 for a vector that says nothing, negative for one that informs about the counts.
    """
    logits = logits.float()
    # log p - log p0 = sum counts * logits - total * log sum_g frequency * exp(logits)
    normaliser = torch.logsumexp(logits + log_frequency, 1) - torch.logsumexp(log_frequency, -1)
    nats = counts.sum(1) * normaliser - (counts * logits).sum(1)
    return (nats if weight is None else weight * nats).mean()
