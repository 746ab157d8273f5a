"""Actions as vectors: what was done to cells, in which dose, and for how long."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from genejepa.data.slots import SEPARATOR, missing_key, parts_of
from genejepa.errors import ConfigError, ExtrapolationWarning, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

_GENE_RIDGE = 1.0
"""Ridge on gene identity vectors, in units of their mean square."""


@dataclass(frozen=True, order=True)
class Action:
    """What is done to cells from one state to the next.

    Attributes
    ----------
    parts
        Different names, sorted; none for the control.
    dose
        Of every part, in the unit of the data; None if there are no doses.
    """

    parts: tuple[str, ...] = ()
    dose: float | None = None

    @classmethod
    def parse(cls, name: str, *, control: str | None, dose: float | None = None) -> Action:
        """From a name such as ``"stim"``, ``"KLF1+GATA1"`` or, with its control, ``"KLF1+ctrl"``.

        A name such as ``"CD3+"``, of which a part would be empty, is that of a single action.
        """
        named = parts_of(name, control)
        return cls(named, dose if named else None)

    def __str__(self) -> str:
        name = SEPARATOR.join(self.parts) or "control"
        return name if self.dose is None else f"{name} ({self.dose:g})"


@dataclass(frozen=True, eq=False)
class ActionSpace:
    """Vectors of actions: one coordinate for each known name, and one for the passing of time.

    Attributes
    ----------
    names : (n_names,)
        Known names.
    largest_dose : (n_names,)
        Largest dose that was seen of each; 1 without doses.
    has_doses
        Whether actions have doses.
    has_time
        Whether the first coordinate is time that passes, which is 1 for every action, also for the control.
    seen : frozenset
        Combinations and single actions that there were cells of.
    gene_vectors : dict
        Identity vector, (d,), of every gene of the model, for actions that are named after genes.
    """

    names: tuple[str, ...]
    largest_dose: NDArray[np.float64]
    has_doses: bool
    has_time: bool
    seen: frozenset[tuple[str, ...]]
    gene_vectors: dict[str, NDArray[np.float64]]

    @classmethod
    def of(
        cls, actions: Iterable[Action], *, has_time: bool, gene_vectors: dict[str, NDArray[np.float64]]
    ) -> ActionSpace:
        """Space of the actions that occur."""
        known = sorted(set(actions))
        names = tuple(sorted({part for action in known for part in action.parts}))
        has_doses = any(action.dose is not None for action in known)
        largest = [
            max((action.dose for action in known if name in action.parts and action.dose is not None), default=1.0)
            for name in names
        ]
        seen = frozenset(action.parts for action in known)
        return cls(names, np.array(largest, dtype=np.float64), has_doses, has_time, seen, gene_vectors)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return len(self.names) + self.has_time

    def encode(self, action: Action) -> NDArray[np.float64]:
        """Vector of an action, (dim,): the sum of the vectors of its parts, each times the level of its dose.

        The level is ``log(1 + dose) / log(1 + largest dose seen)``: nothing at dose 0 and 1 at the largest dose. A
        name that is unknown but is a gene of the model, where all known names are such genes, too, gets the weights
        by which ridge regression on gene identity vectors would predict its effect from the known effects.

        Raises
        ------
        MissingKeyError
            If a name is unknown and cannot be told from its gene.
        ConfigError
            If the dose is missing, not finite or negative, or given although there are none.

        Warns
        -----
        ExtrapolationWarning
            If the action is unknown or was seen in combinations only, the combination was not seen, or the dose is
            above the largest seen.
        """
        self._check_dose(action)
        vector = np.zeros(self.dim)
        vector[: self.has_time] = 1.0
        for part in action.parts:
            weights = self._weights(part)
            if action.dose is not None:
                largest = float(self.largest_dose[weights != 0].max())
                if action.dose > largest:
                    _warn(f"dose {action.dose:g} of {part!r} is above the largest one seen, {largest:g}")
                weights *= math.log1p(action.dose) / np.log1p(np.where(self.largest_dose > 0, self.largest_dose, 1.0))
            vector[self.has_time :] += weights
        unseen_parts = any(part not in self.names for part in action.parts)
        if action.parts and action.parts not in self.seen and not unseen_parts:
            if len(action.parts) > 1:
                _warn(f"the combination {str(action)!r} was not seen; the effects of its parts are added")
            else:
                _warn(f"{str(action)!r} was seen in combinations only; its share of their effects is not known")
        return vector

    def _check_dose(self, action: Action) -> None:
        dose = action.dose
        if not action.parts:
            return
        if dose is not None and not (is_finite_number(dose) and dose >= 0):
            raise ConfigError(f"`dose` is {dose!r}, expected a finite number of at least 0.", fix="pass such a dose.")
        if (dose is None) == self.has_doses:
            found, fix = ("no dose", "pass `dose`.") if dose is None else (f"dose {dose!r}", "leave `dose` out.")
            expected = "one" if self.has_doses else "none, because there was no `dose_key`"
            raise ConfigError(f"{found} is given for {str(action)!r}, expected {expected}.", fix=fix)

    def _weights(self, part: str) -> NDArray[np.float64]:
        """Weights of the known names, (n_names,), that stand for one name."""
        if not self.names:
            raise MissingKeyError(
                f"`action` is {part!r}, and no action is known, because there was no `action_key`.",
                fix="leave `action` out.",
            )
        if part in self.names:
            return np.array([float(name == part) for name in self.names])
        genes = [self.gene_vectors.get(name) for name in self.names]
        own = self.gene_vectors.get(part)
        known = [vector for vector in genes if vector is not None]
        if own is None or len(known) < len(genes) or len(known) < 2:
            raise missing_key("actions", part, self.names)
        _warn(
            f"{part!r} was never perturbed; its effect is a mixture of those of {len(known)} other genes, weighted by "
            "gene identity vectors, which for unseen genes seldom beats the mean effect"
        )
        return mixture_weights(np.stack(known), own, ridge=_GENE_RIDGE)


def is_finite_number(value: object) -> bool:
    """Whether a value is a finite real number, and no bool."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def mixture_weights(known: NDArray[np.float64], new: NDArray[np.float64], *, ridge: float) -> NDArray[np.float64]:
    """Weights, (n,), summing to 1, by which ridge regression on vectors predicts the target of a new vector.

    The prediction of a linear model with intercept is a weighted sum of the known targets; with infinite ridge all
    weights are equal.

    Parameters
    ----------
    known : (n, d)
    new : (d,)
    ridge
        In units of the mean squared length of the centred vectors.
    """
    centre = known.mean(0)
    gram = (known - centre) @ (known - centre).T
    scale = float(np.trace(gram)) / len(known)
    if scale == 0:
        return np.full(len(known), 1.0 / len(known))
    solved: NDArray[np.float64] = np.linalg.solve(
        gram + ridge * scale * np.eye(len(known)), (known - centre) @ (new - centre)
    )
    weights: NDArray[np.float64] = 1.0 / len(known) + solved - solved.mean()
    return weights


def _warn(what: str) -> None:
    warnings.warn(f"Extrapolation: {what}.", ExtrapolationWarning, stacklevel=5)
