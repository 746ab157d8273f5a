"""Rows 35 to 37 and 85 to 101 of the catalogue of bad input: names, slots, batches, labels, keys that are taken."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest

import genejepa
from genejepa.data.counts import check_counts, open_counts
from genejepa.data.setup import batch_codes, register, registration_of
from genejepa.data.slots import CountSlot, obs_column
from genejepa.errors import ConfigError, DataError, DataWarning, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N_OBS, N_VARS = 30, 20


@pytest.fixture
def cells() -> anndata.AnnData:
    counts = np.random.default_rng(0).poisson(3, size=(N_OBS, N_VARS)).astype(np.float32)
    obs = pd.DataFrame({"donor": ["b", "a", "c"] * 10}, index=[f"cell{i}" for i in range(N_OBS)])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(N_VARS)]))


def with_batch(adata: anndata.AnnData, values: Any) -> anndata.AnnData:
    adata.obs["batch"] = values
    return adata


@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_repeated_names_of_cells(corrected: tuple[genejepa.GeneJEPA, anndata.AnnData]) -> None:
    """Row 35: cells are told apart by position; the check warns."""
    model, adata = corrected
    other = adata.copy()
    other.obs_names = ["same"] * 59 + ["other"]
    np.testing.assert_array_equal(
        model.get_latent_representation(other[::-1]), model.get_latent_representation(adata)[::-1]
    )
    report = genejepa.check(other)
    assert report.ok
    assert "58 names of cells are repeated" in str(report)


def test_numbers_as_names_of_genes(cells: anndata.AnnData, tiny_settings: dict[str, Any]) -> None:
    """Row 36: they become text, with a warning, so that they match the same numbers as text."""
    cells.var["entrez"] = np.arange(N_VARS) + 7000
    with pytest.warns(DataWarning, match=r"`var\['entrez'\]` holds names of type int.* the first as '7000'"):
        model = genejepa.GeneJEPA(cells, gene_symbols="entrez", **tiny_settings | {"n_genes": None})
    assert model.genes == [str(number) for number in range(7000, 7000 + N_VARS)]


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA, "", "  "], ids=["nan", "none", "NA", "empty", "blank"])
def test_genes_without_a_name(missing: Any, cells: anndata.AnnData) -> None:
    """Row 37: an error with the positions, in training and in the check."""
    names = np.array(cells.var_names, dtype=object)
    names[[3, 8]] = missing
    cells.var["symbol"] = names
    message = r"`var['symbol']` has 2 missing or blank names among 20, at the positions [3, 8]"
    with pytest.raises(DataError, match=re.escape(message)):
        genejepa.GeneJEPA(cells, gene_symbols="symbol")
    assert message in str(genejepa.check(cells, gene_symbols="symbol"))


def test_missing_layer(cells: anndata.AnnData) -> None:
    """Row 85: the error lists the layers and guesses which was meant."""
    cells.layers["counts"] = cells.X
    cells.layers["spliced"] = cells.X
    message = (
        r"`layers\['count'\]`.* does not exist, found 'counts', 'spliced'; did you mean 'counts'\?\nFix: pass 'counts'"
    )
    with pytest.raises(MissingKeyError, match=message):
        open_counts(cells, CountSlot("count"))
    with pytest.raises(MissingKeyError, match=message):
        register(cells, layer="count")
    with pytest.raises(MissingKeyError, match=r"found 'counts', 'spliced'\.\nFix: pass one of these"):
        register(cells, layer="zzz")


def test_empty_x(cells: anndata.AnnData) -> None:
    """Row 86: the error names where counts are."""
    cells.layers["log"] = np.log1p(cells.X)
    cells.layers["counts"] = cells.X
    cells.X = None
    with pytest.raises(
        DataError, match=r"`X` is empty \(None\).*\nFix: pass layer='counts': `layers\['counts'\]` holds"
    ):
        open_counts(cells, CountSlot())
    with pytest.raises(DataError, match=r"`X` is empty \(None\).*\nFix: pass layer='counts'"):
        open_counts(cells[:5], CountSlot())
    del cells.layers["counts"]
    with pytest.raises(DataError, match=r"`X` is empty \(None\).*\nFix: fill `adata\.X`"):
        open_counts(cells, CountSlot())


def test_file_without_x(cells: anndata.AnnData, tmp_path: Path) -> None:
    """Row 86: the same for a backed file."""
    cells.layers["counts"] = cells.X
    cells.X = None
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for looked_at in (backed, backed[:9]):
        with pytest.raises(DataError, match=r"`X` is empty \(None\).*\nFix: pass layer='counts'"):
            open_counts(looked_at, CountSlot())
    assert genejepa.check(backed, layer="counts").ok
    assert not genejepa.check(backed).ok
    backed.file.close()


def test_raw_is_read_only_if_asked_for(cells: anndata.AnnData) -> None:
    """Row 87: raw may have more genes; it is never read silently."""
    whole = cells.copy()
    cells.raw = cells
    adata = cells[:, 3:9].copy()
    adata.X = np.log1p(adata.X)
    with pytest.raises(DataError, match=r"Fix: pass use_raw=True: `raw\.X` holds counts"):
        check_counts(open_counts(adata, CountSlot()), adata=adata)
    counts = check_counts(open_counts(adata, CountSlot(use_raw=True)), adata=adata)
    np.testing.assert_array_equal(counts.to_csr().toarray(), whole.X)
    assert counts.var.index.tolist() == whole.var_names.tolist()
    view = open_counts(adata[[4, 2], :2], CountSlot(use_raw=True))
    np.testing.assert_array_equal(view.to_csr().toarray(), whole.X[[4, 2]])

    register(adata, use_raw=True)
    assert registration_of(adata).slot == CountSlot(use_raw=True)
    assert genejepa.GeneJEPA(adata, n_genes=None).genes == whole.var_names.tolist()
    with pytest.raises(ConfigError, match=r"`layer` is 'counts' and `use_raw` is True.*\nFix: "):
        register(adata, layer="counts", use_raw=True)
    for missing in (whole, whole[:4]):
        with pytest.raises(MissingKeyError, match=r"`raw` does not exist"):
            open_counts(missing, CountSlot(use_raw=True))
    with pytest.raises(MissingKeyError, match=r"`raw` \(use_raw=True\)"):
        register(whole, use_raw=True)


@pytest.mark.parametrize("argument", ["batch_key", "labels_key"])
def test_missing_column(argument: str, cells: anndata.AnnData) -> None:
    """Row 88: the error lists the columns and guesses which was meant."""
    message = rf"`obs\['donors'\]` \({argument}\) does not exist, found 'donor'; did you mean 'donor'\?"
    with pytest.raises(MissingKeyError, match=message):
        register(cells, **{argument: "donors"})  # type: ignore[arg-type]  # mypy sees a dict of any argument
    with pytest.raises(MissingKeyError, match=r"obs\['donors'\]"):
        obs_column(cells, "donors")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param(["T"] * N_OBS, "found 1 classes: probes need at least 2", id="row 89: one class"),
        pytest.param([*["T"] * 28, "B", "NK"], r"2 classes have one cell only.*'B', 'NK'", id="row 92: single cells"),
    ],
)
def test_labels_are_a_warning(labels: list[str], message: str, cells: anndata.AnnData) -> None:
    cells.obs["kind"] = labels
    report = genejepa.check(cells, labels_key="kind")
    assert report.ok
    assert len([f for f in report.findings if f.level == "warning"]) == 1
    assert message.split(".*")[0] in str(report)
    genejepa.GeneJEPA.setup_anndata(cells, labels_key="kind")
    genejepa.GeneJEPA(cells)


def test_probes_need_two_classes(cells: anndata.AnnData) -> None:
    """Row 89: supervised measures refuse."""
    cells.obs["kind"] = "T"
    cells.obsm["X_genejepa"] = np.random.default_rng(0).normal(size=(N_OBS, 3))
    with pytest.raises(DataError, match="class"):
        genejepa.evaluate.linear_probe(cells, labels_key="kind")


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(["a", None, "b"] * 10, id="row 90: None"),
        pytest.param(pd.Categorical(["a", None, "b"] * 10), id="row 90: category"),
        pytest.param(pd.array([1, pd.NA, 2] * 10, dtype="Int64"), id="row 90: pd.NA"),
        pytest.param(np.array([1, np.nan, 2] * 10), id="row 90: NaN"),
        pytest.param(pd.array([True, pd.NA, False] * 10, dtype="boolean"), id="row 90: boolean"),
    ],
)
def test_cells_without_a_batch(values: Any, cells: anndata.AnnData) -> None:
    with_batch(cells, values)
    message = r"`obs\['batch'\]` has 10 missing values, first for cell 'cell1'; expected a batch for every cell"
    with pytest.raises(DataError, match=message):
        register(cells, batch_key="batch")
    with pytest.raises(DataError, match=message) as caught:
        batch_codes(cells, "batch")
    exec(caught.value.fix, {"adata": cells})
    codes, names = batch_codes(cells, "batch")
    assert len(names) == 3
    assert "unknown" in names
    assert names[codes[1]] == "unknown"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        pytest.param(pd.Categorical(["a", "b", "a"] * 10, categories=list("zbay")), ["a", "b"], id="row 91: unused"),
        pytest.param(np.arange(N_OBS) % 3, ["0", "1", "2"], id="row 93: integers"),
        pytest.param(pd.Categorical(np.arange(N_OBS) % 3 + 9), ["10", "11", "9"], id="row 93: categories of integers"),
        pytest.param(np.arange(N_OBS) % 2 == 0, ["False", "True"], id="row 95: booleans"),
        pytest.param(pd.array(np.arange(N_OBS) % 2 == 0, dtype="boolean"), ["False", "True"], id="row 95: nullable"),
        pytest.param(["", "a", "b"] * 10, ["", "a", "b"], id="row 97: empty text is a batch"),
        pytest.param([b"a", b"b", b"a"] * 10, ["a", "b"], id="row 38: bytes"),
        pytest.param(
            np.arange(N_OBS) % 15, [*map(str, sorted(map(str, range(15))))], id="row 94: half as many as cells"
        ),
    ],
)
def test_batches(values: Any, names: list[str], cells: anndata.AnnData) -> None:
    codes, found = batch_codes(with_batch(cells, values), "batch")
    assert found == names
    assert [found[code] for code in codes] == [v.decode() if isinstance(v, bytes) else str(v) for v in values]
    assert codes.dtype == np.int64


def test_batches_as_floating_point_numbers(cells: anndata.AnnData) -> None:
    """Row 93: taken as categories, with a warning."""
    with pytest.warns(DataWarning, match=r"`obs\['batch'\]` holds floating-point numbers"):
        _, names = batch_codes(with_batch(cells, [0, 1.5, 3.0] * 10), "batch")
    assert names == ["0.0", "1.5", "3.0"]


def test_as_many_batches_as_cells(cells: anndata.AnnData) -> None:
    """Row 94: a measurement, or the name of the cell, is no batch."""
    with_batch(cells, np.random.default_rng(0).normal(size=N_OBS))
    with pytest.raises(DataError, match=r"`obs\['batch'\]` has 30 distinct values in 30 cells.* is this a batch\?"):
        batch_codes(cells, "batch")
    genejepa.GeneJEPA.setup_anndata(cells, batch_key="batch")
    with pytest.raises(DataError, match=r"is this a batch\?"):
        genejepa.GeneJEPA(cells)
    few = with_batch(cells[:19].copy(), [f"b{i}" for i in range(19)])
    assert len(batch_codes(few, "batch")[1]) == 19
    many = with_batch(cells, [f"b{i}" for i in range(N_OBS)])
    assert len(batch_codes(many, "batch", training=False)[1]) == N_OBS


@pytest.mark.parametrize(
    ("values", "types"),
    [
        pytest.param([1, "1", "2"], "int, str", id="row 96: int and str"),
        pytest.param([True, "True", "x"], "bool, str", id="row 96: bool and str"),
        pytest.param([1, True, 0], "bool, int", id="row 96: bool and int"),
        pytest.param([1, 1.0, 2], "float, int", id="row 96: float and int"),
        pytest.param([np.int64(1), np.float32(2), 3], "float, int", id="row 96: numpy types"),
    ],
)
def test_mixed_types(values: list[object], types: str, cells: anndata.AnnData) -> None:
    column = pd.Series(values * 10, dtype=object, index=cells.obs_names)
    with_batch(cells, column)
    for call in (lambda: register(cells, batch_key="batch"), lambda: batch_codes(cells, "batch")):
        with pytest.raises(DataError, match=rf"`obs\['batch'\]` mixes values of the types {types},") as caught:
            call()
    exec(caught.value.fix, {"adata": cells})
    assert len(batch_codes(cells, "batch")[1]) == len({str(v) for v in values})


def test_same_type_in_numpy_and_python(cells: anndata.AnnData) -> None:
    """Row 96: numpy's integers are integers."""
    with_batch(cells, pd.Series([np.int64(1), 1, np.int32(2)] * 10, dtype=object, index=cells.obs_names))
    assert batch_codes(cells, "batch")[1] == ["1", "2"]


@pytest.fixture(scope="module")
def corrected(
    make_adata: Callable[..., anndata.AnnData], tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> tuple[genejepa.GeneJEPA, anndata.AnnData]:
    """A model that corrects for batches, and its cells."""
    adata = make_adata()
    genejepa.GeneJEPA.setup_anndata(adata, batch_key="batch")
    model = genejepa.GeneJEPA(adata, **tiny_settings)
    model.train(**tiny_training)
    return model, adata


@pytest.mark.parametrize("unseen", ["three", "", "0", "False"])
def test_batch_that_the_training_did_not_have(
    unseen: str, corrected: tuple[genejepa.GeneJEPA, anndata.AnnData]
) -> None:
    """Row 97: a warning with the number; also for names that Python takes for false."""
    model, adata = corrected
    other = adata.copy()
    other.obs["batch"] = other.obs["batch"].astype(str).where(np.arange(60) > 6, unseen)
    with pytest.warns(DataWarning, match="7 of 60 cells are of a batch that the training did not have"):
        found = model.get_latent_representation(other)
    np.testing.assert_array_equal(found[7:], model.get_latent_representation(adata)[7:])
    assert np.isfinite(found).all()


@pytest.mark.parametrize("unseen", [0, False])
def test_batches_of_another_type(unseen: object, corrected: tuple[genejepa.GeneJEPA, anndata.AnnData]) -> None:
    """Row 97: all cells of batches 0 or False."""
    model, adata = corrected
    other = adata.copy()
    other.obs["batch"] = unseen
    with pytest.warns(DataWarning, match="60 of 60 cells are of a batch that the training did not have"):
        assert np.isfinite(model.get_latent_representation(other)).all()


def test_batches_are_mapped_by_name(corrected: tuple[genejepa.GeneJEPA, anndata.AnnData]) -> None:
    """Row 98: the order of the categories, and those that do not occur, change nothing."""
    model, adata = corrected
    vectors = model.get_latent_representation(adata)
    other = adata.copy()
    other.obs["batch"] = other.obs["batch"].cat.set_categories(["zero", "two", "one"])
    np.testing.assert_array_equal(model.get_latent_representation(other), vectors)
    np.testing.assert_array_equal(model.get_latent_representation(other[::-1]), vectors[::-1])
    one = other[other.obs["batch"] == "two"].copy()
    np.testing.assert_array_equal(model.get_latent_representation(one), vectors[adata.obs["batch"] == "two"])


def test_column_that_exists_twice(cells: anndata.AnnData) -> None:
    """Row 99: refused where it is asked for, and harmless elsewhere."""
    obs = pd.DataFrame({"donor": cells.obs["donor"], "x": 1})
    obs.columns = pd.Index(["donor", "donor"])
    adata = anndata.AnnData(cells.X, obs=obs, var=cells.var)
    with pytest.raises(DataError, match=r"`obs` has 2 columns named 'donor'") as caught:
        batch_codes(adata, "donor")
    assert genejepa.check(adata).ok
    exec(caught.value.fix, {"adata": adata})
    assert batch_codes(adata, "donor")[1] == ["a", "b", "c"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::anndata.ImplicitModificationWarning")
def test_column_with_a_number_as_its_name(cells: anndata.AnnData) -> None:
    """Row 99: harmless, can be read, and cannot be registered: the record holds text."""
    cells.obs[0] = ["x", "y", "x"] * 10
    assert batch_codes(cells, 0)[1] == ["x", "y"]  # type: ignore[arg-type]
    assert genejepa.check(cells, batch_key="donor").ok
    with pytest.raises(ConfigError, match=r"`batch_key` is 0, of type int.*\nFix: adata\.obs\.columns"):
        register(cells, batch_key=0)  # type: ignore[arg-type]


def test_embedding_key_that_exists(corrected: tuple[genejepa.GeneJEPA, anndata.AnnData]) -> None:
    """Row 100: the own key is replaced in silence, a foreign one with a warning, and others are kept."""
    model, adata = corrected
    other = adata.copy()
    other.obsm["X_pca"] = np.ones((60, 2))
    model.embed(other)
    first = other.obsm["X_genejepa"].copy()
    model.embed(other)
    np.testing.assert_array_equal(other.obsm["X_genejepa"], first)
    model.embed(other, key_added="X_mine")
    assert set(other.obsm) == {"X_pca", "X_genejepa", "X_mine"}
    np.testing.assert_array_equal(other.obsm["X_pca"], np.ones((60, 2)))
    with pytest.warns(DataWarning, match=r"`obsm\['X_pca'\]` was there, not written by genejepa, and is replaced"):
        model.embed(other, key_added="X_pca")
    np.testing.assert_array_equal(other.obsm["X_pca"], first)


def test_embedding_key_in_a_view(corrected: tuple[genejepa.GeneJEPA, anndata.AnnData]) -> None:
    """Row 101: embedding a view leaves the vectors of the whole."""
    model, adata = corrected
    whole = adata.copy()
    model.embed(whole)
    before = whole.obsm["X_genejepa"].copy()
    view = whole[5:9]
    model.embed(view)
    assert view.obsm["X_genejepa"].shape == (4, model.embedding_dim)
    np.testing.assert_array_equal(whole.obsm["X_genejepa"], before)
