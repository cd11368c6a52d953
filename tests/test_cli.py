"""The command line: what it prints, what it returns, and that bad input leaves nothing behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sparing import cli, pretrained
from sparing.compare import Results

SMALL = ["--steps", "2", "--batch-size", "2", "--block-length", "32"]
COMPARE = ["compare", "tiny", *SMALL, "--budget", "3%", "--lr-grid", "1e-3", "--in-process"]
COMPARE += ["--selection-blocks", "2", "--validation-blocks", "2"]
ADAPT = ["adapt", "tiny", "--method", "mos", "--option", "r=2", *SMALL]


class Run(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def sparing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process, as `sparing …` would."""

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["sparing", *map(str, arguments)])
        monkeypatch.setattr(cli, "console", cli.Console(width=200))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return Run(code if isinstance(code, int) else int(bool(code)), *capfd.readouterr())

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return run


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, sparing.cli; print([m for m in ('torch', 'transformers', 'peft', "
    program += "'accelerate', 'numpy', 'matplotlib') if m in sys.modules])"
    assert python("-c", program).stdout == "[]\n"


def test_help_and_the_list_of_methods_answer_as_commands() -> None:
    done = python("-m", "sparing", "--help")
    assert done.returncode == 0
    for command in ("methods", "compare", "adapt", "reproduce", "report"):
        assert command in done.stdout


def test_methods_lists_all_45(sparing) -> None:
    done = sparing("methods")
    assert done.code == 0
    rows = [line for line in done.out.splitlines() if "ready" in line or "planned" in line]
    assert len(rows) == 45
    assert sum("ready" in row for row in rows) >= 4
    assert "neuroada" in done.out
    only = sparing("methods", "--room", "merge").out
    assert "made-it" in only
    assert "neuroada" not in only


def test_a_comparison_prints_its_table_and_returns_0(sparing, tmp_path: Path) -> None:
    done = sparing(*COMPARE, "--methods", "lora", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "lora" in done.out
    assert f"report: {tmp_path / 'run' / 'report.html'}" in done.out
    assert [row.status for row in Results.load(tmp_path / "run" / "results.json").rows] == [
        "reference",
        "ok",
    ]
    again = sparing("report", tmp_path / "run")
    assert again.code == 0
    assert "lora" in again.out


def test_a_failed_run_returns_1(sparing, tmp_path: Path) -> None:
    done = sparing(
        *COMPARE,
        "--methods",
        'lora,mos{"r":2}',
        "--lr-grid",
        "lora:1e30",
        "--out",
        tmp_path / "run",
    )
    assert done.code == 1
    assert "DivergedError" in done.out
    assert len(Results.load(tmp_path / "run" / "results.json").rows) == 3


BAD: dict[str, tuple[list[str], str]] = {
    "unknown model": (["compare", "tinny"], "Did you mean tiny"),
    "unknown hub model": (["compare", "nobody/nothing"], "model 'nobody/nothing'"),
    "unknown data": (["--data", "python-topic"], "Did you mean python-topics"),
    "unknown method": (["--methods", "lora,neuroda"], "Did you mean neuroada"),
    "unknown PEFT method": (["--methods", "peft:lara"], "Did you mean lora"),
    "planned method": (["--methods", "switch-nerf-pp"], "a method that is planned"),
    "repeated method": (["--methods", "lora,lora"], "more than once"),
    "unknown option": (["--methods", 'mos{"rr":2}'], "Did you mean r"),
    "options that are no JSON": (["--methods", "mos{r:2}"], "options as JSON"),
    "unparsable budget": (["--budget", "a lot"], "budget: expected a number with a unit"),
    "budget of nothing": (["--budget", "0%"], "more than nothing"),
    "budget below the minimum": (["--budget", "10"], "smallest size"),
    "budget above the model": (["--budget", "1B"], "model's own"),
    "budget in bits": (["--budget", "4bit"], "sparing compress"),
    "no such modules": (["--target-modules", "q_prj"], "Did you mean q_proj"),
    "no module of an expression": (["--target-modules", ".*nothing"], "target_modules"),
    "shards that do not divide": (["--methods", 'mos{"r":2,"shards":7}'], "7 shards divide"),
    "unknown schedule": (["--schedule", "cosin"], "Did you mean cosine"),
    "unknown type": (["--dtype", "float33"], "Did you mean float32"),
    "no steps": (["--steps", "0"], "steps: expected at least 1"),
    "no seeds": (["--seeds", "0"], "seeds: expected at least one"),
    "no learning rates": (["--lr-grid", "fast"], "positive numbers"),
    "infinite learning rate": (["--lr-grid", "inf"], "positive numbers"),
    "learning rate of another": (["--lr-grid", "hut:1e-3"], "one of the methods"),
}


def assert_one_error(done: Run, text: str) -> None:
    assert done.code == 2, done
    assert text in done.err
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error ")
    assert "Traceback" not in done.out


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_compare(sparing, tmp_path: Path, case: str) -> None:
    changes, text = BAD[case]
    arguments = [*COMPARE, "--methods", "lora", "--out", str(tmp_path / "run")]
    if changes[0] == "compare":
        arguments[:2], changes = changes, []
    assert_one_error(sparing(*arguments, *changes), text)
    assert list(tmp_path.iterdir()) == []


DATA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "found none"),
    "not UTF-8": (b"fine " * 500 + b"\xff", "text.txt, byte 2500"),
    "short": (b"a few words", "at least one block of 32 tokens"),
}


@pytest.mark.parametrize("command", [[*COMPARE, "--methods", "lora"], ADAPT])
@pytest.mark.parametrize("case", DATA)
def test_bad_data(sparing, tmp_path: Path, case: str, command: list[str]) -> None:
    content, text = DATA[case]
    (tmp_path / "text.txt").write_bytes(content)
    done = sparing(*command, "--data", tmp_path / "text.txt", "--out", tmp_path / "run")
    assert_one_error(done, text)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("command", [COMPARE, ["adapt", *COMPARE[1:2], *SMALL]])
def test_corrupted_weights(sparing, tmp_path: Path, command: list[str]) -> None:
    model = Path(shutil.copytree(pretrained.resolve("tiny"), tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = sparing(command[0], model, *command[2:], "--out", tmp_path / "run")
    assert_one_error(done, "model.safetensors: expected a complete model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", [[*COMPARE, "--methods", "lora"], ADAPT])
def test_an_unwritable_folder(sparing, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    done = sparing(*command, "--out", tmp_path / "file" / "run")
    assert_one_error(done, "expected a folder that can be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_is_one_error_and_can_be_resumed(sparing, tmp_path: Path) -> None:
    """The system refuses files above a size that the tuned model, in a process of its own,
    reaches."""
    program = """
import resource, signal
from sparing.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
main()
"""
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("\n\n".join(f"Paragraph {i} has some words of its own." for i in range(300)))
    arguments = [*COMPARE, "--methods", "full", "--data", str(text), "--out", str(folder)]
    done = python("-c", program, *(a for a in arguments if a != "--in-process"))
    assert_one_error(Run(done.returncode, done.stdout, done.stderr), "folder that can be written")
    assert [path.parent.name for path in folder.glob("runs/**/result.json")] == ["base"]
    assert not list(folder.rglob(".*"))
    assert sparing(*arguments).code == 0


def test_the_folder_of_another_comparison(sparing, tmp_path: Path) -> None:
    command = [*COMPARE, "--methods", "lora", "--out", tmp_path / "run"]
    assert sparing(*command).code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = sparing(*command, "--seeds", "2")
    assert_one_error(done, "run: expected a run folder with seeds = [0, 1], found seeds = [0]")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_adapt_writes_an_adapter_that_loads(sparing, tmp_path: Path) -> None:
    done = sparing(*ADAPT, "--out", tmp_path / "adapter")
    assert done.code == 0, done.err
    assert "parameters trained; held-out loss" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    model = PeftModel.from_pretrained(pretrained.load("tiny").model, tmp_path / "adapter")
    config = model.peft_config["default"]
    assert (config.peft_type, config.r) == ("MOS", 2)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_adapt_to_a_budget(sparing, tmp_path: Path) -> None:
    done = sparing(*ADAPT, "--budget", "3%", "--out", tmp_path / "adapter")
    assert done.code == 0, done.err
    total = sum(p.numel() for p in pretrained.load("tiny").model.parameters())
    trained = int(done.out.split(" parameters")[0].split()[-1].replace(",", ""))
    assert 0.8 * 0.03 * total <= trained <= 0.03 * total


def test_adapt_refuses_an_existing_folder(sparing, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert_one_error(sparing(*ADAPT, "--out", tmp_path / "adapter"), "expected a new folder")
    assert list((tmp_path / "adapter").iterdir()) == []


ADAPT_BAD: dict[str, tuple[list[str], str]] = {
    "full": (["--method", "full"], "a method with an adapter"),
    "unknown option": (["--option", "q=3"], "expected an option of MoSConfig"),
    "option without value": (["--option", "r"], "name=value"),
    "option of another type": (["--option", "r=many"], "method 'mos'"),
    "shards": (["--option", "shards=7"], "7 shards divide"),
    "no such modules": (["--target-modules", "k_prj,q_proj"], "Did you mean k_proj"),
    "negative rate": (["--learning-rate", "-1"], "learning_rate: expected above 0"),
    "no steps": (["--steps", "0"], "steps: expected at least 1"),
    "diverged": (["--learning-rate", "1e30"], "DivergedError"),
}


@pytest.mark.parametrize("case", ADAPT_BAD)
def test_bad_input_to_adapt(sparing, tmp_path: Path, case: str) -> None:
    changes, text = ADAPT_BAD[case]
    assert_one_error(sparing(*ADAPT, "--out", tmp_path / "adapter", *changes), text)
    assert list(tmp_path.iterdir()) == []


def test_adapt_resumes_after_an_interruption(sparing, tmp_path: Path, monkeypatch) -> None:
    import functools

    from sparing import train
    from sparing.compare import jobs
    from sparing.compare.progress import Live

    monkeypatch.setattr(jobs, "train", functools.partial(train.train, checkpoint_seconds=0))
    command = [*ADAPT, "--steps", "5", "--option", "lora_dropout=0.2"]
    assert sparing(*command, "--out", tmp_path / "straight").code == 0
    seen: list[int] = []

    def interrupted(self: object, job: object, step: int, loss: float) -> None:
        seen.append(step)
        if step == 4 and seen.count(4) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Live, "step", interrupted)
    assert sparing(*command, "--out", tmp_path / "adapter").code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == [".adapter.work", "straight"]
    other = sparing(*ADAPT, "--steps", "6", "--out", tmp_path / "adapter")
    assert_one_error(other, ".adapter.work: expected unfinished work of this very command")
    assert sparing(*command, "--out", tmp_path / "adapter").code == 0
    assert seen == [1, 2, 3, 4, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "straight"]
    one, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "straight")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_unknown_rooms_and_reproductions_get_near_matches(sparing, tmp_path: Path) -> None:
    assert_one_error(sparing("methods", "--room", "merg"), "Did you mean merge")
    assert_one_error(sparing("reproduce", "moss", "--out", tmp_path), "Did you mean mos")
    assert_one_error(sparing("reproduce"), "at least one method")
    assert_one_error(sparing("report", tmp_path), "results.json: expected a JSON file")
