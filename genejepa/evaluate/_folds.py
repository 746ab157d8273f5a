"""Which cells a probe is fitted on, and which cells it predicts."""

from __future__ import annotations

import warnings
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from genejepa.config import at_least
from genejepa.errors import DataError

Codes = NDArray[np.intp]
Folds = list[tuple[Codes, Codes]]
"""Positions of the training cells and of the test cells of each fold."""

_N_INNER_FOLDS: Final = 3
_MAX_GROUP_SPLITS: Final = 1000


def outer_folds(codes: Codes, groups: Codes | None, *, n_splits: int, seed: int) -> Folds:
    """Return the folds in which each cell is predicted once, after checking that they can be made."""
    at_least("n_splits", n_splits, 2)
    if groups is None:
        _check_class_sizes(codes, n_splits, option="n_splits")
    elif (n_groups := np.unique(groups).size) < n_splits:
        raise DataError(
            f"There are {n_groups} groups among the cells used, expected at least n_splits={n_splits}.",
            fix="Pass a smaller n_splits (at least 2), or a groups_key with more levels.",
        )
    folds = _split(codes, groups, n_splits=n_splits, seed=seed)
    if any(np.unique(codes[train]).size < 2 for train, _ in folds):
        raise DataError(
            "A training fold has cells of one class only, because groups and classes coincide.",
            fix="Pass another groups_key, or none.",
        )
    return folds


def inner_folds(codes: Codes, groups: Codes | None, *, seed: int) -> Folds:
    """Return up to three folds within a training fold; none if there are too few cells or groups.

    A single group cannot be split by group, so its folds are ordinary ones.
    """
    n_splits = min(_N_INNER_FOLDS, int(np.bincount(codes).max()))
    if groups is not None and np.unique(groups).size > 1:
        n_splits = min(n_splits, np.unique(groups).size)
    else:
        groups = None
    if n_splits < 2:
        return []
    folds = _split(codes, groups, n_splits=n_splits, seed=seed)
    return [(train, test) for train, test in folds if np.unique(codes[train]).size >= 2]


def draw_cells(
    codes: Codes, groups: Codes | None, *, n_per_class: int, rng: np.random.Generator
) -> tuple[Codes, Codes]:
    """Draw `n_per_class` cells of every class to fit on, and return them with the cells to predict.

    With groups, the former come from a random half of the groups, and the latter are the other half.
    """
    if groups is None:
        _check_class_sizes(codes, n_per_class + 1, option="n_per_class")
        pool, tested = np.ones((2, codes.size), dtype=bool)
    else:
        pool = _half_of_groups(codes, groups, n_per_class=n_per_class, rng=rng)
        tested = ~pool
    candidates = (np.flatnonzero(pool & (codes == code)) for code in np.unique(codes))
    train = np.sort(np.concatenate([rng.choice(c, size=n_per_class, replace=False) for c in candidates]))
    tested[train] = False
    return train, np.flatnonzero(tested)


def _split(codes: Codes, groups: Codes | None, *, n_splits: int, seed: int) -> Folds:
    """Return folds with classes in proportion, and each group within one fold."""
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    # A class that is rare within a training fold is absent from some inner folds, which is harmless.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        folds = list(kind(n_splits, shuffle=True, random_state=seed).split(codes, codes, groups))
    # Groups of very unequal size can leave a fold without any cell.
    return [(train, test) for train, test in folds if test.size > 0]


def _half_of_groups(codes: Codes, groups: Codes, *, n_per_class: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose a random half of the groups that has enough cells of every class, and leaves some to test."""
    n_classes = int(codes.max()) + 1
    levels = np.unique(groups)
    for _ in range(_MAX_GROUP_SPLITS):
        pool = np.isin(groups, rng.permutation(levels)[: levels.size // 2])
        labelled, tested = (np.bincount(codes[side], minlength=n_classes).min() for side in (pool, ~pool))
        if labelled >= n_per_class and tested >= 1:
            return pool
    raise DataError(
        f"No half of the {levels.size} groups has n_per_class={n_per_class} cells of every class and leaves "
        f"some of every class in the other half ({_MAX_GROUP_SPLITS} halves tried).",
        fix="Pass a smaller n_per_class, a larger min_class_size, or no groups_key.",
    )


def _check_class_sizes(codes: Codes, minimum: int, *, option: str) -> None:
    """Refuse a class that is too small for an option."""
    smallest = np.bincount(codes).min()
    if smallest < minimum:
        raise DataError(
            f"The smallest class has {smallest} cells, expected at least {minimum} for this `{option}`.",
            fix=f"Leave out the smallest classes (min_class_size), or pass a smaller {option}.",
        )
