"""Which matrices of a model are split into directions, and along which side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sparing.errors import ConfigError
from sparing.scale.fast_hp_transfer.alignment import Side
from sparing.scale.parameters import ParameterInfo, classify, matrices

Choice = Literal["inputs", "outputs", "whole"]


@dataclass(frozen=True)
class Split:
    """How one parameter is treated.

    Arguments:
        info: what it is.
        side: whose dimension is the model's width; None for a parameter that is taken whole.
        blocks: matrices stacked along the outputs.
    """

    info: ParameterInfo
    side: Side | None
    blocks: int = 1

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (matrices, outputs, inputs)."""
        stack = matrices(tensor, transposed=self.info.transposed, blocks=self.blocks)
        return stack.reshape(-1, *stack.shape[-2:])


def splits(
    model: nn.Module,
    width: int | None = None,
    sides: Mapping[str, Choice] | None = None,
    blocks: Mapping[str, int] | None = None,
) -> dict[str, Split]:
    """A `Split` for every parameter; each matrix on the side that is as wide as the model.

    Where both sides are, on that of the inputs; embeddings and heads never on that of the
    vocabulary. Vectors are whole. Fused q, k, v are split where their thirds are equal.

    Arguments:
        model: any that `sparing.scale.parameters.classify` knows.
        width: of the model; by default `model.config.hidden_size`.
        sides: for parameters by the end of their name: "inputs", "outputs" or "whole".
        blocks: matrices fused along the outputs, likewise, such as {"gate_up_proj.weight": 2}.

    Raises:
        ConfigError: no width is given or known; a matrix has no side of that width (all are
            listed); a name in `sides` or `blocks` fits nothing.
    """
    if width is None:
        width = getattr(getattr(model, "config", None), "hidden_size", None)
    if width is None:
        raise ConfigError(
            "TrajectoryRecorder.width", expected="the model's width",
            found="none given, and no config.hidden_size", mend="Give width=.",
        )  # fmt: skip
    sides, blocks = sides or {}, blocks or {}
    infos = classify(model)
    for option, names in (("sides", sides), ("blocks", blocks)):
        for name in names:
            if not any(_fits(known, name) for known in infos):
                raise ConfigError(
                    f"TrajectoryRecorder.{option}", expected="ends of parameters' names",
                    found=repr(name), mend="See model.named_parameters().",
                )  # fmt: skip
    found, unknown = {}, []
    for name, info in infos.items():
        chosen = next((side for end, side in sides.items() if _fits(name, end)), None)
        fused = next((n for end, n in blocks.items() if _fits(name, end)), info.blocks)
        if chosen == "whole" or info.role == "vector":
            found[name] = Split(info, None)
        elif chosen is not None:
            found[name] = Split(info, chosen, fused)
        elif info.inputs == width:
            found[name] = Split(info, "inputs", fused)
        elif info.outputs // fused == width:
            found[name] = Split(info, "outputs", fused)
        else:
            unknown.append(f"{name} {info.shape}")
    if unknown:
        raise ConfigError(
            "TrajectoryRecorder", expected=f"matrices with a side of the model's width, {width}",
            found="; ".join(unknown),
            mend='Say which side they are split on, or "whole": sides={"name": "inputs"}.',
        )  # fmt: skip
    return found


def _fits(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
