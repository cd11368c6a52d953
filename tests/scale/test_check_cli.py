"""`sparing check` compares two trained widths."""

import json

import pytest
import torch
from _sizes import family, llama
from conftest import small_gpt2

RATES = ("--lr", 4e-3, 2e-3, "--weight-decay", 0.5, 0.7)


def trained(folder, width: int, gain: float = 1.0, layers: int = 2) -> str:
    """A folder with a model whose matrices have σ₁ = gain."""
    torch.manual_seed(width)
    model = llama(width, layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(gain / torch.linalg.matrix_norm(weight, ord=2))
    model.save_pretrained(folder)
    return str(folder)


def test_matched_widths_are_called_matched(sparing, tmp_path):
    first, second = trained(tmp_path / "a", 16), trained(tmp_path / "b", 64)
    code, out, _ = sparing("check", first, second, "--data", "none")
    assert code == 0
    assert "width^+0.000" in out or "width^-0.000" in out
    assert "matched (limit" in out
    assert "not matched" not in out
    assert "model.layers.*.mlp.up_proj.weight" in out
    assert "32×16" in out
    assert "128×64" in out


def test_a_gain_that_grows_is_called_so_and_the_exponent_is_fitted(sparing, tmp_path):
    first, second = trained(tmp_path / "a", 16), trained(tmp_path / "b", 64, gain=2.0)
    figures = tmp_path / "figures.json"
    code, out, _ = sparing("check", first, second, *RATES, "--data", "none", "--out", str(figures))
    assert code == 0
    assert "width^+0.500" in out
    assert "not matched" in out
    record = json.loads(figures.read_text())
    # log(2 √(4e-3/0.5) / √(2e-3/0.7)) / log 4
    assert record["fit"]["exponent"] == pytest.approx(0.87138, abs=1e-4)
    assert "width^0.743 keeps it" in out
    assert record["slope"] == pytest.approx(0.5, abs=1e-3)
    assert not record["matched"]
    assert len(record["matrices"]) == 14


def test_without_rates_it_asks_for_them(sparing, tmp_path):
    first, second = trained(tmp_path / "a", 16), trained(tmp_path / "b", 64, gain=2.0)
    _, out, _ = sparing("check", first, second, "--data", "none")
    assert "give --lr and --weight-decay" in out
    code, _, errors = sparing("check", first, second, "--lr", 4e-3, 2e-3)
    assert code == 2
    assert "--weight-decay" in errors


def test_a_run_that_has_not_settled_is_told(sparing, tmp_path):
    first, second = trained(tmp_path / "a", 16), trained(tmp_path / "b", 64)
    _, out, _ = sparing(
        "check", first, second, "--lr", 4.0, 4.0, "--weight-decay", 0.1, 0.1, "--data", "none"
    )
    assert out.count("it is not stationary") == 2


def test_gains_of_every_branch_are_shown(sparing, tmp_path):
    first, second = trained(tmp_path / "a", 16), trained(tmp_path / "b", 64, layers=3)
    figures = tmp_path / "figures.json"
    _, out, _ = sparing("check", first, second, "--every", "--out", str(figures))
    assert "model.layers.1.self_attn" in out
    assert "model.layers.1.mlp.up_proj.weight" in out
    assert "7 matrices are in only one of the two" in out
    gains = json.loads(figures.read_text())["gains"]
    assert [len(each) for each in gains] == [4, 6]


def test_a_vision_model_has_singular_values_but_no_gains(sparing, tmp_path):
    for name, width in (("a", 16), ("b", 32)):
        model = family("vit", width)
        type(model)(model.config).save_pretrained(tmp_path / name)
    code, out, _ = sparing("check", tmp_path / "a", tmp_path / "b")
    assert code == 0
    assert "no gains" in out
    assert "σ₁ follows width" in out


def test_one_width_is_compared_by_ratio(sparing, tmp_path):
    first, second = trained(tmp_path / "a", 16), trained(tmp_path / "b", 16, gain=1.05)
    code, out, _ = sparing("check", first, second, *RATES, "--data", "none")
    assert code == 0
    assert "1.05 times" in out


def test_bad_folders_are_named(sparing, tmp_path):
    first = trained(tmp_path / "a", 16)
    code, _, errors = sparing("check", first, tmp_path / "nothing")
    assert code == 2
    assert "nothing" in errors
    small_gpt2().save_pretrained(tmp_path / "gpt")
    code, _, errors = sparing("check", first, tmp_path / "gpt")
    assert code == 2
    assert "no matrix of the same name" in errors


def test_data_that_is_not_there_is_an_error(sparing, tmp_path):
    from sparing import pretrained

    folder = pretrained.resolve("tiny")
    code, _, errors = sparing("check", folder, folder, "--data", str(tmp_path / "no.txt"))
    assert code == 2
    assert "no.txt" in errors
