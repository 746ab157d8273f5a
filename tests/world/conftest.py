"""Cells whose types and answers to actions are known, and a model of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from genejepa.model import GeneJEPA
from genejepa.world.model import WorldModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Draw = Callable[..., AnnData]
    Population = tuple[str, Mapping[str, float], Mapping[str, Any]]
    """Cell type, log fold change of each program, and values of ``obs``."""

N_GENES = 100
TYPES = ("alpha", "beta", "gamma")
PROGRAMS = {name: slice(45 + 12 * number, 57 + 12 * number) for number, name in enumerate("ABCD")}
"""Genes that an action changes, in all types alike; the first 45 tell the types apart."""

EFFECT = 1.3
"""Log fold change."""


@pytest.fixture(scope="session")
def draw_cells() -> Draw:
    """Draw counts of some populations, one after the other; equal seeds give equal cells."""

    def draw(populations: Sequence[Population], *, n: int = 40, seed: int = 0) -> AnnData:
        base = np.random.default_rng(5).gamma(2.0, 1.5, N_GENES)
        rng = np.random.default_rng(seed)
        counts, tables = [], []
        for cell_type, effects, values in populations:
            logs = np.zeros(N_GENES)
            logs[15 * TYPES.index(cell_type) : 15 * TYPES.index(cell_type) + 15] = 1.6
            for program, effect in effects.items():
                logs[PROGRAMS[program]] = effect
            rates = base * np.exp(logs) * rng.lognormal(0.0, 0.3, (n, 1))
            counts.append(rng.poisson(rates))
            tables.append(
                pd.DataFrame({"cell_type": [cell_type] * n} | {key: [value] * n for key, value in values.items()})
            )
        obs = pd.concat(tables, ignore_index=True)
        obs.index = pd.Index([f"cell{number}" for number in range(len(obs))])
        var = pd.DataFrame(index=pd.Index([f"gene{number}" for number in range(N_GENES)]))
        return AnnData(sparse.csr_matrix(np.concatenate(counts), dtype=np.float32), obs=obs, var=var)

    return draw


def conditions(*names: str) -> list[Population]:
    return [
        (own, {part: EFFECT for part in name.split("+") if part in PROGRAMS}, {"condition": name})
        for own in TYPES
        for name in names
    ]


@pytest.fixture(scope="session")
def make_conditions() -> Callable[..., list[Population]]:
    """Populations of all types under actions such as ``"ctrl"`` and ``"A+B"``."""
    return conditions


@pytest.fixture(scope="session")
def perturbed(draw_cells: Draw) -> AnnData:
    """360 cells: three types, each as they are, under A, and under B."""
    return draw_cells(conditions("ctrl", "A", "B"))


@pytest.fixture(scope="session")
def untreated(draw_cells: Draw) -> AnnData:
    """Other cells of the same types, as they are."""
    return draw_cells(conditions("ctrl"), n=30, seed=1)


@pytest.fixture(scope="session")
def model(draw_cells: Draw) -> GeneJEPA:
    """Model of cells under all actions."""
    trained = GeneJEPA(
        draw_cells(conditions("ctrl", "A", "B", "C", "D"), n=30, seed=2),
        n_genes=None,
        embedding_dim=12,
        n_latents=2,
        dim=16,
        n_heads=4,
        n_layers=1,
        predictor_dim=16,
        n_blocks=8,
        n_slices=16,
        batch_size=45,
        learning_rate=3e-3,
    )
    trained.train(max_epochs=15, accelerator="cpu", precision="32-true", threads=1, progress_bar=False)
    return trained


@pytest.fixture(scope="session")
def fit(model: GeneJEPA) -> Callable[..., WorldModel]:
    """Fit a world model with few steps."""

    def run(adata: AnnData, **arguments: Any) -> WorldModel:
        keys: dict[str, Any] = {"action_key": "condition", "control": "ctrl", "group_key": "cell_type", "max_steps": 4}
        return WorldModel(model).fit(adata, **keys | arguments)

    return run


@pytest.fixture(scope="session")
def world(fit: Callable[..., WorldModel], perturbed: AnnData) -> WorldModel:
    """What A and B do to all types. Not to be fitted again."""
    return fit(perturbed, max_steps=30)
