"""Measures of how much biology an embedding holds."""

from __future__ import annotations

from genejepa.evaluate.predict import Draw, predict_few_shot, predict_knn, predict_linear
from genejepa.evaluate.probes import few_shot_probe, knn_probe, linear_probe

__all__ = [
    "Draw",
    "few_shot_probe",
    "knn_probe",
    "linear_probe",
    "predict_few_shot",
    "predict_knn",
    "predict_linear",
]
