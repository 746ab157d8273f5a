"""Colours and small helpers shared by all figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE: Final = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#553311",
    "#DDCC88",
    "#004444",
    "#113399",
    "#8888FF",
    "#99DDCC",
    "#CC3344",
    "#772277",
    "#DD8855",
    "#BBDD55",
    "#AA1166",
    "#CCCCEE",
    "#884400",
    "#FF8899",
    "#447744",
    "#0066CC",
    "#666688",
    "#339922",
)
"""Colours of categories.

The first six are those of Okabe & Ito (2008). Each further one is the colour of moderate lightness and chroma
that is farthest, in CIELAB, from all before it, under the least favourable of normal vision (with distances
weighted by 0.6), protanopia and deuteranopia (simulated after Machado et al. 2009).
"""

MARKERS: Final = ("o", "s", "^", "D", "v", "P")
"""Markers; the next one is used each time the colours are used up."""

MISSING_COLOR: Final = "#D3D3D3"
"""Colour of cells without a value."""


def category_style(index: int) -> tuple[str, str]:
    """Return colour and marker of a category; they differ between the first 144 categories."""
    n = len(PALETTE)
    return PALETTE[index % n], MARKERS[(index // n) % len(MARKERS)]


def new_axes(width: float, height: float) -> Axes:
    """Return the axes of a new figure that notebooks display; sizes are in inches."""
    from matplotlib import pyplot as plt

    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def new_figure(width: float, height: float) -> Figure:
    """Return a new figure that notebooks display; sizes are in inches."""
    from matplotlib import pyplot as plt

    return plt.figure(figsize=(width, height), layout="constrained")


def figure_of(ax: Axes) -> Figure:
    """Return the figure that holds `ax`, also if it lies in a subfigure."""
    return cast("Figure", ax.get_figure(root=True))
