"""Interactive figures of a comparison, as plain plotly.js specifications.

Colours of text, grid and background are left out: the page fills them in, since they depend on
whether its reader prefers light or dark.
"""

import html
import math
from typing import Any

from sparing.compare.results import Results, Row
from sparing.report import numerals
from sparing.report.curves import curves, description, loss_range
from sparing.report.palette import GREY, looks
from sparing.report.pareto import (
    COSTS,
    Cost,
    Point,
    budget_limit,
    cost_window,
    front,
    loss_window,
    nearby_references,
    points,
    reference_lines,
    staircase,
)
from sparing.report.rows import competitors, is_lora

Spec = dict[str, Any]

_MOST_STEPS = 500  # drawn of a learning curve


def pareto_spec(results: Results) -> Spec:
    """The three Pareto plots side by side, with one loss axis and one legend."""
    traces: list[Spec] = []
    layout: Spec = {
        "yaxis": {
            "title": {"text": "validation loss, nats a token"},
            "range": list(loss_window(results)),
            "tickformat": ".3f",
        },
        "shapes": [],
        "annotations": [],
        "margin": {"t": 34, "r": 12, "b": 56, "l": 72},
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top"},
        "hovermode": "closest",
        "height": 460,
    }
    named: set[str] = set()
    for panel, cost in enumerate(COSTS):
        _add_panel(results, cost, panel, traces, layout, named)
    return {"data": traces, "layout": layout}


def curves_spec(results: Results) -> Spec:
    """Training loss by step."""
    drawn = curves(results)
    style = looks(results)
    traces = []
    for curve in drawn:
        stride = max(1, math.ceil(len(curve.steps) / _MOST_STEPS))
        look = style[curve.row.method]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": _name(curve.row),
                "x": curve.steps[::stride],
                "y": [_number(loss) for loss in curve.losses[::stride]],
                "line": {"color": look.colour, "dash": look.dash.plotly, "width": 2},
                "hovertemplate": "%{y:.4f}",
            }
        )
    layout = {
        "xaxis": {"title": {"text": f"step ({description(results)})"}},
        "yaxis": {
            "title": {"text": "training loss, nats a token"},
            "range": list(loss_range(drawn)),
        },
        "margin": {"t": 34, "r": 12, "b": 56, "l": 72},
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top"},
        "hovermode": "x unified",
        "height": 440,
    }
    return {"data": traces, "layout": layout}


def _add_panel(
    results: Results,
    cost: Cost,
    panel: int,
    traces: list[Spec],
    layout: Spec,
    named: set[str],
) -> None:
    """Draw one cost into the `panel`-th third of the figure.

    Arguments:
        named: methods that the legend has already; extended by those of this panel.
    """
    axis = "x" if panel == 0 else f"x{panel + 1}"
    measured = points(competitors(results), cost)
    shown = measured + nearby_references(results, cost)
    limit = budget_limit(results, cost)
    left, right, logarithmic = cost_window(shown, limit)
    layout[f"xaxis{axis[1:]}"] = {
        "title": {"text": cost.title},
        "domain": [0.345 * panel, 0.345 * panel + 0.31],
        "anchor": "y",
        "type": "log" if logarithmic else "linear",
        "range": [math.log10(left), math.log10(right)] if logarithmic else [left, right],
        "nticks": 5,
    }
    if measured:
        costs, losses = staircase(front(measured), right)
        traces.append(_line(costs, losses, axis, "non-dominated", show=panel == 0))
    style = looks(results)
    for point in shown:
        look = style[point.row.method]
        first = point.row.method not in named
        named.add(point.row.method)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _name(point.row),
                "legendgroup": _name(point.row),
                "showlegend": first,
                "xaxis": axis,
                "x": [point.cost],
                "y": [point.loss],
                "error_y": {"type": "data", "array": [point.std], "visible": point.std > 0},
                "marker": {
                    "color": look.colour,
                    "symbol": look.marker.plotly,
                    "size": 15 if is_lora(point.row) else 11,
                },
                "hovertemplate": f"{_hover(point, cost)}<extra></extra>",
            }
        )
    layout["shapes"] += _reference_shapes(results, axis, limit)
    layout["annotations"] += _reference_texts(results, cost, axis)


def _line(x: list[float], y: list[float], axis: str, name: str, *, show: bool) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "legendgroup": name,
        "showlegend": show,
        "xaxis": axis,
        "x": x,
        "y": y,
        "line": {"color": GREY, "width": 1.5},
        "hoverinfo": "skip",
    }


def _hover(point: Point, cost: Cost) -> str:
    summary = point.row.loss
    loss = numerals.loss(point.loss) if summary is None else numerals.loss_summary(summary)
    return f"<b>{_name(point.row)}</b><br>loss {loss}<br>{cost.heading} {cost.amount(point.cost)}"


def _reference_shapes(results: Results, axis: str, limit: float | None) -> list[Spec]:
    """A horizontal line for each reference, a vertical one for the budget."""
    line = {"color": GREY, "width": 1.2, "dash": "dash"}
    shapes: list[Spec] = [
        {
            "type": "line",
            "layer": "below",
            "xref": f"{axis} domain",
            "yref": "y",
            "x0": 0,
            "x1": 1,
            "y0": reference.loss,
            "y1": reference.loss,
            "line": line,
        }
        for reference in reference_lines(results)
    ]
    if limit is not None:
        shapes.append(
            {
                "type": "line",
                "layer": "below",
                "xref": axis,
                "yref": "y domain",
                "x0": limit,
                "x1": limit,
                "y0": 0,
                "y1": 1,
                "line": line | {"dash": "dot"},
                "label": {"text": "budget", "textposition": "end", "font": {"size": 11}},
            }
        )
    return shapes


def _reference_texts(results: Results, cost: Cost, axis: str) -> list[Spec]:
    """The names of the horizontal lines; at the edge with an arrow where the line is beyond."""
    low, high = loss_window(results)
    texts = []
    for line in reference_lines(results):
        arrow = "↑ " if line.loss > high else "↓ " if line.loss < low else ""
        height = min(max(line.loss, low), high)
        texts.append(
            {
                "xref": f"{axis} domain",
                "yref": "y",
                "x": 0.01,
                "y": height,
                "xanchor": "left",
                "yanchor": "bottom" if height < (low + high) / 2 else "top",
                "text": arrow + _escape(line.text(cost)),
                "showarrow": False,
                "font": {"size": 11},
            }
        )
    return texts


def _name(row: Row) -> str:
    return _escape(f"{row.method} (reference)" if is_lora(row) else row.method)


def _escape(text: str) -> str:
    """Plotly reads a little HTML in every text, and `%{…}` in a hover template."""
    return html.escape(text, quote=False).replace("{", "&#123;")


def _number(value: float) -> float | None:
    """A gap in the line where there is no finite figure; JSON knows no nan."""
    return round(value, 5) if math.isfinite(value) else None
