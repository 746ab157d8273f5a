"""Measures of how much biology an embedding holds."""

from __future__ import annotations

from genejepa.evaluate.probes import (
    Draw,
    few_shot_probe,
    knn_probe,
    linear_probe,
    predict_few_shot,
    predict_knn,
    predict_linear,
)

__all__ = [
    "Draw",
    "few_shot_probe",
    "knn_probe",
    "linear_probe",
    "predict_few_shot",
    "predict_knn",
    "predict_linear",
]
