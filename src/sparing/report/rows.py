"""Which row is what: references, competitors, failures, and their order."""

import math

from sparing.compare.results import Results, Row


def is_untouched(row: Row) -> bool:
    """Whether this is the model as it came."""
    return row.status == "reference" and row.learning_rate is None


def is_lora(row: Row) -> bool:
    """Whether this is LoRA, with or without options: what all others are compared with."""
    return row.status == "ok" and row.method.partition("{")[0].strip() == "lora"


def loss_of(row: Row) -> float | None:
    """Mean validation loss; of the untouched model, its only one. None without a finite figure."""
    if row.loss is not None:
        value: float | None = row.loss.mean
    else:
        value = row.loss_before if is_untouched(row) else None
    return value if value is not None and math.isfinite(value) else None


def untouched_loss(results: Results) -> float | None:
    """Validation loss before training."""
    of_reference = [loss_of(row) for row in results.rows if is_untouched(row)]
    of_others = [row.loss_before for row in results.rows]
    known = [loss for loss in of_reference + of_others if loss is not None and math.isfinite(loss)]
    return known[0] if known else None


def competitors(results: Results) -> list[Row]:
    """Methods that finished with a finite loss, best first."""
    finished = [(loss_of(row), row) for row in results.rows if row.status == "ok"]
    with_loss = [(loss, row) for loss, row in finished if loss is not None]
    return [row for _, row in sorted(with_loss, key=lambda pair: pair[0])]


def trained_references(results: Results) -> list[Row]:
    """Full fine-tuning, where it was run."""
    return [
        row
        for row in results.rows
        if row.status == "reference" and not is_untouched(row) and loss_of(row) is not None
    ]


def failures(results: Results) -> list[Row]:
    """Rows with an error in place of figures."""
    return [row for row in results.rows if row.status == "failed"]


def in_order(results: Results) -> list[Row]:
    """All rows: references, then methods by loss, then those without one."""
    references = [row for row in results.rows if row.status == "reference"]
    finished = competitors(results)
    rest = [row for row in results.rows if row not in references and row not in finished]
    return references + finished + sorted(rest, key=lambda row: row.status == "failed")


def num_seeds(results: Results) -> int:
    """Seeds behind each reported loss: the fewest of any competitor."""
    return min((len(row.loss.values) for row in competitors(results) if row.loss), default=0)


def on_grid_edge(row: Row) -> bool:
    """Whether the best learning rate is the smallest or largest of those tried."""
    rate = row.learning_rate
    return rate is not None and bool(rate.grid) and rate.best in (min(rate.grid), max(rate.grid))
