"""Look at the routing of a Queryable LoRA, fix it, or keep that of a prompt."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sparing.adapt._queryable_memory import Memory, Routing
from sparing.adapt.queryable_lora import QueryableLoRATuner
from sparing.errors import ConfigError, DataError
from sparing.forward_pass import ForwardPass
from sparing.lora_files import CARRIED_OVER, write_lora
from sparing.routing import entropy
from sparing.tuners import TunerLayer


@dataclass(frozen=True)
class BlockRouting:
    """Where one block sent its tokens.

    Arguments:
        block: its number, from 0.
        modules: that are routed together.
        weights: p, (batch, tokens, M), or without the axes on which it does not depend.
        mean: over tokens that are no padding, (M,).
        entropy: mean over these tokens, in nats; 0 for one atom, log M for all alike.
    """

    block: int
    modules: tuple[str, ...]
    weights: Tensor
    mean: Tensor
    entropy: float


@dataclass(frozen=True)
class RoutingReport:
    """The routing of one batch, block by block; printed as a table of mean weights."""

    blocks: tuple[BlockRouting, ...]

    @property
    def mean(self) -> Tensor:
        """(blocks, M)."""
        return torch.stack([block.mean for block in self.blocks])

    def __str__(self) -> str:
        atoms = range(self.mean.shape[1])
        lines = ["block  entropy  " + "".join(f"atom {m:<3}" for m in atoms)]
        for block in self.blocks:
            weights = "".join(f"{weight:<8.3f}" for weight in block.mean.tolist())
            lines.append(f"{block.block:<7}{block.entropy:<9.3f}{weights}".rstrip())
        return "\n".join(lines)


@torch.no_grad()
def routing_report(model: PeftModel, adapter_name: str = "default", **inputs: Any) -> RoutingReport:
    """Run a batch and tell how its tokens were routed.

    Arguments:
        model: with a Queryable LoRA, active and enabled.
        adapter_name: of the adapter.
        inputs: of the model's call, such as `input_ids` and `attention_mask`.

    Raises:
        ConfigError: the model has no such adapter, or it is not active.
    """
    memory = _memory(model, adapter_name)
    one = _run(model, inputs)
    blocks = []
    for block, routing in _routings(memory, one).items():
        rows = _real_rows(one, routing.weights)
        blocks.append(
            BlockRouting(
                block,
                tuple(memory.modules_of(block)),
                routing.weights,
                rows.mean(0),
                entropy(rows).mean().item(),
            )
        )
    return RoutingReport(tuple(blocks))


@torch.no_grad()
def freeze_routing(
    model: PeftModel,
    folder: str | Path,
    *,
    instruction: str | Tensor | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    encoder: Any = None,
    adapter_name: str = "default",
) -> Tensor:
    """Fix the weights over the atoms and write the plain PEFT LoRA that the adapter then is.

    Exact where the weights depend on nothing but what is given; else an approximation, of which
    the mean over the data is the one with the least mean square error of p.

    Arguments:
        model: with a Queryable LoRA.
        folder: to write; replaced as a whole.
        instruction: text or (d_e,): p becomes the prior π(I).
        calibration: batches, as keywords of the model's call: p becomes each block's mean over
            their tokens that are no padding.
        tokenizer, encoder: for the text, as for `model.set_instruction`.
        adapter_name: of the adapter.

    Returns:
        (blocks, M): p of each block.

    Raises:
        ConfigError: neither or both are given, or the adapter has no prior.
        DataError: there is no batch, or more than one instruction.
        CheckpointError: the folder cannot be written.
    """
    memory = _memory(model, adapter_name)
    if (instruction is None) == (calibration is None) and not memory.config.is_static:
        raise ConfigError(
            "freeze_routing",
            expected="either an instruction, for its prior, or calibration data, for the mean",
            found="neither" if instruction is None else "both",
            mend="Give one of them.",
        )
    if instruction is not None:
        weights = _prior(model, memory, instruction, tokenizer, encoder, adapter_name)
    elif calibration is not None:
        weights = _mean_weights(model, memory, calibration)
    else:
        weights = torch.stack([memory.constant_weights(b) for b in range(memory.num_blocks)])
    _write(model, memory, weights, Path(folder), adapter_name)
    return weights


@contextmanager
def prompt_routing(
    model: PeftModel, adapter_name: str = "default", **prompt: Any
) -> Iterator[None]:
    """Route every forward within as the prompt was; to `generate` with granularity "sequence".

    Arguments:
        model: with a Queryable LoRA, active and enabled.
        adapter_name: of the adapter.
        prompt: of the model's call: `input_ids`, and `attention_mask` if there is padding.

    Raises:
        ConfigError: the adapter routes every token by itself, which needs no prompt.
    """
    memory = _memory(model, adapter_name)
    if memory.config.granularity != "sequence":
        raise ConfigError(
            "prompt_routing",
            expected="an adapter with granularity='sequence'",
            found=repr(memory.config.granularity),
            mend="Call generate directly.",
        )
    if "prompt_mask" not in prompt:
        tokens = next(v for v in prompt.values() if isinstance(v, Tensor))
        prompt["prompt_mask"] = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        one = _run(model, prompt)
    memory.kept = {block: note.weights for block, note in _routings(memory, one).items()}
    try:
        yield
    finally:
        memory.kept = None


def _memory(model: PeftModel, adapter_name: str) -> Memory:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, QueryableLoRATuner):
        raise ConfigError(
            "model",
            expected="a PEFT model with a Queryable LoRA",
            found=type(model if tuner is None else tuner).__name__,
            mend="Make one with peft.get_peft_model(model, QueryableLoRAConfig(...)).",
        )
    return tuner.memory(adapter_name)


def _run(model: PeftModel, inputs: Mapping[str, Any]) -> ForwardPass:
    """The notes of one forward in evaluation mode."""
    tuner: Any = model.base_model
    was_training = model.training
    model.eval()
    try:
        model(**inputs)
    finally:
        model.train(was_training)
    return tuner.passes.current


def _routings(memory: Memory, one: ForwardPass) -> dict[int, Routing]:
    found = memory.found(one)
    if not found:
        raise ConfigError(
            "adapter",
            expected="an active and enabled one, whose routing can be seen",
            found="one that took no part in the forward",
            mend="Call model.set_adapter, and leave disable_adapter.",
        )
    return found


def _real_rows(one: ForwardPass, weights: Tensor) -> Tensor:
    """(..., M) -> (rows, M), without padding."""
    real = one.real_tokens(weights.shape)
    return (
        weights.reshape(-1, weights.shape[-1]) if real is None else weights[real.to(weights.device)]
    )


def _prior(
    model: PeftModel,
    memory: Memory,
    instruction: str | Tensor,
    tokenizer: Any,
    encoder: Any,
    adapter_name: str,
) -> Tensor:
    if not memory.config.has_prior:
        raise ConfigError(
            "freeze_routing",
            expected="an adapter with an instruction prior",
            found=f"instruction={memory.config.instruction!r}",
            mend="Give calibration data instead.",
        )
    tuner: Any = model.base_model
    asked = tuner.embedded_instruction(instruction, tokenizer, encoder, adapter_name)
    if asked.dim() != 1:
        raise DataError(
            "instruction",
            expected="one instruction, as one LoRA is written",
            found=f"{len(asked)} of them",
            mend="Freeze once for each.",
        )
    groups = [memory.group(block) for block in range(memory.num_blocks)]
    return torch.stack([memory.prior(asked, group).exp() for group in groups])


def _mean_weights(
    model: PeftModel, memory: Memory, calibration: Iterable[Mapping[str, Any]]
) -> Tensor:
    total = torch.zeros(memory.num_blocks, memory.config.num_atoms, dtype=torch.float64)
    counts = torch.zeros(memory.num_blocks, 1, dtype=torch.float64)
    for batch in calibration:
        one = _run(model, batch)
        for block, routing in _routings(memory, one).items():
            rows = _real_rows(one, routing.weights).double().cpu()
            total[block] += rows.sum(0)
            counts[block] += len(rows)
    if not counts.all():
        raise DataError(
            "calibration",
            expected="at least one batch with tokens, through every block",
            found="none",
            mend="Give some batches of the kind that the model will see.",
        )
    return (total / counts).float()


def _write(
    model: PeftModel, memory: Memory, weights: Tensor, folder: Path, adapter_name: str
) -> None:
    config: Any = memory.config
    base: Any = model.base_model
    factors, transposed = {}, False
    for name, module in base.model.named_modules():
        if isinstance(module, TunerLayer) and adapter_name in module.adapters:
            block = memory.places[name].block
            factors[name] = module.adapters[adapter_name].factors(weights[block])
            transposed |= isinstance(module.get_base_layer(), Conv1D)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    extra = {key: t for key, t in state.items() if f".{QueryableLoRATuner.prefix}" not in f".{key}"}
    write_lora(
        folder,
        factors,
        transposed=transposed,
        extra=extra,
        r=config.r,
        lora_alpha=config.lora_alpha,
        **{option: getattr(config, option) for option in CARRIED_OVER},
    )
