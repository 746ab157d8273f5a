"""The record of which layer, batch column and label column of an AnnData are used."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from genejepa._constants import UNS_KEY
from genejepa.errors import DataError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import NDArray

_SETUP = "setup"
_SCVI_ADATA = "_scvi_uuid"
_SCVI_MANAGER = "_scvi_manager_uuid"


@dataclass(frozen=True)
class Registration:
    """Slots of an AnnData that a model reads.

    Parameters
    ----------
    layer
        Key of ``layers`` with the counts; None for ``X``.
    batch_key
        Column of ``obs`` with the batch of every cell; None for one batch.
    labels_key
        Column of ``obs`` with cell labels; None for no labels.
    """

    layer: str | None = None
    batch_key: str | None = None
    labels_key: str | None = None


def register(
    adata: AnnData, *, layer: str | None = None, batch_key: str | None = None, labels_key: str | None = None
) -> Registration:
    """Record in the AnnData which of its slots are to be used.

    Only ``adata.uns["genejepa"]["setup"]`` is written, with strings (empty for None), so it can be saved. A
    view becomes a copy by that, as with any assignment to a view.

    Parameters
    ----------
    adata
        Annotated data.
    layer
        Key of ``layers`` with the counts; None for ``X``.
    batch_key
        Column of ``obs`` with the batch of every cell; no value may be missing.
    labels_key
        Column of ``obs`` with cell labels; values may be missing.

    Returns
    -------
    What was recorded.

    Raises
    ------
    MissingKeyError
        If a key does not exist.
    DataError
        If a cell has no batch, or if ``uns["genejepa"]`` holds something else.
    """
    registration = Registration(layer=layer, batch_key=batch_key, labels_key=labels_key)
    _check(adata, registration)
    record = adata.uns.get(UNS_KEY, {})
    if not isinstance(record, Mapping):
        raise DataError(
            f"`uns[{UNS_KEY!r}]` holds a {type(record).__name__} that genejepa did not write",
            fix=f"rename or delete it: del adata.uns[{UNS_KEY!r}]",
        )
    setup = {name: value or "" for name, value in asdict(registration).items()}
    adata.uns[UNS_KEY] = {**record, _SETUP: setup}
    return registration


def registration_of(adata: AnnData) -> Registration:
    """Find out which slots of an AnnData are to be used.

    The record of :func:`register` counts; without one, what the AnnData was registered with in scvi-tools, in
    this process; without that, ``X`` and no batch.

    Parameters
    ----------
    adata
        Annotated data, not changed.

    Returns
    -------
    The slots to read.

    Raises
    ------
    MissingKeyError
        If a recorded key does not exist any more.
    DataError
        If the record is damaged or a cell has no batch.

    Warns
    -----
    UserWarning
        If the AnnData was registered with scvi-tools and it cannot be known how.
    """
    own = adata.uns.get(UNS_KEY, {})
    if isinstance(own, Mapping) and _SETUP in own:
        registration = _parse(own[_SETUP])
    elif _SCVI_ADATA in adata.uns:
        registration = _scvi_registration(adata)
    else:
        return Registration()
    _check(adata, registration)
    return registration


def batch_codes(adata: AnnData, key: str) -> tuple[NDArray[np.int64], list[str]]:
    """Give every batch of an AnnData a number.

    Parameters
    ----------
    adata
        Annotated data, not changed.
    key
        Column of ``obs`` with the batch of every cell. Values of any type; they are compared as strings.

    Returns
    -------
    The batch of every cell, shape ``(n_obs,)``, in ``0..n_batches - 1``, and the names of the batches that
    occur, sorted as strings.

    Raises
    ------
    MissingKeyError
        If the column does not exist.
    DataError
        If a cell has no batch.
    """
    _check(adata, Registration(batch_key=key))
    values = np.asarray(adata.obs[key].astype(str), dtype=object)
    categories, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.int64), [str(c) for c in categories]


def _check(adata: AnnData, registration: Registration) -> None:
    """Refuse keys that do not exist, and a batch column with missing values."""
    for argument, slot, key, existing in (
        ("layer", "layers", registration.layer, adata.layers),
        ("batch_key", "obs", registration.batch_key, adata.obs),
        ("labels_key", "obs", registration.labels_key, adata.obs),
    ):
        if key is not None and (not key or key not in existing):
            raise MissingKeyError(
                f"`{slot}[{key!r}]` ({argument}) does not exist; `{slot}` has {[str(k) for k in existing]}",
                fix=f"call setup_anndata(adata, {argument}=...) with an existing key, or without it.",
            )
    if registration.batch_key is None:
        return
    missing = adata.obs[registration.batch_key].isna().to_numpy()
    if missing.any():
        raise DataError(
            f"`obs[{registration.batch_key!r}]` has {int(missing.sum())} missing values, first for cell "
            f"{str(adata.obs_names[int(missing.argmax())])!r}; expected a batch for every cell",
            fix=f"adata = adata[adata.obs[{registration.batch_key!r}].notna()].copy(), or fill the values.",
        )


def _parse(record: Any) -> Registration:
    """Read the record of :func:`register`."""
    names = ("layer", "batch_key", "labels_key")
    if not isinstance(record, Mapping) or not all(isinstance(record.get(name, ""), str) for name in names):
        raise DataError(
            f"`uns[{UNS_KEY!r}][{_SETUP!r}]` is {record!r}, expected a dict of strings",
            fix="call setup_anndata(adata) again.",
        )
    return Registration(**{name: str(record.get(name, "")) or None for name in names})


def _scvi_registration(adata: AnnData) -> Registration:
    """Registration that scvi-tools holds for the AnnData; the default, with a warning, if it holds none."""
    for manager in _scvi_managers(str(adata.uns[_SCVI_ADATA])):
        if manager.id == str(adata.uns.get(_SCVI_MANAGER, manager.id)):
            arguments = manager.registry.get("setup_args") or {}
            names = ("layer", "batch_key", "labels_key")
            return Registration(**{name: arguments.get(name) for name in names})
    warnings.warn(
        "`adata` was registered with scvi-tools in another process, so its layer and batch are not known: "
        "using `X` and no batch. To choose, call setup_anndata(adata, layer=..., batch_key=...).",
        UserWarning,
        stacklevel=3,
    )
    return Registration()


def _scvi_managers(adata_id: str) -> Iterator[Any]:
    """Yield the managers that the model classes of scvi-tools keep for an AnnData."""
    if "scvi" not in sys.modules:  # managers live in memory only: without the module there are none
        return
    from scvi.model.base import BaseModelClass

    classes: list[Any] = [BaseModelClass]
    for cls in classes:
        classes.extend(sub for sub in cls.__subclasses__() if sub not in classes)
        manager = getattr(cls, "_setup_adata_manager_store", {}).get(adata_id)
        if manager is not None:
            yield manager
