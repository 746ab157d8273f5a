from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from genejepa.nn.attention import (
    GeneTables,
    Read,
    gene_tables,
    read_blocks,
    read_dense,
    read_ragged,
    reference_attention,
)

N_CELLS, N_GENES, N_LATENTS, N_HEADS, DIM = 5, 23, 3, 4, 16


@dataclass(frozen=True)
class Problem:
    """Tables and values of a few cells."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    identities: Tensor
    x: Tensor

    def tables(self) -> GeneTables:
        return gene_tables(self.queries, self.keys, self.values, self.identities, N_HEADS)

    def reference(self, keep_mask: Tensor) -> Tensor:
        return reference_attention(self.queries, self.keys, self.values, self.identities, N_HEADS, self.x, keep_mask)

    def permuted(self, order: Tensor) -> Problem:
        return Problem(self.queries, self.keys[order], self.values[order], self.identities[order], self.x[:, order])


@pytest.fixture
def problem(generator: torch.Generator) -> Problem:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Problem(
        2.0 * normal(N_LATENTS, DIM),
        normal(N_GENES, DIM),
        normal(N_GENES, DIM),
        normal(N_GENES, DIM),
        normal(N_CELLS, N_GENES),
    )


@pytest.fixture
def per_cell(generator: torch.Generator) -> Tensor:
    """Mask that differs between cells, with one cell that shows a single gene."""
    keep = torch.rand(N_CELLS, N_GENES, generator=generator) < 0.5
    keep[0] = False
    keep[0, 7] = True
    return keep


def normalised(read: Read) -> Tensor:
    return read.normalised(n_latents=N_LATENTS, n_heads=N_HEADS)


def cut_into_blocks(n_blocks: int, generator: torch.Generator) -> Tensor:
    """Random blocks of the panel; the last places of shorter blocks are empty."""
    blocks = torch.full((n_blocks, -(-N_GENES // n_blocks)), N_GENES)
    for row, genes in zip(blocks, torch.randperm(N_GENES, generator=generator).tensor_split(n_blocks), strict=True):
        row[: len(genes)] = genes
    return blocks


def mask_of_blocks(blocks: Tensor, membership: Tensor) -> Tensor:
    """Genes of the blocks that each cell sees, (batch, n_genes), gene by gene."""
    keep = torch.zeros(len(membership), N_GENES, dtype=torch.bool)
    for cell, row in enumerate(membership):
        for block in blocks[row > 0]:
            keep[cell, block[block < N_GENES]] = True
    return keep


def as_ragged(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token lists of the visible genes of each cell."""
    cells, genes = keep.nonzero(as_tuple=True)
    lengths = keep.sum(1)
    return genes, x[cells, genes], lengths.cumsum(0) - lengths


def test_reference_is_softmax_attention_written_out(problem: Problem, per_cell: Tensor) -> None:
    expected = torch.empty(N_CELLS, N_LATENTS, DIM, dtype=torch.float64)
    size = DIM // N_HEADS
    for cell in range(N_CELLS):
        genes = per_cell[cell].nonzero()[:, 0]
        for latent in range(N_LATENTS):
            for head in range(N_HEADS):
                part = slice(head * size, (head + 1) * size)
                query, key = problem.queries[latent, part].double(), problem.keys[genes, part].double()
                weight = torch.softmax(key @ query / size**0.5, 0)
                token = problem.identities[genes, part] + problem.x[cell, genes, None] * problem.values[genes, part]
                expected[cell, latent, part] = weight @ token.double()
    torch.testing.assert_close(problem.reference(per_cell).double(), expected, atol=1e-5, rtol=1e-5)


def test_dense_read_without_mask_equals_the_reference(problem: Problem) -> None:
    everything = torch.ones(N_CELLS, N_GENES, dtype=torch.bool)
    found = normalised(read_dense(problem.tables(), problem.x))
    torch.testing.assert_close(found, problem.reference(everything), atol=1e-5, rtol=1e-5)


def test_dense_read_with_a_shared_mask_equals_the_reference(problem: Problem, per_cell: Tensor) -> None:
    shared = per_cell[1]
    found = normalised(read_dense(problem.tables(), problem.x, shared))
    torch.testing.assert_close(found, problem.reference(shared.expand(N_CELLS, -1)), atol=1e-5, rtol=1e-5)


def test_dense_read_with_a_mask_per_cell_equals_the_reference(problem: Problem, per_cell: Tensor) -> None:
    found = normalised(read_dense(problem.tables(), problem.x, per_cell))
    torch.testing.assert_close(found, problem.reference(per_cell), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_blocks", [2, 8, 32], ids=["2 blocks", "8 blocks", "more blocks than genes"])
def test_block_read_equals_the_reference(problem: Problem, generator: torch.Generator, n_blocks: int) -> None:
    blocks = cut_into_blocks(n_blocks, generator)
    membership = (torch.rand(3, N_CELLS, n_blocks, generator=generator) < 0.5).float()
    membership[..., 0] = 1.0  # the reference needs a gene
    found = normalised(read_blocks(problem.tables(), problem.x, blocks).select(membership))
    assert found.shape == (3, N_CELLS, N_LATENTS, DIM)
    for view, seen in zip(found, membership, strict=True):
        expected = problem.reference(mask_of_blocks(blocks, seen))
        torch.testing.assert_close(view, expected, atol=1e-5, rtol=1e-5)


def test_ragged_read_equals_the_reference(problem: Problem, per_cell: Tensor) -> None:
    found = normalised(read_ragged(problem.tables(), *as_ragged(problem.x, per_cell)))
    torch.testing.assert_close(found, problem.reference(per_cell), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared mask", "mask per cell"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_masked_values_may_be_anything(problem: Problem, per_cell: Tensor, shared: bool, poison: float) -> None:
    keep = per_cell[1] if shared else per_cell
    poisoned = torch.where(keep, problem.x, poison)
    expected = normalised(read_dense(problem.tables(), problem.x, keep))
    assert torch.equal(normalised(read_dense(problem.tables(), poisoned, keep)), expected)


def test_a_view_without_genes_reads_zero(problem: Problem, generator: torch.Generator) -> None:
    nothing = torch.zeros(N_CELLS, N_GENES, dtype=torch.bool)
    tables, blocks = problem.tables(), cut_into_blocks(4, generator)
    reads = {
        "shared": read_dense(tables, problem.x, nothing[0]),
        "per cell": read_dense(tables, problem.x, nothing),
        "blocks": read_blocks(tables, problem.x, blocks).select(torch.zeros(1, N_CELLS, 4)),
        "ragged": read_ragged(tables, *as_ragged(problem.x, nothing)),
    }
    for name, read in reads.items():
        assert torch.count_nonzero(normalised(read)) == 0, name


def test_the_order_of_the_genes_changes_nothing(problem: Problem, per_cell: Tensor, generator: torch.Generator) -> None:
    order = torch.randperm(N_GENES, generator=generator)
    found = normalised(read_dense(problem.permuted(order).tables(), problem.x[:, order], per_cell[:, order]))
    expected = normalised(read_dense(problem.tables(), problem.x, per_cell))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_reads_of_disjoint_genes_add_up(problem: Problem, per_cell: Tensor) -> None:
    tables = problem.tables()
    first, second = (read_dense(tables, problem.x, keep) for keep in (per_cell, ~per_cell))
    whole = read_dense(tables, problem.x)
    torch.testing.assert_close(first.numerator + second.numerator, whole.numerator, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.denominator + second.denominator, whole.denominator, atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow(problem: Problem) -> None:
    keys = problem.keys.clone()
    keys[4] *= 200.0  # exp of the logit alone is beyond float32
    tables = gene_tables(problem.queries, keys, problem.values, problem.identities, N_HEADS)
    everything = torch.ones(N_CELLS, N_GENES, dtype=torch.bool)
    expected = reference_attention(
        problem.queries, keys, problem.values, problem.identities, N_HEADS, problem.x, everything
    )
    torch.testing.assert_close(normalised(read_dense(tables, problem.x)), expected, atol=1e-5, rtol=1e-5)
