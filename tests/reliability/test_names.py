"""Rows 33-34, 38-49 and 51-53 of the catalogue of bad input: names of genes.

A model is trained on cells whose genes have human symbols. The same cells with other names must give the same vectors,
bit for bit, or an error or a warning that says what is wrong. The other rows of names (35-37, 50) are where cells,
tables of genes and masks are tested.
"""

from __future__ import annotations

import unicodedata
import warnings
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from genejepa.data.gene_tables import ortholog_pairs, symbols_by_id
from genejepa.data.genes import gene_names
from genejepa.data.matching import match_genes
from genejepa.errors import DataError, DataWarning, GeneMismatchError
from genejepa.model import GeneJEPA

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

NAMES = """
ACTB CCR7 CD19 CD3D CD3E CD3G CD4 CD79A CD79B CD8A CD8B CEBPB CSF1R CST7 CTLA4 DELEC1 EOMES FOXP3 GATA3 HLA-A HLA-DRA
IL7R IRF8 ITGAM KIT LEF1 MAFB MARCHF3 MKI67 MS4A1 MT-CO1 NKG7 NKX2-1 PRF1 PTPRC RUNX3 SEPTIN2 SPI1 TBX21 TP53
"""
PANEL = NAMES.split()
OTHERS = [f"LINC{i:05d}" for i in range(40)]
ID_OF = {symbol: gene_id for gene_id, symbol in symbols_by_id("human").items() if symbol in PANEL}
MOUSE_OF_PAIR = {pair: name for name, pair in ortholog_pairs("mouse").items() if not name.startswith("ENSMUSG")}
MOUSE = {gene: MOUSE_OF_PAIR[gene_id] for gene, gene_id in ID_OF.items() if gene_id in MOUSE_OF_PAIR}
R_NAMES = {gene: gene.replace("-", ".") for gene in PANEL if "-" in gene}
DATES = {"SEPTIN2": "2-Sep", "MARCHF3": "3-Mar", "DELEC1": "1-Dec"}


@pytest.fixture(scope="module")
def cells(make_adata: Callable[..., anndata.AnnData]) -> anndata.AnnData:
    """60 cells, 80 genes in mixed order, the panel and 40 others; tests do not change it."""
    adata = make_adata()
    names = np.array([*PANEL, *OTHERS])
    adata.var_names = names[np.random.default_rng(0).permutation(80)]
    adata.var["panel"] = np.isin(adata.var_names, PANEL)
    return adata


@pytest.fixture(scope="module")
def model(cells: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]) -> GeneJEPA:
    """Model of the 40 genes of the panel; tests do not change it."""
    trained = GeneJEPA(cells, mask_var="panel", **tiny_settings)
    trained.train(**tiny_training)
    assert sorted(trained.genes) == PANEL
    return trained


@pytest.fixture(scope="module")
def vectors(model: GeneJEPA, cells: anndata.AnnData) -> NDArray[np.float32]:
    return model.get_latent_representation(cells)


def renamed(cells: anndata.AnnData, names: Mapping[str, str]) -> anndata.AnnData:
    """A copy with other names for some genes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")
        adata = cells.copy()
        adata.var_names = pd.Index([names.get(name, name) for name in cells.var_names], dtype=object)
    return adata


def with_panel_genes(cells: anndata.AnnData, genes: Sequence[str]) -> anndata.AnnData:
    """A copy that has only some genes of the panel, and all others."""
    return cells[:, ~cells.var_names.isin(PANEL) | cells.var_names.isin(genes)].copy()


def genes_with_mass(model: GeneJEPA, mass: float) -> list[str]:
    """Genes with most counts that together have at least this share of the counts of the training."""
    frequency = model.normalizer.frequency.astype(float)
    order = np.argsort(-frequency)
    n = int(np.searchsorted(np.cumsum(frequency[order]) / frequency.sum(), mass)) + 1
    return [model.genes[i] for i in order[:n]]


def test_the_names_are_those_meant() -> None:
    assert len(PANEL) == len(set(PANEL)) == 40
    assert set(ID_OF) == set(PANEL)
    assert len(MOUSE) >= 30
    assert MOUSE["TP53"] == "Trp53"


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        pytest.param(dict.fromkeys(OTHERS[:5], "LINC"), None, id="row 33: repeated names outside the panel"),
        pytest.param(ID_OF, None, id="row 39: Ensembl identifiers"),
        pytest.param(
            {gene: f"{i}.{k}" for k, (gene, i) in enumerate(ID_OF.items())}, None, id="row 40: identifiers with version"
        ),
        pytest.param(R_NAMES, r"4 names that R or .* 'HLA\.A' for 'HLA-A'", id="row 43: names changed by R"),
        pytest.param(DATES, r"3 names that R or a spreadsheet .* '1-Dec' for 'DELEC1'", id="row 44: dates"),
        pytest.param(
            dict(zip(OTHERS, ["naïve", "🧬", "a/b", "A\0B", "x" * 10_000, "\ufeffTP53", "'"], strict=False)),
            None,
            id="row 51: odd names",
        ),
    ],
)
def test_other_names_give_the_same_vectors(
    model: GeneJEPA,
    cells: anndata.AnnData,
    vectors: NDArray[np.float32],
    names: Mapping[str, str],
    warning: str | None,
) -> None:
    adata = renamed(cells, names)
    before = list(adata.var_names)
    if warning is None:
        found = model.get_latent_representation(adata)
    else:
        with pytest.warns(DataWarning, match=warning):
            found = model.get_latent_representation(adata)
    np.testing.assert_array_equal(found, vectors)
    assert list(adata.var_names) == before
    assert model.gene_report(adata).n_matched == 40


@pytest.mark.parametrize("seed", range(3), ids="row 48: reordered genes, {}".format)
def test_reordered_genes(model: GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(cells.n_vars)
    other = cells[:, order].copy()
    other.X.sort_indices()  # stored in the new order, too
    np.testing.assert_array_equal(model.get_latent_representation(other), vectors)


def test_extra_genes(model: GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32]) -> None:
    """Catalogue row 49: extra genes, and fewer of those outside the panel."""
    extra = anndata.AnnData(
        sparse.csr_matrix(np.full((cells.n_obs, 500), 7, dtype=np.float32)),
        obs=cells.obs[[]],
        var=pd.DataFrame(index=[f"EXTRA{i}" for i in range(500)]),
    )
    more = anndata.concat([extra, cells], axis="var")
    np.testing.assert_array_equal(model.get_latent_representation(more), vectors)
    np.testing.assert_array_equal(model.get_latent_representation(cells[:, PANEL].copy()), vectors)


def test_repeated_panel_gene(model: GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32]) -> None:
    """Catalogue row 34: a panel gene in two columns is refused, or its columns are added up."""
    column = cells.var_names.get_loc("TP53")
    counts = cells.X.toarray()
    part = counts[:, [column]] // 3
    counts[:, column] -= part[:, 0]
    adata = anndata.AnnData(
        sparse.csr_matrix(np.hstack([part, counts])),
        obs=cells.obs,
        var=pd.DataFrame(index=["first", *cells.var_names]),
    )
    adata = renamed(adata, {"first": "TP53"})
    with pytest.raises(
        DataError, match=r"(?s)`var_names` has 1 genes of the model .* 'TP53' x2.*Fix: .*'sum'"
    ) as caught:
        model.get_latent_representation(adata)
    np.testing.assert_array_equal(model.get_latent_representation(adata, duplicates="sum"), vectors)
    scope = {"adata": adata}
    exec(caught.value.fix.rsplit(": ", 1)[1], scope)
    assert scope["adata"].n_vars == 80
    assert not np.array_equal(model.get_latent_representation(scope["adata"]), vectors)


def test_versions_of_one_gene(model: GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32]) -> None:
    """Catalogue row 40: without their versions, two columns are one gene."""
    gene_id = ID_OF["TP53"]
    adata = renamed(cells, {"TP53": f"{gene_id}.1", OTHERS[0]: f"{gene_id}.2"})
    match = rf"(?s)'TP53' x2; the first is '{gene_id}\.[12]', '{gene_id}\.[12]' at .*Fix: pass duplicates='sum'"
    with pytest.raises(DataError, match=match):
        model.get_latent_representation(adata)
    counts = adata.X.toarray()
    counts[:, adata.var_names.get_loc(f"{gene_id}.2")] = 0
    adata.X = sparse.csr_matrix(counts)
    np.testing.assert_array_equal(model.get_latent_representation(adata, duplicates="sum"), vectors)


def test_bytes() -> None:
    """Catalogue row 38: names as bytes, from an old file."""
    with pytest.warns(DataWarning, match="bytes"):
        names = gene_names(pd.DataFrame(index=pd.Index([b"TP53", b"CD4"], dtype=object)))
    assert match_genes(["CD4", "TP53"], names).gene_of_column.tolist() == [1, 0]


def test_identifiers_with_equal_names_only(model: GeneJEPA, cells: anndata.AnnData) -> None:
    """Catalogue row 39: if names must be equal, the error says what the names are and what would match."""
    adata = renamed(cells, ID_OF | dict.fromkeys(OTHERS, "ENSG00000000000"))
    adata.var["symbol"] = cells.var_names.to_numpy()
    match = (
        r"(?s)0 of the 40 genes of the model.* gene symbols such as .* human Ensembl identifiers such as .*"
        r"gene_mapping='names' would find 40 more.*var\['symbol'\] would find 40 more"
    )
    with pytest.raises(GeneMismatchError, match=match) as caught:
        model.get_latent_representation(adata, gene_mapping="exact")
    assert caught.value.fix == "pass gene_mapping='names'."


def test_the_column_that_has_the_names(model: GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32]) -> None:
    """Catalogue row 39: names of another kind, with the right ones in a column of `var`."""
    adata = renamed(cells, {name: f"probe{i}" for i, name in enumerate(cells.var_names)})
    adata.var["symbol"] = pd.Categorical(cells.var_names.to_numpy())
    with pytest.raises(GeneMismatchError, match=r"var\['symbol'\] would find 40 more") as caught:
        model.get_latent_representation(adata)
    exec(caught.value.fix, {"adata": adata})
    np.testing.assert_array_equal(model.get_latent_representation(adata), vectors)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param({gene: gene.lower() for gene in PANEL}, id="row 41: lower case"),
        pytest.param({gene: gene[0].lower() + gene[1:] for gene in PANEL}, id="row 41: mixed case"),
        pytest.param(MOUSE, id="row 42: mouse"),
    ],
)
def test_case_and_species_are_mapped_only_if_asked_for(
    model: GeneJEPA, cells: anndata.AnnData, names: Mapping[str, str]
) -> None:
    found_by_name = [gene for gene in PANEL if names.get(gene, gene) == gene]
    adata = renamed(cells, names)
    adata = adata[:, [name for name in adata.var_names if name not in found_by_name]].copy()
    mapped = [gene for gene in PANEL if gene not in found_by_name]
    match = (
        rf"(?s)has 0 of the 40 genes .*gene_mapping='orthologs' would find {len(mapped)} more\nFix: pass gene_mapping="
    )
    with pytest.raises(GeneMismatchError, match=match):
        model.get_latent_representation(adata)
    same_genes = with_panel_genes(cells, mapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # how many counts the absent genes have does not matter here
        expected = model.get_latent_representation(same_genes, min_overlap=0)
        found = model.get_latent_representation(adata, gene_mapping="orthologs", min_overlap=0)
    np.testing.assert_array_equal(found, expected)
    assert set(model.gene_report(adata, gene_mapping="orthologs").how) <= {"ortholog", "case", "missing"}


def test_mouse_names_are_said_to_be_so(model: GeneJEPA, cells: anndata.AnnData) -> None:
    """Catalogue row 41: more than 60 % of the names in title case."""
    adata = renamed(cells, {name: name.capitalize() for name in cells.var_names})
    with pytest.raises(GeneMismatchError, match=r"the data mouse-like gene symbols such as '[A-Z][a-z]"):
        model.get_latent_representation(adata)


@pytest.mark.parametrize("mapping", ["exact", "names", "orthologs"])
def test_no_overlap(model: GeneJEPA, cells: anndata.AnnData, mapping: Any) -> None:
    """Catalogue row 45: no gene in common."""
    adata = renamed(cells, {name: f"unknown{i}" for i, name in enumerate(cells.var_names)})
    match = r"(?s)`var_names` has 0 of the 40 genes .* 0\.0% of its counts, expected at least 50%.*\nFix: check that"
    with pytest.raises(GeneMismatchError, match=match):
        model.get_latent_representation(adata, gene_mapping=mapping)
    assert model.gene_report(adata, gene_mapping=mapping).missing == model.genes


def test_one_gene_in_forty(model: GeneJEPA, cells: anndata.AnnData) -> None:
    """Catalogue row 46: hardly any gene in common is an error, and cannot be waved through."""
    adata = with_panel_genes(cells, ["TP53"])
    for min_overlap in (0.5, 0.0):
        match = rf"(?s)has 1 of the 40 genes .* expected at least {min_overlap:.0%} of the counts and 4 genes.*Fix: "
        with pytest.raises(GeneMismatchError, match=match):
            model.get_latent_representation(adata, min_overlap=min_overlap)


def test_less_than_half_of_the_counts(model: GeneJEPA, cells: anndata.AnnData) -> None:
    """Catalogue row 46: overlap is a share of the counts, and the user may lower what is asked for."""
    genes = genes_with_mass(model, 0.5)[:-1]
    adata = with_panel_genes(cells, genes)
    assert 4 <= len(genes) < 20  # the genes with most counts: few genes have nearly half of the counts
    with pytest.raises(GeneMismatchError, match=rf"(?s)has {len(genes)} of the 40 genes .*Fix: pass min_overlap=0\.\d"):
        model.get_latent_representation(adata)
    with pytest.warns(DataWarning, match=rf"only {len(genes)} of the 40 genes"):
        assert np.isfinite(model.get_latent_representation(adata, min_overlap=0.2)).all()


def test_sixty_percent_of_the_counts(model: GeneJEPA, cells: anndata.AnnData) -> None:
    """Catalogue row 47: a warning with the figure, which is stored too."""
    genes = genes_with_mass(model, 0.6)
    adata = with_panel_genes(cells, genes)
    mass = model.gene_report(adata).mass
    assert 0.6 <= mass < 0.7
    with pytest.warns(DataWarning, match=rf"only {len(genes)} of the 40 genes of the model, with {100 * mass:.1f}%"):
        model.embed(adata)
    assert adata.uns["genejepa"]["gene_overlap"] == pytest.approx(mass)


def test_odd_names_are_found() -> None:
    """Catalogue row 51: names that are not ASCII, hold a slash or NUL, or are very long."""
    names = ["naïve", "🧬", "a/b", "A\0B", "x" * 10_000, "ß", "İ"]
    assert match_genes(names, names[::-1], mapping="orthologs").how.tolist() == ["exact"] * 7
    missing = match_genes(names, ["y"])
    assert "x" * 100 not in str(missing)
    assert len(missing._repr_html_()) < 5_000


def test_unicode_forms() -> None:
    """Catalogue row 52: names that look equal are equal, with a warning."""
    from genejepa.data.matching import require_overlap

    nfc, nfd = (unicodedata.normalize(form, "Å-gène") for form in ("NFC", "NFD"))
    assert nfc != nfd
    for panel, name in ((nfc, nfd), (nfd, nfc)):
        report = match_genes([panel], [name])
        assert report.how.tolist() == ["exact"]
        with pytest.warns(DataWarning, match=r"only after Unicode normalisation"):
            require_overlap(report)


def test_index_named_as_a_column(model: GeneJEPA, cells: anndata.AnnData, vectors: NDArray[np.float32]) -> None:
    """Catalogue row 53: the index of `var` has the name of a column."""
    adata = cells.copy()
    adata.var["symbol"] = "other"
    adata.var.index.name = "symbol"
    np.testing.assert_array_equal(model.get_latent_representation(adata), vectors)


def test_multiindex() -> None:
    """Catalogue row 53: several names for each gene."""
    var = pd.DataFrame(index=pd.MultiIndex.from_tuples([("TP53", "a"), ("CD4", "b")]))
    with pytest.raises(DataError, match=r"(?s)`var_names` has 2 names for each gene.*Fix: adata\.var_names ="):
        gene_names(var)
