"""Watching a training: history, collapse, held-out cells, checkpoints, and a wish to stop."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from typing import TYPE_CHECKING, Final, cast

import torch

from genejepa._lightning import Callback
from genejepa.errors import CheckpointWarning, CollapseWarning
from genejepa.objectives import effective_rank, mean_pairwise_cosine

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType
    from typing import Any

    from torch import Tensor

    from genejepa._lightning import LightningModule, Trainer
    from genejepa.data.loader import StepDataset
    from genejepa.train.module import JEPAModule


class HistoryRecorder(Callback):
    """Keep the objectives, the learning rate and the collapse measures of every ``every`` steps.

    Attributes
    ----------
    rows
        One dictionary per recorded step; it lacks what was not finite, which files do not hold.
    """

    def __init__(self, *, every: int, steps_per_epoch: int, monitor: CollapseMonitor) -> None:
        self.every = max(1, every)
        self.steps_per_epoch = steps_per_epoch
        self.monitor = monitor
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, _outputs: object, _batch: object, _batch_idx: int
    ) -> None:
        """Record the step, and let the monitor judge its vectors."""
        module = cast("JEPAModule", pl_module)
        step = module.steps_done
        last = step >= module.total_steps
        if (step % self.every and not last) or (self.rows and self.rows[-1]["step"] == step):
            return
        row = {"step": float(step), "epoch": float((step - 1) // self.steps_per_epoch)}
        row |= {name: float(value) for name, value in module.last_terms.items()}
        row["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        if module.last_vectors is not None and bool(module.last_vectors.isfinite().all()):
            row |= self.monitor.judge(module.last_vectors.float().cpu(), step, module.total_steps)
        self.rows.append({name: value for name, value in row.items() if math.isfinite(value)})


class HeldOutLoss(Callback):
    """After every epoch, measure the objectives on held-out cells under fixed masks; stop when they gain no more.

    A loss that is not finite, as 16-bit numbers can give, is no gain and is not recorded.

    Attributes
    ----------
    best
        Smallest loss so far.
    n_worse
        Epochs since then.
    """

    def __init__(self, cells: StepDataset, *, steps_per_epoch: int, patience: int, recorder: HistoryRecorder) -> None:
        self.cells = cells
        self.steps_per_epoch = steps_per_epoch
        self.patience = patience
        self.recorder = recorder
        self.best = float("inf")
        self.n_worse = 0

    @property
    def wants_stop(self) -> bool:
        """Whether the loss has not fallen for ``patience`` epochs."""
        return self.n_worse >= self.patience

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, _outputs: object, _batch: object, _batch_idx: int
    ) -> None:
        """Measure at the end of an epoch."""
        module = cast("JEPAModule", pl_module)
        if module.steps_done % self.steps_per_epoch:
            return
        loss = self._loss(trainer, module)
        module.log("validation_loss", loss)
        if self.recorder.rows and math.isfinite(loss):
            self.recorder.rows[-1]["validation_loss"] = loss
        self.n_worse = 0 if loss < self.best else self.n_worse + 1
        self.best = min(self.best, loss)
        trainer.should_stop = trainer.should_stop or self.wants_stop

    @torch.no_grad()
    def _loss(self, trainer: Trainer, module: JEPAModule) -> float:
        """Mean loss over the held-out cells; the terms and vectors of the training step are kept."""
        kept = module.last_terms, module.last_vectors
        module.jepa.eval()
        losses = []
        for step in range(self.cells.steps_per_epoch):
            batch = module.transfer_batch_to_device(self.cells[step], module.device, 0)
            with trainer.precision_plugin.forward_context():
                losses.append(float(module.weighted_loss(batch)))
        module.jepa.train()
        module.last_terms, module.last_vectors = kept
        return sum(losses) / len(losses)


class LastGood(Callback):
    """Keep a copy of the weights of the last ten or twenty steps, from which the loss was finite later on.

    Attributes
    ----------
    step
        Steps done when they were copied.
    weights
        The copy; None before there is one.
    """

    every: Final = 10

    def __init__(self) -> None:
        self.step = 0
        self.weights: dict[str, Tensor] | None = None
        self._latest: tuple[int, dict[str, Tensor]] | None = None

    def on_train_batch_end(
        self, _trainer: Trainer, pl_module: LightningModule, _outputs: object, _batch: object, _batch_idx: int
    ) -> None:
        """Copy, and trust the copy before: steps have been done from it."""
        module = cast("JEPAModule", pl_module)
        if module.steps_done % self.every:
            return
        if self._latest is not None:
            self.step, self.weights = self._latest
        copied = {name: tensor.detach().clone() for name, tensor in module.jepa.state_dict().items()}
        self._latest = module.steps_done, copied


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

    Attributes
    ----------
    has_warned
        Whether the warning was given; it is given once.
    """

    def __init__(self, *, min_rank_share: float = 0.05, max_cosine: float = 0.9) -> None:
        self.min_rank_share = min_rank_share
        self.max_cosine = max_cosine
        self.has_warned = False

    def judge(self, vectors: Tensor, step: int, total_steps: int) -> dict[str, float]:
        """Measure a batch of vectors, (batch, dim), and warn once, after the first quarter of training."""
        measures = {"effective_rank": effective_rank(vectors), "mean_cosine": mean_pairwise_cosine(vectors)}
        complaint = self.complaint(measures, largest_rank=min(len(vectors) - 1, vectors.shape[1]))
        if complaint and not self.has_warned and step >= total_steps / 4:
            self.has_warned = True
            message = f"{complaint} (step {step} of {total_steps}).\nFix: raise `diversity` or `information`."
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


class StopRequested(Exception):  # no error: the training ends between two steps
    """Ctrl-C or SIGTERM has asked the training to end."""


class StopSignals:
    """Let Ctrl-C and SIGTERM wait for the end of a step, so that weights and optimiser agree.

    A second Ctrl-C ends the step at once. Signals reach the main thread only; in another one this does nothing.

    Attributes
    ----------
    received
        The signal that asked for a stop, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class StepEnd(Callback):
    """At the end of a step, write a checkpoint if it is time, and stop if that was asked for.

    Parameters
    ----------
    signals
        Where a wish to stop arrives.
    save
        Writes a checkpoint; None for no checkpoints.
    every_seconds, every_steps
        Time or steps between checkpoints, whichever comes first; None: not by this.
    """

    def __init__(
        self,
        signals: StopSignals,
        save: Callable[[], None] | None,
        *,
        every_seconds: float | None,
        every_steps: int | None,
    ) -> None:
        self.signals = signals
        self.save = save
        self.every_seconds = float("inf") if every_seconds is None else every_seconds
        self.every_steps = every_steps
        self._last_save = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, _outputs: object, _batch: object, _batch_idx: int
    ) -> None:
        """Save if it is time; a full disk does not end a training. Stop if that was asked for.

        Raises
        ------
        StopRequested
            If a signal has arrived.
        """
        step = cast("JEPAModule", pl_module).steps_done
        due = time.monotonic() - self._last_save >= self.every_seconds
        due = due or (self.every_steps is not None and step % self.every_steps == 0)
        if self.save is not None and due and trainer.is_global_zero:
            try:
                self.save()
            except OSError as error:
                message = f"The checkpoint of step {step} could not be written; the training goes on.\n{error}"
                warnings.warn(message, CheckpointWarning, stacklevel=2)
            self._last_save = time.monotonic()
        if self.signals.received is not None:
            raise StopRequested
