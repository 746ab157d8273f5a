"""Simulated cells whose gene regulation is known, so that what actions on genes do to them is known too.

The models are those that scanpy ships for ``sc.tl.sim``: the myeloid differentiation of Krumsiek et al. 2011
(doi:10.1371/journal.pone.0022649) and a toggle switch of two genes. Boolean rules become rates by the interpolation of
Wittmann et al. 2009 (doi:10.1186/1752-0509-3-98, BooleCube with Hill functions), with scanpy's constants and time step.
Time is in units of the mean life of a gene product.

Added here: genes that are knocked out or over-expressed for a while, as ``"Pu.1 down"`` or ``"Pu.1 up"``; noise in
proportion to the state; and counts of molecules instead of states. Cells die when they are measured: cells seen at two
times are never the same ones.

A name that is unknown, a number out of its range, and what else cannot be done raise a ConfigError.
"""

from __future__ import annotations

import ast
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from genejepa.config import LARGEST_NUMPY_SEED, at_least
from genejepa.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    States = NDArray[np.float64]

__all__ = [
    "CONTROL",
    "Landscape",
    "Problem",
    "Regulation",
    "branching",
    "draw_problems",
    "explore",
    "landscape",
    "observe",
    "outcome",
    "single_fate",
]

CONTROL: Final = "none"
"""The action that changes nothing."""

_LEVEL: Final = {"up": 1.0, "down": 0.0}
"""What a gene under an action is held at: a state is between 0 and 1."""

_ACTED: Final = 10.0
"""How long an action lasts, and how long the cell is then left alone; after either almost all cells have settled."""

_NOISE: Final = 0.01
"""Noise per step, relative to the state, in cells that are simulated; a settled gene then varies by about 5 %."""

_SETTLED: Final = 40.0
"""Time after which cells near the saddle of the toggle switch have taken a side."""

_SPREAD: Final = 0.01
"""How far progenitors are from that saddle; counts do not show it."""

_SAME: Final = 0.1
"""Populations are the same if the means of all genes differ by less."""

_ON: Final = 0.8
"""Level of active genes where scanpy starts its simulations."""

_ONE_KIND: Final = 0.2
"""Cells are of one kind if no gene deviates more; where two kinds mix, some gene does by 0.3 or more."""

_PROGENITOR: Final = "progenitor"

_ACTIVE: Final = {
    "krumsiek11": {
        _PROGENITOR: "Gata2 Cebpa Pu.1",
        "erythroid": "Gata2 Gata1 Fog1 EKLF SCL Cebpa",
        "megakaryocyte": "Gata2 Gata1 Fog1 Fli1 SCL Cebpa",
        "monocyte": "Cebpa Pu.1 cJun EgrNab",
        "granulocyte": "Cebpa Pu.1 Gfi1",
        "erythroid without Cebpa": "Gata2 Gata1 Fog1 EKLF SCL",
        "megakaryocyte without Cebpa": "Gata2 Gata1 Fog1 Fli1 SCL",
        "megakaryocyte without Gata2": "Gata1 Fog1 Fli1 SCL Cebpa",
        "megakaryocyte without both": "Gata1 Fog1 Fli1 SCL",
        "monocyte without Cebpa": "Pu.1 cJun EgrNab",
        "all off": "",
    },
    "toggleswitch": {_PROGENITOR: "0 1", "0 high": "0", "1 high": "1"},
}
"""Genes that are active in the progenitors of scanpy, which do not stay as they are, and in the states that do."""

_GENES_STREAM: Final = 11
"""Keeps the random numbers of the target genes apart from those of cells."""


class _Rule(NamedTuple):
    """How a gene depends on others: their indices, half-saturations squared, and truth table, (2, 2, ...)."""

    parents: tuple[int, ...]
    squared_thresholds: tuple[float, ...]
    table: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Regulation:
    """Genes that regulate each other.

    Attributes
    ----------
    name
        ``"krumsiek11"`` or ``"toggleswitch"``.
    genes
        Names of the regulators; states have one column for each.
    time_step
        Length of a step of the integration.
    """

    name: str
    genes: tuple[str, ...]
    time_step: float
    _rules: tuple[_Rule, ...]

    @classmethod
    def of(cls, name: str) -> Regulation:
        """Read a model from the files of scanpy."""
        from importlib.resources import files

        _check_known("model", name, list(_ACTIVE))
        text = (files("scanpy") / "sim_models" / f"{name}.txt").read_text(encoding="utf-8")
        head, _, tail = text.partition("# coupling list:")
        lines = [line.split("=") for line in head.splitlines() if line and not line.startswith("#")]
        rules = {gene.strip(): rule for gene, rule in lines}
        couplings = {(child, parent): float(value) for child, parent, value in map(str.split, tail.split("\n")[1:-1])}
        time_step = float(head.partition("invTimeStep =")[2].split()[0])
        genes = tuple(rules)
        return cls(name, genes, time_step, tuple(_rule(gene, rules[gene], genes, couplings) for gene in genes))

    @property
    def actions(self) -> list[str]:
        """All actions: the control, and every gene up and down."""
        return [CONTROL, *(f"{gene} {way}" for gene in self.genes for way in _LEVEL)]

    @property
    def starts(self) -> list[str]:
        """Names of the populations to start from: ``"progenitor"``, and all that stay as they are."""
        return list(_ACTIVE[self.name])

    def start(self, name: str, n_cells: int, *, rng: np.random.Generator) -> States:
        """Draw a population, (n_cells, n_regulators), by its name."""
        _check_known("start", name, self.starts)
        active = _ACTIVE[self.name][name].split()
        level = np.array([_ON if gene in active else 0.0 for gene in self.genes])
        spread = _NOISE / np.sqrt(2 * self.time_step)
        states: States = level * rng.lognormal(0.0, spread, (n_cells, len(level)))
        return states if name == _PROGENITOR else self.advance(states, CONTROL, _ACTED, rng=rng, noise=_NOISE)

    def act(self, states: States, action: str | Sequence[str], *, rng: np.random.Generator) -> States:
        """Act on cells, then leave them alone until they have settled; arguments as in `advance`."""
        acted = self.advance(states, action, _ACTED, rng=rng, noise=_NOISE)
        return self.advance(acted, CONTROL, _ACTED, rng=rng, noise=_NOISE)

    def advance(
        self,
        states: States,
        action: str | Sequence[str],
        duration: float,
        *,
        rng: np.random.Generator | None = None,
        noise: float = 0.0,
    ) -> States:
        """Follow cells for a while; genes under an action are held at 0 or 1 all the time.

        Parameters
        ----------
        states : (n_cells, n_regulators)
            Where the cells are; not changed.
        action
            One for all cells, or one for each: ``"none"``, a gene and ``" up"``, or a gene and ``" down"``.
        duration
            How long, rounded to whole steps.
        rng, noise
            In each step a state is multiplied by one plus a normal number of this deviation. Without ``rng`` there is
            no noise, and the steps are those of scanpy. What is off stays off until something turns it on.

        Returns
        -------
        numpy.ndarray : (n_cells, n_regulators)
        """
        held = self._held([action] * len(states) if isinstance(action, str) else action, len(states))
        free = np.isnan(held)
        cells = np.where(free, states.T, held)
        for _ in range(round(duration / self.time_step)):
            cells += self.time_step * (self._production(cells) - cells)
            if rng is not None:
                cells *= 1 + noise * rng.standard_normal(cells.shape)
            cells = np.where(free, cells, held)
        return cells.T.copy()

    def _production(self, cells: States) -> States:
        """Rates of production, (n_regulators, n_cells): truth tables, interpolated between their corners."""
        squared = cells**2
        rates = np.empty_like(cells)
        for gene, rule in enumerate(self._rules):
            rate = rule.table[..., None]
            for parent, threshold in zip(rule.parents, rule.squared_thresholds, strict=True):
                rate = rate[0] + (rate[1] - rate[0]) * (squared[parent] / (squared[parent] + threshold))
            rates[gene] = rate
        return rates

    def _held(self, actions: Sequence[str], n_cells: int) -> States:
        """Levels at which genes are held, (n_regulators, n_cells); NaN where they are free."""
        if len(actions) != n_cells:
            raise ConfigError(
                f"there are {len(actions)} actions for {n_cells} cells, expected one for all or one for each.",
                fix=f"pass one action, such as {CONTROL!r}, or as many as there are cells.",
            )
        names, of_cell = np.unique(np.asarray(actions, dtype=str), return_inverse=True)
        levels = np.full((len(self.genes), len(names)), np.nan)
        for column, action in enumerate(names.tolist()):
            _check_known("action", action, self.actions)
            gene, _, way = action.rpartition(" ")
            if action != CONTROL:
                levels[self.genes.index(gene), column] = _LEVEL[way]
        return levels[:, of_cell]


def _rule(gene: str, rule: str, genes: tuple[str, ...], couplings: dict[tuple[str, str], float]) -> _Rule:
    """Read a Boolean rule; names such as ``Pu.1`` or ``0`` are none of Python's, and are replaced."""
    words = re.findall(r"[()]|[^\s()]+", rule)
    parents = [name for name in dict.fromkeys(words) if name in genes]
    tree = ast.parse(" ".join(f"x{parents.index(w)}" if w in parents else w for w in words), mode="eval").body
    corners = itertools.product([False, True], repeat=len(parents))
    table = np.array([_holds(tree, corner) for corner in corners], dtype=np.float64).reshape((2,) * len(parents))
    # 0.1 is the half-saturation that scanpy gives to a coupling of 1
    thresholds = tuple((0.1 / couplings[gene, parent]) ** 2 for parent in parents)
    return _Rule(tuple(genes.index(parent) for parent in parents), thresholds, table)


def _holds(tree: ast.expr, corner: tuple[bool, ...]) -> bool:
    """Whether an expression of ``and``, ``or`` and ``not`` holds for given values of x0, x1, ..."""
    if isinstance(tree, ast.BoolOp):
        return (all if isinstance(tree.op, ast.And) else any)(_holds(part, corner) for part in tree.values)
    if isinstance(tree, ast.UnaryOp):
        return not _holds(tree.operand, corner)
    return corner[int(ast.unparse(tree)[1:])]


def observe(model: Regulation, states: States, *, n_genes: int = 240, rng: np.random.Generator) -> AnnData:
    """Sequence cells: Poisson counts of the regulators and of further genes that these regulate.

    The log rate of a further gene is a sum over three random regulators, the same for all calls with the same model and
    number of genes. Cells have about 3,000 molecules, with a log-normal spread.

    Parameters
    ----------
    states : (n_cells, n_regulators)
    n_genes
        Number of all genes, more than there are regulators.

    Returns
    -------
    anndata.AnnData
        ``X`` : (n_cells, n_genes)
            Counts as CSR float32.
        ``obsm["regulators"]`` : (n_cells, n_regulators)
            The states.
    """
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    n_targets = n_genes - len(model.genes)
    if n_targets < 1:
        raise ConfigError(
            f"`n_genes` is {n_genes}, and {model.name} has {len(model.genes)} regulators; expected more.",
            fix=f"pass n_genes={len(model.genes) + 200}.",
        )
    genes = np.random.default_rng([_GENES_STREAM, len(model.genes), n_genes])
    weights = genes.normal(0.0, 1.2, (len(model.genes), n_targets))
    ranks = genes.random(weights.shape).argsort(axis=0)
    targets = np.exp(states @ np.where(ranks < 3, weights, 0.0) + genes.normal(0.0, 1.0, n_targets))
    # a gene that is off is still seen now and then
    rates = np.hstack([0.02 + states, targets])
    rates *= rng.lognormal(np.log(3000), 0.3, (len(states), 1)) / rates.sum(1, keepdims=True)
    adata = AnnData(csr_matrix(rng.poisson(rates), dtype=np.float32), obsm={"regulators": states})
    adata.obs_names = [f"cell{number}" for number in range(len(states))]
    adata.var_names = [*model.genes, *(f"target{number}" for number in range(n_targets))]
    return adata


def explore(
    model: Regulation,
    starts: Sequence[str],
    actions: Sequence[str],
    *,
    n_steps: int = 3,
    n_trajectories: int = 60,
    n_cells: int = 30,
    n_genes: int = 240,
    seed: int = 0,
) -> AnnData:
    """Simulate random sequences of actions; at every time other cells of the same trajectory are measured.

    Parameters
    ----------
    starts
        Names of the populations that the trajectories start from, in turn.
    actions
        What may be done in a step; drawn with equal probabilities.
    n_steps, n_trajectories, n_cells
        Actions in a trajectory, number of trajectories, and cells of a trajectory at a time.

    Returns
    -------
    anndata.AnnData
        As from `observe`, and ``obs["trajectory"]``, ``obs["start"]``, ``obs["time"]`` (0 to `n_steps`) and
        ``obs["action"]``, the one that led to this time; that of time 0 is the control.
    """
    for name, number in {"n_steps": n_steps, "n_trajectories": n_trajectories, "n_cells": n_cells}.items():
        at_least(name, number, 1)
    rng = _generator(seed)
    _check_some(starts=starts, actions=actions)
    sequences = rng.choice(np.asarray(actions, dtype=str), (n_trajectories, n_steps))
    from_start = np.arange(n_trajectories) % len(starts)
    trajectory = np.repeat(np.arange(n_trajectories), (n_steps + 1) * n_cells)
    time = np.tile(np.repeat(np.arange(n_steps + 1), n_cells), n_trajectories)
    states = np.empty((len(time), len(model.genes)))
    for number, name in enumerate(starts):
        here = from_start[trajectory] == number
        states[here] = model.start(name, int(here.sum()), rng=rng)
    for step in range(n_steps):
        later = time > step
        states[later] = model.act(states[later], sequences[trajectory[later], step].tolist(), rng=rng)
    adata = observe(model, states, n_genes=n_genes, rng=rng)
    adata.obs["trajectory"] = trajectory.astype(str)
    adata.obs["start"] = np.asarray(starts, dtype=str)[from_start[trajectory]]
    adata.obs["time"] = time
    adata.obs["action"] = np.where(time > 0, sequences[trajectory, time - 1], CONTROL)
    for key in ("trajectory", "start", "action"):
        adata.obs[key] = adata.obs[key].astype("category")
    return adata


def outcome(model: Regulation, start: str, sequence: Sequence[str], *, n_cells: int = 100, seed: int = 0) -> States:
    """Where cells are, (n_cells, n_regulators), after one action after the other, each as long as in `explore`."""
    rng = _generator(seed)
    states = model.start(start, n_cells, rng=rng)
    for action in sequence:
        states = model.act(states, action, rng=rng)
    return states


@dataclass(frozen=True, eq=False)
class Landscape:
    """Populations within reach, and which action leads from which to which.

    Attributes
    ----------
    starts
        Number of the population of every start.
    actions, horizon
        What may be done in a step, and how many steps may be taken.
    populations
        States of cells, each (n_cells, n_regulators).
    moves
        For every population less than `horizon` steps away, the numbers of the populations that the actions lead to.
    """

    starts: dict[str, int]
    actions: tuple[str, ...]
    horizon: int
    populations: list[States]
    moves: dict[int, list[int]]

    def shortest(self, start: str, goal: int) -> list[tuple[str, ...]]:
        """All shortest sequences of actions from a start to a population, empty if that takes more than the horizon."""
        _check_known("start", start, list(self.starts))
        paths: dict[int, list[tuple[str, ...]]] = {self.starts[start]: [()]}
        seen = set(paths)
        for _ in range(self.horizon):
            if goal in paths:
                break
            further: dict[int, list[tuple[str, ...]]] = {}
            for number, sequences in paths.items():
                for action, to in zip(self.actions, self.moves[number], strict=True):
                    if to not in seen:
                        further.setdefault(to, []).extend((*sequence, action) for sequence in sequences)
            seen.update(further)
            paths = further
        return paths.get(goal, [])


def landscape(
    model: Regulation,
    starts: Sequence[str],
    actions: Sequence[str],
    *,
    horizon: int = 3,
    n_cells: int = 64,
    seed: int = 0,
) -> Landscape:
    """Try all sequences of actions up to a length; populations that are the same are gone on with once."""
    at_least("horizon", horizon, 1)
    at_least("n_cells", n_cells, 1)
    rng = _generator(seed)
    _check_some(starts=starts, actions=actions)
    found = Landscape({}, tuple(actions), horizon, [], {})
    for name in starts:
        found.starts[name] = _number(found.populations, model.start(name, n_cells, rng=rng))
    for _ in range(horizon):
        new = [number for number in range(len(found.populations)) if number not in found.moves]
        if not new:
            break
        cells = np.concatenate([np.tile(found.populations[number], (len(actions), 1)) for number in new])
        done = np.tile(np.repeat(np.asarray(actions, dtype=str), n_cells), len(new))
        after = model.act(cells, done.tolist(), rng=rng).reshape(len(new), len(actions), n_cells, -1)
        for number, populations in zip(new, after, strict=True):
            found.moves[number] = [_number(found.populations, states) for states in populations]
    return found


def _number(populations: list[States], states: States) -> int:
    """Number of a population in the list; it is added if there is none like it."""
    for number, known in enumerate(populations):
        if np.abs(states.mean(0) - known.mean(0)).max() < _SAME:
            return number
    populations.append(states)
    return len(populations) - 1


class Problem(NamedTuple):
    """Where to start, the cells to get to, (n_cells, n_regulators), and all shortest sequences of actions that do."""

    start: str
    goal: States
    sequences: list[tuple[str, ...]]


def draw_problems(known: Landscape, n_problems: int, *, seed: int = 0) -> list[Problem]:
    """Draw different starts and goals, at least half of which are two or more actions apart.

    Goals are populations of one kind of cell: of a mixture it would be unclear how alike its shares have to be.
    """
    rng = _generator(seed)
    problems = [
        Problem(start, goal, sequences)
        for start in known.starts
        for number, goal in enumerate(known.populations)
        if goal.std(0).max() < _ONE_KIND and (sequences := known.shortest(start, number)) and sequences[0]
    ]
    near, far = ([p for p in problems if (len(p.sequences[0]) > 1) is distant] for distant in (False, True))
    n_near = min(n_problems // 2, len(near))
    if n_problems < 1 or n_problems - n_near > len(far):
        raise ConfigError(
            f"`n_problems` is {n_problems}; there are {len(near)} goals one action away and {len(far)} further off.",
            fix="ask for fewer, or call `landscape` with more starts, actions or steps.",
        )
    drawn = [near[i] for i in rng.choice(len(near), n_near, replace=False)]
    drawn += [far[i] for i in rng.choice(len(far), n_problems - n_near, replace=False)]
    return drawn


def branching(n_cells: int = 600, fractions: tuple[float, float] = (0.3, 0.7), *, seed: int = 0) -> AnnData:
    """Simulate progenitors that stand between the two fates of the toggle switch, and the fates of cells like them.

    Parameters
    ----------
    n_cells
        Number of progenitors, and of descendants.
    fractions
        Expected shares of the descendants with gene 0 and with gene 1 on.

    Returns
    -------
    anndata.AnnData
        As from `observe`, and ``obs["time"]``, 0 or 1, and ``obs["branch"]``, ``"0 high"``, ``"1 high"``, or ``""`` for
        progenitors.
    """
    if len(fractions) != 2 or min(fractions) <= 0 or not np.isclose(sum(fractions), 1):
        raise ConfigError(
            f"`fractions` are {fractions}, expected two positive numbers with the sum 1.", fix="pass (0.3, 0.7)."
        )
    return _split(n_cells, fractions[0], CONTROL, seed)


def single_fate(n_cells: int = 600, *, seed: int = 0) -> AnnData:
    """Simulate the cells of `branching` with gene 1 knocked out, which makes all descendants ``"0 high"``."""
    return _split(n_cells, 0.5, "1 down", seed)


def _split(n_cells: int, fraction: float, action: str, seed: int) -> AnnData:
    """Progenitors at the saddle, a given fraction of them on the side of gene 0, and the same after an action."""
    from scipy.stats import norm

    at_least("n_cells", n_cells, 1)
    rng = _generator(seed)
    model = Regulation.of("toggleswitch")
    saddle = model.advance(np.full((1, 2), _ON), CONTROL, _SETTLED)
    lead = _SPREAD * (norm.ppf(fraction) + rng.standard_normal((2 * n_cells, 1)))
    states = saddle + lead * [1.0, -1.0]
    # without noise until the sides are taken, or the fractions would draw nearer to one half
    states[n_cells:] = model.advance(states[n_cells:], action, _SETTLED)
    states[n_cells:] = model.advance(states[n_cells:], CONTROL, _ACTED, rng=rng, noise=_NOISE)
    adata = observe(model, states, rng=rng)
    adata.obs["time"] = np.repeat([0, 1], n_cells)
    branch = np.where(states[:, 0] > states[:, 1], "0 high", "1 high")
    adata.obs["branch"] = np.where(adata.obs["time"] == 0, "", branch)
    adata.obs["branch"] = adata.obs["branch"].astype("category")
    return adata


def _check_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ConfigError(f"{what} {name!r} is unknown.", fix=f"pass one of {', '.join(map(repr, known))}.")


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(at_least("seed", seed, 0, high=LARGEST_NUMPY_SEED))


def _check_some(**names: Sequence[str]) -> None:
    for name, values in names.items():
        if isinstance(values, str) or not len(values):
            raise ConfigError(f"`{name}` is {values!r}, expected a list with at least one name.", fix="pass a list.")
