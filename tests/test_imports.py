"""Parts of the package import in one direction only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "genejepa"

# A part may import itself and the parts named here.
MAY_IMPORT = {
    "errors": set(),
    "_constants": set(),
    "_version": set(),
    "_lightning": set(),
    "_arithmetic": set(),
    "config": {"errors"},
    "datasets": {"errors"},
    "data": {"_arithmetic", "_html", "_memory", "config", "errors", "_constants"},
    "nn": {"config", "errors"},
    "objectives": {"config", "errors"},
    "jepa": {"_arithmetic", "config", "nn", "data"},
    "encode": {"_arithmetic", "nn", "data"},
    "files": {"errors"},
    "bundle": {"_version", "errors", "files"},
    "persistence": {"_constants", "_memory", "bundle", "data", "errors"},
    "_memory": {"errors"},
    "train": {
        "_arithmetic",
        "_lightning",
        "_memory",
        "bundle",
        "config",
        "data",
        "errors",
        "files",
        "jepa",
        "nn",
        "objectives",
        "persistence",
    },
    "query": {"_constants", "data", "errors"},
    "checks": {"_constants", "_html", "data", "errors", "model", "query"},
    "evaluate": {"_constants", "config", "data", "errors"},
    "bench": {
        "_constants",
        "_lightning",
        "_version",
        "config",
        "data",
        "encode",
        "errors",
        "evaluate",
        "files",
        "jepa",
        "model",
        "nn",
        "objectives",
        "persistence",
        "train",
    },
    "pl": {"_constants", "data", "errors", "evaluate", "world"},
    "_html": set(),
    "report": {"_constants", "_html", "data", "errors", "files", "pl"},
    "model": {
        "_constants",
        "_lightning",
        "_memory",
        "_version",
        "bundle",
        "config",
        "data",
        "encode",
        "errors",
        "jepa",
        "persistence",
        "query",
        "train",
        "energy",
    },
    "energy": {"_arithmetic", "data", "errors", "jepa"},
    "simulation": {"config", "errors"},
    "world": {
        "_arithmetic",
        "_constants",
        "_lightning",
        "_memory",
        "bundle",
        "config",
        "data",
        "energy",
        "errors",
        "model",
        "persistence",
        "query",
        "train",
    },
    "api": {"_constants", "data", "model", "query"},
}

SOURCES = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
FILES = sorted(path for path in SOURCES if path.name != "__main__.py" and path.parts[0] != "cli")


def _part(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def _imported_parts(path: Path) -> set[str]:
    """Parts of genejepa that a file imports, in functions and for type checking too."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "genejepa":
            parts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("genejepa."):
            parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            parts |= {a.name.split(".")[1] for a in node.names if a.name.startswith("genejepa.")}
    return parts


@pytest.mark.parametrize("file", [f for f in FILES if str(f) != "__init__.py"], ids=str)
def test_a_part_imports_only_what_it_may(file: Path) -> None:
    part = _part(file)
    assert _imported_parts(PACKAGE / file) - {part} <= MAY_IMPORT[part]


def test_nothing_imports_the_command_line() -> None:
    importers = [f for f in FILES if "cli" in _imported_parts(PACKAGE / f)]
    assert importers == []
