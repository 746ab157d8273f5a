"""Prediction in latent space, and invariance across views and depths."""

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


def depth_loss(whole: Tensor, target: Tensor, thinned: Tensor) -> Tensor:
    """Mean squared distance of the vectors of thinned cells to those of the same cells with all their molecules.

    Parameters
    ----------
    whole, target : (batch, dim)
        Vector of the cell as the context encoder saw it, and by the target encoder from all molecules.
    thinned : (batch,), bool
        Cells that have lost molecules; the others do not count.

    Returns
    -------
    Scalar; 0 if no cell is thinned.
    """
    distance = (whole - target).square().mean(-1)
    return (distance * thinned).sum() / thinned.sum().clamp_min(1)
