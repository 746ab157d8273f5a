"""Prediction in latent space, and invariance across views."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def prediction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance between predicted and target vectors.

    Parameters
    ----------
    predicted, target : (..., dim)
        The target comes from the target encoder and carries no gradient.

    Returns
    -------
    Scalar; mean over all entries.

    References
    ----------
    Assran et al. 2023, I-JEPA, arXiv:2301.08243, eq. 1.
    """
    return F.mse_loss(predicted, target)


def invariance_loss(views: Tensor) -> Tensor:
    """Mean squared distance of the views of a cell to their mean.

    Parameters
    ----------
    views : (n_views, batch, dim)

    References
    ----------
    Balestriero & LeCun 2025, LeJEPA, arXiv:2511.08544 (distance of all views to their centre).
    """
    return (views - views.mean(0)).square().mean()
