"""Singular values and gains of trained models, and the exponents fitted to them."""

import json
import math
import multiprocessing

import _sharded
import pytest
import torch
import transformers
from _sizes import FAMILIES, family, llama
from conftest import small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing.errors import CheckpointError, ConfigError, DataError
from sparing.scale import (
    Spectra,
    branch_gains,
    compare_spectra,
    fit_width_exponent,
    measure_checkpoint,
    measure_spectra,
)
from sparing.scale.gains import branch_ends, checkpoint_gains
from sparing.scale.orthogonalize import spectral_norm
from sparing.scale.parameters import classify, matrices
from sparing.scale.singular import largest_singular_values
from sparing.scale.spectra import MatrixSpectrum, ks_distance, singular_values


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(weight.double(), ord=2)


# The largest singular value


@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 150),
    stack=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_thirty_steps_find_the_largest_singular_value_of_noise(rows, columns, stack, seed):
    x = numbers(stack, rows, columns, seed=seed)
    found = largest_singular_values(x)
    torch.testing.assert_close(found.values.double(), exact(x), rtol=1e-4, atol=1e-6)
    length = (x @ found.directions.unsqueeze(-1)).squeeze(-1).norm(dim=-1)
    torch.testing.assert_close(length, found.values, rtol=1e-4, atol=1e-6)


def test_power_iteration_does_not_in_as_many():
    """The specification asks it of power iteration, which needs a gap below σ₁."""
    x = numbers(256, 256)
    short, _ = spectral_norm(x, steps=30)
    assert short < exact(x) * (1 - 1e-3)
    assert largest_singular_values(x).values.item() == pytest.approx(exact(x).item(), rel=1e-4)


@given(rank=st.integers(0, 4), seed=st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_matrices_of_low_rank_end_early_and_right(rank, seed):
    x = numbers(20, max(rank, 1), seed=seed) @ numbers(max(rank, 1), 30, seed=seed + 1)
    x = x if rank else torch.zeros(20, 30)
    found = largest_singular_values(x).values.double()
    torch.testing.assert_close(found, exact(x).view(1), rtol=1e-4, atol=1e-6)


def test_a_warm_start_needs_fewer_steps():
    x = numbers(128, 128)
    warm = largest_singular_values(x).directions
    moved = x + 0.001 * numbers(128, 128, seed=1)
    errors = [
        abs(largest_singular_values(moved, start=start, steps=3).values.item() / exact(moved) - 1)
        for start in (None, warm)
    ]
    assert errors[1] < 1e-4 < errors[0]


def test_low_precision_is_measured_in_float32():
    x = numbers(30, 20).bfloat16()
    found = largest_singular_values(x).values
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact(x).view(1), rtol=1e-4, atol=0)


def test_a_fused_matrix_is_measured_in_parts():
    x = numbers(30, 60)
    found = largest_singular_values(x, transposed=True, blocks=3).values
    parts = torch.stack([exact(part) for part in x.split(20, dim=1)])
    torch.testing.assert_close(found.double(), parts, rtol=1e-4, atol=0)
    assert largest_singular_values(x, transposed=True).values.item() > 1.05 * parts.max()


def test_sharded_weights_are_measured_without_gathering_them(tmp_path):
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=_sharded.main, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=100)
        assert process.exitcode == 0
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, (shape, options) in _sharded.CASES.items():
            weight = _sharded.weight(name)
            expected = exact(matrices(weight, **options)).flatten().tolist()
            assert found[name]["values"] == pytest.approx(expected, rel=1e-4), name
            assert 0 < found[name]["exchanged"] < math.prod(shape) / 4, name


# Whole models


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_hidden_matrix_of_a_model_is_measured(kind):
    torch.manual_seed(0)
    model = type(family(kind, 16))(family(kind, 16).config)
    run = measure_spectra(model)
    every = singular_values(model)
    expected = [
        (name if len(stack) == 1 else f"{name}[{number}]", values[0].item())
        for name, stack in every.items()
        for number, values in enumerate(stack)
    ]
    assert [row.name for row in run.matrices] == [name for name, _ in expected]
    found = torch.tensor([row.sigma for row in run.matrices])
    torch.testing.assert_close(found, torch.tensor([s for _, s in expected]), rtol=1e-4, atol=1e-6)
    roles = {info.role for name, info in classify(model).items() if name in every}
    assert roles <= {"matrix", "expert", "router"}


def test_entries_are_measured_too():
    model = small_gpt2()
    run = measure_spectra(model)
    named = dict(model.named_parameters())
    first = next(row for row in run.matrices if row.name.endswith("c_attn.weight[1]"))
    part = named["transformer.h.0.attn.c_attn.weight"][:, 32:64]
    assert first.rms == pytest.approx(part.square().mean().sqrt().item(), rel=1e-5)
    assert (first.outputs, first.inputs) == (32, 32)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3", "vit"])
def test_a_saved_model_measures_as_in_memory(kind, tmp_path):
    torch.manual_seed(0)
    model = type(family(kind, 16))(family(kind, 16).config)
    model.save_pretrained(tmp_path)
    seen = []
    saved = measure_checkpoint(tmp_path, lr=1.0, weight_decay=4.0, advance=seen.append)
    held = measure_spectra(model, lr=1.0, weight_decay=4.0)
    assert [row.name for row in saved.matrices] == [row.name for row in held.matrices]
    assert [row.sigma for row in saved.matrices] == pytest.approx(
        [row.sigma for row in held.matrices], rel=1e-5
    )
    assert saved.scale == 0.5
    assert len(seen) == len({row.name.split("[")[0] for row in saved.matrices})


def test_checkpoints_without_a_configuration_are_refused(tmp_path):
    small_llama().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        measure_checkpoint(tmp_path)
    with pytest.raises(CheckpointError):
        measure_checkpoint(tmp_path / "nothing")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    small_llama().save_pretrained(tmp_path)
    small_gpt2().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="missing or foreign"):
        measure_checkpoint(tmp_path)


def test_diverged_weights_are_named():
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
        measure_spectra(model)


# Exponents


def run_of(width: int, a: float, lr: float | None = 1e-3, weight_decay: float | None = 0.5):
    """Two matrices and one that does not grow, exactly on the law."""
    scale = math.sqrt((lr or 1) / (weight_decay or 1))
    rows = [
        MatrixSpectrum(name, sides * width, width, c * (sides**0.5 * width) ** a * scale, 0.1)
        for name, c, sides in (("q", 0.7, 1), ("up", 1.9, 4))
    ]
    rows.append(MatrixSpectrum("k", 8, width, 3.0, 0.1))
    return Spectra(tuple(rows), lr, weight_decay)


@given(
    a=st.floats(0.3, 1.2),
    lr=st.floats(1e-4, 1e-1),
    weight_decay=st.floats(1e-3, 1.0),
)
@settings(max_examples=25, deadline=None)
def test_a_law_is_recovered(a, lr, weight_decay):
    runs = [run_of(64, a), run_of(128, a, lr, weight_decay), run_of(512, a, weight_decay, lr)]
    fit = fit_width_exponent(runs)
    assert fit.exponent == pytest.approx(a, abs=1e-6)
    assert fit.decay_exponent() == pytest.approx(2 * a - 1, abs=1e-6)
    assert fit.decay_exponent(lr_exponent=0.5) == pytest.approx(2 * a - 0.5, abs=1e-6)
    assert fit.constants == {"q": pytest.approx(0.7), "up": pytest.approx(1.9)}
    assert fit.error < 1e-9


@given(a=st.floats(0.5, 1.0), p=st.floats(0.0, 1.0))
@settings(max_examples=20, deadline=None)
def test_the_fitted_exponent_of_decay_keeps_sigma(a, p):
    """Runs made with another p give the p that mends them."""
    runs = [run_of(w, a, 1e-3 * 64 / w, 0.5 * (w / 64) ** p) for w in (64, 256)]
    mended = fit_width_exponent(runs).decay_exponent()
    again = [run_of(w, a, 1e-3 * 64 / w, 0.5 * (w / 64) ** mended) for w in (64, 256)]
    assert compare_spectra(*again).slope == pytest.approx(0, abs=1e-9)
    expected = a - 0.5 - p / 2
    assert compare_spectra(*runs).slope == pytest.approx(expected, abs=1e-9)
    assert compare_spectra(*runs).matched == (abs(compare_spectra(*runs).slope) < 0.15)


@pytest.mark.parametrize("bad", [None, 0.0])
def test_a_fit_needs_rates_and_decays(bad):
    with pytest.raises(DataError, match="weight decay"):
        fit_width_exponent([run_of(64, 0.75), run_of(128, 0.75, 1e-3, bad)])


def test_a_fit_needs_two_widths():
    for runs in ([run_of(64, 0.75)], [run_of(64, 0.75)] * 2, []):
        with pytest.raises(DataError, match="two widths"):
            fit_width_exponent(runs)


def test_a_comparison_names_what_only_one_has():
    torch.manual_seed(0)
    found = compare_spectra(measure_spectra(llama(16)), measure_spectra(llama(32, layers=3)))
    assert len(found.rows) == 14
    assert found.unmatched == tuple(
        f"model.layers.2.{part}.weight"
        for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    )  # fmt: skip
    with pytest.raises(DataError, match="no matrix"):
        compare_spectra(measure_spectra(llama(16)), measure_spectra(small_gpt2()))


def test_two_models_of_one_width_are_compared_by_ratio():
    model, louder = llama(16), llama(16)
    louder.load_state_dict({n: 1.2 * w for n, w in model.state_dict().items()})
    same = compare_spectra(measure_spectra(model), measure_spectra(model))
    other = compare_spectra(measure_spectra(model), measure_spectra(louder))
    assert same.slope is None
    assert same.matched
    assert other.mean_log_ratio == pytest.approx(math.log(1.2), abs=1e-5)
    assert not other.matched


@given(shift=st.floats(0, 1), seed=st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_kolmogorov_smirnov_equals_scipys(shift, seed):
    stats = pytest.importorskip("scipy.stats")
    one, two = numbers(50, seed=seed), numbers(70, seed=seed + 1) + shift
    assert ks_distance(one, two) == pytest.approx(stats.ks_2samp(one, two).statistic, abs=1e-6)
    assert ks_distance(one, one) == 0


# Gains


def test_the_gain_of_a_branch_is_its_output_over_its_input():
    model = small_llama()
    ids = token_ids()
    block = model.model.layers[0]
    seen = {}
    block.self_attn.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(attention=(kwargs["hidden_states"], out[0])),
        with_kwargs=True,
    )
    block.mlp.register_forward_hook(lambda m, args, out: seen.update(mlp=(args[0], out)))
    gains = branch_gains(model, [{"input_ids": ids}])
    for name, branch in (("attention", "self_attn"), ("mlp", "mlp")):
        x, y = seen[name]
        ratio = (y.square().mean(-1) / x.square().mean(-1)).sqrt().mean().item()
        assert gains[f"model.layers.0.{branch}"] == pytest.approx(ratio, rel=1e-5)
    assert len(gains) == 4


def test_gains_are_linear_in_the_last_matrix_and_leave_no_hooks():
    model = small_llama()
    before = branch_gains(model, [{"input_ids": token_ids()}])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3.0)
    after = branch_gains(model, [{"input_ids": token_ids()}])
    for name, gain in before.items():
        factor = 3.0 if name == "model.layers.1.mlp" else 1.0
        assert after[name] == pytest.approx(factor * gain, rel=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gains_are_a_mean_over_the_tokens_of_all_batches():
    model, ids = small_llama(), token_ids(rows=6)
    whole = branch_gains(model, [{"input_ids": ids}])
    parts = branch_gains(model, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}])
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_both_branches_of_every_block_are_found(kind):
    branches = branch_ends(family(kind, 16))
    assert len(branches) == 2


def test_a_mixture_of_experts_has_a_gain():
    torch.manual_seed(0)
    model = type(family("mixtral", 16))(family("mixtral", 16).config).eval()
    gains = branch_gains(model, [{"input_ids": torch.arange(12).view(1, 12)}])
    assert set(gains) == {"model.layers.0.self_attn", "model.layers.0.mlp"}
    assert all(gain > 0 for gain in gains.values())


def test_gains_need_branches_and_batches():
    with pytest.raises(ConfigError, match="blocks with attention"):
        branch_gains(nn.Linear(3, 3), [])
    with pytest.raises(ConfigError, match="batches"):
        branch_gains(small_llama(), [])


def test_gains_of_a_folder_equal_those_in_memory(tmp_path):
    model = small_llama()
    model.save_pretrained(tmp_path)
    found = checkpoint_gains(tmp_path, rows=2, length=12)  # random tokens: there is no tokenizer
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    assert found == pytest.approx(branch_gains(model, [{"input_ids": ids}]), rel=1e-5)


def test_gains_of_a_model_without_language_are_refused(tmp_path):
    vit = family("vit", 16)
    transformers.ViTForImageClassification(vit.config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="language model"):
        checkpoint_gains(tmp_path)
