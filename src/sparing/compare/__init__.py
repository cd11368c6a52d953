"""The main job: many methods, one model, one budget -> a table, plots and saved results."""

from sparing.compare.comparison import compare
from sparing.compare.results import Results, Row
from sparing.compare.settings import Settings

__all__ = ["Results", "Row", "Settings", "compare"]
