"""`sparing queryable`: from an adapter to its routing, a plain LoRA and more atoms."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import perturb

from sparing import pretrained
from sparing.adapt import QueryableLoRAConfig

SMALL = ["--block-length", "32"]
TRAIN = [*SMALL, "--data", "python-topics", "--steps", "2", "--batch-size", "2"]


def write(folder: Path, config: peft.PeftConfig) -> Path:
    model = peft.get_peft_model(pretrained.load("tiny").model, config)
    perturb(model, 0.1)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = QueryableLoRAConfig(
        r=2,
        num_atoms=3,
        d_query=4,
        block_size=1,
        instruction="prior",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return write(tmp_path / "adapter", config)


def test_the_routing_of_a_prompt_follows_the_instruction(sparing, adapter) -> None:
    code, plain, err = sparing("queryable", "show", "tiny", adapter, "--prompt", "a list")
    assert code == 0, err
    assert len(plain.strip().splitlines()) == 3
    told = ("--prompt", "a list", "--instruction", "sort")
    code, steered, err = sparing("queryable", "show", "tiny", adapter, *told)
    assert code == 0, err
    assert steered != plain


@pytest.mark.parametrize("by", [["--instruction", "sort"], ["--data", "python-topics"]])
def test_a_frozen_adapter_is_a_plain_lora(sparing, adapter, tmp_path, by) -> None:
    options = [*by, *SMALL, "--rows", "2", "--out", tmp_path / "lora"]
    code, out, err = sparing("queryable", "freeze", "tiny", adapter, *options)
    assert code == 0, err
    assert "rank 2" in out
    base, tokenizer = pretrained.load("tiny")
    ids = tokenizer("a list", return_tensors="pt")["input_ids"]
    before = base(ids).logits
    lora = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert type(lora.peft_config["default"]) is peft.LoraConfig
    assert not torch.allclose(lora(ids).logits, before)


def test_extending_writes_an_adapter_with_more_atoms(sparing, adapter, tmp_path) -> None:
    options = [*TRAIN, "--count", "2", "--instruction", "sort", "--out", tmp_path / "more"]
    code, out, err = sparing("queryable", "extend", "tiny", adapter, *options)
    assert code == 0, err
    assert "5 atoms" in out
    config: Any = peft.PeftConfig.from_pretrained(str(tmp_path / "more"))
    assert (config.num_atoms, config.frozen_atoms) == (5, 3)
    prompt = ("--prompt", "a list")
    code, table, err = sparing("queryable", "show", "tiny", tmp_path / "more", *prompt)
    assert code == 0, err
    assert "atom 4" in table


def test_other_folders_are_refused(sparing, tmp_path) -> None:
    prompt = ("--prompt", "a")
    code, _, err = sparing("queryable", "show", "tiny", tmp_path, *prompt)
    assert code == 2
    assert "adapter_config.json" in err
    lora = write(tmp_path / "lora", peft.LoraConfig(r=2, target_modules="all-linear"))
    code, _, err = sparing("queryable", "show", "tiny", lora, *prompt)
    assert code == 2
    assert "Queryable LoRA" in err
