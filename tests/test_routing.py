"""Gates pick, weigh and never lose an expert."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.routing import entropy, sparse_softmax, standardized, top_experts


def scores(rows: int, experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, experts, generator=generator, dtype=torch.float64)


@given(experts=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_weights_are_a_softmax_of_the_k_best(experts, k, seed):
    logits = scores(5, experts, seed)
    weights = sparse_softmax(logits, k)
    best = logits.topk(min(k, experts), dim=-1)
    torch.testing.assert_close(weights.gather(-1, best.indices), best.values.softmax(dim=-1))
    assert int((weights > 0).sum(dim=-1).max()) == min(k, experts)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5, dtype=torch.float64))


def test_ties_go_to_the_lowest_index():
    assert top_experts(torch.zeros(2, 40), 3).tolist() == [[0, 1, 2]] * 2


def test_large_scores_in_bfloat16_do_not_overflow():
    weights = sparse_softmax(torch.tensor([300.0, 300.0, -300.0], dtype=torch.bfloat16), 2)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [0.5, 0.5, 0.0]


def test_an_absent_expert_gets_no_weight_even_if_k_asks_for_it():
    weights = sparse_softmax(torch.tensor([0.0, -torch.inf, -torch.inf]), 2)
    assert weights.tolist() == [1.0, 0.0, 0.0]


def test_only_chosen_logits_get_a_gradient():
    logits = scores(1, 6).requires_grad_()
    sparse_softmax(logits, 2)[0, int(logits.argmax())].backward()
    assert int((logits.grad != 0).sum()) == 2


@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_standardizing_forgets_scale_and_shift(scale, shift):
    x = scores(3, 16)
    same = standardized(scale * x + shift, eps=0.0)
    torch.testing.assert_close(same, standardized(x, eps=0.0))


def test_a_constant_vector_standardizes_to_zero():
    assert standardized(torch.full((2, 4), 3.0)).abs().max() == 0


@pytest.mark.parametrize(("weights", "nats"), [([1.0, 0.0], 0.0), ([0.5, 0.5], math.log(2))])
def test_entropy(weights, nats):
    assert entropy(torch.tensor(weights)).item() == pytest.approx(nats)
