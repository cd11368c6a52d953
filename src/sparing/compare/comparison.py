"""Size every competitor, train it at each learning rate, measure the best, and tell."""

import dataclasses
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sparing import pretrained
from sparing.budget import Budget, Unit
from sparing.checkpoint import read_json, write_json
from sparing.compare.competitors import Competitor, competitor
from sparing.compare.jobs import Job
from sparing.compare.progress import Progress, Silent
from sparing.compare.results import LearningRate, Results, Row, Summary
from sparing.compare.settings import Settings, claim_of
from sparing.compare.sizing import MetaModel, Sizing, solve
from sparing.data import TextData, prepare, save_blocks
from sparing.errors import CheckpointError, ConfigError
from sparing.executors import Executor, executor
from sparing.reproduce import environment
from sparing.run_folder import check_folder, claim_folder, one_process_first, versions
from sparing.train import TrainPlan

DATA_FILE = "data.safetensors"
DATA_MARK = "data.json"
SIZES_FILE = "sizes.json"


def compare(
    settings: Settings,
    *,
    folder: Path | None = None,
    ray: str | None = None,
    isolate: bool = True,
    progress: Progress | None = None,
) -> Results:
    """Run a comparison, or finish one that was interrupted.

    Arguments:
        settings: the question.
        folder: for everything that is written; by default one named after the settings.
        ray: address of a Ray cluster ("auto", "local" or host:port) to spread the runs over.
        isolate: give every run its own process, so that peak memory is its own.
        progress: is told what happens.

    Returns:
        the results, which are also in `folder/results.json`, with one adapter folder a method.

    Raises:
        ConfigError: an option, a method or the budget cannot work.
        DataError: the data cannot be used.
        CheckpointError: the folder belongs to another comparison, or files are damaged.
    """
    folder = (folder or settings.default_folder()).absolute()
    progress = progress or Silent()
    runner = executor(ray, isolate, Job.__module__)
    entries = [competitor(name) for name in settings.methods]
    with one_process_first():
        claim = claim_of(settings, versions())
        check_folder(folder, claim)
        source = pretrained.resolve(settings.model)
        pretrained.check(source)
        meta = MetaModel(source, settings.target_modules)
        progress.stage("sizing the methods")
        sizings = _sizings(entries, meta, settings, folder)
        progress.stage("preparing the data")
        data = _data(settings, source, folder)
        # Nothing has been written before everything that was given is known to be usable.
        claim_folder(folder, claim)
        _keep(sizings, data, folder)
    study = _Study(settings, folder, source, runner, progress)
    base = study.base()
    rows = [_base_row(base)]
    chosen = study.learning_rates(entries, sizings)
    rows += study.rows(entries, sizings, chosen, base.get("validation_loss"))
    results = Results(
        model={"name": settings.model, "source": source, "parameters": meta.parameters},
        data=_describe(data, settings),
        budget=_describe_budget(settings, meta),
        settings=settings.as_json(),
        rows=rows,
        environment=environment(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if PartialState().is_main_process:
        results.save(folder / "results.json")
    return results


@dataclasses.dataclass
class _Study:
    """The jobs of one comparison."""

    settings: Settings
    folder: Path
    source: str
    executor: Executor
    progress: Progress
    _errors: dict[str, str] = dataclasses.field(default_factory=dict)

    def base(self) -> dict[str, Any]:
        """Losses of the untouched model."""
        return self._run([self._job("base", "base")])[0]

    def learning_rates(
        self, entries: Sequence[Competitor], sizings: dict[str, Sizing | str]
    ) -> dict[str, LearningRate | None]:
        """Train every method at every rate with the first seed; the selection slice decides."""
        jobs = {
            (entry.name, rate): self._train(entry, sizing, rate, self.settings.seeds[0])
            for entry in entries
            if isinstance(sizing := sizings[entry.name], Sizing)
            for rate in self.settings.grid(entry.name, entry.learning_rates)
        }
        found = dict(zip(jobs, self._run(list(jobs.values())), strict=True))
        self._errors = {
            name: str(result["error"])
            for (name, _), result in reversed(found.items())
            if "error" in result
        }
        chosen: dict[str, LearningRate | None] = {}
        for entry in entries:
            grid = [rate for name, rate in jobs if name == entry.name]
            losses = [found[entry.name, rate].get("selection_loss") for rate in grid]
            finished = [
                (loss, rate) for loss, rate in zip(losses, grid, strict=True) if loss is not None
            ]
            best = min(finished)[1] if finished else None
            chosen[entry.name] = None if best is None else LearningRate(best, grid, losses)
        return chosen

    def rows(
        self,
        entries: Sequence[Competitor],
        sizings: dict[str, Sizing | str],
        chosen: dict[str, LearningRate | None],
        loss_before: float | None,
    ) -> list[Row]:
        """Train the other seeds at the chosen rates, and measure everything."""
        trained: dict[str, list[Job]] = {}
        for entry in entries:
            rate, sizing = chosen[entry.name], sizings[entry.name]
            if rate is not None and isinstance(sizing, Sizing):
                trained[entry.name] = [
                    self._train(entry, sizing, rate.best, seed) for seed in self.settings.seeds
                ]
        training = self._run([job for jobs in trained.values() for job in jobs])
        measures = [
            self._measure(job, first=job is jobs[0]) for jobs in trained.values() for job in jobs
        ]
        measured = self._run(measures)
        outcomes: dict[str, list[dict[str, Any]]] = {}
        for job, one, other in zip(measures, training, measured, strict=True):
            outcomes.setdefault(job.method, []).append({**one, **other})
        return [
            self._row(
                entry,
                sizings[entry.name],
                chosen[entry.name],
                loss_before,
                trained.get(entry.name, []),
                outcomes.get(entry.name, []),
            )
            for entry in entries
        ]

    def _row(
        self,
        entry: Competitor,
        sizing: Sizing | str,
        rate: LearningRate | None,
        loss_before: float | None,
        jobs: list[Job],
        outcomes: list[dict[str, Any]],
    ) -> Row:
        row = Row(
            method=entry.name,
            title=entry.title,
            status="reference" if entry.config_class is None else "ok",
            options=dict(entry.fixed),
            learning_rate=rate,
            loss_before=loss_before,
        )
        if isinstance(sizing, str):
            return dataclasses.replace(row, status="failed", error=sizing)
        row = dataclasses.replace(
            row, options={**row.options, **sizing.options}, budget_share=sizing.share
        )
        errors = [str(outcome["error"]) for outcome in outcomes if "error" in outcome]
        if rate is None:
            errors = [self._errors[entry.name]]
        if errors:
            return dataclasses.replace(row, status="failed", error=errors[0], note=sizing.note)
        first = outcomes[0]
        adapter = Path(jobs[0].folder) / "adapter"
        return dataclasses.replace(
            row,
            note=sizing.note,
            loss=Summary.of([outcome["validation_loss"] for outcome in outcomes]),
            trainable_parameters=first["trainable_parameters"],
            adapter_bytes=first["adapter_bytes"],
            peak_memory_bytes=max(outcome["peak_memory_bytes"] for outcome in outcomes),
            seconds_per_step=first["seconds_per_step"],
            latency_ratio=first.get("latency_ratio"),
            merged_latency_ratio=first.get("merged_latency_ratio"),
            curve=[outcome["losses"] for outcome in outcomes],
            adapter=str(adapter.relative_to(self.folder)),
        )

    def _run(self, jobs: list[Job]) -> list[dict[str, Any]]:
        self.progress.expect(jobs)
        return self.executor.run(jobs, self.progress.step)

    def _train(self, entry: Competitor, sizing: Sizing, rate: float, seed: int) -> Job:
        settings = self.settings
        plan = TrainPlan(
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=rate,
            warmup=settings.warmup,
            schedule=settings.schedule,  # type: ignore[arg-type]
            weight_decay=settings.weight_decay,
            seed=seed,
        )
        return dataclasses.replace(
            self._job("train", f"{_safe(entry.name)}/lr{rate!r}-seed{seed}"),
            method=entry.name,
            options=sizing.options,
            target_modules=settings.target_modules,
            plan=plan,
        )

    def _measure(self, job: Job, first: bool) -> Job:
        folder = f"{job.folder}/measure"
        return dataclasses.replace(
            job, kind="measure", folder=folder, trained=job.folder, latency=first
        )

    def _job(self, kind: Any, name: str) -> Job:
        return Job(
            kind=kind,
            model=self.source,
            data=str(self.folder / DATA_FILE),
            folder=str(self.folder / "runs" / name),
            dtype=self.settings.dtype,
        )


def _base_row(base: dict[str, Any]) -> Row:
    if "error" in base:
        return Row("untouched", "untouched model", "failed", {}, error=str(base["error"]))
    loss = base["validation_loss"]
    return Row(
        "untouched",
        "untouched model",
        "reference",
        {},
        loss_before=loss,
        loss=Summary.of([loss]),
        trainable_parameters=0,
        adapter_bytes=0,
        latency_ratio=1.0,
    )


def _sizings(
    entries: Sequence[Competitor], meta: MetaModel, settings: Settings, folder: Path
) -> dict[str, Sizing | str]:
    """Sizes of all methods, or why one cannot be sized; an unfinished run has kept them."""
    budget, path = Budget.parse(settings.budget), folder / SIZES_FILE
    kept: dict[str, Any] = read_json(path) if path.exists() else {}
    sizings: dict[str, Sizing | str] = {}
    for entry in entries:
        if entry.config_class is None:
            sizings[entry.name] = Sizing({}, meta.size(entry, {}), 1.0, "not held to the budget")
        elif entry.name in kept:
            sizings[entry.name] = Sizing.from_json(kept[entry.name])
        else:
            try:
                sizings[entry.name] = solve(entry, meta, budget)
            except ConfigError:
                raise
            except Exception as error:  # whatever PEFT raises for options that do not fit the model
                sizings[entry.name] = f"{type(error).__name__}: {error}"
    return sizings


def _data(settings: Settings, source: str, folder: Path) -> TextData:
    tokenizer = pretrained.load_tokenizer(source)
    data = prepare(
        settings.data,
        tokenizer,
        block_length=settings.block_length,
        selection_blocks=settings.selection_blocks,
        validation_blocks=settings.validation_blocks,
    )
    mark = folder / DATA_MARK
    if mark.exists() and read_json(mark)["fingerprint"] != data.fingerprint:
        raise CheckpointError(
            str(folder),
            expected=f"the data this comparison began with ({read_json(mark)['fingerprint']})",
            found=f"other text under the same name ({data.fingerprint})",
            mend="Choose another --out, or delete the folder.",
        )
    return data


def _keep(sizings: dict[str, Sizing | str], data: TextData, folder: Path) -> None:
    """What every run of the comparison goes by, in the run folder."""
    solved = {
        name: dataclasses.asdict(sizing)
        for name, sizing in sizings.items()
        if isinstance(sizing, Sizing)
    }
    write_json(folder / SIZES_FILE, solved)
    if not (folder / DATA_MARK).exists():
        save_blocks(folder / DATA_FILE, data.parts)
        write_json(folder / DATA_MARK, {"fingerprint": data.fingerprint})


def _describe(data: TextData, settings: Settings) -> dict[str, Any]:
    return {
        "name": data.name,
        "block_length": settings.block_length,
        "train_tokens": data.train.target_tokens,
        "selection_tokens": data.selection.target_tokens,
        "validation_tokens": data.validation.target_tokens,
        "leaked_paragraphs_dropped": data.leaked_paragraphs,
        "fingerprint": data.fingerprint,
    }


def _describe_budget(settings: Settings, meta: MetaModel) -> dict[str, Any]:
    budget = Budget.parse(settings.budget)
    unit = "bytes" if budget.unit is Unit.BYTES else "parameters"
    return {"text": budget.text, "unit": unit, "limit": budget.limit(meta.parameters)}


def _safe(name: str) -> str:
    """A folder name for a competitor."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
