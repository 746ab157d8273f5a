"""Arithmetic that does not depend on what the caller has told torch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def plain_arithmetic(device: str = "cpu") -> Iterator[None]:
    """Inside the block new tensors are of 32 bits and can be trained, and nothing is computed with fewer bits.

    Whatever the caller has chosen as default type, autocast for this type of device, or inference mode, is as before
    after it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(mode=False), torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)
