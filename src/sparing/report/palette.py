"""One look for each method, the same in every figure.

Colours are Okabe and Ito's, without black and yellow, and four muted ones of Paul Tol's; all can
be told apart with the common kinds of colour blindness, and seen on white as on dark grey. Marker
and dash differ as well, so that no figure depends on colour alone. References are grey.
"""

from dataclasses import dataclass

from sparing.compare.results import Results
from sparing.report.rows import is_lora

GREY = "#7a828e"
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#aa4499", "#999933", "#cc6677", "#44aa99"),
)
ACCENT = COLOURS[0]  # the dark end of heat maps


@dataclass(frozen=True)
class Marker:
    """The same shape in two languages."""

    matplotlib: str
    plotly: str


@dataclass(frozen=True)
class Dash:
    """The same line pattern in two languages."""

    matplotlib: str
    plotly: str


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: Marker
    dash: Dash


MARKERS = (
    *(Marker("o", "circle"), Marker("s", "square"), Marker("^", "triangle-up")),
    *(
        Marker("v", "triangle-down"),
        Marker("P", "cross"),
        Marker("X", "x"),
        Marker("p", "pentagon"),
    ),
)
DASHES = (Dash("-", "solid"), Dash("--", "dash"), Dash("-.", "dashdot"))
LORA = Look(GREY, Marker("*", "star"), Dash("--", "dash"))
REFERENCE = Look(GREY, Marker("D", "diamond"), Dash("-.", "dashdot"))


def looks(results: Results) -> dict[str, Look]:
    """The look of every method by its name; colours follow the order of the rows."""
    chosen: dict[str, Look] = {}
    position = 0
    for row in results.rows:
        if row.status == "reference":
            chosen[row.method] = REFERENCE
        elif is_lora(row):
            chosen[row.method] = LORA
        elif row.method not in chosen:
            chosen[row.method] = Look(
                COLOURS[position % len(COLOURS)],
                MARKERS[position % len(MARKERS)],
                DASHES[position // len(COLOURS) % len(DASHES)],
            )
            position += 1
    return chosen
