from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

import genejepa
from genejepa import checks
from genejepa.checks import CheckReport, Finding
from genejepa.errors import ConfigError, DataError, DataWarning

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    import anndata


@pytest.fixture
def ruined(adata: anndata.AnnData) -> anndata.AnnData:
    """Cells with one mistake of nearly every kind."""
    values = adata.X.toarray()
    values[4, 7] = np.nan
    adata.X = values
    adata.layers["counts"] = np.nan_to_num(values)
    adata.obs["batch"] = [1, "1"] * 30
    adata.obs["cell_type"] = ["alpha"] * 59 + ["beta"]
    adata.var["symbol"] = ["TBCE"] * 2 + [f"S{i}" for i in range(78)]
    return adata


def levels(report: CheckReport) -> list[str]:
    return [finding.level for finding in report.findings]


def messages(report: CheckReport, level: str) -> str:
    return "\n".join(finding.message for finding in report.findings if finding.level == level)


def test_good_cells(adata: anndata.AnnData) -> None:
    report = genejepa.check(adata, batch_key="batch", labels_key="cell_type")
    assert report.ok
    assert set(levels(report)) == {"info"}
    text = str(report)
    for expected in (
        "60 cells, 80 genes",
        "raw counts are in X, of X",
        "2 batches of 30 to 30 cells",
        "3 classes, 0 cells without a label",
    ):
        assert expected in text
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    assert f"raw counts, {totals.min():,.0f} to {totals.max():,.0f} in a cell" in text
    assert text.endswith("no errors, no warnings.")


def test_everything_is_found_at_once(ruined: anndata.AnnData) -> None:
    report = genejepa.check(ruined, batch_key="batch", labels_key="cell_type", gene_symbols="symbol")
    assert not report.ok
    assert levels(report) == sorted(levels(report), key=["error", "warning", "info"].index)
    errors, warned = messages(report, "error"), messages(report, "warning")
    assert "`X` holds 1 NaN" in errors
    assert "`obs['batch']` mixes values of the types int, str" in errors
    assert "1 names are repeated; a training that chooses such a gene is refused: 'TBCE' x2" in warned
    assert "1 classes have one cell only" in warned
    assert "raw counts are in layers['counts'], of layers['counts'], X" in messages(report, "info")
    text = str(report)
    assert "Fix: pass layer='counts': `layers['counts']` holds counts." in text
    assert text.splitlines()[0].startswith("error    X: ")
    assert text.endswith("2 errors, 2 warnings.")
    html = report._repr_html_()
    assert html.count("<tr>") == len(report.findings) + 1
    assert "2 errors, 2 warnings." in html


def test_nothing_is_changed(
    ruined: anndata.AnnData, global_rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    before = ruined.copy()
    with global_rng_untouched():
        genejepa.check(ruined, batch_key="batch", labels_key="cell_type", gene_symbols="symbol")
    pd.testing.assert_frame_equal(ruined.obs, before.obs)
    pd.testing.assert_frame_equal(ruined.var, before.var)
    np.testing.assert_array_equal(ruined.X, before.X)
    assert ruined.uns == before.uns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "umi"}, "`layers['umi']` does not exist"),
        ({"use_raw": True}, "`raw` does not exist"),
        ({"batch_key": "donor"}, "`obs['donor']` does not exist"),
        ({"labels_key": "celltype"}, "did you mean 'cell_type'?"),
        ({"gene_symbols": "symbol"}, "`var['symbol']` (gene_symbols) does not exist"),
    ],
)
def test_missing_keys_are_findings(options: dict[str, Any], message: str, adata: anndata.AnnData) -> None:
    report = genejepa.check(adata, **options)
    assert levels(report).count("error") == 1
    assert message in messages(report, "error")


def test_what_is_recorded_is_checked(adata: anndata.AnnData) -> None:
    adata.layers["counts"] = adata.X
    adata.X = np.log1p(adata.X.toarray())
    assert not genejepa.check(adata).ok
    genejepa.GeneJEPA.setup_anndata(adata, layer="counts", batch_key="batch")
    report = genejepa.check(adata)
    assert report.ok
    assert "2 batches" in str(report)
    del adata.layers["counts"]
    assert "`layers['counts']`" in messages(genejepa.check(adata), "error")


def test_layer_together_with_raw(adata: anndata.AnnData) -> None:
    with pytest.raises(ConfigError, match="`use_raw` is True"):
        genejepa.check(adata, layer="counts", use_raw=True)


@pytest.mark.parametrize(
    ("change", "level", "message"),
    [
        (lambda a: a[:3].copy(), "error", "training needs at least 4 cells, found 3"),
        (lambda a: a[:0].copy(), "error", "training needs at least 4 cells, found 0"),
        (lambda a: a[:, :0].copy(), "error", "`X` has 60 cells and 0 genes"),
        (lambda a: a[np.repeat(np.arange(60), 2)].copy(), "warning", "60 names of cells are repeated"),
    ],
    ids=["row 24: few cells", "row 21: no cells", "row 23: no genes", "row 35: repeated names of cells"],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_sizes(change: Callable[[Any], Any], level: str, message: str, adata: anndata.AnnData) -> None:
    report = genejepa.check(change(adata))
    assert message in messages(report, level)
    assert report.ok == (level != "error")


def test_cells_without_counts(adata: anndata.AnnData) -> None:
    """Row 10: told before the training."""
    values = adata.X.toarray()
    values[[3, 8]] = 0
    adata.X = values
    report = genejepa.check(adata)
    assert report.ok
    assert "2 cells have no counts" in messages(report, "warning")


def test_antibodies_and_one_batch(adata: anndata.AnnData) -> None:
    adata.var["feature_types"] = np.where(np.arange(80) < 9, "Antibody Capture", "Gene Expression")
    adata.obs["batch"] = "one"
    report = genejepa.check(adata, batch_key="batch")
    assert report.ok
    assert "9 columns are no genes" in messages(report, "warning")
    assert "there is nothing to correct" in messages(report, "warning")


def test_files(adata: anndata.AnnData, tmp_path: Path) -> None:
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert str(genejepa.check(tmp_path / "cells.h5ad")) == str(genejepa.check(adata))
    (tmp_path / "page.h5ad").write_text("<!DOCTYPE html>")
    report = genejepa.check(tmp_path / "page.h5ad")
    assert not report.ok
    assert "HTML" in messages(report, "error")
    with pytest.raises(FileNotFoundError):
        genejepa.check(tmp_path / "none.h5ad")


def test_with_a_model(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any], tmp_path: Path
) -> None:
    model = genejepa.GeneJEPA(adata, **tiny_settings)
    model.train(**tiny_training)
    model.save(tmp_path / "model")
    outside = ~np.isin(adata.var_names, model.genes)
    query = adata[:5].copy()
    values = query.X.toarray()
    values[:, outside] = np.nan
    query.X = values
    for given in (model, tmp_path / "model"):
        report = genejepa.check(query, model=given)
        assert report.ok, str(report)  # five cells are enough to embed, and other genes may hold anything
        assert "200 values that are not counts" in messages(report, "warning")
        assert "40 of the 40 genes of the model" in messages(report, "info")
    assert not genejepa.check(query).ok
    query.var_names = [f"other{i}" for i in range(80)]
    report = genejepa.check(query, model=model)
    assert "0 of the 40 genes" in messages(report, "error")


def test_repeated_names_are_an_error_if_they_must_be_chosen(adata: anndata.AnnData) -> None:
    """Row 33: as in the training."""
    adata.var_names = ["TBCE", "TBCE", *adata.var_names[2:]]
    for n_genes, is_refused in ((80, True), (None, True), (79, False)):
        report = genejepa.check(adata, n_genes=n_genes)
        assert report.ok != is_refused
        assert "'TBCE'" in messages(report, "error" if is_refused else "warning")
    with pytest.raises(DataError, match="TBCE"):
        genejepa.GeneJEPA(adata, n_genes=80)


def test_fractions_where_they_are_allowed(
    adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    adata.X = adata.X.toarray() / 3
    assert not genejepa.check(adata).ok
    assert genejepa.check(adata, allow_fractional=True).ok
    model = genejepa.GeneJEPA(adata, allow_fractional=True, **tiny_settings)
    model.train(**tiny_training)
    assert genejepa.check(adata, model=model).ok


def test_warnings_of_other_packages_are_no_findings(adata: anndata.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(*_: Any) -> anndata.AnnData:
        warnings.warn("soon gone", FutureWarning, stacklevel=1)
        warnings.warn("odd", DataWarning, stacklevel=1)
        return adata

    monkeypatch.setattr(checks, "as_anndata", reading)
    assert messages(genejepa.check("cells.h5ad"), "warning") == "odd"


def test_findings_are_plain_data() -> None:
    report = CheckReport((Finding("warning", "X", "odd <value>"),))
    assert report.ok
    assert str(report) == "warning  X: odd <value>\nno errors, 1 warning."
    assert "odd &lt;value&gt;" in report._repr_html_()
