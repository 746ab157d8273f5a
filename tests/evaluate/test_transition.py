from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.sparse import csr_matrix

from genejepa.errors import ConfigError, DataError, GeneJEPAError, GeneMismatchError, MissingKeyError
from genejepa.evaluate import energy_distance, mmd, transition, wasserstein
from genejepa.evaluate._transition import _rank_sum, _welch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

COLUMNS = [
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
DISTANCES = ["energy_distance", "mmd", "wasserstein"]
N_GENES = 30
GENES = [f"G{i}" for i in range(N_GENES)]
RNG = np.random.default_rng(7)
BASE = RNG.uniform(1, 3, N_GENES)
EFFECT = {name: RNG.normal(0, 1, N_GENES) * (RNG.random(N_GENES) < 0.5) for name in "ABC"}
GROUP = {name: RNG.normal(0, 0.5, N_GENES) for name in ("u", "v", "w")}

by_action = partial(transition, action_key="action", control="ctrl")
by_group = partial(by_action, group_key="group")
by_time = partial(transition, time_key="time")


def draw(mean: NDArray[np.float64], n: int = 40, seed: int = 0, **obs: Any) -> ad.AnnData:
    """Return Gaussian cells with exactly the given mean."""
    X = 0.3 * np.random.default_rng(seed).normal(size=(n, len(mean)))
    names = [f"{'-'.join(map(str, obs.values()))}-{seed}-{i}" for i in range(n)]
    return ad.AnnData(
        X - X.mean(0) + mean,
        obs=pd.DataFrame({key: [value] * n for key, value in obs.items()}, index=names),
        var=pd.DataFrame(index=GENES[: len(mean)]),
    )


def population(group: str, action: str, seed: int = 0, n: int = 40) -> ad.AnnData:
    """Return cells in which the changes by actions add up, and are the same in all groups."""
    change = sum((EFFECT[part] for part in action.split("+") if part != "ctrl"), np.zeros(N_GENES))
    return draw(BASE + GROUP[group] + change, n, seed, group=group, action=action)


def rows(table: pd.DataFrame) -> dict[Any, dict[Any, Any]]:
    return table.to_dict(orient="index")


def at_time(time: float, mean: NDArray[np.float64], seed: int = 0) -> ad.AnnData:
    return draw(mean, 40, seed, time=time)


@pytest.fixture(scope="module")
def training() -> ad.AnnData:
    seen = [("u", "ctrl"), ("u", "A"), ("u", "B"), ("v", "ctrl"), ("v", "A"), ("v", "C"), ("w", "ctrl"), ("w", "B")]
    return ad.concat([population(*pair, seed=i) for i, pair in enumerate(seen)])


@pytest.fixture(scope="module")
def observed() -> ad.AnnData:
    return population("w", "A", seed=50)


@pytest.fixture(scope="module")
def table(training: ad.AnnData, observed: ad.AnnData) -> pd.DataFrame:
    return by_group(population("w", "A", seed=51), observed, training)


class TestTable:
    def test_layout(self, table: pd.DataFrame) -> None:
        assert list(table.columns) == COLUMNS
        assert list(table.index) == ["model", "no change", "mean shift", "additive", "linear", "nearest", "ceiling"]
        assert set(table.dtypes) == {np.dtype(float)}
        assert table.drop(index="additive").notna().all(axis=None)
        assert table.loc["additive"].isna().all()

    def test_record(self, table: pd.DataFrame) -> None:
        record = table.attrs["transition"]
        assert json.loads(json.dumps(record)) == record
        sizes = {key: record[key] for key in ("n_predicted", "n_observed", "n_source", "n_training", "n_components")}
        assert sizes == {"n_predicted": 40, "n_observed": 40, "n_source": 40, "n_training": 320, "n_components": 29}

    def test_the_right_population_is_as_good_as_the_ceiling(self, table: pd.DataFrame) -> None:
        model, ceiling = (rows(table)[name] for name in ("model", "ceiling"))
        assert model["delta_pearson"] == pytest.approx(1)
        assert model["weighted_mse"] == pytest.approx(0, abs=1e-12)
        assert model["weighted_r2"] == pytest.approx(1)
        assert model["discrimination"] == 1
        assert ceiling["delta_pearson"] > 0.95
        assert max(abs(model[name] - ceiling[name]) for name in DISTANCES[:2]) < 0.1
        assert model["wasserstein"] == pytest.approx(ceiling["wasserstein"], rel=0.1)

    def test_no_change_scores_nothing(self, table: pd.DataFrame) -> None:
        row = rows(table)["no change"]
        assert row["delta_pearson"] == row["delta_pearson_top"] == row["de_overlap"] == 0
        for name in DISTANCES:
            assert row[name] == table[name].max()
        assert row["weighted_r2"] < 0

    @pytest.mark.parametrize("name", ["mean shift", "linear", "nearest"])
    def test_baselines_find_a_change_that_is_the_same_in_all_groups(self, table: pd.DataFrame, name: str) -> None:
        assert rows(table)[name]["delta_pearson"] > 0.99
        assert rows(table)[name]["weighted_r2"] > 0.95

    def test_same_seed_same_table(self, table: pd.DataFrame, training: ad.AnnData, observed: ad.AnnData) -> None:
        again = partial(by_group, population("w", "A", seed=51), observed, training)
        pd.testing.assert_frame_equal(again(), table)
        assert rows(again(seed=1))["ceiling"] != rows(table)["ceiling"]

    def test_order_of_genes_and_kind_of_matrix_do_not_matter(
        self, table: pd.DataFrame, training: ad.AnnData, observed: ad.AnnData
    ) -> None:
        turned = population("w", "A", seed=51)[:, GENES[::-1]].copy()
        mixed = observed[:, np.random.default_rng(0).permutation(GENES)].copy()
        sparse = training.copy()
        sparse.X = csr_matrix(sparse.X)
        pd.testing.assert_frame_equal(by_group(turned, mixed, sparse), table, rtol=1e-5, atol=1e-7)

    def test_nothing_is_changed(self, training: ad.AnnData, observed: ad.AnnData) -> None:
        given = [population("w", "A", seed=51), observed.copy(), training.copy()]
        kept = [adata.copy() for adata in given]
        by_group(*given)
        for adata, before in zip(given, kept, strict=True):
            assert np.array_equal(adata.X, before.X)
            pd.testing.assert_frame_equal(adata.obs, before.obs)
            assert list(adata.var_names) == list(before.var_names)
            assert not adata.uns


class TestScores:
    """Against formulas written down again, or known answers."""

    def test_changes_and_weights(self, training: ad.AnnData, observed: ad.AnnData) -> None:
        predicted = draw(BASE + GROUP["w"] + 0.5 * EFFECT["A"] + 0.2 * EFFECT["B"], 30)
        found = rows(by_group(predicted, observed, training, n_top=5))["model"]
        source = training[(training.obs["group"] == "w") & (training.obs["action"] == "ctrl")].X
        t = np.abs(stats.ttest_ind(observed.X, source, equal_var=False).statistic)
        top = np.argsort(-t)[:5]
        true, guess = observed.X.mean(0) - source.mean(0), predicted.X.mean(0) - source.mean(0)
        weights = ((t - t.min()) / (t.max() - t.min())) ** 2
        reference = np.mean([EFFECT[name] for name in "ABACB"], axis=0)  # of all five pairs in training
        mean = np.average(true - reference, weights=weights)
        rest = np.average((true - guess) ** 2, weights=weights)
        total = np.average((true - reference - mean) ** 2, weights=weights)
        assert found["delta_pearson"] == pytest.approx(np.corrcoef(true, guess)[0, 1])
        assert found["delta_pearson_top"] == pytest.approx(np.corrcoef(true[top], guess[top])[0, 1])
        assert found["weighted_mse"] == pytest.approx(rest)
        assert found["weighted_r2"] == pytest.approx(1 - rest / total)

    def test_the_mean_of_all_changes_explains_nothing(self, training: ad.AnnData, observed: ad.AnnData) -> None:
        mean = np.mean([EFFECT[name] for name in "ABACB"], axis=0)
        found = rows(by_group(draw(BASE + GROUP["w"] + mean), observed, training))["model"]
        assert found["weighted_r2"] <= 0
        assert found["delta_pearson"] > 0.3

    @pytest.mark.parametrize(("share", "rank"), [(0.0, 0), (0.4, 0), (0.6, 1), (1.0, 1)])
    def test_discrimination(self, observed: ad.AnnData, share: float, rank: int) -> None:
        """On the way from A to B, with C far away: the nearest of three, or the second."""
        far = draw(BASE + GROUP["v"] + 50, group="v", action="C")
        seen = ad.concat([*(population(*pair) for pair in (("v", "ctrl"), ("w", "ctrl"), ("w", "B"))), far])
        guess = draw(BASE + GROUP["w"] + (1 - share) * EFFECT["A"] + share * EFFECT["B"])
        found = rows(by_group(guess, observed, seen))["model"]
        assert found["discrimination"] == pytest.approx(1 - rank / 3)

    def test_discrimination_leaves_out_the_named_gene(self) -> None:
        """The prediction of G0 is right in that gene alone, where the change is large; elsewhere it is that of G1."""
        change = {name: np.zeros(N_GENES) for name in ("G0", "G1")}
        change["G0"][[0, 5]] = -9, 1
        change["G1"][[1, 6]] = -1, 1
        seen = ad.concat([draw(BASE, action="ctrl"), draw(BASE + change["G1"], action="G1")])
        guess = draw(BASE + np.where(np.arange(N_GENES) == 0, change["G0"], change["G1"]))
        found = by_action(guess, draw(BASE + change["G0"], action="G0"), seen)
        assert rows(found)["model"]["discrimination"] == 0.5

    def test_the_ceiling_is_one_half_against_the_other(self, training: ad.AnnData) -> None:
        """All cells together have exactly the mean of the source, so the changes of the halves are opposite."""
        truth = with_obs(population("w", "ctrl", seed=50), action="A")
        found = rows(by_group(truth, truth, training))
        assert found["ceiling"]["delta_pearson"] == pytest.approx(-1)
        assert np.isnan(found["model"]["delta_pearson"])

    def test_wasserstein_does_not_reward_more_predicted_cells(self, training: ad.AnnData) -> None:
        guess, found = population("w", "A", n=400), []
        for seed in range(8):
            found.append(rows(by_group(guess, population("w", "A", seed=50, n=12), training, seed=seed)))
        model, ceiling = (np.mean([each[name]["wasserstein"] for each in found]) for name in ("model", "ceiling"))
        assert model == pytest.approx(ceiling, rel=0.05)

    def test_larger_populations_are_drawn(self) -> None:
        """More cells than are drawn: means are still of all, and the same cells are drawn in every call."""
        seen = ad.concat([draw(BASE, 1100, action="ctrl"), draw(BASE + EFFECT["B"], seed=1, action="B")])
        truth = draw(BASE + EFFECT["A"], 600, seed=2, action="A")
        guess = draw(BASE + EFFECT["A"], 1200, seed=3)
        found = rows(by_action(guess, truth, seen, n_components=5))
        assert found["model"]["weighted_mse"] == pytest.approx(0, abs=1e-12)
        assert found["no change"]["de_overlap"] == 0
        assert found["model"]["wasserstein"] == pytest.approx(found["ceiling"]["wasserstein"], rel=0.1)

    def test_discrimination_needs_two_actions(self) -> None:
        seen = ad.concat([population(*pair) for pair in (("u", "ctrl"), ("v", "ctrl"), ("v", "A"))])
        assert by_group(population("u", "A"), population("u", "A"), seen)["discrimination"].isna().all()

    def test_de_overlap(self, training: ad.AnnData, observed: ad.AnnData) -> None:
        """Of the two genes that change most, the prediction has one."""
        change = np.zeros(N_GENES)
        change[[3, 4]] = 5
        guess = np.zeros(N_GENES)
        guess[[4, 9]] = 5
        truth = draw(BASE + GROUP["w"] + change, group="w", action="A")
        found = by_group(draw(BASE + GROUP["w"] + guess), truth, training, n_top=2)
        assert rows(found)["model"]["de_overlap"] == 0.5

    def test_distances_are_in_components_of_training_cells(self) -> None:
        """Training cells vary in three genes only, so no other gene counts."""
        mean = np.zeros(N_GENES)
        seen = ad.concat([draw(mean, action="ctrl"), draw(mean, seed=1, action="B")])
        seen.X[:, 3:] = 0
        truth, other = draw(mean, seed=2, action="A"), draw(mean, seed=3)
        moved = other.copy()
        moved.X[:, 3:] += 5
        near, far = (rows(by_action(guess, truth, seen, n_components=3))["model"] for guess in (other, moved))
        assert [far[name] for name in DISTANCES] == pytest.approx([near[name] for name in DISTANCES])
        assert far["weighted_mse"] > near["weighted_mse"] + 1

    def test_storage_does_not_matter(self) -> None:
        rng = np.random.default_rng(0)
        cells = ad.AnnData(rng.poisson(1.0, (150, 80)).astype(np.float32))
        cells.obs["action"] = ["ctrl"] * 75 + ["A"] * 75
        cells.obs["group"] = (["x", "y"] * 75)[:150]
        held = ((cells.obs["action"] == "A") & (cells.obs["group"] == "x")).to_numpy()
        truth, seen = cells[held].copy(), cells[~held].copy()
        thin = seen.copy()
        thin.X = csr_matrix(thin.X)
        dense, other = (by_action(truth, truth, own, group_key="group", n_components=20) for own in (seen, thin))
        np.testing.assert_allclose(dense.drop(index="ceiling"), other.drop(index="ceiling"), atol=1e-4)

    def test_constant_values(self) -> None:
        """Cells that are all equal have no change, no spread and no kernel width."""
        same = np.ones(N_GENES)
        seen, truth = draw(same, action="ctrl"), draw(same, action="A")
        seen.X[:], truth.X[:] = 1, 1
        found = by_action(truth, truth, seen)
        for name in ("weighted_mse", "energy_distance", "wasserstein"):
            assert rows(found)["model"][name] == 0
        missing = ["delta_pearson", "delta_pearson_top", "weighted_r2", "mmd", "discrimination", "de_overlap"]
        assert found[missing].isna().all(axis=None)
        assert found.loc[["mean shift", "linear", "nearest"]].isna().all(axis=None)

    def test_three_cells_have_no_ceiling(self, training: ad.AnnData) -> None:
        found = by_group(population("w", "A"), population("w", "A", n=3), training)
        assert found.loc["ceiling"].isna().all()
        assert found.loc["model"].notna().all()

    def test_rank_test_has_tie_correction(self) -> None:
        rng = np.random.default_rng(0)
        x, y = rng.poisson(0.5, (25, 6)).astype(float), rng.poisson(0.9, (40, 6)).astype(float)
        expected = stats.mannwhitneyu(x, y, method="asymptotic", use_continuity=False).pvalue
        assert np.allclose(2 * stats.norm.sf(_rank_sum(x, y)), expected)
        assert _rank_sum(np.ones((3, 1)), np.ones((4, 1))) == 0

    def test_welch_of_constants(self) -> None:
        x, y = np.array([[0.0, 1, 2], [0, 1, 3], [0, 1, 5]]), np.array([[0.0, 7, 8], [0, 7, 9], [0, 7, 8]])
        found = _welch(x, y)
        assert found[0] == 0
        assert found[1] == found[2] == pytest.approx(-stats.ttest_ind(x[:, 2], y[:, 2], equal_var=False).statistic)


class TestActionBaselines:
    @pytest.mark.parametrize("label", ["A+B", "B+A", "B + A", "A+B+ctrl"])
    def test_additive_is_exact_where_changes_add_up(self, training: ad.AnnData, label: str) -> None:
        truth = population("u", "A+B", seed=50)
        truth.obs["action"] = label
        found = rows(by_group(truth, truth, training))["additive"]
        assert found["delta_pearson"] == pytest.approx(1)
        assert found["weighted_mse"] == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("label", ["A+D", "A+", "A"])
    def test_additive_needs_known_parts(self, training: ad.AnnData, label: str) -> None:
        truth = population("w", "A", seed=50)
        truth.obs["action"] = label
        assert by_group(truth, truth, training).loc["additive"].isna().all()

    def test_additive_takes_parts_from_the_group_first(self) -> None:
        """A does something else in v; in u, where it is known, only u counts."""
        seen = [population("u", action) for action in ("ctrl", "A", "B")]
        seen += [population("v", "ctrl"), draw(BASE + GROUP["v"] - EFFECT["A"], group="v", action="A")]
        found = by_group(population("u", "A+B"), population("u", "A+B"), ad.concat(seen))
        assert rows(found)["additive"]["weighted_mse"] == pytest.approx(0, abs=1e-12)

    def test_mean_shift_of_an_unknown_action_is_the_mean_of_all(self) -> None:
        seen = ad.concat([population("u", action) for action in ("ctrl", "A", "B")])
        truth = draw(BASE + GROUP["u"] + (EFFECT["A"] + EFFECT["B"]) / 2, group="u", action="C")
        found = by_group(truth, truth, seen)
        assert rows(found)["mean shift"]["weighted_mse"] == pytest.approx(0, abs=1e-12)
        assert found.loc["nearest"].isna().all()
        assert found.loc["linear"].isna().all()

    def test_linear_learns_from_control_cells_and_nearest_copies(self) -> None:
        """The change is proportional to a property of the group, which its control cells show."""
        state, effect = np.zeros(N_GENES), EFFECT["A"]
        state[:5] = 4
        seen = []
        for i, dose in enumerate((0.0, 1.0, 2.0, 4.0)):
            seen.append(draw(BASE + dose * state, seed=i, group=f"g{i}", action="ctrl"))
            if dose != 2:
                seen.append(draw(BASE + dose * (state + effect), seed=9 + i, group=f"g{i}", action="A"))
        truth = draw(BASE + 2 * (state + effect), seed=30, group="g2", action="A")
        found = by_group(truth, truth, ad.concat(seen))["weighted_mse"].to_dict()
        assert found["linear"] < 0.01 * found["nearest"]
        assert found["nearest"] == pytest.approx(found["no change"] / 4, rel=1e-6)  # the change of g1, half of it

    def test_linear_reaches_genes_that_were_not_perturbed(self) -> None:
        """Genes of one program have the same change, and their embedding tells the program."""
        rng = np.random.default_rng(0)
        program = np.arange(N_GENES) % 2
        answers = 0.3 * rng.normal(size=(2, N_GENES))
        base = np.full(N_GENES, 2.0)
        seen = [draw(base, action="ctrl")]
        for i in range(12):
            change = answers[program[i]] + 3 * (program == program[i])
            seen.append(draw(base + change, seed=i, action=GENES[i]))
        truth = draw(base + answers[1] + 3 * (program == 1), seed=40, action=GENES[21])
        found = by_action(truth, truth, ad.concat(seen))["weighted_mse"].to_dict()
        assert found["linear"] < 0.2 * found["mean shift"]

    def test_without_groups_all_control_cells_are_the_source(self, training: ad.AnnData) -> None:
        pooled = training[training.obs["action"] != "A"].copy()
        truth = population("w", "A")
        found = by_action(truth, truth, pooled)
        assert found.attrs["transition"]["n_source"] == 120
        assert rows(found)["model"]["delta_pearson"] == pytest.approx(1)


class TestTime:
    A, B, C = BASE, BASE + EFFECT["A"], BASE + EFFECT["A"] + EFFECT["B"]

    def test_interpolation_is_exact_on_a_line(self) -> None:
        seen = ad.concat([at_time(0, self.A), at_time(4, self.B, 1)])
        truth = at_time(1, 0.75 * self.A + 0.25 * self.B, 2)
        found = by_time(truth, truth, seen)
        assert list(found.index) == [
            "model",
            "no change",
            "copy previous",
            "copy next",
            "linear",
            "linear, backward",
            "ceiling",
        ]
        assert found.notna().all(axis=None)
        assert found.loc[["linear", "linear, backward"], "weighted_mse"].to_numpy() == pytest.approx(0, abs=1e-12)
        assert rows(found)["no change"] == rows(found)["copy previous"]
        assert rows(found)["no change"]["delta_pearson"] == 0
        assert rows(found)["copy next"]["weighted_mse"] == pytest.approx(9 * rows(found)["no change"]["weighted_mse"])

    @pytest.mark.parametrize(
        ("time", "mean", "name", "absent"),
        [
            pytest.param(5, 3 * B - 2 * A, "linear", ["copy next", "linear, backward"], id="after"),
            pytest.param(-5, 3 * A - 2 * B, "linear, backward", ["copy previous", "linear"], id="before"),
        ],
    )
    def test_extrapolation_goes_on(self, time: float, mean: NDArray[np.float64], name: str, absent: list[str]) -> None:
        """Beyond the last two times, which are 2 apart, by 4."""
        seen = ad.concat([at_time(-1, self.A), at_time(1, self.B, 1)])
        found = by_time(at_time(time, mean), at_time(time, mean), seen)
        assert rows(found)[name]["weighted_mse"] == pytest.approx(0, abs=1e-12)
        assert found.loc[absent].isna().all(axis=None)

    def test_extrapolation_uses_the_last_difference(self) -> None:
        seen = ad.concat([at_time(0, self.A), at_time(1, self.B, 1), at_time(2, self.C, 2)])
        truth = at_time(3, self.C + EFFECT["B"], 3)
        assert rows(by_time(truth, truth, seen))["linear"]["weighted_mse"] == pytest.approx(0, abs=1e-12)

    def test_tie_goes_to_the_earlier_time_and_the_nearer_wins(self) -> None:
        seen = ad.concat([at_time(2, self.B, 1), at_time(0, self.A)])
        for time, same in ((1, "copy previous"), (1.5, "copy next")):
            found = by_time(at_time(time, self.C), at_time(time, self.C), seen)
            assert rows(found)["no change"] == rows(found)[same]

    def test_one_other_time(self) -> None:
        found = by_time(at_time(1, self.B), at_time(1, self.B), at_time(0, self.A))
        assert found.loc["no change"].notna().all()
        assert found.loc[["linear", "linear, backward", "copy next"]].isna().all(axis=None)

    def test_times_as_categories_of_text_and_groups(self) -> None:
        """In the other group the time is known, and its cells are others."""
        own = [at_time(0, self.A), at_time(2, self.C, 1)]
        other = [at_time(time, self.A + 5, 7) for time in (0, 1, 2)]
        for adata, group in ((own, "u"), (other, "v")):
            for part in adata:
                part.obs["group"] = group
        seen = ad.concat([*own, *other], index_unique="-")
        truth = at_time(1, (self.A + self.C) / 2)
        truth.obs["group"] = "u"
        for adata in (seen, truth):
            adata.obs["time"] = adata.obs["time"].astype(str).astype("category")
        found = by_time(truth, truth, seen, group_key="group")
        assert rows(found)["linear"]["weighted_mse"] == pytest.approx(0, abs=1e-12)


class TestDistances:
    @pytest.mark.parametrize("distance", [energy_distance, mmd, wasserstein])
    def test_grows_with_a_shift_and_is_symmetric(self, distance: Callable[..., float]) -> None:
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(60, 3)), rng.normal(size=(50, 3))
        found = [distance(x, y + shift) for shift in (0, 1, 3)]
        assert found == sorted(found)
        assert found[2] > 10 * abs(found[0]) or distance is wasserstein
        assert distance(y + 1, x) == pytest.approx(found[1])

    def test_energy_distance_of_gaussians(self) -> None:
        """E|x − y| of normal numbers with distance m and variance 2 in their difference is that of a folded normal."""
        rng = np.random.default_rng(0)
        folded = stats.foldnorm(2 / np.sqrt(2), scale=np.sqrt(2)).mean()
        x, y = rng.normal(size=(2500, 1)), rng.normal(2, 1, size=(1500, 1))
        assert energy_distance(x, y) == pytest.approx(2 * folded - 4 / np.sqrt(np.pi), abs=0.05)

    def test_mmd_of_gaussians(self) -> None:
        """The kernel of width s between Gaussians of variance 1 has mean s / sqrt(s² + 2) exp(−m² / (2 (s² + 2)))."""
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(2500, 1)), rng.normal(2, 1, size=(1500, 1))
        expected = 2 / np.sqrt(3) * (1 - np.exp(-4 / 6))
        assert mmd(x, y, bandwidth=1.0) == pytest.approx(expected, abs=0.02)

    def test_unbiased(self) -> None:
        """Means over many small samples of one population are near 0, on both sides of it."""
        rng = np.random.default_rng(0)
        samples = [rng.normal(size=(2, 5, 4)) for _ in range(300)]
        for distance in (energy_distance, partial(mmd, bandwidth=2.0)):
            found = np.array([distance(x, y) for x, y in samples])
            assert found.min() < 0 < found.max()
            assert abs(found.mean()) < 4 * found.std() / np.sqrt(len(found))

    def test_wasserstein_in_one_dimension(self) -> None:
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=30), rng.exponential(size=45)
        assert wasserstein(x[:, None], y[:, None]) == pytest.approx(stats.wasserstein_distance(x, y))

    def test_wasserstein_is_the_length_of_a_shift(self) -> None:
        x = np.random.default_rng(0).normal(size=(40, 2))
        assert wasserstein(x, x[::-1] + np.array([3, 4])) == pytest.approx(5)

    def test_default_bandwidth_is_the_median_distance(self) -> None:
        x, y = [[0.0], [1.0]], [[10.0], [12.0]]  # distances 1, 2, 9, 10, 11, 12
        assert mmd(x, y) == pytest.approx(mmd(x, y, bandwidth=9.5))

    @pytest.mark.parametrize("distance", [energy_distance, mmd, wasserstein])
    @pytest.mark.parametrize(
        ("y", "word"),
        [([[1.0, 2.0]] * 3, "columns"), ([[np.nan]] * 3, "NaN"), (np.empty((0, 1)), "shape")],
        ids=["columns", "nan", "empty"],
    )
    def test_refuses(self, distance: Callable[..., float], y: Any, word: str) -> None:
        with pytest.raises(DataError, match=word):
            distance([[1.0], [2.0], [3.0]], y)

    def test_refuses_one_cell_and_no_width(self) -> None:
        with pytest.raises(DataError, match="at least 2"):
            energy_distance([[1.0]], [[1.0], [2.0]])
        with pytest.raises(ConfigError, match="bandwidth"):
            mmd([[1.0], [1.0]], [[1.0], [1.0]])


def with_value(adata: ad.AnnData, value: float) -> ad.AnnData:
    adata = adata.copy()
    adata.X[1, 2] = value
    return adata


def with_obs(adata: ad.AnnData, **columns: Any) -> ad.AnnData:
    adata = adata.copy()
    for key, values in columns.items():
        adata.obs[key] = values
    return adata


class TestErrors:
    @pytest.mark.parametrize("label", ["A", "A+ctrl"])
    @pytest.mark.parametrize("key", ["group", None])
    def test_a_leak_is_refused_and_the_fix_works(
        self, training: ad.AnnData, observed: ad.AnnData, label: str, key: str | None
    ) -> None:
        leaky = ad.concat([training, with_obs(observed[:7], action=label)], index_unique="-")
        with pytest.raises(DataError, match=r"leaked.* 7 cells" if key else r"leaked.* 87 cells") as caught:
            by_action(observed, observed, leaky, group_key=key)
        mended: dict[str, Any] = {"training": leaky}
        exec(caught.value.fix.removesuffix(" before any method sees it."), mended)
        assert rows(by_action(observed, observed, mended["training"], group_key=key))["model"]["delta_pearson"] > 0.99

    def test_a_leaked_time_is_refused_and_the_fix_works(self) -> None:
        truth = at_time(1, BASE + EFFECT["A"])
        leaky = ad.concat([at_time(0, BASE), truth, at_time(2, BASE, 1)])
        leaky.obs["time"] = leaky.obs["time"].astype(str).astype("category")
        with pytest.raises(DataError, match=r"leaked.* 40 cells") as caught:
            by_time(truth, truth, leaky)
        mended: dict[str, Any] = {"training": leaky}
        exec(caught.value.fix.removesuffix(" before any method sees it."), mended)
        assert by_time(truth, truth, mended["training"]).attrs["transition"]["n_training"] == 80

    @pytest.mark.parametrize("role", ["predicted", "observed", "training"])
    @pytest.mark.parametrize(
        ("spoil", "kind", "word"),
        [
            pytest.param(lambda adata: with_value(adata, np.nan), DataError, "1 NaN", id="nan"),
            pytest.param(lambda adata: with_value(adata, np.inf), DataError, "infinite", id="inf"),
            pytest.param(lambda adata: adata[:0], DataError, "0 cells", id="empty"),
            pytest.param(lambda adata: adata[:, :20], GeneMismatchError, "differ in 10 genes", id="genes"),
            pytest.param(
                lambda adata: adata[:, [*GENES[:29], GENES[0]]].copy(), GeneMismatchError, "repeated", id="repeated"
            ),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Variable names are not unique")
    def test_unusable_values(
        self,
        training: ad.AnnData,
        observed: ad.AnnData,
        role: str,
        spoil: Callable[[ad.AnnData], ad.AnnData],
        kind: type[GeneJEPAError],
        word: str,
    ) -> None:
        given = {"predicted": observed, "observed": observed, "training": training}
        given[role] = spoil(given[role])
        with pytest.raises(kind, match=word) as caught:
            by_group(**given)
        assert caught.value.fix

    @pytest.mark.parametrize(
        ("change", "kind", "word"),
        [
            pytest.param({"action_key": "actoin"}, MissingKeyError, "did you mean 'action'", id="key"),
            pytest.param({"group_key": "type"}, MissingKeyError, "type", id="group key"),
            pytest.param({"control": "DMSO"}, DataError, "no 'DMSO'", id="control label"),
            pytest.param({"control": "A"}, DataError, "the control", id="observed control"),
            pytest.param({"control": None}, ConfigError, "control", id="no control"),
            pytest.param({"action_key": None}, ConfigError, "exactly one", id="neither"),
            pytest.param({"time_key": "action"}, ConfigError, "exactly one", id="both"),
            pytest.param({"action_key": None, "time_key": "action"}, DataError, "no finite number", id="time"),
            pytest.param({"n_top": 0}, ConfigError, "n_top", id="n_top"),
            pytest.param({"n_components": 0}, ConfigError, "n_components", id="n_components"),
        ],
    )
    def test_arguments(
        self,
        training: ad.AnnData,
        observed: ad.AnnData,
        change: dict[str, Any],
        kind: type[GeneJEPAError],
        word: str,
    ) -> None:
        given = {"action_key": "action", "control": "ctrl", "group_key": "group", **change}
        with pytest.raises(kind, match=word):
            transition(observed, observed, training, **given)

    @pytest.mark.parametrize(
        ("spoil", "word"),
        [
            pytest.param(lambda o, t: (o[:1], t), "1 cells", id="one cell"),
            pytest.param(lambda o, t: (ad.concat([o, t[:3]]), t), "2 labels", id="several"),
            pytest.param(lambda o, t: (with_obs(o, action=None), t), "missing for 40 of 40", id="no label"),
            pytest.param(lambda o, t: (with_obs(o, group="x"), t), "of the group 'x' has no 'ctrl'", id="new group"),
            pytest.param(
                lambda o, t: (o, t[~((t.obs["group"] == "w") & (t.obs["action"] == "ctrl"))]),
                r"of the group 'w' has no 'ctrl'.*'u', 'v'",
                id="no control in group",
            ),
            pytest.param(
                lambda o, t: (o, t[(t.obs["group"] != "w") | (np.arange(t.n_obs) == 240)]),
                "1 cells",
                id="one control",
            ),
        ],
    )
    def test_populations(
        self, training: ad.AnnData, observed: ad.AnnData, spoil: Callable[..., tuple[ad.AnnData, ad.AnnData]], word: str
    ) -> None:
        cells, seen = spoil(observed, training)
        with pytest.raises(DataError, match=word):
            by_group(observed, cells, seen)
