"""The page is complete, safe and needs no network."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from _results import fake_results, fake_row, hostile_results
from plotly.offline import get_plotlyjs

from sparing.report import write_report
from sparing.report.html import html_page
from sparing.report.interactive import curves_spec, pareto_spec


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in {"script", "style"} else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif not self._inside:
            self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


@pytest.fixture(scope="module")
def page() -> str:
    return html_page(fake_results())


def test_every_row_appears_and_failures_with_their_error(page: str) -> None:
    text = read(page).text
    for row in fake_results().rows:
        assert row.method in text
    assert "OutOfMemoryError: tried to allocate 2.00 GiB" in text


def test_the_page_says_who_won_and_how_sure_that_is(page: str) -> None:
    assert "No single winner: neuroada has the lowest mean" in read(page).text


def test_learning_rate_on_the_edge_is_a_warning(page: str) -> None:
    assert page.count("on the edge of the grid: try a wider one") == 1


def test_settings_environment_and_snippet_are_there(page: str) -> None:
    text = read(page).text
    for expected in (
        "cosine, 5 % warm-up",
        "made-up CPU, 2 threads",
        'PeftModel.from_pretrained(base, run / "adapters/neuroada")',
        'base = sparing.pretrained.load("SmolLM2-135M").model',
        "per_neuron = 3",
    ):
        assert expected in text


def test_only_adapters_are_offered_as_adapters(page: str) -> None:
    assert "adapters/mos" in page
    assert "adapters/full" not in page


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    for tag, attributes in read(page).tags:
        assert "src" not in attributes, tag
        assert tag not in {"link", "iframe", "img", "object", "embed", "form", "base"}
        assert "href" not in attributes
    ours = page.replace(get_plotlyjs(), "")
    assert "http://" not in ours
    assert "https://" not in ours
    assert not re.search(r"@import|url\(", ours)
    assert "default-src 'none'" in ours


def test_plotly_is_there_once_and_does_not_offer_to_upload(page: str) -> None:
    assert page.count(get_plotlyjs()) == 1
    assert "showSendToCloud: false" in page


def test_the_table_sorts(page: str) -> None:
    reader = read(page)
    assert any("function sortBy(table, column, ascending)" in script for script in reader.scripts)
    assert ("table", {"class": "sortable"}) in reader.tags
    keys = [a["data-key"] for tag, a in reader.tags if tag in {"td", "th"} and "data-key" in a]
    lora = next(row.loss for row in fake_results().rows if row.method == "lora")
    assert lora is not None
    assert repr(lora.mean) in keys
    assert "" in keys


def test_light_and_dark(page: str) -> None:
    assert "@media (prefers-color-scheme: dark)" in page


def test_texts_of_users_stay_texts() -> None:
    page = html_page(hostile_results()).replace(get_plotlyjs(), "")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    tags = [tag for tag, _ in read(page).tags]
    assert tags.count("script") == 4  # two figures, plotly.js and ours


def test_the_figures_are_valid_json_and_hold_every_method(page: str) -> None:
    figures = [json.loads(text) for text in read(page).scripts if text.startswith("{")]
    assert figures == [pareto_spec(fake_results()), curves_spec(fake_results())]
    names = {trace["name"] for trace in figures[0]["data"]}
    assert {"mos", "neuroada", "hut", "lora (reference)", "non-dominated"} <= names


def test_a_diverged_curve_is_a_gap() -> None:
    row = fake_row("mos", [2.9], curve=[[3.0, float("nan"), 2.9]])
    spec = curves_spec(replace(fake_results(), rows=[row]))
    assert spec["data"][0]["y"] == [3.0, None, 2.9]
    json.dumps(spec, allow_nan=False)


def test_hover_texts_cannot_call_plotly_templates() -> None:
    row = fake_row('peft:vera{"r":256}%{y}', [2.9])
    spec = pareto_spec(replace(fake_results(), rows=[row]))
    hover = next(t["hovertemplate"] for t in spec["data"] if t["mode"] == "markers")
    assert "{" not in hover


def test_the_whole_report_is_written(tmp_path: Path) -> None:
    written = write_report(fake_results(), tmp_path / "run")
    assert written == tmp_path / "run" / "report.html"
    assert written.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert len(list((tmp_path / "run").glob("*.png"))) == 5
