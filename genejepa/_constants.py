"""Names of the AnnData slots that genejepa reads and writes."""

from __future__ import annotations

from typing import Final

OBSM_KEY: Final = "X_genejepa"
"""Default ``obsm`` key of the cell embedding."""

UNS_KEY: Final = "genejepa"
"""``uns`` key of the record of set-up and embedding."""

WEIGHTS_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"
GENES_FILE: Final = "genes.csv"
MODEL_FORMAT_VERSION: Final = 3
