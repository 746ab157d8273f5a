"""The commands of the world model: ``genejepa predict`` and ``genejepa plan``."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from genejepa.cli.describe import echo_facts, printable
from genejepa.cli.errors import plain_errors
from genejepa.cli.options import READ_TIMEOUT, CellsFile, Layer, Overwrite, ReadTimeout, UseRaw
from genejepa.cli.output import check_output, check_world, compression_of, is_same, write_cells, write_tables
from genejepa.cli.watch import read_watched
from genejepa.errors import ConfigError, DataError, DataWarning
from genejepa.files import output_file, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from genejepa.model import GeneJEPA
    from genejepa.world.model import WorldModel
    from genejepa.world.plan import Plan
    from genejepa.world.transitions import Keys

_N_GENES: Final = 5
_N_LISTED: Final = 20
_SPAN: Final = 2
"""Actions that the hierarchical method takes at once."""
_PICTURES: Final = (".pdf", ".png", ".svg")
_DPI: Final = 150
_OPTIONS: Final = {
    "action": "--action-key",
    "control": "--control",
    "group": "--group-key",
    "time": "--time-key",
    "dose": "--dose-key",
}
"""Options for the columns of :class:`genejepa.world.transitions.Keys`."""


class Method(StrEnum):
    """How plans are searched."""

    auto = "auto"
    exhaustive = "exhaustive"
    cross_entropy = "cross_entropy"
    hierarchical = "hierarchical"


ModelPath = Annotated[
    Path | None, typer.Option("--model", help="Directory of a saved model, to fit a world model on it.")
]
World = Annotated[
    Path | None, typer.Option(help="Directory of a saved world model. If it is there, nothing is fitted.")
]
SaveWorld = Annotated[Path | None, typer.Option(help="Directory to keep the world model in.")]
ActionKey = Annotated[str | None, typer.Option(help="Column of obs with what was done to each cell.")]
Control = Annotated[str | None, typer.Option(help="Its value for doing nothing.")]
GroupKey = Annotated[
    str | None, typer.Option(help="Column of obs with populations that become each other only, such as cell types.")
]
TimeKey = Annotated[str | None, typer.Option(help="Column of obs with the time of measurement, a number.")]


@dataclass(frozen=True)
class _Origin:
    """Where the world model of a command comes from.

    Attributes
    ----------
    model
        Directory of the model to fit it on.
    world
        Directory to load it from; None to fit it.
    save_world
        Directory to keep it in; None if it is kept there already.
    keys
        Columns by the names that :class:`genejepa.world.transitions.Keys` gives them; None for those not given.
    """

    model: Path | None
    world: Path | None
    save_world: Path | None
    keys: Mapping[str, str | None]


@plain_errors
def predict(
    cells: CellsFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: the cells as predicted.")],
    model: ModelPath = None,
    action_key: ActionKey = None,
    control: Control = None,
    group_key: GroupKey = None,
    time_key: TimeKey = None,
    dose_key: Annotated[str | None, typer.Option(help="Column of obs with the dose, a number.")] = None,
    world: World = None,
    save_world: SaveWorld = None,
    action: Annotated[
        str | None, typer.Option(help="What is done; A+B for both.", show_default="only time passes")
    ] = None,
    dose: Annotated[float | None, typer.Option(help="Its dose.")] = None,
    duration: Annotated[
        float | None, typer.Option(help="Time that passes.", show_default="that of a median transition")
    ] = None,
    n_futures: Annotated[
        int, typer.Option(min=1, help="1: a future drawn for each cell; more: so many of the most probable ones.")
    ] = 1,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE",
            help="Start from these only. Repeated: with all columns, and any value given for each.",
        ),
    ] = None,
    layer: Layer = None,
    use_raw: UseRaw = False,
    overwrite: Overwrite = False,
    read_timeout: ReadTimeout = READ_TIMEOUT,
) -> None:
    """Predict cells after an action, or after some time.

    Learns from all cells what actions do, or loads that with --world. The prediction starts from the controls or,
    where there are none, from the cells of the last time. X of the file that is written is log expression; the
    predicted change is in layers, and actions, probabilities and energies are in obs.
    """
    cells = cells.expanduser()
    keys = {"action": action_key, "control": control, "group": group_key, "time": time_key, "dose": dose_key}
    origin = _origin(model, world, save_world, keys, overwrite=overwrite)
    check_output(out, overwrite=overwrite, others=(cells, origin.save_world))
    wanted = _parse_conditions("--source", source)
    _require_one_slot(layer, use_raw)
    loaded, columns = _opened(origin)
    _check_request(columns, action=action, dose=dose, duration=duration)
    adata = read_watched(cells, seconds=read_timeout)
    before = _cells_before(adata, columns, may_be_missing=loaded is not None)
    chosen = _having(adata, wanted, "--source", among=before)
    found = loaded or _fitted(origin, columns, adata, [action], dose=dose, layer=layer, use_raw=use_raw)
    _keep(found, origin)
    predicted = found.predict(
        adata[chosen].copy(),
        action,
        dose=dose,
        duration=duration,
        n_futures=n_futures,
        layer=layer,
        use_raw=use_raw,
    )
    write_cells(predicted, out, compression=compression_of(cells))
    done = {"": action or "only time passes", ", dose ": dose, ", duration ": duration}
    echo_facts(
        {
            "Cells": f"{chosen.sum():,} of {adata.n_obs:,}",
            "Action": "".join(f"{name}{value}" for name, value in done.items() if value is not None),
            "Learnt from": _learnt_from(found, origin),
            **_prediction_facts(found, predicted, n_futures=n_futures),
            "Written": ", ".join(str(path) for path in (out, origin.save_world) if path is not None),
        }
    )


@plain_errors
def plan(
    cells: CellsFile,
    start: Annotated[
        list[str],
        typer.Option(
            metavar="COLUMN=VALUE",
            help="Cells to start from. Repeated: with all columns, and any value given for each.",
        ),
    ],
    goal: Annotated[list[str], typer.Option(metavar="COLUMN=VALUE", help="Cells to come to; as --start.")],
    model: ModelPath = None,
    action_key: ActionKey = None,
    control: Control = None,
    group_key: GroupKey = None,
    time_key: TimeKey = None,
    world: World = None,
    save_world: SaveWorld = None,
    actions: Annotated[
        list[str] | None, typer.Option(help="Action to choose from; can be repeated.", show_default="all")
    ] = None,
    horizon: Annotated[int, typer.Option(min=1, help="Most actions in a sequence.")] = 3,
    method: Annotated[Method, typer.Option(help="How to search; auto: exhaustive if there are few.")] = Method.auto,
    n_best: Annotated[int, typer.Option(min=1, help="Sequences to print.")] = 10,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV file for the table.")] = None,
    picture: Annotated[Path | None, typer.Option(help="File for a picture: png, pdf or svg.")] = None,
    layer: Layer = None,
    use_raw: UseRaw = False,
    overwrite: Overwrite = False,
    read_timeout: ReadTimeout = READ_TIMEOUT,
) -> None:
    """Rank sequences of actions that shall lead from some cells to others.

    Learns from all cells what actions do, or loads that with --world. A sequence costs the energy distance that it
    leaves to the goal, and a little for every action; nothing is done to cells.
    """
    cells = cells.expanduser()
    keys = {"action": action_key, "control": control, "group": group_key, "time": time_key}
    origin = _origin(model, world, save_world, keys, overwrite=overwrite)
    if out is not None:
        check_output(out, overwrite=overwrite, others=(cells, origin.save_world))
    if picture is not None:
        _check_picture(picture, overwrite=overwrite, others=(cells, origin.save_world, out))
    first, last = _parse_conditions("--start", start), _parse_conditions("--goal", goal)
    _require_one_slot(layer, use_raw)
    if method is Method.hierarchical and horizon <= _SPAN:
        raise ConfigError(
            f"the hierarchical method takes {_SPAN} actions at once, and `--horizon` is {horizon}.",
            fix=f"give --horizon {_SPAN + 1} or more, or another --method.",
        )
    loaded, columns = _opened(origin)
    if columns.dose is not None:
        raise ConfigError(
            f"the actions of {origin.world} have doses, and plans choose among actions of one dose.",
            fix="name each action with its dose in a column of its own, and fit without --dose-key.",
        )
    for action in actions or ():
        _check_request(columns, action=action)
    adata = read_watched(cells, seconds=read_timeout)
    begin, end = _having(adata, first, "--start"), _having(adata, last, "--goal")
    found = loaded or _fitted(origin, columns, adata, actions or [], layer=layer, use_raw=use_raw)
    _keep(found, origin)
    ranked = found.plan(
        adata[begin].copy(),
        adata[end].copy(),
        actions,
        horizon=horizon,
        method=method.value,
        span=_SPAN,
        n_best=n_best,
        layer=layer,
        use_raw=use_raw,
    )
    _print_plan(ranked)
    if out is not None:
        write_tables([ranked.table.reset_index()], out)
    if picture is not None:
        _write_picture(ranked, picture)
    written = ", ".join(str(path) for path in (out, picture, origin.save_world) if path is not None)
    echo_facts(
        {
            "Start": f"{begin.sum():,} cells",
            "Goal": f"{end.sum():,} cells",
            "Learnt from": _learnt_from(found, origin),
            "Search": f"{ranked.method}, {ranked.n_evaluations:,} populations imagined",
            **({"Written": written} if written else {}),
        }
    )


# Before any cell is read -----------------------------------------------------------------------------


def _parse_conditions(option: str, entries: Sequence[str] | None) -> dict[str, list[str]]:
    """Read ``COLUMN=VALUE`` pairs: values by column."""
    found: dict[str, list[str]] = {}
    for entry in entries or ():
        column, separator, value = entry.partition("=")
        if not separator or not column:
            raise ConfigError(
                f"`{option} {entry}` is not of the form COLUMN=VALUE.",
                fix=f"name a column of obs and its value, such as {option} cell_type=B.",
            )
        found.setdefault(column, []).append(value)
    return found


def _require_one_slot(layer: str | None, use_raw: bool) -> None:
    from genejepa.data.slots import CountSlot

    CountSlot(layer, use_raw)


def _check_picture(path: Path, *, overwrite: bool, others: Iterable[Path | None]) -> None:
    if path.suffix.lower() not in _PICTURES:
        raise ConfigError(
            f"`--picture` is {path}, expected a name that ends with {', '.join(_PICTURES)}.", fix="give such a name."
        )
    check_output(path, overwrite=overwrite, others=others)


def _origin(
    model: Path | None, world: Path | None, save_world: Path | None, keys: Mapping[str, str | None], *, overwrite: bool
) -> _Origin:
    """Where the world model comes from, and may be kept.

    Raises
    ------
    ConfigError
        If there is nothing to load or fit, or the directory to keep it in holds another.
    FileExistsError
        If that directory holds something else.
    """
    model, world, save_world = (None if path is None else path.expanduser() for path in (model, world, save_world))
    is_there = world is not None and world.exists()
    if not is_there and model is None:
        found = "neither `--world` nor" if world is None else f"{world} does not exist, and no"
        raise ConfigError(
            f"{found} `--model` is given.",
            fix="give a model and the columns of obs, such as --model out/model --action-key condition --control ctrl, "
            "or the directory of a saved world model as --world.",
        )
    if save_world is not None and is_there and world is not None and is_same(world, save_world):
        save_world = None
    if save_world is not None:
        check_world(save_world, overwrite=overwrite)
    return _Origin(model, world if is_there else None, save_world, keys)


def _opened(origin: _Origin) -> tuple[WorldModel | None, Keys]:
    """World model that is loaded, None if one has to be fitted, and its columns.

    Raises
    ------
    ConfigError
        If the columns do not go together, or are not those of what is loaded.
    ModelFileError
        If the directory is not a world model.
    """
    from genejepa.world.transitions import Keys

    if origin.world is None:
        try:
            return None, Keys(**origin.keys)
        except ConfigError as error:
            fix = "give --action-key and --control, or --time-key, or all three; a --dose-key needs an --action-key."
            raise ConfigError(error.problem, fix=fix) from None

    from genejepa.world.model import WorldModel

    loaded = WorldModel.load(origin.world)
    _require_same(origin, loaded)
    return loaded, loaded.keys


def _require_same(origin: _Origin, loaded: WorldModel) -> None:
    """Refuse options that say something else than the world model that is loaded."""
    from genejepa.model import GeneJEPA

    keys = loaded.keys
    changes = [
        f"{_OPTIONS[name]} was {getattr(keys, name)!r} and is {value!r}"
        for name, value in origin.keys.items()
        if value is not None and value != getattr(keys, name)
    ]
    if origin.model is not None:
        model_id = GeneJEPA.load(origin.model).model_id
        if model_id != loaded.model.model_id:
            changes.append(f"--model was {loaded.model.model_id} and is {model_id}")
    if changes:
        raise ConfigError(
            f"{origin.world} is a world model of other options: {'; '.join(changes)}.",
            fix="leave these options out to use it, or leave --world out to fit a new one.",
        )


def _check_request(keys: Keys, *, action: str | None, dose: float | None = None, duration: float | None = None) -> None:
    """Refuse what a world model of these columns cannot be asked, before it is fitted."""
    acts = _acts(keys, action)
    if acts and keys.action is None:
        raise ConfigError(
            f"the action {action!r} is given, and there is no `--action-key`.", fix="leave the action out."
        )
    if not acts and keys.time is None:
        raise ConfigError(
            f"{'no action' if action is None else repr(action)} is given, and without times only actions change cells.",
            fix=f"give an action other than {keys.control!r}.",
        )
    if acts and dose is None and keys.dose is not None:
        raise ConfigError(f"no `--dose` is given for {action!r}, expected one.", fix="give --dose.")
    if dose is not None and keys.dose is None:
        raise ConfigError("`--dose` is given, and there is no `--dose-key`.", fix="leave --dose out.")
    if dose is not None and not (math.isfinite(dose) and dose >= 0):
        raise ConfigError(f"`--dose` is {dose:g}, expected a finite number of at least 0.", fix="give such a dose.")
    if duration is not None and keys.time is None:
        raise ConfigError("`--duration` is given, and there is no `--time-key`.", fix="leave --duration out.")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise ConfigError(f"`--duration` is {duration:g}, expected a number above 0.", fix="give such a duration.")


def _acts(keys: Keys, action: str | None) -> bool:
    """Whether an action is one, and not the control or time that passes."""
    from genejepa.world.actions import Action
    from genejepa.world.model import TIME

    if action is None or (action == TIME and keys.time is not None):
        return False
    return Action.parse(action, control=keys.control) != Action()


# Cells -------------------------------------------------------------------------------------------------


def _cells_before(adata: AnnData, keys: Keys, *, may_be_missing: bool) -> NDArray[np.bool_]:
    """Cells that a prediction starts from, (n_obs,): controls or, where there are none, the cells of the last time.

    Parameters
    ----------
    may_be_missing
        Take all cells, with a warning, if there is no such column, as in new cells that nothing was done to.
    """
    import numpy as np

    from genejepa.data.slots import obs_column
    from genejepa.world.actions import Action

    key = keys.time if keys.action is None else keys.action
    assert key is not None  # of these two a world model has one
    if may_be_missing and key not in adata.obs:
        warnings.warn(f"`obs` has no column {key!r}: the prediction starts from all cells.", DataWarning, stacklevel=2)
        return np.ones(adata.n_obs, dtype=bool)
    if keys.action is not None:
        column = obs_column(adata, keys.action)
        names = _names(column)
        controls = [name for name in names if Action.parse(name, control=keys.control) == Action()]
        if controls:
            return _equal(column, controls)
        if keys.time is None:
            raise DataError(
                f"no cell is a control: `obs[{key!r}]` is never {keys.control!r}, found {_listed(names)}.",
                fix="add control cells to the file, or give the name of the control as --control.",
            )
    assert keys.time is not None
    return _are_last(obs_column(adata, keys.time))


def _are_last(column: pd.Series) -> NDArray[np.bool_]:
    import numpy as np
    import pandas as pd

    times = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(times).any():
        raise DataError(f"`obs[{column.name!r}]` has no finite number.", fix="give the times of the cells as numbers.")
    last: NDArray[np.bool_] = times == times[np.isfinite(times)].max()
    return last


def _having(
    adata: AnnData, wanted: Mapping[str, Sequence[str]], option: str, *, among: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Cells, (n_obs,), that have one of the values of every column.

    Raises
    ------
    MissingKeyError
        If a column does not exist.
    DataError
        If a value does not occur, or no cell has all.
    """
    import numpy as np

    from genejepa.data.slots import obs_column

    found = np.ones(adata.n_obs, dtype=bool) if among is None else among
    for name, values in wanted.items():
        column = obs_column(adata, name)
        for value in values:
            if not _equal(column, [value]).any():
                raise DataError(
                    f"`obs[{name!r}]` is never {value!r}, found {_listed(_names(column))}.",
                    fix=f"give {option} {name}=VALUE with one of these.",
                )
        found = found & _equal(column, values)
    if wanted and not found.any():
        asked = " and ".join(f"{name} {' or '.join(values)}" for name, values in wanted.items())
        kind = "cells" if among is None else f"{among.sum():,} cells that a prediction starts from"
        raise DataError(f"none of the {kind} has {asked}.", fix=f"leave out one {option}, or give other values.")
    return found


def _equal(column: pd.Series, values: Sequence[str]) -> NDArray[np.bool_]:
    """Cells with one of some values; numbers are compared as numbers, so that 1 is 1.0."""
    import pandas as pd

    levels = column.cat.categories.dtype if isinstance(column.dtype, pd.CategoricalDtype) else column.dtype
    found = column.astype(str).isin(values) & column.notna()
    if pd.api.types.is_numeric_dtype(levels):
        numbers = pd.to_numeric(pd.Series(values), errors="coerce").dropna()
        found |= pd.to_numeric(column.astype(object), errors="coerce").isin(numbers)
    equal: NDArray[np.bool_] = found.to_numpy(dtype=bool)
    return equal


def _names(column: pd.Series) -> list[str]:
    return sorted(map(str, column.dropna().unique()))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_N_LISTED])) + (", ..." if len(names) > _N_LISTED else "") or "nothing"


# The world model ---------------------------------------------------------------------------------------


def _fitted(
    origin: _Origin,
    keys: Keys,
    adata: AnnData,
    asked: Sequence[str | None],
    *,
    dose: float | None = None,
    layer: str | None,
    use_raw: bool,
) -> WorldModel:
    """World model of the cells; actions that it could not predict are refused before it is fitted."""
    from genejepa.model import GeneJEPA
    from genejepa.world.model import WorldModel

    assert origin.model is not None  # else nothing would be fitted
    model = GeneJEPA.load(origin.model)
    _require_known(adata, keys, model, [name for name in asked if name is not None and _acts(keys, name)], dose=dose)
    return WorldModel(model).fit(
        adata,
        action_key=keys.action,
        control=keys.control,
        group_key=keys.group,
        time_key=keys.time,
        dose_key=keys.dose,
        layer=layer,
        use_raw=use_raw,
    )


def _require_known(adata: AnnData, keys: Keys, model: GeneJEPA, asked: Sequence[str], *, dose: float | None) -> None:
    from genejepa.world.actions import Action, ActionSpace
    from genejepa.world.decoder import gene_vectors_of
    from genejepa.world.transitions import populations, transitions

    with warnings.catch_warnings(action="ignore"):  # the fit and the prediction give them
        pairs = transitions(populations(adata, keys), keys)
        space = ActionSpace.of(
            [pair.action for pair in pairs], has_time=keys.time is not None, gene_vectors=gene_vectors_of(model)
        )
        for name in asked:
            space.encode(Action.parse(name, control=keys.control, dose=dose))


def _keep(world: WorldModel, origin: _Origin) -> None:
    """Save a world model before it is used, so that a mistake in the request does not cost the fit."""
    if origin.save_world is not None:
        world.save(origin.save_world, overwrite=True)


# What is told ------------------------------------------------------------------------------------------


def _learnt_from(world: WorldModel, origin: _Origin) -> str:
    facts = world.facts
    numbers = {name: facts[f"n_{name}s"] for name in ("transition", "group", "action")}
    found = ", ".join(f"{number:,} {name}{'s' if number != 1 else ''}" for name, number in numbers.items())
    return found if origin.world is None else f"{found}; loaded from {origin.world}"


def _prediction_facts(world: WorldModel, predicted: AnnData, *, n_futures: int) -> dict[str, str]:
    """What a prediction says, in a few words."""
    import numpy as np

    # A future that was drawn stands for its probability; those that are given side by side do not.
    weights = predicted.obs["genejepa_probability"].to_numpy() if n_futures > 1 else None
    change = np.average(predicted.layers["change"], axis=0, weights=weights)
    order = np.argsort(change, kind="stable")
    fall, rise = order[:_N_GENES], order[::-1][:_N_GENES]
    genes = predicted.var_names
    return {
        "Futures": f"{n_futures} of {world.facts['n_futures']} for each cell",
        "Energy": f"median {np.median(predicted.obs['genejepa_energy']):.2f} (about 1 for a state that cells have)",
        "Rise most": ", ".join(f"{genes[k]} {change[k]:+.2f}" for k in rise if change[k] > 0) or "no gene",
        "Fall most": ", ".join(f"{genes[k]} {change[k]:+.2f}" for k in fall if change[k] < 0) or "no gene",
    }


def _print_plan(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Plan", title_justify="left")
    shown.add_column("rank", justify="right")
    shown.add_column("actions", overflow="fold")
    shown.add_column("distance", justify="right")
    shown.add_column("cost", justify="right")
    for rank, row in plan.table.iterrows():
        shown.add_row(str(rank), printable(row["actions"]), f"{row['distance']:.3f}", f"{row['cost']:.3f}")
    Console().print(shown, markup=False)


def _write_picture(plan: Plan, path: Path) -> None:
    import matplotlib as mpl

    from genejepa import pl

    mpl.use("agg")  # files only: no window, also where there is a screen
    figure: Figure = pl.plan(plan)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=_DPI)
    write_atomically(output_file(path), buffer.getvalue())
