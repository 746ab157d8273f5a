"""Watching a training: history, collapse, and Ctrl-C."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, cast

from genejepa._lightning import Callback
from genejepa.errors import CollapseWarning
from genejepa.objectives import effective_rank, mean_pairwise_cosine

if TYPE_CHECKING:
    from torch import Tensor

    from genejepa._lightning import LightningModule, Trainer
    from genejepa.data.loader import StepDataset
    from genejepa.train.module import JEPAModule

logger = logging.getLogger(__name__)


class HistoryRecorder(Callback):
    """Keep the objectives, the learning rate and the collapse measures of every ``every`` steps.

    Attributes
    ----------
    rows
        One dictionary per recorded step.
    """

    def __init__(self, *, every: int, monitor: CollapseMonitor) -> None:
        self.every = max(1, every)
        self.monitor = monitor
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, _outputs: object, _batch: object, _batch_idx: int
    ) -> None:
        """Record the step, and let the monitor judge its vectors."""
        module = cast("JEPAModule", pl_module)
        step = trainer.global_step
        last = step >= module.total_steps
        if (step % self.every and not last) or (self.rows and self.rows[-1]["step"] == step):
            return
        row = {"step": float(step), "epoch": float(trainer.current_epoch)}
        row |= {name: float(value) for name, value in module.last_terms.items()}
        row["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        if module.last_vectors is not None:
            row |= self.monitor.judge(module.last_vectors.float().cpu(), step, module.total_steps)
        self.rows.append(row)

    def on_validation_end(self, trainer: Trainer, _pl_module: LightningModule) -> None:
        """Add the held-out loss to the latest row."""
        value = trainer.callback_metrics.get("validation_loss")
        if value is not None and self.rows:
            self.rows[-1]["validation_loss"] = float(value)


class RankShare(Callback):
    """Give every process of a distributed training its own cells; ranks are known only once it has started."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def setup(self, trainer: Trainer, _pl_module: LightningModule, stage: str) -> None:
        """Tell the data set which process this is."""
        self.dataset.rank, self.dataset.world_size = trainer.global_rank, trainer.world_size


class CollapseMonitor:
    """Warn in words when cell vectors lose their dimensions or all point one way.

    Parameters
    ----------
    min_rank_share
        Smallest acceptable effective rank as a share of the largest possible one; never below a rank of 1.5.
    max_cosine
        Largest acceptable mean cosine between cells.
    """

    def __init__(self, *, min_rank_share: float = 0.05, max_cosine: float = 0.9) -> None:
        self.min_rank_share = min_rank_share
        self.max_cosine = max_cosine
        self._warned = False

    def judge(self, vectors: Tensor, step: int, total_steps: int) -> dict[str, float]:
        """Measure a batch of vectors, (batch, dim), and warn once, after the first quarter of training."""
        measures = {"effective_rank": effective_rank(vectors), "mean_cosine": mean_pairwise_cosine(vectors)}
        complaint = self.complaint(measures, largest_rank=min(len(vectors) - 1, vectors.shape[1]))
        if complaint and not self._warned and step >= total_steps / 4:
            self._warned = True
            message = f"{complaint} (step {step} of {total_steps}).\nFix: raise `diversity` or `information`."
            logger.warning(message)
            warnings.warn(message, CollapseWarning, stacklevel=2)
        return measures

    def complaint(self, measures: dict[str, float], *, largest_rank: int) -> str | None:
        """What is wrong, in words, or None."""
        rank, cosine = measures["effective_rank"], measures["mean_cosine"]
        if rank < max(1.5, self.min_rank_share * largest_rank):
            return (
                f"The embedding is collapsing: its effective rank is {rank:.1f} of {largest_rank}, so the cells "
                "differ in a few directions only"
            )
        if cosine > self.max_cosine:
            return (
                f"The embedding is collapsing: the mean cosine between cells is {cosine:.2f}, so all cells look alike"
            )
        return None
