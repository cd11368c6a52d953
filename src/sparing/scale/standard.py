"""The standard parameterisation: the same numbers at every size. What planners are compared with.

Nothing is rescaled with width or depth and the model keeps the initialisation it came with, so
that a sweep with this planner shows how far the best learning rate moves by itself.
"""

from torch import nn

from sparing.scale.parameters import ParameterInfo, classify
from sparing.scale.planning import Plan, PlannedParameter
from sparing.scale.settings import PlanSettings

_MATRICES = ("matrix", "expert", "router")


def standard_planner(base: nn.Module, target: nn.Module, settings: PlanSettings) -> Plan:
    """One learning rate for matrices and one for the rest; decay for all but vectors."""
    aux = settings.lr if settings.aux_lr is None else settings.aux_lr

    def planned(info: ParameterInfo) -> PlannedParameter:
        hidden = info.role in _MATRICES
        return PlannedParameter(
            info,
            "matrix" if hidden else "adamw",
            settings.lr if hidden else aux,
            0.0 if info.role == "vector" else settings.weight_decay,
            "the same at every size",
        )

    rows = tuple(planned(info) for info in classify(target).values())
    return Plan("standard", rows, ("nothing is rescaled: the control of a sweep",))
