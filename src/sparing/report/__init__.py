"""Tables, figures and pages from the saved results of a comparison, and from evidence."""

from pathlib import Path

from sparing.compare.results import Results
from sparing.report._extras import require
from sparing.report.figures import write_figures
from sparing.report.gallery import write_gallery
from sparing.report.html import write_html
from sparing.report.standing import Standing, standing
from sparing.report.table import markdown_table, render_table
from sparing.report.task_tables import Arrivals, write_forgetting, write_task_table

__all__ = [
    "Arrivals",
    "Standing",
    "markdown_table",
    "render_table",
    "standing",
    "write_figures",
    "write_forgetting",
    "write_gallery",
    "write_html",
    "write_report",
    "write_task_table",
]


def write_report(results: Results, folder: Path) -> Path:
    """Write the figures and `report.html` into `folder`; returns the path of the page.

    Raises:
        MissingExtraError: matplotlib or plotly is not installed; nothing was written.
        CheckpointError: the folder cannot be written.
    """
    for package in ("matplotlib", "plotly"):
        require(package)
    write_figures(results, folder)
    return write_html(results, folder / "report.html")
