"""A slow predictor over macro-actions, in the same latent as the fast one, for planning at two time scales."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from genejepa._arithmetic import plain_arithmetic
from genejepa._lightning import LightningModule
from genejepa.train.devices import cpu_threads
from genejepa.world.training import adamw_with_cosine, run_steps

if TYPE_CHECKING:
    from typing import Any

    from genejepa.world.planning import Dynamics

_MACRO_DIM = 8
_HIDDEN = 256
_N_STEPS = 600
_BATCH = 512
_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 0.01
_MOST_SEQUENCES = 4096
_N_MACROS = 20
_N_SEQUENCES, _N_CELLS = 2000, 10
"""Sequences that are imagined twice in a row, and cells of each: enough of them for all futures to occur."""

_STREAM = 12
"""Keeps the random numbers of this training apart from those of other uses."""


class SlowNetwork(nn.Module):
    """State after ``span`` actions, told at once from the state before and a macro-action.

    A macro-action is a sequence of actions as a vector of eight numbers, which is all that the predictor knows of it
    (HWM, arXiv:2604.03208: a second predictor in the latent of the first, over learned macro-actions).

    Parameters
    ----------
    n_actions
        Actions of the fast predictor.
    span
        Actions of a macro-action.
    centre, scale
        Of the states.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, n_actions: int, span: int, *, centre: Tensor, scale: Tensor) -> None:
        super().__init__()
        dim = len(centre)
        self.n_actions = n_actions
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        self.macro = nn.Sequential(nn.Linear(span * n_actions, 64), nn.SiLU(), nn.Linear(64, _MACRO_DIM))
        self.change = nn.Sequential(
            nn.Linear(dim + _MACRO_DIM, _HIDDEN),
            nn.SiLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.SiLU(),
            nn.Linear(_HIDDEN, dim),
        )

    def macros(self, sequences: Tensor) -> Tensor:
        """Macro-actions, (n, 8), of sequences of action numbers, (n, span)."""
        encoded: Tensor = self.macro(nn.functional.one_hot(sequences, self.n_actions).flatten(1).float())
        return encoded

    def forward(self, z: Tensor, macros: Tensor) -> Tensor:
        """States after, (n, dim), of states (n, dim) under macro-actions (n, 8)."""
        changed: Tensor = z + self.scale * self.change(torch.cat([(z - self.centre) / self.scale, macros], 1))
        return changed


class SlowDynamics:
    """Slow predictor with a library of macro-actions, to be searched like single actions."""

    def __init__(self, network: SlowNetwork, library: Tensor, span: int) -> None:
        self.network, self.library, self.span = network.eval(), library, span

    @property
    def n_actions(self) -> int:
        """Macro-actions of the library."""
        return len(self.library)

    @plain_arithmetic()
    @torch.no_grad()
    def step(self, populations: Tensor, actions: Tensor, _depth: int = 0, /) -> Tensor:
        """Populations, (n, n_cells, dim), after one macro-action each, (n,)."""
        n, n_cells, dim = populations.shape
        macros = self.library[actions].repeat_interleave(n_cells, 0)
        after: Tensor = self.network(populations.flatten(0, 1), macros)
        return after.view(n, n_cells, dim)


def learn_slow(fast: Dynamics, states: Tensor, *, span: int, seed: int) -> SlowDynamics:
    """Teach a slow predictor what the fast one, which stays as it is, imagines over several actions.

    Where there are several futures it learns their mean: it serves to find sub-goals.

    Parameters
    ----------
    fast
        Fast predictor.
    states : (n, dim)
        Known states to start from; those that are reached on the way serve, too.
    span
        Actions of a macro-action.
    """
    with cpu_threads(1), plain_arithmetic(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before, sequences, after = _imagined(fast, states, span=span, seed=seed)
        centre, scale = before.mean(0), before.std()
        network = SlowNetwork(fast.n_actions, span, centre=centre, scale=scale)
        _train(network, before, sequences, after, seed=seed)
        with torch.no_grad():
            library = _library(network, span=span, seed=seed)
    return SlowDynamics(network, library, span)


def _imagined(fast: Dynamics, states: Tensor, *, span: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """States before, random sequences of actions, states after, for twice ``span`` actions cut in two."""
    rng = np.random.default_rng([seed, _STREAM])
    cells = states[rng.integers(len(states), size=(_N_SEQUENCES, _N_CELLS))]
    found = []
    for half in range(2):
        sequences = torch.from_numpy(rng.integers(fast.n_actions, size=(_N_SEQUENCES, span)))
        after = cells
        for step in range(span):
            after = fast.step(after, sequences[:, step], half * span + step)
        found.append((cells.flatten(0, 1), sequences.repeat_interleave(_N_CELLS, 0), after.flatten(0, 1)))
        cells = after
    before, chosen, ends = (torch.cat(parts) for parts in zip(*found, strict=True))
    return before, chosen, ends


class _SlowModule(LightningModule):
    def __init__(self, network: SlowNetwork) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        before, sequences, after = batch
        predicted = self.network(before, self.network.macros(sequences))
        loss: Tensor = ((predicted - after) / self.network.scale).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return adamw_with_cosine(self, _LEARNING_RATE, weight_decay=_WEIGHT_DECAY, n_steps=_N_STEPS)


def _train(network: SlowNetwork, before: Tensor, sequences: Tensor, after: Tensor, *, seed: int) -> None:
    rng = np.random.default_rng([seed, _STREAM, 1])
    rows = [torch.from_numpy(rng.integers(len(before), size=_BATCH)) for _ in range(_N_STEPS)]
    with torch.enable_grad():
        cells = torch.utils.data.TensorDataset(before, sequences, after)
        run_steps(_SlowModule(network), torch.utils.data.DataLoader(cells, batch_size=None, sampler=rows))


def _library(network: SlowNetwork, *, span: int, seed: int) -> Tensor:
    """Macro-actions that stand for all sequences: those nearest to the centres of k-means, (n_macros, 8)."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng([seed, _STREAM, 2])
    n_actions = network.n_actions
    if n_actions**span <= _MOST_SEQUENCES:
        sequences = np.array(list(product(range(n_actions), repeat=span)))
    else:
        sequences = rng.integers(n_actions, size=(_MOST_SEQUENCES, span))
    macros = network.macros(torch.from_numpy(sequences)).numpy()
    n_macros = min(_N_MACROS, len(np.unique(macros, axis=0)))
    centres = KMeans(n_macros, n_init=1, random_state=seed).fit(macros).cluster_centers_
    nearest = ((centres[:, None] - macros[None]) ** 2).sum(-1).argmin(1)
    return torch.from_numpy(macros[np.unique(nearest)])
