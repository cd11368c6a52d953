"""A kept value is computed once, and anew whenever a source changes."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from sparing.kept import Kept


class Doubling:
    """Doubles a tensor and counts how often."""

    def __init__(self) -> None:
        self.source = torch.ones(3)
        self.kept: Kept[Tensor] = Kept()
        self.times = 0

    def make(self) -> Tensor:
        self.times += 1
        return 2 * self.source

    def get(self, *of: object) -> Tensor:
        return self.kept.get([self.source], self.make, *of)


def test_a_value_is_kept_until_a_source_changes():
    doubling = Doubling()
    assert doubling.get() is doubling.get()
    doubling.source.add_(1)
    assert torch.equal(doubling.get(), torch.full((3,), 4.0))
    doubling.source = torch.zeros(3)
    assert torch.equal(doubling.get(), torch.zeros(3))
    assert doubling.times == 3


def test_a_value_depends_on_what_else_is_named():
    doubling = Doubling()
    doubling.get(torch.float32)
    doubling.get(torch.float64)
    assert doubling.times == 2


def test_nothing_is_kept_where_gradients_are_recorded():
    doubling = Doubling()
    doubling.source.requires_grad_()
    first, second = doubling.get(), doubling.get()
    assert first is not second
    assert first.requires_grad
    with torch.no_grad():
        assert doubling.get() is doubling.get()


def test_what_inference_mode_made_is_not_used_outside():
    doubling = Doubling()
    with torch.inference_mode():
        doubling.get()
    assert not doubling.get().is_inference()


def test_forgetting_and_copying_start_empty():
    doubling = Doubling()
    doubling.get()
    doubling.kept.forget()
    doubling.get()
    assert doubling.times == 2
    for copied in (copy.deepcopy(doubling), pickle.loads(pickle.dumps(doubling))):
        copied.get()
        assert copied.times == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_value_is_not_kept_beyond_an_optimisers_step(fused):
    doubling = Doubling()
    doubling.source.requires_grad_()
    doubling.source.grad = torch.ones(3)
    with torch.no_grad():
        before = doubling.get()
        torch.optim.AdamW([doubling.source], lr=0.1, fused=fused).step()
        after = doubling.get()
    assert torch.equal(after, 2 * doubling.source)
    assert not torch.equal(after, before)
