"""Run the long reliability tests and write docs/reliability.md with what they measured.

    make reliability                                              # up to an hour on two cores
    python benchmarks/reliability.py --profile fast --minutes 10  # to try it

Every file of ``tests/reliability`` runs in a process of its own, two at a time. The document is written only if every
test has passed within the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
TESTS = REPOSITORY / "tests" / "reliability"
DOCUMENT = REPOSITORY / "docs" / "reliability.md"

LONGEST_FIRST = ("test_model_files.py", "test_kill.py", "test_fuzz.py", "test_signals.py", "test_seeded_bugs.py")
"""Files that take minutes; with two processes it matters that they start first."""

PACKAGES = ("torch", "pytorch-lightning", "anndata", "h5py", "safetensors", "numpy", "scipy", "pandas")
OUTCOMES = ("passed", "failed", "skipped")

INTRODUCTION = """\
<!-- Written by benchmarks/reliability.py: do not edit. -->

# Reliability

What genejepa promises about bad input, interruptions and files, how each promise is tested, and what the tests of the
last long run measured. The tests are in `tests/reliability`. How many random cases they try is their profile, named
below: `make test` runs the fast one, `make reliability` the nightly one.
"""


class Promise(NamedTuple):
    """What users may rely on, how it is tested, and the figures that belong to it with their words."""

    what: str
    how: str
    figures: dict[str, str]


PROMISES = (
    Promise(
        "Any AnnData gives a right answer or a clear error",
        "Every row of a catalogue of bad input (values, shapes, names, containers, columns, files) is a test of the "
        "outcome and of the message. Checks like those of scikit-learn's `check_estimator` run over dense, sparse, "
        "backed and zarr data. Random AnnData are compared with an oracle that is computed independently: no error "
        "outside the classes of `genejepa.errors`, no value that is not finite, no change of the input or of a global "
        "random state.",
        {
            "rows of the catalogue tested": "rows of the catalogue",
            "rows set aside": "rows set aside, with a reason",
            "checks": "checks of an embedder",
            "cases": "random AnnData",
            "failures": "random AnnData with another outcome than expected",
        },
    ),
    Promise(
        "Equal seeds give equal bits",
        "Weights and vectors are compared over numbers of workers, hash seeds, containers and processes. With another "
        "number of threads, vectors may differ in their last bits.",
        {"runs": "runs compared", "largest difference over threads": "largest difference over threads"},
    ),
    Promise(
        "A training that is killed loses at most the steps since its last checkpoint",
        "Processes are killed (SIGKILL) at random moments and at every step of writing a file, and started again until "
        "they are done: weights, moments and history are those of a training that was never killed, bit for bit. The "
        "control with plain writes leaves checkpoints that cannot be read.",
        {
            "random kills": "random kills",
            "trainings finished after random kills": "trainings finished after them",
            "most steps lost by a kill": "most steps lost",
            "steps between checkpoints": "steps between checkpoints",
            "pairs of kills": "kills that were followed by another one during recovery",
        },
    ),
    Promise(
        "Ctrl-C returns a usable model, SIGTERM leaves a checkpoint",
        "Processes, the command line and a notebook are interrupted at random moments, with and without workers.",
        {
            "SIGINT at random moments": "interruptions by Ctrl-C",
            "most seconds from SIGINT to the return of train": "most seconds until `train` returned",
            "SIGTERM at random moments": "interruptions by SIGTERM",
            "most seconds from SIGTERM to the end of the process": "most seconds until the process ended",
        },
    ),
    Promise(
        "A file is the old one or the new one, never a part",
        "Errors are injected at every operation of every writer; after each prefix of the operations, without what was "
        "not flushed, a reader finds the old version or the new one; disks of many sizes run full; processes write one "
        "directory at once while others read it.",
        {
            "states after a loss of power": "states after a loss of power",
            "models written at once": "models written at once",
            "whole models read meanwhile": "models read meanwhile, all whole",
        },
    ),
    Promise(
        "A model file that was damaged is refused",
        "Every single bit of every file of a small model is flipped and every file is cut at every length. Files that "
        "are changed at random under hashes that agree, as an attacker could, give a model or `ModelFileError`.",
        {
            "bits of a model flipped": "bits of a model flipped",
            "bits of a checkpoint flipped": "bits of a checkpoint flipped",
            "lengths of files of a model tried": "lengths of files of a model",
            "lengths of files of a checkpoint tried": "lengths of files of a checkpoint",
            "changes of manifest.json": "changes of manifest.json",
            "changes of config.json": "changes of config.json",
            "changes of genes.csv": "changes of genes.csv",
            "changes of tensors.safetensors": "changes of tensors.safetensors",
            "changes of state.json": "changes of state.json",
        },
    ),
    Promise(
        "Loading a model runs no code",
        "Bombs in five formats, files of other programs, names and links that lead elsewhere, claims of size and texts "
        "nested deep are loaded under an audit hook that would see any code, process, connection, import or change of "
        "a file. As a control, the same hook sees each bomb go off in the reader that it was made for.",
        {
            "malicious files refused": "malicious files refused",
            "slowest malicious file, seconds": "most seconds of processor time for one",
            "most memory for a malicious file, MB": "most MB of memory for one",
        },
    ),
    Promise(
        "The tests themselves would notice",
        "Mistakes are put into a copy of the package one by one; each must turn a named test red.",
        {"seeded bugs found": "mistakes noticed"},
    ),
)

NOT_PROMISED = """\
## What is not promised

- A damaged HDF5 file (h5ad) can hang inside the HDF5 library, where neither Ctrl-C nor a time limit in Python helps.
  The command line opens it in another process first and gives up after `--read-timeout` seconds; `genejepa.fit` and
  the other functions do not. HDF5 has no checksums by default: a flipped bit in a value reads as another value. What
  HDF5 itself notices is a `DataError`.
- Equal bits hold on one machine with one set of versions. Another processor, another version of torch or a GPU gives
  other last bits.
- The tests run on CPUs. Interruptions of trainings on GPUs and on several devices are not part of them.
- A disk that claims to have flushed what it has not, and fails at the same moment, can lose the last checkpoint.
- Whoever can write to a model directory can replace the model by another valid one. The checksums find damage; they
  are not signatures.
"""


class Run(NamedTuple):
    """What came of one file of tests."""

    name: str
    seconds: float
    outcomes: Counter[str]
    output: str

    @property
    def is_good(self) -> bool:
        return bool(self.outcomes["passed"]) and not self.outcomes["failed"]


def run_file(path: Path, *, profile: str, figures: Path, deadline: float) -> Run:
    """Run the tests of one file; what is not done at the deadline counts as failed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Folders of its own: pytest removes those of earlier runs, of which another may still be one.
        options = ["-q", "--tb=short", f"--junitxml={report}", f"--basetemp={folder}/pytest"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, str(path)],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "GENEJEPA_PROFILE": profile,
                "GENEJEPA_FIGURES": str(figures),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # its own children end with it
        )
        try:
            output, _ = process.communicate(timeout=max(1.0, deadline - started))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0] + "\nnot done in time"
        seconds = time.monotonic() - started
        outcomes = count_outcomes(report) if report.exists() else Counter(failed=1)
    print(f"{path.name}: {seconds:.0f} s, " + ", ".join(f"{outcomes[kind]} {kind}" for kind in OUTCOMES), flush=True)
    return Run(path.name, seconds, outcomes, output)


def count_outcomes(report: Path) -> Counter[str]:
    """Tests of a JUnit file by outcome."""
    counts: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        counts["failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"] += 1
    return counts


def read_figures(path: Path) -> dict[str, Any]:
    """Figures by name, put together where several tests have measured one."""
    values: dict[str, list[Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        figure = json.loads(line)
        values.setdefault(figure["name"], []).append(figure["value"])
    return {name: combined(name, found) for name, found in values.items()}


def combined(name: str, values: list[Any]) -> Any:
    """Of several counts the sum, of several other numbers the largest, of anything else the last."""
    if not all(isinstance(value, int | float) for value in values):
        return values[-1]
    are_counts = all(isinstance(value, int) for value in values) and not name.startswith("most")
    return sum(values) if are_counts else max(values)


def shown(value: Any) -> str:
    """A figure as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(each)}" for name, each in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def document(runs: list[Run], figures: dict[str, Any], *, profile: str, seconds: float) -> str:
    """The whole document."""
    lines = [INTRODUCTION, "## What is promised, and how it is shown", ""]
    told = set()
    for promise in PROMISES:
        measured = [(words, shown(figures[name])) for name, words in promise.figures.items() if name in figures]
        told |= set(promise.figures)
        lines += [f"### {promise.what}", "", promise.how, "", *table(("figure", "value"), measured), ""]
    total = sum((run.outcomes for run in runs), Counter[str]())
    others = [(name, shown(value)) for name, value in sorted(figures.items()) if name not in told]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines += [
        NOT_PROMISED,
        "## The last run",
        "",
        f"Profile `{profile}`: {total['passed']:,} tests passed, {total['skipped']} were skipped, in "
        f"{seconds / 60:.0f} minutes on {processor()} (two processes with one thread each). Python "
        f"{platform.python_version()}, genejepa {version('genejepa')}, {versions}.",
        "",
        *table(
            ("file", "passed", "skipped", "seconds"),
            [
                (f"`{r.name}`", f"{r.outcomes['passed']:,}", str(r.outcomes["skipped"]), f"{r.seconds:.0f}")
                for r in runs
            ],
        ),
        "",
        "Further figures; of what several tests counted, the sum, of other numbers the largest:",
        "",
        *table(("figure", "value"), others),
    ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The machine in words."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


def main() -> None:
    """Parse the command line, run, write and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile", choices=("fast", "slow", "nightly"), default="nightly")
    parser.add_argument("--minutes", type=float, default=58.0, help="time for everything")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    args = parser.parse_args()
    started = time.monotonic()
    paths = sorted(TESTS.glob("test_*.py"), key=lambda path: (path.name not in LONGEST_FIRST, path.name))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        figures = Path(folder) / "figures.jsonl"

        def run(path: Path) -> Run:
            return run_file(path, profile=args.profile, figures=figures, deadline=started + 60 * args.minutes)

        runs = sorted(pool.map(run, paths), key=lambda run: run.name)
        measured = read_figures(figures)
    for failure in (run for run in runs if not run.is_good):
        print(f"\n{failure.name}\n{failure.output[-6000:]}", file=sys.stderr)
    if not all(run.is_good for run in runs):
        raise SystemExit(f"{args.output} was not written: tests have failed.")
    seconds = time.monotonic() - started
    args.output.write_text(document(runs, measured, profile=args.profile, seconds=seconds), encoding="utf-8")
    print(f"{args.output} was written after {seconds / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
