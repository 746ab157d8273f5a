"""The transition network as planning uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from genejepa._arithmetic import plain_arithmetic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genejepa.world.network import TransitionNetwork

_STREAM = 13
"""Keeps the random numbers that choose a future apart from those of other uses."""


class FastDynamics:
    """What single actions do to populations of cells.

    Parameters
    ----------
    network
        Predicts one step.
    vectors : (n_actions, dim)
        Of the actions to choose from.
    logits : (n_actions, n_codes)
        Log probabilities of the futures after each.
    seed
        For the draws that choose a future for each cell; they are the same for all sequences, so that these are
        compared on equal terms, and others in each step.
    """

    def __init__(
        self, network: TransitionNetwork, vectors: NDArray[np.float64], logits: NDArray[np.float32], *, seed: int
    ) -> None:
        self.network, self.seed = network, seed
        self.vectors, self.logits = torch.tensor(vectors, dtype=torch.float32), torch.from_numpy(logits)

    @property
    def n_actions(self) -> int:
        """Actions to choose from."""
        return len(self.vectors)

    @plain_arithmetic()
    @torch.no_grad()
    def step(self, populations: Tensor, actions: Tensor, depth: int, /) -> Tensor:
        """Populations, (n, n_cells, dim), after one action each, (n,), where ``depth`` were taken before."""
        n, n_cells, dim = populations.shape
        vectors, logits = (table[actions].repeat_interleave(n_cells, 0) for table in (self.vectors, self.logits))
        flat = populations.flatten(0, 1)
        chances = self.network.chances(flat, vectors, logits)
        draws = np.random.default_rng([self.seed, _STREAM, depth]).permutation(n_cells)
        level = torch.from_numpy((draws + 0.5) / n_cells).float().repeat(n)[:, None]
        chosen = (chances.cumsum(1) < level).sum(1).clamp_max(self.network.n_codes - 1)
        after = self.network.of_future(flat, vectors, torch.ones(n * n_cells), chosen)
        return after.view(n, n_cells, dim)

    def imagined(self, start: Tensor, actions: Sequence[int]) -> NDArray[np.float32]:
        """Populations before any action and after each, (n_actions + 1, n_cells, dim)."""
        found = [start]
        for depth, action in enumerate(actions):
            found.append(self.step(found[-1][None], torch.tensor([action]), depth)[0])
        return np.stack([population.numpy() for population in found])
