"""That every row of the catalogue of bad input has a test, and every error of genejepa says what to do."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from genejepa import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "genejepa"
N_ROWS = 110

NOT_APPLICABLE = {
    30: "vectors take 256 bytes a cell, less than its counts: there is no option that keeps them out of memory",
    102: "the model does not know perturbations yet",
}
"""Rows that no test can be about, and why."""

CITATION = re.compile(
    r"(?<![a-z])rows?[ _](\d+)(?:\s*(?:-|to|–)\s*(\d+))?((?:, \d+(?:-\d+)?)*)(?:,? and (\d+))?", re.IGNORECASE
)


def rows_in(text: str) -> set[int]:
    """Rows that a text cites: ``row 7``, ``rows 7-9``, ``rows 7 to 9``, ``rows 1, 3-5 and 9``."""
    rows: set[int] = set()
    for first, last, further, final in CITATION.findall(text):
        spans = [(first, last or first), (final or first, final or first)]
        spans += [(part.split("-")[0], part.split("-")[-1]) for part in further.split(", ") if part]
        rows |= {row for start, end in spans for row in range(int(start), int(end) + 1)}
    return rows


def citations(tree: ast.Module) -> Iterator[tuple[str, set[int]]]:
    """Rows cited by each test: in its name, its docstring, and the ids of its cases.

    Ids are looked for in all strings that begin with ``row``; cases are often made from a table above the test.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield node.name, rows_in(f"{node.name} {ast.get_docstring(node) or ''}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"rows? \d", node.value):
            yield f"case in line {node.lineno}", rows_in(node.value)


def cited_rows() -> dict[int, list[str]]:
    """Where each row is tested."""
    found: dict[int, list[str]] = {}
    for path in sorted({*TESTS.rglob("test_*.py")} - {Path(__file__).resolve()}):
        for where, rows in citations(ast.parse(path.read_text(encoding="utf-8"))):
            for row in rows:
                found.setdefault(row, []).append(f"{path.name}: {where}")
    return found


def test_every_row_is_tested_or_set_aside(record_figure: Callable[[str, Any], None]) -> None:
    cited = cited_rows()
    every = set(range(1, N_ROWS + 1))
    assert sorted(every - cited.keys() - NOT_APPLICABLE.keys()) == []
    assert sorted(cited.keys() & NOT_APPLICABLE.keys()) == []
    assert sorted((cited.keys() | NOT_APPLICABLE.keys()) - every) == []
    record_figure("rows of the catalogue tested", len(cited))
    record_figure("rows set aside", len(NOT_APPLICABLE))


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("row 34: duplicated names", {34}),
        ("Rows 103 to 105, and more", {103, 104, 105}),
        ("rows 1-3, 7 and 9", {1, 2, 3, 7, 9}),
        ("rows 33-34, 38-40 and 51", {33, 34, 38, 39, 40, 51}),
        ("test_row_12_is_refused", {12}),
        ("of 7 rows; a row; arrow 5; rows with 3 cells", set()),
    ],
)
def test_citations_are_read(text: str, rows: set[int]) -> None:
    assert rows_in(text) == rows


# Errors -----------------------------------------------------------------------------------------------

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__
}
RAISED = {name: value for name, value in CLASSES.items() if issubclass(value, errors.GeneJEPAError)}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def made(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls that make an error or a warning of genejepa."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in RAISED:
                yield name, node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_error_says_what_to_do(path: Path) -> None:
    for name, call in made(ast.parse(path.read_text(encoding="utf-8"))):
        fix = next((keyword.value for keyword in call.keywords if keyword.arg == "fix"), None)
        assert fix is not None, f"line {call.lineno}: {name} without fix="
        if isinstance(fix, ast.Constant):
            assert isinstance(fix.value, str), f"line {call.lineno}"
            assert fix.value.strip(), f"line {call.lineno}: an empty fix"
            assert "\n" not in fix.value, f"line {call.lineno}: the fix has to be one line"
        for argument in call.args:
            texts = [node.value for node in ast.walk(argument) if isinstance(node, ast.Constant)]
            assert not any("Fix:" in text for text in texts if isinstance(text, str)), f"line {call.lineno}: Fix: twice"


@pytest.mark.parametrize("name", sorted(RAISED.keys() - {"GeneJEPAError"}))
def test_every_error_is_documented_used_and_a_builtin_too(name: str) -> None:
    error = RAISED[name]
    assert error.__doc__
    assert any(
        base
        for base in error.__mro__
        if base.__module__ == "builtins" and base not in (object, BaseException, Exception)
    )
    users = [name for path in SOURCES for used, _ in made(ast.parse(path.read_text(encoding="utf-8"))) if used == name]
    assert users
    made_here = error("Something was found.", fix="do this.")
    assert str(made_here) == "Something was found.\nFix: do this."


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - RAISED.keys()))
def test_every_warning_is_a_user_warning(name: str) -> None:
    assert issubclass(CLASSES[name], UserWarning)
    assert CLASSES[name].__doc__
