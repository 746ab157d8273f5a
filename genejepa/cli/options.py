"""Arguments and options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

READ_TIMEOUT: Final = 600

CellsFile = Annotated[Path, typer.Argument(metavar="CELLS.h5ad", help="Cells with raw counts.")]
Layer = Annotated[str | None, typer.Option(help="Layer with the raw counts.", show_default="X")]
UseRaw = Annotated[bool, typer.Option("--use-raw", help="Take counts and genes from raw.")]
BatchKey = Annotated[
    str | None, typer.Option(help="Column of obs with the batch to correct for, such as the technology.")
]
GeneSymbols = Annotated[str | None, typer.Option(help="Column of var with gene names.", show_default="var_names")]
LabelsKey = Annotated[str | None, typer.Option(help="Column of obs with labels: for probes only.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
ReadTimeout = Annotated[
    int, typer.Option(min=1, max=1_000_000, help="Seconds to wait for a file of cells to open; a damaged one may hang.")
]
