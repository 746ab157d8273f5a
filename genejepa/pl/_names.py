"""Names written on a picture so that none covers another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from genejepa.pl._style import figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

NAME_COLOR: Final = "#1A1A1A"
_GAP: Final = 5.0
"""Pixels between two names."""
_MAX_STEPS: Final = 500


def write_names(ax: Axes, anchors: NDArray[np.float64], names: list[str]) -> None:
    """Write names at data positions (n, 2), moved apart; a line leads back from a name that moved far."""
    style = name_style(zorder=5)
    texts = [ax.text(x, y, name, **style) for (x, y), name in zip(anchors, names, strict=True)]
    # The size of a text in data units is known once the layout of the figure is.
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())
    figure_of(ax).draw_without_rendering()
    starts = ax.transData.transform(anchors)
    sizes = np.array([text.get_window_extent().size for text in texts])
    ends = _spread(starts, sizes, inside=np.asarray(ax.get_window_extent().extents))
    to_data = ax.transData.inverted()
    for text, size, start, end in zip(texts, sizes, starts, ends, strict=True):
        text.set_position(tuple(to_data.transform(end)))
        if np.hypot(*(end - start)) > size[1]:
            ax.plot(*to_data.transform([start, end]).T, color=NAME_COLOR, linewidth=0.7, zorder=4)


def name_style(*, zorder: int) -> dict[str, Any]:
    """How names are written: bold, on a white rim that parts them from what is below."""
    from matplotlib import patheffects

    return {
        "ha": "center",
        "va": "center",
        "fontsize": "small",
        "fontweight": "bold",
        "color": NAME_COLOR,
        "path_effects": [patheffects.withStroke(linewidth=2.5, foreground="white")],
        "zorder": zorder,
    }


def _spread(
    centers: NDArray[np.float64], sizes: NDArray[np.float64], *, inside: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Move boxes apart until none overlaps, each pair along the axis that needs the smaller shift.

    `centers` and `sizes` have shape (n, 2); `inside` is the left, bottom, right and top of the area that
    boxes should not leave; all are in pixels. Returns new centres.
    """
    # Boxes at one place have no direction to part in, so each starts a little higher than the one before.
    placed: NDArray[np.float64] = centers + np.arange(len(centers))[:, None] * np.array([0.0, 0.01])
    half = sizes / 2
    low, high = inside[:2] + half, np.maximum(inside[2:] - half, inside[:2] + half)
    for _ in range(_MAX_STEPS):
        moved = False
        for i in range(len(placed)):
            for j in range(i):
                between = placed[i] - placed[j]
                overlap = half[i] + half[j] + _GAP - np.abs(between)
                if (overlap > 0).all():
                    axis = int(np.argmin(overlap))
                    shift = (0.5 * overlap[axis] + 0.01) * (1.0 if between[axis] >= 0 else -1.0)
                    placed[i, axis] += shift
                    placed[j, axis] -= shift
                    moved = True
        placed = np.clip(placed, low, high)
        if not moved:
            break
    return placed
