"""MoS, mixture of shards: every layer's LoRA factors are pieced together from shared pools.

All layers of one kind (all `q_proj`, say) share a pool of row pieces, the shards. Each layer holds
fixed random indices and concatenates the shards they name into its own factors, so that a budget of
LoRA rank e acts like a higher rank r. Indices are drawn once; nothing routes on the input.

Wang et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
arXiv 2410.00938 (ICLR 2025). Equation numbers are those of our specification, which was made from
the released code.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.errors import CheckpointError, ConfigError
from sparing.kept import Kept
from sparing.tuners import (
    AdditiveAdapter,
    Tuner,
    TunerConfig,
    TunerLayer,
    generator_for,
    layer_shape,
    option_for,
    register_tuner,
)


@dataclass
class MoSConfig(TunerConfig):
    """Options of MoS.

    The number of trainable parameters is that of a LoRA of rank `budget_rank` on the same layers
    (MoS, eq. 8), whatever the other options. The paper's script leaves the learning rate to a
    default of 2e-4 for 10,000 steps; `learning_rates` starts above it because shorter runs need
    more.

    Arguments:
        r: rank of every layer's factors, >= 1; 4 or 8 in the paper for a budget of 2. At most
            p + (e - p) L for p private rows, budget e and L layers that share a pool.
        budget_rank: e, rank of the LoRA with as many parameters, >= 1; 2 or 8 in the paper.
        budget_rank_pattern: another budget for layers whose names match, as in PEFT's
            `rank_pattern`; layers that share a pool must share a budget.
        shards: l, pieces per row, >= 1; has to divide the widths of every adapted layer.
        private_rank: p, how many of a layer's r rows no other layer uses, 0 <= p <= min(e, r);
            p = e requires r = e, which is LoRA. None means 1, or 0 for a budget of 1.
        lora_alpha: above 0; the update is scaled by lora_alpha / r. 16 in the paper.
        lora_dropout: of the adapter's input, 0 <= dropout < 1. 0.1 in the paper's long runs; off
            here, as it is in PEFT's LoRA.
        pair_dissociation: draw the indices of the two factors independently, as in the paper.
        sharing: "type" shares a pool among layers of one name and shape, as in the paper; "none"
            gives every layer its own, so that r <= budget_rank.
        random_scaling: multiply the rows of each layer's first factor by fixed numbers drawn from a
            normal distribution with mean 1 and this standard deviation, >= 0. None, as in the
            paper's final method, is off. Reconstructed: the paper's motivating table names it, the
            released code keeps it off.
    """

    method: ClassVar[str] = "mos"
    size_option: ClassVar[str] = "budget_rank"
    size_pattern_option: ClassVar[str | None] = "budget_rank_pattern"
    smaller_options: ClassVar[tuple[dict[str, Any], ...]] = ({"r": 4}, {"r": 2})
    learning_rates: ClassVar[tuple[float, ...]] = (5e-4, 2e-3, 5e-3)

    r: int = 8
    budget_rank: int = 2
    budget_rank_pattern: dict[str, int] = field(default_factory=dict)
    shards: int = 2
    private_rank: int | None = None
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    pair_dissociation: bool = True
    sharing: Literal["type", "none"] = "type"
    random_scaling: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("r", "budget_rank", "shards"):
            self.require(option, getattr(self, option) >= 1, "at least 1", "Try the default.")
        budgets = (self.budget_rank, *self.budget_rank_pattern.values())
        self.require(
            "budget_rank_pattern", min(budgets) >= 1, "budgets of at least 1", "Raise the others."
        )
        self.require(
            "private_rank",
            self.private_rank is None or self.private_rank >= 0,
            "None or at least 0",
            "Use None for the default.",
        )
        self.require("lora_alpha", self.lora_alpha > 0, "above 0", "Use 16.")
        self.require(
            "lora_dropout", 0 <= self.lora_dropout < 1, "from 0 to below 1", "Use 0 or 0.1."
        )
        self.require("sharing", self.sharing in ("type", "none"), "'type' or 'none'", "Use 'type'.")
        self.require(
            "random_scaling",
            self.random_scaling is None or self.random_scaling >= 0,
            "None or a standard deviation of at least 0",
            "Use None to switch it off.",
        )

    def private_rows(self, budget: int) -> int:
        """p for layers with this budget rank."""
        if self.private_rank is None:
            return 1 if budget > 1 else 0
        return self.private_rank


class ShardPool(nn.Module):
    """The shards that a group of layers shares (MoS, eq. 1).

    Shards 0 … num_public-1 are public; after them every layer of the group has a run of its own
    (MoS, eq. 2). `a` starts uniform within ±1/√inputs, `b` at zero, so that a new adapter changes
    nothing.

    Arguments:
        config: of the adapter.
        budget: rank e of the group.
        blocks: L, layers in the group.
        inputs: width of their inputs.
        outputs: width of their outputs.
        name: of the group, for the seed.

    Attributes:
        a: (e·L·l, inputs / l) float32 shards of the first factors.
        b: (e·L·l, outputs / l) float32 shards of the second.
        num_public: how many shards every layer may draw.
        num_private: shards that belong to each layer alone.
    """

    def __init__(
        self, config: MoSConfig, budget: int, blocks: int, inputs: int, outputs: int, name: str
    ) -> None:
        super().__init__()
        pieces = config.shards
        count = budget * blocks * pieces
        self.num_private = config.private_rows(budget) * pieces
        self.num_public = count - self.num_private * blocks
        a = torch.empty(count, inputs // pieces, dtype=torch.float32, device="cpu")
        bound = inputs**-0.5
        self.a = nn.Parameter(
            a.uniform_(-bound, bound, generator=generator_for(config.seed, f"{name} a"))
        )
        self.b = nn.Parameter(
            torch.zeros(count, outputs // pieces, dtype=torch.float32, device="cpu")
        )

    def draw(self, config: MoSConfig, block: int, name: str) -> Tensor:
        """The shard map of one layer: public shards without repetition, then its private ones
        (MoS, eqs. 3 and 4).

        Indices are uint8 or int32; the types between them cannot be broadcast by NCCL.

        Arguments:
            config: of the adapter.
            block: number of the layer in the group, from 0.
            name: of the layer, for the seed.

        Returns:
            (2, r, l) integers: for both factors and each row, its shards from left to right.
        """
        generator = generator_for(config.seed, f"{name} shards")
        chosen = config.r * config.shards - self.num_private
        first = self.num_public + block * self.num_private
        private = torch.arange(first, first + self.num_private, device="cpu")

        def row() -> Tensor:
            public = torch.randperm(self.num_public, generator=generator, device="cpu")
            return torch.cat([public[:chosen], private])

        a = row()
        b = row() if config.pair_dissociation else a
        small = torch.uint8 if len(self.a) <= 2**8 else torch.int32
        return torch.stack([a, b]).view(2, config.r, config.shards).to(small)


class ShardPools(nn.Module):
    """All pools of one adapter, held once, on the tuner.

    Attributes:
        pools: by the name of their group.
        recipe: (5,) int64: r, shards, private_rank (-1 for None), pair_dissociation and seed, saved
            so that shards are never read through the indices of other options.
        places: group and number within it, by module name.
    """

    recipe: Tensor

    def __init__(self, config: MoSConfig, pools: dict[str, ShardPool]) -> None:
        super().__init__()
        self.pools = nn.ModuleDict(pools)
        self.register_buffer("recipe", _recipe(config))
        self.places: dict[str, tuple[str, int]] = {}

    def place(self, module_name: str) -> tuple[ShardPool, int]:
        """The pool of a layer and the layer's number in it."""
        group, block = self.places[module_name]
        return self.pools[group], block  # type: ignore[return-value]


class MoSAdapter(AdditiveAdapter):
    """Adds (lora_alpha / r) Bᵀ A dropout(x), with A and B gathered from the pool (MoS, eq. 6).

    Outside training the gathered factors are kept until the pool changes. Writing through
    `parameter.data` leaves no trace that could be noticed; after doing so, call `train` or `eval`,
    which drop what was kept. Products are formed in float32, or in float64 for such inputs.

    No shard appears twice in a factor, so the gradient scatter never adds two numbers at one place
    and is deterministic on every device.

    Arguments:
        config: of the adapter.
        pool: of the layer's group.
        block: number of the layer in it.
        name: of the layer, for the seed.

    Attributes:
        shard_map: (2, r, l) uint8 or int32; see `ShardPool.draw`.
        row_scale: (r, 1) float32 of `random_scaling`, or None.
    """

    pool: ShardPool
    shard_map: Tensor
    row_scale: Tensor | None

    def __init__(self, config: MoSConfig, pool: ShardPool, block: int, name: str) -> None:
        super().__init__()
        object.__setattr__(self, "pool", pool)  # the tuner registers it, once
        self.register_buffer("shard_map", pool.draw(config, block, name))
        scale = None
        if config.random_scaling is not None:
            generator = generator_for(config.seed, f"{name} scale")
            noise = torch.randn(config.r, 1, generator=generator, device="cpu")
            scale = 1 + config.random_scaling * noise
        self.register_buffer("row_scale", scale)
        self.scaling = config.lora_alpha / config.r
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._kept: Kept[tuple[Tensor, Tensor]] = Kept()

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """A, and B scaled by lora_alpha / r (MoS, eqs. 5 and 6); differentiable in the pool.

        Arguments:
            dtype: float32 or float64.

        Returns:
            (r, inputs) and (r, outputs), on the device of the indices.
        """
        if self.training:
            return self._gather(dtype)
        sources = [self.pool.a, self.pool.b, self.shard_map]
        sources += [] if self.row_scale is None else [self.row_scale]
        return self._kept.get(sources, partial(self._gather, dtype), dtype)

    def _gather(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rank, device = self.shard_map.shape[1], self.shard_map.device
        maps = self.shard_map.to(self.pool.a.device, torch.int32).flatten(1)
        a = self.pool.a.index_select(0, maps[0]).view(rank, -1).to(device, dtype)
        b = self.pool.b.index_select(0, maps[1]).view(rank, -1).to(device, dtype)
        if self.row_scale is not None:
            a = a * self.row_scale
        return a, b * self.scaling

    def delta(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        a, b = self.factors(exact)
        return F.linear(self.dropout(x).to(exact), a) @ b

    def delta_weight(self) -> Tensor:
        a, b = self.factors(self.pool.b.dtype)
        return b.t() @ a

    def train(self, mode: bool = True) -> "MoSAdapter":
        """Switch between training and evaluation; see the class for what this drops."""
        self._kept.forget()
        return super().train(mode)


class MoSTuner(Tuner):
    """Puts MoS on the linear layers of a model."""

    prefix = "mos_"

    def new_shared(self, config: MoSConfig, layers: dict[str, nn.Module]) -> ShardPools:
        groups: dict[str, list[str]] = {}
        for name, layer in layers.items():
            self._check_layer(layer, name)
            groups.setdefault(_group(config, name, layer), []).append(name)
        pools = {
            group: _new_pool(config, group, {name: layers[name] for name in names})
            for group, names in groups.items()
        }
        shared = ShardPools(config, pools)
        for group, names in groups.items():
            shared.places |= {name: (group, block) for block, name in enumerate(names)}
        return shared

    def new_adapter(
        self, config: MoSConfig, layer: nn.Module, module_name: str, shared: nn.Module | None
    ) -> MoSAdapter:
        assert isinstance(shared, ShardPools)
        return MoSAdapter(config, *shared.place(module_name), module_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        saved = [tensor for key, tensor in state_dict.items() if key.endswith("mos_shared.recipe")]
        if saved and saved[0].tolist() != _recipe(config).tolist():
            names = "r, shards, private_rank, pair_dissociation, seed"
            raise CheckpointError(
                f"MoS adapter {adapter_name!r}",
                expected=f"the options it was saved with: {names} = {saved[0].tolist()}",
                found=str(_recipe(config).tolist()),
                mend="Load it with the adapter_config.json that was saved beside it.",
            )
        own = set(shard_pools(model, adapter_name).pools)
        stored = {key.rsplit(".", 2)[1] for key in state_dict if ".mos_shared.pools." in f".{key}"}
        if own != stored:
            raise CheckpointError(
                f"MoS adapter {adapter_name!r}",
                expected=f"pools for the layers of this base model: {sorted(own - stored)}",
                found=f"pools for other layers: {sorted(stored - own)}",
                mend="Load it on the base model it was trained on.",
            )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _recipe(config: MoSConfig) -> Tensor:
    private = -1 if config.private_rank is None else config.private_rank
    options = [config.r, config.shards, private, int(config.pair_dissociation), config.seed]
    return torch.tensor(options, dtype=torch.int64, device="cpu")


def _group(config: MoSConfig, name: str, layer: nn.Module) -> str:
    """The name of a layer's pool; layers of one type but other widths cannot share."""
    owner = name.rpartition(".")[2] if config.sharing == "type" else name.replace(".", "-")
    outputs, inputs = layer_shape(layer)
    return f"{owner}_{inputs}x{outputs}"


def _new_pool(config: MoSConfig, group: str, layers: dict[str, nn.Module]) -> ShardPool:
    names, layer = list(layers), next(iter(layers.values()))
    outputs, inputs = layer_shape(layer)
    budget = _budget(config, group, names)
    private, blocks = config.private_rows(budget), len(names)
    where = f"module {names[0]!r}" if blocks == 1 else f"pool {group!r} of {blocks} layers"
    for width in (inputs, outputs):
        if width % config.shards:
            raise ConfigError(
                f"module {names[0]!r}",
                expected=f"widths that {config.shards} shards divide",
                found=f"a layer of {inputs} inputs and {outputs} outputs",
                mend=f"Choose another MoSConfig.shards, such as 1, that divides {width}.",
            )
    if private > min(budget, config.r):
        raise ConfigError(
            f"MoSConfig.private_rank for {where}",
            expected=f"at most min(budget_rank, r) = {min(budget, config.r)}",
            found=str(private),
            mend="Lower private_rank, or raise budget_rank and r.",
        )
    if private == budget and config.r != budget:
        raise ConfigError(
            f"MoSConfig.r for {where}",
            expected=f"r = {budget}, as all rows are private (private_rank = budget_rank)",
            found=f"r = {config.r}",
            mend="Lower private_rank, or set r to budget_rank, which is plain LoRA.",
        )
    most = private + (budget - private) * blocks
    if config.r > most:
        raise ConfigError(
            f"MoSConfig.r for {where}",
            expected=f"at most private_rank + (budget_rank - private_rank) · {blocks} = {most}",
            found=f"r = {config.r}",
            mend="Lower r, raise budget_rank, or leave the module out of target_modules.",
        )
    pool = ShardPool(config, budget, blocks, inputs, outputs, group)
    device = next(layer.parameters()).device
    return pool if pool.a.is_meta or device.type == "meta" else pool.to(device)


def _budget(config: MoSConfig, group: str, names: Iterable[str]) -> int:
    budgets = {option_for(config.budget_rank_pattern, n, config.budget_rank) for n in names}
    if len(budgets) > 1:
        raise ConfigError(
            "MoSConfig.budget_rank_pattern",
            expected=f"one budget for all layers of pool {group!r}",
            found=f"budgets {sorted(budgets)}",
            mend="Name the type of layer, such as 'q_proj', instead of single layers.",
        )
    return budgets.pop()


def shard_pools(model: nn.Module, adapter_name: str) -> ShardPools:
    """The pools of one adapter.

    Raises:
        ConfigError: the model has no MoS adapter of that name.
    """
    tuner = next((module for module in model.modules() if isinstance(module, MoSTuner)), None)
    if tuner is None or adapter_name not in tuner.shared:
        raise ConfigError(
            f"adapter {adapter_name!r}",
            expected="a MoS adapter of this model",
            found="none" if tuner is None else f"MoS adapters {sorted(tuner.shared)}",
            mend="Give the model from peft.get_peft_model and the name of its MoS adapter.",
        )
    return tuner.shared[adapter_name]  # type: ignore[return-value]


def adapted_layers(
    model: nn.Module, adapter_name: str
) -> Iterator[tuple[str, TunerLayer, MoSAdapter]]:
    """Name in the model, layer and adapter of every adapted layer."""
    for name, module in model.named_modules():
        if isinstance(module, TunerLayer) and adapter_name in module.adapters:
            adapter = module.adapters[adapter_name]
            assert isinstance(adapter, MoSAdapter)
            yield name, module, adapter


def selection_histogram(
    model: nn.Module, adapter_name: str = "default"
) -> dict[str, tuple[Tensor, Tensor]]:
    """How many layers use each public shard of the two factors.

    Arguments:
        model: with a MoS adapter.
        adapter_name: of the adapter.

    Returns:
        By pool: two int64 tensors (public shards,), for the first and for the second factor.

    Raises:
        ConfigError: the model has no MoS adapter of that name.
    """
    pools = shard_pools(model, adapter_name).pools
    used: dict[str, list[Tensor]] = {group: [] for group in pools}
    group_of = {pool: group for group, pool in pools.items()}
    for _, _, adapter in adapted_layers(model, adapter_name):
        used[group_of[adapter.pool]].append(adapter.shard_map.long().flatten(1))
    histograms = {}
    for group, maps in used.items():
        count, public = len(pools[group].a), pools[group].num_public  # type: ignore[arg-type]
        a, b = torch.cat(maps, dim=1)
        histograms[group] = (
            torch.bincount(a, minlength=count)[:public],
            torch.bincount(b, minlength=count)[:public],
        )
    return histograms


register_tuner(MoSConfig, MoSTuner)
