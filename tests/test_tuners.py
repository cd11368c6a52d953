"""A method defined here, in thirty lines, gets everything that PEFT promises."""

import copy
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import peft
import pytest
import torch
from conftest import perturb, small_llama, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn

from sparing.errors import CheckpointError, ConfigError
from sparing.fingerprint import fingerprint
from sparing.tuners import (
    AdditiveAdapter,
    LayerAdapter,
    Tuner,
    TunerConfig,
    generator_for,
    matrix_view,
    option_for,
    register_tuner,
)


@dataclass
class SharedGainConfig(TunerConfig):
    """Rank-one updates times a gain that all layers share."""

    method: ClassVar[str] = "shared_gain"
    bound_to_base: ClassVar[bool] = True
    size_option: ClassVar[str] = "r"
    learning_rates: ClassVar[tuple[float, ...]] = (1e-3,)
    r: int = 1


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


class SharedGainAdapter(AdditiveAdapter):
    def __init__(self, layer: nn.Module, rank: int, shared: Gain) -> None:
        super().__init__()
        outputs, inputs = matrix_view(layer, layer.weight).shape
        self.a = nn.Parameter(torch.ones(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        object.__setattr__(self, "shared", shared)

    def delta(self, x: Tensor) -> Tensor:
        return (x.to(self.a.dtype) @ self.a.T) @ self.b.T * self.shared.gain

    def delta_weight(self) -> Tensor:
        return self.b @ self.a * self.shared.gain


class SharedGainTuner(Tuner):
    prefix = "shared_gain_"

    def new_shared(self, config: SharedGainConfig, layers: dict[str, nn.Module]) -> Gain:
        return Gain()

    def new_adapter(self, config, layer, module_name, shared):
        return SharedGainAdapter(layer, config.r, shared)


class InputDependent(LayerAdapter):
    mergeable = False

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x) * (1 + self.scale * x.mean(-1, keepdim=True))

    def merged(self, weight, bias):
        raise AssertionError("never called")


@dataclass
class InputDependentConfig(TunerConfig):
    method: ClassVar[str] = "input_dependent"
    size_option: ClassVar[str] = "r"
    learning_rates: ClassVar[tuple[float, ...]] = (1e-3,)


class InputDependentTuner(Tuner):
    prefix = "input_dependent_"

    def new_adapter(self, config, layer, module_name, shared):
        return InputDependent(layer.out_features)


register_tuner(SharedGainConfig, SharedGainTuner)
register_tuner(InputDependentConfig, InputDependentTuner)


def shared_gain(base: nn.Module) -> peft.PeftModel:
    config = SharedGainConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config).eval()


def test_shared_parameters_are_counted_saved_and_trained_once(tmp_path):
    model = shared_gain(small_llama())
    gains = [name for name, _ in model.named_parameters() if "gain" in name.rsplit(".", 1)[-1]]
    assert gains == ["base_model.shared_gain_shared.default.gain"]
    model.save_pretrained(tmp_path)
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert names.count("base_model.shared_gain_shared.gain") == 1


def test_shared_parameters_follow_the_active_adapter():
    model = shared_gain(small_llama())
    model.add_adapter("second", SharedGainConfig(target_modules="all-linear"))

    def trains(name: str) -> bool:
        return model.base_model.shared[name].gain.requires_grad

    assert (trains("default"), trains("second")) == (True, False)
    model.set_adapter("second")
    assert (trains("default"), trains("second")) == (False, True)
    with model.disable_adapter():
        assert not trains("second")
    assert trains("second")
    model.delete_adapter("second")
    assert "second" not in model.base_model.shared


def test_deepcopy_keeps_the_copy_consistent():
    model = shared_gain(small_llama())
    perturb(model)
    twin, ids = copy.deepcopy(model), token_ids()
    assert torch.equal(twin(ids).logits, model(ids).logits)
    with torch.no_grad():
        twin.base_model.shared["default"].gain.zero_()
    assert not torch.equal(twin(ids).logits, model(ids).logits)


def test_another_base_of_the_same_shape_is_refused(tmp_path):
    shared_gain(small_llama(seed=0)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="fingerprint"):
        peft.PeftModel.from_pretrained(small_llama(seed=1), tmp_path)


def test_fingerprint_is_the_same_in_bfloat16_and_absent_without_data():
    weights = [p.detach() for p in small_llama().parameters()]
    half = [w.to(torch.bfloat16) for w in weights]
    assert fingerprint(weights) == fingerprint(half) is not None
    assert fingerprint([w.half() for w in weights]) is None
    assert fingerprint([w.to("meta") for w in weights]) is None
    weights[3] = weights[3] + 1
    assert fingerprint(weights) != fingerprint(half)


def test_input_dependent_adapters_refuse_to_merge():
    config = InputDependentConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(small_llama(), config)
    with pytest.raises(ConfigError, match="depends on its input"):
        model.merge_adapter()


def test_safe_merge_refuses_nan_and_leaves_the_base_alone():
    model = shared_gain(small_llama())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        model.base_model.shared["default"].gain.fill_(float("nan"))
    with pytest.raises(ConfigError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_unsupported_layers_are_named():
    with pytest.raises(ConfigError, match="embed_tokens"):
        peft.get_peft_model(small_llama(), SharedGainConfig(target_modules=["embed_tokens"]))


def test_a_name_that_peft_uses_is_refused():
    @dataclass
    class Impostor(SharedGainConfig):
        method: ClassVar[str] = "lora"

    with pytest.raises(ConfigError, match="LORA"):
        register_tuner(Impostor, SharedGainTuner)


@pytest.mark.parametrize("first", ["import sparing; import peft", "import peft; import sparing"])
def test_importing_sparing_makes_peft_know_our_methods(first):
    code = f"{first}; from peft import PeftType; print(PeftType('MOS').value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "MOS", done.stderr


def test_asking_where_peft_is_does_not_keep_our_methods_from_it():
    """As transformers does when it loads a model."""
    code = "import sparing; from importlib.util import find_spec; find_spec('peft'); "
    code += "from peft import PeftType; print(PeftType('MOS').value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "MOS", done.stderr


@pytest.mark.parametrize("name", ["Trainer", "TrainerCallback", "AutoModelForCausalLM"])
def test_transformers_may_be_the_first_to_import_peft(name):
    """It does so in the middle of its own Trainer."""
    code = f"import sparing; from transformers import {name}; "
    code += "from sparing.adapt import TunerCallback; from peft import PeftType; "
    code += "print(PeftType('MOS').value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "MOS", done.stderr


@pytest.mark.parametrize("module", ["sparing.tuners", "sparing.adapt", "sparing.adapt.mos"])
def test_every_module_can_be_imported_first(module):
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_importing_sparing_alone_imports_no_torch():
    code = "import sys, sparing; print('torch' in sys.modules, 'peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr


def test_per_module_options_match_as_in_peft():
    pattern = {"q_proj": 4, r"layers\.1\..*v_proj": 8}
    assert option_for(pattern, "model.layers.0.self_attn.q_proj", 1) == 4
    assert option_for(pattern, "model.layers.1.self_attn.v_proj", 1) == 8
    assert option_for(pattern, "model.layers.0.self_attn.v_proj", 1) == 1
    assert option_for({}, "anything", 3) == 3


def test_generators_differ_by_name_and_repeat_by_seed():
    def draw(seed: int, name: str) -> list[float]:
        return torch.rand(3, generator=generator_for(seed, name)).tolist()

    assert draw(0, "a") == draw(0, "a")
    assert draw(0, "a") != draw(0, "b")
    assert draw(0, "a") != draw(1, "a")
