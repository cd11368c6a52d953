"""Queryable LoRA: what a token may see, and blocks that run again, from a cache or compiled."""

import copy

import pytest
import torch
import transformers
from _queryable import (
    Net,
    adapted,
    adapters,
    inputs,
    language_model,
    memory_of,
    prompt_mask,
    routings,
)
from conftest import perturb, token_ids
from torch import Tensor

from sparing.adapt import (
    prompt_routing,
)
from sparing.errors import ConfigError, DataError

# Causality and granularity.


def test_later_tokens_never_change_earlier_outputs() -> None:
    """Oracle 11."""
    model, ids = language_model(), token_ids()
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 5) % 64
    before, after = model(ids).logits, model(other).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_sequence_routing_looks_at_the_prompt_only() -> None:
    """Oracle 11."""
    model, ids = language_model(granularity="sequence"), token_ids()
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 5) % 64
    before = model(ids, prompt_mask=prompt_mask()).logits
    after = model(other, prompt_mask=prompt_mask()).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert routings(model)[0].weights.shape == (2, 4)
    in_prompt = ids.clone()
    in_prompt[:, 2] = (in_prompt[:, 2] + 5) % 64
    changed = model(in_prompt, prompt_mask=prompt_mask()).logits
    assert not torch.allclose(changed[:, :2], before[:, :2])


def test_padding_does_not_enter_the_mean_of_a_prompt() -> None:
    model, ids = language_model(granularity="sequence"), token_ids(rows=1, length=6)
    model(ids, prompt_mask=torch.ones(1, 6))
    expected = routings(model)[1].weights
    padded = torch.cat([torch.full((1, 3), 7), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(padded, attention_mask=mask, position_ids=positions, prompt_mask=torch.ones(1, 9))
    torch.testing.assert_close(routings(model)[1].weights, expected)


def test_a_causal_model_needs_to_know_the_prompt() -> None:
    model, ids = language_model(granularity="sequence"), token_ids()
    with pytest.raises(DataError, match="prompt_routing"):
        model(ids)
    with pytest.raises(DataError, match=r"shape \(2, 12\)"):
        model(ids, prompt_mask=torch.ones(2, 3))
    with pytest.raises(DataError, match="prompt_routing"):
        model.generate(input_ids=ids, max_new_tokens=2)


def test_an_encoder_takes_its_whole_input_as_the_prompt() -> None:
    torch.manual_seed(0)
    base = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=64,
        )
    ).eval()
    ids, mask = token_ids(length=8), (torch.arange(8) < 5).long().expand(2, 8)
    for granularity in ("token", "sequence"):
        model = adapted(copy.deepcopy(base), granularity=granularity, block_state="mean")
        before = model(ids, attention_mask=mask).last_hidden_state
        ids_too = torch.cat([ids[:, :5], ids[:, 5:].flip(1)], 1)
        after = model(ids_too, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(after[:, :5], before[:, :5])
    adapted(copy.deepcopy(base), target_modules="all-linear")(ids)  # the pooler sees one token


def test_rows_without_tokens_are_routed_by_themselves() -> None:
    model, x = adapted(granularity="sequence"), inputs()[:, 0]
    torch.testing.assert_close(model(x), model(x[:, None])[:, 0])


def test_generation_within_prompt_routing_equals_generation_without_a_cache() -> None:
    model, ids = language_model(granularity="sequence", noise=0.5), token_ids(length=5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with prompt_routing(model, input_ids=ids, attention_mask=mask):
        cached, plain, beams = (
            model.generate(**options, **more)
            for more in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3})
        )
    assert torch.equal(cached, plain)
    assert beams.shape[0] == 2
    kept = memory_of(model).kept
    assert kept is None
    rows = []
    for row in range(2):  # each row is routed by its own prompt
        real = mask[row].bool()
        with prompt_routing(model, input_ids=ids[row : row + 1, real]):
            alone = model.generate(
                input_ids=ids[row : row + 1, real], max_new_tokens=5, do_sample=False
            )
        rows.append(alone[0, -5:])
    assert torch.equal(torch.stack(rows), cached[:, -5:])


def test_the_kept_routing_is_that_of_the_prompt() -> None:
    model, ids = language_model(granularity="sequence"), token_ids()
    whole = model(ids, prompt_mask=prompt_mask()).logits
    with prompt_routing(model, input_ids=ids[:, :4]):
        torch.testing.assert_close(model(ids).logits, whole)


def test_token_routing_needs_no_prompt() -> None:
    with (
        pytest.raises(ConfigError, match="generate directly"),
        prompt_routing(language_model(), input_ids=token_ids()),
    ):
        pass


# Where blocks run again, or in another way.


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 2, "block_state": "mean", "atom_rank": 2},
        {"depth_summary": "ema", "shared_memory": False},
        {"granularity": "sequence", "top_k": 2, "balance_weight": 0.1},
        {"routing": "constant", "instruction": "both", "instruction_width": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("plain", [False, True], ids=["transformers", "torch"])
def test_checkpointing_changes_no_gradient(options, plain) -> None:
    found = []
    for checkpointed in (False, True):
        if plain:
            model = adapted(Net(checkpointed=checkpointed), **options).train()
            arguments = {"x": inputs()}
        else:
            model = language_model(**options).train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            arguments = {"input_ids": token_ids(), "prompt_mask": prompt_mask()}
        if "instruction" in options:
            model.set_instruction(torch.ones(7))
        output = model(**arguments)
        loss = output.square().sum() if plain else output.logits.square().sum()
        if model.base_model.auxiliary_loss() is not None:
            loss = loss + model.base_model.auxiliary_loss()
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_it_compiles_to_one_graph() -> None:
    model, ids = language_model(block_size=1), token_ids()
    expected = model(ids).logits
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(ids).logits, expected)
    assert len(graphs) == 1


def test_a_part_of_the_model_cannot_be_called_alone() -> None:
    model, ids = language_model(), token_ids()
    model(ids)
    with pytest.raises(ConfigError, match="call of a part"):
        model.base_model.model.model(ids)


def test_a_copy_routes_as_the_original_and_by_itself() -> None:
    model, x = adapted(block_state="mean"), inputs()
    expected = model(x)
    copied = copy.deepcopy(model)
    perturb(model)
    assert torch.equal(copied(x), expected)
    assert memory_of(copied) is not memory_of(model)
    assert adapters(copied)["blocks.0.up"].memory is memory_of(copied)


def test_layers_that_see_other_tokens_are_named() -> None:
    class Pooled(Net):
        def forward(self, x: Tensor) -> Tensor:
            block = self.blocks[0]
            return block.down(block.up(x)[:, 0])

    with pytest.raises(ConfigError, match=r"'blocks\.0\.down'.*exclude_modules"):
        adapted(Pooled())(inputs())
