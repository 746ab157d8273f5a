"""Where to train: accelerator, devices, arithmetic and threads, by what was asked for, what is there, and timings."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch

from genejepa.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")

MOST_THREADS = 1024

_ALL_DEVICES = -1

_MIN_GAIN = 1.3
"""More threads, or bfloat16, must be this much faster in the timing, so that noise does not decide."""


def resolve_accelerator(accelerator: str) -> str:
    """Name of the accelerator that ``auto`` stands for here.

    Raises
    ------
    DeviceError
        If a GPU is asked for and torch sees none.
    """
    wants_cuda = accelerator in ("gpu", "cuda")
    if wants_cuda and not torch.cuda.is_available():
        raise DeviceError(
            f"`accelerator` is {accelerator!r}, and torch {torch.__version__} sees no CUDA device.",
            fix="use accelerator='cpu', or install a CUDA build of torch.",
        )
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            f"`accelerator` is 'mps', and torch {torch.__version__} sees no Apple GPU.", fix="use accelerator='cpu'."
        )
    if wants_cuda or (accelerator == "auto" and torch.cuda.is_available()):
        return "cuda"
    # On Apple GPUs small dense products of this size gain nothing over the CPU and lack float64 diagnostics.
    return "cpu" if accelerator == "auto" else accelerator


def resolve_devices(devices: int | list[int] | str, accelerator: str) -> int | list[int]:
    """Number of devices, or their positions.

    Parameters
    ----------
    devices
        A number, a list of positions, either of them as text such as ``"2"`` or ``"0,1"``, or -1 or ``"auto"`` for
        all that there are. Of the CPU only the number of processes can be given.
    accelerator
        As :func:`resolve_accelerator` returns it.

    Raises
    ------
    ConfigError
        If it is something else.
    DeviceError
        If there are not as many.
    """
    chosen = _parsed(devices)
    if accelerator == "cpu":
        if isinstance(chosen, list):
            raise ConfigError(f"`devices` is {devices!r}, and a CPU has no positions.", fix="give devices=1.")
        return 1 if chosen == _ALL_DEVICES else chosen
    n_there = torch.cuda.device_count() if accelerator == "cuda" else 1
    n_wanted = 1 + max(chosen) if isinstance(chosen, list) else chosen
    if n_wanted > n_there:
        raise DeviceError(
            f"`devices` is {devices!r}, and torch sees {n_there} of the type {accelerator!r}.",
            fix="give devices='auto' for all that there are.",
        )
    return n_there if chosen == _ALL_DEVICES else chosen


def _parsed(devices: Any) -> int | list[int]:
    """A positive number or -1, or a list of different positions."""
    found = devices
    if isinstance(devices, str):
        parts = [part.strip() for part in devices.split(",")]
        if parts == ["auto"]:
            return _ALL_DEVICES
        if all(part.removeprefix("-").isdecimal() for part in parts if part):
            positions = [int(part) for part in parts if part]
            found = positions if "," in devices or not positions else positions[0]
    if isinstance(found, int) and not isinstance(found, bool) and (found > 0 or found == _ALL_DEVICES):
        return found
    different = {one for one in found if type(one) is int and one >= 0} if isinstance(found, list) else set()
    if different and len(different) == len(found):
        return list(found)
    raise ConfigError(
        f"`devices` is {devices!r}.",
        fix="give a number of at least 1, a list of positions such as [0, 1], or 'auto' for all that there are.",
    )


def resolve_arithmetic(precision: str, threads: int | None, accelerator: str, *, n_genes: int) -> tuple[str, int]:
    """Precision and threads: what the user asked for, else bfloat16 and threads where a timing favours them."""
    if accelerator == "cuda":
        if precision == "auto":
            precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
        return precision, threads or torch.get_num_threads()
    if accelerator != "cpu":
        return ("32-true" if precision == "auto" else precision), threads or torch.get_num_threads()
    if threads is None:
        most = torch.get_num_threads()
        candidates = sorted({1, max(1, most // 2), most})
        timed = {n: time_product(n_genes, threads=n, dtype=torch.float32) for n in candidates}
        # The fewest threads that are nearly as fast as any: more would only fight other programs for the cores.
        threads = next(n for n in candidates if timed[n] <= _MIN_GAIN * min(timed.values()))
    if precision == "auto":
        plain = time_product(n_genes, threads=threads, dtype=torch.float32)
        half = time_product(n_genes, threads=threads, dtype=torch.bfloat16)
        precision = "bf16-mixed" if plain > _MIN_GAIN * half else "32-true"
    return precision, threads


def time_product(n_genes: int, *, threads: int, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """Mean time in seconds of one read-in product of 256 cells, repeated for about ``seconds``.

    The mean, not the best: threads that wait for a core that another program uses are what a training would meet.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, n_genes, generator=generator).to(dtype)
    right = torch.randn(n_genes, 256, generator=generator).to(dtype)
    with cpu_threads(threads):
        _ = left @ right  # the first call sets up the kernel
        started = time.perf_counter()
        repeats = 0
        while time.perf_counter() - started < seconds:
            _ = left @ right
            repeats += 1
    return (time.perf_counter() - started) / repeats


@contextlib.contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """Use ``n`` threads inside the block, and the caller's number after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
