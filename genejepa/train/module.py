"""The Lightning module: weigh the objectives, step the optimiser, then the target encoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genejepa._lightning import LightningModule
from genejepa.errors import ConfigError, TrainingDivergedError
from genejepa.nn.ema import ema_decay, update_average
from genejepa.objectives import (
    alignment_loss,
    depth_loss,
    diversity_loss,
    information_loss,
    invariance_loss,
    prediction_loss,
)
from genejepa.objectives.diversity import random_directions

if TYPE_CHECKING:
    from genejepa.config import ObjectiveConfig, TrainConfig
    from genejepa.data.loader import Batch
    from genejepa.jepa import JEPA, JEPAOutput
    from genejepa.train.state import TrainingState

LOG_EVERY = 10
"""Steps between two entries of the user's logger."""


def learning_rate_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Factor of the learning rate: linear rise, then a cosine to zero.

    Returns
    -------
    In (0, 1]; never 0 at the first step.
    """
    warmup = max(1, round(warmup_fraction * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(1, total_steps - warmup), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class JEPAModule(LightningModule):
    """Train a :class:`genejepa.jepa.JEPA` on batches of :class:`genejepa.data.loader.StepDataset`.

    Parameters
    ----------
    total_steps
        Length of the schedules of the learning rate and of the target encoder's decay.
    start
        State to go on from; weights and moments are taken from it.
    median_depth
        Counts of a median cell over the panel; with the cell's own depth, turns nats per cell into nats per count.

    Raises
    ------
    ConfigError
        If no objective counts, because alignment needs batches.
    """

    def __init__(
        self,
        jepa: JEPA,
        *,
        objectives: ObjectiveConfig,
        train_config: TrainConfig,
        total_steps: int,
        median_depth: float,
        start: TrainingState | None = None,
    ) -> None:
        super().__init__()
        self.jepa = jepa
        self._aligns = objectives.alignment > 0 and len(jepa.readout.log_frequency) > 1
        others = (objectives.prediction, objectives.diversity, objectives.invariance, objectives.depth)
        if not (self._aligns or objectives.information or any(others)):
            raise ConfigError(
                "`alignment` is the only objective, and there are no batches that it could align.",
                fix="set up a batch_key, or give another objective a weight above 0, such as information=10.",
            )
        self._start = start
        self._first_step = 0 if start is None else start.step
        self.network: Any = jepa
        """What the training step calls: the architecture, or its compiled form."""
        self.objectives = objectives
        self.train_config = train_config
        self.total_steps = total_steps
        self.median_depth = median_depth
        self.last_terms: dict[str, Tensor] = {}
        """Objectives of the last step, unweighted and detached."""
        self.last_vectors: Tensor | None = None
        """Whole-cell vectors of the last step, detached."""

    @property
    def steps_done(self) -> int:
        """Steps of the whole training that are done, with those before an interruption."""
        return self._first_step + int(self.trainer.global_step)

    def terms(self, output: JEPAOutput, batch: Batch) -> dict[str, Tensor]:
        """Every objective with a weight above zero, unweighted."""
        config = self.objectives
        terms: dict[str, Tensor] = {}
        directions = random_directions(
            output.views.shape[-1],
            config.n_slices,
            seed=self.train_config.seed,
            step=int(batch["step"]),
            device=output.views.device,
        )
        if config.prediction > 0:
            terms["prediction"] = prediction_loss(output.predicted_sets, output.target_sets) + prediction_loss(
                output.predicted_cell, output.target_cell.expand_as(output.predicted_cell)
            )
        if config.invariance > 0:
            terms["invariance"] = invariance_loss(output.views)
        if config.depth > 0:
            terms["depth"] = depth_loss(output.whole, output.target_cell, batch["thinned"])
        if config.diversity > 0:
            terms["diversity"] = torch.stack([diversity_loss(z, directions) for z in output.views]).mean()
        if config.information > 0:
            readout = self.jepa.readout
            # A cell ten times as deep does not say ten times as much: its counts are more than Poisson dispersed.
            weight = 1.0 / batch["counts"].sum(1).clamp(min=self.median_depth)
            terms["information"] = information_loss(
                readout(output.whole),
                batch["counts"],
                readout.expected(batch["batch"]),
                weight=weight,
            )
        if self._aligns:
            terms["alignment"] = torch.stack(
                [alignment_loss(z, batch["batch"], directions) for z in output.views]
            ).mean()
        return terms

    def weighted_loss(self, batch: Batch) -> Tensor:
        """Weighted sum of the objectives on a batch; keeps the terms for the log."""
        output = self.network(batch)
        terms = self.terms(output, batch)
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        self.last_vectors = output.whole.detach()
        return torch.stack([getattr(self.objectives, name) * term for name, term in terms.items()]).sum()

    def training_step(self, batch: Batch, _batch_index: int) -> Tensor:
        """Loss of one step.

        Raises
        ------
        TrainingDivergedError
            If the loss is NaN or infinite.
        """
        # Dropout as a function of (seed, step): nothing depends on how a generator came to its position.
        torch.manual_seed((self.train_config.seed * 1_000_003 + int(batch["step"])) % 2**63)
        loss = self.weighted_loss(batch)
        if not torch.isfinite(loss):
            terms = ", ".join(f"{name} {float(term):.3g}" for name, term in self.last_terms.items())
            raise self._diverged(f"the training loss is {float(loss.detach())} ({terms})")
        self.last_terms["loss"] = loss.detach()
        if (self.global_step + 1) % LOG_EVERY == 0:  # Lightning's bookkeeping costs as much as a tenth of a step
            self.log_dict(self.last_terms, batch_size=len(batch["values"]))
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step the optimiser, then move the target encoder: once per optimiser step under accumulation too."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        decay = ema_decay(self.steps_done, self.total_steps)
        update_average(self.jepa.target_encoder, self.jepa.encoder, decay)

    def configure_gradient_clipping(
        self,
        optimizer: Any,  # signature of Lightning
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all weights; Lightning's own clipping refuses fused optimisers.

        Raises
        ------
        TrainingDivergedError
            If the norm is not finite: before the weights are touched. Not with 16-bit numbers, whose loss scaler
            expects overflows and leaves out the step.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.jepa.parameters(), gradient_clip_val or float("inf"))
        if getattr(self.trainer.precision_plugin, "scaler", None) is None and not torch.isfinite(norm):
            raise self._diverged(f"the norm of the gradients is {float(norm)}")

    def _diverged(self, what: str) -> TrainingDivergedError:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return TrainingDivergedError(
            f"{what} at step {self.steps_done} of {self.total_steps}, with a learning rate of {rate:.3g}",
            fix=f"train again with a lower rate, such as `learning_rate={self.train_config.learning_rate / 10:.1g}`, "
            "or with `precision='32-true'`.",
        )

    def configure_optimizers(self) -> Any:
        """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) under the warm-up and cosine schedule."""
        config = self.train_config
        optimizer = torch.optim.AdamW(
            [p for p in self.jepa.parameters() if p.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        if self._start is not None:
            self._start.restore(self.jepa, optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(self._first_step + step, self.total_steps, config.warmup_fraction),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
