"""Never above the budget, and nothing nearer below it."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from sparing import pretrained
from sparing.budget import Budget, Unit
from sparing.compare.competitors import Competitor, competitor
from sparing.compare.jobs import ADAPTER_FILE, _save
from sparing.compare.sizing import LARGEST_GAP, MetaModel, _largest, solve
from sparing.errors import ConfigError

METHODS = ["lora", 'mos{"r":2}', "neuroada", "sara", "hut", "peft:vera"]
BUDGETS = ["1.2%", "3%", "7777", "20kB", "31KiB", "45_678bytes"]
KINDS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def tiny() -> MetaModel:
    return MetaModel(pretrained.resolve("tiny"), "all-linear")


@pytest.fixture(scope="module")
def three() -> MetaModel:
    """With few enough kinds of modules to try every choice of them."""
    return MetaModel(pretrained.resolve("tiny"), KINDS)


def sizes_around(entry: Competitor, model: MetaModel, chosen: dict[str, Any], unit: Unit):
    """Of every configuration near the chosen one: other sizes, and one more for each choice of
    modules."""
    option, pattern = entry.size_option, entry.size_pattern_option
    assert option is not None
    fixed = {name: value for name, value in chosen.items() if name not in (option, pattern)}
    for size in range(max(1, chosen[option] - 1), chosen[option] + 2):
        for count in range(len(KINDS) if pattern else 1):
            for kinds in combinations(KINDS, count):
                raised = {pattern: dict.fromkeys(kinds, size + 1)} if kinds else {}
                try:
                    yield model.size(entry, {**fixed, option: size, **raised})[unit]
                except ConfigError:
                    continue


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", METHODS)
def test_never_above_the_budget(name: str, budget: str, tiny: MetaModel) -> None:
    parsed = Budget.parse(budget)
    limit = parsed.limit(tiny.parameters)
    try:
        sizing = solve(competitor(name), tiny, parsed)
    except ConfigError:
        smallest = tiny.size(competitor(name), {competitor(name).size_option: 1})
        assert smallest[parsed.unit] > limit
        return
    assert 0 < sizing.size[parsed.unit] <= limit
    assert sizing.share == sizing.size[parsed.unit] / limit
    assert bool(sizing.note) == (sizing.share < 0.8)


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("lora", "2.2%"),
        ("lora", "21kB"),
        ('mos{"r":2}', "2.2%"),
        ('mos{"r":2}', "21kB"),
        ("neuroada", "3.3%"),
        ("hut", "5%"),
        ("hut", "1.2%"),
        ("hut", "31KiB"),
        ("peft:vera", "1.2%"),
        ("sara", "7777"),
    ],
)
def test_nothing_is_nearer_below(name: str, budget: str, three: MetaModel) -> None:
    parsed, entry = Budget.parse(budget), competitor(name)
    limit = parsed.limit(three.parameters)
    sizing = solve(entry, three, parsed)
    others = list(sizes_around(entry, three, sizing.options, parsed.unit))
    assert sizing.size[parsed.unit] == max(size for size in others if size <= limit)
    assert max(others) > limit


def test_some_modules_are_raised_to_come_nearer(tiny: MetaModel) -> None:
    sizing = solve(competitor("lora"), tiny, Budget.parse("3.3%"))
    assert set(sizing.options["rank_pattern"].values()) == {sizing.options["r"] + 1}
    assert sizing.share > 0.97


def test_sara_meets_a_budget_of_parameters_to_the_last_one(tiny: MetaModel) -> None:
    assert solve(competitor("sara"), tiny, Budget.parse("1234")).size.parameters == 1234


@pytest.mark.parametrize(
    "name",
    [*METHODS, "peft:loha", "peft:ia3", "peft:shira", "peft:fourierft", 'mos{"r":2,"shards":4}'],
)
def test_bytes_are_those_of_the_saved_file(name: str, tiny: MetaModel, tmp_path: Path) -> None:
    entry = competitor(name)
    options = solve(entry, tiny, Budget.parse("40KiB")).options if entry.size_option else {}
    if "vera" in name:
        options = {"r": 16}
    model = get_peft_model(
        pretrained.load("tiny").model, entry.config(options, tiny.target_modules)
    )
    _save(model, tmp_path, model.state_dict())
    counted = (tiny.with_weights() if entry.bound_to_base else tiny).size(entry, options)
    assert (tmp_path / ADAPTER_FILE).stat().st_size == counted.file_bytes
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == counted.parameters


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", ["1", "100bytes"])
def test_a_budget_below_the_smallest_size_is_refused(name, budget, tiny: MetaModel) -> None:
    if name == "sara" and budget == "1":
        assert solve(competitor(name), tiny, Budget.parse(budget)).size.parameters == 1
        return
    with pytest.raises(ConfigError, match=r"budget 1.*smallest size, [\d,]+ (parameters|bytes)"):
        solve(competitor(name), tiny, Budget.parse(budget))


@pytest.mark.parametrize("budget", ["1G", "10GiB", "1_000_000"])
def test_a_budget_above_the_model_is_refused(budget: str, tiny: MetaModel) -> None:
    with pytest.raises(ConfigError, match=r"model's own|known unit|number with a unit"):
        solve(competitor("lora"), tiny, Budget.parse(budget))


def test_a_method_far_below_says_so(tiny: MetaModel) -> None:
    sizing = solve(competitor("peft:ia3"), tiny, Budget.parse("30%"))
    assert sizing.note == f"{1 - sizing.share:.0%} below the budget"
    assert solve(competitor("lora"), tiny, Budget.parse("3%")).note == ""


def test_a_size_that_the_user_gives_is_left_alone(tiny: MetaModel) -> None:
    sizing = solve(competitor('lora{"r": 1}'), tiny, Budget.parse("50%"))
    assert sizing.options == {}
    assert "below the budget" in sizing.note


def test_the_smallest_size_that_a_method_allows_is_found(tiny: MetaModel) -> None:
    """With its rank of 8, MoS needs a budget rank of 5 or more on two layers."""
    sizing = solve(competitor("mos"), tiny, Budget.parse("20%"))
    assert sizing.options["budget_rank"] >= 5
    with pytest.raises(ConfigError, match=r"method 'mos.*expected at least"):
        solve(competitor('mos{"r":8}'), tiny, Budget.parse("3%"))


def test_a_default_that_does_not_suit_the_model_gives_way(tiny: MetaModel) -> None:
    """Two layers cannot hold the default rank of 8 within 3 %, but a lower rank fits."""
    sizing = solve(competitor("mos"), tiny, Budget.parse("3%"))
    assert sizing.options["r"] < 8
    assert 0.8 < sizing.share <= 1


def test_a_failed_size_leaves_the_architecture_as_it_was(tiny: MetaModel) -> None:
    before = tiny.size(competitor("lora"), {"r": 2})
    with pytest.raises(ConfigError):
        tiny.size(competitor('mos{"shards":7}'), {"budget_rank": 1})
    with pytest.raises(ConfigError):
        tiny.size(competitor("hut"), {"r": 10**6})
    with pytest.raises(ValueError, match="r` should be a positive integer"):
        tiny.size(competitor('lora{"r": 0}'), {})
    assert tiny.size(competitor("lora"), {"r": 2}) == before


def test_a_method_that_needs_weights_leaves_none_behind(tiny: MetaModel) -> None:
    before = tiny.size(competitor("sara"), {"n_params": 1})
    tiny.size(competitor("peft:shira"), {"r": 1})
    assert tiny.size(competitor("sara"), {"n_params": 1}) == before


@pytest.mark.parametrize("targets", ["nothing", ["q_prj"], ["q_proj", "k_prj"], "model.q_proj"])
def test_target_modules_that_match_nothing_are_refused(targets: Any) -> None:
    with pytest.raises(ConfigError, match=r"target_modules.*(Did you mean|Choose one of).*q_proj"):
        MetaModel(pretrained.resolve("tiny"), targets)


@pytest.mark.parametrize("targets", [["q_proj", "self_attn.k_proj"], r".*\.[qk]_proj", None])
def test_names_and_expressions_select_modules(targets: Any) -> None:
    model = MetaModel(pretrained.resolve("tiny"), targets)
    if targets:
        assert model.module_kinds(competitor("lora"), {}) == ["q_proj", "k_proj"]


@given(
    start=st.integers(0, 500),
    slope=st.integers(0, 50),
    bend=st.integers(0, 9),
    gap=st.integers(1, LARGEST_GAP),
    first=st.integers(1, LARGEST_GAP),
    last=st.integers(1, 300),
    limit=st.integers(0, 5000),
)
def test_the_largest_size_is_that_of_brute_force(start, slope, bend, gap, first, last, limit):
    """Costs that bend, sizes that are multiples of something and have a smallest and a largest."""
    allowed = [size for size in range(first, first + last) if (size - first) % gap == 0]
    costs = {size: start + slope * size + bend * (size // 7) for size in allowed}
    within = [size for size in allowed if costs[size] <= limit]
    assert _largest(costs.get, limit) == (max(within) if within else allowed[0])
