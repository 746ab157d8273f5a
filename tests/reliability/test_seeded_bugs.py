"""Mistakes put into a copy of the package one by one: each has to turn a test red that is green without it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS_FAILED = 1  # exit code of pytest; others mean that it could not run them


class Bug(NamedTuple):
    """One mistake.

    Attributes
    ----------
    name
        What goes wrong.
    file
        Where, below ``genejepa``.
    old, new
        The text that is replaced, which occurs once, and what replaces it.
    test
        Who has to notice, below ``tests``.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


BUGS = (
    Bug(
        "files are renamed before they are on the disk",
        "files.py",
        'with temporary.open("r+b") as file:\n                os.fsync(file.fileno())',
        "pass",
        "reliability/test_bundle.py::test_a_loss_of_power_leaves_the_old_version_or_the_new_one",
    ),
    Bug(
        "what was written is not read again",
        "files.py",
        "if temporary.read_bytes() != data:",
        "if False:",
        "reliability/test_files.py::test_a_file_system_that_loses_bytes_is_noticed",
    ),
    Bug(
        "an error leaves the temporary file",
        "files.py",
        "temporary.unlink(missing_ok=True)\n            raise",
        "raise",
        "reliability/test_files.py::test_an_error_of_the_writer_leaves_the_old_file",
    ),
    Bug(
        "hashes are not compared",
        "bundle.py",
        'if found != entry["sha256"]:',
        "if False:",
        "reliability/test_model_files.py::test_every_flipped_bit_is_noticed",
    ),
    Bug(
        "the manifest's own checksum is not compared",
        "bundle.py",
        "if _manifest_bytes(body) != manifest:",
        "if False:",
        "reliability/test_model_files.py::test_every_flipped_bit_is_noticed",
    ),
    Bug(
        "a manifest may name any file",
        "bundle.py",
        ' or not _STORED.fullmatch(entry["stored_as"])',
        "",
        "reliability/test_security.py::test_malicious_files_are_refused",
    ),
    Bug(
        "links out of the directory are followed",
        "bundle.py",
        "status = path.lstat()",
        "status = path.stat()",
        "reliability/test_security.py::test_malicious_files_are_refused",
    ),
    Bug(
        "of two entries of one name the last counts",
        "bundle.py",
        "object_pairs_hook=_without_repeats,",
        "",
        "reliability/test_model_files.py::test_a_model_that_does_not_fit_together_is_refused",
    ),
    Bug(
        "a directory of somebody else is written to",
        "bundle.py",
        "if foreign := _foreign_names(directory):",
        "if foreign := []:",
        "reliability/test_model_files.py::test_a_foreign_directory_is_left_alone",
    ),
    Bug(
        "a reader that meets a writer gives up",
        "bundle.py",
        "if _manifest_of(directory, kind=kind)[1] == written:",
        "if True:",
        "reliability/test_bundle.py::test_a_reader_takes_the_version_that_has_replaced_the_one_it_began_with",
    ),
    Bug(
        "weights are loaded in part",
        "model.py",
        "jepa.load_state_dict(weights, assign=True)",
        "return self._new_network(seed=0)",
        "reliability/test_model_files.py::test_weights_are_never_loaded_in_part",
    ),
    Bug(
        "a pickle is read",
        "persistence.py",
        'size = int.from_bytes(data[:8], "little")',
        'if data[:1] == b"\\x80":\n        __import__("pickle").loads(data)\n    '
        'size = int.from_bytes(data[:8], "little")',
        "reliability/test_security.py::test_malicious_files_run_nothing",
    ),
    Bug(
        "genes are read in the order of the file",
        "data/counts.py",
        'order = np.argsort(keys, kind="stable")',
        "order = np.arange(len(keys))",
        "data/test_counts.py::test_panel_does_not_depend_on_the_order_of_columns_nor_on_other_genes",
    ),
    Bug(
        "genes are matched by position",
        "data/gene_search.py",
        "self.query = [clean_name(name) for name in query]",
        "self.query = [*self.panel, *map(clean_name, query[len(panel) :])][: len(query)]",
        "reliability/test_names.py::test_reordered_genes",
    ),
    Bug(
        "of several answers the first is taken",
        "data/gene_search.py",
        " and one_name and len(genes[key]) == 1",
        "",
        "data/test_matching.py::test_several_answers_are_none",
    ),
    Bug(
        "overlap is counted in genes",
        "data/gene_report.py",
        "if report.mass < min_overlap or",
        "if report.n_matched / len(report.panel) < min_overlap or",
        "data/test_matching.py::test_overlap_is_counted_by_mass",
    ),
    Bug(
        "absent genes are zeros",
        "query.py",
        "return None if found.all() else found",
        "return None",
        "test_model.py::test_missing_genes_are_not_zeros",
    ),
    Bug(
        "the first batch is taken for an unknown one",
        "data/batches.py",
        "row.get(name, -1)",
        "row.get(name) or -1",
        "reliability/test_obs.py::test_batches_are_mapped_by_name",
    ),
    Bug(
        "only the first cells are looked at",
        "data/counts.py",
        "for start, block in counts.blocks():",
        "for start, block in list(counts.blocks())[:1]:",
        "reliability/test_values.py::test_one_bad_value_is_found_wherever_it_is",
    ),
    Bug(
        "a lone cell is not padded",
        "encode.py",
        "np.resize(cells, _ROWS)",
        "cells",
        "test_model.py::test_batch_size_changes_no_bit",
    ),
    Bug(
        "the order of the cells comes from the global generator",
        "data/loader.py",
        "np.random.default_rng([self.seed, _ORDER_STREAM, epoch]).permutation(",
        "np.random.permutation(",
        "data/test_loader_normalization.py::test_a_batch_is_a_function_of_its_step",
    ),
    Bug(
        "the learning rate begins again",
        "train/module.py",
        "learning_rate_factor(self._first_step + step,",
        "learning_rate_factor(step,",
        "reliability/test_resume.py::test_a_stopped_and_resumed_training_equals_one_that_was_not_stopped",
    ),
    Bug(
        "the moving average begins again",
        "train/module.py",
        "ema_decay(self.steps_done,",
        "ema_decay(int(self.trainer.global_step),",
        "reliability/test_resume.py::test_a_stopped_and_resumed_training_equals_one_that_was_not_stopped",
    ),
    Bug(
        "moments are not restored",
        "train/module.py",
        "self._start.restore(self.jepa, optimizer)",
        "self._start.restore(self.jepa)",
        "reliability/test_resume.py::test_a_stopped_and_resumed_training_equals_one_that_was_not_stopped",
    ),
    Bug(
        "a resumed epoch begins with its first cells",
        "data/loader.py",
        "range(max(start, self.first_step),",
        "range(start,",
        "reliability/test_resume.py::test_a_stopped_and_resumed_training_equals_one_that_was_not_stopped",
    ),
    Bug(
        "a gradient that is not finite is used",
        "train/module.py",
        "and not torch.isfinite(norm)",
        "and False",
        "reliability/test_failures.py::test_a_gradient_that_is_not_finite_ends_the_training_before_the_weights_change",
    ),
    Bug(
        "SIGTERM looks like success",
        "model.py",
        "raise SystemExit(_EXIT_TERMINATED)",
        "pass",
        "reliability/test_signals.py::test_a_signal_at_any_place_of_the_loop_ends_the_training_between_two_steps",
    ),
    Bug(
        "other settings may go on",
        "train/state.py",
        "if changes:",
        "if False:",
        "reliability/test_model_files.py::test_a_checkpoint_of_another_training_lists_every_difference",
    ),
)

by_name = pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.name) for bug in BUGS])


@by_name
def test_seeded_bug_can_be_made(bug: Bug) -> None:
    """The text is there once, the result is Python, and the test that has to notice exists."""
    source = (REPOSITORY / "genejepa" / bug.file).read_text(encoding="utf-8")
    assert source.count(bug.old) == 1
    ast.parse(source.replace(bug.old, bug.new))
    path, _, name = bug.test.partition("::")
    tests = ast.parse((REPOSITORY / "tests" / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tests) if isinstance(node, ast.FunctionDef)}


def test_there_are_enough_bugs() -> None:
    assert len({(bug.file, bug.old) for bug in BUGS}) == len(BUGS) >= 15


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the repository's package and tests."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("genejepa", "tests", "data"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    yield folder
    shutil.rmtree(folder)


def run_tests(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests of the copy on the package of the copy."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)],
        cwd=copy,
        # A child process of a test, too, has to import the copy; compiled files of the version before would mislead.
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "GENEJEPA_PROFILE": "fast"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_without_a_bug_all_tests_are_green(copy: Path) -> None:
    where = [sys.executable, "-c", "import genejepa; print(genejepa.__file__)"]
    found = subprocess.run(
        where, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(copy)
    done = run_tests(copy, *sorted({bug.test for bug in BUGS}))
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@by_name
def test_seeded_bug_is_noticed(bug: Bug, copy: Path, record_figure: Callable[[str, Any], None]) -> None:
    path = copy / "genejepa" / bug.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(bug.old, bug.new), encoding="utf-8")
    try:
        done = run_tests(copy, bug.test)
    finally:
        path.write_text(source, encoding="utf-8")
    assert done.returncode == TESTS_FAILED, done.stdout[-4000:] + done.stderr[-4000:]
    record_figure("seeded bugs found", 1)
