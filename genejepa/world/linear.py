"""The linear start of every prediction: ridge regression of changes on actions and on the state before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_MOST_FEATURES = 2048
_TINY = 1e-6


@dataclass(frozen=True, eq=False)
class Features:
    """What a change is regressed on: ``duration * [a, (a S) x (z - centre)]``.

    Without an action, or without time, nothing changes. Every action has an effect of its own, and one that depends on
    the state; with very many actions the latter is shared (``S`` is a column of ones).

    Attributes
    ----------
    centre : (dim,)
        Mean state before.
    variance
        Mean variance of the states before.
    shared : (n_actions, n_shared)
        ``S``.
    """

    centre: NDArray[np.float64]
    variance: float
    shared: NDArray[np.float64]

    @classmethod
    def of(cls, states: NDArray[np.float32], *, n_actions: int) -> Features:
        """For states before, (n, dim)."""
        own = n_actions * (1 + states.shape[1]) <= _MOST_FEATURES
        shared = np.eye(n_actions) if own else np.ones((n_actions, 1))
        return cls(states.mean(0, dtype=np.float64), float(states.var(0, dtype=np.float64).mean()) or 1.0, shared)

    def __call__(
        self, states: NDArray[np.floating], action: NDArray[np.float64], duration: float
    ) -> NDArray[np.float64]:
        """Features, (n, n_features), of states (n, dim) under one action (n_actions,)."""
        own = np.broadcast_to(action, (len(states), len(action)))
        by_state = np.einsum("r,nd->nrd", action @ self.shared, states - self.centre)
        return duration * np.concatenate([own, by_state.reshape(len(states), -1)], axis=1)

    def penalty(
        self, actions: NDArray[np.float64], durations: NDArray[np.float64], *, strength: float
    ) -> NDArray[np.float64]:
        """Diagonal, (n_features,), of the penalty: of effects that depend on the state, in units of their variance.

        Parameters
        ----------
        actions : (n_transitions, n_actions)
        durations : (n_transitions,)
        """
        square = ((actions @ self.shared * durations[:, None]) ** 2).mean(0)
        by_state = np.repeat(strength * square * self.variance, len(self.centre)) + _TINY
        return np.concatenate([np.full(actions.shape[1], _TINY), by_state])


@dataclass(frozen=True, eq=False)
class Sample:
    """Pairs of cells of one transition.

    Attributes
    ----------
    features : (n, n_features)
    targets : (n, n_targets)
    weight : (n,)
        Sums to 1.
    """

    features: NDArray[np.float64]
    targets: NDArray[np.floating]
    weight: NDArray[np.float64]


def ridge(samples: Iterable[Sample], penalty: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients, (n_features, n_targets), of a ridge regression over transitions, all of the same weight.

    Parameters
    ----------
    samples
        One for each transition; read once and not kept.
    penalty : (n_features,)
        Diagonal of the penalty, from :meth:`Features.penalty`.
    """
    n: int = 0
    gram: Any = 0.0
    cross: Any = 0.0
    for sample in samples:
        weighted = sample.features * sample.weight[:, None]
        gram = gram + weighted.T @ sample.features
        cross = cross + weighted.T @ sample.targets
        n += 1
    solved: NDArray[np.float64] = np.linalg.solve(gram / n + np.diag(penalty), cross / n)
    return solved


def folds_of(groups: Sequence[str], *, most: int) -> list[int]:
    """Fold of each transition: those of one group are in one fold."""
    names = sorted(set(groups))
    return [names.index(group) % most for group in groups]
