"""`sparing check`: do the matrices of two trained models have the same gain?"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparing.errors import ConfigError

if TYPE_CHECKING:
    from sparing.scale.spectra import Comparison, Spectra

Two = tuple[float, float]
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")


def check(
    first: Annotated[Path, typer.Argument(help="Folder of a trained model, such as the proxy.")],
    second: Annotated[
        Path | None,
        typer.Argument(help="Folder of one of another width; none to look at one model alone."),
    ] = None,
    lr: Annotated[
        Two | None, typer.Option(help="Peak learning rates of the matrices, first and second.")
    ] = None,
    weight_decay: Annotated[
        Two | None, typer.Option(help="Weight decays of the matrices, first and second.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="Text to measure gains on, or none for singular values alone.")
    ] = "python-topics",
    band: Annotated[
        Two | None,
        typer.Option(help="One model alone: smallest and largest reduced norm ‖W‖/√(out/in)."),
    ] = None,
    every: Annotated[bool, typer.Option("--every", help="A row for every matrix.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write all figures, as JSON.")] = None,
) -> None:
    """Compare largest singular values and branch gains of two widths; with rates, fit p.

    Hyperparameters scaled well leave both the same. If they differ, the exponent of weight decay
    that mends it is fitted from the rates and decays of both runs. With one folder, the reduced
    norms of its matrices are shown: what Muon++ keeps inside a band at every width.
    """
    if second is None:
        from sparing.cli_band import show_band

        _only_for_two(lr=lr, weight_decay=weight_decay)
        show_band(first, band, out)
        return
    if band is not None:
        raise ConfigError(
            "--band", expected="one folder", found="two", mend="Check each of them alone."
        )
    from sparing.checkpoint import write_json
    from sparing.cli import _quiet_libraries, console

    if (lr is None) != (weight_decay is None):
        raise ConfigError(
            "--lr and --weight-decay",
            expected="both or none",
            found="one of the two",
            mend="The fit needs η/λ of both runs.",
        )
    _quiet_libraries()
    from sparing.progress import progress_line
    from sparing.scale.spectra import compare_spectra, measure_checkpoint

    with progress_line(console) as bar:
        task = bar.add_task("largest singular values", total=None)

        def measured(path: Path, number: int) -> "Spectra":
            return measure_checkpoint(
                path,
                lr=None if lr is None else lr[number],
                weight_decay=None if weight_decay is None else weight_decay[number],
                advance=lambda name: bar.update(task, description=name),
            )

        runs = measured(first, 0), measured(second, 1)
        comparison = compare_spectra(*runs)
        bar.update(task, description="gains")
        gains, reason = _gains((first, second), data)
    console.print(_table(comparison, every))
    if gains:
        console.print(_gain_table(*gains))
    elif reason:
        console.print(f"no gains: {reason}", soft_wrap=True, highlight=False)
    lines, fit = _verdict(comparison, runs)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    if out is not None:
        write_json(out, _record(comparison, gains, lines, fit))
        console.print(f"figures: {out}", soft_wrap=True, highlight=False)


def _only_for_two(**options: Two | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}",
                expected="a second folder to compare with",
                found="one folder",
                mend="Give both, or leave it out.",
            )


def _gains(paths: tuple[Path, Path], data: str) -> tuple[list[dict[str, float]], str]:
    from sparing.scale.gains import checkpoint_gains

    if data == "none":
        return [], ""
    try:
        return [checkpoint_gains(path, data) for path in paths], ""
    except ConfigError as error:  # no language model: singular values are worth showing alone
        return [], str(error)


def _table(comparison: "Comparison", every: bool) -> Any:
    from rich.table import Table

    table = Table("matrix", "first", "second", "σ₁ first", "σ₁ second", "ratio")
    groups: dict[str, list[Any]] = {}
    for pair in comparison.rows:
        name = pair[0].name if every else _NUMBERS.sub("*", pair[0].name).split("[")[0]
        groups.setdefault(name, []).append(pair)
    for name, pairs in groups.items():
        ratios = [b.sigma / a.sigma if a.sigma else float("nan") for a, b in pairs]
        spread = f"{min(ratios):.3g}"
        if f"{max(ratios):.3g}" != spread:
            spread += f" to {max(ratios):.3g}"
        sizes = [f"{m.outputs}×{m.inputs}" for m in pairs[0]]
        means = [f"{sum(pair[i].sigma for pair in pairs) / len(pairs):.4g}" for i in (0, 1)]
        table.add_row(name, *sizes, *means, spread)
    return table


def _gain_table(first: dict[str, float], second: dict[str, float]) -> Any:
    from rich.table import Table

    table = Table("branch", "gain first", "gain second", "ratio")
    for name in first:
        if name in second:
            ratio = f"{second[name] / first[name]:.3g}"
            table.add_row(name, f"{first[name]:.4g}", f"{second[name]:.4g}", ratio)
    return table


def _verdict(comparison: "Comparison", runs: tuple["Spectra", "Spectra"]) -> tuple[list[str], Any]:
    from math import exp

    from sparing.scale.spectra import fit_width_exponent

    slope = comparison.slope
    if slope is None:
        found = f"σ₁ of the second is {exp(comparison.mean_log_ratio):.3g} times that of the first"
    else:
        found = f"σ₁ follows width^{slope:+.3f}"
    word = "matched" if comparison.matched else "not matched"
    lines = [f"{found}, a mean over {len(comparison.rows)} matrices: {word} (limit ±0.15)"]
    if comparison.unmatched:
        lines.append(f"{len(comparison.unmatched)} matrices are in only one of the two")
    if runs[0].scale is None:
        if not comparison.matched:
            lines.append("give --lr and --weight-decay of both runs to fit the exponent of decay")
        return lines, None
    lines += [_settled(run, place) for run, place in zip(runs, ("first", "second"), strict=True)]
    if slope is None:
        return lines, None
    fit = fit_width_exponent(runs)
    p = fit.decay_exponent()
    lines.append(
        f"at fixed η/λ, σ₁ ∝ width^{fit.exponent:.3f} ± {fit.error:.3f}: with η ∝ 1/width, weight"
        f" decay ∝ width^{p:.3f} keeps it"
    )
    return lines, fit


def _settled(run: "Spectra", place: str) -> str:
    from statistics import median

    from sparing.scale.decay import SteadyState

    assert run.lr is not None
    assert run.weight_decay is not None
    state = SteadyState(run.lr, run.weight_decay)
    share = median(row.rms for row in run.matrices) / state.rms
    text = f"{place}: entries have {share:.2f} of the steady state's RMS"
    return text if 0.6 <= share <= 1.4 else f"{text}; it is not stationary, so a fit says little"


def _record(
    comparison: "Comparison", gains: list[dict[str, float]], lines: list[str], fit: Any
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "matched": comparison.matched,
        "slope": comparison.slope,
        "verdict": lines,
        "matrices": [{"first": asdict(a), "second": asdict(b)} for a, b in comparison.rows],
        "unmatched": list(comparison.unmatched),
        "gains": gains,
        "fit": None if fit is None else asdict(fit),
    }
