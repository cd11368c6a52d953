"""Adapters as experts: as good as merging them into the base first."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import perturb, small_gpt2, small_llama
from safetensors.torch import load_file, save_file
from torch import nn

from sparing.adapt import HUTConfig, MoSConfig, NeuroAdaConfig, SaRAConfig
from sparing.errors import CheckpointError, SparingError
from sparing.merge import merge
from sparing.merge.experts import LoraExpert, open_expert
from sparing.merge.tuner_expert import TunerExpert
from sparing.shards import Checkpoint

# Noise on a tiny random base is large, and its embeddings are tied.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*hardly a fine-tune", "ignore:.*tie", "ignore:Setting `save_embedding"
)

ATTENTION = ["q_proj", "v_proj"]
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear", "r": 4, "lora_alpha": 12},
    "patterns": {
        "target_modules": ATTENTION,
        "r": 4,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    "rslora": {"target_modules": ATTENTION, "r": 4, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 3},
    "saved modules": {"target_modules": ATTENTION, "modules_to_save": ["norm"]},
}
OTHERS: dict[str, peft.PeftConfig] = {
    "dora": peft.LoraConfig(target_modules=ATTENTION, use_dora=True),
    "loha": peft.LoHaConfig(target_modules=ATTENTION, r=4),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": peft.VeraConfig(target_modules=["q_proj"], r=4),
    "mos": MoSConfig(target_modules="all-linear", r=2),
    "neuroada": NeuroAdaConfig(target_modules="all-linear"),
    "sara": SaRAConfig(target_modules=ATTENTION, n_params=300),
}


def train(folder: Path, base: nn.Module, config: peft.PeftConfig) -> dict[str, torch.Tensor]:
    """Save the base and a perturbed adapter; the state of the merged model."""
    base.save_pretrained(folder / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    perturb(model, 0.05, seed=1)
    model.save_pretrained(folder / "adapter")
    merged: Any = model.merge_and_unload()
    return {n: t.detach().clone() for n, t in merged.named_parameters()}


def merged_alone(folder: Path, block_size: int = 100) -> dict[str, torch.Tensor]:
    out = merge(
        folder / "base",
        [folder / "adapter"],
        "task-arithmetic",
        folder / "out",
        scale=1.0,
        block_size=block_size,
        threads=2,
    )
    return load_file(out / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_is_what_merging_it_into_the_base_gives(tmp_path: Path, kind: str) -> None:
    expected = train(tmp_path, small_llama(), peft.LoraConfig(**LORAS[kind]))
    with Checkpoint(tmp_path / "base") as base:
        expert = open_expert(tmp_path / "adapter", base, tmp_path / "base")
        assert isinstance(expert, LoraExpert)
        expert.close()
    assert_same(merged_alone(tmp_path), expected)


def test_a_lora_on_transposed_weights(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, r=4)
    expected = train(tmp_path, small_gpt2(), config)
    assert_same(merged_alone(tmp_path), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_adapter_goes_through_peft(tmp_path: Path, kind: str) -> None:
    expected = train(tmp_path, small_llama(), OTHERS[kind])
    with Checkpoint(tmp_path / "base") as base:
        expert = open_expert(tmp_path / "adapter", base, tmp_path / "base")
        assert isinstance(expert, TunerExpert)
        expert.close()
    assert_same(merged_alone(tmp_path), expected)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_changes_biases(tmp_path: Path) -> None:
    """HUT's merge has a bias: GPT-2 has places for it, Llama has none."""
    expected = train(tmp_path, small_gpt2(), HUTConfig(target_modules=["c_attn", "c_fc"]))
    assert_same(merged_alone(tmp_path), expected)
    train(tmp_path / "llama", small_llama(), HUTConfig(target_modules=ATTENTION))
    with pytest.raises(CheckpointError, match="a new bias"):
        merged_alone(tmp_path / "llama")


def test_adapters_and_models_compete_together(tmp_path: Path) -> None:
    expected = train(tmp_path, small_llama(), peft.LoraConfig(**LORAS["plain"]))
    del expected["model.embed_tokens.weight"]
    model = small_llama()
    perturb(model, 0.01, seed=9)
    model.save_pretrained(tmp_path / "full")
    state = {**dict(small_llama().state_dict()), **expected}
    lora = small_llama()
    lora.load_state_dict(state, strict=False)
    lora.save_pretrained(tmp_path / "expanded")
    found = [
        load_file(
            merge(tmp_path / "base", [tmp_path / first, tmp_path / "full"], "ties", tmp_path / out)
            / "model.safetensors"
        )
        for first, out in (("adapter", "a"), ("expanded", "b"))
    ]
    same = [torch.isclose(found[0][n], found[1][n], atol=1e-6).float().mean() for n in found[0]]
    assert min(same) > 0.99  # entries at the threshold may fall on either side


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_base_is_named(tmp_path: Path) -> None:
    train(tmp_path, small_gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    small_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"c_attn.*merge_and_unload"):
        merge(tmp_path / "llama", [tmp_path / "adapter"], "average", tmp_path / "out")
    train(tmp_path / "two", small_llama(), NeuroAdaConfig(target_modules=ATTENTION))
    small_llama(seed=3).save_pretrained(tmp_path / "seed3")
    with pytest.raises(CheckpointError, match="its own base model"):
        merge(tmp_path / "seed3", [tmp_path / "two" / "adapter"], "average", tmp_path / "out")


def test_factors_that_do_not_fit_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    train(tmp_path, small_llama(), peft.LoraConfig(target_modules=["q_proj"], r=4))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    key = next(name for name in whole if "lora_A" in name)
    for change, words in (
        ({key: whole[key][:, :-1].clone()}, "factors"),
        ({"base_model.model.nowhere.lora_A.weight": whole[key].clone()}, "nowhere"),
        ({key: torch.full_like(whole[key], torch.nan)}, "NaN"),
    ):
        save_file({**whole, **change}, file)
        with pytest.raises(CheckpointError, match=words):
            merge(tmp_path / "base", [tmp_path / "adapter"], "average", tmp_path / "out")
    save_file({n: t for n, t in whole.items() if n != key.replace("lora_A", "lora_B")}, file)
    with pytest.raises(CheckpointError, match="lora_B"):
        merge(tmp_path / "base", [tmp_path / "adapter"], "average", tmp_path / "out")


def test_an_adapter_without_weights_or_with_a_pickle_is_refused(tmp_path: Path) -> None:
    train(tmp_path, small_llama(), MoSConfig(target_modules=ATTENTION, r=2))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(SparingError, match="no weights"):
        merge(tmp_path / "base", [tmp_path / "adapter"], "average", tmp_path / "out")
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(SparingError, match="pickle"):
        merge(tmp_path / "base", [tmp_path / "adapter"], "average", tmp_path / "out")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOS"
