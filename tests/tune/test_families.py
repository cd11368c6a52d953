"""SVDiff and DiffFit change a model as their papers say, and fold into plain weights."""

import copy

import pytest
import torch
from _networks import small_unet, unet_inputs
from conftest import perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing.errors import CheckpointError, ConfigError
from sparing.tune import block_groups, export, load_tuned, save_tuned
from sparing.tune.svdiff import SpectralShift, install, shifts

SHAPES = st.sampled_from([(3, 5), (5, 3), (4, 2, 3, 3), (2, 8, 1, 1), (6,), (1, 1), (2, 3, 3)])


def weight_of(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000), scale=st.sampled_from([1.0, 0.5]))
def test_shifted_weight_is_the_equation(shape, seed, scale):
    """W' = U diag(ReLU(Σ + s δ)) Vᵀ, against the plain formula; its singular values are >= 0."""
    weight = weight_of(shape, seed)
    shift = SpectralShift(weight, scale)
    shift.delta.data = 2 * weight_of(tuple(shift.delta.shape), seed + 1)
    matrix = weight[None] if weight.dim() == 1 else weight.flatten(1)
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    moved = torch.relu(sigma + scale * shift.delta.detach())
    found = shift(weight)
    assert found.shape == weight.shape
    torch.testing.assert_close(
        found.detach().view(matrix.shape), (u * moved) @ vt, atol=1e-5, rtol=1e-5
    )
    values = torch.linalg.svdvals(found.detach().view(matrix.shape))
    expected = moved.sort(descending=True).values
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_zero_shift_is_the_weight_and_minus_sigma_is_nothing(shape, seed):
    """Oracle 5: exact where the oracle asks for 1e-5."""
    weight = weight_of(shape, seed)
    shift = SpectralShift(weight)
    assert torch.equal(shift(weight), weight)
    shift.delta.data = -shift.values - 1.0
    assert shift(weight).abs().max() < 1e-5


def test_the_signs_of_singular_vectors_do_not_matter():
    weight = weight_of((4, 6), 0)
    shift = SpectralShift(weight)
    shift.delta.data.uniform_(-0.5, 0.5)
    before = shift(weight).detach()
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    shift.left *= signs
    shift.right *= signs[:, None]
    torch.testing.assert_close(shift(weight).detach(), before)


def test_trainable_parameters_are_the_singular_values():
    """Oracle 6: Σ min(outputs, inputs · kernel) over matrices, and one for every vector."""
    model = small_unet()
    weights = [
        m.weight for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)
    ]
    expected = sum(1 if w.dim() == 1 else min(w.flatten(1).shape) for w in weights)
    groups = block_groups(model, "svdiff")
    assert groups.count(model, "1" * len(groups)) == expected
    assert len(install(model)) == len(weights)  # again: nothing is added
    assert sum(p.numel() for n, p in model.named_parameters() if "delta" in n) == expected


@pytest.mark.parametrize("family", ["svdiff", "difffit"])
def test_export_equals_forward(family):
    """Oracle 5: the exported model is a plain one with the same outputs."""
    model, (x, t, c) = small_unet(), unet_inputs()
    names = list(model.state_dict())
    untouched = model(x, t, encoder_hidden_states=c).sample
    groups = block_groups(model, family)
    groups.apply_mask(model, "1" * len(groups))
    perturb(model, 0.2)
    tuned = model(x, t, encoder_hidden_states=c).sample.detach()
    assert not torch.allclose(tuned, untouched, atol=1e-3)
    plain = export(model)
    assert list(plain.state_dict()) == names
    exported = plain(x, t, encoder_hidden_states=c).sample
    torch.testing.assert_close(exported, tuned, atol=2e-6, rtol=1e-5)
    assert not shifts(plain)


def test_scales_of_difffit_multiply_their_branches():
    """γ starts at 1; at 0 the branches are gone."""
    model, (x, t, c) = small_unet(), unet_inputs()
    before = model(x, t, encoder_hidden_states=c).sample
    groups = block_groups(model, "difffit")
    gammas = [p for n, p in model.named_parameters() if n.endswith("gamma")]
    assert len(gammas) == 3 * 4
    assert torch.equal(model(x, t, encoder_hidden_states=c).sample, before)
    block = model.mid_block.attentions[0].transformer_blocks[0]
    for branch in (block.attn1, block.attn2, block.ff):
        branch.gamma.data.zero_()
    h = torch.randn(1, 4, 8)
    assert torch.equal(block(h, encoder_hidden_states=c[:1]), h)
    assert all(any(w in n for w in ("bias", "norm", "gamma")) for n in groups.parameters)


def test_frozen_shifts_are_applied_too_and_follow_changes():
    linear = nn.Linear(3, 3)
    install(linear)
    (_, shift), x = shifts(linear)[0], torch.randn(2, 3)
    base = linear(x).detach()
    shift.requires_grad_(False)
    for value in (0.5, -0.2, 0.0):
        with torch.no_grad():
            shift.delta.fill_(value)
        frozen = linear(x).detach()
        shift.requires_grad_(True)
        torch.testing.assert_close(linear(x).detach(), frozen)
        shift.requires_grad_(False)
        assert torch.equal(frozen, base) == (value == 0.0)


def test_bases_of_16_bits_are_decomposed_in_32():
    layer = nn.Linear(6, 4).bfloat16()
    weight = layer.weight.detach().clone()
    install(layer)
    shift = shifts(layer)[0][1]
    assert torch.equal(layer.weight, weight)
    assert layer.weight.dtype == torch.bfloat16
    layer.half()
    assert {shift.delta.dtype, shift.left.dtype, shift.values.dtype} == {torch.float32}
    gram = shift.left.T @ shift.left
    torch.testing.assert_close(gram, torch.eye(4), atol=1e-5, rtol=0)
    layer(torch.randn(2, 6).half()).float().sum().backward()
    assert shift.delta.grad is not None


def test_weights_without_singular_values_are_refused():
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="finite floating-point"):
        install(nn.Sequential(layer))
    with pytest.raises(ConfigError, match="modules with a weight"):
        install(nn.ReLU())


@pytest.mark.parametrize("family", ["svdiff", "difffit", "attention"])
def test_saved_and_loaded_gives_the_same_output(family, tmp_path):
    base, (x, t, c) = small_unet(), unet_inputs()
    model = copy.deepcopy(base)
    groups = block_groups(model, family)
    mask = "10" + "1" * (len(groups) - 2)
    groups.apply_mask(model, mask)
    perturb(model, 0.1)
    tuned = model(x, t, encoder_hidden_states=c).sample
    save_tuned(model, groups, mask, tmp_path / "tuned")
    fresh = copy.deepcopy(base)
    loaded, loaded_mask = load_tuned(fresh, tmp_path / "tuned")
    assert (loaded, loaded_mask) == (groups, mask)
    torch.testing.assert_close(fresh(x, t, encoder_hidden_states=c).sample, tuned)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == set(groups.active(mask))
    size = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert (tmp_path / "tuned" / "tuned.safetensors").stat().st_size < size + 20_000


def test_a_folder_of_another_model_is_refused(tmp_path):
    model = small_unet()
    groups = block_groups(model, "svdiff")
    save_tuned(model, groups, "1" * len(groups), tmp_path / "tuned")
    with pytest.raises(CheckpointError, match="fingerprint"):
        load_tuned(small_unet(seed=1), tmp_path / "tuned")
    with pytest.raises(CheckpointError, match="of another shape"):
        load_tuned(small_unet(cross_attention_dim=4), tmp_path / "tuned")
    (tmp_path / "tuned" / "tuned.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="save_tuned"):
        load_tuned(small_unet(), tmp_path / "tuned")
