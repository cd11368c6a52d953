"""A network whose regularisers are told their strengths from outside, step by step."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.errors import ConfigError, DataError
from sparing.train import DivergedError
from sparing.tune.stn.hparams import HParam, Values
from sparing.tune.stn.regularizers import attach, detach, weight_penalty
from sparing.tune.stn.setting import Setting
from sparing.tuners import generator_for

Loss = Callable[[nn.Module, Any], Tensor]
"""From the model and a batch to the mean loss over its rows, a scalar."""


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """`model(**batch).loss` for a mapping, as transformers' models have it, and the cross-entropy
    of `model(inputs)` for a pair (inputs, labels)."""
    if isinstance(batch, Mapping):
        return model(**batch).loss
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def rows_of(batch: Any) -> int:
    """Rows of a batch: the length of the first axis of its first tensor.

    Raises:
        DataError: it has none.
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch
    parts = [parts] if isinstance(parts, Tensor) else list(parts)
    for part in parts:
        if isinstance(part, Tensor) and part.dim() > 0 and len(part) > 0:
            return len(part)
    raise DataError(
        "batch",
        expected="tensors with the rows on the first axis, at least one",
        found=f"{type(batch).__name__} of {[type(part).__name__ for part in parts]}",
        mend="Let the loader return (inputs, labels), or a dictionary of tensors.",
    )


class RegularizedNetwork(nn.Module):
    """A model and its regularisers; what a schedule of hyperparameters is replayed on.

    The model is changed in place: its dropout modules read their rate at every forward.

    Arguments:
        model: any; the batch has to be on the first axis of what its layers see.
        hparams: as in `SelfTuningNetwork`.
        loss: from model and batch to a scalar; a loss that needs values of hyperparameters reads
            `network.values`.
        seed: of the augmentations.

    Raises:
        ConfigError: a hyperparameter cannot act where it should.
    """

    def __init__(
        self,
        model: nn.Module,
        hparams: Sequence[HParam],
        *,
        loss: Loss = default_loss,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.seed = model, loss, seed
        self.hparams = tuple(hparams)
        self.setting = Setting()
        self.changes = list(dict.fromkeys(p.apply for p in self.hparams if callable(p.apply)))
        self.change_generator = generator_for(seed, "augmentation")
        self._prepare_layers()
        attach(model, self.hparams, self.setting)

    def _prepare_layers(self) -> None:
        """Give layers a response, before regularisers are attached."""

    @property
    def values(self) -> Mapping[str, Tensor] | None:
        """Values of the hyperparameters in the forward that is running, or None outside one:
        (rows,) where every row has its own, else scalars."""
        return self.setting.values

    @property
    def device(self) -> torch.device:
        """That of the model's first parameter."""
        return next(self.model.parameters()).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)

    def train_step(
        self,
        batch: Any,
        optimizer: torch.optim.Optimizer,
        values: Mapping[str, float],
        clip: float | None = None,
    ) -> float:
        """One step on the weights with the given strengths of regularisation.

        Returns:
            the regularised loss before the step.

        Raises:
            ConfigError: a hyperparameter has no value.
            DivergedError: the loss is not finite; nothing was changed.
        """
        device = self.device
        missing = [hparam.name for hparam in self.hparams if hparam.name not in values]
        if missing:
            raise ConfigError(
                "values", expected="one for every hyperparameter", found=f"none for {missing}",
                mend="Replay the schedule with the hyperparameters it was recorded with.",
            )  # fmt: skip
        told = Values({p.name: torch.tensor(values[p.name], device=device) for p in self.hparams})
        self.model.train()
        with self.setting.during(None, told):
            loss = self._regularized(batch, self.loss, self.model)
            return self._step(loss, optimizer, clip)

    def _regularized(self, batch: Any, loss: Loss, model: Any) -> Tensor:
        """The training loss under the current setting (STN, L_T of eq. 2)."""
        assert self.setting.values is not None
        for change in self.changes:
            batch = change(batch, self.setting.values, self.change_generator)
        total = loss(model, batch)
        decay = weight_penalty(self.model, self.hparams, self.setting.rows, self.setting)
        for penalty in (*self.setting.penalties, *([] if decay is None else [decay])):
            total = total + penalty
        return total

    def _step(self, loss: Tensor, optimizer: torch.optim.Optimizer, clip: float | None) -> float:
        found = finite(loss, "training loss")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            chosen = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(chosen, clip)
        optimizer.step()
        return found

    @torch.no_grad()
    def evaluate(self, batches: Any) -> float:
        """Mean unregularised loss over all rows of a loader, in evaluation mode.

        Raises:
            DataError: the loader is empty.
        """
        training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        for batch in batches:
            rows = rows_of(batch)
            total += float(self._evaluated(to_device(batch, self.device))) * rows
            count += rows
        self.model.train(training)
        if not count:
            raise DataError(
                "validation data", expected="at least one batch", found="none", mend="Add some."
            )
        return total / count

    def _evaluated(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)

    def plain(self, values: Mapping[str, float]) -> nn.Module:
        """A copy of the model without regularisers; dropout stays, at the given rates."""
        model = copy.deepcopy(self.model)
        detach(model, dict(values))
        return model


def finite(loss: Tensor, what: str) -> float:
    """The loss as a number.

    Raises:
        DivergedError: it is NaN or infinite.
    """
    found = float(loss.detach())
    if not math.isfinite(found):
        raise DivergedError(
            what,
            expected="a finite number",
            found=str(found),
            mend="Lower the learning rate of the weights, or cap the hyperparameters' ranges.",
        )
    return found


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(to_device(part, device) for part in batch)
    return batch
