"""Energies: low for real cells, high for mixtures; calibrated, local to a cell, and refused where they mean nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pytest
import torch

from genejepa.data.panel import PanelCounts
from genejepa.energy import EnergyFunction, ResidualScale, _deviance, _halves
from genejepa.errors import ConfigError, DataError, NotFittedError
from genejepa.model import GeneJEPA

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray


@pytest.fixture(scope="module")
def cells(make_adata: Callable[..., anndata.AnnData]) -> anndata.AnnData:
    """300 cells of three kinds, each with a program of 20 genes."""
    return make_adata(n_obs=300)


@pytest.fixture(scope="module")
def trained(cells: anndata.AnnData, tiny_settings: dict[str, Any], tiny_training: dict[str, Any]) -> GeneJEPA:
    """Model of the first 200 cells that has learnt what goes together."""
    model = GeneJEPA(cells[:200].copy(), **tiny_settings | {"n_genes": 80, "learning_rate": 3e-3})
    model.train(**tiny_training | {"max_epochs": 30})
    return model


@pytest.fixture
def new(cells: anndata.AnnData) -> anndata.AnnData:
    """100 cells that the training has not seen."""
    return cells[200:].copy()


def area(low: NDArray[Any], high: NDArray[Any]) -> float:
    """Share of pairs in which the second is larger."""
    return float((high[:, None] > low[None]).mean())


def mixed(cells: anndata.AnnData) -> anndata.AnnData:
    """Each cell together with the next one, which is of another kind; half of the molecules."""
    counts = cells.X.toarray()
    both = np.random.default_rng(0).binomial((counts + np.roll(counts, -1, axis=0)).astype(int), 0.5)
    return anndata.AnnData(both.astype(np.float32), var=cells.var)


def test_residuals_of_the_reference_have_energy_one(rng: np.random.Generator) -> None:
    mixing = rng.normal(size=(5, 5))
    residuals = rng.normal(size=(20_000, 5)) @ mixing + 3.0
    scale = ResidualScale.fit(residuals)
    assert scale.energy(residuals).mean() == pytest.approx(1.0, rel=0.01)
    one_deviation = scale.mean + mixing[0]  # the image of a unit vector
    assert scale.energy(one_deviation[None])[0] == pytest.approx(1 / 5, rel=0.05)


def test_a_residual_that_never_varies_does_not_break_the_scale() -> None:
    scale = ResidualScale.fit(np.zeros((30, 4)))
    assert scale.energy(np.zeros((2, 4))).tolist() == [0.0, 0.0]


def test_deviance_by_hand() -> None:
    observed = np.array([[0, 0, 4, 1]], dtype=np.float32)
    expected = np.array([[0.0, 2.0, 4.0, 0.5]])
    found = _deviance(observed, expected)
    np.testing.assert_allclose(found, [[0.0, -2.0, 0.0, np.sqrt(2 * (np.log(2) - 0.5))]], atol=1e-5)


def test_halves_share_no_gene_and_are_always_the_same() -> None:
    genes = np.array([1, 4, 5, 7, 9])
    halves = _halves(genes, 10, 3)
    assert halves.shape == (2, 3)
    assert sorted(halves.flatten().tolist()) == [1, 4, 5, 7, 9, 10]  # 10 fills the shorter half
    assert torch.equal(halves, _halves(genes, 10, 3))
    assert not torch.equal(halves, _halves(genes, 10, 4))


def test_real_cells_have_energies_of_about_one(trained: GeneJEPA, new: anndata.AnnData) -> None:
    energies = trained.energy()
    assert energies.shape == (200,)
    assert energies.dtype == np.float32
    assert energies.mean() == pytest.approx(1.0, abs=0.1)
    # Vectors of new cells spread less: the axes were fitted to the noise of the training cells.
    assert 0.5 < trained.energy(new).mean() < 1.1
    assert trained.energy(new, reference=new).mean() == pytest.approx(1.0, abs=0.15)


def test_mixtures_of_two_kinds_have_higher_energies(trained: GeneJEPA, new: anndata.AnnData) -> None:
    assert area(trained.energy(new), trained.energy(mixed(new))) > 0.8


def test_shuffled_genes_have_higher_energies(trained: GeneJEPA, new: anndata.AnnData, rng: np.random.Generator) -> None:
    """The control: the same counts in other genes are no cell."""
    odd = anndata.AnnData(rng.permuted(new.X.toarray(), axis=1), var=new.var)
    assert area(trained.energy(new), trained.energy(odd)) > 0.95


def test_halves_of_one_cell_belong_together(trained: GeneJEPA, new: anndata.AnnData) -> None:
    own = trained.energy(new, partner=new)
    other_kind = trained.energy(new, partner=new[np.roll(np.arange(100), -1)].copy())
    same_kind = trained.energy(new, partner=new[np.roll(np.arange(100), -3)].copy())
    assert area(own, other_kind) > 0.95
    assert np.median(own) < np.median(same_kind) < np.median(other_kind)


def test_the_gene_that_was_added_is_the_surprise(trained: GeneJEPA, new: anndata.AnnData) -> None:
    values = new.X.toarray()
    before = trained.surprise(new)
    assert before.obs_names.tolist() == new.obs_names.tolist()
    assert before.var_names.tolist() == trained.genes
    values[:, 7] += 40
    new.X = values
    after = trained.surprise(new)
    assert (np.asarray(after.X).argmax(axis=1) == trained.genes.index(new.var_names[7])).mean() > 0.9
    assert np.asarray(trained.surprise().X).mean() == pytest.approx(0.0, abs=0.05)


def test_the_energy_of_a_cell_does_not_depend_on_the_others(trained: GeneJEPA, new: anndata.AnnData) -> None:
    energies = trained.energy(new)
    order = np.random.default_rng(1).permutation(100)[:37]
    np.testing.assert_array_equal(trained.energy(new[order].copy()), energies[order])
    shuffled = new[:, ::-1].copy()
    np.testing.assert_array_equal(trained.energy(shuffled), energies)


def test_missing_genes_are_missing_in_the_reference_too(trained: GeneJEPA, new: anndata.AnnData) -> None:
    """Energies of a smaller panel are about 1, and those of mixtures are still higher."""
    few = new[:, np.arange(80) % 4 != 0].copy()
    with pytest.warns(UserWarning, match="60 of the 80 genes"):
        energies = trained.energy(few)
    assert 0.5 < energies.mean() < 1.1
    with pytest.warns(UserWarning, match="60 of the 80 genes"):
        assert area(energies, trained.energy(mixed(few))) > 0.7
    with pytest.warns(UserWarning, match="60 of the 80 genes"):
        assert trained.surprise(few).shape == (100, 60)


def test_a_loaded_model_needs_a_reference(
    trained: GeneJEPA, cells: anndata.AnnData, new: anndata.AnnData, tmp_path: Path
) -> None:
    trained.save(tmp_path / "model")
    loaded = GeneJEPA.load(tmp_path / "model")
    for look in (loaded.energy, loaded.surprise):
        with pytest.raises(NotFittedError, match=r"(?s)no cells to compare with.*Fix: pass reference=adata"):
            look(new)
    np.testing.assert_array_equal(loaded.energy(new, reference=cells[:200].copy()), trained.energy(new))


def test_batches_are_taken_into_account(
    make_adata: Callable[..., anndata.AnnData], tiny_settings: dict[str, Any], tiny_training: dict[str, Any]
) -> None:
    """A shift of one batch is no surprise in its cells if the model has corrected for it."""
    shifted = make_adata(n_obs=120)
    values = shifted.X.toarray()
    values[np.asarray(shifted.obs["batch"] == "two"), 70:75] += 15
    shifted.X = values
    energies = {}
    GeneJEPA.setup_anndata(shifted, batch_key="batch")
    model = GeneJEPA(shifted, **tiny_settings | {"n_genes": 80})
    model.train(**tiny_training | {"max_epochs": 10})
    for name in ("one", "two"):
        energies[name] = model.energy(shifted[shifted.obs["batch"] == name].copy())
    assert np.median(energies["two"]) == pytest.approx(np.median(energies["one"]), rel=0.2)


def test_nothing_is_changed(
    trained: GeneJEPA, new: anndata.AnnData, global_rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    before, weights = new.copy(), trained.weights_sha256()
    with global_rng_untouched():
        trained.energy(new)
        trained.energy(new, partner=new)
        trained.surprise(new)
    assert trained.weights_sha256() == weights
    np.testing.assert_array_equal(new.X.toarray(), before.X.toarray())
    assert not new.uns
    assert list(new.obs) == list(before.obs)


def test_no_cells_have_no_energies(trained: GeneJEPA, new: anndata.AnnData) -> None:
    assert trained.energy(new[:0].copy()).shape == (0,)
    assert trained.energy(new[:0].copy(), partner=new[:0].copy()).shape == (0,)
    assert trained.surprise(new[:0].copy()).shape == (0, 80)


def test_an_empty_cell_has_a_finite_energy(trained: GeneJEPA, new: anndata.AnnData) -> None:
    values = new.X.toarray()
    values[3] = 0
    new.X = values
    assert np.isfinite(trained.energy(new)).all()
    assert np.isfinite(np.asarray(trained.surprise(new).X)).all()


@pytest.mark.parametrize("n_masks", [0, -1, 1.5, True, "8"])
def test_number_of_masks(n_masks: Any, trained: GeneJEPA, new: anndata.AnnData) -> None:
    with pytest.raises(ConfigError, match="`n_masks`"):
        trained.energy(new, n_masks=n_masks)


def test_what_is_refused(
    trained: GeneJEPA, cells: anndata.AnnData, new: anndata.AnnData, tiny_settings: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="`partner` has 40 cells, expected 100"):
        trained.energy(new, partner=new[:40].copy())
    with pytest.raises(DataError, match="reference has 19 cells"):
        trained.energy(new, reference=new[:19].copy())
    with pytest.raises(NotFittedError, match="not trained"):
        GeneJEPA(cells, **tiny_settings).energy(new)
    new.X = np.log1p(new.X.toarray())
    with pytest.raises(DataError, match="expected counts"):
        trained.energy(new)


def test_two_genes_are_needed(trained: GeneJEPA) -> None:
    counts = PanelCounts(np.arange(31), np.zeros(30, dtype=np.int32), np.ones(30, dtype=np.float32), 80)
    assert trained.jepa is not None
    with pytest.raises(DataError, match="1 genes of the model in common"):
        EnergyFunction(trained.jepa, trained.normalizer, counts, keep=np.arange(80) == 0)
