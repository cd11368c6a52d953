"""`sparing route`: from two adapters to a routed model, its text and its statistics."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

GATES = ["--steps", "2", "--batch-size", "2", "--block-length", "32"]
DATA = ["--data", "code=python-source", "--data", "help=python-topics"]


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """Two LoRAs of the tiny model."""
    import peft
    from conftest import perturb

    from sparing import pretrained

    for seed, name in enumerate(("code", "help")):
        base = pretrained.load("tiny").model
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        perturb(model, 0.05, seed=seed)
        model.save_pretrained(str(tmp_path / "experts" / name))
    return tmp_path / "experts"


def test_from_adapters_to_a_routed_model(sparing, experts: Path, tmp_path: Path) -> None:
    code, out, err = sparing("route", "gate", "tiny", experts, *DATA, *GATES)
    assert code == 0, err
    assert "code, loss" in out
    before = (experts / "code" / "gates.safetensors").read_bytes()

    code, out, err = sparing("route", "gate", "tiny", experts, *DATA, *GATES)
    assert "kept: code, help" in out
    assert (experts / "code" / "gates.safetensors").read_bytes() == before

    routed = tmp_path / "routed"
    code, out, err = sparing("route", "assemble", "tiny", experts, "--out", routed)
    assert code == 0, err
    assert "2 experts on 14 modules, top 2 by gate" in out
    assert (routed / "adapter_model.safetensors").is_file()

    prompt = ["--prompt", "def f(", "--max-new-tokens", "4"]
    code, out, err = sparing("route", "generate", "tiny", routed, *prompt)
    assert code == 0, err
    assert out.startswith("def f(")
    alone = [*prompt, "--mode", "single", "--expert", "help"]
    assert sparing("route", "generate", "tiny", routed, *alone)[0] == 0

    look = tmp_path / "look"
    text = "The value of the expression is returned."
    code, out, err = sparing("route", "inspect", "tiny", routed, "--text", text, "--out", look)
    assert code == 0, err
    assert "share of the weight" in out
    content = json.loads((look / "routing.json").read_text())
    assert content["experts"] == ["code", "help"]
    assert sum(content["share"].values()) == pytest.approx(1.0)
    assert (look / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_gates_can_come_one_expert_at_a_time(sparing, experts: Path) -> None:
    code, out, _ = sparing("route", "gate", "tiny", experts, *DATA[:2], *GATES)
    assert code == 0
    assert "still without: help" in out
    assert not (experts / "help" / "gates.safetensors").exists()
    code, out, _ = sparing(
        "route", "gate", "tiny", experts / "help", "--data", "python-topics", *GATES
    )
    assert code == 0
    assert (experts / "help" / "gates.safetensors").exists()


def test_average_inputs_need_no_training(sparing, experts: Path, tmp_path: Path) -> None:
    data = [*DATA, "--block-length", "32", "--key", "average"]
    assert sparing("route", "gate", "tiny", experts, *data)[0] == 0
    assert len(load_file(experts / "code" / "average_inputs.safetensors")) == 14
    out = tmp_path / "routed"
    assert sparing("route", "assemble", "tiny", experts, "--out", out, "--key", "average")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gate", "--data", "python-source"], "NAME=SOURCE"),
        (["gate", "--data", "nobody=python-source"], "'nobody'"),
        (["gate", "--data", "code=python-source", "--key", "colour"], "'colour'"),
        (["assemble", "--out", "{tmp}/routed"], "key='arrow'"),
        (["assemble", "--out", "{tmp}/routed", "--key", "arrow", "--top-k", "3"], "top_k"),
        (["assemble", "--out", "{tmp}"], "an existing one"),
        (["generate", "--prompt", "x"], "route assemble"),
        (["inspect", "--out", "{tmp}/look"], "either --text or --data"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    sparing, experts: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    command, *options = [text.format(tmp=tmp_path) for text in arguments]
    code, _, err = sparing("route", command, "tiny", experts, *options)
    assert code == 2
    assert told in err
    assert err.startswith("error ")
    assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
