"""One list of columns, read by the terminal and by Markdown alike."""

from pathlib import Path

from _results import fake_results, hostile_results
from rich.console import Console

from sparing.compare.results import Results
from sparing.report import markdown_table, render_table
from sparing.report.table import COLUMNS, filled_columns, short_name


def printed(results: Results, width: int, *, fit: bool = False) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_table(results, width if fit else None))
    return console.export_text()


def cells(method: str) -> dict[str, str]:
    results = fake_results()
    row = next(row for row in results.rows if row.method == method)
    return {column.heading: column.text(row, results) for column in COLUMNS}


def test_every_cell_of_a_method() -> None:
    assert cells("lora") == {
        "method": "lora",
        "val loss": "2.9544 ± 0.0027",
        "perplexity": "19.19",
        "change": "−0.4477",
        "best lr": "3e-3",
        "trainable": "589,824",
        "of budget": "95.8 %",
        "adapter": "2.35 MiB",
        "peak memory": "1.80 GiB",
        "s/step": "0.413",
        "latency": "1.08×",
        "merged": "1.00×",
        "note": "4 % below the budget",
    }


def test_the_untouched_model_has_a_loss_and_no_change() -> None:
    untouched = cells("untouched")
    assert untouched["val loss"] == "3.4021"
    assert untouched["change"] == "—"
    assert untouched["note"] == "reference"


def test_full_fine_tuning_has_no_share_of_the_budget() -> None:
    assert cells("full")["of budget"] == "—"
    assert cells("full")["note"] == "reference; not held to the budget"


def test_a_failed_row_shows_its_error() -> None:
    failed = cells("sara")
    assert failed["val loss"] == "—"
    assert failed["note"] == "failed: OutOfMemoryError: tried to allocate 2.00 GiB"


def test_columns_without_any_figure_are_left_out() -> None:
    results = fake_results()
    rows = [row for row in results.rows if row.method == "hut"]
    headings = [c.heading for c in filled_columns(Results(**{**vars(results), "rows": rows}))]
    assert "merged" not in headings
    assert "note" not in headings


def test_the_terminal_shows_every_row() -> None:
    text = printed(fake_results(), 200)
    for row in fake_results().rows:
        assert row.method in text
    assert "tried to allocate 2.00 GiB" in text


def test_a_narrow_terminal_gets_what_matters_and_is_told_what_is_missing() -> None:
    text = printed(fake_results(), 80, fit=True)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "2.9205 ± 0.0038" in text
    assert "No room for:" in text
    assert "OutOfMemoryError" in text


def test_markdown_has_one_line_a_row_and_marks_the_lowest_loss() -> None:
    lines = markdown_table(fake_results()).splitlines()
    assert len(lines) == 2 + len(fake_results().rows)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[4].startswith("| **neuroada** | 2.9205 ± 0.0038 |")


def test_markdown_and_terminal_markup_of_users_is_text() -> None:
    text = markdown_table(hostile_results())
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\|\\`x\\`" in text
    assert "<script>" in printed(hostile_results(), 400)


def test_titles_name_files_and_not_their_folders() -> None:
    names = ["/data/run/model", "org/model", "smollm2-135m", "../text.jsonl", "a/b/c.txt", "."]
    assert [short_name(name) for name in names] == [
        *("model", "org/model", "smollm2-135m", "text.jsonl", "c.txt", "."),
    ]


def test_the_tables_survive_a_round_trip_through_json(tmp_path: Path) -> None:
    fake_results().save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert loaded == fake_results()
    assert markdown_table(loaded) == markdown_table(fake_results())
