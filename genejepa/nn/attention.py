"""Attention of a few latents over the gene tokens of a cell.

The token of gene ``g`` with value ``x`` has the key ``K[g]`` and the value vector ``I[g] + x * V[g]``: identity
and value, from per-gene tables that all cells share. Queries and keys do not depend on the cell, so the
softmax numerator and denominator are sums over visible genes,

    numerator   = sum_g keep[g] * w[g] * (I[g] + x[g] * V[g])
    denominator = sum_g keep[g] * w[g],          w[g] = exp(q . K[g] / sqrt(head_dim)),

and attention over a fixed panel is one dense matrix product, without gather or padding. Both sums add over
disjoint gene sets. Hence one pass over gene *blocks* (:func:`read_blocks`) yields the read of every view and
every target of a training step, whatever their number: add the blocks a view may see.

One mask convention holds everywhere: ``keep_mask`` is True where a gene is **used**. A gene that is not kept
is absent: it adds to neither sum. A view without genes reads zero.

References
----------
Jaegle et al. 2021, Perceiver, arXiv:2103.03206 (latents that read by cross-attention).
Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GeneTables:
    """Per-gene tables already multiplied by the attention weights ``w``.

    Attributes
    ----------
    weight : (n_genes, n_latents * n_heads)
    value : (n_genes, n_latents * dim)
    identity : (n_genes, n_latents * dim)
    """

    weight: Tensor
    value: Tensor
    identity: Tensor


@dataclass(frozen=True)
class Read:
    """Softmax sums over a set of visible genes.

    Attributes
    ----------
    numerator : (..., n_latents * dim)
    denominator : (..., n_latents * n_heads)
    """

    numerator: Tensor
    denominator: Tensor

    def normalised(self, *, n_latents: int, n_heads: int) -> Tensor:
        """Attention output, (..., n_latents, dim); zero where no gene was visible."""
        shape = self.numerator.shape[:-1]
        numerator = self.numerator.view(*shape, n_latents, n_heads, -1)
        denominator = self.denominator.view(*shape, n_latents, n_heads, 1)
        # The smallest positive number: only a sum over no gene is below it, and its numerator is 0.
        return (numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny)).flatten(-2)

    def rows(self, index: Tensor) -> Read:
        """Some cells, (n,), of a read of shape (batch, ...); any order, repeats allowed."""
        return Read(self.numerator[index], self.denominator.expand(len(self.numerator), -1)[index])


@dataclass(frozen=True)
class BlockRead:
    """Softmax sums of every gene block of a batch, ready to be added up into views.

    Attributes
    ----------
    numerator : (n_blocks, batch, n_latents * dim)
        The part that depends on the values.
    identity : (n_blocks, n_latents * dim)
    denominator : (n_blocks, n_latents * n_heads)
    """

    numerator: Tensor
    identity: Tensor
    denominator: Tensor

    def select(self, membership: Tensor) -> Read:
        """Sums over the blocks that each view of each cell sees.

        Parameters
        ----------
        membership : (n_views, batch, n_blocks)
            1 where the block is visible.

        Returns
        -------
        Read of shape (n_views, batch, ...).
        """
        # (batch, views, blocks) @ (batch, blocks, features): one small product per cell
        numerator = torch.bmm(membership.transpose(0, 1), self.numerator.transpose(0, 1)).transpose(0, 1)
        return Read(numerator + membership @ self.identity, membership @ self.denominator)


def gene_tables(queries: Tensor, keys: Tensor, values: Tensor, identities: Tensor, n_heads: int) -> GeneTables:
    """Multiply the value and identity tables by the attention weights of every latent and head.

    Parameters
    ----------
    queries : (n_latents, dim)
    keys, values, identities : (n_genes, dim)
    n_heads
        Divides ``dim``.
    """
    n_genes, dim = keys.shape
    n_latents = queries.shape[0]
    head_dim = dim // n_heads
    logits = torch.einsum(
        "lhd,ghd->glh", queries.view(n_latents, n_heads, head_dim), keys.view(n_genes, n_heads, head_dim)
    ) / math.sqrt(head_dim)
    weight = torch.exp(logits - logits.amax(0, keepdim=True))  # the softmax is unchanged, exp cannot overflow

    def weighted(table: Tensor) -> Tensor:
        return (weight[..., None] * table.view(n_genes, 1, n_heads, head_dim)).flatten(1)

    return GeneTables(weight.flatten(1), weighted(values), weighted(identities))


def read_dense(tables: GeneTables, values: Tensor, keep_mask: Tensor | None = None) -> Read:
    """Read gene values over the whole panel.

    Parameters
    ----------
    values : (batch, n_genes)
    keep_mask : (n_genes,) or (batch, n_genes), bool
        True = use the gene. None uses all. A mask shared by all cells costs nothing per cell.
    """
    batch = values.shape[0]
    if keep_mask is None or keep_mask.ndim == 1:
        weight, value, identity = tables.weight, tables.value, tables.identity
        if keep_mask is not None:
            values = torch.where(keep_mask, values, 0.0)  # where, not times: an absent value may be NaN
            weight, identity = weight[keep_mask], identity[keep_mask]
        numerator = (values @ value).float() + identity.sum(0)
        return Read(numerator, weight.sum(0).expand(batch, -1))
    keep = keep_mask.to(values.dtype)
    values = torch.where(keep_mask, values, 0.0)
    return Read((values @ tables.value + keep @ tables.identity).float(), (keep @ tables.weight).float())


def read_blocks(tables: GeneTables, values: Tensor, blocks: Tensor) -> BlockRead:
    """Read gene values block by block.

    Parameters
    ----------
    values : (batch, n_genes)
        Finite, for hidden genes too.
    blocks : (n_blocks, block_size), int64
        Gene positions of each block; ``n_genes`` marks an empty place at the end of a shorter block.
    """
    n_blocks, size = blocks.shape
    columns = F.pad(values, (0, 1)).index_select(1, blocks.flatten())  # (batch, n_blocks * size)
    by_block = columns.view(-1, n_blocks, size).transpose(0, 1)  # (n_blocks, batch, size)

    def gathered(table: Tensor) -> Tensor:
        return F.pad(table, (0, 0, 0, 1))[blocks]  # (n_blocks, size, features)

    numerator = torch.bmm(by_block, gathered(tables.value)).float()
    return BlockRead(numerator, gathered(tables.identity).sum(1), gathered(tables.weight).sum(1))


def read_ragged(tables: GeneTables, gene_ids: Tensor, values: Tensor, offsets: Tensor) -> Read:
    """Read cells given as lists of visible genes, for panels that differ from cell to cell.

    Parameters
    ----------
    gene_ids : (n_tokens,), int64
    values : (n_tokens,)
    offsets : (batch,), int64
        Start of each cell in ``gene_ids``.
    """

    def segment_sum(table: Tensor, per_token: Tensor | None = None) -> Tensor:
        return F.embedding_bag(gene_ids, table, offsets, mode="sum", per_sample_weights=per_token)

    numerator = segment_sum(tables.value, values) + segment_sum(tables.identity)
    return Read(numerator, segment_sum(tables.weight))


def add_excess(base: Read, tables: GeneTables, gene_ids: Tensor, excess: Tensor, offsets: Tensor) -> Read:
    """Read cells that differ from a base cell at a few genes.

    Counts are mostly zeros, so a cell is the cell of zeros plus its expressed genes: the cost is that of the stored
    counts, not of the panel.

    Parameters
    ----------
    base : Read of shape (1, ...) or (batch, ...)
        Read of the base cell, or of that of each cell, over the visible genes.
    gene_ids : (n_stored,), int64
        Visible genes, cell by cell.
    excess : (n_stored,)
        Value of the gene minus its value in the base cell.
    offsets : (batch,), int64
        Start of each cell in ``gene_ids``.
    """
    added = F.embedding_bag(gene_ids, tables.value, offsets, mode="sum", per_sample_weights=excess)
    return Read(base.numerator + added, base.denominator.expand(len(offsets), -1))


def reference_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    identities: Tensor,
    n_heads: int,
    x: Tensor,
    keep_mask: Tensor,
) -> Tensor:
    """Plain softmax attention over explicit gene tokens: what every other path must equal.

    Materialises all tokens, (batch, n_genes, dim); for tests only.

    Parameters
    ----------
    queries : (n_latents, dim)
    keys, values, identities : (n_genes, dim)
    x : (batch, n_genes)
    keep_mask : (batch, n_genes), bool, with at least one True per cell

    Returns
    -------
    (batch, n_latents, dim)
    """
    batch, n_genes = x.shape
    n_latents, dim = queries.shape
    tokens = identities + x[..., None] * values  # (batch, n_genes, dim)

    def heads(t: Tensor) -> Tensor:  # (batch, length, dim) -> (batch, n_heads, length, head_dim)
        split: Tensor = t.unflatten(-1, (n_heads, -1))
        return split.transpose(1, 2)

    q = heads(queries.expand(batch, n_latents, dim))
    k = heads(keys.expand(batch, n_genes, dim))
    logits = q @ k.transpose(-1, -2) / math.sqrt(dim // n_heads)
    logits = logits.masked_fill(~keep_mask[:, None, None, :], -torch.inf)
    attended: Tensor = logits.softmax(-1) @ heads(tokens)
    out: Tensor = attended.transpose(1, 2).flatten(2)
    return out
