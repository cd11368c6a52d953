"""What every parameter of a model is: a matrix, an embedding, a head, a vector; and why.

Scaling rules treat these differently, so nothing is guessed: a parameter of two or more dimensions
that no rule knows is an error.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.errors import ConfigError

Role = Literal["matrix", "expert", "router", "embedding", "head", "vector"]

_EXPERTS = re.compile(r"experts?", re.IGNORECASE)
_ROUTER = re.compile(r"router|(^|\.)gate$", re.IGNORECASE)
_TOKENS = re.compile(
    r"cls_token|mask_token|dist_token|position_embeddings?|pos_embed|register_token"
)
_HEADS = re.compile(r"(^|\.)(lm_head|classifier|score|embed_out|qa_outputs)$")
_GATED = re.compile(r"(^|\.)(gate_up_proj|w13)$")
# The last matrix of an attention or feed-forward branch, whose output joins the residual stream.
_BRANCH_ENDS = ("o_proj", "down_proj", "c_proj", "out_proj", "fc2", "wo", "w2", "experts.down_proj")
_FUSED = re.compile(r"(^|\.)(c_attn|qkv|qkv_proj|query_key_value|Wqkv)$")


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter and how scaling rules see it.

    Arguments:
        name: in the model; of the first of several names of a tied parameter.
        role: "matrix" and "router" are 2-D, "expert" a stack of matrices; "embedding" has one-hot
            inputs, "head" makes the logits, "vector" is everything of which at most one dimension
            is a width.
        why: the rule that decided.
        shape: as stored.
        transposed: whether it is stored as (inputs, outputs), as in GPT-2's `Conv1D`.
        blocks: matrices of equal size stacked along the outputs, such as 3 for a fused q, k, v.
        tied: whether an embedding is the head as well.
    """

    name: str
    role: Role
    why: str
    shape: tuple[int, ...]
    transposed: bool = False
    blocks: int = 1
    tied: bool = False

    @property
    def outputs(self) -> int:
        """Of the matrix, or of one expert."""
        if len(self.shape) > 3:
            return self.shape[0]
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def inputs(self) -> int:
        """Of the matrix, or of one expert; for a kernel, channels times area."""
        if len(self.shape) > 3:
            return self.shape[1] * self.area
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def area(self) -> int:
        """Places of a convolution's kernel, (outputs, inputs, height, width, …); 1 for others."""
        return math.prod(self.shape[2:]) if len(self.shape) > 3 else 1

    @property
    def ends_branch(self) -> bool:
        """Whether its output joins the residual stream."""
        return self.name.removesuffix(".weight").endswith(_BRANCH_ENDS)

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def classify(
    model: nn.Module, overrides: dict[str, Role] | None = None
) -> dict[str, ParameterInfo]:
    """Every parameter of a model, each once, in the model's order. The meta device will do.

    Arguments:
        model: a `transformers` model or any other.
        overrides: roles by the end of a parameter's name, where the rules do not know better.

    Raises:
        ConfigError: parameters of two or more dimensions that no rule knows, all listed.
    """
    modules = dict(model.named_modules())
    head = _output_embedding(model)
    found: dict[str, ParameterInfo] = {}
    unknown: list[str] = []
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        info = _by_override(name, parameter, overrides or {}) or _info(
            name, leaf, owner, parameter, modules[owner], head
        )
        if info is None:
            unknown.append(f"{name} {tuple(parameter.shape)} in {type(modules[owner]).__name__}")
        else:
            found[name] = info
    if unknown:
        raise ConfigError(
            "parameters",
            expected="layers that the scaling rules know: linear, Conv1D, convolution, embedding,"
            " mixture of experts",
            found="; ".join(unknown),
            mend='Say what they are with overrides={"name": "matrix"}, or "vector", and so on.',
        )
    return found


def _info(
    name: str, leaf: str, owner: str, parameter: Tensor, module: nn.Module, head: Tensor | None
) -> ParameterInfo | None:
    shape, kind = tuple(parameter.shape), type(module).__name__

    def made(role: Role, why: str, transposed: bool = False, blocks: int = 1) -> ParameterInfo:
        return ParameterInfo(
            name, role, why, shape, transposed, blocks, role == "embedding" and parameter is head
        )

    if parameter.ndim <= 1:
        return made("vector", "has one dimension")
    if isinstance(module, nn.Embedding):
        return made("embedding", "rows are chosen by index")
    if _TOKENS.search(leaf):
        return made("vector", "learned token or position")
    if parameter is head or _HEADS.search(owner):
        return made("head", "makes the logits")
    if parameter.ndim == 3 and _EXPERTS.search(f"{kind} {owner}"):
        fused = 2 if leaf in ("gate_up_proj", "w13") else 1
        return made("expert", "one matrix for each expert", blocks=fused)
    if _ROUTER.search(kind) or (_ROUTER.search(owner) and isinstance(module, nn.Linear)):
        return made("router", "chooses experts")
    if isinstance(module, nn.Linear | Conv1D):
        transposed = isinstance(module, Conv1D)
        outputs = shape[1] if transposed else shape[0]
        blocks = 3 if _FUSED.search(owner) and outputs % 3 == 0 else 1
        blocks = 2 if _GATED.search(owner) and outputs % 2 == 0 else blocks
        return made("matrix", f"weight of {kind}", transposed, blocks)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and "patch" in owner:
        return made("vector", "reads pixels, of which there are as many at every width")
    if isinstance(module, nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return made("matrix", "kernel, flattened to outputs × inputs")
    return None


def _by_override(name: str, parameter: Tensor, overrides: dict[str, Role]) -> ParameterInfo | None:
    for end, role in overrides.items():
        if name == end or name.endswith(f".{end}"):
            return ParameterInfo(name, role, "said by the user", tuple(parameter.shape))
    return None


def _output_embedding(model: nn.Module) -> Tensor | None:
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if getter is not None else None
    return None if layer is None else layer.weight


def matrices(tensor: Tensor, *, transposed: bool = False, blocks: int = 1) -> Tensor:
    """A view of a weight as a stack of matrices that act as W x.

    Arguments:
        tensor: (outputs, inputs), (experts, outputs, inputs), or a convolution's kernel
            (outputs, inputs, height, width).
        transposed: whether it is stored as (inputs, outputs).
        blocks: matrices of equal size along the outputs.

    Returns:
        (…, outputs / blocks, inputs); writing to it writes to `tensor`.
    """
    if tensor.ndim > 3:
        tensor = tensor.flatten(1)
    view = tensor.transpose(-1, -2) if transposed else tensor
    return view.unflatten(-2, (blocks, -1)) if blocks > 1 else view


def counts(parameters: Iterable[ParameterInfo]) -> dict[str, int]:
    """Numbers in each role."""
    total: dict[str, int] = {}
    for info in parameters:
        total[info.role] = total.get(info.role, 0) + info.count
    return total
