"""The world model: what becomes of cells when something is done to them, or when time passes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import numpy as np
import torch

from genejepa._arithmetic import plain_arithmetic
from genejepa._constants import OBSM_KEY
from genejepa._memory import memory_errors
from genejepa.config import LARGEST_NUMPY_SEED, at_least
from genejepa.data.inputs import as_anndata
from genejepa.data.slots import SEPARATOR, as_text
from genejepa.errors import ConfigError, DataError, ExtrapolationWarning, NotFittedError
from genejepa.world.actions import Action, ActionSpace, is_finite_number
from genejepa.world.decoder import Decoder, gene_vectors_of
from genejepa.world.fast import FastDynamics
from genejepa.world.fitting import READOUT_SHARE, Fitted, Fitting
from genejepa.world.plan import Plan
from genejepa.world.planning import check_search, energy_distance, search
from genejepa.world.slow import SlowDynamics, learn_slow
from genejepa.world.stored import load_world, save_world
from genejepa.world.transitions import Keys, populations, transitions

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.model import GeneJEPA
    from genejepa.query import MatchingOptions

_FUTURES_STREAM = 11
"""Keeps the random numbers that choose a future apart from those of other uses."""

TIME = "time"
"""Name of letting time pass, where there are no actions."""

_MOST_STEPS = 100
"""Steps after which nothing that was learnt is left of a prediction."""

_MANY = 0.1
"""Share of the cells that have to be unlike those of the fit before a warning is given; of the latter 1 % are."""


class WorldModel:
    """Transitions between states of cells, on the frozen latent of a trained model.

    Parameters
    ----------
    model
        A trained model; it is not changed. Once it is trained further, the world model has to be fitted again.

    Raises
    ------
    genejepa.errors.NotFittedError
        If the model is not trained.

    Examples
    --------
    >>> import genejepa
    >>> cells = genejepa.simulation.branching(300, seed=0)
    >>> model = genejepa.fit(cells, max_epochs=2, progress_bar=False)
    >>> world = genejepa.WorldModel(model).fit(cells, time_key="time", max_steps=20)
    >>> later = world.predict(cells[cells.obs["time"] == 0])
    >>> later.obsm["X_genejepa"].shape[1]
    64
    """

    def __init__(self, model: GeneJEPA) -> None:
        from genejepa.model import GeneJEPA

        if not isinstance(model, GeneJEPA):
            raise ConfigError(
                f"`model` is of type {type(model).__name__}, expected a GeneJEPA.",
                fix="pass a trained model, such as GeneJEPA.load('out/model').",
            )
        if not model.is_trained:
            raise NotFittedError("the model is not trained.", fix="call `model.train()` first.")
        self.model = model
        self._decoder = Decoder(model)
        self._fitted: Fitted | None = None
        self._slow: dict[tuple[object, ...], SlowDynamics] = {}

    @property
    def is_fitted(self) -> bool:
        """Whether :meth:`fit` has run."""
        return self._fitted is not None

    @property
    def actions(self) -> list[str]:
        """Names of the known actions, without combinations."""
        return list(self._known().space.names)

    @property
    def keys(self) -> Keys:
        """Columns that the fit has read."""
        return self._known().keys

    @property
    def facts(self) -> dict[str, float | int | str]:
        """What the fit has found: transitions, groups, actions, futures, and how far the network is believed.

        ``gate`` and ``prior_gate`` are the factors, from 0 to 1, of the network's correction of the linear start and of
        how probabilities of futures depend on the state, by what they were worth for groups that were left out.
        """
        return dict(self._known().facts)

    def fit(
        self,
        adata: AnnData | str | Path,
        *,
        action_key: str | None = None,
        control: str | None = None,
        group_key: str | None = None,
        time_key: str | None = None,
        dose_key: str | None = None,
        max_futures: int = 8,
        max_steps: int | None = None,
        seed: int = 0,
        **matching: Unpack[MatchingOptions],
    ) -> WorldModel:
        """Learn what actions, or time, do to cells.

        Populations before and after are matched by optimal transport within each group. A ridge regression on action
        and state is the start; a network corrects it, as far as it predicts groups that it has not seen. See
        ``docs/world.md``.

        Parameters
        ----------
        adata
            Raw counts, (n_obs, n_vars), or the path of a file.
        action_key, control
            Column of ``obs`` with what was done to each cell, and the name of doing nothing. ``"A+B"`` is a
            combination, whose order does not matter.
        group_key
            Column of ``obs`` with populations that become each other only, such as cell types, donors or cultures.
        time_key
            Column of ``obs`` with the time of measurement, a number. With actions, the action of a cell is what was
            done since the time before.
        dose_key
            Column of ``obs`` with the dose of the action, a number of at least 0; not read for controls.
        max_futures
            Largest number of separate futures to look for; 1 for none.
        max_steps
            Training steps of the network; None for four for each transition, from 300 to 3,000. 0 keeps the linear
            start.
        seed
            Seed of everything random; equal seeds give equal models.
        **matching
            ``layer``, ``use_raw``, ``gene_mapping``, ``duplicates``, ``min_overlap`` as in
            :meth:`genejepa.GeneJEPA.get_latent_representation`.

        Returns
        -------
        This object. An earlier fit is forgotten.

        Raises
        ------
        genejepa.errors.MissingKeyError
            If a column does not exist.
        genejepa.errors.DataError
            If no cell is a control or all are, no group has a population before and one after, or times or doses are
            not finite numbers.
        genejepa.errors.ConfigError
            If the keys do not go together, or a number is out of range.
        """
        at_least("max_futures", max_futures, 1)
        if max_steps is not None:
            at_least("max_steps", max_steps, 0)
        at_least("seed", seed, 0, high=LARGEST_NUMPY_SEED)
        keys = Keys(action_key, None if control is None else as_text(control).strip(), group_key, time_key, dose_key)
        adata = as_anndata(adata)
        found = populations(adata, keys)
        pairs = transitions(found, keys)
        space = ActionSpace.of(
            [pair.action for pair in pairs], has_time=time_key is not None, gene_vectors=gene_vectors_of(self.model)
        )
        self._decoder = Decoder(self.model)
        states, profiles, _ = self._read(adata, matching)
        with memory_errors("fitting the world model", fix="pass fewer cells."):
            fitting = Fitting(
                self._decoder,
                states,
                profiles,
                pairs,
                space,
                most_futures=int(max_futures),
                n_steps=_n_steps(len(pairs)) if max_steps is None else int(max_steps),
                seed=int(seed),
            )
            self._fitted, self._slow = fitting.run(keys), {}
        return self

    def predict(
        self,
        adata: AnnData | str | Path,
        action: str | None = None,
        *,
        dose: float | None = None,
        duration: float | None = None,
        n_futures: int = 1,
        seed: int = 0,
        **matching: Unpack[MatchingOptions],
    ) -> AnnData:
        """State and expression of cells after an action, or after some time.

        Parameters
        ----------
        adata
            Cells before, raw counts.
        action
            Name, ``"A+B"`` for a combination, or the gene of an unseen perturbation if the known actions are genes;
            None for the control, that is for time alone.
        dose
            As in ``dose_key``.
        duration
            In the unit of ``time_key``; None for that of a median transition. More than the longest transition that was
            learnt is predicted in several steps.
        n_futures
            1: one future for each cell, drawn with its probability, so that the population is right. More: so many
            of the most probable futures of each cell; one that does not occur has probability 0.
        seed
            For drawing a future.
        **matching
            As in :meth:`fit`.

        Returns
        -------
        AnnData, (n_obs * n_futures, n_genes), with cell after cell, and the futures of a cell from the most probable
        one on. ``X``: log1p of counts scaled to the median depth of the training cells, as :meth:`expression` gives it:
        that of the cell plus the predicted change, which is in ``layers["change"]``; small values below 0 are
        possible. ``var["genejepa_measured"]``: whether the cells have the gene; that of others is told from the state.
        ``obsm["X_genejepa"]``: state. ``obs``: that of the cells and ``action``, ``future`` (its number, from
        0), ``probability``, ``energy`` (about 1 for a state that cells have; see
        :class:`genejepa.world.decoder.PlausibleStates`), all under names that start with ``genejepa_``.

        Raises
        ------
        genejepa.errors.NotFittedError
            Before :meth:`fit`.
        genejepa.errors.MissingKeyError
            If the action is unknown and cannot be told from its gene.
        genejepa.errors.ConfigError
            If dose, duration or ``n_futures`` is not possible; more than one future needs one step.

        Warns
        -----
        genejepa.errors.ExtrapolationWarning
            If the action or combination was not seen, the dose or duration is above the largest one seen, or, before
            any of the steps, a tenth of the cells are unlike those that transitions were learnt from.
        """
        fitted = self._current()
        at_least("n_futures", n_futures, 1)
        at_least("seed", seed, 0, high=LARGEST_NUMPY_SEED)
        if n_futures > fitted.network.n_codes:
            raise ConfigError(
                f"`n_futures` is {n_futures}, and the world model knows {fitted.network.n_codes}.",
                fix=f"pass n_futures={fitted.network.n_codes} or fewer.",
            )
        encoded, duration = self._encoded(action, dose), self._in_units(duration)
        steps = self._steps(duration, n_futures)
        adata = as_anndata(adata)
        states, profiles, keep = self._read(adata, matching)
        rng = np.random.default_rng([seed, _FUTURES_STREAM])
        outcome, unlike = Outcome.of_states(states), []
        for step in steps:
            unlike.append(fitted.known.share_outside(outcome.states))
            outcome = self._step(outcome, encoded, step, n_futures=n_futures, rng=rng)
        _warn_if_unlike(fitted, unlike)
        return self._as_anndata(adata, profiles, outcome, keep, action=self._name_of(action), n_futures=n_futures)

    def rollout(
        self,
        adata: AnnData | str | Path,
        actions: Sequence[str | None],
        *,
        seed: int = 0,
        **matching: Unpack[MatchingOptions],
    ) -> list[AnnData]:
        """Cells after each of several actions, one after the other.

        Parameters
        ----------
        actions
            Names as in :meth:`predict`, each for the duration of a median transition.

        Returns
        -------
        One AnnData, as from :meth:`predict`, for every step.
        """
        fitted = self._current()
        at_least("seed", seed, 0, high=LARGEST_NUMPY_SEED)
        actions = _names(actions)
        adata = as_anndata(adata)
        encoded = [self._encoded(action, None) for action in actions]
        states, profiles, keep = self._read(adata, matching)
        rng = np.random.default_rng([seed, _FUTURES_STREAM])
        outcome, unlike, found = Outcome.of_states(states), [], []
        for action, own in zip(actions, encoded, strict=True):
            unlike.append(fitted.known.share_outside(outcome.states))
            outcome = self._step(outcome, own, 1.0, n_futures=1, rng=rng)
            name = self._name_of(action)
            found.append(self._as_anndata(adata, profiles, outcome, keep, action=name, n_futures=1))
        _warn_if_unlike(fitted, unlike)
        return found

    def expression(self, adata: AnnData | str | Path, **matching: Unpack[MatchingOptions]) -> AnnData:
        """Observed log expression in the space of :meth:`predict`, to compare predictions with.

        Returns
        -------
        AnnData, (n_obs, n_genes), with log1p of counts scaled to the median depth of the training cells, over the genes
        of the model, in ``X``, the state in ``obsm["X_genejepa"]``, and ``obs`` as it was. Genes that the cells do not
        have, where ``var["genejepa_measured"]`` is False, are told from the state: leave them out of evaluations.
        """
        from anndata import AnnData

        adata = as_anndata(adata)
        states, profiles, keep = self._read(adata, matching)
        return AnnData(profiles, obs=adata.obs.copy(), var=self._var(keep), obsm={OBSM_KEY: states})

    def plan(
        self,
        start: AnnData | str | Path,
        goal: AnnData | str | Path,
        actions: Sequence[str] | None = None,
        *,
        horizon: int = 3,
        method: Literal["auto", "exhaustive", "cross_entropy", "hierarchical"] = "auto",
        span: int = 2,
        action_cost: float = 0.05,
        n_best: int = 10,
        n_cells: int = 100,
        seed: int = 0,
        **matching: Unpack[MatchingOptions],
    ) -> Plan:
        """Sequences of actions that lead from one population to another, the best first.

        Nothing is done to cells: the population is imagined after each action, and compared with the goal by energy
        distance in the latent.

        Parameters
        ----------
        start, goal
            Cells, raw counts.
        actions
            Names to choose from, also of combinations; None for all single actions, and with times also for letting
            time pass.
        horizon
            Most actions in a sequence. Shorter ones count, too, and so does doing nothing.
        method
            ``exhaustive``: all sequences. ``cross_entropy``: a search of promising ones. ``hierarchical``: a slow
            predictor, taught by the fast one, jumps over ``span`` actions at once to find sub-goals, and single
            actions are searched from sub-goal to sub-goal. ``auto``: exhaustive up to 10,000 sequences, else
            cross-entropy. See :func:`genejepa.world.planning.search`.
        action_cost
            Price of an action, as a share of the distance from start to goal.
        n_best
            Sequences to return.
        n_cells
            Most cells of start and of goal that are used, drawn at random.

        Returns
        -------
        Plan, which :func:`genejepa.pl.plan` draws.

        Raises
        ------
        genejepa.errors.NotFittedError
            Before :meth:`fit`.
        genejepa.errors.MissingKeyError
            If an action is unknown.
        genejepa.errors.ConfigError
            If a number is out of range, there is no action, or the actions have doses, which cannot be planned.

        Warns
        -----
        genejepa.errors.ExtrapolationWarning
            As in :meth:`predict`.
        """
        fitted = self._current()
        at_least("n_cells", n_cells, 2)
        check_search(method, horizon=horizon, span=span, action_cost=action_cost, n_best=n_best, seed=seed)
        names = self._plannable(None if actions is None else _names(actions))
        vectors, logits = (np.stack(each) for each in zip(*(self._encoded(name, None) for name in names), strict=True))
        fast = FastDynamics(fitted.network, vectors, logits, seed=seed)
        rng = np.random.default_rng([seed, _FUTURES_STREAM, 1])
        first, last = (self._sampled(cells, n_cells, rng, matching) for cells in (start, goal))
        begin, end = torch.from_numpy(first), torch.from_numpy(last)
        apart = float(energy_distance(begin[None], end)[0])
        slow = None
        if method == "hierarchical":
            slow = self._slow_dynamics(fast, names, span=int(span), seed=int(seed))
        found = search(
            fast,
            begin,
            end,
            horizon=horizon,
            action_cost=float(action_cost) * apart,
            method=method,
            slow=slow,
            span=span if slow is not None else None,
            n_best=n_best,
            seed=seed,
        )
        populations = [fast.imagined(begin, candidate.actions) for candidate in found.candidates]
        unlike = [[fitted.known.share_outside(cells) for cells in ways[:-1]] for ways in populations]
        _warn_if_unlike(fitted, unlike[0] or [fitted.known.share_outside(first)])
        return Plan(
            sequences=[tuple(names[k] for k in candidate.actions) for candidate in found.candidates],
            costs=np.array([candidate.cost for candidate in found.candidates]),
            distances=[np.array(candidate.distances) for candidate in found.candidates],
            populations=populations,
            goal=last,
            method=found.method,
            n_evaluations=found.n_evaluations,
            unlike=np.array([max(shares, default=0.0) for shares in unlike]),
        )

    def save(self, dir_path: str | Path, *, overwrite: bool = False) -> None:
        """Save the world model together with its model, without cells, as safetensors, JSON and CSV.

        Raises
        ------
        FileExistsError
            If the directory holds a world model and ``overwrite`` is False, or something else.
        genejepa.errors.NotFittedError
            Before :meth:`fit`.
        """
        save_world(Path(dir_path).expanduser(), self.model, self._current(), overwrite=overwrite)

    @classmethod
    def load(cls, dir_path: str | Path) -> WorldModel:
        """Load what :meth:`save` wrote; nothing in the directory is executed.

        Raises
        ------
        genejepa.errors.ModelFileError
            If the directory is not a complete world model, or a byte of it was changed.
        """
        model, fitted = load_world(Path(dir_path).expanduser())
        world = cls(model)
        world._fitted = fitted
        return world

    def _plannable(self, actions: Sequence[str | None] | None) -> list[str]:
        """Names of the actions of a plan."""
        fitted = self._known()
        if fitted.space.has_doses:
            raise ConfigError(
                "the actions have doses, and plans choose among actions of one dose.",
                fix="name each action with its dose in a column of its own, and fit without `dose_key`.",
            )
        names = list(fitted.space.names) if actions is None else [self._name_of(action) for action in actions]
        names = list(dict.fromkeys(names))
        if actions is None and fitted.space.has_time:
            names.append(fitted.keys.control or TIME)
        if not names:
            raise ConfigError("`actions` is empty.", fix="pass at least one action, or None for all.")
        return names

    def _slow_dynamics(self, fast: FastDynamics, names: list[str], *, span: int, seed: int) -> SlowDynamics:
        """Slow predictor for some actions, taught once."""
        key = (*names, span, seed)
        if key not in self._slow:
            states = torch.from_numpy(self._known().known.states)
            self._slow[key] = learn_slow(fast, states, span=span, seed=seed)
        return self._slow[key]

    def _sampled(
        self, cells: AnnData | str | Path, n_cells: int, rng: np.random.Generator, matching: MatchingOptions
    ) -> NDArray[np.float32]:
        """States of some of the cells, (n, dim)."""
        counts, keep = self.model.read_panel(as_anndata(cells), matching)
        if counts.n_obs == 0:
            raise DataError("`start` or `goal` has no cells.", fix="pass at least one cell of each.")
        chosen = np.sort(rng.permutation(counts.n_obs)[:n_cells])
        return self.model.encode_panel(counts, keep=keep, indices=chosen)

    def _read(
        self, adata: AnnData, matching: MatchingOptions
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_] | None]:
        """States, (n_obs, dim), log expression, (n_obs, n_genes), and the genes of which it was not decoded."""
        counts, keep = self.model.read_panel(adata, matching)
        if counts.n_obs == 0:
            raise DataError("`adata` has no cells.", fix="pass at least one cell.")
        states = self.model.encode_panel(counts, keep=keep)
        profiles = self._decoder.profiles(counts, keep)
        if keep is not None:
            profiles[:, ~keep] = self._decoder.expression(states)[:, ~keep]
        return states, profiles, keep

    def _known(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError("the world model is not fitted.", fix="call `world.fit(adata, ...)` first.")
        return self._fitted

    def _current(self) -> Fitted:
        """What is known, if the model is still the one that it was learnt with."""
        fitted = self._known()
        if self.model.weights_sha256() != self._decoder.weights_sha256:
            raise NotFittedError(
                "the model was trained again after the world model was fitted: its latent is another one.",
                fix="call `world.fit(adata, ...)` again.",
            )
        return fitted

    def _encoded(self, action: str | None, dose: float | None) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Vector of an action, and log probabilities of the futures after it."""
        fitted = self._known()
        parsed = self._parsed(action, dose)
        if not parsed.parts and dose is not None:
            raise ConfigError(
                f"`dose` is {dose!r}, and `action` is {action!r}, which has none.", fix="leave `dose` out."
            )
        if not parsed.parts and not fitted.space.has_time:
            raise ConfigError(
                f"`action` is {action!r}, the control, which changes nothing without time.",
                fix=f"pass one of the actions {', '.join(map(repr, fitted.space.names[:5]))}.",
            )
        return fitted.space.encode(parsed), fitted.shares.logits(parsed.parts)

    def _parsed(self, action: str | None, dose: float | None = None) -> Action:
        """An action by its name; there is one name for the passing of time if no action has it."""
        fitted = self._known()
        if action is None or (action == TIME and TIME not in fitted.space.names):
            return Action()
        return Action.parse(as_text(action), control=fitted.keys.control, dose=dose)

    def _name_of(self, action: str | None) -> str:
        """The one name of an action that may be spelt in several ways."""
        return SEPARATOR.join(self._parsed(action).parts) or self._known().keys.control or TIME

    def _in_units(self, duration: float | None) -> float:
        """Duration in the unit of the model."""
        fitted = self._known()
        if duration is None:
            return 1.0
        if fitted.keys.time is None:
            raise ConfigError("`duration` is given, and there was no `time_key`.", fix="leave `duration` out.")
        if not is_finite_number(duration) or duration <= 0:
            raise ConfigError(f"`duration` is {duration!r}, expected a number above 0.", fix="pass such a duration.")
        return duration / fitted.unit

    def _steps(self, duration: float, n_futures: int) -> list[float]:
        """Durations of the steps, none longer than those learnt."""
        fitted = self._known()
        longest = fitted.longest / fitted.unit
        n = max(1, math.ceil(duration / longest - 1e-9))
        if n > _MOST_STEPS:
            raise ConfigError(
                f"`duration` is {duration * fitted.unit:g}, more than {_MOST_STEPS} times the longest transition seen, "
                f"{fitted.longest:g}.",
                fix="pass a shorter duration, in the unit of the times of the fit.",
            )
        if n > 1 and n_futures > 1:
            raise ConfigError(
                f"`n_futures` is {n_futures}, and the duration takes {n} steps, each with several futures.",
                fix=f"pass n_futures=1, or a duration of at most {fitted.longest:g}.",
            )
        if n > 1:
            warnings.warn(
                f"Extrapolation: duration {duration * fitted.unit:g} is longer than any transition seen "
                f"({fitted.longest:g}); it is predicted in {n} steps.",
                ExtrapolationWarning,
                stacklevel=3,
            )
        return [duration / n] * n

    def _step(
        self,
        before: Outcome,
        encoded: tuple[NDArray[np.float64], NDArray[np.float32]],
        duration: float,
        *,
        n_futures: int,
        rng: np.random.Generator,
    ) -> Outcome:
        """What becomes of cells in one step, with the change of expression added up."""
        fitted = self._known()
        futures, chances, linear = _futures(fitted, before.states, encoded, duration)
        if n_futures == 1:
            draws = rng.random(len(chances))[:, None]
            chosen = np.minimum((chances.cumsum(1) < draws).sum(1), chances.shape[1] - 1)[:, None]
        else:
            chosen = np.argsort(-chances, axis=1, kind="stable")[:, :n_futures]
        rows = np.repeat(np.arange(len(chances)), n_futures)
        after = futures[rows, chosen.ravel()]
        decode = self._decoder.expression
        by_readout = READOUT_SHARE * (decode(linear) - decode(before.states)) - decode(linear)
        by_features = fitted.features(before.states, encoded[0], duration) @ fitted.expression
        change = before.change + by_readout + by_features
        return Outcome(
            after,
            change[rows] + decode(after),
            chosen.ravel(),
            before.probability[rows] * chances[rows, chosen.ravel()],
        )

    def _as_anndata(
        self,
        adata: AnnData,
        profiles: NDArray[np.float32],
        outcome: Outcome,
        keep: NDArray[np.bool_] | None,
        *,
        action: str,
        n_futures: int,
    ) -> AnnData:
        import pandas as pd
        from anndata import AnnData

        rows = np.repeat(np.arange(adata.n_obs), n_futures)
        obs = adata.obs.iloc[rows].copy()
        if n_futures > 1:
            obs.index = [f"{name}-{k % n_futures}" for k, name in enumerate(obs.index)]
        obs["genejepa_action"] = pd.Categorical([action] * len(obs))
        obs["genejepa_future"] = outcome.future
        obs["genejepa_probability"] = outcome.probability.astype(np.float32)
        obs["genejepa_energy"] = self._known().plausible.energy(self._decoder, outcome.states)
        change = outcome.change.astype(np.float32)
        return AnnData(
            profiles[rows] + change,
            obs=obs,
            var=self._var(keep),
            obsm={OBSM_KEY: outcome.states.astype(np.float32)},
            layers={"change": change},
        )

    def _var(self, keep: NDArray[np.bool_] | None) -> pd.DataFrame:
        """Table of the genes of the model, and whether the cells had them."""
        import pandas as pd

        index = np.array(self.model.genes, dtype=object)
        return pd.DataFrame({"genejepa_measured": np.ones(len(index), dtype=bool) if keep is None else keep}, index)

    def __repr__(self) -> str:
        if self._fitted is None:
            return f"WorldModel({self.model!r}, not fitted)"
        facts = self._fitted.facts
        return (
            f"WorldModel({self.model!r}, {facts['n_actions']} actions, {facts['n_transitions']} transitions, "
            f"{facts['n_futures']} futures)"
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """What has become of cells.

    Attributes
    ----------
    states : (n, dim)
    change : (n, n_genes)
        Of log expression, since the start.
    future : (n,)
        Number of the future in the last step.
    probability : (n,)
        Of all choices of a future.
    """

    states: NDArray[np.float64]
    change: NDArray[np.float64]
    future: NDArray[np.int64]
    probability: NDArray[np.float64]

    @classmethod
    def of_states(cls, states: NDArray[np.float32]) -> Outcome:
        """Nothing has happened yet."""
        n = len(states)
        return cls(states.astype(np.float64), np.zeros((n, 1)), np.zeros(n, dtype=np.int64), np.ones(n))


@plain_arithmetic()
@torch.no_grad()
def _futures(
    fitted: Fitted,
    states: NDArray[np.float64],
    encoded: tuple[NDArray[np.float64], NDArray[np.float32]],
    duration: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Every future, (n, n_codes, dim), its probability, (n, n_codes), and the linear prediction, (n, dim)."""
    z = torch.tensor(states, dtype=torch.float32)
    action = torch.tensor(encoded[0], dtype=torch.float32).expand(len(z), -1)
    logits = torch.from_numpy(encoded[1]).expand(len(z), -1)
    durations = torch.full((len(z),), duration)
    after = fitted.network(z, action, durations)
    linear = z + fitted.network.linear(z, action, durations)
    chances = fitted.network.chances(z, action, logits)
    return after.double().numpy(), chances.double().numpy(), linear.double().numpy()


def _warn_if_unlike(fitted: Fitted, unlike: Sequence[float]) -> None:
    """Warn of shares of cells that are unlike those of the fit, before each step."""
    where = "" if unlike and unlike[0] > _MANY else None
    if len(unlike) > 1 and fitted.facts["n_followed"] == 0:
        warnings.warn(
            "Extrapolation: no transition of the fit starts where another one ends; nobody has seen a second step.",
            ExtrapolationWarning,
            stacklevel=3,
        )
    elif len(unlike) > 1 and max(unlike[1:]) > _MANY:
        where = f"before step {1 + int(np.argmax(unlike))}, "
    if where is not None:
        share = max(unlike) if where else unlike[0]
        warnings.warn(
            f"Extrapolation: {where}{share:.0%} of the cells are unlike those that transitions were learnt from.",
            ExtrapolationWarning,
            stacklevel=3,
        )


def _n_steps(n_transitions: int) -> int:
    """Steps that suffice for so many transitions."""
    return min(max(300, 4 * n_transitions), 3000)


def _names(actions: object) -> list[str | None]:
    """Names of actions as a list."""
    if isinstance(actions, str):
        raise ConfigError(f"`actions` is {actions!r}, expected a list of names.", fix=f"pass actions=[{actions!r}].")
    given: list[object] = list(actions) if isinstance(actions, Iterable) else [actions]
    names = [name for name in given if name is None or isinstance(name, str)]
    if not isinstance(actions, Iterable) or len(names) < len(given):
        raise ConfigError(f"`actions` is {actions!r}, expected a list of names.", fix="pass a list of texts.")
    return names
