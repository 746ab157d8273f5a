"""All methods of the benchmark by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from genejepa.bench import contrastive, linear, ours, scvi

if TYPE_CHECKING:
    from genejepa.bench.interface import Method

METHODS: Final[dict[str, Method]] = {
    method.name: method for module in (linear, scvi, contrastive, ours) for method in module.METHODS
}

HARMONY: Final = "Harmony"
"""The one method that has nothing to do without a batch."""

REFERENCE: Final = "PCA-50 sqrt"
"""The embedding before integration, against which integration is measured."""

DEFAULT_METHODS: Final = ("HVG", "PCA-50 log", REFERENCE, "scVI-10", "genejepa")
"""What a user call compares; with a batch, `HARMONY` too."""
