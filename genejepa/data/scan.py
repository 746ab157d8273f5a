"""One look at every value of a count matrix: what is there that cannot be a count, and what it looks like."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from scipy import sparse

TINY = float(np.finfo(np.float32).tiny)
"""Smallest number that float32, in which counts are kept, tells from zero."""

KINDS = {
    "nan": "NaN",
    "infinite": "infinite value",
    "huge": "value beyond 2^53",
    "negative": "negative value",
    "fractional": "fractional value",
}
"""Kinds of values that are not counts, the worst first, with their names."""

_LARGEST_COUNT = 2.0**53
"""Largest float64 below which every whole number is exact."""

_LARGEST_LOG = 20
"""Logarithms of counts are smaller."""

_NOISE = 1e-4
"""Distance from a whole number that is put down to rounding noise."""

_CONSTANT_SUMS = 1e-3
"""Relative spread of the sums of cells below which they were scaled to one sum."""

_INVERSES: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "log-normalised: log1p of counts": np.expm1,
    "log-normalised: log2(1 + x) of counts": lambda x: np.exp2(x) - 1,
    "transformed: the square root of counts": np.square,
}
"""What values look like that become whole numbers by a function."""

_LARGEST_INVERTED = 5.0
"""Values below this become whole numbers to 1e-3, if they were transformed in float32."""


@dataclass
class Offences:
    """Values of one kind that are not counts: how many in the columns that matter, and the first of them."""

    n: int = 0
    first: str = ""


@dataclass
class Scan:
    """What a pass over all values has found.

    Attributes
    ----------
    offences
        By kind, see ``KINDS``; in the columns that matter, as is all that is not said otherwise.
    n_elsewhere
        Offences in the other columns.
    n_values, n_positive
        Values that are stored, and those of them above zero.
    largest, largest_deviation
        Largest value, and largest distance from a whole number.
    untransformed
        Largest distance from a whole number of the fractional values below 5 after each inverse transform.
    totals
        Sums over all columns of the cells of each block.
    """

    offences: dict[str, Offences] = field(default_factory=lambda: {kind: Offences() for kind in KINDS})
    n_elsewhere: int = 0
    n_values: int = 0
    n_positive: int = 0
    largest: float = 0.0
    largest_deviation: float = 0.0
    untransformed: dict[str, float] = field(default_factory=dict)
    totals: list[NDArray[np.float64]] = field(default_factory=list)

    @property
    def worst(self) -> str | None:
        """The kind of offence to report; None if all values are counts."""
        return next((kind for kind, offences in self.offences.items() if offences.n), None)

    @property
    def has_noise_only(self) -> bool:
        """Whether all values are counts but for rounding noise."""
        return self.worst == "fractional" and self.largest_deviation <= _NOISE

    @property
    def transform(self) -> str | None:
        """The transform that gave the values, if its inverse makes whole numbers of them."""
        return next((name for name, deviation in self.untransformed.items() if deviation < 1e-3), None)

    @property
    def looks_corrected(self) -> bool:
        """Whether most values are whole, as after a correction of counts, and were not transformed."""
        few = 2 * self.offences["fractional"].n < self.n_positive
        return self.worst == "fractional" and few and self.transform is None

    @property
    def cell_totals(self) -> NDArray[np.float64]:
        """Sum of each cell over all columns, (n_obs,)."""
        return np.concatenate([np.empty(0), *self.totals])

    @property
    def common_sum(self) -> float | None:
        """The sum of every cell, if it is the same for all."""
        sums = self.cell_totals[self.cell_totals > 0]
        same = len(sums) > 1 and sums.max() - sums.min() <= _CONSTANT_SUMS * sums.max()
        return float(np.median(sums)) if same else None

    @property
    def looks_like(self) -> str:
        """What values that are not counts look like, in words."""
        if self.worst in ("nan", "infinite", "huge"):
            return "Counts are never missing, infinite or that large."
        if self.worst == "negative":
            if self.offences["fractional"].n:
                return "It looks scaled (z-scored) or otherwise centred."
            return "Counts are never negative: something was subtracted, or an integer type overflowed."
        if self.transform is not None:
            return f"It looks {self.transform}."
        if self.common_sum is not None:
            total = f"{self.common_sum:.4g}"
            return f"It looks normalised without log, as CPM are: the values of every cell add up to {total}."
        if self.largest < _LARGEST_LOG:
            return f"It looks log-normalised (largest value {self.largest:.4g})."
        return f"It looks normalised without log: FPKM, TPM or CPM (largest value {self.largest:.4g})."

    def add(self, block: sparse.csr_matrix, used: NDArray[np.bool_], describe: Callable[[int], str]) -> None:
        """Look at a block of cells; ``describe`` words the value stored at a position of it."""
        values, offending = _offending(block.data)
        matters = used[block.indices]
        for kind, bad in offending.items():
            inside = bad & matters
            offences, n = self.offences[kind], int(np.count_nonzero(inside))
            if n and not offences.n:
                offences.first = describe(int(inside.argmax()))
            offences.n += n
            self.n_elsewhere += int(np.count_nonzero(bad)) - n
        rows = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
        totals = np.bincount(rows, weights=values, minlength=block.shape[0])
        self.totals.append(totals.astype(np.float64, copy=False))
        fractional = values[offending["fractional"] & matters] if "fractional" in offending else values[:0]
        values = values[matters]
        self.n_values += len(values)
        self.n_positive += int(np.count_nonzero(values > TINY))
        self.largest = max(self.largest, float(values.max(initial=0)))
        if len(fractional):
            self.largest_deviation = max(self.largest_deviation, float(_deviation(fractional).max()))
            small = fractional[np.abs(fractional) < _LARGEST_INVERTED].astype(np.float64)
            for name, inverse in _INVERSES.items() if len(small) else ():
                deviation = float(_deviation(inverse(small)).max())
                self.untransformed[name] = max(self.untransformed.get(name, 0.0), deviation)


def _deviation(values: NDArray[Any]) -> NDArray[Any]:
    """Distance from the nearest whole number."""
    distance: NDArray[Any] = np.abs(values - np.rint(values))
    return distance


def _offending(values: NDArray[Any]) -> tuple[NDArray[Any], dict[str, NDArray[np.bool_]]]:
    """Values, with zero for those that cannot be computed with, and which are of each kind of offence."""
    offending = {}
    valid = np.abs(values) <= _LARGEST_COUNT if values.dtype.kind == "f" else values <= _LARGEST_COUNT  # NaN is not
    if not valid.all():
        offending["nan"], offending["infinite"] = np.isnan(values), np.isinf(values)
        offending["huge"] = ~(valid | offending["nan"] | offending["infinite"])
        values = np.where(valid, values, 0)
    if values.dtype.kind not in "bu":
        offending["negative"] = values < 0
    if values.dtype.kind == "f":
        offending["fractional"] = _deviation(values) > 0
    return values, offending
