"""What an EPT adapter is made of: its parameters by kind, and the experts of each task."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparing.tuners import TunerLayer

if TYPE_CHECKING:
    from sparing.adapt._ept_routers import Routers
    from sparing.adapt.ept import EPTTuner


@dataclass(frozen=True)
class EPTCounts:
    """Trainable numbers of an adapter.

    Arguments:
        seeds: of A and B.
        kernels: of all experts.
        routers: embeddings and gates.
        tasks: among which they are shared.
    """

    seeds: int
    kernels: int
    routers: int
    tasks: int

    @property
    def without_routers(self) -> int:
        """What the paper counts."""
        return self.seeds + self.kernels

    @property
    def total(self) -> int:
        """All of them."""
        return self.without_routers + self.routers

    @property
    def per_task(self) -> tuple[float, float]:
        """Without and with routers, divided by the number of tasks."""
        return self.without_routers / self.tasks, self.total / self.tasks


@dataclass(frozen=True)
class RouteTable:
    """The experts of each task in each layer.

    Arguments:
        tasks: their names.
        kernel_sizes: of the experts.
        routes: by module and task, the number and the weight of each chosen expert.
    """

    tasks: tuple[str, ...]
    kernel_sizes: tuple[int, ...]
    routes: dict[str, tuple[dict[int, float], ...]]

    def size_shares(self, task: int) -> dict[int, float]:
        """How much of a task's weight goes to kernels of each size, over all layers; sums to 1."""
        shares: defaultdict[int, float] = defaultdict(float)
        for by_task in self.routes.values():
            for expert, weight in by_task[task].items():
                shares[self.kernel_sizes[expert]] += weight / len(self.routes)
        return dict(sorted(shares.items()))

    def __str__(self) -> str:
        width = max(len("module"), *map(len, self.routes))
        lines = [f"{'module':<{width}}  " + "  ".join(f"{task:<20}" for task in self.tasks)]
        for module, by_task in self.routes.items():
            cells = [
                " ".join(f"{e}:{self.kernel_sizes[e]}×{w:.2f}" for e, w in chosen.items())
                for chosen in by_task
            ]
            lines.append(f"{module:<{width}}  " + "  ".join(f"{cell:<20}" for cell in cells))
        return "\n".join(line.rstrip() for line in lines)


def counts_of(tuner: "EPTTuner", adapter_name: str) -> EPTCounts:
    """Count the parameters of one adapter."""
    config = tuner.peft_config[adapter_name]
    seeds = kernels = routers = 0
    for module in tuner.model.modules():
        if isinstance(module, TunerLayer) and adapter_name in module.adapters:
            adapter = module.adapters[adapter_name]
            seeds += adapter.a.numel() + adapter.b.numel()
            kernels += adapter.kernels.numel()
            routers += 0 if adapter.gate is None else adapter.gate.numel()
    if adapter_name in tuner.shared:
        routers += sum(p.numel() for p in tuner.shared[adapter_name].parameters())
    return EPTCounts(seeds, kernels, routers, config.num_tasks)  # type: ignore[attr-defined]


def routes_of(routers: "Routers") -> RouteTable:
    """The experts that the routers choose now."""
    gates, config = routers.all_gates(), routers.config
    routes = {}
    for name in routers.names:
        number = routers.numbers[name]
        weights = gates.weights[number].tolist()
        chosen = gates.chosen[number]
        routes[name] = tuple(
            {expert: weights[task][expert] for expert in chosen[task]}
            for task in range(config.num_tasks)
        )
    return RouteTable(tuple(config.names), tuple(config.kernel_sizes), routes)
