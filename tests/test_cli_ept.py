"""`sparing tasks`: from two sources to one adapter, and from it to single tasks."""

from pathlib import Path

import peft
import pytest
import torch
from conftest import token_ids

from sparing import pretrained

DATA = ["--data", "code=python-source", "--data", "help=python-topics"]
SHORT = ["--steps", "4", "--batch-size", "2", "--block-length", "32"]


def test_from_sources_to_an_adapter_and_to_single_tasks(sparing, tmp_path: Path) -> None:
    folder, merged, lora = (tmp_path / name for name in ("adapter", "merged", "lora"))
    code, out, err = sparing("tasks", "train", "tiny", *DATA, *SHORT, "--out", folder)
    assert code == 0, err
    assert "held-out loss before" in out
    assert "without routers" in out
    code, out, err = sparing("tasks", "routes", "tiny", folder)
    assert code == 0, err
    assert "code" in out
    assert "layers.0.mlp.down_proj" in out
    assert sparing("tasks", "merge", "tiny", folder, "--task", "help", "--out", merged)[0] == 0
    assert sparing("tasks", "export", "tiny", folder, "--task", "help", "--out", lora)[0] == 0
    ids = token_ids()
    adapted = peft.PeftModel.from_pretrained(pretrained.load("tiny").model, folder).eval()
    adapted.set_task("help")
    with torch.no_grad():
        expected = adapted(ids).logits
        assert not torch.allclose(pretrained.load("tiny").model(ids).logits, expected, atol=1e-4)
        plain = pretrained.load(str(merged)).model(ids).logits
        torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-4)
        exported = peft.PeftModel.from_pretrained(pretrained.load("tiny").model, lora).eval()
        torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-3, atol=1e-4)
    code, _, err = sparing("tasks", "export", "tiny", folder, "--task", "hepl", "--out", "x")
    assert (code, "Did you mean help" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny", "--data", "python-source", "--out", "new"], "NAME=SOURCE"),
        (["train", "tiny", *DATA, "--data", "code=x", "--out", "new"], "another name"),
        (["train", "tiny", *DATA, "--out", "new", "--option", "rank=3"], "rank"),
        (["train", "tiny", *DATA, "--out", "old"], "an existing one"),
        (["routes", "tiny", "old"], "no adapter_config.json"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    sparing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    code, _, err = sparing("tasks", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
