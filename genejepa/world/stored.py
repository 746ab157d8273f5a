"""World models in directories: the model they stand on, numbers as JSON, and arrays."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from genejepa.bundle import damaged, parse_json, read_bundle, write_bundle
from genejepa.energy import ResidualScale
from genejepa.model import GeneJEPA
from genejepa.persistence import json_to_bytes, model_from_files, model_to_files, tensors_from_bytes, tensors_to_bytes
from genejepa.world.actions import ActionSpace
from genejepa.world.decoder import PlausibleStates, gene_vectors_of
from genejepa.world.fitting import HIDDEN, Fitted, KnownStates
from genejepa.world.futures import FutureShares
from genejepa.world.linear import Features
from genejepa.world.network import TransitionNetwork
from genejepa.world.transitions import Keys

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

_KIND: Final = "world model"
_VERSION: Final = 1
_NUMBERS, _ARRAYS = "world.json", "world.safetensors"
_NETWORK = "network."


def save_world(directory: Path, model: GeneJEPA, fitted: Fitted, *, overwrite: bool) -> None:
    """Write a world model with its model.

    Raises
    ------
    FileExistsError
        If the directory holds one and ``overwrite`` is False, or anything else.
    OSError
        If it cannot be written; an earlier one is as it was.
    """
    space = fitted.space
    numbers = {
        "keys": asdict(fitted.keys),
        "names": list(space.names),
        "largest_dose": space.largest_dose.tolist(),
        "has_doses": space.has_doses,
        "has_time": space.has_time,
        "seen": sorted(map(list, space.seen)),
        "unit": fitted.unit,
        "longest": fitted.longest,
        "largest_distance": fitted.known.largest,
        "futures": [[list(parts), shares.tolist()] for parts, shares in fitted.shares.of_known.items()],
        "facts": fitted.facts,
    }
    scale = fitted.plausible.scale
    arrays = {
        "expression": fitted.expression,
        "known": fitted.known.states,
        "residual_mean": scale.mean,
        "residual_precision": scale.precision,
    }
    tensors = {_NETWORK + name: tensor for name, tensor in fitted.network.state_dict().items()}
    tensors |= {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}
    files = {
        **model_to_files(model.to_stored()),
        _NUMBERS: json_to_bytes(numbers),
        _ARRAYS: tensors_to_bytes(tensors),
    }
    write_bundle(directory, files, kind=_KIND, version=_VERSION, overwrite=overwrite)


def load_world(directory: Path) -> tuple[GeneJEPA, Fitted]:
    """Read what :func:`save_world` wrote; nothing in it is executed.

    Raises
    ------
    ModelFileError
        If it is not a complete world model, or a byte of it was changed.
    """
    files = read_bundle(directory, kind=_KIND, version=_VERSION)
    for name in (_NUMBERS, _ARRAYS):
        if name not in files:
            raise damaged(directory / name, "the file is missing")
    model = GeneJEPA.from_stored(model_from_files(files, directory), path=directory)
    numbers = parse_json(files[_NUMBERS], directory / _NUMBERS)
    tensors = tensors_from_bytes(files[_ARRAYS], directory / _ARRAYS)
    try:
        fitted = _fitted(numbers, tensors, gene_vectors_of(model))
        dim, n_genes = model.embedding_dim, len(model.genes)
        if fitted.known.states.shape[1] != dim or fitted.expression.shape[1] != n_genes:
            raise ValueError(f"its arrays are not those of a model with {dim} dimensions and {n_genes} genes")
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise damaged(directory, f"its parts do not fit together ({type(error).__name__}: {error})") from error
    return model, fitted


def _fitted(
    numbers: dict[str, Any], tensors: dict[str, Tensor], gene_vectors: dict[str, NDArray[np.float64]]
) -> Fitted:
    space = ActionSpace(
        tuple(numbers["names"]),
        np.array(numbers["largest_dose"], dtype=np.float64),
        bool(numbers["has_doses"]),
        bool(numbers["has_time"]),
        frozenset(map(tuple, numbers["seen"])),
        gene_vectors,
    )
    weights = {name.removeprefix(_NETWORK): t for name, t in tensors.items() if name.startswith(_NETWORK)}
    arrays = {name: t.numpy() for name, t in tensors.items() if not name.startswith(_NETWORK)}
    centre = weights["centre"].double().numpy()
    features = Features(centre, float(weights["scale"]) ** 2, weights["shared"].double().numpy())
    if len(features.shared) != space.dim:
        raise ValueError(f"there are weights of {len(features.shared)} actions, expected {space.dim}")
    start = (weights[name] for name in ("coefficients", "by_future"))
    network = TransitionNetwork(features, *start, hidden=HIDDEN)
    network.load_state_dict(weights)
    scale = ResidualScale(arrays["residual_mean"].astype(np.float64), arrays["residual_precision"].astype(np.float64))
    return Fitted(
        keys=Keys(**numbers["keys"]),
        space=space,
        unit=float(numbers["unit"]),
        longest=float(numbers["longest"]),
        network=network.eval(),
        shares=_shares(numbers["futures"], network.n_codes),
        expression=arrays["expression"],
        plausible=PlausibleStates(scale),
        known=KnownStates(arrays["known"], float(numbers["largest_distance"])),
        facts=dict(numbers["facts"]),
    )


def _shares(stored: Any, n_codes: int) -> FutureShares:
    found = {tuple(parts): np.array(shares, dtype=np.float64) for parts, shares in stored}
    if not found or any(shares.shape != (n_codes,) for shares in found.values()):
        raise ValueError(f"the shares of the futures are not those of {n_codes}")
    return FutureShares(found)
