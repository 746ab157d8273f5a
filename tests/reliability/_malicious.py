"""Model directories as an attacker would write them, and a process that watches them being loaded.

``python _malicious.py TASKS`` gives every path that the JSON file TASKS names to ``GeneJEPA.load`` under an audit hook,
and prints as JSON what came of it. The bombs are live, but harmless: all that they do is to make a marker file; at the
end each is opened with the reader it was made for, as a control.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
import time
import zipfile
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from genejepa._constants import MODEL_FORMAT_VERSION
from genejepa._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

FORBIDDEN = {
    "code.__new__",
    "compile",
    "ctypes.dlopen",
    "exec",
    "import",
    "marshal.loads",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
}
CHANGES = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

OTHER_NAMES = (
    "../outside.json",
    "../../outside.json",
    "./config-0123456789abcdef.json",
    "sub/config-0123456789abcdef.json",
    "config-0123456789abcdef.json/../../outside.json",
    "/etc/passwd",
    "//server/share/config.json",
    r"\\server\share\config.json",
    r"\\?\C:\config.json",
    r"C:\Windows\config.json",
    r"..\outside.json",
    "file:///etc/passwd",
    "https://example.org/config-0123456789abcdef.json",
    "~/config.json",
    "%2e%2e%2foutside.json",
    "．．／outside.json",
    "CON",
    "config-0123456789abcdef.json.",
    "config-0123456789abcdef.json\n",
    "config-0123456789abcdef.json\0",
    "config-0123456789ABCDEF.json",
    "config-٠١٢٣٤٥٦٧٨٩abcdef.json",
    "..",
    "",
)
"""Names of a file in a manifest that genejepa never writes; most lead out of the directory on some system."""


# Directories as genejepa writes them ------------------------------------------------------------------


def contents_of(directory: Path) -> dict[str, bytes]:
    """Files of a model or checkpoint, by the names that the manifest gives them."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return {name: (directory / entry["stored_as"]).read_bytes() for name, entry in manifest["files"].items()}


def entry_of(name: str, data: bytes) -> dict[str, Any]:
    """Entry of a file in a manifest; the name does not depend on the content, so that one file replaces another."""
    stem, _, suffix = name.partition(".")
    digest = hashlib.sha256(data).hexdigest()
    return {"stored_as": f"{stem}-{0:016x}.{suffix}", "size": len(data), "sha256": digest}


def body_of(files: dict[str, bytes], /, **changes: Any) -> dict[str, Any]:
    """Manifest, without its own checksum, of a model with these files."""
    entries = {name: entry_of(name, data) for name, data in files.items()}
    head = {"format": "genejepa", "kind": "model", "format_version": MODEL_FORMAT_VERSION, "written_by": __version__}
    return {**head, "files": entries, **changes}


def sealed(body: Any) -> bytes:
    """A manifest with the right checksum."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=2) + "\n").encode()


def forge(directory: Path, files: dict[str, bytes], /, **changes: Any) -> Path:
    """Write a model directory whose hashes, sizes and checksums are those of its content, whatever that is."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / str(entry_of(name, data)["stored_as"])).write_bytes(data)
    (directory / "manifest.json").write_bytes(sealed(body_of(files, **changes)))
    return directory


def split_tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and numbers of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_tensors(header: Any, numbers: bytes) -> bytes:
    """A safetensors file; a header in bytes is taken as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


# Malicious files --------------------------------------------------------------------------------------


class Bomb:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def bombs(directory: Path, marker: Path) -> dict[str, Path]:
    """Files that run code when the usual reader of their format opens them."""
    import joblib  # type: ignore[import-untyped]
    import numpy as np
    import torch

    bomb = Bomb(marker)
    directory.mkdir()
    paths = {suffix: directory / f"bomb.{suffix}" for suffix in ("pkl", "pt", "npz", "joblib", "yaml")}
    paths["pkl"].write_bytes(pickle.dumps(bomb))
    torch.save(bomb, paths["pt"])
    np.savez(paths["npz"], bomb=np.array([bomb], dtype=object))
    joblib.dump(bomb, paths["joblib"])
    paths["yaml"].write_text(f"!!python/object/apply:builtins.exec [{json.dumps(bomb.code)}]\n", encoding="utf-8")
    return paths


def explode(path: Path) -> None:
    """Open a bomb as its victims would."""
    import joblib
    import numpy as np
    import torch
    import yaml  # type: ignore[import-untyped]

    if path.suffix == ".pkl":
        pickle.loads(path.read_bytes())
    elif path.suffix == ".pt":
        torch.load(path, weights_only=False)
    elif path.suffix == ".npz":
        np.load(path, allow_pickle=True)["bomb"]
    elif path.suffix == ".joblib":
        joblib.load(path)
    else:
        yaml.unsafe_load(path.read_text(encoding="utf-8"))


def malicious_files(work: Path, good: dict[str, bytes], armed: dict[str, Path]) -> dict[str, Path]:
    """Make everything that a reader of models should refuse; path to load by what it is."""
    made = {
        **{f"bomb.{suffix} as a model": path for suffix, path in armed.items()},
        **_bombs_inside(work, good, armed),
        **_other_programs(work, armed["pt"]),
        **_names(work, good),
        **_large_claims(work, good),
        **_odd_texts(work, good),
    }
    if os.name == "posix":
        made |= _links_and_pipes(work, good)
    return made


def _bombs_inside(work: Path, good: dict[str, bytes], armed: dict[str, Path]) -> dict[str, Path]:
    """Directories in which one file is a bomb."""
    made = {}
    for suffix, path in armed.items():
        bomb = path.read_bytes()
        for name in good:
            made[f"bomb.{suffix} as {name}"] = forge(work / f"{suffix}-{name}", {**good, name: bomb})
        directory = forge(work / f"{suffix}-manifest", good)
        (directory / "manifest.json").write_bytes(bomb)
        made[f"bomb.{suffix} as manifest.json"] = directory
    return made


def _other_programs(work: Path, bomb: Path) -> dict[str, Path]:
    """What other programs call a model."""
    import anndata
    import numpy as np

    layouts = {
        "scvi-tools": ("model.pt",),
        "scGPT": ("best_model.pt", "args.json", "vocab.json"),
        "Geneformer": ("pytorch_model.bin", "config.json"),
        "Lightning": ("epoch=1-step=2.ckpt",),
    }
    made = {}
    for program, names in layouts.items():
        directory = work / program
        directory.mkdir()
        for name in names:
            (directory / name).write_bytes(b"{}" if name.endswith(".json") else bomb.read_bytes())
        made[f"directory of {program}"] = directory
    cells = work / "cells.h5ad"
    anndata.AnnData(np.ones((2, 2), dtype=np.float32)).write_h5ad(cells)
    return {**made, "h5ad as a model": cells, "empty directory": _empty(work / "empty")}


def _empty(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _names(work: Path, good: dict[str, bytes]) -> dict[str, Path]:
    """Manifests that name files elsewhere; what they name is a good configuration wherever that can be."""
    made = {}
    for i, name in enumerate(OTHER_NAMES):
        directory = forge(work / f"name{i}" / "model", good)
        files = {**body_of(good)["files"]}
        files["config.json"] = {**files["config.json"], "stored_as": name}
        (directory / "manifest.json").write_bytes(sealed(body_of(good, files=files)))
        (directory / "sub").mkdir()
        for target in (directory, directory.parent, work):
            (target / "outside.json").write_bytes(good["config.json"])
        for place in (directory, directory / "sub"):
            (place / "config-0123456789abcdef.json").write_bytes(good["config.json"])
        made[f"file called {name!r}"] = directory
    return made


def _large_claims(work: Path, good: dict[str, bytes]) -> dict[str, Path]:
    """Small files that promise, or unpack to, large ones."""
    claimed = 10**9
    made: dict[str, Path] = {}
    for name in good:
        stored = {**entry_of(name, good[name]), "size": claimed}
        directory = forge(work / f"claim-{name}", good, files={**body_of(good)["files"], name: stored})
        made[f"{name} claims 1 GB"] = directory
    for name in ("config.json", "genes.csv"):
        directory = forge(work / f"sparse-{name}", good)
        stored = {**entry_of(name, good[name]), "size": claimed}
        with (directory / stored["stored_as"]).open("r+b") as file:
            file.truncate(claimed)  # takes no room on the disk
        (directory / "manifest.json").write_bytes(sealed(body_of(good, files={**body_of(good)["files"], name: stored})))
        made[f"{name} is 1 GB of nothing"] = directory
    made["manifest.json is 1 GB of nothing"] = directory = forge(work / "sparse-manifest", good)
    with (directory / "manifest.json").open("r+b") as file:
        file.truncate(claimed)
    header = claimed.to_bytes(8, "little") + good["tensors.safetensors"][8:]
    made["header claims 1 GB"] = forge(work / "header", {**good, "tensors.safetensors": header})
    many = b'{"settings": [' + b"[]," * 5_000_000 + b"[]]}"
    made["config.json of five million lists"] = forge(work / "lists", {**good, "config.json": many})
    rows = b"gene,mean,scale,frequency\n" + b"\n" * 15_000_000
    made["genes.csv of empty lines"] = forge(work / "lines", {**good, "genes.csv": rows})
    zipped = work / "bomb.zip"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("manifest.json", bytes(10**8))
    made["zip bomb as a model"] = zipped
    made["zip bomb as tensors"] = forge(work / "zip", {**good, "tensors.safetensors": zipped.read_bytes()})
    for key, value in (("dim", 10**12), ("n_latents", 10**12), ("embedding_dim", 10**12), ("n_layers", 10**9)):
        config = json.loads(good["config.json"])
        config["settings"]["model"][key] = value
        changed = {**good, "config.json": json.dumps(config).encode()}
        made[f"{key} of {value:.0e}"] = forge(work / key, changed)
    return made


def _odd_texts(work: Path, good: dict[str, bytes]) -> dict[str, Path]:
    """Manifests and configurations that are no such thing."""
    deep = b"[" * 100_000
    texts = {
        "nested 100,000 deep": deep,
        "nested 30,000 deep": b"[" * 30_000,
        "nested 100,000 deep in an object": b'{"format": ' + deep + b"]" * 100_000 + b"}",
        "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "YAML": b"format: genejepa\nfiles: !!python/name:os.system\n",
        "of another program": b'{"name": "app", "start_url": "/", "files": {}}',
        "empty": b"",
        "zeros": bytes(1000),
        "UTF-16": json.dumps(body_of(good)).encode("utf-16"),
        "a number of 5,000 digits": b'{"format_version": ' + b"9" * 5000 + b"}",
        "not a number": b'{"format": "genejepa", "format_version": NaN}',
        "a list": b"[]",
    }
    made = {}
    for what, text in texts.items():
        directory = forge(work / f"manifest-{what}", good)
        (directory / "manifest.json").write_bytes(text)
        made[f"manifest.json: {what}"] = directory
        made[f"config.json: {what}"] = forge(work / f"config-{what}", {**good, "config.json": text})
    return made


def _links_and_pipes(work: Path, good: dict[str, bytes]) -> dict[str, Path]:
    """Directories in which a file is something else."""
    outside = forge(work / "linked-to", good)
    made = {}
    for name in ("manifest.json", *(str(entry_of(name, data)["stored_as"]) for name, data in good.items())):
        kinds: dict[str, Callable[[Path], object]] = {
            "a link out of the directory": lambda path: path.symlink_to(outside / path.name),
            "a link to nothing": lambda path: path.symlink_to("nothing"),
            "a link to itself": lambda path: path.symlink_to(path.name),
            "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
            "a pipe": os.mkfifo,
            "a directory": Path.mkdir,
        }
        for kind, make in kinds.items():
            directory = forge(work / f"{kind} {name}".replace("/", "_"), good)
            (directory / name).unlink()
            make(directory / name)
            made[f"{name.partition('-')[0]}: {kind}"] = directory
    return made


# Watching ---------------------------------------------------------------------------------------------


class Watch:
    """Audit hook that notes forbidden events, and files opened for writing, while it is switched on."""

    def __init__(self) -> None:
        self.is_on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if writes or event in FORBIDDEN or event in CHANGES:
            self.seen.append(f"{event} {_described(args[0])}")

    def take(self) -> list[str]:
        """What was seen since the last call."""
        seen, self.seen = self.seen, []
        return seen


def _described(value: Any) -> str:
    """Start of a value as text; for code what it does instead of where it lies in memory."""
    if isinstance(value, CodeType):
        value = (value.co_filename, value.co_name, value.co_names, value.co_code)
    return repr(value)[:200]


def memory(field: str) -> float:
    """Memory that this process uses (``VmRSS``) or has used at most (``VmHWM``), in MB; 0 where Linux is not."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def forget_peak() -> None:
    """Let the most that was used begin at what is used now."""
    if (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5", encoding="ascii")


def main(tasks: dict[str, Any]) -> dict[str, Any]:
    """Load every path under the hook, then open the bombs without care.

    Parameters
    ----------
    tasks
        ``cases`` and ``bombs``: paths by what they are. ``marker``: the file that bombs make. ``good``: a model; it and
        ``warm_up``, some of the cases, are loaded before, for what torch and the standard library do on first use.

    Returns
    -------
    What came of the good model, of each case and of each bomb: outcome, seconds, memory and events.
    """
    from genejepa.model import GeneJEPA

    cases, marker, watch = tasks["cases"], Path(tasks["marker"]), Watch()

    def load(path: str) -> dict[str, Any]:
        forget_peak()
        before, started = memory("VmRSS"), time.process_time()
        watch.is_on = True
        try:
            GeneJEPA.load(path)
        except BaseException as error:  # noqa: BLE001  # the test wants to know which
            outcome, message = type(error).__name__, str(error)
        else:
            outcome, message = "loaded", ""
        finally:
            watch.is_on = False
        seconds = time.process_time() - started
        grown = max(0.0, memory("VmHWM") - before)
        facts = {"outcome": outcome, "message": message, "seconds": seconds, "megabytes": grown}
        return {**facts, "events": watch.take()}

    for path in (tasks["good"], *(cases[name] for name in tasks["warm_up"])):
        load(path)
    good = load(tasks["good"])
    results = {name: load(path) for name, path in cases.items()}
    exploded = marker.exists()
    controls = {}
    for suffix, path in tasks["bombs"].items():
        watch.is_on = True
        explode(Path(path))
        watch.is_on = False
        controls[suffix] = {"events": watch.take(), "exploded": marker.exists()}
        marker.unlink(missing_ok=True)
    return {"good": good, "cases": results, "exploded": exploded, "controls": controls}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
