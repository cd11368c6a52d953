"""An empty figure in the style of the reports, for any room that draws one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK = "#1f2933"


def blank_figure(size: tuple[float, float]) -> Figure:
    """An empty figure that belongs to no window, so that nothing global is touched.

    Arguments:
        size: width and height in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=size, dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, *, fontsize: float) -> None:
    """Two spines, a light grid and grey ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.grid(True, color="#e4e7eb", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#52606d", labelsize=fontsize)
