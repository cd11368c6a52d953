"""Sparse products equal their dense definitions, and patterns survive files and devices."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparing._patching import PatchedInPlace
from sparing.sparsity import DENSE_GRADIENT_SHARE, Pattern, top_entries


def random_pattern(height: int, width: int, share: float, seed: int) -> Pattern:
    generator = torch.Generator().manual_seed(seed)
    return Pattern(torch.rand(height, width, generator=generator) < share)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


SHARES = (0.0, DENSE_GRADIENT_SHARE / 3, DENSE_GRADIENT_SHARE * 3, 1.0)
cases = given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    tokens=st.integers(1, 9),
    share=st.sampled_from(SHARES),
    seed=st.integers(0, 99),
)


@cases
@settings(max_examples=60, deadline=None)
def test_both_products_equal_their_dense_definition(height, width, tokens, share, seed):
    pattern = random_pattern(height, width, share, seed)
    mask = pattern.mask()
    weight, bias = numbers(height, width, seed=seed), numbers(height, seed=seed + 1)
    for product in ("linear", "replaced", "added"):
        x = numbers(2, tokens, width, seed=seed + 2).requires_grad_()
        entries = numbers(len(pattern), seed=seed + 3).requires_grad_()
        upstream = numbers(2, tokens, height, seed=seed + 4)
        if product == "linear":
            found = pattern.linear(x, entries)
            expected = F.linear(x, pattern.dense(entries))
        else:
            added = product == "added"
            found = pattern.patched_linear(x, weight, bias, entries, added=added)
            change = pattern.dense(entries)
            dense = weight + change if added else torch.where(mask, change, weight)
            expected = F.linear(x, dense, bias)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        gradients = torch.autograd.grad(found, (x, entries), upstream)
        reference = torch.autograd.grad(expected, (x, entries), upstream)
        torch.testing.assert_close(gradients, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [DENSE_GRADIENT_SHARE / 2, DENSE_GRADIENT_SHARE * 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(share, transposed):
    pattern = random_pattern(7, 9, share, seed=3)
    weight = numbers(9, 7).t() if transposed else numbers(7, 9)
    x = numbers(4, 9, seed=1).requires_grad_()
    entries = numbers(len(pattern), seed=2).requires_grad_()
    assert torch.autograd.gradcheck(pattern.linear, (x, entries))
    assert torch.autograd.gradcheck(
        lambda x, e: pattern.patched_linear(x, weight, None, e), (x, entries)
    )


def test_custom_operators_pass_torchs_own_checks():
    pattern = random_pattern(6, 8, 0.2, seed=0)
    positions = (pattern.rows, pattern.columns, pattern.row_starts)
    x = numbers(5, 8).requires_grad_()
    entries = numbers(len(pattern)).requires_grad_()
    sparse, patched = torch.ops.sparing.sparse_linear, torch.ops.sparing.patched_linear
    torch.library.opcheck(sparse.default, (x, entries, *positions))
    for added in (False, True):
        inputs = (x, numbers(6, 8), numbers(6), entries, *positions, added)
        torch.library.opcheck(patched.default, inputs)


def test_rows_without_entries_give_zeros_and_no_gradient_to_their_inputs():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[2, 3] = True
    pattern = Pattern(mask)
    x = numbers(3, 5).requires_grad_()
    y = pattern.linear(x, torch.tensor([2.0], dtype=torch.float64))
    assert torch.equal(y[:, [0, 1, 3]], torch.zeros(3, 3, dtype=torch.float64))
    torch.testing.assert_close(y[:, 2], 2 * x[:, 3])
    y.sum().backward()
    assert x.grad[:, [0, 1, 2, 4]].abs().sum() == 0


def test_patching_with_the_weights_own_entries_changes_no_bit():
    for dtype in (torch.float32, torch.bfloat16):
        weight, bias = numbers(16, 24).to(dtype), numbers(16).to(dtype)
        pattern = random_pattern(16, 24, 0.1, seed=1)
        x = numbers(2, 6, 24, seed=4).to(dtype)
        entries = pattern.gather(weight).float()
        found = pattern.patched_linear(x, weight, bias, entries)
        assert torch.equal(found, F.linear(x, weight, bias))


def test_the_product_is_formed_in_the_type_of_its_input():
    weight = numbers(6, 8).float()
    pattern = random_pattern(6, 8, 0.2, seed=1)
    entries = pattern.gather(weight).requires_grad_()
    x = numbers(3, 8).bfloat16().requires_grad_()
    y = pattern.patched_linear(x, weight, None, entries)
    assert torch.equal(y, F.linear(x, weight.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert entries.grad.dtype == torch.float32
    assert torch.equal(pattern.gather(weight), entries.detach())


def test_the_backward_keeps_neither_a_patched_weight_nor_a_copy_of_the_weight():
    weight = numbers(32, 48).float()
    pattern = random_pattern(32, 48, 0.05, seed=1)
    x = numbers(4, 48).float().requires_grad_()
    entries = pattern.gather(weight).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pattern.patched_linear(x, weight, None, entries)
    large = [t for t in kept if t.numel() >= weight.numel()]
    assert [t.data_ptr() for t in large] == [weight.data_ptr()]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_training_in_place_equals_inference_with_a_copy_and_leaves_the_weight(transposed, added):
    weight = (numbers(24, 16).t() if transposed else numbers(16, 24)).float()
    before, pattern = weight.clone(), random_pattern(16, 24, 0.1, seed=1)
    x, entries = numbers(6, 24).float(), numbers(len(pattern)).float().requires_grad_()
    trained = pattern.patched_linear(x, weight, None, entries, added=added)
    assert "PatchedInPlace" in type(trained.grad_fn.next_functions[0][0]).__name__
    assert torch.equal(weight, before)
    trained.sum().backward()
    assert torch.equal(weight, before)
    with torch.no_grad():
        assert torch.equal(pattern.patched_linear(x, weight, None, entries, added=added), trained)


def test_a_failed_product_leaves_the_weight_as_it_was():
    weight, pattern = numbers(16, 24).float(), random_pattern(16, 24, 0.1, seed=1)
    before = weight.clone()
    entries = numbers(len(pattern)).float().requires_grad_()
    with pytest.raises(RuntimeError):
        PatchedInPlace.apply(numbers(6, 23).float(), weight, None, entries, pattern, False)
    assert torch.equal(weight, before)


def test_threads_that_train_on_one_weight_do_not_see_each_other():
    weight, pattern = numbers(64, 96).float(), random_pattern(64, 96, 0.05, seed=1)
    x = numbers(16, 96).float()

    def train(seed: int) -> Tensor:
        entries = numbers(len(pattern), seed=seed).float().requires_grad_()
        return torch.stack(
            [pattern.patched_linear(x, weight, None, entries).detach() for _ in range(50)]
        )

    expected = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for found, alone in zip(threads.map(train, range(4)), expected, strict=True):
            assert torch.equal(found, alone)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("width", "small"), [(300, torch.uint16), (70_000, torch.int32)])
def test_state_dict_round_trip(uniform, width, small):
    mask = torch.zeros(3, width, dtype=torch.bool)
    mask[:, [1, width - 1]] = True
    mask[1, 5] = not uniform
    pattern, other = Pattern(mask), Pattern(mask.flip(1))
    state = pattern.state_dict()
    assert state["stored_columns"].dtype == small
    assert ("stored_counts" in state) is not uniform
    other.load_state_dict(state)
    assert torch.equal(other.mask(), mask)
    restored = Pattern.stored(state["stored_columns"], state.get("stored_counts"), (3, width))
    assert torch.equal(restored.mask(), mask)


def test_casting_a_module_leaves_the_positions_alone():
    pattern = random_pattern(5, 7, 0.3, seed=2)
    mask = pattern.mask()
    assert torch.equal(nn.Sequential(pattern).bfloat16()[0].mask(), mask)


def test_positions_in_any_order_give_the_same_pattern():
    mask = random_pattern(5, 7, 0.3, seed=2).mask()
    positions = mask.flatten().nonzero()[:, 0].flip(0)
    assert torch.equal(Pattern.at(positions, (5, 7)).mask(), mask)


def test_an_unplaced_pattern_only_counts():
    for entries in (12, 13):
        pattern = Pattern.unplaced(entries, (4, 9))
        assert len(pattern) == entries
        assert pattern.shape == (4, 9)
        assert {buffer.device.type for buffer in pattern.buffers()} == {"meta"}


def test_compiles_into_one_graph_forward_and_backward():
    pattern = random_pattern(8, 16, 0.1, seed=5)
    weight, bias = numbers(8, 16).float(), numbers(8).float()

    def loss(x: Tensor, entries: Tensor) -> Tensor:
        y = pattern.patched_linear(x, weight, bias, entries + pattern.gather(weight))
        return (y * pattern.linear(x, entries)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        x = numbers(3, 16).float().requires_grad_()
        entries = numbers(len(pattern)).float().requires_grad_()
        function(x, entries).backward()
        results.append((x.grad, entries.grad))
    torch.testing.assert_close(*results)


@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    count=st.integers(0, 10),
    levels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_top_entries_are_a_stable_sorts_first(rows, columns, count, levels, seed):
    score = torch.randint(
        levels, (rows, columns), generator=torch.Generator().manual_seed(seed)
    ).float()
    for scope in ("row", "matrix"):
        pool = score if scope == "row" else score.reshape(1, -1)
        order = torch.argsort(pool, dim=1, descending=True, stable=True)[:, :count]
        expected = torch.zeros_like(pool, dtype=torch.bool).scatter_(1, order, True)
        assert torch.equal(top_entries(score, count, scope=scope), expected.view(score.shape))


def test_ties_go_to_the_lowest_column():
    mask = top_entries(torch.ones(2, 5), 2, scope="row")
    assert mask.tolist() == [[True, True, False, False, False]] * 2
    assert top_entries(torch.ones(2, 5), 6, scope="matrix").sum(1).tolist() == [5, 1]
