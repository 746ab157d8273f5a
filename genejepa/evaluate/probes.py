"""Probes: scores of simple classifiers on a frozen embedding, on cells that they were not fitted on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genejepa._constants import OBSM_KEY
from genejepa.config import at_least
from genejepa.evaluate._input import read_cells
from genejepa.evaluate._tables import cross_validated_table, few_shot_table
from genejepa.evaluate.predict import predict_few_shot, predict_knn, predict_linear

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["few_shot_probe", "knn_probe", "linear_probe"]


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
    """Score a cross-validated logistic regression from an embedding to labels (Alain & Bengio 2016).

    Every cell is predicted once, by a multinomial logistic regression that was fitted on the other folds.
    Dimensions are standardised with the mean and deviation of the training fold. The L2 penalty is chosen
    among `C_GRID` inside the training fold, by the macro-averaged F1 of a threefold cross-validation.

    Parameters
    ----------
    adata
        Annotated data; it is not changed.
    labels_key
        Column of ``obs`` with the classes. Cells without a label are left out.
    use_rep
        Key of ``obsm`` with the embedding, shape (n_cells, dim).
    groups_key
        Column of ``obs``, such as the donor, whose levels are kept within one fold, in the outer and in the
        inner cross-validation. If a training fold has a single group, its inner folds are ordinary ones.
    n_splits, seed
        Number of folds, at least 2, and seed of the folds and of the bootstrap.
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
    MissingKeyError, DataError, ConfigError
        If a key does not exist; if the embedding is not finite, or the cells cannot be split as asked, or the
        logistic regression does not converge; if a number is out of range.

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
    smallest = at_least("min_class_size", min_class_size, n_splits)
    Z, codes, groups, record = read_cells(adata, labels_key, use_rep, groups_key, min_class_size=smallest)
    settings = {"n_splits": n_splits, "seed": seed}
    predicted = predict_linear(Z, codes, groups=groups, **settings)
    return cross_validated_table(codes, predicted, seed=seed, record={"name": "linear", **record, **settings})


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
    """Score a cross-validated nearest-neighbour vote on an embedding (Cover & Hart 1967).

    Every cell takes the commonest label among its `n_neighbors` nearest cells of the other folds, by
    Euclidean distance in the embedding as it is, without any scaling. This tells whether cells of a class lie
    together. Other parameters, the table and the errors are those of `linear_probe`.
    """
    smallest = at_least("min_class_size", min_class_size, n_splits)
    Z, codes, groups, record = read_cells(adata, labels_key, use_rep, groups_key, min_class_size=smallest)
    settings = {"n_splits": n_splits, "seed": seed, "n_neighbors": n_neighbors}
    predicted = predict_knn(Z, codes, groups=groups, **settings)
    return cross_validated_table(codes, predicted, seed=seed, record={"name": "knn", **record, **settings})


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
    dimension, estimated from so few cells, would be mostly noise. Parameters and errors are those of
    `linear_probe`, except:

    Parameters
    ----------
    groups_key
        Labelled cells come from a random half of its levels, and only cells of the other half are tested. The
        inner folds do not regard groups, as so few labelled cells cannot be split by group.
    n_per_class, n_draws, seed
        Labelled cells per class (less than `min_class_size`), number of draws, and their seed: draw ``i``
        depends on ``(seed, i)`` only.

    Returns
    -------
    pandas.DataFrame
        ``value`` is the mean over draws, with its 95 % Student interval cut to [0, 1] (missing for a single
        draw); ``n_cells`` is the rounded mean number of tested cells; confusion counts are summed over draws.
    """
    smallest = at_least("min_class_size", min_class_size, n_per_class + 1)
    Z, codes, groups, record = read_cells(adata, labels_key, use_rep, groups_key, min_class_size=smallest)
    settings = {"n_per_class": n_per_class, "n_draws": n_draws, "seed": seed}
    draws = predict_few_shot(Z, codes, groups=groups, **settings)
    return few_shot_table(codes, draws, record={"name": "few_shot", **record, **settings})
