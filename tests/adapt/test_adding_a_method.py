"""The method that docs/adding-a-method.md adds really works, and keeps every promise."""

import re
from pathlib import Path

import pytest
import test_contract as contract

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def namespace():
    names: dict[str, object] = {"__name__": "gain"}
    exec(BLOCKS[0], names)
    return names


@pytest.fixture
def _known(namespace, monkeypatch):
    monkeypatch.setitem(contract.METHODS, "gain", namespace["GainConfig"])
    monkeypatch.setitem(contract.EXAMPLES, "gain", {"groups": 4})


PROMISES = [
    contract.test_a_new_adapter_leaves_the_output_bit_identical,
    contract.test_only_adapter_parameters_train_and_all_of_them_get_gradients,
    contract.test_disabling_restores_the_base_output,
    contract.test_merged_equals_unmerged_and_unmerging_is_exact,
    contract.test_merge_and_unload_gives_a_plain_model,
    contract.test_two_adapters_switch_and_delete,
    contract.test_two_active_adapters_equal_their_joint_merge,
]


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_added_method_keeps_the_promise(promise, base_model):
    promise("gain", base_model)


@pytest.mark.usefixtures("_known")
def test_it_saves_and_loads(base_model, tmp_path):
    contract.test_saved_adapter_loads_to_the_same_output("gain", base_model, tmp_path, False)
    contract.test_saved_file_holds_no_base_weight_and_no_tensor_twice("gain", base_model, tmp_path)


@pytest.mark.usefixtures("_known")
def test_a_trainer_trains_it(tmp_path):
    contract.test_gradient_checkpointing_gives_the_same_gradients("gain")
    contract.test_bfloat16_base_keeps_float32_adapters("gain", contract.small_llama)


def test_the_page_shows_how_to_use_it(namespace, capsys):
    exec(BLOCKS[1], namespace)
    assert "trainable params" in capsys.readouterr().out
