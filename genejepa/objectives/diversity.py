"""Diversity: keep the cell vectors of a batch spread over all dimensions.

Without such a term the cheapest way to be predictable is to map all cells to one point. Three regularisers are
offered; each is applied to one view of a batch, and each is large on a collapsed batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from genejepa.config import Diversity

_EPS = 1e-6


def diversity_loss(z: Tensor, *, kind: Diversity, directions: Tensor) -> Tensor:
    """Regulariser named ``kind`` on a batch of cell vectors.

    Parameters
    ----------
    z : (batch, dim)
    directions : (dim, n_slices)
        Unit directions of the sliced regularisers; see :func:`random_directions`.
    """
    if kind == "sliced_gaussian":
        return sliced_gaussian_loss(z, directions)
    if kind == "sigreg":
        return sigreg_loss(z, directions)
    return vicreg_loss(z)


def random_directions(dim: int, n_slices: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Random unit directions, (dim, n_slices), as a function of (seed, step), the same on every device."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return F.normalize(torch.randn(dim, n_slices, generator=generator), dim=0).to(device)


def sliced_gaussian_loss(z: Tensor, directions: Tensor) -> Tensor:
    """Distance of a batch from a standard Gaussian: centre, scale, and shape of one-dimensional projections.

    The shape term is the squared 2-Wasserstein distance between sorted projections of the standardised batch and
    the quantiles of N(0, 1), averaged over directions.

    Parameters
    ----------
    z : (batch, dim)
    directions : (dim, n_slices), unit columns

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


def sigreg_loss(z: Tensor, directions: Tensor, *, n_knots: int = 17, t_max: float = 3.0) -> Tensor:
    """Epps-Pulley distance between the characteristic functions of the projections and of N(0, 1).

    The *mean* form: the statistic is not multiplied by the batch size (LeJEPA's N-scaled form is this times N).

    Parameters
    ----------
    z : (batch, dim)
    directions : (dim, n_slices), unit columns
    n_knots, t_max
        Trapezoid rule over t in [0, t_max].

    References
    ----------
    Balestriero & LeCun 2025, LeJEPA, arXiv:2511.08544; Epps & Pulley 1983, doi:10.1093/biomet/70.3.723.
    """
    t = torch.linspace(0, t_max, n_knots, device=z.device)
    projected = (z.float() @ directions)[..., None] * t  # (batch, n_slices, n_knots)
    gauss = torch.exp(-0.5 * t.square())
    distance = (projected.cos().mean(0) - gauss).square() + projected.sin().mean(0).square()
    # The integrand is even in t: twice the half-line.
    return 2 * torch.trapezoid(distance * gauss, t, dim=-1).mean()


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
