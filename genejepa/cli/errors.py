"""What a user sees when something goes wrong: a message and an exit code, no traceback."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Final, ParamSpec

import typer

from genejepa.errors import (
    CheckpointWarning,
    CollapseWarning,
    DataWarning,
    GeneJEPAError,
    TrainingInterruptedWarning,
)

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")

EXIT_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 128 + 2
_OF_THE_SYSTEM: Final = "check the path, its permissions, and the room on the disk."
_OWN: Final = (CheckpointWarning, DataWarning, TrainingInterruptedWarning)


def plain_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors that a user can mend into a message on stderr and exit code 2, and Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            for category in _OWN:
                warnings.simplefilter("always", category)  # told, not raised, whatever the interpreter was asked for
            try:
                command(*args, **kwargs)
            except (GeneJEPAError, OSError) as error:
                hint = "" if "\nFix:" in str(error) else f"\nFix: {_OF_THE_SYSTEM}"
                typer.echo(f"Error: {error}{hint}", err=True)
                raise typer.Exit(EXIT_ERROR) from error
            except KeyboardInterrupt as error:
                raise typer.Exit(EXIT_INTERRUPTED) from error

    return wrapped


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """Write a warning to stderr, without the line of code if it is one of ours."""
    if issubclass(category, CollapseWarning):
        return  # the monitor logs it as well, and the log goes to stderr
    own = issubclass(category, _OWN)
    text = f"Warning: {message}" if own else warnings.formatwarning(message, category, filename, lineno)
    typer.echo(text.rstrip(), err=True)
