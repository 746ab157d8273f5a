"""Random changes of the files of a model, each a function of its number."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.reliability._malicious import body_of, join_tensors, sealed, split_tensors

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    10**12,
    2**63,
    2**64 - 1,
    10**400,
    0.0,
    -0.0,
    0.5,
    5e-324,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "gene_tokens",
    "mlp",
    "F16",
    "BOOL",
    "../config.json",
    "\ud800",
    "x" * 10_000,
    [],
    {},
    [[]],
    [0, 2**62],
    [1] * 70,
    {"": {}},
)
ODD_BYTES = (
    b"\0",
    b"\xff\xfe",
    b'"',
    b"{",
    b"[" * 2000,
    b",",
    b"\n",
    b"1e999",
    b"9" * 5000,
    b"NaN",
    b"-",
    b"\xf0\x9f\xa7\xac",
)


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, drop, repeat, overwrite or insert some bytes."""
    start, other = sorted(rng.choices(range(len(data) + 1), k=2))
    end = min(other, start + rng.choice((1, 4, 16, len(data))))
    kind = rng.randrange(6)
    if kind == 0:
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:start] + data[end:]
    if kind == 2:
        return data[:end] + data[start:]
    if kind == 3:
        return data[:start] + rng.randbytes(end - start) + data[end:]
    if kind == 4:
        return data[:start]
    return data[:start] + rng.choice(ODD_BYTES) + data[start:]


def changed_json(value: Any, rng: random.Random) -> Any:
    """A copy in which one entry at any depth is dropped, renamed, replaced, wrapped, added or swapped with another."""
    value = json.loads(json.dumps(value))
    places = _places(value)
    container, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(("", key + "_", key.upper(), "__class__"))] = container.pop(key)
    elif kind == 2:
        container[key] = [container[key]]
    elif kind == 3:
        there, name = rng.choice(places)
        container[key], there[name] = there[name], container[key]
    elif kind == 4 and isinstance(container, list):
        container.append(rng.choice(ODD_VALUES))
    else:
        container[key] = rng.choice(ODD_VALUES)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container within a value with every key or position in it."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found += [(value, key), *_places(value[key])]
    return found


def changed_text(data: bytes, rng: random.Random) -> bytes:
    """JSON with one entry, or some bytes, or a repeated key changed."""
    kind = rng.randrange(8)
    if kind == 0:
        return changed_bytes(data, rng)
    value = json.loads(data)
    if kind > 1:
        return json.dumps(changed_json(value, rng)).encode()
    container, key = rng.choice([(c, k) for c, k in _places(value) if isinstance(c, dict)])
    again = f"{json.dumps(key)}: {json.dumps(container[key])}"
    return json.dumps(value).replace(again, f"{again}, {again}").encode()


def changed_genes(data: bytes, rng: random.Random) -> bytes:
    """A table with one field, or some bytes, changed."""
    if rng.randrange(4) == 0:
        return changed_bytes(data, rng)
    rows = [line.split(",") for line in data.decode().splitlines()]
    row = rng.choice(rows)
    kind = rng.randrange(4)
    if kind == 0:
        rows.append(list(row))
    elif kind == 1:
        rows.remove(row)
    elif kind == 2:
        row.append("1.0")
    else:
        row[rng.randrange(len(row))] = rng.choice(
            ("", " ", "nan", "inf", "-1", "0", "1e39", "1e-50", "1e400", "1_0", "x", '"', '"a\nb"', "ACTB", "\0", "٣")
        )
    return "\n".join(",".join(row) for row in rows).encode() + b"\n"


def changed_tensors(data: bytes, rng: random.Random) -> bytes:
    """Weights with some numbers, the header, its length, or some bytes changed."""
    header, numbers = split_tensors(data)
    kind = rng.randrange(8)
    if kind == 0:
        return changed_bytes(data, rng)
    if kind == 1:
        return rng.choice((rng.randrange(2**12), rng.randrange(2**64))).to_bytes(8, "little") + data[8:]
    if kind == 2:
        return join_tensors(header, changed_bytes(numbers, rng))
    return join_tensors(changed_text(json.dumps(header).encode(), rng), numbers)


def changed_manifest(files: dict[str, bytes], rng: random.Random) -> bytes:
    """A manifest with one entry changed and the checksum that belongs to it, or with some bytes changed."""
    body = body_of(files)
    if rng.randrange(4) == 0:
        return changed_bytes(sealed(body), rng)
    return sealed(changed_json(body, rng))


CHANGED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "config.json": changed_text,
    "genes.csv": changed_genes,
    "tensors.safetensors": changed_tensors,
    "state.json": changed_text,
}
