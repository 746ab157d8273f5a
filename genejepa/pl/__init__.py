"""Figures of embeddings, of training, of probes, of energies, of transitions and of plans."""

from __future__ import annotations

from genejepa.pl._benchmark import benchmark
from genejepa.pl._embedding import embedding
from genejepa.pl._energy import energy
from genejepa.pl._plan import plan
from genejepa.pl._probe import probe
from genejepa.pl._training import training
from genejepa.pl._transition import transition

__all__ = ["benchmark", "embedding", "energy", "plan", "probe", "training", "transition"]
