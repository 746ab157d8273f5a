"""What a method of the benchmark is: one function that fits on cells and returns another that embeds cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from anndata import AnnData

Embed = Callable[["AnnData"], NDArray[np.float32]]
"""Embeds cells, (n_obs, dim), that have the genes of the fit or some of them, matched by name."""


@dataclass(frozen=True)
class FitOptions:
    """What every method is told besides the cells.

    Attributes
    ----------
    seed
        Of all random choices of the method.
    batch_key
        Column of ``obs`` with the batch to correct for; None for no correction.
    threads
        CPU threads that the method may use.
    """

    seed: int = 0
    batch_key: str | None = None
    threads: int = 1


@dataclass(frozen=True)
class Method:
    """A way to embed cells.

    Attributes
    ----------
    name
        As in the tables.
    fit
        Fits on an AnnData of raw counts (``X``, sparse rows, float32) over the gene panel that all methods share,
        and returns the function that embeds. It does not change the AnnData.
    random
        Whether the result depends on the seed; the others run once.
    new_cells
        Whether cells other than those of the fit can be embedded.
    uses_batch
        Whether ``batch_key`` changes the result.
    """

    name: str
    fit: Callable[[AnnData, FitOptions], Embed]
    random: bool = True
    new_cells: bool = True
    uses_batch: bool = False
