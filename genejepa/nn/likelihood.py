"""Read-out of a cell vector as log fold changes of gene expression."""

from __future__ import annotations

from torch import Tensor, nn


class CountReadout(nn.Module):
    """Linear map from the cell vector to log fold changes over the mean frequency of each gene.

    Parameters
    ----------
    embedding_dim
        Length of the cell vector.
    log_frequency : (n_batches + 1, n_genes)
        Log of the mean share of each gene in the training counts of every batch, and of all cells in the last row.
        What differs between batches is thus known, and the cell vector need not say it.
    """

    log_frequency: Tensor

    def __init__(self, embedding_dim: int, log_frequency: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, log_frequency.shape[1])
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("log_frequency", log_frequency)

    def forward(self, z: Tensor) -> Tensor:
        """Log fold changes, (batch, n_genes), of cell vectors (batch, embedding_dim)."""
        logits: Tensor = self.linear(z)
        return logits

    def expected(self, batch: Tensor) -> Tensor:
        """Log frequencies, (n, n_genes) or (1, n_genes), of cells of the given batches, (n,); -1: unknown."""
        frequency: Tensor = self.log_frequency
        return frequency if len(frequency) == 1 else frequency[batch]
