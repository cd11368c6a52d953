"""A heat map of one value for each neuron, layers as rows."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.checkpoint import atomic_path
from sparing.report._extras import require
from sparing.report.palette import ACCENT

if TYPE_CHECKING:
    from torch import Tensor

_DPI = 160
_INK = "#1f2933"
_NEGATIVE = "#d55e00"  # the palette's orange, which nobody confuses with its blue
_WIDTH = 8.0  # inches
_MOST_COLUMNS = 512  # cells across; wider layers are averaged into these
_MOST_LABELS = 24  # rows that are named


def write_heat_map(
    path: Path, values: Mapping[str, Tensor], title: str, *, signed: bool = False
) -> None:
    """Draw a PNG, atomically: a row for each layer, its neurons sorted by value.

    Colours run from white to blue; with `signed` from orange over white, which is zero, to blue.
    Layers of other widths are drawn to the same length, as shares of their neurons.

    Arguments:
        path: of the picture.
        values: by layer, (neurons,); from 0 to 1, or with `signed` from -1 to 1.
        title: above the picture.
        signed: whether values have a sign.

    Raises:
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the file cannot be written.
    """
    require("matplotlib")
    import torch.nn.functional as F
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    columns = min(_MOST_COLUMNS, max(len(row) for row in values.values()))
    cells = [
        F.interpolate(row.sort(descending=True).values.float()[None, None], columns, mode="area")
        if len(row) > columns
        else F.interpolate(row.sort(descending=True).values.float()[None, None], columns)
        for row in values.values()
    ]
    ends = [_NEGATIVE, "white", ACCENT] if signed else ["white", ACCENT]
    figure = Figure(
        figsize=(_WIDTH, 1.6 + 0.22 * min(len(cells), 40)), dpi=_DPI, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(
        [cell.flatten().tolist() for cell in cells],
        aspect="auto",
        interpolation="nearest",
        cmap=LinearSegmentedColormap.from_list("participation", ends),
        vmin=-1.0 if signed else 0.0,
        vmax=1.0,
        extent=(0, 100, len(cells) - 0.5, -0.5),
    )
    step = -(-len(cells) // _MOST_LABELS)
    axes.set_yticks(range(0, len(cells), step), list(values)[::step], fontsize=7, color=_INK)
    axes.set_xlabel("neurons of the layer, in per cent, highest first", fontsize=9, color=_INK)
    axes.set_title("\n".join(textwrap.wrap(title, 80)), fontsize=11, color=_INK)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, fraction=0.03)
    with atomic_path(path) as fresh:
        figure.savefig(fresh, dpi=_DPI, format="png")
