"""Judge a predicted population of cells against the observed one, beside simple baselines and the noise ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from genejepa.config import LARGEST_NUMPY_SEED, at_least
from genejepa.data.slots import obs_column, parts_of
from genejepa.errors import ConfigError, DataError, GeneMismatchError
from genejepa.evaluate._transition_baselines import Changes, action_problem, time_problem
from genejepa.evaluate.distances import energy_distance, median_distance, mmd, wasserstein

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.evaluate._transition_baselines import Problem, Vector

__all__ = ["transition"]

_MOST_CELLS = 1000
"""Cells drawn of a larger population, for distances between cells and for rank tests."""

_DECIMALS = 6
"""Decimals of log1p values that count; what is beyond is the rounding of single precision."""

_NO_CHANGE = 10.0**-_DECIMALS
"""Spread of a change over genes below which there is none."""

_COLUMNS = [
    "delta_pearson",
    "delta_pearson_top",
    "weighted_mse",
    "weighted_r2",
    "energy_distance",
    "mmd",
    "wasserstein",
    "discrimination",
    "de_overlap",
]


def transition(
    predicted: AnnData,
    observed: AnnData,
    training: AnnData,
    *,
    action_key: str | None = None,
    control: str | None = None,
    group_key: str | None = None,
    time_key: str | None = None,
    n_top: int = 50,
    n_components: int = 50,
    seed: int = 0,
) -> pd.DataFrame:
    """Score a predicted population, simple baselines, and one half of the observed cells as a prediction of the other.

    Give `action_key` and `control` for the outcome of an action, or `time_key` for a time that was left out. Changes
    are those of the mean from the source cells: the control cells of the group, or the cells of the nearest time, the
    earlier of two equally near ones. Call once per (group, action) or time, and concatenate.

    Parameters
    ----------
    predicted : (n_predicted, n_genes)
        Predicted log1p-normalised expression in ``X``; its ``obs`` is not read.
    observed : (n_observed, n_genes)
        Real cells of one action, of one group if `group_key` is given, or of one time, in the same units.
    training : (n_training, n_genes)
        All cells that a method may have seen, in the same units, none of the action in the group, or of the time.
    action_key
        Column of ``obs`` with the action. ``"A+B"`` is the combination of the actions ``A`` and ``B``, in any order.
    control
        Label of the cells without an action.
    group_key
        Column of ``obs`` with the group, such as the cell type. Control cells and times are those of the group.
    time_key
        Column of ``obs`` with the time, numbers.
    n_top
        Number of genes in ``delta_pearson_top`` and ``de_overlap``.
    n_components
        Principal components of the training cells in which distances are taken; fewer if there are fewer.
    seed
        Of the halves of the observed cells, and of the at most 1,000 cells that are drawn of larger populations.

    Returns
    -------
    pandas.DataFrame
        One row per prediction, a row of NaN where a baseline cannot be had from the training cells. For an action:

        - ``model``: `predicted`
        - ``no change``: the source cells
        - ``mean shift``: source cells plus the mean over groups of the change by this action; for an action that no
          group had, the mean of all changes in training
        - ``additive``: for a combination, plus the changes by its parts, each in this group, else its mean over groups
        - ``linear``: plus the change given by a ridge regression (penalty 0.1, with intercept) of the mean changes of
          all genes, one row per training group and action, on the 10 leading principal components of the mean of the
          control cells of the group, and on the action, one-hot with a 1 per part. If a part is not in training, but
          is a gene, the action is given by the 10 leading scores of its genes in a principal component analysis of
          all population means instead (Ahlmann-Eltze et al. 2025, doi:10.1038/s41592-025-02772-6; other than there,
          features are centred and the response is not reduced to components)
        - ``nearest``: plus the change in the group whose control mean is nearest in principal components
        - ``ceiling``: a random half of the observed cells, judged against the other half; as halves are noisier than
          all cells, a good prediction may score slightly above it

        For a time: ``model``, ``no change`` (the nearest time), ``copy previous``, ``copy next``, ``linear`` (cells of
        the previous time moved by the share of the difference of means that has passed by then; after the last time
        the last difference goes on), ``linear, backward`` (likewise from the next time), ``ceiling``.

        Columns:

        - ``delta_pearson``: Pearson correlation over all genes of the predicted and the observed mean change; 0 for a
          prediction without change, hence for ``no change`` by definition, NaN if nothing was observed to change
        - ``delta_pearson_top``: the same over the `n_top` genes with the largest absolute Welch t between observed
          and source cells
        - ``weighted_mse``: squared error of the mean, weighted by the squared absolute t scaled to 0 to 1 (Mejia et
          al. 2025, arXiv:2506.22641)
        - ``weighted_r2``: share of the variance of the change explained, with these weights, where a change is what
          differs from the mean of all changes in training (same source), so that predicting that mean gives at most 0;
          of times, from the mean of the means of the training times. NaN without a training population.
        - ``energy_distance``, ``mmd``, ``wasserstein``: see the functions of these names, in principal components of
          the training cells. The kernel has the median distance between observed and source cells. As the
          Wasserstein distance depends on sample sizes, it is always taken to one half of the observed cells, from as
          many predicted cells if there are as many.
        - ``discrimination``: 1 − rank / N of the observed change among the changes by all N known actions, or times,
          by L1 distance to the predicted change; the nearest has rank 0, ties count half; genes that the action names
          are left out. NaN if N < 2. (Perturbation discrimination score of the Virtual Cell Challenge, as in
          cell-eval, github.com/ArcInstitute/cell-eval.)
        - ``de_overlap``: share of the `n_top` genes that differ most between observed and source cells, by Wilcoxon's
          rank-sum test with tie correction, that also differ most between predicted and source cells. To a rank test
          a shift of all cells, however small, is a large difference in a gene that few cells express: shifted
          baselines score low here for this reason.

        For the first four and the last two of them a higher value is better, except for ``weighted_mse``; for it and
        the distances a lower one. ``attrs["transition"]`` holds sizes and settings.

    Raises
    ------
    ConfigError
        If not exactly one of `action_key` and `time_key` is given, the first without `control`, or a number is out
        of range.
    MissingKeyError
        If a column does not exist.
    GeneMismatchError
        If the three do not have the same genes.
    DataError
        If the training cells contain what is to be predicted, a population is absent or has fewer than two cells,
        values are not finite, or `observed` has several actions, groups or times.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd
    >>> from genejepa.evaluate import transition
    >>> rng = np.random.default_rng(0)
    >>> def cells(type, condition, mean):
    ...     obs = pd.DataFrame({"type": [type] * 30, "condition": condition}, index=[f"{type}{i}" for i in range(30)])
    ...     return ad.AnnData(rng.normal(mean, 0.1, size=(30, 4)), obs=obs)
    >>> change = np.array([1.0, -1.0, 0.0, 2.0])
    >>> training = ad.concat(
    ...     [cells("B", "ctrl", 3.0), cells("B", "stim", 3.0 + change), cells("T", "ctrl", 4.0)], index_unique="-"
    ... )
    >>> observed, predicted = cells("T", "stim", 4.0 + change), cells("T", "stim", 4.0 + change)
    >>> table = transition(
    ...     predicted, observed, training, action_key="condition", control="ctrl", group_key="type"
    ... )
    >>> table["delta_pearson"].round(2).to_dict()["mean shift"]
    1.0
    """
    import pandas as pd

    at_least("n_top", n_top, 1)
    at_least("n_components", n_components, 1)
    at_least("seed", seed, 0, high=LARGEST_NUMPY_SEED)
    if (action_key is None) == (time_key is None):
        raise ConfigError(
            f"`action_key` is {action_key!r} and `time_key` is {time_key!r}, expected exactly one of them.",
            fix="pass action_key and control for the outcome of an action, or time_key for a time.",
        )
    genes = training.var_names
    cells = _population(_in_order(observed, genes, "observed"), "`observed`")
    guessed = _population(_in_order(predicted, genes, "predicted"), "`predicted`")
    seen = _Training(training, group_key, n_components, seed)
    group = "" if group_key is None else _only(observed, group_key)
    named: tuple[str, ...] = ()
    if time_key is not None:
        problem = _time_problem(seen, observed, group, time_key)
    elif action_key is not None and control is not None:
        named = parts_of(_only(observed, action_key), str(control))
        problem = _action_problem(seen, named, group, action_key, str(control))
    else:
        raise ConfigError("`control` is None, expected a label.", fix="pass the label of the cells without an action.")

    halves = np.array_split(np.random.default_rng(seed).permutation(len(cells)), 2)
    first, second = cells[halves[0]], cells[halves[1]]
    bandwidth = _bandwidth(seen, problem.source, cells)
    shared = {"problem": problem, "seen": seen, "kept": ~genes.isin(named), "bandwidth": bandwidth, "n_top": n_top}
    judge = _Judge(cells, second, **shared)
    rows = {"model": judge.scores(guessed)}
    for name, guess in problem.guesses.items():
        rows[name] = {} if guess is None else judge.scores(guess.cells + guess.shift)
    rows["ceiling"] = _Judge(second, second, **shared).scores(first) if len(second) > 1 < len(first) else {}
    table = pd.DataFrame(rows, index=_COLUMNS, dtype=float).T
    table.attrs["transition"] = {
        "action_key": action_key,
        "control": control,
        "group_key": group_key,
        "group": group or None,
        "time_key": time_key,
        "n_predicted": len(guessed),
        "n_observed": len(cells),
        "n_source": len(problem.source),
        "n_training": training.n_obs,
        "n_genes": len(genes),
        "n_top": n_top,
        "n_components": seen.n_components,
        "bandwidth": bandwidth,
        "seed": seed,
    }
    return table


class _Training:
    """The training cells, by population and in principal components."""

    def __init__(self, adata: AnnData, group_key: str | None, n_components: int, seed: int) -> None:
        from sklearn.decomposition import PCA

        self.adata, self.group_key, self.seed = adata, group_key, seed
        self.genes: list[str] = adata.var_names.tolist()
        self.values = _expression(adata, "`training`")
        self.n_components = min(n_components, min(self.values.shape) - 1)
        if self.n_components < 1:
            raise DataError(
                f"`training` has shape {self.values.shape}, expected at least 2 cells and 2 genes.",
                fix="pass all cells that the method may have seen, over all genes.",
            )
        # An exact solver for dense and sparse values alike; it cannot start where all cells are equal, and where the
        # share of explained variance is 0 / 0.
        varies = (self.values.max(axis=0) - self.values.min(axis=0)).max() > 0
        values = self.values if varies else _dense(self.values)
        with np.errstate(invalid="ignore"):
            solver = "arpack" if varies else "full"
            self._components = PCA(self.n_components, svd_solver=solver, random_state=seed).fit(values)
        self.groups = np.full(adata.n_obs, "") if group_key is None else _labels(adata, group_key)

    def cells(self, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Dense values of some cells, (n_chosen, n_genes)."""
        return _dense(self.values[chosen])

    def project(self, cells: NDArray[np.float64]) -> NDArray[np.float64]:
        """Principal components, (n, n_components), of cells, (n, n_genes)."""
        projected: NDArray[np.float64] = self._components.transform(cells)
        return projected

    def draw(self, cells: NDArray[np.float64], most: int = _MOST_CELLS) -> NDArray[np.float64]:
        """At most so many of some cells, the same for the same number of cells."""
        if len(cells) <= most:
            return cells
        return cells[np.random.default_rng(self.seed).choice(len(cells), most, replace=False)]


@dataclass(frozen=True, eq=False)
class _Judge:
    """Scores of predictions of one population, ``truth``; ``half`` is that part of it that the ceiling is judged by."""

    truth: NDArray[np.float64]
    half: NDArray[np.float64]
    problem: Problem
    seen: _Training
    kept: NDArray[np.bool_]
    bandwidth: float
    n_top: int

    def scores(self, cells: NDArray[np.float64]) -> dict[str, float]:
        """One row of the table, for predicted cells, (n, n_genes)."""
        change = cells.mean(0) - self.problem.source.mean(0)
        top = _first(self.welch, self.n_top)
        projected = self.seen.project(self.seen.draw(cells))
        return {
            "delta_pearson": pearson(change, self.change),
            "delta_pearson_top": pearson(change[top], self.change[top]),
            "weighted_mse": float(self.weights @ (change - self.change) ** 2),
            "weighted_r2": self._weighted_r2(change),
            "energy_distance": energy_distance(projected, self.projected),
            "mmd": mmd(projected, self.projected, bandwidth=self.bandwidth) if self.bandwidth else np.nan,
            "wasserstein": self._wasserstein(cells),
            "discrimination": self._discrimination(change),
            "de_overlap": self._de_overlap(cells),
        }

    @cached_property
    def change(self) -> Vector:
        """Observed change of the mean."""
        change: Vector = self.truth.mean(0) - self.problem.source.mean(0)
        return change

    @cached_property
    def welch(self) -> Vector:
        """Absolute Welch t of every gene."""
        return _welch(self.truth, self.problem.source)

    @cached_property
    def weights(self) -> Vector:
        """Weights of the genes, with sum 1; all the same if t is."""
        spread = np.ptp(self.welch)
        weights: Vector = ((self.welch - self.welch.min()) / spread) ** 2 if spread > 0 else np.ones_like(self.welch)
        weights /= weights.sum()
        return weights

    @cached_property
    def projected(self) -> NDArray[np.float64]:
        return self.seen.project(self.seen.draw(self.truth))

    @cached_property
    def different(self) -> NDArray[np.intp]:
        """Genes that differ most by rank test."""
        return self._most_different(self.truth)

    def _weighted_r2(self, change: Vector) -> float:
        if self.problem.reference is None:
            return np.nan
        true = self.change - self.problem.reference
        total = self.weights @ (true - self.weights @ true) ** 2
        return float(1 - self.weights @ (change - self.change) ** 2 / total) if total > _NO_CHANGE**2 else np.nan

    def _wasserstein(self, cells: NDArray[np.float64]) -> float:
        size = min(len(self.half), _MOST_CELLS)
        return wasserstein(*(self.seen.project(self.seen.draw(each, size)) for each in (cells, self.half)))

    def _discrimination(self, change: Vector) -> float:
        others = self.problem.others
        if not others:
            return np.nan
        true, *distances = (float(np.abs(change - other)[self.kept].sum()) for other in [self.change, *others])
        rank = sum((distance < true) + (distance == true) / 2 for distance in distances)
        return 1 - rank / (len(others) + 1)

    def _de_overlap(self, cells: NDArray[np.float64]) -> float:
        if not len(self.different):
            return np.nan
        return float(np.isin(self.different, self._most_different(cells)).mean())

    def _most_different(self, cells: NDArray[np.float64]) -> NDArray[np.intp]:
        found = _rank_sum(self.seen.draw(cells), self.seen.draw(self.problem.source))
        ordered = _first(found, self.n_top)
        return ordered[found[ordered] > 0]


def _action_problem(seen: _Training, action: tuple[str, ...], group: str, action_key: str, control: str) -> Problem:
    """Baselines for the outcome of an action, which the training cells must not have."""
    if not action:
        raise DataError(
            f"`observed.obs[{action_key!r}]` is {control!r}, the control, expected an action.",
            fix="pass the cells of one action as `observed`.",
        )
    labels = _labels(seen.adata, action_key)
    parts = {label: parts_of(label, control) for label in np.unique(labels).tolist()}
    names = {known: [label for label in parts if parts[label] == known] for known in parts.values()}

    def has(name: str, known: tuple[str, ...]) -> NDArray[np.bool_]:
        """Which training cells are of a group and an action."""
        same: NDArray[np.bool_] = (seen.groups == name) & np.isin(labels, names.get(known, []))
        return same

    column = f"training.obs[{action_key!r}]"
    _refuse_leak(has(group, action), column, f"{column}.astype(str).isin({names.get(action)})", seen, group)
    pairs = {(name, parts[label]) for name, label in zip(seen.groups.tolist(), labels.tolist(), strict=True)}
    means = {pair: _mean(seen.values[has(*pair)]) for pair in sorted(pairs)}
    controls = {name: mean for (name, known), mean in means.items() if not known}
    place = f"`{column}`" + (f" of the group {group!r}" if seen.group_key else "")
    if group not in controls:
        raise DataError(
            f"{place} has no {control!r}, expected at least 2 control cells; groups with control cells: "
            f"{sorted(controls) if seen.group_key else 'none'}.",
            fix="pass the label of the control cells as `control`, and training cells with those of this group.",
        )
    source = _at_least_two(seen.cells(has(group, ())), f"{place}, {control!r},")
    changes = {
        (name, known): mean - controls[name] for (name, known), mean in means.items() if known and name in controls
    }
    return action_problem(
        Changes(controls, changes, seen.genes), source, group, action, lambda mean: seen.project(mean[None])[0]
    )


def _time_problem(seen: _Training, observed: AnnData, group: str, time_key: str) -> Problem:
    """Baselines for a time, which the training cells must not have."""
    times, found = _times(seen.adata, time_key), np.unique(_times(observed, time_key))
    if len(found) > 1:
        raise DataError(
            f"`observed.obs[{time_key!r}]` has {len(found)} times, {found[:5].tolist()}, expected one.",
            fix=f"observed = observed[observed.obs[{time_key!r}].astype(float) == {found[0]}]",
        )
    here, time = seen.groups == group, float(found[0])
    column = f"training.obs[{time_key!r}]"
    _refuse_leak(here & (times == time), column, f"({column}.astype(float) == {time})", seen, group)
    known = np.unique(times[here]).tolist()
    if not known:
        raise DataError(
            f"`training.obs[{seen.group_key!r}]` has no {group!r}, expected cells of this group at other times.",
            fix="pass training cells of the group of the observed cells.",
        )
    return time_problem(
        lambda other: _at_least_two(seen.cells(here & (times == other)), f"`{column}`, time {other},"), known, time
    )


def _refuse_leak(leaked: NDArray[np.bool_], column: str, same: str, seen: _Training, group: str) -> None:
    """Raise if there are training cells of what is to be predicted."""
    if not leaked.any():
        return
    within = f" & (training.obs[{seen.group_key!r}].astype(str) == {group!r})" if seen.group_key else ""
    raise DataError(
        f"The answer leaked: `{column}` has {int(leaked.sum())} cells of what is to be predicted"
        f"{f' in the group {group!r}' if seen.group_key else ''}, expected none.",
        fix=f"training = training[~({same}{within})] before any method sees it.",
    )


def _in_order(adata: AnnData, genes: pd.Index[str], name: str) -> AnnData:
    """Return a view with the genes of the training cells, in their order."""
    for slot, found in (("training", genes), (name, adata.var_names)):
        if not found.is_unique:
            raise GeneMismatchError(
                f"`{slot}.var_names` has {int(found.duplicated().sum())} repeated names, "
                f"{found[found.duplicated()][:3].tolist()}, expected unique ones.",
                fix=f"{slot}.var_names_make_unique()",
            )
    if len(odd := genes.symmetric_difference(adata.var_names)):
        raise GeneMismatchError(
            f"`{name}.var_names` and `training.var_names` differ in {len(odd)} genes, {odd[:3].tolist()}, "
            "expected the same genes.",
            fix=f"genes = training.var_names.intersection({name}.var_names), then take [:, genes] of all three.",
        )
    return adata[:, genes]


def _expression(adata: AnnData, name: str) -> Any:
    """Return ``X``, finite and either dense or CSR."""
    from scipy.sparse import csr_matrix, issparse

    values: Any = adata.to_memory().X if adata.isbacked else adata.X
    if values is None or 0 in adata.shape:
        raise DataError(
            f"{name} has {adata.n_obs} cells, {adata.n_vars} genes and {'no' if values is None else 'an'} `X`, "
            "expected log1p-normalised expression in `X`.",
            fix="pass an AnnData with cells, and their values in `X`.",
        )
    values = csr_matrix(values) if issparse(values) else np.asarray(values)
    bad = int((~np.isfinite(values.data if issparse(values) else values)).sum())
    if bad:
        raise DataError(
            f"`X` of {name} has {bad} NaN or infinite values, expected finite ones.",
            fix="leave out these cells or genes; log1p of a value below -1 is NaN.",
        )
    return values


def _population(adata: AnnData, name: str) -> NDArray[np.float64]:
    """Return ``X``, (n_cells, n_genes), of at least two cells."""
    return _at_least_two(_dense(_expression(adata, name)), name)


def _at_least_two(cells: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    if len(cells) < 2:
        raise DataError(f"{name} has {len(cells)} cells, expected at least 2.", fix="pass more cells.")
    return cells


def _dense(values: Any) -> NDArray[np.float64]:
    from scipy.sparse import issparse

    return np.asarray(values.toarray() if issparse(values) else values, dtype=np.float64)


def _mean(values: Any) -> Vector:
    """Mean over the rows of a dense or sparse matrix."""
    return np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()


def _labels(adata: AnnData, key: str) -> NDArray[Any]:
    """Return a column of ``obs`` as text; no cell may lack it."""
    column = obs_column(adata, key)
    if missing := int(column.isna().sum()):
        raise DataError(
            f"`obs[{key!r}]` is missing for {missing} of {adata.n_obs} cells, expected a label for each of them.",
            fix=f"adata = adata[adata.obs[{key!r}].notna()]",
        )
    return np.asarray(column.astype(str), dtype=str)


def _only(observed: AnnData, key: str) -> str:
    """Return the one label that all observed cells have."""
    found = np.unique(_labels(observed, key)).tolist()
    if len(found) != 1:
        raise DataError(
            f"`observed.obs[{key!r}]` has {len(found)} labels, {found[:5]}, expected one.",
            fix=f"observed = observed[observed.obs[{key!r}].astype(str) == {found[0]!r}], once for each label.",
        )
    return str(found[0])


def _times(adata: AnnData, key: str) -> NDArray[np.float64]:
    """Return a column of ``obs`` as finite numbers."""
    import pandas as pd

    column = obs_column(adata, key)
    times = np.asarray(pd.to_numeric(column.astype(object), errors="coerce"), dtype=np.float64)
    bad = ~np.isfinite(times)
    if bad.any():
        raise DataError(
            f"`obs[{key!r}]` is no finite number in {int(bad.sum())} of {adata.n_obs} cells, such as "
            f"{column[bad].iloc[0]!r}, expected times.",
            fix="make a column with numbers, such as hours, and leave out cells without.",
        )
    return times


def _bandwidth(seen: _Training, source: NDArray[np.float64], observed: NDArray[np.float64]) -> float:
    """Median distance between cells of both populations; 0 if most are equal."""
    return median_distance(seen.project(np.concatenate([seen.draw(source), seen.draw(observed)])))


def _first(values: Vector, n: int) -> NDArray[np.intp]:
    """Positions of the largest values."""
    return np.argsort(-values, kind="stable")[:n]


def pearson(predicted: Vector, true: Vector) -> float:
    """Correlation over genes; NaN if the true values are all the same, else 0 if the predicted ones are."""
    if np.ptp(true) <= _NO_CHANGE:
        return np.nan
    return float(np.corrcoef(predicted, true)[0, 1]) if np.ptp(predicted) > _NO_CHANGE else 0.0


def _welch(x: NDArray[np.float64], y: NDArray[np.float64]) -> Vector:
    """Absolute Welch t, (n_genes,): 0 for equal constants, the largest finite one for different constants."""
    from scipy.stats import ttest_ind_from_stats

    described = [value for cells in (x, y) for value in (cells.mean(0), cells.std(0, ddof=1), len(cells))]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.abs(ttest_ind_from_stats(*described, equal_var=False).statistic)
    found = np.nan_to_num(found, nan=0.0, posinf=np.inf)
    finite: Vector = found[np.isfinite(found)]
    largest: Vector = np.minimum(found, finite.max() if finite.any() else 1.0)
    return largest


def _rank_sum(x: NDArray[np.float64], y: NDArray[np.float64]) -> Vector:
    """Absolute z of Wilcoxon's rank-sum test, (n_genes,), with tie correction; 0 for a gene of equal values.

    The variance is that of the rank sum over all permutations of the mid-ranks, which is the tie correction (Lehmann
    1975, "Nonparametrics"). Genes are not ranked by p value: those of well separated genes are all 0.
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([x, y]).round(_DECIMALS), axis=0)
    deviation = ranks[: len(x)].sum(0) - len(x) * (len(ranks) + 1) / 2
    scale = np.sqrt(len(x) * len(y) / len(ranks) * ranks.var(0, ddof=1))
    z: Vector = np.abs(np.divide(deviation, scale, out=np.zeros_like(deviation), where=scale > 0))
    return z
