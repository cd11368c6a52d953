"""EPT, expert pyramid tuning: experts of several granularities grown from one small seed.

Every layer holds one low-rank seed B A, narrower than the layer. Experts blow leading parts of it
up with small learned kernels: size 2 keeps much of the seed and repeats little, size 8 the other
way round. A router picks k experts by the id of the task, so that each task's mixture is a fixed
matrix that merges.

A token costs a layer r (inputs + outputs) + r s² multiply-adds for each size s among the k chosen
experts: experts of one size act as one, with mixed kernels. Long inputs go through the factors
(B ⊗ I)(A ⊗ K) instead, of rank r s, which cost s times the multiply-adds in two large products
where the above takes many small ones; no expert is built as a matrix in either form. Routers are
evaluated for all layers at once.

Zhang, Yan, Xiong, Xia: "Expert Pyramid Tuning: Efficient Parameter Fine-Tuning for
Expertise-Driven Task Allocation", arXiv 2603.12577 (2026). Equation numbers are those of our
specification, which was made from the released code and from reading notes of the paper, and which
differ. Reconstructed are: d_i = s_i, the standard deviation of the seed, the mean over tokens in
the contrastive loss of causal models, the double softmax of the token router, the guess of unknown
tasks, and the table that is the router of a single task.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.adapt import _ept_contrast as contrast
from sparing.adapt._ept_config import EPTConfig
from sparing.adapt._ept_export import write_task
from sparing.adapt._ept_inference import infer_tasks
from sparing.adapt._ept_pyramid import PROJECTIONS, Seed
from sparing.adapt._ept_reports import EPTCounts, RouteTable, counts_of, routes_of
from sparing.adapt._ept_routers import Routers, double_softmax, initial_gate
from sparing.adapt._ept_tasks import task_numbers
from sparing.errors import ConfigError
from sparing.forward_pass import ForwardPass
from sparing.kept import Kept
from sparing.tuners import (
    AdditiveAdapter,
    Tuner,
    TunerLayer,
    generator_for,
    layer_shape,
    register_tuner,
)


class EPTAdapter(AdditiveAdapter):
    """Adds (α/r) Σ_{i∈P} g_i (d_i/T) W_i dropout(x) (EPT, eq. 4).

    Products are formed in float32, or in float64 for such inputs. Experts that are not chosen get
    a gradient of zero rather than none, as all kernels are one tensor: processes that draw other
    tasks still agree on which parameters take part.

    Arguments:
        config: of the adapter.
        layer: the base layer.
        name: of the layer.
        routers: of all layers, or None for `router="token"`.
        pooling: of the contrastive loss; None where the layer takes no part.

    Attributes:
        a: (r, ⌊inputs / s_min⌋) float32.
        b: (⌊outputs / s_min⌋, r) float32.
        kernels: (Σ numbers of a kernel,) float32, one expert after the other.
        gate: W_r, (experts, inputs) float32 of `router="token"`, or None.
    """

    routers: Routers | None
    gate: nn.Parameter | None
    instead_of_merging: ClassVar[str] = (
        "Keep the adapter as it is, or train one with router='task', which merges task by task."
    )

    def __init__(
        self,
        config: EPTConfig,
        layer: nn.Module,
        name: str,
        routers: Routers | None,
        pooling: contrast.Pooling | None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "routers", routers)  # the tuner registers them, once
        self.config, self.name, self.pooling = config, name, pooling
        self.outputs, self.inputs = layer_shape(layer)
        self._check_widths()
        self.projection = PROJECTIONS[config.projection]
        shapes = [self.projection.kernel_shape(s, self.outputs) for s in config.kernel_sizes]
        self.shapes, self.numels = shapes, [rows * columns for rows, columns in shapes]
        a, b = self._new_seed()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.kernels = nn.Parameter(self._new_kernels())
        gate = None
        if config.router == "token":
            generator = generator_for(config.seed, f"{name} gate")
            gate = nn.Parameter(initial_gate(self.inputs, config.num_experts, generator))
        self.register_parameter("gate", gate)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._kept: Kept[dict[int, dict[int, Tensor]]] = Kept()

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Whether a task's effect is a fixed matrix: it is, unless tokens are routed."""
        return self.routers is not None

    def delta(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        if self.routers is None:
            return self._routed_by_token(self.dropout(x).to(exact))
        one = self.routers.passes.running or ForwardPass()
        assignment = self.routers.assigned(one, self.name)
        routing = self.routers.routing(one, self.name)
        number = self.routers.numbers[self.name]
        weights, chosen = routing.weights[number].to(x.device), routing.chosen[number]
        if self.training and self.config.contrasts and self.pooling is not None:
            rows = contrast.pooled(x, self.pooling, one.real_tokens(x.shape))
            tasks = assignment.of_rows(len(rows), self.name)
            embedding = routing.embeddings[number]
            loss = contrast.contrastive_loss(rows, embedding, tasks, self.config.tau)
            one.add_loss(self.config.lambda_con / self.routers.contrasted_layers * loss)
        x = self.dropout(x).to(exact)
        task = assignment.single
        if task is not None:
            return self._mixture(x, self._mixed(task, weights, chosen, exact))
        groups = assignment.groups(len(x), x.device, self.name)
        parts = [
            self._mixture(x.index_select(0, rows), self._mixed(task, weights, chosen, exact))
            for task, rows in groups.rows.items()
        ]
        return torch.cat(parts).index_select(0, groups.back)

    def delta_weight(self) -> Tensor:
        down, up = self.factors()
        return up @ down

    def factors(self, task: int | None = None) -> tuple[Tensor, Tensor]:
        """The update for one task as a product of factors: (B ⊗ I) and (A ⊗ K) of each size.

        Arguments:
            task: None for the one that is set.

        Returns:
            down (rank, inputs) and up (outputs, rank), scaling included; rank = Σ r·s over the
            distinct sizes of the chosen experts.

        Raises:
            ConfigError: no single task is set.
        """
        assert self.routers is not None
        if task is None:
            task = self._set_task()
        number = self.routers.numbers[self.name]
        routing = self.routers.all_gates()
        weights = routing.weights[number].to(self.a.device)
        kernels = self._mixed(task, weights, routing.chosen[number], self.a.dtype)
        return self.projection.factors(self._seed(self.a.dtype), kernels)

    def _mixture(self, x: Tensor, kernels: dict[int, Tensor]) -> Tensor:
        """Σ over the chosen experts for rows of one task, whose mixed kernels are given."""
        seed = self._seed(x.dtype)
        rank = sum(self.projection.rank(self.config.r, size) for size in kernels)
        if x.numel() < rank * self.inputs:  # fewer tokens than the factors have rows
            return self.projection.apply(x, seed, kernels)
        down, up = self.projection.factors(seed, kernels)
        return F.linear(F.linear(x, down), up)

    def _mixed(
        self, task: int, weights: Tensor, chosen: list[list[int]], dtype: torch.dtype
    ) -> dict[int, Tensor]:
        """By size, Σ (α/r) g_i (d_i/T) K_i of a task's experts; kept outside training.

        Arguments:
            task: its number.
            weights: (tasks, experts).
            chosen: numbers of the experts, by task.
            dtype: of the result.
        """
        known = self._kept.get((self.kernels, weights), dict, dtype)
        if task not in known:
            kernels = self._kernels(dtype)
            mixed: dict[int, Tensor] = {}
            for i in chosen[task]:
                size = self.config.kernel_sizes[i]
                kernel = kernels[i] * (weights[task, i].to(dtype) * self.config.coefficient(size))
                mixed[size] = mixed[size] + kernel if size in mixed else kernel
            known[task] = mixed
        return known[task]

    def _routed_by_token(self, x: Tensor) -> Tensor:
        """g = G(x) = softmax(W_r x / τ) of each token, of which the k largest take part; experts of
        all sizes are evaluated, and those not chosen weighted by 0."""
        assert self.gate is not None
        logits = F.linear(x, self.gate.to(x.dtype)) / self.config.router_temperature
        weights = double_softmax(logits, self.config.top_k).to(x.dtype)
        kernels = self._kernels(x.dtype)
        by_size: dict[int, list[int]] = {}
        for i, size in enumerate(self.config.kernel_sizes):
            by_size.setdefault(size, []).append(i)
        stacks = {
            size: torch.stack([kernels[i] for i in own]) * self.config.coefficient(size)
            for size, own in by_size.items()
        }
        shares = {size: weights[..., own] for size, own in by_size.items()}
        return self.projection.apply_each(x, self._seed(x.dtype), stacks, shares)

    def _kernels(self, dtype: torch.dtype) -> list[Tensor]:
        pieces = self.kernels.to(dtype).split(self.numels)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def _seed(self, dtype: torch.dtype) -> Seed:
        return Seed(self.a.to(dtype), self.b.to(dtype), self.inputs, self.outputs)

    def _set_task(self) -> int:
        assert self.routers is not None
        assignment = self.routers.assignment
        if assignment is None or assignment.single is None:
            raise ConfigError(
                f"module {self.name!r}",
                expected="one task whose mixture of experts is to be merged",
                found="none" if assignment is None else "a task for each row",
                mend="Call model.set_task first; one of " + ", ".join(self.config.names) + ".",
            )
        return assignment.single

    def _check_widths(self) -> None:
        largest = max(self.config.kernel_sizes)
        if largest > min(self.inputs, self.outputs):
            raise ConfigError(
                f"module {self.name!r}",
                expected="kernels no larger than the layer",
                found=f"size {largest} for {self.inputs} inputs and {self.outputs} outputs",
                mend="Choose smaller EPTConfig.kernel_sizes, or name it in exclude_modules.",
            )

    def _new_seed(self) -> tuple[Tensor, Tensor]:
        config, smallest = self.config, min(self.config.kernel_sizes)
        a = torch.empty(config.r, self.inputs // smallest, dtype=torch.float32, device="cpu")
        b = torch.zeros(self.outputs // smallest, config.r, dtype=torch.float32, device="cpu")
        for_a, for_b = (generator_for(config.seed, f"{self.name} {part}") for part in "ab")
        if config.seed_init == "gaussian":
            a.normal_(0.0, config.r**-0.5, generator=for_a)
            b.normal_(generator=for_b)
        else:
            _kaiming(a, a.shape[1], for_a)
            if config.seed_init == "kaiming":
                _kaiming(b, b.shape[1], for_b)
        return a, b * config.seed_scale

    def _new_kernels(self) -> Tensor:
        config = self.config
        kernels = torch.zeros(sum(self.numels), dtype=torch.float32, device="cpu")
        if config.kernel_init == "kaiming":
            generator = generator_for(config.seed, f"{self.name} kernels")
            for piece, (_, columns) in zip(kernels.split(self.numels), self.shapes, strict=True):
                _kaiming(piece, columns, generator)
        return kernels


def _kaiming(tensor: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """Uniform within ±1/√fan_in, which is Kaiming's rule for a = √5."""
    tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)


class EPTTuner(Tuner):
    """Puts EPT on the linear layers of a model.

    The model's call takes one more keyword: `tasks`, the number of each row's task, (rows,), or
    their names. Without it, all rows have the task of `set_task`. The methods below are reachable
    from the model of `peft.get_peft_model`.
    """

    prefix = "ept_"
    uses_passes = True
    forward_inputs = ("tasks",)

    def new_shared(self, config: EPTConfig, layers: dict[str, nn.Module]) -> Routers | None:
        for name, layer in layers.items():
            self._check_layer(layer, name)
        if config.router == "token" or not layers:
            return None
        inputs = {name: layer_shape(layer)[1] for name, layer in layers.items()}
        apart = {name for name in layers if self._pooling(config, name) is None}
        routers = Routers(config, inputs, apart, self.passes)
        device = next(next(iter(layers.values())).parameters()).device
        on_meta = device.type == "meta" or any(p.is_meta for p in routers.parameters())
        return routers if on_meta else routers.to(device)

    def new_adapter(
        self, config: EPTConfig, layer: nn.Module, module_name: str, shared: nn.Module | None
    ) -> EPTAdapter:
        assert shared is None or isinstance(shared, Routers)
        return EPTAdapter(config, layer, module_name, shared, self._pooling(config, module_name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("tasks") is not None and self._is_merged():
            raise _merged("tasks in the model's call")
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, tasks: Any = None, **kwargs: Any) -> Any:
        """The model's own `generate`, with `tasks` as in its call."""
        if tasks is None:
            return self.model.generate(*args, **kwargs)
        active = [self.routers(name) for name in self.active_adapters if name in self.shared]
        before = [routers.assignment for routers in active]
        self.set_task(tasks)
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            for routers, assignment in zip(active, before, strict=True):
                routers.assignment = assignment

    def set_task(self, task: Any, adapter_name: str | None = None) -> None:
        """Use a task in all forwards to come, and in merging; not saved.

        Arguments:
            task: name or number of a task; a sequence of them, or an integer tensor (rows,), for
                the rows of a batch; or None, so that every call has to say.
            adapter_name: of the adapter; None for all active ones.

        Raises:
            ConfigError: there is no such task, the adapter is merged, or it routes by token.
            DataError: a tensor that is no list of tasks.
        """
        if self._is_merged():
            raise _merged("set_task")
        for name in self.active_adapters if adapter_name is None else [adapter_name]:
            self.routers(name).set_task(task)

    def routers(self, adapter_name: str = "default") -> Routers:
        """The routers of one adapter.

        Raises:
            ConfigError: there is no such adapter, or it routes by token.
        """
        if adapter_name not in self.shared:
            known = adapter_name in self.peft_config
            raise ConfigError(
                f"adapter {adapter_name!r}",
                expected="an EPT adapter that routes by task",
                found="one that routes by token" if known else "no adapter of that name",
                mend="Create it with router='task'." if known else "Name one of the model's.",
            )
        return self.shared[adapter_name]  # type: ignore[return-value]

    def infer_tasks(self, adapter_name: str = "default", **inputs: Any) -> Tensor:
        """Guess the task of each row: the one whose embeddings resemble the layers' inputs most
        (EPT, eq. 9). Reconstructed: every task is tried, in a forward of its own.

        Arguments:
            adapter_name: of the adapter, which was trained with the contrastive loss.
            inputs: of the model's call.

        Returns:
            (rows,) int64, to be given to the model as `tasks`.

        Raises:
            ConfigError: the adapter embeds no tasks, or is merged.
        """
        if self._is_merged():
            raise _merged("infer_tasks")
        return infer_tasks(self, adapter_name, inputs)

    def export_lora(
        self, folder: str | Path, task: str | int | None = None, adapter_name: str = "default"
    ) -> None:
        """Write one task's mixture as a plain PEFT LoRA, which needs no sparing to load.

        Its rank in a layer is Σ r·s over the distinct sizes of the chosen experts. Modules trained
        in full are written too. The folder is replaced as a whole, or left as it was.

        Arguments:
            folder: to write to.
            task: None for the task that is set.
            adapter_name: of the adapter.

        Raises:
            ConfigError: no such task or adapter, no task is set, or tokens are routed.
            CheckpointError: the folder cannot be written.
        """
        routers = self.routers(adapter_name)
        number = None if task is None else task_numbers(task, routers.config.names)[0]
        write_task(self, adapter_name, number, Path(folder))

    def route_table(self, adapter_name: str = "default") -> RouteTable:
        """Which experts each task uses in each layer, and their weights; prints as a table.

        Raises:
            ConfigError: there is no such adapter, or it routes by token.
        """
        return routes_of(self.routers(adapter_name))

    def parameter_counts(self, adapter_name: str = "default") -> EPTCounts:
        """The trainable numbers of one adapter, with and without routers."""
        return counts_of(self, adapter_name)

    def _pooling(self, config: EPTConfig, name: str) -> contrast.Pooling | None:
        """How the contrastive loss sees a layer; None for layers of a decoder that reads an
        encoder, which the released code leaves out, too: they all start with the same token."""
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return None if ".decoder." in f".{name}" else config.contrastive_input or "first"
        generates = getattr(self.model, "can_generate", None)
        causal = bool(generates and generates())
        return config.contrastive_input or ("mean" if causal else "first")

    def _is_merged(self) -> bool:
        return any(isinstance(m, TunerLayer) and m.merged for m in self.model.modules())


def _merged(where: str) -> ConfigError:
    return ConfigError(
        where,
        expected="an adapter that is not merged, to choose among tasks",
        found="one that is merged into the weights for one task",
        mend="Call model.unmerge_adapter first.",
    )


register_tuner(EPTConfig, EPTTuner)
