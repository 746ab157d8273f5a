from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from typer.testing import CliRunner, Result

import genejepa
from genejepa.cli import app
from genejepa.pl import _embedding

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ["--n-genes", "100", "--max-epochs", "1", "--threads", "1", "--precision", "32-true"]


def genejepa_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """Return the message of a call that ends with exit code 2, a hint and no traceback."""
    result = genejepa_command(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Error: ")
    assert "\nFix: " in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return genejepa.datasets.pbmc3k()[:200].copy()


@pytest.fixture(scope="module")
def folder(cells: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the cells and the output of a fit; two dimensions stand for the UMAP, which is slow."""
    path = tmp_path_factory.mktemp("cli")
    cells.write_h5ad(path / "cells.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_embedding, "_umap", lambda Z, **_: Z[:, :2].astype(np.float64))
        result = genejepa_command("fit", path / "cells.h5ad", "-o", path / "out", "--labels-key", "cell_type", *QUICK)
    assert result.exit_code == 0, result.output
    (path / "summary.txt").write_text(result.stdout, encoding="utf-8")
    return path


def test_help_is_instant() -> None:
    code = (
        "import sys; from genejepa.cli import app; from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "heavy = {'torch', 'scanpy', 'anndata', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else result.exit_code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_module_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "genejepa", "--version"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.strip() == genejepa.__version__


@pytest.mark.parametrize("command", ["fit", "embed", "probe", "info"])
def test_help_has_an_example(command: str) -> None:
    result = genejepa_command(command, "--help")
    assert result.exit_code == 0
    assert f"Example: genejepa {command} " in result.output


def test_fit_writes_everything(folder: Path, cells: AnnData) -> None:
    out = folder / "out"
    assert sorted(path.name for path in out.iterdir()) == ["cells.h5ad", "model", "probe.csv", "report.html"]
    written = read_h5ad(out / "cells.h5ad")
    assert written.obsm["X_genejepa"].shape == (200, 64)
    assert (written.X != cells.X).nnz == 0
    assert list(written.obs_names) == list(cells.obs_names)
    model = genejepa.GeneJEPA.load(out / "model")
    assert written.uns["genejepa"]["model_id"] == model.model_id
    np.testing.assert_array_equal(model.get_latent_representation(written), written.obsm["X_genejepa"])
    table = pd.read_csv(out / "probe.csv")
    assert set(table["probe"]) == {"linear", "knn", "few_shot"}
    assert "cells.h5ad" in (out / "report.html").read_text(encoding="utf-8")


def test_fit_sums_up(folder: Path) -> None:
    text = (folder / "summary.txt").read_text(encoding="utf-8")
    lines = dict(line.split("  ", 1) for line in text.splitlines())
    assert lines["Cells"].strip() == "200"
    assert lines["Genes"].strip() == "100 of 13,713"
    assert lines["Training"].strip().startswith("1 step in ")
    assert lines["Effective rank"].strip().endswith(" of 64")
    assert " to " in lines["Macro-F1, linear"]
    assert str(folder / "out" / "report.html") in lines["Written"]


def test_embed_equals_python(folder: Path, cells: AnnData) -> None:
    others = cells[:50, ::-1].copy()
    others.write_h5ad(folder / "others.h5ad")
    target = folder / "embedded.h5ad"
    arguments = ("embed", folder / "others.h5ad", "--model", folder / "out" / "model", "-o", target)
    result = genejepa_command(*arguments, "--key-added", "X_mine")
    assert result.exit_code == 0, result.output
    assert "100 of the model's 100 found by name" in result.stdout
    expected = read_h5ad(folder / "out" / "cells.h5ad").obsm["X_genejepa"][:50]
    np.testing.assert_allclose(read_h5ad(target).obsm["X_mine"], expected, atol=1e-5)
    assert [path.name for path in folder.glob(".*.tmp")] == []
    assert "exists" in refused(*arguments)
    assert genejepa_command(*arguments, "--overwrite").exit_code == 0
    assert list(read_h5ad(target).obsm) == ["X_genejepa"]


def test_probe_prints_and_writes(folder: Path) -> None:
    table = folder / "scores.csv"
    arguments = ("probe", folder / "out" / "cells.h5ad", "--labels-key", "cell_type", "--kind", "knn")
    result = genejepa_command(*arguments, "--output", table)
    assert result.exit_code == 0, result.output
    assert "macro f1" in result.stdout
    assert "Left out, as they have too few cells: DC" in result.stdout
    earlier = pd.read_csv(folder / "out" / "probe.csv")
    expected = earlier[earlier["probe"] == "knn"].reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_csv(table), expected)


def test_info_of_a_model(folder: Path) -> None:
    for path in (folder / "out" / "model", folder / "out"):
        result = genejepa_command("info", path)
        assert result.exit_code == 0, result.output
        assert "100 genes" in result.stdout
        assert "200 cells" in result.stdout
        assert "embedding_dim" in result.stdout


def test_info_of_cells(folder: Path, cells: AnnData) -> None:
    changed = AnnData(cells.X * np.float32(0.5), cells.obs, cells.var, layers={"counts": cells.X})
    changed.write_h5ad(folder / "two.h5ad")
    result = genejepa_command("info", folder / "two.h5ad")
    assert result.exit_code == 0, result.output
    lines = [line.split("  ", 1) for line in result.stdout.splitlines()]
    facts = {name: value.strip() for name, value in lines}
    assert facts["X"].startswith("not raw counts: `X` holds")
    assert facts["layers['counts']"] == "raw counts"
    assert facts["Usable as labels"].startswith("cell_type (8 levels of 3 to 53 cells)")


def test_log_normalised_cells_are_refused(tmp_path: Path, cells: AnnData) -> None:
    logged = AnnData(np.log1p(cells.X.toarray()), cells.obs, cells.var)
    logged.write_h5ad(tmp_path / "log.h5ad")
    assert "looks log-normalised" in refused("fit", tmp_path / "log.h5ad", "-o", tmp_path / "out")


def test_missing_slots_are_refused(folder: Path, tmp_path: Path) -> None:
    arguments: list[Any] = ["fit", folder / "cells.h5ad", "-o", tmp_path / "out"]
    assert "layers['raw']" in refused(*arguments, "--layer", "raw")
    assert "obs['type']" in refused(*arguments, "--labels-key", "type")
    assert "obsm['X_genejepa']" in refused("probe", folder / "cells.h5ad", "--labels-key", "cell_type")


def test_settings_are_checked_before_files(tmp_path: Path) -> None:
    arguments: list[Any] = ["fit", tmp_path / "none.h5ad", "-o", tmp_path / "out"]
    assert "`informaton` is not a setting" in refused(*arguments, "--set", "informaton=0")
    assert "has no value" in refused(*arguments, "--set", "information")
    assert "`embedding_dim` is 'wide'" in refused(*arguments, "--set", "embedding_dim=wide")
    assert "`max_epochs` is 0" in refused(*arguments, "--max-epochs", "0")
    assert not (tmp_path / "out").exists()


def test_files_are_checked(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("fit", tmp_path / "none.h5ad", "-o", tmp_path / "out")
    (tmp_path / "text.h5ad").write_text("no HDF5", encoding="utf-8")
    assert "is not a readable h5ad" in refused("info", tmp_path / "text.h5ad")
    assert "is not the directory of a model" in refused("info", tmp_path)
    cells, target = folder / "cells.h5ad", tmp_path / "new.h5ad"
    assert "no manifest.json" in refused("embed", cells, "--model", tmp_path, "-o", target)
    assert "does not exist" in refused("embed", cells, "--model", tmp_path, "-o", tmp_path / "no" / "new.h5ad")


def test_check_tells_good_cells_from_bad_ones(folder: Path, tmp_path: Path, cells: AnnData) -> None:
    model = folder / "out" / "model"
    good = genejepa_command("check", folder / "cells.h5ad", "--labels-key", "cell_type", "--model", model)
    assert good.exit_code == 0, good.output
    assert "raw counts" in good.stdout
    logged = AnnData(np.log1p(cells.X.toarray()), cells.obs, cells.var, layers={"counts": cells.X})
    logged.write_h5ad(tmp_path / "log.h5ad")
    bad = genejepa_command("check", tmp_path / "log.h5ad", "--batch-key", "donor")
    assert bad.exit_code == 2, bad.output
    assert "looks log-normalised" in bad.stdout  # and not only the first thing that is wrong
    assert "obs['donor']" in bad.stdout
    assert genejepa_command("check", tmp_path / "log.h5ad", "--layer", "counts").exit_code == 0


def test_a_complete_fit_is_not_repeated_by_resume(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    result = genejepa_command("fit", folder / "cells.h5ad", "-o", folder / "out", "--resume", *QUICK)
    assert result.exit_code == 0, result.output
    assert "Nothing to resume" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")} == before


def test_output_directory_is_not_mixed_up(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert "is not empty" in refused("fit", folder / "cells.h5ad", "-o", tmp_path)
    assert "is a file" in refused("fit", folder / "cells.h5ad", "-o", tmp_path / "notes.txt")


def test_overwriting_leaves_other_files_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_embedding, "_umap", lambda Z, **_: Z[:, :2].astype(np.float64))
    for name in ("notes.txt", "probe.csv"):
        (tmp_path / name).write_text("old", encoding="utf-8")
    result = genejepa_command(
        "fit", folder / "cells.h5ad", "-o", tmp_path, "--overwrite", *QUICK, "--set", "embedding_dim=16"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "old"
    assert not (tmp_path / "probe.csv").exists()
    assert read_h5ad(tmp_path / "cells.h5ad").obsm["X_genejepa"].shape == (200, 16)
