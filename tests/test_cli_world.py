"""``genejepa predict`` and ``genejepa plan``: what they write is what Python gives, and mistakes are told early."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from typer.testing import CliRunner, Result

import genejepa
from genejepa.cli import app, watch
from genejepa.world.model import WorldModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from genejepa.world.plan import Plan

KEYS = ["--action-key", "condition", "--control", "ctrl", "--group-key", "cell_type"]
RISING = [f"gene{number}" for number in range(60, 65)]


def genejepa_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = genejepa_command(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    """Return the message of a call that ends with exit code 2, a hint and no traceback."""
    result = genejepa_command(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Error: ")
    assert "\nFix: " in result.stderr
    return result.stderr


def facts_of(result: Result) -> dict[str, str]:
    lines = [re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


@pytest.fixture(scope="module", autouse=True)
def quick_fits() -> Iterator[None]:
    """Let every fit of a world model end with its linear start."""
    fit = WorldModel.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorldModel, "fit", lambda self, adata, **options: fit(self, adata, **options, max_steps=0))
        yield


@pytest.fixture
def no_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: object, **__: object) -> None:
        pytest.fail("a world model was fitted")

    monkeypatch.setattr(WorldModel, "fit", fit)


@pytest.fixture(scope="module")
def cells(make_adata: Callable[..., AnnData]) -> AnnData:
    """180 cells of three types, in thirds: as they are, stimulated, which raises five genes, and starved of five."""
    found = make_adata(n_obs=180)
    counts = found.X.toarray()
    counts[60:120, 60:65] += 12
    counts[120:, 65:70] = 0
    found.X = counts
    found.obs["condition"] = np.repeat(["ctrl", "stim", "starved"], 60)
    found.obs["dose"] = np.where(found.obs["condition"] == "ctrl", np.nan, 1.0 + np.arange(180) // 3 % 2)
    found.obs["day"] = np.repeat([0, 2], 90)
    return found


@pytest.fixture(scope="module")
def folder(
    cells: AnnData,
    tiny_settings: dict[str, Any],
    tiny_training: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Directory with cells, a model, a world model and what it predicted."""
    path = tmp_path_factory.mktemp("world")
    cells.write_h5ad(path / "cells.h5ad", compression="gzip")
    model = genejepa.GeneJEPA(cells.copy(), **tiny_settings | {"n_genes": None})
    model.train(**tiny_training)
    model.save(path / "model")
    result = done(
        *("predict", path / "cells.h5ad", "--model", path / "model", *KEYS, "--action", "stim"),
        *("-o", path / "predicted.h5ad", "--save-world", path / "world"),
    )
    (path / "summary.txt").write_text(result.stdout, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(folder: Path) -> WorldModel:
    return WorldModel.load(folder / "world")


def controls(cells: AnnData) -> AnnData:
    return cells[(cells.obs["condition"] == "ctrl").to_numpy()].copy()


def assert_equal(found: AnnData, expected: AnnData) -> None:
    np.testing.assert_array_equal(found.X, expected.X)
    np.testing.assert_array_equal(found.layers["change"], expected.layers["change"])
    np.testing.assert_array_equal(found.obsm["X_genejepa"], expected.obsm["X_genejepa"])
    pd.testing.assert_frame_equal(found.obs, expected.obs, check_dtype=False, check_categorical=False)
    assert list(found.var_names) == list(expected.var_names)


# Prediction --------------------------------------------------------------------------------------------


def test_predict_equals_python(folder: Path, cells: AnnData) -> None:
    model = genejepa.GeneJEPA.load(folder / "model")
    fitted = WorldModel(model).fit(cells, action_key="condition", control="ctrl", group_key="cell_type")
    found = read_h5ad(folder / "predicted.h5ad")
    assert found.shape == (60, 80)
    assert_equal(found, fitted.predict(controls(cells), "stim"))


def test_predict_sums_up(folder: Path) -> None:
    text = (folder / "summary.txt").read_text(encoding="utf-8")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())
    assert facts["Cells"] == "60 of 180"
    assert facts["Action"] == "stim"
    assert facts["Learnt from"] == "6 transitions, 3 groups, 2 actions"
    assert re.fullmatch(r"1 of \d for each cell", facts["Futures"])
    found = read_h5ad(folder / "predicted.h5ad")
    assert facts["Energy"].startswith(f"median {found.obs['genejepa_energy'].median():.2f} ")
    rise = dict(entry.split() for entry in facts["Rise most"].split(", "))
    assert set(rise) == set(RISING)
    change = pd.Series(found.layers["change"].mean(0), index=found.var_names)
    assert {name: float(value) for name, value in rise.items()} == pytest.approx(change[RISING].to_dict(), abs=0.006)
    fall = [entry.split()[0] for entry in facts["Fall most"].split(", ")]
    assert fall == list(change.nsmallest(5).index)
    assert facts["Written"] == f"{folder / 'predicted.h5ad'}, {folder / 'world'}"


@pytest.mark.usefixtures("no_fits")
@pytest.mark.parametrize(
    "options", [[], [*KEYS, "--model", "{folder}/model", "--save-world", "{folder}/world"]], ids=["alone", "as before"]
)
def test_a_saved_world_model_predicts_the_same(options: list[str], folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "world").iterdir()}
    given = [option.format(folder=folder) for option in options]
    arguments = ("predict", folder / "cells.h5ad", "--world", folder / "world", "--action", "stim", *given)
    result = done(*arguments, "-o", tmp_path / "new.h5ad")
    assert_equal(read_h5ad(tmp_path / "new.h5ad"), read_h5ad(folder / "predicted.h5ad"))
    assert facts_of(result)["Learnt from"].endswith(f"; loaded from {folder / 'world'}")
    assert facts_of(result)["Written"] == str(tmp_path / "new.h5ad")
    assert {path: path.stat().st_mtime_ns for path in (folder / "world").iterdir()} == before


def test_a_directory_that_is_not_there_yet_is_fitted_and_then_loaded(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "world"
    options = (*KEYS, "--world", home, "--save-world", home, "--action", "stim", "-o", tmp_path / "new.h5ad")
    first = done("predict", folder / "cells.h5ad", "--model", folder / "model", *options)
    again = done("predict", folder / "cells.h5ad", "--model", folder / "model", *options, "--overwrite")
    assert "loaded from" not in facts_of(first)["Learnt from"]
    assert "loaded from" in facts_of(again)["Learnt from"]
    assert_equal(read_h5ad(tmp_path / "new.h5ad"), read_h5ad(folder / "predicted.h5ad"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (["cell_type=alpha"], lambda obs: obs["cell_type"] == "alpha"),
        (["cell_type=alpha", "cell_type=gamma"], lambda obs: obs["cell_type"] != "beta"),
        (["cell_type=alpha", "batch=one"], lambda obs: (obs["cell_type"] == "alpha") & (obs["batch"] == "one")),
        (["day=0.0"], lambda obs: obs["day"] == 0),
    ],
    ids=["one", "two of a column", "two columns", "number"],
)
def test_sources_narrow_the_controls(
    source: list[str], expected: Callable[[pd.DataFrame], Any], folder: Path, cells: AnnData, tmp_path: Path
) -> None:
    options = [option for entry in source for option in ("--source", entry)]
    arguments = ("predict", folder / "cells.h5ad", "--world", folder / "world", "--action", "stim", *options)
    result = done(*arguments, "-o", tmp_path / "new.h5ad")
    chosen = controls(cells).obs.loc[expected]
    assert len(chosen) > 0
    assert list(read_h5ad(tmp_path / "new.h5ad").obs_names) == list(chosen.index)
    assert facts_of(result)["Cells"] == f"{len(chosen)} of 180"


def test_new_cells_need_no_column_with_actions(folder: Path, cells: AnnData, world: WorldModel, tmp_path: Path) -> None:
    new = cells[:20].copy()
    del new.obs["condition"]
    new.layers["counts"], new.X = new.X, np.log1p(new.X)
    new.write_h5ad(tmp_path / "new.h5ad")
    options = ("--world", folder / "world", "--action", "stim", "--layer", "counts", "-o", tmp_path / "after.h5ad")
    result = done("predict", tmp_path / "new.h5ad", *options)
    assert "Warning: `obs` has no column 'condition': the prediction starts from all cells.\n" in result.stderr
    assert_equal(read_h5ad(tmp_path / "after.h5ad"), world.predict(new, "stim", layer="counts"))


def test_without_actions_the_last_cells_are_predicted(folder: Path, cells: AnnData, tmp_path: Path) -> None:
    options = ("--time-key", "day", "--duration", 5, "--save-world", tmp_path / "world", "-o", tmp_path / "new.h5ad")
    result = done("predict", folder / "cells.h5ad", "--model", folder / "model", *options)
    last = cells[(cells.obs["day"] == 2).to_numpy()].copy()
    with pytest.warns(genejepa.errors.ExtrapolationWarning) as caught:
        expected = WorldModel.load(tmp_path / "world").predict(last, duration=5)
    assert_equal(read_h5ad(tmp_path / "new.h5ad"), expected)
    assert facts_of(result)["Action"] == "only time passes, duration 5.0"
    told = [f"Warning: {warning.message}" for warning in caught]
    assert result.stderr.splitlines() == told
    assert told[0] == (
        "Warning: Extrapolation: duration 5 is longer than any transition seen (2); it is predicted in 3 steps."
    )


def test_doses_are_passed_on(folder: Path, cells: AnnData, tmp_path: Path) -> None:
    options = (*KEYS, "--dose-key", "dose", "--save-world", tmp_path / "world", "-o", tmp_path / "new.h5ad")
    done("predict", folder / "cells.h5ad", "--model", folder / "model", *options, "--action", "stim", "--dose", 1.5)
    dosed = WorldModel.load(tmp_path / "world")
    assert_equal(read_h5ad(tmp_path / "new.h5ad"), dosed.predict(controls(cells), "stim", dose=1.5))
    options = ("--world", tmp_path / "world", "--start", "condition=ctrl", "--goal", "condition=stim")
    assert "have doses" in refused("plan", tmp_path / "none.h5ad", *options)


def test_several_futures_count_by_their_probability(
    folder: Path, cells: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = np.zeros((2, 80), dtype=np.float32)
    change[0, 3], change[1, 7] = 1.0, -2.0
    obs = pd.DataFrame({"genejepa_probability": [0.75, 0.25], "genejepa_energy": [1.0, 2.0]}, index=["a-0", "a-1"])
    two = AnnData(change, obs=obs, var=cells.var, layers={"change": change})
    asked: list[int] = []

    def predict(*_: object, n_futures: int, **__: object) -> AnnData:
        asked.append(n_futures)
        return two

    monkeypatch.setattr(WorldModel, "predict", predict)
    arguments = ("predict", folder / "cells.h5ad", "--world", folder / "world", "--action", "stim")
    facts = facts_of(done(*arguments, "--n-futures", 2, "-o", tmp_path / "new.h5ad"))
    assert asked == [2]
    assert facts["Rise most"] == "gene3 +0.75"
    assert facts["Fall most"] == "gene7 -0.50"


def test_extrapolation_is_told_in_a_plain_line(folder: Path, tmp_path: Path) -> None:
    options = ("--world", folder / "world", "--action", "starved+stim", "-o", tmp_path / "new.h5ad")
    result = done("predict", folder / "cells.h5ad", *options)
    assert result.stderr.splitlines() == [
        "Warning: Extrapolation: the combination 'starved+stim' was not seen; the effects of its parts are added."
    ]


# Plans -------------------------------------------------------------------------------------------------

WAY = ["--start", "condition=ctrl", "--goal", "condition=stim", "--goal", "cell_type=alpha"]


def ends(cells: AnnData) -> tuple[AnnData, AnnData]:
    goal = (cells.obs["condition"] == "stim") & (cells.obs["cell_type"] == "alpha")
    return controls(cells), cells[goal.to_numpy()].copy()


def test_plan_equals_python(folder: Path, cells: AnnData, tmp_path: Path) -> None:
    options = ("--horizon", 2, "--n-best", 4, "-o", tmp_path / "plan.csv", "--picture", tmp_path / "plan.png")
    result = done("plan", folder / "cells.h5ad", "--model", folder / "model", *KEYS, *WAY, *options)
    world = WorldModel.load(folder / "world")
    expected = world.plan(*ends(cells), horizon=2, n_best=4)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "plan.csv", index_col="rank"), expected.table)
    for rank, row in expected.table.iterrows():
        assert re.search(
            rf"│ +{rank} │ {row['actions']} +│ +{row['distance']:.3f} │ +{row['cost']:.3f} │\n", result.stdout
        )
    facts = facts_of(result)
    assert facts["Start"] == "60 cells"
    assert facts["Goal"] == "20 cells"
    assert facts["Search"] == f"exhaustive, {expected.n_evaluations} populations imagined"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_fits")
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--actions", "stim", "--horizon", "2"], {"actions": ["stim"], "horizon": 2}),
        (["--method", "cross_entropy"], {"method": "cross_entropy"}),
    ],
    ids=["actions", "cross-entropy"],
)
def test_options_of_a_plan_are_passed_on(
    options: list[str], arguments: dict[str, Any], folder: Path, cells: AnnData, world: WorldModel, tmp_path: Path
) -> None:
    done("plan", folder / "cells.h5ad", "--world", folder / "world", *WAY, *options, "-o", tmp_path / "plan.csv")
    expected = world.plan(*ends(cells), **arguments).table
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "plan.csv", index_col="rank"), expected)


def test_a_hierarchical_plan_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search itself, which takes seconds, is that of another method."""
    asked: list[dict[str, Any]] = []
    plan = WorldModel.plan

    def quick(self: WorldModel, start: AnnData, goal: AnnData, *_: object, **options: Any) -> Plan:
        asked.append(options)
        return plan(self, start, goal, horizon=1)

    monkeypatch.setattr(WorldModel, "plan", quick)
    options = ("--method", "hierarchical", "--horizon", 4)
    done("plan", folder / "cells.h5ad", "--world", folder / "world", *WAY, *options)
    assert (asked[0]["method"], asked[0]["horizon"], asked[0]["span"]) == ("hierarchical", 4, 2)


def test_a_plan_is_printed_if_nothing_is_to_be_written(folder: Path) -> None:
    result = done("plan", folder / "cells.h5ad", "--world", folder / "world", *WAY, "--horizon", 1)
    assert "stim" in result.stdout
    assert "Written" not in result.stdout


# Mistakes ----------------------------------------------------------------------------------------------

MODEL, WORLD = ["--model", "{folder}/model"], ["--world", "{folder}/world"]
FIT = [*MODEL, *KEYS]


@pytest.mark.usefixtures("no_fits")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "neither `--world` nor `--model` is given"),
        (["--world", "{folder}/no"], "no does not exist, and no `--model` is given"),
        (MODEL, "neither `action_key` nor `time_key` is given"),
        ([*MODEL, "--action-key", "condition"], "both or neither are needed"),
        ([*MODEL, "--time-key", "day", "--dose-key", "dose"], "`dose_key` is given without `action_key`"),
        ([*FIT, "--source", "cell_type"], "`--source cell_type` is not of the form COLUMN=VALUE"),
        ([*FIT, "--source", "=alpha"], "`--source =alpha` is not of the form COLUMN=VALUE"),
        ([*FIT, "--layer", "counts", "--use-raw"], "expected one of them"),
        (FIT, "no action is given, and without times only actions change cells"),
        ([*FIT, "--action", "ctrl"], "'ctrl' is given, and without times"),
        ([*WORLD], "no action is given, and without times"),
        ([*MODEL, "--time-key", "day", "--action", "stim"], "'stim' is given, and there is no `--action-key`"),
        ([*FIT, "--action", "stim", "--dose", "1"], "`--dose` is given, and there is no `--dose-key`"),
        ([*FIT, "--dose-key", "dose", "--action", "stim"], "no `--dose` is given for 'stim'"),
        ([*FIT, "--dose-key", "dose", "--action", "stim", "--dose", "nan"], "`--dose` is nan"),
        ([*FIT, "--action", "stim", "--duration", "1"], "`--duration` is given, and there is no `--time-key`"),
        ([*MODEL, "--time-key", "day", "--duration", "-1"], "`--duration` is -1"),
        ([*WORLD, "--control", "stim"], "--control was 'ctrl' and is 'stim'"),
        ([*WORLD, "--time-key", "day"], "--time-key was None and is 'day'"),
        ([*WORLD, "--model", "{folder}/world"], "holds a world model, expected a model"),
        (["--world", "{folder}/model"], "holds a model, expected a world model"),
        ([*FIT, "--save-world", "{folder}/world"], "world holds a world model"),
        ([*FIT, "--save-world", "{folder}/model", "--overwrite"], "holds a model, not a world model"),
        ([*FIT, "--save-world", "{folder}"], "not of genejepa"),
        ([*FIT, "--save-world", "{folder}/new.h5ad"], "is read, or named for something else"),
    ],
)
def test_mistakes_of_predict_show_before_the_cells_are_read(options: list[str], message: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    given = [option.format(folder=folder) for option in options]
    assert message in refused("predict", folder / "none.h5ad", *given, "-o", folder / "new.h5ad")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.usefixtures("no_fits")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "ctrl", "--goal", "condition=stim"], "`--start ctrl` is not of the form COLUMN=VALUE"),
        (["--start", "condition=ctrl", "--goal", "stim"], "`--goal stim` is not of the form COLUMN=VALUE"),
        ([*WAY, "--method", "hierarchical", "--horizon", "2"], "takes 2 actions at once, and `--horizon` is 2"),
        ([*WAY, "--picture", "{folder}/plan.jpg"], "expected a name that ends with .pdf, .png, .svg"),
        ([*WAY, "-o", "{folder}/a.png", "--picture", "{folder}/a.png"], "is read, or named for something else"),
        ([*WAY, "-o", "{folder}/none/plan.csv"], "none does not exist"),
        ([*WAY, "-o", "{folder}/summary.txt"], "summary.txt exists"),
        ([*WAY, "--actions", "ctrl"], "'ctrl' is given, and without times"),
    ],
)
def test_mistakes_of_plan_show_before_the_cells_are_read(options: list[str], message: str, folder: Path) -> None:
    given = [option.format(folder=folder) for option in [*FIT, *options]]
    assert message in refused("plan", folder / "none.h5ad", *given)


@pytest.mark.parametrize("option", ["--start", "--goal"])
def test_a_plan_has_a_start_and_a_goal(option: str, folder: Path) -> None:
    result = genejepa_command("plan", folder / "cells.h5ad", "--world", folder / "world", option, "condition=ctrl")
    assert result.exit_code == 2
    assert "Missing option" in result.stderr


@pytest.mark.usefixtures("no_fits")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "donor=1"], "`obs['donor']` does not exist"),
        (["--source", "cell_type=delta"], "`obs['cell_type']` is never 'delta', found 'alpha', 'beta', 'gamma'"),
        (["--source", "day=1"], "`obs['day']` is never '1', found '0', '2'"),
        (["--source", "condition=stim"], "none of the 60 cells that a prediction starts from has condition stim"),
        (["--control", "none"], "no cell is a control: `obs['condition']` is never 'none', found 'ctrl', 'starved'"),
        (["--action-key", "treatment"], "`obs['treatment']` does not exist"),
        (["--group-key", "donor"], "`obs['donor']` does not exist"),
        (["--action", "stin"], "did you mean 'stim'?"),
        (["--action", "stim+stin"], "did you mean 'stim'?"),
    ],
)
def test_mistakes_about_the_cells_show_before_the_fit(options: list[str], message: str, folder: Path) -> None:
    arguments = ("predict", folder / "cells.h5ad", "--model", folder / "model", *KEYS, "--action", "stim", *options)
    assert message in refused(*arguments, "-o", folder / "new.h5ad")
    assert not (folder / "new.h5ad").exists()


@pytest.mark.usefixtures("no_fits")
def test_mistakes_about_the_cells_of_a_plan_show_before_the_fit(folder: Path) -> None:
    arguments = ("plan", folder / "cells.h5ad", "--model", folder / "model", *KEYS)
    message = "`obs['condition']` is never 'none', found 'ctrl', 'starved', 'stim'.\nFix: give --goal condition=VALUE"
    assert message in refused(*arguments, "--start", "condition=ctrl", "--goal", "condition=none")
    assert "none of the cells has condition ctrl and dose 1" in refused(
        *arguments, "--start", "condition=ctrl", "--start", "dose=1", "--goal", "condition=stim"
    )
    assert "did you mean 'stim'?" in refused(*arguments, *WAY, "--actions", "stin")


def test_cells_without_a_time_have_no_last_one(folder: Path, cells: AnnData, tmp_path: Path) -> None:
    timeless = cells.copy()
    timeless.obs["day"] = np.nan
    timeless.write_h5ad(tmp_path / "cells.h5ad")
    options = ("--model", folder / "model", "--time-key", "day", "-o", tmp_path / "new.h5ad")
    assert "`obs['day']` has no finite number" in refused("predict", tmp_path / "cells.h5ad", *options)


def test_a_fit_is_kept_when_the_prediction_cannot_be_made(folder: Path, tmp_path: Path) -> None:
    options = (*KEYS, "--action", "stim", "--n-futures", 9, "--save-world", tmp_path / "world")
    arguments = ("predict", folder / "cells.h5ad", "--model", folder / "model", *options)
    assert "`n_futures` is 9" in refused(*arguments, "-o", tmp_path / "new.h5ad")
    assert WorldModel.load(tmp_path / "world").actions == ["starved", "stim"]
    assert not (tmp_path / "new.h5ad").exists()


@pytest.mark.parametrize("name", ["cells.h5ad", "link.h5ad"])
def test_the_input_is_never_replaced(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cells.h5ad").write_bytes((folder / "cells.h5ad").read_bytes())
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "cells.h5ad")
    options = ("--world", folder / "world", "--action", "stim", "--overwrite", "-o", tmp_path / name)
    assert "is read, or named for something else" in refused("predict", tmp_path / "cells.h5ad", *options)
    assert (tmp_path / "cells.h5ad").read_bytes() == (folder / "cells.h5ad").read_bytes()


def test_an_earlier_prediction_is_replaced_on_request_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new.h5ad").write_text("mine", encoding="utf-8")
    options = ("--world", folder / "world", "--action", "starved", "-o", tmp_path / "new.h5ad")
    assert "new.h5ad exists" in refused("predict", folder / "cells.h5ad", *options)
    assert (tmp_path / "new.h5ad").read_text(encoding="utf-8") == "mine"
    done("predict", folder / "cells.h5ad", *options, "--overwrite")
    assert set(read_h5ad(tmp_path / "new.h5ad").obs["genejepa_action"]) == {"starved"}


@pytest.mark.parametrize("command", ["predict", "plan"])
def test_the_cells_are_read_under_watch(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def look(_: Path, *, seconds: float) -> None:
        waited.append(seconds)
        raise genejepa.errors.DataError("it hangs.", fix="copy it again.")

    monkeypatch.setattr(watch, "_require_answer", look)
    options: list[Any] = ["--action", "stim", "-o", tmp_path / "new.h5ad"] if command == "predict" else WAY
    arguments = (command, folder / "cells.h5ad", "--world", folder / "world", "--read-timeout", 7, *options)
    assert "it hangs" in refused(*arguments)
    assert waited == [7]


@pytest.mark.parametrize("command", ["predict", "plan"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: genejepa {command} " in done(command, "--help").output


def test_names_of_actions_do_not_change_the_terminal(folder: Path, cells: AnnData, tmp_path: Path) -> None:
    odd = cells.copy()
    odd.obs["condition"] = odd.obs["condition"].astype(str).replace("stim", "[bold]st\x1b[31mim")
    odd.write_h5ad(tmp_path / "odd.h5ad")
    arguments = ("plan", tmp_path / "odd.h5ad", "--model", folder / "model", *KEYS, "--horizon", 1)
    result = done(*arguments, "--start", "condition=ctrl", "--goal", "condition=starved")
    assert "[bold]st\\x1b[31mim" in result.stdout
    assert "\x1b" not in result.stdout
