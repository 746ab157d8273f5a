"""Training objectives: pure functions of tensors, each explained in ``docs/objectives.md``."""

from __future__ import annotations

from genejepa.objectives.alignment import alignment_loss
from genejepa.objectives.diagnostics import effective_rank, mean_pairwise_cosine
from genejepa.objectives.diversity import diversity_loss
from genejepa.objectives.information import information_loss
from genejepa.objectives.prediction import depth_loss, invariance_loss, prediction_loss

__all__ = [
    "alignment_loss",
    "depth_loss",
    "diversity_loss",
    "effective_rank",
    "information_loss",
    "invariance_loss",
    "mean_pairwise_cosine",
    "prediction_loss",
]
