"""Pictures of merging."""

import math
from pathlib import Path

import pytest

from sparing.report import Arrivals, write_forgetting, write_task_table
from sparing.report.task_tables import forgetting_figure, task_table_figure

TASKS = ["a", "$b$", "c"]
VALUES = {"base": [1.0, 2.0, 3.0], "merged": [0.5, math.nan, 2.5]}

ORDERS = {
    "one way": Arrivals(["a", "$b$"], [[1.0], [0.9, 0.8]]),
    "other": Arrivals(["$b$", "a"], [[0.7], [0.6, 1.0]]),
}


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_better_a_cell_the_darker(higher_is_better: bool) -> None:
    figure = task_table_figure(VALUES, TASKS, "title", higher_is_better=higher_is_better)
    image = figure.axes[0].images[0]
    shades = image.cmap(image.norm([0.5, 1.0, 2.0, 3.0]))[:, 0].tolist()  # red falls towards blue
    assert shades == sorted(shades, reverse=higher_is_better)


def test_every_cell_says_its_number_and_the_last_is_the_mean() -> None:
    figure = task_table_figure(VALUES, TASKS, "title", higher_is_better=False)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["1.00", "2.00", "3.00", "2.00", "0.50", "–", "2.50", "–"]
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["a", r"\$b\$", "c", "mean"]


def test_a_task_looks_the_same_in_every_order() -> None:
    figure = forgetting_figure(ORDERS, "title", "accuracy")
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker()) for line in axes.lines}
        for axes in figure.axes
    ]
    assert looks[0] == looks[1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[1].lines}
    assert lines["a"] == [[2.0, 1.0]]
    assert lines[r"\$b\$"] == [[1.0, 0.7], [2.0, 0.6]]
    assert lines["mean of those there"] == [[1.0, 0.7], [2.0, 0.8]]


def test_files_are_written(tmp_path: Path) -> None:
    write_task_table(tmp_path / "table.png", VALUES, TASKS, "title", higher_is_better=True)
    write_forgetting(tmp_path / "curves.png", ORDERS, "title", "accuracy")
    for name in ("table.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
