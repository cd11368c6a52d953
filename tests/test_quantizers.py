"""Codebooks, nearest levels, gradients through rounding, and packed codes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparing.errors import ConfigError, DataError
from sparing.quantizers import (
    CODEBOOKS,
    Encoded,
    NormalQuantizer,
    codebook,
    nearest,
    pack_bits,
    packed_bytes,
    straight_through,
    unpack_bits,
)

# Positive halves, as found by running the paper's own iteration.
PAPER_LEVELS = {
    1: [0.6745],
    2: [0.3778, 1.2657],
    3: [0.2026, 0.6254, 1.1137, 1.7920],
    4: [0.1056, 0.3190, 0.5401, 0.7752, 1.0340, 1.3331, 1.7077, 2.2655],
}
# J. Max, "Quantizing for minimum distortion", 1960, table I: positive halves, and uniform steps.
MAX_LEVELS = {
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
MAX_STEPS = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352}
MEDIAN_ERRORS = {1: 0.379, 2: 0.129, 3: 0.0403, 4: 0.0118}


def matrix(seed: int = 0, rows: int = 7, columns: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 0.1


def exactly(bits: int, **options: object) -> NormalQuantizer:
    """Without ε, as closed forms have it."""
    return NormalQuantizer(bits, epsilon=0.0, **options)  # type: ignore[arg-type]


# Codebooks.


@pytest.mark.parametrize(("bits", "expected"), PAPER_LEVELS.items())
def test_k_median_levels_are_the_papers(bits, expected) -> None:
    """Oracle 1."""
    levels = codebook("k-median", bits)
    torch.testing.assert_close(
        levels[2 ** (bits - 1) :], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5
    )


def test_two_bits_switch_at_the_papers_threshold() -> None:
    assert codebook("k-median", 2)[2:].mean().item() == pytest.approx(0.8217, abs=5e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_k_median_levels_are_the_medians_of_their_cells(bits) -> None:
    """Oracle 1: eq. 2 to 1e-10."""
    v = codebook("k-median", bits)
    t = torch.cat([torch.tensor([-math.inf]), (v[1:] + v[:-1]) / 2, torch.tensor([math.inf])])
    p = torch.special.ndtr(t.double())
    # In the upper half probabilities are too near 1 to be told apart; it mirrors the lower one.
    half = 2 ** (bits - 1)
    medians = torch.special.ndtri((p[:-1] + p[1:]) / 2)
    torch.testing.assert_close(v[:half], medians[:half], rtol=0, atol=1e-10)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["k-median", "lloyd-max", "uniform"])
def test_levels_are_ascending_and_symmetric_to_the_last_bit(kind, bits) -> None:
    levels = codebook(kind, bits)
    assert len(levels) == 2**bits
    assert (levels.diff() > 0).all()
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("bits", MAX_LEVELS)
def test_lloyd_max_and_uniform_levels_are_those_of_max_1960(bits) -> None:
    expected = torch.tensor(MAX_LEVELS[bits], dtype=torch.float64)
    found = codebook("lloyd-max", bits)[2 ** (bits - 1) :]
    torch.testing.assert_close(found, expected, rtol=6e-4, atol=0)
    steps = codebook("uniform", bits).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, MAX_STEPS[bits]), rtol=5e-4, atol=0)


def _errors(kind: str, bits: int) -> tuple[float, float]:
    """Mean squared and mean absolute error on a normal variable, by its quantiles."""
    levels = codebook(kind, bits)  # type: ignore[arg-type]
    middles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    x = torch.special.ndtri(middles)
    off = x - levels[nearest(x, levels).long()]
    return off.square().mean().item(), off.abs().mean().item()


@pytest.mark.parametrize(("bits", "expected"), MEDIAN_ERRORS.items())
def test_squared_error_of_k_medians_is_the_papers(bits, expected) -> None:
    """Oracle 12."""
    assert _errors("k-median", bits)[0] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_each_codebook_is_best_at_what_it_minimises(bits) -> None:
    errors = {kind: _errors(kind, bits) for kind in ("k-median", "lloyd-max", "uniform")}
    assert min(errors, key=lambda kind: errors[kind][1]) == "k-median"
    assert errors["lloyd-max"][0] <= min(e[0] for e in errors.values()) * (1 + 1e-6)
    if bits == 1:
        assert errors["lloyd-max"][0] == pytest.approx(0.363, rel=0.01)


@pytest.mark.parametrize(("kind", "bits"), [("k-median", 0), ("k-median", 9), ("sign", 2)])
def test_impossible_codebooks_are_refused(kind, bits) -> None:
    with pytest.raises(ConfigError, match="codebook"):
        codebook(kind, bits)


def test_codebooks_made_while_models_are_on_meta_have_numbers() -> None:
    codebook.cache_clear()
    with torch.device("meta"):
        assert codebook("k-median", 2).tolist() == codebook("k-median", 2).tolist()
        assert NormalQuantizer(1, "sign").levels.tolist() == [-1, 1]


# Nearest levels.


@given(seed=st.integers(0, 2**31), bits=st.integers(1, 8), kind=st.sampled_from(CODEBOOKS[:3]))
@settings(max_examples=30, deadline=None)
def test_nearest_is_the_nearest_by_brute_force(seed, bits, kind) -> None:
    """Oracle 3."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    levels = codebook(kind, bits)
    assert torch.equal(nearest(x, levels).long(), (x[:, None] - levels).abs().argmin(dim=1))


@given(seed=st.integers(0, 2**31), bits=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_papers_sum_of_signs_is_the_nearest_level(seed, bits) -> None:
    """Oracle 3: eq. 4."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = codebook("k-median", bits)
    t = (v[1:] + v[:-1]) / 2
    signs = (torch.sign(x[:, None] - t) * v.diff() / 2).sum(dim=1)
    torch.testing.assert_close(v[nearest(x, v).long()], signs, rtol=0, atol=1e-12)


def test_half_way_between_two_levels_the_sum_of_signs_gives_neither() -> None:
    """Oracle 3: sign(0) = 0; codes have to choose, and choose the lower one as the paper's do."""
    v = codebook("k-median", 1)
    tie = torch.zeros(1, dtype=torch.float64)
    assert nearest(tie, v).item() == 0


# The quantised matrix.


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 8),
    granularity=st.sampled_from(["matrix", "row"]),
)
@settings(max_examples=30, deadline=None)
def test_a_matrix_has_no_more_values_than_levels(seed, bits, granularity) -> None:
    """Oracle 2."""
    quantizer = NormalQuantizer(bits, granularity=granularity)
    values = quantizer.decode(quantizer.encode(matrix(seed)))
    for group in values if granularity == "row" else [values]:
        assert len(group.unique()) <= 2**bits


def test_one_bit_is_the_mean_and_a_third_of_the_normal_away() -> None:
    """Oracle 2: μ ± 0.67449 σ, with the unbiased σ."""
    w = matrix()
    values = NormalQuantizer(1).decode(NormalQuantizer(1).encode(w))
    expected = torch.stack([w.mean() - 0.6744897501960817 * w.std(), w.mean() + 0.67449 * w.std()])
    torch.testing.assert_close(values.unique(), expected, rtol=1e-5, atol=0)
    assert torch.equal(values > w.mean(), w > w.mean())


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 8),
    a=st.floats(0.01, 100),
    c=st.floats(-10, 10),
)
@settings(max_examples=40, deadline=None)
def test_scaling_and_moving_a_matrix_scales_and_moves_its_levels(seed, bits, a, c) -> None:
    """Oracle 4."""
    quantizer, w = exactly(bits), matrix(seed)
    found = quantizer.decode(quantizer.encode(a * w + c))
    expected = a * quantizer.decode(quantizer.encode(w)) + c
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_quantising_twice_shrinks_a_matrix() -> None:
    """Oracle 7: by 0.67449 for one bit on balanced signs."""
    half = matrix(rows=8)
    w, quantizer = torch.cat([half, -half]), exactly(1)
    once = quantizer.decode(quantizer.encode(w))
    twice = quantizer.decode(quantizer.encode(once))
    torch.testing.assert_close(twice, 0.6744897501960817 * once, rtol=5e-3, atol=1e-12)
    assert not torch.allclose(twice, once, rtol=0.1)


def test_signs_are_scaled_by_the_mean_absolute_value() -> None:
    w = matrix()
    values = NormalQuantizer(1, "sign").decode(NormalQuantizer(1, "sign").encode(w))
    torch.testing.assert_close(values, w.sign() * w.abs().mean())


def test_sixteen_bit_matrices_are_quantised_in_float32() -> None:
    w = (1e-3 * matrix()).to(torch.float16)
    encoded = NormalQuantizer(4).encode(w)
    assert encoded.scale.dtype == torch.float32
    assert torch.equal(encoded.codes, NormalQuantizer(4).encode(w.float()).codes)


def test_rows_are_quantised_as_matrices_of_one_row() -> None:
    w = matrix()
    rows = NormalQuantizer(2, granularity="row")
    alone = [NormalQuantizer(2).decode(NormalQuantizer(2).encode(row[None])) for row in w]
    torch.testing.assert_close(rows.decode(rows.encode(w)), torch.cat(alone))


# Gradients.


def _gradient(quantizer: NormalQuantizer, w: Tensor, g: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    (straight_through(w, quantizer.prepare(w)) * g).sum().backward()
    assert w.grad is not None
    return w.grad


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gradient_is_the_papers_closed_form(bits) -> None:
    """Oracle 5: eq. 5b."""
    w, g, quantizer = matrix(), matrix(1), exactly(bits)
    prepared = quantizer.prepare(w)
    expected = g + ((prepared.levels - prepared.normal) * g).sum() * prepared.normal / (
        w.numel() - 1
    )
    torch.testing.assert_close(_gradient(quantizer, w, g), expected, rtol=1e-9, atol=1e-12)


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([1, 2, 4]),
    granularity=st.sampled_from(["matrix", "row"]),
    kind=st.sampled_from(CODEBOOKS),
    epsilon=st.sampled_from([0.0, 1e-5, 0.1]),
)
@settings(max_examples=40, deadline=None)
def test_gradient_is_that_of_equation_5_by_autograd(seed, bits, granularity, kind, epsilon) -> None:
    """Oracle 5: gradients flow through ŵ, σ and μ."""
    quantizer = NormalQuantizer(1 if kind == "sign" else bits, kind, granularity, epsilon)
    w, g = matrix(seed), matrix(seed + 1)
    latent = w.clone().requires_grad_()
    mean, std = quantizer.moments(latent)
    normal = (latent - mean) / (std + epsilon)
    levels = quantizer.levels[nearest(normal.detach(), quantizer.levels).long()]
    (std * ((levels - normal).detach() + normal) + mean).mul(g).sum().backward()
    torch.testing.assert_close(_gradient(quantizer, w, g), latent.grad, rtol=1e-9, atol=1e-12)


def test_only_with_detached_moments_the_gradient_passes_unchanged() -> None:
    """Oracle 5."""
    w, g, quantizer = matrix(), matrix(1), exactly(1)
    latent = w.clone().requires_grad_()
    mean, std = (moment.detach() for moment in quantizer.moments(latent))
    normal = (latent - mean) / std
    levels = quantizer.levels[nearest(normal.detach(), quantizer.levels).long()]
    (std * ((levels - normal).detach() + normal) + mean).mul(g).sum().backward()
    torch.testing.assert_close(latent.grad, g, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(_gradient(quantizer, w, g), g, rtol=1e-3)


def test_the_forward_value_is_bit_by_bit_that_of_the_codes() -> None:
    """So that a network computes the same before and after its codes were written."""
    for bits in (1, 2, 4, 8):
        quantizer, w = NormalQuantizer(bits), matrix().float()
        found = straight_through(w.requires_grad_(), quantizer.prepare(w))
        assert torch.equal(found, quantizer.decode(quantizer.encode(w)))


# Packed codes.


@given(
    bits=st.integers(1, 8),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
)
@settings(max_examples=200, deadline=None)
def test_unpacking_undoes_packing(bits, shape, seed, kind) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, shape, generator=generator).to(kind)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(codes.numel() * bits / 8),)
    assert len(packed) == packed_bytes(codes.numel(), bits)
    assert torch.equal(unpack_bits(packed, bits, codes.numel()), codes.flatten().to(torch.uint8))


@given(codes=st.lists(st.integers(0, 255), max_size=40), bits=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_packed_codes_are_one_little_endian_number(codes, bits) -> None:
    codes = [code % 2**bits for code in codes]
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    expected = number.to_bytes(packed_bytes(len(codes), bits), "little")
    found = pack_bits(torch.tensor(codes, dtype=torch.int64), bits)
    assert bytes(found.tolist()) == expected


def test_byte_order_is_the_papers() -> None:
    """Oracle 6: (+, -, -, -, -, -, -, -) is 0x01; two bits 0, 1, 2, 3 are 0b11100100."""
    signs = torch.tensor([[1.0, -1, -1, -1], [-1, -1, -1, -1]])
    assert pack_bits(NormalQuantizer(1).encode(signs).codes, 1).tolist() == [0x01]
    assert pack_bits(torch.arange(4), 2).tolist() == [0b11100100]


def test_a_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="3 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 1, 16)


def test_decoding_reads_packed_codes() -> None:
    quantizer, w = NormalQuantizer(2), matrix()
    encoded = quantizer.encode(w)
    codes = unpack_bits(pack_bits(encoded.codes, 2), 2, w.numel()).view(w.shape)
    again = Encoded(codes, encoded.centre, encoded.scale)
    assert torch.equal(quantizer.decode(again), quantizer.decode(encoded))
