"""The PNG files can be opened and show something."""

from dataclasses import replace
from pathlib import Path

import pytest
from _results import crowded_results, fake_results, hostile_results

from sparing.compare.results import Results
from sparing.errors import MissingExtraError
from sparing.report import _extras, write_figures
from sparing.report.canvas import DPI
from sparing.report.figures import pareto_figure
from sparing.report.pareto import COSTS

NAMES = {
    *("pareto_parameters.png", "pareto_memory.png", "pareto_seconds.png"),
    *("learning_curves.png", "overview.png"),
}


def all_failed() -> Results:
    results = fake_results()
    return replace(results, rows=[row for row in results.rows if row.status == "failed"])


@pytest.mark.parametrize(
    "results",
    [fake_results(), crowded_results(), hostile_results(seeds=1), all_failed()],
    ids=["three seeds", "crowded", "hostile with one seed", "all failed"],
)
def test_every_figure_opens_and_is_not_blank(results: Results, tmp_path: Path) -> None:
    from matplotlib.image import imread

    written = write_figures(results, tmp_path)
    assert {path.name for path in written} == NAMES == {path.name for path in tmp_path.iterdir()}
    for path in written:
        picture = imread(path)
        assert picture.shape[1] >= 1000
        assert picture[..., :3].min() < 0.5
        assert picture[..., :3].mean() > 0.7


def test_names_do_not_cover_one_another() -> None:
    figure = pareto_figure(fake_results(), COSTS[0])
    figure.savefig("/dev/null", format="png", dpi=DPI)
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text() != ""]
    assert {"mos", "neuroada", "hut", "lora (reference)"} <= {t.get_text() for t in axes.texts}
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert overlapping == []


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(_extras.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparing\[compare\]'"):
        _extras.require("matplotlib")
