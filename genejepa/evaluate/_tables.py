"""Scores of predictions, their intervals, and the table that holds them.

All scores follow from confusion counts, shape (n, n_classes, n_classes), rows true and columns predicted, of
`n` draws or bootstrap samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student

if TYPE_CHECKING:
    from collections.abc import Mapping

    from genejepa.evaluate.predict import Draw

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_OVERALL: Final = ("macro_f1", "balanced_accuracy", "accuracy")
_PER_CLASS: Final = ("precision", "recall", "f1")
_N_BOOTSTRAP: Final = 1000


def cross_validated_table(
    codes: NDArray[np.intp], predicted: NDArray[np.intp], *, seed: int, record: Mapping[str, Any]
) -> pd.DataFrame:
    """Score one prediction per cell, with bootstrap intervals."""
    counts = confusion(codes, predicted, len(record["classes"]))
    samples = scores(np.concatenate([counts[None], bootstrap_counts(counts, seed=seed)]))
    overall, per_class = (np.stack([values[0], *np.quantile(values[1:], [0.025, 0.975], axis=0)]) for values in samples)
    return _table(counts[None], overall, per_class, record)


def few_shot_table(codes: NDArray[np.intp], draws: list[Draw], *, record: Mapping[str, Any]) -> pd.DataFrame:
    """Score draws by their mean, with its Student interval."""
    n_classes = len(record["classes"])
    counts = np.stack([confusion(codes[draw.test], draw.predicted, n_classes) for draw in draws])
    overall, per_class = map(_mean_and_interval, scores(counts))
    return _table(counts, overall, per_class, record)


def confusion(true: NDArray[np.intp], predicted: NDArray[np.intp], n_classes: int) -> Counts:
    """Count cells by true (rows) and predicted (columns) class, shape (n_classes, n_classes)."""
    counts = np.bincount(true * n_classes + predicted, minlength=n_classes**2)
    return counts.reshape(n_classes, n_classes)


def scores(counts: Counts) -> tuple[Floats, Floats]:
    """Return the `_OVERALL` scores, shape (n, 3), and the `_PER_CLASS` scores, shape (n, 3, n_classes).

    A ratio without any cell is 0.
    """
    correct = np.diagonal(counts, axis1=1, axis2=2)
    true, predicted = counts.sum(axis=2), counts.sum(axis=1)
    recall = correct / np.maximum(true, 1)
    precision = correct / np.maximum(predicted, 1)
    f1 = 2 * correct / np.maximum(true + predicted, 1)
    accuracy = correct.sum(axis=1) / true.sum(axis=1)
    overall = np.stack([f1.mean(axis=1), recall.mean(axis=1), accuracy], axis=1)
    return overall, np.stack([precision, recall, f1], axis=1)


def bootstrap_counts(counts: Counts, *, seed: int) -> Counts:
    """Resample cells with replacement, shape (_N_BOOTSTRAP, n_classes, n_classes).

    Resampling cells makes their confusion counts multinomial, so that no cell has to be drawn.
    """
    rng = np.random.default_rng(seed)
    resampled = rng.multinomial(counts.sum(), counts.ravel() / counts.sum(), size=_N_BOOTSTRAP)
    return resampled.reshape(_N_BOOTSTRAP, *counts.shape)


def _mean_and_interval(values: Floats) -> Floats:
    """Stack the mean over the first axis and its 95 % Student interval (missing for one), shape (3, ...)."""
    n, mean = len(values), values.mean(axis=0)
    half = student.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return np.stack([mean, np.clip(mean - half, 0.0, 1.0), np.clip(mean + half, 0.0, 1.0)])


def _table(counts: Counts, overall: Floats, per_class: Floats, record: Mapping[str, Any]) -> pd.DataFrame:
    """Assemble the table; scores have value, lower and upper bound along their first axis."""
    n_tested = np.rint(counts.sum(axis=2).mean(axis=0)).astype(int)
    rows = [(metric, "all", *overall[:, i], n_tested.sum()) for i, metric in enumerate(_OVERALL)]
    rows += [
        (metric, label, *per_class[:, i, j], n_tested[j])
        for j, label in enumerate(record["classes"])
        for i, metric in enumerate(_PER_CLASS)
    ]
    table = pd.DataFrame(rows, columns=["metric", "label", "value", "ci_low", "ci_high", "n_cells"])
    table.insert(0, "probe", record["name"])
    table.attrs["probe"] = {**record, "confusion": counts.sum(axis=0).tolist()}
    return table
