"""The joint-embedding predictive architecture: context encoder, target encoder, predictor, count read-out.

No optimiser, logging, masking or loss lives here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from genejepa._arithmetic import plain_arithmetic
from genejepa.nn.encoder import GeneTokenEncoder, make_encoder
from genejepa.nn.likelihood import CountReadout
from genejepa.nn.predictor import GeneSetPredictor

if TYPE_CHECKING:
    from genejepa.config import ModelConfig
    from genejepa.data.axes import PrincipalAxes
    from genejepa.data.loader import Batch


@dataclass(frozen=True)
class JEPAOutput:
    """What one batch yields; the objectives take it from here.

    Attributes
    ----------
    views : (2, batch, dim)
        Context vectors of the two complementary views.
    whole : (batch, dim)
        Context encoder's vector of the whole cell.
    predicted_sets, target_sets : (2, batch, dim)
        For each view, the vector of the genes that it cannot see: predicted, and by the target encoder.
    predicted_cell : (2, batch, dim)
        Vector of the whole cell predicted from each view.
    target_cell : (batch, dim)
        Vector of the whole cell by the target encoder.
    """

    views: Tensor
    whole: Tensor
    predicted_sets: Tensor
    target_sets: Tensor
    predicted_cell: Tensor
    target_cell: Tensor


class JEPA(nn.Module):
    """Context encoder, its moving average, a predictor asked for named gene sets, and a count read-out.

    Parameters
    ----------
    n_genes
        Genes of the panel.
    log_frequency : (n_batches + 1, n_genes)
        Log of the mean share of each gene in the counts of each batch, and of all cells in the last row.
    """

    def __init__(self, n_genes: int, config: ModelConfig, log_frequency: Tensor) -> None:
        super().__init__()
        self.config = config
        with plain_arithmetic():
            self.encoder = make_encoder(n_genes, config)
            self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(requires_grad=False).eval()
            self.predictor = GeneSetPredictor(n_genes, dim=config.embedding_dim, hidden=config.predictor_dim)
            self.readout = CountReadout(config.embedding_dim, log_frequency)

    def train(self, mode: bool = True) -> JEPA:  # noqa: FBT001, FBT002  # signature of nn.Module
        """Set the mode of all parts but the target encoder, which has no dropout in training either."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    @plain_arithmetic()
    @torch.no_grad()
    def start_from_axes(self, axes: PrincipalAxes, *, seed: int) -> None:
        """Start both encoders in the space of the principal axes of the data.

        A random value table reads random projections of the genes, and a short training spends most of its steps on
        finding the directions that vary. The tables start as a rotation of the axes, and the linear path as the
        principal coordinates of the cells.
        """
        tables = axes.start_tables(self.config.dim, seed=seed)
        spread = axes.spread(tables)
        for encoder in (self.encoder, self.target_encoder):
            if not isinstance(encoder, GeneTokenEncoder):
                continue
            encoder.values[:, : tables.shape[1]] = torch.from_numpy(tables)
            encoder.log_scale.fill_(float(np.log(encoder.n_genes / (4.0 * spread))))
            if self.config.n_axes:
                coordinates = axes.coordinates(self.config.n_axes, self.config.embedding_dim, seed=seed)
                encoder.start_linear_path(torch.from_numpy(axes.values), torch.from_numpy(coordinates))

    def forward(self, batch: Batch) -> JEPAOutput:
        """Encode the views, the targets and the whole cell of a batch, and predict the targets.

        The target encoder sees the whole cell, with all its molecules, and carries no gradient; see
        :meth:`genejepa.nn.encoder.GeneTokenEncoder.targets`.
        """
        blocks = batch["blocks"]
        hidden = batch["views"].flip(0)  # what a view cannot see is the other view
        everything = torch.ones_like(hidden[:1])
        encoded = self.encoder.views(batch["values"], blocks, torch.cat([batch["views"], everything]))
        views, whole = encoded[:2], encoded[2]
        with torch.no_grad():
            target_cell, target_sets = self.target_encoder.targets(batch["whole_values"], blocks, hidden)
        return JEPAOutput(
            views=views,
            whole=whole,
            predicted_sets=self.predictor(views, self.predictor.set_queries(blocks, hidden)),
            target_sets=target_sets,
            predicted_cell=self.predictor(views),
            target_cell=target_cell,
        )
