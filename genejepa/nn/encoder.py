"""Cell encoders: gene tokens read by latents, or (for comparison) a perceptron over the panel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genejepa.nn.attention import GeneTables, Read, gene_tables, read_blocks, read_dense, read_ragged

if TYPE_CHECKING:
    from genejepa.config import ModelConfig


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and perceptron over the latents of a cell (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads = max(1, math.gcd(dim, dim // 64))  # heads of width 64
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, latents: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (..., n_latents, dim) to the same shape.

        Parameters
        ----------
        context : (..., n_context, dim)
            Further latents of the same cells, with leading dimensions that broadcast: attended to, not mapped.
        """
        lead = latents.shape[:-2]
        q, k, v = self._heads(self.qkv(self.attention_norm(latents)), 3)
        if context is not None:
            width = latents.shape[-1]
            keys_values = F.linear(self.attention_norm(context), self.qkv.weight[width:], self.qkv.bias[width:])
            seen = [part.expand(*lead, -1, -1, -1) for part in self._heads(keys_values, 2)]
            k, v = torch.cat([k, seen[0]], -2), torch.cat([v, seen[1]], -2)
        mixed = F.scaled_dot_product_attention(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4))
        latents = latents + self.dropout(self.out(mixed.transpose(1, 2).reshape(latents.shape)))
        out: Tensor = latents + self.dropout(self.mlp(self.mlp_norm(latents)))
        return out

    def _heads(self, projected: Tensor, n_parts: int) -> tuple[Tensor, ...]:
        """Split (..., length, n_parts * dim) into ``n_parts`` tensors of shape (..., n_heads, length, head_dim)."""
        if projected.device.type == "cpu":
            projected = projected.float()  # torch's CPU kernel for a few latents is three times slower in bfloat16
        split: Tensor = projected.unflatten(-1, (n_parts, self.n_heads, -1)).transpose(-2, -4)
        return split.unbind(-3)


class GeneTokenEncoder(nn.Module):
    """Perceiver over gene tokens: latents read the visible genes, mix, and are joined into the cell vector.

    The cell vector is the sum of a head on the mixed, normalised latents and of a linear path from the read itself,
    which training starts at the principal coordinates of the cells.

    Parameters
    ----------
    n_genes
        Genes of the panel.
    config
        Sizes.

    Notes
    -----
    Values are the normalised expression of :class:`genejepa.data.normalization.Normalizer`. A visible zero is a
    token like any other (its centred value is negative); a gene that is not kept is absent.
    """

    def __init__(self, n_genes: int, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.n_genes = n_genes
        self.embedding_dim = config.embedding_dim
        self.n_latents = config.n_latents
        self.n_heads = config.n_heads
        self.queries = nn.Parameter(0.3 * torch.randn(self.n_latents, dim))
        self.keys = nn.Parameter(torch.randn(n_genes, dim))
        self.values = nn.Parameter(torch.randn(n_genes, dim))
        self.identities = nn.Parameter(0.02 * torch.randn(n_genes, dim))
        self.latents = nn.Parameter(0.02 * torch.randn(self.n_latents, dim))
        # A mean over n_genes independent standard values has deviation 1/sqrt(n_genes); start at a quarter.
        self.log_scale = nn.Parameter(torch.tensor(math.log(math.sqrt(n_genes) / 4)))
        self.blocks = nn.ModuleList(TransformerBlock(dim, dropout=config.dropout) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(self.n_latents * dim, config.embedding_dim)
        self.linear_path = nn.Linear(self.n_latents * dim, config.embedding_dim) if config.n_axes else None

    def start_linear_path(self, values: Tensor, coordinates: Tensor) -> None:
        """Set the linear path to give ``coordinates``, (n, embedding_dim), for cells with ``values``, (n, n_genes).

        By least squares from what the latents read; a small ridge keeps directions that no cell varies along at 0.
        """
        assert self.linear_path is not None
        read = self.latents_of(read_dense(self.tables(), values)).flatten(-2)
        mean = read.mean(0)
        gram = (read - mean).T @ (read - mean)
        # Cells that are all alike have no variation, and the system no other solution than one by the ridge.
        ridge = 1e-4 * gram.diagonal().mean().clamp_min(1e-6) * torch.eye(len(gram))
        weight = torch.linalg.solve(gram + ridge, (read - mean).T @ coordinates)
        self.linear_path.weight.copy_(weight.T)
        self.linear_path.bias.copy_(-(mean @ weight))

    def tables(self) -> GeneTables:
        """Per-gene tables under the present weights; compute once per step."""
        return gene_tables(self.queries, self.keys, self.values, self.identities, self.n_heads)

    def latents_of(self, read: Read) -> Tensor:
        """Latents, (..., n_latents, dim), before the transformer blocks."""
        return read.normalised(n_latents=self.n_latents, n_heads=self.n_heads) * self.log_scale.exp() + self.latents

    def vectors(self, latents: Tensor) -> Tensor:
        """Vectors, (..., embedding_dim), of latents (..., n_latents, dim)."""
        mixed = latents
        for block in self.blocks:
            mixed = block(mixed)
        return self._read_out(latents, mixed)

    def _read_out(self, latents: Tensor, mixed: Tensor) -> Tensor:
        """Sum of the head on the mixed latents and of the linear path, (..., embedding_dim)."""
        vector: Tensor = self.head(self.norm(mixed).flatten(-2))
        if self.linear_path is not None:
            vector = vector + self.linear_path(latents.flatten(-2))
        return vector.float()

    def targets(self, values: Tensor, blocks: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
        """Vector of the whole cell, (batch, embedding_dim), and of gene sets of it, (n_sets, batch, embedding_dim).

        A set is read from its own genes; in the transformer blocks it attends to the whole cell. Its vector thus says
        what these genes mean in this cell, as the targets of I-JEPA are patches encoded with the full image.

        Parameters
        ----------
        values, blocks
            As in :meth:`views`.
        sets : (n_sets, batch, n_blocks)
            1 where the set contains the block.
        """
        by_block = read_blocks(self.tables(), values, blocks)
        latents = self.latents_of(by_block.select(torch.cat([sets, torch.ones_like(sets[:1])])))
        parts, whole = latents[:-1], latents[-1:]
        for block in self.blocks:
            parts, whole = block(parts, whole), block(whole)
        vectors = self._read_out(latents, torch.cat([parts, whole]))
        return vectors[-1], vectors[:-1]

    def views(self, values: Tensor, blocks: Tensor, membership: Tensor) -> Tensor:
        """Cell vectors of several views of a batch, each view a set of gene blocks.

        Parameters
        ----------
        values : (batch, n_genes)
        blocks : (n_blocks, block_size), int64
            See :func:`genejepa.nn.attention.read_blocks`.
        membership : (n_views, batch, n_blocks)
            1 where the view sees the block.

        Returns
        -------
        (n_views, batch, embedding_dim)
        """
        return self.vectors(self.latents_of(read_blocks(self.tables(), values, blocks).select(membership)))

    def forward(self, values: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Cell vectors, (batch, embedding_dim).

        Parameters
        ----------
        values : (batch, n_genes)
        keep_mask : (n_genes,) or (batch, n_genes), bool
            True = use the gene.
        """
        return self.vectors(self.latents_of(read_dense(self.tables(), values, keep_mask)))

    def forward_ragged(self, gene_ids: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        """Cell vectors of cells given as token lists; see :func:`genejepa.nn.attention.read_ragged`."""
        return self.vectors(self.latents_of(read_ragged(self.tables(), gene_ids, values, offsets)))


class MLPEncoder(nn.Module):
    """A 512-512 perceptron over the panel, the comparison arm of the gene-token encoder.

    Masked genes are set to 0, the mean, and the rest is divided by the visible share.
    """

    def __init__(self, n_genes: int, config: ModelConfig, *, hidden: int = 512) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.embedding_dim = config.embedding_dim
        layers: list[nn.Module] = []
        for width in (n_genes, hidden):
            layers += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(config.dropout)]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, config.embedding_dim))

    def views(self, values: Tensor, blocks: Tensor, membership: Tensor) -> Tensor:
        """As :meth:`GeneTokenEncoder.views`."""
        block_of_gene = values.new_zeros(self.n_genes + 1, dtype=torch.int64)
        block_of_gene[blocks] = torch.arange(len(blocks), device=blocks.device)[:, None]
        keep_mask = membership[..., block_of_gene[:-1]] > 0  # (n_views, batch, n_genes)
        flat = self(values.expand(len(membership), -1, -1).flatten(0, 1), keep_mask.flatten(0, 1))
        vectors: Tensor = flat.view(*membership.shape[:2], -1)
        return vectors

    def targets(self, values: Tensor, blocks: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`GeneTokenEncoder.targets`, but a set is encoded alone: a perceptron has nothing to attend to."""
        encoded = self.views(values, blocks, torch.cat([torch.ones_like(sets[:1]), sets]))
        return encoded[0], encoded[1:]

    def forward(self, values: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """As :meth:`GeneTokenEncoder.forward`."""
        if keep_mask is not None:
            share = keep_mask.float().mean(-1, keepdim=True).clamp_min(1e-6)
            values = torch.where(keep_mask, values, 0.0) / share
        vector: Tensor = self.net(values)
        return vector.float()


CellEncoder = GeneTokenEncoder | MLPEncoder


def make_encoder(n_genes: int, config: ModelConfig) -> CellEncoder:
    """Encoder of the kind that ``config.encoder`` names."""
    return MLPEncoder(n_genes, config) if config.encoder == "mlp" else GeneTokenEncoder(n_genes, config)
