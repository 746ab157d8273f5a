from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from genejepa.bench import contrastive, ours
from genejepa.bench.interface import Embed, FitOptions, Method
from genejepa.bench.linear import Normaliser
from genejepa.bench.views import stress_views, thinned
from genejepa.config import GeneJEPAConfig
from genejepa.model import GeneJEPA
from genejepa.nn.ema import update_average
from genejepa.nn.encoder import GeneTokenEncoder
from genejepa.objectives import effective_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa.config import ObjectiveConfig

N_OBS, N_GENES = 200, 120
NAMES = ["SimCLR", "VICReg", "arm", "untrained", "original"]


@pytest.fixture(scope="module")
def methods(tiny_settings: dict[str, Any]) -> dict[str, Method]:
    """The two-view methods as they are, and tiny forms of the others."""
    settings = {name: value for name, value in tiny_settings.items() if name != "n_genes"} | {"target_steps": 60}
    own = (
        ours.arm("arm", **settings),
        ours.untrained("untrained", **settings),
        ours.original_objective("original", **settings),
    )
    return {method.name: method for method in (*contrastive.METHODS, *own)}


@pytest.fixture(scope="module")
def cells(make_adata: Callable[..., AnnData]) -> AnnData:
    """Cells of three types, so shallow that random projections do not tell all of them apart."""
    return shallow_cells(make_adata)


def shallow_cells(make_adata: Callable[..., AnnData]) -> AnnData:
    return thinned(make_adata(n_obs=N_OBS, n_vars=N_GENES), 0.25)


@pytest.fixture(scope="module", autouse=True)
def few_epochs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "EPOCHS", 60)
        yield


@pytest.fixture(scope="module")
def fitted(methods: dict[str, Method], cells: AnnData, few_epochs: None) -> dict[str, Embed]:
    return {name: method.fit(cells, FitOptions()) for name, method in methods.items()}


def neighbour_accuracy(Z: NDArray[np.float32], cells: AnnData) -> float:
    scores = cross_val_score(KNeighborsClassifier(15), Z, cells.obs["cell_type"].to_numpy(), cv=4)
    return float(np.mean(scores))


# Every method


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_a_function_of_cells_and_seed(
    name: str,
    methods: dict[str, Method],
    fitted: dict[str, Embed],
    cells: AnnData,
    global_rng_untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    first = fitted[name](cells)
    assert first.shape == (N_OBS, contrastive.EMBEDDING_DIM if name in ("SimCLR", "VICReg") else 8)
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    assert np.linalg.matrix_rank(first - first.mean(0)) > 3
    threads = torch.get_num_threads()
    with global_rng_untouched():
        again = methods[name].fit(cells, FitOptions())(cells)
    assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(again, first)
    other = methods[name].fit(cells, FitOptions(seed=1))(cells)
    assert np.abs(other - first).max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_worse_views_can_be_embedded(name: str, fitted: dict[str, Embed], cells: AnnData) -> None:
    full = fitted[name](cells)
    for view, query in stress_views(cells).items():
        Z = fitted[name](query)
        assert Z.shape == full.shape
        assert np.isfinite(Z).all()
        assert np.abs(Z - full).max() > 0.01, view


def test_cells_are_not_changed(fitted: dict[str, Embed], cells: AnnData, make_adata: Callable[..., AnnData]) -> None:
    for embed in fitted.values():
        embed(cells)
    before = shallow_cells(make_adata)
    assert (cells.X != before.X).nnz == 0
    assert cells.obs.equals(before.obs)
    assert cells.var.equals(before.var)
    assert not cells.uns
    assert not cells.obsm


@pytest.mark.parametrize("name", NAMES)
def test_genes_are_matched_by_name(name: str, fitted: dict[str, Embed], cells: AnnData) -> None:
    np.testing.assert_allclose(fitted[name](cells[:, ::-1].copy()), fitted[name](cells), atol=1e-5)


@pytest.mark.parametrize("name", ["arm", "untrained", "original"])
def test_a_missing_gene_is_not_a_zero(name: str, fitted: dict[str, Embed], cells: AnnData) -> None:
    zeros = cells.copy()
    zeros.X = (cells.X.toarray() * (np.arange(N_GENES) % 2 == 0)).astype(np.float32)
    assert np.abs(fitted[name](cells[:, ::2].copy()) - fitted[name](zeros)).max() > 0.01


@pytest.mark.parametrize("name", ["SimCLR", "VICReg", "arm", "original"])
def test_training_tells_types_apart_better_than_random_weights(
    name: str, fitted: dict[str, Embed], cells: AnnData
) -> None:
    random = neighbour_accuracy(fitted["untrained"](cells), cells)
    assert 0.4 < random < 0.9
    assert neighbour_accuracy(fitted[name](cells), cells) > random + 0.05


# Two views


def test_log_values_are_log1p_at_the_depth_of_the_fit(cells: AnnData) -> None:
    counts = cells.X.toarray()
    median = np.median(counts.sum(1))
    normaliser = Normaliser.fit(cells, transform="log", unit_variance=False)
    expected = np.log1p(counts * median / counts.sum(1, keepdims=True))
    np.testing.assert_allclose(contrastive.log_values(cells, normaliser).numpy(), expected, atol=1e-5)
    part = contrastive.log_values(cells[:, :60].copy(), normaliser).numpy()
    assert not part[:, 60:].any()
    expected = np.log1p(counts[:, :60] * np.median(counts[:, :60].sum(1)) / counts[:, :60].sum(1, keepdims=True))
    np.testing.assert_allclose(part[:, :60], expected, atol=1e-5)


def test_masking_hides_the_stated_share_and_keeps_the_rest(generator: torch.Generator) -> None:
    values = torch.rand(200, 300, generator=generator) + 1
    seen = contrastive.masked(values, generator)
    hidden = seen == 0
    assert float(hidden.float().mean()) == pytest.approx(contrastive.MASKED_SHARE, abs=0.01)
    assert torch.equal(seen[~hidden], values[~hidden])
    assert not torch.equal(contrastive.masked(values, generator), seen)


def test_nt_xent_agrees_with_the_formula(generator: torch.Generator) -> None:
    first, second = torch.randn(2, 5, 4, generator=generator)
    views = F.normalize(torch.cat([first, second]), dim=1).numpy().astype(float)
    losses = []
    for i in range(10):
        others = [k for k in range(10) if k != i]
        weights = {k: np.exp(views[i] @ views[k] / 0.5) for k in others}
        losses.append(-np.log(weights[(i + 5) % 10] / sum(weights.values())))
    assert float(contrastive.nt_xent_loss(first, second)) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.fixture(params=["gaussian", "skewed"])
def batch(request: pytest.FixtureRequest, generator: torch.Generator) -> torch.Tensor:
    """Vectors that are Gaussian, or far from it, off centre, with correlated and unequally scaled dimensions."""
    z = torch.randn(64, 6, generator=generator)
    if request.param == "gaussian":
        return z
    mixing = torch.randn(6, 6, generator=generator)
    return z.exp() @ mixing * torch.linspace(0.1, 2.0, 6) + 0.5


def test_vicreg_equals_its_formula(batch: torch.Tensor, generator: torch.Generator) -> None:
    z: NDArray[np.float64] = batch.double().numpy()
    hinge = np.maximum(0.0, 1.0 - np.sqrt(z.var(axis=0, ddof=1) + 1e-4)).mean()
    covariance = np.cov(z, rowvar=False)
    expected = hinge + 0.04 * (covariance[~np.eye(6, dtype=bool)] ** 2).sum() / 6
    assert float(contrastive.vicreg_loss(batch.double())) == pytest.approx(expected, rel=1e-4)
    shuffled = batch[torch.randperm(64, generator=generator)]
    torch.testing.assert_close(contrastive.vicreg_loss(shuffled), contrastive.vicreg_loss(batch))


def test_collapsed_batches_cost_vicreg_more_than_a_gaussian_one(generator: torch.Generator) -> None:
    best = float(contrastive.vicreg_loss(torch.randn(64, 6, generator=generator)))
    line = torch.randn(64, 1, generator=generator).expand(64, 6).contiguous()
    for name, z in {"point": torch.ones(64, 6), "line": line, "two clusters": line.sign()}.items():
        z.requires_grad_()
        cost = contrastive.vicreg_loss(z)
        cost.backward()
        assert float(cost.detach()) > 1.5 * best + 0.01, name
        assert z.grad is not None
        assert torch.isfinite(z.grad).all(), name


def test_descending_vicreg_undoes_a_collapse(generator: torch.Generator) -> None:
    z = (1.0 + 0.02 * torch.randn(64, 6, generator=generator)).requires_grad_()
    start = float(z.detach().std(0).mean())
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        contrastive.vicreg_loss(z).backward()
        optimizer.step()
    assert float(z.detach().std(0).mean()) > 20 * start
    assert effective_rank(z.detach()) > 0.8 * 6


def test_vicreg_pair_agrees_with_the_formula(generator: torch.Generator) -> None:
    first, second = 0.5 * torch.randn(2, 50, 4, generator=generator)

    def spread(z: NDArray[np.float64]) -> float:
        covariance = np.cov(z.T)
        off_diagonal = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
        hinge = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
        return float(5 * hinge + off_diagonal / 4)

    a, b = first.numpy().astype(float), second.numpy().astype(float)
    expected = 5 * np.mean((a - b) ** 2) + spread(a) + spread(b)
    assert float(contrastive.vicreg_pair_loss(first, second)) == pytest.approx(expected, rel=1e-4)


def test_training_brings_the_views_of_a_cell_together(
    cells: AnnData, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = contrastive.log_values(cells, Normaliser.fit(cells, transform="log", unit_variance=False))
    first, second = (contrastive.masked(values, generator) for _ in range(2))

    def loss_after(epochs: int) -> float:
        monkeypatch.setattr(contrastive, "EPOCHS", epochs)
        encoder = contrastive.train_encoder(values, contrastive.nt_xent_loss, projected_dim=8, seed=0)
        with torch.no_grad():
            return float(contrastive.nt_xent_loss(encoder(first), encoder(second)))

    assert loss_after(200) < loss_after(1) - 0.2


# genejepa and its arms


@pytest.fixture
def objectives_of(
    cells: AnnData, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[ObjectiveConfig, GeneJEPA, dict[str, Any]]]:
    """Fit a method of the registry up to the training: its objectives, model and arguments of ``train``."""
    started: list[tuple[GeneJEPA, dict[str, Any]]] = []
    monkeypatch.setattr(GeneJEPA, "train", lambda model, **arguments: started.append((model, arguments)))

    def fit(name: str, options: FitOptions | None = None) -> tuple[ObjectiveConfig, GeneJEPA, dict[str, Any]]:
        next(method for method in ours.METHODS if method.name == name).fit(
            cells, options or FitOptions(batch_key="batch")
        )
        model, arguments = started.pop()
        return model.config.objectives, model, arguments

    return fit


def test_genejepa_is_the_default_model(objectives_of: Callable[..., tuple[ObjectiveConfig, GeneJEPA, Any]]) -> None:
    _, model, arguments = objectives_of("genejepa", FitOptions(seed=3, batch_key="batch", threads=2))
    assert model.config == GeneJEPAConfig()
    assert model.registration.batch_key == "batch"
    assert len(model.genes) == N_GENES
    assert (arguments["seed"], arguments["threads"]) == (3, 2)


def test_arms_switch_off_what_they_say(objectives_of: Callable[..., tuple[ObjectiveConfig, GeneJEPA, Any]]) -> None:
    likelihood, *_ = objectives_of("genejepa, likelihood only")
    assert likelihood.information > 0
    assert likelihood.prediction == likelihood.invariance == likelihood.depth == likelihood.diversity == 0
    jepa, *_ = objectives_of("genejepa, JEPA only")
    assert jepa.information == 0
    assert min(jepa.prediction, jepa.diversity) > 0
    _, model, _ = objectives_of("genejepa, MLP encoder")
    assert model.config.model.encoder == "mlp"
    assert model.config.objectives == GeneJEPAConfig().objectives


def test_only_x_is_read_whatever_was_declared(
    methods: dict[str, Method], fitted: dict[str, Embed], cells: AnnData
) -> None:
    declared = cells.copy()
    declared.layers["other"] = declared.X[::-1].copy()
    GeneJEPA.setup_anndata(declared, layer="other", batch_key="batch")
    expected = fitted["arm"](cells)
    np.testing.assert_array_equal(fitted["arm"](declared), expected)
    np.testing.assert_array_equal(methods["arm"].fit(declared, FitOptions())(cells), expected)


def test_arms_use_the_batch_and_the_others_do_not(methods: dict[str, Method]) -> None:
    assert {name for name, method in methods.items() if method.uses_batch} == {"arm"}
    assert all(method.new_cells and method.random for method in methods.values())


def test_original_loss_weighs_its_terms(generator: torch.Generator) -> None:
    centred = torch.randn(64, 5, generator=generator)
    basis, _ = torch.linalg.qr(centred - centred.mean(0))
    white = 2 * np.sqrt(63) * basis  # deviation 2 and no covariance: neither costs anything
    assert float(ours.original_loss(white, white, 3 * white)) == pytest.approx(0, abs=1e-4)
    assert float(ours.original_loss(white, white, -white)) == pytest.approx(2, abs=1e-4)
    point = torch.ones(64, 5)  # deviation 0.01, as the hinge counts it
    assert float(ours.original_loss(white, point, point)) == pytest.approx(25 * 0.99, rel=1e-3)
    assert float(ours.original_loss(point, white, white)) == pytest.approx(20 * 0.99, rel=1e-3)
    plane, line = white[:, :2], white[:, :1].expand(-1, 2)  # covariance 4, twice, over two dimensions
    assert float(ours.original_loss(plane, line, line)) == pytest.approx(16, rel=1e-3)
    assert float(ours.original_loss(line, plane, plane)) == pytest.approx(16, rel=1e-3)


def test_original_objective_predicts_the_hidden_genes_and_moves_its_target(
    methods: dict[str, Method], cells: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    decays: list[float] = []
    original_loss, views = ours.original_loss, GeneTokenEncoder.views

    def watched_views(
        encoder: GeneTokenEncoder, values: torch.Tensor, blocks: torch.Tensor, membership: torch.Tensor
    ) -> torch.Tensor:
        (contexts if torch.is_grad_enabled() else targets).append(membership[0])
        return views(encoder, values, blocks, membership)

    def watched_loss(context: torch.Tensor, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert context.requires_grad
        assert predicted.requires_grad
        assert not target.requires_grad
        return original_loss(context, predicted, target)

    def watched_update(target: torch.nn.Module, source: torch.nn.Module, decay: float) -> None:
        decays.append(decay)
        update_average(target, source, decay)

    monkeypatch.setattr(GeneTokenEncoder, "views", watched_views)
    monkeypatch.setattr("genejepa.bench.ours.original_loss", watched_loss)
    monkeypatch.setattr("genejepa.bench.ours.update_average", watched_update)
    methods["original"].fit(cells, FitOptions())
    assert len(contexts) == len(targets) == len(decays) >= 50
    assert torch.equal(torch.stack(contexts) + torch.stack(targets), torch.ones(len(contexts), *contexts[0].shape))
    assert float(torch.stack(contexts).mean()) == pytest.approx(0.55, abs=0.1)
    assert decays[0] < decays[-1] <= 1
