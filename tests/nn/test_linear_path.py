from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from genejepa.config import ModelConfig
from genejepa.data.axes import PrincipalAxes, principal_axes
from genejepa.data.normalization import Normalizer
from genejepa.errors import ConfigError
from genejepa.jepa import JEPA
from genejepa.nn.encoder import GeneTokenEncoder
from genejepa.nn.likelihood import CountReadout

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray
    from torch import Tensor

    from genejepa.data.panel import PanelCounts

N_OBS, N_GENES, N_AXES = 250, 60, 5
SIZES: dict[str, Any] = {"embedding_dim": 12, "n_latents": 2, "dim": 32, "n_heads": 4, "predictor_dim": 16}


@pytest.fixture(scope="module")
def axes(as_panel: Callable[[NDArray[np.float32]], PanelCounts]) -> PrincipalAxes:
    """Axes of cells that vary along five programs of genes, and by sampling noise."""
    rng = np.random.default_rng(0)
    programs = rng.gamma(0.5, 2.0, size=(N_AXES, N_GENES))
    weights = rng.dirichlet(np.full(N_AXES, 0.5), size=N_OBS)
    counts = as_panel(rng.poisson(4.0 * weights @ programs).astype(np.float32))
    return principal_axes(counts, Normalizer.fit(counts, transform="sqrt"), n_components=32, seed=0)


def started(axes: PrincipalAxes, make_seeded: Callable[[Callable[[], Any]], Any], **settings: Any) -> JEPA:
    config = ModelConfig(**{**SIZES, "n_axes": N_AXES, **settings})
    network: JEPA = make_seeded(lambda: JEPA(N_GENES, config, torch.zeros(1, N_GENES))).eval()
    network.start_from_axes(axes, seed=0)
    return network


def linear_part(network: JEPA, values: NDArray[np.float32]) -> Tensor:
    """Vectors of the linear path alone: those of an encoder whose head says nothing."""
    encoder = network.encoder
    assert isinstance(encoder, GeneTokenEncoder)
    with torch.no_grad():
        encoder.head.weight.zero_()
        encoder.head.bias.zero_()
        vectors: Tensor = encoder(torch.from_numpy(values))
    return vectors


def explained(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Share of the variance of the expected vectors that is found, R^2."""
    return 1 - float(((found - expected) ** 2).sum() / ((expected - expected.mean(axis=0)) ** 2).sum())


def test_linear_path_starts_at_the_principal_coordinates(
    axes: PrincipalAxes, make_seeded: Callable[[Callable[[], Any]], Any]
) -> None:
    found = linear_part(started(axes, make_seeded), axes.values).numpy()
    assert explained(found, axes.coordinates(N_AXES, 12, seed=0)) > 0.95
    scores = axes.values @ axes.axes[:, :N_AXES]
    distances = torch.pdist(torch.from_numpy(scores)).numpy()
    correlation = np.corrcoef(torch.pdist(torch.from_numpy(found)).numpy(), distances)[0, 1]
    assert correlation > 0.98


def test_coordinates_keep_distances_and_fill_the_dimensions(axes: PrincipalAxes) -> None:
    found = axes.coordinates(N_AXES, 12, seed=0)
    assert found.shape == (N_OBS, 12)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.mean(axis=0), 0.0, atol=1e-5)
    assert float(found.var()) == pytest.approx(1.0, rel=1e-3)
    assert found.std(axis=0).min() > 0.2
    scores = torch.from_numpy(axes.values @ axes.axes[:, :N_AXES])
    ratio = torch.pdist(torch.from_numpy(found)) / torch.pdist(scores)
    assert float(ratio.max() / ratio.min()) == pytest.approx(1.0, rel=1e-2)


def test_coordinates_are_a_function_of_the_seed(
    axes: PrincipalAxes, global_rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    with global_rng_untouched():
        first = axes.coordinates(N_AXES, 12, seed=0)
        np.testing.assert_array_equal(axes.coordinates(N_AXES, 12, seed=0), first)
        assert not np.allclose(axes.coordinates(N_AXES, 12, seed=1), first, atol=0.1)


@pytest.mark.parametrize(("n_axes", "embedding_dim"), [(30, 4), (100, 64), (1, 12)], ids=lambda n: str(n))
def test_any_number_of_axes_and_dimensions_can_start(
    axes: PrincipalAxes, make_seeded: Callable[[Callable[[], Any]], Any], n_axes: int, embedding_dim: int
) -> None:
    network = started(axes, make_seeded, n_axes=n_axes, embedding_dim=embedding_dim)
    found = linear_part(network, axes.values)
    assert found.shape == (N_OBS, embedding_dim)
    assert torch.isfinite(found).all()
    assert np.linalg.matrix_rank(found - found.mean(0), tol=1e-2) <= min(n_axes, embedding_dim)


def test_cells_that_do_not_vary_start_finite(make_seeded: Callable[[Callable[[], Any]], Any]) -> None:
    orthonormal = np.linalg.qr(np.random.default_rng(0).standard_normal((N_GENES, 16)))[0].astype(np.float32)
    values = np.zeros((9, N_GENES), dtype=np.float32)
    values[0, 0] = 1e-3
    network = started(PrincipalAxes(orthonormal, np.full(16, 1e-4, np.float32), values), make_seeded)
    assert all(torch.isfinite(weight).all() for weight in network.state_dict().values())


def test_the_nonlinear_head_adds_to_the_path(
    axes: PrincipalAxes, make_seeded: Callable[[Callable[[], Any]], Any]
) -> None:
    network = started(axes, make_seeded)
    with torch.no_grad():
        whole = network.encoder(torch.from_numpy(axes.values))
    assert float((whole - linear_part(network, axes.values)).norm()) > 0.1 * float(whole.norm())


def test_without_axes_there_is_no_path(axes: PrincipalAxes, make_seeded: Callable[[Callable[[], Any]], Any]) -> None:
    network = started(axes, make_seeded, n_axes=0)
    assert isinstance(network.encoder, GeneTokenEncoder)
    assert network.encoder.linear_path is None
    assert not [name for name in network.state_dict() if "linear_path" in name]
    assert float(linear_part(network, axes.values).abs().max()) == 0.0
    with pytest.raises(ConfigError, match="n_axes"):
        ModelConfig(n_axes=-1)


# Count read-out


def test_readout_takes_the_frequencies_of_the_batch_and_of_all_cells_for_others() -> None:
    frequency = torch.log_softmax(torch.arange(12.0).view(3, 4).sin(), 1)
    readout = CountReadout(5, frequency)
    assert torch.equal(readout.expected(torch.tensor([1, -1, 0])), frequency[[1, 2, 0]])
    alone = CountReadout(5, frequency[:1])
    found = alone.expected(torch.tensor([-1, -1]))
    assert torch.equal(found.expand(2, -1), frequency[[0, 0]])
    assert readout(torch.zeros(2, 5)).shape == alone(torch.zeros(2, 5)).shape == (2, 4)
