"""`sparing plan` prints and writes what happens to every parameter."""

import json

import pytest
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from sparing.cli import app
from sparing.errors import ConfigError
from sparing.scale import Plan
from sparing.scale.planners import PLANNERS
from sparing.scale.settings import PlanSettings

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_key_value_heads": 2}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {}),
    "vit": (ViTForImageClassification, ViTConfig, {}),
}


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)


def config_file(folder, family: str, width: int, depth: int, **options) -> str:
    """A configuration as a JSON file, as its model class writes it."""
    model_class, config_class, family_options = FAMILIES[family]
    sizes = dict(zip(SIZES, (width, 2 * width, depth, width // 8), strict=True))
    if family == "gpt2":
        sizes = {"n_embd": width, "n_layer": depth, "n_head": width // 8}
    config = config_class(**sizes, **family_options, **options)
    config.architectures = [model_class.__name__]
    path = folder / f"{family}-{width}-{depth}.json"
    config.to_json_file(path)
    return str(path)


@pytest.mark.parametrize("method", PLANNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_plans_every_family(family, method, tmp_path):
    untied = {} if family == "vit" else {"tie_word_embeddings": False}
    base = config_file(tmp_path, family, 16, 2, **untied)
    target = config_file(tmp_path, family, 64, 8, **untied)
    out = tmp_path / "plan.json"
    done = run(
        "--base", base, "--target", target, "--lr", "0.02", "--method", method, "--out", str(out)
    )
    assert done.exit_code == 0, done.output
    plan = Plan.from_json(json.loads(out.read_text()))
    assert plan.method == method
    assert len({row.info.name for row in plan.parameters}) == len(plan.parameters) > 20
    assert all(row.why for row in plan.parameters)


def test_the_depth_of_the_base_enters_the_rate(tmp_path):
    base, target = config_file(tmp_path, "llama", 16, 2), config_file(tmp_path, "llama", 32, 8)
    out = tmp_path / "plan.json"
    run("--base", base, "--target", target, "--lr", "0.02", "--aux-lr", "0.005", "--out", str(out))
    rates = {row["lr"] for row in json.loads(out.read_text())["parameters"]}
    assert rates == {0.01, 0.0025}  # √(2/8)


def test_an_unknown_method_is_refused_with_near_matches():
    with pytest.raises(ConfigError, match="hyperp"):
        run("--base", "tiny", "--target", "tiny", "--lr", "0.02", "--method", "hyperb")


def test_a_run_that_is_half_described_is_refused():
    with pytest.raises(ConfigError, match="tokens and base_tokens"):
        PlanSettings(0.02, tokens=1e9)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_is_a_number_above_zero(bad):
    with pytest.raises(ConfigError, match="lr"):
        PlanSettings(bad)
