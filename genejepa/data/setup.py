"""The record of which layer, batch column and label column of an AnnData are used."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from genejepa._constants import UNS_KEY
from genejepa.data.inputs import as_anndata
from genejepa.data.slots import CountSlot, as_text, missing_key, obs_column
from genejepa.errors import ConfigError, DataError, DataWarning, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

_SETUP = "setup"
_SCVI_ADATA = "_scvi_uuid"
_SCVI_MANAGER = "_scvi_manager_uuid"

_MANY_CELLS = 20
"""Cells from which on more batches than half their number cannot be meant."""

_N_EXAMPLES = 3


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
    use_raw
        Read the counts from ``raw.X`` instead of ``X``.

    Raises
    ------
    ConfigError
        If ``use_raw`` is given together with a layer.
    """

    layer: str | None = None
    batch_key: str | None = None
    labels_key: str | None = None
    use_raw: bool = False

    def __post_init__(self) -> None:
        _ = self.slot  # refuses raw together with a layer

    @property
    def slot(self) -> CountSlot:
        """Where the counts are."""
        return CountSlot(self.layer, self.use_raw)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Registration:
        """Inverse of :func:`dataclasses.asdict`; a ValueError for anything else, such as entries of a forged file."""
        found = cls(**values)
        keys = (found.layer, found.batch_key, found.labels_key)
        if not isinstance(found.use_raw, bool) or not all(isinstance(key, str | None) for key in keys):
            raise ValueError(f"the slots {dict(values)} are not keys of an AnnData")
        return found


def require_writable(adata: AnnData) -> None:
    """Refuse, before anything is computed, an object that genejepa cannot write to.

    Raises
    ------
    DataError
        If it is no AnnData, or a view of a file, or ``uns["genejepa"]`` is not ours.
    """
    if as_anndata(adata) is not adata:
        raise DataError(
            f"expected an AnnData to write to, found a {type(adata).__name__}.",
            fix="adata = anndata.read_h5ad(path), or use `model.get_latent_representation(path)`.",
        )
    if adata.is_view and adata.isbacked:
        raise DataError(
            "`adata` is a view of a file, which cannot be written to.",
            fix="adata = adata.to_memory(), or use `model.get_latent_representation(adata)`.",
        )
    if not isinstance(adata.uns.get(UNS_KEY, {}), Mapping):
        raise DataError(
            f"`uns[{UNS_KEY!r}]` holds a {type(adata.uns[UNS_KEY]).__name__} that genejepa did not write.",
            fix=f"rename or delete it: del adata.uns[{UNS_KEY!r}]",
        )


def register(
    adata: AnnData,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    batch_key: str | None = None,
    labels_key: str | None = None,
) -> Registration:
    """Record in the AnnData which of its slots are to be used.

    Only ``adata.uns["genejepa"]["setup"]`` is written, with strings (empty for None and False), so it can be saved. A
    view becomes a copy by that, as with any assignment to a view.

    Parameters
    ----------
    adata
        Annotated data.
    layer
        Key of ``layers`` with the counts; None for ``X``.
    use_raw
        Read the counts from ``raw.X`` instead of ``X``.
    batch_key
        Column of ``obs`` with the batch of every cell; no value may be missing.
    labels_key
        Column of ``obs`` with cell labels; values may be missing.

    Returns
    -------
    What was recorded.

    Raises
    ------
    ConfigError
        If ``use_raw`` is given together with a layer, or a key is not a string.
    MissingKeyError
        If a key does not exist.
    DataError
        If a cell has no batch, if the batch column cannot be one (see :func:`batch_codes`), or if
        ``uns["genejepa"]`` holds something else.
    """
    require_writable(adata)
    registration = Registration(layer=layer, batch_key=batch_key, labels_key=labels_key, use_raw=use_raw)
    check_registration(adata, registration)
    setup = {name: str(value or "") for name, value in asdict(registration).items()}
    adata.uns[UNS_KEY] = {**adata.uns.get(UNS_KEY, {}), _SETUP: setup}
    return registration


def registration_of(adata: AnnData) -> Registration:
    """Find out which slots of an AnnData are to be used: those declared, else ``X`` and no batch.

    Errors and warnings as in :func:`declared_registration`.
    """
    return declared_registration(adata) or Registration()


def declared_registration(adata: AnnData) -> Registration | None:
    """Find out which slots of an AnnData were declared.

    The record of :func:`register` counts; without one, what the AnnData was registered with in scvi-tools, in
    this process.

    Parameters
    ----------
    adata
        Annotated data, not changed.

    Returns
    -------
    The slots to read; None if nothing is declared.

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
        registration: Registration | None = _parse(own[_SETUP])
    elif _SCVI_ADATA in adata.uns:
        registration = _scvi_registration(adata)
    else:
        return None
    if registration is not None:
        check_registration(adata, registration)
    return registration


def batch_codes(adata: AnnData, key: str, *, training: bool = True) -> tuple[NDArray[np.int64], list[str]]:
    """Give every batch of an AnnData a number.

    Parameters
    ----------
    adata
        Annotated data, not changed.
    key
        Column of ``obs`` with the batch of every cell: text, whole numbers or booleans.
    training
        Refuse a column with hardly two cells of a batch, from which nothing can be learnt.

    Returns
    -------
    The batch of every cell, shape ``(n_obs,)``, in ``0..n_batches - 1``, and the names of the batches that
    occur, sorted as strings. Categories without a cell are left out.

    Raises
    ------
    MissingKeyError
        If the column does not exist.
    DataError
        If a cell has no batch, if there are values of several types such as ``1`` and ``"1"``, or, in training, if 20
        cells or more have more batches than half their number.

    Warns
    -----
    DataWarning
        If the values are floating-point numbers.
    """
    import pandas as pd

    column = _complete_column(adata, key)
    _check_types(column, key)
    try:
        codes, values = pd.factorize(column)
    except TypeError as error:  # lists, dicts
        raise DataError(
            f"`obs[{key!r}]` holds values that cannot be compared, such as {str(column.iloc[0])[:40]}, expected text "
            f"or whole numbers ({error}).",
            fix=f"adata.obs[{key!r}] = adata.obs[{key!r}].astype(str).astype('category')",
        ) from error
    if training and len(values) > len(column) / 2 and len(column) >= _MANY_CELLS:
        raise DataError(
            f"`obs[{key!r}]` has {len(values)} distinct values in {len(column)} cells, such as "
            f"{[as_text(v) for v in values[:_N_EXAMPLES]]}: is this a batch?",
            fix="pass as batch_key a column with several cells for each value, or None.",
        )
    if column.dtype.kind == "f" and len(values):
        warnings.warn(
            f"`obs[{key!r}]` holds floating-point numbers, such as {values[0]}; each of its {len(values)} values is "
            "taken as one batch.",
            DataWarning,
            stacklevel=2,
        )
    names, order = np.unique(np.array([as_text(v) for v in values], dtype=object), return_inverse=True)
    return order[codes].astype(np.int64), [str(name) for name in names]


def _complete_column(adata: AnnData, key: str) -> pd.Series[Any]:
    """Column of ``obs`` that has a value for every cell."""
    column = obs_column(adata, key)
    missing = column.isna().to_numpy()
    if missing.any():
        raise DataError(
            f"`obs[{key!r}]` has {int(missing.sum())} missing values, first for cell "
            f"{str(adata.obs_names[int(missing.argmax())])!r}; expected a batch for every cell",
            fix=f"adata.obs[{key!r}] = adata.obs[{key!r}].astype('string').fillna('unknown').astype('category')",
        )
    return column


def _check_types(column: pd.Series[Any], key: str) -> None:
    """Refuse a column with values of several types: pandas takes 1 and True for one, and ``"1"`` for another."""
    values = column.cat.remove_unused_categories().cat.categories if hasattr(column, "cat") else column
    types = sorted({_type_name(kind) for kind in set(map(type, values))}) if values.dtype == object else []
    if len(types) > 1:
        raise DataError(
            f"`obs[{key!r}]` mixes values of the types {', '.join(types)}, of which some may be meant to be equal; "
            "expected one type",
            fix=f"adata.obs[{key!r}] = adata.obs[{key!r}].astype(str).astype('category')",
        )


def _type_name(kind: type) -> str:
    """Name of a type; numpy's types have that of Python's."""
    known: dict[str, tuple[type, ...]] = {
        "bool": (bool, np.bool_),
        "int": (int, np.integer),
        "float": (float, np.floating),
        "str": (str,),
    }
    return next((name for name, kinds in known.items() if issubclass(kind, kinds)), kind.__name__)


def check_registration(adata: AnnData, registration: Registration) -> None:
    """Refuse keys that are not text or do not exist, and a batch column that cannot be one."""
    keys = {"layer": registration.layer, "batch_key": registration.batch_key, "labels_key": registration.labels_key}
    for argument, key in keys.items():
        if key is not None and not isinstance(key, str):
            raise ConfigError(
                f"`{argument}` is {key!r}, of type {type(key).__name__}, expected a string or None.",
                fix="adata.obs.columns = adata.obs.columns.astype(str), and pass the name as a string.",
            )
        slot, existing = ("layers", adata.layers) if argument == "layer" else ("obs", adata.obs)
        if key is not None and (not key or key not in existing):
            raise missing_key(slot, key, existing, argument=argument)
    if registration.use_raw and adata.raw is None:
        raise MissingKeyError("`raw` (use_raw=True) is empty.", fix="leave use_raw out to read `X`.")
    if registration.batch_key is not None:
        _check_types(_complete_column(adata, registration.batch_key), registration.batch_key)


def _parse(record: Any) -> Registration:
    """Read the record of :func:`register`."""
    names = ("layer", "batch_key", "labels_key", "use_raw")
    if not isinstance(record, Mapping) or not all(isinstance(record.get(name, ""), str) for name in names):
        raise DataError(
            f"`uns[{UNS_KEY!r}][{_SETUP!r}]` is {record!r}, expected a dict of strings",
            fix="call setup_anndata(adata) again.",
        )
    layer, batch_key, labels_key, use_raw = (str(record.get(name, "")) or None for name in names)
    return Registration(layer, batch_key, labels_key, use_raw=use_raw is not None)


def _scvi_registration(adata: AnnData) -> Registration | None:
    """Registration that scvi-tools holds for the AnnData; None, with a warning, if it holds none."""
    for manager in _scvi_managers(str(adata.uns[_SCVI_ADATA])):
        if manager.id == str(adata.uns.get(_SCVI_MANAGER, manager.id)):
            arguments = manager.registry.get("setup_args") or {}
            layer, batch_key, labels_key = (arguments.get(name) for name in ("layer", "batch_key", "labels_key"))
            return Registration(layer, batch_key, labels_key)
    warnings.warn(
        "`adata` was registered with scvi-tools in another process, so its layer and batch are not known: "
        "using `X` and no batch. To choose, call setup_anndata(adata, layer=..., batch_key=...).",
        UserWarning,
        stacklevel=4,
    )
    return None


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
