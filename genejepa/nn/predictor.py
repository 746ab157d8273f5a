"""Predictor: from the vector of a view, the vector of a set of genes it cannot see."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GeneSetPredictor(nn.Module):
    """Predict the latent of a *named* gene set, or of the whole cell.

    The query of a set is the sum of learned identity vectors of its genes, divided by the square root of their
    number so that large and small sets have queries of one size. It carries no expression values. The whole cell
    has a query vector of its own. Conditioning on what is asked for is what separates a joint-embedding
    predictive architecture from the alignment of two views (LeCun 2022; Assran et al. 2023, arXiv:2301.08243).
    """

    def __init__(self, n_genes: int, *, dim: int, hidden: int) -> None:
        super().__init__()
        self.gene_queries = nn.Parameter(0.3 * torch.randn(n_genes, dim))
        self.whole_cell_query = nn.Parameter(0.3 * torch.randn(dim))
        self.net = nn.Sequential(nn.Linear(2 * dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, dim))

    def set_queries(self, blocks: Tensor, membership: Tensor) -> Tensor:
        """Queries, (..., dim), of unions of gene blocks.

        Parameters
        ----------
        blocks : (n_blocks, block_size), int64
            Gene positions; ``n_genes`` marks an empty place.
        membership : (..., n_blocks)
            1 where the set contains the block.
        """
        n_genes = len(self.gene_queries)
        block_sums = nn.functional.pad(self.gene_queries, (0, 0, 0, 1))[blocks].sum(1)  # (n_blocks, dim)
        n_in_block = (blocks < n_genes).sum(1).to(membership.dtype)
        n_in_set = (membership @ n_in_block).clamp_min(1.0)
        queries: Tensor = (membership @ block_sums) / n_in_set.sqrt()[..., None]
        return queries

    def forward(self, context: Tensor, query: Tensor | None = None) -> Tensor:
        """Predicted vectors, (..., dim).

        Parameters
        ----------
        context : (..., dim)
            Cell vector of the visible genes.
        query : (..., dim)
            From :meth:`set_queries`; None asks for the whole cell.
        """
        query = self.whole_cell_query if query is None else query
        context, query = torch.broadcast_tensors(context, query)
        predicted: Tensor = self.net(torch.cat([context, query], -1))
        return predicted.float()
