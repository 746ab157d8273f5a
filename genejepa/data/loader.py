"""Training batches as a pure function of (seed, step), so that workers, restarts and ranks change nothing."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from dataclasses import replace
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from genejepa.data.masking import draw_masks
from genejepa.data.normalization import Thinning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from genejepa.config import MaskConfig
    from genejepa.data.normalization import Normalizer
    from genejepa.data.panel import PanelCounts

_ORDER_STREAM = 2
_THINNING_STREAM = 6


class Batch(TypedDict):
    """One training step: cells, gene blocks, and the blocks that the two views of a cell see.

    Shapes: values, whole_values and counts (batch, n_genes); blocks (n_blocks, block_size); views
    (2, batch, n_blocks); thinned and batch (batch,); step (). The context encoder reads ``values``, in which the cells
    marked by ``thinned`` have lost molecules; the targets come from ``whole_values``, where none has.
    """

    values: Tensor
    whole_values: Tensor
    thinned: Tensor
    counts: Tensor
    batch: Tensor
    blocks: Tensor
    views: Tensor
    step: Tensor


class StepDataset(Dataset[Batch]):
    """Map a step number to its batch.

    Cells are visited in a new order in every epoch; a last incomplete batch is filled up from the next order, so
    that all steps have one shape. Cells of which most values are fractional, such as FPKM, are not thinned: they hold
    no molecules that could be lost.

    Parameters
    ----------
    counts
        Training cells.
    rank, world_size
        This process takes every ``world_size``-th cell of the batch.
    """

    def __init__(
        self,
        counts: PanelCounts,
        normalizer: Normalizer,
        *,
        masks: MaskConfig,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.counts = counts
        self.normalizer = normalizer
        is_whole = counts.data == np.rint(counts.data)
        self.masks = masks if 2 * is_whole.sum() > len(is_whole) else replace(masks, thinned_fraction=0.0)
        self.batch_size = min(batch_size, counts.n_obs)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = -(-counts.n_obs // self.batch_size)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.steps_per_epoch

    def cells(self, step: int) -> NDArray[np.int64]:
        """Positions of the cells of a step over all ranks, (batch_size,)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        index = self._epoch_order(epoch)[start : start + self.batch_size]
        missing = self.batch_size - len(index)
        if missing:
            index = np.concatenate([index, self._shuffled(epoch + 1)[:missing]])
        return index

    def __getitem__(self, step: int) -> Batch:
        share = slice(self.rank, None, self.world_size)
        index = self.cells(step)[share]
        whole_values, counts = self.normalizer.dense(self.counts, index)
        values, thinned = self._with_thinned_cells(whole_values, index, step)
        masks = draw_masks(
            self.masks, n_genes=self.counts.n_genes, batch_size=self.batch_size, seed=self.seed, step=step
        )
        return Batch(
            values=torch.from_numpy(values),
            whole_values=torch.from_numpy(whole_values),
            thinned=torch.from_numpy(thinned),
            counts=torch.from_numpy(counts),
            batch=torch.from_numpy(self.counts.batch_of(index)),
            blocks=torch.from_numpy(masks.blocks),
            views=torch.from_numpy(masks.views[:, share].astype(np.float32)),
            step=torch.tensor(step),
        )

    def _with_thinned_cells(
        self, values: NDArray[np.float32], index: NDArray[np.int64], step: int
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Values of a step, (len(index), n_genes), where some cells have lost molecules, and which, (len(index),)."""
        rng = np.random.default_rng([self.seed, _THINNING_STREAM, step, self.rank])
        kept = np.exp(rng.uniform(np.log(self.masks.min_depth), 0.0, size=len(index)))
        thinned = rng.random(len(index)) < self.masks.thinned_fraction
        if thinned.any():
            values = values.copy()
            loss = Thinning(kept[thinned], rng)
            values[thinned], _ = self.normalizer.dense(self.counts, index[thinned], thinning=loss)
        return values, thinned

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        return self._order[1]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, _ORDER_STREAM, epoch]).permutation(self.counts.n_obs)


class StepSampler(Sampler[int]):
    """Absolute step numbers of the current epoch, of a training that may begin in the middle.

    Epochs are counted from 0 by the training loop, also where earlier ones were done before an interruption.
    """

    def __init__(self, steps_per_epoch: int, *, first_step: int = 0) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.first_step = first_step
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start = (self.first_step // self.steps_per_epoch + self.epoch) * self.steps_per_epoch
        return iter(range(max(start, self.first_step), start + self.steps_per_epoch))

    def __len__(self) -> int:
        return self.steps_per_epoch


def step_loader(
    dataset: StepDataset, *, first_step: int = 0, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Loader of whole steps from ``first_step`` on; the dataset makes the batch, so no collation is needed.

    Workers are spawned, not forked: a fork after torch has started threads can hang.
    """
    return _StepLoader(
        dataset,
        batch_size=None,
        sampler=StepSampler(dataset.steps_per_epoch, first_step=first_step),
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_end_without_parent,
    )


def _end_without_parent(_worker: int) -> None:
    """From here on torch notices that the main process has died, but not that it died while this worker started."""
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        sys.exit(1)


class _StepLoader(DataLoader[Batch]):
    """Loader whose workers leave Ctrl-C and SIGTERM to the main process, from their start on.

    Both reach the whole process group, and a worker that dies of one would take the present step along. Processes
    inherit which signals are blocked.
    """

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        resource_tracker.ensure_running()  # its start ends with these signals not blocked
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
