"""Make a trainer, choose threads and precision, and run it: the only place that touches devices."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genejepa._lightning import EarlyStopping, TQDMProgressBar, Trainer, rank_zero_module
from genejepa.data.loader import StepDataset, step_loader
from genejepa.errors import ConfigError, TrainingInterruptedWarning
from genejepa.train.callbacks import CollapseMonitor, HistoryRecorder, RankShare
from genejepa.train.module import LOG_EVERY, JEPAModule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from genejepa._lightning import Callback, Logger
    from genejepa.config import GeneJEPAConfig
    from genejepa.data.normalization import Normalizer
    from genejepa.data.panel import PanelCounts
    from genejepa.jepa import JEPA

logger = logging.getLogger(__name__)

_N_RECORDS = 100
"""Rows of the history of a full training, about."""

_MIN_GAIN = 1.3
"""More threads, or bfloat16, must be this much faster in the timing, so that noise does not decide."""


@dataclass(frozen=True)
class RunOptions:
    """How to run: everything that is not part of the model.

    Attributes
    ----------
    precision
        A precision of Lightning, or ``auto``: bfloat16 on GPUs that have it and on CPUs where it is faster.
    threads
        CPU threads; None chooses by a quick timing.
    early_stopping
        Hold out ``1 - train_size`` of the cells and stop when their weighted objectives, which need no labels and
        do not improve by collapse, have not improved for ``patience`` epochs.
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


@dataclass(frozen=True)
class RunResult:
    """What happened.

    Attributes
    ----------
    history
        One row per recorded step.
    precision, threads
        What was used.
    interrupted
        Whether Ctrl-C ended the training early.
    """

    history: list[dict[str, float]]
    seconds: float
    steps: int
    precision: str
    threads: int
    interrupted: bool


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
) -> RunResult:
    """Train ``jepa`` in place."""
    held_out = None
    if options.early_stopping:
        counts, held_out = split_cells(counts, train_size=options.train_size, seed=config.train.seed)
    accelerator = resolve_accelerator(options.accelerator)
    precision, threads = resolve_cpu_settings(options, accelerator, n_genes=counts.n_genes)

    def dataset(cells: PanelCounts, seed: int) -> StepDataset:
        return StepDataset(cells, normalizer, masks=config.masks, batch_size=config.train.batch_size, seed=seed)

    training = dataset(counts, config.train.seed)
    epochs = n_epochs(config, counts.n_obs)
    total_steps = epochs * training.steps_per_epoch
    module = JEPAModule(
        jepa,
        objectives=config.objectives,
        train_config=config.train,
        total_steps=total_steps,
        median_depth=normalizer.median_depth,
    )
    if options.compile:
        module.network = torch.compile(jepa)
    recorder = HistoryRecorder(every=math.ceil(total_steps / _N_RECORDS), monitor=CollapseMonitor())
    ours = [recorder, RankShare(training)]
    trainer = _trainer(config, options, accelerator, precision, epochs, ours, validate=held_out is not None)
    workers = options.num_workers
    loaders = [step_loader(training, num_workers=workers, pin_memory=accelerator == "cuda")]
    if held_out is not None:
        loaders.append(step_loader(dataset(held_out, config.train.seed + 1), new_every_epoch=False))

    started = time.perf_counter()
    jepa.train()
    gpus = list(range(torch.cuda.device_count())) if accelerator == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus), cpu_threads(threads), _quiet_lightning():
            interrupted = _fit(trainer, module, loaders)
    finally:
        jepa.eval().to("cpu")
    return RunResult(
        history=recorder.rows,
        seconds=time.perf_counter() - started,
        steps=trainer.global_step,
        precision=precision,
        threads=threads,
        interrupted=interrupted,
    )


def _fit(trainer: Trainer, module: JEPAModule, loaders: list[Any]) -> bool:
    """Run the loop; True if the user stopped it. Lightning turns Ctrl-C into SystemExit, which ends notebooks."""
    try:
        trainer.fit(module, *loaders)
    except (KeyboardInterrupt, SystemExit):
        if not trainer.interrupted:  # somebody else's exit
            raise
    interrupted = bool(trainer.interrupted)
    if interrupted:
        warnings.warn(
            f"Training was interrupted at step {trainer.global_step} of {module.total_steps}; the model is usable.\n"
            "Fix: call `train()` again for a full training.",
            TrainingInterruptedWarning,
            stacklevel=3,
        )
    return interrupted


def _trainer(
    config: GeneJEPAConfig,
    options: RunOptions,
    accelerator: str,
    precision: str,
    epochs: int,
    ours: Sequence[Callback],
    *,
    validate: bool,
) -> Trainer:
    callbacks: list[Callback] = [*ours, *options.callbacks]
    if options.progress_bar:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    if validate:
        callbacks.append(EarlyStopping(monitor="validation_loss", patience=options.patience))
    with _quiet_lightning():
        return Trainer(
            accelerator=accelerator,
            devices=options.devices,
            # Which read-outs take part depends on the objectives.
            strategy="auto" if options.devices in (1, "1") else "ddp_find_unused_parameters_true",
            precision=precision,  # type: ignore[arg-type]  # Lightning checks the literal itself
            max_epochs=epochs,
            callbacks=callbacks,
            logger=options.logger,
            enable_progress_bar=options.progress_bar,
            enable_checkpointing=False,
            enable_model_summary=False,
            gradient_clip_val=config.train.gradient_clip or None,
            num_sanity_val_steps=0,
            log_every_n_steps=LOG_EVERY,
            use_distributed_sampler=False,
        )


def split_cells(counts: PanelCounts, *, train_size: float, seed: int) -> tuple[PanelCounts, PanelCounts]:
    """Cells for training and cells held out, at least two of each."""
    order = np.random.default_rng([seed, 3]).permutation(counts.n_obs)
    n_train = min(max(round(train_size * counts.n_obs), 2), counts.n_obs - 2)
    return counts.subset(np.sort(order[:n_train])), counts.subset(np.sort(order[n_train:]))


def resolve_accelerator(accelerator: str) -> str:
    """Name of the accelerator that ``auto`` stands for here.

    Raises
    ------
    ConfigError
        If a GPU is asked for and torch sees none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"`accelerator` is {accelerator!r}, and torch {torch.__version__} sees no CUDA device.",
            fix="use `accelerator='cpu'`, or install a CUDA build of torch.",
        )
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return "cuda"
    # On Apple GPUs small dense products of this size gain nothing over the CPU and lack float64 diagnostics.
    return "cpu" if accelerator == "auto" else accelerator


def resolve_cpu_settings(options: RunOptions, accelerator: str, *, n_genes: int) -> tuple[str, int]:
    """Precision and threads: what the user asked for, else bfloat16 and threads where a timing favours them."""
    precision, threads = options.precision, options.threads
    if accelerator == "cuda":
        if precision == "auto":
            precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
        return precision, threads or torch.get_num_threads()
    if accelerator != "cpu":
        return ("32-true" if precision == "auto" else precision), threads or torch.get_num_threads()
    if threads is None:
        most = torch.get_num_threads()
        candidates = sorted({1, max(1, most // 2), most})
        timed = {n: time_product(n_genes, threads=n, dtype=torch.float32) for n in candidates}
        # The fewest threads that are nearly as fast as any: more would only fight other programs for the cores.
        threads = next(n for n in candidates if timed[n] <= _MIN_GAIN * min(timed.values()))
    if precision == "auto":
        plain = time_product(n_genes, threads=threads, dtype=torch.float32)
        half = time_product(n_genes, threads=threads, dtype=torch.bfloat16)
        precision = "bf16-mixed" if plain > _MIN_GAIN * half else "32-true"
    return precision, threads


def time_product(n_genes: int, *, threads: int, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """Mean time in seconds of one read-in product of 256 cells, repeated for about ``seconds``.

    The mean, not the best: threads that wait for a core that another program uses are what a training would meet.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, n_genes, generator=generator).to(dtype)
    right = torch.randn(n_genes, 256, generator=generator).to(dtype)
    with cpu_threads(threads):
        _ = left @ right  # the first call sets up the kernel
        started = time.perf_counter()
        repeats = 0
        while time.perf_counter() - started < seconds:
            _ = left @ right
            repeats += 1
    return (time.perf_counter() - started) / repeats


@contextlib.contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """Use ``n`` threads inside the block, and the caller's number after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
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
