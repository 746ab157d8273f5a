"""Rows 103 to 106, 108 and 110: files that are damaged, foreign, newer or elsewhere; and every bit of a model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import h5py
import numpy as np
import pytest

import genejepa
from genejepa.data.inputs import read_cells
from genejepa.errors import ConfigError, DataError, ModelFileError, ModelVersionError, OutOfMemoryError
from genejepa.model import GeneJEPA
from genejepa.persistence import load_model
from genejepa.train.state import TrainingState
from tests.reliability._malicious import contents_of, entry_of, forge, join_tensors, split_tensors
from tests.reliability._models import cells, save_smallest_model, smallest_settings, training
from tests.reliability._mutations import CHANGED, changed_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.reliability.conftest import Profile

CONFIG, GENES, TENSORS = "config.json", "genes.csv", "tensors.safetensors"
MANIFEST, STATE = "manifest.json", "state.json"
SHARES = {MANIFEST: 0.2, CONFIG: 0.15, GENES: 0.1, TENSORS: 0.25, STATE: 0.3}
"""Of the random changes: the fewer, the longer it takes to load what often remains a model."""
SLOWEST = 1.0
"""Seconds of processor time that a changed file may take."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the smallest model, in ``model``, and the checkpoint of its training, in ``checkpoint``."""
    folder = tmp_path_factory.mktemp("smallest")
    save_smallest_model(folder / "model", checkpoint_dir=folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def good(written: Path) -> dict[str, bytes]:
    """Content of the files of the smallest model."""
    return contents_of(written / "model")


@pytest.fixture
def model_dir(good: dict[str, bytes], tmp_path: Path) -> Path:
    """A directory of the smallest model that may be damaged."""
    return forge(tmp_path / "model", good)


def refused(directory: Path) -> str:
    """Message of the error that loading a model gives."""
    with pytest.raises(ModelFileError) as caught:
        GeneJEPA.load(directory)
    assert str(caught.value).count("\nFix: ") == 1
    return str(caught.value)


# Every bit, every length ------------------------------------------------------------------------------

READ: dict[str, Callable[[Path], object]] = {
    "model": load_model,
    "checkpoint": TrainingState.load,
}
each_kind = pytest.mark.parametrize("kind", READ)


def manifest_of(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def is_refused(directory: Path, kind: str) -> bool:
    try:
        READ[kind](directory)
    except ModelFileError:
        return True
    return False


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.stat().st_size)


@each_kind
def test_every_flipped_bit_is_noticed(
    kind: str, written: Path, profile: Profile, record_figure: Callable[[str, Any], None]
) -> None:
    """Row 105: no file of a model or of a checkpoint can change by a bit and still be read."""
    step = 1 if kind == "model" else profile.pick(fast=29, slow=1, nightly=1)
    directory = written / kind
    assert not is_refused(directory, kind)
    n_flips, accepted = 0, []
    for path in files_of(directory):
        data = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for bit in range(0, 8 * len(data), step):
                at, flipped = bit // 8, data[bit // 8] ^ (1 << bit % 8)
                os.pwrite(file.fileno(), bytes([flipped]), at)
                if not is_refused(directory, kind):
                    accepted.append((path.name, bit))
                os.pwrite(file.fileno(), data[at : at + 1], at)
                n_flips += 1
    assert accepted == []
    assert not is_refused(directory, kind)
    record_figure(f"bits of a {kind} flipped", n_flips)


@each_kind
def test_every_truncation_is_noticed(kind: str, written: Path, record_figure: Callable[[str, Any], None]) -> None:
    """Row 105: no file of a model or of a checkpoint can be shorter, or longer, and still be read."""
    directory = written / kind
    n_lengths, accepted = 0, []
    for path in files_of(directory):
        data = path.read_bytes()
        for length in range(len(data) - 1, -1, -1):
            os.truncate(path, length)
            if not is_refused(directory, kind):
                accepted.append((path.name, length))
            n_lengths += 1
        for longer in (data + b"\0", data + b"\n", data + data):
            path.write_bytes(longer)
            assert is_refused(directory, kind), path
        path.write_bytes(data)
    assert accepted == []
    assert not is_refused(directory, kind)
    record_figure(f"lengths of files of a {kind} tried", n_lengths)


@each_kind
def test_every_missing_file_is_noticed(kind: str, written: Path) -> None:
    """Row 105: a model or checkpoint from which a file was removed is refused, and the message names the file."""
    directory = written / kind
    for path in files_of(directory):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(ModelFileError, match=path.name):
            READ[kind](directory)
        path.write_bytes(data)
    assert not is_refused(directory, kind)


# Changes whose hashes agree ---------------------------------------------------------------------------


def open_model(directory: Path) -> None:
    model = GeneJEPA.load(directory)
    assert len(model.model_id) == 16
    assert str(len(model.genes)) in repr(model)


def open_checkpoint(directory: Path) -> None:
    state = TrainingState.load(directory)
    assert state.is_finished in (True, False)
    with contextlib.suppress(ConfigError):  # a plan that differs
        state.require_plan({})


@pytest.mark.parametrize("part", SHARES)
def test_changed_files_are_refused_or_as_good(
    part: str, written: Path, tmp_path: Path, profile: Profile, record_figure: Callable[[str, Any], None]
) -> None:
    """Rows 105 and 107: random changes under hashes that agree give a model or ModelFileError, never another error."""
    n_cases = int(SHARES[part] * profile.pick(fast=2_000, slow=20_000, nightly=1_000_000))
    kind, read = ("checkpoint", open_checkpoint) if part == STATE else ("model", open_model)
    original = contents_of(written / kind)
    head = {key: value for key, value in manifest_of(written / kind).items() if key not in ("files", "sha256")}
    n_read, slowest = 0, 0.0
    for number in range(n_cases):
        rng = random.Random(f"{part} {number}")
        if part == MANIFEST:
            forge(tmp_path, original)
            (tmp_path / MANIFEST).write_bytes(changed_manifest(original, rng))
        else:
            changed = {**original, part: CHANGED[part](original[part], rng)}
            forge(tmp_path, changed, **head)
        started = time.process_time()
        try:
            read(tmp_path)
            n_read += 1
        except ModelFileError:
            pass
        except Exception as error:  # the number of the case is what is needed to mend it
            raise AssertionError(f"change {number} of {part}: {error!r}") from error
        slowest = max(slowest, time.process_time() - started)
    assert 0 < n_read < n_cases
    assert slowest < SLOWEST
    record_figure(f"changes of {part}", n_cases)
    record_figure("changes after which a file is as good as before", n_read)
    record_figure("slowest change, seconds", round(slowest, 3))


# Row 103: files of cells ------------------------------------------------------------------------------


def an_h5ad(path: Path) -> bytes:
    anndata.AnnData(np.ones((4, 3), dtype=np.float32)).write_h5ad(path)
    return path.read_bytes()


def an_hdf5(path: Path, *groups: str) -> bytes:
    with h5py.File(path, "w") as file:
        for group in groups:
            file.create_group(group)
    return path.read_bytes()


BAD_FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda _: b"", "it is empty"),
    "HTML": (lambda _: b"<!DOCTYPE html><html>404 Not Found</html>", "HTML or XML: a failed download"),
    "truncated": (lambda path: an_h5ad(path)[:-1000], "HDF5 file that is damaged, cut off"),
    "half": (lambda path: an_h5ad(path)[: path.stat().st_size // 2], "HDF5 file that is damaged, cut off"),
    "wrong signature": (lambda path: b"\x89PNG" + an_h5ad(path)[4:], "something else, or damaged at its start"),
    "10x h5": (lambda path: an_hdf5(path, "matrix"), r"10x Genomics HDF5.*\nFix: adata = scanpy.read_10x_h5\("),
    "loom": (lambda path: an_hdf5(path, "matrix", "row_attrs", "col_attrs"), r"loom file.*\nFix: .*read_loom\("),
    "h5mu": (lambda path: an_hdf5(path, "mod", "obs", "var"), r"several modalities.*\nFix: .*read_h5mu\("),
    "other HDF5": (lambda path: an_hdf5(path, "data"), "not an h5ad"),
    "csv": (lambda _: b"cell,TP53,CD3E\nc1,0,1\n", r"text, such as a CSV.*\nFix: .*read_csv\("),
    "gz": (lambda _: b"\x1f\x8b\x08\x00" + bytes(20), "compressed by gzip"),
    "rds": (lambda _: b"RDX3\nX\n" + bytes(20), "an R object"),
    "pickle": (lambda _: b"\x80\x04K\x01.", "a Python pickle, which is not opened"),
    "npz": (lambda _: b"PK\x03\x04" + bytes(20), "a zip archive"),
    "mtx": (lambda _: b"%%MatrixMarket matrix coordinate\n", r"Matrix Market.*\nFix: .*read_10x_mtx"),
}


@pytest.mark.parametrize("backed", [False, True], ids=["in memory", "backed"])
@pytest.mark.parametrize("what", [pytest.param(what, id=f"row 103: {what}") for what in BAD_FILES])
def test_a_file_that_is_no_h5ad_is_named(what: str, backed: bool, tmp_path: Path) -> None:
    make, message = BAD_FILES[what]
    path = tmp_path / "cells.h5ad"
    data = make(tmp_path / "source")
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_cells(path, backed=backed)
    assert re.search(message, str(caught.value), re.DOTALL), caught.value
    assert str(path) in str(caught.value)
    assert f"{len(data):,} bytes" in str(caught.value)
    assert "\nFix: " in str(caught.value)


def test_a_missing_file_of_cells(tmp_path: Path) -> None:
    """Row 103: a path where nothing is, and one where a directory is."""
    with pytest.raises(FileNotFoundError, match=r"nothing\.h5ad"):
        read_cells(tmp_path / "nothing.h5ad")
    with pytest.raises(DataError, match=r"is a directory, expected an h5ad file(?s:.*)\nFix: "):
        read_cells(tmp_path)


# Row 104: paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=f"row 104: {what}")
        for what, name in {
            "spaces": "my model, 2nd try",
            "non-ASCII": "Modell für Zellen 細胞 🧬",
            "name of a Windows device": "CON",
            "Windows path": r"C:\models\first",
            "trailing dot": "model.",
            "glob characters": "[a-z]*?",
            "leading dash": "--model",
            "200 bytes": "x" * 200,
        }.items()
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows refuses some of these names")
def test_a_model_can_have_any_name(name: str, written: Path, tmp_path: Path) -> None:
    model = GeneJEPA.load(written / "model")
    model.save(tmp_path / name)
    assert GeneJEPA.load(tmp_path / name).model_id == model.model_id
    data = cells()
    data.write_h5ad(tmp_path / f"{name}.h5ad")
    assert read_cells(tmp_path / f"{name}.h5ad").shape == data.shape


def test_a_tilde_is_the_home_directory(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 104: ``~`` in the path of a model and of cells."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    model = GeneJEPA.load(written / "model")
    model.save("~/model")
    assert GeneJEPA.load("~/model").model_id == model.model_id
    assert (tmp_path / "model" / MANIFEST).is_file()
    cells().write_h5ad(tmp_path / "cells.h5ad")
    assert read_cells("~/cells.h5ad").n_obs == 8


def test_a_name_that_no_file_can_have(written: Path, tmp_path: Path) -> None:
    """Row 104: more than 255 bytes."""
    name = "x" * 300
    assert name in refused(tmp_path / name)
    with pytest.raises(OSError, match=name):
        GeneJEPA.load(written / "model").save(tmp_path / name)
    with pytest.raises(OSError, match=name):
        read_cells(tmp_path / name)


AS_NOBODY = """
import os, sys
from pathlib import Path
from genejepa.persistence import load_model
from genejepa.data.inputs import read_cells
from genejepa.errors import ModelFileError
folder = Path(sys.argv[1])
read_cells(folder / "open.h5ad")
load_model(folder / "open")
if os.getuid() == 0:
    os.setuid(65534)
try:
    read_cells(folder / "closed.h5ad")
except PermissionError as error:
    print(error)
try:
    load_model(folder / "closed")
except ModelFileError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="file modes of POSIX")
def test_files_that_may_not_be_read(good: dict[str, bytes], public_path: Path) -> None:
    """Row 104: the error names the path and says that permission is missing."""
    for name in ("open", "closed"):
        cells().write_h5ad(public_path / f"{name}.h5ad")
        forge(public_path / name, good)
    for path in (public_path / "closed.h5ad", *files_of(public_path / "closed")):
        path.chmod(0o000)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, public_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Permission denied") == 2
    assert str(public_path / "closed.h5ad") in done.stdout
    assert str(public_path / "closed" / MANIFEST) in done.stdout
    assert "\nFix: " in done.stdout


# Row 105: damage that hashes do not show --------------------------------------------------------------

WEIGHT = "encoder.head.weight"


def with_header(good: dict[str, bytes], edit: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
    header, numbers = split_tensors(good[TENSORS])
    edit(header)
    return {**good, TENSORS: join_tensors(header, numbers)}


def with_config(good: dict[str, bytes], edit: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
    config = json.loads(good[CONFIG])
    edit(config)
    return {**good, CONFIG: json.dumps(config).encode()}


def with_weight(good: dict[str, bytes], value: float) -> dict[str, bytes]:
    header, numbers = split_tensors(good[TENSORS])
    start, end = header[WEIGHT]["data_offsets"]
    return {**good, TENSORS: join_tensors(header, numbers[:start] + np.float32(value).tobytes() + numbers[end:])}


def with_repeated_weight(good: dict[str, bytes]) -> dict[str, bytes]:
    header, numbers = split_tensors(good[TENSORS])
    again = f'{{"{WEIGHT}": {json.dumps(header["encoder.head.bias"])}, '
    return {**good, TENSORS: join_tensors(again.encode() + json.dumps(header).encode()[1:], numbers)}


def as_float16(header: dict[str, Any]) -> None:
    header["encoder.keys"]["dtype"] = "F16"
    header["encoder.keys"]["shape"] = [6, 1]


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [208, 208]}
DAMAGE: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "tensor missing": (
        lambda good: {**good, TENSORS: join_tensors(*_without_last(good[TENSORS]))},
        "Missing key.*target_encoder.values",
    ),
    "tensor extra": (lambda good: with_header(good, lambda h: h.update(extra=EMPTY)), "Unexpected key.*extra"),
    "tensor of batches extra": (
        lambda good: with_header(good, lambda h: h.update({"batches.gain": EMPTY})),
        "Unexpected key.*batches.gain",
    ),
    "wrong shape": (
        lambda good: with_header(good, lambda h: h["encoder.keys"].update(shape=[1, 3])),
        r"size mismatch for encoder.keys.*\[1, 3\].*\[3, 1\]",
    ),
    "wrong type": (lambda good: with_header(good, as_float16), "encoder.keys.*float16, expected float32"),
    "NaN weight": (lambda good: with_weight(good, float("nan")), f"{WEIGHT}.*not finite"),
    "infinite weight": (lambda good: with_weight(good, float("inf")), f"{WEIGHT}.*not finite"),
    "repeated name of a weight": (with_repeated_weight, "a key occurs twice"),
    "repeated key in config.json": (
        lambda good: {**good, CONFIG: good[CONFIG].replace(b'"settings"', b'"training": {}, "settings"', 1)},
        "a key occurs twice",
    ),
    "header too long": (
        lambda good: {**good, TENSORS: (2**40).to_bytes(8, "little") + good[TENSORS][8:]},
        r"tensors-\w+.safetensors|tensors.safetensors",
    ),
    "empty file of weights": (lambda good: {**good, TENSORS: b""}, "tensors.safetensors"),
    "configuration missing": (lambda good: {k: v for k, v in good.items() if k != CONFIG}, "config.json.*missing"),
    "weights missing": (lambda good: {k: v for k, v in good.items() if k != TENSORS}, "tensors.safetensors.*missing"),
    "gene that occurs twice": (lambda good: {**good, GENES: good[GENES].replace(b"CD3E", b"ACTB")}, "occurs twice"),
    "gene without a number": (lambda good: {**good, GENES: good[GENES].replace(b'CD3E",', b'CD3E",nan,')}, "genes.csv"),
    "frequency of zero": (lambda good: {**good, GENES: _last_number(good[GENES], b"0.0")}, "genes.csv.*not a possible"),
    "other number of genes": (lambda good: {**good, GENES: good[GENES] + b"TP53,1.0,1.0,0.1\n"}, "size mismatch"),
    "section missing": (lambda good: with_config(good, lambda c: c.pop("training")), "training"),
    "unknown setting": (
        lambda good: with_config(good, lambda c: c["settings"]["model"].update(dimension=3)),
        "unknown entries.*dimension",
    ),
    "impossible setting": (
        lambda good: with_config(good, lambda c: c["settings"]["model"].update(dim=0)),
        "`dim` is 0",
    ),
    "depth that is no number": (
        lambda good: with_config(good, lambda c: c["normalization"].update(median_depth="5")),
        "median depth '5'",
    ),
    "depth beyond 32 bits": (
        lambda good: with_config(good, lambda c: c["normalization"].update(median_depth=1e300)),
        "median depth 1e\\+300",
    ),
    "layer that is no name": (
        lambda good: with_config(good, lambda c: c["registration"].update(layer=["counts"])),
        "layer",
    ),
    "infinite learning rate": (
        lambda good: {**good, CONFIG: good[CONFIG].replace(b"0.002", b"1e400", 1)},
        "not a finite number",
    ),
    "history that is no table": (
        lambda good: with_config(good, lambda c: c["training"]["history"].update(loss=[1.0, 2.0, 3.0])),
        "no table",
    ),
}


def _without_last(tensors: bytes) -> tuple[dict[str, Any], bytes]:
    header, numbers = split_tensors(tensors)
    name = max(header, key=lambda name: header[name]["data_offsets"][1])
    return header, numbers[: header.pop(name)["data_offsets"][0]]


def _last_number(genes: bytes, number: bytes) -> bytes:
    return genes[: genes.rindex(b",") + 1] + number + b"\n"


@pytest.mark.parametrize("what", [pytest.param(what, id=f"row 105: {what}") for what in DAMAGE])
def test_a_model_that_does_not_fit_together_is_refused(what: str, good: dict[str, bytes], tmp_path: Path) -> None:
    make, message = DAMAGE[what]
    changed = make(good)
    assert changed != good
    found = refused(forge(tmp_path / "model", changed))
    assert str(tmp_path / "model") in found
    assert re.search(message, found, re.DOTALL), found


def test_a_size_or_hash_that_differs_is_stated(model_dir: Path, good: dict[str, bytes]) -> None:
    """Row 105: the message has the file, what was found and what was expected."""
    path = model_dir / str(entry_of(TENSORS, good[TENSORS])["stored_as"])
    path.write_bytes(good[TENSORS][:-1])
    size = len(good[TENSORS])
    assert f"{path} cannot be read: it has {size - 1:,} bytes, the manifest has {size}." in refused(model_dir)
    path.write_bytes(good[TENSORS][:-1] + b"\1")
    expected = entry_of(TENSORS, good[TENSORS])["sha256"][:16]
    assert f"the manifest has {expected}" in refused(model_dir)


# Row 106: other versions ------------------------------------------------------------------------------


def test_a_newer_format_says_what_to_install(model_dir: Path, good: dict[str, bytes]) -> None:
    """Row 106: both versions are named, and the fix can be pasted."""
    forge(model_dir, good, format_version=9, written_by="2.3.0")
    with pytest.raises(ModelVersionError, match=rf"2\.3\.0 in format 9; this is genejepa {genejepa.__version__}") as e:
        GeneJEPA.load(model_dir)
    assert e.value.fix == "pip install genejepa==2.3.0"


@pytest.mark.parametrize(
    "writer",
    [
        pytest.param(writer, id=f"row 106: {what}")
        for what, writer in {
            "further arguments": "2.0 --index-url https://example.org",
            "another line": "2.0\nFix: rm -rf ~",
            "no text": ["2.0"],
            "shell": "2.0;rm${IFS}-rf",
            "absent": None,
        }.items()
    ],
)
def test_the_fix_holds_nothing_that_a_stranger_wrote(writer: object, model_dir: Path, good: dict[str, bytes]) -> None:
    forge(model_dir, good, format_version=9, written_by=writer)
    with pytest.raises(ModelVersionError) as caught:
        GeneJEPA.load(model_dir)
    assert caught.value.fix == "fit and save the model again."
    assert str(caught.value).count("Fix:") == 1


def test_unknown_optional_entries_are_ignored(model_dir: Path, good: dict[str, bytes]) -> None:
    """Row 106: an entry that a later version of the same format adds does no harm."""
    before = GeneJEPA.load(model_dir).model_id
    forge(model_dir, with_config(good, lambda config: config.update(comment="mine")), licence="CC0")
    assert GeneJEPA.load(model_dir).model_id == before


# Row 108: a training under other settings -------------------------------------------------------------


def test_a_checkpoint_of_another_training_lists_every_difference(written: Path) -> None:
    """Row 108: size of the vector, optimiser and genes, old and new, before any step is done."""
    others = cells()
    others.var_names = ["ACTB", "CD3E", "TP53"]
    others.X = others.X * 2
    model = GeneJEPA(others, **{**smallest_settings(), "embedding_dim": 3, "learning_rate": 0.5})
    with pytest.raises(ConfigError) as caught:
        model.train(**training(), checkpoint_dir=written / "checkpoint", resume=True)
    message = str(caught.value)
    assert "settings.model.embedding_dim was 1 and is 3" in message
    assert "settings.train.learning_rate was 0.002 and is 0.5" in message
    assert "the cells, genes or batches are others" in message
    assert "\nFix: " in message
    assert not model.is_trained


def test_weights_are_never_loaded_in_part(good: dict[str, bytes], tmp_path: Path) -> None:
    """Row 108: a configuration of another size than the weights is refused, whichever size it is."""
    for name in ("embedding_dim", "n_latents", "dim", "predictor_dim", "n_layers", "n_axes"):
        changed = with_config(good, lambda config, name=name: config["settings"]["model"].update({name: 2}))  # type: ignore[misc]
        assert "do not fit together" in refused(forge(tmp_path / name, changed)), name


def test_a_lightning_checkpoint_is_not_opened(tmp_path: Path) -> None:
    """Row 108: a checkpoint directory that is a .ckpt file, or holds one, is refused and left as it is."""
    path = tmp_path / "runs" / "last.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"\x80\x04K\x01.")
    for place in (path, path.parent):
        with pytest.raises(ModelFileError):
            TrainingState.load(place)
        model = GeneJEPA(cells(), **smallest_settings())
        with pytest.raises(FileExistsError):
            model.train(**training(), checkpoint_dir=place, resume=True)
        assert not model.is_trained
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]
    assert path.read_bytes() == b"\x80\x04K\x01."


# Names of genes ---------------------------------------------------------------------------------------

ODD_NAMES = ["TP53\r", "a\nb", "a\r\nb", 'say "CD4"', "a,b", " CD4", "'", "a\x00b", "a\u2028b", "α", "#", "1e5"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_whatever_the_genes_are_called_a_model_that_was_saved_can_be_loaded(
    name: str, written: Path, tmp_path: Path
) -> None:
    model = GeneJEPA.load(written / "model")
    model.genes[1] = name
    model.save(tmp_path / "model")
    loaded = GeneJEPA.load(tmp_path / "model")
    assert loaded.genes == model.genes
    assert loaded.weights_sha256() == model.weights_sha256()


def test_a_name_that_no_file_can_hold_is_refused_and_the_old_model_stays(written: Path, tmp_path: Path) -> None:
    model = GeneJEPA.load(written / "model")
    model.save(tmp_path / "model")
    before = snapshot(tmp_path)
    model.genes[1] = "TP\udc80"
    with pytest.raises(DataError, match=r"1 of 3 gene names cannot be encoded as UTF-8.*'TP\\udc80'.*\nFix: rename"):
        model.save(tmp_path / "model", overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_model_that_does_not_fit_into_memory_is_told_as_such(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_torch(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    def of_python(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.load", of_torch)
        with pytest.raises(OutOfMemoryError, match=r"reading a model(?s:.*)\nFix: "):
            GeneJEPA.load(written / "model")
    monkeypatch.setattr(Path, "read_bytes", of_python)
    with pytest.raises(OutOfMemoryError, match=r"reading .*manifest\.json\.\nFix: "):
        GeneJEPA.load(written / "model")


# Rows 109 and 110: places that cannot be written to ---------------------------------------------------


def test_a_checkpoint_place_is_tried_before_the_first_step(tmp_path: Path) -> None:
    """Row 109: training into a place that cannot be written to ends before its first step."""
    (tmp_path / "file").touch()
    model = GeneJEPA(cells(), **smallest_settings())
    with pytest.raises(OSError, match="file"):
        model.train(**training(), checkpoint_dir=tmp_path / "file" / "checkpoint")
    assert not model.is_trained


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_directory_is_left_alone(overwrite: bool, written: Path, tmp_path: Path) -> None:
    """Row 110: a directory that genejepa did not make is never written to, whatever ``overwrite`` says."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("a year's work")
    (tmp_path / "config-0123456789abcdef.json").write_text("{}")
    before = snapshot(tmp_path)
    model = GeneJEPA.load(written / "model")
    with pytest.raises(FileExistsError, match=r"(?s)not of genejepa: it holds 'thesis'.*\nFix: "):
        model.save(tmp_path, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_a_model_is_replaced_only_on_request(written: Path, tmp_path: Path) -> None:
    """Row 110: with ``overwrite=True`` a model is replaced and files beside it stay; without, nothing changes."""
    model = GeneJEPA.load(written / "model")
    model.save(tmp_path / "model")
    (tmp_path / "model" / "note.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"not empty(?s:.*)\nFix: .*overwrite=True"):
        model.save(tmp_path / "model")
    assert snapshot(tmp_path) == before
    model.save(tmp_path / "model", overwrite=True)
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content, and every directory."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}
