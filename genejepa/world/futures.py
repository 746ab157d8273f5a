"""Which futures there are: separate places where cells from one place end."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genejepa.world.training import Example
    from genejepa.world.transitions import Pairs

_N_COMPONENTS = 8
_CELLS_PER_COMPONENT = 10
_CLEAR = 4.0
"""Ashman's D above which two modes are apart: the halves of a normal distribution have 2.6, of a uniform one 3.5."""

SMALLEST_SHARE = 0.1
"""Share of the cells from one place that go somewhere, below which that is no future."""

_N_DEVIATIONS = 2.0
"""A future has more cells than the numbers of cells in a mode differ by chance, by so many standard deviations."""

_NEVER = 1e-3
"""Added to the share of every future, so that the log probability of one that does not occur is finite."""


@dataclass(frozen=True, eq=False)
class FutureShares:
    """How often each future occurs after an action.

    Attributes
    ----------
    of_known : dict
        By the parts of an action, shares, (n_codes,), that sum to 1.
    """

    of_known: dict[tuple[str, ...], NDArray[np.float64]]

    @classmethod
    def of_examples(cls, examples: Sequence[Example]) -> FutureShares:
        """Median over the transitions by an action: what a minority does is not to be expected of another group."""
        each: dict[tuple[str, ...], list[NDArray[np.float64]]] = {}
        for example in examples:
            occurred = np.bincount(example.future.numpy(), example.weight, example.chance.shape[1])
            each.setdefault(example.parts, []).append(occurred.astype(np.float64))
        found = {}
        for parts, own in each.items():
            middle = np.median(own, axis=0)
            shares = middle if middle.any() else np.mean(own, axis=0)
            found[parts] = shares / shares.sum()
        return cls(found)

    @property
    def n_codes(self) -> int:
        """Number of futures."""
        return len(next(iter(self.of_known.values())))

    def of(self, parts: tuple[str, ...]) -> NDArray[np.float64]:
        """Shares, (n_codes,), after an action.

        After a combination that was not seen: the product of the shares after those of its parts that have several
        futures; the first future if none has. After an unknown action: the first future.
        """
        if parts in self.of_known:
            return self.of_known[parts]
        known = [self.of_known[(part,)] for part in parts if (part,) in self.of_known]
        several = [shares for shares in known if shares.max() < 1]
        product = np.prod(several, axis=0) if several else np.zeros(self.n_codes)
        if product.sum() == 0:
            product = np.eye(self.n_codes)[0]
        shares: NDArray[np.float64] = product / product.sum()
        return shares

    def logits(self, parts: tuple[str, ...]) -> NDArray[np.float32]:
        """Log of the shares, (n_codes,), all finite."""
        shares = _NEVER + self.of(parts)
        logits: NDArray[np.float32] = np.log(shares / shares.sum()).astype(np.float32)
        return logits


def modes_of(states: NDArray[np.floating], *, most: int, seed: int) -> NDArray[np.int64]:
    """Mode of each cell of a population, (n,), of states (n, dim); all the same where there is no gap.

    A Gaussian mixture with a common covariance in the leading principal components, its size by BIC (Schwarz 1978).
    Components that do not stand apart, by Ashman's D > 4 along the line between them (Ashman, Bird & Zepf 1994,
    doi:10.1086/117248), are one mode: a mixture also uses several components for one mode that
    is not Gaussian. Modes with less than a tenth of the cells join the nearest one.
    """
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    n, dim = states.shape
    n_components = min(_N_COMPONENTS, dim, n // _CELLS_PER_COMPONENT)
    if n_components == 0 or not np.ptp(states, axis=0).any():
        return np.zeros(n, dtype=np.int64)
    points = PCA(n_components, random_state=seed).fit_transform(states.astype(np.float64))
    label = np.zeros(n, dtype=np.int64)
    best = np.inf
    for k in range(1, min(most, n // _CELLS_PER_COMPONENT) + 1):
        mixture = GaussianMixture(k, covariance_type="tied", random_state=seed, reg_covar=1e-6 * float(points.var()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(points)
        if (bic := mixture.bic(points)) >= best:
            break
        best, label = bic, mixture.predict(points)
    return _merge(points, label)


def futures_of(
    pairs: Sequence[Pairs],
    before: Sequence[NDArray[np.int64]],
    after: Sequence[NDArray[np.int64]],
    starts: Sequence[NDArray[np.floating]],
    states: Sequence[NDArray[np.floating]],
    *,
    most: int,
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Number of the future of each pair of cells, and the chances of all, for all transitions by one action.

    A future is a mode of the cells after that at least a tenth of those from one mode before go to, and more than by
    chance, if there is more than one such. Within a mode, transport decides which cell goes where, and that is
    no knowledge. Futures of these transitions, of any dose, have the same number if the change is alike; those of other
    actions have nothing to do with them. Where there is only one, its number is 0, as that of the most frequent one of
    the transition that has most.

    Parameters
    ----------
    pairs
        Of each transition.
    before, after
        Modes of the cells of each transition before, (n,), and after, (m,).
    starts, states
        States before, (n, dim), and after, (m, dim).
    most
        Largest number of futures.

    Returns
    -------
    For each transition the future of each pair, (n_pairs,), and the chances of the futures for the mode that its cell
    before is in, (n_pairs, most).
    """
    found = [np.zeros(len(own.weight), dtype=np.int64) for own in pairs]
    centres: NDArray[np.float64] = np.empty((0, 0))
    ends = [_ends(own, b, a) for own, b, a in zip(pairs, before, after, strict=True)]
    by_size = sorted(range(len(pairs)), key=lambda k: -max(len(modes) for modes in ends[k].values()))
    for number in by_size:
        for origin, modes in ends[number].items():
            if len(modes) == 1:
                continue
            start = starts[number][before[number] == origin].mean(0, dtype=np.float64)
            changes = (
                np.stack([states[number][after[number] == mode].mean(0, dtype=np.float64) for mode in modes]) - start
            )
            codes, centres = _aligned(changes, centres, most=most)
            own = before[number][pairs[number].before] == origin
            target = after[number][pairs[number].after]
            labels = np.full(len(target), codes[0])
            for mode, code in zip(modes, codes, strict=True):
                labels[target == mode] = code
            found[number][own] = labels[own]
    chances = []
    for transition, modes_before, future in zip(pairs, before, found, strict=True):
        origins = modes_before[transition.before]
        mass = np.zeros((origins.max() + 1, most))
        np.add.at(mass, (origins, future), transition.weight)
        chances.append(mass[origins] / mass[origins].sum(1, keepdims=True))
    return list(zip(found, chances, strict=True))


def usual_futures(
    found: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], weights: Sequence[NDArray[np.float64]]
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Futures from :func:`futures_of` without those that do not occur in most of the transitions.

    Unless states tell who has them, they could not be expected of another group, and the effect of the action would be
    learnt from a part of the cells that have them. These pairs count to the most frequent future.
    """
    shares = np.stack(
        [np.bincount(future, weight, chance.shape[1]) for (future, chance), weight in zip(found, weights, strict=True)]
    )
    usual = np.median(shares, axis=0)
    kept = usual >= SMALLEST_SHARE
    if not kept.any():
        return list(found)
    numbers = np.cumsum(kept) - 1
    numbers[~kept] = numbers[usual.argmax()]
    merged = []
    for future, chance in found:
        chances = np.zeros_like(chance)
        np.add.at(chances.T, numbers, chance.T)
        merged.append((numbers[future], chances))
    return merged


def _ends(pairs: Pairs, before: NDArray[np.int64], after: NDArray[np.int64]) -> dict[int, list[int]]:
    """Modes after that each mode before goes to, the most frequent first."""
    mass = np.zeros((before.max() + 1, after.max() + 1))
    np.add.at(mass, (before[pairs.before], after[pairs.after]), pairs.weight)
    found = {}
    # Populations of several kinds are samples: by chance alone, this share of all cells has to go to another mode.
    expected = np.minimum(mass.sum(0), 1.0) * (before.max() > 0)
    chance = _N_DEVIATIONS * np.sqrt(expected * (1 - expected) * (1 / len(before) + 1 / len(after)))
    for origin in np.flatnonzero(mass.sum(1)):
        share = mass[origin] / mass[origin].sum()
        order = np.argsort(-share, kind="stable")
        several = (share >= SMALLEST_SHARE) & (mass[origin] > chance)
        found[int(origin)] = [int(mode) for mode in order if several[mode]] or [int(order[0])]
    return found


def _aligned(
    changes: NDArray[np.float64], centres: NDArray[np.float64], *, most: int
) -> tuple[list[int], NDArray[np.float64]]:
    """Numbers of some changes among known ones, (n, dim), by the cheapest assignment; those left over are new."""
    from scipy.optimize import linear_sum_assignment

    if centres.size == 0:
        centres = changes[:most]
    distance = np.linalg.norm(changes[:, None] - centres, axis=-1)
    codes = distance.argmin(1)
    rows, columns = linear_sum_assignment(distance)
    codes[rows] = columns
    for row in sorted(set(range(len(changes))) - set(rows.tolist())):
        if len(centres) < most:
            codes[row] = len(centres)
            centres = np.vstack([centres, changes[row]])
    return [int(code) for code in codes], centres


def _merge(points: NDArray[np.float64], label: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join the pair of groups that stand least apart, until all do and none is small; numbered from 0."""
    label = label.copy()
    while len(names := np.unique(label)) > 1:
        apart = {(a, b): _ashman(points[label == a], points[label == b]) for a in names for b in names if a < b}
        small = {name for name in names if (label == name).mean() < SMALLEST_SHARE}
        weakest = min(apart, key=lambda pair: (not small & set(pair), apart[pair]))
        if apart[weakest] > _CLEAR and not small & set(weakest):
            break
        label[label == weakest[1]] = weakest[0]
    return np.unique(label, return_inverse=True)[1].astype(np.int64).ravel()


def _ashman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Ashman's D of two groups along the line between their means."""
    line = first.mean(0) - second.mean(0)
    length = np.linalg.norm(line)
    if length == 0:
        return 0.0
    spread = (first @ line / length).var() + (second @ line / length).var()
    return float(np.sqrt(2) * length / np.sqrt(max(spread, 1e-12 * length**2)))
