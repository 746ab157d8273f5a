"""Read-out of a cell vector as log fold changes of gene expression."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CountReadout(nn.Module):
    """Linear map from the cell vector to log fold changes over the mean frequency of each gene.

    Parameters
    ----------
    embedding_dim
        Length of the cell vector.
    log_frequency : (n_genes,)
        Log of the mean share of each gene in the training counts.
    """

    log_frequency: Tensor

    def __init__(self, embedding_dim: int, log_frequency: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, len(log_frequency))
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.log_dispersion = nn.Parameter(torch.zeros(len(log_frequency)))
        self.register_buffer("log_frequency", log_frequency)

    def forward(self, z: Tensor) -> Tensor:
        """Log fold changes, (batch, n_genes), of cell vectors (batch, embedding_dim)."""
        logits: Tensor = self.linear(z)
        return logits
