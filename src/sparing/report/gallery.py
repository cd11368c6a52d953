"""The evidence of all reproductions on one page, and as a chapter of the documentation."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.catalog import CATALOG
from sparing.checkpoint import atomic_path, read_json
from sparing.errors import CheckpointError
from sparing.report import numerals
from sparing.report._template import render
from sparing.report.table import markdown_escape

if TYPE_CHECKING:
    from sparing.reproduce import Check, Claim, Evidence

_BADGES = {
    "holds": "holds",
    "holds in direction": "direction",
    "does not hold at this scale": "not",
    "not measurable here": "unmeasured",
}


@dataclass(frozen=True)
class Exhibit:
    """One method's record.

    Arguments:
        slug: of the method.
        title: of its paper; the slug where the catalog does not know it.
        paper: address of the paper; empty if not known.
        seeds: that the experiment was run with.
        claim: of the paper.
        evidence: what was found.
    """

    slug: str
    title: str
    paper: str
    seeds: list[int]
    claim: Claim
    evidence: Evidence

    @property
    def badge(self) -> str:
        """Style of the verdict."""
        return _BADGES.get(self.evidence.verdict, "unmeasured")


@dataclass(frozen=True)
class Bar:
    """A measured figure beside its threshold, both as a percentage of the plot's width."""

    measured: float
    threshold: float


def write_gallery(evidence_folder: Path, out_folder: Path) -> list[Path]:
    """Write `evidence.html` and `evidence.md` from all records of a folder.

    Raises:
        CheckpointError: a record is damaged, or the folder cannot be written.
    """
    exhibits = read_exhibits(evidence_folder)
    pages = {"evidence.html": gallery_html(exhibits), "evidence.md": gallery_markdown(exhibits)}
    for name, text in pages.items():
        with atomic_path(out_folder / name) as fresh:
            fresh.write_text(text, encoding="utf-8")
    return [out_folder / name for name in pages]


def read_exhibits(folder: Path) -> list[Exhibit]:
    """All records, in the order of the catalog; those that it does not know come last.

    Raises:
        CheckpointError: a file is not the record of a reproduction.
    """
    order = {method.slug: position for position, method in enumerate(CATALOG)}
    exhibits = [_exhibit(path) for path in sorted(folder.glob("*.json"))]
    return sorted(exhibits, key=lambda exhibit: order.get(exhibit.slug, len(order)))


def gallery_html(exhibits: list[Exhibit]) -> str:
    """The page, which works without any network."""
    return render(
        "evidence.html.j2",
        exhibits=exhibits,
        counts=_counts(exhibits),
        badges=_BADGES,
        bar=bar,
        number=numerals.significant,
        figure=figure_text,
        duration=duration,
        plain=numerals.plain,
    )


def gallery_markdown(exhibits: list[Exhibit]) -> str:
    """The chapter, in GitHub's Markdown."""
    lines = [
        "# Evidence",
        "",
        "What each paper claims, and what a small experiment of ours found. Thresholds were "
        "declared before the run; a control must hold for the experiment to mean anything. "
        "Written by `sparing.report.write_gallery`; do not edit.",
        "",
    ]
    if not exhibits:
        return "\n".join([*lines, "No reproduction has been run yet."]) + "\n"
    lines += ["| method | verdict | checks | controls |", "| :--- | :--- | ---: | ---: |"]
    for exhibit in exhibits:
        evidence = exhibit.evidence
        lines.append(
            f"| [{exhibit.slug}](#{exhibit.slug}) | {evidence.verdict} | "
            f"{_held(evidence.checks)} | {_held(evidence.controls)} |"
        )
    for exhibit in exhibits:
        lines += ["", *_markdown_exhibit(exhibit)]
    return "\n".join(lines) + "\n"


def bar(check: Check) -> Bar | None:
    """The plot of a check; none where figures of both signs, or nan, have no common length."""
    values = (check.measured, check.threshold)
    if not all(math.isfinite(value) and value >= 0 for value in values) or max(values) == 0:
        return None
    scale = 92 / max(values)
    return Bar(round(check.measured * scale, 2), round(check.threshold * scale, 2))


def figure_text(value: Any) -> str:
    """A measured figure; of one value a seed, mean ± standard deviation and the values."""
    if isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
        return numerals.plain(value)
    if isinstance(value, int | float):
        return _four_digits(value)
    numbers = [v for v in value if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(value) or len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return ", ".join(figure_text(item) for item in value)
    mean, spread = statistics.fmean(numbers), statistics.stdev(numbers)
    each = ", ".join(_four_digits(number) for number in numbers)
    return f"{_four_digits(mean)} ± {_four_digits(spread)} ({each})"


def duration(seconds: float) -> str:
    """41 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{minutes} min {rest} s" if hours == 0 else f"{hours} h {minutes_left} min"


def _exhibit(path: Path) -> Exhibit:
    from sparing.reproduce import Check, Claim, Evidence

    record = read_json(path)
    try:
        known = {field.name for field in fields(Evidence)}
        found = {name: value for name, value in record.items() if name in known}
        for name in ("checks", "controls"):
            found[name] = [Check(**check) for check in found[name]]
        slug = record["slug"]
        method = next((method for method in CATALOG if method.slug == slug), None)
        return Exhibit(
            slug=slug,
            title=method.title if method else slug,
            paper=method.paper if method else "",
            seeds=record["seeds"],
            claim=Claim(**record["claim"]),
            evidence=Evidence(**found),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            str(path),
            expected="the record of a reproduction",
            found=f"{type(error).__name__}: {error}",
            mend="Run the reproduction again, or move the file elsewhere.",
        ) from error


def _counts(exhibits: list[Exhibit]) -> dict[str, int]:
    """How many methods got each verdict."""
    verdicts = [exhibit.evidence.verdict for exhibit in exhibits]
    return {verdict: verdicts.count(verdict) for verdict in _BADGES if verdict in verdicts}


def _held(checks: list[Check]) -> str:
    return f"{sum(check.holds for check in checks)} of {len(checks)}"


def _four_digits(value: int | float) -> str:
    return numerals.count(value) if isinstance(value, int) else numerals.significant(value, 4)


def _markdown_exhibit(exhibit: Exhibit) -> list[str]:
    claim, evidence, text = exhibit.claim, exhibit.evidence, markdown_escape
    paper = f"[{text(exhibit.title)}]({exhibit.paper})" if exhibit.paper else text(exhibit.title)
    lines = [
        f"## {exhibit.slug}",
        "",
        f"{paper}",
        "",
        f"**Claim.** {text(claim.text)} The paper's figure: {text(claim.number)} "
        f"({text(claim.source)}).",
        "",
        f"**Verdict: {text(evidence.verdict)}**",
        "",
        "| | statement | measured | threshold |",
        "| :--- | :--- | ---: | ---: |",
    ]
    lines += [_markdown_check(check, "") for check in evidence.checks]
    lines += [_markdown_check(check, "control: ") for check in evidence.controls]
    if evidence.notes:
        lines += ["", text(evidence.notes)]
    seeds = ", ".join(str(seed) for seed in exhibit.seeds)
    device = evidence.environment.get("device", "a machine that was not recorded")
    return [*lines, "", f"Seeds {seeds}; {duration(evidence.seconds)} on {text(device)}."]


def _markdown_check(check: Check, prefix: str) -> str:
    mark = "✓" if check.holds else "✗"
    return (
        f"| {mark} | {prefix}{markdown_escape(check.statement)} | "
        f"{numerals.significant(check.measured)} | {numerals.significant(check.threshold)} |"
    )
