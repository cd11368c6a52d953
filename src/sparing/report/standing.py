"""Who leads, in a sentence that claims no more than the runs show."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparing.compare.results import Results, Row, Summary
from sparing.report import numerals
from sparing.report.rows import (
    competitors,
    failures,
    is_lora,
    num_seeds,
    on_grid_edge,
    untouched_loss,
)


@dataclass(frozen=True)
class Standing:
    """The outcome of a comparison in words.

    Arguments:
        headline: who has the lowest loss, and whether that is a clear lead.
        caveats: what limits the headline; may be empty.
        clear: whether one method leads all others by more than the spread over its seeds.
    """

    headline: str
    caveats: list[str]
    clear: bool

    def __str__(self) -> str:
        return " ".join([self.headline, *self.caveats])


def standing(results: Results) -> Standing:
    """State the winner.

    Two methods count as apart when their means differ by more than the larger of their two
    standard deviations over seeds. With one seed there is no such figure, and the caveats say so.
    """
    finished = competitors(results)
    if not finished:
        return Standing("No method finished with a loss.", _failures(results), clear=False)
    best = finished[0]
    tied = [row for row in finished[1:] if within_spread(best, row)]
    caveats = [*_seeds(results), *_edges(finished), *_failures(results)]
    before = untouched_loss(results)
    improves = before is None or _summary(best).mean < before
    return Standing(
        _headline(results, best, finished, tied),
        caveats,
        clear=improves and not tied and num_seeds(results) > 1,
    )


def within_spread(first: Row, second: Row) -> bool:
    """Whether two means are within one standard deviation, the larger of the two."""
    a, b = _summary(first), _summary(second)
    if min(len(a.values), len(b.values)) < 2:
        return False
    return abs(a.mean - b.mean) <= max(a.std, b.std)


def _headline(results: Results, best: Row, finished: list[Row], tied: list[Row]) -> str:
    summary, before = _summary(best), untouched_loss(results)
    figure = (
        f"{numerals.loss_summary(summary)} nats a token, "
        f"perplexity {numerals.perplexity(numerals.perplexity_of(summary.mean))}"
    )
    if before is not None and summary.mean >= before:
        return (
            f"No method improves on the untouched model ({numerals.loss(before)}): "
            f"the lowest loss after training is that of {best.method} ({figure})."
        )
    if len(finished) == 1:
        return f"{best.method} is the only method that finished: {figure}{_gains(best, before)}."
    if tied:
        names = phrase([row.method for row in tied])
        verb = "is" if len(tied) == 1 else "are"
        return (
            f"No single winner: {best.method} has the lowest mean validation loss ({figure}), "
            f"but {names} {verb} within one standard deviation of it, so their order may be chance."
        )
    lora = next((row for row in finished if is_lora(row) and row is not best), None)
    return (
        f"{best.method} has the lowest validation loss of {len(finished)} methods within the "
        f"budget: {figure}{_gains(best, before, lora)}."
    )


def _gains(best: Row, before: float | None, lora: Row | None = None) -> str:
    gains = []
    if before is not None:
        gains.append(f"{numerals.loss(before - _summary(best).mean)} below the untouched model")
    if lora is not None:
        gains.append(f"{numerals.loss(_summary(lora).mean - _summary(best).mean)} below LoRA")
    return f", {phrase(gains)}" if gains else ""


def _seeds(results: Results) -> list[str]:
    seeds = num_seeds(results)
    if seeds == 1:
        return ["One seed was run, so no spread is known: another seed may change the order."]
    if seeds == 2:
        return ["A standard deviation from two seeds is itself uncertain."]
    return []


def _edges(finished: list[Row]) -> list[str]:
    names = [row.method for row in finished if on_grid_edge(row)]
    if not names:
        return []
    return [
        f"The best learning rate of {phrase(names)} is on the edge of the grid: a wider grid may "
        "find a lower loss."
    ]


def _failures(results: Results) -> list[str]:
    names = [row.method for row in failures(results)]
    return [f"Failed and left out of the ranking: {phrase(names)}."] if names else []


def _summary(row: Row) -> Summary:
    assert row.loss is not None  # competitors have one
    return row.loss


def phrase(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
