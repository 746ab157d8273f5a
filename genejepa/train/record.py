"""What a training leaves in the model file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genejepa.config import check_entries
from genejepa.train.runner import Ending

if TYPE_CHECKING:
    from collections.abc import Mapping

    from genejepa.train.runner import RunResult


@dataclass(frozen=True)
class TrainingRecord:
    """How a training went.

    Attributes
    ----------
    n_cells, steps, seconds, precision, threads
        Cells trained on, steps done, time, arithmetic and CPU threads.
    interrupted
        Whether it ended before its last step.
    effective_rank
        Of the last recorded step; see :func:`genejepa.objectives.effective_rank`.
    history
        Recorded values by name, one per recorded step; None where a step has none.
    """

    n_cells: int
    steps: int
    seconds: float
    precision: str
    threads: int
    interrupted: bool
    effective_rank: float
    history: dict[str, list[float | None]]

    @classmethod
    def of(cls, result: RunResult, *, n_cells: int) -> TrainingRecord:
        """Sum up a training."""
        state = result.state
        names = list(dict.fromkeys(name for row in state.rows for name in row))
        return cls(
            n_cells=n_cells,
            steps=state.step,
            seconds=state.seconds,
            precision=state.precision,
            threads=state.threads,
            interrupted=result.ending is not Ending.finished,
            effective_rank=state.rows[-1].get("effective_rank", 0.0) if state.rows else 0.0,
            history={name: [row.get(name) for row in state.rows] for name in names},
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingRecord:
        """Inverse of :func:`dataclasses.asdict`.

        Raises
        ------
        ValueError
            If an entry is missing, unknown or of another type.
        """
        check_entries(cls, values)
        numbers = [values["n_cells"], values["steps"], values["seconds"], values["threads"]]
        columns = list(values["history"].values())
        if min(numbers) < 0 or any(len(column) != len(columns[0]) for column in columns):
            raise ValueError("`training` has negative numbers or a history that is no table")
        return cls(**values)
