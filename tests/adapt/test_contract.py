"""What PEFT promises about any method holds for each of ours, on Llama and on GPT-2."""

import copy
import dataclasses

import peft
import pytest
import torch
from conftest import perturb, small_gpt2, small_llama, token_ids
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from sparing import adapt
from sparing.adapt.callback import TunerCallback
from sparing.errors import CheckpointError, ConfigError
from sparing.tuners import TunerConfig, TunerLayer, register_tuner

METHODS = {
    config.method: config
    for config in vars(adapt).values()
    if isinstance(config, type) and issubclass(config, TunerConfig)
}
EXAMPLES: dict[str, dict[str, object]] = {
    "mos": {"r": 3, "budget_rank": 2, "shards": 2, "private_rank": 1, "lora_dropout": 0.0},
    "neuroada": {"k": 2},
    "sara": {"n_params": 400},
    "hut": {"r": 2},
    "bi_adapter": {"kind": "lora", "h": 3, "dropout": 0.0},
    "dopamine": {},
    "queryable_lora": {"r": 3, "num_atoms": 4, "d_query": 8, "block_size": 1},
    "phatgoose": {"r": 2},
    "unified_peft": {
        "attn": {"form": "prefix", "bottleneck": 3},
        "ffn": {"form": "lora", "bottleneck": 2},
        "prefix_mlp_dim": None,
    },
    "ept": {"r": 2, "kernel_sizes": [2, 3], "seed_scale": 0.3},
}
# Promises that a method's own mathematics rules out, each with its reason.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "starts as the identity": {
        "bi_adapter": "a matrix of zeros has no signs, so it starts near the identity",
        "unified_peft": "a prefix takes its share of the attention, whatever its vectors are",
    },
    "saves exactly what it trains": {
        "bi_adapter": "it trains float32 numbers and saves their codes",
    },
    "the loss of an untrained network falls": {
        "dopamine": "it scales frozen neurons, which there add next to nothing; see its own test",
    },
}


def unless_excepted(promise: str, method: str) -> None:
    if method in EXCEPTIONS[promise]:
        pytest.skip(EXCEPTIONS[promise][method])


def is_mergeable(model: nn.Module) -> bool:
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    return all(adapter.mergeable for layer in layers for adapter in layer.adapters.values())


def assert_refuses_to_merge(model: peft.PeftModel) -> None:
    ids = token_ids()
    before = model(ids).logits
    with pytest.raises(ConfigError, match="depends on its input"):
        model.merge_adapter()
    assert torch.equal(model(ids).logits, before)


def example(method: str, **options: object) -> TunerConfig:
    chosen = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | EXAMPLES[method] | options
    return METHODS[method](**chosen)


def adapted(base: nn.Module, method: str, **options: object) -> peft.PeftModel:
    return peft.get_peft_model(base, example(method, **options)).eval()


pytestmark = pytest.mark.parametrize("method", sorted(METHODS))


def test_a_new_adapter_leaves_the_output_bit_identical(method, base_model):
    unless_excepted("starts as the identity", method)
    ids = token_ids()
    before = base_model(ids).logits
    assert torch.equal(adapted(base_model, method)(ids).logits, before)


def test_only_adapter_parameters_train_and_all_of_them_get_gradients(method, base_model):
    model = adapted(base_model, method)
    perturb(model)
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert f"{method}_" in name
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_disabling_restores_the_base_output(method, base_model):
    ids = token_ids()
    before = base_model(ids).logits
    model = adapted(base_model, method)
    perturb(model)
    assert not torch.allclose(model(ids).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(model(ids).logits, before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapter_loads_to_the_same_output(method, base_model, tmp_path, low_cpu_mem_usage):
    fresh, ids = copy.deepcopy(base_model), token_ids()
    model = adapted(base_model, method)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        fresh, tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_saved_file_holds_no_base_weight_and_no_tensor_twice(method, base_model, tmp_path):
    unless_excepted("saves exactly what it trains", method)
    model = adapted(base_model, method)
    perturb(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(f"{method}_" in name for name in tensors)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    floats = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    assert floats == trainable


def test_merged_equals_unmerged_and_unmerging_is_exact(method, base_model):
    ids = token_ids()
    model = adapted(base_model.double(), method)
    perturb(model)
    if not is_mergeable(model):
        assert_refuses_to_merge(model)
        return
    with torch.no_grad():
        before = model(ids).logits
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, before)


def test_merge_and_unload_gives_a_plain_model(method, base_model):
    ids = token_ids()
    kinds = {type(module) for module in base_model.modules()}
    model = adapted(base_model, method)
    perturb(model)
    if not is_mergeable(model):
        assert {type(module) for module in model.unload().modules()} == kinds
        return
    expected = model(ids).logits
    merged = model.merge_and_unload()
    assert {type(module) for module in merged.modules()} == kinds
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_switch_and_delete(method, base_model):
    ids = token_ids()
    model = adapted(base_model, method)
    perturb(model, seed=1)
    first = model(ids).logits
    model.add_adapter("second", example(method, seed=1))
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("second")
    perturb(model, seed=2)
    second = model(ids).logits
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(model(ids).logits, second)


def test_two_active_adapters_equal_their_joint_merge(method, base_model):
    ids = token_ids()
    model = adapted(base_model.double(), method)
    model.add_adapter("second", example(method, seed=1))
    for name in ("default", "second"):
        model.set_adapter(name)
        perturb(model, scale=0.05, seed=len(name))
    model.base_model.set_adapter(["default", "second"])
    both = model(ids).logits
    if not is_mergeable(model):
        model.base_model.set_adapter("second")
        assert not torch.allclose(model(ids).logits, both)
        return
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(model(ids).logits, both, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(method):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(small_llama(), method).train()
        perturb(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = token_ids()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_bfloat16_base_keeps_float32_adapters(method, make):
    model = adapted(make(torch.bfloat16), method)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    perturb(model)
    ids = token_ids()
    output = model(ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable)


def test_autocast_matches_the_plain_product(method):
    model = adapted(small_llama(), method)
    perturb(model)
    ids = token_ids()
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids).logits
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_generate_with_a_cache_equals_generate_without(method):
    model = adapted(small_llama(), method)
    perturb(model)
    ids = token_ids(rows=1)
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))


def test_trainer_trains_it_and_the_loss_falls(method, tmp_path):
    unless_excepted("the loss of an untrained network falls", method)
    model = adapted(small_llama(), method)
    ids = token_ids(rows=16)
    items = [{"input_ids": row, "labels": row} for row in ids]
    before = model(ids, labels=ids).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=items, callbacks=[TunerCallback()]).train()
    assert model.eval()(ids, labels=ids).loss.item() < before - 0.01


def test_same_seed_same_adapter(method):
    states = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 2**31)
        states.append(peft.get_peft_model_state_dict(adapted(small_llama(), method, seed=3)))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_another_architecture_is_refused_by_name(method, tmp_path):
    adapted(small_llama(), method).save_pretrained(tmp_path)
    narrow = small_llama()
    config = copy.deepcopy(narrow.config)
    config.intermediate_size = 96
    with pytest.raises(CheckpointError, match=r"mlp|base model"):
        peft.PeftModel.from_pretrained(type(narrow)(config), tmp_path)


def test_module_lists_that_match_nothing_are_refused(method):
    with pytest.raises(ValueError, match="not_there"):
        adapted(small_llama(), method, target_modules=["not_there"])


def test_registering_twice_changes_nothing(method):
    config_class = METHODS[method]
    tuner_class = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[example(method).peft_type]
    register_tuner(config_class, tuner_class)
    assert example(method).peft_type == method.upper()


def test_config_survives_json(method, tmp_path):
    config = example(method, seed=7)
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert dataclasses.asdict(loaded) == dataclasses.asdict(config)


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    small_llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_4_or_8_bits_is_adapted_or_refused_by_name(method, bits, saved_base, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantised = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            saved_base, quantization_config=quantised, device_map="cpu"
        )

    ids, base = token_ids(), load()
    before = base(ids).logits
    try:
        model = adapted(base, method)
    except ConfigError as error:
        if "quantised" not in str(error):
            raise
        return
    if method not in EXCEPTIONS["starts as the identity"]:
        assert torch.equal(model(ids).logits, before)
    perturb(model)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or torch.isfinite(parameter.grad).all(), name
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
