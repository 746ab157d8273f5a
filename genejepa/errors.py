"""Errors and warnings of genejepa.

Every message says what was found, where, what was expected, and ends with a line that starts with ``Fix:``.
"""

from __future__ import annotations

import functools
from typing import Any


class GeneJEPAError(Exception):
    """Base of all errors raised on purpose by genejepa.

    Parameters
    ----------
    problem
        What was found, in which slot, and what was expected.
    fix
        What the user can do about it; printed on a line of its own after ``Fix:``.
    """

    def __init__(self, problem: str, *, fix: str) -> None:
        super().__init__(f"{problem}\nFix: {fix}")
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\nFix: {self.fix}"

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and other processes: the default calls the class without `fix`."""
        return functools.partial(type(self), fix=self.fix), (self.problem,), vars(self)


class DataError(GeneJEPAError, ValueError):
    """The content of an AnnData cannot be used."""


class MissingKeyError(DataError, KeyError):
    """A layer, obs, var, obsm or uns key does not exist."""


class GeneMismatchError(DataError):
    """The genes of an AnnData do not match the genes of a model."""


class NotFittedError(GeneJEPAError, ValueError, AttributeError):
    """A trained model is needed, and this one is not; the bases are those of scikit-learn's error of this name."""


class ModelFileError(GeneJEPAError, ValueError):
    """A model directory or a checkpoint is missing, incomplete, damaged, or not one of genejepa."""


class ModelVersionError(ModelFileError):
    """A model directory or a checkpoint has a format that this version of genejepa does not read."""


class ConfigError(GeneJEPAError, ValueError):
    """A parameter has a value outside its range."""


class MissingPackageError(GeneJEPAError, ImportError):
    """An optional package is needed, and it is not installed."""


class DeviceError(GeneJEPAError, RuntimeError):
    """The device that was asked for is not there."""


class OutOfMemoryError(GeneJEPAError, MemoryError):
    """Memory of the computer or of the GPU did not suffice."""


class OutOfDiskError(GeneJEPAError, OSError):
    """A disk is full, or a quota is used up."""

    def __reduce__(self) -> tuple[Any, ...]:
        """As above, with the number, which an OSError does not keep among its variables."""
        make, arguments, state = super().__reduce__()
        return make, arguments, {**state, "errno": self.errno}


class TrainingDivergedError(GeneJEPAError, RuntimeError):
    """The training loss became NaN or infinite."""


class CollapseWarning(UserWarning):
    """The embedding is losing its dimensions, or all cells look alike."""


class TrainingInterruptedWarning(UserWarning):
    """Training was stopped by the user before its end; the model is usable."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written, or there is little room for it; the training goes on."""


class DataWarning(UserWarning):
    """Data that can be used, but look as if something were wrong with them."""


class ExtrapolationWarning(UserWarning):
    """A prediction is asked for beyond what the data could teach."""
