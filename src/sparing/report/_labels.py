"""Names beside the points of a matplotlib plot, placed so that they do not cover one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

_DISTANCES = (7, 12, 18, 26, 36, 48, 62)  # from the point, in typographic points
_ANGLES = (0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90)  # degrees, the best first
_MARKER = 5  # half the width of a marker, in typographic points


@dataclass(frozen=True)
class Label:
    """A name for the point (x, y), given in data coordinates."""

    text: str
    x: float
    y: float
    colour: str


def place_labels(axes: Axes, labels: Sequence[Label], *, fontsize: float) -> None:
    """Write each label near its point, with a thin line to it where there was no room beside it.

    Greedy: from the top of the plot to the bottom, each label takes the place with the least
    overlap with markers, lines, other texts and the frame, nearer to its own point than to any
    other; the nearest among equals. The figure's layout must be final, since overlap is measured
    in pixels.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    pixel = figure.dpi / 72
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    centres: list[tuple[float, float]] = [
        tuple(axes.transData.transform((label.x, label.y))) for label in labels
    ]
    reach = _MARKER * pixel
    taken: list[Bbox] = [
        Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in centres
    ]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    taken += _segments(axes)
    frame = axes.get_window_extent(renderer)
    from_the_top = sorted(zip(labels, centres, strict=True), key=lambda pair: -pair[1][1])
    for label, (x, y) in from_the_top:
        text = axes.text(label.x, label.y, label.text, fontsize=fontsize)
        extent = text.get_window_extent(renderer)
        text.remove()
        others = [centre for centre in centres if centre != (x, y)]
        places = [
            (distance, _box(x, y, distance * pixel, angle, extent.width, extent.height))
            for distance, angle in itertools.product(_DISTANCES, _ANGLES)
        ]
        distance, box = min(
            places,
            key=lambda place: (
                _crowding(place[1], taken, frame)
                + place[0] * pixel
                + 60 * pixel * _ambiguous(place[1], (x, y), others)
            ),
        )
        taken.append(box)
        line = {"arrowstyle": "-", "color": label.colour, "lw": 0.7, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2),
            textcoords="figure pixels",
            ha="center",
            va="center_baseline",
            fontsize=fontsize,
            color="#1f2933",
            arrowprops=line if distance > 12 else None,
            zorder=6,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        ).set_in_layout(False)


def _segments(axes: Axes) -> list[Bbox]:
    """Thin boxes around the pieces of all lines, which run along the axes."""
    from matplotlib.transforms import Bbox

    boxes = []
    for line in axes.lines:
        corners = line.get_transform().transform(line.get_xydata())
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            boxes.append(
                Bbox.from_extents(
                    min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2
                )
            )
    return boxes


def _box(x: float, y: float, distance: float, angle: float, width: float, height: float) -> Bbox:
    """The box of a text whose nearest side is `distance` away in the direction of `angle`."""
    from matplotlib.transforms import Bbox

    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    middle_x = x + across * distance + _side(across) * width / 2
    middle_y = y + up * distance + (height / 2 * up)
    return Bbox.from_bounds(middle_x - width / 2, middle_y - height / 2, width, height)


def _side(across: float) -> float:
    return 0.0 if abs(across) < 0.1 else math.copysign(1.0, across)


def _crowding(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Covered area and area outside the frame, in square pixels."""
    covered = sum(_shared_area(box, other) for other in taken)
    outside = box.width * box.height - _shared_area(box, frame)
    return covered + 40 * outside


def _ambiguous(box: Bbox, own: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    """Whether a text there would be read as the name of another point."""
    return any(_gap(box, other) < 1.2 * _gap(box, own) for other in others)


def _gap(box: Bbox, point: tuple[float, float]) -> float:
    """Distance in pixels from a point to the nearest place of the box; 0 inside."""
    across = max(box.x0 - point[0], 0.0, point[0] - box.x1)
    up = max(box.y0 - point[1], 0.0, point[1] - box.y1)
    return math.hypot(across, up)


def _shared_area(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
