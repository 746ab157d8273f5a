from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from genejepa.config import EncoderKind, ModelConfig
from genejepa.nn.encoder import GeneTokenEncoder, MLPEncoder, make_encoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from genejepa.nn.encoder import CellEncoder

N_CELLS, N_GENES, N_BLOCKS = 6, 30, 4
SIZES = {"embedding_dim": 8, "n_latents": 2, "dim": 16, "n_heads": 4, "dropout": 0.3}

both_kinds = pytest.mark.parametrize("kind", ["gene_tokens", "mlp"])


@pytest.fixture
def build(make_seeded: Callable[[Callable[[], Any]], Any]) -> Callable[[EncoderKind], CellEncoder]:
    def make(kind: EncoderKind) -> CellEncoder:
        config = ModelConfig(encoder=kind, **SIZES)  # type: ignore[arg-type]  # numbers by name
        encoder: CellEncoder = make_seeded(lambda: make_encoder(N_GENES, config)).eval()
        return encoder

    return make


@pytest.fixture
def values(generator: torch.Generator) -> Tensor:
    return torch.randn(N_CELLS, N_GENES, generator=generator)


@pytest.fixture
def blocks(generator: torch.Generator) -> Tensor:
    """Thirty genes in four blocks of eight places, two of them empty."""
    order = torch.randperm(N_GENES, generator=generator)
    padded = torch.cat([order[:23], torch.tensor([N_GENES]), order[23:], torch.tensor([N_GENES])])
    return padded.view(N_BLOCKS, -1)


@pytest.fixture
def membership(generator: torch.Generator) -> Tensor:
    """Blocks of three views; every view shows each cell a block or more, and not all."""
    noise = torch.rand(3, N_CELLS, N_BLOCKS, generator=generator)
    return (noise.argsort(-1).argsort(-1) < torch.tensor([1, 2, 3])[:, None, None]).float()


def keep_masks(blocks: Tensor, membership: Tensor) -> Tensor:
    """Visible genes, (n_views, batch, n_genes)."""
    keep = torch.zeros(*membership.shape[:2], N_GENES + 1, dtype=torch.bool)
    for block, genes in enumerate(blocks):
        keep[..., genes] |= (membership[..., block] > 0)[..., None]
    return keep[..., :N_GENES]


def test_kind_of_encoder_follows_the_configuration(build: Callable[[EncoderKind], CellEncoder]) -> None:
    assert isinstance(build("gene_tokens"), GeneTokenEncoder)
    assert isinstance(build("mlp"), MLPEncoder)


@both_kinds
@torch.no_grad()
def test_views_of_blocks_equal_masks(
    build: Callable[[EncoderKind], CellEncoder],
    kind: EncoderKind,
    values: Tensor,
    blocks: Tensor,
    membership: Tensor,
) -> None:
    encoder = build(kind)
    found = encoder.views(values, blocks, membership)
    expected = torch.stack([encoder(values, keep) for keep in keep_masks(blocks, membership)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_ragged_cells_equal_masks(
    build: Callable[[EncoderKind], CellEncoder], values: Tensor, blocks: Tensor, membership: Tensor
) -> None:
    encoder = build("gene_tokens")
    assert isinstance(encoder, GeneTokenEncoder)
    keep = keep_masks(blocks, membership)[1]
    cells, genes = keep.nonzero(as_tuple=True)
    lengths = keep.sum(1)
    found = encoder.forward_ragged(genes, values[cells, genes], lengths.cumsum(0) - lengths)
    torch.testing.assert_close(found, encoder(values, keep), atol=1e-5, rtol=1e-5)


@both_kinds
@torch.no_grad()
def test_one_mask_for_all_cells_equals_the_same_mask_per_cell(
    build: Callable[[EncoderKind], CellEncoder], kind: EncoderKind, values: Tensor
) -> None:
    encoder = build(kind)
    shared = torch.arange(N_GENES) % 3 > 0
    expected = encoder(values, shared.expand(N_CELLS, -1))
    torch.testing.assert_close(encoder(values, shared), expected, atol=1e-5, rtol=1e-5)


@both_kinds
@torch.no_grad()
def test_every_visible_gene_matters_and_no_hidden_gene_does(
    build: Callable[[EncoderKind], CellEncoder], kind: EncoderKind, values: Tensor
) -> None:
    encoder = build(kind)
    keep = torch.arange(N_GENES) % 3 > 0
    before = encoder(values[:1], keep)[0]
    for gene in range(N_GENES):
        changed = values[:1].clone()
        changed[0, gene] += 1.0
        distance = float((encoder(changed, keep)[0] - before).norm())
        if keep[gene]:
            assert distance > 1e-4, f"gene {gene} is visible"
        else:
            assert distance == 0.0, f"gene {gene} is hidden"


@both_kinds
@torch.no_grad()
def test_a_hidden_gene_is_not_a_gene_with_the_value_zero(
    build: Callable[[EncoderKind], CellEncoder], kind: EncoderKind, values: Tensor
) -> None:
    encoder = build(kind)
    keep = torch.ones(N_GENES, dtype=torch.bool)
    keep[3] = False
    zero = values.clone()
    zero[:, 3] = 0.0
    assert float((encoder(values, keep) - encoder(zero)).norm()) > 1e-4


@both_kinds
@torch.no_grad()
def test_a_cell_without_visible_genes_is_finite_and_always_the_same(
    build: Callable[[EncoderKind], CellEncoder], kind: EncoderKind, values: Tensor
) -> None:
    vectors = build(kind)(values, torch.zeros(N_CELLS, N_GENES, dtype=torch.bool))
    assert torch.isfinite(vectors).all()
    torch.testing.assert_close(vectors, vectors[:1].expand_as(vectors), atol=1e-6, rtol=0)


@both_kinds
@torch.no_grad()
def test_evaluation_is_deterministic_and_draws_no_random_numbers(
    build: Callable[[EncoderKind], CellEncoder],
    kind: EncoderKind,
    values: Tensor,
    global_rng_untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    encoder = build(kind)
    with global_rng_untouched():
        assert torch.equal(encoder(values), encoder(values))


@both_kinds
@torch.no_grad()
def test_dropout_acts_in_training_only(
    build: Callable[[EncoderKind], CellEncoder], kind: EncoderKind, values: Tensor
) -> None:
    encoder = build(kind).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(encoder(values), encoder(values))


def test_gradients_reach_every_weight(build: Callable[[EncoderKind], CellEncoder], values: Tensor) -> None:
    encoder = build("gene_tokens")
    encoder(values).square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
        assert torch.count_nonzero(weight.grad), name
