"""The documents: their Python runs, their shell lines parse, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import pytest
import typer

import genejepa
from genejepa.cli import app
from genejepa.config import ObjectiveConfig

if TYPE_CHECKING:
    from anndata import AnnData

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def code_blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, without the indentation that a list gives them."""
    pattern = rf"^( *)```{language}\n(.*?)^\1```$"
    found = re.finditer(pattern, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{match[1]}", "", match[2], flags=re.MULTILINE) for match in found]


def shell_lines() -> list[str]:
    blocks = [block for path in DOCUMENTS for block in code_blocks(path, "bash")]
    return [line for block in blocks for line in block.splitlines() if line.startswith("genejepa ")]


@pytest.fixture
def short_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every training take one pass over the cells, or five steps, whatever the document asks for."""
    train, fit = genejepa.GeneJEPA.train, genejepa.WorldModel.fit

    def short(self: genejepa.GeneJEPA, **options: Any) -> None:
        train(self, **{**options, "max_epochs": 1, "progress_bar": False, "threads": 1})

    def short_fit(self: genejepa.WorldModel, adata: AnnData, **options: Any) -> genejepa.WorldModel:
        return fit(self, adata, **{**options, "max_steps": 5})

    monkeypatch.setattr(genejepa.GeneJEPA, "train", short)
    monkeypatch.setattr(genejepa.WorldModel, "fit", short_fit)


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return genejepa.datasets.pbmc3k()[:300].copy()


@pytest.fixture
def working_directory(cells: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide few cells, as the bundled ones and as the files that the documents name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(genejepa.datasets, "pbmc3k", cells.copy)
    own = cells.copy()
    own.layers["counts"] = own.X
    own.obs["donor"] = ["a", "b"] * (own.n_obs // 2)
    own.write_h5ad("cells.h5ad")
    own[:40].write_h5ad("others.h5ad")


@pytest.mark.usefixtures("short_trainings", "working_directory")
@each_document
def test_python_of_the_documents_runs(path: Path) -> None:
    names: dict[str, Any] = {"__name__": "document"}
    with mpl.rc_context({"backend": "agg", "figure.max_open_warning": 0}):
        for block in code_blocks(path, "python"):
            exec(compile(block, path.name, "exec"), names)
    if path.name == "README.md":
        assert names["others"].obsm["X_genejepa"].shape == (40, 32)


def test_there_are_shell_lines() -> None:
    assert {line.split()[1] for line in shell_lines()} == {
        *("check", "fit", "embed", "energy", "predict", "plan", "probe", "info")
    }


@pytest.mark.parametrize("line", shell_lines())
def test_shell_lines_parse(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    group: Any = typer.main.get_command(app)
    command = group.commands[name]
    assert command.make_context(name, arguments).params


@each_document
def test_options_in_the_text_exist(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    known = {option for command in group.commands.values() for p in command.params for option in p.opts}
    text = re.sub(r"```bash.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known | {"--help"}


@each_document
def test_relative_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z]+)", DOCUMENTS[0].read_text(encoding="utf-8"), re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_default_weights_of_the_document_are_those_of_the_code() -> None:
    text = (REPOSITORY / "docs" / "objectives.md").read_text(encoding="utf-8")
    weights = {name: float(value) for name, value in re.findall(r"\| `([a-z]+)` \| ([0-9.]+) \|", text)}
    defaults = ObjectiveConfig()
    assert weights == {name: getattr(defaults, name) for name in weights}
    assert set(weights) == {"prediction", "diversity", "invariance", "depth", "information", "alignment"}
