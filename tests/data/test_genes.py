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

from genejepa.data.counts import open_counts
from genejepa.data.genes import check_unique, gene_names, is_gene, resolve_panel, select_panel
from genejepa.data.slots import CountSlot
from genejepa.errors import ConfigError, DataError, DataWarning, MissingKeyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_OBS, N_VARS, N_MARKERS = 120, 60, 8
REAL_DATA = Path(os.environ.get("GENEJEPA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


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


@pytest.mark.parametrize("least", [0.9, 1 / 64], ids=["one value", "all values"])
def test_values_below_one_count_as_they_are(counts: sparse.csr_matrix, least: float) -> None:
    values = counts.toarray() * (1 if least == 0.9 else np.float32(least))
    values[7] = 0
    values[7, 20] = least
    panel = select_panel(sparse.csr_matrix(values[:, ::-1]), names_of("gene", N_VARS), n_genes=N_MARKERS)
    assert panel.tolist() == list(range(N_VARS - N_MARKERS, N_VARS))


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
    with pytest.raises(DataError, match="none of them has a count"):
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
    panel = select_panel(open_counts(adata, CountSlot()).to_csr(), gene_names(adata.var), n_genes=1000)
    table: Any = sc.experimental.pp.highly_variable_genes(adata, n_top_genes=1000, inplace=False)
    expected = np.flatnonzero(table["highly_variable"])
    assert len(np.intersect1d(panel, expected)) >= 998  # genes may tie at the boundary


def test_resolve_panel_by_variability(adata: anndata.AnnData) -> None:
    panel = resolve_panel(adata.X, adata.var, n_genes=N_MARKERS, batch=adata.obs["donor"].to_numpy())
    assert panel.tolist() == list(range(N_MARKERS))
    assert panel.dtype == np.int64


@pytest.mark.parametrize("kind", ["column", "nullable column", "array", "list"])
def test_resolve_panel_by_mask(adata: anndata.AnnData, kind: str) -> None:
    mask = np.zeros(N_VARS, dtype=bool)
    mask[[40, 3, N_VARS - 1]] = True  # the last gene is empty
    adata.var["mine"] = pd.array(mask, dtype="boolean") if kind == "nullable column" else mask
    mask_var: Any = {"array": mask, "list": mask.tolist()}.get(kind, "mine")
    panel = resolve_panel(adata.X, adata.var, mask_var=mask_var)
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
        resolve_panel(adata.X, adata.var, mask_var="mine")


def test_fix_for_a_mask_with_missing_values_repairs(adata: anndata.AnnData) -> None:
    adata.var["mine"] = pd.array([True, None] * (N_VARS // 2), dtype="boolean")
    with pytest.raises(DataError) as caught:
        resolve_panel(adata.X, adata.var, mask_var="mine")
    exec(caught.value.fix, {"adata": adata})
    assert len(resolve_panel(adata.X, adata.var, mask_var="mine")) == N_VARS // 2 - 1


def test_mask_of_another_length(adata: anndata.AnnData) -> None:
    with pytest.raises(DataError, match=r"`mask_var` has dtype bool and shape \(3,\)"):
        resolve_panel(adata.X, adata.var, mask_var=np.ones(3, dtype=bool))


def test_missing_mask_column(adata: anndata.AnnData) -> None:
    adata.var["highly_variable"] = True
    with pytest.raises(MissingKeyError, match=r"`var\['hvg'\]` \(mask_var\) does not exist, found 'highly_variable'"):
        resolve_panel(adata.X, adata.var, mask_var="hvg")


def test_repeated_names_matter_only_in_the_panel(adata: anndata.AnnData) -> None:
    """Rows 33 and 34: the fix keeps the first."""
    names = adata.var_names.to_numpy(dtype=object).copy()
    names[[20, 30]] = "TBCE"
    adata.var["symbol"] = names
    mask = np.arange(N_VARS) < 10
    assert len(resolve_panel(adata.X, adata.var, mask_var=mask, gene_symbols="symbol")) == 10
    mask[20] = True  # one of the two is enough: its name does not say which one is meant
    with pytest.raises(
        DataError, match=r"`var\['symbol'\]` has 1 duplicated .*'TBCE' x2; .* positions \[20, 30\]"
    ) as caught:
        resolve_panel(adata.X, adata.var, mask_var=mask, gene_symbols="symbol")
    scope = {"adata": adata}
    exec(caught.value.fix, scope)
    assert scope["adata"].n_vars == N_VARS - 1
    assert scope["adata"].var["symbol"].is_unique


def test_repeated_names_in_raw(adata: anndata.AnnData) -> None:
    """Row 34: the fix makes an AnnData of raw."""
    adata.var["symbol"] = "TBCE"
    adata.raw = adata
    with pytest.raises(DataError, match=r"`raw\.var\['symbol'\]` has 1 duplicated") as caught:
        resolve_panel(adata.raw.X, adata.raw.var, gene_symbols="symbol", table="raw.var")
    scope = {"adata": adata}
    exec(caught.value.fix, scope)
    assert scope["adata"].n_vars == 1


def test_check_unique_accepts_distinct_names() -> None:
    check_unique(names_of("g", 4), np.arange(4))


@pytest.mark.parametrize(
    ("first", "second"), [("TP53", "TP53 "), ("Å-gène", "A\u030a-ge\u0300ne")], ids=["white space", "Unicode form"]
)
@pytest.mark.parametrize("gene_symbols", [None, "symbol"])
def test_names_that_a_model_could_not_tell_apart(
    adata: anndata.AnnData, first: str, second: str, gene_symbols: str | None
) -> None:
    """Row 34: names that are equal when genes are looked for are refused like equal ones."""
    names = [first, second, *adata.var_names[2:]]
    if gene_symbols is None:
        adata.var_names = names
    else:
        adata.var[gene_symbols] = names
    with pytest.raises(DataError, match=r"1 duplicated names .* x2; the first is at positions \[0, 1\] as '") as caught:
        resolve_panel(adata.X, adata.var, n_genes=None, gene_symbols=gene_symbols)
    scope = {"adata": adata}
    exec(caught.value.fix, scope)
    panel = resolve_panel(scope["adata"].X, scope["adata"].var, n_genes=None, gene_symbols=gene_symbols)
    assert len(panel) == N_VARS - 3  # two genes have no counts


@pytest.mark.parametrize("table", ["var", "raw.var"])
@pytest.mark.parametrize("gene_symbols", [None, "symbol"])
def test_names_that_no_file_can_hold(adata: anndata.AnnData, table: str, gene_symbols: str | None) -> None:
    names = ["A", "B\udcff", *adata.var_names[2:]]
    adata.var["symbol"] = names
    adata.var_names = names
    adata.raw = adata

    def read() -> NDArray[np.object_]:
        var = adata.raw.var if table == "raw.var" else adata.var
        return gene_names(var, gene_symbols=gene_symbols, table=table)

    with pytest.raises(DataError, match=r"has 1 names that cannot be written as UTF-8: 'B\\udcff'; expected") as caught:
        read()
    exec(caught.value.fix, {"adata": adata})
    assert read()[1] == "B\\udcff"


def test_names_that_were_read_already_are_not_read_again(adata: anndata.AnnData) -> None:
    adata.var["number"] = np.arange(N_VARS)
    with pytest.warns(DataWarning, match="names of type int"):
        names = gene_names(adata.var, gene_symbols="number")
    panel = resolve_panel(adata.X, adata.var, n_genes=N_MARKERS, gene_symbols="number", names=names)
    assert panel.tolist() == list(range(N_MARKERS))


def test_antibodies_are_left_out(adata: anndata.AnnData) -> None:
    adata.var["feature_types"] = np.where(np.arange(N_VARS) < 2, "Antibody Capture", "Gene Expression")
    names = adata.var_names.to_numpy(dtype=object).copy()
    names[0] = names[5]  # an antibody may have the name of a gene
    adata.var["symbol"] = names
    assert is_gene(adata.var).tolist() == [False] * 2 + [True] * (N_VARS - 2)
    with pytest.warns(DataWarning, match=r"`var\['feature_types'\]` marks 2 columns as Antibody Capture: they are not"):
        panel = resolve_panel(adata.X, adata.var, n_genes=N_MARKERS, gene_symbols="symbol")
    assert len(panel) == N_MARKERS
    assert set(range(2, N_MARKERS)) < set(panel.tolist())
    mask = np.arange(N_VARS) < 2
    assert resolve_panel(adata.X, adata.var, mask_var=mask).tolist() == [0, 1]  # asked for by name
    adata.var["feature_types"] = "gene"
    assert is_gene(adata.var).all()
    assert is_gene(adata.var[[]]).all()


@pytest.mark.parametrize(
    "values",
    [["A", "B"], pd.Categorical(["A", "A"]), ["é", "x" * 10_000]],
    ids=["str", "categorical", "long"],
)
def test_gene_names(values: Any) -> None:
    adata = anndata.AnnData(np.ones((1, 2), dtype=np.float32))
    adata.var["symbol"] = values
    names = gene_names(adata.var, gene_symbols="symbol")
    assert names.tolist() == list(values)
    assert names.dtype == object
    assert gene_names(adata.var).tolist() == ["0", "1"]


@pytest.mark.parametrize(
    ("values", "expected", "kind"),
    [
        pytest.param([7, 8], ["7", "8"], "int", id="row 36: integers"),
        pytest.param([b"TP53", b"B"], ["TP53", "B"], "bytes", id="row 38: bytes"),
        pytest.param([b"TP53", b"B\xff"], ["TP53", r"B\xff"], "bytes", id="row 38: bytes that are no text"),
    ],
)
@pytest.mark.parametrize("in_index", [True, False], ids=["index", "column"])
def test_names_that_are_not_text(values: list[Any], expected: list[str], kind: str, in_index: bool) -> None:
    var = pd.DataFrame({"symbol": values}, index=values if in_index else ["a", "b"])
    slot = "var_names" if in_index else r"var\['symbol'\]"
    with pytest.warns(DataWarning, match=rf"`{slot}` holds names of type {kind}, .* first as '{expected[0]}'"):
        names = gene_names(var, gene_symbols=None if in_index else "symbol")
    assert names.tolist() == expected
    assert all(type(name) is str for name in names)


@pytest.mark.parametrize("table", ["var", "raw.var"])
@pytest.mark.parametrize("missing", [np.nan, None, pd.NA, "", "  "], ids=["nan", "none", "NA", "empty", "blank"])
def test_missing_gene_names(missing: Any, table: str) -> None:
    """Row 37: the error lists positions, and the fix leaves the genes out."""
    adata = anndata.AnnData(np.ones((1, 5), dtype=np.float32))
    adata.var["symbol"] = np.array(["A", missing, missing, missing, missing], dtype=object)
    adata.raw = adata
    slot = table.replace(".", r"\.") + r"\['symbol'\]"
    message = rf"`{slot}` has 4 missing .* among 5, at the positions \[1, 2, 3\] and more; expected a name"
    with pytest.raises(DataError, match=message) as caught:
        gene_names(adata.raw.var if table == "raw.var" else adata.var, gene_symbols="symbol", table=table)
    scope = {"adata": adata}
    exec(caught.value.fix, scope)
    assert scope["adata"].var["symbol"].tolist() == ["A"]


def test_missing_names_in_the_index() -> None:
    """Row 37: the same for ``var_names``."""
    var = pd.DataFrame(index=pd.Index(["A", None, "B"]))
    with pytest.raises(DataError, match=r"`var_names` has 1 missing or blank names among 3, at the positions \[1\];"):
        gene_names(var)


def test_several_names_for_each_gene() -> None:
    """Row 53: a MultiIndex, or two columns of one name."""
    index = pd.MultiIndex.from_tuples([("A", "1"), ("B", "2")])
    with pytest.raises(DataError, match=r"`var_names` has 2 names for each gene.*\nFix: .*get_level_values\(0\)"):
        gene_names(pd.DataFrame(index=index))
    var = pd.DataFrame([["a", "b"]], columns=["symbol", "symbol"], index=["x"])
    with pytest.raises(DataError, match=r"`var\['symbol'\]` has 2 names for each gene.*\nFix: .*columns\.duplicated"):
        gene_names(var, gene_symbols="symbol")


def test_index_with_the_name_of_a_column() -> None:
    """Row 53: harmless."""
    var = pd.DataFrame({"symbol": ["A", "B"]}, index=pd.Index(["x", "y"], name="symbol"))
    assert gene_names(var).tolist() == ["x", "y"]
    assert gene_names(var, gene_symbols="symbol").tolist() == ["A", "B"]


def test_missing_symbol_column() -> None:
    var = pd.DataFrame({"gene_ids": ["A"]})
    with pytest.raises(MissingKeyError, match=r"`var\['gene_id'\]` .* found 'gene_ids'; did you mean 'gene_ids'\?"):
        gene_names(var, gene_symbols="gene_id")
