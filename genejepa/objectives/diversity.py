"""Diversity: keep the cell vectors of a batch spread over all dimensions.

Without such a term the cheapest way to be predictable is to map all cells to one point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


def random_directions(dim: int, n_slices: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Random unit directions, (dim, n_slices), as a function of (seed, step), the same on every device."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return F.normalize(torch.randn(dim, n_slices, generator=generator), dim=0).to(device)


def diversity_loss(z: Tensor, directions: Tensor) -> Tensor:
    """Distance of a batch from a standard Gaussian: centre, scale, and shape of one-dimensional projections.

    The shape term is the squared 2-Wasserstein distance between sorted projections of the standardised batch and
    the quantiles of N(0, 1), averaged over directions.

    Parameters
    ----------
    z : (batch, dim)
    directions : (dim, n_slices), unit columns
        See :func:`random_directions`.

    References
    ----------
    VISReg, arXiv:2606.02572 (centre, scale and sliced shape); Bonneel et al. 2015,
    doi:10.1007/s10851-014-0506-3 (sliced Wasserstein distance).
    """
    z = z.float()
    n = len(z)
    mean = z.mean(0)
    deviation = (z.var(0) + _EPS).sqrt()
    centre = mean.square().mean()
    scale = F.relu(1 - deviation).mean() + 0.1 * (deviation - 1).square().mean()
    projected = ((z - mean) / deviation @ directions).sort(0).values  # (batch, n_slices)
    quantiles = torch.special.ndtri((torch.arange(n, device=z.device) + 0.5) / n)
    shape = (projected - quantiles[:, None]).square().mean()
    loss: Tensor = 0.1 * centre + scale + shape
    return loss
