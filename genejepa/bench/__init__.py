"""Compare embeddings of single cells: methods, tasks and statistics.

Names are imported on first use: the methods import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genejepa.bench import statistics
    from genejepa.bench.api import benchmark
    from genejepa.bench.interface import Embed, FitOptions, Method
    from genejepa.bench.methods import DEFAULT_METHODS, METHODS
    from genejepa.bench.run import Run, fit_and_embed, hold_out, panel_of
    from genejepa.bench.tasks import TASKS, score

__all__ = [
    "DEFAULT_METHODS",
    "METHODS",
    "TASKS",
    "Embed",
    "FitOptions",
    "Method",
    "Run",
    "benchmark",
    "fit_and_embed",
    "hold_out",
    "panel_of",
    "score",
    "statistics",
]

_NAMES = {
    "api": ("benchmark",),
    "interface": ("Embed", "FitOptions", "Method"),
    "methods": ("DEFAULT_METHODS", "METHODS"),
    "run": ("Run", "fit_and_embed", "hold_out", "panel_of"),
    "tasks": ("TASKS", "score"),
}
_HOME = {name: f"genejepa.bench.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "statistics":
        return importlib.import_module("genejepa.bench.statistics")
    raise AttributeError(f"module 'genejepa.bench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
