"""Names on the command line become competitors."""

import pytest

from sparing import adapt
from sparing.compare.competitors import competitor, split_methods
from sparing.errors import ConfigError
from sparing.tuners import TunerConfig


def fresh_methods() -> set[str]:
    configs = [c for c in vars(adapt).values() if isinstance(c, type)]
    ours = [c for c in configs if issubclass(c, TunerConfig) and c.starts_fresh]
    return {config.method.replace("_", "-") for config in ours}


def test_all_adapt_is_lora_and_every_method_that_starts_fresh():
    names = split_methods("all-adapt")
    assert names[0] == "lora"
    assert set(names[1:]) == fresh_methods()


def test_all_adapt_leaves_out_what_is_named_beside_it():
    names = split_methods("mos,all-adapt")
    assert names[0] == "mos"
    assert sorted(names) == sorted({"lora", *fresh_methods()})


def test_commas_inside_options_do_not_split():
    assert split_methods('lora,peft:vera{"r":8,"d_initial":0.1}') == [
        "lora",
        'peft:vera{"r":8,"d_initial":0.1}',
    ]


def test_a_method_put_together_from_trained_adapters_is_no_competitor(monkeypatch):
    monkeypatch.setattr(adapt.MoSConfig, "starts_fresh", False)
    with pytest.raises(ConfigError, match="sparing route"):
        competitor("mos")
    assert "mos" not in split_methods("all-adapt")
