"""The state of a training between two steps: everything needed to go on as if it had not stopped.

Masks, thinning, dropout and the order of the cells are functions of seed and step, and the schedules of the step
alone; so weights, moments of the optimiser, and the step are enough.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from genejepa.bundle import damaged, parse_json, read_bundle, require_own, write_bundle
from genejepa.errors import ConfigError, ModelFileError
from genejepa.persistence import json_to_bytes, tensors_from_bytes, tensors_to_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.optim import Optimizer

    from genejepa.config import GeneJEPAConfig
    from genejepa.data.panel import PanelCounts
    from genejepa.jepa import JEPA

_KIND: Final = "checkpoint"
_VERSION: Final = 1
_STATE, _TENSORS = "state.json", "tensors.safetensors"
_WEIGHTS, _MOMENTS = "jepa.", "optimizer."


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
        values = parse_json(files[_STATE], path)
        kinds = {"int": int, "float": float, "bool": bool, "str": str}
        for field in fields(cls):
            if field.name != "tensors":
                kind = kinds.get(str(field.type), list if field.name == "rows" else dict)
                if type(values.get(field.name)) is not kind:
                    raise damaged(path, f"its entry {field.name!r} is {str(values.get(field.name))[:40]!r}")
        if len(values) != len(fields(cls)) - 1 or not all(isinstance(row, dict) for row in values["rows"]):
            raise damaged(path, "its entries are not those of a checkpoint")
        return cls(**values, tensors=tensors_from_bytes(files[_TENSORS], directory / _TENSORS))

    def require_plan(self, plan: Mapping[str, Any]) -> None:
        """Refuse to go on under other settings or on other data.

        Raises
        ------
        ConfigError
            Naming every difference, old and new.
        """
        before, now = _flat(self.plan), _flat(plan)
        changes = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
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
        except RuntimeError as error:
            raise ModelFileError(
                f"the checkpoint does not fit the network: {error}.", fix="remove the checkpoint, and train again."
            ) from error
        if optimizer is not None:
            optimizer.load_state_dict(
                {"state": self._moments(), "param_groups": optimizer.state_dict()["param_groups"]}
            )

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith(_MOMENTS):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor.clone()  # the optimiser changes them in place
        return moments


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
    return {"settings": config.to_dict(), "options": options, "data_sha256": digest.hexdigest()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
