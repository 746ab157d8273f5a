"""Figures of embeddings, of training, of probes and of energies."""

from __future__ import annotations

from genejepa.pl._benchmark import benchmark
from genejepa.pl._embedding import embedding
from genejepa.pl._energy import energy
from genejepa.pl._probe import probe
from genejepa.pl._training import training

__all__ = ["benchmark", "embedding", "energy", "probe", "training"]
