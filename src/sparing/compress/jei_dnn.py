"""JEI-DNN: a trained classifier that answers early where its own gates say so.

A linear classifier and a gate with five parameters go behind every block of a frozen network. Both
are trained in turn for expected loss + λ · compute, so that classifiers learn from the samples that
will leave with them. Inference computes no sample further than its exit.

Regol, Chataoui and Coates, "Jointly-Learned Exit and Inference for a Dynamic Neural Network",
arXiv 2310.09163 (ICLR 2024). Equation numbers are those of our specification, which was made from
the released code; the paper's body was not available.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparing.checkpoint import atomic_path, read_json, write_json
from sparing.compress._jei_backbone import Backbone, Inputs, Pool, Rows, final_norm
from sparing.compress.jei_gates import Heads, LearnedGates, Policy
from sparing.compress.jei_uncertainty import Conformal, Variant
from sparing.errors import CheckpointError, ConfigError, near_matches
from sparing.fingerprint import fingerprint
from sparing.surgery import block_names

_FORMAT = "sparing-jei-dnn-1"


@dataclass(frozen=True)
class ExitOutput:
    """What a batch got.

    Arguments:
        logits: (batch, classes) float32, of each row's own exit.
        exit: (batch,) int64; the number of exits stands for the model's own head.
        cost: (batch,) float32, multiply-adds spent over those of the final exit (eq. 7).
    """

    logits: Tensor
    exit: Tensor
    cost: Tensor


class EarlyExitNetwork(nn.Module):
    """A frozen classifier with exits; made by `attach` or `load_addon`.

    Attributes:
        heads: all that is trained, float32.
        costs: (exits + 1,) float32, IC of eq. 7: with every head passed on the way; the last is 1.
        mult_adds: of a row through all blocks and heads.
        lam: λ it was trained with, or None.
        conformal: quantiles from validation data, or None.
    """

    costs: Tensor

    def __init__(self, backbone: Backbone, heads: Heads, mult_adds: Sequence[float]) -> None:
        super().__init__()
        self.model = backbone.model
        self.backbone = backbone
        self.heads = heads
        first: Any = heads.classifiers[0]
        self.classes: int = first.out_features
        total = total_mult_adds(mult_adds, self.widths, self.classes)
        self.mult_adds = total[-1]
        self.register_buffer("costs", torch.tensor(total) / total[-1], persistent=False)
        self.backbone_mult_adds = list(mult_adds)
        self.lam: float | None = None
        self.conformal: Conformal | None = None
        self.eval()

    @property
    def exits(self) -> int:
        """G, exits before the model's own head."""
        return len(self.heads.gates)

    @property
    def widths(self) -> list[int]:
        """D of every exit."""
        return [classifier.in_features for classifier in self.heads.classifiers]  # type: ignore[misc]

    def train(self, mode: bool = True) -> Self:
        """Only the heads have a training mode; the backbone stays as it is."""
        self.training = mode
        self.heads.train(mode)
        return self

    @torch.no_grad()
    def predict(self, inputs: Inputs, policy: Policy | None = None) -> ExitOutput:
        """Answer a batch; rows that have left are computed no further.

        Arguments:
            inputs: what the model is called with: a tensor, or a mapping of keyword arguments whose
                tensors with two axes or more have the batch first.
            policy: who leaves; the trained gates by default.

        Raises:
            ConfigError: the backbone is in train mode.
        """
        policy = policy or LearnedGates(self.heads)
        found: dict[str, Tensor] = {}

        def at_exit(exit: int, z: Tensor, rows: Rows) -> None:
            if not found:
                found["logits"] = z.new_zeros((rows.batch, self.classes))
                found["exit"] = torch.full_like(rows.index, self.exits)
                found["mass"] = z.new_ones(rows.batch)
            logits = self.heads.classifiers[exit](z)
            leaves, mass = policy.decide(exit, logits, found["mass"][rows.index])
            leaves = leaves & rows.alive
            found["mass"].index_copy_(0, rows.index, mass)
            kept = torch.where(leaves[:, None], logits, found["logits"][rows.index])
            found["logits"].index_copy_(0, rows.index, kept)
            chosen = torch.where(leaves, exit, found["exit"][rows.index])
            found["exit"].index_copy_(0, rows.index, chosen)
            rows.alive = rows.alive & ~leaves

        final, _ = self.backbone.run(inputs, at_exit)
        logits, exits = found["logits"], found["exit"]
        if final is not None:
            logits = torch.where((exits == self.exits)[:, None], final.to(logits.dtype), logits)
        return ExitOutput(logits, exits, self.costs[exits])

    @torch.no_grad()
    def all_logits(self, inputs: Inputs) -> Tensor:
        """(exits + 1, batch, classes) float32, with nothing left out, for simulated exits."""
        pooled, final = self.backbone.features(inputs)
        return torch.cat([self.heads.classify(pooled), final[None]])

    def prediction_sets(
        self, output: ExitOutput, alpha: float = 0.05, variant: Variant = "exit"
    ) -> Tensor:
        """Conformal sets, (batch, classes) bool; see `Conformal`.

        Raises:
            ConfigError: it was trained without validation data.
        """
        if self.conformal is None:
            raise ConfigError(
                "prediction_sets",
                expected="quantiles from validation data",
                found="a network trained without",
                mend="Give fit a val_loader.",
            )
        return self.conformal.sets(output.logits, output.exit, alpha, variant)

    def save_addon(self, folder: Path | str) -> None:
        """Write heads and quantiles, not the backbone; atomically."""
        tensors = {name: tensor.contiguous() for name, tensor in self.heads.state_dict().items()}
        if self.conformal is not None:
            tensors["conformal.quantiles"] = self.conformal.quantiles
        with atomic_path(Path(folder)) as fresh:
            fresh.mkdir()
            save_file(tensors, fresh / "heads.safetensors")
            write_json(
                fresh / "addon.json",
                {
                    "format": _FORMAT,
                    "backbone": _digest(self.model),
                    "blocks": list(self.backbone.blocks),
                    "exits": list(self.backbone.exits),
                    "pool": self.backbone.pool,
                    "norm": self.backbone.norm,
                    "widths": self.widths,
                    "classes": self.classes,
                    "mult_adds": self.backbone_mult_adds,
                    "lam": self.lam,
                },
            )


def total_mult_adds(backbone: Sequence[float], widths: Sequence[int], classes: int) -> list[float]:
    """Multiply-adds up to every exit with the heads passed, and of the whole (before eq. 7).

    A classifier counts D C, a gate 9 C + 6 as in the released code.
    """
    heads, total = 0, []
    for reached, width in zip(backbone, widths, strict=False):
        heads += width * classes + 9 * classes + 6
        total.append(reached + heads)
    return [*total, backbone[-1] + heads]


def attach(
    model: nn.Module,
    example: Inputs,
    *,
    exits: Literal["all"] | Sequence[int] = "all",
    pool: Pool = "cls",
    norm: str | None = "final",
    blocks: Sequence[str] | None = None,
    seed: int = 322,
) -> EarlyExitNetwork:
    """Put untrained exits on a trained classifier.

    Arguments:
        model: in eval mode: a network that returns logits (batch, classes), or a `transformers`
            model that does. A causal language model classifies the next token. It is not changed.
        example: inputs of a typical size, from which widths and multiply-adds are read.
        exits: behind which blocks, from 0, never the last one.
        pool: how a row's tokens become one vector: "cls" takes the first, "mean" averages the real
            ones, "last" takes the last real one.
        norm: "final" is the backbone's own last norm, frozen; a module's name; or None.
        blocks: names of the blocks; found by `sparing.surgery` otherwise.
        seed: of the heads' initialisation.

    Raises:
        ConfigError: train mode; fewer than two classes or blocks; an exit that does not exist or is
            behind the last block; no final norm, or one of another width.
    """
    names = list(blocks) if blocks is not None else block_names(model)
    for name in names:
        _require_module(model, name)
    if len(names) < 2:
        raise ConfigError(
            "blocks",
            expected="at least two blocks, one after the other",
            found=str(names),
            mend="Name them with blocks=[...].",
        )
    chosen = list(range(len(names) - 1)) if exits == "all" else sorted(set(exits))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(names) - 1:
        raise ConfigError(
            "exits",
            expected=f"numbers of blocks from 0 to {len(names) - 2}; behind the last is the head",
            found=str(exits),
            mend='Use "all".',
        )
    if pool not in ("cls", "mean", "last"):
        raise ConfigError(
            "pool", expected="'cls', 'mean' or 'last'", found=repr(pool), mend="Use 'cls'."
        )
    backbone = Backbone(model, names, chosen, pool, _norm_name(model, names, norm))
    try:
        pooled, logits = backbone.features(example)
    except RuntimeError as error:
        if backbone.norm is None:
            raise
        raise ConfigError(
            f"norm {backbone.norm!r}",
            expected="a norm as wide as every exit",
            found=str(error).splitlines()[0],
            mend="Use norm=None.",
        ) from error
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ConfigError(
            "model",
            expected="logits (batch, classes) with at least 2 classes, as a gate needs a margin",
            found=str(tuple(logits.shape)),
            mend="Use a model with a class for each answer.",
        )
    heads = Heads([z.shape[1] for z in pooled], logits.shape[1], seed).to(logits.device)
    return EarlyExitNetwork(backbone, heads, backbone.mult_adds(example))


def load_addon(model: nn.Module, folder: Path | str) -> EarlyExitNetwork:
    """Put saved exits on the classifier that they were trained on.

    Raises:
        CheckpointError: the folder is damaged, or belongs to another backbone.
        ConfigError: the model is in train mode when it is used.
    """
    folder = Path(folder)
    about = read_json(folder / "addon.json")
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise CheckpointError(
            str(folder / "addon.json"),
            expected=f"format {_FORMAT}",
            found=repr(about.get("format") if isinstance(about, dict) else about),
            mend="Train the exits again, or use the version that wrote them.",
        )
    if about["backbone"] != _digest(model):
        raise CheckpointError(
            str(folder),
            expected=f"the backbone with fingerprint {about['backbone']}",
            found=str(_digest(model)),
            mend="Load the weights that the exits were trained on; others need new exits.",
        )
    heads = Heads(about["widths"], about["classes"])
    try:
        tensors = load_file(folder / "heads.safetensors")
        quantiles = tensors.pop("conformal.quantiles", None)
        heads.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            str(folder / "heads.safetensors"),
            expected="the heads that addon.json describes",
            found=str(error).splitlines()[0],
            mend="Copy the folder again.",
        ) from error
    backbone = Backbone(model, about["blocks"], about["exits"], about["pool"], about["norm"])
    device = next(model.parameters()).device
    network = EarlyExitNetwork(backbone, heads, about["mult_adds"]).to(device)
    network.lam = about["lam"]
    network.conformal = None if quantiles is None else Conformal(quantiles)
    return network


def _require_module(model: nn.Module, name: str) -> None:
    known = [known for known, _ in model.named_modules()]
    if name not in known:
        raise ConfigError(
            f"module {name!r}",
            expected="a module of the model",
            found="none of that name",
            mend=near_matches(name, known),
        )


def _norm_name(model: nn.Module, blocks: list[str], norm: str | None) -> str | None:
    if norm == "final":
        found = final_norm(model, blocks)
        if found is None:
            raise ConfigError(
                "norm",
                expected="a norm behind the last block",
                found=f"none in {type(model).__name__}",
                mend="Use norm=None, as for BERT and ResNet, or name a module.",
            )
        return found
    if norm is not None:
        _require_module(model, norm)
    return norm


def _digest(model: nn.Module) -> str | None:
    exact = [t for t in model.state_dict().values() if t.is_floating_point()]
    return fingerprint(t.float() if t.dtype == torch.float16 else t for t in exact)
