from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import signal
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning_utilities.core import rank_zero

from genejepa._lightning import Callback, Logger, Trainer
from genejepa.config import GeneJEPAConfig, MaskConfig, ModelConfig, ObjectiveConfig, TrainConfig
from genejepa.data.axes import PrincipalAxes, principal_axes
from genejepa.data.batches import BatchScaling
from genejepa.data.loader import StepDataset, step_loader
from genejepa.data.normalization import Normalizer
from genejepa.errors import (
    CollapseWarning,
    ConfigError,
    DeviceError,
    TrainingDivergedError,
    TrainingInterruptedWarning,
)
from genejepa.jepa import JEPA
from genejepa.model import GeneJEPA
from genejepa.nn import ema
from genejepa.nn.attention import read_dense
from genejepa.nn.encoder import GeneTokenEncoder
from genejepa.objectives import effective_rank
from genejepa.train import module as training_module
from genejepa.train import runner
from genejepa.train.callbacks import CollapseMonitor, HeldOutLoss, HistoryRecorder
from genejepa.train.devices import resolve_devices
from genejepa.train.module import JEPAModule, learning_rate_factor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import anndata
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from genejepa.data.panel import PanelCounts

N_OBS, N_GENES = 24, 30
SIZES = ModelConfig(embedding_dim=8, n_latents=2, dim=16, n_heads=4, predictor_dim=16, dropout=0.0)


@dataclass(frozen=True)
class Bench:
    """A network and batches for it, without the class around them."""

    dataset: StepDataset

    @property
    def axes(self) -> PrincipalAxes:
        return principal_axes(self.dataset.counts, self.dataset.normalizer, n_components=16, seed=0)

    def module(self, objectives: ObjectiveConfig, *, model: ModelConfig = SIZES, total_steps: int = 10) -> JEPAModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            normalizer = self.dataset.normalizer
            frequency = normalizer.frequency[None] if normalizer.batches is None else normalizer.batches.frequency
            jepa = JEPA(N_GENES, model, torch.from_numpy(np.log(frequency))).train()
        return JEPAModule(
            jepa,
            objectives=objectives,
            train_config=TrainConfig(batch_size=8),
            total_steps=total_steps,
            median_depth=1.0,
        )


@pytest.fixture
def bench(rng: np.random.Generator, as_panel: Callable[[NDArray[np.float32]], PanelCounts]) -> Bench:
    counts = as_panel(rng.poisson(rng.gamma(1.0, 3.0, size=N_GENES), size=(N_OBS, N_GENES)).astype(np.float32))
    normalizer = Normalizer.fit(counts, transform="sqrt")
    return Bench(StepDataset(counts, normalizer, masks=MaskConfig(n_blocks=4), batch_size=8, seed=0))


@pytest.fixture
def bench_of_batches(bench: Bench) -> Bench:
    """The same cells in two batches, and steps of all of them."""
    counts = replace(bench.dataset.counts, batch=np.arange(N_OBS) % 2)
    scaling = BatchScaling.fit(counts, bench.dataset.normalizer, ("one", "two"))
    normalizer = replace(bench.dataset.normalizer, batches=scaling)
    return Bench(StepDataset(counts, normalizer, masks=bench.dataset.masks, batch_size=N_OBS, seed=0))


def gradients(part: nn.Module) -> dict[str, float]:
    """Norm of the gradient of every weight; 0 for one that was not reached."""
    return {name: 0.0 if weight.grad is None else float(weight.grad.norm()) for name, weight in part.named_parameters()}


# One step


@pytest.mark.parametrize("encoder", ["gene_tokens", "mlp"])
def test_the_objectives_train_every_part(bench: Bench, encoder: Any) -> None:
    module = bench.module(ObjectiveConfig(), model=replace(SIZES, encoder=encoder))
    batch = bench.dataset[0]
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    loss = module.weighted_loss(batch)
    loss.backward()
    assert torch.isfinite(loss)
    found = gradients(module.jepa)
    assert all(math.isfinite(norm) for norm in found.values()), found
    assert not {name for name, norm in found.items() if norm == 0 and not name.startswith("target_encoder.")}
    optimizer.step()
    assert float(module.weighted_loss(batch).detach()) < float(loss.detach())


def test_no_gradient_reaches_the_target_encoder(bench: Bench) -> None:
    module = bench.module(ObjectiveConfig())
    module.weighted_loss(bench.dataset[0]).backward()
    assert not any(gradients(module.jepa.target_encoder).values())
    optimizer = module.configure_optimizers()["optimizer"]
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert not trained & {id(weight) for weight in module.jepa.target_encoder.parameters()}
    assert {id(weight) for weight in module.jepa.encoder.parameters()} < trained


@pytest.mark.parametrize(
    ("weights", "silent"),
    [
        ({"prediction": 0.0}, "predictor"),
        ({"information": 0.0}, "readout"),
        ({"prediction": 0.0, "invariance": 0.0, "depth": 0.0}, "predictor"),
    ],
    ids=["no prediction", "no information", "information alone"],
)
def test_an_objective_without_weight_is_off(bench: Bench, weights: dict[str, float], silent: str) -> None:
    module = bench.module(ObjectiveConfig(**weights))  # type: ignore[arg-type]  # weights only
    module.weighted_loss(bench.dataset[0]).backward()
    assert not set(weights) & set(module.last_terms)
    assert not any(gradients(getattr(module.jepa, silent)).values())
    assert any(gradients(module.jepa.encoder).values())


WEIGHTS = {
    "prediction": 0.5,
    "diversity": 2.0,
    "invariance": 3.0,
    "depth": 0.7,
    "information": 0.1,
    "alignment": 4.0,
}


def test_loss_is_the_weighted_sum_of_the_terms(bench_of_batches: Bench) -> None:
    module = bench_of_batches.module(ObjectiveConfig(**WEIGHTS))  # type: ignore[arg-type]  # weights only
    loss = module.weighted_loss(bench_of_batches.dataset[0])
    assert set(module.last_terms) == set(WEIGHTS)
    assert float(module.last_terms["alignment"]) > 0
    expected = sum(weight * float(module.last_terms[name]) for name, weight in WEIGHTS.items())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_without_batches_there_is_no_alignment(bench: Bench) -> None:
    module = bench.module(ObjectiveConfig(**WEIGHTS))  # type: ignore[arg-type]  # weights only
    module.weighted_loss(bench.dataset[0])
    assert set(module.last_terms) == set(WEIGHTS) - {"alignment"}


def test_alignment_is_switched_off_by_its_weight(bench_of_batches: Bench) -> None:
    module = bench_of_batches.module(ObjectiveConfig(alignment=0.0))
    module.weighted_loss(bench_of_batches.dataset[0])
    assert "alignment" not in module.last_terms


def test_something_has_to_be_trained(bench: Bench) -> None:
    nothing = dict.fromkeys(WEIGHTS, 0.0)
    with pytest.raises(ConfigError, match=r"`alignment` are all 0.*\nFix: give one of them a weight above 0"):
        ObjectiveConfig(**nothing)  # type: ignore[arg-type]  # weights only
    with pytest.raises(ConfigError, match=r"`alignment` is the only objective, and there are no batches.*\nFix: "):
        bench.module(ObjectiveConfig(**{**nothing, "alignment": 1.0}))  # type: ignore[arg-type]  # weights only


def test_alignment_trains_the_encoder_alone(bench_of_batches: Bench) -> None:
    others = dict.fromkeys(set(WEIGHTS) - {"alignment"}, 0.0)
    module = bench_of_batches.module(ObjectiveConfig(**others))  # type: ignore[arg-type]  # weights only
    module.weighted_loss(bench_of_batches.dataset[0]).backward()
    assert all(gradients(module.jepa.encoder).values())
    for part in (module.jepa.predictor, module.jepa.readout, module.jepa.target_encoder):
        assert not any(gradients(part).values())


@torch.no_grad()
def test_readout_knows_the_batch_of_a_cell(bench_of_batches: Bench) -> None:
    module = bench_of_batches.module(ObjectiveConfig())
    module.jepa.readout.linear.weight.zero_()
    batch = bench_of_batches.dataset[0]
    module.weighted_loss(batch)
    assert float(module.last_terms["information"]) == pytest.approx(0.0, abs=1e-4)
    scaling = bench_of_batches.dataset.normalizer.batches
    assert scaling is not None
    expected = np.log(scaling.frequency[batch["batch"].numpy()])
    np.testing.assert_allclose(module.jepa.readout.expected(batch["batch"]), expected, atol=1e-6)


@torch.no_grad()
def test_network_encodes_views_targets_and_whole_cells(bench: Bench) -> None:
    jepa = bench.module(ObjectiveConfig()).jepa
    batch = bench.dataset[0]
    output = jepa(batch)
    values, whole_values, blocks = batch["values"], batch["whole_values"], batch["blocks"]
    assert not torch.equal(values, whole_values)  # some cells are thinned

    def mask(membership: Tensor) -> Tensor:
        keep = torch.zeros(*membership.shape[:-1], N_GENES + 1, dtype=torch.bool)
        for block, genes in enumerate(blocks):
            keep[..., genes] |= (membership[..., block] > 0)[..., None]
        return keep[..., :N_GENES]

    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
    encoder = jepa.target_encoder
    assert isinstance(encoder, GeneTokenEncoder)
    torch.testing.assert_close(output.whole, jepa.encoder(values), **close)
    torch.testing.assert_close(output.target_cell, jepa.target_encoder(whole_values), **close)
    for view in range(2):
        expected = jepa.encoder(values, mask(batch["views"][view]))
        torch.testing.assert_close(output.views[view], expected, **close)
        torch.testing.assert_close(output.predicted_cell[view], jepa.predictor(expected), **close)
        hidden = 1 - batch["views"][view]
        tables = encoder.tables()
        whole = encoder.latents_of(read_dense(tables, whole_values))
        read = read_dense(tables, whole_values, mask(hidden))
        part, mixed = encoder.latents_of(read), encoder.latents_of(read)
        for block in encoder.blocks:
            # The set's latents among those of the whole cell, all in one self-attention.
            mixed = block(torch.cat([mixed, whole], -2))[..., : encoder.n_latents, :]
        assert encoder.linear_path is not None
        expected_set = encoder.head(encoder.norm(mixed).flatten(-2)) + encoder.linear_path(part.flatten(-2))
        torch.testing.assert_close(output.target_sets[view], expected_set, **close)
        predicted = jepa.predictor(output.views[view], jepa.predictor.set_queries(blocks, hidden))
        torch.testing.assert_close(output.predicted_sets[view], predicted, **close)


@torch.no_grad()
def test_target_of_a_set_depends_on_the_rest_of_the_cell(bench: Bench) -> None:
    encoder = bench.module(ObjectiveConfig()).jepa.target_encoder
    batch = bench.dataset[0]
    sets = torch.zeros_like(batch["views"][:1])
    sets[..., 0] = 1
    outside = batch["blocks"][1][0]
    changed = batch["values"].clone()
    changed[:, outside] += 5
    _, before = encoder.targets(batch["values"], batch["blocks"], sets)
    _, after = encoder.targets(changed, batch["blocks"], sets)
    assert (before - after).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_prediction_of_a_hidden_set_sees_no_hidden_value(bench: Bench) -> None:
    jepa = bench.module(ObjectiveConfig()).jepa
    batch = copy.deepcopy(bench.dataset[0])
    before = jepa(batch)
    for cell in range(8):
        hidden = batch["blocks"][batch["views"][0, cell] == 0].flatten()
        for name in ("values", "whole_values"):
            batch[name][cell, hidden[hidden < N_GENES]] += 3.0
    after = jepa(batch)
    torch.testing.assert_close(after.predicted_sets[0], before.predicted_sets[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.predicted_cell[0], before.predicted_cell[0], atol=1e-5, rtol=1e-4)
    assert float((after.target_sets[0] - before.target_sets[0]).abs().max()) > 0.01


def test_target_encoder_starts_as_the_encoder_and_has_no_dropout(bench: Bench) -> None:
    jepa = bench.module(ObjectiveConfig(), model=replace(SIZES, dropout=0.5)).jepa
    assert jepa.training
    assert jepa.encoder.training
    assert not jepa.target_encoder.training
    jepa.start_from_axes(bench.axes, seed=0)
    targets = jepa.target_encoder.state_dict()
    for name, weight in jepa.encoder.state_dict().items():
        assert torch.equal(weight, targets[name]), name


# The loop


@pytest.mark.parametrize("accumulate", [1, 2], ids="accumulate {}".format)
def test_target_encoder_moves_once_per_optimizer_step(
    bench: Bench, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench.module(ObjectiveConfig(), total_steps=8)
    average = [weight.detach().clone() for weight in module.jepa.target_encoder.parameters()]
    update = ema.update_average
    decays: list[float] = []

    def recorded(target: nn.Module, source: nn.Module, decay: float) -> None:
        decays.append(decay)
        for old, new in zip(average, source.parameters(), strict=True):
            old.mul_(decay).add_(new.detach(), alpha=1 - decay)
        update(target, source, decay)

    monkeypatch.setattr(training_module, "update_average", recorded)
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=accumulate)
    with torch.random.fork_rng(devices=[]), runner.quiet_lightning():
        trainer.fit(module, step_loader(bench.dataset))
    steps_per_epoch = -(-3 // accumulate)
    assert trainer.global_step == 2 * steps_per_epoch
    assert decays == pytest.approx([ema.ema_decay(step, 8) for step in range(trainer.global_step)])
    for found, expected in zip(module.jepa.target_encoder.parameters(), average, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def make_trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def test_learning_rate_rises_and_falls() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert learning_rate_factor(0, 1, 0.0) == 1.0


def test_history_has_about_a_hundred_rows_and_the_last_step() -> None:
    recorder = HistoryRecorder(every=3, steps_per_epoch=100, monitor=CollapseMonitor())
    trainer: Any = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5}])])
    for step in range(1, 251):
        module: Any = SimpleNamespace(steps_done=step, total_steps=250, last_terms={}, last_vectors=None)
        recorder.on_train_batch_end(trainer, module, None, None, 0)
    assert [row["step"] for row in recorder.rows] == [*range(3, 250, 3), 250]
    assert [row["epoch"] for row in recorder.rows[32:35]] == [0, 1, 1]


# Collapse


def vectors_on_a_line(generator: torch.Generator) -> Tensor:
    return torch.randn(64, 1, generator=generator) * torch.ones(32)


def test_monitor_warns_once_and_not_in_the_first_quarter(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = CollapseMonitor()
    line = vectors_on_a_line(generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.judge(line, 24, 100)["effective_rank"] == pytest.approx(1.0)
    with pytest.warns(CollapseWarning, match=r"effective rank is 1\.0 of 32.*\(step 25 of 100\)\.\nFix: raise"):
        monitor.judge(line, 25, 100)
    assert not caplog.records  # told once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.judge(line, 26, 100)


def test_monitor_warns_of_cells_that_look_alike(generator: torch.Generator) -> None:
    alike = 5.0 + torch.randn(64, 32, generator=generator)
    with pytest.warns(CollapseWarning, match=r"mean cosine between cells is 0\.9\d, so all cells\s+look alike"):
        CollapseMonitor().judge(alike, 5, 10)


def test_monitor_accepts_cells_that_are_spread(generator: torch.Generator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measures = CollapseMonitor().judge(torch.randn(64, 32, generator=generator), 10, 10)
    assert measures["effective_rank"] > 25
    assert abs(measures["mean_cosine"]) < 0.1


LONG: dict[str, Any] = {"batch_size": 60, "embedding_dim": 64, "dropout": 0.0, "learning_rate": 1e-2}


@pytest.mark.filterwarnings("always::genejepa.errors.CollapseWarning")
def test_a_model_without_diversity_and_information_collapses_and_says_so(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    # Without the linear path: what starts as principal coordinates takes longer to collapse.
    settings = {**tiny_settings, **LONG, "n_axes": 0, "diversity": 0.0, "information": 0.0, "depth": 0.0}
    model = GeneJEPA(adata, **settings)
    with pytest.warns(CollapseWarning, match="(?s)collapsing.*effective rank is.*of 59.*Fix: raise `diversity`"):
        model.train(**{**tiny_training, "max_epochs": 80})
    assert effective_rank(torch.from_numpy(model.get_latent_representation())) < 2.7


def test_a_model_with_defaults_learns_without_collapse(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    model = GeneJEPA(adata, **{**tiny_settings, **LONG, "embedding_dim": 32})
    model.train(**{**tiny_training, "max_epochs": 40})  # any warning is an error
    history = model.history
    assert effective_rank(torch.from_numpy(model.get_latent_representation())) > 8.0
    for term in ("loss", "prediction", "information"):
        assert history[term].tail(5).mean() < history[term].head(5).mean(), term
    assert history["information"].iloc[-1] < -0.1


# The class around the loop


@pytest.fixture
def model(adata: anndata.AnnData, tiny_settings: dict[str, Any]) -> GeneJEPA:
    return GeneJEPA(adata, **tiny_settings)


def test_history_tells_objectives_rate_and_collapse_measures(model: GeneJEPA, tiny_training: dict[str, Any]) -> None:
    model.train(**tiny_training)
    history = model.history
    assert set(history) == {
        "step",
        "epoch",
        "loss",
        "prediction",
        "invariance",
        "depth",
        "information",
        "learning_rate",
        "effective_rank",
        "mean_cosine",
    }
    assert history["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert history["epoch"].tolist() == [0, 0, 0, 1, 1, 1]
    assert np.isfinite(history.to_numpy(dtype=float)).all()
    assert model.record is not None
    assert model.record.steps == 6
    assert not model.record.interrupted
    assert model.record.effective_rank == history["effective_rank"].iloc[-1]


def test_early_stopping_ends_a_training_that_does_not_improve(model: GeneJEPA, tiny_training: dict[str, Any]) -> None:
    options = {**tiny_training, "max_epochs": 12, "learning_rate": 0.0}
    model.train(**options, early_stopping=True, patience=2, train_size=0.5)
    losses = model.history["validation_loss"].dropna().tolist()
    assert len(losses) == 3  # the first is the best, and two more are waited for
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 1  # masks of held-out cells are the same every time
    assert model.record is not None
    assert model.record.steps == 6  # thirty cells in batches of twenty
    assert not model.record.interrupted


def test_early_stopping_lets_an_improving_training_go_on(model: GeneJEPA, tiny_training: dict[str, Any]) -> None:
    model.train(**{**tiny_training, "max_epochs": 6}, early_stopping=True, patience=1, train_size=0.5)
    losses = model.history["validation_loss"].dropna()
    assert len(losses) == 6
    assert losses.is_monotonic_decreasing


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out_of_the_history(
    model: GeneJEPA, tiny_training: dict[str, Any], value: float, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out losses and measures of collapse are not what is trained: 16-bit numbers may overflow in them."""
    monkeypatch.setattr(HeldOutLoss, "_loss", lambda *_: value)
    monkeypatch.setattr("genejepa.train.callbacks.effective_rank", lambda _: value)
    options = {**tiny_training, "max_epochs": 9, "checkpoint_dir": tmp_path / "checkpoint"}
    model.train(**options, early_stopping=True, patience=3)
    assert model.record is not None
    assert model.record.steps == 9  # three epochs without a gain
    model.save(tmp_path / "model")
    history = GeneJEPA.load(tmp_path / "model").history
    assert len(history) == 9
    assert not {"validation_loss", "effective_rank"} & set(history)
    assert history["mean_cosine"].notna().all()


def test_vectors_that_are_not_finite_are_not_judged(generator: torch.Generator) -> None:
    recorder = HistoryRecorder(every=1, steps_per_epoch=1, monitor=CollapseMonitor())
    trainer: Any = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5}])])
    vectors = torch.randn(8, 4, generator=generator)
    vectors[2, 1] = torch.inf
    module: Any = SimpleNamespace(steps_done=1, total_steps=1, last_terms={}, last_vectors=vectors)
    recorder.on_train_batch_end(trainer, module, None, None, 0)
    assert recorder.rows == [{"step": 1.0, "epoch": 0.0, "learning_rate": 0.5}]


def test_validation_does_not_change_the_training(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    def watched(patience: int) -> GeneJEPA:
        model = GeneJEPA(adata, **tiny_settings)
        model.train(**tiny_training, early_stopping=True, patience=patience)
        return model

    assert watched(5).weights_sha256() == watched(50).weights_sha256()


def test_held_out_cells_are_apart_from_training_cells(
    as_panel: Callable[[NDArray[np.float32]], PanelCounts],
) -> None:
    counts = as_panel(np.diag(np.arange(1, 21)).astype(np.float32))  # each cell has a gene of its own
    train, held_out = runner.split_cells(counts, train_size=0.9, seed=0)
    assert (train.n_obs, held_out.n_obs) == (18, 2)
    assert sorted([*train.indices, *held_out.indices]) == list(range(20))
    small = as_panel(np.eye(4, dtype=np.float32))
    assert [part.n_obs for part in runner.split_cells(small, train_size=0.99, seed=0)] == [2, 2]


class Watcher(Callback):
    """Callback that notes the threads in use, and can stop the training as Ctrl-C does."""

    def __init__(self, *, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.steps: list[int] = []
        self.threads: set[int] = set()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        self.threads.add(torch.get_num_threads())
        if trainer.global_step == self.interrupt_at:
            raise KeyboardInterrupt


class ListLogger(Logger):
    """Logger that keeps the names of what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    @property
    def name(self) -> str:
        return "list"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        return

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.names.update(metrics)


def test_callbacks_and_loggers_of_the_user_are_called(
    model: GeneJEPA, tiny_training: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    watcher, logger = Watcher(), ListLogger()
    model.train(**{**tiny_training, "max_epochs": 4}, callbacks=[watcher], logger=logger)
    assert watcher.steps == list(range(1, 13))
    assert {"loss", "prediction", "invariance", "depth", "information"} <= logger.names
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("interrupt_at", [1, 4])
def test_ctrl_c_leaves_a_usable_model(
    model: GeneJEPA, tiny_training: dict[str, Any], interrupt_at: int, tmp_path: Any
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    message = rf"interrupted at step {interrupt_at} of 6; the model is usable\.\nFix: call"
    with pytest.warns(TrainingInterruptedWarning, match=message):
        model.train(**tiny_training, callbacks=[Watcher(interrupt_at=interrupt_at)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert model.is_trained
    assert model.record is not None
    assert model.record.interrupted
    assert model.record.steps == interrupt_at
    vectors = model.get_latent_representation()
    assert np.isfinite(vectors).all()
    model.save(tmp_path / "model")
    loaded = GeneJEPA.load(tmp_path / "model")
    assert loaded.record is not None
    assert loaded.record.interrupted

    model.train(**tiny_training)
    record = model.record
    assert not record.interrupted
    assert not np.array_equal(model.get_latent_representation(), vectors)


def test_weights_that_are_not_numbers_are_reported(model: GeneJEPA, tiny_training: dict[str, Any]) -> None:
    model.train(**tiny_training)
    assert model.jepa is not None
    with torch.no_grad():
        model.jepa.predictor.gene_queries.fill_(torch.nan)
    message = r"(?s)loss is nan \(.*prediction nan.*at step 0 of 6.*Fix: train again with a lower"
    with pytest.raises(TrainingDivergedError, match=message):
        model.train(**tiny_training)


def test_a_diverged_training_can_be_repeated_with_a_lower_rate(model: GeneJEPA, tiny_training: dict[str, Any]) -> None:
    message = r"(?s)the weights are those after step 0.*`learning_rate=1e\+29`"
    with pytest.raises(TrainingDivergedError, match=message):
        model.train(**{**tiny_training, "max_epochs": 10}, learning_rate=1e30)
    assert not model.is_trained
    model.train(**tiny_training, learning_rate=1e-3)
    assert np.isfinite(model.get_latent_representation()).all()


@pytest.mark.parametrize("fails", [False, True], ids=["finishes", "diverges"])
def test_the_process_is_left_as_it_was(
    model: GeneJEPA,
    tiny_training: dict[str, Any],
    fails: bool,
    global_rng_untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    loggers = [logging.getLogger(f"pytorch_lightning{part}") for part in ("", ".utilities.rank_zero")]
    before = (
        torch.get_num_threads(),
        [log.level for log in loggers],
        torch.is_grad_enabled(),
        signal.getsignal(signal.SIGTERM),
        list(warnings.filters),
    )
    watcher = Watcher()
    other = 1 if torch.get_num_threads() > 1 else 2
    options = {**tiny_training, "threads": other, "callbacks": [watcher], "early_stopping": True}
    with global_rng_untouched():
        if fails:
            with pytest.raises(TrainingDivergedError):
                model.train(**{**options, "max_epochs": 10}, learning_rate=1e30)
        else:
            model.train(**options)
    assert watcher.threads == {other}
    after = (
        torch.get_num_threads(),
        [log.level for log in loggers],
        torch.is_grad_enabled(),
        signal.getsignal(signal.SIGTERM),
        list(warnings.filters),
    )
    assert after == before


@pytest.mark.parametrize("home", ["pytorch_lightning", "lightning.pytorch"])
def test_training_tells_no_lightning_notices(
    model: GeneJEPA,
    tiny_training: dict[str, Any],
    home: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The two distributions of Lightning share this variable; the one that was imported last owns it.
    monkeypatch.setattr(rank_zero, "log", logging.getLogger(f"{home}.utilities.rank_zero"))
    with caplog.at_level(logging.INFO):
        model.train(**tiny_training)
    assert [record.getMessage() for record in caplog.records if "lightning" in record.name] == []


def test_automatic_settings_are_recorded(model: GeneJEPA) -> None:
    model.train(max_epochs=1, accelerator="cpu", progress_bar=False)
    assert model.record is not None
    assert model.record.precision in {"32-true", "bf16-mixed"}
    assert 1 <= model.record.threads <= torch.get_num_threads()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "64-true"}, "`precision` is '64-true'"),
        ({"precision": "bf16-true"}, "`precision` is 'bf16-true'"),
        ({"threads": 10**6}, "`threads` is 1000000"),
        ({"callbacks": [3]}, r"`callbacks` is \[3\]"),
        ({"callbacks": None}, "`callbacks` is None"),
        ({"devices": "abc"}, "`devices` is 'abc'"),
        ({"devices": 0}, "`devices` is 0"),
        ({"devices": []}, r"`devices` is \[\]"),
        ({"devices": True}, "`devices` is True"),
        ({"devices": [0, 0]}, r"`devices` is \[0, 0\]"),
        ({"devices": ","}, "`devices` is ','"),
        ({"devices": [0]}, r"`devices` is \[0\], and a CPU has no positions"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything(
    model: GeneJEPA, tiny_training: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{named}.*\nFix: (give|use) "):
        model.train(**{**tiny_training, **options})
    assert model.jepa is None


@pytest.mark.parametrize("kind", ["gpu", "cuda", "mps"])
def test_an_accelerator_that_is_not_there_is_refused(
    model: GeneJEPA, tiny_training: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(DeviceError, match=rf"`accelerator` is '{kind}', .*\nFix: use accelerator='cpu'"):
        model.train(**{**tiny_training, "accelerator": kind})


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(2, 2), ("2", 2), ([1, 0], [1, 0]), ("0,1", [0, 1]), ("1,", [1]), ("auto", 2), (-1, 2), ("-1", 2)],
)
def test_devices_are_a_number_or_positions(
    devices: Any, expected: int | list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_devices(devices, "cuda") == expected
    for missing in (3, "3", [2], "0,2"):
        with pytest.raises(DeviceError, match=r"torch sees 2 of the type 'cuda'\.\nFix: "):
            resolve_devices(missing, "cuda")


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "make_context",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        double_precision,
        torch.no_grad,
        torch.inference_mode,
    ],
    ids=["autocast", "default type", "no gradients", "inference mode"],
)
def test_what_the_caller_has_told_torch_does_not_matter(
    model: GeneJEPA,
    adata: anndata.AnnData,
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
    make_context: Callable[[], AbstractContextManager[Any]],
    tmp_path: Any,
) -> None:
    model.train(**tiny_training)
    weights, vectors = model.weights_sha256(), model.get_latent_representation()
    model.save(tmp_path / "model")
    with make_context():
        same = GeneJEPA(adata, **tiny_settings)
        same.train(**tiny_training)
        for one in (model, same, GeneJEPA.load(tmp_path / "model", adata)):
            assert one.weights_sha256() == weights
            np.testing.assert_array_equal(one.get_latent_representation(), vectors)
    model.train(**tiny_training)
    same.train(**tiny_training)
    assert same.weights_sha256() == model.weights_sha256() != weights


@pytest.mark.filterwarnings("ignore::genejepa.errors.CollapseWarning")
@pytest.mark.parametrize("settings", [{}, {"encoder": "mlp"}, {"thinned_fraction": 0.0}], ids=str)
def test_cells_that_are_all_alike_have_one_vector(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any], settings: dict[str, Any]
) -> None:
    adata.X = np.tile(np.arange(adata.n_vars, dtype=np.float32) % 7, (adata.n_obs, 1))
    model = GeneJEPA(adata, **{**tiny_settings, **settings})
    model.train(**tiny_training)
    assert np.ptp(model.get_latent_representation(), axis=0).max() < 1e-4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_precision_trains_and_embeds_in_32_bits(
    model: GeneJEPA, tiny_training: dict[str, Any], precision: str
) -> None:
    model.train(**{**tiny_training, "precision": precision})
    assert model.record is not None
    assert model.record.precision == precision
    assert model.jepa is not None
    assert {weight.dtype for weight in model.jepa.state_dict().values()} == {torch.float32}
    assert model.get_latent_representation().dtype == np.float32


@pytest.mark.parametrize(
    ("max_epochs", "target_steps", "n_obs", "expected"),
    [(None, 600, 2560, 60), (None, 600, 100, 600), (None, 600, 10_000_000, 1), (7, 600, 10, 7)],
    ids=["2,560 cells", "one batch", "ten million", "given"],
)
def test_number_of_epochs(max_epochs: int | None, target_steps: int, n_obs: int, expected: int) -> None:
    train = TrainConfig(max_epochs=max_epochs, target_steps=target_steps, batch_size=256)
    assert runner.n_epochs(GeneJEPAConfig(train=train), n_obs) == expected


# Settings


def test_numbers_of_numpy_are_numbers() -> None:
    given = GeneJEPAConfig().updated(embedding_dim=np.int64(32), seed=np.uint8(7), information=np.float32(0.5))
    assert given == GeneJEPAConfig().updated(embedding_dim=32, seed=7, information=0.5)
    assert json.loads(json.dumps(given.to_dict())) == given.to_dict()


def test_every_seed_of_63_bits_trains(model: GeneJEPA, tiny_training: dict[str, Any], tmp_path: Any) -> None:
    for seed in (-1, 2**63, 1.0, True, np.True_):
        with pytest.raises(ConfigError, match=r"`seed` is .*\nFix: give a whole number of at least 0 and at most 9223"):
            model.train(**tiny_training, seed=seed)  # type: ignore[arg-type]  # on purpose
    model.train(**tiny_training, seed=2**63 - 1, early_stopping=True, checkpoint_dir=tmp_path / "checkpoint")
    model.save(tmp_path / "model")
    assert GeneJEPA.load(tmp_path / "model").config.train.seed == 2**63 - 1
