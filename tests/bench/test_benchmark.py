from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import genejepa
from genejepa.bench import FitOptions, Method, Run, fit_and_embed, hold_out, panel_of, statistics
from genejepa.bench.methods import DEFAULT_METHODS, HARMONY, METHODS
from genejepa.errors import ConfigError, DataError, MissingKeyError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from genejepa.bench import Embed

COLUMNS = [
    "method",
    "seed",
    "regime",
    "task",
    "setting",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n_cells",
    "labels_from_clustering",
]
QUIET: dict[str, Any] = {"labels_key": "cell_type", "n_genes": 40, "progress_bar": False}


def sums(adata: anndata.AnnData, options: FitOptions) -> Embed:
    """Sums over random sets of genes, of a fixed width, whatever genes are left."""

    def embed(cells: anndata.AnnData) -> NDArray[np.float32]:
        rng = np.random.default_rng(options.seed)
        weights = dict(zip(adata.var_names, rng.normal(size=(adata.n_vars, 8)), strict=True))
        return np.asarray(np.sqrt(cells.X.toarray()) @ np.stack([weights[g] for g in cells.var_names]), np.float32)

    return embed


def returning(value: Any) -> Method:
    return Method("bad", lambda adata, options: lambda cells: value)


@pytest.fixture
def cells(adata: anndata.AnnData) -> anndata.AnnData:
    return panel_of(adata, n_genes=40)


def same_anndata(first: anndata.AnnData, second: anndata.AnnData) -> None:
    pd.testing.assert_frame_equal(first.obs, second.obs)
    pd.testing.assert_frame_equal(first.var, second.var)
    assert (first.X != second.X).nnz == 0
    assert list(first.uns) == list(second.uns)
    assert list(first.obsm) == list(second.obsm)


class TestPanel:
    def test_is_the_panel_of_the_model(self, adata: anndata.AnnData) -> None:
        adata.layers["counts"] = adata.X.copy()
        adata.X = np.log1p(adata.X.toarray())
        genejepa.GeneJEPA.setup_anndata(adata, layer="counts")
        panel = panel_of(adata, n_genes=30)
        assert list(panel.var_names) == genejepa.GeneJEPA(adata, n_genes=30).genes
        assert panel.X.dtype == np.float32
        assert panel.X.format == "csr"
        np.testing.assert_array_equal(panel.X.toarray(), adata[:, panel.var_names].layers["counts"].toarray())
        pd.testing.assert_frame_equal(panel.obs, adata.obs)
        assert not panel.layers

    def test_held_out_cells_have_no_say(self, make_adata: Callable[..., anndata.AnnData]) -> None:
        adata = make_adata(n_obs=90)
        held_out = hold_out(adata.obs["cell_type"])
        panel = panel_of(adata, n_genes=20, held_out=held_out)
        assert panel.n_obs == 90
        assert list(panel.var_names) == list(panel_of(adata[~held_out], n_genes=20).var_names)
        other = adata.X.toarray()
        other[held_out] = 3 * other[held_out][:, ::-1]
        changed = anndata.AnnData(sparse.csr_matrix(other), obs=adata.obs, var=adata.var)
        assert list(panel.var_names) == list(panel_of(changed, n_genes=20, held_out=held_out).var_names)
        assert list(panel.var_names) != list(panel_of(changed, n_genes=20).var_names)

    def test_needs_counts(self, adata: anndata.AnnData) -> None:
        adata.X = adata.X * 0.5
        with pytest.raises(DataError, match="expected counts"):
            panel_of(adata)

    def test_hold_out_takes_a_share_of_every_class(self) -> None:
        labels = pd.Series(["a"] * 50 + ["b"] * 10 + [None] * 5)
        held_out = hold_out(labels)
        assert [held_out[:50].sum(), held_out[50:60].sum(), held_out[60:].sum()] == [10, 2, 1]
        np.testing.assert_array_equal(held_out, hold_out(labels))
        assert (held_out != hold_out(labels, seed=1)).any()


class TestFitAndEmbed:
    def test_views_and_costs(self, cells: anndata.AnnData) -> None:
        before = cells.copy()
        run = fit_and_embed(Method("sums", sums), cells, seed=3, batch_key="batch")
        assert list(run.views) == ["full", "depth 0.5", "depth 0.25", "depth 0.1", "genes 0.5", "genes 0.2"]
        np.testing.assert_array_equal(run.views["full"], sums(cells, FitOptions(seed=3))(cells))
        assert (run.views["full"] != run.views["depth 0.5"]).any()
        assert (run.method, run.seed, run.batch_key, run.held_out) == ("sums", 3, None, None)
        assert run.fit_seconds >= 0
        assert run.embed_seconds > 0
        same_anndata(cells, before)

    def test_method_sees_only_the_fitted_cells(self, cells: anndata.AnnData) -> None:
        seen: list[list[str]] = []

        def fit(adata: anndata.AnnData, options: FitOptions) -> Embed:
            seen.append(list(adata.obs_names))
            assert options == FitOptions(seed=1, batch_key="batch", threads=1)
            adata.X.data[:] = 0  # its own copy
            return sums(adata, options)

        held_out = hold_out(cells.obs["cell_type"])
        run = fit_and_embed(
            Method("m", fit, uses_batch=True), cells, seed=1, batch_key="batch", held_out=held_out, stress=False
        )
        assert seen == [list(cells.obs_names[~held_out])]
        assert list(run.views) == ["full"]
        np.testing.assert_array_equal(run.views["full"], sums(cells, FitOptions(seed=1))(cells))

    def test_memory_and_threads(self, cells: anndata.AnnData) -> None:
        def fit(adata: anndata.AnnData, options: FitOptions) -> Embed:
            assert torch.get_num_threads() == options.threads == before + 1
            np.ones(10_000_000).sum()  # 80 MB that are gone at the end
            return sums(adata, options)

        before = torch.get_num_threads()
        run = fit_and_embed(Method("m", fit), cells, threads=before + 1, stress=False)
        assert 60 < run.peak_mb < 400
        assert torch.get_num_threads() == before

    def test_only_its_own_cells(self, cells: anndata.AnnData) -> None:
        method = Method("fixed", sums, new_cells=False)
        assert list(fit_and_embed(method, cells).views) == ["full"]
        with pytest.raises(ConfigError, match=r"(?s)'fixed' cannot embed.*Fix:"):
            fit_and_embed(method, cells, held_out=hold_out(cells.obs["cell_type"]))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            pytest.param(np.ones((60, 2)), r"'bad' returned float64 of shape \(60, 2\)", id="float64"),
            pytest.param(np.ones((59, 2), np.float32), r"shape \(59, 2\), expected .* \(60, dim\)", id="rows"),
            pytest.param(np.ones(60, np.float32), r"shape \(60,\)", id="vector"),
            pytest.param(np.ones((60, 0), np.float32), r"shape \(60, 0\)", id="no dimension"),
            pytest.param([1.0], "returned a list", id="list"),
            pytest.param(np.diag([np.nan] * 60).astype(np.float32), "NaN or infinite values in 60 of 60", id="nan"),
        ],
    )
    def test_refuses_what_is_no_embedding(self, cells: anndata.AnnData, value: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            fit_and_embed(returning(value), cells)

    def test_limits_are_restored_after_an_error(self, cells: anndata.AnnData) -> None:
        before = torch.get_num_threads()

        def fit(adata: anndata.AnnData, options: FitOptions) -> Embed:
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            fit_and_embed(Method("m", fit), cells, threads=before + 1)
        assert torch.get_num_threads() == before

    def test_needs_psutil(self, cells: anndata.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "psutil", None)
        with pytest.raises(MissingPackageError, match=r"(?s)psutil.*Fix: pip install 'genejepa\[bench\]'"):
            fit_and_embed(Method("sums", sums), cells)


class TestRunFile:
    run = Run(
        method="PCA µ",
        seed=2,
        views={"full": np.eye(3, 2, dtype=np.float32), "depth 0.5": np.ones((3, 2), np.float32)},
        fit_seconds=1.5,
        embed_seconds=0.25,
        peak_mb=10.0,
        batch_key=None,
        held_out=np.array([True, False, False]),
    )

    def test_roundtrip(self, tmp_path: Path) -> None:
        self.run.save(tmp_path / "run.npz")
        loaded = Run.load(tmp_path / "run.npz")
        for name in ("method", "seed", "fit_seconds", "embed_seconds", "peak_mb", "batch_key"):
            assert getattr(loaded, name) == getattr(self.run, name)
        assert list(loaded.views) == ["full", "depth 0.5"]
        for name, Z in self.run.views.items():
            np.testing.assert_array_equal(loaded.views[name], Z)
            assert loaded.views[name].dtype == np.float32
        np.testing.assert_array_equal(loaded.held_out, self.run.held_out)
        assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]

    def test_none_held_out(self, tmp_path: Path, cells: anndata.AnnData) -> None:
        fit_and_embed(Method("sums", sums), cells, stress=False).save(tmp_path / "run.npz")
        assert Run.load(tmp_path / "run.npz").held_out is None

    def test_refuses_pickles_and_other_files(self, tmp_path: Path) -> None:
        path = tmp_path / "run.npz"
        self.run.save(path)
        arrays = dict(np.load(path))
        np.savez(path, **{**arrays, "view:full": np.array([{"a": 1}], dtype=object)})
        with pytest.raises(DataError, match=r"(?s)not a saved run.*allow_pickle=False.*Fix:"):
            Run.load(path)
        np.savez(path, **{name: array for name, array in arrays.items() if name != "metadata"})
        with pytest.raises(DataError, match="not a saved run"):
            Run.load(path)
        path.write_bytes(b"nothing")
        with pytest.raises(DataError, match="not a saved run"):
            Run.load(path)


class TestBenchmark:
    def test_table(self, adata: anndata.AnnData) -> None:
        adata.obsm["X_other"] = np.zeros((60, 2))
        before = adata.copy()
        table = genejepa.benchmark(
            adata,
            methods=["HVG", "PCA-50 log", sums],
            seeds=2,
            tasks=["linear", "knn", "depth"],
            labels_from_clustering=True,
            **QUIET,
        )
        assert list(table.columns) == COLUMNS
        runs = table[["method", "seed"]].drop_duplicates()
        assert list(runs.itertuples(index=False, name=None)) == [
            ("HVG", 0),
            ("PCA-50 log", 0),
            ("sums", 0),
            ("sums", 1),
        ]
        assert set(table["task"]) == {"linear", "knn", "depth", "cost"}
        assert set(table["regime"]) == {"transductive"}
        assert table["labels_from_clustering"].all()
        linear = table[(table["task"] == "linear") & (table["metric"] == "macro_f1")]
        assert linear["value"].between(0.5, 1.0).all()
        assert linear["value"].between(linear["ci_low"], linear["ci_high"]).all()
        costs = table[table["task"] == "cost"]
        assert list(costs["metric"].unique()) == ["fit_seconds", "embed_seconds", "peak_mb"]
        assert (costs["n_cells"] == 60).all()
        record = table.attrs["benchmark"]
        assert json.loads(json.dumps(record)) == record
        assert record["labels_key"] == "cell_type"
        assert record["seeds"] == [0, 1]
        assert set(record["versions"]) == {"genejepa", "torch", "scanpy", "scikit-learn", "scvi-tools"}
        same_anndata(adata, before)

    def test_repeats_and_keeps_global_seeds(
        self, adata: anndata.AnnData, global_rng_untouched: Callable[[], AbstractContextManager[None]]
    ) -> None:
        def run() -> pd.DataFrame:
            table = genejepa.benchmark(adata, methods=["PCA-50 sqrt", sums], seeds=[5], tasks=["knn", "leak"], **QUIET)
            return table[table["task"] != "cost"]

        with global_rng_untouched():
            first = run()
        assert set(first["seed"]) == {0, 5}
        pd.testing.assert_frame_equal(first, run())

    def test_genejepa(
        self, adata: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
    ) -> None:
        def fit(cells: anndata.AnnData, options: FitOptions) -> Embed:
            model = genejepa.GeneJEPA(cells, **tiny_settings)
            model.train(**tiny_training, seed=options.seed)
            return model.get_latent_representation

        table = genejepa.benchmark(
            adata, methods=[Method("tiny", fit)], seeds=1, tasks=["knn"], regimes=("transductive", "inductive"), **QUIET
        )
        assert set(table["method"]) == {"tiny"}
        values = table[table["metric"] == "macro_f1"].set_index("regime")["value"]
        assert set(values.index) == {"transductive", "inductive"}

    def test_inductive_methods_and_panel_see_no_held_out_cell(self, adata: anndata.AnnData) -> None:
        sizes = []

        def fit(cells: anndata.AnnData, options: FitOptions) -> Embed:
            sizes.append(cells.n_obs)
            return sums(cells, options)

        methods: list[Any] = [fit, Method("fixed", sums, random=False, new_cells=False)]
        table = genejepa.benchmark(
            adata, methods=methods, seeds=1, tasks=["linear"], regimes=("transductive", "inductive"), **QUIET
        )
        assert sizes == [60, 48]
        assert set(table.loc[table["method"] == "fixed", "regime"]) == {"transductive"}
        linear = table[(table["task"] == "linear") & (table["regime"] == "inductive")]
        assert len(linear)
        assert (linear["n_cells"] == 12).all()

    def test_batch_is_told(self, adata: anndata.AnnData) -> None:
        told = []

        def fit(cells: anndata.AnnData, options: FitOptions) -> Embed:
            told.append(options.batch_key)
            return sums(cells, options)

        table = genejepa.benchmark(
            adata, methods=[fit], seeds=1, batch_key="batch", tasks=["transfer", "leak"], **QUIET
        )
        assert told == ["batch"]
        assert set(table.loc[table["task"] == "transfer", "setting"]) == {"one", "two", "mean"}
        assert set(table.loc[table["task"] == "leak", "setting"]) == {"depth", "batch"}
        assert table.attrs["benchmark"]["batch_key"] == "batch"

    def test_only_costs(self, adata: anndata.AnnData) -> None:
        table = genejepa.benchmark(adata, methods=["HVG"], tasks=["clustering"], regimes=["inductive"], **QUIET)
        assert table["metric"].to_list() == ["fit_seconds", "embed_seconds", "peak_mb"]

    def test_defaults(self, adata: anndata.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("scVI-10", "genejepa"):  # their full training takes half a minute
            monkeypatch.setitem(METHODS, name, Method(name, sums))
        table = genejepa.benchmark(adata, seeds=1, tasks=["knn"], **QUIET)
        assert tuple(table["method"].unique()) == DEFAULT_METHODS
        table = genejepa.benchmark(adata, batch_key="batch", seeds=1, tasks=["knn"], **QUIET)
        assert tuple(table["method"].unique()) == (*DEFAULT_METHODS, HARMONY)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            pytest.param({"labels_key": "x"}, MissingKeyError, r"obs\['x'\]", id="labels"),
            pytest.param({"batch_key": "x"}, MissingKeyError, r"obs\['x'\]", id="batch"),
            pytest.param({"methods": ["PCA-51"]}, ConfigError, "`methods` has 'PCA-51', expected .*'HVG'", id="name"),
            pytest.param({"methods": []}, ConfigError, "expected at least one", id="no method"),
            pytest.param({"methods": ["HVG", "HVG"]}, ConfigError, "each once", id="twice"),
            pytest.param({"methods": [3]}, ConfigError, "holds 3, expected a name", id="number"),
            pytest.param({"methods": [HARMONY]}, ConfigError, "'Harmony' corrects for a batch", id="harmony"),
            pytest.param({"tasks": ["cooking"]}, ConfigError, "`tasks` has 'cooking'", id="task"),
            pytest.param({"regimes": ["abductive"]}, ConfigError, "`regimes` has 'abductive'", id="regime"),
            pytest.param({"regimes": []}, ConfigError, "expected at least one", id="no regime"),
            pytest.param({"seeds": 0}, ConfigError, "expected at least one", id="no seed"),
            pytest.param(
                {"methods": [HARMONY], "batch_key": "batch", "regimes": ["inductive"]},
                ConfigError,
                "cannot embed cells",
                id="inductive harmony",
            ),
        ],
    )
    def test_errors(
        self, adata: anndata.AnnData, changes: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=f"(?s){message}.*Fix: "):
            genejepa.benchmark(adata, **{**QUIET, "methods": ["HVG"], **changes})

    def test_registry(self) -> None:
        assert {*DEFAULT_METHODS, HARMONY} <= set(METHODS)
        assert all(name == method.name for name, method in METHODS.items())
        assert not METHODS[HARMONY].new_cells


def scores(values: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """Table of a linear probe from {data set: {method: values of the seeds}}."""
    rows = [
        (dataset, method, seed, "transductive", "linear", "all", "macro_f1", value, value - 0.1, value + 0.1, 100)
        for dataset, methods in values.items()
        for method, seeds in methods.items()
        for seed, value in enumerate(seeds)
    ]
    columns = ["dataset", "method", "seed", *COLUMNS[2:-1]]
    return pd.DataFrame(rows, columns=columns)


LINEAR = (("linear", "all", "macro_f1"),)


class TestStatistics:
    table = scores(
        {
            "one": {"a": [0.7, 0.9], "b": [0.5], "c": [0.8]},
            "two": {"a": [0.4, 0.4], "b": [0.6], "c": [0.5]},
            "three": {"a": [0.9, 1.0], "b": [0.3]},
        }
    )

    def test_summary(self) -> None:
        out = statistics.summary(self.table).set_index(["dataset", "method"])
        first = out.iloc[:1, -6:].to_dict("records")[0]
        assert first == pytest.approx(
            {"mean": 0.8, "sd": np.sqrt(0.02), "n_seeds": 2, "ci_low": 0.7, "ci_high": 0.9, "n_cells": 100}
        )
        assert list(out.index[:2]) == [("one", "a"), ("one", "b")]
        assert out["sd"].isna().to_list() == [False, True, True, False, True, True, False, True]
        assert len(out) == 8

    def test_average_rank(self) -> None:
        out = statistics.average_rank(self.table, measures=LINEAR).set_index("method")
        assert list(out.index) == ["a", "b", "c"]
        assert out["rank"].to_list()[:2] == pytest.approx([4 / 3, 5 / 3])
        assert out["rank"].isna().to_list() == [False, False, True]
        assert out["n_cells"].to_list() == [3, 3, 2]
        two = statistics.average_rank(self.table[self.table["dataset"] != "three"], measures=LINEAR)
        assert two["rank"].to_list() == pytest.approx([1.75, 2.0, 2.25])
        assert two["method"].to_list() == ["c", "b", "a"]

    def test_paired_tests(self) -> None:
        rng = np.random.default_rng(0)
        base = dict(zip("pqrstu", rng.random(6), strict=True))
        step = dict(zip("pqrstu", [0.1, 0.2, 0.3, 0.4, 0.5, -0.01], strict=True))
        table = scores({d: {"a": [x], "b": [x - step[d]], "c": [x - 0.1], "d": [x]} for d, x in base.items()})
        out = statistics.paired_tests(table, "a", measures=LINEAR).set_index("other")
        assert out["n_pairs"].to_list() == [6, 6, 6]
        assert out["median_difference"].to_list() == pytest.approx([0.25, 0.1, 0.0])
        # exact: the smallest of six ranks is the only negative one, so 2 * 2 of the 64 sign patterns are as extreme
        assert out["p"].to_dict() == pytest.approx({"b": 4 / 64, "c": 2 / 64, "d": 1.0})
        assert out["p_holm"].to_dict() == pytest.approx({"b": 8 / 64, "c": 6 / 64, "d": 1.0})

    def test_labels_of_one_data_set_are_one_pair(self) -> None:
        table = pd.concat([self.table.assign(labels="type"), self.table.assign(labels="state")])
        out = statistics.paired_tests(table, "a", measures=LINEAR).set_index("other")
        assert out["n_pairs"].to_dict() == {"b": 3, "c": 2}
        assert out.loc["b", "median_difference"] == pytest.approx(0.3)

    def test_against_best(self) -> None:
        out = statistics.against_best(self.table, "a", ["b", "c"], measures=LINEAR).set_index("dataset")
        assert out["best"].to_dict() == {"one": "c", "two": "b", "three": "b"}
        assert out["difference"].to_dict() == pytest.approx({"one": 0.0, "two": -0.2, "three": 0.65})
        assert out.loc["two", "best_value"] == pytest.approx(0.6)

    def test_errors(self) -> None:
        with pytest.raises(DataError, match="no rows for any of"):
            statistics.average_rank(self.table, measures=[("knn", "all", "macro_f1")])
        with pytest.raises(ConfigError, match="Less is better"):
            statistics.average_rank(self.table, measures=[("leak", "depth", "r2")])
        with pytest.raises(ConfigError, match="no rows of 'z', found 'a', 'b', 'c'"):
            statistics.against_best(self.table, "a", ["z"], measures=LINEAR)
        with pytest.raises(DataError, match="no column `dataset`"):
            statistics.paired_tests(self.table.drop(columns="dataset"), "a", measures=LINEAR)
