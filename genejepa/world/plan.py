"""What planning returns: sequences of actions, the best first, and what each is imagined to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Plan:
    """Ranked sequences of actions.

    Attributes
    ----------
    sequences
        Names of the actions of each sequence, the best sequence first; an empty one does nothing.
    costs : (n_sequences,)
        Energy distance of the population that is imagined at the end to the goal, in the latent
        (:func:`genejepa.world.planning.energy_distance`), plus the price of the actions.
    distances
        For each sequence, the energy distance to the goal before any action and after each, (n_actions + 1,).
    populations
        For each sequence, the imagined states before any action and after each, (n_actions + 1, n_cells, dim).
    goal : (n_goal_cells, dim)
        States of the goal.
    method
        How sequences were searched.
    n_evaluations
        Populations that were put through a predictor. The teaching of a slow predictor, once for each choice of
        actions, is not counted.
    unlike : (n_sequences,)
        Share of the cells, in the population that has most, that were unlike those of the fit when something was done
        to them; what comes after is extrapolated.
    """

    sequences: list[tuple[str, ...]]
    costs: NDArray[np.float64]
    distances: list[NDArray[np.float64]]
    populations: list[NDArray[np.float32]]
    goal: NDArray[np.float32]
    method: str
    n_evaluations: int
    unlike: NDArray[np.float64]

    @property
    def best(self) -> tuple[str, ...]:
        """Actions of the best sequence."""
        return self.sequences[0]

    @property
    def table(self) -> pd.DataFrame:
        """One row for each sequence: actions, their number, distance to the goal at the end, cost, unlike cells."""
        import pandas as pd

        return pd.DataFrame(
            {
                "actions": [" > ".join(sequence) or "nothing" for sequence in self.sequences],
                "n_actions": [len(sequence) for sequence in self.sequences],
                "distance": [float(distances[-1]) for distances in self.distances],
                "cost": self.costs,
                "unlike": self.unlike,
            },
            index=pd.RangeIndex(1, len(self.sequences) + 1, name="rank"),
        )
