"""Contrastive objective: the two views of a cell find each other among the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(first: Tensor, second: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Symmetric cross-entropy of matching two views of each cell by cosine similarity.

    Parameters
    ----------
    first, second : (batch, dim)
        Row ``i`` of both belongs to cell ``i``; all other rows are negatives.
    temperature
        Divides the cosine.

    References
    ----------
    Chen et al. 2020, SimCLR, arXiv:2002.05709, eq. 1, in the two-sided form of Radford et al. 2021, CLIP,
    arXiv:2103.00020.
    """
    similarity = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    cell = torch.arange(len(first), device=first.device)
    return 0.5 * (F.cross_entropy(similarity, cell) + F.cross_entropy(similarity.T, cell))
