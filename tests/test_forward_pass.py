"""Layers of one forward share a pass, also under checkpointing, generation and copying."""

import copy
from dataclasses import dataclass

import peft
import pytest
import torch
from conftest import small_llama, token_ids
from torch import nn

from sparing.errors import ConfigError
from sparing.forward_pass import ForwardPass, Passes
from sparing.tuners import AdditiveAdapter, Tuner, TunerConfig, register_tuner


class NotingAdapter(AdditiveAdapter):
    """Adds the sum of what earlier layers of the pass have left, times a parameter."""

    mergeable = False

    def __init__(self, passes: Passes, name: str, outputs: int) -> None:
        super().__init__()
        self.passes, self.name = passes, name
        self.weight = nn.Parameter(torch.full((outputs,), 0.1))

    def delta(self, x):
        current = self.passes.current
        earlier = [note for name, note in current.notes.items() if name < self.name]
        current.leave(self.name, x.mean(dim=-1, keepdim=True))
        current.add_loss(self.weight.square().sum())
        scale = current.inputs.get("scale", 1.0)
        return scale * sum(earlier, start=torch.zeros_like(x[..., :1])) * self.weight

    def delta_weight(self):
        raise NotImplementedError


@dataclass
class NotingConfig(TunerConfig):
    method = "noting"
    size_option = "seed"
    learning_rates = (1e-3,)


class NotingTuner(Tuner):
    prefix = "noting_"
    uses_passes = True
    forward_inputs = ("scale",)

    def new_adapter(self, config, layer, module_name, shared):
        return NotingAdapter(self.passes, module_name, layer.out_features)


register_tuner(NotingConfig, NotingTuner)


def noting_model():
    config = NotingConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(small_llama(), config)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), gradients(model)


def test_checkpointing_changes_neither_loss_nor_gradients():
    ids = token_ids()
    model = noting_model().train()
    loss, expected = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, found = step(model, ids)
    assert torch.equal(loss, again)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_reentrant_checkpointing_is_refused_because_it_loses_gradients():
    model = noting_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        model(token_ids())


def test_two_forwards_before_one_backward_keep_their_own_notes():
    model = noting_model().train()
    one, other = token_ids(seed=1), token_ids(seed=2)
    expected = [step(model, ids)[1] for ids in (one, other)]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    (model(input_ids=one, labels=one).loss + model(input_ids=other, labels=other).loss).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[0][name] + expected[1][name], msg=name)


def test_losses_are_added_in_training_only():
    ids, model = token_ids(), noting_model()
    plain = model.eval()(input_ids=ids, labels=ids).loss
    extra = model.base_model.auxiliary_loss()
    torch.testing.assert_close(extra, torch.tensor(2 * 32 * 0.01))
    trained = model.train()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(trained, plain + extra)


def test_inputs_of_the_tuner_do_not_reach_the_base_model():
    ids, model = token_ids(), noting_model().eval()
    with model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(model(ids, scale=0.0).logits, base)
    assert not torch.equal(model(ids).logits, base)


def test_generation_with_a_cache_equals_generation_without():
    model, ids = noting_model().eval(), token_ids(rows=1)
    cached, plain = (
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_a_copied_model_has_its_own_passes():
    model, ids = noting_model().train(), token_ids()
    expected, _ = step(model, ids)
    copied = copy.deepcopy(model)
    assert copied.base_model.passes is not model.base_model.passes
    loss, _ = step(copied, ids)
    assert torch.equal(loss, expected)
    assert copied.base_model.passes._last is not model.base_model.passes._last


def test_unloading_removes_the_hooks():
    model = noting_model().train()
    model.gradient_checkpointing_enable()
    step(model, token_ids())
    base = model.unload()
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    functions = [m._gradient_checkpointing_func for m in base.modules()
                 if hasattr(m, "_gradient_checkpointing_func")]  # fmt: skip
    assert functions
    assert all("Replaying" not in type(function).__name__ for function in functions)


def test_a_failed_forward_leaves_no_pass_open():
    model = noting_model()
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10_000))
    assert model.base_model.passes._open is None


def test_a_layer_outside_of_any_model_gets_an_empty_pass():
    current = Passes().current
    assert isinstance(current, ForwardPass)
    assert not current.notes


def test_a_pass_runs_within_a_forward_and_nowhere_else():
    model = noting_model()
    passes, seen = model.base_model.passes, []
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(passes.running))
    assert passes.running is None
    model(input_ids=token_ids())
    assert isinstance(seen.pop(), ForwardPass)
    assert passes.running is None
    model.base_model.model.model(token_ids())  # a part of the model, after a forward of the whole
    assert seen == [None]


def test_real_tokens_are_those_of_the_mask_at_the_end():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    one = ForwardPass(attention_mask=mask)
    assert torch.equal(one.real_tokens(torch.Size((2, 4, 8))), mask.bool())
    assert torch.equal(one.real_tokens(torch.Size((2, 1, 8))), mask[:, -1:].bool())
    assert one.real_tokens(torch.Size((2, 8))) is None
    assert one.real_tokens(torch.Size((2, 5, 8))) is None
    assert ForwardPass().real_tokens(torch.Size((2, 4, 8))) is None
