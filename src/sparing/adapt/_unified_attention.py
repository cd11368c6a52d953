"""Attention with prefixes: the registered attention function and the identity behind it.

Attention over l prefix vectors put before the real keys and values is the gated sum
(1 - λ) Attn(q, K, V) + λ softmax(q P_kᵀ) P_v, with λ = σ(logsumexp a - logsumexp b) for the logits
a of the prefix and b of the content (paper, eqs. 6 and 7). Long queries use the model's own
attention function on longer keys, values and masks; single queries, as in generation, use the sum
and so never copy the cache.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparing.adapt._unified_bottleneck import UnifiedLayer
from sparing.adapt._unified_prefix import GatedPrefix, HeadPart
from sparing.errors import ConfigError

NAME = "sparing_unified_peft"
MASKED = ("sdpa", "eager")  # implementations that take a mask of four dimensions


class Route:
    """Stands for an attention module's configuration and leads its attention through ours.

    Everything but the implementation is the configuration's own, which stays as it is, so that
    masks are made as before.

    Arguments:
        config: the module's configuration.
        site: the wrapped output layer, which holds the parts of the adapters.
    """

    _attn_implementation = NAME

    def __init__(self, config: Any, site: UnifiedLayer) -> None:
        self.config, self.site = config, site
        self.gates: list[Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)

    @property
    def implementation(self) -> str:
        """Name of the implementation that the model is set to."""
        return self.config._attn_implementation

    def function(self, module: nn.Module) -> Callable[..., Any]:
        """The attention function that the model would use."""
        own = sys.modules[type(module).__module__]
        eager: Any = getattr(own, "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)


def check_routable(module: nn.Module, name: str) -> None:
    """Raise a `ConfigError` if a module computes attention in its own way."""
    if not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise ConfigError(
            f"module {name!r}",
            expected="attention through transformers' AttentionInterface",
            found=f"{type(module).__name__}, which attends in its own way",
            mend="Use form='adapter' or 'lora' for attn on this architecture.",
        )


def route(module: nn.Module, site: UnifiedLayer) -> None:
    """Lead a module's attention through ours."""
    if not isinstance(module.config, Route):
        setattr(module, "config", Route(module.config, site))  # noqa: B010 (not a Module's type)


def unroute(model: nn.Module) -> None:
    """Give every module its own configuration back."""
    for module in model.modules():
        one: Any = getattr(module, "config", None)
        if isinstance(one, Route):
            module.config = one.config


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of adapted modules; arguments and result as in transformers.

    Attention weights are those of the real keys; with a gated prefix they sum to 1 - λ.
    """
    config: Any = module.config
    function = config.function(module)
    parts = [part for part in config.site.active_parts if isinstance(part, HeadPart)]
    if not parts:
        return function(module, query, key, value, attention_mask, **options)
    prefixes = [part for part in parts if part.gated and isinstance(part, GatedPrefix)]
    if prefixes:
        tables = [part.tables() for part in prefixes]
        keys, values = (
            torch.cat(of, 1) if len(of) > 1 else of[0] for of in zip(*tables, strict=True)
        )
        heads, weights = _with_prefix(
            module, function, query, key, value, attention_mask, keys, values, options
        )
    else:
        heads, weights = function(module, query, key, value, attention_mask, **options)
    scaling = _scaling(query, options)
    for part in parts:
        if not part.gated:
            heads = heads + part.delta(query, scaling).transpose(1, 2).to(heads.dtype)
    return heads, weights


def _joined(tables: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The prefixes of all active adapters, one after the other."""
    if len(tables) == 1:
        return tables[0]
    return torch.cat([keys for keys, _ in tables], 1), torch.cat(
        [values for _, values in tables], 1
    )


def _scaling(query: Tensor, options: dict[str, Any]) -> float:
    given = options.get("scaling")
    return query.shape[-1] ** -0.5 if given is None else given


def _with_prefix(
    module: nn.Module,
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    config: Any = module.config
    name, length = config.implementation, prefix_keys.shape[1]
    if name not in MASKED:
        raise ConfigError(
            f"attention implementation {name!r}",
            expected=f"one of {', '.join(MASKED)}, whose masks can be extended for a prefix",
            found=repr(name),
            mend='Call model.set_attn_implementation("sdpa").',
        )
    options = dict(options)
    causal = options.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if name == "sdpa" and mask is None and causal and query.shape[2] > 1:
        mask = _causal(query.shape[2], key.shape[2], query.device)
    plain = not any(options.get(key) is not None for key in ("s_aux", "softcap"))
    alone = query.shape[2] == 1 and plain and not options.get("output_attentions")
    if config.gates is not None or (alone and not options.get("dropout")):
        bias = options.get("position_bias")
        heads, gate = gated_attention(
            query, key, value, prefix_keys, prefix_values, mask, _scaling(query, options), bias
        )
        if config.gates is not None:
            config.gates.append(gate.detach())
        return heads.transpose(1, 2), None
    if mask is not None:
        mask = F.pad(mask, (length, 0), value=mask.dtype == torch.bool)
    if options.get("position_bias") is not None:
        options["position_bias"] = F.pad(options["position_bias"], (length, 0))
    batch = len(key)
    key, value = (
        torch.cat([prefix.to(real.dtype).expand(batch, -1, -1, -1), real], 2)
        for prefix, real in ((prefix_keys, key), (prefix_values, value))
    )
    if name == "sdpa":
        options["is_causal"] = False  # the mask says it
    heads, weights = function(module, query, key, value, mask, **options)
    return heads, None if weights is None else weights[..., length:]


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """(1, 1, queries, keys) bool: what the backends allow where they get no mask."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and a prefix as a gated sum (paper, eqs. 6 and 7).

    Logits and softmax are float32, or float64 for such inputs. A query whose every real key is
    masked has λ = 1.

    Arguments:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, kv heads, keys, head_dim); kv heads divides heads.
        prefix_keys, prefix_values: (kv heads, l, head_dim).
        mask: (1 or batch, 1 or heads, 1 or queries, keys), bool (True: visible) or added to the
            logits; None: all visible.
        scaling: of the logits; None: 1/√head_dim.
        position_bias: (1 or batch, heads, queries, keys), added to the content's logits.

    Returns:
        The heads, (batch, heads, queries, head_dim) of the value's type, and λ, (batch, heads,
        queries) float.
    """
    batch, num_heads, queries, width = query.shape
    kv_heads = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    exact = torch.promote_types(query.dtype, torch.float32)
    # Heads that share keys become one long row of queries, so that no key is copied.
    rows = query.reshape(batch, kv_heads, -1, width)
    own = prefix_keys.to(query.dtype).transpose(1, 2)
    a = (rows @ own).to(exact).view(batch, num_heads, queries, -1) * scaling
    b = (rows @ key.transpose(2, 3)).to(exact).view(batch, num_heads, queries, -1) * scaling
    if position_bias is not None:
        b = b + position_bias.to(exact)
    if mask is not None and mask.dtype == torch.bool:
        b = b.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        b = b + mask.to(exact)
    gate = torch.sigmoid(a.logsumexp(-1) - b.logsumexp(-1))
    weights = torch.cat([a, b], -1).softmax(-1).to(value.dtype)
    length = prefix_keys.shape[1]
    weights = weights.view(batch, kv_heads, -1, weights.shape[-1])
    mixed = weights[..., :length] @ prefix_values.to(value.dtype)
    mixed = mixed + weights[..., length:] @ value
    return mixed.view(batch, num_heads, queries, -1), gate


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect λ of every attention with a gated prefix while the model runs in evaluation mode.

    Fused kernels do not tell λ, so that attention is computed step by step meanwhile; a warning
    says so.

    Yields:
        By the name of the attention module: a (batch, heads, queries) float tensor a forward.

    Raises:
        ConfigError: the model has no gated prefix, or trains with dropout.
    """
    routes = {
        name: module.config
        for name, module in model.named_modules()
        if isinstance(getattr(module, "config", None), Route)
        and any(part.gated for part in module.config.site.active_parts)
    }
    if not routes or model.training:
        raise ConfigError(
            "record_gates",
            expected="a model in evaluation mode with an active gated prefix",
            found="a model in training mode" if routes else "no gated prefix",
            mend="Call model.eval()." if routes else "Use UnifiedPeftConfig.prefix() or .mam().",
        )
    backend = next(iter(routes.values())).implementation
    if backend != "eager":
        warnings.warn(
            f"{backend!r} attention does not report its logits: while gates are recorded, "
            "attention is computed step by step.",
            stacklevel=3,
        )
    found: dict[str, list[Tensor]] = {name: [] for name in routes}
    for name, one in routes.items():
        one.gates = found[name]
    try:
        yield found
    finally:
        for one in routes.values():
            one.gates = None


AttentionInterface.register(NAME, attend)
