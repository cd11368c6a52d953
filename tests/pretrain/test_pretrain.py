"""A run from scratch: planned, logged, resumed to the bit, saved as a plain model."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from _pretraining import small, weights

from sparing import pretrained
from sparing.data import load_blocks
from sparing.errors import CheckpointError, ConfigError
from sparing.pretrain import Settings, pretrain
from sparing.pretrain.run import RunError, plan_of, planned_model
from sparing.run_progress import Silent
from sparing.scale.optimizers import OPTIMIZERS
from sparing.scale.parameters import classify
from sparing.train import DivergedError, evaluate
from sparing.work import Stopped

RATES = {"muonh": 0.05, "adamh": 0.05, "muon": 0.01, "adamw": 0.005, "muon++": 0.01}


class StopAfter(Silent):
    def __init__(self, last: int) -> None:
        self.last = last

    def step(self, work: object, step: int, loss: float) -> None:
        if step > self.last:
            raise Stopped


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_of_both_families(optimizer, family, tmp_path) -> None:
    settings = small(
        optimizer=optimizer, family=family, learning_rate=RATES[optimizer], steps=40, width=32
    )
    outcome = pretrain(settings, tmp_path)
    losses = [line["loss"] for line in log(tmp_path)]
    vocabulary = len(pretrained.load_tokenizer(str(tmp_path / "model")))
    assert losses[0] == pytest.approx(math.log(vocabulary), abs=0.5)
    assert outcome.train_loss < losses[0] - 0.3
    assert outcome.tokens == 40 * 4 * 16


def test_the_folder_holds_a_plain_model_with_the_reported_loss(tmp_path: Path) -> None:
    outcome = pretrain(small(), tmp_path)
    model, tokenizer = pretrained.load(str(tmp_path / "model"))
    assert type(model) is transformers.LlamaForCausalLM
    validation = load_blocks(str(tmp_path / "data.safetensors"), "validation")
    assert evaluate(model, validation) == pytest.approx(outcome.validation_loss, abs=1e-6)
    assert outcome.parameters == sum(p.numel() for p in model.parameters())
    text = "The with statement"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert model.generate(ids[:, :8], max_new_tokens=4).shape[1] <= 12
    assert not (tmp_path / "checkpoint.pt").exists()
    assert len(log(tmp_path)) == 6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_it_ends_bitwise_the_same(optimizer: str, tmp_path: Path) -> None:
    settings = small(optimizer=optimizer, learning_rate=RATES[optimizer])
    straight = pretrain(settings, tmp_path / "straight")
    for last in (1, 4):
        folder = tmp_path / str(last)
        with pytest.raises(Stopped):
            pretrain(settings, folder, StopAfter(last), checkpoint_seconds=0)
        torch.rand(5)
        again = pretrain(settings, folder)
        assert again.validation_loss == straight.validation_loss
        expected, found = weights(tmp_path / "straight"), weights(folder)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        losses = [[line["loss"] for line in log(f)] for f in (tmp_path / "straight", folder)]
        assert losses[0] == losses[1]


def test_killed_at_any_moment_the_same_command_ends_bitwise_the_same(tmp_path: Path) -> None:
    steps = 24
    options = ["--lr", "0.05", "--width", "16", "--depth", "2", "--head", "8", "--steps", steps]
    options += ["--batch-size", "4", "--block-length", "16", "--validation-blocks", "4"]
    command = [sys.executable, "-m", "sparing", "pretrain", *map(str, options)]
    command += [
        "--data",
        small().data,
        "--checkpoint-seconds",
        "0",
        "--out",
        str(tmp_path / "killed"),
    ]
    straight = pretrain(small(steps=steps), tmp_path / "straight")
    lines = tmp_path / "killed" / "log.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while process.poll() is None and (not lines.exists() or lines.read_text().count("\n") < 11):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    expected, found = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in log(tmp_path / "killed")] == list(range(1, steps + 1))
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert result["validation_loss"] == straight.validation_loss


def test_a_finished_run_is_read_and_not_computed_again(tmp_path: Path, monkeypatch) -> None:
    first = pretrain(small(), tmp_path)

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("sparing.pretrain.run.train", refuse)
    assert pretrain(small(), tmp_path) == first


def test_the_base_run_decides_the_rates(tmp_path: Path) -> None:
    plan = plan_of(small(depth=8, base_depth=2), 50)
    spheres = {row.lr for row in plan.parameters if row.algorithm == "matrix"}
    assert list(spheres) == [pytest.approx(0.05 / 2)]
    longer = plan_of(small(base_tokens=6 * 4 * 16 / 10), 50)  # ten times the tokens
    (rate,) = {row.lr for row in longer.parameters if row.algorithm == "matrix"}
    assert rate == pytest.approx(0.05 * 10**-0.32)


def test_the_planner_initialises_and_the_seed_decides() -> None:
    settings = small(width=64, head=16)
    models = [planned_model(s, 50)[0] for s in (settings, settings, small(width=64, seed=1))]
    one, same, other = (m.model.layers[0].mlp.up_proj.weight for m in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)
    assert models[0].model.embed_tokens.weight.std().item() == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("optimizer", "planner"),
    [("adamw", "wd-scaling"), ("muon++", "muon-mup"), ("muonh", "hyperp")],
)
def test_planned_from_a_smaller_base_it_is_saved_as_a_plain_model(
    optimizer: str, planner: str, family: str, tmp_path: Path
) -> None:
    sizes = {"width": 32, "base_width": 16, "depth": 2, "base_depth": 1, "family": family}
    settings = small(optimizer=optimizer, planner=planner, learning_rate=RATES[optimizer], **sizes)
    outcome = pretrain(settings, tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    heads = [r["multiplier"] for r in plan["parameters"] if r["info"]["role"] == "head"]
    assert (heads == [0.5]) == (planner == "wd-scaling")
    model = pretrained.load(str(tmp_path / "model")).model
    validation = load_blocks(str(tmp_path / "data.safetensors"), "validation")
    assert evaluate(model, validation) == pytest.approx(outcome.validation_loss, abs=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "planner"), [("adamw", "wd-scaling"), ("muon++", "muon-mup")]
)
def test_a_tied_model_is_refused_where_the_planner_multiplies_logits(
    optimizer: str, planner: str, tmp_path: Path
) -> None:
    settings = small(optimizer=optimizer, planner=planner, tied=True, width=32, base_width=16)
    with pytest.raises(ConfigError, match=r"tied embedding.*--tied"):
        pretrain(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tied_model_has_its_embedding_off_the_sphere(tmp_path: Path) -> None:
    plan = plan_of(small(tied=True), 50)
    (row,) = [row for row in plan.parameters if row.info.tied]
    assert row.algorithm == "adamw"
    outcome = pretrain(small(tied=True), tmp_path)
    model = pretrained.load(str(tmp_path / "model")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    validation = load_blocks(str(tmp_path / "data.safetensors"), "validation")
    assert evaluate(model, validation) == pytest.approx(outcome.validation_loss, abs=1e-6)
    assert not [i for i in classify(model).values() if i.role == "head"]


def test_bytes_and_a_models_own_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Größe {number} → «ja», 日本.\n" for number in range(400)))
    settings = small(data=str(text), tokenizer="bytes", validation_blocks=1)
    pretrain(settings, tmp_path / "bytes")
    model, tokenizer = pretrained.load(str(tmp_path / "bytes" / "model"))
    assert model.config.vocab_size == len(tokenizer) == 257
    assert tokenizer.decode(tokenizer("Größe → 日本")["input_ids"]) == "Größe → 日本"
    pretrain(small(tokenizer="tiny"), tmp_path / "tiny")
    assert pretrained.load(str(tmp_path / "tiny" / "model")).model.config.vocab_size == 512


def test_a_diverged_run_says_so_and_leaves_no_model(tmp_path: Path) -> None:
    settings = small(optimizer="adamw", learning_rate=1e30)
    with pytest.raises(DivergedError, match=r"finite number.*smaller --lr, and another --out"):
        pretrain(settings, tmp_path)
    assert not (tmp_path / "model").exists()
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "diverged"


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    pretrain(small(), tmp_path)
    with pytest.raises(CheckpointError, match="width = 32, found width = 16"):
        pretrain(small(width=32), tmp_path)


def test_other_text_under_the_same_name_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"one two {number}\n" for number in range(400)))
    settings = small(data=str(text), validation_blocks=1)
    pretrain(settings, tmp_path / "run")
    text.write_text("".join(f"two one {number}\n" for number in range(400)))
    with pytest.raises(CheckpointError, match="fingerprint"):
        pretrain(settings, tmp_path / "run")


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_damaged_checkpoint_is_named_and_can_be_deleted(kept: float, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pretrain(small(), tmp_path, StopAfter(3), checkpoint_seconds=0)
    file = tmp_path / "checkpoint.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        pretrain(small(), tmp_path)
    file.unlink()
    pretrain(small(), tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_an_error_in_a_run_is_named_and_the_same_command_tries_again(tmp_path, monkeypatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise KeyError("a mistake")

    with monkeypatch.context() as patched:
        patched.setattr("sparing.pretrain.run.train", broken)
        with pytest.raises(RunError, match=r"KeyError: 'a mistake'.*traceback\.txt"):
            pretrain(small(), tmp_path)
    assert "in broken" in (tmp_path / "traceback.txt").read_text()
    pretrain(small(), tmp_path)


BAD = {
    "optimizer": ({"optimizer": "muonhh"}, "Did you mean muonh"),
    "planner": ({"planner": "hyper"}, "Did you mean hyperp"),
    "unsuited planner": ({"optimizer": "adamw", "planner": "hyperp"}, "one for adamw"),
    "decay on spheres": ({"weight_decay": 0.1}, "0 for muonh"),
    "family": ({"family": "lama"}, "Did you mean llama"),
    "width": ({"width": 20}, r"multiple of the head size 8.*Use 24"),
    "odd head": ({"head": 5, "width": 20}, "even number"),
    "steps": ({"steps": 0}, "1 or more"),
    "rate": ({"learning_rate": -1.0}, "above 0"),
    "nan rate": ({"learning_rate": math.nan}, "above 0"),
    "schedule": ({"schedule": "cosin"}, "Did you mean cosine"),
    "final": ({"final": 2.0}, "share from 0 to 1"),
    "clip": ({"clip": 0.0}, "above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_named(case: str, tmp_path: Path) -> None:
    changes, text = BAD[case]
    with pytest.raises(ConfigError, match=text):
        pretrain(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_and_its_errors(sparing, tmp_path: Path) -> None:
    options = ["--width", 16, "--depth", 1, "--steps", 3, "--batch-size", 4]
    options += ["--block-length", 16, "--validation-blocks", 4, "--data", small().data]
    done = sparing("pretrain", "--lr", 0.05, *options, "--out", tmp_path / "run")
    assert done[0] == 0
    assert "validation loss" in done[1]
    assert Settings(**json.loads((tmp_path / "run" / "settings.json").read_text())["settings"])
    for changes, text in (
        (["--optimizer", "muonhh"], "Did you mean muonh"),
        (["--data", "python-topic"], "Did you mean python-topics"),
        (["--tokenizer", "tyny"], "Did you mean tiny"),
    ):
        code, _, error = sparing(
            "pretrain", "--lr", 0.05, *options, *changes, "--out", tmp_path / "bad"
        )
        assert code == 2
        assert text in error
        assert not (tmp_path / "bad").exists()
