"""HUT scales weights entry by entry by two cheap factors, and keeps what multiplication keeps."""

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from sparing.adapt import HUTConfig, hut
from sparing.adapt.hut import AffineAdapter, BlockAdapter, HUTAdapter, ProductAdapter
from sparing.errors import ConfigError

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Toy(nn.Module):
    """One linear layer under a name."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def toy(inputs: int, outputs: int, *, bias: bool = True, seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy(inputs, outputs, bias)


def fit(base: nn.Module, scale: float = 0.5, seed: int = 1, **options) -> peft.PeftModel:
    """`base` under a HUT adapter with noise in all of its parameters."""
    model = peft.get_peft_model(base, HUTConfig(target_modules=["linear"], **options)).double()
    perturb(model, scale, seed)
    return model


def adapter_of(model: peft.PeftModel, name: str = "default") -> HUTAdapter:
    return model.base_model.model.linear.adapters[name]


def new_weight(model: peft.PeftModel) -> torch.Tensor:
    layer = model.base_model.model.linear
    return adapter_of(model).merged(layer.base_layer.weight, layer.base_layer.bias)[0].detach()


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(model: peft.PeftModel, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, then the gradients of x and of all trainable parameters, for a fixed loss."""
    x = x.clone().requires_grad_()
    trainable = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    return [y, *torch.autograd.grad((y * noise(*y.shape)).sum(), [x, *trainable])]


def by_the_index_formula(
    weight: torch.Tensor, into: torch.Tensor, out: torch.Tensor, tiled: bool
) -> torch.Tensor:
    """Entry by entry, as the equation says; into (r, inputs), out (outputs, r)."""
    (k, d), r = weight.shape, into.shape[0]
    new = weight.clone()
    for j in range(k):
        for i in range(d):
            q, p = (j % r, i % r) if tiled else (j * r // k, i * r // d)
            new[j, i] = into[q, i] * weight[j, i] * out[j, p]
    return new


@pytest.mark.parametrize("form", ["block", "tile", "product", "affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_adapter_is_the_identity_bit_by_bit(form, dtype):
    """Oracle 1."""
    base = small_llama(dtype)
    ids = token_ids()
    before = base(ids).logits
    for r in (1, 4):
        config = HUTConfig(r=r, form=form, mode="auto" if r == 1 else "weight")
        adapter_model = peft.get_peft_model(base, config)
        assert torch.equal(adapter_model(ids).logits, before)
        base = adapter_model.unload()


@pytest.mark.parametrize("form", ["block", "tile"])
def test_the_activation_form_starts_as_the_identity_up_to_rounding(form):
    model = peft.get_peft_model(
        toy(12, 8), HUTConfig(r=4, form=form, mode="activation", target_modules=["linear"])
    )
    x = noise(5, 12)
    torch.testing.assert_close(model(x), model.base_model.model.linear.base_layer(x), **EXACT)


@pytest.mark.parametrize("form", ["block", "tile"])
@pytest.mark.parametrize(("inputs", "outputs", "r"), [(12, 6, 3), (7, 5, 3), (8, 8, 8), (4, 6, 1)])
def test_the_new_weight_follows_the_index_formula(form, inputs, outputs, r):
    """Equation 2, unequal last blocks included."""
    model = fit(toy(inputs, outputs), r=r, form=form, strict=False, scale_shift="none")
    weight = model.base_model.model.linear.base_layer.weight.detach()
    adapter = adapter_of(model)
    expected = by_the_index_formula(
        weight, 1 + adapter.input_factor, 1 + adapter.output_factor, form == "tile"
    )
    torch.testing.assert_close(new_weight(model), expected.detach(), **EXACT)


def test_rank_one_scales_inputs_and_outputs():
    """Oracle 2."""
    model = fit(toy(6, 4), r=1, scale_shift="none")
    adapter = adapter_of(model)
    into, out = 1 + adapter.input_factor[0], 1 + adapter.output_factor[:, 0]
    expected = torch.diag(out) @ model.base_model.model.linear.base_layer.weight @ torch.diag(into)
    torch.testing.assert_close(new_weight(model), expected.detach(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("side", ["input", "output"])
def test_one_vector_alone_is_ia3(side):
    """Oracle 3: M_A alone is IA³ on the input, γ alone IA³ on the output, which scales the bias."""
    x, values = noise(3, 6), noise(6 if side == "input" else 4)
    ia3 = peft.get_peft_model(
        toy(6, 4),
        peft.IA3Config(
            target_modules=["linear"], feedforward_modules=["linear"] if side == "input" else []
        ),
    ).double()
    options = {"factors": "input", "scale_shift": "none" if side == "input" else "scale"}
    model = fit(toy(6, 4), scale=0.0, r=1, **options)
    vector = ia3.base_model.model.linear.ia3_l["default"]
    adapter = adapter_of(model)
    with torch.no_grad():
        vector.copy_((1 + values).reshape(vector.shape))
        (adapter.input_factor[0] if side == "input" else adapter.scale).copy_(values)
    torch.testing.assert_close(model(x), ia3(x), **EXACT)


@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_scale_and_shift_alone_are_ssf_and_shift_alone_is_bitfit(mode):
    """Oracle 3."""
    x = noise(3, 6)
    model = fit(toy(6, 4), r=2, mode=mode)
    adapter, base = adapter_of(model), model.base_model.model.linear.base_layer
    with torch.no_grad():
        adapter.input_factor.zero_()
        adapter.output_factor.zero_()
        torch.testing.assert_close(model(x), (1 + adapter.scale) * base(x) + adapter.shift, **EXACT)
        adapter.scale.zero_()
        torch.testing.assert_close(model(x), base(x) + adapter.shift, **EXACT)


def test_full_rank_reaches_any_weight_with_the_same_zeros():
    """Oracle 4: r = k on a square weight."""
    base = toy(6, 6)
    with torch.no_grad():
        base.linear.weight.mul_(noise(6, 6, seed=2) > 0)
    weight = base.linear.weight.detach()
    wanted = noise(6, 6, seed=3) * (weight != 0)
    model = fit(base, scale=0.0, r=6, factors="input", scale_shift="none")
    with torch.no_grad():
        adapter_of(model).input_factor.copy_(
            torch.where(weight == 0, 0, wanted / torch.where(weight == 0, 1, weight) - 1)
        )
    torch.testing.assert_close(new_weight(model), wanted, **EXACT)


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tokens=st.integers(1, 6),
    form=st.sampled_from(["block", "tile"]),
    factors=st.sampled_from(["both", "input", "output"]),
    scale_shift=st.sampled_from(["both", "scale", "shift", "none"]),
    bias=st.booleans(),
    bounded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_activation_and_weight_forms_agree_in_outputs_and_gradients(
    r, widths, tokens, form, factors, scale_shift, bias, bounded, seed
):
    """Oracle 5: equation 8 against equation 2."""
    inputs, outputs = (r * n for n in widths)
    x = noise(2, tokens, inputs, seed=seed)
    options = {
        "r": r,
        "form": form,
        "factors": factors,
        "scale_shift": scale_shift,
        "bounded": bounded,
    }
    both = [
        results(fit(toy(inputs, outputs, bias=bias), seed=seed, mode=mode, **options), x)
        for mode in ("weight", "activation")
    ]
    for weight, activation in zip(*both, strict=True):
        torch.testing.assert_close(weight, activation, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "block", "r": 2},
        {"form": "tile", "r": 2},
        {"form": "block", "r": 3, "strict": False},
        {"form": "product", "r": 2},
        {"form": "product", "r": 2, "bounded": True},
        {"form": "affine", "r": 2, "scale_shift": "none"},
    ],
)
def test_the_custom_backward_equals_autograd_through_the_new_weight(options):
    """Oracle 5: equation 6 against autograd, and gradcheck."""
    x = noise(5, 8)
    model = fit(toy(8, 6) if options["r"] == 2 else toy(8, 7), mode="weight", **options)
    layer = model.base_model.model.linear
    found = results(model, x)
    leaf = x.clone().requires_grad_()
    y = F.linear(leaf, *adapter_of(model).merged(layer.base_layer.weight, layer.base_layer.bias))
    trainable = [p for p in model.parameters() if p.requires_grad]
    expected = [y, *torch.autograd.grad((y * noise(*y.shape)).sum(), [leaf, *trainable])]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert torch.autograd.gradcheck(lambda v, *_: model(v), (leaf, *trainable))


@pytest.mark.parametrize("form", ["block", "tile", "product"])
def test_zeros_stay_zero_under_training_and_lora_breaks_them(form):
    """Oracle 6."""

    def pruned_base() -> Toy:
        base = toy(8, 8)
        prune.l1_unstructured(base.linear, "weight", amount=0.5)
        prune.remove(base.linear, "weight")
        return base

    zeros = pruned_base().linear.weight == 0
    assert zeros.sum() == 32
    x, target = noise(32, 8), noise(32, 8, seed=6)

    def trained(model: peft.PeftModel) -> torch.Tensor:
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.01
        )
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
        return model.merge_and_unload().linear.weight

    kept = trained(fit(pruned_base(), scale=0.0, r=2, form=form))
    assert (kept[zeros] == 0).all()
    assert not torch.allclose(kept, pruned_base().linear.weight)
    lora = peft.get_peft_model(
        pruned_base(), peft.LoraConfig(r=2, target_modules=["linear"])
    ).double()
    assert (trained(lora)[zeros] != 0).any()


def test_each_block_has_one_redundant_number():
    """Oracle 7: M_A of a block times c and its M_B over c leave the weight as it is."""
    model = fit(toy(6, 8), r=2, scale_shift="none")
    before, adapter = new_weight(model), adapter_of(model)
    with torch.no_grad():
        into, out = 1 + adapter.input_factor, 1 + adapter.output_factor
        into[1, :3] *= 4.0
        out[4:, 0] /= 4.0
        adapter.input_factor.copy_(into - 1)
        adapter.output_factor.copy_(out - 1)
    torch.testing.assert_close(new_weight(model), before, rtol=0, atol=1e-15)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_multiplier_has_rank_r_squared_and_the_change_full_rank(r):
    """Oracle 8; a product of the factors would give rank r, one with a ones matrix rank one."""
    model = fit(toy(24, 24), r=r, scale_shift="none")
    ones = torch.ones(24, 24, dtype=torch.float64)
    multiplier = adapter_of(model).merged(ones, None)[0]
    assert torch.linalg.matrix_rank(multiplier) == r * r
    change = new_weight(model) - model.base_model.model.linear.base_layer.weight
    assert torch.linalg.matrix_rank(change) == 24


@settings(max_examples=20, deadline=None)
@given(r=st.sampled_from([1, 2, 4]), factor=st.floats(0.1, 10.0), seed=st.integers(0, 100))
def test_the_update_is_linear_in_the_weight_and_permutes_with_inputs(r, factor, seed):
    """Oracle 9."""
    adapter = adapter_of(fit(toy(8, 4), r=r, seed=seed))
    weight = noise(4, 8, seed=seed)
    torch.testing.assert_close(
        adapter.merged(factor * weight, None)[0], factor * adapter.merged(weight, None)[0], **EXACT
    )
    order = torch.arange(8)
    order[: 8 // r] = order[: 8 // r].flip(0)  # inside the first block
    before = adapter.merged(weight, None)[0]
    with torch.no_grad():
        adapter.input_factor.copy_(adapter.input_factor[:, order])
    torch.testing.assert_close(adapter.merged(weight[:, order], None)[0], before[:, order], **EXACT)


@pytest.mark.parametrize("form", ["block", "tile", "product", "affine"])
@pytest.mark.parametrize("bias", [True, False])
def test_merging_gives_weight_and_bias_and_unmerging_restores_them(form, bias):
    """Oracle 10 and equation 5."""
    base = toy(6, 4, bias=bias)
    weight, x = base.linear.weight.clone(), noise(3, 6)
    model = fit(base, r=2, form=form)
    expected, layer = model(x), model.base_model.model.linear
    with torch.no_grad():
        # A zero multiplier: nothing could be recovered by division.
        if form == "block":
            adapter_of(model).input_factor.fill_(-1.0)
            expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert layer.base_layer.bias is not None
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)
    assert (layer.base_layer.bias is not None) == bias


@pytest.mark.parametrize(
    ("r", "outputs", "modules", "counts"),
    [
        (1, 1024, 48, {"both": 196_608, "none": 98_304}),
        (8, 1024, 48, {"both": 884_736, "none": 786_432}),
        (4, 3072, 24, {"both": 540_672}),
    ],
)
def test_parameter_counts_are_those_of_equation_9(r, outputs, modules, counts):
    """Oracle 11, on the meta device; RoBERTa-large's q and v, GPT-2 medium's c_attn."""
    for scale_shift, expected in counts.items():
        with torch.device("meta"):
            adapter = BlockAdapter(HUTConfig(r=r, scale_shift=scale_shift), 1024, outputs, r)
        assert modules * sum(p.numel() for p in adapter.parameters()) == expected


@pytest.mark.parametrize(("mode", "backward"), [("weight", 2), ("activation", 1)])
@pytest.mark.parametrize("r", [1, 4])
def test_matrix_products_are_those_of_the_base_and_one_or_two_backwards(mode, backward, r):
    """Oracle 11: one GEMM forward; backward one with activations, two with the weight."""
    model = fit(toy(16, 8), r=r, mode=mode)
    x = noise(32, 16).requires_grad_()
    gemm = 2 * 32 * 16 * 8
    with FlopCounterMode(display=False) as forward:
        y = model(x)
    assert forward.get_total_flops() == gemm
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == backward * gemm


@pytest.mark.parametrize("tokens", [4, 64])
def test_the_weight_form_keeps_only_its_input_and_the_activation_form_r_outputs(tokens):
    """Nothing of the weight's size is kept besides the frozen weight itself."""
    kept: dict[str, int] = {}
    for mode in ("weight", "activation"):
        model = fit(toy(32, 24, bias=False), r=2, mode=mode, scale_shift="none")
        weight = model.base_model.model.linear.base_layer.weight
        x = noise(tokens, 32).requires_grad_()
        storages: dict[int, int] = {}

        def pack(tensor, storages=storages, weight=weight, x=x):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in (weight.data_ptr(), x.data_ptr()):
                storages[storage.data_ptr()] = storage.nbytes() // 8
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        kept[mode] = sum(storages.values())
        del y
    factors = 2 * (32 + 24)
    assert kept["weight"] <= 2 * factors
    assert kept["activation"] <= 2 * tokens * 24 + 2 * factors


def test_product_equals_peft_hira_with_the_same_factors():
    """Oracle 12; on a weight of ones the change is the scaled product itself."""
    x = noise(3, 6)
    hira = peft.get_peft_model(
        toy(6, 4), peft.HiraConfig(r=2, target_modules=["linear"], hira_dropout=0.0)
    ).double()
    perturb(hira, 0.5)
    model = fit(toy(6, 4), r=2, form="product", lora_alpha=2, scale_shift="none")
    theirs, ours = hira.base_model.model.linear, adapter_of(model)
    with torch.no_grad():
        ours.input_factor.copy_(theirs.hira_A["default"])
        ours.output_factor.copy_(theirs.hira_B["default"])
    torch.testing.assert_close(model(x), hira(x), **EXACT)
    ones = torch.ones(4, 6, dtype=torch.float64)
    torch.testing.assert_close(
        ours.merged(ones, None)[0] - ones, ours.output_factor @ ours.input_factor, **EXACT
    )


def test_affine_without_its_product_equals_peft_lora():
    """Oracle 13."""
    x = noise(3, 6)
    lora = peft.get_peft_model(
        toy(6, 4), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["linear"])
    ).double()
    perturb(lora, 0.5)
    model = fit(toy(6, 4), r=2, form="affine", lora_alpha=6, scale_shift="none")
    theirs, ours = lora.base_model.model.linear, adapter_of(model)
    with torch.no_grad():
        ours.output_factor.zero_()
        ours.added_input.copy_(theirs.lora_A["default"].weight)
        ours.added_output.copy_(theirs.lora_B["default"].weight)
    torch.testing.assert_close(model(x), lora(x), **EXACT)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 20.0), form=st.sampled_from(["block", "tile", "product"]))
def test_bounded_multipliers_keep_every_sign(scale, form):
    model = fit(toy(8, 8), scale=scale, r=2, form=form, bounded=True)
    before = model.base_model.model.linear.base_layer.weight
    assert (new_weight(model) * before >= 0).all()


def test_unbounded_multipliers_can_flip_signs():
    model = fit(toy(8, 8), scale=5.0, r=2)
    assert (new_weight(model) * model.base_model.model.linear.base_layer.weight < 0).any()


@pytest.mark.parametrize("form", ["block", "product"])
def test_weight_decay_pulls_to_the_pretrained_weight(form):
    """Pitfall: decay of M rather than of its deviation would shrink the model itself."""
    model = fit(toy(8, 8), r=2, form=form)
    base = model.base_model.model.linear.base_layer.weight
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = (new_weight(model) - base).norm()
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=1.0)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    assert (new_weight(model) - base).norm() < 1e-3 * before


def test_both_factors_get_gradients_at_the_first_step():
    """Equation 4: unlike LoRA, where one of them starts at rest."""
    grads = results(fit(toy(8, 8), scale=0.0, r=2), noise(4, 8))[2:]
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_small_deviations_survive_a_bfloat16_base(mode):
    """Pitfall: 1 + δ in bfloat16 loses δ below 2⁻⁸; here it is multiplied in float32."""
    layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    adapter = BlockAdapter(HUTConfig(r=1, mode=mode, scale_shift="none"), 256, 256, 1)
    with torch.no_grad():
        adapter.input_factor.fill_(0.0035)
    assert torch.tensor(1.0035).to(torch.bfloat16) == 1
    x = noise(64, 256).to(torch.bfloat16)
    assert adapter(x, layer).dtype == torch.bfloat16
    assert not torch.equal(adapter(x, layer), layer(x))
    assert adapter.merged(layer.weight, None)[0].dtype == torch.bfloat16


def test_auto_scales_activations_for_rank_one_and_for_few_tokens():
    def takes_activations(r: int, tokens: int, **options: object) -> bool:
        adapter = BlockAdapter(HUTConfig(r=r, **options), 576, 576, r)
        return adapter._by_activation(torch.empty(tokens, 576))

    assert takes_activations(1, 4096)
    assert takes_activations(2, 1)
    assert not takes_activations(2, 512)
    assert not takes_activations(7, 1, strict=False)  # unequal blocks
    assert not takes_activations(1, 1, mode="weight")
    assert takes_activations(2, 512, mode="activation")


def test_a_rank_of_three_keeps_the_blocks_of_c_attn_inside_q_k_and_v():
    base = small_gpt2()
    config = HUTConfig(r=3, strict=False, target_modules=["c_attn"], scale_shift="none")
    model = peft.get_peft_model(base, config)
    adapter = model.base_model.model.transformer.h[0].attn.c_attn.adapters["default"]
    with torch.no_grad():
        adapter.input_factor[0].fill_(1.0)
    ones = torch.ones(96, 32)
    changed = (adapter.merged(ones, None)[0] != 1).any(dim=1)
    assert changed[:32].all()
    assert not changed[32:].any()


def test_rank_pattern_sets_the_rank_of_a_module():
    model = peft.get_peft_model(
        small_llama(), HUTConfig(r=2, target_modules="all-linear", rank_pattern={"q_proj": 4})
    )
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.adapters["default"].input_factor.shape == (4, 32)
    assert attention.v_proj.adapters["default"].input_factor.shape == (2, 32)


def test_two_active_adapters_multiply():
    x = noise(3, 6)
    model = fit(toy(6, 4, bias=False), r=2, scale_shift="none")
    model.add_adapter("second", HUTConfig(r=1, target_modules=["linear"], scale_shift="none"))
    model.base_model.set_adapter(["default", "second"])
    model.double()
    perturb(model, 0.5, seed=3)
    layer = model.base_model.model.linear
    ones = torch.ones(4, 6, dtype=torch.float64)
    multipliers = [layer.adapters[name].merged(ones, None)[0] for name in ("default", "second")]
    expected = layer.base_layer.weight * multipliers[0] * multipliers[1]
    torch.testing.assert_close(model(x), x @ expected.t(), **EXACT)


def test_products_differ_between_layers_and_seeds():
    def first_factors(seed: int) -> list[torch.Tensor]:
        model = peft.get_peft_model(
            small_llama(), HUTConfig(r=2, form="product", seed=seed, target_modules=["q_proj"])
        )
        return [p for n, p in model.named_parameters() if "input_factor" in n]

    one, two = first_factors(0)
    assert not torch.equal(one, two)
    assert not torch.equal(one, first_factors(1)[0])
    assert one.abs().max() <= 1
    assert one.abs().mean().item() == pytest.approx(0.5, abs=0.15)  # entries O(1), not 1/√inputs


def test_peft_approximates_it_by_a_lora():
    """Real use: `peft.tuners.lora.conversion` gives the truncated SVD of W_new − W."""
    model = fit(toy(12, 12, bias=False), r=2, scale_shift="scale")
    config, tensors = peft.convert_to_lora(model, rank=12)
    lora = peft.get_peft_model(toy(12, 12, bias=False), config)
    peft.set_peft_model_state_dict(lora, tensors)
    x = noise(3, 12)
    torch.testing.assert_close(lora.double()(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_adapter_that_changes_the_bias_is_not_converted_to_a_lora():
    layer = fit(toy(6, 6), r=2).base_model.model.linear
    assert not layer.supports_lora_conversion()
    layer = fit(toy(6, 6), r=2, scale_shift="none").base_model.model.linear
    assert layer.supports_lora_conversion()


def test_merging_warns_of_biases_that_the_architecture_would_drop():
    model = peft.get_peft_model(small_llama(), HUTConfig(r=1, target_modules=["q_proj"]))
    perturb(model)
    with pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.q_proj.*scale_shift='scale'"):
        model.merge_and_unload()


def test_merging_without_shift_makes_no_bias_and_survives_saving(tmp_path):
    config = HUTConfig(r=1, target_modules=["q_proj"], scale_shift="scale")
    model = peft.get_peft_model(small_llama(), config)
    perturb(model)
    ids = token_ids()
    expected = model(ids).logits
    merged = model.merge_and_unload()
    assert merged.model.layers[0].self_attn.q_proj.bias is None
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 0}, "HUTConfig.r"),
        ({"r": 2.0}, "HUTConfig.r"),
        ({"form": "ring"}, "HUTConfig.form"),
        ({"scale_shift": "yes"}, "HUTConfig.scale_shift"),
        ({"factors": "neither"}, "HUTConfig.factors"),
        ({"factors": "input", "form": "product"}, "HUTConfig.factors"),
        ({"mode": "fast"}, "HUTConfig.mode"),
        ({"mode": "activation", "form": "affine"}, "HUTConfig.mode"),
        ({"bounded": True, "form": "affine"}, "HUTConfig.bounded"),
        ({"lora_alpha": 0}, "HUTConfig.lora_alpha"),
        ({"rank_pattern": {"q": 0}}, "HUTConfig.rank_pattern"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        HUTConfig(**options)


@pytest.mark.parametrize(("r", "found"), [(5, "8 inputs and 6 outputs"), (7, "widths 8 and 6")])
def test_a_rank_that_does_not_fit_is_refused_with_the_widths(r, found):
    with pytest.raises(ConfigError, match=found) as error:
        fit(toy(8, 6), r=r, strict=True)
    assert "'linear'" in str(error.value)


def test_unequal_blocks_cannot_scale_activations():
    with pytest.raises(ConfigError, match=r"HUTConfig\.mode on module 'linear'"):
        fit(toy(8, 6), r=5, strict=False, mode="activation")


def test_a_head_tied_to_the_embedding_is_refused():
    with pytest.raises(ConfigError, match=r"lm_head.*embed_tokens"):
        peft.get_peft_model(small_llama(), HUTConfig(r=1, target_modules=["lm_head"]))


def test_dead_units_are_reported_with_their_share():
    base = toy(6, 4)
    with torch.no_grad():
        base.linear.weight[1] = 0.0
    with pytest.warns(UserWarning, match=r"1 of 10 .*10\.0%"):
        fit(base, r=2)


class Packed(nn.Linear):
    """Stands for a quantised layer: only its own forward can use the weight."""


@pytest.fixture
def packed(monkeypatch):
    def backend(layer: nn.Module) -> object:
        return object() if isinstance(layer, Packed) else None

    monkeypatch.setattr(hut, "resolve_quantization_backend", backend)
    base = toy(6, 4)
    layer = Packed(6, 4, dtype=torch.float64)
    layer.load_state_dict(base.linear.state_dict())
    base.linear = layer
    return base


def test_a_packed_layer_is_used_only_through_its_own_forward(packed, monkeypatch):
    """Quantised bases: r = 1 scales what goes in and what comes out."""
    x = noise(3, 6)
    expected = fit(toy(6, 4), r=1)(x)
    model = fit(packed, r=1)
    layer = model.base_model.model.linear.base_layer
    weight = layer.weight.detach().clone()
    monkeypatch.setattr(layer, "forward", lambda v: F.linear(v, weight, layer.bias))
    layer._parameters["weight"] = None
    torch.testing.assert_close(model(x), expected, **EXACT)


@pytest.mark.parametrize("options", [{"r": 2}, {"form": "product", "r": 1}])
def test_forms_that_need_the_weight_refuse_a_packed_layer(packed, options):
    with pytest.raises(ConfigError, match="Packed, whose weight is packed"):
        fit(packed, **options)


def test_products_and_affine_are_the_classes_behind_their_forms():
    for form, kind in (("product", ProductAdapter), ("affine", AffineAdapter)):
        assert type(adapter_of(fit(toy(6, 4), r=2, form=form))) is kind
