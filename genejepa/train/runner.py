"""Make a trainer, choose threads and precision, and run it: the only place that touches devices."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genejepa._arithmetic import plain_arithmetic
from genejepa._lightning import Callback, SIGTERMException, TQDMProgressBar, Trainer, rank_zero_module
from genejepa._memory import memory_errors
from genejepa.config import check_at_least, check_one_of, check_range
from genejepa.data.loader import StepDataset, step_loader
from genejepa.errors import ConfigError, ModelFileError, TrainingDivergedError
from genejepa.files import check_writable
from genejepa.train.callbacks import (
    CollapseMonitor,
    HeldOutLoss,
    HistoryRecorder,
    LastGood,
    RankShare,
    StepEnd,
    StopRequested,
    StopSignals,
)
from genejepa.train.devices import (
    ACCELERATORS,
    MOST_THREADS,
    PRECISIONS,
    cpu_threads,
    resolve_accelerator,
    resolve_arithmetic,
    resolve_devices,
)
from genejepa.train.module import LOG_EVERY, JEPAModule
from genejepa.train.state import TrainingState, plan_of, require_place, tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from genejepa._lightning import Logger
    from genejepa.config import GeneJEPAConfig
    from genejepa.data.normalization import Normalizer
    from genejepa.data.panel import PanelCounts
    from genejepa.jepa import JEPA

logger = logging.getLogger(__name__)

_N_RECORDS = 100
"""Rows of the history of a full training, about."""

_CHECKPOINT_SIZE = 4
"""Bytes of a checkpoint per byte of weights, about: two moments per trained weight, and the old checkpoint."""

_SCALER = "scaler."


@dataclass(frozen=True)
class RunOptions:
    """How to run: everything that is not part of the model.

    Attributes
    ----------
    accelerator, devices
        Where; see :func:`genejepa.train.devices.resolve_devices`.
    precision
        A precision of Lightning, or ``auto``: bfloat16 on GPUs that have it and on CPUs where it is faster.
    threads
        CPU threads; None chooses by a quick timing.
    early_stopping
        Hold out ``1 - train_size`` of the cells and stop when their weighted objectives, which need no labels and
        do not improve by collapse, have not improved for ``patience`` epochs.
    checkpoint_dir
        Where checkpoints go; None for none.
    checkpoint_minutes, checkpoint_steps
        Time and steps between checkpoints, whichever comes first; None: not by this.

    Raises
    ------
    ConfigError
        If a value is not a possible one.
    DeviceError
        If the devices are not there.
    """

    accelerator: str = "auto"
    devices: int | list[int] | str = 1
    precision: str = "auto"
    threads: int | None = None
    num_workers: int = 0
    early_stopping: bool = False
    patience: int = 5
    train_size: float = 0.9
    progress_bar: bool = True
    callbacks: Sequence[Callback] = ()
    logger: Logger | bool = False
    compile: bool = False
    checkpoint_dir: Path | None = None
    checkpoint_minutes: float | None = 1.0
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        check_one_of(self, ACCELERATORS, "accelerator")
        check_one_of(self, PRECISIONS, "precision")
        resolve_devices(self.devices, resolve_accelerator(self.accelerator))
        if not isinstance(self.callbacks, Sequence) or not all(isinstance(one, Callback) for one in self.callbacks):
            raise ConfigError(
                f"`callbacks` is {str(self.callbacks)[:60]}, expected a list of callbacks.",
                fix="give instances of subclasses of pytorch_lightning.Callback.",
            )
        check_at_least(self, 0, "num_workers")
        check_at_least(self, 1, "patience")
        check_range(self, 0.01, 0.99, "train_size")
        if self.threads is not None:
            check_at_least(self, 1, "threads", high=MOST_THREADS)
        if self.checkpoint_steps is not None:
            check_at_least(self, 1, "checkpoint_steps")
        if self.checkpoint_minutes is not None:
            check_range(self, 0.0, 1e6, "checkpoint_minutes")


class Ending(StrEnum):
    """How a training has ended."""

    finished = "finished"
    interrupted = "interrupted"
    terminated = "terminated"
    broken_off = "broken off"
    diverged = "diverged"


@dataclass(frozen=True)
class RunResult:
    """What happened.

    Attributes
    ----------
    ending
        Whether all steps were done; if not, whether Ctrl-C, SIGTERM or a loss that is not finite ended it between two
        steps, or a second Ctrl-C within a step, after which there is nothing to go on with.
    state
        Where to go on.
    error
        What ended a training that diverged; then ``state`` is the one that the weights were set back to.
    """

    ending: Ending
    state: TrainingState
    error: TrainingDivergedError | None = None


def n_epochs(config: GeneJEPAConfig, n_obs: int) -> int:
    """Epochs of a training: ``max_epochs``, or what gives about ``target_steps`` steps, at least one."""
    if config.train.max_epochs is not None:
        return config.train.max_epochs
    steps_per_epoch = -(-n_obs // min(config.train.batch_size, n_obs))
    return max(1, round(config.train.target_steps / steps_per_epoch))


def train(
    jepa: JEPA,
    counts: PanelCounts,
    normalizer: Normalizer,
    *,
    config: GeneJEPAConfig,
    options: RunOptions,
    start: TrainingState | None = None,
) -> RunResult:
    """Train ``jepa`` in place, from its present weights or from ``start``.

    Raises
    ------
    ConfigError
        If ``start`` is of a training under other settings or on other cells.
    ModelFileError
        If ``start`` does not fit the network.
    OutOfMemoryError
        If memory runs out.
    OSError
        If checkpoints cannot be written to ``options.checkpoint_dir``; before the first step.
    """
    with memory_errors("training", fix="lower `batch_size`, or pass batch_size='auto'; a smaller `n_genes` helps too."):
        return _Run(jepa, counts, normalizer, config, options, start).run()


class _Run:
    """One training: its data, its network, and what watches it."""

    def __init__(
        self,
        jepa: JEPA,
        counts: PanelCounts,
        normalizer: Normalizer,
        config: GeneJEPAConfig,
        options: RunOptions,
        start: TrainingState | None,
    ) -> None:
        self.jepa, self.options, self.start = jepa, options, start
        self.accelerator = resolve_accelerator(options.accelerator)
        self.devices = resolve_devices(options.devices, self.accelerator)
        self.n_devices = len(self.devices) if isinstance(self.devices, list) else self.devices
        held_out_share = {"train_size": options.train_size, "patience": options.patience}
        self.plan = plan_of(
            config,
            counts,
            early_stopping=held_out_share if options.early_stopping else None,
            n_devices=self.n_devices,
            compile=options.compile,
        )
        if start is not None:
            start.require_plan(self.plan, precision=options.precision, threads=options.threads)
        held_out = None
        if options.early_stopping:
            counts, held_out = split_cells(counts, train_size=options.train_size, seed=config.train.seed)
        if start is None:
            self.precision, self.threads = resolve_arithmetic(
                options.precision, options.threads, self.accelerator, n_genes=counts.n_genes
            )
        else:
            self.precision, self.threads = start.precision, start.threads

        def dataset(cells: PanelCounts, seed: int) -> StepDataset:
            return StepDataset(cells, normalizer, masks=config.masks, batch_size=config.train.batch_size, seed=seed)

        self.cells = dataset(counts, config.train.seed)
        self.epochs = n_epochs(config, counts.n_obs)
        self.module = JEPAModule(
            jepa,
            objectives=config.objectives,
            train_config=config.train,
            total_steps=self.epochs * self.cells.steps_per_epoch,
            median_depth=normalizer.median_depth,
            start=start,
        )
        if start is not None and start.total_steps != self.module.total_steps:
            raise ModelFileError(
                f"the checkpoint is of a training of {start.total_steps} steps, expected {self.module.total_steps}.",
                fix="remove the checkpoint, and train again.",
            )
        if options.compile:
            self.module.network = torch.compile(jepa)
        self.monitor = CollapseMonitor()
        self.last_good = LastGood()
        per_epoch = self.cells.steps_per_epoch
        every = math.ceil(self.module.total_steps / _N_RECORDS)
        self.recorder = HistoryRecorder(every=every, steps_per_epoch=per_epoch, monitor=self.monitor)
        self.held_out = None
        if held_out is not None:
            self.held_out = HeldOutLoss(
                dataset(held_out, config.train.seed + 1),
                steps_per_epoch=per_epoch,
                patience=options.patience,
                recorder=self.recorder,
            )
        self.signals = StopSignals()
        self.trainer = self._trainer(gradient_clip=config.train.gradient_clip)
        self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if start is not None:
            self._remember(start)

    def run(self) -> RunResult:
        """Do all steps that are left."""
        if self.start is not None and self.start.is_finished:
            self.start.restore(self.jepa)
            return RunResult(Ending.finished, self.start)
        if self.options.checkpoint_dir is not None:
            require_place(self.options.checkpoint_dir)
            n_bytes = sum(tensor.nbytes for tensor in self.jepa.state_dict().values())
            check_writable(self.options.checkpoint_dir, n_bytes=_CHECKPOINT_SIZE * n_bytes)
        loader = step_loader(
            self.cells,
            first_step=0 if self.start is None else self.start.step,
            num_workers=self.options.num_workers,
            pin_memory=self.accelerator == "cuda",
        )
        self.started = time.perf_counter()
        if self.start is not None:
            self.start.restore(self.jepa)
        self.initial = {name: tensor.clone() for name, tensor in self.jepa.state_dict().items()}
        self.jepa.train()
        gpus = list(range(torch.cuda.device_count())) if self.accelerator == "cuda" else []
        error = None
        try:
            with (
                torch.random.fork_rng(devices=gpus),
                cpu_threads(self.threads),
                plain_arithmetic(self.accelerator),
                torch.enable_grad(),
                quiet_lightning(),
                self.signals,
            ):
                ending, error = self._fit(loader)
        finally:
            self.jepa.eval().to("cpu")
        if error is not None:
            return self._back_to_last_good(error)
        state = self._state()
        return RunResult(ending, state, error)

    def _fit(self, loader: Any) -> tuple[Ending, TrainingDivergedError | None]:
        """Run the loop. Lightning turns Ctrl-C into SystemExit, which would end a notebook."""
        try:
            self.trainer.fit(self.module, loader)
        except StopRequested:
            return (Ending.terminated if self._was_terminated else Ending.interrupted), None
        except TrainingDivergedError as error:
            return Ending.diverged, error
        except SIGTERMException:  # the signal came between this step's end and Lightning's own look at it
            return Ending.terminated, None
        except (KeyboardInterrupt, SystemExit):
            if not self.trainer.interrupted:  # somebody else's exit
                raise
            return Ending.broken_off, None
        return (Ending.terminated if self._was_terminated else Ending.finished), None

    @property
    def _was_terminated(self) -> bool:
        return self.signals.received == signal.SIGTERM

    def _state(self) -> TrainingState:
        """What to go on from, after the step that was done last."""
        counters = {"collapse_warned": float(self.monitor.has_warned)}
        if self.held_out is not None and math.isfinite(self.held_out.best):
            counters |= {"held_out_best": self.held_out.best, "held_out_worse": float(self.held_out.n_worse)}
        if self.scaler is not None:
            counters |= {_SCALER + name: float(value) for name, value in self.scaler.state_dict().items()}
        before = 0.0 if self.start is None else self.start.seconds
        return TrainingState(
            step=self.module.steps_done,
            total_steps=self.module.total_steps,
            stopped=self.held_out is not None and self.held_out.wants_stop,
            seconds=before + time.perf_counter() - self.started,
            precision=self.precision,
            threads=self.threads,
            plan=self.plan,
            rows=self.recorder.rows,
            counters=counters,
            tensors=tensors_of(self.jepa, self.trainer.optimizers),
        )

    def _back_to_last_good(self, error: TrainingDivergedError) -> RunResult:
        """Set the weights back to the last ones known to be good: those of a few steps ago, or those of the start."""
        good = self.last_good
        step = good.step if good.weights is not None else (0 if self.start is None else self.start.step)
        self.jepa.load_state_dict(self.initial if good.weights is None else good.weights)
        rows = [row for row in self.recorder.rows if row["step"] <= step]
        state = replace(self._state(), step=step, rows=rows)
        told = TrainingDivergedError(f"{error.problem}; the weights are those after step {step}.", fix=error.fix)
        told.__cause__ = error
        return RunResult(Ending.diverged, state, told)

    def _remember(self, start: TrainingState) -> None:
        """Give those who watch what they knew when the training was stopped."""
        self.recorder.rows = [dict(row) for row in start.rows]
        self.monitor.has_warned = bool(start.counters.get("collapse_warned"))
        if self.held_out is not None and "held_out_best" in start.counters:
            self.held_out.best = start.counters["held_out_best"]
            self.held_out.n_worse = int(start.counters["held_out_worse"])
        if self.scaler is not None:
            names = self.scaler.state_dict()
            self.scaler.load_state_dict(
                {name: type(old)(start.counters.get(_SCALER + name, old)) for name, old in names.items()}
            )

    def _save_checkpoint(self) -> None:
        assert self.options.checkpoint_dir is not None
        self._state().save(self.options.checkpoint_dir)

    def _trainer(self, *, gradient_clip: float) -> Trainer:
        options = self.options
        minutes = options.checkpoint_minutes
        step_end = StepEnd(
            self.signals,
            None if options.checkpoint_dir is None else self._save_checkpoint,
            every_seconds=None if minutes is None else 60.0 * minutes,
            every_steps=options.checkpoint_steps,
        )
        held_out = [] if self.held_out is None else [self.held_out]
        watching: list[Callback] = [self.recorder, *held_out, self.last_good, RankShare(self.cells)]
        callbacks: list[Callback] = [*watching, *options.callbacks, step_end]
        if options.progress_bar:
            callbacks.append(TQDMProgressBar(refresh_rate=10))
        first_epoch = 0 if self.start is None else self.start.step // self.cells.steps_per_epoch
        with quiet_lightning():
            return Trainer(
                accelerator=self.accelerator,
                devices=self.devices,
                # Which read-outs take part depends on the objectives.
                strategy="auto" if self.n_devices == 1 else "ddp_find_unused_parameters_true",
                precision=self.precision,  # type: ignore[arg-type]  # Lightning checks the literal itself
                max_epochs=self.epochs - first_epoch,
                callbacks=callbacks,
                logger=options.logger,
                enable_progress_bar=options.progress_bar,
                enable_checkpointing=False,
                enable_model_summary=False,
                gradient_clip_val=gradient_clip or None,
                num_sanity_val_steps=0,
                log_every_n_steps=LOG_EVERY,
                use_distributed_sampler=False,
            )


def split_cells(counts: PanelCounts, *, train_size: float, seed: int) -> tuple[PanelCounts, PanelCounts]:
    """Cells for training and cells held out, at least two of each."""
    order = np.random.default_rng([seed, 3]).permutation(counts.n_obs)
    n_train = min(max(round(train_size * counts.n_obs), 2), counts.n_obs - 2)
    return counts.subset(np.sort(order[:n_train])), counts.subset(np.sort(order[n_train:]))


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notices about devices and workers away from the user for the length of a call."""
    # Both Lightning distributions log through this one; whichever was imported last has named it.
    log = rank_zero_module.log
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Batches are whole steps made by our own dataset; more workers rarely pay on small data.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            warnings.filterwarnings("ignore", message=".*number of training batches.*")
            warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
            # The target encoder has no dropout, on purpose.
            warnings.filterwarnings("ignore", message=".*module.s. in eval mode.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        log.setLevel(before)
