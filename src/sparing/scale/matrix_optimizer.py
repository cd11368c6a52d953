"""What Muon, Muon++ and MuonH share: momentum, orthogonal updates in batches, AdamW for the rest.

A parameter group says how its parameters are treated by its `algorithm`: "matrix" (the method's own
step) or "adamw". Under FSDP2 every process computes the whole update and keeps its share, so that
the result does not depend on the number of processes; DDP needs nothing.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sparing.errors import ConfigError, SparingError
from sparing.scale.orthogonalize import Orthogonalizer, orthogonalize
from sparing.scale.parameters import matrices

Algorithm = Literal["matrix", "adamw"]
Piece = tuple[Tensor, int]  # a parameter, and the number of one of its pieces


class NotFiniteError(SparingError, ArithmeticError):
    """A gradient holds NaN or infinity; no state has been changed by it."""


class MatrixOptimizer(Optimizer):
    """The loop around a method's `matrix_step`.

    State of a parameter: `momentum` in float32 (its own type where that is more exact), `master`
    in float32 for parameters in 16 bits; of an AdamW parameter `exp_avg`, `exp_avg_sq`, `step`.

    Arguments:
        params: tensors, or groups with any of the options below and `algorithm`, `transposed` and
            `blocks`, as the planners make them.
        lr: step size of matrices.
        momentum: 0 to 1.
        nesterov: look ahead by one momentum step.
        weight_decay: decoupled, times the learning rate.
        orthogonalizer: see `orthogonalize`.
        betas, eps: of AdamW.
        on_nan: "raise", or "skip" the whole step and count it in `skipped`.

    Raises:
        ConfigError: an option out of range, or a matrix group with a parameter of one dimension.
    """

    algorithms: tuple[str, ...] = ("matrix", "adamw")

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        orthogonalizer: Orthogonalizer = "ns5",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        on_nan: Literal["raise", "skip"] = "raise",
        **more: Any,
    ) -> None:
        defaults = {
            "algorithm": "matrix",
            "transposed": False,
            "blocks": 1,
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "orthogonalizer": orthogonalizer,
            "betas": betas,
            "eps": eps,
            **more,
        }
        self.on_nan = on_nan
        self.skipped = 0
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.check_group(self.param_groups[-1])

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise a `ConfigError` unless the options and parameters of a group make sense."""
        where = f"{type(self).__name__} group"
        ranges = {
            "lr": (group["lr"] >= 0, "0 or more"),
            "momentum": (0 <= group["momentum"] < 1, "at least 0 and below 1"),
            "weight_decay": (group["weight_decay"] >= 0, "0 or more"),
            "algorithm": (group["algorithm"] in self.algorithms, f"one of {self.algorithms}"),
        }
        for option, (holds, expected) in ranges.items():
            if not holds:
                raise ConfigError(
                    f"{where}, {option}",
                    expected=expected,
                    found=repr(group[option]),
                    mend="Choose such a value.",
                )
        for name, parameter in zip(self.names(group), group["params"], strict=True):
            if group["algorithm"] != "adamw" and parameter.ndim < 2:
                raise ConfigError(
                    f"{where}, parameter {name}",
                    expected="two or more dimensions",
                    found=f"shape {tuple(parameter.shape)}",
                    mend='Put vectors into a group with "algorithm": "adamw".',
                )

    @staticmethod
    def names(group: dict[str, Any]) -> list[str]:
        """Names of a group's parameters, or their numbers if they came without."""
        given = group.get("param_names")
        return list(given) if given else [str(number) for number in range(len(group["params"]))]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; all gradients are checked before anything changes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._gradients_are_finite():
            self.skipped += 1
            return loss
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._adamw(parameter, group)
            else:
                self.step_group(group)
        return loss

    def step_group(self, group: dict[str, Any]) -> None:
        """One step of a group that is not AdamW's."""
        by_shape: dict[tuple[Any, ...], list[tuple[Piece, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            momentum = self._momentum_of(parameter, group)
            for number, direction in enumerate(self.pieces(momentum, group)):
                key = (*direction.shape[-2:], direction.dtype, direction.device)
                by_shape.setdefault(key, []).append(((parameter, number), direction))
        for (rows, columns, *_), members in by_shape.items():
            stacks = [direction.reshape(-1, rows, columns) for _, direction in members]
            sizes = [len(stack) for stack in stacks]
            owners = [owner for owner, _ in members]
            whole = self.orthogonal(torch.cat(stacks), owners, sizes, group)
            for (owner, direction), part in zip(members, whole.split(sizes), strict=True):
                self.apply(owner[0], part.view(direction.shape), group, owner[1])

    def orthogonal(
        self, stack: Tensor, owners: list[Piece], sizes: list[int], group: dict[str, Any]
    ) -> Tensor:
        """Orthogonalise the directions of pieces of one shape.

        Arguments:
            stack: (matrices, outputs, inputs).
            owners: whose they are, in order.
            sizes: how many matrices each has.
            group: its options.
        """
        return orthogonalize(stack, group["orthogonalizer"])

    def apply(
        self, parameter: Tensor, orthogonal: Tensor, group: dict[str, Any], piece: int = 0
    ) -> None:
        """Move one piece of a parameter along its orthogonalised direction.

        Arguments:
            parameter: as stored.
            orthogonal: (…, outputs, inputs) of the piece's matrices.
            group: its options.
            piece: number among the parameter's `pieces`.
        """
        weight = self.whole(parameter)
        matrix = self.pieces(weight, group)[piece]
        self.matrix_step(matrix, orthogonal, self.state[parameter], group)
        self.store(parameter, weight)

    def matrix_step(
        self, weight: Tensor, orthogonal: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """The method: change `weight`, (…, outputs, inputs), in place."""
        raise TypeError(f"{type(self).__name__} does not implement matrix_step")

    def views(self, tensor: Tensor, group: dict[str, Any]) -> Tensor:
        """The matrices of a tensor stored like the group's parameters."""
        return matrices(tensor, transposed=group["transposed"], blocks=group["blocks"])

    def pieces(self, tensor: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """The same, in pieces that may differ in shape; here one."""
        return (self.views(tensor, group),)

    def whole(self, parameter: Tensor) -> Tensor:
        """The parameter's exact value, all of it: its master copy if it has one."""
        state = self.state[parameter]
        if parameter.dtype in (torch.bfloat16, torch.float16):
            if "master" not in state:
                state["master"] = parameter.detach().float().clone()
            exact = self.gathered(state["master"])
        else:
            exact = self.gathered(parameter.detach())
        # A kernel stored channels last has no view as a matrix; `store` writes a copy back.
        return exact.contiguous() if exact.ndim > 3 else exact

    @staticmethod
    def gathered(tensor: Tensor) -> Tensor:
        """All of a tensor, also where FSDP2 has spread it over processes."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def store(self, parameter: Tensor, value: Tensor) -> None:
        """Write back what `whole` gave, changed."""
        held = self.state[parameter].get("master", parameter)
        if isinstance(held, DTensor):
            held.copy_(distribute_tensor(value, held.device_mesh, held.placements))
        elif held.data_ptr() != value.data_ptr():
            held.copy_(value)
        if held is not parameter:
            parameter.copy_(held)

    def _momentum_of(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grad)
        buffer = state["momentum"].mul_(group["momentum"]).add_(grad)
        return self.gathered(grad + group["momentum"] * buffer if group["nesterov"] else buffer)

    def adam_direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """m̂ / (√v̂ + ε) in at least float32, shaped and sharded like the parameter."""
        mean, root = self._moments(parameter, group)
        return mean / root

    def _moments(self, parameter: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Adam's mean m after this step, and what to divide it by; the second is a new tensor."""
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["step"] += 1
        slow, fast = group["betas"]
        state["exp_avg"].lerp_(grad, 1 - slow)
        state["exp_avg_sq"].mul_(fast).addcmul_(grad, grad, value=1 - fast)
        steps = float(state["step"])
        # In place where it can be: of an embedding, each copy is as large as the gradient.
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - fast**steps)).add_(group["eps"])
        return state["exp_avg"], root.mul_(1 - slow**steps)

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> None:
        mean, root = self._moments(parameter, group)
        state = self.state[parameter]
        held = parameter
        if parameter.dtype in (torch.bfloat16, torch.float16):
            if "master" not in state:
                state["master"] = parameter.detach().float().clone()
            held = state["master"]
        if group["weight_decay"]:
            held.mul_(1 - group["lr"] * group["weight_decay"])
        held.addcdiv_(mean, root, value=-group["lr"])
        if held is not parameter:
            parameter.copy_(held)

    def _gradients_are_finite(self) -> bool:
        grads: dict[str, Tensor] = {}
        for group in self.param_groups:
            for name, parameter in zip(self.names(group), group["params"], strict=True):
                if parameter.grad is not None:
                    grads[name if name not in grads else f"{name} ({len(grads)})"] = parameter.grad
        for name, grad in grads.items():
            if grad.is_sparse or grad.is_complex():
                raise ConfigError(
                    f"gradient of parameter {name}",
                    expected="a dense real gradient",
                    found="a sparse or complex one",
                    mend="Create the embedding with sparse=False.",
                )
        # The quick norm first; only it can overflow, so that where it did the exact one decides.
        for order in (2.0, torch.inf):
            sizes = torch._foreach_norm(list(grads.values()), ord=order) if grads else []
            finite = [torch.isfinite(self.gathered(size)) for size in sizes]
            # One question to each device, not one a parameter.
            devices = {each.device for each in finite}
            if all(bool(torch.stack([e for e in finite if e.device == d]).all()) for d in devices):
                return True
        if self.on_nan == "skip":
            return False
        bad = [name for name, each in zip(grads, finite, strict=True) if not bool(each)]
        raise NotFiniteError(
            f"gradient of parameter {bad[0]}",
            expected="finite numbers",
            found="NaN or infinity",
            mend='Lower the learning rate, or create the optimizer with on_nan="skip".',
        )

    # `torch.optim.Optimizer` casts floating-point state to the parameter's type when loading; a
    # master copy or a momentum in float32 must stay as it is.
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        ordered = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, ordered, strict=True):
            for key, value in saved.get(number, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    device = "cpu" if key == "step" else parameter.device
                    self.state[parameter][key] = value.detach().clone().to(device)
