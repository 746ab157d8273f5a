"""Scores of runs whose right answer is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from genejepa.bench import integration
from genejepa.bench.run import Run
from genejepa.bench.tasks import TASKS, score
from genejepa.errors import ConfigError, DataError, MissingKeyError
from genejepa.evaluate import linear_probe

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

N_CLASSES = 4
PROBES = ["linear", "knn", "few_shot"]
CHANCE = pytest.approx(1 / N_CLASSES, abs=0.08)
"""Macro-F1 of a guess: four standard errors of an accuracy over 400 cells are 0.087."""


def make_run(Z: NDArray[Any], *, held_out: NDArray[np.bool_] | None = None, **views: NDArray[Any]) -> Run:
    named = {"full": Z, **{name.replace("_", " ", 1).replace("_", "."): view for name, view in views.items()}}
    arrays = {name: np.asarray(view, dtype=np.float32) for name, view in named.items()}
    return Run("method", 0, arrays, 1.0, 1.0, 1.0, None, held_out)


def make_obs(n: int = 400) -> pd.DataFrame:
    """Four classes of equal size in two batches."""
    cells = np.arange(n)
    obs = {"type": pd.Categorical(np.array(list("ABCD"))[cells % N_CLASSES]), "batch": cells // N_CLASSES % 2}
    return pd.DataFrame(obs, index=[f"cell{i}" for i in cells])


def one_hot(obs: pd.DataFrame) -> NDArray[np.float64]:
    return np.eye(N_CLASSES)[obs["type"].cat.codes]


def noise(n: int = 400, dim: int = 6, *, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(n, dim))


def values(table: pd.DataFrame, task: str, metric: str = "macro_f1") -> dict[str, float]:
    """Scores of a task by setting."""
    rows = table[(table["task"] == task) & (table["metric"] == metric)]
    assert rows["setting"].is_unique
    return dict(zip(rows["setting"], rows["value"], strict=True))


class TestSeededErrors:
    """An embedding without the answer scores chance, and one with the answer scores 1."""

    def test_shuffled_labels_score_chance(self) -> None:
        obs = make_obs()
        Z = one_hot(obs) + 0.1 * noise(dim=N_CLASSES)
        obs["type"] = np.random.default_rng(1).permutation(obs["type"].to_numpy())
        table = score(make_run(Z), obs, labels_key="type", tasks=PROBES)
        assert {task: list(values(table, task).values()) for task in PROBES} == {
            "linear": [CHANCE],
            "knn": [CHANCE],
            "few_shot": [CHANCE] * 4,
        }

    def test_noise_scores_chance(self) -> None:
        table = score(make_run(noise()), make_obs(), labels_key="type", tasks=PROBES)
        assert {task: list(values(table, task).values()) for task in PROBES} == {
            "linear": [CHANCE],
            "knn": [CHANCE],
            "few_shot": [CHANCE] * 4,
        }

    def test_label_in_the_embedding_scores_one(self) -> None:
        obs = make_obs()
        Z = one_hot(obs) + 1e-3 * noise(dim=N_CLASSES)
        run = make_run(Z, depth_0_5=Z, genes_0_2=Z)
        table = score(run, obs, labels_key="type", batch_key="batch", tasks=[*PROBES, "depth", "genes", "transfer"])
        assert set(table["task"]) == {*PROBES, "depth", "genes", "transfer"}
        np.testing.assert_array_equal(table["value"], 1.0)

    def test_held_out_cells(self) -> None:
        obs = make_obs()
        held_out = np.arange(400) % 5 == 0
        right, wrong = one_hot(obs) + 1e-3 * noise(dim=N_CLASSES), noise()
        good, bad = (score(make_run(Z, held_out=held_out), obs, labels_key="type") for Z in (right, wrong))
        assert set(good["task"]) == set(PROBES)
        assert set(good["n_cells"]) == {80}
        np.testing.assert_array_equal(good["value"], 1.0)
        assert all(values(bad, task).popitem()[1] < 0.45 for task in PROBES)  # four standard errors over 80 cells

    @pytest.mark.slow
    def test_clustering(self) -> None:
        obs = make_obs()
        right, wrong = (
            score(make_run(Z), obs, labels_key="type", tasks=["clustering"])
            for Z in (one_hot(obs) + 1e-3 * noise(dim=N_CLASSES), noise())
        )
        assert values(right, "clustering", "ari") == {"kmeans": 1.0, "leiden": pytest.approx(1.0, abs=0.5)}
        assert values(right, "clustering", "nmi")["kmeans"] == pytest.approx(1.0)
        assert values(wrong, "clustering", "ari") == pytest.approx({"kmeans": 0.0, "leiden": 0.0}, abs=0.03)

    @pytest.mark.slow
    def test_collapsed_embedding_is_scored(self) -> None:
        tasks = ["linear", "knn", "few_shot", "clustering", "leak"]
        depth = np.arange(400, dtype=np.float32)
        table = score(make_run(np.ones((400, 3))), make_obs(), labels_key="type", tasks=tasks, depth=depth)
        assert list(table["task"].unique()) == tasks
        assert values(table, "clustering", "ari") == pytest.approx({"kmeans": 0.0, "leiden": 0.0}, abs=0.03)
        assert table.loc[table["metric"] == "balanced_accuracy", "value"].max() < 0.35


class TestViews:
    def test_garbage_view_scores_chance_and_the_full_one_stays_right(self) -> None:
        obs = make_obs()
        Z = one_hot(obs) + 1e-3 * noise(dim=N_CLASSES)
        run = make_run(Z, depth_0_1=noise(dim=N_CLASSES), depth_0_5=Z, genes_0_2=noise(dim=N_CLASSES, seed=1))
        table = score(run, obs, labels_key="type", tasks=["linear", "depth", "genes"])
        assert values(table, "linear") == {"all": 1.0}
        assert values(table, "depth") == {"0.5": 1.0, "0.1": CHANCE}
        assert values(table, "genes") == {"0.2": CHANCE}

    def test_held_out_view(self) -> None:
        obs = make_obs()
        held_out = np.arange(400) % 5 == 0
        Z = one_hot(obs) + 1e-3 * noise(dim=N_CLASSES)
        view = np.where(held_out[:, None], noise(dim=N_CLASSES), Z)
        table = score(make_run(Z, held_out=held_out, depth_0_5=view), obs, labels_key="type")
        assert values(table, "linear") == {"all": 1.0}
        assert values(table, "depth")["0.5"] < 0.5

    def test_model_never_saw_the_cell_it_predicts(self) -> None:
        obs = make_obs(120)
        obs["type"] = np.random.default_rng(1).permutation(obs["type"].to_numpy())
        Z = np.eye(120)  # a cell is recognised if and only if it was fitted on
        table = score(make_run(Z, depth_0_5=Z), obs, labels_key="type", tasks=["linear", "depth"])
        assert values(table, "depth")["0.5"] == values(table, "linear")["all"] < 0.5

    def test_other_space_is_refused(self) -> None:
        run = make_run(noise(dim=6), depth_0_5=noise(dim=5))
        with pytest.raises(DataError, match=r"'depth 0.5'.*\(400, 5\).*\(400, 6\)"):
            score(run, make_obs(), labels_key="type", tasks=["depth"])


class TestProbes:
    def test_same_scores_as_the_public_probe(self, adata: Any) -> None:
        Z = np.eye(3)[adata.obs["cell_type"].cat.codes] + 0.6 * noise(60, 3)
        adata.obsm["Z"] = Z.astype(np.float32)
        expected = linear_probe(adata, labels_key="cell_type", use_rep="Z", seed=3)
        table = score(make_run(Z), adata.obs, labels_key="cell_type", tasks=["linear"], seed=3)
        columns = ["metric", "value", "ci_low", "ci_high", "n_cells"]
        assert 0.3 < values(table, "linear")["all"] < 0.99
        pd.testing.assert_frame_equal(table[columns], expected.loc[expected["label"] == "all", columns])

    def test_unlabelled_cells_and_small_classes_are_left_out(self) -> None:
        obs = make_obs(200)
        labels = obs["type"].astype(object)
        labels.iloc[:20:4] = None
        labels.iloc[1:37:4] = "rare"
        obs["type"] = labels
        Z = one_hot(make_obs(200)) + 1e-3 * noise(200, N_CLASSES)
        table = score(make_run(Z), obs, labels_key="type", tasks=PROBES)
        assert set(table.loc[table["task"] != "few_shot", "n_cells"]) == {200 - 5 - 9}
        few = table[(table["task"] == "few_shot") & (table["metric"] == "macro_f1")].set_index("setting")["n_cells"]
        assert few.to_dict() == {"1": 182, "5": 166, "10": 146}  # no class has more than 50 cells

    def test_class_without_enough_cells_on_one_side(self) -> None:
        obs = make_obs(200)
        held_out = np.arange(200) % 5 == 0
        held_out[np.flatnonzero(obs["type"] == "A")] = np.arange(50) < 2
        held_out[np.flatnonzero(obs["type"] == "B")] = np.arange(50) < 41
        table = score(make_run(one_hot(obs), held_out=held_out), obs, labels_key="type", tasks=["linear"])
        assert set(table["n_cells"]) == {int(held_out[obs["type"].isin(["C", "D"])].sum())}


class TestBatches:
    def test_transfer_is_worse_across_a_shift(self) -> None:
        obs = make_obs()
        aligned = one_hot(obs) + 0.1 * noise(dim=N_CLASSES)
        shifted = aligned + np.outer(obs["batch"], [0.0, 1.0, 2.0, 3.0])
        good, bad = (
            score(make_run(Z), obs, labels_key="type", batch_key="batch", tasks=["transfer"])
            for Z in (aligned, shifted)
        )
        assert list(values(good, "transfer")) == ["0", "1", "mean"]
        assert min(values(good, "transfer").values()) > 0.95
        assert max(values(bad, "transfer").values()) < 0.6
        assert values(bad, "transfer")["mean"] == pytest.approx(np.mean(bad["value"][:2]))
        assert good["ci_low"].isna().tolist() == [False, False, True]

    def test_transfer_leaves_out_classes_of_one_side(self) -> None:
        obs = make_obs()
        obs["batch"] = np.where(obs["type"] == "A", 0, obs["batch"])
        table = score(make_run(one_hot(obs)), obs, labels_key="type", batch_key="batch", tasks=["transfer"])
        assert dict(zip(table["setting"], table["n_cells"], strict=True)) == {"0": 150, "1": 150, "mean": 300}
        np.testing.assert_array_equal(table["value"], 1.0)

    def test_leaks(self) -> None:
        obs = make_obs()
        depth = np.exp(noise()[:, 0] + 8.0).astype(np.float32)
        leaky = np.stack([np.log(depth), obs["batch"], noise(seed=1)[:, 0]], axis=1)
        tight = noise(seed=2)
        tables = [
            score(make_run(Z), obs, labels_key="type", batch_key="batch", tasks=["leak"], depth=depth)
            for Z in (leaky, tight)
        ]
        assert [values(table, "leak", "r2")["depth"] for table in tables] == pytest.approx([1.0, 0.0], abs=0.05)
        found = [values(table, "leak", "balanced_accuracy")["batch"] for table in tables]
        assert found == [1.0, pytest.approx(0.5, abs=0.1)]
        assert all(len(table) == 2 for table in tables)

    @pytest.mark.slow
    def test_integration_prefers_mixed_batches(
        self, global_rng_untouched: Callable[[], AbstractContextManager[None]]
    ) -> None:
        obs = make_obs(200)
        mixed = one_hot(obs) + 0.1 * noise(200, N_CLASSES)
        apart = mixed + 3 * obs["batch"].to_numpy()[:, None]
        before = obs.copy()
        with global_rng_untouched():
            good, bad = (
                score(
                    make_run(Z),
                    obs,
                    labels_key="type",
                    batch_key="batch",
                    tasks=["integration"],
                    reference=apart.astype(np.float32),
                )
                for Z in (mixed, apart)
            )
        pd.testing.assert_frame_equal(obs, before)
        mixing, parting = (dict(zip(table["metric"], table["value"], strict=True)) for table in (good, bad))
        assert {"total", "bio_conservation", "batch_correction", "kbet", "ilisi", "pcr_comparison"} <= set(mixing)
        assert mixing["total"] > parting["total"] + 0.2
        assert mixing["batch_correction"] > parting["batch_correction"] + 0.3
        assert mixing["total"] == pytest.approx(0.6 * mixing["bio_conservation"] + 0.4 * mixing["batch_correction"])

    @pytest.mark.slow
    def test_neighbors_begin_with_the_cell_itself(self) -> None:
        Z = (noise(100) + 1e3).astype(np.float32)  # far from the origin, where distances round
        found = integration._neighbors(Z, 20)
        np.testing.assert_array_equal(found.indices[:, 0], np.arange(100))
        np.testing.assert_array_equal(found.distances[:, 0], 0.0)
        assert found.indices.shape == found.distances.shape == (100, 20)

    def test_integration_needs_a_reference(self) -> None:
        with pytest.raises(ConfigError, match=r"`reference` is None"):
            score(make_run(noise()), make_obs(), labels_key="type", batch_key="batch", tasks=["integration"])


class TestTable:
    def test_tasks_that_do_not_apply_are_left_out(self) -> None:
        obs = make_obs()
        tasks = set(TASKS) - {"clustering", "few_shot"}
        run = make_run(one_hot(obs))
        table = score(run, obs, labels_key="type", tasks=tasks)
        assert list(table.columns) == ["task", "setting", "metric", "value", "ci_low", "ci_high", "n_cells"]
        assert list(table["task"].unique()) == ["linear", "knn"]
        obs["batch"] = "only"
        one_batch = score(run, obs, labels_key="type", batch_key="batch", tasks=tasks)
        pd.testing.assert_frame_equal(one_batch, table)

    def test_same_seed_same_table(self, global_rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
        obs, run = make_obs(), make_run(one_hot(make_obs()) + noise(dim=N_CLASSES))
        with global_rng_untouched():
            first, second, other = (
                score(run, obs, labels_key="type", tasks=["linear", "knn"], seed=seed) for seed in (1, 1, 2)
            )
        pd.testing.assert_frame_equal(first, second)
        assert not first["value"].equals(other["value"])
        inside = first["value"].between(first["ci_low"], first["ci_high"])
        assert inside.all()

    def test_bad_arguments(self) -> None:
        run, obs = make_run(noise()), make_obs()
        with pytest.raises(ConfigError, match=r"'umap', expected some of 'linear'"):
            score(run, obs, labels_key="type", tasks=["umap"])
        with pytest.raises(MissingKeyError, match=r"obs\['kind'\].*'type'"):
            score(run, obs, labels_key="kind")
        with pytest.raises(DataError, match=r"'full' has 400 rows, expected 399"):
            score(run, obs[1:], labels_key="type")
        with pytest.raises(DataError, match=r"0 usable classes"):
            score(run, obs.assign(type=np.arange(400)), labels_key="type")
