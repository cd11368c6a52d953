"""Optimizers and planners by name; the standard plan; multipliers while training and after."""

import copy

import pytest
import torch
from torch import nn

from sparing.errors import ConfigError
from sparing.models import FAMILIES, Shape, build
from sparing.scale.multipliers import fold_multipliers, install_multipliers
from sparing.scale.optimizers import OPTIMIZERS, check_decay, make_optimizer, planner_for
from sparing.scale.planners import PLANNERS
from sparing.scale.planning import Plan
from sparing.scale.settings import PlanSettings

SETTINGS = PlanSettings(lr=0.02, aux_lr=0.005, weight_decay=0.3)
IDS = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(0))


def model(family: str = "llama", width: int = 32, tied: bool = False) -> nn.Module:
    return build(family, Shape(width, 2, 20, 8, 16, tied=tied))


def planned(planner: str, target: nn.Module, base: nn.Module | None = None) -> Plan:
    sphere = planner == "hyperp"
    settings = PlanSettings(lr=0.02, weight_decay=0.0) if sphere else SETTINGS
    return PLANNERS[planner](base or target, target, settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("optimizer", "planner"),
    [
        (name, planner)
        for name, entry in OPTIMIZERS.items()
        for planner in entry.planners
        if planner in PLANNERS and not (entry.on_sphere and planner == "standard")
    ],
)
def test_every_suitable_pair_takes_a_step_that_changes_every_parameter(
    optimizer: str, planner: str, family: str
) -> None:
    network = model(family)
    plan = planned(planner, network)
    plan.initialize(network)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    steps = make_optimizer(optimizer, plan, network)
    for _ in range(2):
        network(input_ids=IDS, labels=IDS).loss.backward()
        steps.step()
        steps.zero_grad()
    still = [n for n, p in network.named_parameters() if torch.equal(p.detach(), before[n])]
    assert still == []


def test_the_standard_plan_is_the_same_at_every_width() -> None:
    plans = [planned("standard", model(width=width), model(width=16)) for width in (32, 64)]
    said = [
        [(row.info.name, row.algorithm, row.lr, row.weight_decay) for row in plan.parameters]
        for plan in plans
    ]
    assert said[0] == said[1]
    rows = {row.info.name: row for row in plans[0].parameters}
    up = rows["model.layers.0.mlp.up_proj.weight"]
    assert (up.algorithm, up.lr, up.weight_decay, up.init_std) == ("matrix", 0.02, 0.3, None)
    head, norm = rows["lm_head.weight"], rows["model.norm.weight"]
    assert (head.algorithm, head.lr, head.weight_decay) == ("adamw", 0.005, 0.3)
    assert (norm.lr, norm.weight_decay) == (0.005, 0.0)


def test_names_and_pairs_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean muonh"):
        planner_for("muon-h")
    with pytest.raises(ConfigError, match="Did you mean hyperp"):
        planner_for("muonh", "hyper-p")
    with pytest.raises(ConfigError, match="one for muonh: hyperp, standard, found 'wd-scaling'"):
        planner_for("muonh", "wd-scaling")
    assert planner_for("muonh") == "hyperp"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_decay_is_refused_on_spheres_only(optimizer: str) -> None:
    check_decay(optimizer, 0.0)
    if not OPTIMIZERS[optimizer].on_sphere:
        check_decay(optimizer, 0.1)
        return
    with pytest.raises(ConfigError, match="weight_decay: expected 0"):
        check_decay(optimizer, 0.1)
    network = model()
    with pytest.raises(ConfigError, match="weight_decay"):  # whoever made the plan
        make_optimizer(optimizer, planned("standard", network), network)


def scaled_head(base_width: int = 16, tied: bool = False) -> tuple[nn.Module, Plan]:
    network = model(tied=tied)
    plan = planned("wd-scaling", network, model(width=base_width, tied=tied))
    plan.initialize(network)
    return network, plan


def test_a_multiplier_scales_the_output_until_it_is_removed() -> None:
    network, plan = scaled_head()
    (row,) = [row for row in plan.parameters if row.multiplier != 1]
    assert (row.info.role, row.multiplier) == ("head", 0.5)
    before = network(input_ids=IDS).logits
    handles = install_multipliers(network, plan)
    torch.testing.assert_close(network(input_ids=IDS).logits, 0.5 * before)
    for handle in handles:
        handle.remove()
    assert torch.equal(network(input_ids=IDS).logits, before)


def test_folded_into_the_weights_it_is_a_plain_model_with_the_same_output() -> None:
    network, plan = scaled_head()
    plain = copy.deepcopy(network)
    plain.load_state_dict(fold_multipliers(network.state_dict(), plan))
    install_multipliers(network, plan)
    torch.testing.assert_close(plain(input_ids=IDS).logits, network(input_ids=IDS).logits)


def test_a_multiplier_of_a_tied_embedding_is_refused() -> None:
    network, plan = scaled_head(tied=True)
    with pytest.raises(ConfigError, match=r"embed_tokens.*tied embedding.*Untie"):
        install_multipliers(network, plan)
    alone, same = scaled_head(base_width=32, tied=True)  # nothing to multiply
    assert install_multipliers(alone, same) == []
