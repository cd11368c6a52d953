"""Models of several widths, on the meta device, for tests of scaling rules."""

import torch
import transformers
from torch import nn

HEAD = 8


def llama(width: int, layers: int = 2, kv_heads: int | None = None, **options):
    """Heads of 8, as many as the width holds; keys and values grow with it unless said."""
    config = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": kv_heads or width // HEAD,
        "head_dim": HEAD,
        "vocab_size": 19,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | options)))


def family(kind: str, width: int) -> nn.Module:
    """One of seven families, on the meta device."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": width // HEAD,
    }
    grouped = sizes | {"num_key_value_heads": width // HEAD, "vocab_size": 19}
    grouped |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    kinds = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, grouped),
        "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, grouped),
        "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, grouped),
        "qwen3": (
            transformers.Qwen3ForCausalLM,
            transformers.Qwen3Config,
            grouped | {"head_dim": HEAD, "tie_word_embeddings": True},
        ),
        "mixtral": (
            transformers.MixtralForCausalLM,
            transformers.MixtralConfig,
            grouped | {"num_local_experts": 4},
        ),
        "gpt2": (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config,
            {
                "n_embd": width, "n_layer": 1, "n_head": width // HEAD, "vocab_size": 19,
                "bos_token_id": 1, "eos_token_id": 2,
            },
        ),
        "vit": (
            transformers.ViTForImageClassification,
            transformers.ViTConfig,
            sizes | {"image_size": 8, "patch_size": 4},
        ),
    }  # fmt: skip
    model_class, config_class, options = kinds[kind]
    with torch.device("meta"):
        return model_class(config_class(**options))


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "gpt2", "vit")


def on_meta(width: int, **options) -> nn.Module:
    with torch.device("meta"):
        return llama(width, **options)
