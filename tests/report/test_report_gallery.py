"""Evidence becomes a page and a chapter that show checks, controls and verdicts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sparing.checkpoint import write_json
from sparing.errors import CheckpointError
from sparing.report import write_gallery
from sparing.report.gallery import Bar, bar, duration, figure_text, read_exhibits
from sparing.reproduce import Check


def record(slug: str, **changes: Any) -> dict[str, Any]:
    return {
        "slug": slug,
        "seeds": [0, 1],
        "claim": {"text": "Better <b>than</b> LoRA.", "number": "8x", "source": "table 2"},
        "measured": {"loss": [0.25, 0.75], "steps": 12_000},
        "checks": [
            asdict(Check.below("loss < 0.6", 0.5, 0.6)),
            asdict(Check.above("gain > 0.2 | all", 0.1, 0.2)),
        ],
        "controls": [asdict(Check.above("a fake is worse", 0.9, 0.6))],
        "verdict": "holds in direction",
        "notes": "Small <script>alert(1)</script>.",
        "seconds": 200.4,
        "environment": {"device": "made-up CPU"},
    } | changes


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    folder = tmp_path / "evidence"
    for slug in ("sara", "mos", "a-stranger"):
        write_json(folder / f"{slug}.json", record(slug))
    return folder


def test_records_come_in_catalog_order(evidence: Path) -> None:
    assert [exhibit.slug for exhibit in read_exhibits(evidence)] == ["mos", "sara", "a-stranger"]


def test_page_and_chapter_show_what_was_found(evidence: Path, tmp_path: Path) -> None:
    page, chapter = write_gallery(evidence, tmp_path / "docs")
    assert page == tmp_path / "docs" / "evidence.html"
    html, markdown = page.read_text(encoding="utf-8"), chapter.read_text(encoding="utf-8")
    for expected in (
        "holds in direction",
        "2410.00938",
        "made-up CPU",
        "✓",
        "✗",
        "a fake is worse",
    ):
        assert expected in html
        assert expected in markdown
    assert "0.5000 ± 0.3536 (0.2500, 0.7500)" in html
    assert "| [mos](#mos) | holds in direction | 1 of 2 | 1 of 1 |" in markdown
    assert "| ✗ | gain &gt; 0.2 \\| all | 0.100 | 0.200 |" in markdown


def test_the_gallery_is_safe_and_self_contained(evidence: Path, tmp_path: Path) -> None:
    page, chapter = write_gallery(evidence, tmp_path)
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert "<script" not in html
    assert "<script" not in chapter.read_text(encoding="utf-8")
    assert "src=" not in html
    assert "<link" not in html


def test_no_evidence_yet(tmp_path: Path) -> None:
    for path in write_gallery(tmp_path / "nothing", tmp_path):
        assert "No reproduction has been run yet." in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["slug", "claim", "checks", "verdict"])
def test_a_damaged_record_is_named(evidence: Path, damage: str) -> None:
    content = record("mos")
    del content[damage]
    write_json(evidence / "mos.json", content)
    with pytest.raises(CheckpointError, match=r"mos\.json: expected the record"):
        read_exhibits(evidence)


def test_bars_need_figures_of_one_sign() -> None:
    assert bar(Check.below("", 0.5, 1.0)) == Bar(46.0, 92.0)
    assert bar(Check.above("", -0.5, 0.0)) is None
    assert bar(Check.above("", float("nan"), 1.0)) is None


def test_figures_and_durations_are_readable() -> None:
    assert figure_text(12_288) == "12,288"
    assert figure_text(0.123456) == "0.1235"
    assert figure_text(["a", 1]) == "a, 1"
    assert figure_text(True) == "yes"
    assert [duration(s) for s in (41.2, 200.4, 7500)] == ["41 s", "3 min 20 s", "2 h 5 min"]
