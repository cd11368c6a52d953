"""`sparing plan` prints and writes what happens to every parameter."""

import json

import pytest
from typer.testing import CliRunner

from sparing.cli import app
from sparing.errors import ConfigError
from sparing.scale import Plan


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)


def test_a_plan_is_printed_and_written(tmp_path):
    out = tmp_path / "plan.json"
    done = run("tiny", "--eta0", "0.02", "--base-depth", "8", "--out", str(out))
    assert done.exit_code == 0
    assert "4.00e-02" in done.output or "0.04" in done.output  # two blocks: √(8/2)
    plan = Plan.from_json(json.loads(out.read_text()))
    assert plan.method == "hyperp"
    assert any(row.info.name.endswith("mlp.down_proj.weight") for row in plan.parameters)


def test_other_methods_are_refused():
    with pytest.raises(ConfigError, match="muon"):
        run("tiny", "--eta0", "0.02", "--method", "muon")
