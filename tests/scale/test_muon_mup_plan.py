"""The plan of Muon++ for whole models, what its monitor reads, and the check of a checkpoint."""

import copy
import json
import math

import pytest
import torch
import transformers
from _sizes import FAMILIES, family, llama
from torch import nn

from sparing.errors import ConfigError
from sparing.scale import (
    MuonPlusPlus,
    SpectralMonitor,
    exact_init,
    measure_checkpoint,
    muon_mup_groups,
    muon_mup_plan,
)
from sparing.scale.multipliers import install_multipliers
from sparing.scale.muon_mup import spectral_unit
from sparing.scale.muon_mup_plan import fused_parts, muon_mup_planner, pieces_of, unit_of
from sparing.scale.planning import Plan
from sparing.scale.settings import PlanSettings
from sparing.scale.spectral_monitor import reduced_norms

IDS = torch.randint(0, 19, (4, 12), generator=torch.Generator().manual_seed(0))


def model(width: int = 64, layers: int = 2, **options) -> nn.Module:
    torch.manual_seed(0)
    return llama(width, layers, **options)


def phi(width: int = 64) -> nn.Module:
    """Queries, keys and values fused, with fewer keys and values; gate and up fused too."""
    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
            num_attention_heads=8, num_key_value_heads=2, vocab_size=19, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def rows_of(plan: Plan) -> dict:
    return {row.info.name: row for row in plan.parameters}


def norms(network: nn.Module, plan: Plan) -> dict[str, list[float]]:
    """Reduced norms by SVD."""
    named = dict(network.named_parameters())
    return {
        row.info.name: [
            float(torch.linalg.matrix_norm(each.double(), ord=2)) / unit_of(piece, row)
            for piece in pieces_of(named[row.info.name], row)
            for each in piece
        ]
        for row in plan.parameters
        if row.algorithm == "matrix"
    }


# The plan


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_has_a_plan_that_trains(kind):
    torch.manual_seed(0)
    network = type(family(kind, 16))(family(kind, 16).config)
    plan = muon_mup_plan(network, lr=0.02, base_width=16)
    plan.initialize(network)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = MuonPlusPlus(plan.param_groups(network))
    if kind == "vit":
        images = torch.randn(2, 3, *[network.config.image_size] * 2)
        inputs = {"pixel_values": images, "labels": torch.tensor([0, 1])}
    else:
        inputs = {"input_ids": IDS, "labels": IDS}
    first = network(**inputs).loss
    for _ in range(3):
        network(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert network(**inputs).loss < first
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert moved >= {row.info.name for row in plan.parameters if row.algorithm == "matrix"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_every_matrix_starts_at_the_reduced_norm_that_was_asked_for(kind):
    torch.manual_seed(0)
    network = type(family(kind, 128))(family(kind, 128).config)
    plan = muon_mup_plan(network, gain=1.5)
    plan.initialize(network)
    hidden = {n: w for n, w in norms(network, plan).items() if min(rows_of(plan)[n].info.shape) > 8}
    assert len(hidden) >= 4
    for name, values in hidden.items():
        assert all(0.9 * 1.5 <= w <= 1.05 * 1.5 for w in values), name
    exact_init(network, plan, gain=0.7)
    for name, values in norms(network, plan).items():
        assert values == pytest.approx([0.7] * len(values), rel=1e-3), name


def test_no_rate_depends_on_the_width_but_the_heads():
    small, large = (
        rows_of(muon_mup_plan(model(width), lr=0.03, aux_lr=0.01, base_width=32))
        for width in (32, 128)
    )
    for name, row in small.items():
        ratio = 0.25 if name == "lm_head.weight" else 1.0
        assert large[name].lr == pytest.approx(ratio * row.lr), name
        assert large[name].weight_decay == row.weight_decay
    assert small["model.layers.0.mlp.up_proj.weight"].lr == 0.03
    assert small["model.layers.0.mlp.up_proj.weight"].weight_decay == pytest.approx(0.1)
    embedding = small["model.embed_tokens.weight"]
    assert (embedding.algorithm, embedding.lr, embedding.weight_decay) == ("adamw", 0.01, 0.0)
    assert large["lm_head.weight"].init_std == pytest.approx(0.25 / math.sqrt(32))


def test_a_folded_head_trains_as_one_with_a_multiplier():
    """d₀/d times rate and initialisation, against d₀/d times the logits."""
    folded, multiplied = model(64), model(64)
    plan = muon_mup_plan(folded, lr=0.02, base_width=16)
    head = rows_of(plan)["lm_head.weight"]
    with torch.no_grad():
        folded.lm_head.weight.mul_(0.25)
    multiplied.lm_head.register_forward_hook(lambda module, args, out: 0.25 * out)
    groups = [plan.param_groups(each) for each in (folded, multiplied)]
    for group in groups[1]:
        if group["role"] == "head":
            group["lr"] *= 4
    assert head.lr == pytest.approx(0.02 / 4)
    optimizers = [MuonPlusPlus(each, eps=1e-20) for each in groups]
    for _ in range(4):
        for network, optimizer in zip((folded, multiplied), optimizers, strict=True):
            network(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(
        folded(input_ids=IDS).logits, multiplied(input_ids=IDS).logits, rtol=1e-3, atol=1e-3
    )


def test_a_branch_multiplier_folds_into_the_unit():
    """α f(W x) with unit ρ, against f(W' x) with W' = αW and unit αρ."""
    plain, folded = (nn.Linear(7, 5, bias=False) for _ in range(2))
    alpha = 0.25
    folded.weight.data = alpha * plain.weight.data
    optimizers = [
        MuonPlusPlus(plain.parameters(), lr=0.1, radius=2.0),
        MuonPlusPlus([{"params": list(folded.parameters()), "scale": alpha}], lr=0.1, radius=2.0),
    ]
    for seed in range(5):
        x = torch.randn(9, 7, generator=torch.Generator().manual_seed(seed))
        (alpha * plain(x)).square().sum().backward()
        folded(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(folded.weight, alpha * plain.weight, rtol=1e-4, atol=1e-6)
    rows = rows_of(muon_mup_plan(model(layers=4), base_depth=2, depth_exponent=0.5))
    assert rows["model.layers.3.mlp.down_proj.weight"].options["scale"] == pytest.approx(0.5**0.5)
    assert "scale" not in rows["model.layers.3.mlp.up_proj.weight"].options


def test_a_head_of_zeros_still_learns():
    network = model()
    plan = muon_mup_plan(network, head="zero")
    plan.initialize(network)
    assert network(input_ids=IDS).logits.abs().max() == 0
    optimizer = MuonPlusPlus(plan.param_groups(network))
    for _ in range(5):
        network(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert network(input_ids=IDS, labels=IDS).loss < math.log(19) - 0.1


def test_a_tied_head_is_said_to_need_a_multiplier():
    network = model(64, tie_word_embeddings=True)
    plan = muon_mup_plan(network, base_width=16)
    row = rows_of(plan)["model.embed_tokens.weight"]
    assert (row.algorithm, row.multiplier) == ("adamw", 0.25)
    assert any("multiply logits by 0.25" in note for note in plan.notes)
    with pytest.raises(ConfigError, match="tied"):
        install_multipliers(network, plan)
    assert install_multipliers(network, muon_mup_plan(network)) == []


def test_fused_matrices_are_split_where_queries_keys_and_values_are():
    network = phi()
    assert fused_parts(network) == {"model.layers.0.self_attn.qkv_proj.weight": [64, 16, 16]}
    plan = muon_mup_plan(network)
    rows = rows_of(plan)
    assert rows["model.layers.0.self_attn.qkv_proj.weight"].options == {"split": [64, 16, 16]}
    assert rows["model.layers.0.mlp.gate_up_proj.weight"].options == {"blocks": 2}
    assert any("exact_init" in note for note in plan.notes)
    plan.initialize(network)
    exact_init(network, plan)
    before = copy.deepcopy(network)
    optimizer = MuonPlusPlus(plan.param_groups(network), lr=0.02)
    network(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    weight, old = (m.model.layers[0].self_attn.qkv_proj.weight.detach() for m in (network, before))
    for now, then in zip(weight.split([64, 16, 16]), old.split([64, 16, 16]), strict=True):
        step = now - (1 - 0.02 * 0.1) * then
        assert float(torch.linalg.matrix_norm(step, ord=2)) == pytest.approx(
            0.02 * spectral_unit(*then.shape), rel=2e-3
        )
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert rows_of(again)["model.layers.0.self_attn.qkv_proj.weight"].options["split"] == [
        64,
        16,
        16,
    ]


def test_gpt2s_fused_matrix_is_three():
    network = type(family("gpt2", 16))(family("gpt2", 16).config)
    row = rows_of(muon_mup_plan(network))["transformer.h.0.attn.c_attn.weight"]
    assert row.options == {"blocks": 3}
    assert row.info.transposed
    assert "√(16/16)" in row.why


def test_kernels_are_matrices_and_other_modules_an_error():
    class Images(nn.Module):
        def __init__(self, table: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.classifier = nn.Linear(8, 5)
            if table:
                self.table = nn.Parameter(torch.zeros(3, 4))

    row = rows_of(muon_mup_plan(Images(False)))["conv.weight"]
    assert row.algorithm == "matrix"
    assert row.init_std == pytest.approx(math.sqrt(8 / 3) / 9 / (math.sqrt(8) + math.sqrt(27)))
    with pytest.raises(ConfigError, match=r"table \(3, 4\) in Images"):
        muon_mup_plan(Images(True))
    assert rows_of(muon_mup_plan(Images(True), overrides={"table": "matrix"}))["table"].lr == 0.02


def test_interleaved_heads_are_not_split_by_guess():
    with torch.device("meta"):
        network = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=19,
            )
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"query_key_value\.weight.*interleaved"):
        muon_mup_plan(network)
    plan = muon_mup_plan(network, overrides={"query_key_value.weight": "matrix"})
    assert all("blocks" not in row.options for row in plan.parameters)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": 0.0}, "lr"), ({"aux_lr": -1.0}, "aux_lr"), ({"gain": math.inf}, "gain"),
        ({"head": "plain"}, "head"), ({"radius": 0.0}, "radius"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        muon_mup_plan(model(), **options)


def test_the_planner_takes_rate_and_radius_from_the_base_run():
    with torch.device("meta"):
        base, target = llama(32), llama(128)
    settings = PlanSettings(
        lr=0.02,
        aux_lr=0.01,
        weight_decay=0.5,
        base_tokens=1e6,
        tokens=1e5,
        base_batch=1e3,
        batch=1e3,
    )
    plan = muon_mup_planner(base, target, settings)
    rows = rows_of(plan)
    assert rows["model.layers.0.mlp.up_proj.weight"].weight_decay == pytest.approx(0.5)
    assert rows["lm_head.weight"].lr == pytest.approx(0.01 / 4)
    assert any("below 2" in note for note in plan.notes)
    assert any("100 steps are too few" in note for note in plan.notes)
    endless = muon_mup_planner(base, target, PlanSettings(lr=0.02, weight_decay=0.0))
    assert any("without end" in note for note in endless.notes)


# The monitor


def test_the_monitor_reads_norms_moves_and_alignments():
    network = model(32)
    plan = muon_mup_plan(network, lr=0.05)
    plan.initialize(network)
    groups = plan.param_groups(network)
    for group in groups:
        group["adaptive"] = group["algorithm"] == "matrix"
    optimizer = MuonPlusPlus(groups, max_gain=1.0)
    optimizer.watch(network)
    monitor = SpectralMonitor(network, plan, optimizer, steps=True)
    first = {reading.name: reading for reading in monitor.read()}
    expected = norms(network, plan)
    assert set(first) == set(expected)
    network(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    second = {reading.name: reading for reading in monitor.read()}
    for name, reading in first.items():
        assert [reading.norm] == pytest.approx(expected[name], rel=1e-3)
        assert (reading.moved, reading.alignment) == (None, None)
        assert second[name].moved == pytest.approx(0.05, rel=0.15)  # and decay
        assert 0 < second[name].alignment <= 1 + 1e-5


def test_the_monitor_writes_from_a_trainer_in_which_muon_trains(tmp_path):
    network = model(32)
    plan = muon_mup_plan(network, lr=0.02)
    plan.initialize(network)
    before = network(input_ids=IDS, labels=IDS).loss.item()
    optimizer = MuonPlusPlus(plan.param_groups(network))
    monitor = SpectralMonitor(network, plan, every=4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(
        model=network,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS],
        optimizers=(optimizer, schedule),
        callbacks=[monitor],
    ).train()
    assert network(input_ids=IDS, labels=IDS).loss.item() < before - 0.1
    monitor.save(tmp_path / "norms.json")
    history = json.loads((tmp_path / "norms.json").read_text())
    assert [each["step"] for each in history] == [4, 8, 12]
    assert all(0 < row["norm"] < 10 for each in history for row in each["matrices"])
    with pytest.raises(ConfigError, match="every"):
        SpectralMonitor(network, every=0)


# The command


def test_a_checkpoint_is_checked_against_its_band(tmp_path, sparing):
    network = model(32)
    plan = muon_mup_plan(network)
    plan.initialize(network)
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight.mul_(20)
    network.save_pretrained(tmp_path)
    found = reduced_norms(measure_checkpoint(tmp_path).matrices)
    for name, values in norms(network, plan).items():
        assert found[name] == pytest.approx(values[0], rel=1e-3)
    out = tmp_path / "norms.json"
    code, text, _ = sparing("check", tmp_path, "--band", 0.2, 10, "--out", out)
    assert code == 0
    assert "1 of 14 matrices outside 0.2 to 10" in text
    written = json.loads(out.read_text())
    assert [row["name"] for row in written["matrices"] if not row["inside"]] == [
        "model.layers.1.mlp.up_proj.weight"
    ]
    code, _, error = sparing("check", tmp_path, "--band", 10, 0.2)
    assert code == 2
    assert "band" in error
    code, _, error = sparing("check", tmp_path, "--lr", 0.1, 0.1, "--weight-decay", 0.1, 0.1)
    assert code == 2
    assert "second" in error


def test_groups_are_those_of_the_plan():
    network = model()
    said = muon_mup_groups(network, lr=0.03)
    assert [group["lr"] for group in said] == [
        group["lr"] for group in muon_mup_plan(network, lr=0.03).param_groups(network)
    ]
