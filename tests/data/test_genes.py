from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from genejepa.data.counts import read_counts
from genejepa.data.genes import check_unique, gene_names, resolve_panel, select_panel
from genejepa.data.matching import match_genes
from genejepa.errors import ConfigError, DataError, GeneMismatchError, MissingKeyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_OBS, N_VARS, N_MARKERS = 120, 60, 8
REAL_DATA = Path(os.environ.get("GENEJEPA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
ENSEMBL = [f"ENSG{i:011d}" for i in range(20)]


def names_of(prefix: str, n: int) -> NDArray[np.object_]:
    return np.array([f"{prefix}{i}" for i in range(n)], dtype=object)


@pytest.fixture
def counts() -> sparse.csr_matrix:
    """Two kinds of cells that differ in the first 8 genes; the last 2 genes and 3 cells are empty."""
    rng = np.random.default_rng(0)
    rates = np.full((N_OBS, N_VARS), 2.0)
    rates[: N_OBS // 2, :N_MARKERS] = 12
    values = rng.poisson(rates).astype(np.float32)
    values[:, -2:] = 0
    values[[5, 50, 119]] = 0
    return sparse.csr_matrix(values)


@pytest.fixture
def adata(counts: sparse.csr_matrix) -> anndata.AnnData:
    obs = pd.DataFrame({"donor": np.arange(N_OBS) % 3}, index=names_of("cell", N_OBS))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=names_of("gene", N_VARS)))


def test_markers_are_chosen_and_nothing_is_changed(counts: sparse.csr_matrix) -> None:
    before = [a.tobytes() for a in (counts.data, counts.indices, counts.indptr)]
    state = pickle.dumps((random.getstate(), np.random.get_state()))  # noqa: NPY002
    panel = select_panel(counts, names_of("gene", N_VARS), n_genes=N_MARKERS)
    assert panel.tolist() == list(range(N_MARKERS))
    assert [a.tobytes() for a in (counts.data, counts.indices, counts.indptr)] == before
    assert pickle.dumps((random.getstate(), np.random.get_state())) == state  # noqa: NPY002


@pytest.mark.parametrize("n_genes", [None, N_VARS - 2, N_VARS, 2000])
def test_all_genes_with_a_count_if_there_are_no_more(counts: sparse.csr_matrix, n_genes: int | None) -> None:
    counts = sparse.csr_matrix(np.vstack([counts.toarray(), np.zeros(N_VARS)]))
    counts.data[counts.indices == 4] = 0  # explicit zeros are no counts
    panel = select_panel(counts, names_of("gene", N_VARS), n_genes=n_genes)
    assert panel.tolist() == [j for j in range(N_VARS - 2) if j != 4]


def test_panel_does_not_depend_on_gene_order(counts: sparse.csr_matrix) -> None:
    names = names_of("gene", N_VARS)
    counts = sparse.csr_matrix(np.hstack([counts.toarray()[:, :30]] * 2))  # every gene ties with another one
    order = np.random.default_rng(1).permutation(N_VARS)
    for n_genes in (5, 21, 40):
        panel = names[select_panel(counts, names, n_genes=n_genes)]
        shuffled = names[order][select_panel(counts[:, order], names[order], n_genes=n_genes)]
        assert sorted(panel) == sorted(shuffled)


def test_panel_does_not_depend_on_cells_without_counts(counts: sparse.csr_matrix) -> None:
    names = names_of("gene", N_VARS)
    filled = counts[np.diff(counts.indptr) > 0]
    np.testing.assert_array_equal(select_panel(counts, names, n_genes=20), select_panel(filled, names, n_genes=20))


def test_batch_differences_are_not_variability(counts: sparse.csr_matrix) -> None:
    names, kind = names_of("gene", N_VARS), np.repeat([0, 1], N_OBS // 2)
    panel = select_panel(counts, names, n_genes=N_MARKERS, batch=kind)
    assert len(np.intersect1d(panel, np.arange(N_MARKERS))) < N_MARKERS - 2
    mixed = select_panel(counts, names, n_genes=N_MARKERS, batch=np.arange(N_OBS) % 2)
    assert mixed.tolist() == list(range(N_MARKERS))


@pytest.mark.parametrize(
    "batch",
    [
        np.arange(N_OBS),
        np.r_[0, np.ones(N_OBS - 1, dtype=int)],
        np.where(np.arange(N_OBS) % 4 == 0, np.arange(N_OBS), -1),
    ],
    ids=["every-cell", "one-cell", "every-fourth-cell"],
)
def test_tiny_batches_have_no_vote(counts: sparse.csr_matrix, batch: NDArray[np.int64]) -> None:
    panel = select_panel(counts, names_of("gene", N_VARS), n_genes=N_MARKERS, batch=batch)
    # Put together, every fourth cell makes a batch of 28 that votes: one of its genes may be chance.
    assert len(np.intersect1d(panel, np.arange(N_MARKERS))) >= N_MARKERS - 1


def test_panel_does_not_depend_on_which_batch_comes_first(counts: sparse.csr_matrix) -> None:
    rng = np.random.default_rng(0)
    values = counts.toarray()
    values[100:110, 20:30] += 60 * np.eye(10)  # outliers, so that clipping matters
    batch = rng.permutation(np.arange(N_OBS) >= 24).astype(np.int64)
    panels = [
        select_panel(sparse.csr_matrix(values), names_of("gene", N_VARS), n_genes=16, batch=codes)
        for codes in (batch, 1 - batch)
    ]
    np.testing.assert_array_equal(panels[0], panels[1])


def test_no_counts_at_all() -> None:
    with pytest.raises(DataError, match="no gene has a count"):
        select_panel(sparse.csr_matrix((4, 5)), names_of("gene", 5))


@pytest.mark.parametrize("n_genes", [0, -3])
def test_panel_size_must_be_positive(counts: sparse.csr_matrix, n_genes: int) -> None:
    with pytest.raises(ConfigError, match="`n_genes`"):
        select_panel(counts, names_of("gene", N_VARS), n_genes=n_genes)


def test_panel_of_published_data_is_that_of_scanpy() -> None:
    file = REAL_DATA / "pbmc_facs_zheng2017.h5ad"
    if not file.exists():
        pytest.skip(f"{file.name} is not present")
    import scanpy as sc

    adata = anndata.read_h5ad(file)[::4].copy()
    panel = select_panel(read_counts(adata), gene_names(adata), n_genes=1000)
    table: Any = sc.experimental.pp.highly_variable_genes(adata, n_top_genes=1000, inplace=False)
    expected = np.flatnonzero(table["highly_variable"])
    assert len(np.intersect1d(panel, expected)) >= 998  # genes may tie at the boundary


def test_resolve_panel_by_variability(adata: anndata.AnnData) -> None:
    panel = resolve_panel(adata, read_counts(adata), n_genes=N_MARKERS, batch_key="donor")
    assert panel.tolist() == list(range(N_MARKERS))
    assert panel.dtype == np.int64


@pytest.mark.parametrize("kind", ["column", "nullable column", "array", "list"])
def test_resolve_panel_by_mask(adata: anndata.AnnData, kind: str) -> None:
    mask = np.zeros(N_VARS, dtype=bool)
    mask[[40, 3, N_VARS - 1]] = True  # the last gene is empty
    adata.var["mine"] = pd.array(mask, dtype="boolean") if kind == "nullable column" else mask
    mask_var: Any = {"array": mask, "list": mask.tolist()}.get(kind, "mine")
    panel = resolve_panel(adata, read_counts(adata), mask_var=mask_var)
    assert panel.tolist() == [3, 40]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (np.arange(N_VARS), r"`var\['mine'\]` has dtype int64"),
        (
            np.array([True, None] * (N_VARS // 2), dtype=object),
            r"has 30 missing values, first for gene 'gene1'",
        ),
        (np.arange(N_VARS) >= N_VARS - 2, r"marks 2 genes and none of them has a count"),
    ],
    ids=["integers", "missing", "empty-genes"],
)
def test_bad_mask_columns(adata: anndata.AnnData, column: NDArray[Any], message: str) -> None:
    adata.var["mine"] = column
    with pytest.raises(DataError, match=message):
        resolve_panel(adata, read_counts(adata), mask_var="mine")


def test_fix_for_a_mask_with_missing_values_repairs(adata: anndata.AnnData) -> None:
    adata.var["mine"] = pd.array([True, None] * (N_VARS // 2), dtype="boolean")
    with pytest.raises(DataError) as caught:
        resolve_panel(adata, read_counts(adata), mask_var="mine")
    exec(caught.value.fix, {"adata": adata})
    assert len(resolve_panel(adata, read_counts(adata), mask_var="mine")) == N_VARS // 2 - 1


def test_mask_of_another_length(adata: anndata.AnnData) -> None:
    with pytest.raises(DataError, match=r"`mask_var` has dtype bool and shape \(3,\)"):
        resolve_panel(adata, read_counts(adata), mask_var=np.ones(3, dtype=bool))


def test_missing_mask_column(adata: anndata.AnnData) -> None:
    adata.var["highly_variable"] = True
    with pytest.raises(MissingKeyError, match=r"`var\['hvg'\]` does not exist.*\['highly_variable'\]"):
        resolve_panel(adata, read_counts(adata), mask_var="hvg")


def test_repeated_names_matter_only_in_the_panel(adata: anndata.AnnData) -> None:
    names = adata.var_names.to_numpy(dtype=object).copy()
    names[[20, 30]] = "TBCE"
    adata.var["symbol"] = names
    mask = np.arange(N_VARS) < 10
    counts = read_counts(adata)
    assert len(resolve_panel(adata, counts, mask_var=mask, gene_symbols="symbol")) == 10
    mask[20] = True  # one of the two is enough: its name does not say which one is meant
    with pytest.raises(
        DataError, match=r"`var\['symbol'\]` has 1 duplicated .*'TBCE' x2; .* positions \[20, 30\]"
    ) as caught:
        resolve_panel(adata, counts, mask_var=mask, gene_symbols="symbol")
    scope = {"adata": adata}
    exec(caught.value.fix.split(": ")[1], scope)
    assert scope["adata"].n_vars == N_VARS - 1


def test_check_unique_accepts_distinct_names() -> None:
    check_unique(names_of("g", 4), np.arange(4))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["A", "B"], ["A", "B"]),
        ([b"A", b"B"], ["A", "B"]),
        ([7, 8], ["7", "8"]),
        (pd.Categorical(["A", "A"]), ["A", "A"]),
        (["é", "x" * 10_000], ["é", "x" * 10_000]),
    ],
    ids=["str", "bytes", "int", "categorical", "long"],
)
def test_gene_names(values: Any, expected: list[str]) -> None:
    adata = anndata.AnnData(np.ones((1, 2), dtype=np.float32))
    adata.var["symbol"] = values
    names = gene_names(adata, gene_symbols="symbol")
    assert names.tolist() == expected
    assert names.dtype == object
    assert gene_names(adata).tolist() == ["0", "1"]


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA, "", "  "], ids=["nan", "none", "NA", "empty", "blank"])
def test_missing_gene_names(missing: Any) -> None:
    adata = anndata.AnnData(np.ones((1, 3), dtype=np.float32))
    adata.var["symbol"] = np.array(["A", missing, missing], dtype=object)
    with pytest.raises(DataError, match=r"`var\['symbol'\]` has 2 missing .* among 3, first at position 1"):
        gene_names(adata, gene_symbols="symbol")


def test_missing_symbol_column() -> None:
    adata = anndata.AnnData(np.ones((1, 3), dtype=np.float32))
    adata.var["gene_ids"] = "A"
    with pytest.raises(MissingKeyError, match=r"`var\['symbol'\]` does not exist; `var` has \['gene_ids'\]"):
        gene_names(adata, gene_symbols="symbol")


def test_match_by_name_in_any_order_with_extra_genes() -> None:
    match = match_genes(["A", "B", "C"], ["x", "C", "y", "A"])
    assert match.columns.tolist() == [3, -1, 1]
    assert match.columns.dtype == np.int64
    assert match.missing == ["B"]
    assert match.n_matched == 2
    assert match.fraction == pytest.approx(2 / 3)


@pytest.mark.parametrize("versioned", ["panel", "query", "both"])
def test_ensembl_versions_are_ignored(versioned: str) -> None:
    panel = [f"{n}.3" if versioned in ("panel", "both") else n for n in ENSEMBL]
    query = [f"{n}.12" if versioned in ("query", "both") else n for n in reversed(ENSEMBL)]
    assert match_genes(panel, query).columns.tolist() == list(range(20))[::-1]


def test_dots_in_symbols_are_not_versions() -> None:
    with pytest.raises(GeneMismatchError, match=r"20 would match without the part after the last dot"):
        match_genes([f"RP11-{i}.1" for i in range(20)], [f"RP11-{i}" for i in range(20)])


def test_version_is_kept_where_it_tells_genes_apart() -> None:
    query = [*[f"{n}.1" for n in ENSEMBL], f"{ENSEMBL[0]}.2"]
    assert match_genes([f"{n}.1" for n in ENSEMBL], query).n_matched == 20
    with pytest.raises(DataError, match=rf"'{ENSEMBL[0]}' x2; .* positions \[0, 20\]"):
        match_genes(ENSEMBL, query)


def test_repeated_query_names() -> None:
    assert match_genes(["A", "B"], ["x", "x", "B", "A"]).n_matched == 2
    with pytest.raises(DataError, match=r"has 1 duplicated names .*'A' x3; .* \[0, 1, 3\]"):
        match_genes(["A", "B"], ["A", "A", "B", "A"])


@pytest.mark.parametrize(
    ("panel", "query", "message"),
    [
        (names_of("TP", 20), names_of("Tp", 20), r"Fix: 20 would match if case were ignored"),
        (names_of("TP", 20), ENSEMBL, r"the model has gene symbols and the data Ensembl identifiers"),
        (ENSEMBL, names_of("TP", 20), r"the model has Ensembl identifiers and the data gene symbols"),
        (names_of("TP", 20), names_of("other", 20), r"check that the species"),
        (names_of("TP", 20), [], r"check that the species"),
        (
            names_of("TP", 20),
            ["TP7"],
            r"has 1 of the 20 genes .* \['TP0', 'TP1', 'TP2'\], the data \['TP7'\]",
        ),
    ],
    ids=["case", "ids-in-data", "ids-in-model", "nothing", "no-genes", "too-few"],
)
def test_mismatch_says_why(panel: Any, query: Any, message: str) -> None:
    with pytest.raises(GeneMismatchError, match=message):
        match_genes(panel, query)


def test_low_overlap_warns() -> None:
    names = names_of("g", 20)
    with pytest.warns(UserWarning, match=r"only 8 of the 20 genes of the model \(40%\).*'g8', 'g9', 'g10'"):
        match_genes(names, names[:8])
    assert match_genes(names, names[:8], min_fraction=0.4).n_matched == 8
