"""One training run from scratch, in a folder of its own.

The folder holds `settings.json`, the prepared data, `tokenizer/`, `plan.json`, `log.jsonl` with a
line a step, `checkpoint.pt` while unfinished, and in the end `model/` and `result.json`.
"""

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoTokenizer

from sparing import pretrained
from sparing.checkpoint import atomic_path, write_json
from sparing.data import TextData, load_blocks, prepare, save_blocks
from sparing.data.alphabets import tokenizer_for
from sparing.errors import CheckpointError, SparingError
from sparing.models import build
from sparing.pretrain.log import Log
from sparing.pretrain.settings import Settings
from sparing.run_folder import Claim, check_folder, claim_folder, one_process_first, versions
from sparing.run_progress import Progress, Silent
from sparing.scale.multipliers import check_multipliers, fold_multipliers, install_multipliers
from sparing.scale.optimizers import make_optimizer
from sparing.scale.planners import PLANNERS
from sparing.scale.planning import Plan
from sparing.train import DivergedError, evaluate, train
from sparing.work import Report, Work

DATA_FILE = "data.safetensors"
TOKENIZER = "tokenizer"
CHECKPOINT_SECONDS = 30.0


class RunError(SparingError, RuntimeError):
    """A run ended by an error of its own."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Arguments:
        selection_loss, validation_loss: nats a token on two held-out parts; hyperparameters are
            chosen on the first and reported on the second.
        train_loss: mean over the last tenth of the steps.
        parameters: of the model.
        tokens: seen in training.
        seconds_per_step: median.
    """

    selection_loss: float
    validation_loss: float
    train_loss: float
    parameters: int
    tokens: int
    seconds_per_step: float


@dataclass(frozen=True)
class Run(Work):
    """A run as a unit of work.

    Arguments:
        settings: what to train.
        folder: of this run.
        source: folder with the prepared data and the tokenizer.
        vocabulary: tokens of the tokenizer.
        keep: whether to save the final model.
        checkpoint_seconds: the least time between two saves.
    """

    settings: Settings
    folder: str
    source: str
    vocabulary: int
    keep: bool = True
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    @property
    def label(self) -> str:
        s = self.settings
        return f"width {s.width} depth {s.depth} lr {s.learning_rate:g} seed {s.seed}"

    @property
    def steps(self) -> int:
        return self.settings.steps

    def act(self, report: Report, accelerator: Accelerator) -> dict[str, Any]:
        try:
            return {"status": "ok"} | dataclasses.asdict(self._train(report, accelerator))
        except DivergedError as error:  # a finding, not a failure
            return {"status": "diverged", "error": str(error)}

    def _train(self, report: Report, accelerator: Accelerator) -> Outcome:
        settings, folder = self.settings, Path(self.folder)
        model, plan = planned_model(settings, self.vocabulary)
        parameters = sum(p.numel() for p in model.parameters())
        handles = install_multipliers(model, plan)
        data = str(Path(self.source) / DATA_FILE)
        checkpoint, log = folder / "checkpoint.pt", Log(folder / "log.jsonl", settings)
        if accelerator.is_main_process:
            write_json(folder / "plan.json", plan.to_json())

        def on_step(step: int, loss: float) -> None:
            if accelerator.is_main_process:
                log.step(step, loss)
            report(step, loss)

        with log:
            trained, history = train(
                model,
                load_blocks(data, "train"),
                settings.train_plan(),
                accelerator,
                make_optimizer=lambda model: make_optimizer(settings.optimizer, plan, model),
                checkpoint=checkpoint,
                checkpoint_seconds=self.checkpoint_seconds,
                on_step=on_step,
            )
        losses = {
            part: _finite(part, evaluate(trained, load_blocks(data, part), accelerator))
            for part in ("selection", "validation")
        }
        weights = accelerator.get_state_dict(trained)
        for handle in handles:
            handle.remove()
        if accelerator.is_main_process:
            if self.keep:
                plain = accelerator.unwrap_model(trained)
                self._save(plain, fold_multipliers(weights, plan))
            checkpoint.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        last = history.losses[-max(1, len(history.losses) // 10) :]
        return Outcome(
            losses["selection"],
            losses["validation"],
            statistics.fmean(last),
            parameters,
            settings.steps * settings.tokens_a_step,
            statistics.median(history.seconds),
        )

    def _save(self, model: Any, weights: dict[str, Tensor]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(Path(self.source) / TOKENIZER)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        with atomic_path(Path(self.folder) / "model") as fresh:
            pretrained.save(model, fresh, weights)
            tokenizer.save_pretrained(fresh)


def planned_model(settings: Settings, vocabulary: int) -> tuple[nn.Module, Plan]:
    """A fresh model as the planner wants it, and the plan.

    Raises:
        ConfigError: the planner cannot do this model.
    """
    plan = plan_of(settings, vocabulary)
    model = build(settings.family, settings.shape(vocabulary), settings.seed)
    plan.initialize(model, settings.seed)
    return model, plan


def plan_of(settings: Settings, vocabulary: int) -> Plan:
    """What the planner makes of a run; no weights are made."""
    with torch.device("meta"):
        base = build(settings.family, settings.base_shape(vocabulary))
        target = build(settings.family, settings.shape(vocabulary))
    plan = PLANNERS[settings.planner_name](base, target, settings.plan_settings())
    check_multipliers(plan)
    return plan


def pretrain(
    settings: Settings,
    folder: Path,
    progress: Progress | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Outcome:
    """Train a model, or finish what an interrupted call began.

    Arguments:
        settings: what to train.
        folder: for everything that is written.
        progress: is told what happens.
        checkpoint_seconds: the least time between two saves.

    Returns:
        the losses; the model and its tokenizer are in `folder/model`.

    Raises:
        ConfigError: an option that cannot work.
        DataError: the data cannot be used.
        CheckpointError: the folder belongs to another run, or files are damaged.
        DivergedError: the loss or a gradient became NaN or infinite.
        RunError: anything else went wrong; the folder has the traceback.
    """
    progress = progress or Silent()
    folder = folder.absolute()
    progress.stage("preparing the data")
    with one_process_first():
        vocabulary = prepare_folder(folder, settings, {"settings": settings.as_json()})
    run = Run(settings, str(folder), str(folder), vocabulary, checkpoint_seconds=checkpoint_seconds)
    progress.expect([run])
    result = run.run(lambda step, loss: progress.step(run, step, loss))
    status = result.pop("status", "failed")
    if status == "ok":
        return Outcome(**result)
    if status == "failed":
        raise _failed(run, str(result["error"]))
    raise DivergedError(
        str(folder),
        expected="a finished run",
        found=str(result["error"]),
        mend="Choose a smaller --lr, and another --out.",
    )


def _failed(run: Run, error: str) -> SparingError:
    """What stopped a run; the same command tries again."""
    run.result_file.unlink(missing_ok=True)
    kind = CheckpointError if error.startswith("CheckpointError") else RunError
    return kind(
        run.folder,
        expected="a run without errors",
        found=error,
        mend=f"See {run.folder}/traceback.txt, and run the same command again.",
    )


def prepare_folder(folder: Path, settings: Settings, claim: Claim) -> int:
    """Claim a run folder and put data and tokenizer into it; nothing is written on bad input.

    Arguments:
        folder: of a run or a sweep.
        settings: say which data and tokenizer.
        claim: what decides the numbers.

    Returns:
        tokens of the vocabulary.
    """
    claim = {**claim, "versions": versions()}
    check_folder(folder, claim)
    tokenizer = tokenizer_for(settings.tokenizer, settings.data)
    vocabulary = len(tokenizer)
    plan_of(settings, vocabulary)
    data = prepare(
        settings.data,
        tokenizer,
        block_length=settings.block_length,
        selection_blocks=settings.validation_blocks,
        validation_blocks=settings.validation_blocks,
    )
    claim_folder(folder, {**claim, "data": _describe(data)})
    if not (folder / DATA_FILE).exists():
        with atomic_path(folder / TOKENIZER) as fresh:
            tokenizer.save_pretrained(fresh)
        save_blocks(folder / DATA_FILE, data.parts)
    return vocabulary


def _describe(data: TextData) -> dict[str, Any]:
    return {
        "fingerprint": data.fingerprint,
        "train_tokens": data.train.target_tokens,
        "selection_tokens": data.selection.target_tokens,
        "validation_tokens": data.validation.target_tokens,
    }


def _finite(part: str, loss: float) -> float:
    if not math.isfinite(loss):
        raise DivergedError(
            f"{part} loss",
            expected="a finite number",
            found=str(loss),
            mend="Try a smaller learning rate.",
        )
    return loss
