"""What tests do with a model and with cells in every container, here and in another process.

``python _elsewhere.py TASK`` does the job of the JSON file TASK and prints what came of it, as JSON. Heavy packages are
imported where they are needed: the workers of a training run the top of this file, too.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import anndata
    from numpy.typing import NDArray

    from genejepa.model import GeneJEPA

WAYS = ("class", "functions")
CONTAINERS = ("dense", "csr", "backed h5ad", "zarr")
FIT_ARGUMENTS = ("max_epochs", "seed", "progress_bar")


def hold(cells: anndata.AnnData, container: str, directory: Path) -> anndata.AnnData:
    """Cells, given with a dense matrix, in a container; files go to ``directory``, which may hold others."""
    import anndata
    from scipy import sparse

    adata = anndata.AnnData(obs=cells.obs.copy(), var=cells.var.copy())
    adata._X = cells.X.copy() if container == "dense" else sparse.csr_matrix(cells.X)  # AnnData(...) converts some
    if container in ("dense", "csr"):
        return adata
    path = directory / f"cells{len(list(directory.iterdir()))}"
    if container == "zarr":
        return _lazy(adata, path)
    adata.write_h5ad(path)
    return anndata.read_h5ad(path, backed="r")


def _lazy(adata: anndata.AnnData, path: Path) -> anndata.AnnData:
    """Cells whose matrix is in a zarr store, from where it is read block by block."""
    import anndata
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what anndata will do in its next version
        anndata.io.write_elem(zarr.open_group(path, mode="w"), "X", adata.X)
    matrix = anndata.io.sparse_dataset(zarr.open_group(path, mode="r")["X"])
    return anndata.AnnData(matrix, obs=adata.obs, var=adata.var)


def train(way: str, adata: anndata.AnnData, settings: dict[str, Any], training: dict[str, Any]) -> GeneJEPA:
    """A new model, trained in one of the ways."""
    import genejepa

    if way == "class":
        model = genejepa.GeneJEPA(adata, **settings)
        model.train(**training)
        return model
    arguments = {name: value for name, value in training.items() if name in FIT_ARGUMENTS}
    options = {name: value for name, value in training.items() if name not in FIT_ARGUMENTS}
    return genejepa.fit(adata, **arguments | settings, train_options=options)


def embed(way: str, model: GeneJEPA, adata: anndata.AnnData, **options: Any) -> NDArray[Any]:
    """Vectors of cells in one of the ways."""
    import genejepa

    if way == "class":
        return model.get_latent_representation(adata, **options)
    genejepa.embed(adata, model, **options)
    found: NDArray[Any] = adata.obsm["X_genejepa"]
    return found


def words(way: str, model: GeneJEPA, bad: anndata.AnnData) -> list[str]:
    """What a model says of itself, in its help and of cells that it refuses."""
    import pydoc

    import genejepa

    said = ["nothing"]
    try:
        embed(way, model, bad)
    except genejepa.errors.DataError as error:
        said = [str(error)]
    helped = model if way == "class" else genejepa.embed
    plain = pydoc.plaintext  # type: ignore[attr-defined]  # made at run time
    return [repr(model), str(model), pydoc.render_doc(helped, renderer=plain), *said]


def sha256(array: NDArray[Any]) -> str:
    """Hash of the values of an array."""
    return hashlib.sha256(array.tobytes()).hexdigest()


# Jobs ---------------------------------------------------------------------------------------------------


def use_saved(*, model: str, cells: str, bad: str, containers: list[str], directory: str) -> dict[str, Any]:
    """Load a model, and embed cells in all ways and some containers."""
    import anndata

    import genejepa

    loaded = genejepa.GeneJEPA.load(model)
    found: dict[str, Any] = {"weights": loaded.weights_sha256(), "vectors": {}, "words": {}}
    given, refused = anndata.read_h5ad(cells), anndata.read_h5ad(bad)
    for container in containers:
        for way in WAYS:
            key = f"{way}, {container}"
            found["vectors"][key] = sha256(embed(way, loaded, hold(given, container, Path(directory))))
            found["words"][key] = words(way, loaded, hold(refused, container, Path(directory)))
    return found


def train_and_embed(
    *, cells: str, container: str, model: str, directory: str, settings: dict[str, Any], training: dict[str, Any]
) -> dict[str, Any]:
    """Train on cells in a container and embed them, also by a model that was saved before; changes the threads."""
    import anndata
    import torch

    import genejepa

    adata = hold(anndata.read_h5ad(cells), container, Path(directory))
    trained = train("class", adata, settings, training)
    torch.set_num_threads(training["threads"])
    return {
        "weights": trained.weights_sha256(),
        "vectors": sha256(embed("class", trained, adata)),
        "vectors_by_saved": embed("class", genejepa.GeneJEPA.load(model), adata).tolist(),
        "hash": hash("genejepa"),
    }


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job: Any = {"use_saved": use_saved, "train_and_embed": train_and_embed}[task.pop("job")]
    sys.stdout.write(json.dumps(job(**task)))
