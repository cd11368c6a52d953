"""LoRA folders, read and written as PEFT does."""

import pytest
import torch
from conftest import perturb, small_llama, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from sparing.errors import CheckpointError
from sparing.lora_files import WEIGHTS_FILE, lora_scale, open_lora, write_lora

OPTIONS = {
    "plain": {"lora_alpha": 12},
    "stable": {"lora_alpha": 12, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 9, "q_proj": 2},
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_factors_times_scale_are_the_update_that_peft_merges(options, tmp_path) -> None:
    base = small_llama()
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(small_llama(), config)
    perturb(model, 0.3)
    model.save_pretrained(str(tmp_path))
    merged = model.merge_and_unload()
    lora = open_lora(tmp_path)
    assert len(lora.shapes) == 4
    for name, shape in lora.shapes.items():
        a, b, scale = lora.read(name)
        assert (a.shape, b.shape) == ((shape.rank, shape.inputs), (shape.outputs, shape.rank))
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(scale * b @ a, change, rtol=1e-4, atol=1e-6)


def test_what_is_written_is_what_is_read(tmp_path) -> None:
    name, ids = "model.layers.0.self_attn.q_proj", token_ids()
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    write_lora(tmp_path / "x", {name: (a, b)}, r=2, lora_alpha=6, target_modules=[name])
    found = open_lora(tmp_path / "x").read(name)
    assert torch.equal(found.a, a)
    assert torch.equal(found.b, b)
    assert found.scale == 3.0
    base = small_llama()
    with torch.no_grad():
        base.get_submodule(name).weight.add_(3 * b @ a)
    model = PeftModel.from_pretrained(small_llama(), str(tmp_path / "x")).eval()
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)


def test_scale_is_alpha_over_rank_or_its_root() -> None:
    assert lora_scale({"lora_alpha": 1}, "q_proj", rank=16) == 1 / 16
    assert lora_scale({"lora_alpha": 8, "use_rslora": True}, "q_proj", rank=16) == 2.0


def test_a_factor_without_its_other_half_is_refused(tmp_path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    factors = {name: (torch.ones(2, 32), torch.ones(32, 2))}
    write_lora(tmp_path / "x", factors, r=2, target_modules=[name])
    file = tmp_path / "x" / WEIGHTS_FILE
    whole = load_file(file)
    half = {key: tensor for key, tensor in whole.items() if "lora_A" in key}
    for tensors in (half, whole | {"base_model.model.lm_head.weight": torch.ones(2)}):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
            open_lora(tmp_path / "x")
