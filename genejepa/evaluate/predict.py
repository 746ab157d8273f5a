"""Predict labels of cells from an embedding, by simple classifiers that did not see these cells."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from genejepa.config import at_least
from genejepa.data.slots import finite_matrix
from genejepa.errors import DataError
from genejepa.evaluate._folds import Codes, draw_cells, inner_folds, outer_folds
from genejepa.evaluate._input import check_arrays

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from genejepa.evaluate._folds import Folds

__all__ = [
    "C_GRID",
    "Draw",
    "fit_few_shot",
    "fit_linear",
    "predict_few_shot",
    "predict_knn",
    "predict_linear",
    "predict_linear_views",
]

Predict: TypeAlias = Callable[[NDArray[np.float64]], Codes]
"""Predicts class codes, (n_cells,), of an embedding, (n_cells, dim)."""

C_GRID: Final = (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2)
"""Inverse strengths of the L2 penalty among which the logistic regression is chosen."""

_MAX_ITER: Final = 5000


class Draw(NamedTuple):
    """Positions of labelled cells, positions of tested cells, and predicted labels of the latter."""

    train: Codes
    test: Codes
    predicted: NDArray[Any]


def predict_linear(
    Z: ArrayLike, labels: ArrayLike, *, groups: ArrayLike | None = None, n_splits: int = 5, seed: int = 0
) -> NDArray[Any]:
    """Predict the label of every cell by a logistic regression fitted on the other folds.

    Parameters
    ----------
    Z : (n_cells, dim)
        Embedding.
    labels, groups : (n_cells,)
        Class and group of every cell. A class has at least `n_splits` cells; a group is kept within one fold.
    n_splits, seed
        Number of folds and their seed.

    Returns
    -------
    numpy.ndarray
        Predicted labels, shape (n_cells,). A `DataError` says why arrays cannot be used or split.
    """
    return predict_linear_views(Z, {"Z": Z}, labels, groups=groups, n_splits=n_splits, seed=seed)["Z"]


def predict_linear_views(
    Z: ArrayLike,
    views: Mapping[str, ArrayLike],
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    n_splits: int = 5,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Fit as `predict_linear` does, on `Z`, and predict every cell from other embeddings of it.

    A view, (n_cells, dim), holds the same cells as `Z`, such as after thinning, in the same space. Within a fold
    one model serves all views, and it has seen none of the cells that it predicts, in no view.
    """
    Z, codes, classes, group_codes = check_arrays(Z, labels, groups)
    checked = {name: _check_view(view, name, Z.shape) for name, view in views.items()}
    predicted = {name: np.empty_like(codes) for name in checked}
    for train, test in outer_folds(codes, group_codes, n_splits=n_splits, seed=seed):
        predict = fit_linear(Z[train], codes[train], None if group_codes is None else group_codes[train], seed=seed)
        for name, view in checked.items():
            predicted[name][test] = predict(view[test])
    return {name: classes[values] for name, values in predicted.items()}


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

    `n_neighbors` cells vote; the other parameters and the result are those of `predict_linear`.
    """
    at_least("n_neighbors", n_neighbors, 1)
    Z, codes, classes, group_codes = check_arrays(Z, labels, groups)
    predicted = np.empty_like(codes)
    for train, test in outer_folds(codes, group_codes, n_splits=n_splits, seed=seed):
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
    """Fit a logistic regression on `n_per_class` cells of every class, and predict others, `n_draws` times.

    With `groups`, labelled cells come from a random half of the groups, and only cells of the other half are
    predicted; without, all other cells are. With one labelled cell per class the penalty is that of ``C=1``,
    else it is chosen by cross-validation among the labelled cells. Draw ``i`` depends on ``(seed, i)`` only.
    """
    at_least("n_per_class", n_per_class, 1)
    at_least("n_draws", n_draws, 1)
    Z, codes, classes, group_codes = check_arrays(Z, labels, groups)
    draws: list[Draw] = []
    for draw in range(n_draws):
        rng = np.random.default_rng([seed, draw])
        train, test = draw_cells(codes, group_codes, n_per_class=n_per_class, rng=rng)
        predict = fit_few_shot(Z[train], codes[train], rng=rng)
        draws.append(Draw(train, test, classes[predict(Z[test])]))
    return draws


def fit_linear(Z: NDArray[np.float64], codes: Codes, groups: Codes | None = None, *, seed: int = 0) -> Predict:
    """Fit the model of `predict_linear` on all rows, with scale and penalty from these rows; groups as there."""
    scaler = StandardScaler().fit(Z)
    model = _fit_logistic(scaler.transform(Z), codes, inner_folds(codes, groups, seed=seed))
    return lambda queries: model.predict(scaler.transform(queries))


def fit_few_shot(Z: NDArray[np.float64], codes: Codes, *, rng: np.random.Generator) -> Predict:
    """Fit the model of `predict_few_shot` on all rows; `rng` makes the inner folds."""
    center = Z.mean(axis=0)
    scale = float((Z - center).std()) or 1.0
    model = _fit_logistic((Z - center) / scale, codes, inner_folds(codes, None, seed=int(rng.integers(2**31))))
    return lambda queries: model.predict((queries - center) / scale)


def _check_view(values: ArrayLike, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return a view of the cells of `Z` in the space of `Z`."""
    view = finite_matrix(values, name=name)
    if view.shape != shape:
        raise DataError(
            f"The view {name!r} has shape {view.shape}, expected {shape}, that of `Z`.",
            fix="Embed the same cells by the same model.",
        )
    return view


def _fit_logistic(Z: NDArray[np.float64], codes: Codes, folds: Folds) -> LogisticRegression:
    """Fit a multinomial logistic regression; `folds` choose its penalty, without any it is that of C=1."""
    # One thread: products this small are slower with more, tenfold when another program uses the cores.
    with (
        threadpool_limits(1),
        warnings.catch_warnings(action="error", category=ConvergenceWarning),
    ):
        try:
            strength = _choose_strength(Z, codes, folds) if folds else 1.0
            return LogisticRegression(C=strength, max_iter=_MAX_ITER).fit(Z, codes)
        except ConvergenceWarning as warning:
            raise DataError(
                f"The logistic regression did not converge on {len(Z)} cells in {_MAX_ITER} iterations.",
                fix="Check the embedding for dimensions or cells with extreme values.",
            ) from warning


def _choose_strength(Z: NDArray[np.float64], codes: Codes, folds: Folds) -> float:
    """Return the C with the highest mean macro-F1 over `folds`; the smallest of equally good ones."""
    # LogisticRegressionCV searches alike, but the arguments that it wants differ between its versions.
    scores = np.zeros(len(C_GRID))
    for train, test in folds:
        model = LogisticRegression(max_iter=_MAX_ITER, warm_start=True)
        for i, strength in enumerate(C_GRID):
            predicted = model.set_params(C=strength).fit(Z[train], codes[train]).predict(Z[test])
            scores[i] += f1_score(codes[test], predicted, average="macro")
    return C_GRID[int(np.argmax(scores))]
