"""Names written beside what they name, so that they cover neither each other nor what must be seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from genejepa.pl._names import NAME_COLOR, name_style
from genejepa.pl._style import figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_NEAR: Final = 7.0
"""Pixels between a name and its place where there is room; farther away, a line joins them."""
_DISTANCES: Final = _NEAR * np.array([1, 2, 4, 6, 9, 12, 16, 20, 25, 30, 36])
_N_DIRECTIONS: Final = 16
_GAP: Final = 2.0
"""Pixels that are kept free around a name."""
_COVERS: Final = 1e4
"""What covering something that must be seen costs; covering a dot of a cloud costs 1, and so does a pixel of way."""


def write_beside(ax: Axes, anchors: Floats, names: list[str], *, avoid: Floats, cloud: Floats) -> None:
    """Write names beside places, the first ones first.

    Every name takes the best of some positions around its place: near, inside the axes, off what must be seen, and on
    few dots of the cloud. Limits and layout of the axes must be final.

    Parameters
    ----------
    anchors : (n, 2)
        Places, in units of the data.
    avoid : (n_avoid, 2)
        Points that must not be covered, besides the places.
    cloud : (n_cloud, 2)
        Points that may be covered where there is no better position.
    """
    figure_of(ax).draw_without_rendering()
    to_pixels = ax.transData
    style = name_style(zorder=6)
    places = to_pixels.transform(anchors)
    seen, dots = np.concatenate([places, to_pixels.transform(avoid)]), to_pixels.transform(cloud)
    taken = np.empty((0, 4))
    for place, name in zip(places, names, strict=True):
        x, y = to_pixels.inverted().transform(place)
        text = ax.text(x, y, name, **style)
        half = np.asarray(text.get_window_extent().size) / 2 + _GAP
        centers, lines = _positions(place, half)
        boxes = np.concatenate([centers - half, centers + half], axis=1)
        best = int(np.argmin(_cost(boxes, lines, taken, seen, dots, np.asarray(ax.bbox.extents))))
        text.set_position(tuple(to_pixels.inverted().transform(centers[best])))
        taken = np.concatenate([taken, boxes[[best]]])
        if best >= _N_DIRECTIONS:
            seen = np.concatenate([seen, lines[best]])
            ends = to_pixels.inverted().transform(lines[best][[0, -1]])
            ax.plot(*ends.T, color=NAME_COLOR, linewidth=0.7, zorder=5)


def _positions(place: Floats, half: Floats) -> tuple[Floats, Floats]:
    """Centres of a name around its place, (n, 2), the nearest first, and points on the lines to it, (n, 10, 2)."""
    angles = np.linspace(0, 2 * np.pi, _N_DIRECTIONS, endpoint=False) + np.pi / 2
    directions = np.tile(np.stack([np.cos(angles), np.sin(angles)], axis=1), (len(_DISTANCES), 1))
    centers = place + directions * (half + np.repeat(_DISTANCES, _N_DIRECTIONS)[:, None])
    ends = np.clip(place, centers - half, centers + half)
    lines = place + np.linspace(0, 1, 10)[:, None] * (ends - place)[:, None, :]
    return centers, lines


def _cost(boxes: Floats, lines: Floats, taken: Floats, seen: Floats, dots: Floats, inside: Floats) -> Floats:
    """How bad each of some positions is, (n,), for boxes (n, 4): left, bottom, right, top."""
    overlap = (boxes[:, None, :2] < taken[:, 2:]).all(2) & (boxes[:, None, 2:] > taken[:, :2]).all(2)
    crossed = _within(lines.reshape(-1, 2), taken).reshape(len(taken), *lines.shape[:2]).any(2).T
    outside = (boxes[:, :2] < inside[:2]).any(1) | (boxes[:, 2:] > inside[2:]).any(1)
    # What cannot be read is the worst: a name on another, or one that leaves the picture.
    hidden = 10 * (overlap.sum(1) + outside) + crossed.sum(1) + _within(seen, boxes).sum(1)
    way = np.repeat(_DISTANCES, _N_DIRECTIONS)
    total: Floats = _COVERS * hidden + _within(dots, boxes).sum(1) + way
    return total


def _within(points: Floats, boxes: Floats) -> NDArray[np.bool_]:
    """Which points lie in which boxes, (n_boxes, n_points)."""
    x, y = points.T
    left, bottom, right, top = boxes.T[:, :, None]
    found: NDArray[np.bool_] = (x > left) & (x < right) & (y > bottom) & (y < top)
    return found
