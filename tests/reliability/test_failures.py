"""Memory that runs out, and losses that are not finite: the last good weights, and an error that says what to do."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from genejepa._lightning import Callback
from genejepa.errors import OutOfMemoryError, TrainingDivergedError, TrainingInterruptedWarning
from genejepa.train.module import JEPAModule
from genejepa.train.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor

    from genejepa._lightning import LightningModule, Trainer
    from genejepa.data.loader import Batch
    from genejepa.model import GeneJEPA
    from tests.reliability.conftest import Children

TORCH_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000 bytes. Error code 12 (Cannot allocate memory)"
)
EXHAUSTED = {
    "the processor": RuntimeError(TORCH_MESSAGE),
    "the GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "numpy": MemoryError("Unable to allocate 3.73 GiB for an array"),
}
each_memory = pytest.mark.parametrize("error", list(EXHAUSTED.values()), ids=list(EXHAUSTED))


@pytest.fixture
def limit_cells(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let steps of too many cells, from one step on, find no memory; return the sizes of the steps that were tried."""

    def limit(most: int, error: Exception, *, from_step: int = 0) -> list[int]:
        tried: list[int] = []
        weighted_loss = JEPAModule.weighted_loss

        def limited(module: JEPAModule, batch: Batch) -> Tensor:
            tried.append(len(batch["values"]))
            if tried[-1] > most and module.steps_done >= from_step:
                raise error
            return weighted_loss(module, batch)

        monkeypatch.setattr(JEPAModule, "weighted_loss", limited)
        return tried

    return limit


# Memory


@each_memory
@pytest.mark.parametrize("from_step", [0, 4])
def test_exhausted_memory_names_the_batch_size_and_leaves_the_weights_from_before(
    error: Exception,
    from_step: int,
    limit_cells: Callable[..., list[int]],
    jobs: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = jobs.make_model()
    model.train(max_epochs=1, **jobs.TRAINING)
    before, record = model.weights_sha256(), model.record
    limit_cells(19, error, from_step=from_step)
    with pytest.raises(OutOfMemoryError, match=r"memory has run out while training.*\nFix: lower `batch_size`") as e:
        model.train(max_epochs=3, **jobs.TRAINING)
    assert isinstance(e.value, MemoryError)
    assert model.weights_sha256() == before
    assert model.record is record
    monkeypatch.undo()
    model.train(max_epochs=1, **jobs.TRAINING)
    assert np.isfinite(model.get_latent_representation()).all()


@each_memory
@pytest.mark.parametrize("from_step", [0, 4])
def test_an_automatic_batch_size_ends_with_the_weights_of_a_training_with_that_size(
    error: Exception, from_step: int, limit_cells: Callable[..., list[int]], jobs: ModuleType
) -> None:
    reference = jobs.make_model()
    reference.train(max_epochs=3, batch_size=5, **jobs.TRAINING)
    tried = limit_cells(9, error, from_step=from_step)
    model = jobs.make_model()
    model.train(max_epochs=3, batch_size="auto", **jobs.TRAINING)
    assert list(dict.fromkeys(tried)) == [20, 10, 5]
    assert model.config.train.batch_size == 5
    assert model.weights_sha256() == reference.weights_sha256()


def test_an_automatic_batch_size_does_not_go_below_two_cells(
    limit_cells: Callable[..., list[int]], jobs: ModuleType
) -> None:
    model = jobs.make_model()
    tried = limit_cells(0, RuntimeError(TORCH_MESSAGE))
    with pytest.raises(OutOfMemoryError, match=r"\nFix: "):
        model.train(max_epochs=1, batch_size="auto", **jobs.TRAINING)
    assert tried == [20, 10, 5, 2]
    assert not model.is_trained


def test_memory_that_runs_out_after_a_resume_begins_again_with_half(
    limit_cells: Callable[..., list[int]], jobs: ModuleType, tmp_path: Path
) -> None:
    reference = jobs.make_model()
    reference.train(max_epochs=3, batch_size=10, **jobs.TRAINING)
    options = {"max_epochs": 3, "batch_size": "auto", "checkpoint_dir": tmp_path, **jobs.TRAINING}
    with pytest.warns(TrainingInterruptedWarning):
        jobs.make_model().train(callbacks=[Interrupt(after=4)], **options)
    tried = limit_cells(10, RuntimeError(TORCH_MESSAGE))
    model = jobs.make_model()
    model.train(resume=True, **options)
    assert tried[:2] == [20, 10]
    assert model.weights_sha256() == reference.weights_sha256()
    assert TrainingState.load(tmp_path).step == 18


class Interrupt(Callback):
    """Ctrl-C after a step."""

    def __init__(self, *, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            signal.raise_signal(signal.SIGINT)


def test_other_errors_are_not_taken_for_exhausted_memory(
    limit_cells: Callable[..., list[int]], jobs: ModuleType
) -> None:
    tried = limit_cells(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        jobs.make_model().train(max_epochs=1, batch_size="auto", **jobs.TRAINING)
    assert not isinstance(caught.value, OutOfMemoryError)
    assert len(tried) == 1


@pytest.mark.slow
def test_memory_that_really_runs_out(children: Children, record_figure: Callable[[str, Any], None]) -> None:
    outcomes = {}
    for megabytes in (20, 60, 120, 250, 500, 1500):
        child = children.run("train_in_little_memory", megabytes=megabytes, batch_size=4000, n_obs=4000)
        trained = child.event("trained")
        outcomes[megabytes] = trained["error"]
        assert trained["error"] in (None, "OutOfMemoryError"), trained
        if trained["error"]:
            assert re.search("`(batch_size|n_genes)`", trained["message"])  # the axes are found before the first step
            assert not trained["is_trained"]
    assert set(outcomes.values()) == {None, "OutOfMemoryError"}
    child = children.run("train_in_little_memory", megabytes=250, batch_size="auto", n_obs=4000)
    assert child.event("trained")["error"] is None
    record_figure("outcome by MB of memory left", outcomes)


# Losses that are not finite


class Keeper(Callback):
    """Keeps the weights from before the first step and after every tenth one, and counts the steps that are begun."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.n_begun = 0

    def on_train_batch_start(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self.weights:
            self._keep(pl_module)
        self.n_begun += 1

    def on_train_batch_end(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if cast("JEPAModule", pl_module).steps_done % 10 == 0:
            self._keep(pl_module)

    def _keep(self, pl_module: LightningModule) -> None:
        module = cast("JEPAModule", pl_module)
        weights = module.jepa.state_dict()
        self.weights[module.steps_done] = {name: weight.clone() for name, weight in weights.items()}


def check_weights(model: GeneJEPA, expected: dict[str, Tensor]) -> None:
    assert model.jepa is not None
    assert not model.jepa.training
    weights = model.jepa.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
        assert bool(weight.isfinite().all()), name


def spoil_loss(patch: pytest.MonkeyPatch, value: float, *, at: int) -> None:
    """Add a number to the loss of one step."""
    weighted_loss = JEPAModule.weighted_loss

    def spoiled(module: JEPAModule, batch: Batch) -> Tensor:
        loss = weighted_loss(module, batch)
        return loss + value if module.steps_done == at else loss

    patch.setattr(JEPAModule, "weighted_loss", spoiled)


@pytest.mark.parametrize(
    ("step", "good"), [(0, 0), (1, 0), (19, 0), (20, 10), (29, 10), (35, 20)], ids="step {}".format
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_ends_the_training_in_its_step(
    value: float, step: int, good: int, jobs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_loss(monkeypatch, value, at=step)
    model = jobs.make_model()
    keeper = Keeper()
    message = (
        rf"the training loss is {value} \(.*\) at step {step} of 36, with a learning rate of .*; the weights are those "
        rf"after step {good}\.\nFix: train again with a lower rate, such as `learning_rate=0\.0002`"
    )
    with pytest.raises(TrainingDivergedError, match=message):
        model.train(max_epochs=12, checkpoint_dir=tmp_path, checkpoint_steps=7, callbacks=[keeper], **jobs.TRAINING)
    assert keeper.n_begun == step + 1
    assert model.is_trained is (good > 0)
    if not good:
        assert model.jepa is None  # so that the next training starts as a first one does
    else:
        check_weights(model, keeper.weights[good])
        assert model.record is not None
        assert (model.record.steps, model.record.interrupted) == (good, True)
        assert np.isfinite(model.get_latent_representation()).all()
    if step < 7:
        assert not (tmp_path / "manifest.json").exists()
    else:
        assert TrainingState.load(tmp_path).step == step // 7 * 7


def test_a_gradient_that_is_not_finite_ends_the_training_before_the_weights_change(
    jobs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighted_loss = JEPAModule.weighted_loss

    def spoiled(module: JEPAModule, batch: Batch) -> Tensor:
        loss = weighted_loss(module, batch)
        if module.steps_done == 5:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    model = jobs.make_model()
    model.train(max_epochs=1, **jobs.TRAINING)
    monkeypatch.setattr(JEPAModule, "weighted_loss", spoiled)
    keeper = Keeper()
    with pytest.raises(TrainingDivergedError, match=r"norm of the gradients is nan at step 5 of 9.*\nFix: "):
        model.train(max_epochs=3, callbacks=[keeper], **jobs.TRAINING)
    assert keeper.n_begun == 6
    check_weights(model, keeper.weights[0])


def test_a_model_that_was_trained_is_as_before_if_its_next_training_diverges_at_once(
    jobs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = jobs.make_model()
    model.train(max_epochs=2, **jobs.TRAINING)
    before, record = model.weights_sha256(), model.record
    spoil_loss(monkeypatch, float("nan"), at=3)
    with pytest.raises(TrainingDivergedError, match="the weights are those after step 0"):
        model.train(max_epochs=2, **jobs.TRAINING)
    assert model.weights_sha256() == before
    assert model.record is record


def test_a_training_that_diverges_after_a_resume_goes_back_to_where_it_was_resumed(
    jobs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_epochs": 3, "checkpoint_dir": tmp_path, **jobs.TRAINING}
    model = jobs.make_model()
    with pytest.warns(TrainingInterruptedWarning):
        model.train(callbacks=[Interrupt(after=4)], **options)
    stopped = model.weights_sha256()
    spoil_loss(monkeypatch, float("nan"), at=6)
    for resumed in (model, jobs.make_model()):
        with pytest.raises(TrainingDivergedError, match=r"at step 6 of 9.*the weights are those after step 4"):
            resumed.train(resume=True, **options)
        assert resumed.weights_sha256() == stopped
        assert TrainingState.load(tmp_path).step == 4
    monkeypatch.undo()
    reference = jobs.make_model()
    reference.train(max_epochs=3, **jobs.TRAINING)
    model.train(resume=True, **options)
    assert model.weights_sha256() == reference.weights_sha256()


def test_a_huge_learning_rate_diverges_and_a_lower_one_mends_it(jobs: ModuleType, tmp_path: Path) -> None:
    model = jobs.make_model()
    with pytest.raises(
        TrainingDivergedError, match=r"\nFix: train again with a lower rate, such as `learning_rate=1e\+29`"
    ):
        model.train(max_epochs=10, learning_rate=1e30, checkpoint_dir=tmp_path, **jobs.TRAINING)
    assert not model.is_trained
    other = jobs.make_model()
    for one in (model, other):
        one.train(max_epochs=1, learning_rate=1e-3, checkpoint_dir=tmp_path, **jobs.TRAINING)
    assert np.isfinite(model.get_latent_representation()).all()
    assert model.weights_sha256() == other.weights_sha256()
