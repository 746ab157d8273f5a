"""What no line of the package may do: run what a file says, reach the network, write around ``genejepa.files``."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).resolve().parents[2] / "genejepa"
SOURCES = sorted(PACKAGE.rglob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))

UNSAFE_MODULES = {
    *("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"),
    *("subprocess", "pty", "code", "codeop", "runpy", "imp", "ctypes", "yaml"),
    *("socket", "ssl", "urllib", "http", "ftplib", "smtplib", "requests", "httpx", "aiohttp"),
}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "input", "print", "breakpoint"),
    *("os.system", "os.popen", "os.startfile", "os.fork", "os.execv", "os.posix_spawn"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "pandas.read_pickle", "pd.read_pickle"),
}
LOADS_BY_NAME = {"importlib.import_module"}
MAY_LOAD_BY_NAME = {"__init__.py", "bench/__init__.py"}

WRITING_METHODS = {
    *("write_text", "write_bytes", "write_h5ad", "write_zarr", "write_csvs", "write_loom", "savefig", "tofile"),
    *("to_pickle", "to_parquet", "to_excel", "to_hdf", "to_feather", "rename", "replace_file"),
}
WRITING_CALLS = {
    *("np.save", "np.savez", "np.savez_compressed", "np.savetxt", "json.dump", "shutil.copy", "shutil.copyfile"),
    *("shutil.move", "os.open", "os.rename", "os.replace", "tempfile.mkstemp", "tempfile.NamedTemporaryFile"),
    *("save_file", "np.memmap"),
}
FILES = "files.py"


def name_of(node: ast.expr) -> str:
    """Dotted name of an expression such as ``os.path.join``; empty if it has none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := name_of(node.value)):
        return f"{before}.{node.attr}"
    return ""


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Top-level packages that are imported anywhere, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module.partition(".")[0]


def unsafe(tree: ast.AST, *, may_load_by_name: bool = False) -> list[str]:
    """Imports and calls that could run code from a file, start a process, or open a connection."""
    found = [f"line {line}: {name}" for line, name in imported(tree) if name in UNSAFE_MODULES]
    refused = UNSAFE_CALLS if may_load_by_name else UNSAFE_CALLS | LOADS_BY_NAME
    for call in calls(tree):
        name = name_of(call.func)
        allows_pickle = any(
            keyword.arg == "allow_pickle"
            and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            for keyword in call.keywords
        )
        if name in refused or allows_pickle:
            found.append(f"line {call.lineno}: {name}")
    return found


def validating_asserts(tree: ast.AST) -> list[str]:
    """Asserts other than ``assert x is not None``, which tell a type checker what is known; -O removes them all."""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
        and not (
            isinstance(node.test, ast.Compare)
            and isinstance(node.test.ops[0], ast.IsNot)
            and isinstance(node.test.comparators[0], ast.Constant)
            and node.test.comparators[0].value is None
        )
    ]


def temporary_names(tree: ast.AST) -> set[str]:
    """Names of what may be written to: what ``replacing`` gives, files opened on that, and buffers in memory."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            for item in node.items:
                call, target = item.context_expr, item.optional_vars
                if not isinstance(call, ast.Call) or not isinstance(target, ast.Name):
                    continue
                of_ours = isinstance(call.func, ast.Attribute) and name_of(call.func.value) in names
                of_ours |= any(name_of(argument) in names for argument in call.args)
                if name_of(call.func) == "replacing" or of_ours:
                    names.add(target.id)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            in_memory = name_of(node.value.func) in ("io.BytesIO", "io.StringIO")
            names |= {target.id for target in node.targets if isinstance(target, ast.Name) and in_memory}
    return names


def writes(call: ast.Call) -> bool:
    """Whether a call writes to a file."""
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method == "to_csv":
        return bool(call.args) or any(keyword.arg == "path_or_buf" for keyword in call.keywords)
    if method == "open" or name_of(call.func) in ("open", "h5py.File"):
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        modes = [node.value for node in arguments if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        return any(set(mode) <= set("rwaxbt+-") and set(mode) & set("wax+") for mode in modes)
    return method in WRITING_METHODS or name_of(call.func) in WRITING_CALLS


def foreign_writes(tree: ast.AST) -> list[str]:
    """Calls that write elsewhere than to a temporary file of ``replacing`` or to memory."""
    ours = temporary_names(tree)
    found = []
    for call in calls(tree):
        receiver = name_of(call.func).partition(".")[0]
        if writes(call) and not ours & {receiver, *map(name_of, call.args)}:
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@each_source
def test_nothing_from_a_file_is_run(path: Path) -> None:
    """Row 107: no pickle in any coat, no eval, no process, no connection; and no print."""
    may_load = path.relative_to(PACKAGE).as_posix() in MAY_LOAD_BY_NAME
    assert unsafe(parse(path), may_load_by_name=may_load) == []


@each_source
def test_asserts_validate_nothing(path: Path) -> None:
    assert validating_asserts(parse(path)) == []


@each_source
def test_everything_is_written_through_one_module(path: Path) -> None:
    if path.name == FILES:
        pytest.skip("the one module")
    assert foreign_writes(parse(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "def f():\n    import subprocess",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "eval(text)",
        "os.system('ls')",
        "importlib.import_module(name)",
        "print(1)",
    ],
)
def test_unsafe_code_would_be_seen(code: str) -> None:
    assert len(unsafe(ast.parse(code))) == 1


@pytest.mark.parametrize("code", ["assert x", "assert x > 0", "assert isinstance(x, int)", "assert x is None"])
def test_validating_asserts_would_be_seen(code: str) -> None:
    assert len(validating_asserts(ast.parse(code))) == 1
    assert validating_asserts(ast.parse("assert self.x is not None")) == []


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'w')",
        "open(file=path, mode='ab')",
        "path.open('r+b')",
        "h5py.File(path, 'a')",
        "path.write_text(text)",
        "table.to_csv(path)",
        "adata.write_h5ad(path)",
        "figure.savefig(path)",
        "np.savez(path, a)",
        "with replacing(path) as temporary:\n    path.write_bytes(data)",
    ],
)
def test_foreign_writes_would_be_seen(code: str) -> None:
    assert len(foreign_writes(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "open(path)",
        "path.open('rb')",
        "h5py.File(path, 'r')",
        "table.to_csv(index=False)",
        "with replacing(path) as temporary:\n    adata.write_h5ad(temporary)",
        "with replacing(path) as temporary, temporary.open('wb') as file:\n    np.savez(file, a)",
        "buffer = io.BytesIO()\nfigure.savefig(buffer)",
    ],
)
def test_what_is_allowed_is_not_seen(code: str) -> None:
    assert foreign_writes(ast.parse(code)) == []
