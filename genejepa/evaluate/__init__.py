"""Measures of how much biology an embedding holds, and of how good a predicted population is."""

from __future__ import annotations

from genejepa.evaluate._transition import transition
from genejepa.evaluate.distances import energy_distance, mmd, wasserstein
from genejepa.evaluate.predict import Draw, predict_few_shot, predict_knn, predict_linear
from genejepa.evaluate.probes import few_shot_probe, knn_probe, linear_probe

__all__ = [
    "Draw",
    "energy_distance",
    "few_shot_probe",
    "knn_probe",
    "linear_probe",
    "mmd",
    "predict_few_shot",
    "predict_knn",
    "predict_linear",
    "transition",
    "wasserstein",
]
