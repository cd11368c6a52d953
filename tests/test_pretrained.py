"""Models by name, and what is said of damaged ones."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparing import pretrained
from sparing.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def tiny() -> pretrained.Pretrained:
    return pretrained.load("tiny")


@pytest.fixture
def folder(tiny: pretrained.Pretrained, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(pretrained.resolve("tiny"), tmp_path / "model"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 35)[None]).logits


def test_tiny_is_a_small_llama_in_evaluation_mode(tiny: pretrained.Pretrained) -> None:
    assert type(tiny.model).__name__ == "LlamaForCausalLM"
    assert not tiny.model.training
    assert sum(p.numel() for p in tiny.model.parameters()) < 200_000
    assert tiny.tokenizer.decode(tiny.tokenizer("def f():")["input_ids"]) == "def f():"


def test_tiny_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        shutil.copytree(source, folder)

    source = pretrained.resolve("tiny")
    monkeypatch.setenv("SPARING_CACHE", str(tmp_path))
    monkeypatch.setitem(pretrained._BUILT_IN, "tiny", make)
    assert pretrained.resolve("tiny") == pretrained.resolve("tiny") == str(tmp_path / "tiny")
    assert len(made) == 1


def test_a_folder_loads_in_the_type_asked_for(folder: Path, tiny: pretrained.Pretrained) -> None:
    assert torch.equal(logits(pretrained.load(str(folder)).model), logits(tiny.model))
    half = pretrained.load(str(folder), dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["tinny", "smollm2", "./tiny", "a/b/tiny", "missing.gguf", "/no"])
def test_an_unknown_name_gets_near_matches(name: str) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean (tiny|smollm2-135m)|Choose one of"):
        pretrained.load(name)


def test_an_unknown_hub_id_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for act in (pretrained.load, pretrained.load_tokenizer, pretrained.architecture):
        with pytest.raises(ConfigError, match="nobody/no-such-model"):
            act("nobody/no-such-model")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_named(folder: Path, kept: float) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match="model"):
        pretrained.load(str(folder))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        pretrained.check(str(folder))


def test_a_damaged_header_is_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[20:40] = b"\xff" * 20
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        pretrained.check(str(folder))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match="model: expected a complete model"):
        pretrained.load(str(folder))


def test_a_damaged_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="model: expected a complete model"):
        pretrained.architecture(str(folder))


def write_gguf(path: Path, source: pretrained.Pretrained) -> None:
    """The tiny model in the format of llama.cpp, whose rotary halves are interleaved."""
    gguf = pytest.importorskip("gguf")
    config, weights = source.model.config, source.model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    vocabulary = source.tokenizer.get_vocab()
    merges = _merges(source.tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(source.tokenizer.bos_token_id)
    writer.add_eos_token_id(source.tokenizer.eos_token_id)
    writer.add_pad_token_id(source.tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        for kind, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if kind in name:
                halves = array.reshape(heads, 2, -1, array.shape[1])
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        stem = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{stem}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(tokenizer: Any) -> list[str]:
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [" ".join(merge) for merge in merges]


def test_gguf_is_converted_once_to_the_same_model(
    tiny: pretrained.Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, tiny)
    monkeypatch.setenv("SPARING_CACHE", str(tmp_path / "cache"))
    model, tokenizer = pretrained.load(str(path))
    assert torch.allclose(logits(model), logits(tiny.model), atol=1e-5)
    text = "import os\n\nclass A:\n    pass"
    assert tokenizer(text)["input_ids"][-8:] == tiny.tokenizer(text)["input_ids"][-8:]
    converted = Path(pretrained.resolve(str(path)))
    assert converted.parent == tmp_path / "cache"
    assert AutoModelForCausalLM.from_pretrained(converted).config.hidden_size == 64
    before = (converted / "config.json").stat().st_mtime_ns
    pretrained.load(str(path))
    assert (converted / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.6])
def test_a_truncated_gguf_is_named_and_leaves_nothing(
    tiny: pretrained.Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, tiny)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    monkeypatch.setenv("SPARING_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"small\.gguf"):
        pretrained.load(str(path))
    assert list((tmp_path / "cache").iterdir()) == []
