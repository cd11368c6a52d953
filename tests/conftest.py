"""Small models shared by the tests; nothing here touches the network."""

import copy
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def small_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """Two blocks, grouped-query attention, tied embeddings; every width divides by 8."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def small_gpt2(dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT2LMHeadModel:
    """Two blocks with `Conv1D` layers, whose weights are stored as (inputs, outputs)."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=64,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def token_ids(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """(rows, length) int64 below 64."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def perturb(model: nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Add noise to every trainable parameter, so that an adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))


@pytest.fixture(params=["llama", "gpt2"])
def base_model(request: pytest.FixtureRequest) -> nn.Module:
    return {"llama": small_llama, "gpt2": small_gpt2}[request.param]()


@pytest.fixture
def clone():
    return copy.deepcopy


@pytest.fixture
def sparing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process; returns its exit code, output and errors."""

    from sparing import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparing", *map(str, arguments)])
        monkeypatch.setattr(cli, "console", cli.Console(width=200))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return code if isinstance(code, int) else int(bool(code)), *capfd.readouterr()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return run
