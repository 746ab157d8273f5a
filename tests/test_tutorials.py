"""The tutorials run from top to bottom, with a short training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "tutorials").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


SHORT = """
import genejepa.datasets

max_epochs = 2
read_all = genejepa.datasets.pbmc3k
genejepa.datasets.pbmc3k = lambda: read_all()[:400].copy()
fit_all = genejepa.WorldModel.fit
genejepa.WorldModel.fit = lambda self, adata, **options: fit_all(self, adata, **{**options, "max_steps": 10})
"""


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def shortened(notebook: Any) -> Any:
    """Return the notebook with few cells and two passes over them."""
    parameters = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert [cell.source for cell in parameters] == ["max_epochs = None"]
    parameters[0].source = SHORT
    return notebook


PICTURES = {
    "01_quickstart.ipynb": 3,
    "02_energy.ipynb": 3,
    "03_perturbation.ipynb": 2,
    "04_time_and_planning.ipynb": 1,
}


def test_there_are_tutorials() -> None:
    assert [path.name for path in NOTEBOOKS] == sorted(PICTURES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@each_notebook
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = shortened(read(path))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES[path.name]
    texts = [o["data"]["text/plain"] for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    if path.name == "01_quickstart.ipynb":
        assert "True" in texts  # the loaded model embeds as the one in memory does


@each_notebook
def test_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@each_notebook
def test_links_of_the_notebook_lead_to_files(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
