"""Measures of collapse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the singular values of the centred batch: how many dimensions are in use.

    Parameters
    ----------
    z : (batch, dim)

    Returns
    -------
    From 1 (all cells on a line, or one point) to ``min(batch - 1, dim)``.

    References
    ----------
    Roy & Vetterli 2007 (effective rank); Garrido et al. 2023, RankMe, arXiv:2210.02885, eq. 1.
    """
    singular = torch.linalg.svdvals((z - z.mean(0)).double())
    total = singular.sum()
    if total <= 1e-12 * max(1.0, float(z.double().norm())):
        return 1.0
    share = singular / total
    return float(torch.exp(-(share * torch.log(share.clamp_min(1e-300))).sum()))


@torch.no_grad()
def mean_pairwise_cosine(z: Tensor) -> float:
    """Mean cosine between different cells: 1 when all point one way, about 0 when spread around the origin.

    Parameters
    ----------
    z : (batch, dim), batch >= 2
    """
    n = len(z)
    unit = F.normalize(z.double(), dim=1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))
