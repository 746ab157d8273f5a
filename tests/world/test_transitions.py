"""Which population comes from which, which cells are left out, and which cell is matched with which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from genejepa.errors import ConfigError, DataError, DataWarning, MissingKeyError
from genejepa.world.transitions import FEWEST_CELLS, Keys, match, populations, transitions

if TYPE_CHECKING:
    from collections.abc import Sequence

ACTION = Keys(action="action", control="ctrl", group="group")
TIME = Keys(group="group", time="time")
BOTH = Keys(action="action", control="ctrl", group="group", time="time")
DOSE = Keys(action="action", control="ctrl", dose="dose")


def cells(columns: str, *rows: Sequence[Any], n: int = 4) -> AnnData:
    """Cells without genes: some with the values of each row, mixed up."""
    table = pd.DataFrame([row for row in rows for _ in range(n)], columns=columns.split(), dtype=object)
    table = table.iloc[np.random.default_rng(0).permutation(len(table))]
    table.index = pd.Index([f"cell{number}" for number in range(len(table))])
    return AnnData(np.zeros((len(table), 0), dtype=np.float32), obs=table)


def found(adata: AnnData, keys: Keys) -> list[str]:
    """Transitions as texts."""
    pairs = transitions(populations(adata, keys), keys)
    return [f"{pair.source} -> {pair.target}" for pair in pairs]


def test_actions_come_from_the_controls_of_their_group() -> None:
    adata = cells("group action", *[(group, action) for group in "xy" for action in ("ctrl", "A", "B")])
    expected = [f"{group}, control -> {group}, {action}" for group in "xy" for action in "AB"]
    assert found(adata, ACTION) == expected
    assert all(pair.duration is None for pair in transitions(populations(adata, ACTION), ACTION))


def test_times_come_from_the_time_before() -> None:
    adata = cells("group time", ("x", 0), ("x", 6), ("x", 30), ("y", 6), ("y", 7))
    assert found(adata, TIME) == [
        "x, control at 0 -> x, control at 6",
        "x, control at 6 -> x, control at 30",
        "y, control at 6 -> y, control at 7",
    ]
    assert [pair.duration for pair in transitions(populations(adata, TIME), TIME)] == [6, 24, 1]


def test_with_both_cells_come_from_the_same_action_then_from_controls() -> None:
    adata = cells(
        "group action time",
        ("x", "ctrl", 0),
        ("x", "ctrl", 1),
        ("x", "A", 1),
        ("x", "A", 2),
        ("x", "B", 2),
        ("x", "B", 3),
    )
    assert found(adata, BOTH) == [
        "x, control at 0 -> x, control at 1",
        "x, control at 0 -> x, A at 1",
        "x, A at 1 -> x, A at 2",
        "x, control at 1 -> x, B at 2",
        "x, B at 2 -> x, B at 3",
    ]


def test_with_both_cells_come_from_the_only_action_of_the_time_before() -> None:
    adata = cells("group action time", ("x", "A", 0), ("x", "B", 1), ("x", "ctrl", 2))
    assert sorted(found(adata, BOTH)) == ["x, A at 0 -> x, B at 1", "x, B at 1 -> x, control at 2"]


def test_with_both_cells_that_could_come_from_two_actions_are_left_out() -> None:
    adata = cells("group action time", ("x", "A", 0), ("x", "B", 0), ("x", "A", 1), ("x", "C", 1))
    with pytest.warns(DataWarning, match=r"1 of 4 populations are left out.*: x, C at 1 \(4 cells\)\."):
        assert found(adata, BOTH) == ["x, A at 0 -> x, A at 1"]


def test_combinations_have_no_order() -> None:
    adata = cells("group action", ("x", "ctrl"), ("x", "A+B"), ("x", "B+A"), ("x", "ctrl+B+A"))
    assert found(adata, ACTION) == ["x, control -> x, A+B"]
    assert [len(population.cells) for population in populations(adata, ACTION)] == [4, 12]


def test_doses_are_populations_of_their_own() -> None:
    adata = cells("action dose", ("ctrl", 0), ("ctrl", np.nan), ("A", 1), ("A", 10))
    assert found(adata, DOSE) == ["all cells, control -> all cells, A (1)", "all cells, control -> all cells, A (10)"]
    assert len(populations(adata, DOSE)[0].cells) == 8


def test_doses_that_are_all_zero_are_refused() -> None:
    adata = cells("action dose", ("ctrl", 0), ("A", 0), ("B", 0), ("B", 1))
    with pytest.raises(DataError, match=r"(?s)`obs\['dose'\]` is 0 for all cells with the action 'A'.*\nFix: "):
        populations(adata, DOSE)


def test_every_cell_is_in_its_population(rng: np.random.Generator) -> None:
    obs = {"group": rng.choice(list("xyz"), 200), "action": rng.choice(["ctrl", "A", "B"], 200)}
    adata = cells("group action", *zip(*obs.values(), strict=True), n=1)
    own = populations(adata, ACTION)
    assert sorted(np.concatenate([population.cells for population in own]).tolist()) == list(range(200))
    for population in own:
        assert set(adata.obs["group"].iloc[population.cells]) == {population.group}
        named = "+".join(population.action.parts) or "ctrl"
        assert set(adata.obs["action"].iloc[population.cells]) == {named}


@pytest.mark.parametrize("nothing", [None, np.nan, pd.NA, "", "  "])
@pytest.mark.parametrize("key", ["group", "action"])
def test_cells_with_missing_values_are_left_out(key: str, nothing: Any) -> None:
    adata = cells("group action", ("x", "ctrl"), ("x", "A"))
    adata.obs.loc["cell2", key] = nothing
    with pytest.warns(DataWarning, match="1 of 8 cells have no group or no action; they are left out"):
        own = populations(adata, ACTION)
    assert sorted(np.concatenate([population.cells for population in own]).tolist()) == [0, 1, 3, 4, 5, 6, 7]


def test_a_blank_may_be_the_control() -> None:
    adata = cells("action", ("",), ("A",))
    assert found(adata, Keys(action="action", control="")) == ["all cells, control -> all cells, A"]


def test_categories_without_cells_are_no_populations() -> None:
    adata = cells("group action", ("x", "ctrl"), ("x", "A"))
    adata.obs["action"] = pd.Categorical(adata.obs["action"], categories=["ctrl", "A", "never"])
    adata.obs["group"] = pd.Categorical(adata.obs["group"], categories=["x", "nowhere"])
    assert found(adata, ACTION) == ["x, control -> x, A"]


def test_small_populations_are_left_out() -> None:
    adata = cells("group action", ("x", "ctrl"), ("x", "A"), ("x", "B"))
    few = np.flatnonzero(adata.obs["action"] == "B")[: FEWEST_CELLS - 1]
    adata = adata[np.sort([*np.flatnonzero(adata.obs["action"] != "B"), *few])].copy()
    with pytest.warns(DataWarning, match=r"1 of 3 populations are left out, .* than 3 cells .*: x, B \(2 cells\)\."):
        assert found(adata, ACTION) == ["x, control -> x, A"]


def test_a_group_of_one_time_is_left_out() -> None:
    adata = cells("group time", ("x", 0), ("x", 1), ("y", 1))
    with pytest.warns(DataWarning, match=r"1 of 3 populations .* y, control at 1 \(4 cells\)"):
        assert found(adata, TIME) == ["x, control at 0 -> x, control at 1"]


def test_a_group_without_a_control_is_left_out() -> None:
    adata = cells("group action", ("x", "ctrl"), ("x", "A"), ("y", "A"))
    with pytest.warns(DataWarning, match=r"1 of 3 populations .* y, A \(4 cells\)"):
        assert found(adata, ACTION) == ["x, control -> x, A"]


@pytest.mark.parametrize("times", [(0, 24), ("0", "24"), (0.0, np.float32(24)), ("0", 24), (-24, 0)])
def test_times_are_numbers_however_they_are_written(times: tuple[Any, Any]) -> None:
    adata = cells("group time", *[("x", time) for time in times])
    for column in (adata.obs["time"], adata.obs["time"].astype(str).astype("category")):
        adata.obs["time"] = column
        (pair,) = transitions(populations(adata, TIME), TIME)
        assert pair.duration == 24


def test_strange_columns_are_read() -> None:
    for values, control in (((0, 1), "0"), ((False, True), "False"), ((b"ctrl", b"A"), "ctrl"), ((0.0, 1.5), "0.0")):
        adata = cells("action", *[(value,) for value in values])
        keys = Keys(action="action", control=control)
        assert len(found(adata, keys)) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "neither `action_key` nor `time_key`"),
        ({"group": "group"}, "neither `action_key` nor `time_key`"),
        ({"action": "action"}, "`control` is None"),
        ({"time": "time", "control": "ctrl"}, "`action_key` is None and `control` is 'ctrl'"),
        ({"time": "time", "dose": "dose"}, "`dose_key` is given without `action_key`"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Keys(**keys)


@pytest.mark.parametrize("key", ["action", "group", "time", "dose"])
def test_columns_that_do_not_exist(key: str) -> None:
    adata = cells("action group time dose", ("ctrl", "x", 0, 0), ("A", "x", 1, 1))
    names: dict[str, Any] = {"action": "action", "control": "ctrl", "group": "group", "time": "time", "dose": "dose"}
    with pytest.raises(MissingKeyError, match=r"`obs\['none'\]` does not exist, found 'action', 'group'"):
        populations(adata, Keys(**names | {key: "none"}))


def test_a_control_is_needed() -> None:
    adata = cells("group action", ("x", "mock"), ("x", "A"))
    with pytest.raises(DataError, match=r"(?s)never 'ctrl', found 'A', 'mock'.*Fix: pass the name of the control"):
        populations(adata, ACTION)


def test_more_than_controls_are_needed() -> None:
    with pytest.raises(DataError, match="all cells are controls"):
        populations(cells("group action", ("x", "ctrl")), ACTION)
    with pytest.raises(DataError, match="`adata` has no cells"):
        populations(cells("group action", ("x", "ctrl"))[:0].copy(), ACTION)


@pytest.mark.parametrize(
    ("adata", "keys", "message"),
    [
        (cells("group action", ("x", "ctrl"), ("y", "A")), ACTION, "no group has a control and another action"),
        (cells("group time", ("x", 0), ("y", 1)), TIME, "no group has two times"),
        (cells("group action", ("x", "ctrl"), ("x", "A"), n=2), ACTION, "with at least 3 cells each"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*populations are left out:genejepa.errors.DataWarning")
def test_groups_never_mix(adata: AnnData, keys: Keys, message: str) -> None:
    with pytest.raises(DataError, match=message):
        found(adata, keys)


@pytest.mark.parametrize("value", [np.nan, None, np.inf, "24 h"])
@pytest.mark.parametrize("key", ["time", "dose"])
def test_what_is_no_number_is_refused_and_the_fix_works(key: str, value: Any) -> None:
    adata = cells("action time dose", ("ctrl", 0, np.nan), ("A", 1, 1))
    treated = adata.obs_names[adata.obs["action"] == "A"][0]
    adata.obs.loc[treated, key] = value
    keys = Keys(action="action", control="ctrl", time="time", dose="dose")
    with pytest.raises(DataError, match=rf"`obs\['{key}'\]` has no finite number for 1 of 8 .* '{treated}'") as caught:
        populations(adata, keys)
    names: dict[str, Any] = {"adata": adata, "numpy": np, "pandas": pd}
    exec(caught.value.fix, names)
    assert [len(population.cells) for population in populations(names["adata"], keys)] == [4, 3]


def test_a_column_without_numbers_is_refused() -> None:
    adata = cells("group time", ("x", "early"), ("x", "late"))
    with pytest.raises(
        DataError, match=r"(?s)for 8 of 8 cells, such as '\w+' of 'cell0'.*Fix: make `obs\['time'\]` num"
    ):
        populations(adata, TIME)


def test_negative_doses_are_refused() -> None:
    with pytest.raises(DataError, match="negative doses"):
        populations(cells("action dose", ("ctrl", -1), ("A", -1)), DOSE)
    assert len(populations(cells("action dose", ("ctrl", -1), ("A", 1)), DOSE)) == 2  # that of a control is not read


def test_a_shifted_population_is_matched_cell_by_cell(rng: np.random.Generator) -> None:
    before = rng.normal(size=(30, 4)).astype(np.float32)
    order = rng.permutation(30)
    pairs = match(before, before[order] + np.float32(5.0), rng)
    assert len(pairs.weight) == 30
    np.testing.assert_array_equal(order[pairs.after], pairs.before)
    np.testing.assert_allclose(pairs.weight, 1 / 30)


@pytest.mark.parametrize(("n", "m"), [(7, 11), (11, 7), (3, 40), (1, 5), (5, 1)])
def test_all_cells_have_the_same_mass(n: int, m: int, rng: np.random.Generator) -> None:
    before, after = (rng.normal(size=(k, 3)).astype(np.float32) for k in (n, m))
    pairs = match(before, after, rng)
    assert pairs.weight.min() > 0
    np.testing.assert_allclose(np.bincount(pairs.before, pairs.weight, n), 1 / n)
    np.testing.assert_allclose(np.bincount(pairs.after, pairs.weight, m), 1 / m)


def test_large_populations_are_matched_in_blocks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    import ot

    sizes: list[tuple[int, ...]] = []

    def plan(a: Any, b: Any, cost: Any, **options: Any) -> Any:
        sizes.append(cost.shape)
        return solve(a, b, cost, **options)

    solve = ot.emd
    monkeypatch.setattr(ot, "emd", plan)
    before = rng.normal(size=(1201, 2)).astype(np.float32)
    after = (rng.normal(size=(1050, 2)) + 3).astype(np.float32)
    pairs = match(before, after, np.random.default_rng(1))
    assert sizes == [(601, 525), (600, 525)]
    np.testing.assert_allclose(np.bincount(pairs.before, pairs.weight, 1201), 1 / 1201)
    np.testing.assert_allclose(np.bincount(pairs.after, pairs.weight, 1050), 1 / 1050, rtol=2e-3)
    again = match(before, after, np.random.default_rng(1))
    np.testing.assert_array_equal(again.before, pairs.before)
    np.testing.assert_array_equal(again.after, pairs.after)
    np.testing.assert_array_equal(again.weight, pairs.weight)


def test_blocks_of_very_unequal_populations_are_not_empty(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genejepa.world.transitions._BLOCK", 10)
    pairs = match(rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=(95, 2)).astype(np.float32), rng)
    assert sorted(set(pairs.after.tolist())) == list(range(95))
    np.testing.assert_allclose(np.bincount(pairs.before, pairs.weight, 3), 1 / 3)
