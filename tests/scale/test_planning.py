"""Plans name every parameter once, become groups, and survive files."""

import json

import pytest
import torch
import transformers

from sparing.errors import ConfigError
from sparing.scale.muon import Muon
from sparing.scale.parameters import classify
from sparing.scale.planning import Plan, PlannedParameter, pairs


def llama(width: int = 16, layers: int = 2) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=width // 8, num_key_value_heads=1, head_dim=8, vocab_size=11,
        )
    )  # fmt: skip


def plan_for(model) -> Plan:
    rows = []
    for info in classify(model).values():
        matrix = info.role == "matrix"
        rows.append(
            PlannedParameter(
                info, "matrix" if matrix else "adamw", 0.02 if matrix else 1e-3, 0.0, "a test",
                init_std=0.5 if matrix else None,
            )
        )  # fmt: skip
    return Plan("test", tuple(rows), ("a note",))


def test_groups_hold_every_parameter_once_and_train():
    model = llama()
    groups = plan_for(model).param_groups(model)
    held = [name for group in groups for name, _ in group["params"]]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    ids = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))
    optimizer = Muon(groups)
    before = model(ids, labels=ids).loss
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids, labels=ids).loss < before - 0.05


def test_a_plan_survives_json():
    plan = plan_for(llama())
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert len(plan.rows()) == len(plan.parameters)


def test_another_model_is_refused():
    with pytest.raises(ConfigError, match=r"layers\.2"):
        plan_for(llama()).param_groups(llama(layers=3))


def test_initialisation_follows_the_plan_and_the_seed():
    one, two, other = llama(64), llama(64), llama(64)
    plan = plan_for(one)
    norm = one.model.norm.weight.clone()
    plan.initialize(one, seed=1)
    plan.initialize(two, seed=1)
    plan.initialize(other, seed=2)
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (one, two, other)]
    assert weights[0].std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(one.model.norm.weight, norm)


def test_pairs_compare_sides_and_added_blocks():
    found = {pair.target.name: pair for pair in pairs(llama(16, 2), llama(64, 4))}
    assert found["model.layers.3.mlp.up_proj.weight"].base.name.startswith("model.layers.1.")
    assert found["model.layers.3.mlp.up_proj.weight"].input_ratio == 4
    key = found["model.layers.0.self_attn.k_proj.weight"]
    assert (key.input_ratio, key.output_ratio) == (4, 1)
    assert found["model.norm.weight"].input_ratio == 1


def test_pairs_of_two_architectures_are_refused():
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11)
    )
    with pytest.raises(ConfigError, match="one architecture"):
        pairs(llama(), gpt)
