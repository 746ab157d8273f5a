"""Picture of energies by group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from genejepa import pl
from genejepa.errors import DataError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes


@pytest.fixture
def ax() -> Iterator[Axes]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


@pytest.fixture
def adata() -> ad.AnnData:
    """90 cells of three kinds with medians 2, 1 and 4."""
    kinds = np.repeat(["one", "two", "three"], 30)
    energies = np.tile(np.linspace(0.5, 1.5, 30), 3) * np.repeat([2.0, 1.0, 4.0], 30)
    obs = pd.DataFrame({"kind": pd.Categorical(kinds), "energy": energies}, index=[f"c{i}" for i in range(90)])
    return ad.AnnData(np.ones((90, 2), dtype=np.float32), obs=obs)


def names(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def test_groups_are_sorted_by_their_medians(adata: ad.AnnData, ax: Axes) -> None:
    adata.obs.loc["c0", "kind"] = np.nan
    assert pl.energy(adata, groupby="kind", ax=ax) is ax
    assert names(ax) == ["two (30)", "one (29)", "three (30)"]
    assert ax.get_xscale() == "log"


def test_all_cells_are_one_group(adata: ad.AnnData, ax: Axes) -> None:
    pl.energy(adata, ax=ax)
    assert names(ax) == ["all cells (90)"]


def test_energies_that_are_texts(adata: ad.AnnData, ax: Axes) -> None:
    adata.obs["energy"] = adata.obs["energy"].astype(str).replace(adata.obs["energy"].astype(str).iloc[0], "high")
    with pytest.raises(DataError, match=r"holds 1 values that are not positive numbers"):
        pl.energy(adata, ax=ax)


def test_what_cannot_be_drawn(adata: ad.AnnData, ax: Axes) -> None:
    with pytest.raises(MissingKeyError, match="did you mean 'energy'"):
        pl.energy(adata, key="energies", ax=ax)
    with pytest.raises(MissingKeyError, match="'sample'"):
        pl.energy(adata, groupby="sample", ax=ax)
    with pytest.raises(DataError, match="no cell to draw"):
        pl.energy(adata[:0].copy(), ax=ax)
    adata.obs.loc["c3", "energy"] = np.nan
    with pytest.raises(DataError, match=r"(?s)1 values that are not positive.*Fix: adata.obs\['energy'\] = model"):
        pl.energy(adata, ax=ax)
