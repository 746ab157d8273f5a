from __future__ import annotations

import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from genejepa.errors import ConfigError, DataError, MissingKeyError
from genejepa.evaluate import (
    _folds,
    few_shot_probe,
    knn_probe,
    linear_probe,
    predict,
    predict_few_shot,
    predict_knn,
    predict_linear,
)
from genejepa.evaluate._tables import bootstrap_counts, confusion, scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

ALL = [
    pytest.param(linear_probe, id="linear"),
    pytest.param(knn_probe, id="knn"),
    pytest.param(partial(few_shot_probe, n_draws=3), id="few_shot"),
]
COLUMNS = ["probe", "metric", "label", "value", "ci_low", "ci_high", "n_cells"]


def make_adata(*, n: int = 150, spread: float = 0.3, seed: int = 0) -> ad.AnnData:
    """Return three classes at three corners, in six donors."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % 3
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(["T", "B", "NK"])[codes], categories=["T", "B", "NK"]),
            "donor": rng.permutation(np.arange(n) % 6).astype(str),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    Z = np.eye(3, 4)[codes] + spread * rng.normal(size=(n, 4))
    return ad.AnnData(X=np.ones((n, 2), dtype=np.float32), obs=obs, obsm={"X_genejepa": Z.astype(np.float32)})


def value(table: pd.DataFrame, metric: str, label: str = "all") -> float:
    row = table[(table["metric"] == metric) & (table["label"] == label)]
    return float(row["value"].item())


@pytest.mark.parametrize("probe", ALL)
class TestTable:
    def test_layout(self, probe: Callable[..., pd.DataFrame]) -> None:
        table = probe(make_adata(), labels_key="cell_type")
        assert list(table.columns) == COLUMNS
        assert list(table["label"].unique()) == ["all", "T", "B", "NK"]
        assert list(table.loc[table["label"] == "all", "metric"]) == [
            "macro_f1",
            "balanced_accuracy",
            "accuracy",
        ]
        assert list(table.loc[table["label"] == "NK", "metric"]) == ["precision", "recall", "f1"]
        assert table["value"].between(table["ci_low"], table["ci_high"]).all()

    def test_record_is_json(self, probe: Callable[..., pd.DataFrame]) -> None:
        record = probe(make_adata(), labels_key="cell_type").attrs["probe"]
        assert json.loads(json.dumps(record)) == record
        assert record["classes"] == ["T", "B", "NK"]
        assert record["labels_key"] == "cell_type"
        assert record["use_rep"] == "X_genejepa"

    def test_same_seed_same_table(self, probe: Callable[..., pd.DataFrame]) -> None:
        adata = make_adata(spread=0.7)
        first, second = (probe(adata, labels_key="cell_type", seed=3) for _ in range(2))
        pd.testing.assert_frame_equal(first, second)
        assert first.attrs == second.attrs

    def test_leaves_adata_and_global_seed_alone(self, probe: Callable[..., pd.DataFrame]) -> None:
        adata = make_adata()
        before, state = adata.copy(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
        probe(adata, labels_key="cell_type", groups_key="donor")
        pd.testing.assert_frame_equal(adata.obs, before.obs)
        np.testing.assert_array_equal(adata.obsm["X_genejepa"], before.obsm["X_genejepa"])
        assert list(adata.uns) == []
        np.testing.assert_array_equal(state, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002

    def test_perfect_embedding_scores_one(self, probe: Callable[..., pd.DataFrame]) -> None:
        table = probe(make_adata(spread=1e-3), labels_key="cell_type")
        np.testing.assert_array_equal(table[["value", "ci_low", "ci_high"]], 1.0)

    def test_shuffled_labels_score_chance(self, probe: Callable[..., pd.DataFrame]) -> None:
        adata = make_adata(n=300)
        adata.obs["cell_type"] = np.random.default_rng(1).permutation(adata.obs["cell_type"].to_numpy())
        assert 0.2 < value(probe(adata, labels_key="cell_type"), "accuracy") < 0.45

    def test_small_classes_and_unlabelled_cells_are_left_out(self, probe: Callable[..., pd.DataFrame]) -> None:
        adata = make_adata()
        labels = adata.obs["cell_type"].astype(object)
        labels.iloc[:4] = "rare"
        labels.iloc[4:7] = np.nan
        adata.obs["cell_type"] = labels
        record = probe(adata, labels_key="cell_type").attrs["probe"]
        assert record["classes"] == ["B", "NK", "T"]
        assert record["dropped_classes"] == {"rare": 4}
        assert record["n_unlabelled"] == 3

    def test_missing_keys_are_named(self, probe: Callable[..., pd.DataFrame]) -> None:
        adata = make_adata()
        with pytest.raises(MissingKeyError, match=r"(?s)obs\['nope'\].*'donor'.*Fix:"):
            probe(adata, labels_key="nope")
        with pytest.raises(MissingKeyError, match=r"obsm\['X_pca'\].*'X_genejepa'"):
            probe(adata, labels_key="cell_type", use_rep="X_pca")
        with pytest.raises(MissingKeyError, match=r"obs\['lab'\]"):
            probe(adata, labels_key="cell_type", groups_key="lab")

    def test_unusable_content(self, probe: Callable[..., pd.DataFrame]) -> None:
        adata = make_adata()
        adata.obs["one"] = "same"
        with pytest.raises(DataError, match=r"1 usable classes"):
            probe(adata, labels_key="one")
        adata.obs["number"] = np.arange(adata.n_obs) / 7
        with pytest.raises(DataError, match=r"0 usable classes"):
            probe(adata, labels_key="number")
        adata.obs["donor"] = adata.obs["donor"].where(adata.obs["donor"] != "2")
        with pytest.raises(DataError, match=r"missing for 25 labelled cells"):
            probe(adata, labels_key="cell_type", groups_key="donor")
        adata.obsm["X_genejepa"][5, 1] = np.nan
        with pytest.raises(DataError, match=r"NaN or infinite values in 1 of 150 cells"):
            probe(adata, labels_key="cell_type")

    def test_class_of_one_group_is_left_out(self, probe: Callable[..., pd.DataFrame]) -> None:
        adata = make_adata()
        labels = adata.obs["cell_type"].astype(object)
        labels[(adata.obs["donor"] == "0").to_numpy()] = "private"
        adata.obs["cell_type"] = labels
        record = probe(adata, labels_key="cell_type", groups_key="donor").attrs["probe"]
        assert record["dropped_classes"] == {"private": 25}


def test_metrics_agree_with_scikit_learn() -> None:
    from sklearn import metrics

    rng = np.random.default_rng(0)
    true, predicted = rng.integers(4, size=(2, 200))
    overall, per_class = scores(confusion(true, predicted, 4)[None])
    expected = [
        metrics.f1_score(true, predicted, average="macro"),
        metrics.balanced_accuracy_score(true, predicted),
        metrics.accuracy_score(true, predicted),
    ]
    np.testing.assert_allclose(overall[0], expected)
    np.testing.assert_allclose(per_class[0], metrics.precision_recall_fscore_support(true, predicted)[:3], rtol=1e-12)


def test_bootstrap_is_fast_and_has_the_right_width() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(10, size=4000)
    predicted = np.where(rng.random(4000) < 0.8, true, rng.integers(10, size=4000))
    start = time.perf_counter()
    counts = bootstrap_counts(confusion(true, predicted, 10), seed=0)
    overall, _ = scores(counts)
    assert time.perf_counter() - start < 1.0
    accuracy = (true == predicted).mean()
    assert overall[:, 2].std() == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 4000), rel=0.1)


def test_predictions_keep_the_type_of_labels() -> None:
    adata = make_adata()
    Z, labels = adata.obsm["X_genejepa"], adata.obs["cell_type"].astype(str).to_numpy()
    for predicted in (predict_linear(Z, labels), predict_knn(Z, labels)):
        assert predicted.shape == labels.shape
        assert set(predicted) <= set(labels)


def test_folds_keep_groups_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[NDArray[Any] | None, Any]] = []
    original = _folds._split

    def spy(codes: Any, groups: Any, **kwargs: Any) -> Any:
        folds = original(codes, groups, **kwargs)
        calls.append((groups, folds))
        return folds

    monkeypatch.setattr(_folds, "_split", spy)
    linear_probe(make_adata(), labels_key="cell_type", groups_key="donor", n_splits=3)
    assert len(calls) == 4
    for groups, folds in calls:
        assert groups is not None
        for train, test in folds:
            assert not set(groups[train]) & set(groups[test])


def test_groups_expose_a_donor_effect() -> None:
    # Each donor has a class of its own making: only donors, not classes, can be told apart.
    rng = np.random.default_rng(0)
    donor = np.arange(240) % 8
    adata = ad.AnnData(
        obs=pd.DataFrame(
            {"type": np.where(donor < 4, "A", "B"), "donor": donor.astype(str)},
            index=[f"c{i}" for i in range(240)],
        ),
        obsm={"X_genejepa": rng.normal(size=(8, 20))[donor] * 5 + rng.normal(size=(240, 20))},
    )
    assert value(linear_probe(adata, labels_key="type"), "accuracy") > 0.95
    grouped = linear_probe(adata, labels_key="type", groups_key="donor", n_splits=4)
    assert value(grouped, "accuracy") < 0.85


def test_two_donors_are_enough() -> None:
    adata = make_adata()
    adata.obs["donor"] = np.where(np.arange(adata.n_obs) < 75, "a", "b")
    table = linear_probe(adata, labels_key="cell_type", groups_key="donor", n_splits=2)
    assert value(table, "accuracy") > 0.8


def test_too_few_groups() -> None:
    adata = make_adata()
    with pytest.raises(DataError, match=r"6 groups.*at least n_splits=7"):
        linear_probe(adata, labels_key="cell_type", groups_key="donor", n_splits=7)


def test_scaler_sees_the_training_fold_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NDArray[Any]] = []
    original = predict._fit_logistic

    def spy(Z: Any, codes: Any, folds: Any) -> Any:
        seen.append(Z)
        return original(Z, codes, folds)

    monkeypatch.setattr(predict, "_fit_logistic", spy)
    adata = make_adata()
    adata.obsm["X_genejepa"][0, 0] = 1e3
    linear_probe(adata, labels_key="cell_type")
    for Z in seen:
        np.testing.assert_allclose(Z.mean(axis=0), 0, atol=1e-9)
        np.testing.assert_allclose(Z.std(axis=0), 1, rtol=1e-9)


def test_constant_dimension_is_harmless() -> None:
    adata = make_adata()
    adata.obsm["X_genejepa"][:, 3] = 0.1
    assert value(linear_probe(adata, labels_key="cell_type"), "accuracy") > 0.9


def test_knn_uses_the_embedding_as_it_is() -> None:
    adata = make_adata()
    noise = 100 * np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    adata.obsm["X_genejepa"] = np.hstack([adata.obsm["X_genejepa"], noise])
    assert value(knn_probe(adata, labels_key="cell_type"), "accuracy") < 0.6
    with pytest.raises(DataError, match="n_neighbors=500"):
        knn_probe(adata, labels_key="cell_type", n_neighbors=500)


class TestFewShot:
    def test_draws(self) -> None:
        adata = make_adata()
        Z, labels = adata.obsm["X_genejepa"], adata.obs["cell_type"].astype(str).to_numpy()
        draws = predict_few_shot(Z, labels, n_per_class=4, n_draws=3)
        assert len(draws) == 3
        for train, test, predicted in draws:
            assert not set(train) & set(test)
            assert len(train) + len(test) == len(labels)
            assert set(np.unique(labels[train], return_counts=True)[1]) == {4}
            assert predicted.shape == test.shape

    def test_draw_does_not_depend_on_the_number_of_draws(self) -> None:
        adata = make_adata()
        Z, labels = adata.obsm["X_genejepa"], adata.obs["cell_type"].astype(str).to_numpy()
        few, many = (predict_few_shot(Z, labels, n_draws=n, seed=7) for n in (2, 4))
        for a, b in zip(few, many[:2], strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
        assert (many[0].train != many[1].train).any()

    def test_groups_are_not_shared(self) -> None:
        adata = make_adata()
        Z, labels = adata.obsm["X_genejepa"], adata.obs["cell_type"].astype(str).to_numpy()
        donors = adata.obs["donor"].to_numpy()
        for draw in predict_few_shot(Z, labels, groups=donors, n_draws=5):
            assert not set(donors[draw.train]) & set(donors[draw.test])

    def test_impossible_groups(self) -> None:
        with pytest.raises(DataError, match="No half of the 6 groups"):
            few_shot_probe(make_adata(), labels_key="cell_type", groups_key="donor", n_per_class=40, min_class_size=41)

    @pytest.mark.parametrize("n_per_class", [1, 2])
    def test_very_few_labels(self, n_per_class: int) -> None:
        table = few_shot_probe(make_adata(spread=0.1), labels_key="cell_type", n_per_class=n_per_class, n_draws=3)
        assert value(table, "accuracy") > 0.9

    def test_single_draw_has_no_interval(self) -> None:
        table = few_shot_probe(make_adata(), labels_key="cell_type", n_draws=1)
        assert table["ci_low"].isna().all()
        assert table["value"].notna().all()

    def test_class_size_must_exceed_labelled_cells(self) -> None:
        with pytest.raises(ConfigError, match="min_class_size"):
            few_shot_probe(make_adata(), labels_key="cell_type", n_per_class=10)


def test_numbers_out_of_range() -> None:
    adata = make_adata()
    with pytest.raises(ConfigError, match="n_splits"):
        linear_probe(adata, labels_key="cell_type", n_splits=1)
    with pytest.raises(ConfigError, match="min_class_size"):
        knn_probe(adata, labels_key="cell_type", n_splits=5, min_class_size=4)


def test_arrays_must_fit() -> None:
    with pytest.raises(DataError, match=r"`labels` has shape \(3,\)"):
        predict_linear(np.zeros((4, 2)), ["a", "b", "a"])
    with pytest.raises(DataError, match="1 class"):
        predict_knn(np.zeros((4, 2)), ["a"] * 4)
    with pytest.raises(DataError, match="smallest class has 2 cells"):
        predict_linear(np.zeros((4, 2)), ["a", "a", "b", "b"])


class TestViews:
    """One model per fold serves the embedding and other views of the same cells."""

    def test_the_embedding_as_a_view_is_the_probe_itself(self) -> None:
        adata = make_adata(spread=0.7)
        Z, labels = adata.obsm["X_genejepa"], adata.obs["cell_type"]
        shifted = Z + 5.0
        found = predict.predict_linear_views(Z, {"same": Z, "shifted": shifted}, labels, groups=adata.obs["donor"])
        np.testing.assert_array_equal(found["same"], predict_linear(Z, labels, groups=adata.obs["donor"]))
        assert np.mean(found["shifted"] == labels) < np.mean(found["same"] == labels)

    def test_other_cells_or_dimensions_are_refused(self) -> None:
        adata = make_adata()
        Z, labels = adata.obsm["X_genejepa"], adata.obs["cell_type"]
        for view in (Z[1:], Z[:, 1:]):
            with pytest.raises(DataError, match=r"'worse' has shape .*expected \(150, 4\)"):
                predict.predict_linear_views(Z, {"worse": view}, labels)
