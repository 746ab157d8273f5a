from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from genejepa.objectives import alignment_loss, information_loss
from genejepa.objectives.diversity import random_directions

if TYPE_CHECKING:
    from torch import Tensor

N, DIM = 200, 6


@pytest.fixture
def directions() -> Tensor:
    return random_directions(DIM, 64, seed=0, step=0, device=torch.device("cpu"))


@pytest.fixture
def z(generator: torch.Generator) -> Tensor:
    return torch.randn(N, DIM, generator=generator)


@pytest.fixture
def batch(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (N,), generator=generator)


def naive(z: Tensor, batch: Tensor, directions: Tensor) -> float:
    """Mean squared difference of 32 quantiles of each batch of five or more, known, from those of all."""
    projected = z.numpy() @ directions.numpy()
    levels = (np.arange(32) + 0.5) / 32
    codes, sizes = np.unique(batch.numpy(), return_counts=True)
    pooled = np.quantile(projected, levels, axis=0)
    members = [projected[batch.numpy() == code] for code in codes[(sizes >= 5) & (codes >= 0)]]
    return float(np.mean([((np.quantile(own, levels, axis=0) - pooled) ** 2).mean() for own in members]))


def test_loss_follows_the_definition(z: Tensor, generator: torch.Generator, directions: Tensor) -> None:
    batch = torch.randint(-1, 4, (N,), generator=generator)
    batch[batch == 2] = 0
    batch[:4] = 2  # too few
    shifted = z + 0.3 * batch[:, None]
    found = float(alignment_loss(shifted, batch, directions))
    assert found == pytest.approx(naive(shifted, batch, directions), rel=1e-4)


def test_equal_distributions_cost_nothing(z: Tensor, directions: Tensor, batch: Tensor) -> None:
    twice = torch.cat([z, z])
    copies = torch.arange(2).repeat_interleave(N)
    assert float(alignment_loss(twice, copies, directions)) < 1e-3
    assert float(alignment_loss(z, batch, directions)) < 0.05  # two draws of one distribution


def test_loss_grows_with_the_shift_of_a_batch(z: Tensor, batch: Tensor, directions: Tensor) -> None:
    along = torch.zeros(DIM)
    along[1] = 1.0
    losses = [float(alignment_loss(z + shift * batch[:, None] * along, batch, directions)) for shift in (0, 1, 2, 4, 8)]
    assert losses == sorted(losses)
    # Far apart, the quantiles of each of two equal batches are half the shift away, or a spread more or less.
    assert losses[-1] > 0.5 * 8**2 / DIM / 4 > 5 * losses[0]


def test_batches_that_spread_unlike_cost_too(z: Tensor, batch: Tensor, directions: Tensor) -> None:
    wider = torch.where(batch[:, None] == 1, 3.0, 1.0) * z
    assert float(alignment_loss(wider, batch, directions)) > 5 * float(alignment_loss(z, batch, directions))


def test_names_of_the_batches_do_not_matter(z: Tensor, batch: Tensor, directions: Tensor) -> None:
    shifted = z + batch[:, None]
    expected = float(alignment_loss(shifted, batch, directions))
    assert expected > 0.1
    assert float(alignment_loss(shifted, 1 - batch, directions)) == pytest.approx(expected, rel=1e-6)
    assert float(alignment_loss(shifted, 7 * batch, directions)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "codes",
    [[0] * 20, [0] * 16 + [1] * 4, [0] * 10 + [-1] * 10, [-1] * 20, [0, 1, 2, 3, 4] * 4],
    ids=["one batch", "a batch of four", "one known batch", "no known batch", "all too small"],
)
def test_fewer_than_two_batches_of_five_cost_nothing(codes: list[int], z: Tensor, directions: Tensor) -> None:
    few = (z[:20] + torch.tensor(codes)[:, None]).requires_grad_()
    loss = alignment_loss(few, torch.tensor(codes), directions)
    assert loss.shape == ()
    assert float(loss) == 0.0


@pytest.mark.parametrize("kind", ["random", "all equal", "far apart"])
def test_gradients_are_finite_and_draw_batches_together(
    kind: str, z: Tensor, batch: Tensor, directions: Tensor
) -> None:
    start = {"random": z + 2.0 * batch[:, None], "all equal": torch.ones(N, DIM), "far apart": z + 1e4 * batch[:, None]}
    vectors = start[kind].clone().requires_grad_()
    loss = alignment_loss(vectors, batch, directions)
    loss.backward()
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()
    if kind == "all equal":
        assert float(loss.detach()) == 0.0
    else:
        moved = vectors.detach() - vectors.grad
        assert float(alignment_loss(moved, batch, directions)) < float(loss.detach())


def test_quantiles_are_taken_in_32_bits(
    z: Tensor, batch: Tensor, directions: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantile = torch.quantile
    seen: set[torch.dtype] = set()

    def recorded(projected: Tensor, levels: Tensor, dim: int) -> Tensor:
        seen.add(projected.dtype)
        return quantile(projected, levels, dim=dim)

    monkeypatch.setattr(torch, "quantile", recorded)
    expected = float(alignment_loss(z + batch[:, None], batch, directions))
    with torch.autocast("cpu", torch.bfloat16):
        found = float(alignment_loss(z + batch[:, None], batch, directions))
    assert seen == {torch.float32}  # GPUs refuse quantiles of 16-bit numbers
    assert found == pytest.approx(expected, rel=0.05)


# Count likelihood


def test_frequencies_may_be_those_of_the_batch_of_a_cell(generator: torch.Generator) -> None:
    counts = torch.poisson(torch.rand(10, 7, generator=generator) * 5, generator=generator)
    logits = torch.randn(10, 7, generator=generator)
    frequency = torch.log_softmax(torch.randn(2, 7, generator=generator), 1)

    def loss(cells: slice, log_frequency: Tensor) -> float:
        return float(information_loss(logits[cells], counts[cells], log_frequency))

    batch = torch.arange(10) // 5
    apart = [loss(slice(0, 5), frequency[0]), loss(slice(5, 10), frequency[1])]
    assert loss(slice(None), frequency[batch]) == pytest.approx(np.mean(apart), rel=1e-5)
    assert apart[0] != pytest.approx(loss(slice(0, 5), frequency[1]), rel=1e-2)
