"""`sparing merge` at a shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import perturb, small_llama

from sparing.cli import main
from sparing.merge import merge


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    small_llama().save_pretrained(root / "base")
    for i in (1, 2):
        model = small_llama()
        perturb(model, 0.01, seed=i)
        model.save_pretrained(root / f"e{i}")
    return root


MODELS = ("--base", "./base", "--expert", "./e1", "--expert", "./e2")


def test_does_what_the_function_does(root: Path) -> None:
    arguments = [
        *MODELS,
        *("--method", "pcb-merging", "--out", "out", "--threads", "2"),
        *("--option", "ratio=0.2", "--option", "lam=[1.0, 0.8]"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "sparing", "merge", *arguments],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "merged model" in done.stdout
    options = {"ratio": 0.2, "lam": [1.0, 0.8]}
    experts = [root / "e1", root / "e2"]
    expected = merge(root / "base", experts, "pcb-merging", root / "expected", **options)
    assert (root / "out" / "model.safetensors").read_bytes() == (
        expected / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "tie"), "Did you mean ties"),
        (("--option", "ratio=2"), "option 'ratio'"),
        (("--option", "ratio"), "name=value"),
        (("--expert", "./nowhere"), "nowhere"),
        (("--vocabulary", "grow"), "vocabulary"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["sparing", "merge", *MODELS, "--out", "bad", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (root / "bad").exists()
