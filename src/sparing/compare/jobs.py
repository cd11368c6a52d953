"""The units of work of a comparison: train one adapter, or measure one that has been trained.

Files follow the rules of `sparing.work`.
"""

import dataclasses
import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import nn

import sparing.adapt  # noqa: F401  (a child process must know our methods before it unpickles)
from sparing import pretrained
from sparing.checkpoint import atomic_path
from sparing.compare.competitors import competitor
from sparing.data import Blocks, load_blocks
from sparing.train import DivergedError, TrainPlan, evaluate, is_sharded, prepared, train
from sparing.work import Report, Work

ADAPTER_FILE = "adapter_model.safetensors"
LATENCY_REPEATS = 7


@dataclass(frozen=True)
class Job(Work):
    """One unit of work.

    Arguments:
        kind: "base" measures the untouched model; "train" trains and scores on the selection
            slice; "measure" reloads a trained adapter and scores it on the validation slice.
        model: as given by the user.
        data: file of prepared blocks.
        method: competitor, as given by the user; empty for "base".
        options: of its config.
        target_modules: to adapt.
        plan: of training; for "measure" the plan it was trained with.
        folder: of this job.
        trained: for "measure", the folder of the training job.
        dtype: of the base model's weights.
        latency: whether to time forwards ("measure" only).
    """

    kind: Literal["base", "train", "measure"]
    model: str
    data: str
    folder: str
    method: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    target_modules: Any = None
    plan: TrainPlan | None = None
    trained: str | None = None
    dtype: str = "float32"
    latency: bool = False

    @property
    def label(self) -> str:
        if self.plan is None:
            return "untouched model"
        what = f"{self.method} lr {self.plan.learning_rate:g} seed {self.plan.seed}"
        return f"measure {what}" if self.kind == "measure" else what

    @property
    def steps(self) -> int:
        return self.plan.steps if self.plan is not None and self.kind == "train" else 0

    def act(self, report: Report, accelerator: Accelerator) -> dict[str, Any]:
        return _ACTIONS[self.kind](self, report, accelerator)


def run(job: Job, report: Report = lambda step, loss: None) -> dict[str, Any]:
    """Do a job, or read what it gave before; see `Work.run`."""
    return job.run(report)


def _base(job: Job, report: Report, accelerator: Accelerator) -> dict[str, Any]:
    model = prepared(_model(job, accelerator), accelerator)
    return {
        "selection_loss": _score(model, job, "selection", accelerator),
        "validation_loss": _score(model, job, "validation", accelerator),
    }


def _train(job: Job, report: Report, accelerator: Accelerator) -> dict[str, Any]:
    assert job.plan is not None
    entry, model = competitor(job.method), _model(job, accelerator)
    if entry.config_class is None:
        model.requires_grad_(True)
    else:
        # PEFT's own methods initialise from torch's global generator.
        torch.manual_seed(job.plan.seed)
        config = entry.config(job.options, job.target_modules, seed=job.plan.seed)
        config.base_model_name_or_path = job.model
        model = get_peft_model(model, config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoint = Path(job.folder) / "checkpoint.pt"
    trained, history = train(
        model,
        load_blocks(job.data, "train"),
        job.plan,
        accelerator,
        checkpoint=checkpoint,
        on_step=report,
    )
    loss = _score(trained, job, "selection", accelerator)
    adapter = Path(job.folder) / "adapter"
    state = accelerator.get_state_dict(trained)
    if accelerator.is_main_process:
        with atomic_path(adapter) as fresh:
            _save(accelerator.unwrap_model(trained), fresh, state)
            if entry.config_class is None:  # a model of its own
                pretrained.load_tokenizer(job.model).save_pretrained(fresh)
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    weights = sorted(adapter.glob("*.safetensors"))
    return {
        "selection_loss": loss,
        "trainable_parameters": trainable,
        "adapter_bytes": sum(file.stat().st_size for file in weights),
        "losses": history.losses,
        "seconds_per_step": statistics.median(history.seconds),
        "peak_memory_bytes": peak_memory(accelerator.device),
    }


def _measure(job: Job, report: Report, accelerator: Accelerator) -> dict[str, Any]:
    assert job.trained is not None
    adapter = Path(job.trained) / "adapter"
    if competitor(job.method).config_class is None:
        whole = prepared(_model(job, accelerator, source=str(adapter)), accelerator)
        return {"validation_loss": _score(whole, job, "validation", accelerator)}
    model = PeftModel.from_pretrained(_model(job, accelerator), adapter).eval()
    loss = _score(prepared(model, accelerator), job, "validation", accelerator)
    result: dict[str, Any] = {"validation_loss": loss}
    if job.latency and not is_sharded(accelerator):  # a sharded forward waits for the network
        validation = load_blocks(job.data, "validation")
        result |= _latency(model, _model(job, accelerator), validation, accelerator)
    return result


def _score(model: nn.Module, job: Job, part: str, accelerator: Accelerator) -> float:
    """The loss on one part of the data, which is finite."""
    loss = evaluate(model, load_blocks(job.data, part), accelerator)
    if not math.isfinite(loss):
        raise DivergedError(
            f"{part} loss",
            expected="a finite number",
            found=str(loss),
            mend="Try a smaller learning rate.",
        )
    return loss


@torch.no_grad()
def _latency(
    model: PeftModel, base: nn.Module, data: Blocks, accelerator: Accelerator
) -> dict[str, Any]:
    """Forward time with the adapter, and merged, over that of the untouched model."""
    ids = data.take(slice(0, 1)).input_ids.to(accelerator.device)
    ratio = _ratio(lambda: model(input_ids=ids), lambda: base(input_ids=ids))
    try:
        merged = model.merge_and_unload()
    except (ValueError, NotImplementedError, AttributeError, TypeError):
        # PEFT's methods have no common way to say that they cannot merge.
        return {"latency_ratio": ratio, "merged_latency_ratio": None}
    merged_ratio = _ratio(lambda: merged(input_ids=ids), lambda: base(input_ids=ids))
    return {"latency_ratio": ratio, "merged_latency_ratio": merged_ratio}


def _ratio(one: Callable[[], Any], other: Callable[[], Any]) -> float:
    """Median time of one over the other, taken in turns so that both see the same machine."""
    times: dict[Callable[[], Any], list[float]] = {one: [], other: []}
    for action in (one, other):
        action()
    for _ in range(LATENCY_REPEATS):
        for action in (one, other):
            _wait()
            start = time.perf_counter()
            action()
            _wait()
            times[action].append(time.perf_counter() - start)
    return statistics.median(times[one]) / statistics.median(times[other])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _model(job: Job, accelerator: Accelerator, source: str | None = None) -> nn.Module:
    dtype = getattr(torch, job.dtype)
    return pretrained.load(source or job.model, dtype=dtype, device=str(accelerator.device)).model


def _save(model: Any, folder: Path, state: dict[str, Any]) -> None:
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        return
    pretrained.save(model, folder, state)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that CUDA has allocated, or the process' largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident_peak()


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_ACTIONS = {"base": _base, "train": _train, "measure": _measure}
