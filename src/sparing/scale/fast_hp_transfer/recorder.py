"""Watches a training run and splits the fall of its loss into directions (eq. 8 to 11)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparing.errors import CheckpointError, ConfigError, DataError
from sparing.scale.fast_hp_transfer.alignment import (
    alignment_matrix,
    leading,
    partial_sums,
    spectrum,
)
from sparing.scale.fast_hp_transfer.ema import EmaSchedule, copies, move_towards
from sparing.scale.fast_hp_transfer.evaluation import evaluating
from sparing.scale.fast_hp_transfer.matrices import Choice, Split, splits
from sparing.scale.fast_hp_transfer.samples import PerSample
from sparing.scale.fast_hp_transfer.trajectory import Trajectory

Loss = Callable[[nn.Module, Any], Tensor]

_MOST_AT_ONCE = 2**24  # numbers in a stack of alignment matrices


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a `transformers` model returns for a batch with labels."""
    return model(**batch).loss


class TrajectoryRecorder(TrainerCallback):
    """Records how the evaluation loss falls along the averaged weights, and in which directions.

    In a plain loop call `step()` after every optimizer step and `finish()` at the end. For
    `Trainer` give it as a callback; `trajectory` is there when training ends. It changes neither
    weights, gradients, buffers nor random numbers: training is the same to the bit without it.

    Needs three copies of the weights (averaged now, averaged at the last record, and the raw ones
    while it evaluates), float32, and for each record one gradient of the evaluation loss and the
    eigenvalues of one n × n matrix for every matrix of the model.

    Under DDP and FSDP2 every process gives its part of the evaluation batches; gradients are
    averaged, and shards gathered one parameter at a time. Every process has to call `step`.

    Arguments:
        model: whose parameters are trained. A wrapper of DDP is looked through.
        eval_batches: on which L is the mean of the losses; the same at every record. Held-out data
            in the paper.
        loss: of the model and a batch, a mean; by default `model(**batch).loss`.
        ema: of the weights, see `EmaSchedule`.
        width, sides, blocks: see `sparing.scale.fast_hp_transfer.splits`.
        top: how many directions to compute, by Lanczos; None for all, from all eigenvalues.
        per_sample: also record ψ (eq. 17), for plain linear layers; one more pass a record.
        about: kept with the trajectory: hyperparameters, seed.

    Raises:
        ConfigError: no batches, `top` below 1, or see `splits`.
    """

    def __init__(
        self,
        model: nn.Module,
        eval_batches: Sequence[Any],
        loss: Loss = model_loss,
        *,
        ema: EmaSchedule | None = None,
        width: int | None = None,
        sides: Mapping[str, Choice] | None = None,
        blocks: Mapping[str, int] | None = None,
        top: int | None = None,
        per_sample: bool = False,
        about: Mapping[str, float | str] | None = None,
    ) -> None:
        if not len(eval_batches):
            raise ConfigError(
                "TrajectoryRecorder.eval_batches", expected="one or more", found="none",
                mend="Hold some batches out of training.",
            )  # fmt: skip
        if top is not None and top < 1:
            raise ConfigError(
                "TrajectoryRecorder.top", expected="1 or more, or None", found=repr(top),
                mend="None computes all directions.",
            )  # fmt: skip
        model = _unwrapped(model)
        self.splits: dict[str, Split] = splits(model, width, sides, blocks)
        self.width: int = width or model.config.hidden_size  # type: ignore[union-attr,assignment]
        self.eval_batches, self.loss = eval_batches, loss
        self.ema = ema or EmaSchedule()
        self.top = top
        self.samples = PerSample(self.splits) if per_sample else None
        self.about = dict(about or {})
        self.trajectory: Trajectory | None = None
        self._begin(model)

    def _begin(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.average = copies(list(self.parameters.values()))
        self.before = [mean.clone() for mean in self.average]
        self.steps, self.taken = 0, [0]
        self.next = self.ema.stride_at(0)
        self.losses: list[float] = []
        self.whole: list[float] = []
        self.vectors: list[float] = []
        self.directions: list[Tensor] = []
        self.by_parameter: dict[str, Tensor] = {}

    @property
    def _directions(self) -> int:
        sizes = [self._size(split) for split in self.splits.values() if split.side]
        return min(max(sizes, default=0), self.top or max(sizes, default=0))

    @staticmethod
    def _size(split: Split) -> int:
        info = split.info
        return info.inputs if split.side == "inputs" else info.outputs // split.blocks

    def step(self) -> None:
        """Take the weights after an optimizer step into the average; now and then record."""
        self.steps += 1
        move_towards(
            self.average, list(self.parameters.values()), self.ema.decay_at(self.steps - 1)
        )
        if self.steps == self.next:
            self._record()

    def finish(self) -> Trajectory:
        """Record what is left, evaluate the last point, and return the trajectory.

        Raises:
            DataError: no step was taken.
        """
        if self.steps == 0:
            raise DataError(
                "TrajectoryRecorder", expected="a training run", found="no step",
                mend="Call step() after every optimizer step.",
            )  # fmt: skip
        if self.steps > self.taken[-1]:
            self._record()
        last = self._loss_at(self.average)
        self.trajectory = Trajectory(
            self.width,
            torch.tensor(self.taken),
            torch.tensor([*self.losses, last], dtype=torch.float64),
            torch.tensor(self.whole, dtype=torch.float64),
            torch.tensor(self.vectors, dtype=torch.float64),
            torch.stack(self.directions),
            dict(self.by_parameter),
            self.samples.psi() if self.samples else torch.zeros(0, 0, dtype=torch.float64),
            self.about,
        )
        return self.trajectory

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the training run has to hold, to go on recording."""
        names = list(self.parameters)
        return {
            "average": dict(zip(names, self.average, strict=True)),
            "before": dict(zip(names, self.before, strict=True)),
            "steps": self.steps, "taken": list(self.taken), "next": self.next,
            "losses": list(self.losses), "whole": list(self.whole), "vectors": list(self.vectors),
            "directions": list(self.directions), "by_parameter": dict(self.by_parameter),
            "samples": self.samples.sums if self.samples else None,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, in a recorder with the same options.

        Raises:
            CheckpointError: the state is of another model.
        """
        if set(state["average"]) != set(self.parameters):
            raise CheckpointError(
                "TrajectoryRecorder", expected="the state of this model's recorder",
                found="parameters of other names", mend="Resume with the same model.",
            )  # fmt: skip
        for kept, saved in ((self.average, "average"), (self.before, "before")):
            for tensor, name in zip(kept, self.parameters, strict=True):
                tensor.copy_(state[saved][name])
        self.steps, self.next = state["steps"], state["next"]
        for name in ("taken", "losses", "whole", "vectors", "directions"):
            setattr(self, name, list(state[name]))
        self.by_parameter = dict(state["by_parameter"])
        if self.samples is not None:
            self.samples.sums = state["samples"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the model as `Trainer` has placed, wrapped and loaded it."""
        if self.steps == 0:
            self._begin(_unwrapped(kwargs["model"]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """`step`, for `Trainer`."""
        self.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """`finish`, for `Trainer`."""
        self.finish()

    def _record(self) -> None:
        """One δφ: the gradient at the last point, times the way from there to here."""
        self.next = self.steps + self.ema.stride_at(self.steps)
        self.taken.append(self.steps)
        with evaluating(self.model, self.before):
            loss = self._mean_loss(backward=True)
            gradients = {name: self._gradient(p) for name, p in self.parameters.items()}
            if self.samples is not None:
                changes = zip(self.parameters, self.average, self.before, strict=True)
                for parameter in self.parameters.values():
                    parameter.grad = None  # the second pass must not add to the gradients
                self.samples.add(
                    self.model,
                    [self._placed(batch) for batch in self.eval_batches],
                    self.loss,
                    gradients,
                    {name: now - then for name, now, then in changes},
                )
        self.losses.append(loss)
        self._decompose(gradients)
        for then, now in zip(self.before, self.average, strict=True):
            then.copy_(now)

    def _decompose(self, gradients: dict[str, Tensor | None]) -> None:
        sums = torch.zeros(self._directions + 1, dtype=torch.float64)
        whole = vectors = 0.0
        pending: dict[tuple[int, torch.device], list[tuple[str, Tensor]]] = {}
        for (name, split), then, now in zip(
            self.splits.items(), self.before, self.average, strict=True
        ):
            gradient = gradients.pop(name)
            if gradient is None:
                continue
            gradient, change = _gathered(gradient), _gathered(now) - _gathered(then)
            part = float((gradient.double() * change.double()).sum())
            self._require_finite(f"step of {name}", part)
            whole += part
            if split.side is None:
                vectors += part
                continue
            g, w = split.view(gradient.to(change.dtype)), split.view(change)
            if self.top is not None:
                found = torch.stack(
                    [leading(a, b, self.top, split.side) for a, b in zip(g, w, strict=True)]
                )
                sums += self._keep(name, found)
                continue
            stack = alignment_matrix(g, w, split.side)
            waiting = pending.setdefault((stack.shape[-1], stack.device), [])
            waiting += [(name, one) for one in stack]
            if sum(one.numel() for _, one in waiting) > _MOST_AT_ONCE:
                sums += self._flush(waiting)
        for waiting in pending.values():
            sums += self._flush(waiting)
        self.whole.append(whole)
        self.vectors.append(vectors)
        self.directions.append(sums + vectors)

    def _flush(self, waiting: list[tuple[str, Tensor]]) -> Tensor:
        """Eigenvalues of matrices of one size, all at once."""
        sums = torch.zeros(self._directions + 1, dtype=torch.float64)
        if waiting:
            found = spectrum(torch.stack([one for _, one in waiting]))
            for (name, _), eigenvalues in zip(waiting, found, strict=True):
                sums += self._keep(name, eigenvalues[None])
            waiting.clear()
        return sums

    def _keep(self, name: str, eigenvalues: Tensor) -> Tensor:
        """Add (matrices, k) eigenvalues to their parameter's account; returns their φ^k."""
        sums = partial_sums(eigenvalues).sum(dim=0).cpu()
        if len(sums) <= self._directions:  # a narrower side: all of it from there on
            sums = torch.cat([sums, sums[-1:].expand(self._directions + 1 - len(sums))])
        sums = sums[: self._directions + 1]
        self.by_parameter[name] = self.by_parameter.get(name, torch.zeros_like(sums)) + sums
        return sums

    def _loss_at(self, weights: Sequence[Tensor]) -> float:
        with evaluating(self.model, weights), torch.no_grad():
            return self._mean_loss(backward=False)

    def _mean_loss(self, backward: bool) -> float:
        total = 0.0
        for batch in self.eval_batches:
            loss = self.loss(self.model, self._placed(batch))
            if backward:
                (loss / len(self.eval_batches)).backward()
            total += float(loss.detach()) / len(self.eval_batches)
        total = _mean_over_processes(torch.tensor(total, dtype=torch.float64)).item()
        self._require_finite("evaluation loss", total)
        return total

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DataError(
                f"TrajectoryRecorder, {what}",
                expected="a finite number",
                found=str(value),
                mend=f"The run has diverged by step {self.steps}; count its loss as infinite.",
            )

    def _placed(self, batch: Any) -> Any:
        return _to(batch, next(iter(self.parameters.values())).device)

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        gradient = parameter.grad
        if gradient is None or isinstance(gradient, DTensor):
            return gradient  # FSDP2 has averaged it
        return _mean_over_processes(gradient)


def _mean_over_processes(tensor: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_to(value, device) for value in batch)
    return batch
