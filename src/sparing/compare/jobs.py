"""The units of work of a comparison: train one adapter, or measure one that has been trained.

A job is described by plain data and leaves one `result.json` in its folder, written last and
atomically. A job whose result is there is never done again; one that was interrupted resumes.
"""

import dataclasses
import math
import os
import resource
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sparing.adapt  # noqa: F401  (a child process must know our methods before it unpickles)
from sparing import pretrained
from sparing.checkpoint import UnwritableError, atomic_path, read_json, write_json
from sparing.compare.competitors import competitor
from sparing.data import Batch, Blocks
from sparing.errors import CheckpointError
from sparing.train import DivergedError, TrainPlan, evaluate, is_sharded, prepared, train

ADAPTER_FILE = "adapter_model.safetensors"
LATENCY_REPEATS = 7

Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Job:
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
    def result_file(self) -> Path:
        """Present once the job is done, or has failed for good."""
        return Path(self.folder) / "result.json"

    @property
    def label(self) -> str:
        """For progress displays."""
        if self.plan is None:
            return "untouched model"
        what = f"{self.method} lr {self.plan.learning_rate:g} seed {self.plan.seed}"
        return f"measure {what}" if self.kind == "measure" else what


def run(job: Job, report: Report = lambda step, loss: None) -> dict[str, Any]:
    """Do a job, or read what it gave before.

    An exception becomes the result `{"error": ...}`, with the traceback in the job's folder.

    Raises:
        UnwritableError: nothing more can be done here; the job can go on later.
        Stopped: so can one whose `report` asks for an end.
    """
    if job.result_file.exists():
        return dict(read_json(job.result_file))
    # Under FSDP, only one process would load the weights. But methods choose entries by them, and
    # accelerate cannot spread models that have buffers, as our adapters do, from one process.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    accelerator.wait_for_everyone()  # every process has looked before one can leave a result
    try:
        result = _ACTIONS[job.kind](job, report, accelerator)
    except (UnwritableError, Stopped):
        raise
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
        if accelerator.is_main_process:
            with atomic_path(Path(job.folder) / "traceback.txt") as fresh:
                fresh.write_text(traceback.format_exc())
        if isinstance(error, CheckpointError):
            return result  # a file can be mended, so the job is not done for good
    if accelerator.is_main_process:
        write_json(job.result_file, result)
    accelerator.wait_for_everyone()
    return result


class Stopped(Exception):  # noqa: N818
    """Nobody waits for the job any more."""


def save_blocks(path: Path, parts: dict[str, Blocks]) -> None:
    """Keep prepared data, so that every job sees the very same tokens."""
    tensors = {
        f"{name}.{field}": getattr(part.batch, field)
        for name, part in parts.items()
        for field in Batch._fields
    }
    with atomic_path(path) as fresh:
        save_file(tensors, fresh)


def load_blocks(path: str, part: str) -> Blocks:
    """One part of what `save_blocks` kept."""
    with safe_open(path, framework="pt") as file:
        return Blocks(Batch(*(file.get_tensor(f"{part}.{field}") for field in Batch._fields)))


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
    # Tied weights, gathered from several processes, have become copies.
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    model.save_pretrained(str(folder), state_dict={n: t for n, t in state.items() if n not in tied})


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
