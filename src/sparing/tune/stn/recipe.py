"""A run described by a YAML file, for the command line."""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparing.checkpoint import atomic_path
from sparing.errors import ConfigError, DataError, near_matches
from sparing.tune.stn.augmentation import image_hparams
from sparing.tune.stn.figure import draw_schedule
from sparing.tune.stn.hparams import HParam
from sparing.tune.stn.network import SelfTuningNetwork
from sparing.tune.stn.regularized import RegularizedNetwork
from sparing.tune.stn.schedule import Record, Schedule
from sparing.tune.stn.training import Plan, Run, fit, replay


@dataclass
class Recipe:
    """What a YAML file says.

    Arguments:
        model: "module:function" that builds the model, imported with the file's folder on the path.
        train, validation: safetensors files with `inputs` and `labels`, relative to the file.
        hparams: options of `HParam`, one mapping each.
        images: names of `image_hparams` to tune besides.
        network: options of `SelfTuningNetwork`.
        optimizer: options of `torch.optim.SGD`.
        plan: options of `Plan`.
        batch_size: rows a step.
        folder: where the file was.
    """

    model: str
    train: str
    validation: str
    plan: dict[str, Any]
    hparams: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    network: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=lambda: {"lr": 0.01, "momentum": 0.9})
    batch_size: int = 128
    folder: Path = Path()

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """Read a file.

        Raises:
            ConfigError: it is no YAML, lacks an entry or has an unknown one.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(
                str(path), expected="a YAML file", found=str(error), mend="Check the path."
            ) from error
        known = [f.name for f in fields(cls) if f.name != "folder"]
        found = content if isinstance(content, dict) else {}
        for name in found:
            if name not in known:
                mend = near_matches(str(name), known)
                raise ConfigError(str(path), expected="known entries", found=repr(name), mend=mend)
        lacking = [n for n in ("model", "train", "validation", "plan") if n not in found]
        if lacking:
            raise ConfigError(
                str(path),
                expected="entries model, train, validation and plan",
                found=f"no {lacking[0]}",
                mend="See docs/methods/stn.md for an example.",
            )
        return cls(**found, folder=path.parent)

    def hyperparameters(self) -> list[HParam]:
        """Of the run."""
        own = []
        for options in self.hparams:
            given: dict[str, Any] = dict(options)
            for name in ("range", "places"):
                if name in given:
                    given[name] = tuple(given[name])
            own.append(_with_options(HParam, given, "hparams"))
        return own + (image_hparams(self.images) if self.images else [])

    def build(self) -> nn.Module:
        """The model, the same at every call.

        Raises:
            ConfigError: the function cannot be found.
        """
        module, _, function = self.model.partition(":")
        if str(self.folder.resolve()) not in sys.path:
            sys.path.insert(0, str(self.folder.resolve()))
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                "model",
                expected="module:function, beside the file or installed",
                found=f"{self.model!r} ({error})",
                mend="For example: model: network:build, with network.py beside the file.",
            ) from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.plan.get("seed", 0)))
            return make()

    def loader(self, part: str) -> DataLoader[Any]:
        """Batches of train or validation.

        Raises:
            DataError: the file cannot be read or lacks a tensor.
        """
        path = self.folder / getattr(self, part)
        try:
            tensors = load_file(path)
            data = TensorDataset(tensors["inputs"], tensors["labels"])
        except (OSError, SafetensorError, KeyError, AssertionError) as error:
            raise DataError(
                str(path),
                expected="safetensors with `inputs` and `labels` of as many rows",
                found=f"{type(error).__name__}: {error}",
                mend="Write it with safetensors.torch.save_file.",
            ) from error
        generator = torch.Generator().manual_seed(int(self.plan.get("seed", 0)))
        return DataLoader(data, self.batch_size, shuffle=True, generator=generator)

    def sgd(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimiser of the weights."""
        return _with_options(torch.optim.SGD, self.optimizer, "optimizer", parameters)

    def training_plan(self) -> Plan:
        """How to train."""
        return _with_options(Plan, self.plan, "plan")


def train(
    recipe: Recipe, out: Path, on_cycle: Callable[[Record], None] = lambda record: None
) -> tuple[Run, SelfTuningNetwork]:
    """Run a recipe; `out` gets the folded model, the network, and the schedule as table and figure.

    Resumes where an interrupted run of the same recipe stopped.
    """
    plan, hparams = recipe.training_plan(), recipe.hyperparameters()
    model = recipe.build()
    network = _with_options(
        SelfTuningNetwork, {"seed": plan.seed} | recipe.network, "network", model, hparams
    )
    decay = float(recipe.optimizer.get("weight_decay", 0.0))
    optimizer = recipe.sgd(network.parameter_groups(decay))
    loaders = recipe.loader("train"), recipe.loader("validation")
    _check_same_data(recipe)
    run = fit(network, *loaders, optimizer, plan, checkpoint=out / "run.pt", on_cycle=on_cycle)
    if run.best is not None:
        network.load_state_dict(run.best)
    network.save(out / "network")
    save_weights(network.fold(), out / "model.safetensors")
    run.schedule.save(out / "schedule.csv")
    draw_schedule(run.schedule, out / "schedule.png", tuple(hparams))
    (out / "run.pt").unlink(missing_ok=True)
    return run, network


def repeat(
    recipe: Recipe,
    schedule: Schedule,
    out: Path,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train a plain model of the recipe under a schedule; returns its validation loss."""
    plan = recipe.training_plan()
    network = RegularizedNetwork(recipe.build(), recipe.hyperparameters(), seed=plan.seed)
    optimizer = recipe.sgd(network.model.parameters())
    replay(
        network, recipe.loader("train"), optimizer, schedule, plan.steps,
        clip=plan.clip, seed=plan.seed, on_step=on_step,
    )  # fmt: skip
    save_weights(network.plain(schedule(plan.steps)), out / "model.safetensors")
    return network.evaluate(recipe.loader("validation"))


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights as safetensors, atomically; tied ones once."""
    with atomic_path(path) as fresh:
        save_model(model, str(fresh))


def _check_same_data(recipe: Recipe) -> None:
    if (recipe.folder / recipe.train).resolve() == (recipe.folder / recipe.validation).resolve():
        raise DataError(
            "validation",
            expected="items that the weights are not trained on",
            found=f"the training file {recipe.train!r}",
            mend="Hold some items out, in a file of their own.",
        )


def _with_options(make: Any, options: Mapping[str, Any], entry: str, *arguments: Any) -> Any:
    try:
        return make(*arguments, **options)
    except TypeError as error:
        raise ConfigError(
            entry,
            expected=f"options of {make.__name__}",
            found=str(error),
            mend="See docs/methods/stn.md for an example.",
        ) from error
