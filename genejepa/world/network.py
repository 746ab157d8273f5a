"""The network that corrects the linear start, with a discrete latent variable for several futures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genejepa.world.futures import SMALLEST_SHARE

if TYPE_CHECKING:
    from genejepa.world.linear import Features

_CODE_DIM = 8


class TransitionNetwork(nn.Module):
    r"""Change of a state under an action, for every value of a discrete latent variable.

    .. math:: \hat z_k = z + \tau \, [\text{linear}_k(z, a) + g f(z, a, k)]

    with ``linear_k`` the ridge regression of the cells with future ``k``, ``f`` a perceptron that starts at zero,
    ``tau`` the duration, and ``g`` in [0, 1] how far ``f`` is believed. An action of strength 0 changes nothing. The
    probabilities of the futures are those of the action, times a factor that depends on the state if that is believed,
    too. A latent variable of few values is the simplest one whose information
    is limited, without which it could explain any outcome (LeCun 2022, "A path towards autonomous machine
    intelligence", sec. 4.5.3).

    Parameters
    ----------
    features
        Of the linear start.
    coefficients : (n_features, dim)
        Of the ridge regression of all cells.
    by_future : (n_codes, n_features, dim)
        Of that of the cells with each future.
    hidden
        Width of the perceptron.
    """

    centre: Tensor
    shared: Tensor
    coefficients: Tensor
    gate: Tensor
    prior_gate: Tensor
    by_future: Tensor
    scale: Tensor

    def __init__(self, features: Features, coefficients: Tensor, by_future: Tensor, *, hidden: int) -> None:
        super().__init__()
        dim, n_actions, n_codes = len(features.centre), len(features.shared), len(by_future)
        self.n_codes = n_codes
        self.register_buffer("centre", torch.tensor(features.centre, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(features.variance**0.5, dtype=torch.float32))
        self.register_buffer("shared", torch.tensor(features.shared, dtype=torch.float32))
        self.register_buffer("coefficients", coefficients)
        self.register_buffer("gate", torch.ones(()))
        self.register_buffer("prior_gate", torch.ones(()))
        self.codes = nn.Parameter(torch.randn(n_codes, _CODE_DIM))
        self.register_buffer("by_future", by_future)
        self.first = nn.Linear(dim + n_actions + _CODE_DIM, hidden)
        self.second = nn.Linear(hidden, hidden)
        # An action scales the units of both layers: what it does depends on the state in its own way (FiLM, Perez et
        # al. 2018, arXiv:1709.07871).
        self.first_gain = nn.Linear(n_actions, hidden)
        self.second_gain = nn.Linear(n_actions, hidden)
        self.correction_out = nn.Linear(hidden, dim)
        self.prior = nn.Sequential(nn.Linear(dim + n_actions, hidden), nn.SiLU())
        self.prior_out = nn.Linear(hidden, n_codes)
        for layer in (self.correction_out, self.prior_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _features(self, z: Tensor, action: Tensor, duration: Tensor) -> Tensor:
        """As :class:`genejepa.world.linear.Features`, (n, n_features), with an action for each state."""
        by_state = torch.einsum("nr,nd->nrd", action @ self.shared, z - self.centre).flatten(1)
        return duration[:, None] * torch.cat([action, by_state], 1)

    def linear(self, z: Tensor, action: Tensor, duration: Tensor) -> Tensor:
        """Mean change over futures, (n, dim), of states (n, dim) under actions (n, n_actions) for durations (n,)."""
        return self._features(z, action, duration) @ self.coefficients

    def correction(self, z: Tensor, action: Tensor, duration: Tensor, future: Tensor) -> Tensor:
        """What the perceptron adds, (n, dim), for one future of each state, (n,)."""
        strength = self.gate * self.scale * duration * action.abs().amax(1)
        inputs = torch.cat([(z - self.centre) / self.scale, action, self.codes[future]], 1)
        units = nn.functional.silu(self.first(inputs)) * (1 + self.first_gain(action))
        units = nn.functional.silu(self.second(units)) * (1 + self.second_gain(action))
        corrected: Tensor = strength[:, None] * self.correction_out(units)
        return corrected

    def starts(self, z: Tensor, action: Tensor, duration: Tensor) -> Tensor:
        """States by the linear start of every future, (n, n_codes, dim)."""
        return z[:, None] + torch.einsum("nf,kfd->nkd", self._features(z, action, duration), self.by_future)

    def of_future(self, z: Tensor, action: Tensor, duration: Tensor, future: Tensor) -> Tensor:
        """States after, (n, dim), of states (n, dim), each in the future that is named for it, (n,)."""
        start = self.starts(z, action, duration)[torch.arange(len(z)), future]
        return start + self.correction(z, action, duration, future)

    def forward(self, z: Tensor, action: Tensor, duration: Tensor) -> Tensor:
        """States of every future, (n, n_codes, dim)."""
        each = [torch.full((len(z),), future) for future in range(self.n_codes)]
        corrected = torch.stack([self.correction(z, action, duration, future) for future in each], 1)
        return self.starts(z, action, duration) + corrected

    def log_prior(self, z: Tensor, action: Tensor, logits: Tensor) -> Tensor:
        """Log probabilities of the futures, (n, n_codes); `logits`, (n, n_codes), are those of the action."""
        by_state: Tensor = self.prior_out(self.prior(torch.cat([(z - self.centre) / self.scale, action], 1)))
        return (self.prior_gate * by_state + logits).log_softmax(-1)

    def chances(self, z: Tensor, action: Tensor, logits: Tensor) -> Tensor:
        """Probabilities of the futures, (n, n_codes), without those below a tenth, which is no future."""
        likely = self.log_prior(z, action, logits).exp()
        likely = torch.where(likely >= SMALLEST_SHARE, likely, torch.zeros(()))
        return likely / likely.sum(-1, keepdim=True)
