"""What is true of the merge methods, on tensors in memory."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparing.errors import ConfigError
from sparing.merge import METHODS
from sparing.merge.dare import drop_and_rescale
from sparing.merge.memory import InMemory
from sparing.merge.method import Method
from sparing.merge.selection import order_keys, order_statistics
from sparing.merge.ties import merge_agreeing
from sparing.merge.view import Block, View

BLOCKWISE = [slug for slug, method in METHODS.items() if isinstance(method, Method)]
WEIGHT_ONE = {
    "average": {"weights": 3.0},
    "task-arithmetic": {"scale": 1.0},
    "ties": {"density": 1.0},
    "dare": {"drop": 0.0},
    "pcb-merging": {"ratio": 1.0},
}
SYMMETRIC: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("task-arithmetic", {"scale": 0.3}),
    ("ties", {}),
    ("ties", {"scope": "tensor"}),
    ("dare", {"drop": 0.0, "elect": True}),
    ("pcb-merging", {}),
    ("pcb-merging", {"variant": "vision_es"}),
    ("pcb-merging", {"scope": "tensor", "clip_q": 0.05}),
]


def models(count: int, seed: int = 0, scale: float = 0.1) -> list[dict[str, Tensor]]:
    """A base and fine-tunes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = {"a": noise(7, 9), "b": noise(11)}
    tuned = [{n: t + scale * noise(*t.shape) for n, t in base.items()} for _ in range(count)]
    return [base, *tuned]


def run(
    base: dict[str, Tensor],
    experts: Sequence[dict[str, Tensor]],
    method: str,
    options: dict[str, Any],
    block_size: int | None = None,
) -> dict[str, Tensor]:
    chosen = METHODS[method].options.of(method, options)
    chosen.check(len(experts))
    together = InMemory(base, experts, block_size)
    view = together.view
    survey = METHODS[method].survey
    known = survey(view, chosen) if survey else None

    def update(name: str) -> Tensor:
        found = [
            METHODS[method].update(view.read(block)[1], chosen, known, block)
            for start in range(0, view.sizes[name], view.block_size)
            for block in [Block(name, start, min(start + view.block_size, view.sizes[name]))]
        ]
        return torch.cat(found)

    return together.with_update(update)


@pytest.mark.filterwarnings("ignore:PCB of a single")
@pytest.mark.parametrize("method", BLOCKWISE)
def test_one_expert_at_weight_one_is_returned(method: str) -> None:
    base, expert = models(1)
    merged = run(base, [expert], method, WEIGHT_ONE[method])
    assert all(torch.equal(merged[name], expert[name]) for name in base)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("average", {}),
        ("task-arithmetic", {"scale": 1 / 3}),
        ("ties", {"density": 1.0}),
        ("dare", {"drop": 0.0, "elect": True}),
        ("pcb-merging", {"ratio": 1.0}),
    ],
)
def test_identical_experts_merge_to_themselves(method: str, options: dict[str, Any]) -> None:
    base, expert = models(1)
    merged = run(base, [expert] * 3, method, options)
    assert all(torch.allclose(merged[n], expert[n], rtol=0, atol=1e-6) for n in base)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SYMMETRIC), st.permutations(range(4)), st.integers(0, 99))
def test_the_order_of_experts_changes_nothing(
    case: tuple[str, dict[str, Any]], order: list[int], seed: int
) -> None:
    base, *experts = models(4, seed)
    first = run(base, experts, *case)
    second = run(base, [experts[i] for i in order], *case)
    assert all(torch.allclose(first[n], second[n], rtol=0, atol=1e-6) for n in base)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([*SYMMETRIC, ("dare", {"drop": 0.5}), ("pcb-merging", {"dare_drop": 0.3})]),
    st.integers(1, 40),
)
def test_the_cut_into_blocks_changes_nothing(
    case: tuple[str, dict[str, Any]], block_size: int
) -> None:
    base, *experts = models(3)
    whole, cut = run(base, experts, *case), run(base, experts, *case, block_size)
    assert all(torch.allclose(whole[n], cut[n], rtol=1e-6, atol=1e-9) for n in base)


def test_average_of_weights_is_the_plain_weighted_mean() -> None:
    base, *experts = models(3)
    merged = run(base, experts, "average", {"weights": [1, 2, 5]})
    expected = (experts[0]["a"] + 2 * experts[1]["a"] + 5 * experts[2]["a"]) / 8
    assert torch.allclose(merged["a"], expected, atol=1e-6)


def test_task_arithmetic_forgets_with_a_negative_scale() -> None:
    base, expert = models(1)
    merged = run(base, [expert], "task-arithmetic", {"scale": -1.0})
    assert torch.allclose(merged["a"], 2 * base["a"] - expert["a"], atol=1e-6)


def test_ties_by_hand() -> None:
    """τ = (1, -2, .1, 3), (2, 1, .2, -4): trimmed to two each, then signs are elected."""
    base = {"a": torch.zeros(4)}
    experts = [{"a": torch.tensor([1.0, -2, 0.1, 3])}, {"a": torch.tensor([2.0, 1, 0.2, -4])}]
    merged = run(base, experts, "ties", {"density": 0.5})
    assert merged["a"].tolist() == [2, -2, 0, -4]


def test_ties_elects_nobody_where_the_sum_is_zero() -> None:
    vectors = [torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 4.0])]
    assert merge_agreeing(vectors, [1, 1]).tolist() == [0, 3]


def test_ties_trims_the_whole_model_or_each_tensor() -> None:
    base = {"large": torch.zeros(4), "small": torch.zeros(4)}
    expert = {"large": torch.tensor([5.0, 6, 7, 8]), "small": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    model = run(base, [expert], "ties", {"density": 0.5})
    tensor = run(base, [expert], "ties", {"density": 0.5, "scope": "tensor"})
    assert torch.count_nonzero(model["large"]) == 4
    assert torch.count_nonzero(model["small"]) == 0
    assert torch.count_nonzero(tensor["large"]) == torch.count_nonzero(tensor["small"]) == 2


def test_dare_keeps_the_mean_and_the_share() -> None:
    delta = torch.ones(200_000)
    thinned = drop_and_rescale(delta, 0.75, 0, 0, Block("a", 0, len(delta)))
    assert set(thinned.unique().tolist()) == {0.0, 4.0}
    assert thinned.mean() == pytest.approx(1, abs=0.02)


def test_dare_draws_by_place_expert_and_seed() -> None:
    def fate(tensor: str = "a", expert: int = 0, seed: int = 0, start: int = 0) -> Tensor:
        ones = torch.ones(70_000 - start)
        return drop_and_rescale(ones, 0.5, expert, seed, Block(tensor, start, 70_000))

    assert torch.equal(fate()[65_000:], fate(start=65_000))
    for other in (fate("b"), fate(expert=1), fate(seed=1)):
        assert 0.4 < (other == fate()).float().mean() < 0.6


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32)
        | st.sampled_from([0.0, -0.0, 1.0, -1.0]),
        min_size=1,
        max_size=300,
    ),
    st.data(),
)
def test_order_statistics_are_those_of_a_sort(numbers: list[float], data: st.DataObject) -> None:
    from sparing.merge import selection

    rank = data.draw(st.integers(0, len(numbers) - 1))
    kept = data.draw(st.sampled_from([1, 5, 1000]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    row = torch.tensor(numbers, dtype=dtype)
    view = View({"a": len(row)}, 1, lambda b: (row, [row[b.start : b.stop]]), block_size=7)
    before, selection.COLLECTED = selection.COLLECTED, kept
    try:
        found = order_statistics(view, lambda deltas, _: deltas, [rank], ["a"], "", dtype=dtype)
    finally:
        selection.COLLECTED = before
    assert found == [sorted(numbers)[rank]]


def test_keys_are_in_the_order_of_the_numbers() -> None:
    numbers = torch.tensor([-3e300, -1, -1e-310, 0, 1e-310, 1, 1e300], dtype=torch.float64)
    assert (order_keys(numbers).diff() > 0).all()
    assert order_keys(torch.tensor([-0.0])) == order_keys(torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("average", {"weights": [1, -1]}),
        ("average", {"weights": [1, 2, 3]}),
        ("average", {"weights": "many"}),
        ("task-arithmetic", {"scale": [1]}),
        ("task-arithmetic", {"scale": float("nan")}),
        ("ties", {"density": 0}),
        ("ties", {"density": 1.5}),
        ("ties", {"scope": "layer"}),
        ("dare", {"drop": 1.0}),
        ("dare", {"elect": 1}),
        ("dare", {"seed": 0.5}),
        ("pcb-merging", {"ratio": 0}),
        ("pcb-merging", {"ratio": "half"}),
        ("pcb-merging", {"variant": "vision-es"}),
        ("pcb-merging", {"clip_q": 0.5}),
        ("pcb-merging", {"lam": [1.0]}),
        ("pcb-merging", {"rho": 1}),
    ],
)
def test_an_option_that_cannot_work_is_named(method: str, options: dict[str, Any]) -> None:
    base, *experts = models(2)
    with pytest.raises(ConfigError, match=next(iter(options))):
        run(base, experts, method, options)


def test_models_that_do_not_fit_are_named() -> None:
    base, expert = models(1)
    for wrong, words in (
        ({"a": expert["a"]}, "'b'.*found none"),
        ({**expert, "c": expert["a"]}, "'c'.*no such tensor"),
        ({**expert, "b": torch.ones(3)}, "'b'.*shape"),
        ({**expert, "b": torch.full((11,), torch.nan)}, "'b'.*NaN"),
    ):
        with pytest.raises(ConfigError, match=words):
            InMemory(base, [wrong])
    with pytest.raises(ConfigError, match="at least one"):
        InMemory(base, [])
