"""Forms that need attention heads: prefixes and multi-head adapters, and where they come from."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.adapt._unified_bottleneck import BERT_DEVIATION, Scale
from sparing.adapt._unified_config import Slot
from sparing.kept import Kept
from sparing.surgery import Attention
from sparing.tuners import LayerAdapter, generator_for

TABLE_DEVIATION = 0.02


class PrefixTable(nn.Module):
    """Prefix vectors that are trained themselves, N(0, 0.02) at first.

    Attributes:
        keys, values: (kv heads, l, head_dim) float32.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    @classmethod
    def drawn(cls, attention: Attention, length: int, seed: int) -> "PrefixTable":
        """New vectors for one attention."""
        generator = generator_for(seed, f"{attention.module} prefix")
        shape = (2, attention.num_kv_heads, length, attention.head_dim)
        table = torch.empty(shape, dtype=torch.float32, device="cpu")
        keys, values = table.normal_(std=TABLE_DEVIATION, generator=generator)
        return cls(keys.clone(), values.clone())

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class PrefixTrunk(nn.Module):
    """What all attentions of one kind share while training: l embeddings and the first layer of
    the network that turns them into prefixes, tanh(E W_1 + b_1).

    Arguments:
        length: l.
        width: d, of the model.
        hidden: of the network.
        role: of the attentions, for the seed.

    Attributes:
        embeddings: (l, d) float32, N(0, 1) at first.
        weight, bias: (hidden, d) and (hidden,) float32.
    """

    def __init__(self, length: int, width: int, hidden: int, seed: int, role: str) -> None:
        super().__init__()
        generator = generator_for(seed, f"{role} prefix trunk")
        embeddings = torch.empty(length, width, dtype=torch.float32, device="cpu")
        self.embeddings = nn.Parameter(embeddings.normal_(generator=generator))
        self.weight, self.bias = _linear(hidden, width, generator)

    def forward(self) -> Tensor:
        """(l, hidden)."""
        return torch.tanh(F.linear(self.embeddings, self.weight, self.bias))


class PrefixNetwork(nn.Module):
    """The prefix of one attention as the output of a network: the trunk, and this attention's rows
    of the second layer.

    Every attention runs the trunk again: 2 l d hidden FLOPs, less than a thousandth of a block for
    a batch of a thousand tokens, and right under gradient checkpointing.

    Arguments:
        attention: where.
        trunk: shared by all attentions of this kind.
        seed: of the adapter.

    Attributes:
        weight, bias: (2 kv_heads head_dim, hidden) and (2 kv_heads head_dim,) float32.
    """

    trunk: PrefixTrunk

    def __init__(self, attention: Attention, trunk: PrefixTrunk, seed: int) -> None:
        super().__init__()
        object.__setattr__(self, "trunk", trunk)  # the tuner registers it, once
        generator = generator_for(seed, f"{attention.module} prefix")
        self.shape = (2, attention.num_kv_heads, attention.head_dim)
        self.weight, self.bias = _linear(math.prod(self.shape), len(trunk.bias), generator)
        self._kept: Kept[tuple[Tensor, Tensor]] = Kept()

    def forward(self) -> tuple[Tensor, Tensor]:
        """(kv heads, l, head_dim) twice; kept outside of training."""
        trunk = self.trunk
        sources = [trunk.embeddings, trunk.weight, trunk.bias, self.weight, self.bias]
        return self._kept.get(sources, self._make, torch.is_autocast_enabled())

    def _make(self) -> tuple[Tensor, Tensor]:
        hidden = self.trunk().to(self.weight.device)
        keys, values = F.linear(hidden, self.weight, self.bias).view(-1, *self.shape).unbind(1)
        return keys.transpose(0, 1), values.transpose(0, 1)

    def train(self, mode: bool = True) -> "PrefixNetwork":
        """Switch between training and evaluation; drops what was kept."""
        self._kept.forget()
        return super().train(mode)

    def folded(self) -> PrefixTable:
        """The same vectors without the network."""
        with torch.no_grad():
            keys, values = self._make()
        return PrefixTable(keys.float().contiguous(), values.float().contiguous())


def _linear(
    outputs: int, inputs: int, generator: torch.Generator
) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias, drawn as torch's linear layer draws them."""
    bound = inputs**-0.5
    weight = torch.empty(outputs, inputs, dtype=torch.float32, device="cpu")
    bias = torch.empty(outputs, dtype=torch.float32, device="cpu")
    for tensor in (weight, bias):
        tensor.uniform_(-bound, bound, generator=generator)
    return nn.Parameter(weight), nn.Parameter(bias)


class HeadPart(LayerAdapter):
    """Something that acts on the heads of an attention. It is held by the output layer, which it
    leaves as it is; the attention finds it there (see `_unified_attention`)."""

    mergeable: ClassVar[bool] = False
    gated: ClassVar[bool] = False

    def forward(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        return layer(x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias

    def delta(self, query: Tensor, scaling: float) -> Tensor:
        """Δh of the heads, of the query's type.

        Arguments:
            query: (batch, heads, tokens, head_dim), after rotation if there is one.
            scaling: of the attention's logits.

        Returns:
            (batch, heads, tokens, head_dim).
        """
        raise NotImplementedError


class GatedPrefix(HeadPart):
    """Prefix tuning: keys and values before the real ones (paper, eq. 6).

    Keys are those that the attention compares with, after any rotation, and have no position.
    """

    gated: ClassVar[bool] = True

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def tables(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v, (kv heads, l, head_dim) each."""
        return self.source()


class AddedPrefix(GatedPrefix):
    """A prefix without the gate: head + s softmax(q P_kᵀ) P_v."""

    gated: ClassVar[bool] = False

    def __init__(self, source: nn.Module, slot: Slot) -> None:
        super().__init__(source)
        self.scale = Scale(slot)

    def delta(self, query: Tensor, scaling: float) -> Tensor:
        keys, values = (by_query_head(table, query).to(query.dtype) for table in self.tables())
        mixed = F.scaled_dot_product_attention(query, keys[None], values[None], scale=scaling)
        return self.scale(mixed)


class MultiHeadAdapter(HeadPart):
    """A parallel adapter a head that reads the query: s ReLU(q P_kᵀ) P_v. With as many parameters
    as a parallel adapter of width r its change has rank up to heads · r.

    Attributes:
        keys, values: (heads, r, head_dim) float32.
    """

    def __init__(self, slot: Slot, attention: Attention, width: int, seed: int) -> None:
        super().__init__()
        generator = generator_for(seed, f"{attention.module} multi-head adapter")
        shape = (attention.num_heads, width, attention.head_dim)
        keys = torch.empty(shape, dtype=torch.float32, device="cpu")
        values = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if slot.init == "bert":
            keys.normal_(std=BERT_DEVIATION, generator=generator)
            values.normal_(std=BERT_DEVIATION, generator=generator)
        else:
            for head in keys:
                nn.init.kaiming_uniform_(head, a=math.sqrt(5), generator=generator)
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)
        self.scale = Scale(slot)

    def delta(self, query: Tensor, scaling: float) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        hidden = F.relu(query.to(exact) @ self.keys.to(exact).transpose(1, 2))
        return self.scale(hidden @ self.values.to(hidden.dtype)).to(query.dtype)


def by_query_head(table: Tensor, query: Tensor) -> Tensor:
    """(kv heads, l, head_dim) -> (heads, l, head_dim), for grouped-query attention."""
    return table.repeat_interleave(query.shape[1] // len(table), dim=0)


def new_head_part(
    slot: Slot, width: int, attention: Attention, trunk: PrefixTrunk | None, seed: int
) -> HeadPart:
    """The part for one attention; with `trunk`, prefixes come from a network."""
    if slot.form == "mh_adapter":
        return MultiHeadAdapter(slot, attention, width, seed)
    source: nn.Module
    if trunk is None:
        source = PrefixTable.drawn(attention, width, seed)
    else:
        source = PrefixNetwork(attention, trunk, seed)
    return GatedPrefix(source) if slot.composes == "gated" else AddedPrefix(source, slot)


def new_trunks(
    attentions: list[Attention], length: int, hidden: int, seed: int
) -> dict[str, PrefixTrunk]:
    """One trunk a kind of attention: networks are not shared between kinds."""
    widths = {attention.role: attention.width for attention in attentions}
    return {role: PrefixTrunk(length, d, hidden, seed, role) for role, d in widths.items()}


def prefix_vectors(part: Any) -> tuple[Tensor, Tensor]:
    """P_k and P_v of a part that has them."""
    return part.tables()
