"""Resuming: a training that was stopped and resumed equals, bit for bit, one that was not."""

from __future__ import annotations

import signal
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from genejepa._lightning import Callback
from genejepa.errors import ConfigError, ModelFileError, TrainingInterruptedWarning
from genejepa.model import GeneJEPA
from genejepa.train.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    import anndata
    from torch import Tensor

    from genejepa._lightning import LightningModule, Trainer

Case = tuple[dict[str, Any], dict[str, Any]]
"""Settings of the model, and options of the training."""

# 60 cells in steps of 20, and half of them where cells are held out.
CASES: dict[str, Case] = {
    "dropout and thinning": ({"thinned_fraction": 0.5}, {"max_epochs": 3}),
    "batches": ({"batch_key": "batch"}, {"max_epochs": 3}),
    "bfloat16": ({}, {"max_epochs": 3, "precision": "bf16-mixed"}),
    "held-out cells": ({}, {"max_epochs": 5, "early_stopping": True, "train_size": 0.5}),
    "early stopping": (
        {"learning_rate": 0.0},
        {"max_epochs": 9, "early_stopping": True, "train_size": 0.5, "patience": 3},
    ),
}
N_STEPS = {"dropout and thinning": 9, "batches": 9, "bfloat16": 9, "held-out cells": 10, "early stopping": 8}


class Watcher(Callback):
    """Notes the steps that are done, and stops the training after one of them."""

    def __init__(self, *, stop_after: int | None = None, error: Exception | None = None) -> None:
        self.stop_after, self.error = stop_after, error
        self.steps: list[int] = []

    def on_train_batch_end(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.steps.append(pl_module.steps_done)  # type: ignore[arg-type]  # a number
        if self.steps[-1] == self.stop_after:
            if self.error is not None:
                raise self.error
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def make_model(jobs: ModuleType) -> Callable[..., GeneJEPA]:
    """Make a small model with dropout; equal settings give equal models."""

    def make(*, batch_key: str | None = None, **settings: Any) -> GeneJEPA:
        adata: anndata.AnnData = jobs.make_adata()
        if batch_key is not None:
            adata.obs[batch_key] = pd.Categorical(np.where(np.arange(adata.n_obs) % 3, "one", "two"))
            GeneJEPA.setup_anndata(adata, batch_key=batch_key)
        return GeneJEPA(adata, **{**jobs.SETTINGS, **settings})

    return make


@pytest.fixture
def train(jobs: ModuleType) -> Callable[..., Watcher]:
    """Train with checkpoints, stop where that is asked for, and return what was seen."""

    def run(model: GeneJEPA, directory: Path | None, *, stop_after: int | None = None, **options: Any) -> Watcher:
        watcher = Watcher(stop_after=stop_after)
        arguments = {**jobs.TRAINING, "checkpoint_minutes": None, **options, "checkpoint_dir": directory}
        if stop_after is None:
            model.train(callbacks=[watcher], **arguments)  # a warning would be an error
        else:
            with pytest.warns(TrainingInterruptedWarning, match=rf"at step {stop_after} of .*\nFix: `train\(resume"):
                model.train(callbacks=[watcher], **arguments)
        return watcher

    return run


class Reference:
    """What a training that was not interrupted has left."""

    def __init__(self, model: GeneJEPA, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.weights = model.weights_sha256()
        self.vectors = model.get_latent_representation()
        self.history = model.history


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    return {}


@pytest.fixture
def reference_of(
    references: dict[str, Reference],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    fingerprint: Callable[[Path], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Reference]:
    def reference(name: str) -> Reference:
        if name not in references:
            directory = tmp_path_factory.mktemp("reference")
            settings, options = CASES[name]
            model = make_model(**settings)
            watcher = train(model, directory, **options)
            assert watcher.steps == list(range(1, N_STEPS[name] + 1))
            references[name] = Reference(model, fingerprint(directory))
        return references[name]

    return reference


def cases() -> list[Any]:
    """Every kind of step for one case, and for the others the middle and the end of an epoch."""
    stops = {
        "dropout and thinning": {
            1: "first",
            3: "end of an epoch",
            4: "first of an epoch",
            5: "middle",
            8: "last but one",
        },
        "batches": {5: "middle"},
        "bfloat16": {5: "middle"},
        "held-out cells": {4: "end of an epoch", 5: "middle"},
        "early stopping": {6: "end of an epoch", 7: "middle"},
    }
    return [pytest.param(name, at, id=f"{name}, {step}") for name in stops for at, step in stops[name].items()]


# The same bits


@pytest.mark.parametrize(("case", "stop_after"), cases())
@pytest.mark.parametrize("session", ["same", "other"])
def test_a_stopped_and_resumed_training_equals_one_that_was_not_stopped(
    case: str,
    stop_after: int,
    session: str,
    reference_of: Callable[[str], Reference],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    fingerprint: Callable[[Path], str],
    tmp_path: Path,
) -> None:
    reference = reference_of(case)
    settings, options = CASES[case]
    model = make_model(**settings)
    train(model, tmp_path, stop_after=stop_after, **options)
    assert fingerprint(tmp_path) != reference.fingerprint
    if session == "other":
        model = make_model(**settings)
    watcher = train(model, tmp_path, resume=True, **options)
    assert watcher.steps == list(range(stop_after + 1, N_STEPS[case] + 1))
    assert fingerprint(tmp_path) == reference.fingerprint
    check_equal(model, reference)


def check_equal(model: GeneJEPA, reference: Reference) -> None:
    assert model.weights_sha256() == reference.weights
    np.testing.assert_array_equal(model.get_latent_representation(), reference.vectors)
    pd.testing.assert_frame_equal(model.history, reference.history, check_exact=True)
    assert model.record is not None
    assert not model.record.interrupted


def test_a_training_that_is_stopped_after_every_step_is_the_same(
    reference_of: Callable[[str], Reference],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
) -> None:
    reference = reference_of("dropout and thinning")
    settings, options = CASES["dropout and thinning"]
    model = make_model(**settings)  # no checkpoint: what is needed is in the model
    for step in range(1, N_STEPS["dropout and thinning"]):
        assert train(model, None, stop_after=step, resume=True, **options).steps == [step]
    train(model, None, resume=True, **options)
    check_equal(model, reference)


def test_a_stop_after_the_last_step_leaves_nothing_to_do(
    reference_of: Callable[[str], Reference],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    tmp_path: Path,
) -> None:
    settings, options = CASES["dropout and thinning"]
    model = make_model(**settings)
    train(model, tmp_path, stop_after=9, **options)
    assert train(model, tmp_path, resume=True, **options).steps == []
    check_equal(model, reference_of("dropout and thinning"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 2)])
@pytest.mark.parametrize("stop_after", [3, 5])
def test_workers_do_not_matter(
    before: int,
    after: int,
    stop_after: int,
    reference_of: Callable[[str], Reference],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    tmp_path: Path,
) -> None:
    settings, options = CASES["dropout and thinning"]
    train(make_model(**settings), tmp_path, stop_after=stop_after, num_workers=before, **options)
    model = make_model(**settings)
    train(model, tmp_path, resume=True, num_workers=after, **options)
    check_equal(model, reference_of("dropout and thinning"))


def test_an_error_of_a_callback_costs_only_the_steps_since_the_checkpoint(
    reference_of: Callable[[str], Reference],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    jobs: ModuleType,
    tmp_path: Path,
) -> None:
    settings, options = CASES["dropout and thinning"]
    model = make_model(**settings)
    watcher = Watcher(stop_after=6, error=RuntimeError("mine"))
    with pytest.raises(RuntimeError, match="mine"):
        model.train(
            callbacks=[watcher], checkpoint_dir=tmp_path, checkpoint_steps=2, resume=True, **jobs.TRAINING, **options
        )
    assert train(model, tmp_path, resume=True, **options).steps == [5, 6, 7, 8, 9]
    check_equal(model, reference_of("dropout and thinning"))


# Checkpoints


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"checkpoint_steps": 4}, [4, 8, 9]),
        ({"checkpoint_steps": 3}, [3, 6, 9, 9]),
        ({"checkpoint_minutes": 0.0}, [*range(1, 10), 9]),
        ({"checkpoint_minutes": 60.0}, [9]),
        ({}, [9]),
    ],
    ids=["every 4 steps", "every 3 steps", "at all times", "every hour", "only the last"],
)
def test_checkpoints_are_written_when_it_is_time(
    options: dict[str, Any],
    expected: list[int],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[int] = []
    save = TrainingState.save

    def noted(state: TrainingState, directory: Path) -> None:
        save(state, directory)
        saved.append(TrainingState.load(directory).step)

    monkeypatch.setattr(TrainingState, "save", noted)
    train(make_model(), tmp_path, max_epochs=3, **options)
    assert saved == expected


def test_without_a_checkpoint_a_training_starts(
    reference_of: Callable[[str], Reference],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    tmp_path: Path,
) -> None:
    settings, options = CASES["dropout and thinning"]
    model = make_model(**settings)
    assert train(model, tmp_path / "new", resume=True, **options).steps == list(range(1, 10))
    check_equal(model, reference_of("dropout and thinning"))


@pytest.mark.parametrize("case", ["dropout and thinning", "early stopping"])
def test_a_finished_training_is_not_repeated(
    case: str,
    reference_of: Callable[[str], Reference],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    jobs: ModuleType,
    tmp_path: Path,
) -> None:
    settings, options = CASES[case]
    train(make_model(**settings), tmp_path, **options)
    before = jobs.content_of(tmp_path)
    model = make_model(**settings)
    assert train(model, tmp_path, resume=True, **options).steps == []
    check_equal(model, reference_of(case))
    assert jobs.content_of(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "options", "named"),
    [
        ({}, {"learning_rate": 1e-4}, r"settings\.train\.learning_rate was 0\.002 and is 0\.0001"),
        ({}, {"batch_size": 10}, r"settings\.train\.batch_size was 20 and is 10"),
        ({}, {"seed": 5}, r"settings\.train\.seed was 0 and is 5"),
        ({}, {"max_epochs": 4}, r"settings\.train\.max_epochs was 3 and is 4"),
        ({}, {"early_stopping": True}, r"options\.early_stopping.* was None"),
        ({"embedding_dim": 16}, {}, r"settings\.model\.embedding_dim was 8 and is 16"),
        ({"information": 5.0}, {}, r"settings\.objectives\.information was 10\.0 and is 5\.0"),
        ({"n_blocks": 4, "dim": 8}, {}, r"masks\.n_blocks was 8 and is 4; settings\.model\.dim was 16 and is 8"),
        ({"n_genes": 39, "mask_var": None}, {}, "the cells, genes or batches are others"),
        ({"batch_key": "batch"}, {}, "the cells, genes or batches are others"),
    ],
)
def test_other_settings_or_cells_are_refused(
    settings: dict[str, Any],
    options: dict[str, Any],
    named: str,
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    jobs: ModuleType,
    tmp_path: Path,
) -> None:
    """Row 108: a checkpoint of another configuration; every difference is told, old and new, before the first step."""
    train(make_model(), tmp_path, stop_after=2, max_epochs=3)
    before = jobs.content_of(tmp_path)
    message = rf"the training cannot be resumed: .*{named}(?s:.*)\nFix: use the data and settings of the checkpoint"
    with pytest.raises(ConfigError, match=message):
        train(make_model(**settings), tmp_path, resume=True, **{"max_epochs": 3, **options})
    assert jobs.content_of(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "bf16-mixed"}, "precision was '32-true' and is 'bf16-mixed'"),
        ({"threads": 2}, "threads was 1 and is 2"),
        ({"devices": 2}, "options.n_devices was 1 and is 2"),
        ({"compile": True}, "options.compile was False and is True"),
    ],
)
@pytest.mark.parametrize("stop_after", [2, 3], ids=["stopped", "finished"])
def test_arithmetic_that_would_give_other_bits_is_refused(
    options: dict[str, Any],
    named: str,
    stop_after: int,
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    tmp_path: Path,
) -> None:
    train(make_model(), tmp_path, stop_after=stop_after, max_epochs=1)
    model = make_model()
    with pytest.raises(ConfigError, match=rf"the training cannot be resumed: {named}\.\nFix: "):
        train(model, tmp_path, resume=True, max_epochs=1, **options)
    train(model, tmp_path, resume=True, max_epochs=1, precision="auto", threads=None)
    assert model.record is not None
    assert (model.record.precision, model.record.threads) == ("32-true", 1)


def test_one_changed_count_is_noticed(
    make_model: Callable[..., GeneJEPA], train: Callable[..., Watcher], jobs: ModuleType, tmp_path: Path
) -> None:
    """Row 108: a checkpoint of other cells."""
    model = make_model()
    train(model, tmp_path, stop_after=2, max_epochs=3)
    adata = jobs.make_adata()
    dense = adata.X.toarray()
    dense[5, adata.var_names.get_loc(model.genes[0])] += 1
    adata.X = sparse.csr_matrix(dense)
    changed = GeneJEPA(adata, **jobs.SETTINGS)
    assert changed.genes == model.genes
    with pytest.raises(ConfigError, match="the cells, genes or batches are others"):
        train(changed, tmp_path, resume=True, max_epochs=3)


def test_a_refused_resume_can_be_mended(
    reference_of: Callable[[str], Reference],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    tmp_path: Path,
) -> None:
    settings, options = CASES["dropout and thinning"]
    model = make_model(**settings)
    train(model, tmp_path, stop_after=4, **options)
    with pytest.raises(ConfigError, match="learning_rate"):
        train(model, tmp_path, resume=True, learning_rate=1e-5, **options)
    train(model, tmp_path, resume=True, **options)
    check_equal(model, reference_of("dropout and thinning"))


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "threads that nobody has": {"threads": 10**6},
    "no threads": {"threads": 0},
    "unknown precision": {"precision": "64-true"},
    "open precision": {"precision": "auto"},
    "more steps than there are": {"step": 4},
    "negative step": {"step": -1},
    "another number of steps": {"total_steps": 300},
    "no settings": {"plan": {}},
    "settings of another kind": {"plan": {"settings": [1]}},
    "settings in part": {"plan": {"settings": {}}},
    "text as a counter": {"counters": {"collapse_warned": "q"}},
    "a counter without its partner": {"counters": {"held_out_best": 1.0}},
    "a row without a step": {"rows": [{}]},
    "text in the history": {"rows": [{"step": "1"}]},
    "time that runs backwards": {"seconds": -1.0},
}


@pytest.mark.parametrize("changes", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_checkpoint_that_no_training_can_have_left_is_refused(
    changes: dict[str, Any], make_model: Callable[..., GeneJEPA], train: Callable[..., Watcher], tmp_path: Path
) -> None:
    """Row 105: impossible content under checksums that agree."""
    train(make_model(), tmp_path, stop_after=2, max_epochs=1)
    replace(TrainingState.load(tmp_path), **changes).save(tmp_path)
    with pytest.raises(ModelFileError, match=r"\nFix: "):
        train(make_model(), tmp_path, resume=True, max_epochs=1)


@pytest.mark.parametrize(
    "forge",
    [
        lambda tensors: {"optimizer.0.exp_avg": torch.zeros(3)},
        lambda tensors: {"optimizer.0.exp_avg_sq": tensors["optimizer.0.exp_avg_sq"][:, :-1].contiguous()},
        lambda tensors: {"optimizer.0.step": torch.zeros(2)},
        lambda tensors: {"optimizer.0.more": torch.zeros(2)},
        lambda tensors: {"optimizer.999.exp_avg": torch.zeros(2)},
        lambda tensors: {"optimizer.x.exp_avg": torch.zeros(2)},
        lambda tensors: {"optimizer.0": torch.zeros(2)},
        lambda tensors: {"other": torch.zeros(2)},
        lambda tensors: {"jepa.more": torch.zeros(2)},
        lambda tensors: {next(name for name in tensors if name.startswith("jepa.")): torch.zeros(2)},
    ],
    ids=["moment", "narrow", "step", "unknown moment", "index", "no index", "no name", "kind", "weight", "shape"],
)
def test_tensors_that_do_not_fit_the_network_are_refused(
    forge: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    jobs: ModuleType,
    tmp_path: Path,
) -> None:
    """Row 105: the optimiser itself takes moments of any shape, and its compiled code writes beyond them."""
    train(make_model(), tmp_path, stop_after=2, max_epochs=1)
    state = TrainingState.load(tmp_path)
    replace(state, tensors={**state.tensors, **forge(state.tensors)}).save(tmp_path)
    watcher = Watcher()
    model = make_model()
    with pytest.raises(ModelFileError, match=r"\nFix: "):
        model.train(max_epochs=1, checkpoint_dir=tmp_path, resume=True, callbacks=[watcher], **jobs.TRAINING)
    assert watcher.steps == []


def test_a_checkpoint_without_moments_is_refused(
    make_model: Callable[..., GeneJEPA], train: Callable[..., Watcher], tmp_path: Path
) -> None:
    train(make_model(), tmp_path, stop_after=2, max_epochs=1)
    state = TrainingState.load(tmp_path)
    weights = {name: tensor for name, tensor in state.tensors.items() if name.startswith("jepa.")}
    assert len(weights) < len(state.tensors)
    replace(state, tensors=weights).save(tmp_path)
    with pytest.raises(ModelFileError, match=r"there are no moments\.\nFix: "):
        train(make_model(), tmp_path, resume=True, max_epochs=1)


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
@pytest.mark.parametrize("name", ["manifest.json", "state-*", "tensors-*"])
def test_a_damaged_checkpoint_is_refused(
    damage: str,
    name: str,
    make_model: Callable[..., GeneJEPA],
    train: Callable[..., Watcher],
    tmp_path: Path,
) -> None:
    """Row 105: truncated, changed or incomplete."""
    if (damage, name) == ("missing", "manifest.json"):
        pytest.skip("a directory without a manifest is no checkpoint")
    train(make_model(), tmp_path, stop_after=2, max_epochs=1)
    file = next(tmp_path.glob(name))
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(data) // 2
        file.write_bytes(data[:middle] + (b"" if damage == "truncated" else b"?" + data[middle + 1 :]))
    with pytest.raises(ModelFileError, match=r"cannot be read.*\nFix: "):
        train(make_model(), tmp_path, resume=True, max_epochs=1)


def test_a_model_is_no_checkpoint(
    make_model: Callable[..., GeneJEPA], train: Callable[..., Watcher], jobs: ModuleType, tmp_path: Path
) -> None:
    model = make_model()
    train(model, None, max_epochs=1)
    model.save(tmp_path / "model")
    before = jobs.content_of(tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"holds a model, expected a checkpoint.*\nFix: "):
        train(make_model(), tmp_path / "model", resume=True, max_epochs=1)
    with pytest.raises(FileExistsError, match=r"\nFix: "):
        train(make_model(), tmp_path / "model", max_epochs=1)
    assert jobs.content_of(tmp_path / "model") == before


def test_a_directory_of_others_is_refused_before_the_first_step(
    make_model: Callable[..., GeneJEPA], jobs: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    watcher = Watcher()
    with pytest.raises(FileExistsError, match=r"not of genejepa: it holds 'notes\.txt'.*\nFix: "):
        make_model().train(max_epochs=1, checkpoint_dir=tmp_path, callbacks=[watcher], **jobs.TRAINING)
    assert watcher.steps == []
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_warnings_as_errors_do_not_cost_the_training(
    make_model: Callable[..., GeneJEPA], jobs: ModuleType, fingerprint: Callable[[Path], str], tmp_path: Path
) -> None:
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TrainingInterruptedWarning):
            model.train(max_epochs=3, checkpoint_dir=tmp_path, callbacks=[Watcher(stop_after=5)], **jobs.TRAINING)
    assert model.record is not None
    assert model.record.steps == 5
    assert TrainingState.load(tmp_path).step == 5
    assert np.isfinite(model.get_latent_representation()).all()
