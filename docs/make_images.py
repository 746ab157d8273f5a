"""Draw the pictures of the documents: python docs/make_images.py."""

from __future__ import annotations

from pathlib import Path

import genejepa

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Fit the bundled blood cells with the default settings and draw their embedding."""
    adata = genejepa.datasets.pbmc3k()
    genejepa.fit(adata, progress_bar=False)
    title = f"{adata.n_obs:,} blood cells: UMAP of obsm['X_genejepa']"
    ax = genejepa.pl.embedding(adata, color="cell_type", title=title)
    IMAGES.mkdir(exist_ok=True)
    ax.figure.savefig(IMAGES / "pbmc3k.png", dpi=140, metadata={"Software": None})


if __name__ == "__main__":
    main()
