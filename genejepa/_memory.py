"""Recognising that memory has run out: torch says so in three ways."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from genejepa.errors import OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""Name in the message of the plain RuntimeError that torch raises when the memory of the computer is used up."""


@contextlib.contextmanager
def memory_errors(task: str, *, fix: str) -> Iterator[None]:
    """Turn any error of exhausted memory inside the block into :class:`genejepa.errors.OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemoryError) or not _is_about_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), "").rstrip(".")
        raise OutOfMemoryError(f"memory has run out while {task}{reason and f': {reason}'}.", fix=fix) from error


def _is_about_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)
