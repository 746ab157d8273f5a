from __future__ import annotations

import importlib
import os
import re
from itertools import product
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from genejepa.bench import METHODS, TASKS, Run

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
DOCUMENT = REPOSITORY / "docs" / "benchmark.md"

DATA = [("cells", "cell_type", True), ("sorted", "gate", False)]
HEIGHTS = {"genejepa": 0.8, "PCA-50 sqrt": 0.85, "PCA-30 sqrt": 0.7, "scVI-10": 0.6, "genejepa, MLP encoder": 0.81}
ENVIRONMENT = pd.DataFrame({"name": ["cpu", "processes", "python"], "value": ["abacus", "2", "3.11"]})


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_path() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def data() -> Any:
    return importlib.import_module("_data")


@pytest.fixture(scope="module")
def suite() -> Any:
    return importlib.import_module("suite")


@pytest.fixture(scope="module")
def report() -> Any:
    return importlib.import_module("report")


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    """Two data sets, three seeds of genejepa, one of the others; genejepa is best on the second only."""
    measures = [("linear", "all"), ("knn", "all"), ("few_shot", "5"), ("depth", "0.25")]
    rows = []
    for (dataset, labels, clustered), (method, height), (task, setting) in product(DATA, HEIGHTS.items(), measures):
        value = height + (0.1 if method == "genejepa" and dataset == "sorted" else 0.0)
        for seed in range(3 if method == "genejepa" else 1):
            score = value + 0.01 * (seed - 1) * (method == "genejepa")
            keys = (dataset, labels, clustered, method, seed, "transductive", "plain")
            rows.append((*keys, task, setting, "macro_f1", score, score - 0.02, score + 0.02, 100))
    columns = ["dataset", "labels", "labels_from_clustering", "method", "seed", "regime", "batch"]
    return pd.DataFrame(rows, columns=[*columns, "task", "setting", "metric", "value", "ci_low", "ci_high", "n_cells"])


@pytest.fixture(scope="module")
def costs(scores: pd.DataFrame) -> pd.DataFrame:
    keys = scores[["dataset", "method", "seed", "regime", "batch"]].drop_duplicates(ignore_index=True)
    seconds = keys["method"].map({"scVI-10": 60.0, "genejepa": 5.0}).fillna(1.0)
    return keys.assign(n_cells=100, n_genes=50, fit_seconds=seconds, embed_seconds=0.1, peak_mb=10.0)


@pytest.fixture(scope="module")
def text(report: Any, scores: pd.DataFrame, costs: pd.DataFrame) -> str:
    return str(report.document(scores, costs, ENVIRONMENT))


def section(text: str, title: str) -> str:
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[2]


class TestJobs:
    def test_every_method_runs_somewhere(self, data: Any) -> None:
        jobs = data.all_jobs()
        assert {job.method for job in jobs} == {*METHODS, data.NO_BATCH_KEY}
        assert {job.dataset for job in jobs} == set(data.DATASETS)
        assert {job.method for job in jobs if job.corrected} >= {"Harmony", "scVI-10", "genejepa"}
        assert len(jobs) == len(set(jobs)) == len({job.key for job in jobs})

    def test_jobs_are_possible(self, data: Any) -> None:
        for job in data.all_jobs():
            method = METHODS["genejepa" if job.method == data.NO_BATCH_KEY else job.method]
            assert method.random or job.method == data.HARMONY or job.seed == 0
            assert method.new_cells or job.regime == "transductive"
            assert data.DATASETS[job.dataset].batch_key is not None or not job.corrected

    def test_the_model_has_three_seeds_wherever_it_is_compared(self, data: Any) -> None:
        plain = [job for job in data.all_jobs() if job.method == "genejepa" and job.regime == "transductive"]
        for name in data.DATASETS:
            assert {job.seed for job in plain if job.dataset == name and not job.corrected} == {0, 1, 2}

    def test_all_takes_less_than_90_minutes(self, data: Any) -> None:
        assert sum(job.seconds for job in data.all_jobs()) / 2 < 90 * 60

    def test_key_names_the_files(self, data: Any, suite: Any, tmp_path: Path) -> None:
        job = data.Job("pbmc_facs", "transductive", False, "scVI-10 thinned", 0)
        assert job.key == "pbmc_facs.transductive.plain.scVI-10-thinned.0"
        assert suite.files_of(job, cache=tmp_path).embedding == tmp_path / f"{job.key}.npz"

    def test_every_task_is_asked_of_some_job(self, data: Any, suite: Any) -> None:
        assert {task for job in data.all_jobs() for task in suite.tasks_of(job)} == set(TASKS)


class TestCache:
    def test_own_rows_follow_the_code_of_the_model_and_baselines_do_not(
        self, data: Any, suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, other = (data.Job("pbmc3k", "transductive", False, name, 0) for name in ("genejepa", "scVI-10"))
        for name in suite.MODEL_CODE + suite.SCORING_CODE:
            path = tmp_path / name if name.endswith(".py") else tmp_path / name / "module.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        monkeypatch.setattr(suite, "PACKAGE", tmp_path)

        def files() -> list[Any]:
            suite.digest.cache_clear()
            return [suite.files_of(job) for job in (own, other)]

        before = files()
        (tmp_path / "nn" / "module.py").write_text("depth = 2")
        changed = files()
        assert changed[0].embedding != before[0].embedding
        assert changed[1] == before[1]
        (tmp_path / "bench" / "tasks.py").write_text("seed = 1")
        rescored = files()
        for old, new in zip(changed, rescored, strict=True):
            assert new.embedding == old.embedding
            assert new.scores != old.scores
        suite.digest.cache_clear()

    def test_new_embedding_is_scored_again(self, suite: Any, tmp_path: Path) -> None:
        files = suite.Files(tmp_path / "a.npz", tmp_path / "a.csv", tmp_path / "a.cost.csv")
        assert not suite.is_done(files)
        for path in files:
            path.touch()
        assert suite.is_done(files)
        later = files.scores.stat().st_mtime + 10
        os.utime(files.embedding, (later, later))
        assert not suite.is_done(files)

    def test_kept_embedding_is_used(self, suite: Any, data: Any, tmp_path: Path, adata: anndata.AnnData) -> None:
        Z = np.ones((adata.n_obs, 2), np.float32)
        Run("scVI-10", 0, {"full": Z}, 1.0, 0.1, 5.0, None, None).save(tmp_path / "kept.npz")
        job = data.Job("pbmc3k", "transductive", False, "scVI-10", 0)
        run = suite.embedded(job, tmp_path / "kept.npz", adata)
        np.testing.assert_array_equal(run.views["full"], Z)


class TestWork:
    @pytest.fixture
    def folder(self, data: Any, suite: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_adata: Any) -> Path:
        adata = make_adata(n_obs=120)
        adata.obs["donor"] = np.array(list("abcdef"))[np.arange(120) // 20]
        adata.obs["sick"] = np.where(np.arange(120) % 40 < 20, "yes", "no")
        adata.write_h5ad(tmp_path / "small.h5ad")
        small = data.DataSet("small.h5ad", "nobody", 120, {"cell_type": False, "batch": False}, "batch")
        monkeypatch.setitem(data.DATASETS, "small", small)
        donors = data.DataSet("small.h5ad", "nobody", 120, {"sick": False}, "donor", "donor")
        monkeypatch.setitem(data.DATASETS, "donors", donors)
        monkeypatch.setattr(suite, "PLAIN_TASKS", ("knn", "depth", "leak"))
        monkeypatch.setattr(suite, "PROBES", ("knn",))
        return tmp_path

    @pytest.mark.parametrize(
        ("dataset", "regime", "tasks"),
        [
            ("small", "transductive", {"knn", "depth", "leak"}),
            ("small", "inductive", {"knn"}),
            ("donors", "transductive", {"left_out_groups", "leak"}),
        ],
    )
    def test_writes_scores_costs_and_embedding(
        self, suite: Any, data: Any, folder: Path, dataset: str, regime: str, tasks: set[str]
    ) -> None:
        job = data.Job(dataset, regime, False, "PCA-30 sqrt", 0)
        files = suite.files_of(job, cache=folder / "cache")
        suite.work(job, files, folder)
        table = pd.read_csv(files.scores)
        assert set(table["task"]) == tasks
        assert set(table["labels"]) == set(data.DATASETS[dataset].labels)
        assert table.groupby("labels")["task"].apply(lambda values: "leak" in set(values)).sum() == ("leak" in tasks)
        run = Run.load(files.embedding)
        assert (run.held_out is not None) == (regime == "inductive")
        assert pd.read_csv(files.cost)["n_cells"].item() == 120
        assert suite.is_done(files)

    def test_donors_that_share_nothing_give_chance(self, suite: Any, folder: Path) -> None:
        obs = anndata.read_h5ad(folder / "small.h5ad").obs
        Z = np.eye(6, dtype=np.float32)[obs["donor"].cat.codes]  # tells donors apart, and nothing else
        table = suite.group_probe(Z, obs, "sick", "donor")
        assert table.loc[table["metric"] == "accuracy", "value"].item() <= 0.6


class TestDocument:
    def test_shows_every_number_with_its_spread(self, text: str) -> None:
        line = next(line for line in section(text, "linear").splitlines() if line.startswith("| cells"))
        assert "80.0 ± 1.0" in line
        assert "85.0 [83.0, 87.0]" in line
        assert "**-5.0 (PCA-50 sqrt)**" in line

    def test_marks_labels_from_clustering(self, text: str) -> None:
        for title in ("linear", "kNN", "few-shot 5", "25 % of molecules, by data set"):
            rows = [line for line in section(text, title).splitlines() if re.match(r"\| (cells|sorted)", line)]
            assert [("†" in row.split("|")[1]) for row in rows] == [True, False], title

    def test_summary_counts_cells(self, text: str) -> None:
        summary = section(text, "In short")
        assert "All labels: best or tied within 0.5 point in 3 of 6 cells (50 %); worst -5.0 points (cells" in summary
        assert "do not come from clustering: best or tied within 0.5 point in 3 of 3 cells (100 %)" in summary
        assert "+0.0 points against the best PCA" in summary

    def test_says_what_is_worse(self, text: str) -> None:
        part = section(text, "What is worse")
        rows = [line for line in part.splitlines() if line.startswith("| cells")]
        assert len(rows) == 4
        assert all("PCA-50 sqrt: 85.0 [83.0, 87.0]" in row for row in rows)
        assert "| sorted" not in part

    def test_says_which_variant_is_better(self, report: Any, scores: pd.DataFrame, costs: pd.DataFrame) -> None:
        better = 0.1 * (scores["method"] == "genejepa, MLP encoder")
        text = report.document(scores.assign(value=scores["value"] + better), costs, ENVIRONMENT)
        part = section(text, "What is worse")
        assert "“genejepa, MLP encoder”: 6.0 points better than genejepa on average (linear)." in part

    def test_says_what_is_missing(self, data: Any, report: Any, scores: pd.DataFrame, costs: pd.DataFrame) -> None:
        done = costs.iloc[[0, 0]].assign(dataset=["pbmc3k", "paul15"], method=["genejepa", "HVG"], seed=[1, 0])
        some = pd.concat([costs, done], ignore_index=True)
        lines = section(report.document(scores, some, ENVIRONMENT), "Missing").splitlines()
        assert f"{len(data.all_jobs()) - 2} of {len(data.all_jobs())} jobs have no result in these tables:" in lines
        pbmc3k = next(line for line in lines if line.startswith("- pbmc3k, transductive, plain: "))
        assert "HVG (seed 0);" in pbmc3k
        assert pbmc3k.endswith("; genejepa (seed 0, 2)")
        assert not any("HVG" in line for line in lines if line.startswith("- paul15, transductive, plain"))

    def test_gives_times_relative_to_scvi(self, text: str) -> None:
        line = next(line for line in section(text, "Time and memory").splitlines() if "**genejepa**" in line)
        assert line.endswith("| 12 (12 to 12) |")

    @pytest.mark.parametrize("kept", [["genejepa"], ["PCA-50 sqrt"], ["scVI-10", "genejepa"]])
    def test_is_written_with_whatever_is_there(
        self, report: Any, scores: pd.DataFrame, costs: pd.DataFrame, kept: list[str]
    ) -> None:
        some = scores[scores["method"].isin(kept)]
        text = report.document(some, costs[costs["method"].isin(kept)], ENVIRONMENT)
        assert "nan" not in text
        assert section(text, "Missing")

    def test_figure_shows_the_model_and_no_variant(self, report: Any, scores: pd.DataFrame) -> None:
        assert set(report.figure_rows(scores)["method"]) == {"genejepa", "PCA-50 sqrt", "scVI-10"}


@pytest.mark.skipif(not (RESULTS / "scores.csv").exists(), reason="the suite has not been run")
class TestPublished:
    def test_document_is_what_the_tables_say(self, report: Any) -> None:
        assert DOCUMENT.read_text(encoding="utf-8") == report.document(*report.read_results())

    def test_every_number_of_a_table_is_in_the_results(self, report: Any) -> None:
        scores, _, _ = report.read_results()
        table = scores[(scores["regime"] == "transductive") & (scores["batch"] == "plain")]
        table = table[(table["task"] == "linear") & (table["metric"] == "macro_f1")]
        means = table.groupby(["dataset", "labels", "method"])["value"].mean()
        lines = section(DOCUMENT.read_text(encoding="utf-8"), "linear").strip().splitlines()
        header, _, *rows = [[cell.strip(" *†") for cell in line.strip("|").split("|")] for line in lines]
        checked = 0
        for unit, *cells in rows:
            for method, cell in zip(header[1:], cells, strict=True):
                key = (*unit.split(", "), method)
                if method in METHODS and cell != report.NONE:
                    assert cell.split()[0] == f"{100 * means[key]:.1f}", key
                    checked += 1
        assert checked >= len(rows) > 0
