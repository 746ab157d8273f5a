"""Alignment: cells of every batch spread alike in the space of cell vectors."""

from __future__ import annotations

import torch
from torch import Tensor

_N_QUANTILES = 32
_MIN_CELLS = 5
"""Cells of a batch below which its quantiles are noise, and it is left out of the step."""


def alignment_loss(z: Tensor, batch: Tensor, directions: Tensor) -> Tensor:
    """Sliced Wasserstein distance of the vectors of each batch from those of all cells.

    Along each direction the quantiles of a batch are compared with those of all cells. This assumes that the batches
    hold the same kinds of cell in about the same shares: a batch of one cell type would lose what sets it apart.

    Parameters
    ----------
    z : (n, dim)
    batch : (n,), integer
        Batch of each cell. The unknown batch, -1, is among all cells, but is not compared with them.
    directions : (dim, n_slices), unit columns

    Returns
    -------
    Scalar: mean squared distance over quantiles and directions, averaged over the batches with at least five cells; 0
    if there are fewer than two of them.

    References
    ----------
    Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3 (sliced Wasserstein distance).
    """
    present = [code for code in range(int(batch.max()) + 1) if int((batch == code).sum()) >= _MIN_CELLS]
    if len(present) < 2:
        return z.new_zeros(())
    levels = (torch.arange(_N_QUANTILES, device=z.device) + 0.5) / _N_QUANTILES
    projected = (z.float() @ directions).float()  # (n, n_slices); quantiles need 32 bits, the product may have 16
    pooled = torch.quantile(projected, levels, dim=0)
    apart = [torch.quantile(projected[batch == code], levels, dim=0) - pooled for code in present]
    return torch.stack([difference.square().mean() for difference in apart]).mean()
