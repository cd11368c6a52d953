"""Queryable LoRA: instructions, reports, frozen routing, losses and atoms for another task."""

import math

import peft
import pytest
import torch
import transformers
from _queryable import Net, Words, adapted, adapters, inputs, language_model, memory_of, routings
from conftest import small_llama, token_ids
from safetensors.torch import load_file

from sparing import pretrained
from sparing.adapt import (
    TunerCallback,
    freeze_routing,
    routing_report,
)
from sparing.errors import ConfigError, DataError

# Instructions.


def instructed(**options: object) -> peft.PeftModel:
    return adapted(**({"instruction": "prior", "instruction_width": 7} | options))


@pytest.mark.parametrize("kind", ["prior", "query", "both"])
@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("routing", ["state", "constant"])
def test_each_row_follows_its_own_instruction(kind, granularity, routing) -> None:
    model = instructed(instruction=kind, granularity=granularity, routing=routing)
    x, asked = inputs(), torch.randn(2, 7)
    together = model(x, instruction=asked)
    for row in range(2):
        alone = model(x[row : row + 1], instruction=asked[row])
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.allclose(model(x, instruction=asked.flip(0)), together)
    model.set_instruction(asked)
    torch.testing.assert_close(model(x), together)
    model.set_instruction(None)
    assert not torch.allclose(model(x), together)
    flat = model(x[:, 0], instruction=asked) if granularity == "token" else None
    if flat is not None:
        torch.testing.assert_close(flat, together[:, 0])


def test_without_an_instruction_the_state_alone_routes() -> None:
    model, plain = instructed(), adapted()
    shared = plain.state_dict()
    plain.load_state_dict({name: model.state_dict()[name] for name in shared})
    assert torch.equal(model(inputs()), plain(inputs()))


def test_text_goes_through_the_models_own_tokenizer_and_embeddings(monkeypatch) -> None:
    model, ids = language_model(instruction="prior"), token_ids()
    text = "translate"
    mean = model.get_input_embeddings().weight[[ord(c) % 64 for c in text]].mean(0)
    expected = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
    model.set_instruction(text, tokenizer=Words())
    torch.testing.assert_close(memory_of(model).instruction, expected)
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda name: Words() if name == "hub" else 0)
    model.base_model.model.config.name_or_path = "hub"
    model.set_instruction([text, "sum"])
    torch.testing.assert_close(memory_of(model).instruction[0], expected)
    output = model(ids).logits
    model.set_instruction(["sum", text])
    assert not torch.allclose(model(ids).logits, output)


def test_generation_follows_an_instruction_for_each_row() -> None:
    model, ids = language_model(instruction="prior", noise=0.5), token_ids(length=5)
    model.set_instruction(["add", "sum"], tokenizer=Words())
    options = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
    cached = model.generate(**options)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    assert model.generate(**options, num_beams=2).shape == cached.shape


def test_a_users_encoder_embeds_the_text() -> None:
    model = instructed()
    model.set_instruction("any", encoder=lambda texts: torch.full((len(texts), 7), 0.5))
    assert torch.equal(memory_of(model).instruction, torch.full((7,), 0.5))


def test_an_instruction_is_not_saved(tmp_path) -> None:
    model = instructed()
    model.set_instruction(torch.ones(7))
    model.save_pretrained(tmp_path)
    assert not any("instruction" in n for n in load_file(tmp_path / "adapter_model.safetensors"))


def test_described_atoms_attract_instructions_like_their_description(tmp_path) -> None:
    model = instructed(described_atoms=True, prior_beta=1e3, noise=0.0)
    with pytest.raises(ConfigError, match="describe_atoms first"):
        model.set_instruction(torch.ones(7))
    descriptions = 3 * torch.eye(4, 7)
    model.describe_atoms(descriptions)
    memory_of(model).router.w_i.data = torch.eye(5, 7)
    for atom in range(4):
        model.set_instruction(descriptions[atom])
        assert routing_report(model, x=inputs()).mean.argmax(1).tolist() == [atom] * 4
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path).double().eval()
    loaded.set_instruction(descriptions[1])
    assert routing_report(loaded, x=inputs()).mean.argmax(1).tolist() == [1] * 4
    with pytest.raises(DataError, match="4 of width 7"):
        model.describe_atoms(torch.ones(3, 7))
    with pytest.raises(ConfigError, match="described_atoms"):
        instructed().describe_atoms(torch.ones(4, 7))


def test_bad_instructions_are_refused() -> None:
    model = instructed()
    with pytest.raises(DataError, match="instruction_width"):
        model.set_instruction(torch.ones(5))
    with pytest.raises(DataError, match="instruction_width"):
        model(inputs(), instruction=torch.ones(2, 6))
    with pytest.raises(DataError, match="as many as there are rows"):
        model(inputs(3), instruction=torch.ones(2, 7))
    with pytest.raises(ConfigError, match="instruction='prior'"):
        adapted().set_instruction(torch.ones(7))
    with pytest.raises(ConfigError, match="token embeddings"):
        model.set_instruction("text", tokenizer=Words())
    with pytest.raises(ConfigError, match="instruction_width"):
        adapted(instruction="prior")
    language = language_model(instruction="prior")
    with pytest.raises(DataError, match="at least one token"):
        language.set_instruction("", tokenizer=Words())
    with pytest.raises(ConfigError, match="tokenizer="):
        language.set_instruction("text")
    with pytest.raises(ConfigError, match="'other'"):
        language.set_instruction("text", adapter_name="other")


# Fixed routing.


def test_merging_is_refused_and_the_export_is_offered() -> None:
    with pytest.raises(ConfigError, match=r"depends on its input.*freeze_routing"):
        language_model().merge_adapter()
    with pytest.raises(ConfigError, match="freeze_routing"):
        adapters(language_model())["model.layers.0.self_attn.q_proj"].delta_weight()


def test_freezing_on_an_instruction_takes_its_prior(tmp_path) -> None:
    """With b_q = 0 and constant routing p = π(I), so the LoRA is exact."""
    model = language_model(instruction="prior", routing="constant")
    memory_of(model).router.b_q.data.zero_()
    model.set_instruction("sum", tokenizer=Words())
    ids = token_ids()
    weights = freeze_routing(model, tmp_path / "lora", instruction="sum", tokenizer=Words())
    torch.testing.assert_close(weights, routing_report(model, input_ids=ids).mean)
    lora = peft.PeftModel.from_pretrained(small_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(lora(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_freezing_on_data_takes_the_mean_over_real_tokens(tmp_path) -> None:
    model, ids = language_model(), token_ids()
    mask = (torch.arange(12) < 9).long().expand(2, 12)
    batches = [{"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in (0, 1)]
    weights = freeze_routing(model, tmp_path / "lora", calibration=batches)
    model(ids, attention_mask=mask)
    expected = torch.stack([r.weights[:, :9].mean((0, 1)) for r in routings(model).values()])
    torch.testing.assert_close(weights, expected)
    lora = peft.PeftModel.from_pretrained(small_llama(), tmp_path / "lora").eval()
    base = small_llama()(ids).logits
    away = (model(ids).logits - base).norm()
    assert (model(ids).logits - lora(ids).logits).norm() < 0.5 * away


def test_what_cannot_be_frozen_is_said(tmp_path) -> None:
    model, batch = language_model(), {"input_ids": token_ids()}
    with pytest.raises(ConfigError, match="found neither"):
        freeze_routing(model, tmp_path / "lora")
    with pytest.raises(ConfigError, match="found both"):
        freeze_routing(model, tmp_path / "lora", instruction="a", calibration=[batch])
    with pytest.raises(ConfigError, match="instruction prior"):
        freeze_routing(model, tmp_path / "lora", instruction="a")
    with pytest.raises(DataError, match="at least one batch"):
        freeze_routing(model, tmp_path / "lora", calibration=[])
    many = language_model(instruction="prior")
    with pytest.raises(DataError, match="one instruction"):
        freeze_routing(many, tmp_path / "lora", instruction=torch.ones(2, 32))
    lora = peft.get_peft_model(Net(), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match="QueryableLoRAConfig"):
        freeze_routing(lora, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_the_report_tells_where_tokens_go() -> None:
    model, ids = language_model(top_k=1).train(), token_ids()
    report = routing_report(model, input_ids=ids)
    assert model.training
    first = report.blocks[0]
    assert first.weights.shape == (2, 12, 4)
    assert "model.layers.0.self_attn.q_proj" in first.modules
    assert all("layers.0" in name for name in first.modules)
    torch.testing.assert_close(first.mean, first.weights.mean((0, 1)))
    assert first.entropy == 0
    assert len(str(report).splitlines()) == 3
    with model.disable_adapter(), pytest.raises(ConfigError, match="active"):
        routing_report(model, input_ids=ids)


# Training: losses, warm-up, and atoms for another task.


def test_the_balance_loss_is_one_if_atoms_share_the_tokens_and_m_over_k_if_they_do_not() -> None:
    model = adapted(top_k=2, balance_weight=1.0).train()
    with torch.no_grad():
        memory_of(model).atoms.keys.zero_()  # ties: always the first two atoms, half each
    model(inputs())
    assert model.base_model.auxiliary_loss().item() == pytest.approx(4 * 2 * 0.25)
    dense = adapted(balance_weight=1.0).train()
    dense(inputs())
    assert dense.base_model.auxiliary_loss() is None
    model.eval()(inputs())
    assert model.base_model.auxiliary_loss() is None


def test_padding_does_not_enter_the_losses() -> None:
    model = language_model(top_k=2, balance_weight=1.0, entropy_weight=1.0).train()
    ids = token_ids()
    mask = (torch.arange(12) < 9).long().expand(2, 12)
    model(ids, attention_mask=mask)
    padded = model.base_model.auxiliary_loss()
    model(ids[:, :9])
    torch.testing.assert_close(padded, model.base_model.auxiliary_loss())
    model(ids)
    assert not torch.allclose(padded, model.base_model.auxiliary_loss())


def test_the_entropy_loss_lifts_weights_to_its_floor_only() -> None:
    model = adapted(entropy_weight=1.0, entropy_floor=0.9).train()
    with torch.no_grad():
        memory_of(model).atoms.keys.zero_()
    model(inputs())
    assert model.base_model.auxiliary_loss() == 0
    with torch.no_grad():
        memory_of(model).atoms.keys.normal_(std=300.0)
    model(inputs())
    assert model.base_model.auxiliary_loss().item() == pytest.approx(0.9 * math.log(4), rel=0.15)


def test_constant_weights_are_held_to_the_floor_too() -> None:
    model = adapted(routing="constant", entropy_weight=1.0, entropy_floor=1.0).train()
    model(inputs())
    weights = routings(model)[0].weights
    assert weights.shape == (4,)
    expected = math.log(4) + (weights * weights.log()).sum()
    torch.testing.assert_close(model.base_model.auxiliary_loss(), expected)


def test_all_atoms_learn_during_the_dense_steps_and_k_afterwards(tmp_path) -> None:
    model = language_model(top_k=1, dense_steps=2)
    counts = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs) -> None:
            counts.append((routings(model)[0].weights > 0).sum(-1).max().item())

    ids = token_ids(rows=4)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    items = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(
        model=model, args=arguments, train_dataset=items, callbacks=[TunerCallback(), Watch()]
    ).train()
    assert counts == [4, 4, 1, 1]
    fresh = language_model(top_k=1, dense_steps=2)
    fresh(ids)
    assert (routings(fresh)[0].weights > 0).sum(-1).max() == 1  # evaluation is never dense


def test_extending_freezes_what_was_learned_and_trains_new_atoms_and_the_router(tmp_path) -> None:
    model, x = instructed(), inputs()
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    old_atoms = memory_of(model).atoms.dense().detach().clone()
    model.extend_atoms(3)
    atoms = memory_of(model).atoms
    assert memory_of(model).config.num_atoms == 7
    assert torch.equal(atoms.dense()[:, :4], old_atoms)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition("shared.default.")[2] for name in trainable} == {
        *("atoms.keys", "atoms.values", "atoms.prior_keys"),
        *("router.b_q", "router.w_h", "router.w_z", "router.w_b", "router.w_i"),
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(x, instruction=torch.ones(7))
    before.square().sum().backward()
    optimizer.step()
    assert torch.equal(atoms.dense()[:, :4], old_atoms)
    for name, adapter in adapters(model).items():
        key = f"base_model.model.{name}.queryable_lora_adapter.default"
        assert torch.equal(adapter.a, old[f"{key}.a"])
        assert torch.equal(adapter.b, old[f"{key}.b"])
    assert not torch.allclose(model(x, instruction=torch.ones(7)), before)
    model.set_adapter("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True).double().eval()
    expected = model(x, instruction=torch.ones(7))
    torch.testing.assert_close(loaded(x, instruction=torch.ones(7)), expected, rtol=1e-4, atol=1e-4)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    loaded.extend_atoms(1)
    assert memory_of(loaded).atoms.dense().shape[1] == 8
    with pytest.raises(ConfigError, match="at least 1"):
        model.extend_atoms(0)


def test_extending_keeps_the_number_of_mixed_atoms() -> None:
    model = adapted(top_k=2)
    model.extend_atoms(3)
    assert memory_of(model).config.top_k == 2
    dense = adapted()
    dense.extend_atoms(20)
    assert memory_of(dense).router.top_k == 24
