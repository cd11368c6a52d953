"""Training of JEI-DNN's heads: a warm-up of the classifiers, then gates and classifiers in turn."""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sparing.compress.jei_dnn import EarlyExitNetwork
from sparing.compress.jei_gates import LearnedGates, exit_probabilities, simulate
from sparing.compress.jei_objective import (
    ClassifierLoss,
    ClassWeights,
    Rescale,
    TargetLoss,
    best_exits,
    class_weights,
    classifier_loss,
    cross_entropies,
    gate_loss,
    gate_targets,
    warm_up_loss,
)
from sparing.compress.jei_uncertainty import Conformal
from sparing.errors import ConfigError, DataError

Loader = Iterable[Any]


@dataclass(frozen=True)
class JEIOptions:
    """Options of training; defaults are the released code's.

    Arguments:
        epochs: of gates and classifiers in turn; the paper's runs use 15 to 30.
        warmup_epochs: at most, of the classifiers alone, with SGD.
        patience: warm-up epochs without a better validation accuracy before a classifier stops.
        batch_size: of cached features; without the cache the loader's own batches are used.
        period: batches until the other level has its turn; every epoch starts with the gates.
        optimizer: "sgd" with momentum 0.9, or "adamw".
        lr: of the classifiers, and of the gates unless `gate_lr` is given.
        warmup_lr: of the warm-up.
        schedule: "cosine" to `final_lr` over the epochs, or "constant".
        weight_decay: of both.
        target_loss: which loss tells the best exit: "ce", "error" or "probability".
        class_weights: ω of eq. 10; "share" is the paper's and leaves too early.
        classifier_loss: "weighted" by P, or "single", the exit taken only.
        rescale: by ρ, as the released code does; see `classifier_loss`.
        joint: False trains gates alone after the warm-up.
        cache: features once for all epochs; False runs the backbone in every epoch, for loaders
            that augment.
        seed: of the order of batches.
    """

    epochs: int = 10
    warmup_epochs: int = 6
    patience: int = 2
    batch_size: int = 64
    period: int = 200
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    gate_lr: float | None = None
    warmup_lr: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: float = 2e-4
    weight_decay: float = 5e-4
    target_loss: TargetLoss = "ce"
    class_weights: ClassWeights = "none"
    classifier_loss: ClassifierLoss = "weighted"
    rescale: Rescale = "none"
    joint: bool = True
    cache: bool = True
    seed: int = 322

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size", "period"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("warmup_epochs", self.warmup_epochs >= 0, "at least 0")
        for name in ("lr", "warmup_lr"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("gate_lr", self.gate_lr is None or self.gate_lr > 0, "None or above 0")
        for name, choices in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("cosine", "constant")),
            ("target_loss", ("ce", "error", "probability")),
            ("class_weights", ("none", "share", "cumulative")),
            ("classifier_loss", ("weighted", "single")),
            ("rescale", ("none", "released", "detached")),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(
                f"JEIOptions.{name}",
                expected=expected,
                found=repr(getattr(self, name)),
                mend="Leave it out for the default.",
            )


@dataclass(frozen=True)
class Features:
    """What the heads see of some samples.

    Arguments:
        pooled: z of every exit, (items, width) float32.
        final: logits of the model's own head, (items, classes) float32.
        labels: (items,) int64.
    """

    pooled: list[Tensor]
    final: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Features":
        """Some of the samples."""
        return Features([z[index] for z in self.pooled], self.final[index], self.labels[index])


@dataclass
class Fitted:
    """One λ's result.

    Arguments:
        lam: λ.
        heads: state of the heads; `network.heads.load_state_dict` takes it.
        conformal: quantiles, or None without validation data.
        history: one row an epoch: losses of both levels, and with validation data accuracy and
            mean cost.
    """

    lam: float
    heads: dict[str, Tensor]
    conformal: Conformal | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def install(self, network: EarlyExitNetwork) -> None:
        """Make the network this one."""
        network.heads.load_state_dict(self.heads)
        network.lam, network.conformal = self.lam, self.conformal


def features_of(network: EarlyExitNetwork, loader: Loader) -> Iterator[Features]:
    """Run the frozen backbone over a loader of (inputs, labels), or of mappings with "labels".

    Raises:
        DataError: a batch has no labels, or one out of range.
    """
    for batch in loader:
        if hasattr(batch, "items"):
            inputs: Any = {name: value for name, value in batch.items() if name != "labels"}
            labels = batch.get("labels")
        else:
            pair = isinstance(batch, tuple | list) and len(batch) == 2
            inputs, labels = batch if pair else (batch, None)
        if not isinstance(labels, Tensor):
            raise DataError(
                "loader",
                expected='batches (inputs, labels), or mappings with "labels"',
                found="a batch without labels",
                mend="Exits need labels to learn from.",
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < network.classes:
            raise DataError(
                "labels",
                expected=f"classes from 0 to {network.classes - 1}",
                found=f"{int(labels.min())} to {int(labels.max())}",
                mend="Use the classes that the model was trained on.",
            )
        pooled, final = network.backbone.features(inputs)
        yield Features(pooled, final, labels.to(final.device))


def cached_features(network: EarlyExitNetwork, loader: Loader) -> Features:
    """All features of a loader, in its order; G D + C float32 numbers a sample.

    Raises:
        DataError: as `features_of`, or the loader is empty.
    """
    parts = list(features_of(network, loader))
    if not parts:
        raise DataError("loader", expected="samples", found="none", mend="Check the data.")
    exits = range(network.exits)
    return Features(
        [torch.cat([part.pooled[exit] for part in parts]) for exit in exits],
        torch.cat([part.final for part in parts]),
        torch.cat([part.labels for part in parts]),
    )


def fit(
    network: EarlyExitNetwork,
    loader: Loader,
    val_loader: Loader | None = None,
    *,
    lam: float,
    options: JEIOptions | None = None,
) -> Fitted:
    """Train exits for one λ and install them.

    Arguments:
        network: of `attach`.
        loader: labelled batches.
        val_loader: for early stopping, ω and conformal sets; without it there are none of these.
        lam: λ ≥ 0, the price of the whole network in units of cross-entropy; 0.01 to 9 in the
            paper.
        options: of training.

    Raises:
        ConfigError: λ is negative, or the backbone in train mode.
        DataError: see `features_of`.
    """
    return fit_path(network, loader, val_loader, lams=[lam], options=options)[0]


def fit_path(
    network: EarlyExitNetwork,
    loader: Loader,
    val_loader: Loader | None = None,
    *,
    lams: Sequence[float],
    options: JEIOptions | None = None,
) -> list[Fitted]:
    """Train exits for several λ from one pass over the data and one warm-up.

    The network has the last one installed; `Fitted.install` changes that. Other arguments and
    errors are those of `fit`.
    """
    for lam in lams:
        if not 0 <= lam < math.inf:
            raise ConfigError("lam", expected="λ of at least 0", found=repr(lam), mend="Try 0.2.")
    options = options or JEIOptions()
    if val_loader is None and options.class_weights != "none":
        warnings.warn("Without validation data there are no class weights.", stacklevel=2)
    trainer = _Trainer(network, loader, val_loader, options)
    trainer.warm_up()
    start = copy.deepcopy(network.heads.state_dict())
    results = []
    for lam in lams:
        network.heads.load_state_dict(start)
        results.append(trainer.alternate(lam))
        results[-1].install(network)
    return results


class _Trainer:
    def __init__(
        self,
        network: EarlyExitNetwork,
        loader: Loader,
        val_loader: Loader | None,
        options: JEIOptions,
    ) -> None:
        self.network, self.heads, self.options = network, network.heads, options
        self.loader = loader
        self.known = cached_features(network, loader) if options.cache else None
        self.unseen = cached_features(network, val_loader) if val_loader is not None else None
        self.order = torch.Generator().manual_seed(options.seed)

    def batches(self) -> Iterator[Features]:
        """One epoch."""
        if self.known is None:
            yield from features_of(self.network, self.loader)
            return
        order = torch.randperm(len(self.known), generator=self.order).to(self.known.labels.device)
        for index in order.split(self.options.batch_size):
            yield self.known.take(index)

    def logits(self, batch: Features) -> Tensor:
        """(exits + 1, items, classes), with gradients to the classifiers."""
        return torch.cat([self.heads.classify(batch.pooled), batch.final[None]])

    def warm_up(self) -> None:
        """Classifiers alone; each stops at its best validation accuracy."""
        exits = self.network.exits
        classifiers = self.heads.classifiers
        optimizer = torch.optim.SGD(
            classifiers.parameters(),
            lr=self.options.warmup_lr,
            momentum=0.9,
            weight_decay=self.options.weight_decay,
        )
        device = self.network.costs.device
        active = torch.ones(exits, dtype=torch.bool, device=device)
        best, waited = [-1.0] * exits, [0] * exits
        states: list[dict[str, Tensor]] = [{} for _ in range(exits)]
        for _ in range(self.options.warmup_epochs):
            for batch in self.batches():
                ce = cross_entropies(self.heads.classify(batch.pooled), batch.labels)
                _step(optimizer, warm_up_loss(ce, active))
            if self.unseen is None:
                continue
            for exit, accuracy in enumerate(self._accuracies(self.unseen)):
                if not active[exit]:
                    continue
                waited[exit] += 1
                if accuracy > best[exit]:
                    best[exit], waited[exit] = accuracy, 0
                    states[exit] = copy.deepcopy(classifiers[exit].state_dict())
                active[exit] = waited[exit] < self.options.patience
            for exit in (~active).nonzero()[:, 0].tolist():
                classifiers[exit].load_state_dict(states[exit])
            if not active.any():
                break

    @torch.no_grad()
    def _accuracies(self, data: Features) -> list[float]:
        logits = self.heads.classify(data.pooled)
        return (logits.argmax(-1) == data.labels).float().mean(1).tolist()

    def alternate(self, lam: float) -> Fitted:
        """Both levels in turn, each with an optimizer of its own, so that the one that rests is
        not moved by momentum or weight decay."""
        options, network = self.options, self.network
        self.order.manual_seed(options.seed + 1)  # the same batches for every λ
        gates = self._optimizer(self.heads.gates.parameters(), options.gate_lr or options.lr)
        classifiers = self._optimizer(self.heads.classifiers.parameters(), options.lr)
        weights = torch.ones(network.exits, device=network.costs.device)
        history = []
        for epoch in range(options.epochs):
            self._set_rates(gates, classifiers, epoch)
            losses: dict[str, list[float]] = {"gate loss": [], "classifier loss": []}
            for number, batch in enumerate(self.batches()):
                if not options.joint or number // options.period % 2 == 0:
                    with torch.no_grad():
                        logits = self.logits(batch)
                    loss = self.gate_level(logits, batch.labels, weights, lam)
                    losses["gate loss"].append(_step(gates, loss))
                else:
                    loss = self.classifier_level(batch)
                    losses["classifier loss"].append(_step(classifiers, loss))
            row = {name: sum(each) / len(each) for name, each in losses.items() if each}
            if self.unseen is not None:
                row |= self._validate(self.unseen)
                weights = self._weights(self.unseen, lam)
            history.append(row)
        state = copy.deepcopy(self.heads.state_dict())
        return Fitted(lam, state, self._conformal(), history)

    def gate_level(self, logits: Tensor, labels: Tensor, weights: Tensor, lam: float) -> Tensor:
        """Eq. 9; no gradient to the classifiers."""
        exits = self.network.exits
        best = best_exits(logits, labels, self.network.costs, lam, self.options.target_loss)
        return gate_loss(self.heads.scores(logits[:-1]), gate_targets(best, exits), weights)

    def classifier_level(self, batch: Features) -> Tensor:
        """Eq. 11; no gradient to the gates."""
        logits = self.heads.classify(batch.pooled)
        with torch.no_grad():
            P, _ = exit_probabilities(self.heads.scores(logits).sigmoid())
        options = self.options
        return classifier_loss(logits, batch.labels, P, options.classifier_loss, options.rescale)

    def _optimizer(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        decay = self.options.weight_decay
        if self.options.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)

    def _set_rates(
        self, gates: torch.optim.Optimizer, classifiers: torch.optim.Optimizer, epoch: int
    ) -> None:
        if self.options.schedule == "constant":
            return
        fallen = (1 + math.cos(math.pi * epoch / self.options.epochs)) / 2
        peaks = (gates, self.options.gate_lr or self.options.lr), (classifiers, self.options.lr)
        for optimizer, peak in peaks:
            for group in optimizer.param_groups:
                group["lr"] = self.options.final_lr + (peak - self.options.final_lr) * fallen

    @torch.no_grad()
    def _validate(self, data: Features) -> dict[str, float]:
        logits = self.logits(data)
        exits = simulate(logits, LearnedGates(self.heads))
        taken = logits[exits, torch.arange(len(data), device=exits.device)]
        return {
            "accuracy": float((taken.argmax(-1) == data.labels).float().mean()),
            "cost": float(self.network.costs[exits].mean()),
        }

    @torch.no_grad()
    def _weights(self, data: Features, lam: float) -> Tensor:
        costs, exits = self.network.costs, self.network.exits
        best = best_exits(self.logits(data), data.labels, costs, lam, self.options.target_loss)
        return class_weights(best, exits, self.options.class_weights)

    @torch.no_grad()
    def _conformal(self) -> Conformal | None:
        if self.unseen is None:
            return None
        logits = self.logits(self.unseen)
        exits = simulate(logits, LearnedGates(self.heads))
        return Conformal.of(logits, self.unseen.labels, exits)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()
