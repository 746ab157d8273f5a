"""Probes: simple classifiers on a frozen embedding, scored on cells that they were not fitted on.

`linear_probe`, `knn_probe` and `few_shot_probe` read an AnnData and return a table. `predict_linear`,
`predict_knn` and `predict_few_shot` do the same work on arrays and return predictions.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from genejepa._constants import OBSM_KEY
from genejepa.errors import ConfigError, DataError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData

__all__ = [
    "Draw",
    "few_shot_probe",
    "knn_probe",
    "linear_probe",
    "predict_few_shot",
    "predict_knn",
    "predict_linear",
]

ProbeName = Literal["linear", "knn", "few_shot"]
Floats = NDArray[np.float64]
Codes = NDArray[np.intp]
Folds = list[tuple[Codes, Codes]]

C_GRID: Final = (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2)
"""Inverse strengths of the L2 penalty among which the logistic regression is chosen."""

_N_INNER_FOLDS: Final = 3
_MAX_ITER: Final = 5000
_N_BOOTSTRAP: Final = 1000
_MAX_GROUP_SPLITS: Final = 1000
_OVERALL: Final = ("macro_f1", "balanced_accuracy", "accuracy")
_PER_CLASS: Final = ("precision", "recall", "f1")


class Draw(NamedTuple):
    """One draw of a few-shot probe.

    Attributes
    ----------
    train
        Positions of the labelled cells, shape (n_classes * n_per_class,).
    test
        Positions of the cells that were predicted, shape (n_test,).
    predicted
        Predicted labels of the cells in `test`, shape (n_test,).
    """

    train: Codes
    test: Codes
    predicted: NDArray[Any]


class _Cells(NamedTuple):
    """The cells of an AnnData that a probe uses, as arrays."""

    Z: Floats
    codes: Codes
    groups: Codes | None
    classes: list[str]
    dropped: dict[str, int]
    n_unlabelled: int


# Public: from an AnnData to a table -------------------------------------------------------------------


def linear_probe(
    adata: AnnData,
    *,
    labels_key: str,
    use_rep: str = OBSM_KEY,
    groups_key: str | None = None,
    n_splits: int = 5,
    seed: int = 0,
    min_class_size: int = 10,
) -> pd.DataFrame:
    """Score a cross-validated logistic regression from an embedding to labels.

    Every cell is predicted once, by a multinomial logistic regression that was fitted on the other folds.
    Dimensions are standardised with the mean and deviation of the training fold. The L2 penalty is chosen
    among `C_GRID` inside the training fold, by the macro-averaged F1 of a threefold cross-validation.

    Parameters
    ----------
    adata
        Annotated data with an embedding in ``obsm``; it is not changed.
    labels_key
        Column of ``obs`` with the classes. Cells without a label are left out.
    use_rep
        Key of ``obsm`` with the embedding, shape (n_cells, dim).
    groups_key
        Column of ``obs``, such as the donor, whose levels are kept within one fold, in the outer and in the
        inner cross-validation. If a training fold has a single group, its inner folds are ordinary ones.
    n_splits
        Number of folds, at least 2.
    seed
        Seed of the folds and of the bootstrap.
    min_class_size
        Classes with fewer cells are left out, as are, with `groups_key`, classes that occur in one group
        only; ``attrs["probe"]["dropped_classes"]`` names them.

    Returns
    -------
    pandas.DataFrame
        Columns ``probe``, ``metric``, ``label``, ``value``, ``ci_low``, ``ci_high``, ``n_cells``. The rows of
        ``macro_f1``, ``balanced_accuracy`` and ``accuracy`` have the label ``"all"``; ``precision``,
        ``recall`` and ``f1`` have one row per class. Intervals are 95 % percentile intervals of a bootstrap
        of the predicted cells; they describe the sampling of cells, not of groups or of folds.
        ``attrs["probe"]`` holds the settings, the classes and the confusion counts (rows: true class).

    Raises
    ------
    MissingKeyError
        If `labels_key`, `use_rep` or `groups_key` does not exist.
    DataError
        If fewer than two classes remain, the embedding is not finite, there are fewer groups than folds, or
        the logistic regression does not converge.
    ConfigError
        If a number is out of range.

    References
    ----------
    Alain & Bengio (2016), Understanding intermediate layers using linear classifier probes,
    arXiv:1610.01644.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd
    >>> from genejepa.evaluate import linear_probe
    >>> labels = np.repeat(["B", "T"], 20)
    >>> rng = np.random.default_rng(0)
    >>> Z = rng.normal(size=(40, 3)) + 9 * (labels == "T")[:, None]
    >>> adata = ad.AnnData(obs=pd.DataFrame({"type": labels}, index=[f"c{i}" for i in range(40)]))
    >>> adata.obsm["X_genejepa"] = Z
    >>> table = linear_probe(adata, labels_key="type")
    >>> float(table.loc[table["metric"] == "macro_f1", "value"].item())
    1.0
    """
    cells = _cells(
        adata,
        labels_key=labels_key,
        use_rep=use_rep,
        groups_key=groups_key,
        min_class_size=_at_least("min_class_size", min_class_size, _at_least("n_splits", n_splits, 2)),
    )
    predicted = predict_linear(cells.Z, cells.codes, groups=cells.groups, n_splits=n_splits, seed=seed)
    settings = {
        "groups_key": groups_key,
        "n_splits": n_splits,
        "seed": seed,
        "min_class_size": min_class_size,
    }
    return _cross_validated_table("linear", cells, predicted, labels_key, use_rep, settings)


def knn_probe(
    adata: AnnData,
    *,
    labels_key: str,
    use_rep: str = OBSM_KEY,
    groups_key: str | None = None,
    n_splits: int = 5,
    seed: int = 0,
    min_class_size: int = 10,
    n_neighbors: int = 15,
) -> pd.DataFrame:
    """Score a cross-validated nearest-neighbour vote on an embedding.

    Every cell takes the commonest label among its nearest cells of the other folds, by Euclidean distance in
    the embedding as it is, without any scaling. This tells whether cells of a class lie together.

    Parameters
    ----------
    adata
        Annotated data with an embedding in ``obsm``; it is not changed.
    labels_key
        Column of ``obs`` with the classes. Cells without a label are left out.
    use_rep
        Key of ``obsm`` with the embedding, shape (n_cells, dim).
    groups_key
        Column of ``obs``, such as the donor, whose levels are kept within one fold.
    n_splits
        Number of folds, at least 2.
    seed
        Seed of the folds and of the bootstrap.
    min_class_size
        Classes with fewer cells are left out, as are, with `groups_key`, classes that occur in one group
        only.
    n_neighbors
        Number of cells that vote.

    Returns
    -------
    pandas.DataFrame
        The same table as that of `linear_probe`.

    Raises
    ------
    MissingKeyError
        If `labels_key`, `use_rep` or `groups_key` does not exist.
    DataError
        If fewer than two classes remain, the embedding is not finite, there are fewer groups than folds, or
        a training fold has fewer than `n_neighbors` cells.
    ConfigError
        If a number is out of range.

    References
    ----------
    Cover & Hart (1967), Nearest neighbor pattern classification, IEEE Trans. Inf. Theory 13:21.
    """
    cells = _cells(
        adata,
        labels_key=labels_key,
        use_rep=use_rep,
        groups_key=groups_key,
        min_class_size=_at_least("min_class_size", min_class_size, _at_least("n_splits", n_splits, 2)),
    )
    predicted = predict_knn(
        cells.Z, cells.codes, groups=cells.groups, n_splits=n_splits, seed=seed, n_neighbors=n_neighbors
    )
    settings = {
        "groups_key": groups_key,
        "n_splits": n_splits,
        "seed": seed,
        "min_class_size": min_class_size,
        "n_neighbors": n_neighbors,
    }
    return _cross_validated_table("knn", cells, predicted, labels_key, use_rep, settings)


def few_shot_probe(
    adata: AnnData,
    *,
    labels_key: str,
    use_rep: str = OBSM_KEY,
    groups_key: str | None = None,
    seed: int = 0,
    min_class_size: int = 10,
    n_per_class: int = 5,
    n_draws: int = 10,
) -> pd.DataFrame:
    """Score a logistic regression that sees only a few labelled cells of every class.

    Each draw takes `n_per_class` cells of every class at random, fits on them and predicts all other cells.
    The embedding is centred and divided by one common scale, both taken from the labelled cells: a scale per
    dimension, estimated from so few cells, would be mostly noise.

    Parameters
    ----------
    adata
        Annotated data with an embedding in ``obsm``; it is not changed.
    labels_key
        Column of ``obs`` with the classes. Cells without a label are left out.
    use_rep
        Key of ``obsm`` with the embedding, shape (n_cells, dim).
    groups_key
        Column of ``obs``, such as the donor. Labelled cells then come from a random half of its levels, and
        only cells of the other half are tested. The inner folds do not regard groups, as so few labelled
        cells cannot be split by group.
    seed
        Seed of the draws; draw ``i`` depends on ``(seed, i)`` only.
    min_class_size
        Classes with fewer cells are left out, as are, with `groups_key`, classes that occur in one group
        only. It must exceed `n_per_class`.
    n_per_class
        Labelled cells per class.
    n_draws
        Number of draws.

    Returns
    -------
    pandas.DataFrame
        The same columns as those of `linear_probe`. ``value`` is the mean over draws, and the interval is the
        95 % Student interval of that mean, cut to [0, 1] (missing for a single draw). ``n_cells`` is the
        mean number of tested cells of a draw, rounded. The confusion counts are summed over draws.

    Raises
    ------
    MissingKeyError
        If `labels_key`, `use_rep` or `groups_key` does not exist.
    DataError
        If fewer than two classes remain, the embedding is not finite, or no half of the groups holds enough
        cells of every class.
    ConfigError
        If a number is out of range, or `min_class_size` does not exceed `n_per_class`.
    """
    _at_least("n_per_class", n_per_class, 1)
    cells = _cells(
        adata,
        labels_key=labels_key,
        use_rep=use_rep,
        groups_key=groups_key,
        min_class_size=_at_least("min_class_size", min_class_size, n_per_class + 1),
    )
    draws = predict_few_shot(
        cells.Z, cells.codes, groups=cells.groups, n_per_class=n_per_class, n_draws=n_draws, seed=seed
    )
    n_classes = len(cells.classes)
    counts = np.stack([_confusion(cells.codes[draw.test], draw.predicted, n_classes) for draw in draws])
    overall, per_class = _scores(counts)
    settings = {
        "groups_key": groups_key,
        "seed": seed,
        "min_class_size": min_class_size,
        "n_per_class": n_per_class,
        "n_draws": n_draws,
    }
    return _table(
        "few_shot",
        cells,
        counts=counts.sum(axis=0),
        n_tested=np.rint(counts.sum(axis=2).mean(axis=0)).astype(np.intp),
        overall=_with_mean_interval(overall),
        per_class=_with_mean_interval(per_class),
        record={"labels_key": labels_key, "use_rep": use_rep, **settings},
    )


# Public: from arrays to predictions -------------------------------------------------------------------


def predict_linear(
    Z: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    n_splits: int = 5,
    seed: int = 0,
) -> NDArray[Any]:
    """Predict the label of every cell by a logistic regression fitted on the other folds.

    Parameters
    ----------
    Z
        Embedding, shape (n_cells, dim).
    labels
        Class of every cell, shape (n_cells,); every class has at least `n_splits` cells.
    groups
        Group of every cell, shape (n_cells,); a group is kept within one fold.
    n_splits
        Number of folds.
    seed
        Seed of the folds.

    Returns
    -------
    numpy.ndarray
        Predicted labels, shape (n_cells,).

    Raises
    ------
    DataError
        If the arrays do not fit together, are not finite, or cannot be split as asked.
    """
    Z, codes, classes, group_codes = _check_arrays(Z, labels, groups)
    predicted = np.empty_like(codes)
    for train, test in _outer_folds(codes, group_codes, n_splits=n_splits, seed=seed):
        mean, scale = Z[train].mean(axis=0), Z[train].std(axis=0)
        scale[scale <= 10 * np.finfo(np.float64).eps * np.abs(mean)] = 1.0
        inner_groups = None if group_codes is None else group_codes[train]
        inner = _folds(codes[train], inner_groups, n_splits=_N_INNER_FOLDS, seed=seed)
        model = _fit_logistic((Z[train] - mean) / scale, codes[train], inner)
        predicted[test] = model.predict((Z[test] - mean) / scale)
    return classes[predicted]


def predict_knn(
    Z: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    n_splits: int = 5,
    seed: int = 0,
    n_neighbors: int = 15,
) -> NDArray[Any]:
    """Predict the label of every cell by a vote of its nearest cells in the other folds.

    Parameters
    ----------
    Z
        Embedding, shape (n_cells, dim).
    labels
        Class of every cell, shape (n_cells,); every class has at least `n_splits` cells.
    groups
        Group of every cell, shape (n_cells,); a group is kept within one fold.
    n_splits
        Number of folds.
    seed
        Seed of the folds.
    n_neighbors
        Number of cells that vote.

    Returns
    -------
    numpy.ndarray
        Predicted labels, shape (n_cells,).

    Raises
    ------
    DataError
        If the arrays do not fit together, are not finite, or cannot be split as asked.
    """
    from sklearn.neighbors import KNeighborsClassifier

    _at_least("n_neighbors", n_neighbors, 1)
    Z, codes, classes, group_codes = _check_arrays(Z, labels, groups)
    predicted = np.empty_like(codes)
    for train, test in _outer_folds(codes, group_codes, n_splits=n_splits, seed=seed):
        if train.size < n_neighbors:
            raise DataError(
                f"A training fold has {train.size} cells, expected at least n_neighbors={n_neighbors}.",
                fix="Pass a smaller n_neighbors.",
            )
        model = KNeighborsClassifier(n_neighbors=n_neighbors).fit(Z[train], codes[train])
        predicted[test] = model.predict(Z[test])
    return classes[predicted]


def predict_few_shot(
    Z: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    n_per_class: int = 5,
    n_draws: int = 10,
    seed: int = 0,
) -> list[Draw]:
    """Fit a logistic regression on a few cells of every class, and predict the others, several times.

    Parameters
    ----------
    Z
        Embedding, shape (n_cells, dim).
    labels
        Class of every cell, shape (n_cells,); every class has more than `n_per_class` cells.
    groups
        Group of every cell, shape (n_cells,). Labelled cells come from a random half of the groups, and only
        cells of the other half are predicted.
    n_per_class
        Labelled cells per class. With one, the penalty is that of ``C=1``, else it is chosen by
        cross-validation among the labelled cells.
    n_draws
        Number of draws.
    seed
        Seed; draw ``i`` depends on ``(seed, i)`` only.

    Returns
    -------
    list of Draw
        Labelled cells, tested cells and predictions of every draw.

    Raises
    ------
    DataError
        If the arrays do not fit together, are not finite, or cannot be split as asked.
    """
    _at_least("n_per_class", n_per_class, 1)
    _at_least("n_draws", n_draws, 1)
    Z, codes, classes, group_codes = _check_arrays(Z, labels, groups)
    draws: list[Draw] = []
    for draw in range(n_draws):
        rng = np.random.default_rng([seed, draw])
        train, test = _draw_cells(codes, group_codes, n_per_class=n_per_class, rng=rng)
        center = Z[train].mean(axis=0)
        scale = float(np.sqrt(np.mean((Z[train] - center) ** 2))) or 1.0
        n_inner = min(_N_INNER_FOLDS, n_per_class)
        inner = _folds(codes[train], None, n_splits=n_inner, seed=int(rng.integers(2**31)))
        model = _fit_logistic((Z[train] - center) / scale, codes[train], inner)
        draws.append(Draw(train, test, classes[model.predict((Z[test] - center) / scale)]))
    return draws


# Splits -----------------------------------------------------------------------------------------------


def _outer_folds(codes: Codes, groups: Codes | None, *, n_splits: int, seed: int) -> Folds:
    """Return (train, test) positions of the outer folds, after checking that they can be made."""
    _at_least("n_splits", n_splits, 2)
    if groups is None and np.bincount(codes).min() < n_splits:
        raise DataError(
            f"The smallest class has {np.bincount(codes).min()} cells, expected at least "
            f"n_splits={n_splits}.",
            fix="Leave out the smallest classes (min_class_size), or pass a smaller n_splits.",
        )
    if groups is not None and np.unique(groups).size < n_splits:
        raise DataError(
            f"There are {np.unique(groups).size} groups among the cells used, expected at least "
            f"n_splits={n_splits}.",
            fix="Pass a smaller n_splits (at least 2), or a groups_key with more levels.",
        )
    folds = _folds(codes, groups, n_splits=n_splits, seed=seed)
    if any(np.unique(codes[train]).size < 2 for train, _ in folds):
        raise DataError(
            "A training fold has cells of one class only, because groups and classes coincide.",
            fix="Pass another groups_key, or none.",
        )
    return folds


def _folds(codes: Codes, groups: Codes | None, *, n_splits: int, seed: int) -> Folds:
    """Return stratified folds; none if they would be fewer than two."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    n_groups = 0 if groups is None else np.unique(groups).size
    use_groups = n_groups >= 2
    n_splits = min(n_splits, n_groups if use_groups else int(np.bincount(codes).max()))
    if n_splits < 2:
        return []
    with warnings.catch_warnings():
        # A class that is rare within a training fold is absent from some inner folds, which is harmless.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        if use_groups:
            splitter = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed)
            folds = list(splitter.split(codes, codes, groups))
        else:
            splitter = StratifiedKFold(n_splits, shuffle=True, random_state=seed)
            folds = list(splitter.split(codes, codes))
    # Groups of very unequal size can leave a fold without any cell.
    return [(train, test) for train, test in folds if test.size > 0]


def _draw_cells(
    codes: Codes, groups: Codes | None, *, n_per_class: int, rng: np.random.Generator
) -> tuple[Codes, Codes]:
    """Draw the labelled cells of one few-shot draw, and return them with the cells to test."""
    n_classes = int(codes.max()) + 1
    if groups is None:
        pool = np.ones(codes.size, dtype=bool)
        if np.bincount(codes).min() <= n_per_class:
            raise DataError(
                f"The smallest class has {np.bincount(codes).min()} cells, expected more than "
                f"n_per_class={n_per_class}.",
                fix="Leave out the smallest classes (min_class_size), or pass a smaller n_per_class.",
            )
    else:
        pool = _half_of_groups(codes, groups, n_per_class=n_per_class, rng=rng)
    train = np.concatenate(
        [
            rng.choice(np.flatnonzero(pool & (codes == label)), size=n_per_class, replace=False)
            for label in range(n_classes)
        ]
    )
    tested = np.ones(codes.size, dtype=bool) if groups is None else ~pool
    tested[train] = False
    return np.sort(train), np.flatnonzero(tested)


def _half_of_groups(
    codes: Codes, groups: Codes, *, n_per_class: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Choose a random half of the groups that has enough cells of every class, and leaves some to test."""
    n_classes = int(codes.max()) + 1
    levels = np.unique(groups)
    for _ in range(_MAX_GROUP_SPLITS):
        chosen = rng.permutation(levels)[: max(1, levels.size // 2)]
        pool = np.isin(groups, chosen)
        labelled = np.bincount(codes[pool], minlength=n_classes)
        tested = np.bincount(codes[~pool], minlength=n_classes)
        if labelled.min() >= n_per_class and tested.min() >= 1:
            return pool
    raise DataError(
        f"No half of the {levels.size} groups was found that has at least n_per_class={n_per_class} cells of "
        "every class and leaves cells of every class in the other half.",
        fix="Pass a smaller n_per_class, a larger min_class_size, or no groups_key.",
    )


# Models and scores ------------------------------------------------------------------------------------


def _fit_logistic(Z: Floats, codes: Codes, folds: Folds) -> Any:
    """Fit a multinomial logistic regression; `folds` choose its penalty, without any it is that of C=1."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            strength = _choose_strength(Z, codes, folds)
            return LogisticRegression(C=strength, solver="lbfgs", max_iter=_MAX_ITER).fit(Z, codes)
        except ConvergenceWarning as warning:
            raise DataError(
                f"The logistic regression of the probe did not converge on {Z.shape[0]} cells and "
                f"{Z.shape[1]} dimensions ({str(warning).splitlines()[0]}).",
                fix="Check the embedding for dimensions or cells with extreme values.",
            ) from warning


def _choose_strength(Z: Floats, codes: Codes, folds: Folds) -> float:
    """Return the C with the highest mean macro-F1 over `folds`; the smallest of equally good ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    folds = [(train, test) for train, test in folds if np.unique(codes[train]).size >= 2]
    if not folds:
        return 1.0
    # LogisticRegressionCV searches alike, but the arguments that it wants differ between its versions.
    scores = np.zeros(len(C_GRID))
    for train, test in folds:
        model = LogisticRegression(solver="lbfgs", max_iter=_MAX_ITER, warm_start=True)
        for i, strength in enumerate(C_GRID):
            predicted = model.set_params(C=strength).fit(Z[train], codes[train]).predict(Z[test])
            scores[i] += f1_score(codes[test], predicted, average="macro")
    return C_GRID[int(np.argmax(scores))]


def _confusion(true: Codes, predicted: Codes, n_classes: int) -> NDArray[np.int64]:
    """Count cells by true (rows) and predicted (columns) class."""
    flat = np.bincount(true * n_classes + predicted, minlength=n_classes**2)
    return flat.reshape(n_classes, n_classes).astype(np.int64)


def _scores(counts: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Compute all metrics of confusion counts.

    Parameters
    ----------
    counts
        Confusion counts, shape (n, n_classes, n_classes), rows true and columns predicted.

    Returns
    -------
    tuple of numpy.ndarray
        `_OVERALL` metrics, shape (n, 3), and `_PER_CLASS` metrics, shape (n, 3, n_classes). A ratio
        without any cell is 0.
    """
    correct = np.diagonal(counts, axis1=1, axis2=2).astype(np.float64)
    true, predicted = counts.sum(axis=2), counts.sum(axis=1)
    recall = correct / np.maximum(true, 1)
    precision = correct / np.maximum(predicted, 1)
    f1 = 2 * correct / np.maximum(true + predicted, 1)
    accuracy = correct.sum(axis=1) / np.maximum(true.sum(axis=1), 1)
    overall = np.stack([f1.mean(axis=1), recall.mean(axis=1), accuracy], axis=1)
    return overall, np.stack([precision, recall, f1], axis=1)


def _with_mean_interval(values: Floats) -> Floats:
    """Stack the mean over the first axis and its 95 % Student interval, shape (3, ...)."""
    from scipy.stats import t

    n = values.shape[0]
    mean = values.mean(axis=0)
    if n < 2:
        return np.stack([mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)])
    half = float(t.ppf(0.975, n - 1)) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return np.stack([mean, np.clip(mean - half, 0.0, 1.0), np.clip(mean + half, 0.0, 1.0)])


def _bootstrap_counts(counts: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Resample cells with replacement, shape (_N_BOOTSTRAP, n_classes, n_classes).

    The metrics depend on the cells through their confusion counts only, and resampling cells makes these
    counts multinomial, so that no cell has to be drawn.
    """
    rng = np.random.default_rng(seed)
    resampled = rng.multinomial(counts.sum(), counts.ravel() / counts.sum(), size=_N_BOOTSTRAP)
    return resampled.reshape(_N_BOOTSTRAP, *counts.shape).astype(np.int64)


def _cross_validated_table(
    name: ProbeName,
    cells: _Cells,
    predicted: Codes,
    labels_key: str,
    use_rep: str,
    settings: Mapping[str, Any],
) -> pd.DataFrame:
    """Score out-of-fold predictions, with bootstrap intervals."""
    counts = _confusion(cells.codes, predicted, len(cells.classes))
    resampled = _scores(_bootstrap_counts(counts, seed=settings["seed"]))
    overall, per_class = (
        np.concatenate([value, np.quantile(draws, [0.025, 0.975], axis=0)])
        for value, draws in zip(_scores(counts[None]), resampled, strict=True)
    )
    return _table(
        name,
        cells,
        counts=counts,
        n_tested=counts.sum(axis=1),
        overall=overall,
        per_class=per_class,
        record={"labels_key": labels_key, "use_rep": use_rep, **settings},
    )


def _table(
    name: ProbeName,
    cells: _Cells,
    *,
    counts: NDArray[np.int64],
    n_tested: NDArray[np.integer[Any]],
    overall: Floats,
    per_class: Floats,
    record: Mapping[str, Any],
) -> pd.DataFrame:
    """Assemble the tidy table; `overall` is (3, n_metrics), `per_class` (3, n_metrics, n_classes)."""
    import pandas as pd

    columns = ("probe", "metric", "label", "value", "ci_low", "ci_high", "n_cells")
    rows: list[tuple[object, ...]] = [
        (name, metric, "all", *overall[:, i].tolist(), int(n_tested.sum()))
        for i, metric in enumerate(_OVERALL)
    ]
    rows += [
        (name, metric, label, *per_class[:, i, j].tolist(), int(n_tested[j]))
        for j, label in enumerate(cells.classes)
        for i, metric in enumerate(_PER_CLASS)
    ]
    table = pd.DataFrame(rows, columns=list(columns))
    table.attrs["probe"] = {
        "name": name,
        **record,
        "classes": cells.classes,
        "confusion": counts.tolist(),
        "dropped_classes": cells.dropped,
        "n_unlabelled": cells.n_unlabelled,
    }
    return table


# Input ------------------------------------------------------------------------------------------------


def _at_least(name: str, value: int, minimum: int) -> int:
    """Return `value`, or raise if it is below `minimum`."""
    if value < minimum:
        raise ConfigError(
            f"`{name}` is {value}, expected at least {minimum}.",
            fix=f"Pass {name}={minimum} or more.",
        )
    return value


def _names(keys: Sequence[str]) -> str:
    """List existing keys for an error message."""
    return ", ".join(repr(key) for key in keys) or "none"


def _cells(
    adata: AnnData,
    *,
    labels_key: str,
    use_rep: str,
    groups_key: str | None,
    min_class_size: int,
) -> _Cells:
    """Read embedding, labels and groups, and leave out unlabelled cells and small classes."""
    import pandas as pd

    labels = pd.Categorical(_obs_column(adata, labels_key))
    codes = np.asarray(labels.codes, dtype=np.intp)
    Z = _embedding(adata, use_rep)
    groups = None if groups_key is None else _group_codes(adata, groups_key, used=codes >= 0)

    counts = np.bincount(codes[codes >= 0], minlength=len(labels.categories))
    large = counts >= min_class_size
    if groups is not None:
        large &= np.array(
            [np.unique(groups[codes == code]).size > 1 for code in range(counts.size)], dtype=bool
        )
    classes = [str(name) for name in labels.categories]
    if large.sum() < 2:
        found = ", ".join(f"{name} ({n})" for name, n in list(zip(classes, counts, strict=True))[:10])
        raise DataError(
            f"`obs[{labels_key!r}]` has {large.sum()} usable classes, expected at least 2 with at least "
            f"{min_class_size} cells each{'' if groups is None else ' in at least 2 groups'}; found "
            f"{len(classes)} classes: {found}{', ...' if len(classes) > 10 else ''}.",
            fix="Pass the labels_key of a column with classes, or a smaller min_class_size.",
        )
    kept = (codes >= 0) & large[codes]
    new_code = np.cumsum(large) - 1
    return _Cells(
        Z=Z[kept],
        codes=new_code[codes[kept]].astype(np.intp),
        groups=None if groups is None else groups[kept],
        classes=[name for name, keep in zip(classes, large, strict=True) if keep],
        dropped={
            name: int(n) for name, n, keep in zip(classes, counts, large, strict=True) if not keep and n > 0
        },
        n_unlabelled=int((codes < 0).sum()),
    )


def _obs_column(adata: AnnData, key: str) -> pd.Series[Any]:
    """Return a column of obs."""
    if key not in adata.obs:
        raise MissingKeyError(
            f"`obs[{key!r}]` does not exist, found {_names([str(k) for k in adata.obs.columns])}.",
            fix="Pass the name of an existing column of adata.obs.",
        )
    column: pd.Series[Any] = adata.obs[key]
    return column


def _group_codes(adata: AnnData, key: str, *, used: NDArray[np.bool_]) -> Codes:
    """Return groups as integers; cells in use must have one."""
    import pandas as pd

    codes = np.asarray(pd.Categorical(_obs_column(adata, key)).codes, dtype=np.intp)
    if (codes[used] < 0).any():
        raise DataError(
            f"`obs[{key!r}]` is missing for {int((codes[used] < 0).sum())} labelled cells, expected a group "
            "for every labelled cell.",
            fix=f"Leave out cells without a group: adata[adata.obs[{key!r}].notna()].",
        )
    return codes


def _embedding(adata: AnnData, use_rep: str) -> Floats:
    """Return the embedding as a dense array of finite float64, shape (n_cells, dim)."""
    from scipy.sparse import issparse

    if use_rep not in adata.obsm:
        raise MissingKeyError(
            f"`obsm[{use_rep!r}]` does not exist, found {_names(list(adata.obsm))}.",
            fix="Write the embedding into adata.obsm first, or pass the use_rep of an existing one.",
        )
    stored: Any = adata.obsm[use_rep]
    Z = np.asarray(stored.toarray() if issparse(stored) else stored, dtype=np.float64)
    return _check_finite(Z, name=f"`obsm[{use_rep!r}]`")


def _check_finite(Z: Floats, *, name: str) -> Floats:
    """Return `Z` if it is a finite matrix."""
    if Z.ndim != 2 or 0 in Z.shape:
        raise DataError(
            f"{name} has shape {Z.shape}, expected (n_cells, dim) with at least one of each.",
            fix="Pass an embedding with one row per cell.",
        )
    bad = int((~np.isfinite(Z)).any(axis=1).sum())
    if bad:
        raise DataError(
            f"{name} has NaN or infinite values in {bad} of {Z.shape[0]} cells, expected finite numbers.",
            fix="Compute the embedding again, or leave these cells out.",
        )
    return Z


def _check_arrays(
    Z: ArrayLike, labels: ArrayLike, groups: ArrayLike | None
) -> tuple[Floats, Codes, NDArray[Any], Codes | None]:
    """Return embedding, class codes, classes and group codes of arrays that fit together."""
    Z = _check_finite(np.asarray(Z, dtype=np.float64), name="`Z`")
    label_array = np.asarray(labels)
    group_array = None if groups is None else np.asarray(groups)
    for name, array in (("labels", label_array), ("groups", group_array)):
        if array is not None and array.shape != (Z.shape[0],):
            raise DataError(
                f"`{name}` has shape {array.shape}, expected ({Z.shape[0]},), one entry per row of `Z`.",
                fix=f"Pass {name} in the order of the cells of the embedding.",
            )
    classes, codes = np.unique(label_array, return_inverse=True)
    if classes.size < 2:
        raise DataError(
            f"`labels` has {classes.size} class, expected at least 2.",
            fix="Pass labels with at least two classes.",
        )
    group_codes = None if group_array is None else np.unique(group_array, return_inverse=True)[1]
    return Z, codes, classes, group_codes
