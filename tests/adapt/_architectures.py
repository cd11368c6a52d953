"""One small model of every kind that has attention, each with inputs for a forward."""

from collections.abc import Callable

import torch
import transformers
from conftest import small_gpt2, small_llama, token_ids
from torch import nn

WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
ENCODER = {**WIDTHS, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}
SIDES = {
    f"{side}_{option}": value
    for side in ("encoder", "decoder")
    for option, value in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))
}
SEQ2SEQ = {
    "d_model": 32,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def _qwen() -> nn.Module:
    config = transformers.Qwen3Config(
        **ENCODER, num_key_value_heads=2, head_dim=16, bos_token_id=1, eos_token_id=2
    )
    return transformers.Qwen3ForCausalLM(config)


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(**ENCODER, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.RobertaForMaskedLM(config)


def _bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ, **SIDES))


def _mbart() -> nn.Module:
    return transformers.MBartForConditionalGeneration(transformers.MBartConfig(**SEQ2SEQ, **SIDES))


def _t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=4, vocab_size=64,
        decoder_start_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        **WIDTHS, num_attention_heads=4, image_size=8, patch_size=4, num_labels=3
    )
    return transformers.ViTForImageClassification(config)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": small_llama,
    "gpt2": small_gpt2,
    "qwen3": _qwen,
    "bert": _bert,
    "roberta": _roberta,
    "bart": _bart,
    "mbart": _mbart,
    "t5": _t5,
    "vit": _vit,
}
SEQUENCE_TO_SEQUENCE = ("bart", "mbart", "t5")


def small(kind: str) -> nn.Module:
    """A small model with weights large enough to make attention uneven."""
    torch.manual_seed(0)
    model = MAKERS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def inputs_of(kind: str, padded: bool = False) -> dict[str, torch.Tensor]:
    """Arguments of a forward; `padded` hides the first tokens of the second row."""
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    inputs = {"input_ids": token_ids()}
    if padded:
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, :4] = 0
        inputs["attention_mask"] = mask
    if kind in SEQUENCE_TO_SEQUENCE:
        inputs["decoder_input_ids"] = token_ids(length=7, seed=1)
    return inputs
