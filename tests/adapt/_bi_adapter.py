"""Small quantised adapters, for the tests of Bi-Adapter."""

import peft
import torch
import transformers
from conftest import perturb, small_llama
from torch import Tensor, nn

from sparing.adapt import BiAdapterConfig
from sparing.adapt._bi_adapter_matrix import QuantizedMatrix
from sparing.adapt.bi_adapter import matrices
from sparing.tuners import TunerLayer

KINDS = ("adaptformer", "lora")


def config(**options: object) -> BiAdapterConfig:
    return BiAdapterConfig(**({"h": 8, "dropout": 0.0} | options))  # type: ignore[arg-type]


def adapted(base: nn.Module | None = None, noise: float = 0.1, **options: object) -> peft.PeftModel:
    model = peft.get_peft_model(small_llama() if base is None else base, config(**options)).eval()
    perturb(model, noise)
    return model


def of(model: nn.Module) -> list[QuantizedMatrix]:
    return [matrix for _, matrix in matrices(model, "default")]


def adapters(model: nn.Module) -> list:
    return [m.adapters["default"] for m in model.modules() if isinstance(m, TunerLayer)]


def small_vit(labels: int = 5) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=48, image_size=16, patch_size=8, num_labels=labels
    )
    return transformers.ViTForImageClassification(config).eval()


def images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))
