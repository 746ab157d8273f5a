"""What every way to embed must do, in 24 checks, as ``check_estimator`` of scikit-learn asks of estimators.

A check is a function of an :class:`Embedder`: a public way to train and to embed, the class or the two functions, with
cells in one container. Each runs over all of them, where that makes a difference.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import pydoc
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

import genejepa
from genejepa.errors import ConfigError, DataError, DataWarning, GeneMismatchError, NotFittedError
from genejepa.model import GeneJEPA
from tests.reliability._elsewhere import CONTAINERS, WAYS, embed, hold, sha256, train, words
from tests.reliability._strategy import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from anndata import AnnData
    from numpy.typing import NDArray

    Function = Callable[["Embedder"], None]

HERE = Path(__file__).parent
KEY = "X_genejepa"
NOT_ZARR = ("dense", "csr", "backed h5ad")
"""Containers to use with ``python -O``, with which zarr 3 does not work."""


@dataclass(frozen=True)
class Embedder:
    """A public way to train and to embed cells in one container.

    Attributes
    ----------
    cells
        60 cells of 80 genes in a dense matrix, of which all others are made.
    model, vectors
        A model trained on them as CSR through the class, and their vectors; checks change neither.
    elsewhere
        What another process found that loaded the model, see :func:`used_elsewhere`.
    """

    way: str
    container: str
    path: Path
    cells: AnnData
    settings: dict[str, Any]
    training: dict[str, Any]
    model: GeneJEPA
    vectors: NDArray[np.float32]
    elsewhere: dict[str, Any]
    rng_untouched: Callable[[], AbstractContextManager[None]]

    def hold(self, cells: AnnData | None = None) -> AnnData:
        """Cells in the container; None for those of this embedder."""
        return hold(self.cells if cells is None else cells, self.container, self.path)

    def hold_counts(self, counts: NDArray[Any]) -> AnnData:
        """The cells with other counts in the container."""
        cells = self.cells.copy()
        cells._X = counts
        return self.hold(cells)

    def train(self, adata: AnnData, *, settings: dict[str, Any] | None = None, **training: Any) -> GeneJEPA:
        """A new model, trained for two epochs; further settings, or other arguments of the training, can be given."""
        return train(self.way, adata, self.settings | (settings or {}), self.training | training)

    def embed(self, adata: AnnData, model: GeneJEPA | None = None, **options: Any) -> NDArray[np.float32]:
        """Vectors of cells, by default by the trained model."""
        return embed(self.way, self.model if model is None else model, adata, **options)


# The checks ---------------------------------------------------------------------------------------------


class Check(NamedTuple):
    function: Function
    containers: tuple[str, ...]


CHECKS: list[Check] = []


def check(*containers: str) -> Callable[[Function], Function]:
    """Add a function to the checks; it runs over these containers, by default over all."""

    def add(function: Function) -> Function:
        CHECKS.append(Check(function, containers or CONTAINERS))
        return function

    return add


@check()
def check_unfitted(embedder: Embedder) -> None:
    """An untrained model says so and writes nothing."""
    adata = embedder.hold()
    untrained = GeneJEPA(adata, **embedder.settings)
    with pytest.raises(NotFittedError, match=r"not trained\.\nFix: call `model\.train\(\)` first") as caught:
        embedder.embed(adata, untrained)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AttributeError)
    assert KEY not in adata.obsm
    assert not untrained.is_trained


@check()
def check_constructor(embedder: Embedder) -> None:
    """The constructor keeps its settings, draws no random number, makes no network and changes no cell."""
    adata = embedder.hold()
    before = fingerprint(adata)
    with embedder.rng_untouched():
        first, second = (GeneJEPA(adata, **embedder.settings) for _ in range(2))
    assert fingerprint(adata) == before
    assert first.jepa is None
    assert first.config == second.config
    assert first.genes == second.genes == embedder.model.genes
    assert first.adata is adata
    values = first.config.to_dict()
    kept = {name: value for section in values.values() for name, value in section.items()}
    assert {name: kept[name] for name in embedder.settings if name != "n_genes"} == {
        name: value for name, value in embedder.settings.items() if name != "n_genes"
    }


BAD_SETTINGS: dict[str, tuple[object, ...]] = {
    "n_genes": (0, -1, 2.5, "many"),
    "embedding_dim": (0, -3, 1.5, "8", None, True),
    "n_heads": (0, 3),
    "n_layers": (-1,),
    "dropout": (-0.1, 1.0, float("nan"), "0.1"),
    "encoder": ("transformer", None),
    "transform": ("log",),
    "n_blocks": (1,),
    "min_keep": (-0.1, 0.9),
    "min_depth": (0.0,),
    "information": (-1.0, float("inf")),
    "n_slices": (0,),
    "batch_size": (1, "some"),
    "learning_rate": (-1e-3, float("inf")),
    "warmup_fraction": (1.1,),
    "max_epochs": (0, 1.5),
    "seed": (-1, "x"),
}
BAD_TRAINING: dict[str, tuple[object, ...]] = {
    "batch_size": (1, "some"),
    "learning_rate": (-1.0,),
    "max_epochs": (0,),
    "seed": (-1,),
    "accelerator": ("abacus",),
    "precision": ("7-bit",),
    "threads": (0,),
    "num_workers": (-1,),
    "train_size": (0.0, 1.5),
    "patience": (-1,),
    "checkpoint_minutes": (-1.0,),
    "checkpoint_steps": (0,),
}
BAD_EMBEDDING: dict[str, tuple[object, ...]] = {
    "gene_mapping": ("fuzzy",),
    "duplicates": ("first",),
    "min_overlap": (-0.1, 1.1),
}
RANGE = r"\nFix: .*(at least|from .* to|use one of|pass|multiple|swap)"


@check("csr")
def check_bad_parameters(embedder: Embedder) -> None:
    """A parameter outside its range is named with its value and the range."""
    adata = embedder.hold()
    for call, table in (
        (lambda bad: embedder.train(adata, settings=bad), BAD_SETTINGS),
        (lambda bad: embedder.train(adata, early_stopping=True, **bad), BAD_TRAINING),
        (lambda bad: embedder.embed(adata, **bad), BAD_EMBEDDING),
    ):
        for name, value in ((name, value) for name, values in table.items() for value in values):
            with pytest.raises(ConfigError) as caught:
                call({name: value})
            assert re.search(rf"(?s)`{name}`(=| is ){re.escape(repr(value))}.*{RANGE}", str(caught.value))
    with pytest.raises(ConfigError, match=r"`n_layer` is not a setting of genejepa\.\nFix: use one of: .*n_layers"):
        embedder.train(adata, settings={"n_layer": 2})


@check()
def check_no_cells(embedder: Embedder) -> None:
    """Rows 21 and 22: no cells can be embedded, but not trained on."""
    adata = embedder.hold(embedder.cells[:0].copy())
    found = embedder.embed(adata)
    assert found.shape == (0, embedder.model.embedding_dim)
    assert found.dtype == np.float32
    with pytest.raises(DataError, match=r"0 cells"):
        embedder.train(adata)


@check()
def check_no_genes(embedder: Embedder) -> None:
    """Row 23: cells without genes are refused."""
    adata = embedder.hold(embedder.cells[:, :0].copy())
    with pytest.raises(DataError, match=r"0 genes"):
        embedder.train(adata)
    with pytest.raises(GeneMismatchError, match=r"0 of the 40 genes"):
        embedder.embed(adata)


@check()
def check_one_cell(embedder: Embedder) -> None:
    """Row 25: the vector of a cell is that which it has among others, to the last bit."""
    for i in (0, 17, 59):
        found = embedder.embed(embedder.hold(embedder.cells[[i]].copy()))
        np.testing.assert_array_equal(found, embedder.vectors[[i]])


@check()
def check_one_gene(embedder: Embedder) -> None:
    """Row 26: one gene is too few to train on, and to embed by."""
    one = embedder.hold(embedder.cells[:, embedder.model.genes[:1]].copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # it has few counts
        with pytest.raises(DataError, match=r"(?s)1 gene.* at least \d+"):
            embedder.train(one)
        with pytest.raises(GeneMismatchError, match=r"1 of the 40 genes"):
            embedder.embed(one)


def refused(embedder: Embedder, counts: NDArray[Any], message: str) -> None:
    """Training and embedding refuse counts with one message, and write nothing."""
    adata = embedder.hold_counts(counts)
    for use in (embedder.train, embedder.embed):
        with pytest.raises(DataError, match=message):
            use(adata)
    assert KEY not in adata.obsm


def with_value(embedder: Embedder, value: float) -> NDArray[np.float32]:
    """Counts with another value at the last gene of the model."""
    counts: NDArray[np.float32] = embedder.cells.X.copy()
    counts[41, embedder.cells.var_names.get_loc(embedder.model.genes[-1])] = value
    return counts


@check()
def check_not_finite(embedder: Embedder) -> None:
    """Rows 06 to 08: a value that is NaN or infinite is named with its place, and never embedded."""
    gene = embedder.model.genes[-1]
    for value, what in ((np.nan, "NaN"), (np.inf, "infinite value"), (-np.inf, "infinite value")):
        message = rf"`X` holds 1 {what} among .* {value} in cell 'cell41', gene '{gene}'"
        refused(embedder, with_value(embedder, value), message)


@check()
def check_negative(embedder: Embedder) -> None:
    """Row 04: a negative value is named with its place."""
    gene = embedder.model.genes[-1]
    message = rf"`X` holds 1 negative value among .* -1 in cell 'cell41', gene '{gene}'"
    refused(embedder, with_value(embedder, -1), message)


@check("dense", "csr")
def check_no_numbers(embedder: Embedder) -> None:
    """Rows 72 and 73: complex numbers and text are refused, numbers as objects are read with a warning."""
    counts = embedder.cells.X
    refused(embedder, counts.astype(np.complex64), r"`X` has dtype complex64, expected numbers")
    adata = embedder.hold()
    objects, text = (counts.astype(kind) for kind in (object, "U8"))
    if embedder.container == "dense":
        refused(embedder, text, r"`X` has dtype <U8, expected numbers")
        adata._X = objects
    else:
        adata._X.data = adata._X.data.astype(object)
    with pytest.warns(DataWarning, match="`X` holds numbers as Python objects"):
        np.testing.assert_array_equal(embedder.embed(adata), embedder.vectors)
    objects[3, 4] = "three"
    if embedder.container == "dense":
        refused(embedder, objects, r"`X` has dtype object, and its values are not all numbers")


@check()
def check_dtypes(embedder: Embedder) -> None:
    """Rows 68 to 71: the type that counts are stored with changes no bit."""
    dtypes = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"]
    dtypes += ["f2", "g", ">f4", ">i4"] if embedder.container == "dense" else []
    for dtype in dtypes:
        found = embedder.embed(embedder.hold_counts(embedder.cells.X.astype(dtype)))
        np.testing.assert_array_equal(found, embedder.vectors, err_msg=dtype)
    ones = np.minimum(embedder.cells.X, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # ones only are no counts
        found, expected = (embedder.embed(embedder.hold_counts(ones.astype(dtype))) for dtype in (bool, "f4"))
    np.testing.assert_array_equal(found, expected)


@check()
def check_containers(embedder: Embedder) -> None:
    """Rows 54, 55, 62 and 63: every container, and both ways, give the same weights and the same vectors."""
    adata = embedder.hold()
    model = embedder.train(adata)
    assert model.weights_sha256() == embedder.model.weights_sha256()
    np.testing.assert_array_equal(embedder.embed(adata, model), embedder.vectors)
    np.testing.assert_array_equal(model.get_latent_representation(), embedder.vectors)
    np.testing.assert_array_equal(embedder.embed(adata), embedder.vectors)


def give_the_same(embedder: Embedder, matrix: Any) -> None:
    """Train and embed with this very matrix."""
    adata = embedder.hold()
    adata._X = matrix
    assert embedder.train(adata).weights_sha256() == embedder.model.weights_sha256()
    np.testing.assert_array_equal(embedder.embed(adata), embedder.vectors)
    assert adata.X is matrix


@check("dense", "csr")
def check_read_only(embedder: Embedder) -> None:
    """Row 77: arrays that cannot be written to, in memory and in a file, are as good as others."""
    matrix = embedder.hold().X
    arrays = [matrix.data, matrix.indices, matrix.indptr] if embedder.container == "csr" else [matrix]
    for array in arrays:
        array.setflags(write=False)
    give_the_same(embedder, matrix)
    mapped = []
    for i, array in enumerate(arrays):
        array.tofile(embedder.path / f"{i}.bin")
        mapped.append(np.memmap(embedder.path / f"{i}.bin", dtype=array.dtype, mode="r", shape=array.shape))
    if embedder.container == "csr":
        matrix.data, matrix.indices, matrix.indptr = mapped
    give_the_same(embedder, matrix if embedder.container == "csr" else mapped[0])


@check("dense")
def check_memory_layout(embedder: Embedder) -> None:
    """Row 54: columns first, strides and negative strides change no bit."""
    counts = embedder.cells.X
    wide = np.full((2 * counts.shape[0], 3 * counts.shape[1]), -1, dtype=np.float32)
    wide[::-2, ::3] = counts
    for matrix in (np.asfortranarray(counts), wide[::-2, ::3]):
        give_the_same(embedder, matrix)


@check()
def check_input_is_unchanged(embedder: Embedder) -> None:
    """Only what is documented is added to the cells."""
    adata = embedder.hold()
    adata.uns["mine"] = {"colours": ["red"]}
    before = fingerprint(adata)
    model = embedder.train(adata)
    embedder.embed(adata, model)
    after = fingerprint(adata)
    added = set() if embedder.way == "class" else {f"obsm[{KEY!r}]", "uns['genejepa']"}
    assert set(after) - set(before) == added
    assert {slot: after[slot] for slot in before} == before
    model.get_latent_representation()
    model.gene_report(adata)
    genejepa.check(adata, model=model)
    assert fingerprint(adata) == after


@check("csr", "backed h5ad")
def check_random_state_is_unchanged(embedder: Embedder) -> None:
    """No call draws from, or seeds, a generator of the user."""
    with embedder.rng_untouched():
        adata = embedder.hold()
        GeneJEPA.setup_anndata(adata, labels_key="cell_type")
        model = embedder.train(adata)
        embedder.embed(adata, model)
        model.save(embedder.path / "model")
        embedder.embed(adata, GeneJEPA.load(embedder.path / "model"))


@check()
def check_order_of_cells(embedder: Embedder) -> None:
    """A permutation of the cells permutes the vectors, to the last bit, also through a view."""
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(embedder.embed(embedder.hold(embedder.cells[order].copy())), embedder.vectors[order])
    if embedder.way == "class" or embedder.container != "backed h5ad":  # results are not written to a view of a file
        np.testing.assert_array_equal(embedder.embed(embedder.hold()[order]), embedder.vectors[order])


@check()
def check_order_of_genes(embedder: Embedder) -> None:
    """Rows 48 and 49: the order of the genes, and further genes, change no bit."""
    order = np.random.default_rng(0).permutation(80)
    only_panel = np.isin(embedder.cells.var_names, embedder.model.genes)
    for genes in (order, order[only_panel[order]]):
        np.testing.assert_array_equal(embedder.embed(embedder.hold(embedder.cells[:, genes].copy())), embedder.vectors)


@check("csr")
def check_batches_and_threads(embedder: Embedder) -> None:
    """Which cells are embedded together changes no bit; threads change 1e-5 at most. Workers: test_determinism.py."""
    for size in (1, 2, 7, 32, 59):
        chunks = np.split(np.arange(60), range(size, 60, size))
        parts = [embedder.embed(embedder.hold(embedder.cells[chunk].copy())) for chunk in chunks[:9]]
        np.testing.assert_array_equal(np.concatenate(parts), embedder.vectors[: sum(map(len, chunks[:9]))])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            np.testing.assert_allclose(embedder.embed(embedder.hold()), embedder.vectors, rtol=0, atol=1e-5)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@check("csr")
def check_fit_twice(embedder: Embedder) -> None:
    """A second new model on the same cells is the first; a second training of one model goes on."""
    adata = embedder.hold()
    first, second = (embedder.train(adata) for _ in range(2))
    assert first.weights_sha256() == second.weights_sha256() == embedder.model.weights_sha256()
    second.train(**embedder.training)
    assert second.weights_sha256() != first.weights_sha256()
    assert np.isfinite(embedder.embed(adata, second)).all()


@check(*NOT_ZARR)
def check_another_process(embedder: Embedder) -> None:
    """A saved model gives the same bits in a process that loads it from another place, where it cannot write."""
    assert embedder.elsewhere["weights"] == embedder.model.weights_sha256()
    assert embedder.elsewhere["vectors"][f"{embedder.way}, {embedder.container}"] == sha256(embedder.vectors)


@check("dense", "csr", "zarr")
def check_copies(embedder: Embedder) -> None:
    """Copies of the object in memory, also by pickle, are as good as the model; anndata can copy no backed cells."""
    adata = embedder.hold()
    for model in (GeneJEPA(adata, **embedder.settings), embedder.train(adata)):
        for twin in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.genes == model.genes
            assert twin.is_trained == model.is_trained
            if not twin.is_trained:
                twin.train(**embedder.training)
            assert twin.weights_sha256() == embedder.model.weights_sha256()
            np.testing.assert_array_equal(embedder.embed(adata, twin), embedder.vectors)
            np.testing.assert_array_equal(twin.get_latent_representation(), embedder.vectors)


@check()
def check_output(embedder: Embedder) -> None:
    """Vectors are finite, float32, by rows, in the order of the cells, and belong to the caller."""
    adata = embedder.hold()
    found = embedder.embed(adata)
    assert type(found) is np.ndarray
    assert found.dtype == np.float32
    assert found.shape == (60, embedder.model.embedding_dim)
    assert found.flags.c_contiguous
    assert found.flags.owndata
    assert found.flags.writeable
    assert np.isfinite(found).all()
    assert len(np.unique(found, axis=0)) == 60
    found[:] = 7.0
    np.testing.assert_array_equal(embedder.embed(adata), embedder.vectors)
    if embedder.way == "class":
        for indices in ([5, 3, 59, 3], np.arange(10, 20), [7], []):
            wanted = np.array(indices, dtype=int)
            np.testing.assert_array_equal(embedder.embed(adata, indices=indices), embedder.vectors[wanted])
    assert embedder.model.weights_sha256() == embedder.elsewhere["weights"]


@check(*NOT_ZARR)
def check_words(embedder: Embedder) -> None:
    """Text, help and refusals of a model are the same with ``python -O -W error`` as here."""
    bad = embedder.hold_counts(with_value(embedder, np.nan))
    said = words(embedder.way, embedder.model, bad)
    assert said == embedder.elsewhere["words"][f"{embedder.way}, {embedder.container}"]
    name, text, helped, refusal = said
    assert name == text
    assert re.fullmatch(r"GeneJEPA\(40 genes -> 8, trained on 60 cells in \d+ s\)", text)
    assert "Parameters" in helped
    assert "`X` holds 1 NaN" in refusal
    untrained = GeneJEPA(embedder.hold(), **embedder.settings)
    assert repr(untrained) == str(untrained) == "GeneJEPA(40 genes -> 8, not trained)"
    assert "Parameters" in pydoc.render_doc(untrained)


# What they are run on ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(
    make_adata: Callable[..., AnnData],
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Embedder:
    """The class, with cells in a CSR matrix; others are made of it."""
    adata = make_adata()
    model = GeneJEPA(adata, **tiny_settings)
    model.train(**tiny_training)
    cells = adata.copy()
    cells.X = adata.X.toarray()
    made = Embedder(
        way="class",
        container="csr",
        path=tmp_path_factory.mktemp("elsewhere"),
        cells=cells,
        settings=tiny_settings,
        training=tiny_training,
        model=model,
        vectors=model.get_latent_representation(adata),
        elsewhere={},
        rng_untouched=contextlib.nullcontext,
    )
    return replace(made, elsewhere=used_elsewhere(made))


def used_elsewhere(embedder: Embedder) -> dict[str, Any]:
    """What ``python -O -W error`` finds when it loads the model from another place, where it cannot write."""
    path = embedder.path
    embedder.model.save(path / "saved")
    (path / "saved").rename(path / "moved")
    (path / "work").mkdir()
    embedder.cells.write_h5ad(path / "cells.h5ad")
    bad = embedder.cells.copy()
    bad.X = with_value(embedder, np.nan)
    bad.write_h5ad(path / "bad.h5ad")
    places = {"model": "moved", "cells": "cells.h5ad", "bad": "bad.h5ad", "directory": "work"}
    task = {"job": "use_saved", "containers": NOT_ZARR} | {name: str(path / place) for name, place in places.items()}
    (path / "task.json").write_text(json.dumps(task), encoding="utf-8")
    (path / "moved").chmod(0o555)
    command = [sys.executable, "-O", "-W", "error", str(HERE / "_elsewhere.py"), str(path / "task.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    (path / "moved").chmod(0o755)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("function", "way", "container"),
    [
        pytest.param(function, way, container, id=f"{number:02d} {function.__name__}: {way}, {container}")
        for number, (function, containers) in enumerate(CHECKS, start=1)
        for container in containers
        for way in WAYS
    ],
)
def test_embedder(
    function: Function,
    way: str,
    container: str,
    embedder: Embedder,
    global_rng_untouched: Callable[[], AbstractContextManager[None]],
    tmp_path: Path,
) -> None:
    function(replace(embedder, way=way, container=container, path=tmp_path, rng_untouched=global_rng_untouched))


def test_there_are_24_checks(record_figure: Callable[[str, Any], None]) -> None:
    """All checks of this file run, and each says what it checks."""
    record_figure("checks", len(CHECKS))
    defined = [value for name, value in globals().items() if name.startswith("check_")]
    assert [function for function, _ in CHECKS] == defined
    assert len(CHECKS) == len(set(defined)) == 24
    assert all(function.__doc__ for function in defined)
