"""Row 107, and parts of row 109: loading a model runs nothing, follows nothing, writes nothing and calls nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.reliability._malicious import bombs, contents_of, forge, malicious_files
from tests.reliability._models import save_smallest_model

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
REFUSALS = {"ModelFileError", "ModelVersionError"}
ALLOWED_SECONDS = 1.0
ALLOWED_MEGABYTES = 64.0


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process saw that loaded every malicious file, and then opened the bombs as their victims would."""
    work = tmp_path_factory.mktemp("malicious")
    save_smallest_model(work / "model")
    good = contents_of(work / "model")
    armed = bombs(work / "bombs", work / "marker")
    tasks = {
        "good": forge(work / "good", good),
        "cases": malicious_files(work, good, armed),
        "warm_up": ["empty directory", "bomb.pkl as config.json"],
        "bombs": armed,
        "marker": work / "marker",
    }
    (work / "tasks.json").write_text(json.dumps(tasks, default=str), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, HERE / "_malicious.py", work / "tasks.json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_malicious_files_are_refused(watched: dict[str, Any], record_figure: Callable[[str, Any], None]) -> None:
    """Row 107: bombs, other programs' files, names and links that lead elsewhere, claims of size, texts nested deep."""
    cases = watched["cases"]
    assert watched["good"]["outcome"] == "loaded"
    outcomes = {name: case["outcome"] for name, case in cases.items()}
    assert {name: outcome for name, outcome in outcomes.items() if outcome not in REFUSALS} == {}
    assert [name for name, case in cases.items() if "\nFix: " not in case["message"]] == []
    assert len(cases) > 100
    record_figure("malicious files refused", len(cases))


def test_malicious_files_run_nothing(watched: dict[str, Any]) -> None:
    """Row 107: no code, process, connection, import or change of a file while they, or a good model, are loaded."""
    assert watched["good"]["events"] == []
    assert {name: case["events"] for name, case in watched["cases"].items() if case["events"]} == {}
    assert not watched["exploded"]


@pytest.mark.parametrize(
    ("suffix", "event"),
    [
        pytest.param("pkl", "pickle.find_class", id="pickle"),
        pytest.param("pt", "pickle.find_class", id="torch"),
        pytest.param("npz", "pickle.find_class", id="numpy"),
        pytest.param("joblib", "pickle.find_class", id="joblib"),
        pytest.param("yaml", "exec", id="yaml"),
    ],
)
def test_the_bombs_are_live_and_the_hook_sees_them(suffix: str, event: str, watched: dict[str, Any]) -> None:
    """Control of row 107: the reader that each bomb was made for sets it off."""
    control = watched["controls"][suffix]
    assert control["exploded"]
    assert any(seen.startswith(event) for seen in control["events"])


def test_malicious_files_cost_little(watched: dict[str, Any], record_figure: Callable[[str, Any], None]) -> None:
    """Row 107: each is refused within a second of processor time, and none takes more than 64 MB of memory."""
    seconds = {name: case["seconds"] for name, case in watched["cases"].items()}
    megabytes = {name: case["megabytes"] for name, case in watched["cases"].items()}
    assert {name: used for name, used in seconds.items() if used > ALLOWED_SECONDS} == {}
    assert {name: used for name, used in megabytes.items() if used > ALLOWED_MEGABYTES} == {}
    record_figure("slowest malicious file, seconds", round(max(seconds.values()), 3))
    record_figure("most memory for a malicious file, MB", round(max(megabytes.values()), 1))


# What a whole session does ----------------------------------------------------------------------------

SESSION = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
from _malicious import Watch
watch = Watch()
watch.is_on = True
import genejepa
from _models import cells, smallest_settings, training
adata = cells()
model = genejepa.GeneJEPA(adata, **smallest_settings())
model.train(**training())
model = genejepa.GeneJEPA.load(sys.argv[2])
model.embed(adata)
session = watch.take()

before = sorted(os.listdir("."))
model = genejepa.GeneJEPA.load(sys.argv[2])
model.embed(adata)
again, after = watch.take(), sorted(os.listdir("."))

try:
    socket.create_connection(("127.0.0.1", 9), timeout=0.2).close()
except OSError:
    pass
open(os.path.join(sys.argv[3], "file"), "w").close()
json.dump({"session": session, "again": again, "same": before == after, "control": watch.take()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process saw that imported genejepa, trained, loaded and embedded; HOME and TMPDIR do not exist."""
    work = tmp_path_factory.mktemp("session")
    save_smallest_model(work / "model")
    (work / "here").mkdir()
    nowhere = {name: str(work / "nowhere") for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SESSION, HERE, work / "model", work],
        env={**os.environ, **nowhere, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=work / "here",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_nothing_is_sent_anywhere(session: dict[str, Any]) -> None:
    """Import, training, loading and embedding open no connection; the control does."""
    assert [event for event in session["session"] + session["again"] if event.startswith("socket")] == []
    assert any(event.startswith("socket.connect") for event in session["control"])


def test_embedding_writes_nothing(session: dict[str, Any]) -> None:
    """Row 109: where HOME and TMPDIR do not exist, a model is loaded and cells are embedded without any writing."""
    assert session["again"] == []
    assert session["same"]
    assert any(event.startswith("open") for event in session["control"])
