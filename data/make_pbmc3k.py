"""Derive ``data/pbmc3k.h5ad`` from an assembled copy of the 10x Genomics 3k PBMC counts.

Usage: ``python data/make_pbmc3k.py SOURCE.h5ad [-o data/pbmc3k.h5ad]``. The source holds integer counts in
``X`` and the tutorial cluster names in ``obs["cell_type"]``; ``data/README.md`` says how to assemble it. The
content written is fully determined by the source; the bytes may differ between versions of HDF5 and anndata.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Final

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

SHAPE: Final = (2638, 13713)

SOURCE: Final[dict[str, str]] = {
    "data": "10x Genomics, 3k PBMCs from a healthy donor, Chromium v1 chemistry, 2016",
    "labels": "cell_type: clusters of the Seurat pbmc3k tutorial, named by marker genes (from this RNA)",
    "repository": "rnabioco/clustifyrdata on GitHub",
    "files": "data/pbmc_matrix.rda, data/pbmc_meta.rda",
    "counts": "integer UMI counts, recovered as round(expm1(x) * nCount_RNA / 1e4) from log values",
    "organism": "Homo sapiens",
    "licence": "CC BY 4.0 (10x Genomics); the repository states MIT",
}


def derive(source: anndata.AnnData) -> anndata.AnnData:
    """Keep the counts, the names and the cell types of the source, and nothing else.

    Parameters
    ----------
    source
        2,638 cells x 13,713 genes, with integer counts in ``X`` and ``cell_type`` in ``obs``.

    Returns
    -------
    anndata.AnnData
        The same cells and genes in the same order; ``X`` is CSR float32 with sorted indices.

    Raises
    ------
    ValueError
        If the source has another shape, values that are not counts, or repeated names.
    """
    if source.shape != SHAPE:
        raise ValueError(f"the source has shape {source.shape}, expected {SHAPE}")
    if not (source.obs_names.is_unique and source.var_names.is_unique):
        raise ValueError("cell names or gene names of the source repeat")
    counts = sparse.csr_matrix(source.X, dtype=np.float32, copy=True)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    if (counts.data < 0).any() or (counts.data != np.round(counts.data)).any():
        raise ValueError("X of the source holds values that are not counts")
    labels = source.obs["cell_type"].astype(str)
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(labels, categories=sorted(labels.unique()))},
        index=pd.Index(source.obs_names, name=None),
    )
    var = pd.DataFrame(index=pd.Index(source.var_names, name=None))
    return anndata.AnnData(X=counts, obs=obs, var=var, uns={"source": dict(SOURCE)})


def main() -> None:
    """Write the file and print its SHA-256, which ``genejepa/datasets.py`` and ``data/README.md`` repeat."""
    parser = argparse.ArgumentParser(description="Derive data/pbmc3k.h5ad from the assembled source file.")
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("pbmc3k.h5ad"))
    arguments = parser.parse_args()
    derived = derive(anndata.read_h5ad(arguments.source))
    derived.write_h5ad(arguments.output, compression="gzip", compression_opts=9)
    print(hashlib.sha256(arguments.output.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
