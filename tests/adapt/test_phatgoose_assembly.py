"""PHATGOOSE on whole models: adapters of any origin in, one routed model out."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from conftest import perturb, small_gpt2, small_llama, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from sparing.adapt import (
    MoSConfig,
    NeuroAdaConfig,
    PhatgooseConfig,
    adapters_in,
    assemble,
    expert_layers,
    export_unrouted,
    gate_model,
    has_keys,
    routing_statistics,
    save_average_inputs,
    save_gates,
    set_mode,
    train_gates,
)
from sparing.adapt._phatgoose_experts import low_rank
from sparing.data.blocks import Batch, Blocks
from sparing.errors import CheckpointError, ConfigError
from sparing.tuners import TunerLayer

ADAPTERS = {
    "wide": {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"},
    "narrow": {"r": 2, "lora_alpha": 1, "target_modules": ["q_proj", "down_proj"]},
    "stable": {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
}


def write_adapter(base: nn.Module, folder: Path, *, seed: int = 0, **options: object) -> Path:
    """A LoRA of PEFT that does something."""
    config = LoraConfig(**({"task_type": "CAUSAL_LM"} | options))  # type: ignore[arg-type]
    model = get_peft_model(copy.deepcopy(base), config)
    perturb(model, 0.3, seed=seed)
    model.save_pretrained(str(folder))
    return folder


def write_gates(folder: Path, seed: int = 0) -> None:
    """Random gates, as if trained."""
    from sparing.adapt._phatgoose_keys import save_keys

    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "adapter_model.safetensors")
    widths = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[1]
        for key, tensor in tensors.items()
        if "lora_A" in key
    }
    save_keys(folder, "gate", {m: torch.randn(w, generator=generator) for m, w in widths.items()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three LoRAs with gates; ranks, scales and modules differ."""
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        write_adapter(small_llama(), tmp_path / name, seed=seed, **options)
        write_gates(tmp_path / name, seed)
    return tmp_path


def routed(folder: Path, base: nn.Module | None = None, **options: object) -> PeftModel:
    base = small_llama() if base is None else base
    return assemble(base, adapters_in(folder), **options).eval()  # type: ignore[arg-type]


def stock(folder: Path, base: nn.Module | None = None) -> PeftModel:
    base = small_llama() if base is None else base
    return PeftModel.from_pretrained(base, str(folder)).eval()


def blocks(rows: int = 16, seed: int = 0) -> Blocks:
    ids = token_ids(rows, seed=seed)
    return Blocks(Batch(ids, torch.ones_like(ids), ids))


# What is assembled.


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_expert_alone_is_its_adapter_in_stock_peft(folder, name) -> None:
    """Oracle 11, with ranks, scales (also rank-stabilised) and modules of their own."""
    model, ids = routed(folder), token_ids()
    set_mode(model, "single", name)
    torch.testing.assert_close(model(ids).logits, stock(folder / name)(ids).logits)


def test_the_papers_scale_is_stock_lora_with_alpha_1(tmp_path) -> None:
    """Oracle 11: r = 16, lora_alpha = 1, and a PhatgooseConfig trained as step 1 is the same."""
    base, ids = small_llama(), token_ids()
    write_adapter(base, tmp_path / "lora", r=16, lora_alpha=1, target_modules="all-linear")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    mine = get_peft_model(copy.deepcopy(base), PhatgooseConfig(target_modules="all-linear")).eval()
    for name, adapter in expert_layers(mine).items():
        with torch.no_grad():
            adapter.a.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
            adapter.b.copy_(tensors[f"base_model.model.{name}.lora_B.weight"].t())
    expected = stock(tmp_path / "lora")(ids).logits
    torch.testing.assert_close(mine(ids).logits, expected)
    mine.save_pretrained(str(tmp_path / "ours"))
    model = assemble(small_llama(), [tmp_path / "ours"], key="arrow", top_k=1)
    torch.testing.assert_close(model(ids).logits, expected)


def test_patterns_of_rank_and_alpha_are_read(tmp_path) -> None:
    options = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.q_proj": 7}}
    write_adapter(
        small_llama(), tmp_path / "x", r=2, target_modules=["q_proj", "o_proj"], **options
    )
    model, ids = assemble(small_llama(), [tmp_path / "x"], key="arrow", top_k=1), token_ids()
    assert set(expert_layers(model)["model.layers.1.self_attn.q_proj"].ranks) == {5}
    torch.testing.assert_close(model(ids).logits, stock(tmp_path / "x")(ids).logits)


def test_modules_are_those_that_any_expert_adapts(folder) -> None:
    layers = expert_layers(routed(folder))
    ranks = {name.rsplit(".", 1)[1]: adapter.ranks for name, adapter in layers.items()}
    assert ranks["q_proj"] == [2, 3, 4]  # alphabetical: narrow, stable, wide
    assert ranks["down_proj"] == [2, 0, 4]
    assert ranks["gate_proj"] == [0, 0, 4]


def test_gates_reach_the_modules_that_they_were_made_for(folder) -> None:
    saved = load_file(folder / "wide" / "gates.safetensors")
    layers = expert_layers(routed(folder))
    for name, adapter in layers.items():
        assert torch.equal(adapter.keys[2], saved[name])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("key", ["gate", "arrow", "mean_row", "random"])
def test_a_saved_collection_loads_to_the_same_output(
    folder, tmp_path, key, low_cpu_mem_usage
) -> None:
    model, ids = routed(folder, key=key), token_ids()
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(
        small_llama(), str(tmp_path / "saved"), low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    config = loaded.peft_config["default"]
    assert config.experts == ["narrow", "stable", "wide"]
    set_mode(loaded, "single", "stable")
    torch.testing.assert_close(loaded(ids).logits, stock(folder / "stable")(ids).logits)


def test_copies_choose_their_modes_apart(folder) -> None:
    model, ids = routed(folder), token_ids()
    before, copied = model(ids).logits, copy.deepcopy(model)
    set_mode(copied, "merged")
    assert not torch.allclose(copied(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


def test_padding_and_batch_do_not_change_a_token(folder) -> None:
    """Oracle 10: tokens are routed one by one."""
    model, ids = routed(folder).double(), token_ids(rows=3, length=10)
    padded = torch.cat([torch.full((3, 4), 2), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(ids[1:2]).logits, model(ids).logits[1:2], rtol=0, atol=1e-10)


def test_decoding_with_a_cache_is_decoding_without(folder) -> None:
    """Oracle 10."""
    model, ids = routed(folder).double(), token_ids(rows=1)
    whole = model(ids).logits
    first = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 7:], rtol=0, atol=1e-10)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))


def test_bfloat16_base_routes_in_float32(folder) -> None:
    model, ids = routed(folder, small_llama(torch.bfloat16)), token_ids()
    output = model(ids).logits
    assert output.dtype == torch.bfloat16
    assert torch.isfinite(output).all()
    adapter = next(iter(expert_layers(model).values()))
    x = torch.randn(2, adapter.a.shape[1], dtype=torch.bfloat16)
    assert adapter.routing_weights(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter.scores(x.float()).dtype == torch.float32


def test_conv1d_layers_are_routed_too(tmp_path) -> None:
    base, ids = small_gpt2(), token_ids()
    for seed, name in enumerate(("x", "y")):
        options = {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
        write_adapter(base, tmp_path / name, seed=seed, **options)
    model = routed(tmp_path, copy.deepcopy(base), key="arrow")
    set_mode(model, "single", "y")
    expected = stock(tmp_path / "y", copy.deepcopy(base))(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    set_mode(model, "merged")
    export_unrouted(model, tmp_path / "out" / "merged")
    expected = model(ids).logits
    found = stock(tmp_path / "out" / "merged", copy.deepcopy(base))(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Nested(nn.Module):
    """Two layers, of which one name is the end of the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["proj"](self.proj(x))


def test_a_module_whose_name_is_the_end_of_another_is_adapted_alone(tmp_path) -> None:
    file = write_adapter(Nested(), tmp_path / "x", r=2, target_modules="proj", task_type=None)
    model = assemble(Nested(), [file], key="arrow", top_k=1)
    assert list(expert_layers(model)) == ["proj"]
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), stock(file, Nested())(x))
    set_mode(model, "single")
    export_unrouted(model, tmp_path / "out" / "x")
    torch.testing.assert_close(stock(tmp_path / "out" / "x", Nested())(x), model(x))


# Merging and export.


def test_a_routed_model_cannot_be_merged_and_stays_whole(folder) -> None:
    base, ids = small_llama(), token_ids()
    weight = base.model.layers[0].self_attn.q_proj.weight.clone()
    model = routed(folder, base)
    before = model(ids).logits
    with pytest.raises(ConfigError, match="depends on its input"):
        model.merge_adapter()
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.unload().model.layers[0].self_attn.q_proj.weight, weight)


@pytest.mark.parametrize(("mode", "expert"), [("merged", None), ("single", "stable")])
def test_export_and_merge_give_what_the_mode_computes(folder, tmp_path, mode, expert) -> None:
    """Oracle 12."""
    model, ids = routed(folder), token_ids()
    set_mode(model, mode, expert)
    expected = model(ids).logits
    export_unrouted(model, tmp_path / "out" / mode)
    torch.testing.assert_close(
        stock(tmp_path / "out" / mode)(ids).logits, expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_exporting_one_expert_gives_back_its_numbers(folder, tmp_path) -> None:
    model = routed(folder)
    set_mode(model, "single", "narrow")
    export_unrouted(model, tmp_path / "out" / "narrow")
    original = load_file(folder / "narrow" / "adapter_model.safetensors")
    exported = load_file(tmp_path / "out" / "narrow" / "adapter_model.safetensors")
    assert original.keys() == exported.keys()
    assert all(torch.equal(original[key], exported[key]) for key in original)


def test_what_is_routed_cannot_be_exported(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="chosen for each token"):
        export_unrouted(routed(folder), tmp_path / "out" / "x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mode", "expert"), [("gate_train", None), ("fast", None), ("single", "nobody")]
)
def test_modes_and_experts_that_do_not_exist_are_refused(folder, mode, expert) -> None:
    with pytest.raises(ConfigError):
        set_mode(routed(folder), mode, expert)


# Adapters of other kinds.


def test_mos_adapters_are_experts(tmp_path) -> None:
    base, ids = small_llama(), token_ids()
    config = MoSConfig(r=3, budget_rank=2, target_modules=["q_proj", "v_proj"])
    mos = get_peft_model(copy.deepcopy(base), config).eval()
    perturb(mos, 0.3)
    mos.save_pretrained(str(tmp_path / "mos"))
    write_adapter(base, tmp_path / "lora", r=2, target_modules=["q_proj"])
    model = routed(tmp_path, copy.deepcopy(base), key="arrow")
    assert expert_layers(model)["model.layers.0.self_attn.q_proj"].ranks == [2, 3]
    set_mode(model, "single", "mos")
    torch.testing.assert_close(model(ids).logits, mos(ids).logits)


def test_adapters_that_are_not_low_rank_are_refused(tmp_path) -> None:
    model = get_peft_model(small_llama(), NeuroAdaConfig(k=2, target_modules=["q_proj"]))
    perturb(model, 0.3)
    model.save_pretrained(str(tmp_path / "sparse"))
    base = small_llama()
    with pytest.raises(CheckpointError, match=r"q_proj.*whose effect is not"):
        assemble(base, [tmp_path / "sparse"], key="arrow", top_k=1)
    assert not any(isinstance(module, TunerLayer) for module in base.modules())


def test_an_exactly_low_rank_matrix_is_factored_without_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(20, 3, generator=generator), torch.randn(3, 30, generator=generator)
    found = low_rank(b @ a)
    assert found is not None
    assert found.a.shape == (3, 30)
    torch.testing.assert_close(found.b @ found.a, b @ a)
    assert low_rank(torch.randn(20, 30, generator=generator)) is None


# Gates and average inputs.


def test_gate_training_sees_the_frozen_expert(folder) -> None:
    """Oracle 2 on a model, and the pitfall of training gates beside a fresh expert."""
    model, ids = gate_model(small_llama(), folder / "wide"), token_ids()
    tensors = load_file(folder / "wide" / "adapter_model.safetensors")
    for name, adapter in expert_layers(model).items():
        assert torch.equal(adapter.a, tensors[f"base_model.model.{name}.lora_A.weight"])
        assert adapter.keys.abs().max() == 0
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 14
    assert all(name.endswith(".keys") for name in trainable)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_training_gates_writes_them_beside_the_expert_and_frees_the_base(folder) -> None:
    base, ids = small_llama(), token_ids()
    (folder / "wide" / "gates.safetensors").unlink()
    before, steps = base(ids).logits, []
    assert not has_keys(folder / "wide")
    file = train_gates(
        base, folder / "wide", blocks(), steps=4, batch_size=4, on_step=lambda s, _: steps.append(s)
    )
    assert file == folder / "wide" / "gates.safetensors"
    assert steps == [1, 2, 3, 4]
    gates = load_file(file)
    assert set(gates) == set(dict(small_llama().named_modules())) & set(gates)
    assert len(gates) == 14
    for gate in gates.values():
        assert gate.dim() == 1
        # AdamW at 5e-3 and a warm-up of one step: no entry moved further than 4 steps.
        assert 0 < gate.abs().max() <= 4 * 5e-3 * 1.01
    assert torch.equal(base(ids).logits, before)
    assert not any(isinstance(module, TunerLayer) for module in base.modules())
    assert sorted(p.name for p in folder.glob("wide/.*")) == []


def test_gates_that_are_there_are_kept_unless_asked(folder) -> None:
    file = folder / "wide" / "gates.safetensors"
    before = file.read_bytes()
    train_gates(small_llama(), folder / "wide", blocks(), steps=2, batch_size=4)
    assert file.read_bytes() == before
    train_gates(small_llama(), folder / "wide", blocks(), steps=2, batch_size=4, again=True)
    assert file.read_bytes() != before


def test_gates_are_the_same_for_the_same_seed(folder) -> None:
    found = []
    for seed in (0, 0, 1):
        options = {"steps": 3, "batch_size": 4, "seed": seed, "again": True}
        found.append(load_file(train_gates(small_llama(), folder / "narrow", blocks(), **options)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_interrupted_gate_training_leaves_no_gates_and_goes_on_where_it_stopped(
    folder, monkeypatch
) -> None:
    from sparing.adapt import phatgoose_gates

    expert, steps = folder / "wide", []
    options = {"steps": 6, "batch_size": 4}
    whole = load_file(train_gates(small_llama(), expert, blocks(), again=True, **options))
    (expert / "gates.safetensors").unlink()
    often = phatgoose_gates.train

    def saving_every_step(*args: object, **kwargs: object) -> object:
        return often(*args, **kwargs, checkpoint_seconds=0.0)  # type: ignore[arg-type]

    def stop(step: int, loss: float) -> None:
        steps.append(step)
        if steps == [1, 2, 3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(phatgoose_gates, "train", saving_every_step)
    base = small_llama()
    with pytest.raises(KeyboardInterrupt):
        train_gates(base, expert, blocks(), on_step=stop, **options)
    assert not (expert / "gates.safetensors").exists()
    found = load_file(train_gates(base, expert, blocks(), on_step=stop, **options))
    assert steps[:3] == [1, 2, 3]
    assert steps[3] in (3, 4)  # the third step had been taken, but not been saved
    assert steps[-1] == 6
    for name, gate in whole.items():
        torch.testing.assert_close(found[name], gate)


def test_average_inputs_are_means_over_tokens_that_are_no_padding(folder) -> None:
    ids = token_ids(rows=2, length=6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    base, name = small_llama(), "model.layers.0.self_attn.q_proj"
    batch = {"input_ids": ids, "attention_mask": mask}
    file = save_average_inputs(base, folder / "narrow", [batch])
    hidden = base.model.layers[0].input_layernorm(base.model.embed_tokens(ids))
    torch.testing.assert_close(load_file(file)[name], hidden[mask.bool()].mean(dim=0))
    with pytest.raises(ConfigError, match="at least one batch"):
        save_average_inputs(base, folder / "narrow", [])


def test_average_inputs_route_as_gates_do(folder, tmp_path) -> None:
    for seed, name in enumerate(ADAPTERS):
        save_average_inputs(small_llama(), folder / name, blocks(seed=seed))
    model = routed(folder, key="average")
    saved = load_file(folder / "wide" / "average_inputs.safetensors")
    for name, adapter in expert_layers(model).items():
        assert torch.equal(adapter.keys[2], saved[name])
    assert torch.isfinite(model(token_ids()).logits).all()


# Encoder-decoders.


def small_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def test_t5_is_gated_routed_and_decoded(tmp_path) -> None:
    """Every linear of encoder and decoder; cross-attention k and v see encoder outputs."""
    batch = {"input_ids": token_ids(), "labels": token_ids(length=5, seed=1)}
    for seed, name in enumerate(("x", "y")):
        options = {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}
        write_adapter(small_t5(), tmp_path / name, seed=seed, **options)
        model = gate_model(small_t5(), tmp_path / name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
        save_gates(model, tmp_path / name)
        save_average_inputs(small_t5(), tmp_path / name, [batch])
    model = routed(tmp_path, small_t5())
    layers = expert_layers(model)
    assert len(layers) == 4 + 3 + 2 * 4 + 3
    assert layers["decoder.block.0.layer.2.DenseReluDense.wo"].keys.shape == (2, 40)
    assert all(adapter.keys.abs().max() > 0 for adapter in layers.values())
    options = {"max_new_tokens": 5, "do_sample": False}
    cached = model.generate(input_ids=batch["input_ids"], use_cache=True, **options)
    uncached = model.generate(input_ids=batch["input_ids"], use_cache=False, **options)
    assert torch.equal(cached, uncached)
    seen: list[int] = []
    cross = layers["decoder.block.0.layer.1.EncDecAttention.k"]
    cross.observer = lambda weights: seen.append(len(weights))
    model(**batch)
    assert seen == [batch["input_ids"].numel()]


# Statistics.


def test_statistics_add_up_and_leave_padding_out(folder, tmp_path) -> None:
    model, ids = routed(folder, top_k=2), token_ids()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = routing_statistics(model, batch, batch)
    assert set(found.modules) == set(expert_layers(model))
    for module in found.modules.values():
        assert module.tokens == 2 * int(mask.sum())
        assert float(module.share.sum()) == pytest.approx(1.0)
        assert float(module.first.sum()) == module.tokens
    only_wide = found.modules["model.layers.0.mlp.gate_proj"]
    assert only_wide.share.tolist() == [0.0, 0.0, 1.0]
    assert only_wide.diversity == pytest.approx(0.0)
    assert found.token_weights.shape == (int(mask.sum()), 3)
    torch.testing.assert_close(found.token_weights.sum(dim=1), torch.ones(int(mask.sum())))
    found.write(tmp_path / "routing.json")
    content = json.loads((tmp_path / "routing.json").read_text())
    assert content["experts"] == ["narrow", "stable", "wide"]
    assert content["modules"]["model.layers.0.mlp.gate_proj"]["chosen"]["wide"] == 1.0
    assert len(content["token_weights"]) == len(content["token_ids"]) == int(mask.sum())


def test_statistics_are_those_of_the_weights(folder) -> None:
    model, ids = routed(folder, top_k=2), token_ids()
    name = "model.layers.0.self_attn.q_proj"
    found = routing_statistics(model, {"input_ids": ids}).modules[name]
    inner = model.base_model.model.model
    x = inner.layers[0].input_layernorm(inner.embed_tokens(ids)).flatten(0, 1)
    weights = expert_layers(model)[name].routing_weights(x)
    torch.testing.assert_close(found.share.float(), weights.mean(dim=0))
    assert found.chosen.sum() == 2 * len(x)


def test_checkpointing_does_not_count_tokens_twice(folder) -> None:
    model, ids = routed(folder), token_ids()
    plain = routing_statistics(model, {"input_ids": ids})
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = routing_statistics(model, {"input_ids": ids})
    assert model.training
    for name, module in plain.modules.items():
        assert again.modules[name].tokens == module.tokens == ids.numel()
    assert all(adapter.observer is None for adapter in expert_layers(model).values())


def test_statistics_need_a_routed_model(folder) -> None:
    model = routed(folder)
    set_mode(model, "merged")
    with pytest.raises(ConfigError, match="'merged'"):
        routing_statistics(model, {"input_ids": token_ids()})


# Bad input.


def test_more_experts_a_token_than_there_are_is_refused(folder) -> None:
    with pytest.raises(ConfigError, match="1 to 3, the number of experts, found 4"):
        routed(folder, top_k=4)


def test_missing_gates_are_listed_with_a_way_out(folder) -> None:
    for name in ("stable", "wide"):
        (folder / name / "gates.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"experts stable, wide: .*key='arrow'"):
        routed(folder)


def test_a_gate_missing_for_one_module_is_named(folder) -> None:
    file = folder / "narrow" / "gates.safetensors"
    gates = load_file(file)
    del gates["model.layers.1.mlp.down_proj"]
    save_file(gates, file)
    with pytest.raises(CheckpointError, match=r"narrow \(module model.layers.1.mlp.down_proj\)"):
        routed(folder)


def test_gates_of_other_weights_are_refused(folder) -> None:
    write_adapter(small_llama(), folder / "wide", seed=9, **ADAPTERS["wide"])
    with pytest.raises(CheckpointError, match="trained or replaced since"):
        routed(folder)


@pytest.mark.parametrize(
    ("gate", "found"),
    [
        (torch.randn(5), "found 5"),
        (torch.full((32,), torch.nan), "NaN"),
        (torch.ones(1, 32), "1, 32"),
    ],
)
def test_gates_that_are_no_vectors_of_the_width_are_refused(folder, gate: Tensor, found) -> None:
    file = folder / "narrow" / "gates.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_proj": gate}, file)
    with pytest.raises(CheckpointError, match=rf"layers.0.self_attn.q_proj.*{found}"):
        routed(folder)


def test_an_expert_of_another_width_is_refused_by_module(folder) -> None:
    config = copy.deepcopy(small_llama().config)
    config.intermediate_size = 96
    wider = type(small_llama())(config)
    with pytest.raises(CheckpointError, match=r"mlp.down_proj' of expert 'narrow'.*48 inputs.*96"):
        routed(folder, wider)


def test_an_expert_of_another_architecture_is_refused_by_module(folder) -> None:
    with pytest.raises(CheckpointError, match="no such module"):
        routed(folder, small_gpt2())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"base_model_name_or_path": "someone/else"}, "someone/else"),
        ({"revision": "v2"}, "revision v2"),
    ],
)
def test_another_base_or_revision_is_refused_unless_vouched_for(folder, change, found) -> None:
    for name, revised in (
        ("narrow", {"base_model_name_or_path": "a/b", "revision": "v1"}),
        ("wide", change),
    ):
        file = folder / name / "adapter_config.json"
        content = json.loads(file.read_text())
        content |= {"base_model_name_or_path": "a/b", "revision": "v1"} | revised
        file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"expert 'wide'.*{found}"):
        routed(folder)
    assert routed(folder, check_base=False)(token_ids()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "also changes the base"),
    ],
)
def test_adapters_that_do_more_than_lora_are_refused(tmp_path, options, found) -> None:
    file = write_adapter(small_llama(), tmp_path / "x", r=2, target_modules=["q_proj"])
    content = json.loads((file / "adapter_config.json").read_text()) | options
    (file / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=found):
        assemble(small_llama(), [file], key="arrow", top_k=1)


def test_a_real_dora_adapter_is_refused(tmp_path) -> None:
    write_adapter(small_llama(), tmp_path / "x", r=2, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="DoRA"):
        assemble(small_llama(), [tmp_path / "x"], key="arrow", top_k=1)


def test_an_adapter_of_a_method_that_is_no_lora_is_refused(tmp_path) -> None:
    model = get_peft_model(small_llama(), peft.IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "x"))
    with pytest.raises(CheckpointError, match="type IA3"):
        assemble(small_llama(), [tmp_path / "x"], key="arrow", top_k=1)


def test_damaged_files_are_named(folder) -> None:
    file = folder / "wide" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"wide/adapter_model.safetensors"):
        routed(folder, key="arrow")
    file.unlink()
    (folder / "wide" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickle"):
        routed(folder, key="arrow")
    (folder / "wide" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="valid JSON"):
        routed(folder, key="arrow")


def test_numbers_that_are_not_finite_are_refused(folder) -> None:
    file = folder / "narrow" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.inf
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        routed(folder, key="arrow")


def test_folders_without_adapters_or_with_two_of_one_name_are_refused(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        adapters_in(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="sub-folders"):
        adapters_in(Path(__file__).parent)
    with pytest.raises(ConfigError, match="different names"):
        assemble(small_llama(), [folder / "wide", folder / "wide"], key="arrow")
    with pytest.raises(ConfigError, match="at least one adapter"):
        assemble(small_llama(), [], key="arrow")


def test_an_adapted_base_is_refused(folder) -> None:
    with pytest.raises(ConfigError, match="plain model"):
        routed(folder, routed(folder))
    with pytest.raises(ConfigError, match="from gate_model"):
        save_gates(routed(folder), folder / "wide")
    with pytest.raises(ConfigError, match="PHATGOOSE adapter"):
        expert_layers(small_llama())
