"""The √d rule: which parameters it scales, by how much, and what it refuses or warns of."""

import copy
import json
import math
import warnings

import pytest
import torch
import transformers
import yaml
from _sizes import FAMILIES, HEAD, family, llama, on_meta
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing.errors import CheckpointError, ConfigError
from sparing.scale import (
    DecayRule,
    Plan,
    ScalingWarning,
    WidthMultipliers,
    narrowed,
    wd_scaled_groups,
    wd_scaled_plan,
)
from sparing.scale.planners import PLANNERS
from sparing.scale.settings import PlanSettings
from sparing.scale.spectra import MatrixSpectrum, Spectra

RULE = DecayRule(8e-3, 0.1)
BOTH = {"matrix", "expert"}
STATED = {"one_sided_p": 0.25}


def rows(plan: Plan) -> dict[str, dict]:
    return {row["name"]: row for row in plan.rows()}


def groups_of(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScalingWarning)
        return wd_scaled_groups(model, lr=8e-3, weight_decay=0.1, **options)


def numbers(groups) -> dict[str, tuple[float, float]]:
    return {n: (g["lr"], g["weight_decay"]) for g in groups for n, _ in g["params"]}


# The rule


@pytest.mark.parametrize(
    ("width", "rate", "decay", "steps"),
    [(256, 8e-3, 0.1, 3750), (512, 4e-3, 0.14142, 5303), (1024, 2e-3, 0.2, 7500),
     (2048, 1e-3, 0.28284, 10_607)],
)  # fmt: skip
def test_worked_example(width, rate, decay, steps):
    plan = wd_scaled_plan(on_meta(width), on_meta(256), RULE, steps=1e6)
    row = rows(plan)["model.layers.1.mlp.down_proj.weight"]
    assert row["lr"] == pytest.approx(rate)
    assert row["weight_decay"] == pytest.approx(decay, rel=1e-4)
    assert 3 / (row["lr"] * row["weight_decay"]) == pytest.approx(steps, abs=0.5)


def test_the_base_itself_trains_bit_for_bit_as_with_plain_adamw():
    ids = torch.randint(3, 19, (4, 12), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = llama(32)
    other = copy.deepcopy(model)
    scaled = torch.optim.AdamW(groups_of(model, base=on_meta(32)))
    decayed = [p for n, p in other.named_parameters() if "proj" in n]
    rest = [p for n, p in other.named_parameters() if "proj" not in n]
    plain = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=8e-3
    )
    for _ in range(5):
        for each, optimizer in ((model, scaled), (other, plain)):
            optimizer.zero_grad()
            each(ids, labels=ids).loss.backward()
            optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@given(factor=st.sampled_from([2, 3, 4]), further=st.sampled_from([2, 5]), p=st.floats(0, 1))
@settings(max_examples=8, deadline=None)
def test_two_steps_of_scaling_equal_one(factor, further, p):
    small, middle, large = (on_meta(w, layers=1) for w in (16, 16 * factor, 16 * factor * further))
    first = rows(wd_scaled_plan(middle, small, DecayRule(8e-3, 0.1, p=p)))
    name = "model.layers.0.self_attn.q_proj.weight"
    tuned = DecayRule(first[name]["lr"], first[name]["weight_decay"], 8e-3, p=p)
    twice = rows(wd_scaled_plan(large, middle, tuned))
    once = rows(wd_scaled_plan(large, small, DecayRule(8e-3, 0.1, p=p)))
    for key, row in once.items():
        assert twice[key]["lr"] == pytest.approx(row["lr"], rel=1e-12)
        assert twice[key]["weight_decay"] == pytest.approx(row["weight_decay"], rel=1e-12)


def test_doubling_the_width_halves_the_rate_and_leaves_vectors_alone():
    once, twice = (rows(wd_scaled_plan(on_meta(w), on_meta(16), RULE)) for w in (32, 64))
    for name, row in once.items():
        if row["role"] == "matrix":
            assert twice[name]["lr"] == pytest.approx(row["lr"] / 2)
            assert twice[name]["weight_decay"] == pytest.approx(row["weight_decay"] * 2**0.5)
            product = [r["lr"] * r["weight_decay"] for r in (row, twice[name])]
            assert product[1] == pytest.approx(product[0] * 2**-0.5)
        else:
            assert (twice[name]["lr"], twice[name]["weight_decay"]) == (8e-3, 0.0)
            assert (row["lr"], row["weight_decay"]) == (8e-3, 0.0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_has_one_class_and_only_matrices_are_scaled(kind):
    model = family(kind, 64)
    plan = wd_scaled_plan(model, family(kind, 16), DecayRule(8e-3, 0.1, **STATED))
    assert [row.info.name for row in plan.parameters] == [n for n, _ in model.named_parameters()]
    by_class = {"matrix-like": 0, "vector-like": 0}
    for row in plan.parameters:
        by_class[row.options["scaling"]] += row.info.count
        if row.info.role in BOTH:
            assert (row.lr, row.weight_decay) == (2e-3, pytest.approx(0.2))
        elif row.info.role != "router":
            assert (row.lr, row.weight_decay) == (8e-3, 0.0)
    assert sum(by_class.values()) == sum(p.numel() for p in model.parameters())
    assert by_class["matrix-like"] > 0


def test_a_tied_embedding_is_one_vector_whose_logits_are_scaled():
    plan = rows(wd_scaled_plan(family("qwen3", 64), family("qwen3", 16), RULE))
    row = plan["model.embed_tokens.weight"]
    assert (row["lr"], row["weight_decay"], row["multiplier"]) == (8e-3, 0.0, 0.25)
    assert "lm_head.weight" not in plan


def test_initialisation_follows_fan_in():
    plan = rows(wd_scaled_plan(on_meta(64), on_meta(16), RULE, base_std=0.1))
    assert plan["model.layers.0.mlp.down_proj.weight"]["init_std"] == pytest.approx(0.05)
    assert plan["model.embed_tokens.weight"]["init_std"] == pytest.approx(0.1)
    assert plan["lm_head.weight"]["init_std"] == pytest.approx(0.05)
    zero = rows(wd_scaled_plan(on_meta(64), on_meta(16), DecayRule(8e-3, 0.1, zero_head=True)))
    assert zero["lm_head.weight"]["init_std"] == 0.0
    assert zero["model.norm.weight"]["init_std"] is None


def test_the_standard_parameterisation_scales_nothing():
    rule = DecayRule(8e-3, 0.1, p=0, lr_exponent=0, head="plain")
    for row in wd_scaled_plan(on_meta(64), on_meta(16), rule).rows():
        assert row["lr"] == 8e-3
        assert row["weight_decay"] == (0.1 if row["role"] == "matrix" else 0.0)
        assert row["multiplier"] == 1


def test_vectors_take_the_rate_and_decay_they_are_given():
    rule = DecayRule(8e-3, 0.1, 3e-3, 0.01)
    row = rows(wd_scaled_plan(on_meta(64), on_meta(16), rule))["model.norm.weight"]
    assert (row["lr"], row["weight_decay"]) == (3e-3, 0.01)


# Against μP


def mup_groups(model, base, lr, weight_decay, *, decoupled):
    """What `mup.MuAdamW` does: newer versions keep decay ("decoupled"), 1.0.0 times the width."""
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    found = {}
    for name, parameter in model.named_parameters():
        grown = [now / was for now, was in zip(parameter.shape, shapes[name], strict=True)]
        infinite = sum(ratio != 1 for ratio in grown)
        factor = grown[-1] if infinite == 2 else 1.0
        found[name] = (lr / factor, weight_decay * (1.0 if decoupled else factor))
    return found


@pytest.mark.parametrize(("p", "decoupled"), [(0.0, True), (1.0, False)])
def test_p_of_zero_and_one_are_the_two_versions_of_mup(p, decoupled):
    base, model = on_meta(16), on_meta(64)
    found = numbers(groups_of(model, base=base, p=p, vector_decay=0.1))
    expected = mup_groups(model, base, 8e-3, 0.1, decoupled=decoupled)
    assert found == {name: pytest.approx(pair) for name, pair in expected.items()}


def test_the_mup_package_agrees():
    mup = pytest.importorskip("mup")
    import inspect

    base, model = llama(16), llama(64)
    mup.set_base_shapes(model, base, delta=llama(24), rescale_params=False, do_assert=False)
    scaled_decay = "decoupled_wd" not in inspect.getsource(mup.optim)
    theirs = mup.MuAdamW(model.parameters(), lr=8e-3, weight_decay=0.1)
    found = numbers(groups_of(model, base=base, p=float(scaled_decay), vector_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in theirs.param_groups:
        for parameter in group["params"]:
            pair = group["lr"], group["weight_decay"]
            assert found[names[id(parameter)]] == pytest.approx(pair)


@given(p=st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_p_of_one_keeps_the_product_of_rate_and_decay(p):
    base = on_meta(16, layers=1)
    products = [
        rows(wd_scaled_plan(on_meta(w, layers=1), base, DecayRule(8e-3, 0.1, p=p)))[
            "model.layers.0.mlp.up_proj.weight"
        ]
        for w in (16, 64)
    ]
    before, after = (row["lr"] * row["weight_decay"] for row in products)
    assert after / before == pytest.approx(4 ** (p - 1))


def test_independent_decay_is_converted_and_said():
    name = "model.layers.0.mlp.up_proj.weight"
    base, model = on_meta(16), on_meta(64)
    decoupled = rows(wd_scaled_plan(model, base, RULE))[name]
    rule = DecayRule(8e-3, 8e-3 * 0.1, decay="independent")
    plan = wd_scaled_plan(model, base, rule)
    assert rows(plan)[name]["weight_decay"] == pytest.approx(
        decoupled["lr"] * decoupled["weight_decay"]
    )
    assert any("independent" in note for note in plan.notes)


# Sides that grow differently


def test_keys_of_fixed_heads_need_a_stated_exponent():
    base, model = on_meta(16, kv_heads=1), on_meta(64, kv_heads=1)
    with pytest.raises(ConfigError, match=r"k_proj.*one_sided_p|one_sided_p.*k_proj"):
        wd_scaled_plan(model, base, RULE)
    plan = wd_scaled_plan(model, base, DecayRule(8e-3, 0.1, one_sided_p=0.3))
    row = rows(plan)["model.layers.0.self_attn.k_proj.weight"]
    assert (row["lr"], row["weight_decay"]) == (2e-3, pytest.approx(0.1 * 4**0.3))
    assert any("k_proj, v_proj" in note for note in plan.notes)


def test_a_wider_feed_forward_network_takes_the_geometric_mean_and_warns():
    model = on_meta(64, intermediate_size=8 * 64)  # 4 times the width, 16 times the hidden
    with pytest.warns(ScalingWarning, match="unequally"):
        groups = wd_scaled_groups(model, lr=8e-3, weight_decay=0.1, base=on_meta(16), head="plain")
    found = numbers(groups)
    up, down = (found[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "down"))
    assert up == (pytest.approx(8e-3 / 4), pytest.approx(0.1 * 8**0.5))
    assert down == (pytest.approx(8e-3 / 16), pytest.approx(0.1 * 8**0.5))


def test_a_matrix_may_be_declared_a_vector():
    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed = nn.Linear(32, width, bias=False)
            self.hidden = nn.Linear(width, width, bias=False)

    declared = {"embed.weight": "vector"}
    plan = rows(wd_scaled_plan(Net(64), Net(16), RULE, overrides=declared))
    assert (plan["embed.weight"]["lr"], plan["embed.weight"]["weight_decay"]) == (8e-3, 0)
    assert plan["hidden.weight"]["weight_decay"] == pytest.approx(0.2)


# The head and attention


def test_a_folded_head_trains_like_one_with_a_multiplier():
    ids = torch.randint(3, 19, (4, 12), generator=torch.Generator().manual_seed(0))
    base = on_meta(16)
    torch.manual_seed(0)
    model = llama(32).double()
    folded = copy.deepcopy(model)
    with torch.no_grad():
        folded.lm_head.weight.mul_(0.5)
    WidthMultipliers.between(base, model).install(model)
    for name, each in (("multiplier", model), ("folded", folded)):
        groups = groups_of(each, base=base, head=name)
        optimizer = torch.optim.AdamW(groups, eps=1e-30)
        for _ in range(4):
            optimizer.zero_grad()
            each(ids, labels=ids).loss.backward()
            optimizer.step()
    torch.testing.assert_close(model(ids).logits, folded(ids).logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.lm_head.weight / 2, folded.lm_head.weight)


def test_multipliers_are_installed_and_removed():
    base, model = llama(32), llama(32, head_dim=4 * HEAD)
    ids = torch.arange(3, 13).view(1, 10)
    before = model(ids).logits
    multipliers = WidthMultipliers.between(base, model)
    assert multipliers.attention == pytest.approx(0.5)
    assert multipliers.logits == 1
    installed = WidthMultipliers(0.25, multipliers.attention).install(model)
    attention = model.model.layers[0].self_attn
    assert attention.scaling == pytest.approx(0.5 / math.sqrt(4 * HEAD))
    assert not torch.allclose(model(ids).logits, before / 4)
    installed.remove()
    assert torch.equal(model(ids).logits, before)
    only_logits = WidthMultipliers(0.25).install(model)
    torch.testing.assert_close(model(ids).logits, before / 4)
    only_logits.remove()


def test_growing_heads_is_told():
    plan = wd_scaled_plan(on_meta(32, head_dim=32), on_meta(32), DecayRule(8e-3, 0.1, **STATED))
    assert any("attention's scale" in note and "0.5" in note for note in plan.notes)


def test_a_tied_head_cannot_be_folded():
    rule = DecayRule(8e-3, 0.1, head="folded")
    with pytest.raises(ConfigError, match="embed_tokens"):
        wd_scaled_plan(family("qwen3", 64), family("qwen3", 16), rule)


# Where the base comes from


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_base_width_is_a_base_model_of_that_width(kind):
    model = family(kind, 64)
    options = {} if kind not in ("mixtral",) else STATED
    by_width = groups_of(model, base_width=16, **options)
    by_model = groups_of(model, base=family(kind, 16), **options)
    assert numbers(by_width) == numbers(by_model)
    shapes = [tuple(p.shape) for p in narrowed(model, 16).parameters()]
    assert shapes == [tuple(p.shape) for p in family(kind, 16).parameters()]


def test_grouped_heads_must_be_declared():
    model = on_meta(64, kv_heads=2)
    with pytest.raises(ConfigError, match="kv_heads"):
        groups_of(model, base_width=16)
    fixed = numbers(groups_of(model, base_width=16, kv_heads=2, **STATED))
    assert fixed["model.layers.0.self_attn.k_proj.weight"][1] == pytest.approx(0.1 * 4**0.25)
    grown = numbers(groups_of(on_meta(64, kv_heads=4), base_width=16, kv_heads=1))
    assert grown["model.layers.0.self_attn.k_proj.weight"][1] == pytest.approx(0.2)


@pytest.mark.parametrize("width", [12, 7])
def test_a_width_that_does_not_divide_is_refused(width):
    with pytest.raises(ConfigError, match="whole"):
        groups_of(on_meta(64), base_width=width)


def test_a_base_width_needs_a_configuration():
    with pytest.raises(ConfigError, match="hidden_size"):
        groups_of(nn.Linear(4, 4), base_width=2)


@pytest.mark.parametrize("given", [{}, {"base": on_meta(16), "base_width": 16}])
def test_the_base_is_given_once(given):
    with pytest.raises(ConfigError, match="base_width"):
        groups_of(on_meta(64), **given)


def test_a_file_of_base_shapes_gives_the_same_groups(tmp_path):
    base, model = on_meta(16), on_meta(64)
    delta = dict(model.named_parameters())
    table = {
        name: [
            None if side == now else side
            for side, now in zip(p.shape, delta[name].shape, strict=True)
        ]
        for name, p in base.named_parameters()
    }
    path = tmp_path / "shapes.bsh"
    path.write_text("# This is a base shape file encoded in yaml\n" + yaml.dump(table, indent=4))
    assert numbers(groups_of(model, base=path)) == numbers(groups_of(model, base=base))


@pytest.mark.parametrize("text", ["- 1\n- 2", "a: [x]", "a: [0, 3]", "{", "a: 3"])
def test_another_file_is_refused(text, tmp_path):
    path = tmp_path / "shapes.bsh"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"shapes\.bsh"):
        groups_of(on_meta(64), base=path)
    with pytest.raises(CheckpointError, match=r"missing\.bsh"):
        groups_of(on_meta(64), base=tmp_path / "missing.bsh")


def test_shapes_of_another_model_are_refused():
    shapes = {name: list(p.shape) for name, p in on_meta(16).named_parameters()}
    flat = shapes | {"model.norm.weight": [16, 1]}
    with pytest.raises(ConfigError, match=r"norm\.weight"):
        groups_of(on_meta(64), base=flat)
    del shapes["model.norm.weight"]
    with pytest.raises(ConfigError, match=r"norm\.weight"):
        groups_of(on_meta(64), base=shapes)


# p = "auto"


def spectra(width: int, a: float, lr: float, weight_decay: float) -> Spectra:
    sigma = 0.7 * width**a * math.sqrt(lr / weight_decay)
    return Spectra((MatrixSpectrum("w", width, width, sigma, 0.1),), lr, weight_decay)


@given(a=st.floats(0.5, 1.0))
@settings(max_examples=10, deadline=None)
def test_auto_takes_two_a_minus_one_from_measured_spectra(a):
    measured = [spectra(64, a, 4e-3, 0.5), spectra(256, a, 1e-3, 0.9)]
    plan = wd_scaled_plan(
        on_meta(64), on_meta(16), DecayRule(8e-3, 0.1, p="auto"), measured=measured
    )
    row = rows(plan)["model.layers.0.mlp.up_proj.weight"]
    assert row["weight_decay"] == pytest.approx(0.1 * 4 ** (2 * a - 1))
    assert any("weight decay ∝" in note for note in plan.notes)


def test_auto_without_measurements_is_refused():
    with pytest.raises(ConfigError, match="measured"):
        groups_of(on_meta(64), base_width=16, p="auto")


def test_auto_outside_of_the_limits_warns():
    with pytest.warns(ScalingWarning, match="outside"):
        wd_scaled_groups(
            on_meta(64), lr=8e-3, weight_decay=0.1, base_width=16, p="auto",
            measured=[spectra(64, 0.2, 4e-3, 0.5), spectra(256, 0.2, 4e-3, 0.5)],
        )  # fmt: skip


# Warnings and refusals


def test_no_decay_makes_the_rule_void():
    with pytest.warns(ScalingWarning, match="not stationary"):
        wd_scaled_groups(on_meta(32), lr=8e-3, weight_decay=0.0, base=on_meta(16), head="plain")


@pytest.mark.parametrize(("steps", "warned"), [(1000, True), (10_000, False)])
def test_a_run_too_short_for_decay_is_told(steps, warned):
    plan = wd_scaled_plan(on_meta(64), on_meta(16), RULE, steps=steps)  # 2/(ηλ) = 5,000
    assert any("not stationary" in note for note in plan.notes) == warned


def test_sixteen_bits_lose_small_decay():
    with pytest.warns(ScalingWarning, match="masters"):
        wd_scaled_groups(
            on_meta(32).bfloat16(), lr=8e-3, weight_decay=0.1, base=on_meta(16), head="plain"
        )


def test_an_unknown_matrix_is_listed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 4))

    with pytest.raises(ConfigError, match=r"table \(3, 4\)"):
        wd_scaled_plan(Odd(), Odd(), RULE)


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0.0}, {"lr": math.nan}, {"weight_decay": -1.0}, {"vector_lr": -1.0}, {"p": math.inf},
     {"p": "half"}, {"one_sided_p": math.nan}, {"head": "tied"}, {"decay": "l2"},
     {"lr_exponent": -1.0}],
)  # fmt: skip
def test_options_out_of_range_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DecayRule(**({"lr": 8e-3, "weight_decay": 0.1} | bad))


def test_an_unknown_option_is_named():
    with pytest.raises(ConfigError, match="decay_power"):
        groups_of(on_meta(64), base_width=16, decay_power=0.5)


# Plans and optimizers


def test_the_planner_is_the_rule_with_a_default_for_one_sided_matrices():
    base, model = on_meta(16, kv_heads=1), on_meta(64, kv_heads=1)
    plan = PLANNERS["wd-scaling"](base, model, PlanSettings(8e-3, 4e-3, 0.1))
    found = rows(plan)
    assert found["model.layers.0.self_attn.q_proj.weight"]["weight_decay"] == pytest.approx(0.2)
    key = found["model.layers.0.self_attn.k_proj.weight"]["weight_decay"]
    assert key == pytest.approx(0.1 * 4**0.25)  # half of p, the geometric mean of both sides
    assert found["model.norm.weight"]["lr"] == 4e-3
    stated = PlanSettings(8e-3, None, 0.1, decay_exponent=1.0, one_sided_exponent=0.0)
    found = rows(PLANNERS["wd-scaling"](base, model, stated))
    assert found["model.layers.0.self_attn.q_proj.weight"]["weight_decay"] == pytest.approx(0.4)
    assert found["model.layers.0.self_attn.k_proj.weight"]["weight_decay"] == pytest.approx(0.1)


def test_the_planner_counts_steps_from_tokens():
    settings = PlanSettings(8e-3, None, 0.1, base_tokens=1e6, tokens=1e6, base_batch=1e3, batch=1e3)
    plan = PLANNERS["wd-scaling"](on_meta(16), on_meta(64), settings)
    assert any("there are 1,000" in note for note in plan.notes)


def test_a_plan_survives_json():
    plan = wd_scaled_plan(on_meta(64), on_meta(16), RULE)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_groups_train_in_a_trainer_and_resume(tmp_path):
    torch.manual_seed(0)
    model = llama(32)
    ids = torch.randint(0, 19, (16, 12), generator=torch.Generator().manual_seed(0))
    before = model(ids, labels=ids).loss.item()
    optimizer = torch.optim.AdamW(groups_of(model, base_width=16))
    again = torch.optim.AdamW(groups_of(model, base_width=16))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=8, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizers=(optimizer, schedule),
    ).train()
    assert model(ids, labels=ids).loss.item() < before - 0.1
    again.load_state_dict(optimizer.state_dict())
    assert [g["role"] for g in again.param_groups] == [g["role"] for g in optimizer.param_groups]


def test_groups_are_taken_by_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    model = llama(32)
    groups = groups_of(model, base_width=16)
    expected = sorted((g["lr"], g["weight_decay"]) for g in groups)
    optimizer = bnb.optim.AdamW8bit(groups)
    assert sorted((g["lr"], g["weight_decay"]) for g in optimizer.param_groups) == expected
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
