"""What optimizers of matrices share: roles of parameters, batches, state, bad gradients."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing.errors import ConfigError
from sparing.scale.matrix_optimizer import NotFiniteError
from sparing.scale.muon import Muon, step_factor
from sparing.scale.orthogonalize import newton_schulz, orthogonalize, spectral_norm
from sparing.scale.parameters import classify, counts, matrices

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1),
    "qwen3": transformers.Qwen3Config(
        **SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True
    ),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8),
    "mixtral": transformers.MixtralConfig(
        **SMALL, intermediate_size=24, num_key_value_heads=1, num_local_experts=4
    ),
    "vit": transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    ),
}  # fmt: skip


def build(kind: str) -> nn.Module:
    auto = (
        transformers.AutoModelForImageClassification
        if kind == "vit"
        else transformers.AutoModelForCausalLM
    )
    with torch.device("meta"):
        return auto.from_config(CONFIGS[kind])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_parameter_has_exactly_one_role(kind):
    model = build(kind)
    infos = classify(model)
    assert sorted(infos) == sorted(name for name, _ in model.named_parameters())
    assert sum(counts(infos.values()).values()) == sum(p.numel() for p in model.parameters())
    assert all(info.role == "vector" for info in infos.values() if len(info.shape) == 1)


def roles(kind: str) -> dict[str, str]:
    return {name: info.role for name, info in classify(build(kind)).items()}


def test_roles_of_a_mixture_of_experts():
    found = roles("mixtral")
    assert found["model.layers.0.mlp.gate.weight"] == "router"
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == "expert"
    assert found["lm_head.weight"] == "head"
    assert classify(build("mixtral"))["model.layers.0.mlp.experts.gate_up_proj"].blocks == 2


def test_a_tied_embedding_is_counted_once_and_says_so():
    infos = classify(build("qwen3"))
    assert infos["model.embed_tokens.weight"].tied
    assert "lm_head.weight" not in infos


def test_conv1d_is_transposed_and_fused():
    info = classify(build("gpt2"))["transformer.h.0.attn.c_attn.weight"]
    assert (info.transposed, info.blocks, info.outputs, info.inputs) == (True, 3, 48, 16)


def test_an_unknown_matrix_is_named_and_can_be_declared():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 4))

    with pytest.raises(ConfigError, match=r"table \(3, 4\) in Odd"):
        classify(Odd())
    assert classify(Odd(), {"table": "matrix"})["table"].role == "matrix"


def test_matrices_are_views():
    weight = torch.zeros(4, 6)
    matrices(weight, transposed=True, blocks=3)[2] += 1.0  # outputs 4 and 5, stored as columns
    assert weight[:, 4:].eq(1).all()
    assert weight[:, :4].eq(0).all()


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_polar_equals_svd(rows, columns, seed):
    x = numbers(rows, columns, seed=seed)
    exact = orthogonalize(x, "svd")
    torch.testing.assert_close(exact @ exact.mT @ exact, exact, rtol=1e-9, atol=1e-9)
    if torch.linalg.cond(x) < 1e3:
        torch.testing.assert_close(orthogonalize(x, "polar"), exact, rtol=1e-3, atol=1e-3)


def test_newton_schulz_is_odd_scale_free_and_turns_with_its_input():
    x = numbers(5, 8)
    turn = torch.linalg.qr(numbers(8, 8, seed=1)).Q
    found = newton_schulz(x)
    torch.testing.assert_close(newton_schulz(-3.0 * x), -found)
    torch.testing.assert_close(newton_schulz(x.mT), found.mT)
    torch.testing.assert_close(newton_schulz(x @ turn), found @ turn)
    assert newton_schulz(torch.zeros(3, 4)).abs().max() == 0


def test_stacks_of_any_depth_equal_single_matrices():
    x = numbers(2, 3, 7, 5)
    whole = newton_schulz(x)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(whole[i, j], newton_schulz(x[i, j]))


def test_power_iteration_finds_the_largest_singular_value():
    x = numbers(4, 20, 30)
    values, _ = spectral_norm(x, steps=300)
    torch.testing.assert_close(values, torch.linalg.matrix_norm(x, ord=2), rtol=1e-4, atol=0)


def test_muon_equals_torchs_own():
    model = nn.Linear(12, 12, bias=False)
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    mine = Muon(model.parameters(), lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(
        other.parameters(), lr=0.02, weight_decay=0.1, adjust_lr_fn="original"
    )
    for seed in range(20):
        for each, optimizer in ((model, mine), (other, theirs)):
            each.weight.grad = numbers(12, 12, seed=seed, dtype=torch.float32)
            optimizer.step()
    torch.testing.assert_close(model.weight, other.weight, rtol=0.05, atol=0.01)  # theirs: bf16


def test_step_factors():
    assert step_factor("spectral", 4, 16) == 0.5
    assert step_factor("jordan", 4, 16) == 1.0
    assert step_factor("moonlight", 4, 16) == pytest.approx(0.8)


def test_parameters_of_one_shape_are_orthogonalised_together(monkeypatch):
    calls = []
    from sparing.scale import matrix_optimizer

    def counted(x, kind):
        calls.append(tuple(x.shape))
        return orthogonalize(x, kind)

    monkeypatch.setattr(matrix_optimizer, "orthogonalize", counted)
    parameters = [nn.Parameter(numbers(*shape).float()) for shape in ((4, 6), (4, 6), (6, 4))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    Muon(parameters, lr=0.1).step()
    assert sorted(calls) == [(1, 6, 4), (2, 4, 6)]


def test_experts_and_fused_matrices_are_treated_one_by_one():
    fused = nn.Parameter(numbers(6, 9).float())  # Conv1D: 6 inputs, three blocks of 3 outputs
    parts = [nn.Parameter(block.clone()) for block in fused.detach().t().split(3)]
    fused.grad = numbers(6, 9, seed=1).float()
    for part, grad in zip(parts, fused.grad.t().split(3), strict=True):
        part.grad = grad.clone()
    Muon([{"params": [fused], "transposed": True, "blocks": 3}], lr=0.1).step()
    Muon(parts, lr=0.1).step()
    torch.testing.assert_close(fused.detach().t(), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_takes_the_same_steps_bit_for_bit(dtype):
    def start():
        weight = nn.Parameter(numbers(6, 4).to(dtype))
        bias = nn.Parameter(numbers(6).to(dtype))
        groups = [{"params": [weight]}, {"params": [bias], "algorithm": "adamw"}]
        return (weight, bias), Muon(groups, lr=0.1)

    def steps(parameters, optimizer, seeds):
        for seed in seeds:
            for parameter in parameters:
                parameter.grad = numbers(*parameter.shape, seed=seed).to(dtype)
            optimizer.step()

    parameters, optimizer = start()
    steps(parameters, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, again = start()
    for new, old in zip(resumed, parameters, strict=True):
        new.data.copy_(old)
    again.load_state_dict(saved)
    for each in ((parameters, optimizer), (resumed, again)):
        steps(*each, range(3, 6))
    for new, old in zip(resumed, parameters, strict=True):
        assert torch.equal(new, old)


def test_bfloat16_parameters_keep_a_float32_master():
    weight = nn.Parameter(torch.ones(4, 4).bfloat16())
    optimizer = Muon([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(20):
        weight.grad = torch.eye(4).bfloat16()
        optimizer.step()
    master = optimizer.state[weight]["master"]
    assert master.dtype == torch.float32
    assert master[0, 0] < 1 - 20 * 0.6e-4  # each step alone would be lost to rounding
    assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    weights = [nn.Parameter(numbers(3, 3).float()) for _ in range(2)]
    optimizer = Muon([{"params": [("first", weights[0]), ("second", weights[1])]}], lr=0.1)
    before = [weight.detach().clone() for weight in weights]
    weights[0].grad = torch.ones(3, 3)
    weights[1].grad = torch.full((3, 3), bad)
    with pytest.raises(NotFiniteError, match="second"):
        optimizer.step()
    optimizer.on_nan = "skip"
    optimizer.step()
    assert optimizer.skipped == 1
    assert not optimizer.state
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_a_huge_but_finite_gradient_is_none_that_is_not_finite():
    weight = nn.Parameter(numbers(3, 3).float())
    optimizer = Muon([weight], lr=0.1)
    weight.grad = torch.full((3, 3), 1e30)  # whose square overflows
    optimizer.step()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_vectors_are_adamws(decay):
    mine, theirs = (nn.Parameter(numbers(7).float()) for _ in range(2))
    group = {"params": [mine], "algorithm": "adamw", "weight_decay": decay}
    optimizers = (
        Muon([group], lr=0.01),
        torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=decay),
    )
    for seed in range(5):
        for each, optimizer in zip((mine, theirs), optimizers, strict=True):
            each.grad = numbers(7, seed=seed).float()
            optimizer.step()
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"lr": -1.0}, "lr"), ({"momentum": 1.0}, "momentum"), ({"weight_decay": -0.1}, "weight_dec")],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        Muon([nn.Parameter(torch.zeros(2, 2))], **options)


def test_a_vector_in_a_matrix_group_is_named():
    with pytest.raises(ConfigError, match="gain"):
        Muon([{"params": [("gain", nn.Parameter(torch.zeros(3)))]}])
