"""EPT's routers: which experts a task uses in each layer, found for all layers at once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparing.adapt._ept_config import EPTConfig
from sparing.adapt._ept_tasks import Assignment, task_numbers
from sparing.errors import DataError
from sparing.forward_pass import ForwardPass, Passes
from sparing.kept import Kept
from sparing.routing import sparse_softmax
from sparing.tuners import generator_for


def double_softmax(logits: Tensor, k: int) -> Tensor:
    """The softmax of the k largest softmax probabilities, 0 elsewhere (EPT, eq. 6).

    Arguments:
        logits: (..., experts), any floating type.
        k: experts that take part.

    Returns:
        (..., experts) float32 or float64; for k = 2 both weights lie in [0.268, 0.732].
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return sparse_softmax(exact.softmax(dim=-1), k)


def initial_gate(inputs: int, experts: int, generator: torch.Generator) -> Tensor:
    """(experts, inputs) float32, Kaiming-uniform for fan-in and ReLU: within ±√(6 / inputs)."""
    bound = (6 / inputs) ** 0.5
    gate = torch.empty(experts, inputs, dtype=torch.float32, device="cpu")
    return gate.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Gates:
    """The routing of all layers.

    Arguments:
        weights: g, by layer: (tasks, experts), 0 for experts that are not chosen.
        chosen: the numbers of these experts, by layer and task.
        embeddings: E, (tasks, inputs), by layer; empty for `router="table"`.
    """

    weights: tuple[Tensor, ...]
    chosen: list[list[list[int]]]
    embeddings: tuple[Tensor, ...]


class Routers(nn.Module):
    """The routers of all layers, and the task that was set.

    A router depends on the task only, so all layers are routed by a few batched products once a
    forward, with one wait for the device. Outside training what was found is kept.

    Arguments:
        config: of the adapter.
        inputs: width of each adapted layer's input, by module name.
        uncontrasted: modules that take no part in the contrastive loss.
        passes: of the tuner.

    Attributes:
        names: of the modules, in the model's order.
        numbers: place of each layer, by module name; layers of one width stand together.
        embeddings: by width, E of the layers that wide, (layers, tasks, inputs) float32.
        gates: by width, W_g, (layers, experts, inputs) float32.
        biases: b, (layers, experts) float32.
        logits: for `router="table"`, (layers, tasks, experts) float32 instead of these three.
        assignment: what `set_task` set, or None; not saved.
    """

    def __init__(
        self,
        config: EPTConfig,
        inputs: dict[str, int],
        uncontrasted: set[str],
        passes: Passes,
    ) -> None:
        super().__init__()
        self.config, self.passes, self.uncontrasted = config, passes, uncontrasted
        self.names = list(inputs)
        self.widths = list(dict.fromkeys(map(str, inputs.values())))  # ParameterDict sorts its keys
        by_width: dict[int, list[str]] = {}
        for name, width in inputs.items():
            by_width.setdefault(width, []).append(name)
        ordered = [(name, width) for width, names in by_width.items() for name in names]
        self.numbers = {name: number for number, (name, _) in enumerate(ordered)}
        if config.uses_embeddings:
            drawn = {name: _new_router(config, name, width) for name, width in ordered}

            def stacked(part: int, names: list[str]) -> nn.Parameter:
                return nn.Parameter(torch.stack([drawn[name][part] for name in names]))

            named = {str(width): names for width, names in by_width.items()}
            self.embeddings = nn.ParameterDict({w: stacked(0, n) for w, n in named.items()})
            self.gates = nn.ParameterDict({w: stacked(1, n) for w, n in named.items()})
            self.biases = stacked(2, [name for name, _ in ordered])
        else:
            self.logits = nn.Parameter(
                torch.stack([_new_table(config, name, width) for name, width in ordered])
            )
        self.assignment = Assignment((0,)) if config.num_tasks == 1 else None
        self._kept: Kept[Gates] = Kept()
        self._key = ("ept gates", id(self))

    @property
    def contrasted_layers(self) -> int:
        """How many layers the contrastive loss is averaged over."""
        return len(self.numbers) - len(self.uncontrasted)

    def set_task(self, tasks: Any) -> None:
        """Use a task, or one for each row, in all forwards to come; None for no task."""
        self.assignment = None
        if tasks is not None:
            self.assignment = Assignment(tuple(task_numbers(tasks, self.config.names)))

    def assigned(self, one: ForwardPass, name: str) -> Assignment:
        """The tasks of a forward: those of its call before those that were set.

        Raises:
            DataError: there are none.
        """
        asked = one.inputs.get("tasks")
        if asked is not None:
            key = (*self._key, "tasks")
            if key not in one.notes:
                numbers = task_numbers(asked, self.config.names)
                one.leave(key, Assignment(tuple(numbers)))
            return one.notes[key]
        if self.assignment is None:
            raise DataError(
                f"module {name!r}",
                expected=f"the task of every row, as the adapter has {self.config.num_tasks} tasks",
                found="none",
                mend="Call model.set_task first, or give the model's call "
                "tasks=(rows,) of task numbers; model.infer_tasks guesses unknown ones.",
            )
        return self.assignment

    def routing(self, one: ForwardPass, name: str) -> Gates:
        """The gates in a forward, found by the first layer that asks and read by the others.

        When gradient checkpointing replays that layer's block, it has to find them again, because
        the replay must record what the first run recorded.
        """
        owner, gates = one.notes.get(self._key, (None, None))
        if gates is None or owner == name:
            gates = self.all_gates()
            one.leave(self._key, (name, gates))
        return gates

    def all_gates(self) -> Gates:
        """The gates of all layers and tasks."""
        return self._kept.get(tuple(self.parameters()), self._find)

    def _find(self) -> Gates:
        weights = double_softmax(self._all_logits(), self.config.top_k)
        pairs = weights.detach().ne(0).tolist()
        chosen = [[[i for i, on in enumerate(e) if on] for e in task] for task in pairs]
        # One unbind for all: a slice of its own for each layer would cost a stack of zeros each.
        widths = self.widths if self.config.uses_embeddings else []
        embeddings = tuple(one for width in widths for one in self.embeddings[width].unbind(0))
        return Gates(weights.unbind(0), chosen, embeddings)

    def _all_logits(self) -> Tensor:
        """W_g e_t + b, (layers, tasks, experts)."""
        if not self.config.uses_embeddings:
            return self.logits
        with torch.autocast(self.biases.device.type, enabled=False):
            products = [self.embeddings[w] @ self.gates[w].mT for w in self.widths]
            return torch.cat(products) + self.biases.unsqueeze(1)


def _new_router(config: EPTConfig, name: str, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """E, W_g and b of one layer."""
    std = inputs**-0.5 if config.task_emb_std is None else config.task_emb_std
    embedding = torch.randn(
        config.num_tasks, inputs, generator=generator_for(config.seed, f"{name} tasks")
    )
    gate = initial_gate(inputs, config.num_experts, generator_for(config.seed, f"{name} gate"))
    bias = torch.empty(config.num_experts, dtype=torch.float32, device="cpu")
    bound = inputs**-0.5
    bias.uniform_(-bound, bound, generator=generator_for(config.seed, f"{name} gate bias"))
    return embedding * std, gate, bias


def _new_table(config: EPTConfig, name: str, inputs: int) -> Tensor:
    """(tasks, experts), spread as W_g e_t of a new router is."""
    shape = (config.num_tasks, config.num_experts)
    generator = generator_for(config.seed, f"{name} table")
    return torch.randn(shape, generator=generator, device="cpu") * (2 / inputs) ** 0.5
