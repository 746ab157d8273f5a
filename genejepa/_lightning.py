"""The one place that imports Lightning.

scvi-tools brings a second distribution, ``lightning``, whose ``LightningModule`` and ``Trainer`` are other
classes than those of ``pytorch_lightning``; mixing the two fails inside the trainer. Everything else in
genejepa imports Lightning's names from here.
"""

from __future__ import annotations

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_module

__all__ = [
    "Callback",
    "LightningModule",
    "Logger",
    "SIGTERMException",
    "TQDMProgressBar",
    "Trainer",
    "rank_zero_module",
]
