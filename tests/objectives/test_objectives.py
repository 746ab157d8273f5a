from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import special, stats

from genejepa.objectives import (
    depth_loss,
    diversity_loss,
    effective_rank,
    information_loss,
    invariance_loss,
    mean_pairwise_cosine,
    prediction_loss,
)
from genejepa.objectives.diversity import random_directions

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray
    from torch import Tensor

N, DIM = 64, 6


@pytest.fixture
def directions() -> Tensor:
    return random_directions(DIM, 32, seed=0, step=0, device=torch.device("cpu"))


@pytest.fixture
def gaussian(generator: torch.Generator) -> Tensor:
    return torch.randn(N, DIM, generator=generator)


@pytest.fixture
def skewed(generator: torch.Generator) -> Tensor:
    """A batch far from Gaussian, off centre, with correlated and unequally scaled dimensions."""
    z = torch.randn(N, DIM, generator=generator).exp()
    mixing = torch.randn(DIM, DIM, generator=generator)
    return z @ mixing * torch.linspace(0.1, 2.0, DIM) + 0.5


def collapsed_batches(generator: torch.Generator) -> dict[str, Tensor]:
    """Batches that use no dimension, or one; each dimension of the last two has unit variance."""
    line = torch.randn(N, 1, generator=generator)
    return {
        "origin": torch.zeros(N, DIM),
        "point": torch.ones(N, DIM),
        "line": line.expand(N, DIM).contiguous(),
        "two clusters": line.sign().expand(N, DIM).contiguous(),
    }


# Diversity


def test_collapsed_batches_cost_more_than_a_gaussian_one(
    gaussian: Tensor, directions: Tensor, generator: torch.Generator
) -> None:
    best = float(diversity_loss(gaussian, directions))
    for name, z in collapsed_batches(generator).items():
        cost = float(diversity_loss(z, directions))
        assert math.isfinite(cost), name
        assert cost > 1.5 * best + 0.01, name


def test_descending_diversity_undoes_a_collapse(directions: Tensor, generator: torch.Generator) -> None:
    z = (1.0 + 0.02 * torch.randn(N, DIM, generator=generator)).requires_grad_()
    start = float(z.detach().std(0).mean())
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        diversity_loss(z, directions).backward()
        optimizer.step()
    assert float(z.detach().std(0).mean()) > 20 * start
    assert effective_rank(z.detach()) > 0.8 * DIM


def test_gradient_of_a_point_is_finite(directions: Tensor) -> None:
    z = torch.ones(N, DIM, requires_grad=True)
    diversity_loss(z, directions).backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_the_order_of_the_cells_changes_nothing(skewed: Tensor, directions: Tensor, generator: torch.Generator) -> None:
    shuffled = skewed[torch.randperm(N, generator=generator)]
    found = diversity_loss(shuffled, directions)
    torch.testing.assert_close(found, diversity_loss(skewed, directions))


@pytest.mark.parametrize("batch", ["gaussian", "skewed"])
def test_diversity_equals_distances_to_the_quantiles_of_the_normal_distribution(
    batch: str, request: pytest.FixtureRequest, directions: Tensor
) -> None:
    z: NDArray[np.float64] = request.getfixturevalue(batch).double().numpy()
    deviation = z.std(axis=0, ddof=1)
    quantiles = stats.norm.ppf((np.arange(N) + 0.5) / N)
    standardised = (z - z.mean(axis=0)) / deviation
    shape = np.mean(
        [((np.sort(standardised @ column) - quantiles) ** 2).mean() for column in directions.double().numpy().T]
    )
    scale = np.maximum(0, 1 - deviation).mean() + 0.1 * ((deviation - 1) ** 2).mean()
    expected = 0.1 * (z.mean(axis=0) ** 2).mean() + scale + shape
    assert float(diversity_loss(torch.from_numpy(z), directions)) == pytest.approx(expected, rel=1e-3)


def test_directions_are_unit_vectors_and_a_function_of_seed_and_step(
    global_rng_untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    cpu = torch.device("cpu")
    with global_rng_untouched():
        first = random_directions(DIM, 9, seed=1, step=5, device=cpu)
        assert torch.equal(first, random_directions(DIM, 9, seed=1, step=5, device=cpu))
    assert first.shape == (DIM, 9)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(9))
    assert not torch.equal(first, random_directions(DIM, 9, seed=1, step=6, device=cpu))
    assert not torch.equal(first, random_directions(DIM, 9, seed=2, step=5, device=cpu))


# Information


@pytest.fixture
def counts(rng: np.random.Generator) -> Tensor:
    """Counts of twelve genes, one cell of them without any."""
    drawn = rng.poisson(rng.gamma(1.0, 4.0, size=12), size=(7, 12)).astype(np.float32)
    drawn[2] = 0
    return torch.from_numpy(drawn)


@pytest.fixture
def log_frequency(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(np.log(rng.dirichlet(np.full(12, 2.0)))).float()


@pytest.fixture
def logits(generator: torch.Generator) -> Tensor:
    return 0.7 * torch.randn(7, 12, generator=generator)


def test_information_is_the_gain_over_the_average_cell_in_nats(
    counts: Tensor, logits: Tensor, log_frequency: Tensor
) -> None:
    found = information_loss(logits, counts, log_frequency)
    frequency = log_frequency.double().numpy()
    frequency = frequency - special.logsumexp(frequency)
    gains = [
        stats.multinomial.logpmf(cell, cell.sum(), special.softmax(frequency + fold))
        - stats.multinomial.logpmf(cell, cell.sum(), special.softmax(frequency))
        for cell, fold in zip(counts.double().numpy(), logits.double().numpy(), strict=True)
    ]
    assert float(found) == pytest.approx(-np.mean(gains), rel=1e-4, abs=1e-3)


def test_a_vector_that_says_nothing_has_no_information(counts: Tensor, log_frequency: Tensor) -> None:
    nothing = torch.zeros_like(counts)
    loss = information_loss(nothing, counts, log_frequency)
    assert float(loss) == pytest.approx(0.0, abs=1e-3)


def test_knowing_the_rates_of_a_cell_is_information(counts: Tensor, log_frequency: Tensor) -> None:
    kept = counts[counts.sum(1) > 0]
    truth = torch.log((kept + 0.5) / (kept + 0.5).sum(1, keepdim=True)) - log_frequency
    losses = [float(information_loss(sign * truth, kept, log_frequency)) for sign in (1, -1)]
    assert losses[0] < -1.0
    assert losses[1] > 1.0


def test_information_is_the_mean_over_the_cells(counts: Tensor, logits: Tensor, log_frequency: Tensor) -> None:
    def loss(rows: slice) -> float:
        return float(information_loss(logits[rows], counts[rows], log_frequency))

    each = [loss(slice(i, i + 1)) for i in range(len(counts))]
    assert loss(slice(None)) == pytest.approx(np.mean(each), rel=1e-4)
    assert each[2] == pytest.approx(0.0, abs=1e-5)  # a cell without counts tells nothing


@pytest.mark.parametrize("shift", [-3.0, 5.0])
def test_multinomial_ignores_a_constant_in_the_logits(
    shift: float, counts: Tensor, logits: Tensor, log_frequency: Tensor
) -> None:
    torch.testing.assert_close(
        information_loss(logits + shift, counts, log_frequency),
        information_loss(logits, counts, log_frequency),
        atol=1e-3,
        rtol=1e-4,
    )


def test_gradient_of_extreme_logits_is_finite(counts: Tensor, log_frequency: Tensor) -> None:
    logits = torch.full_like(counts, -50.0)
    logits[:, ::2] = 50.0
    logits.requires_grad_()
    loss = information_loss(logits, counts, log_frequency)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


# Prediction, invariance, depth


def test_prediction_is_the_mean_squared_distance(gaussian: Tensor, skewed: Tensor) -> None:
    expected = ((gaussian.numpy() - skewed.numpy()) ** 2).mean()
    assert float(prediction_loss(gaussian, skewed)) == pytest.approx(float(expected), rel=1e-5)
    assert float(prediction_loss(gaussian, gaussian)) == 0.0


def test_invariance_is_the_variance_over_the_views(generator: torch.Generator) -> None:
    views = torch.randn(3, N, DIM, generator=generator)
    assert float(invariance_loss(views)) == pytest.approx(float(views.numpy().var(axis=0).mean()), rel=1e-5)
    assert float(invariance_loss(views[:1].expand(2, -1, -1))) == pytest.approx(0.0, abs=1e-12)


def test_depth_compares_thinned_cells_only(gaussian: Tensor, skewed: Tensor) -> None:
    thinned = torch.arange(N) % 3 == 0
    expected = ((gaussian - skewed)[thinned].numpy() ** 2).mean()
    assert float(depth_loss(gaussian, skewed, thinned)) == pytest.approx(float(expected), rel=1e-5)
    assert float(depth_loss(gaussian, skewed, torch.zeros(N, dtype=torch.bool))) == 0.0


# Diagnostics


def batch_of_spectrum(singular: list[float], *, seed: int = 0) -> Tensor:
    """Centred batch with the given singular values."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((40, len(singular)))
    left, _ = np.linalg.qr(left - left.mean(axis=0))
    right, _ = np.linalg.qr(rng.standard_normal((len(singular), len(singular))))
    return torch.from_numpy(left * np.array(singular) @ right)


@pytest.mark.parametrize(
    ("singular", "expected"),
    [
        ([1.0], 1.0),
        ([2.0] * 5, 5.0),
        ([3.0, 3.0, 0.0, 0.0], 2.0),
        ([7.0, 0.0, 0.0], 1.0),
        ([0.5, 0.25, 0.25], 2.0 * math.sqrt(2.0)),
    ],
    ids=["one", "five equal", "two of four", "one of three", "1/2 1/4 1/4"],
)
@pytest.mark.parametrize("offset", [0.0, 50.0], ids=["centred", "off centre"])
def test_effective_rank_is_the_exponential_of_the_entropy(
    singular: list[float], expected: float, offset: float
) -> None:
    assert effective_rank(batch_of_spectrum(singular) + offset) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6, 0.1], ids="all {}".format)
def test_effective_rank_of_a_point_is_one(value: float) -> None:
    assert effective_rank(torch.full((N, DIM), value)) == pytest.approx(1.0)


def test_effective_rank_ignores_scale_and_rotation() -> None:
    batch = batch_of_spectrum([4.0, 2.0, 1.0, 0.5])
    rotation, _ = torch.linalg.qr(torch.arange(16.0).view(4, 4).sin().double())
    assert effective_rank(1e-3 * batch @ rotation) == pytest.approx(effective_rank(batch), rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.tensor([[1.0, 2.0], [10.0, 20.0], [0.1, 0.2]]), 1.0),
        (torch.tensor([[1.0, 2.0], [-3.0, -6.0]]), -1.0),
        (torch.eye(5), 0.0),
        (torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), -1 / 3),
        (torch.tensor([[1.0, 0.0], [1.0, 1.0]]), math.sqrt(0.5)),
    ],
    ids=["one direction", "opposite", "orthogonal", "cross", "45 degrees"],
)
def test_mean_cosine_of_known_configurations(batch: Tensor, expected: float) -> None:
    assert mean_pairwise_cosine(batch) == pytest.approx(expected, abs=1e-6)


def test_mean_cosine_equals_the_mean_over_all_pairs(skewed: Tensor) -> None:
    z = skewed.double().numpy()
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[np.triu_indices(N, k=1)]
    assert mean_pairwise_cosine(skewed) == pytest.approx(pairs.mean(), rel=1e-5)


def test_weights_multiply_the_nats_of_each_cell(counts: Tensor, logits: Tensor, log_frequency: Tensor) -> None:
    def loss(rows: slice, weight: Tensor | None) -> Tensor:
        return information_loss(logits[rows], counts[rows], log_frequency, weight=weight)

    weight = torch.linspace(0, 2, len(counts))
    each = torch.stack([loss(slice(i, i + 1), None) for i in range(len(counts))])
    torch.testing.assert_close(loss(slice(None), weight), (weight * each).mean())
