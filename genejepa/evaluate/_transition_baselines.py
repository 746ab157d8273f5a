"""Simple predictions of a changed population: the cells of a source population, all moved by the same shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Vector: TypeAlias = NDArray[np.float64]
"""One value per gene, (n_genes,)."""

Parts: TypeAlias = tuple[str, ...]
"""Sorted parts of an action: two or more of a combination, none of the control."""

_N_FEATURES = 10
"""Leading principal components that the linear baseline uses (Ahlmann-Eltze et al. 2025, Methods)."""

_RIDGE = 0.1
"""Penalty of the linear baseline (same source)."""


class Guess(NamedTuple):
    """Predicted cells: those of a population, (n_cells, n_genes), plus a shift, (n_genes,)."""

    cells: NDArray[np.float64]
    shift: Vector


class Problem(NamedTuple):
    """What a prediction is compared with, apart from the observed cells.

    Attributes
    ----------
    source : (n_source, n_genes)
        Cells that a change is measured from.
    guesses
        Baselines by name; None for one that the training cells do not allow.
    others
        Changes from the source to the other populations, of which the right one is to be told.
    reference : (n_genes,)
        Mean change of the training populations; None if there is no such population.
    """

    source: NDArray[np.float64]
    guesses: dict[str, Guess | None]
    others: list[Vector]
    reference: Vector | None


@dataclass(frozen=True, eq=False)
class Changes:
    """Mean changes by actions that the training cells show.

    Attributes
    ----------
    controls
        Mean of the control cells, (n_genes,), of every group.
    changes
        Mean of the cells of an action less that of the control cells of the group, by group and action.
    genes
        Names of the genes.
    """

    controls: dict[str, Vector]
    changes: dict[tuple[str, Parts], Vector]
    genes: Sequence[str]

    @property
    def actions(self) -> list[Parts]:
        """Actions with a known change."""
        return sorted({action for _, action in self.changes})

    def over_groups(self, action: Parts) -> dict[str, Vector]:
        """Changes by an action in the groups that had it."""
        return {group: change for (group, found), change in self.changes.items() if found == action}

    def of(self, group: str, action: Parts) -> Vector | None:
        """Change by an action in a group, else its mean over groups that had it, else None."""
        known = self.over_groups(action)
        return known.get(group, _mean(known.values()))

    def mean_shift(self, action: Parts) -> Vector | None:
        """Mean over groups of the change by an action; for an action that no group had, the mean of all changes."""
        known = self.over_groups(action) or self.changes
        return _mean(known.values())

    def additive(self, group: str, action: Parts) -> Vector | None:
        """Sum of the changes by the parts of a combination; None for other actions, and if a part is not known."""
        parts = [self.of(group, (part,)) for part in action]
        known = [part for part in parts if part is not None]
        return np.sum(known, axis=0) if len(action) > 1 and len(known) == len(action) else None

    def nearest(self, group: str, action: Parts, project: Callable[[Vector], Vector]) -> Vector | None:
        """Change in the group, of those that had the action, whose control mean is nearest once projected."""
        here = project(self.controls[group])
        known = self.over_groups(action)
        return min(
            known.items(),
            key=lambda item: float(np.linalg.norm(project(self.controls[item[0]]) - here)),
            default=("", None),
        )[1]

    def linear(self, group: str, action: Parts, project: Callable[[Vector], Vector]) -> Vector | None:
        """Change predicted by a ridge regression on the control mean of the group and on the action.

        One row per group and action of the training cells. The responses are the changes of all genes. The features
        are the 10 leading principal components of the control mean, and the action: how often each known part is
        in it or, if it has an unknown part, the sum over its parts of the embedding of the gene of that name. None if
        a part is neither known nor a gene.
        """
        from sklearn.linear_model import Ridge

        known = self.changes
        parts = sorted({part for found in self.actions for part in found})
        if set(action) <= set(parts):
            codes = dict(zip(parts, np.eye(len(parts)), strict=True))
        elif set(action) <= set(self.genes):
            known = {key: change for key, change in known.items() if set(key[1]) <= set(self.genes)}
            codes = self._gene_embedding()
        else:
            return None
        if not known:
            return None

        def features(group: str, action: Parts) -> Vector:
            state = project(self.controls[group])[:_N_FEATURES]
            return np.concatenate([state, np.sum([codes[part] for part in action], axis=0)])

        model = Ridge(alpha=_RIDGE).fit([features(*key) for key in known], np.stack(list(known.values())))
        predicted: Vector = model.predict(features(group, action)[None])[0]
        return predicted

    def _gene_embedding(self) -> dict[str, Vector]:
        """Scores of the genes in a principal component analysis of the means of all populations, genes as rows."""
        from sklearn.decomposition import PCA

        means = list(self.controls.values())
        means += [self.controls[group] + change for (group, _), change in self.changes.items()]
        table = np.stack(means, axis=1)
        scores = PCA(min(_N_FEATURES, *table.shape), svd_solver="full").fit_transform(table)
        return dict(zip(self.genes, scores, strict=True))


def action_problem(
    changes: Changes, source: NDArray[np.float64], group: str, action: Parts, project: Callable[[Vector], Vector]
) -> Problem:
    """Baselines for one action in one group; ``project`` takes a mean to principal components."""
    shifts: dict[str, Vector | None] = {
        "no change": np.zeros(source.shape[1]),
        "mean shift": changes.mean_shift(action),
        "additive": changes.additive(group, action),
        "linear": changes.linear(group, action, project),
        "nearest": changes.nearest(group, action, project),
    }
    others = [changes.of(group, other) for other in changes.actions if other != action]
    return Problem(
        source,
        {name: None if shift is None else Guess(source, shift) for name, shift in shifts.items()},
        [other for other in others if other is not None],
        _mean(changes.changes.values()),
    )


def time_problem(cells_at: Callable[[float], NDArray[np.float64]], times: Sequence[float], time: float) -> Problem:
    """Baselines for one time, from the cells of other times, which are sorted and at least one."""
    before = [other for other in reversed(times) if other < time]
    after = [other for other in times if other > time]
    means = {other: cells_at(other).mean(0) for other in times}
    nearest = min(times, key=lambda other: abs(other - time))  # the first, hence the earlier, of equally near ones
    source = cells_at(nearest)

    def moved(start: list[float], beyond: list[float]) -> Guess | None:
        """The nearest cells of one side, moved along the line through the other side or, without one, the next time."""
        ends = [*beyond[:1], *start[1:2]]
        if not start or not ends:
            return None
        here, there = start[0], ends[0]
        shift = (means[there] - means[here]) * (time - here) / (there - here)
        return Guess(cells_at(here), shift)

    def copied(other: list[float]) -> Guess | None:
        return Guess(cells_at(other[0]), np.zeros(source.shape[1])) if other else None

    changes = [mean - means[nearest] for mean in means.values()]
    return Problem(
        source,
        {
            "no change": copied([nearest]),
            "copy previous": copied(before),
            "copy next": copied(after),
            "linear": moved(before, after),
            "linear, backward": moved(after, before),
        },
        changes,
        _mean(changes),
    )


def _mean(vectors: Any) -> Vector | None:
    """Mean of vectors, None of none."""
    found = list(vectors)
    return np.mean(found, axis=0) if found else None
