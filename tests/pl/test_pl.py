from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

mpl.use("Agg")

import anndata as ad

from genejepa import pl
from genejepa.errors import ConfigError, DataError, MissingKeyError
from genejepa.evaluate import knn_probe
from genejepa.pl import _embedding, _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@pytest.fixture
def adata() -> ad.AnnData:
    rng = np.random.default_rng(0)
    codes = np.arange(90) % 3
    obs = pd.DataFrame(
        {"type": np.array(["alpha", "beta", "gamma"])[codes], "depth": rng.random(90)},
        index=[f"c{i}" for i in range(90)],
    )
    Z = 4 * np.eye(3, 5)[codes] + rng.normal(size=(90, 5))
    return ad.AnnData(obs=obs, obsm={"X_genejepa": Z, "X_umap": np.full((90, 2), 7.0)})


@pytest.fixture
def ax() -> Axes:
    return Figure(figsize=(5, 4)).subplots()


@pytest.fixture
def no_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the first two dimensions for the UMAP, whose compilation takes seconds."""

    def first_two(Z: np.ndarray, **_: object) -> np.ndarray:
        return Z[:, :2].astype(np.float64)

    monkeypatch.setattr(_embedding, "_umap", first_two)


@pytest.mark.slow
def test_umap_repeats_and_leaves_all_else_alone(adata: ad.AnnData, ax: Axes) -> None:
    before, state = adata.copy(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    parameters = dict(mpl.rcParams)
    assert pl.embedding(adata, color="type", ax=ax) is ax
    points = np.asarray(ax.collections[-1].get_offsets())
    again = pl.embedding(adata, color="type", ax=Figure().subplots())
    np.testing.assert_array_equal(points, np.asarray(again.collections[-1].get_offsets()))
    assert (points.std(axis=0) > 1).all()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    np.testing.assert_array_equal(adata.obsm["X_umap"], before.obsm["X_umap"])
    assert sorted(adata.obsm) == ["X_genejepa", "X_umap"]
    assert list(adata.uns) == []
    assert list(adata.obsp) == []
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    assert dict(mpl.rcParams) == parameters


@pytest.mark.usefixtures("no_umap")
class TestEmbedding:
    def test_legend_names_categories(self, adata: ad.AnnData, ax: Axes) -> None:
        adata.obs.loc["c0", "type"] = np.nan
        pl.embedding(adata, color="type", ax=ax)
        legend = ax.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == [
            "alpha",
            "beta",
            "gamma",
            "no label (1 cells)",
        ]

    def test_new_figure(self, adata: ad.AnnData) -> None:
        from matplotlib import pyplot as plt

        ax = pl.embedding(adata)
        assert ax.get_title() == "90 cells"
        plt.close(_style.figure_of(ax))

    def test_numbers_get_a_colour_bar(self, adata: ad.AnnData, ax: Axes) -> None:
        adata.obs.loc["c0", "depth"] = np.nan
        pl.embedding(adata, color="depth", ax=ax)
        assert ax.get_legend() is None
        assert len(_style.figure_of(ax).axes) == 2

    def test_truth_values_are_categories(self, adata: ad.AnnData, ax: Axes) -> None:
        adata.obs["flag"] = np.arange(90) % 2 == 0
        pl.embedding(adata, color="flag", ax=ax)
        legend = ax.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["False", "True"]

    def test_names_on_data_do_not_overlap(self, adata: ad.AnnData, ax: Axes) -> None:
        adata.obsm["X_genejepa"][:] = np.random.default_rng(1).normal(size=(90, 5))
        adata.obs["type"] = [f"population {i % 9}" for i in range(90)]
        pl.embedding(adata, color="type", legend_loc="on data", ax=ax)
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) == 9
        inside = ax.get_window_extent()
        for i, box in enumerate(boxes):
            assert inside.x0 <= box.x0 + 1
            assert box.x1 <= inside.x1 + 1
            assert not any(box.overlaps(other) for other in boxes[:i])

    def test_no_legend(self, adata: ad.AnnData, ax: Axes) -> None:
        pl.embedding(adata, color="type", legend_loc="none", ax=ax)
        assert ax.get_legend() is None
        assert not ax.texts

    def test_errors(self, adata: ad.AnnData) -> None:
        with pytest.raises(MissingKeyError, match=r"(?s)obs\['x'\].*'type', 'depth'.*Fix:"):
            pl.embedding(adata, color="x")
        with pytest.raises(MissingKeyError, match=r"obsm\['X_pca'\]"):
            pl.embedding(adata, use_rep="X_pca")
        with pytest.raises(ConfigError, match="legend_loc"):
            pl.embedding(adata, legend_loc="left")  # type: ignore[arg-type]
        with pytest.raises(DataError, match="has 5 cells"):
            pl.embedding(adata[:5])
        adata.obsm["X_genejepa"][0, 0] = np.inf
        with pytest.raises(DataError, match="in 1 of 90 cells"):
            pl.embedding(adata)


def test_category_styles_differ() -> None:
    assert len({_style.category_style(i) for i in range(144)}) == 144
    assert len(set(_style.PALETTE)) == 24


class TestTraining:
    history = pd.DataFrame(
        {
            "step": np.arange(1, 201),
            "loss": np.geomspace(9, 0.1, 200),
            "prediction": np.geomspace(9, 0.1, 200),
            "effective_rank": [float(i) if i % 10 == 0 else np.nan for i in range(200)],
            "mean_cosine": np.nan,
        }
    )

    def test_panels(self) -> None:
        figure = pl.training(self.history, figure=Figure())
        labels = [ax.get_ylabel() for ax in figure.axes]
        assert labels == ["Loss (sum of the terms)", "Prediction error", "Effective rank"]
        assert {ax.get_xlabel() for ax in figure.axes} == {"Step"}
        assert len(figure.axes[2].lines[0].get_xdata()) == 20  # type: ignore[arg-type]

    def test_object_with_history(self) -> None:
        class Model:
            history = TestTraining.history.drop(columns="step").assign(epoch=range(200))

        figure = pl.training(Model(), figure=Figure())
        assert figure.axes[0].get_xlabel() == "Epoch"

    def test_new_figure(self) -> None:
        from matplotlib import pyplot as plt

        figure = pl.training(self.history)
        assert plt.fignum_exists(figure.number)
        plt.close(figure)

    def test_errors(self) -> None:
        with pytest.raises(DataError, match="no values to draw"):
            pl.training(self.history[["step", "mean_cosine"]])
        with pytest.raises(DataError, match="of type int"):
            pl.training(3)  # type: ignore[arg-type]


class TestProbe:
    def test_percent_of_true_class(self, adata: ad.AnnData, ax: Axes) -> None:
        table = knn_probe(adata, labels_key="type")
        pl.probe(table, ax=ax)
        shown = np.asarray(ax.images[0].get_array())
        np.testing.assert_allclose(shown.sum(axis=1), 100)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["alpha", "beta", "gamma"]
        macro_f1 = table.loc[table["metric"] == "macro_f1", "value"].item()
        assert f"macro-F1 {macro_f1:.2f}" in ax.get_title()

    def test_needs_the_record(self, adata: ad.AnnData) -> None:
        table = knn_probe(adata, labels_key="type")
        table.attrs = {}
        with pytest.raises(DataError, match=r"attrs\['probe'\]"):
            pl.probe(table)
