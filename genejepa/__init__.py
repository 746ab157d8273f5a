"""genejepa: a joint-embedding predictive model of the transcriptome for AnnData.

Names are imported on first use, so that ``import genejepa`` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from genejepa._version import __version__

if TYPE_CHECKING:
    from genejepa import bench, config, datasets, errors, evaluate, pl, simulation
    from genejepa.api import embed, fit
    from genejepa.bench.api import benchmark
    from genejepa.model import GeneJEPA
    from genejepa.world.model import WorldModel

__all__ = [
    "GeneJEPA",
    "WorldModel",
    "__version__",
    "bench",
    "benchmark",
    "check",
    "config",
    "datasets",
    "embed",
    "errors",
    "evaluate",
    "fit",
    "pl",
    "simulation",
]

_HOME = {
    "GeneJEPA": "genejepa.model",
    "WorldModel": "genejepa.world.model",
    "benchmark": "genejepa.bench.api",
    "check": "genejepa.checks",
    "embed": "genejepa.api",
    "fit": "genejepa.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in __all__:
        return importlib.import_module(f"genejepa.{name}")
    raise AttributeError(f"module 'genejepa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
