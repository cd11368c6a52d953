"""MADE-IT: continual merging into a small, self-growing bank of experts in every linear layer.

Qiu, Wu, Tan, "MADE-IT: Towards Adaptive Continual Model Merging via Manifold-Aware Expert
Evolution", arXiv 2604.22464. From the abstract come: experts as subspaces, projection-based
affinity, a distribution-aware threshold, evolution module by module, and routing without data or
training. All formulas are reconstructions of our specification, for the paper's were not found.

Fine-tunes of one base arrive one after another. In every layer a newcomer's change is merged into
the expert whose input subspace it shares, or becomes an expert of its own; at inference experts are
picked by how much of a feature lies in their subspace. Everything else in the model (norms,
embeddings) is the running mean of the fine-tunes.

`sparing.merge.merge(..., "made-it", ...)` does it with files of any size. `MadeIt` does it in
memory, for any network.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparing.checkpoint import atomic_path, read_json, write_json
from sparing.errors import CheckpointError
from sparing.merge.bank_report import BankReport, bank_report
from sparing.merge.layer_experts import PARTS, LayerExpert, unstacked
from sparing.merge.ledger import Adaptive, Ledger, ModuleLedger, Pool, Task
from sparing.merge.method import Continual, Options
from sparing.merge.routed import Experts, Granularity, Router, Routing, attach
from sparing.merge.skeleton import target_names
from sparing.merge.subspaces import Factors, Truncation, affinity, cosine, factorize
from sparing.shards import Checkpoint

STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = "bank.safetensors"
_MEAN = "mean."  # before the names of the tensors that are running means


@dataclass(frozen=True)
class MadeItOptions(Options):
    """Options of MADE-IT.

    Arguments:
        rank: k, most directions of an expert; None for no limit.
        energy: an expert keeps the fewest directions with this share of ‖Δ‖_F², and not more than
            `rank`; 1 keeps all.
        router_rank: r, directions of the routing basis; less where Δ has fewer. A large r raises
            the affinity of unrelated tasks, which is r/i.
        kappa: κ of the threshold mean + κ sd of all affinities.
        tau_min: least threshold. Above 1, together with `tau_max`, every task gets an expert.
        tau_max: largest threshold. Equal to `tau_min` the threshold is fixed; with both 0 there is
            one expert a layer, the running average.
        pool: whether the threshold is of all layers ("global") or each has its own ("module"),
            which hides that early layers have more in common.
        affinity: "projection" compares subspaces, "cosine" the changes as vectors.
        target_modules: "all-linear" (those inside the model's blocks), or names or patterns.
        temperature: T of the routing softmax.
        top_k: experts that take part in a layer, or None for all.
        granularity: what is routed as one: "token", "sample" or "model" (see `Routing`); "auto" is
            "token" for models that generate and else "sample".
        ood: None, or "base" to use no expert on features that none claims.
        margin: with `ood`, how far above a random feature's a score has to be.
        drop_common: None, or the share of experts from which on a common direction is ignored.
        storage: type of the experts on disk: "float32", "bfloat16" or "float16".
        seed: of the randomised SVD of layers with 1024 or more inputs and outputs.
    """

    rank: int | None = 64
    energy: float = 0.9
    router_rank: int = 16
    kappa: float = 2.0
    tau_min: float = 0.5
    tau_max: float = 0.98
    pool: Pool = "global"
    affinity: Literal["projection", "cosine"] = "projection"
    target_modules: str | Sequence[str] = "all-linear"
    temperature: float = 0.05
    top_k: int | None = None
    granularity: Granularity | Literal["auto"] = "auto"
    ood: Literal["base"] | None = None
    margin: float = 0.1
    drop_common: float | None = None
    storage: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("rank", "top_k"):
            value = getattr(self, option)
            holds = value is None or (type(value) is int and value >= 1)
            self.require(option, holds, "a whole number of at least 1, or null", "Leave it out.")
        count = type(self.router_rank) is int and self.router_rank >= 1
        self.require("router_rank", count, "a whole number of at least 1", "Use 16.")
        self.require_number("energy", 0, 1, above=True, mend="Use 0.9.")
        self.require_number("kappa", -100, 100, mend="Use 2.")
        self.require_number("tau_min", 0, 2, mend="Use 0.5; above 1 no task is ever merged.")
        self.require_number(
            "tau_max", self.tau_min, 2, mend="It may not be below tau_min; set both."
        )
        self.require_choice("pool", ("global", "module"))
        self.require_choice("affinity", ("projection", "cosine"))
        self.require_number("temperature", 0, 1e12, above=True, mend="Use 0.05.")
        self.require_choice("granularity", ("auto", "token", "sample", "model"))
        self.require("ood", self.ood in (None, "base"), '"base" or null', "Leave it out.")
        self.require_number("margin", 0, 1e6, mend="Use 0.1.")
        if self.drop_common is not None:
            self.require_number("drop_common", 0, 1, above=True, mend="Use 0.9, or leave it out.")
        self.require_choice("storage", tuple(STORAGE))
        self.require("seed", type(self.seed) is int, "a whole number", "Use 0.")
        texts = (
            [self.target_modules]
            if isinstance(self.target_modules, str)
            else list(self.target_modules)
        )
        self.require(
            "target_modules",
            bool(texts) and all(isinstance(text, str) for text in texts),
            '"all-linear", or a list of names',
            "Leave it out.",
        )

    @property
    def truncation(self) -> Truncation:
        """How much of a change an expert keeps."""
        return Truncation(self.rank, self.energy, self.router_rank, self.seed)

    @property
    def adaptive(self) -> Adaptive:
        """The threshold."""
        return Adaptive(self.kappa, self.tau_min, self.tau_max, self.pool)

    def routing(self, *, generates: bool) -> Routing:
        """How to route, for a model that generates text or does not."""
        chosen = self.granularity
        if chosen == "auto":
            chosen = "token" if generates else "sample"
        return Routing(
            self.temperature, self.top_k, chosen, self.ood, self.margin, self.drop_common
        )

    def alike(self, first: Factors, second: Factors) -> float:
        """The affinity of two experts."""
        return (affinity if self.affinity == "projection" else cosine)(first, second)


METHOD = Continual("made-it", "arXiv 2604.22464", MadeItOptions)


class MadeIt:
    """A bank of experts in memory, for any network.

    Arguments:
        base: the network that all experts are fine-tunes of; it is not changed, and must not be
            by others while the bank is in use.
        options: of `MadeItOptions`.

    Attributes:
        ledger: tasks, members, affinities and thresholds.

    Raises:
        ConfigError: an option cannot work.
    """

    def __init__(self, base: nn.Module, **options: Any) -> None:
        self.options = MadeItOptions.of(METHOD.slug, options)
        self.base = base
        self._state = {name: tensor.detach() for name, tensor in base.state_dict().items()}
        modules, self._transposed = {}, {}
        for name in target_names(base, self.options.target_modules):
            layer: Any = base.get_submodule(name)
            self._transposed[name] = not isinstance(layer, nn.Linear)
            shape = layer.weight.shape if self._transposed[name] else layer.weight.shape[::-1]
            inputs, outputs = shape
            modules[name] = ModuleLedger(inputs, outputs, layer.bias is not None)
        self.ledger = Ledger(modules)
        self._experts: dict[str, list[LayerExpert]] = {name: [] for name in modules}
        self._means: dict[str, Tensor] = {}

    def add(
        self, expert: nn.Module | Mapping[str, Tensor] | str | Path, name: str | None = None
    ) -> bool:
        """Let a fine-tune arrive.

        Arguments:
            expert: the network, its state dict, or a safetensors file of it.
            name: of the task.

        Returns:
            False if these very weights are in the bank already; nothing changes then.

        Raises:
            CheckpointError: other tensors than the base's, or NaN.
        """
        state, label = _state_of(expert), name or f"task {len(self.ledger.tasks)}"
        self._check(state, label)
        task = Task(label, _digest(state))
        known = self.ledger.knows(task.digest)
        if known is not None:
            self.ledger.notes.append(f"{label} is {known} once more: nothing changed")
            return False
        fresh = {module: self._represent(module, state) for module in self._experts}
        affinities = {
            module: None
            if new is None
            else [self.options.alike(old.factors, new.factors) for old in self._experts[module]]
            for module, new in fresh.items()
        }
        ranks = {name: new.factors.router_rank for name, new in fresh.items() if new is not None}
        self.ledger.note_reduced(
            label, {name: r for name, r in ranks.items() if r < self.options.router_rank}
        )
        number = len(self.ledger.tasks)
        for module, chosen in self.ledger.arrive(task, affinities, self.options.adaptive).items():
            new = fresh[module]
            if chosen is not None and new is not None:
                self._admit(module, chosen, new)
        self._average(state, number, {module for module, new in fresh.items() if new is not None})
        return True

    def _check(self, state: Mapping[str, Tensor], label: str) -> None:
        for name in dict.fromkeys((*self._state, *state)):
            shapes = [tuple(s[name].shape) if name in s else None for s in (self._state, state)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"tensor {name!r} of {label}",
                    expected=f"shape {shapes[0]}" if shapes[0] else "no such tensor",
                    found=f"shape {shapes[1]}" if shapes[1] else "none",
                    mend="Experts must be fine-tunes of the base, with its vocabulary.",
                )
            if state[name].is_floating_point() and not torch.isfinite(state[name]).all():
                raise CheckpointError(
                    f"tensor {name!r} of {label}",
                    expected="finite numbers",
                    found="NaN or infinity",
                    mend="Leave that expert out, or train it again.",
                )

    def _change(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        return state[name].detach().double() - self._state[name].double()

    def _represent(self, module: str, state: Mapping[str, Tensor]) -> LayerExpert | None:
        delta = self._change(f"{module}.weight", state)
        delta = delta.mT if self._transposed[module] else delta
        factors = factorize(delta, self.options.truncation, module)
        if factors is None:
            return None
        has_bias = self.ledger.modules[module].bias
        bias = self._change(f"{module}.bias", state) if has_bias else None
        return LayerExpert(factors, bias).to(STORAGE[self.options.storage])

    def _admit(self, module: str, chosen: int, new: LayerExpert) -> None:
        experts, ledger = self._experts[module], self.ledger.modules[module]
        if chosen == len(experts):
            experts.append(new)
        else:
            before = len(ledger.members[chosen]) - 1
            experts[chosen] = experts[chosen].joined_by(
                new, before, self.options.truncation, torch.float64
            )
        ledger.ranks = [expert.factors.rank for expert in experts]
        ledger.router_ranks = [expert.factors.router_rank for expert in experts]

    def _average(self, state: Mapping[str, Tensor], number: int, changed: set[str]) -> None:
        """Running mean of whatever no expert holds (eq. 7)."""
        held = {f"{module}.weight" for module in self._experts}
        held |= {f"{module}.bias" for module in changed}
        for name, tensor in self._state.items():
            if not tensor.is_floating_point():
                continue
            delta = torch.zeros_like(tensor, dtype=torch.float64)
            if name not in held:
                delta = self._change(name, state)
            old = self._means.get(name, torch.zeros_like(delta, dtype=torch.float32)).double()
            mean = (number * old + delta) / (number + 1)
            if name in self._means or mean.any():
                self._means[name] = mean.float()

    def module(self) -> nn.Module:
        """A copy of the base with the experts in it, which routes by itself."""
        model = copy.deepcopy(self.base).eval().requires_grad_(False)
        with torch.no_grad():
            state = model.state_dict()
            for name, mean in self._means.items():
                state[name].copy_(self._state[name].double() + mean.double())
        generates = bool(getattr(model, "can_generate", lambda: False)())
        router = Router(self.options.routing(generates=generates), len(self.ledger.tasks))
        for name, experts in self._experts.items():
            if experts:
                layer: Any = model.get_submodule(name)
                attach(layer, _stacked(experts, self.ledger.modules[name], router, layer.weight))
        router.watch(model)
        return model

    def report(self) -> BankReport:
        """Experts, members, affinities and thresholds; printed, a line for each layer."""
        return bank_report(self.ledger)

    def expert(self, module: str, number: int) -> LayerExpert:
        """An expert of a layer."""
        return self._experts[module][number]

    def save(self, folder: str | Path) -> None:
        """Write the bank, without the base, atomically.

        Raises:
            UnwritableError: the folder cannot be written.
        """
        tensors = {f"{_MEAN}{name}": mean for name, mean in self._means.items()}
        for name, experts in self._experts.items():
            for part in _parts(self.ledger.modules[name]) if experts else ():
                tensors[f"{name}.{part}"] = torch.cat([expert.part(part) for expert in experts])
        with atomic_path(Path(folder)) as fresh:
            fresh.mkdir()
            save_file(tensors, fresh / _WEIGHTS)
            write_json(fresh / "options.json", asdict(self.options))
            write_json(fresh / "base.json", _digest(self._state))
            self.ledger.save(fresh)

    @classmethod
    def load(cls, folder: str | Path, base: nn.Module) -> Self:
        """Read a bank for its base.

        Raises:
            CheckpointError: no bank, or one of another base.
        """
        path = Path(folder)
        bank = cls(base, **read_json(path / "options.json"))
        if read_json(path / "base.json") != _digest(bank._state):
            raise CheckpointError(
                str(path),
                expected="a bank of this base",
                found="one of other weights",
                mend="Load the base that the bank was made with.",
            )
        bank.ledger = Ledger.load(path)
        tensors = load_file(path / _WEIGHTS)
        for name, ledger in bank.ledger.modules.items():

            def read(part: str, start: int, stop: int, of: str = name) -> Tensor:
                return tensors[f"{of}.{part}"][start:stop].clone()  # aligned, as a new one is

            bank._experts[name] = unstacked(
                read, ledger.ranks, ledger.router_ranks, bias=ledger.bias
            )
        bank._means = {
            name.removeprefix(_MEAN): tensor
            for name, tensor in tensors.items()
            if name.startswith(_MEAN)
        }
        return bank


def _parts(ledger: ModuleLedger) -> tuple[str, ...]:
    return PARTS if ledger.bias else PARTS[:2]


def _stacked(
    experts: Sequence[LayerExpert], ledger: ModuleLedger, router: Router, like: Tensor
) -> Experts:
    bank = Experts(
        (ledger.inputs, ledger.outputs),
        ledger.ranks,
        ledger.router_ranks,
        ledger.members,
        bias=ledger.bias,
        router=router,
    )
    for part in _parts(ledger):
        getattr(bank, part).data = torch.cat([expert.part(part) for expert in experts]).to(like)
    return bank


def _state_of(expert: nn.Module | Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    if isinstance(expert, nn.Module):
        return expert.state_dict()
    if isinstance(expert, Mapping):
        return expert
    with Checkpoint(Path(expert)) as checkpoint:
        return {
            name: checkpoint.read(name).view(info.shape)
            for name, info in checkpoint.tensors.items()
        }


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
