"""`sparing search` at a shell."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from _networks import small_unet

from sparing import cli
from sparing.tune import load_tuned
from sparing.tune.task import digits_task

SMALL = ["--steps", "2", "--batch-size", "8", "--samples", "20", "--sampling-steps", "2"]
SMALL += ["--pretraining", "2", "--trials", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    digits_task(folder, steps=2)
    return folder


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparing", "search", *map(str, arguments)])
        monkeypatch.setattr(cli, "console", cli.Console(width=200))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return code if isinstance(code, int) else int(bool(code)), *capfd.readouterr()

    return run


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "trials.csv").open()))


def test_a_search_writes_its_front_and_goes_on(search, base: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(base, out / "base")
    code, text, error = search(*SMALL, "--out", out)
    assert code == 0, error
    assert "trial 1: " in text
    first = rows(out)
    assert [row["number"] for row in first] == ["0", "1"]
    assert {"max_norm", "FID", "mask", "seconds"} <= set(first[0])
    code, text, error = search(*SMALL, "--out", out, "--trials", "4", "--final-steps", "2")
    assert code == 0, error
    assert "trial 1: " not in text
    assert rows(out)[:2] == [
        dict(row, on_front=rows(out)[i]["on_front"]) for i, row in enumerate(first)
    ]
    assert [row["number"] for row in rows(out)] == ["0", "1", "2", "3"]
    assert json.loads((out / "front.json").read_text())["rewards"] == ["max_norm", "FID"]
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    picked = text.split("picked trial ")[1].split("mask ")[1].split(",")[0]
    _, mask = load_tuned(digits_task(out / "base").model, out / "tuned")
    assert mask == picked
    code, text, error = search(*SMALL, "--out", out, "--seed", "1")
    assert code == 2
    assert "expected trials with" in error


@pytest.mark.filterwarnings("ignore")
def test_all_rewards_on_a_model_and_data_of_ones_own(search, base: Path, tmp_path: Path):
    task = digits_task(base)
    task.save_data(tmp_path / "data.safetensors")
    code, _, error = search(
        base,
        *SMALL,
        *("--data", tmp_path / "data.safetensors", "--out", tmp_path / "run"),
        *("--rewards", "avg_norm,extraction,distance,MIFID,FID", "--family", "difffit"),
        *("--sampler", "random", "--trials", "1"),
    )
    assert code == 0, error
    (row,) = rows(tmp_path / "run")
    values = [float(row[n]) for n in ("avg_norm", "extraction", "distance", "MIFID", "FID")]
    assert all(value >= 0 for value in values)
    assert torch.tensor(values).isfinite().all()


def test_digits_are_split_without_overlap(base: Path):
    task = digits_task(base)
    sets = [task.ordinary, task.repeated, task.held_out]
    assert [len(s) for s in sets] == [200, 20, 400]
    assert len({tuple(c.flatten().tolist()) for c in task.repeated.conditions}) == 20
    conditions = {tuple(c.flatten().tolist()) for c in task.ordinary.conditions}
    assert len(conditions) == 10
    private = {tuple(c.flatten().tolist()) for c in task.repeated.conditions}
    assert not private & conditions
    assert -1 <= task.ordinary.images.min() < task.ordinary.images.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rewards", "max_nrm,FID"), "Did you mean max_norm"),
        (("--family", "svdif"), "Did you mean svdiff"),
        (("--learning-rates", "1e-3"), "a lower and a higher bound"),
        (("--learning-rates", "1e-2,1e-3"), "a lower and a higher bound"),
        (("--sampler", "grid"), "'nsga2', 'tpe'"),
        (("--trials", "0"), "trials"),
        (("--samples", "16"), "more than the 16 features"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(search, base, tmp_path, arguments, words):
    shutil.copytree(base, tmp_path / "run" / "base")
    code, _, error = search(*SMALL, "--out", tmp_path / "run", *arguments)
    assert code == 2
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "trials.csv").exists()


def test_bad_files_are_one_line_and_exit_code_2(search, base, tmp_path):
    data = tmp_path / "data.safetensors"
    out = ("--out", tmp_path / "run")
    cases = [((base,), "--data FILE"), ((base, "--data", data), "a safetensors file")]
    for arguments, words in cases:
        code, _, error = search(*arguments, *SMALL, *out)
        assert (code, len(error.strip().splitlines())) == (2, 1)
        assert words in error
    digits_task(base).save_data(data)
    code, _, error = search(tmp_path / "nowhere-at-all", "--data", data, *SMALL, *out)
    assert code == 2
    assert "a UNet2DConditionModel of diffusers" in error
    from safetensors.torch import save_file

    save_file({"unconditional": torch.zeros(1, 16)}, data)
    code, _, error = search(base, "--data", data, *SMALL, *out)
    assert "a tensor ordinary.images" in error
    assert small_unet() is not None
