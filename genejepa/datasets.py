"""Data that comes with genejepa and needs no network."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from genejepa.errors import DataError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from anndata import AnnData

__all__ = ["pbmc3k"]

_PBMC3K_FILE: Final = "pbmc3k.h5ad"
_PBMC3K_SHA256: Final = "761621ea8b971026bf26b19e612b55f74a89fd22d9146e029574f3404bc4e6e8"


def pbmc3k() -> AnnData:
    """Read 2,638 peripheral blood mononuclear cells of a healthy human donor.

    The file is part of the package, and its SHA-256 is checked on every call.

    Returns
    -------
    anndata.AnnData
        A new object of 2,638 cells x 13,713 genes.

        ``X`` : (2638, 13713)
            UMI counts as CSR float32, integer values, 1 to 419 where stored.
        ``obs["cell_type"]`` : (2638,)
            Categorical with 9 cell types. They are clusters of the same counts, named by marker genes, so a
            score against them shows agreement with an earlier analysis and not correctness.
        ``uns["source"]``
            Origin, licence and method, as text.

        Genes are named by symbol, cells by barcode.

    Raises
    ------
    DataError
        If the file is missing from the installation or its content has changed.

    Notes
    -----
    Data: 10x Genomics, "3k PBMCs from a Healthy Donor", 2016, licensed under CC BY 4.0. Labels: the Seurat
    pbmc3k tutorial. ``data/README.md`` in the repository gives the whole provenance.

    Examples
    --------
    >>> from genejepa.datasets import pbmc3k
    >>> adata = pbmc3k()
    >>> adata.shape
    (2638, 13713)
    >>> adata.obs["cell_type"].nunique()
    9
    """
    candidates: list[Traversable] = [
        resources.files("genejepa") / "_bundled" / _PBMC3K_FILE,
        # an editable installation or a checkout has the file outside the package
        Path(__file__).resolve().parents[1] / "data" / _PBMC3K_FILE,
    ]
    return _read_verified(candidates, _PBMC3K_SHA256)


def _read_verified(candidates: list[Traversable], sha256: str) -> AnnData:
    """Read the first file that exists, after checking its content.

    Parameters
    ----------
    candidates
        Places where the file can be, in the order of preference.
    sha256
        Expected SHA-256 of the content, 64 lower-case hexadecimal digits.

    Raises
    ------
    DataError
        If there is no file in any of the places, or the first one found has another SHA-256.
    """
    source = next((candidate for candidate in candidates if candidate.is_file()), None)
    if source is None:
        places = " or ".join(str(candidate) for candidate in candidates)
        raise DataError(
            f"The bundled data file was not found; expected {places}.",
            fix="Install genejepa again, or use a complete checkout of its repository.",
        )
    with resources.as_file(source) as path:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise DataError(
                f"{path} is damaged: its SHA-256 is {found}, expected {sha256}.",
                fix="Install genejepa again, or restore the file from the repository.",
            )
        from anndata import read_h5ad

        adata: AnnData = read_h5ad(path)
    return adata
