from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

mpl.use("Agg")

from genejepa.errors import ConfigError, MissingKeyError
from genejepa.evaluate import knn_probe
from genejepa.pl import _embedding
from genejepa.report import build_report, write_report

if TYPE_CHECKING:
    from pathlib import Path


class Balanced(HTMLParser):
    """Check that every element is closed, and collect what is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def figure() -> Figure:
    drawn = Figure(figsize=(2, 2))
    drawn.subplots().plot([1, 2])
    return drawn


def test_page_is_whole_and_needs_no_other_file(tmp_path: Path) -> None:
    page = write_report(
        tmp_path / "report.html",
        title="T cells & <others>",
        facts={"Cells": "<b>7</b>"},
        figures=[('A "quoted" caption', figure())],
        tables=[("Scores", pd.DataFrame({"<name>": ["a&b", "c"], "value": [0.12345, np.nan], "n": [1, 2]}))],
        notes=["<script>alert(1)</script>"],
    )
    text = page.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.links) == 1
    assert parser.links[0].startswith("data:image/png;base64,")
    assert base64.b64decode(parser.links[0].split(",")[1]).startswith(b"\x89PNG")
    assert "<script>" not in text
    assert "T cells &amp; &lt;others&gt;" in text
    assert "&lt;b&gt;7" in text
    assert "&lt;name&gt;" in text
    assert '<td class="number">0.123</td>' in text
    assert '<td class="number">–</td>' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]


def test_index_is_shown_unless_it_counts_rows(tmp_path: Path) -> None:
    named = pd.DataFrame({"x": [1.0]}, index=pd.Index(["first"], name="row"))
    page = write_report(tmp_path / "r.html", title="t", facts={}, tables=[("c", named)])
    assert "<td>first</td>" in page.read_text(encoding="utf-8")


def test_same_input_same_bytes(tmp_path: Path) -> None:
    pages = [write_report(tmp_path / name, title="t", facts={}, figures=[("c", figure())]) for name in ("a", "b")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_existing_page_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("old", encoding="utf-8")
    assert "old" not in write_report(tmp_path / "r.html", title="t", facts={}).read_text(encoding="utf-8")


def test_path_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        write_report(tmp_path / "no" / "r.html", title="t", facts={})
    with pytest.raises(ConfigError, match="is a folder"):
        build_report(tmp_path, adata=ad.AnnData(np.ones((3, 2))), facts={})


@pytest.fixture
def adata(monkeypatch: pytest.MonkeyPatch) -> ad.AnnData:
    """Return cells with labels; the first two dimensions stand for the UMAP, which is slow."""
    monkeypatch.setattr(_embedding, "_umap", lambda Z, **_: Z[:, :2].astype(np.float64))
    rng = np.random.default_rng(0)
    codes = np.arange(60) % 2
    obs = pd.DataFrame({"type": np.array(["A", "B"])[codes]}, index=[f"c{i}" for i in range(60)])
    X = rng.poisson(2.0, size=(60, 8)).astype(np.float32)
    X[0] = 0
    return ad.AnnData(X, obs=obs, obsm={"X_genejepa": rng.normal(size=(60, 4)) + 5 * codes[:, None]})


def test_report_with_labels(adata: ad.AnnData, tmp_path: Path) -> None:
    history = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0], "effective_rank": [np.nan, 3.21]})
    table = knn_probe(adata, labels_key="type")
    before = adata.copy()
    page = build_report(
        tmp_path / "r.html",
        adata=adata,
        facts={"Seed": "0", "Cells": "sixty"},
        history=history,
        labels_key="type",
        probe_tables=[table],
    )
    text = page.read_text(encoding="utf-8")
    assert text.count("<img ") == 3
    assert "sixty" in text
    assert re.search(r"Effective rank at the end of training</dt><dd>3\.2<", text)
    assert "Scores of the nearest-neighbour probe of type." in text
    assert "numpy " in text
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert list(adata.uns) == []


def test_report_without_labels(adata: ad.AnnData, tmp_path: Path) -> None:
    text = build_report(tmp_path / "r.html", adata=adata, facts={}).read_text(encoding="utf-8")
    assert text.count("<img ") == 1
    assert "Colour: total of X per cell, log10." in text
    assert list(adata.obs.columns) == ["type"]


def test_missing_slots(adata: ad.AnnData, tmp_path: Path) -> None:
    with pytest.raises(MissingKeyError, match=r"layers\['counts'\]"):
        build_report(tmp_path / "r.html", adata=adata, facts={}, layer="counts")
    with pytest.raises(MissingKeyError, match=r"obsm\['X_pca'\]"):
        build_report(tmp_path / "r.html", adata=adata, facts={}, use_rep="X_pca")
