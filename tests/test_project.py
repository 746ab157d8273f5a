from __future__ import annotations

import ast
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "genejepa"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LIGHTNING = {"lightning", "pytorch_lightning"}
UNSAFE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def imported_packages(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def requirement_name(requirement: str) -> str:
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0]


def test_requirements_have_a_floor_and_nothing_else(project: dict[str, Any]) -> None:
    groups: dict[str, list[str]] = project["dependency-groups"]
    for requirement in [*project["project"]["dependencies"], *groups["dev"], *groups["test"]]:
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", requirement), requirement


def test_requirements_are_declared_once(project: dict[str, Any]) -> None:
    names = [requirement_name(entry) for entry in project["project"]["dependencies"]]
    assert len(names) == len(set(names))


def test_constraints_pin_torch_above_the_floor(project: dict[str, Any]) -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert list(pins) == ["torch"]
    floor = next(
        entry.partition(">=")[2] for entry in project["project"]["dependencies"] if requirement_name(entry) == "torch"
    )
    assert [int(part) for part in pins["torch"].split(".")] >= [int(part) for part in floor.split(".")]


def test_wheel_carries_the_data(project: dict[str, Any]) -> None:
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["data/pbmc3k.h5ad"] == "genejepa/_bundled/pbmc3k.h5ad"
    for source in included:
        assert (REPOSITORY / source).is_file()


def test_makefile_has_the_targets_of_the_readme() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert {"demo", "test", "lint", "types", "format"} <= targets


def test_every_install_keeps_the_pinned_torch() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert installs
    for line in installs:
        assert "-c constraints.txt" in line or "'pip>=" in line, line


@pytest.mark.skipif(os.name == "nt", reason="file modes")
def test_ci_script_can_be_run() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


@each_source
def test_lightning_is_imported_in_one_place(path: Path) -> None:
    if path == PACKAGE / "_lightning.py":
        pytest.skip("the one place")
    assert LIGHTNING.isdisjoint(imported_packages(parse(path)))


@each_source
def test_no_pickle(path: Path) -> None:
    tree = parse(path)
    assert UNSAFE.isdisjoint(imported_packages(tree))
    for node in ast.walk(tree):
        # torch.load and torch.save are pickle in another coat
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"load", "save"}, f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), f"line {node.value.lineno}"
            assert node.value.value is False, f"line {node.value.lineno}"


@each_source
def test_no_print(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


@each_source
def test_annotations_are_postponed(path: Path) -> None:
    tree = parse(path)
    if not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AnnAssign) for node in ast.walk(tree)):
        pytest.skip("nothing to annotate")
    assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
