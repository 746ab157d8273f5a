"""What a user sees when something goes wrong: a message and an exit code, no traceback."""

from __future__ import annotations

import functools
import signal
import warnings
from typing import TYPE_CHECKING, Final, NoReturn, ParamSpec

import typer

from genejepa.errors import (
    CheckpointWarning,
    CollapseWarning,
    DataWarning,
    ExtrapolationWarning,
    GeneJEPAError,
    TrainingInterruptedWarning,
)

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")

EXIT_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 128 + 2
_OF_THE_SYSTEM: Final = "check the path, its permissions, and the room on the disk."
_OF_MEMORY: Final = "use a computer with more memory, or fewer cells at a time."
_OWN: Final = (CheckpointWarning, CollapseWarning, DataWarning, ExtrapolationWarning, TrainingInterruptedWarning)


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
            except BrokenPipeError:
                _end_as_its_reader_has()
            except (GeneJEPAError, MemoryError, OSError) as error:
                fix = _OF_THE_SYSTEM if isinstance(error, OSError) else _OF_MEMORY
                hint = "" if "\nFix:" in str(error) else f"\nFix: {fix}"
                typer.echo(f"Error: {str(error) or 'memory has run out.'}{hint}", err=True)
                raise typer.Exit(EXIT_ERROR) from error
            except KeyboardInterrupt as error:
                raise typer.Exit(EXIT_INTERRUPTED) from error

    return wrapped


def _end_as_its_reader_has() -> NoReturn:
    """End without a word when whoever reads the output has seen enough, by the signal that ends other programs then."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.raise_signal(signal.SIGPIPE)
    raise typer.Exit(EXIT_ERROR)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """Write a warning to stderr, without the line of code if it is one of ours."""
    own = issubclass(category, _OWN)
    text = f"Warning: {message}" if own else warnings.formatwarning(message, category, filename, lineno)
    typer.echo(text.rstrip(), err=True)
