"""Quality against cost: what is drawn in a Pareto plot, before any plotting library is asked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparing.compare.results import Results, Row
from sparing.report import numerals
from sparing.report.rows import competitors, loss_of, trained_references, untouched_loss


@dataclass(frozen=True)
class Cost:
    """A resource that a method uses.

    Arguments:
        slug: names its file.
        heading: title of its axis.
        unit: of the axis; empty for a plain count.
        of: the amount that a row used, in the unit of the axis; None if not measured.
        text: the amount as written at ticks.
    """

    slug: str
    heading: str
    unit: str
    of: Callable[[Row], float | None]
    text: Callable[[float], str]

    @property
    def title(self) -> str:
        """Heading and unit."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading

    def amount(self, value: float) -> str:
        """A figure with its unit."""
        return f"{self.text(value)} {self.unit}".rstrip()


def _mebibytes(row: Row) -> float | None:
    return None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**20


COSTS = (
    Cost(
        "parameters",
        "trainable parameters",
        "",
        lambda row: row.trainable_parameters,
        numerals.compact,
    ),
    Cost("memory", "peak memory in training", "MiB", _mebibytes, numerals.significant),
    Cost("seconds", "time per step", "s", lambda row: row.seconds_per_step, numerals.significant),
)


@dataclass(frozen=True)
class Point:
    """One method in a Pareto plot."""

    row: Row
    cost: float
    loss: float
    std: float


def points(rows: Sequence[Row], cost: Cost) -> list[Point]:
    """Those of `rows` whose cost and loss are known."""
    found = []
    for row in rows:
        amount, loss = cost.of(row), loss_of(row)
        if amount is not None and loss is not None and math.isfinite(amount):
            found.append(Point(row, float(amount), loss, row.loss.std if row.loss else 0.0))
    return found


def front(candidates: Sequence[Point]) -> list[Point]:
    """The points that no other beats in one respect without losing in the other; cheapest first."""
    kept: list[Point] = []
    for point in sorted(candidates, key=lambda p: (p.cost, p.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def staircase(steps: Sequence[Point], right: float) -> tuple[list[float], list[float]]:
    """Corners of the line that bounds what the front reaches, up to a cost of `right`."""
    costs, losses = [], []
    for position, point in enumerate(steps):
        end = steps[position + 1].cost if position + 1 < len(steps) else right
        costs += [point.cost, end]
        losses += [point.loss, point.loss]
    return costs, losses


@dataclass(frozen=True)
class ReferenceLine:
    """A loss that every method is seen against.

    Arguments:
        name: "untouched", or as given on the command line.
        loss: validation loss, nats a token.
        row: of a trained reference.
    """

    name: str
    loss: float
    row: Row | None = None

    def text(self, cost: Cost) -> str:
        """The name and the loss, and what a trained reference costs."""
        amount = None if self.row is None else cost.of(self.row)
        price = "" if amount is None else f" (at {cost.amount(amount)})"
        return f"{self.name} {self.loss:.3f}{price}"


def reference_lines(results: Results) -> list[ReferenceLine]:
    """The untouched model, and full fine-tuning where it was run."""
    before = untouched_loss(results)
    lines = [] if before is None else [ReferenceLine("untouched", before)]
    for row in trained_references(results):
        loss = loss_of(row)
        assert loss is not None  # a trained reference has one
        lines.append(ReferenceLine(row.method, loss, row))
    return lines


def loss_window(results: Results) -> tuple[float, float]:
    """Lower and upper end of the loss axis.

    All methods with their spread are inside, and each reference that is hardly farther from them
    than they are from one another; a farther one would squeeze the methods into a line, so that
    it is written at the edge instead.
    """
    finished = competitors(results)
    spans = [(row.loss.mean, row.loss.std) for row in finished if row.loss]
    values = [mean + sign * std for mean, std in spans for sign in (-1, 1)]
    references = [line.loss for line in reference_lines(results)]
    if len(spans) < 2 or min(values) == max(values):
        values += references
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    reach = 1.2 * (high - low)
    inside = [value for value in references if low - reach <= value <= high + reach]
    low, high = min([low, *inside]), max([high, *inside])
    margin = 0.1 * (high - low) or 0.05
    return low - margin, high + margin


def cost_window(drawn: Sequence[Point], limit: float | None = None) -> tuple[float, float, bool]:
    """Both ends of a cost axis, and whether it is logarithmic (from a factor of twenty on).

    Arguments:
        drawn: points on it.
        limit: the budget, where the axis counts what the budget counts.
    """
    values = [point.cost for point in drawn] + ([] if limit is None else [limit])
    if not values:
        return 0.0, 1.0, False
    low, high = min(values), max(values)
    if low > 0 and high / low > 20:
        stretch = (high / low) ** 0.1
        return low / stretch, high * stretch, True
    margin = max(0.14 * (high - low), 0.02 * high) or 0.5
    return low - margin, high + margin, False


def nearby_references(results: Results, cost: Cost) -> list[Point]:
    """Trained references that cost at most half more than the dearest method does.

    Farther ones are a line only: full fine-tuning trains hundreds of times as many parameters,
    and would leave the methods no room.
    """
    dearest = max((point.cost for point in points(competitors(results), cost)), default=0.0)
    trained = points(trained_references(results), cost)
    return [point for point in trained if point.cost <= 1.5 * dearest]


def budget_limit(results: Results, cost: Cost) -> float | None:
    """The budget, if it is counted in what this axis shows."""
    if cost.slug != "parameters" or results.budget.get("unit") != "parameters":
        return None
    limit = results.budget.get("limit")
    return None if limit is None else float(limit)
