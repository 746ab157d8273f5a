from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import pytest
import typer
from anndata import AnnData, read_h5ad
from typer.testing import CliRunner, Result

import genejepa
from genejepa.bundle import is_bundle, write_bundle
from genejepa.cli import app, commands, watch
from genejepa.cli.errors import plain_errors
from genejepa.data.inputs import read_cells
from genejepa.errors import CollapseWarning, DataError
from genejepa.pl import _embedding

if TYPE_CHECKING:
    from collections.abc import Callable
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


@pytest.mark.parametrize("command", ["fit", "embed", "energy", "probe", "info"])
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


def test_energy_equals_python(folder: Path, cells: AnnData, tmp_path: Path) -> None:
    known, out = folder / "out" / "cells.h5ad", tmp_path / "energies.h5ad"
    result = genejepa_command(
        "energy", folder / "cells.h5ad", "--model", folder / "out" / "model", "--reference", known, "-o", out
    )
    assert result.exit_code == 0, result.output
    assert "50 %:" in result.stdout
    expected = genejepa.GeneJEPA.load(folder / "out" / "model").energy(cells, reference=cells)
    np.testing.assert_array_equal(read_h5ad(out).obs["energy"], expected)
    again = genejepa_command(
        "energy", folder / "cells.h5ad", "--model", folder / "out" / "model", "--reference", known, "-o", out
    )
    assert again.exit_code == 2
    assert "exists" in again.output


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
    assert not (tmp_path / "out").exists()


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
    (tmp_path / "none.h5ad").touch()
    for devices in ("abc", "1,x", "0", ""):
        assert f"devices` is {devices!r}".replace("'0'", "0") in refused(*arguments, "--devices", devices)
    assert not (tmp_path / "out").exists()


def test_files_are_checked(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("fit", tmp_path / "none.h5ad", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
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


# What is there already --------------------------------------------------------------------------------


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    """A copy of the output of the fit, with a checkpoint that was left."""
    shutil.copytree(folder / "out", tmp_path / "out")
    files = {"state.json": b"{}", "tensors.safetensors": b""}
    write_bundle(tmp_path / "out" / "checkpoint", files, kind="checkpoint", version=1)
    return tmp_path / "out"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(genejepa.GeneJEPA, "train", interrupted)


def content_of(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "mistake",
    [
        *(["--layer", "typo"], ["--batch-key", "typo"], ["--labels-key", "typo"], ["--mask-var", "typo"]),
        *(["--gene-symbols", "typo"], ["--set", "typo=1"], ["--devices", "typo"]),
    ],
    ids="".join,
)
def test_a_mistake_costs_no_earlier_result(mistake: list[str], folder: Path, out: Path) -> None:
    before = content_of(out)
    assert "typo" in refused("fit", folder / "cells.h5ad", "-o", out, "--overwrite", *QUICK, *mistake)
    assert content_of(out) == before


@pytest.mark.usefixtures("no_training")
def test_nothing_of_an_earlier_training_is_left_when_a_new_one_begins(folder: Path, out: Path) -> None:
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    result = genejepa_command("fit", folder / "cells.h5ad", "-o", out, "--overwrite", *QUICK)
    assert result.exit_code == 130, result.output
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("no_training")
def test_the_input_is_replaced_only_on_request_and_only_by_the_result(folder: Path, tmp_path: Path) -> None:
    cells = tmp_path / "cells.h5ad"
    shutil.copy(folder / "cells.h5ad", cells)
    before = content_of(tmp_path)
    assert "is not empty" in refused("fit", cells, "-o", tmp_path, *QUICK)
    assert "cells.h5ad is there, and was not written by" in refused("fit", cells, "-o", tmp_path, "--resume", *QUICK)
    assert genejepa_command("fit", cells, "-o", tmp_path, "--overwrite", *QUICK).exit_code == 130
    assert content_of(tmp_path) == before


@pytest.mark.usefixtures("no_training")
def test_resume_replaces_only_what_the_training_has_written(folder: Path, out: Path) -> None:
    arguments: list[Any] = ["fit", folder / "cells.h5ad", "-o", out, "--resume", *QUICK]
    assert genejepa_command(*arguments).exit_code == 130  # all of it is
    shutil.copy(folder / "cells.h5ad", out / "cells.h5ad")
    before = content_of(out)
    assert "cells.h5ad is there, and was not written by" in refused(*arguments)
    (out / "cells.h5ad").unlink()
    assert "probe.csv is there, and was not written by" in refused(*arguments)
    assert genejepa_command(*arguments, "--overwrite").exit_code == 130
    assert content_of(out).items() <= before.items()


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
@pytest.mark.parametrize("name", ["model", "checkpoint"])
def test_a_manifest_of_others_is_no_model(option: str, name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "manifest.json").write_text('{"name": "My app"}', encoding="utf-8")
    before = content_of(tmp_path)
    assert "not of genejepa" in refused("fit", folder / "cells.h5ad", "-o", tmp_path, option, *QUICK)
    assert content_of(tmp_path) == before


def test_a_complete_fit_of_other_cells_or_settings_is_not_taken_for_this_one(folder: Path, cells: AnnData) -> None:
    others = cells[:199].copy()
    others.write_h5ad(folder / "others.h5ad")
    mistakes: dict[str, list[Any]] = {
        "seed was 0 and is 1": [folder / "cells.h5ad", "--seed", "1"],
        "batch_key was None and is 'cell_type'": [folder / "cells.h5ad", "--batch-key", "cell_type"],
        "precision was '32-true' and is '16-mixed'": [folder / "cells.h5ad", "--precision", "16-mixed"],
        "the counts, genes or batches are others": [folder / "others.h5ad"],
    }
    for expected, arguments in mistakes.items():
        message = refused("fit", "-o", folder / "out", "--resume", *QUICK, *arguments)
        assert "is complete, and not of these cells and settings" in message
        assert expected in message


def test_a_training_that_cannot_be_resumed_names_options_of_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments: list[Any] = ["fit", folder / "cells.h5ad", "-o", tmp_path / "out", "--resume", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(commands, "_write_outputs", killed)
        assert genejepa_command(*arguments).exit_code == 130
    assert is_bundle(tmp_path / "out" / "checkpoint")
    message = refused(*arguments, "--seed", "1")
    assert "seed was 0 and is 1" in message
    assert "checkpoint_dir" not in message
    assert "leave --resume out and pass --overwrite" in message


# Places to write to -----------------------------------------------------------------------------------


def test_a_home_directory_in_quotes_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    arguments = ("embed", "~/cells.h5ad", "--model", folder / "out" / "model", "-o", tmp_path / "new.h5ad")
    result = genejepa_command(*arguments)
    assert result.exit_code == 0, result.output


def test_an_output_through_a_link_is_written_where_it_leads(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "disk" / "cells.h5ad")
    arguments = ("embed", folder / "cells.h5ad", "--model", folder / "out" / "model", "-o", tmp_path / "link.h5ad")
    assert genejepa_command(*arguments).exit_code == 0
    assert (tmp_path / "link.h5ad").is_symlink()
    assert "X_genejepa" in read_h5ad(tmp_path / "disk" / "cells.h5ad").obsm
    assert "exists" in refused(*arguments)


def test_what_is_no_file_is_refused_as_output_before_anything_is_read(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    none = tmp_path / "none.h5ad"
    options: list[Any] = ["--overwrite", "--model", folder / "out" / "model", "-o", tmp_path / "pipe"]
    assert "pipe exists and is not a regular file" in refused("embed", none, *options)
    options = ["--overwrite", "--labels-key", "cell_type", "--output", tmp_path / "pipe"]
    assert "pipe exists and is not a regular file" in refused("probe", none, *options)
    (tmp_path / "pipe").rename(tmp_path / "report.html")
    assert "report.html exists and is not a" in refused("fit", none, "-o", tmp_path, "--overwrite")


@pytest.mark.parametrize("key", ["a/b", ""])
def test_a_key_that_no_file_can_hold_is_refused_before_anything_is_written(
    key: str, folder: Path, tmp_path: Path
) -> None:
    arguments = ("embed", folder / "cells.h5ad", "--model", folder / "out" / "model", "-o", tmp_path / "new.h5ad")
    assert "`key_added` is" in refused(*arguments, "--key-added", key)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_cells_are_compressed_as_before(compression: Any, folder: Path, tmp_path: Path, cells: AnnData) -> None:
    cells[:20].copy().write_h5ad(tmp_path / "cells.h5ad", compression=compression)
    arguments = ("embed", tmp_path / "cells.h5ad", "--model", folder / "out" / "model", "-o", tmp_path / "new.h5ad")
    assert genejepa_command(*arguments).exit_code == 0
    with h5py.File(tmp_path / "new.h5ad") as file:
        assert file["X/data"].compression == compression
    assert (read_h5ad(tmp_path / "new.h5ad").X != cells[:20].X).nnz == 0


def test_room_is_looked_for_by_the_size_in_memory(
    folder: Path, tmp_path: Path, cells: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells.write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    asked: list[int] = []

    def check_writable(_: Path, *, n_bytes: int) -> None:
        asked.append(n_bytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "check_writable", check_writable)
    assert genejepa_command("fit", tmp_path / "cells.h5ad", "-o", tmp_path / "out", *QUICK).exit_code == 130
    assert asked[0] > cells.X.data.nbytes + cells.X.indices.nbytes > (tmp_path / "cells.h5ad").stat().st_size


# What is told -----------------------------------------------------------------------------------------


def test_embed_counts_the_genes_of_the_slot_that_it_has_used(folder: Path, tmp_path: Path, cells: AnnData) -> None:
    few = cells[:20, :50].copy()
    few.raw = cells[:20]
    few.write_h5ad(tmp_path / "few.h5ad")
    arguments = ("embed", tmp_path / "few.h5ad", "--model", folder / "out" / "model", "-o", tmp_path / "new.h5ad")
    result = genejepa_command(*arguments, "--use-raw")
    assert result.exit_code == 0, result.output
    assert "100 of the model's 100 found by name" in result.stdout


def test_info_of_odd_cells(tmp_path: Path) -> None:
    odd = AnnData(np.ones((3, 2), dtype=np.float32), uns={"genejepa": 5}, obsm={"X_\x1b[31m": np.ones((3, 2, 4))})
    odd.write_h5ad(tmp_path / "odd.h5ad")
    result = genejepa_command("info", tmp_path / "odd.h5ad")
    assert result.exit_code == 0, result.output
    assert "X_\\x1b[31m (2x4)" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    code = (
        "import typer; from genejepa.cli.errors import plain_errors\n"
        "plain_errors(lambda: [typer.echo('a line') for _ in range(10_000)] and None)()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE


def test_warnings_and_exhausted_memory_are_told_in_words(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        warnings.warn("The embedding is collapsing", CollapseWarning, stacklevel=1)
        raise MemoryError

    with pytest.raises(typer.Exit) as caught:
        plain_errors(command)()
    assert caught.value.exit_code == 2
    text = "Warning: The embedding is collapsing\nError: memory has run out.\nFix: use a computer with more memory"
    assert capfd.readouterr().err.startswith(text)


# Files that hang --------------------------------------------------------------------------------------


def hang(*_: object) -> None:
    """Do not come back, nor let other threads run, as the HDF5 library does."""
    ctypes.PyDLL(None).sleep(60)


@pytest.mark.parametrize("command", ["check", "fit", "embed", "probe", "info"])
def test_a_file_that_hangs_the_library_ends_the_command(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, list[Any]] = {
        "fit": ["-o", tmp_path / "out"],
        "embed": ["--model", folder / "out" / "model", "-o", tmp_path / "new.h5ad"],
        "probe": ["--labels-key", "cell_type"],
    }
    monkeypatch.setattr(watch, "_open_everything", hang)
    look = watch._require_answer
    monkeypatch.setattr(watch, "_require_answer", lambda path, *, seconds: look(path, seconds=seconds / 100))
    started = time.monotonic()
    message = refused(command, folder / "cells.h5ad", "--read-timeout", "10", *options.get(command, []))
    assert time.monotonic() - started < 5.0
    assert "cells.h5ad could not be opened in 0.1 s: it is so damaged that the HDF5 library hangs" in message
    assert "h5repack" in message
    assert "--read-timeout" in message
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_crashes_the_library_is_a_damaged_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_open_everything", lambda *_: os.kill(os.getpid(), signal.SIGSEGV))
    assert "the HDF5 library has crashed on it (signal 11)" in refused("info", folder / "cells.h5ad")


@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_process_that_nobody_waits_for_ends_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that looks at the file, should the command itself be killed."""
    monkeypatch.setattr("h5py.File", hang)
    process = multiprocessing.get_context("fork").Process(
        target=watch._open_everything, args=(folder / "cells.h5ad", 0.05)
    )
    process.start()
    process.join(10.0)
    assert process.exitcode == -signal.SIGALRM


@pytest.mark.parametrize("name", ["cells.h5ad", "text.h5ad", "none.h5ad"])
def test_other_files_are_read_as_without_a_watch(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("no HDF5", encoding="utf-8")
    path = (folder if name == "cells.h5ad" else tmp_path) / name
    found: list[str] = []
    readers: list[Callable[[], object]] = [
        lambda: read_cells(path, backed=True).shape,
        lambda: watch.read_watched(path, seconds=60, backed=True).shape,
    ]
    for read in readers:
        try:
            found.append(str(read()))
        except (DataError, OSError) as error:
            found.append(repr(error))
    assert found[0] == found[1]
