"""Which samples are learned in few directions, and which need many (eq. 17)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.errors import ConfigError, DataError
from sparing.scale.fast_hp_transfer.alignment import alignment_matrix
from sparing.scale.fast_hp_transfer.matrices import Split


class PerSample:
    """Adds up ψ_ij = Σ u_jᵀ G_iᵀ δW u_j over layers and records, without forming a G_i.

    For a linear layer G_i is a sum of δ_s x_sᵀ over the positions s of a sample, so that each term
    is a product of two projections.

    Arguments:
        splits: of the model; all matrices must be unfused weights of linear layers or `Conv1D`.

    Raises:
        ConfigError: others are there (all are listed), or several processes.
    """

    def __init__(self, splits: Mapping[str, Split]) -> None:
        self.splits = {name: split for name, split in splits.items() if split.side is not None}
        wrong = [
            name
            for name, split in self.splits.items()
            if split.info.role not in ("matrix", "head") or split.blocks > 1
        ]
        if wrong:
            raise ConfigError(
                "TrajectoryRecorder.per_sample", expected="matrices of plain linear layers only",
                found=", ".join(wrong), mend='Take these whole: sides={"name": "whole"}.',
            )  # fmt: skip
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                "TrajectoryRecorder.per_sample", expected="one process",
                found=f"{dist.get_world_size()}", mend="Record samples in a run of one process.",
            )  # fmt: skip
        self.sums: Tensor | None = None

    def psi(self) -> Tensor:
        """(samples, directions) float64, in the order of the evaluation batches."""
        return torch.zeros(0, 0, dtype=torch.float64) if self.sums is None else self.sums

    def add(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        gradients: Mapping[str, Tensor | None],
        changes: Mapping[str, Tensor],
    ) -> None:
        """Add one record.

        Arguments:
            model: at the weights of the record, in evaluation mode.
            batches: on its device; the mean of their losses is what is decomposed.
            loss: mean over the rows of a batch.
            gradients, changes: by parameter, of the whole loss.
        """
        bases = {}
        for name, split in self.splits.items():
            gradient = gradients[name]
            if gradient is None:
                continue
            change = split.view(changes[name])[0]
            matrix = alignment_matrix(split.view(gradient)[0].to(change.dtype), change, split.side)  # type: ignore[arg-type]
            values, vectors = torch.linalg.eigh(matrix)
            vectors = vectors[:, values.abs().argsort(descending=True, stable=True)]
            bases[name] = (
                vectors,
                change @ vectors if split.side == "inputs" else change.T @ vectors,
            )
        rows: list[list[Tensor]] = []
        handles = [
            module.register_forward_hook(self._hook(rows, self.splits[name].side, *bases[name]))  # type: ignore[arg-type]
            for name, module in _layers(model, bases)
        ]
        try:
            for batch in batches:
                rows.append([])
                loss(model, batch).backward()
        finally:
            for handle in handles:
                handle.remove()
        found = torch.cat([_padded_sum(of_batch) for of_batch in rows])
        found *= len(found) / len(batches)  # so that the mean over samples is that of the loss
        self.sums = found if self.sums is None else self.sums + found

    @staticmethod
    def _hook(
        rows: list[list[Tensor]], side: str, vectors: Tensor, moved: Tensor
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def on_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()

            def on_backward(delta: Tensor) -> None:
                a, b = (x, delta) if side == "inputs" else (delta, x)
                product = (a.to(vectors.dtype) @ vectors) * (b.to(vectors.dtype) @ moved)
                rows[-1].append(
                    product.double().flatten(1, -2).sum(1) if x.ndim > 2 else product.double()
                )

            output.register_hook(on_backward)

        return on_forward


def mean_component_index(psi: Tensor) -> Tensor:
    """MCI_i = Σ_j j |ψ_ij| / Σ_k |ψ_ik|: low for a sample that is learned in few directions.

    Arguments:
        psi: (samples, directions).

    Returns:
        (samples,) float64 from 1 to the number of directions.

    Raises:
        DataError: a sample has no contribution at all.
    """
    weights = psi.double().abs()
    total = weights.sum(dim=1)
    if not (total > 0).all():
        raise DataError(
            "psi", expected="a contribution from every sample",
            found=f"none from sample {int((total <= 0).nonzero()[0])}",
            mend="Record more steps, or leave the sample out.",
        )  # fmt: skip
    places = torch.arange(1, psi.shape[1] + 1, dtype=torch.float64, device=psi.device)
    return (weights @ places) / total


def easy_and_hard(psi: Tensor, easy: float = 0.25, hard: float = 0.05) -> tuple[Tensor, Tensor]:
    """Indices of the samples of least and of most MCI; the paper takes a quarter and a twentieth.

    Arguments:
        psi: (samples, directions).
        easy, hard: shares, above 0; at least one sample each.
    """
    order = mean_component_index(psi).argsort(stable=True)
    count = len(order)
    return order[: max(1, round(easy * count))], order[count - max(1, round(hard * count)) :]


def _layers(model: nn.Module, names: Mapping[str, Any]) -> list[tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    found: list[tuple[str, nn.Module]] = []
    for name in names:
        owner = modules[name.rpartition(".")[0]]
        if not isinstance(owner, nn.Linear | Conv1D):
            raise ConfigError(
                "TrajectoryRecorder.per_sample", expected="weights of linear layers",
                found=f"{name} of {type(owner).__name__}",
                mend='Take it whole: sides={"name": "whole"}.',
            )  # fmt: skip
        found.append((name, owner))
    return found


def _padded_sum(parts: list[Tensor]) -> Tensor:
    """Sum of (rows, k) tensors of different k."""
    widest = max(part.shape[1] for part in parts)
    return torch.stack(
        [nn.functional.pad(part, (0, widest - part.shape[1])) for part in parts]
    ).sum(0)
