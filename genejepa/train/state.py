"""The state of a training between two steps: everything needed to go on as if it had not stopped.

Masks, thinning, dropout and the order of the cells are functions of seed and step, and the schedules of the step
alone; so weights, moments of the optimiser, and the step are enough.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor  # noqa: TC002  # the types of the fields are evaluated

from genejepa.bundle import damaged, parse_json, read_bundle, require_own, write_bundle
from genejepa.config import GeneJEPAConfig, check_entries
from genejepa.errors import ConfigError, ModelFileError
from genejepa.persistence import json_to_bytes, tensors_from_bytes, tensors_to_bytes
from genejepa.train.devices import MOST_THREADS, PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch.optim import Optimizer

    from genejepa.data.panel import PanelCounts
    from genejepa.jepa import JEPA

_KIND: Final = "checkpoint"
_VERSION: Final = 1
_STATE, _TENSORS = "state.json", "tensors.safetensors"
_WEIGHTS, _MOMENTS = "jepa.", "optimizer."
_DATA: Final = "data_sha256"
_MOMENT: Final = re.compile(r"optimizer\.\d{1,9}\.\w+")


@dataclass(frozen=True, eq=False)
class TrainingState:
    """A training between two steps.

    Attributes
    ----------
    step, total_steps
        Steps done, and steps of the whole training.
    stopped
        Whether early stopping has ended it; then there is nothing to go on with.
    seconds
        Time that the steps took.
    precision, threads
        Arithmetic and CPU threads, which have to be the same again for the same bits.
    plan
        Settings and data that the training depends on; see :func:`plan_of`.
    rows
        History so far.
    counters
        What callbacks and the loss scaler of 16-bit training have to remember.
    tensors
        Weights of both encoders, predictor and read-out (``jepa.``), moments of the optimiser (``optimizer.``).
    """

    step: int
    total_steps: int
    stopped: bool
    seconds: float
    precision: str
    threads: int
    plan: dict[str, Any]
    rows: list[dict[str, float]]
    counters: dict[str, float]
    tensors: dict[str, Tensor]

    @property
    def is_finished(self) -> bool:
        """Whether no step is left."""
        return self.stopped or self.step >= self.total_steps

    def save(self, directory: Path) -> None:
        """Write a checkpoint; an earlier one is replaced at once."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tensors"}
        files = {_STATE: json_to_bytes(values), _TENSORS: tensors_to_bytes(self.tensors)}
        write_bundle(directory, files, kind=_KIND, version=_VERSION, overwrite=True)

    @classmethod
    def load(cls, directory: Path) -> TrainingState:
        """Read a checkpoint.

        Raises
        ------
        ModelFileError
            If it is not a complete checkpoint of this format, or a byte of it was changed.
        """
        files = read_bundle(directory, kind=_KIND, version=_VERSION)
        path = directory / _STATE
        if set(files) != {_STATE, _TENSORS}:
            raise damaged(directory, f"it holds the files {sorted(files)}")
        tensors = tensors_from_bytes(files[_TENSORS], directory / _TENSORS)
        values = {"tensors": tensors, **parse_json(files[_STATE], path)}
        try:
            check_entries(cls, values)
            state = cls(**values)
            state._check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise damaged(path, f"it is not of a training ({error!r})") from error
        return state

    def _check(self) -> None:
        """Refuse what no training can have left."""
        if GeneJEPAConfig.from_dict(self.plan["settings"]).to_dict() != self.plan["settings"]:
            raise ValueError("its settings are incomplete")
        if not 0 <= self.step <= self.total_steps or self.seconds < 0:
            raise ValueError(f"it has {self.step} of {self.total_steps} steps in {self.seconds} seconds")
        if self.precision == "auto" or self.precision not in PRECISIONS or not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"it has the precision {self.precision!r} and {self.threads} threads")
        if not all("step" in row for row in self.rows):
            raise ValueError("its history has a row without a step")
        if ("held_out_best" in self.counters) != ("held_out_worse" in self.counters):
            raise ValueError("its counters are incomplete")
        if not all(name.startswith(_WEIGHTS) or _MOMENT.fullmatch(name) for name in self.tensors):
            raise ValueError("it holds tensors that are neither weights nor moments")

    def require_plan(self, plan: Mapping[str, Any], *, precision: str = "auto", threads: int | None = None) -> None:
        """Refuse to go on under other settings or on other data.

        Parameters
        ----------
        plan
            As :func:`plan_of` gives it.
        precision, threads
            What was asked for; ``auto`` and None take those of this state.

        Raises
        ------
        ConfigError
            Naming every difference, old and new.
        """
        own = {"precision": self.precision, "threads": self.threads}
        asked = {
            "precision": self.precision if precision == "auto" else precision,
            "threads": self.threads if threads is None else threads,
        }
        before, now = _flat({**self.plan, **own}), _flat({**plan, **asked})
        changes = [
            "the cells, genes or batches are others"
            if name == _DATA
            else f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changes:
            raise ConfigError(
                f"the training cannot be resumed: {'; '.join(changes)}.",
                fix="use the data and settings of the checkpoint, or another `checkpoint_dir` for a new training.",
            )

    def restore(self, jepa: JEPA, optimizer: Optimizer | None = None) -> None:
        """Set weights, and the moments of the optimiser.

        Raises
        ------
        ModelFileError
            If the tensors do not fit the network.
        """
        weights = {name.removeprefix(_WEIGHTS): t for name, t in self.tensors.items() if name.startswith(_WEIGHTS)}
        try:
            jepa.load_state_dict(weights)
            if optimizer is not None:
                moments = self._moments()
                if self.step and not moments and self.precision != "16-mixed":  # whose first steps may be left out
                    raise ValueError("there are no moments")
                _require_shapes(moments, optimizer)
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": moments, "param_groups": groups})
        except (RuntimeError, ValueError) as error:
            raise ModelFileError(
                f"the checkpoint does not fit the network: {error}.", fix="remove the checkpoint, and train again."
            ) from error

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith(_MOMENTS):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor.clone()  # the optimiser changes them in place
        return moments


def _require_shapes(moments: Mapping[int, Mapping[str, Tensor]], optimizer: Optimizer) -> None:
    """Refuse moments that are not those of the weights; an optimiser would take any, and fail in its first step."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, found in moments.items():
        if index >= len(weights):
            raise ValueError(f"there are moments of weight {index}, expected {len(weights)} weights")
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        expected = {"step": (), **dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(weights[index].shape))}
        if shapes != expected:
            raise ValueError(f"the moments of weight {index} have the shapes {shapes}, expected {expected}")


def require_place(directory: Path) -> None:
    """Refuse, before a training, a directory that no checkpoint may be written to.

    Raises
    ------
    FileExistsError
        If it holds something else.
    """
    require_own(directory, kind=_KIND, overwrite=True)


def tensors_of(jepa: JEPA, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Copies of the tensors of :class:`TrainingState`, on the CPU; before the first step there is no optimiser."""
    tensors = {_WEIGHTS + name: tensor for name, tensor in jepa.state_dict().items()}
    for optimizer in optimizers:
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{_MOMENTS}{index}.{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def plan_of(config: GeneJEPAConfig, counts: PanelCounts, **options: object) -> dict[str, Any]:
    """What has to be equal for a training to be the same: settings, options and a hash of the training cells."""
    digest = hashlib.sha256(str(counts.n_genes).encode())
    for array in (counts.indptr, counts.indices, counts.data, counts.batch):
        if array is not None:
            digest.update(array.tobytes())
    return {"settings": config.to_dict(), "options": options, _DATA: digest.hexdigest()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
