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
from genejepa.world.futures import FutureShares, futures_of, modes_of, usual_futures
from genejepa.world.linear import Features, Sample, folds_of, ridge
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
    shares
        How often each future occurs, by action.
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
    shares: FutureShares
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
        self.chosen = self._chosen()
        self.cells = [(self.chosen[id(pair.source)], self.chosen[id(pair.target)]) for pair in pairs]
        self.matched = [self._matched(number) for number in range(len(pairs))]
        self.before = states[np.unique(np.concatenate([own[0] for own in self.cells]))]
        self.features = Features.of(self.before, n_actions=space.dim)
        self.examples = self._examples(durations / self.unit, self._find_futures(most_futures))

    @property
    def n_futures(self) -> int:
        """Number of futures."""
        return int(self.examples[0].chance.shape[1])

    def run(self, keys: Keys) -> Fitted:
        """Learn everything."""
        groups = [pair.group for pair in self.pairs]
        fold_of = folds_of(groups, most=_GATE_FOLDS)
        belief = self._belief(fold_of)
        if not belief.prior_gate and self._keep_usual_futures():
            belief = self._belief(fold_of)
        shares = FutureShares.of_examples(self.examples)
        linear, by_future = self._linear(self.examples)
        expression = self._expression(linear, by_future)
        network = self._trained(self.examples, linear, by_future, shares)
        network.gate.fill_(belief.gate)
        network.prior_gate.fill_(belief.prior_gate)
        facts: dict[str, float | int | str] = {
            "n_transitions": len(self.pairs),
            "n_groups": len(set(groups)),
            "n_actions": len(self.space.names),
            "n_followed": sum(bool(example.followers) for example in self.examples),
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
            shares=shares,
            expression=expression.astype(np.float32),
            plausible=PlausibleStates.fit(self.decoder, _some(known, seed=self.seed)),
            known=KnownStates.of(self.before, seed=self.seed),
            facts=facts,
        )

    def _chosen(self) -> dict[int, NDArray[np.int64]]:
        """Cells of every population that are used, at most 2,000, by its id."""
        found: dict[int, NDArray[np.int64]] = {}
        for number, pair in enumerate(self.pairs):
            for side, population in enumerate((pair.source, pair.target)):
                if id(population) not in found:
                    rng = np.random.default_rng([self.seed, _STREAM, number, side])
                    found[id(population)] = np.sort(rng.permutation(population.cells)[:MOST_CELLS])
        return found

    def _matched(self, number: int) -> Pairs:
        before, after = self.cells[number]
        rng = np.random.default_rng([self.seed, _STREAM, number, 2])
        return match(self.states[before], self.states[after], rng)

    def _by_parts(self) -> list[list[int]]:
        """Numbers of the transitions by the same actions: all their doses have futures in common."""
        found: dict[tuple[str, ...], list[int]] = {}
        for number, pair in enumerate(self.pairs):
            found.setdefault(pair.action.parts, []).append(number)
        return list(found.values())

    def _find_futures(self, most: int) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Future of each pair, (n_pairs,), and chances of all, (n_pairs, n_futures), for every transition."""
        modes = {key: modes_of(self.states[cells], most=most, seed=self.seed) for key, cells in self.chosen.items()}
        found: dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        for numbers in self._by_parts():
            labels = futures_of(
                [self.matched[k] for k in numbers],
                [modes[id(self.pairs[k].source)] for k in numbers],
                [modes[id(self.pairs[k].target)] for k in numbers],
                [self.states[self.cells[k][0]] for k in numbers],
                [self.states[self.cells[k][1]] for k in numbers],
                most=most,
            )
            found |= dict(zip(numbers, labels, strict=True))
        n_futures = 1 + max(int(future.max()) for future, _ in found.values())
        return [(found[k][0], found[k][1][:, :n_futures]) for k in range(len(self.pairs))]

    def _keep_usual_futures(self) -> bool:
        """Leave out futures that most of the transitions by an action do not have; whether there were any."""
        found = [(example.future.numpy(), example.chance.numpy().astype(np.float64)) for example in self.examples]
        for numbers in self._by_parts():
            usual = usual_futures([found[k] for k in numbers], [self.examples[k].weight for k in numbers])
            for number, own in zip(numbers, usual, strict=True):
                found[number] = own
        n_futures = 1 + max(int(future.max()) for future, _ in found)
        changed = any(
            bool((example.future.numpy() != future).any())
            for example, (future, _) in zip(self.examples, found, strict=True)
        )
        self.examples = [
            replace(
                example,
                future=torch.from_numpy(future),
                chance=torch.tensor(chance[:, :n_futures], dtype=torch.float32),
            )
            for example, (future, chance) in zip(self.examples, found, strict=True)
        ]
        return changed

    def _examples(
        self, durations: NDArray[np.float64], futures: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]
    ) -> list[Example]:
        actions = np.stack([self.space.encode(pair.action) for pair in self.pairs])
        kinds = np.unique(actions, axis=0, return_inverse=True)[1].ravel()
        starts: dict[int, list[int]] = {}
        for number, pair in enumerate(self.pairs):
            starts.setdefault(id(pair.source), []).append(number)
        found = []
        for number, (pairs, (before, after)) in enumerate(zip(self.matched, self.cells, strict=True)):
            future, chance = futures[number]
            example = Example(
                before=torch.from_numpy(self.states[before[pairs.before]]),
                after=torch.from_numpy(self.states[after[pairs.after]]),
                future=torch.from_numpy(future),
                chance=torch.tensor(chance, dtype=torch.float32),
                weight=pairs.weight,
                parts=self.pairs[number].action.parts,
                action=torch.tensor(actions[number], dtype=torch.float32),
                duration=float(durations[number]),
                kind=int(kinds[number]),
                followers=tuple(starts.get(id(self.pairs[number].target), ())),
            )
            found.append(example)
        return found

    def _penalty(self, examples: Sequence[Example], strength: float) -> NDArray[np.float64]:
        actions = np.stack([example.action.double().numpy() for example in examples])
        durations = np.array([example.duration for example in examples])
        return self.features.penalty(actions, durations, strength=strength)

    def _linear(self, examples: Sequence[Example]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Coefficients of the linear start, (n_features, dim), and of that of each future, (n_futures, ...)."""
        penalty = self._penalty(examples, _STATE_PENALTY)
        linear = ridge(self._state_samples(examples, None), penalty)
        if self.n_futures == 1:
            return linear, linear[None]
        each = [ridge(self._state_samples(examples, k), penalty) for k in range(self.n_futures)]
        return linear, np.stack(each)

    def _state_samples(self, examples: Sequence[Example], future: int | None) -> Iterator[Sample]:
        """Changes of state in all pairs, or in those of one future; in all if an action never has this future."""
        having = {
            example.parts for example in examples if future is not None and bool((example.future == future).any())
        }
        for example in examples:
            numbers = example.future.numpy()
            kept = numbers == future if example.parts in having else np.ones(len(numbers), dtype=bool)
            if kept.any():
                z, weight = example.before.double().numpy()[kept], example.weight[kept]
                features = self.features(z, example.action.double().numpy(), example.duration)
                yield Sample(features, example.after.double().numpy()[kept] - z, weight / weight.sum())

    def _expression(self, linear: NDArray[np.float64], by_future: NDArray[np.float64]) -> NDArray[np.float64]:
        samples = self._expression_samples(linear, by_future)
        return ridge(samples, self._penalty(self.examples, _EXPRESSION_PENALTY))

    def _expression_samples(self, linear: NDArray[np.float64], by_future: NDArray[np.float64]) -> Iterator[Sample]:
        """Changes of expression that the read-out does not account for, summed up for each cell before."""
        decode = self.decoder.expression
        for pairs, (before, after), example in zip(self.matched, self.cells, self.examples, strict=True):
            plan = _plan(pairs, len(before), len(after))
            z = self.states[before].astype(np.float64)
            features = self.features(z, example.action.double().numpy(), example.duration)
            decoded = decode(z + features @ linear)
            told = READOUT_SHARE * (decoded - decode(z))
            if self.n_futures > 1:
                shares = np.zeros((len(before), self.n_futures))
                np.add.at(shares, (pairs.before, example.future.numpy()), pairs.weight)
                shares /= shares.sum(1, keepdims=True)
                for k in np.flatnonzero(shares.sum(0)):
                    told += shares[:, k, None] * (decode(z + features @ by_future[k]) - decoded)
            weight = np.bincount(pairs.before, pairs.weight, len(before)).astype(np.float64)
            yield Sample(features, plan @ self.profiles[after] - self.profiles[before] - told, weight)

    def _trained(
        self,
        examples: Sequence[Example],
        linear: NDArray[np.float64],
        by_future: NDArray[np.float64],
        shares: FutureShares,
    ) -> TransitionNetwork:
        """Network that starts from linear predictions."""
        with plain_arithmetic(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = TransitionNetwork(
                self.features,
                torch.tensor(linear, dtype=torch.float32),
                torch.tensor(by_future, dtype=torch.float32),
                hidden=HIDDEN,
            )
        train_network(network, examples, shares, n_steps=self.n_steps, seed=self.seed)
        return network

    def _belief(self, fold_of: Sequence[int]) -> Belief:
        """How far networks are right about groups of which they saw nothing; with one group, about such cells."""
        belief = Belief()
        for training, held_out in self._splits(fold_of):
            shares = FutureShares.of_examples(training)
            network = self._trained(training, *self._linear(training), shares)
            for example in held_out:
                belief.add(network, example, shares)
        return belief

    def _splits(self, fold_of: Sequence[int]) -> Iterator[tuple[list[Example], list[Example]]]:
        """Examples to train on, and those left out, of each fold."""
        if max(fold_of) > 0:
            yield from (_without(self.examples, [own == k for own in fold_of]) for k in range(max(fold_of) + 1))
            return
        for fold in range(_GATE_FOLDS):
            is_out = [pairs.before % _GATE_FOLDS == fold for pairs in self.matched]
            pieces = [
                [_part(example, out == wanted) for example, out in zip(self.examples, is_out, strict=True)]
                for wanted in (False, True)
            ]
            yield pieces[0], pieces[1]


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
