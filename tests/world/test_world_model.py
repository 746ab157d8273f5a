"""The world model end to end: effects that are known are predicted, and what cannot be known is said."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from genejepa.errors import (
    ConfigError,
    DataError,
    DataWarning,
    ExtrapolationWarning,
    GeneJEPAError,
    MissingKeyError,
    NotFittedError,
)
from genejepa.model import GeneJEPA
from genejepa.world import fitting, training, transitions
from genejepa.world.decoder import Decoder
from genejepa.world.model import WorldModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    Draw = Callable[..., AnnData]
    Fit = Callable[..., WorldModel]

GENES = {name: slice(45 + 12 * number, 57 + 12 * number) for number, name in enumerate("ABCD")}
TYPES = ("alpha", "beta", "gamma")
EFFECT = 1.3
unlike = pytest.mark.filterwarnings("ignore:.*cells are unlike:genejepa.errors.ExtrapolationWarning")
added = pytest.mark.filterwarnings("ignore:.*effects of its parts are added:genejepa.errors.ExtrapolationWarning")


def mean(adata: AnnData) -> NDArray[np.float64]:
    """Mean expression of each gene."""
    found: NDArray[np.float64] = np.asarray(adata.X, dtype=np.float64).mean(0)
    return found


def change(adata: AnnData) -> NDArray[np.float64]:
    """Mean predicted change of each gene."""
    found: NDArray[np.float64] = np.asarray(adata.layers["change"], dtype=np.float64).mean(0)
    return found


def where(adata: AnnData, **values: Any) -> AnnData:
    chosen = np.all([np.asarray(adata.obs[key] == value) for key, value in values.items()], axis=0)
    return adata[chosen].copy()


@pytest.fixture(scope="module")
def later(draw_cells: Draw) -> AnnData:
    """Three types over time, in which program A rises from hour 0 to 48."""
    return draw_cells(
        [(own, {"A": EFFECT * time / 48}, {"time": time}) for own in TYPES for time in (0, 24, 48)], n=30, seed=3
    )


@pytest.fixture(scope="module")
def world_of_time(fit: Fit, later: AnnData) -> WorldModel:
    return fit(later, action_key=None, control=None, time_key="time")


@pytest.fixture(scope="module")
def fork(draw_cells: Draw) -> AnnData:
    """One type, of which three in ten take way C and the others way D, over one day."""
    before: list[Any] = [("alpha", {}, {"time": 0, "way": ""})] * 10
    ways: list[Any] = [("alpha", {"C": 2.0}, {"time": 1, "way": "C"})] * 3 + [
        ("alpha", {"D": 2.0}, {"time": 1, "way": "D"})
    ] * 7
    return draw_cells(before + ways, n=20, seed=4)


@pytest.fixture(scope="module")
def world_of_two_ways(fit: Fit, fork: AnnData) -> WorldModel:
    return fit(fork, action_key=None, control=None, group_key=None, time_key="time")


# What is predicted


@unlike
@pytest.mark.parametrize("left_out", TYPES)
def test_the_effect_on_a_type_that_was_left_out(left_out: str, fit: Fit, perturbed: AnnData) -> None:
    kept = (perturbed.obs["cell_type"] != left_out) | (perturbed.obs["condition"] == "ctrl")
    world = fit(perturbed[kept].copy(), max_steps=20)
    start = where(perturbed, cell_type=left_out, condition="ctrl")
    before = mean(world.expression(start))
    for action in "AB":
        predicted = world.predict(start, action)
        true = mean(world.expression(where(perturbed, cell_type=left_out, condition=action)))
        assert np.corrcoef(change(predicted), true - before)[0, 1] > 0.85
        assert np.square(mean(predicted) - true).sum() < 0.35 * np.square(before - true).sum()
        top = np.argsort(-change(predicted))[:12]
        assert set(top.tolist()) == set(range(100)[GENES[action]])


def test_states_move_to_where_the_cells_are(world: WorldModel, untreated: AnnData, perturbed: AnnData) -> None:
    for own in TYPES:
        start, end = where(untreated, cell_type=own), where(perturbed, cell_type=own, condition="A")
        before, true = (world.expression(cells).obsm["X_genejepa"].mean(0) for cells in (start, end))
        after = world.predict(start, "A").obsm["X_genejepa"].mean(0)
        assert np.linalg.norm(after - true) < 0.35 * np.linalg.norm(before - true)


@added
def test_a_combination_is_about_the_sum(world: WorldModel, untreated: AnnData, draw_cells: Draw) -> None:
    single = [change(world.predict(untreated, action)) for action in "AB"]
    both = change(world.predict(untreated, "A+B"))
    assert np.corrcoef(both, single[0] + single[1])[0, 1] > 0.95
    truth = draw_cells([(own, {"A": EFFECT, "B": EFFECT}, {}) for own in TYPES], seed=7)
    true = mean(world.expression(truth)) - mean(world.expression(untreated))
    assert np.corrcoef(both, true)[0, 1] > 0.85


def test_the_order_of_a_combination_does_not_matter(world: WorldModel, untreated: AnnData) -> None:
    with pytest.warns(ExtrapolationWarning, match=r"combination 'A\+B' was not seen"):
        first = world.predict(untreated, "A+B")
    with pytest.warns(ExtrapolationWarning, match=r"combination 'A\+B' was not seen"):
        second = world.predict(untreated, "B + A")
    np.testing.assert_array_equal(first.X, second.X)


def test_more_of_a_dose_does_more(fit: Fit, draw_cells: Draw, untreated: AnnData) -> None:
    cells = draw_cells(
        [
            (own, {"A": EFFECT * np.log1p(dose) / np.log1p(10)}, {"condition": "A" if dose else "ctrl", "dose": dose})
            for own in TYPES
            for dose in (0, 1, 3, 10)
        ],
        seed=5,
    )
    world = fit(cells, dose_key="dose", max_steps=0)
    strength = [change(world.predict(untreated, "A", dose=dose))[GENES["A"]].mean() for dose in (0, 0.5, 1, 3, 10)]
    assert strength[0] == pytest.approx(0, abs=1e-6)
    assert np.diff(strength).min() > 0.03
    with pytest.warns(ExtrapolationWarning, match="dose 20 of 'A' is above the largest one seen, 10"):
        world.predict(untreated, "A", dose=20)
    with pytest.raises(ConfigError, match="no dose is given for 'A'"):
        world.predict(untreated, "A")
    with pytest.raises(ConfigError, match="plans choose among actions of one dose"):
        world.plan(untreated, untreated)


def test_halfway_in_time_is_between(world_of_time: WorldModel, later: AnnData) -> None:
    start = where(later, time=0)
    half, whole = (change(world_of_time.predict(start, duration=hours)) for hours in (12, 24))
    own = GENES["A"]
    assert 0.3 < half[own].mean() / whole[own].mean() < 0.7
    np.testing.assert_array_equal(change(world_of_time.predict(start)), whole)  # the median transition
    true = mean(world_of_time.expression(where(later, time=24))) - mean(world_of_time.expression(start))
    assert np.corrcoef(whole, true)[0, 1] > 0.6


def test_longer_than_any_transition_is_several_steps(world_of_time: WorldModel, later: AnnData) -> None:
    start = where(later, time=0)
    with pytest.warns(ExtrapolationWarning, match=r"duration 48 is longer than any .* \(24\); .* in 2 steps"):
        far = world_of_time.predict(start, duration=48)
    twice = world_of_time.rollout(start, [None, None])
    np.testing.assert_allclose(far.X, twice[-1].X, atol=1e-5)
    own = GENES["A"]
    assert change(far)[own].mean() > 1.3 * change(twice[0])[own].mean()


def test_actions_one_after_the_other(world: WorldModel, untreated: AnnData) -> None:
    """All that was seen is what actions do to untreated cells."""
    with pytest.warns(ExtrapolationWarning, match="nobody has seen a second step") as caught:
        first, second = world.rollout(untreated, ["A", "B"])
    assert len(caught) == 1
    np.testing.assert_array_equal(first.X, world.predict(untreated, "A").X)
    assert change(second)[GENES["A"]].mean() > 0.5
    assert change(second)[GENES["B"]].mean() > 0.5
    assert change(first)[GENES["B"]].mean() < 0.2
    assert second.obs["genejepa_action"].unique().tolist() == ["B"]
    assert world.rollout(untreated, []) == []


def test_time_and_actions_together(fit: Fit, draw_cells: Draw, untreated: AnnData) -> None:
    """Program C rises with time alone; the action adds A."""
    cells = draw_cells(
        [
            (own, {"C": EFFECT * time} | ({"A": EFFECT} if action == "A" else {}), {"time": time, "condition": action})
            for own in TYPES
            for time, action in ((0, "ctrl"), (1, "ctrl"), (1, "A"))
        ],
        seed=6,
    )
    world = fit(cells, time_key="time", max_steps=0)
    alone, acted = change(world.predict(untreated)), change(world.predict(untreated, "A"))
    np.testing.assert_array_equal(change(world.predict(untreated, "ctrl")), alone)
    np.testing.assert_array_equal(change(world.predict(untreated, "time")), alone)
    assert alone[GENES["C"]].mean() > 0.5
    assert abs(alone[GENES["A"]].mean()) < 0.25  # the share of the others falls as C rises
    assert acted[GENES["C"]].mean() > 0.5
    assert acted[GENES["A"]].mean() > 0.5


def test_an_action_named_time_is_an_action(fit: Fit, perturbed: AnnData, untreated: AnnData) -> None:
    renamed = perturbed.copy()
    renamed.obs["condition"] = renamed.obs["condition"].astype(str).replace("A", "time")
    assert change(fit(renamed).predict(untreated, "time"))[GENES["A"]].mean() > 0.5


# Several futures


def test_two_ways_are_two_futures(world_of_two_ways: WorldModel, fork: AnnData) -> None:
    start = where(fork, time=0)
    both = world_of_two_ways.predict(start, n_futures=2)
    assert both.n_obs == 2 * start.n_obs
    assert both.obs_names[:4].tolist() == ["cell0-0", "cell0-1", "cell1-0", "cell1-1"]
    chances = both.obs["genejepa_probability"].to_numpy().reshape(-1, 2)
    assert (chances[:, 0] >= chances[:, 1]).all()
    np.testing.assert_allclose(chances.sum(1), 1, atol=1e-6)
    assert chances.mean(0) == pytest.approx([0.7, 0.3], abs=0.05)
    by_rank = np.asarray(both.layers["change"]).reshape(-1, 2, both.n_vars).mean(0)
    likely, rare = by_rank
    assert likely[GENES["D"]].mean() - likely[GENES["C"]].mean() > 1
    assert rare[GENES["C"]].mean() - rare[GENES["D"]].mean() > 1
    assert both.obs["genejepa_future"].nunique() == 2


def test_one_future_is_drawn_so_that_the_population_is_right(world_of_two_ways: WorldModel, fork: AnnData) -> None:
    start = where(fork, time=0)
    drawn = world_of_two_ways.predict(start)
    assert drawn.n_obs == start.n_obs
    goes_c = np.asarray(drawn.layers["change"])[:, GENES["C"]].mean(1) > 0.8
    assert goes_c.mean() == pytest.approx(0.3, abs=0.08)
    assert drawn.obs["genejepa_future"][goes_c].nunique() == 1
    np.testing.assert_array_equal(drawn.X, world_of_two_ways.predict(start).X)
    assert not np.array_equal(drawn.X, world_of_two_ways.predict(start, seed=1).X)


def test_no_more_futures_than_there_are(world: WorldModel, world_of_two_ways: WorldModel, fork: AnnData) -> None:
    for own, n in ((world, 1), (world_of_two_ways, 2)):
        action = "A" if n == 1 else None
        with pytest.raises(ConfigError, match=rf"(?s)`n_futures` is {n + 1}.* knows {n}.*Fix: pass n_futures={n}"):
            own.predict(fork, action, n_futures=n + 1)


def test_several_futures_need_one_step(world_of_two_ways: WorldModel, fork: AnnData) -> None:
    with pytest.raises(ConfigError, match=r"(?s)the duration takes 3 steps.*\nFix: .* duration of at most 1\."):
        world_of_two_ways.predict(where(fork, time=0), duration=2.5, n_futures=2)


def test_a_branch_is_not_lost_in_a_combination(fit: Fit, draw_cells: Draw) -> None:
    """A has one end, B has two; so has A with B. Doses in which B hardly does anything give A no second end."""
    ctrl: list[Any] = [("alpha", {}, {"condition": "ctrl", "dose": 0.0})] * 8
    acted: list[Any] = [("alpha", {"A": EFFECT}, {"condition": "A", "dose": d}) for d in (1.0, 10.0) for _ in range(4)]
    for dose in (9.0, 10.0):
        acted += [("alpha", {"C": 2.5}, {"condition": "B", "dose": dose})] * 4
        acted += [("alpha", {"D": 2.5}, {"condition": "B", "dose": dose})] * 4
    cells = draw_cells(ctrl + acted, n=20, seed=12)
    world = fit(cells, group_key=None, dose_key="dose", max_steps=0)
    assert world.facts["n_futures"] == 2
    start = where(cells, condition="ctrl")
    for dose in (1.0, 10.0):
        assert set(world.predict(start, "A", dose=dose).obs["genejepa_future"]) == {0}
    single = change(world.predict(start, "A", dose=10.0))[GENES["A"]].mean()
    with pytest.warns(ExtrapolationWarning, match="combination"):
        both = world.predict(start, "A+B", dose=10.0, n_futures=2)
    chances = both.obs["genejepa_probability"].to_numpy()
    assert chances.min() > 0.3
    by_future = [np.asarray(both.layers["change"])[both.obs["genejepa_future"] == k].mean(0) for k in (0, 1)]
    ends = {bool(own[GENES["C"]].mean() > own[GENES["D"]].mean()) for own in by_future}
    assert ends == {True, False}
    for own in by_future:
        assert own[GENES["A"]].mean() > 0.5 * single


def test_where_nothing_happens_there_is_one_future(model: GeneJEPA, draw_cells: Draw) -> None:
    """Labels are drawn at random: types, which are modes, differ in number by chance alone."""
    cells = draw_cells([(own, {}, {}) for own in TYPES], n=60, seed=21)
    for seed in range(5):
        cells.obs["condition"] = np.random.default_rng(seed).choice(["ctrl", "A"], cells.n_obs)
        world = WorldModel(model).fit(cells, action_key="condition", control="ctrl", max_steps=0)
        assert world.facts["n_futures"] == 1


def test_one_future_on_request(fit: Fit, fork: AnnData) -> None:
    world = fit(fork, action_key=None, control=None, group_key=None, time_key="time", max_futures=1)
    later = world.predict(where(fork, time=0))
    assert set(later.obs["genejepa_probability"]) == {1.0}
    assert change(later)[GENES["C"]].mean() > 0.15
    assert change(later)[GENES["D"]].mean() > 0.5


# What comes back


def test_what_a_prediction_holds(world: WorldModel, untreated: AnnData) -> None:
    before = untreated.copy()
    predicted = world.predict(untreated, "A")
    assert predicted.shape == (90, 100)
    assert predicted.obs_names.tolist() == untreated.obs_names.tolist()
    assert predicted.var_names.tolist() == world.model.genes
    own = ["genejepa_action", "genejepa_future", "genejepa_probability", "genejepa_energy"]
    assert list(predicted.obs) == [*untreated.obs, *own]
    assert predicted.obs["genejepa_action"].unique().tolist() == ["A"]
    assert set(predicted.obs["genejepa_future"]) == {0}
    assert set(predicted.obs["genejepa_probability"]) == {1.0}
    assert predicted.obsm["X_genejepa"].shape == (90, 12)
    for values in (predicted.X, predicted.layers["change"], predicted.obsm["X_genejepa"]):
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
    profile = world.expression(untreated)
    np.testing.assert_array_equal(predicted.X, profile.X + predicted.layers["change"])
    assert list(untreated.obs) == list(before.obs)
    assert not untreated.obsm
    assert (untreated.X != before.X).nnz == 0


def test_expression_is_log_of_scaled_counts(world: WorldModel, untreated: AnnData) -> None:
    counts = untreated.X.toarray()[:, [untreated.var_names.get_loc(name) for name in world.model.genes]]
    scaled = counts * (world.model.normalizer.median_depth / counts.sum(1, keepdims=True))
    found = world.expression(untreated)
    np.testing.assert_allclose(found.X, np.log1p(scaled), rtol=1e-4, atol=1e-5)
    assert list(found.obs) == list(untreated.obs)
    np.testing.assert_array_equal(found.obsm["X_genejepa"], world.model.get_latent_representation(untreated))


def test_decoded_expression_is_that_of_cells(model: GeneJEPA, untreated: AnnData) -> None:
    """Means of decoded and of observed expression agree, also for genes of few counts."""
    decoder = Decoder(model)
    decoded = decoder.expression(model.get_latent_representation(untreated)).mean(0)
    observed = decoder.profiles(*model.read_panel(untreated, {})).mean(0)
    assert np.abs(decoded - observed).mean() < 0.15
    assert np.corrcoef(decoded, observed)[0, 1] > 0.95


def test_the_order_of_cells_and_genes_does_not_matter(
    world: WorldModel, untreated: AnnData, rng: np.random.Generator
) -> None:
    predicted = world.predict(untreated, "A")
    cells, genes = rng.permutation(untreated.n_obs), rng.permutation(untreated.n_vars)
    other = world.predict(untreated[cells][:, genes].copy(), "A")
    np.testing.assert_array_equal(other.X, np.asarray(predicted.X)[cells])
    np.testing.assert_array_equal(other.obsm["X_genejepa"], predicted.obsm["X_genejepa"][cells])


def test_a_fit_hardly_depends_on_the_order_of_cells(
    fit: Fit, perturbed: AnnData, untreated: AnnData, rng: np.random.Generator
) -> None:
    orders = (np.arange(perturbed.n_obs), rng.permutation(perturbed.n_obs))
    first, second = (fit(perturbed[order].copy(), max_steps=0).predict(untreated, "A").X for order in orders)
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_counts_may_be_anywhere(
    world: WorldModel, fit: Fit, perturbed: AnnData, untreated: AnnData, tmp_path: Path
) -> None:
    expected = world.predict(untreated, "A").X
    dense = untreated.copy()
    dense.X = dense.X.toarray()
    layered = untreated.copy()
    layered.layers["counts"] = layered.X.copy()
    layered.X = layered.X * 0.5
    untreated.write_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(world.predict(dense, "A").X, expected)
    np.testing.assert_array_equal(world.predict(layered, "A", layer="counts").X, expected)
    np.testing.assert_array_equal(world.predict(tmp_path / "cells.h5ad", "A").X, expected)
    perturbed.write_h5ad(tmp_path / "all.h5ad")
    backed = anndata.read_h5ad(tmp_path / "all.h5ad", backed="r")
    columns = perturbed.copy()
    columns.X = sparse.csc_matrix(columns.X)
    expected = fit(perturbed, max_steps=0).predict(untreated, "A").X
    for cells in (backed, columns, str(tmp_path / "all.h5ad")):
        np.testing.assert_array_equal(fit(cells, max_steps=0).predict(untreated, "A").X, expected)
    backed.file.close()


def test_missing_genes_are_decoded(world: WorldModel, untreated: AnnData) -> None:
    few = untreated[:, np.arange(100) % 5 != 0].copy()
    expected = world.predict(untreated, "A")
    with pytest.warns(UserWarning, match="80 of the 100 genes"):
        predicted = world.predict(few, "A")
    assert predicted.var_names.tolist() == world.model.genes
    missing = [name not in few.var_names for name in world.model.genes]
    assert sum(missing) == 20
    np.testing.assert_allclose(mean(predicted)[missing], mean(expected)[missing], atol=0.4)
    assert np.corrcoef(change(predicted), change(expected))[0, 1] > 0.97


@pytest.mark.filterwarnings("ignore:Extrapolation:genejepa.errors.ExtrapolationWarning")
def test_cells_of_one_name_and_cells_without_counts(world: WorldModel, untreated: AnnData) -> None:
    cells = untreated[:5].copy()
    cells.obs_names = ["same"] * 5
    cells.X = cells.X.toarray() * np.array([[1], [1], [0], [1], [1]], dtype=np.float32)
    with pytest.warns(UserWarning, match="names are not unique"):
        predicted = world.predict(cells, "A")
    assert np.isfinite(predicted.X).all()
    assert predicted.obs_names.tolist() == ["same"] * 5


# What is said of it


@added
def test_energies_of_nonsense_are_higher(world: WorldModel, untreated: AnnData) -> None:
    predicted = world.predict(untreated, "A")
    own = predicted.obs["genejepa_energy"].to_numpy()
    assert 0.3 < np.median(own) < 5
    fitted = world._known()
    before = world.expression(untreated).obsm["X_genejepa"]
    nonsense = before + 5 * (predicted.obsm["X_genejepa"] - before)
    high = fitted.plausible.energy(world._decoder, nonsense)
    assert (high[:, None] > own[None]).mean() > 0.95
    known = fitted.plausible.energy(world._decoder, fitted.known.states)
    assert known.mean() == pytest.approx(1, abs=0.1)


def test_cells_unlike_those_of_the_fit_are_warned_of(fit: Fit, perturbed: AnnData, draw_cells: Draw) -> None:
    world = fit(where(perturbed, cell_type="alpha"), max_steps=0)
    world.predict(draw_cells([("alpha", {}, {})], seed=8), "A")
    strange = draw_cells([("gamma", {}, {})], seed=8)
    for act in (
        lambda: world.predict(strange, "A"),
        lambda: world.rollout(strange, ["A"]),
        lambda: world.plan(strange, strange, horizon=1),
    ):
        with pytest.warns(ExtrapolationWarning, match=r"Extrapolation: \d+% of the cells are unlike those"):
            act()


def test_one_type_of_three_that_was_not_in_the_fit_is_warned_of(
    fit: Fit, perturbed: AnnData, untreated: AnnData
) -> None:
    world = fit(perturbed[perturbed.obs["cell_type"] != "gamma"].copy(), max_steps=0)
    with pytest.warns(ExtrapolationWarning, match=r"Extrapolation: [23]\d% of the cells are unlike those"):
        world.predict(untreated, "A")


def test_plans_tell_where_they_leave_what_is_known(world: WorldModel, untreated: AnnData, draw_cells: Draw) -> None:
    end = draw_cells([(own, {"A": EFFECT}, {}) for own in TYPES], n=30, seed=9)
    plan = world.plan(untreated, end, horizon=2)  # one action, on cells that are known: no warning
    assert plan.best == ("A",)
    unlike = dict(zip(plan.sequences, plan.unlike, strict=True))
    assert unlike[()] == 0
    assert unlike["A",] < 0.1 < 0.5 < unlike["A", "B"]
    assert plan.table["unlike"].tolist() == plan.unlike.tolist()


@unlike
def test_a_model_that_was_trained_again_needs_another_fit(model: GeneJEPA, perturbed: AnnData) -> None:
    own = copy.deepcopy(model)
    assert own.jepa is not None
    world = WorldModel(own).fit(perturbed, action_key="condition", control="ctrl", max_steps=0)
    world.predict(perturbed, "A")
    with torch.no_grad():
        next(own.jepa.parameters()).add_(0.01)
    for act in (
        lambda: world.predict(perturbed, "A"),
        lambda: world.rollout(perturbed, ["A"]),
        lambda: world.plan(perturbed, perturbed),
        lambda: world.save("nowhere"),
    ):
        with pytest.raises(NotFittedError, match=r"(?s)trained again after .*\nFix: call `world\.fit"):
            act()
    world.fit(perturbed, action_key="condition", control="ctrl", max_steps=0).predict(perturbed, "A")


def test_an_unseen_gene_is_warned_of(fit: Fit, perturbed: AnnData, untreated: AnnData) -> None:
    renamed = perturbed.copy()
    renamed.obs["condition"] = renamed.obs["condition"].astype(str).replace({"A": "gene50", "B": "gene60"})
    world = fit(renamed, max_steps=0)
    with pytest.warns(ExtrapolationWarning, match="'gene51' was never perturbed"):
        predicted = change(world.predict(untreated, "gene51"))
    known = [change(world.predict(untreated, name)) for name in ("gene50", "gene60")]
    weight = np.linalg.lstsq(np.stack(known, 1), predicted, rcond=None)[0]
    assert weight.sum() == pytest.approx(1, abs=0.1)
    assert weight[0] > weight[1]  # it is of the same program


# Fits of all kinds


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": 0},
        {"max_steps": 1},
        {"max_futures": 1},
        {"group_key": None},
        {"seed": 5},
    ],
    ids=str,
)
def test_fits(arguments: dict[str, Any], fit: Fit, perturbed: AnnData, untreated: AnnData) -> None:
    world = fit(perturbed, **arguments)
    assert world.actions == ["A", "B"]
    for action in "AB":
        predicted = change(world.predict(untreated, action))
        assert np.argsort(-predicted)[:12].min() >= GENES[action].start


def test_three_cells_are_enough(fit: Fit, perturbed: AnnData) -> None:
    few = np.concatenate(
        [
            np.flatnonzero((perturbed.obs["cell_type"] == "alpha") & (perturbed.obs["condition"] == name))[:3]
            for name in ("ctrl", "A")
        ]
    )
    world = fit(perturbed[np.sort(few)].copy(), max_steps=2)
    assert change(world.predict(perturbed[few[:3]].copy(), "A"))[GENES["A"]].mean() > 0.3
    with (
        pytest.warns(DataWarning, match="populations are left out"),
        pytest.raises(DataError, match="at least 3 cells"),
    ):
        fit(perturbed[few[[0, 1, 3, 4, 5]]].copy())


def test_cells_that_are_all_the_same(fit: Fit, perturbed: AnnData, untreated: AnnData) -> None:
    """Empty droplets, or one cell many times, in one of the populations."""
    for value in (0.0, 3.0):
        cells = perturbed.copy()
        counts = cells.X.toarray()
        counts[(cells.obs["condition"] == "A") & (cells.obs["cell_type"] == "beta")] = value
        cells.X = counts
        assert np.isfinite(fit(cells).predict(untreated, "B").X).all()


def test_large_populations_are_cut(
    fit: Fit, perturbed: AnnData, untreated: AnnData, monkeypatch: pytest.MonkeyPatch, world: WorldModel
) -> None:
    assert fitting.MOST_CELLS == 2000
    monkeypatch.setattr(fitting, "MOST_CELLS", 15)
    sizes = []

    def match(before: Any, after: Any, rng: Any) -> Any:
        sizes.append((len(before), len(after)))
        return solve(before, after, rng)

    solve = transitions.match
    monkeypatch.setattr(fitting, "match", match)
    cut = fit(perturbed, max_steps=0)
    assert sizes == [(15, 15)] * 6
    assert np.corrcoef(change(cut.predict(untreated, "A")), change(world.predict(untreated, "A")))[0, 1] > 0.9


def test_numbers_are_names_too(fit: Fit, perturbed: AnnData, untreated: AnnData) -> None:
    numbered = perturbed.copy()
    numbered.obs["condition"] = numbered.obs["condition"].astype(str).map({"ctrl": 0, "A": 1, "B": 2}).astype(int)
    world = fit(numbered, control=0)
    assert world.actions == ["1", "2"]
    name: Any = 1
    np.testing.assert_array_equal(world.predict(untreated, name).X, world.predict(untreated, "1").X)


def test_spaces_around_a_control_do_not_matter(fit: Fit, perturbed: AnnData) -> None:
    spaced = perturbed.copy()
    spaced.obs["condition"] = spaced.obs["condition"].astype(str).replace("ctrl", " ctrl ")
    for control in ("ctrl", " ctrl "):
        assert fit(spaced, control=control, max_steps=0).actions == ["A", "B"]


def test_a_second_fit_forgets_the_first(fit: Fit, perturbed: AnnData) -> None:
    world = fit(perturbed, max_steps=0)
    renamed = perturbed.copy()
    renamed.obs["condition"] = renamed.obs["condition"].astype(str).replace("A", "Z")
    assert world.fit(renamed, action_key="condition", control="ctrl", max_steps=0) is world
    assert world.actions == ["B", "Z"]


def test_equal_seeds_give_equal_worlds(
    fit: Fit,
    fork: AnnData,
    model: GeneJEPA,
    global_rng_untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    weights = model.weights_sha256()
    keys: dict[str, Any] = {"action_key": None, "control": None, "group_key": None, "time_key": "time"}
    start = where(fork, time=0)
    with global_rng_untouched():
        first, again, other = (fit(fork, seed=seed, **keys) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first.predict(start).X, again.predict(start).X)
    weights_of = [world._known().network.correction_out.weight.detach().numpy() for world in (first, again, other)]
    np.testing.assert_array_equal(weights_of[0], weights_of[1])
    assert not np.array_equal(weights_of[0], weights_of[2])
    assert model.weights_sha256() == weights


def test_ctrl_c_leaves_the_earlier_fit(
    fit: Fit, perturbed: AnnData, untreated: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = fit(perturbed)
    before = world.predict(untreated, "A").X
    n_steps = 0

    def interrupted(self: Any, batch: Any, number: int) -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 3:
            raise KeyboardInterrupt
        return step(self, batch, number)

    step = training.TransitionModule.training_step
    monkeypatch.setattr(training.TransitionModule, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.fit(perturbed, action_key="condition", control="ctrl", max_steps=5)
    np.testing.assert_array_equal(world.predict(untreated, "A").X, before)
    monkeypatch.undo()
    assert world.fit(perturbed, action_key="condition", control="ctrl", max_steps=5).is_fitted


# What is refused


def test_nothing_works_before_a_fit(model: GeneJEPA, untreated: AnnData, tmp_path: Path) -> None:
    world = WorldModel(model)
    assert not world.is_fitted
    assert "not fitted" in repr(world)
    uses: list[Callable[[], object]] = [
        lambda: world.actions,
        lambda: world.predict(untreated, "A"),
        lambda: world.rollout(untreated, ["A"]),
        lambda: world.plan(untreated, untreated),
        lambda: world.save(tmp_path / "world"),
    ]
    for use in uses:
        with pytest.raises(NotFittedError, match=r"call `world\.fit"):
            use()
    assert not (tmp_path / "world").exists()
    assert world.expression(untreated).shape == (90, 100)


def test_a_model_has_to_be_trained(untreated: AnnData) -> None:
    with pytest.raises(NotFittedError, match=r"call `model.train\(\)` first"):
        WorldModel(GeneJEPA(untreated, n_genes=50))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_futures": 0}, ConfigError, "`max_futures` is 0"),
        ({"max_futures": True}, ConfigError, "`max_futures` is True"),
        ({"max_steps": -1}, ConfigError, "`max_steps` is -1"),
        ({"max_steps": 1.5}, ConfigError, "`max_steps` is 1.5"),
        ({"seed": -1}, ConfigError, "`seed` is -1"),
        ({"seed": "x"}, ConfigError, "`seed` is 'x'"),
        ({"action_key": None}, ConfigError, "neither `action_key` nor `time_key`"),
        ({"control": None}, ConfigError, "`control` is None"),
        ({"action_key": "conditions"}, MissingKeyError, "did you mean 'condition'"),
        ({"group_key": "type"}, MissingKeyError, "`obs\\['type'\\]`"),
        ({"dose_key": "dose"}, MissingKeyError, "`obs\\['dose'\\]`"),
        ({"dose_key": "condition"}, DataError, "no finite number for 240 of 360"),
        ({"time_key": "cell_type"}, DataError, "no finite number for 360 of 360"),
        ({"control": "mock"}, DataError, "never 'mock', found 'A', 'B', 'ctrl'"),
        ({"layer": "nothing"}, MissingKeyError, "`layers\\['nothing'\\]`"),
        ({"min_overlap": 2.0}, ConfigError, "min_overlap"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_fits_that_are_refused(
    arguments: dict[str, Any], error: type[GeneJEPAError], message: str, fit: Fit, perturbed: AnnData
) -> None:
    with pytest.raises(error, match=message):
        fit(perturbed, **arguments)


def test_groups_that_are_the_actions_are_refused(fit: Fit, perturbed: AnnData) -> None:
    with pytest.warns(DataWarning), pytest.raises(DataError, match="no group has a control and another action"):
        fit(perturbed, group_key="condition")


def test_cells_that_are_refused(fit: Fit, world: WorldModel, perturbed: AnnData, untreated: AnnData) -> None:
    with pytest.raises(DataError, match="`adata` has no cells"):
        fit(perturbed[:0].copy())
    with pytest.raises(DataError, match="`adata` has no cells"):
        world.predict(untreated[:0].copy(), "A")
    with pytest.raises(DataError, match="`start` or `goal` has no cells"):
        world.plan(untreated, untreated[:0].copy())
    matrix: Any = perturbed.X
    with pytest.raises(DataError, match="expected an AnnData or a path"):
        fit(matrix)
    logs = untreated.copy()
    logs.X = np.log1p(logs.X.toarray())
    with pytest.raises(DataError, match="expected counts"):
        world.predict(logs, "A")


@pytest.mark.parametrize(
    ("action", "arguments", "error", "message"),
    [
        ("a", {}, MissingKeyError, "`actions\\['a'\\]` does not exist, found 'A', 'B'"),
        ("A+Z", {}, MissingKeyError, "'Z'"),
        ("", {}, MissingKeyError, "''"),
        (["A"], {}, MissingKeyError, "A"),
        (None, {}, ConfigError, "which changes nothing without time"),
        ("ctrl", {}, ConfigError, r"(?s)which changes nothing without time.*pass one of the actions 'A', 'B'"),
        ("A", {"dose": 1.0}, ConfigError, "there was no `dose_key`"),
        ("A", {"duration": 1.0}, ConfigError, "there was no `time_key`"),
        ("A", {"n_futures": 0}, ConfigError, "`n_futures` is 0"),
        ("A", {"n_futures": 1.0}, ConfigError, "`n_futures` is 1.0"),
        ("A", {"seed": -1}, ConfigError, "`seed` is -1"),
    ],
    ids=str,
)
def test_predictions_that_are_refused(
    action: Any,
    arguments: dict[str, Any],
    error: type[GeneJEPAError],
    message: str,
    world: WorldModel,
    untreated: AnnData,
) -> None:
    with pytest.raises(error, match=message):
        world.predict(untreated, action, **arguments)


@pytest.mark.parametrize("duration", [0, -1.0, np.nan, np.inf, True, np.bool_(True), "12"])
def test_impossible_durations(duration: Any, world_of_time: WorldModel, later: AnnData) -> None:
    with pytest.raises(ConfigError, match=r"`duration` is .*, expected a number above 0"):
        world_of_time.predict(later, duration=duration)


def test_a_world_of_time_has_no_actions(world_of_time: WorldModel, later: AnnData) -> None:
    assert world_of_time.actions == []
    with pytest.raises(MissingKeyError, match=r"(?s)no action is known.*Fix: leave `action` out"):
        world_of_time.predict(later, "A")


def test_lists_of_actions_are_lists(world: WorldModel, untreated: AnnData) -> None:
    with pytest.raises(ConfigError, match=r"(?s)`actions` is 'AB', expected a list.*Fix: pass actions=\['AB'\]"):
        world.rollout(untreated, "AB")
    with pytest.raises(ConfigError, match="`actions` is 'A'"):
        world.plan(untreated, untreated, "A")
    for actions in (5, [["A"]], [b"A"]):
        with pytest.raises(ConfigError, match=r"(?s)`actions` is .*\nFix: pass a list of texts"):
            world.plan(untreated, untreated, actions)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"(?s)`actions` is None.*\nFix: pass a list of texts"):
        world.rollout(untreated, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`actions` is empty"):
        world.plan(untreated, untreated, [])
    with pytest.raises(ConfigError, match="`seed` is -1"):
        world.rollout(untreated, ["A"], seed=-1)


# Plans


@added
@pytest.mark.parametrize(("goal", "best"), [("A", {"A"}), ("B", {"B"}), ("A+B", {"A", "B"})])
@pytest.mark.filterwarnings("ignore:Extrapolation. no transition:genejepa.errors.ExtrapolationWarning")
def test_plans_lead_to_the_goal(
    goal: str, best: set[str], world: WorldModel, untreated: AnnData, draw_cells: Draw
) -> None:
    effects = dict.fromkeys(goal.split("+"), EFFECT)
    end = draw_cells([(own, effects, {}) for own in TYPES], n=30, seed=9)
    plan = world.plan(untreated, end, horizon=2)
    assert set(plan.best) == best
    assert plan.method == "exhaustive"
    assert (np.diff(plan.costs) >= 0).all()
    assert plan.table["actions"].iloc[0] == " > ".join(plan.best)
    for sequence, distances, populations in zip(plan.sequences, plan.distances, plan.populations, strict=True):
        assert len(distances) == len(populations) == len(sequence) + 1
    assert plan.distances[0][-1] < 0.5 * plan.distances[0][0]


def test_nothing_is_done_where_the_goal_is_the_start(world: WorldModel, untreated: AnnData) -> None:
    assert world.plan(untreated, untreated, horizon=1).best == ()


def test_an_action_has_one_name(world: WorldModel, untreated: AnnData) -> None:
    plan = world.plan(untreated, untreated, ["A", " A", "A+ctrl", "ctrl + A"], horizon=1)
    assert plan.sequences == [(), ("A",)]
    assert world.predict(untreated, " A+ctrl").obs["genejepa_action"].unique().tolist() == ["A"]
    assert world.plan(untreated, untreated, (name for name in ("A", "B")), horizon=1).sequences[0] == ()  # type: ignore[arg-type]


def test_many_steps_are_warned_of_once(world_of_time: WorldModel, later: AnnData) -> None:
    with pytest.warns(ExtrapolationWarning) as caught:
        world_of_time.predict(where(later, time=0), duration=480)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2
    assert "it is predicted in 20 steps" in told[0]
    assert "before step" in told[1]


def test_letting_time_pass_is_a_step_of_a_plan(world_of_time: WorldModel, later: AnnData) -> None:
    plan = world_of_time.plan(where(later, time=0), where(later, time=48), horizon=3)
    assert set(plan.best) == {"time"}
    assert len(plan.best) in (2, 3)
