"""Figures of embeddings, of training and of probes."""

from __future__ import annotations

from genejepa.pl._benchmark import benchmark
from genejepa.pl._embedding import embedding
from genejepa.pl._probe import probe
from genejepa.pl._training import training

__all__ = ["benchmark", "embedding", "probe", "training"]
