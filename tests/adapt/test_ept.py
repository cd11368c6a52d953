"""EPT: seeds, kernels and gates, and what their mixtures amount to."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparing.adapt import EPTConfig
from sparing.adapt import _ept_contrast as contrast
from sparing.adapt._ept_pyramid import PROJECTIONS, Seed
from sparing.adapt._ept_routers import double_softmax
from sparing.adapt.ept import EPTAdapter
from sparing.errors import ConfigError

EXACT = {"rtol": 1e-12, "atol": 1e-12}
PYRAMID = [2, 2, 4, 4, 6, 6, 8, 8]


class Toy(nn.Module):
    """One linear layer under a name."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def fit(inputs: int, outputs: int, noise: float = 0.3, **options: object) -> peft.PeftModel:
    """A toy under EPT in float64, with noise in all of its parameters."""
    chosen = {"r": 3, "kernel_sizes": [2, 3, 4], "target_modules": ["linear"]}
    config = EPTConfig(**(chosen | options))  # type: ignore[arg-type]
    model = peft.get_peft_model(Toy(inputs, outputs), config).double().eval()
    perturb(model, noise)
    return model


def adapter_of(model: peft.PeftModel) -> EPTAdapter:
    return model.base_model.model.linear.adapters["default"]


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expert(adapter: EPTAdapter, i: int) -> Tensor:
    """W_i by torch's own transposed convolution, padded with zeros (eqs. 2 and 3)."""
    size = adapter.config.kernel_sizes[i]
    n, m = adapter.outputs // size, adapter.inputs // size
    z = adapter.b[:n] @ adapter.a[:, :m]
    start = sum(s * s for s in adapter.config.kernel_sizes[:i])
    kernel = adapter.kernels[start : start + size * size].view(1, 1, size, size)
    blown = F.conv_transpose2d(z[None, None], kernel, stride=size)[0, 0]
    return F.pad(blown, (0, adapter.inputs - m * size, 0, adapter.outputs - n * size)).detach()


def seed_and_kernels(inputs: int, outputs: int, sizes: list[int]) -> tuple[Seed, dict[int, Tensor]]:
    smallest = min(sizes)
    seed = Seed(noise(3, inputs // smallest), noise(outputs // smallest, 3), inputs, outputs)
    return seed, {size: noise(size, size, seed=size) for size in sizes}


# The pyramid.


def test_transposed_convolution_is_the_kronecker_product() -> None:
    """Oracle 2."""
    z, kernel = noise(5, 7), noise(3, 3)
    convolved = F.conv_transpose2d(z[None, None], kernel[None, None], stride=3)[0, 0]
    assert torch.equal(convolved, torch.kron(z, kernel))


@given(
    inputs=st.integers(8, 25),
    outputs=st.integers(8, 25),
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True),
)
@settings(max_examples=40, deadline=None)
def test_both_fast_forms_equal_the_experts_as_matrices(inputs, outputs, sizes) -> None:
    """Oracle 3, for widths that the sizes divide or do not."""
    seed, kernels = seed_and_kernels(inputs, outputs, sizes)
    expected = torch.zeros(outputs, inputs, dtype=torch.float64)
    for size, kernel in kernels.items():
        a, b = seed.pruned(size)
        blown = torch.kron(b @ a, kernel)
        expected += F.pad(blown, (0, inputs - blown.shape[1], 0, outputs - blown.shape[0]))
    x, kron = noise(2, 4, inputs), PROJECTIONS["kron"]
    torch.testing.assert_close(kron.apply(x, seed, kernels), x @ expected.mT, **EXACT)
    down, up = kron.factors(seed, kernels)
    assert len(down) == sum(kron.rank(3, size) for size in sizes)
    torch.testing.assert_close(up @ down, expected, **EXACT)


@given(inputs=st.integers(6, 20), outputs=st.integers(6, 20))
@settings(max_examples=15, deadline=None)
def test_channel_kernels_follow_the_released_code(inputs, outputs) -> None:
    """Output c·s + d is channel c of Z on the first inputs/s features, times K[c, d]."""
    sizes, channel = (2, 3), PROJECTIONS["channel"]
    seed = Seed(noise(3, inputs // 2), noise(outputs // 2, 3), inputs, outputs)
    kernels = {s: noise(*channel.kernel_shape(s, outputs), seed=s) for s in sizes}
    x = noise(4, inputs)
    expected = torch.zeros(4, outputs, dtype=torch.float64)
    for s in sizes:
        n, m = outputs // s, inputs // s
        y = x[:, :m] @ (seed.b[:n] @ seed.a[:, :m]).mT
        for c in range(n):
            for d in range(s):
                expected[:, c * s + d] += y[:, c] * kernels[s][c, d]
    torch.testing.assert_close(channel.apply(x, seed, kernels), expected, **EXACT)
    down, up = channel.factors(seed, kernels)
    torch.testing.assert_close(x @ down.mT @ up.mT, expected, **EXACT)
    x[:, inputs // 2 :] += 1
    torch.testing.assert_close(channel.apply(x, seed, kernels), expected, **EXACT)


def test_kronecker_kernels_read_every_input_that_fills_a_column() -> None:
    seed, kernels = seed_and_kernels(13, 12, [4])
    x = noise(1, 13).requires_grad_()
    PROJECTIONS["kron"].apply(x, seed, kernels).square().sum().backward()
    assert x.grad[0, :12].ne(0).all()
    assert x.grad[0, 12] == 0


def test_a_larger_expert_sees_the_corner_of_what_a_smaller_one_sees() -> None:
    """Oracle 11."""
    seed, _ = seed_and_kernels(24, 30, [2, 6])
    small, large = ((b @ a) for a, b in (seed.pruned(2), seed.pruned(6)))
    torch.testing.assert_close(large, small[:5, :4], **EXACT)


@pytest.mark.parametrize(("size", "r"), [(1, 3), (2, 3), (4, 2), (6, 2)])
def test_the_rank_of_an_expert_is_r_times_its_size(size, r) -> None:
    """Oracle 5."""
    model = fit(48, 36, r=r, kernel_sizes=[size], top_k=1, noise=1.0)
    assert torch.linalg.matrix_rank(adapter_of(model).delta_weight()) == r * size


def test_one_expert_of_size_one_is_lora() -> None:
    """Oracle 4: outputs and gradients equal those of peft's LoRA with the same factors."""
    options = {"kernel_sizes": [1], "top_k": 1, "dim_scaling": "none", "lora_alpha": 6}
    model = fit(10, 7, **options)
    adapter = adapter_of(model)
    lora = peft.get_peft_model(
        Toy(10, 7), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["linear"])
    ).double()
    layer = lora.base_model.model.linear
    with torch.no_grad():
        adapter.kernels.fill_(1.0)
        layer.lora_A["default"].weight.copy_(adapter.a)
        layer.lora_B["default"].weight.copy_(adapter.b)
    for rows in (1, 5):  # either form
        x = noise(rows, 10)
        torch.testing.assert_close(model(x), lora(x), **EXACT)
    model(x).square().sum().backward()
    lora(x).square().sum().backward()
    torch.testing.assert_close(adapter.a.grad, layer.lora_A["default"].weight.grad, **EXACT)
    torch.testing.assert_close(adapter.b.grad, layer.lora_B["default"].weight.grad, **EXACT)


# The mixture.


@pytest.mark.parametrize("dim_scaling", ["d_over_T", "none"])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_output_is_the_weighted_sum_over_the_chosen_experts(dim_scaling, rows) -> None:
    """Equation 4, term by term, with weights found by hand (eq. 6)."""
    model = fit(13, 11, kernel_sizes=[2, 3, 2, 5], num_tasks=3, dim_scaling=dim_scaling)
    adapter, routers, x = adapter_of(model), model.base_model.routers(), noise(rows, 13)
    for task in range(3):
        model.set_task(task)
        logits = routers.gates["13"][0] @ routers.embeddings["13"][0, task] + routers.biases[0]
        p = logits.softmax(0)
        first, second = p.topk(2).indices.tolist()
        total = p[first].exp() + p[second].exp()
        expected = F.linear(x, model.base_model.model.linear.base_layer.weight)
        expected = expected + model.base_model.model.linear.base_layer.bias
        for i in (first, second):
            share = p[i].exp() / total
            d = adapter.config.kernel_sizes[i] / 3 if dim_scaling == "d_over_T" else 1
            expected = expected + 32 / 3 * d * share * x @ expert(adapter, i).mT
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-8)


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=8))
@settings(max_examples=60, deadline=None)
def test_two_weights_are_between_27_and_73_percent(logits) -> None:
    """Oracle 13: a softmax of a softmax."""
    weights = double_softmax(torch.tensor(logits, dtype=torch.float64), 2)
    chosen = weights[weights > 0]
    assert len(chosen) == 2
    assert abs(chosen.sum() - 1) < 1e-12
    edge = 1 / (1 + math.e)
    assert edge - 1e-9 <= chosen.min()
    assert chosen.max() <= 1 - edge + 1e-9


def test_a_single_expert_has_weight_one() -> None:
    """Oracle 13."""
    weights = double_softmax(noise(6, 5), 1)
    assert torch.equal(weights.amax(1), torch.ones(6, dtype=torch.float64))
    assert weights.ne(0).sum() == 6


def test_permuting_the_experts_changes_nothing() -> None:
    """Oracle 14: kernels and rows of the gate together."""
    sizes, order = [2, 3, 2, 5], [2, 0, 3, 1]
    model = fit(13, 11, kernel_sizes=sizes, num_tasks=2)
    other = fit(13, 11, kernel_sizes=[sizes[i] for i in order], num_tasks=2)
    source, target = adapter_of(model), adapter_of(other)
    routers, permuted = model.base_model.routers(), other.base_model.routers()
    with torch.no_grad():
        target.a.copy_(source.a)
        target.b.copy_(source.b)
        pieces = source.kernels.split(source.numels)
        target.kernels.copy_(torch.cat([pieces[i] for i in order]))
        permuted.embeddings["13"].copy_(routers.embeddings["13"])
        permuted.gates["13"].copy_(routers.gates["13"][:, order])
        permuted.biases.copy_(routers.biases[:, order])
    for task in range(2):
        model.set_task(task)
        other.set_task(task)
        torch.testing.assert_close(model(noise(3, 13)), other(noise(3, 13)), **EXACT)


def test_tokens_are_routed_by_their_own_input() -> None:
    """`router="token"`, token by token and expert by expert."""
    for projection in ("kron", "channel"):
        model = fit(13, 11, kernel_sizes=[2, 3, 2, 5], router="token", projection=projection)
        adapter, x = adapter_of(model), noise(2, 3, 13)
        weights = double_softmax(x @ adapter.gate.mT, 2)
        assert (weights > 0).sum(-1).eq(2).all()
        kernels = [k.detach() for k in adapter._kernels(torch.float64)]
        seed = Seed(adapter.a, adapter.b, 13, 11)
        expected = model.base_model.model.linear.base_layer(x)
        for i, size in enumerate(adapter.config.kernel_sizes):
            y = adapter.projection.apply(x, seed, {size: kernels[i] * 32 / 3 * size})
            expected = expected + weights[..., i, None] * y
        torch.testing.assert_close(model(x), expected, **EXACT)


class Shapes(TorchDispatchMode):
    """Collects how many numbers every tensor has that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.seen.add(one.numel())
        return out


@pytest.mark.parametrize("rows", [1, 50])
def test_no_expert_is_ever_built_as_a_matrix(rows) -> None:
    """Neither in the forward nor in the backward, for few and for many tokens."""
    model = fit(128, 96, kernel_sizes=PYRAMID, r=2).train()
    adapter = adapter_of(model)
    x = noise(rows, 128).requires_grad_()
    with Shapes() as shapes:
        adapter.delta(x).square().sum().backward()
    assert max(shapes.seen) < 128 * 96 / 1.5


# What it starts as, and what learns.


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e6))
@settings(max_examples=15, deadline=None)
def test_a_new_adapter_adds_exactly_zero(seed, scale) -> None:
    """Oracle 1."""
    model = fit(13, 11, noise=0.0, seed=seed, num_tasks=2)
    model.set_task(1)
    x = scale * noise(4, 13)
    assert torch.equal(model(x), model.base_model.model.linear.base_layer(x))


def test_only_chosen_kernels_learn_in_the_first_step() -> None:
    """Oracle 7."""
    model = fit(13, 11, noise=0.0, kernel_sizes=[2, 3, 4, 5], num_tasks=2).train()
    model.set_task(0)
    model(noise(4, 13)).square().sum().backward()
    adapter = adapter_of(model)
    assert not adapter.a.grad.any()
    assert not adapter.b.grad.any()
    chosen = model.base_model.routers().all_gates().chosen[0][0]
    for i, piece in enumerate(adapter.kernels.grad.split(adapter.numels)):
        assert bool(piece.any()) == (i in chosen)


def test_experts_that_a_task_does_not_use_get_no_gradient_from_it() -> None:
    """Oracle 8; nor does the embedding of another task. The gates' rows all get some, as the
    probabilities of the chosen ones are a softmax over all."""
    model = fit(13, 11, kernel_sizes=[2, 3, 4, 5], num_tasks=3, lambda_con=0.0).train()
    routers, adapter = model.base_model.routers(), adapter_of(model)
    for task in range(3):
        model.zero_grad()
        model.set_task(task)
        model(noise(4, 13)).square().sum().backward()
        chosen = routers.all_gates().chosen[0][task]
        assert len(chosen) == 2
        for i, piece in enumerate(adapter.kernels.grad.split(adapter.numels)):
            assert bool(piece.any()) == (i in chosen)
            assert routers.gates["13"].grad[0, i].any()
        for other in range(3):
            assert bool(routers.embeddings["13"].grad[0, other].any()) == (other == task)


def test_seed_and_kernels_both_zero_never_learn() -> None:
    """Oracle 6: a dead point, however long one trains."""
    model = fit(13, 11, noise=0.0, num_tasks=2).train()
    adapter = adapter_of(model)
    nn.init.zeros_(adapter.b)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.set_task(0)
    losses = []
    for _ in range(20):
        loss = model(noise(4, 13)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert len(set(losses)) == 1


def test_the_dead_point_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing ever learns"):
        EPTConfig(seed_init="lora")
    alive = EPTConfig(seed_init="lora", kernel_init="kaiming", target_modules=["linear"])
    adapter = adapter_of(peft.get_peft_model(Toy(16, 16), alive))
    assert adapter.a.any()
    assert adapter.kernels.any()
    assert not adapter.b.any()


def test_initial_values_have_the_stated_spread() -> None:
    def new(**options: object) -> EPTAdapter:
        config = EPTConfig(r=4, target_modules=["linear"], num_tasks=2, **options)
        model = peft.get_peft_model(Toy(2048, 2048), config)
        new.routers = model.base_model.routers()
        return adapter_of(model)

    adapter = new(seed_scale=0.5)
    assert abs(adapter.a.std() - 0.5) < 0.02
    assert abs(adapter.b.std() - 0.5) < 0.02
    assert abs(new.routers.embeddings["2048"].std() * 2048**0.5 - 1) < 0.05
    assert new.routers.gates["2048"].abs().max() <= (6 / 2048) ** 0.5
    released = new(seed_init="kaiming", kernel_init="kaiming", task_emb_std=0.01, seed_scale=1.0)
    assert abs(new.routers.embeddings["2048"].std() - 0.01) < 5e-4
    assert 0.99 / 32 < released.a.abs().max() <= 1 / 32
    assert 0.99 / 2 < released.b.abs().max() <= 1 / 2
    for size, piece in zip(PYRAMID, released.kernels.split(released.numels), strict=True):
        assert 0.2 / size**0.5 < piece.abs().max() <= 1 / size**0.5


def test_wide_embeddings_tell_tasks_apart_from_the_start() -> None:
    """Pitfall: at 0.01 the gate's bias decides, and tasks share their experts."""

    def pairs(std: float | None) -> float:
        config = EPTConfig(num_tasks=4, task_emb_std=std, target_modules=["linear"])
        base = nn.ModuleDict({f"{i}_linear": nn.Linear(48, 48) for i in range(40)})
        config.target_modules = r".*linear"
        chosen = peft.get_peft_model(base, config).base_model.routers().all_gates().chosen
        return sum(len({tuple(c) for c in layer}) for layer in chosen) / len(chosen)

    assert pairs(0.01) < 2.2
    assert pairs(None) > 3.3


# Counts.


def test_a_layer_of_width_768_has_the_papers_6384_numbers() -> None:
    """Oracle 10."""
    config = EPTConfig(r=8, kernel_sizes=PYRAMID, target_modules=["linear"])
    counts = peft.get_peft_model(Toy(768, 768), config).parameter_counts()
    assert (counts.seeds, counts.kernels, counts.without_routers) == (6144, 240, 6384)


@pytest.mark.parametrize(("projection", "kernels"), [("kron", 46_080), ("channel", 1_622_016)])
def test_t5_base_has_the_papers_number_of_parameters(projection, kernels) -> None:
    """Oracle 10: 0.41 M a task is seeds and the released code's kernels, without routers."""
    t5 = transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    with torch.device("meta"):
        base = transformers.T5ForConditionalGeneration(t5)
        model = peft.get_peft_model(
            base,
            EPTConfig(
                num_tasks=8,
                kernel_sizes=PYRAMID,
                projection=projection,
                target_modules=["q", "k", "v", "o", "wi", "wo"],
            ),
        )
    counts = model.parameter_counts()
    assert len(model.base_model.targeted_module_names) == 192
    assert counts.seeds == 1_622_016
    assert counts.kernels == kernels
    assert counts.routers == 3_245_568
    assert counts.total == model.get_nb_trainable_parameters()[0]
    if projection == "channel":
        without, included = counts.per_task
        assert round(without / 1e6, 2) == 0.41
        assert round(included / 1e6, 2) == 0.81


def test_a_single_task_needs_no_embeddings() -> None:
    model = peft.get_peft_model(Toy(32, 16), EPTConfig(target_modules=["linear"]))
    assert model.peft_config["default"].router == "table"
    assert model.parameter_counts().routers == 8


# The contrastive loss.


def test_equal_cosines_cost_the_logarithm_of_the_number_of_tasks() -> None:
    """Oracle 12."""
    embedding = torch.eye(5, dtype=torch.float64)
    rows = torch.ones(3, 5, dtype=torch.float64)
    loss = contrast.contrastive_loss(rows, embedding, [0, 3, 4], 0.05)
    assert abs(loss.item() - math.log(5)) < 1e-12


@given(scale=st.floats(1e-3, 1e3), other=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_the_contrastive_loss_ignores_lengths(scale, other) -> None:
    """Oracle 12."""
    rows, embedding = noise(4, 6), noise(3, 6, seed=9)
    expected = contrast.contrastive_loss(rows, embedding, [0, 1, 2, 0], 0.05)
    found = contrast.contrastive_loss(rows * scale, embedding * other, [0, 1, 2, 0], 0.05)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_contrastive_loss_is_the_cross_entropy_of_cosines() -> None:
    """Equation 7."""
    rows, embedding, tasks = noise(4, 6), noise(3, 6, seed=9), [2, 0, 1, 1]
    expected = 0.0
    for row, task in zip(rows, tasks, strict=True):
        cosines = [F.cosine_similarity(row, e, dim=0) / 0.05 for e in embedding]
        expected += (torch.stack(cosines).logsumexp(0) - cosines[task]).item() / 4
    found = contrast.contrastive_loss(rows, embedding, tasks, 0.05)
    assert abs(found.item() - expected) < 1e-9


def test_pooling_leaves_padding_out() -> None:
    """Pitfall: with padding on the left, the first token is none."""
    x = noise(2, 4, 3)
    real = torch.tensor([[False, False, True, True], [True, True, True, False]])
    first = contrast.pooled(x, "first", real)
    assert torch.equal(first, torch.stack([x[0, 2], x[1, 0]]))
    averaged = contrast.pooled(x, "mean", real)
    torch.testing.assert_close(averaged, torch.stack([x[0, 2:].mean(0), x[1, :3].mean(0)]))
    assert torch.equal(contrast.pooled(x, "first", None), x[:, 0])
    assert torch.equal(contrast.pooled(x[:, 0], "mean", None), x[:, 0])


# Options.


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", 0),
        ("num_tasks", 0),
        ("kernel_sizes", []),
        ("kernel_sizes", [0, 2]),
        ("top_k", 0),
        ("top_k", 9),
        ("task_names", ["a", "a"]),
        ("router", "fixed"),
        ("projection", "conv"),
        ("dim_scaling", "d"),
        ("contrastive_input", "last"),
        ("seed_init", "zero"),
        ("kernel_init", "one"),
        ("lora_alpha", 0),
        ("tau", 0),
        ("router_temperature", -1),
        ("seed_scale", 0),
        ("task_emb_std", 0),
        ("lambda_con", -0.1),
        ("lora_dropout", 1.0),
    ],
)
def test_an_option_out_of_range_is_named(option, value) -> None:
    with pytest.raises(ConfigError, match=f"EPTConfig.{option}"):
        EPTConfig(**{option: value})


def test_names_that_contradict_the_number_of_tasks_are_refused() -> None:
    assert EPTConfig(task_names=["a", "b", "c"]).num_tasks == 3
    with pytest.raises(ConfigError, match="task_names"):
        EPTConfig(num_tasks=2, task_names=["a", "b", "c"])


def test_a_kernel_larger_than_a_layer_names_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"'linear'.*size 8 for 6 inputs"):
        peft.get_peft_model(Toy(6, 32), EPTConfig(target_modules=["linear"]))
