from __future__ import annotations

import logging
import time
import unicodedata
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from genejepa.data.gene_tables import ortholog_pairs, symbols_by_id
from genejepa.data.matching import GeneReport, match_genes, require_overlap
from genejepa.errors import ConfigError, DataError, DataWarning, GeneMismatchError

TP53, TRP53 = "ENSG00000141510", "ENSMUSG00000059552"
CD99 = ["ENSG00000002586", "ENSG00000292348"]
HUMAN = ["TP53", "IL4R", "PTPRC", "CD4", "MS4A1", "LYZ", "NKG7", "GNLY", "CD14", "FCER1A"]


def numbered(prefix: str, n: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def how(panel: list[str], query: list[str], mapping: Any = "names") -> list[str]:
    found: list[str] = match_genes(panel, query, mapping=mapping).how.tolist()
    return found


def test_by_name_in_any_order_with_extra_genes() -> None:
    report = match_genes(["A", "B", "C"], ["x", "C", "y", "A"])
    assert report.gene_of_column.tolist() == [-1, 2, -1, 0]
    assert report.gene_of_column.dtype == np.int64
    assert report.found.tolist() == [True, False, True]
    assert report.how.tolist() == ["exact", "missing", "exact"]
    assert report.missing == ["B"]
    assert report.n_matched == 2
    assert report.mass == pytest.approx(2 / 3)


def test_mass_is_the_share_of_the_training_counts() -> None:
    frequency = np.array([0.7, 0.2, 0.1], dtype=np.float32)
    assert match_genes(["A", "B", "C"], ["A", "C"], frequency=frequency).mass == pytest.approx(0.8)
    assert match_genes(["A", "B", "C"], ["C", "B", "A"], frequency=frequency).mass == 1
    assert match_genes(["A", "B", "C"], [], frequency=frequency).mass == 0


@pytest.mark.parametrize(
    ("gene", "name", "step"),
    [
        ("TP53", " TP53\t", "exact"),
        ("Caf\u00e9", "Cafe\u0301", "exact"),
        (f"{TP53}.18", TP53, "version"),
        (TP53, f"{TP53}.18", "version"),
        (f"{TP53}.3", f"{TP53}.18", "version"),
        (f"{TRP53}.1", f"{TRP53}.2", "version"),
        ("TP53", TP53, "ensembl"),
        (TP53, "TP53", "ensembl"),
        (f"{TP53}.18", "TP53", "ensembl"),
        ("Trp53", f"{TRP53}.1", "ensembl"),
        ("CD99", CD99[1], "ensembl"),
        ("HLA-A", "HLA.A", "r_name"),
        ("MT-CO1", "MT.CO1", "r_name"),
        ("7SK", "X7SK", "r_name"),
        ("RP11-34P13.7", "RP11.34P13.7", "r_name"),
        ("Y_RNA", "Y-RNA", "r_name"),
        ("HLA.A", "HLA-A", "r_name"),
        ("MARCH3", "3-Mar", "date"),
        ("MARCHF10", "10-mar", "date"),
        ("SEPT2", "2-Sep", "date"),
        ("SEPTIN11", "Sep-11", "date"),
        ("Sept7", "2001-09-07 00:00:00", "date"),
        ("SEP15", "2019-09-15", "date"),
        ("DEC1", "1-Dec", "date"),
        ("DELEC1", "Dec-01", "date"),
    ],
)
def test_one_gene_by_another_name(gene: str, name: str, step: str) -> None:
    report = match_genes(["other", gene], ["XIST", name, "ACTB"])
    assert report.how.tolist() == ["missing", step]
    assert report.gene_of_column.tolist() == [-1, 1, -1]
    if step != "exact":
        assert how([gene], ["XIST", name], "exact") == ["missing"]


@pytest.mark.parametrize(
    ("gene", "name"),
    [
        ("RP11-1.1", "RP11-1"),
        ("TP53", TRP53),
        (CD99[0], CD99[1]),
        ("MARCH1", "1-Mar"),
        ("MARC2", "2-Mar"),
        ("SEPT2", "2-Oct"),
        ("SEPT2", "SEPTIN2"),
        ("TP53", "Tp53"),
        ("TP53", "Trp53"),
        ("", ""),
        (TP53, "ENSG00000141511"),
    ],
    ids=[
        "a-version-of-no-identifier",
        "other-species",
        "two-genes-of-one-symbol",
        "date-of-two-genes",
        "another-date-of-two-genes",
        "other-month",
        "previous-symbol",
        "case",
        "ortholog",
        "no-name",
        "next-identifier",
    ],
)
def test_other_genes_are_not_found(gene: str, name: str) -> None:
    assert how([gene], [name]) == ["missing"]


@pytest.mark.parametrize(
    ("panel", "query", "step"),
    [
        (HUMAN, [*HUMAN[1:], "Trp53"], "missing"),  # all other names are human ones
        (HUMAN, ["Trp53", "Il4ra", "Ptprc", "Cd4"], "ortholog"),
        (HUMAN, [f"{TRP53}.2", "Il4ra", "Ptprc"], "ortholog"),
        ([f"{TP53}.1", "IL4R", "PTPRC"], ["Trp53", "Il4ra", "Cd4"], "ortholog"),
        (["Trp53", "Il4ra", "Ptprc"], HUMAN, "ortholog"),
        (HUMAN, ["tp53", "cd8b"], "case"),
        (HUMAN, ["tp53", *HUMAN[1:]], "case"),
        (["gene1"], ["Gene1"], "case"),
    ],
    ids=["one-species", "symbols", "id-in-data", "id-in-panel", "from-mouse", "case", "case-of-one", "unknown-genes"],
)
def test_orthologs(panel: list[str], query: list[str], step: str) -> None:
    assert how(panel, query)[0] == "missing"
    assert how(panel, query, "orthologs")[0] == step


def test_equal_letters_do_not_make_an_ortholog_of_another_gene() -> None:
    assert ortholog_pairs("human")["GSTM3"] == ortholog_pairs("mouse")["Gstm5"]
    mouse = ["Gstm5", "Gstm3", "Il4ra", "Ptprc"]
    assert how(["GSTM3", "GSTM5", *HUMAN], mouse, "orthologs")[:2] == ["ortholog", "missing"]
    assert how(["GSTM5", *HUMAN], mouse, "orthologs")[0] == "missing"


@pytest.mark.parametrize(
    ("panel", "query"),
    [
        ([f"{TP53}.1", f"{TP53}.2"], [f"{TP53}.3"]),
        (["CD99"], CD99),
        (CD99, ["CD99"]),
        (["HLA-A"], ["HLA.A", "HLA_A"]),
        (["HLA-A", "HLA_A"], ["HLA.A"]),
        (["SEPT2"], ["2-Sep", "Sep-02"]),
        (["SEPT2", "SEPTIN2"], ["2-Sep"]),
        (["gene"], ["GENE", "Gene"]),
        (["gene", "GENE"], ["Gene"]),
        (["Caf\u00e9", "Cafe\u0301"], ["Cafe\u0301"]),
    ],
    ids=[
        "versions-in-panel",
        "ids-in-data",
        "ids-in-panel",
        "R-in-data",
        "R-in-panel",
        "dates-in-data",
        "dates-in-panel",
        "case-in-data",
        "case-in-panel",
        "unicode-in-panel",
    ],
)
def test_several_answers_are_none(panel: list[str], query: list[str]) -> None:
    for names in (query, query[::-1]):
        report = match_genes(panel, names, mapping="orthologs")
        assert set(report.how) == {"ambiguous"}
        assert report.gene_of_column.tolist() == [-1] * len(names)
        assert report.n_matched == report.mass == 0
        assert report.missing == panel


@pytest.mark.parametrize(
    ("gene", "other"),
    [("TP53", TP53), ("HLA-A", "HLA.A"), ("SEPT2", "2-Sep"), ("gene", "Gene"), ("TP53", "Trp53"), (f"{TP53}.1", TP53)],
)
def test_an_equal_name_wins(gene: str, other: str) -> None:
    report = match_genes([gene], [other, gene], mapping="orthologs")
    assert report.how.tolist() == ["exact"]
    assert report.gene_of_column.tolist() == [-1, 0]


def test_a_column_is_used_for_one_gene() -> None:
    report = match_genes([TP53, "TP53", "tp53", "Trp53"], ["TP53", "IL4R"], mapping="orthologs")
    assert report.gene_of_column.tolist() == [1, -1]
    assert report.n_matched == 1


def test_what_is_found_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    symbols = symbols_by_id("human")
    ids = rng.choice([*symbols], 60, replace=False)
    panel = [symbols[i] if k % 2 else i for k, i in enumerate(ids)] + ["HLA-A", "SEPT2", "gene", "CD99", "IL4R"]
    query = [i if k % 3 else symbols[i] for k, i in enumerate(ids[:50])]
    query += ["HLA.A", "2-Sep", "Gene", *CD99, "Il4ra", "x", "x"]
    first = match_genes(panel, query, mapping="orthologs")
    assert {"exact", "ensembl", "r_name", "date", "case", "ambiguous", "missing"} <= set(first.how)
    for _ in range(5):
        order = rng.permutation(len(query))
        report = match_genes(panel, [query[i] for i in order], mapping="orthologs")
        np.testing.assert_array_equal(report.gene_of_column, first.gene_of_column[order])
        assert report.how.tolist() == first.how.tolist()
        rows = rng.permutation(len(panel))
        report = match_genes([panel[i] for i in rows], query, mapping="orthologs")
        assert report.how.tolist() == first.how[rows].tolist()


def test_equal_names_are_found_as_by_a_double_loop() -> None:
    rng = np.random.default_rng(1)
    alphabet = numbered("g", 30)
    for _ in range(50):
        panel = rng.choice(alphabet, 10, replace=False).tolist()
        query = rng.choice(alphabet, 20).tolist()
        expected = [next((i for i, gene in enumerate(panel) if gene == name), -1) for name in query]
        report = match_genes(panel, query, duplicates="sum", mapping="exact")
        assert report.gene_of_column.tolist() == expected
        assert report.missing == [gene for gene in panel if gene not in query]


def test_repeated_names_outside_the_panel_do_no_harm() -> None:
    report = match_genes(["A", "B"], ["x", "x", "B", "A", "", ""])
    assert report.gene_of_column.tolist() == [-1, -1, 1, 0, -1, -1]


@pytest.mark.parametrize(
    ("query", "found_as", "message"),
    [
        (["A", "A", "B", "A"], "A", r"`var_names` has 1 genes .* more than once: 'A' x3; the first is .* \[0, 1, 3\]"),
        (["A", "A ", "B"], "A+A ", r"'A' x2; the first is 'A', 'A ' at positions \[0, 1\]"),
        ([f"{TP53}.1", f"{TP53}.2"], f"{TP53}.1+{TP53}.2", rf"'{TP53}' x2; .* '{TP53}.1', '{TP53}.2' at"),
    ],
    ids=["equal", "white-space", "versions"],
)
def test_repeated_panel_genes_are_refused_or_added_up(query: list[str], found_as: str, message: str) -> None:
    panel = ["A", "B", TP53]
    with pytest.raises(DataError, match=message) as caught:
        match_genes(panel, query)
    assert "duplicates='sum'" in caught.value.fix
    report = match_genes(panel, query, duplicates="sum")
    expected = {"A": 0, "B": 1}
    assert report.gene_of_column.tolist() == [expected.get(name.strip(), 2) for name in query]
    assert report.to_frame()["found_as"][report.gene_of_column[0]] == found_as
    assert report.n_matched == len(set(report.gene_of_column))


def test_the_columns_of_raw_can_only_be_added_up() -> None:
    with pytest.raises(DataError, match=r"`raw\.var_names` has 1 genes") as caught:
        match_genes(["A"], ["A", "A"], slot="raw.var_names")
    assert caught.value.fix == "pass duplicates='sum' to add them up"


@pytest.mark.parametrize("slot", ["var_names", "var['symbol']"])
def test_the_fix_for_repeated_names_keeps_the_first(slot: str) -> None:
    adata = anndata.AnnData(np.arange(6.0).reshape(2, 3), var=pd.DataFrame(index=["A", "B", "A2"]))
    adata.var["symbol"] = ["A", "B", "A"]
    if slot == "var_names":
        adata.var.index = pd.Index(adata.var["symbol"].to_numpy())
    with pytest.raises(DataError) as caught:
        match_genes(["A"], ["A", "B", "A"], slot=slot)
    scope = {"adata": adata}
    exec(caught.value.fix.rsplit(": ", 1)[1], scope)
    assert scope["adata"].X.tolist() == [[0, 1], [3, 4]]


@pytest.mark.parametrize(("argument", "name"), [("mapping", "gene_mapping"), ("duplicates", "duplicates")])
def test_unknown_choices_are_refused(argument: str, name: str) -> None:
    options: dict[str, Any] = {argument: "ortholog"}
    with pytest.raises(ConfigError, match=rf"(?s)`{name}` is 'ortholog'.*Fix: pass {name}='e"):
        match_genes(["A"], ["A"], **options)


def test_what_would_find_more() -> None:
    mouse = ["Trp53", "Il4ra", "Ptprc", "Cd4", "2-Sep"]
    panel = [*HUMAN[:4], "SEPT2"]
    assert match_genes(panel, mouse).would_match == {"orthologs": 4}
    assert match_genes(panel, mouse, mapping="exact").would_match == {"names": 1, "orthologs": 5}
    assert match_genes(panel, mouse, mapping="orthologs").would_match == {}
    assert match_genes(panel, [*panel, "x"]).would_match == {}


def test_columns_that_would_find_more() -> None:
    query = numbered("probe", 5)
    var = pd.DataFrame(
        {
            "symbols": pd.Categorical(HUMAN[:5]),
            "gene_ids": [f"{TP53}.{i}" for i in range(5)],
            "highly_variable": True,
            "counts": 1.5,
            "missing": [None, np.nan, "LYZ", "", "z"],
            "useless": "x",
        },
        index=query,
    )
    before = var.copy()
    more = {"var['symbols']": 5, "var['missing']": 1}
    assert match_genes(HUMAN, query, var=var).would_match == more
    assert match_genes(HUMAN, HUMAN[:5], var=var).would_match == {}
    assert match_genes([f"{TP53}.77"], query, var=var).would_match == {"var['gene_ids']": 1}
    pd.testing.assert_frame_equal(var, before)


def test_report_as_a_table() -> None:
    table = match_genes(["A", "B", TP53], [f"{TP53}.1", "A", "x"]).to_frame()
    assert table["gene"].tolist() == ["A", "B", TP53]
    assert table["found_as"].tolist() == ["A", None, f"{TP53}.1"]
    assert table["how"].tolist() == ["exact", "missing", "version"]


def test_report_as_text() -> None:
    report = match_genes([*HUMAN[:4], "HLA-A"], ["Trp53", "Il4ra", "Ptprc", "CD4", "HLA.A"])
    lines = str(report).splitlines()
    assert lines == [
        "2 of the 5 genes of the model, with 40.0% of its counts",
        "  equal names: 1, e.g. 'CD4'",
        "  names changed by R: 1, e.g. 'HLA-A'",
        "  missing: 3, e.g. 'TP53', 'IL4R', 'PTPRC'",
        "  gene_mapping='orthologs' would find 3 more",
    ]
    html = report._repr_html_()
    assert "2 of the 5 genes" in html
    assert html.count("<tr>") == 4


def test_report_escapes_names() -> None:
    assert "<b>" not in match_genes(["<b>"], ["<b>"])._repr_html_()


@pytest.mark.parametrize(
    ("n_panel", "n_found", "enough"),
    [(1, 1, True), (1, 0, False), (40, 4, True), (40, 3, False), (500, 50, True), (500, 49, False), (2000, 50, True)],
)
def test_least_number_of_genes(n_panel: int, n_found: int, enough: bool) -> None:
    panel = numbered("g", n_panel)
    frequency = np.where(np.arange(n_panel) < n_found, 0.999, 1e-9)
    report = match_genes(panel, panel[:n_found], frequency=frequency)
    if enough:
        require_overlap(report)
    else:
        with pytest.raises(GeneMismatchError):
            require_overlap(report, min_overlap=0)


def test_overlap_is_counted_by_mass() -> None:
    panel = numbered("g", 100)
    report = match_genes(panel, panel[:20], frequency=np.repeat([4.0, 0.25], [20, 80]))
    with pytest.warns(DataWarning, match=r"only 20 of the 100 genes .* 80\.0% of its counts.*'g20', 'g21', 'g22'"):
        require_overlap(report)
    with pytest.raises(GeneMismatchError, match=r"80\.0% of its counts, expected at least 81% .* and 10 genes"):
        require_overlap(report, min_overlap=0.81)


@pytest.mark.parametrize("min_overlap", [-0.1, 1.1, float("nan")])
def test_overlap_out_of_range(min_overlap: float) -> None:
    with pytest.raises(ConfigError, match="`min_overlap` is"):
        require_overlap(match_genes(["A"], ["A"]), min_overlap=min_overlap)


@pytest.mark.parametrize(
    ("panel", "query", "message"),
    [
        (numbered("TP", 20), numbered("ENSG0000000000", 20), r"gene symbols such as 'TP0'.* human Ensembl identifiers"),
        (numbered("ENSMUSG0000000000", 20), numbered("TP", 20), r"mouse Ensembl identifiers .* gene symbols such"),
        (numbered("TP", 20), numbered("ENSDARG0000000000", 20), r"data Ensembl identifiers such as 'ENSDARG"),
        (numbered("TP", 20), numbered("Trp", 20), r"data mouse-like gene symbols such as 'Trp0', 'Trp1', 'Trp2'"),
        (numbered("TP", 20), numbered("", 20), r"data numbers such as '0', '1', '2'"),
        (numbered("TP", 20), [], r"data no gene names\nFix: check that the species"),
        (numbered("TP", 20), ["", " ", "TP7"], r"20 genes .* 5\.0% .* and 2 genes.* 'TP7'\nFix: check"),
        (numbered("TP", 20), ["x" * 10_000], r"such as 'x{37}\.\.\.'\nFix"),
        (HUMAN, ["Trp53", "Il4ra", "Ptprc"], r"='orthologs' would find 3 more\nFix: pass gene_mapping='orthologs'\."),
        (
            HUMAN,
            ["TP53", "IL4R", "Ptprc", "Cd4"],
            r"\nFix: pass gene_mapping='orthologs', or min_overlap=0\.2 if the other genes were truly not measured\.",
        ),
        (numbered("TP", 20), ["tp7"], r"='orthologs' would find 1 more\nFix: check that the species"),
        (HUMAN, HUMAN[:4], r"\nFix: pass min_overlap=0\.4 if the other genes"),
    ],
    ids=[
        "ids",
        "ids-in-model",
        "other-ids",
        "mouse",
        "numbers",
        "none",
        "one",
        "long",
        "orthologs",
        "both",
        "too-few",
        "few",
    ],
)
def test_mismatch_says_why(panel: list[str], query: list[str], message: str) -> None:
    with pytest.raises(GeneMismatchError, match=rf"(?s)^`var_names` has \d+ of the .*{message}"):
        require_overlap(match_genes(panel, query))


@pytest.mark.parametrize("slot", ["var_names", "var['name']", "raw.var_names", "raw.var['name']"])
def test_mismatch_names_the_column_that_fits(slot: str) -> None:
    adata = anndata.AnnData(np.ones((2, 10), dtype=np.float32), var=pd.DataFrame(index=numbered("probe", 10)))
    adata.var["name"] = numbered("name", 10)
    adata.var["symbols"] = pd.Categorical(HUMAN)
    adata.raw = adata
    scope = {"adata": adata}
    table = "raw.var" if slot.startswith("raw.") else "var"
    var = eval(f"adata.{table}", scope)
    report = match_genes(HUMAN, [*eval(f"adata.{slot}", scope)], var=var, slot=slot)
    with pytest.raises(GeneMismatchError, match=r"[a-z.]*var\['symbols'\] would find 10 more") as caught:
        require_overlap(report, slot=slot)
    assert list(report.would_match) == [f"{table}['symbols']"]
    exec(caught.value.fix, scope)
    assert match_genes(HUMAN, [*eval(f"adata.{slot}", scope)]).n_matched == 10


def test_good_data_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="genejepa"):
        require_overlap(match_genes(HUMAN, [*HUMAN, "x"]))
        assert not caplog.records
        require_overlap(match_genes(["TP53", f"{CD99[0]}.1"], [TP53, CD99[0]]))
    assert [record.getMessage() for record in caplog.records] == [
        f"1 genes were found by Ensembl identifiers without version, e.g. '{CD99[0]}.1'",
        "1 genes were found by Ensembl identifier and symbol, e.g. 'TP53'",
    ]


@pytest.mark.parametrize(
    ("panel", "query", "message"),
    [
        (["HLA-A", "TP53"], ["HLA.A", "TP53"], r"`var_names` has 1 names that R or .* changed: 'HLA.A' for 'HLA-A'"),
        (["SEPT2", "DEC1"], ["2-Sep", "1-Dec"], r"has 2 names .* changed: '2-Sep' for 'SEPT2', '1-Dec' for 'DEC1'"),
        (
            ["Caf\u00e9", "B"],
            ["Cafe\u0301", "B"],
            r"has 1 names that equal .* Unicode normalisation \(NFC\): 'Caf\u00e9'",
        ),
    ],
    ids=["R", "dates", "unicode"],
)
def test_changed_names_are_warned_of(panel: list[str], query: list[str], message: str) -> None:
    with pytest.warns(DataWarning, match=message):
        require_overlap(match_genes(panel, query))


def test_white_space_is_not_warned_of() -> None:
    require_overlap(match_genes(["TP53", unicodedata.normalize("NFD", "Caf\u00e9")], ["TP53 ", "Cafe\u0301 "]))


def test_exact_match_is_fast() -> None:
    query = numbered("gene", 60_000)
    panel = query[::30]
    match_genes(panel, query)
    start = time.process_time()
    report: GeneReport = match_genes(panel, query)
    assert time.process_time() - start < 0.1
    assert report.n_matched == 2000
