"""A plan: for every parameter its learning rate, decay, initialisation and multiplier, and why.

Planners (HyperP, Muon++, √d decay) make plans; optimizers take their parameter groups.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from sparing.errors import ConfigError
from sparing.scale.parameters import ParameterInfo, Role, classify


@dataclass(frozen=True)
class PlannedParameter:
    """What to do with one parameter.

    Arguments:
        info: what it is.
        algorithm: name of the step, as in the groups of `MatrixOptimizer`.
        lr: peak learning rate.
        weight_decay: decoupled, times the learning rate.
        why: the rule, in words.
        init_std: of its entries at initialisation; None to leave them as they are.
        multiplier: of the output of its layer, to be applied by the model; 1 for none.
        options: further options of its group, such as `blocks`.
        distribution: of the initialisation.
    """

    info: ParameterInfo
    algorithm: str
    lr: float
    weight_decay: float
    why: str
    init_std: float | None = None
    multiplier: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    distribution: Literal["normal", "uniform"] = "normal"

    def group_key(self) -> str:
        """Equal for parameters that can share a group."""
        return json.dumps(
            [
                self.algorithm, self.lr, self.weight_decay, self.info.role,
                self.info.transposed, self.options,
            ],
            sort_keys=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a planner made of a model.

    Arguments:
        method: slug of the planner.
        parameters: in the model's order, each once.
        notes: warnings and remarks for the user.
    """

    method: str
    parameters: tuple[PlannedParameter, ...]
    notes: tuple[str, ...] = ()

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for a torch optimizer, with the names of their parameters.

        Arguments:
            model: has exactly the parameters of the plan.

        Raises:
            ConfigError: it has others.
        """
        named = dict(model.named_parameters())
        planned = {row.info.name for row in self.parameters}
        if planned != set(named):
            different = sorted(planned ^ set(named))
            raise ConfigError(
                f"plan of {self.method}",
                expected="the model that was planned for",
                found=f"{len(different)} parameters in only one of them, such as {different[0]}",
                mend="Plan again with this model.",
            )
        groups: dict[str, dict[str, Any]] = {}
        for row in self.parameters:
            group = groups.setdefault(
                row.group_key(),
                {
                    "params": [],
                    "role": row.info.role,
                    "algorithm": row.algorithm,
                    "lr": row.lr,
                    "weight_decay": row.weight_decay,
                    "transposed": row.info.transposed,
                    **row.options,
                },
            )
            group["params"].append((row.info.name, named[row.info.name]))
        return list(groups.values())

    @torch.no_grad()
    def initialize(self, model: nn.Module, seed: int = 0) -> None:
        """Draw every parameter that has an `init_std` anew."""
        named = dict(model.named_parameters())
        for number, row in enumerate(self.parameters):
            if row.init_std is None:
                continue
            parameter = named[row.info.name]
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            if row.distribution == "normal":
                noise = torch.randn(parameter.shape, generator=generator)
            else:
                noise = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * 3**0.5
            parameter.copy_(noise * row.init_std)

    def rows(self) -> list[dict[str, Any]]:
        """One flat dictionary a parameter, for tables and files."""
        return [
            {
                "name": row.info.name,
                "role": row.info.role,
                "shape": list(row.info.shape),
                "algorithm": row.algorithm,
                "lr": row.lr,
                "weight_decay": row.weight_decay,
                "init_std": row.init_std,
                "multiplier": row.multiplier,
                "options": row.options,
                "why": row.why,
            }
            for row in self.parameters
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, as `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        """Read what `to_json` wrote."""
        rows = []
        for row in content["parameters"]:
            info = ParameterInfo(**{**row["info"], "shape": tuple(row["info"]["shape"])})
            rows.append(PlannedParameter(**{**row, "info": info}))
        return cls(content["method"], tuple(rows), tuple(content["notes"]))


@dataclass(frozen=True)
class Pair:
    """One parameter at the base size and at the target size."""

    base: ParameterInfo
    target: ParameterInfo

    @property
    def input_ratio(self) -> float:
        """Target over base; 1 for vectors."""
        return self._ratio("inputs")

    @property
    def output_ratio(self) -> float:
        """Target over base; 1 for vectors."""
        return self._ratio("outputs")

    def _ratio(self, side: str) -> float:
        if len(self.target.shape) < 2:
            return 1.0
        return float(getattr(self.target, side) / getattr(self.base, side))


def pairs(
    base: nn.Module, target: nn.Module, overrides: dict[str, Role] | None = None
) -> list[Pair]:
    """The parameters of a target model beside those of the base; blocks may differ in number.

    A parameter of a block that the base does not have is compared with that of its last block.

    Raises:
        ConfigError: another architecture.
    """
    known = classify(base, overrides)
    found = []
    for name, info in classify(target, overrides).items():
        twin = known.get(name) or _of_last_block(name, known)
        if twin is None or twin.role != info.role:
            raise ConfigError(
                f"parameter {name!r} of the target",
                expected="one of that name and role in the base",
                found="none" if twin is None else f"{twin.role} instead of {info.role}",
                mend="Plan between two sizes of one architecture.",
            )
        found.append(Pair(twin, info))
    return found


def _of_last_block(name: str, known: dict[str, ParameterInfo]) -> ParameterInfo | None:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for place in numbers:
        for number in range(int(parts[place]), -1, -1):
            twin = known.get(".".join([*parts[:place], str(number), *parts[place + 1 :]]))
            if twin is not None:
                return twin
    return None
