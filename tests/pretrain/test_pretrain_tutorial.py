"""The tutorial's commands and code run as they stand, but for a second seed."""

import json
import re
import shlex
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "tune-small-train-large.md"
BLOCKS = re.findall(r"```(console|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_runs(sparing, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(text, names)
        else:
            text = text.replace("--seeds 0,1", "--seeds 0")
            command = shlex.split(text.removeprefix("$ sparing ").replace("\\\n", " "))
            code, output, error = sparing(*command)
            assert code == 0, error + output
    rates = {row["lr"] for row in json.loads(Path("plan.json").read_text())["parameters"]}
    assert max(rates) == pytest.approx(0.16 * 0.5**0.5)
    assert Path("runs/large/model/model.safetensors").exists()


def test_every_command_of_the_page_has_the_options_that_it_names(sparing) -> None:
    text = PAGE.read_text()
    commands = re.findall(r"sparing (sweep|plan|pretrain) ((?:[^\n]|\\\n)*)", text)
    assert len(commands) >= 5
    for command, rest in commands:
        known = sparing(command, "--help")[1]
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in known, (command, option)
