"""Shared by the tests of Queryable LoRA: a small network, its adapters and what they noted."""

import peft
import torch
from conftest import perturb, small_llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparing.adapt import (
    QueryableLoRAConfig,
)
from sparing.adapt._queryable_memory import Memory, Routing
from sparing.adapt._queryable_router import Router
from sparing.adapt.queryable_lora import QueryableLoRAAdapter
from sparing.tuners import TunerLayer

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """(batch, tokens, 8) through residual blocks `blocks.<i>.up` and `.down`, token by token."""

    def __init__(self, depth: int = 4, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def config(**options: object) -> QueryableLoRAConfig:
    small = {"r": 3, "num_atoms": 4, "d_query": 5, "block_size": 1, "target_modules": "all-linear"}
    return QueryableLoRAConfig(**(small | options))  # type: ignore[arg-type]


def adapted(base: nn.Module | None = None, noise: float = 0.3, **options: object) -> peft.PeftModel:
    """An adapter that does something; on `Net`, all in float64."""
    model = peft.get_peft_model(Net() if base is None else base, config(**options)).eval()
    perturb(model, noise)
    return model.double() if base is None or isinstance(base, Net) else model


def language_model(**options: object) -> peft.PeftModel:
    return adapted(small_llama(), task_type="CAUSAL_LM", **options)


def memory_of(model: peft.PeftModel) -> Memory:
    return model.base_model.memory()


def adapters(model: nn.Module) -> dict[str, QueryableLoRAAdapter]:
    layers = [m.adapters["default"] for m in model.modules() if isinstance(m, TunerLayer)]
    return {adapter.name: adapter for adapter in layers}


def routings(model: peft.PeftModel) -> dict[int, Routing]:
    return memory_of(model).found(model.base_model.passes.current)


def inputs(batch: int = 2, tokens: int = 5, seed: int = 0) -> Tensor:
    return drawn(batch, tokens, WIDTH, seed=seed)


def gradients(model: nn.Module, x: Tensor, **options: object) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x, **options).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def lora_like(model: peft.PeftModel, factors: dict[str, tuple[Tensor, Tensor]], r: int, **options):
    """PEFT's LoRA with these A and B."""
    lora = peft.get_peft_model(Net(), peft.LoraConfig(r=r, target_modules="all-linear", **options))
    lora.double()
    for name, layer in lora.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            a, b = factors[name.removeprefix("base_model.model.")]
            layer.lora_A["default"].weight.data = a.detach().clone()
            layer.lora_B["default"].weight.data = b.detach().clone()
    return lora


def router(beta: float = 1.0, k: int | None = None, atoms: int = 6, **options: object) -> Router:
    chosen = config(
        num_atoms=atoms, top_k=k, prior_beta=beta, instruction="prior", r=3, d_query=5, **options
    )
    return Router(chosen, depth=3, num_blocks=4, instruction_width=7).double()


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


class Words:
    """A tokenizer: every letter is a token."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 64 for letter in text]}


def prompt_mask(length: int = 4) -> Tensor:
    return (torch.arange(12) < length).expand(2, 12)
