"""Learning transitions from an AnnData: match, regress, look for several futures, correct."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_matrix

from genejepa._arithmetic import plain_arithmetic
from genejepa.world.decoder import PlausibleStates
from genejepa.world.futures import futures_of, modes_of
from genejepa.world.linear import Features, RidgeFit, Sample, folds_of
from genejepa.world.network import TransitionNetwork
from genejepa.world.training import Belief, Example, train_network
from genejepa.world.transitions import Pairs, match

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from genejepa.world.actions import ActionSpace
    from genejepa.world.decoder import Decoder
    from genejepa.world.transitions import Keys, Transition

logger = logging.getLogger(__name__)

MOST_CELLS = 2000
"""Cells of a population that are used; more would hardly change what is learnt."""

READOUT_SHARE = 0.25
"""Share of the change of expression that is left to the read-out; what it misses is learnt by ridge regression."""

_STATE_PENALTY, _EXPRESSION_PENALTY = 1.0, 3.0
"""Of the ridge regressions. Single genes are noisier than states."""

HIDDEN = 256
_GATE_FOLDS = 3
_N_NEIGHBOURS = 5
_MOST_KNOWN = 1000
_NEVER = 1e-3
"""Mass of a future that does not occur, so that its log probability is finite."""

_STREAM = 10
"""Keeps the random numbers of matching apart from those of other uses."""


@dataclass(frozen=True, eq=False)
class KnownStates:
    """States that transitions were learnt from.

    Attributes
    ----------
    states : (n, dim), float32
    largest
        Mean distance to the five nearest others that 99 % of them stay below.
    """

    states: NDArray[np.float32]
    largest: float

    @classmethod
    def of(cls, states: NDArray[np.float32], *, seed: int) -> KnownStates:
        """At most 1,000 of some states, (n, dim)."""
        kept = _some(states, seed=seed)
        distances = _nearest(kept, kept, skip_self=True)
        return cls(kept, float(np.quantile(distances, 0.99)))

    def share_outside(self, states: NDArray[np.floating]) -> float:
        """Share of states, (n, dim), that are farther from the known ones than nearly all of these."""
        return float((_nearest(states, self.states, skip_self=False) > self.largest).mean())


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was learnt.

    Attributes
    ----------
    keys
        Columns that were read.
    space
        Known actions.
    unit, longest
        Median and largest duration of a transition; 1 without times.
    network
        Change of states.
    expression : (n_features, n_genes), float32
        Change of log expression beyond what the read-out says, by the features of the linear start.
    plausible
        Which states a cell could have.
    known
        States before.
    facts
        What was found, for the user and for files: numbers and texts.
    """

    keys: Keys
    space: ActionSpace
    unit: float
    longest: float
    network: TransitionNetwork
    expression: NDArray[np.float32]
    plausible: PlausibleStates
    known: KnownStates
    facts: dict[str, float | int | str]

    @property
    def features(self) -> Features:
        """Features of the linear start."""
        network = self.network
        variance = float(network.scale) ** 2
        return Features(network.centre.double().numpy(), variance, network.shared.double().numpy())


class Fitting:
    """One fit: what is matched with what, and in which order the parts are learnt.

    Parameters
    ----------
    states : (n_obs, dim), float32
    profiles : (n_obs, n_genes), float32
        Log expression.
    pairs
        Transitions between populations of these cells.
    most_futures
        Largest number of futures.
    n_steps
        Training steps of the network.
    """

    def __init__(
        self,
        decoder: Decoder,
        states: NDArray[np.float32],
        profiles: NDArray[np.float32],
        pairs: Sequence[Transition],
        space: ActionSpace,
        *,
        most_futures: int,
        n_steps: int,
        seed: int,
    ) -> None:
        self.decoder, self.states, self.profiles, self.pairs = decoder, states, profiles, pairs
        self.n_steps, self.seed = n_steps, seed
        self.space = space
        durations = np.array([1.0 if pair.duration is None else pair.duration for pair in pairs])
        self.unit, self.longest = float(np.median(durations)), float(durations.max())
        self.durations = durations / self.unit
        self.actions = np.stack([space.encode(pair.action) for pair in pairs])
        self.kinds = np.unique(self.actions, axis=0, return_inverse=True)[1].ravel()
        self.cells = [self._cells(number) for number in range(len(pairs))]
        self.matched = [self._matched(number) for number in range(len(pairs))]
        found = self._find_futures(most_futures)
        self.futures = [future for future, _ in found]
        self.n_futures = 1 + max(int(own.max()) for own in self.futures)
        self.chances = [chance[:, : self.n_futures] for _, chance in found]
        before = np.unique(np.concatenate([own[0] for own in self.cells]))
        self.before = states[before]
        self.features = Features.of(self.before, n_actions=space.dim)

    def run(self, keys: Keys) -> Fitted:
        """Learn everything."""
        groups = [pair.group for pair in self.pairs]
        fold_of = folds_of(groups, most=_GATE_FOLDS)
        by_state = RidgeFit(self._state_samples(), self._penalty(_STATE_PENALTY), fold_of)
        linear = by_state.coefficients()
        by_future = self._by_future()
        expression = RidgeFit(self._expression_samples(linear, by_future), self._penalty(_EXPRESSION_PENALTY))
        examples = self._examples()
        belief = self._belief(by_state, fold_of, by_future, examples)
        network = self._network(linear, by_future)
        train_network(network, examples, n_steps=self.n_steps, seed=self.seed)
        network.gate.fill_(belief.gate)
        network.prior_gate.fill_(belief.prior_gate)
        facts: dict[str, float | int | str] = {
            "n_transitions": len(self.pairs),
            "n_groups": len(set(groups)),
            "n_actions": len(self.space.names),
            "n_futures": network.n_codes,
            "gate": belief.gate,
            "prior_gate": belief.prior_gate,
            "seed": self.seed,
        }
        logger.info("world model: %s", facts)
        after = np.unique(np.concatenate([own[1] for own in self.cells]))
        known = np.concatenate([self.before, self.states[after]])
        return Fitted(
            keys=keys,
            space=self.space,
            unit=self.unit,
            longest=self.longest,
            network=network,
            expression=expression.coefficients().astype(np.float32),
            plausible=PlausibleStates.fit(self.decoder, _some(known, seed=self.seed)),
            known=KnownStates.of(self.before, seed=self.seed),
            facts=facts,
        )

    def _penalty(self, strength: float) -> NDArray[np.float64]:
        return self.features.penalty(self.actions, self.durations, strength=strength)

    def _cells(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cells of a transition before and after, at most 2,000 of each."""
        rng = np.random.default_rng([self.seed, _STREAM, number])
        pair = self.pairs[number]
        before, after = (rng.permutation(p.cells)[:MOST_CELLS] for p in (pair.source, pair.target))
        return np.sort(before), np.sort(after)

    def _matched(self, number: int) -> Pairs:
        before, after = self.cells[number]
        rng = np.random.default_rng([self.seed, _STREAM, number, 1])
        return match(self.states[before], self.states[after], rng)

    def _state_samples(self, future: int | None = None) -> Iterator[Sample]:
        """Changes of state, of all pairs or of those of a future, where it occurs."""
        for number, (pairs, (before, after)) in enumerate(zip(self.matched, self.cells, strict=True)):
            kept = slice(None) if future is None else np.flatnonzero(self.futures[number] == future)
            weight = pairs.weight[kept]
            if len(weight):
                z = self.states[before[pairs.before[kept]]].astype(np.float64)
                change = self.states[after[pairs.after[kept]]] - z
                yield Sample(self._features_of(number, z), change, weight / weight.sum())

    def _by_future(self) -> NDArray[np.float64]:
        """Coefficients of the linear start of each future, (n_futures, n_features, dim)."""
        fits = [RidgeFit(self._state_samples(k), self._penalty(_STATE_PENALTY)) for k in range(self.n_futures)]
        return np.stack([fit.coefficients() for fit in fits])

    def _expression_samples(self, linear: NDArray[np.float64], by_future: NDArray[np.float64]) -> Iterator[Sample]:
        """Changes of expression that the read-out does not account for, summed up for each cell before."""
        decode = self.decoder.expression
        for number, (pairs, (before, after)) in enumerate(zip(self.matched, self.cells, strict=True)):
            plan = _plan(pairs, len(before), len(after))
            z = self.states[before].astype(np.float64)
            features = self._features_of(number, z)
            decoded = decode(z + features @ linear)
            told = READOUT_SHARE * (decoded - decode(z))
            if self.n_futures > 1:
                shares = np.zeros((len(before), self.n_futures))
                np.add.at(shares, (pairs.before, self.futures[number]), pairs.weight)
                shares /= shares.sum(1, keepdims=True)
                for k in np.flatnonzero(shares.sum(0)):
                    told += shares[:, k, None] * (decode(z + features @ by_future[k]) - decoded)
            weight = np.bincount(pairs.before, pairs.weight, len(before)).astype(np.float64)
            yield Sample(features, plan @ self.profiles[after] - self.profiles[before] - told, weight)

    def _features_of(self, number: int, states: NDArray[np.floating]) -> NDArray[np.float64]:
        return self.features(states, self.actions[number], float(self.durations[number]))

    def _find_futures(self, most: int) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Future of each pair, (n_pairs,), and chances of all, (n_pairs, most), for every transition."""
        modes: dict[int, NDArray[np.int64]] = {}
        for pair, cells in zip(self.pairs, self.cells, strict=True):
            for population, own in zip((pair.source, pair.target), cells, strict=True):
                if id(population) not in modes:
                    modes[id(population)] = modes_of(self.states[own], most=most, seed=self.seed)
        found: dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        for kind in range(self.kinds.max() + 1):
            numbers = np.flatnonzero(self.kinds == kind).tolist()
            labels = futures_of(
                [self.matched[k] for k in numbers],
                [modes[id(self.pairs[k].source)] for k in numbers],
                [modes[id(self.pairs[k].target)] for k in numbers],
                [self.states[self.cells[k][0]] for k in numbers],
                [self.states[self.cells[k][1]] for k in numbers],
                most=most,
            )
            found |= dict(zip(numbers, labels, strict=True))
        return [found[number] for number in range(len(self.pairs))]

    def _network(self, linear: NDArray[np.float64], by_future: NDArray[np.float64]) -> TransitionNetwork:
        """Network that predicts as the linear starts do."""
        each = np.stack(
            [np.bincount(f, p.weight, self.n_futures) for f, p in zip(self.futures, self.matched, strict=True)]
        )
        # The median: what happens in a minority of the groups is not what is to be expected in another one.
        kinds = range(self.kinds.max() + 1)
        shares = _NEVER + np.stack([np.median(each[self.kinds == kind], axis=0) for kind in kinds])
        logits = np.log(shares / shares.sum(1, keepdims=True))
        first = np.unique(self.kinds, return_index=True)[1]
        with plain_arithmetic(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return TransitionNetwork(
                self.features,
                torch.tensor(linear, dtype=torch.float32),
                torch.tensor(by_future - linear, dtype=torch.float32),
                # Combinations are sums of their parts; the smallest numbers that give every kind its own.
                torch.tensor(np.linalg.pinv(self.actions[first]) @ logits, dtype=torch.float32),
                hidden=HIDDEN,
            )

    def _examples(self) -> list[Example]:
        starts: dict[int, list[int]] = {}
        for number, pair in enumerate(self.pairs):
            starts.setdefault(id(pair.source), []).append(number)
        found = []
        for number, (pairs, (before, after)) in enumerate(zip(self.matched, self.cells, strict=True)):
            example = Example(
                before=torch.from_numpy(self.states[before[pairs.before]]),
                after=torch.from_numpy(self.states[after[pairs.after]]),
                future=torch.from_numpy(self.futures[number]),
                chance=torch.tensor(self.chances[number], dtype=torch.float32),
                weight=pairs.weight,
                action=torch.tensor(self.actions[number], dtype=torch.float32),
                duration=float(self.durations[number]),
                kind=int(self.kinds[number]),
                followers=tuple(starts.get(id(self.pairs[number].target), ())),
            )
            found.append(example)
        return found

    def _belief(
        self,
        by_state: RidgeFit,
        fold_of: list[int],
        by_future: NDArray[np.float64],
        examples: list[Example],
    ) -> Belief:
        """How far the network is right about groups that it has not seen; with one group, about such cells."""
        by_group = max(fold_of) > 0
        belief = Belief()
        for fold in range(max(fold_of) + 1 if by_group else _GATE_FOLDS):
            if by_group:
                training, held_out = _without(examples, [own == fold for own in fold_of])
            else:
                is_out = [pairs.before % _GATE_FOLDS == fold for pairs in self.matched]
                training = [_part(example, ~out) for example, out in zip(examples, is_out, strict=True)]
                held_out = [_part(example, out) for example, out in zip(examples, is_out, strict=True)]
            network = self._network(by_state.coefficients(without=fold if by_group else None), by_future)
            train_network(network, training, n_steps=self.n_steps, seed=self.seed)
            for example in held_out:
                belief.add(network, example)
        return belief


def _without(examples: Sequence[Example], is_out: Sequence[bool]) -> tuple[list[Example], list[Example]]:
    """Examples to train on, with followers among themselves only, and those that are left out."""
    kept = [number for number, out in enumerate(is_out) if not out]
    renamed = {old: new for new, old in enumerate(kept)}
    followers = [tuple(renamed[f] for f in examples[old].followers if f in renamed) for old in kept]
    training = [replace(examples[old], followers=own) for old, own in zip(kept, followers, strict=True)]
    return training, [examples[number] for number, out in enumerate(is_out) if out]


def _part(example: Example, chosen: NDArray[np.bool_]) -> Example:
    """Some of the pairs of an example."""
    rows = torch.from_numpy(np.flatnonzero(chosen))
    cells = {name: getattr(example, name)[rows] for name in ("before", "after", "future", "chance")}
    weight = example.weight[chosen]
    return replace(example, **cells, weight=weight / weight.sum())


def _plan(pairs: Pairs, n_before: int, n_after: int) -> csr_matrix:
    """Where the mass of each cell before goes: rows, which sum to 1, of a matrix (n_before, n_after)."""
    plan = csr_matrix((pairs.weight, (pairs.before, pairs.after)), shape=(n_before, n_after))
    return csr_matrix(plan.multiply(1 / plan.sum(1)))


def _some(states: NDArray[np.float32], *, seed: int) -> NDArray[np.float32]:
    """At most 1,000 of some states, (n, dim), in their order."""
    rng = np.random.default_rng([seed, _STREAM])
    return states[np.sort(rng.permutation(len(states))[:_MOST_KNOWN])]


def _nearest(states: NDArray[np.floating], known: NDArray[np.float32], *, skip_self: bool) -> NDArray[np.float64]:
    """Mean distance, (n,), of states (n, dim) to the five nearest known ones."""
    from sklearn.neighbors import NearestNeighbors

    n_neighbours = min(_N_NEIGHBOURS + skip_self, len(known))
    distances, _ = NearestNeighbors(n_neighbors=n_neighbours).fit(known).kneighbors(states)
    means: NDArray[np.float64] = distances[:, int(skip_self) :].mean(1)
    return means
