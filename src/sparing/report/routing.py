"""A picture of which experts a routed adapter uses, by module and by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.checkpoint import atomic_path
from sparing.report._extras import require
from sparing.report.canvas import DPI, INK, blank_figure
from sparing.report.palette import ACCENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from sparing.adapt import RoutingStatistics

_TEXT = 9.0
_MOST_TOKENS = 64  # a row each, so that their text can be read
_ROW_INCHES = 0.14
_COLUMN_INCHES = 0.45


def write_routing(
    statistics: RoutingStatistics, file: Path, tokens: Sequence[str] | None = None
) -> None:
    """Draw the shares of all experts, by module and by token, atomically.

    Arguments:
        statistics: of a routed adapter.
        file: PNG to write.
        tokens: text of the tokens of the last batch, to label their rows; the first 64 are drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the folder cannot be written.
    """
    require("matplotlib")
    with atomic_path(file) as fresh:
        routing_figure(statistics, tokens).savefig(fresh, dpi=DPI, format="png")


def routing_figure(statistics: RoutingStatistics, tokens: Sequence[str] | None = None) -> Figure:
    """The figure of `write_routing`."""
    import torch

    names = list(statistics.modules)
    shares = torch.stack([statistics.modules[name].share for name in names]).float()
    by_token = statistics.token_weights
    panels = 1 if by_token is None else 2
    shown = 0 if by_token is None else min(_MOST_TOKENS, len(by_token))
    width = 1.8 + _COLUMN_INCHES * len(statistics.experts)
    height = min(12.0, 2.5 + _ROW_INCHES * max(shown, min(len(names), _MOST_TOKENS)))
    figure = blank_figure((panels * width, height))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw(axes[0], "by module", shares, statistics.experts)
    _label_blocks(axes[0], names)
    if by_token is not None:
        _draw(axes[1], "by token", by_token[:shown], statistics.experts)
        if tokens is not None:
            labels = [token.replace("$", r"\$") for token in tokens[:shown]]
            axes[1].set_yticks(range(shown), labels, fontsize=_TEXT - 3, family="monospace")
    figure.colorbar(axes[-1].images[0], ax=list(axes), shrink=0.5, label="share of the weight")
    return figure


def _draw(axes: Axes, title: str, values: Tensor, experts: Sequence[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("share", ["white", ACCENT])
    axes.imshow(values.numpy(), aspect="auto", cmap=shades, vmin=0.0, vmax=1.0)
    axes.set_title(title, fontsize=_TEXT, color=INK)
    axes.set_xticks(range(len(experts)), experts, rotation=60, ha="right", fontsize=_TEXT)
    axes.tick_params(colors="#52606d", labelsize=_TEXT)


def _label_blocks(axes: Axes, names: Sequence[str]) -> None:
    """One label where each block begins; all names where there are few."""
    if len(names) <= 24:
        axes.set_yticks(range(len(names)), names, fontsize=_TEXT - 3)
        return
    starts: dict[str, int] = {}
    for row, name in enumerate(names):
        words = name.split(".")
        number = next((i for i, word in enumerate(words) if word.isdigit()), None)
        starts.setdefault(name if number is None else ".".join(words[: number + 1]), row)
    axes.set_yticks(list(starts.values()), list(starts), fontsize=_TEXT - 2)
