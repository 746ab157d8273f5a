"""The target encoder's weights: an exponential moving average of the context encoder's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


@torch.no_grad()
def update_average(target: nn.Module, source: nn.Module, decay: float) -> None:
    """Set every target weight to ``decay * target + (1 - decay) * source``, in place.

    Call once per optimiser step, after it.
    """
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1.0 - decay)


def ema_decay(step: int, total_steps: int) -> float:
    """Decay at ``step`` of ``total_steps``: a cosine from ``1 - 10 / total_steps`` to 1.

    The memory of the average is thus a tenth of the training, however short that is: a fixed decay of 0.996 would
    keep a third of the untrained weights after 300 steps (0.996^300 = 0.30). The rise to 1 follows BYOL (Grill et
    al. 2020, arXiv:2006.07733, sec. 3.3).
    """
    start = max(0.0, 1.0 - 10.0 / max(total_steps, 1))
    progress = min(step / max(total_steps, 1), 1.0)
    return 1.0 - (1.0 - start) * 0.5 * (1.0 + math.cos(math.pi * progress))
