"""Names of the AnnData slots that genejepa reads and writes."""

from __future__ import annotations

from typing import Final

OBSM_KEY: Final = "X_genejepa"
"""Default ``obsm`` key of the cell embedding."""

UNS_KEY: Final = "genejepa"
"""``uns`` key of the record of set-up and embedding."""

MODEL_FORMAT_VERSION: Final = 4

MIN_CELLS: Final = 4
"""Cells with counts that a training needs."""

MIN_GENES: Final = 2
"""Genes with counts that a training needs: they are predicted from each other."""
