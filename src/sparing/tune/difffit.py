"""DiffFit: fine-tune biases, norms and a scale of every branch (Xie et al. 2023)."""

from typing import Any

import torch
from torch import Tensor, nn

BRANCHES = ("attn1", "attn2", "ff", "ff_context")
_SCALE = "gamma"


def install(model: nn.Module) -> list[str]:
    """Give every branch of the transformer blocks a trainable scale γ = 1.

    A branch is a module called attn1, attn2, ff or ff_context that returns one tensor and is added
    to its input by the block around it [rec: which outputs γ scales]. γ is float32 of shape (1,).
    Joint attention, which returns two tensors, gets none.

    Returns:
        names of the scales; branches that have one already keep it.
    """
    found = []
    for name, module in branches(model):
        if _SCALE not in module._parameters:
            device = next(module.parameters()).device
            module.register_parameter(_SCALE, nn.Parameter(torch.ones(1, device=device)))
            module._difffit_hook = module.register_forward_hook(_scaled)  # type: ignore[assignment]
        found.append(f"{name}.{_SCALE}")
    return found


def branches(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that γ scales, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in BRANCHES and _last_linear(module) is not None
    ]


def belongs(name: str) -> bool:
    """Whether a parameter is trained, by its name: bias, norm or γ."""
    return any(word in name for word in ("bias", "norm", _SCALE))


def export(model: nn.Module) -> nn.Module:
    """Fold every γ into the branch's last linear layer, in place; returns the model."""
    for _, module in branches(model):
        if _SCALE not in module._parameters:
            continue
        last: Any = _last_linear(module)
        with torch.no_grad():
            scale = module._parameters[_SCALE]
            assert scale is not None
            last.weight.copy_(last.weight.float() * scale)
            if last.bias is not None:
                last.bias.copy_(last.bias.float() * scale)
        module._difffit_hook.remove()  # type: ignore[union-attr, operator]
        del module._difffit_hook, module._parameters[_SCALE]
    return model


def _scaled(module: Any, args: Any, output: Tensor) -> Tensor:
    return output * module.gamma.to(output.dtype)


def _last_linear(module: nn.Module) -> nn.Linear | None:
    """The layer whose output is the branch's, up to dropout."""
    if getattr(module, "residual_connection", False):
        return None  # its output is more than that of its last layer
    if getattr(module, "to_add_out", None) is not None:
        return None  # joint attention
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return linears[-1] if linears else None
