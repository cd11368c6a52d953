"""The report of a sweep: one page that works without any network, and its pictures."""

import math
from pathlib import Path
from typing import Any

from sparing.checkpoint import atomic_path, write_json
from sparing.report import numerals
from sparing.report._extras import require
from sparing.report._template import render
from sparing.report.palette import COLOURS, DASHES, MARKERS
from sparing.scale.fast_hp_transfer.figures import (
    gaps,
    loss_window,
    profiles,
    write_transfer_figures,
)
from sparing.scale.fast_hp_transfer.results import Estimate, TransferAnalysis
from sparing.scale.fast_hp_transfer.table import Sweep

BUDGETS = (1.0, 4.0, 16.0, 64.0)  # in runs of the widest model


def write_transfer_report(
    analysis: TransferAnalysis, sweep: Sweep, folder: Path, budgets: tuple[float, ...] = BUDGETS
) -> Path:
    """Write `transfer.html`, `analysis.json`, `curves.png` and `rates.png`, each atomically.

    Arguments:
        analysis: of the sweep.
        sweep: what was analysed.
        folder: made if it is not there.
        budgets: to plan for, in runs of the widest model.

    Returns:
        the path of the page.

    Raises:
        MissingExtraError: matplotlib or plotly is not installed; nothing was written.
        UnwritableError: the folder cannot be written.
    """
    for package in ("matplotlib", "plotly"):
        require(package)
    text = transfer_page(analysis, sweep, budgets)
    write_transfer_figures(analysis, sweep, folder)
    write_json(folder / "analysis.json", analysis.to_json())
    with atomic_path(folder / "transfer.html") as fresh:
        fresh.write_text(text, encoding="utf-8")
    return folder / "transfer.html"


def transfer_page(
    analysis: TransferAnalysis, sweep: Sweep, budgets: tuple[float, ...] = BUDGETS
) -> str:
    """The text of the page."""
    from markupsafe import Markup

    return render(
        "transfer.html.j2",
        analysis=analysis,
        figure=figure,
        estimate=estimate,
        plans=plan_rows(analysis, budgets),
        curves=[_curves_spec(analysis, sweep, hp) for hp in range(len(sweep.hps))],
        rates=_rates_spec(analysis),
        plotly=Markup(require("plotly.offline").get_plotlyjs()),
    )


def figure(value: float) -> str:
    """Three digits, or a dash for what is not known."""
    return numerals.significant(value) if math.isfinite(value) else numerals.MISSING


def estimate(found: Estimate) -> str:
    """A figure and its interval: 0.52 (0.48 to 0.55)."""
    if not math.isfinite(found.low):
        return figure(found.value)
    return f"{figure(found.value)} ({figure(found.low)} to {figure(found.high)})"


def plan_rows(analysis: TransferAnalysis, budgets: tuple[float, ...]) -> list[dict[str, str]]:
    """What each budget should be spent on; none where the rates are not known."""
    if analysis.cost is None:
        return []
    rows = []
    for budget in budgets:
        plan = analysis.plan(budget)
        rows.append(
            {
                "budget": numerals.significant(budget),
                "proxy": f"{plan.proxy_width:,.0f}",
                "step": figure(plan.step),
                "final": f"{plan.final_width:,.0f}",
                "search": numerals.share(plan.search_share),
                "error": figure(plan.error),
                "direct": figure(analysis.direct_error(budget)),
            }
        )
    return rows


def _curves_spec(analysis: TransferAnalysis, sweep: Sweep, hp: int) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for number, curve in enumerate(profiles(sweep, hp)):
        row = analysis.widths[number]
        look = {"color": COLOURS[number % len(COLOURS)]}
        marker = look | {"symbol": MARKERS[number % len(MARKERS)].plotly, "size": 5}
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": f"{curve.width:g}",
                "legendgroup": f"{curve.width:g}", "x": curve.values,
                "y": [None if math.isnan(y) else y for y in curve.mean],
                "line": look | {"width": 2}, "marker": marker,
                "hovertemplate": "%{x:.4g}: %{y:.4f}",
            }
        )  # fmt: skip
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": f"best of {curve.width:g}",
                "legendgroup": f"{curve.width:g}", "showlegend": False,
                "x": [row.values[hp]], "y": [row.loss],
                "marker": look | {"symbol": "star", "size": 13},
                "hovertemplate": "best: %{x:.4g}, %{y:.4f}",
            }
        )  # fmt: skip
    kind = "log" if sweep.axis == "log" else "linear"
    return {
        "data": traces,
        "layout": _layout({"title": {"text": sweep.hps[hp]}, "type": kind})
        | {"yaxis": {"title": {"text": "loss"}, "range": list(loss_window(sweep))}},
    }


def _rates_spec(analysis: TransferAnalysis) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for number, gap in enumerate(gaps(analysis)):
        look = {"color": COLOURS[number]}
        for mode, values in (("markers", gap.values), ("lines", gap.fit)):
            traces.append(
                {
                    "type": "scatter", "mode": mode, "name": gap.name, "legendgroup": gap.name,
                    "showlegend": mode == "markers", "x": gap.widths,
                    "y": [v if math.isfinite(v) and v > 0 else None for v in values],
                    "marker": look | {"symbol": MARKERS[number].plotly, "size": 9},
                    "line": look | {"dash": DASHES[number].plotly},
                    "hovertemplate": "%{x:.4g}: %{y:.3g}",
                }
            )  # fmt: skip
    return {
        "data": traces,
        "layout": _layout({"title": {"text": "width"}, "type": "log"})
        | {"yaxis": {"title": {"text": "gap to the widest"}, "type": "log"}},
    }


def _layout(xaxis: dict[str, Any]) -> dict[str, Any]:
    return {
        "xaxis": xaxis,
        "margin": {"t": 24, "r": 12, "b": 56, "l": 72},
        "hovermode": "closest",
        "height": 440,
    }
