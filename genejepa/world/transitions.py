"""Which population becomes which: pairs of populations of an AnnData, and pairs of cells matched by optimal transport.

Cells are destroyed when they are measured, so the same cell is never seen before and after. What is known is a
population before and one after; cells are paired as cheaply as possible in the latent (Schiebinger et al. 2019,
doi:10.1016/j.cell.2019.01.006).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from genejepa.data.slots import SEPARATOR, as_text, obs_column
from genejepa.errors import ConfigError, DataError, DataWarning
from genejepa.world.actions import Action

if TYPE_CHECKING:
    from types import ModuleType

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

FEWEST_CELLS = 3
"""Populations with fewer cells are left out."""

_BLOCK = 1000
"""Most cells per side of one transport problem; larger populations are split at random."""

_N_LISTED = 5


@dataclass(frozen=True)
class Keys:
    """Columns of ``obs`` that say what was done to a cell; None where there is no such column.

    Attributes
    ----------
    action
        Name of the action.
    control
        Its value for cells to which nothing was done.
    group
        Populations that are compared with themselves only, such as cell types or donors.
    time
        Number: when the cell was measured.
    dose
        Number: dose of the action; not read for controls.
    """

    action: str | None = None
    control: str | None = None
    group: str | None = None
    time: str | None = None
    dose: str | None = None

    def __post_init__(self) -> None:
        if self.action is None and self.time is None:
            raise ConfigError(
                "neither `action_key` nor `time_key` is given.",
                fix="name the column of `obs` with the action, such as action_key='condition', or with the time.",
            )
        if (self.action is None) != (self.control is None):
            raise ConfigError(
                f"`action_key` is {self.action!r} and `control` is {self.control!r}; both or neither are needed.",
                fix="pass both, such as action_key='condition', control='ctrl'.",
            )
        if self.dose is not None and self.action is None:
            raise ConfigError("`dose_key` is given without `action_key`.", fix="pass `action_key`, too.")


@dataclass(frozen=True, eq=False)
class Population:
    """Cells of one group, action and time.

    Attributes
    ----------
    cells : (n,)
        Positions in the AnnData.
    time
        None without times.
    """

    group: str
    action: Action
    time: float | None
    cells: NDArray[np.int64]

    @property
    def moment(self) -> float:
        """Time, 0 without times."""
        return 0.0 if self.time is None else self.time

    def __str__(self) -> str:
        time = "" if self.time is None else f" at {self.time:g}"
        return f"{self.group}, {self.action}{time}"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Cells matched with each other.

    Attributes
    ----------
    before, after : (n_pairs,)
        Positions in each population.
    weight : (n_pairs,)
        Share of the transport plan, summing to 1.
    """

    before: NDArray[np.int64]
    after: NDArray[np.int64]
    weight: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Transition:
    """A population that becomes another by an action.

    Attributes
    ----------
    duration
        Time between the two; None without times.
    """

    source: Population
    target: Population
    duration: float | None

    @property
    def action(self) -> Action:
        """What was done."""
        return self.target.action

    @property
    def group(self) -> str:
        """Group of both."""
        return self.target.group


def populations(adata: AnnData, keys: Keys) -> list[Population]:
    """Populations of an AnnData, sorted; cells without a group or an action are in none.

    Raises
    ------
    MissingKeyError
        If a column does not exist.
    DataError
        If there are no cells, times or doses are no finite numbers, a dose is negative, no cell is a control, or all
        are.

    Warns
    -----
    DataWarning
        If cells are left out for a missing value.
    """
    import pandas as pd

    n_obs = adata.n_obs
    if n_obs == 0:
        raise DataError("`adata` has no cells.", fix="pass cells before and after.")
    group = _texts(adata, keys.group) if keys.group is not None else pd.Series(["all cells"] * n_obs)
    name = _texts(adata, keys.action, control=keys.control) if keys.action is not None else pd.Series([""] * n_obs)
    known = (group.notna() & name.notna()).to_numpy()
    actions = {text: Action.parse(text, control=keys.control or "") for text in name.dropna().unique()}
    by_name = {SEPARATOR.join(action.parts): action.parts for action in actions.values()}
    name = name.map({text: SEPARATOR.join(action.parts) for text, action in actions.items()})  # A+B is B+A
    is_control = (name == "").to_numpy()
    if keys.action is not None:
        _require_controls(keys, list(actions), is_control)
    time = _numbers(adata, keys.time, of=known) if keys.time is not None else np.zeros(n_obs)
    treated = known & ~is_control
    dose = _numbers(adata, keys.dose, of=treated, keys=keys) if keys.dose is not None else np.zeros(n_obs)
    if keys.dose is not None and (dose[treated] < 0).any():
        raise DataError(f"`obs[{keys.dose!r}]` has negative doses.", fix="give doses as numbers of at least 0.")
    if keys.dose is not None:
        largest = pd.Series(dose[treated]).groupby(name[treated].to_numpy()).max()
        if (largest == 0).any():
            raise DataError(
                f"`obs[{keys.dose!r}]` is 0 for all cells with the action {largest.idxmin()!r}, expected one above 0.",
                fix=f"call them controls, or give their dose in `obs[{keys.dose!r}]`.",
            )
    if not known.all():
        n = int((~known).sum())
        warnings.warn(f"{n} of {n_obs} cells have no group or no action; they are left out.", DataWarning, stacklevel=4)
    table = pd.DataFrame({"group": group, "name": name, "dose": np.where(is_control, 0.0, dose), "time": time})
    found = []
    for values, cells in table[known].groupby(list(table), sort=True).indices.items():
        own_group, own_name, own_dose, own_time = cast("tuple[str, str, float, float]", values)
        parts = by_name[own_name]
        action = Action(parts, float(own_dose) if parts and keys.dose is not None else None)
        own = np.flatnonzero(known)[cells]
        found.append(Population(own_group, action, None if keys.time is None else float(own_time), own))
    return found


def transitions(found: list[Population], keys: Keys) -> list[Transition]:
    """Pairs of populations of one group, of which the second comes from the first.

    Without times, every population comes from the controls of its group. With times, it comes from the time before, in
    this order: from cells with the same action, from controls, or, if all cells of that time had one action, from
    these. An action at a time is thus what was done since the time before.

    Raises
    ------
    DataError
        If there is no such pair.

    Warns
    -----
    DataWarning
        If populations are left out, because they have too few cells or nothing that they come from.
    """
    large = [population for population in found if len(population.cells) >= FEWEST_CELLS]
    pairs, orphans = [], [population for population in found if len(population.cells) < FEWEST_CELLS]
    for target in large:
        own = [population for population in large if population.group == target.group]
        if keys.time is None:
            if target.action == Action():
                continue
            source = next((population for population in own if population.action == Action()), None)
        else:
            earlier = [population.moment for population in own if population.moment < target.moment]
            if not earlier:
                if all(population.moment == target.moment for population in own):
                    orphans.append(target)
                continue
            source = _before(target, [population for population in own if population.moment == max(earlier)])
        if source is None:
            orphans.append(target)
        else:
            duration = None if keys.time is None else target.moment - source.moment
            pairs.append(Transition(source, target, duration))
    if orphans:
        warnings.warn(
            f"{len(orphans)} of {len(found)} populations are left out, because they have fewer than {FEWEST_CELLS} "
            f"cells or their group has nothing they could come from or become: {_listed(orphans)}.",
            DataWarning,
            stacklevel=4,
        )
    if not pairs:
        what = "a control and another action" if keys.time is None else "two times"
        raise DataError(
            f"no group has {what} with at least {FEWEST_CELLS} cells each, found {_listed(found)}.",
            fix="check `group_key`: every group is compared with itself only.",
        )
    return pairs


def match(before: NDArray[np.float32], after: NDArray[np.float32], rng: np.random.Generator) -> Pairs:
    """Match two populations, (n, dim) and (m, dim), by optimal transport.

    Exact transport with squared distances, between the populations as wholes or between random blocks of at most 1,000
    cells (mini-batch transport, Fatras et al. 2020, arXiv:1910.04091).
    """
    ot = _transport()
    n_blocks = -(-max(len(before), len(after)) // _BLOCK)
    n_blocks = min(n_blocks, len(before), len(after))
    sources = np.array_split(rng.permutation(len(before)), n_blocks)
    targets = np.array_split(rng.permutation(len(after)), n_blocks)
    first, second, weights = [], [], []
    for i, j in zip(sources, targets, strict=True):
        cost = ot.dist(before[i].astype(np.float64), after[j].astype(np.float64))
        plan = ot.emd(ot.unif(len(i)), ot.unif(len(j)), cost, numItermax=1_000_000)
        rows, columns = np.nonzero(plan)
        first.append(i[rows])
        second.append(j[columns])
        weights.append(plan[rows, columns] * len(i) / len(before))
    weight = np.concatenate(weights)
    return Pairs(np.concatenate(first), np.concatenate(second), weight / weight.sum())


def _transport() -> ModuleType:
    """POT, whose import draws from the global random numbers of numpy, which are the user's."""
    state = np.random.get_state()  # noqa: NPY002
    import ot

    np.random.set_state(state)  # noqa: NPY002
    return cast("ModuleType", ot)


def _before(target: Population, previous: list[Population]) -> Population | None:
    """Which of the populations of the time before a population comes from."""
    for action in (target.action, Action()):
        for population in previous:
            if population.action == action:
                return population
    return previous[0] if len(previous) == 1 else None


def _texts(adata: AnnData, key: str, *, control: str | None = None) -> pd.Series[str]:
    """Column as texts; missing where it is, or where it is blank and that is not the control."""
    column = obs_column(adata, key).reset_index(drop=True)
    texts = column.astype(str)
    return texts.where(column.notna() & ((texts.str.strip() != "") | (control == "")))


def _numbers(adata: AnnData, key: str, *, of: NDArray[np.bool_], keys: Keys | None = None) -> NDArray[np.float64]:
    """Column as finite numbers for some cells; with keys, not for controls."""
    import pandas as pd

    column = obs_column(adata, key)
    values = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64)
    bad = of & ~np.isfinite(values)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        kept = f"numpy.isfinite(pandas.to_numeric(adata.obs[{key!r}].astype(object), errors='coerce'))"
        if keys is not None:
            kept = f"(adata.obs[{keys.action!r}] == {keys.control!r}) | {kept}"
        raise DataError(
            f"`obs[{key!r}]` has no finite number for {int(bad.sum())} of {len(values)} cells, such as "
            f"{as_text(column.iloc[first])!r} of {adata.obs_names[first]!r}.",
            fix=f"make `obs[{key!r}]` numbers." if bad[of].all() else f"adata = adata[{kept}].copy()",
        )
    return values


def _require_controls(keys: Keys, names: list[str], is_control: NDArray[np.bool_]) -> None:
    if is_control.all():
        raise DataError(
            f"all cells are controls: `obs[{keys.action!r}]` is {keys.control!r} everywhere.",
            fix="pass cells with an action, or another `action_key`.",
        )
    if not is_control.any() and keys.time is None:
        raise DataError(
            f"no cell is a control: `obs[{keys.action!r}]` is never {keys.control!r}, found "
            f"{', '.join(map(repr, sorted(names)[:_N_LISTED])) or 'none'}{', ...' if len(names) > _N_LISTED else ''}.",
            fix="pass the name of the control as `control`.",
        )


def _listed(found: list[Population]) -> str:
    shown = "; ".join(f"{population} ({len(population.cells)} cells)" for population in found[:_N_LISTED])
    return shown + ("; ..." if len(found) > _N_LISTED else "")
