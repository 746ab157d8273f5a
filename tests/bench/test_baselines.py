from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from genejepa.bench import linear, scvi
from genejepa.bench.interface import FitOptions
from genejepa.bench.views import stress_views, thinned
from genejepa.errors import ConfigError, DataError, GeneMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.bench.interface import Embed, Method

    Guard = Callable[[], AbstractContextManager[None]]

LINEAR = [pytest.param(method, id=method.name) for method in linear.METHODS if method.name != "Harmony"]
PCAS = [pytest.param(method, id=method.name) for method in linear.METHODS if method.name.startswith("PCA")]
SCVI = [pytest.param(method, id=method.name) for method in scvi.METHODS]
HARMONY = next(method for method in linear.METHODS if method.name == "Harmony")


@pytest.fixture(scope="module")
def cells(make_adata: Callable[..., AnnData]) -> AnnData:
    """150 cells of three types, of which the second batch has three times the counts of 30 genes of 100."""
    adata = make_adata(n_obs=150, n_vars=100)
    X = adata.X.toarray()
    second = (adata.obs["batch"] == "two").to_numpy()
    X[np.ix_(second, np.random.default_rng(5).permutation(100)[:30])] *= 3
    adata.X = type(adata.X)(X)
    return adata


def fit(method: Method, adata: AnnData, *, max_epochs: int = 2, **options: Any) -> Embed:
    settings: dict[str, Any] = {"max_epochs": max_epochs} if method.name.startswith("scVI") else {}
    return partial(method.fit, **settings)(adata, FitOptions(**options))


def normalised(method: Method, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values behind a linear method, by the formula of its name."""
    scaled = counts / counts.sum(1, keepdims=True) * np.median(counts.sum(1))
    values = np.log1p(scaled) if " log" in method.name else np.sqrt(scaled)
    values -= values.mean(0)
    return np.asarray(np.clip(values / values.std(0), -10, 10) if method.name.endswith("unit") else values)


def test_names() -> None:
    names = [method.name for method in (*linear.METHODS, *scvi.METHODS)]
    assert len(set(names)) == len(names) == 13
    assert len(PCAS) == 8
    assert not any(method.random for method in linear.METHODS if method.name != "Harmony")


@pytest.mark.parametrize("method", [*LINEAR, *SCVI])
class TestEveryMethod:
    def test_embeds_the_cells_and_worse_views(self, method: Method, cells: AnnData) -> None:
        embed = fit(method, cells, threads=1)
        Z = embed(cells)
        assert Z.dtype == np.float32
        assert Z.shape[0] == 150
        assert Z.std(0).min() > 1e-4
        for name, view in stress_views(cells).items():
            worse = embed(view)
            assert worse.shape == Z.shape, name
            assert np.isfinite(worse).all(), name
            assert 0.3 < np.corrcoef(Z.ravel(), worse.ravel())[0, 1] < 0.999, name

    def test_embeds_some_cells_and_cells_without_counts(self, method: Method, cells: AnnData) -> None:
        embed = fit(method, cells, threads=1)
        few = cells[10:13].copy()
        np.testing.assert_allclose(embed(few), embed(cells)[10:13], atol=1e-4)
        few.X = few.X * 0
        assert np.isfinite(embed(few)).all()

    def test_genes_are_matched_by_name(self, method: Method, cells: AnnData) -> None:
        embed = fit(method, cells, threads=1)
        order = np.random.default_rng(0).permutation(cells.n_vars)
        np.testing.assert_allclose(embed(cells[:, order].copy()), embed(cells), atol=1e-4)
        other = cells.copy()
        other.var_names = [f"unknown{i}" for i in range(cells.n_vars)]
        with pytest.raises(GeneMismatchError, match=r"(?s)None of the 100 genes.*Fix:"):
            embed(other)

    def test_changes_nothing(self, method: Method, cells: AnnData, global_rng_untouched: Guard) -> None:
        adata, before = cells.copy(), cells.copy()
        threads, environment = torch.get_num_threads(), dict(os.environ)
        with global_rng_untouched():
            fit(method, adata, seed=3, batch_key="batch", threads=1)(adata)
        assert (adata.X != before.X).nnz == 0
        pd.testing.assert_frame_equal(adata.obs, before.obs)
        pd.testing.assert_frame_equal(adata.var, before.var)
        assert not any(len(slot) for slot in (adata.uns, adata.obsm, adata.varm, adata.layers))
        assert torch.get_num_threads() == threads
        assert dict(os.environ) == environment

    def test_is_a_function_of_the_seed(self, method: Method, cells: AnnData) -> None:
        first, second, other = (fit(method, cells, seed=seed, threads=1)(cells) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, second)
        assert np.array_equal(first, other) != method.random


class TestLinear:
    def test_expression_is_the_formula(self, cells: AnnData) -> None:
        method = linear.METHODS[0]
        np.testing.assert_allclose(fit(method, cells)(cells), normalised(method, cells.X.toarray()), atol=1e-4)

    @pytest.mark.parametrize("method", PCAS)
    def test_pca_is_the_formula(self, method: Method, cells: AnnData) -> None:
        values = normalised(method, cells.X.toarray().astype(np.float64))
        values -= values.mean(0)
        U, S, _ = np.linalg.svd(values, full_matrices=False)
        Z = fit(method, cells)(cells)
        assert Z.shape == (150, int(method.name[4:6]))
        # The first components are well separated; their signs are free.
        np.testing.assert_allclose(np.abs(Z[:, :2]), np.abs(U * S)[:, :2], rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(np.linalg.norm(Z, axis=0), S[: Z.shape[1]], rtol=0.05)

    @pytest.mark.parametrize("method", LINEAR)
    def test_depth_of_other_cells_does_not_matter(self, method: Method, cells: AnnData) -> None:
        deeper = cells.copy()
        deeper.X = deeper.X * 7
        embed = fit(method, cells)
        np.testing.assert_allclose(embed(deeper), embed(cells), atol=1e-3)

    def test_depth_is_counted_over_the_measured_genes(self, cells: AnnData) -> None:
        method = linear.METHODS[0]
        X = cells.X.toarray()
        measured = X[:, ::2]
        expected = np.zeros_like(X)
        scaled = measured / measured.sum(1, keepdims=True) * np.median(measured.sum(1))
        mean = np.sqrt(X / X.sum(1, keepdims=True) * np.median(X.sum(1))).mean(0)
        expected[:, ::2] = np.sqrt(scaled) - mean[::2]
        np.testing.assert_allclose(fit(method, cells)(cells[:, ::2].copy()), expected, atol=1e-4)

    @pytest.mark.parametrize("method", PCAS)
    def test_few_genes_give_nearly_the_components_of_all(
        self, method: Method, make_adata: Callable[..., AnnData]
    ) -> None:
        adata = make_adata(n_obs=200, n_vars=60, seed=1)  # three programs, and nothing else
        adata.X = adata.X * 20
        embed = fit(method, adata)
        Z, few = embed(adata)[:, :2], embed(adata[:, ::3].copy())[:, :2]
        for full, partial_ in zip(Z.T, few.T, strict=True):
            assert np.corrcoef(full, partial_)[0, 1] > 0.95
            assert 0.8 < partial_.std() / full.std() < 1.1  # zeros for missing genes would shrink it to a third

    def test_no_more_components_than_the_cells_allow(self, cells: AnnData) -> None:
        few = cells[:20, :30].copy()
        for method in linear.METHODS[1:3]:
            assert fit(method, few)(few).shape == (20, 19)
        assert fit(linear.METHODS[1], cells[:, :30].copy())(cells).shape == (150, 30)


class TestHarmony:
    def separation(self, Z: NDArray[np.float32], adata: AnnData) -> float:
        """How often the nearest cells tell the batch."""
        batch = adata.obs["batch"].to_numpy()
        votes = KNeighborsClassifier(11).fit(Z, batch).kneighbors(return_distance=False)
        return float((batch[votes] == batch[:, None]).mean())

    def test_mixes_batches(self, make_adata: Callable[..., AnnData], global_rng_untouched: Guard) -> None:
        adata = make_adata(n_obs=300, n_vars=100)
        X = adata.X.toarray()
        X[np.ix_((adata.obs["batch"] == "two").to_numpy(), range(0, 100, 3))] *= 5
        adata.X = type(adata.X)(X)
        before = adata.copy()
        with global_rng_untouched():
            Z = fit(HARMONY, adata, batch_key="batch")(adata)
        plain = fit(next(m for m in linear.METHODS if m.name == "PCA-50 sqrt"), adata)(adata)
        assert Z.shape == plain.shape == (300, 50)
        assert Z.dtype == np.float32
        assert self.separation(plain, adata) > 0.95
        assert self.separation(Z, adata) < 0.7
        types = adata.obs["cell_type"].to_numpy()
        assert KNeighborsClassifier(5).fit(Z, types).score(Z, types) > 0.95
        assert (adata.X != before.X).nnz == 0
        assert list(adata.obsm) == []

    def test_needs_a_batch(self, cells: AnnData) -> None:
        with pytest.raises(ConfigError, match=r"(?s)batch_key.*Fix:"):
            fit(HARMONY, cells)

    def test_refuses_other_cells(self, cells: AnnData) -> None:
        embed = fit(HARMONY, cells, batch_key="batch")
        assert embed(cells.copy()).shape == (150, 50)
        for other in (cells[:100].copy(), thinned(cells, 0.5), cells[::-1].copy()):
            with pytest.raises(DataError, match=r"(?s)not fitted on.*Fix:"):
                embed(other)


class TestScvi:
    def test_leaves_settings_and_loggers_alone(self, cells: AnnData, capfd: pytest.CaptureFixture[str]) -> None:
        import scvi as scvi_tools

        loggers = [logging.getLogger(name) for name in ("scvi", "lightning.pytorch", "lightning.fabric")]
        levels = [logger.level for logger in loggers]
        seed = scvi_tools.settings.seed
        fit(scvi.METHODS[0], cells, seed=4)(cells)
        assert scvi_tools.settings.seed == seed
        assert [logger.level for logger in loggers] == levels
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("method", SCVI)
    def test_batch_is_used_in_training_and_not_needed_afterwards(self, method: Method, cells: AnnData) -> None:
        embed = fit(method, cells, batch_key="batch", threads=1)
        Z = embed(cells)
        assert not np.array_equal(Z, fit(method, cells, threads=1)(cells))
        new = cells.copy()
        new.obs = new.obs[["cell_type"]].copy()
        np.testing.assert_array_equal(embed(new), Z)

    def test_thinned_views_make_shallow_cells_alike(self, cells: AnnData) -> None:
        agreement = {}
        for method in (scvi.METHODS[0], scvi.METHODS[2]):
            embed = fit(method, cells, max_epochs=80, threads=1)
            Z, shallow = embed(cells), embed(thinned(cells, 0.1))
            agreement[method.name] = np.mean([np.corrcoef(z, s)[0, 1] for z, s in zip(Z.T, shallow.T, strict=True)])
        assert agreement["scVI-10 thinned"] > agreement["scVI-10"] + 0.05

    def test_thin_keeps_molecules_at_a_log_uniform_depth(self, make_seeded: Callable[..., Any]) -> None:
        counts = torch.full((2000, 50), 20.0)  # depth 1,000 = 10 * 10^2
        counts[:, ::2] = 0
        counts[:, 1::2] *= 2
        view = make_seeded(lambda: scvi.thin(counts))
        assert torch.equal(view, view.round())
        assert (view <= counts).all()
        assert (view >= 0).all()
        exponent = torch.log10(view.sum(1) / 10)
        at = torch.quantile(exponent, torch.tensor([0.25, 0.5, 0.75]))
        torch.testing.assert_close(at, torch.tensor([0.5, 1.0, 1.5]), atol=0.1, rtol=0)

    def test_thin_leaves_shallow_cells_as_they_are(self) -> None:
        counts = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 6.0], [1.0, 1.0, 0.0]])
        with torch.random.fork_rng(devices=[]):
            assert torch.equal(scvi.thin(counts), counts)

    def test_cross_correlation_loss_is_the_formula(self, rng: np.random.Generator) -> None:
        a = rng.normal(size=(40, 3))
        b = a + rng.normal(size=(40, 3))
        C = np.corrcoef(a.T, b.T)[:3, 3:]
        expected = sum((1 - C[i, j]) ** 2 if i == j else 0.01 * C[i, j] ** 2 for i in range(3) for j in range(3))
        loss = scvi.cross_correlation_loss(torch.as_tensor(a), torch.as_tensor(5 * b - 1))
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        assert float(scvi.cross_correlation_loss(torch.as_tensor(a), torch.as_tensor(a[::-1].copy()))) > 2 * expected
