"""A mask switches exactly the parameters of its blocks."""

import copy

import pytest
import torch
from _networks import Stack, small_unet, stable_diffusion_unet, unet_inputs
from conftest import small_llama
from torch import nn

from sparing.errors import ConfigError
from sparing.tune import block_groups, export
from sparing.tune.parameter_groups import OUTSIDE, ParameterGroups

FAMILIES = ("svdiff", "difffit", "attention", "full")
CASES = [(f, c) for f in FAMILIES for c in ("strict", "legacy") if (f, c) != ("full", "legacy")]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def loss_curve(model: nn.Module, parameters, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x, t, c = unet_inputs()
    losses = []
    for _ in range(steps):
        loss = model(x, t, encoder_hidden_states=c).sample.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("family", "coverage"), CASES)
def test_every_parameter_is_in_one_group_or_trained_always(family, coverage):
    """Oracle 1."""
    model = small_unet()
    groups = block_groups(model, family, coverage=coverage)
    names = groups.parameters
    assert len(set(names)) == len(names)
    groups.apply_mask(model, "1" * len(groups))
    assert trainable(model) == set(names)
    assert coverage == "legacy" or not groups.always
    with pytest.raises(ConfigError, match=f"{len(groups)} bits, one for each of down_blocks"):
        groups.mask("1" * (len(groups) + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ones_is_the_unmasked_family(family):
    """Oracle 2: the same tensors and the same losses as training the family without a mask."""
    masked, whole = small_unet(), small_unet()
    groups = block_groups(masked, family)
    mask = "1" * len(groups)
    groups.apply_mask(masked, mask)
    block_groups(whole, family)  # installs shifts and scales
    words = {
        "svdiff": lambda n: n.endswith(".delta"),
        "difffit": lambda n: any(w in n for w in ("bias", "norm", "gamma")),
        "attention": lambda n: ".attentions." in n,
        "full": lambda n: True,
    }[family]
    expected = [(n, p.requires_grad_()) for n, p in whole.named_parameters() if words(n)]
    assert trainable(masked) == {name for name, _ in expected}
    one = groups.optimizer_groups(masked, mask, 1e-2)
    assert {id(p) for g in one for p in g["params"]} == {
        id(p) for p in masked.parameters() if p.requires_grad
    }
    assert loss_curve(masked, one) == loss_curve(whole, [p for _, p in expected])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_zeros_trains_nothing_and_leaves_the_model_bitwise(family):
    """Oracle 3, strict."""
    base, (x, t, c) = small_unet(), unet_inputs()
    before = base(x, t, encoder_hidden_states=c).sample
    state = copy.deepcopy(base.state_dict())
    groups = block_groups(base, family)
    mask = "0" * len(groups)
    with pytest.raises(ConfigError, match="at least one group"):
        groups.apply_mask(base, mask)
    groups.apply_mask(base, mask, allow_empty=True)
    assert trainable(base) == set()
    assert groups.count(base, mask) == 0
    assert groups.optimizer_groups(base, mask, 1e-3) == []
    assert torch.equal(base(x, t, encoder_hidden_states=c).sample, before)
    after = export(base).state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize(("family", "coverage"), CASES)
def test_a_bit_changes_only_its_module(family, coverage):
    """Oracle 4."""
    model = small_unet()
    groups = block_groups(model, family, coverage=coverage)
    mask = [0] * len(groups)
    groups.apply_mask(model, mask, allow_empty=True)
    nothing = trainable(model)
    assert nothing == set(groups.always)
    for bit, group in enumerate(groups.groups):
        groups.apply_mask(model, [int(i == bit) for i in range(len(groups))])
        changed = trainable(model) - nothing
        assert changed == set(group.parameters)
        if group.name != OUTSIDE:
            assert all(name.startswith(f"{group.name}.") for name in changed)


def test_legacy_bits_of_stable_diffusion_are_the_papers():
    """The table of the search space: 13 bits, and 16 for attention tuning."""
    table = {i: f"down_blocks.{i // 2}.attentions.{i % 2}" for i in range(6)}
    table[6] = "mid_block.attentions.0"
    thirteen = table | {
        i: f"up_blocks.{(i - 7) // 2 + 1}.attentions.{(i - 7) % 2}" for i in range(7, 13)
    }
    sixteen = table | {
        i: f"up_blocks.{(i - 7) // 3 + 1}.attentions.{(i - 7) % 3}" for i in range(7, 16)
    }
    model = stable_diffusion_unet()
    for family, expected in (("svdiff", thirteen), ("difffit", thirteen), ("attention", sixteen)):
        groups = block_groups(copy.deepcopy(model), family, coverage="legacy")
        assert groups.names == tuple(expected.values())
    strict = block_groups(model, "svdiff")
    assert strict.names == (*sixteen.values(), OUTSIDE)


def test_legacy_leaves_much_trained_at_all_zeros():
    """Where the code departs: the third attention of up blocks, and all outside the attention."""
    model = stable_diffusion_unet()
    always = block_groups(model, "svdiff", coverage="legacy").always
    third = "up_blocks.1.attentions.2.transformer_blocks"
    assert any(name.startswith(third) for name in always)
    assert any(".resnets." in name for name in always)
    assert not any(n.startswith("up_blocks.1.attentions.1.transformer_blocks") for n in always)
    groups = block_groups(stable_diffusion_unet(), "attention", coverage="legacy")
    assert all("attn" in name for group in groups.groups for name in group.parameters)
    assert any(".ff." in name for name in groups.always)
    assert all(".attentions." in name for name in groups.always)


def test_frozen_parameters_are_not_decayed():
    """The mask reaches the optimiser, not only the gradients."""
    model = Stack()
    groups = block_groups(model, "full")
    before = copy.deepcopy(model.state_dict())
    groups.apply_mask(model, "0100")
    parameters = groups.optimizer_groups(model, "0100", 1e-1)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"blocks.1.linear.weight", "blocks.1.linear.bias"}
    assert len(optimizer.state) == 2


def test_vectors_of_svdiff_have_their_own_rate():
    model = small_unet()
    groups = block_groups(model, "svdiff")
    mask = "1" * len(groups)
    matrices, vectors = groups.optimizer_groups(model, mask, 1e-3, lr_1d=1e-6)
    assert (matrices["lr"], vectors["lr"]) == (1e-3, 1e-6)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    assert len(vectors["params"]) == len(norms)
    assert all(p.shape == (1,) for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(groups.parameters)
    (one,) = groups.optimizer_groups(model, mask, 1e-3, lr_1d=1e-3)
    assert len(one["params"]) == len(groups.parameters)


def test_blocks_of_any_model_and_any_choice_of_parameters():
    """Transformers by their blocks; blocks, patterns and families of the user's own."""
    llama = small_llama()
    groups = block_groups(llama, "attention")
    assert groups.names == ("model.layers.0", "model.layers.1")
    assert all("self_attn" in name for name in groups.parameters)
    stack = Stack()
    groups = block_groups(stack, "full", always=["norm"], freeze=["enter"])
    assert groups.names == ("blocks.0", "blocks.1", "blocks.2")
    assert groups.always == ("norm.weight", "norm.bias")
    groups = block_groups(stack, lambda name, p: p.dim() == 2, blocks=["enter", "blocks"])
    assert [len(group.parameters) for group in groups.groups] == [1, 3]
    assert block_groups(stack, "full", blocks=lambda m: ["norm"]).names == ("norm", OUTSIDE)


def test_transformers_of_diffusers_are_masked_by_block():
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        cross_attention_dim=8,
        sample_size=4,
        patch_size=2,
        norm_num_groups=2,
        caption_channels=8,
        use_additional_conditions=False,
    )
    groups = block_groups(model, "svdiff")
    assert groups.names == ("transformer_blocks.0", "transformer_blocks.1", OUTSIDE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": "svdif"}, "Did you mean svdiff"),
        ({"family": "full", "coverage": "loose"}, "'strict' or 'legacy'"),
        ({"family": "attention", "coverage": "legacy"}, "all but UNets"),
        ({"family": "full", "blocks": ["block.0"]}, "Did you mean blocks.0"),
        ({"family": "full", "blocks": ["blocks", "blocks.0"]}, "blocks.0 inside blocks"),
        ({"family": "full", "freeze": ["."]}, "inside the blocks, found none"),
    ],
)
def test_bad_choices_are_one_error(options, words):
    with pytest.raises(ConfigError, match=words):
        block_groups(Stack(), **options)


def test_masks_that_do_not_fit_are_refused():
    model = Stack()
    groups = block_groups(model, "full")
    with pytest.raises(ConfigError, match="zeros and ones"):
        groups.mask("01x1")
    with pytest.raises(ConfigError, match="2 bits"):
        groups.apply_mask(model, [1, 0])
    with pytest.raises(ConfigError, match="a parameter of this model"):
        groups.apply_mask(nn.Linear(2, 2), "1111")
    assert isinstance(groups, ParameterGroups)
    assert groups.mask("0110") == groups.mask([0, 1, 1, 0]) == (False, True, True, False)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="repeated blocks"):
        block_groups(nn.Linear(2, 2), "full")
    plain = small_unet(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    with pytest.raises(ConfigError, match="attention blocks below"):
        block_groups(plain, "full")
