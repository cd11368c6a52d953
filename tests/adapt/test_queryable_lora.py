"""Queryable LoRA: shared atoms, routing weights, depth, and the LoRA of fixed weights."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from _queryable import (
    WIDTH,
    Net,
    adapted,
    adapters,
    config,
    drawn,
    gradients,
    inputs,
    language_model,
    lora_like,
    memory_of,
    router,
    routings,
)
from conftest import perturb, small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from sparing.adapt import (
    QueryableLoRAConfig,
    freeze_routing,
)
from sparing.adapt._queryable_blocks import place_layers
from sparing.errors import CheckpointError, ConfigError

# What it starts as, and how large it is.


def test_only_b_has_a_gradient_at_the_first_step() -> None:
    """Oracle 1."""
    for name, gradient in gradients(adapted(noise=0.0), inputs()).items():
        moves = gradient is not None and bool(gradient.any())
        assert moves == name.endswith(".b"), name


@pytest.mark.parametrize(
    ("instruction", "more"),
    [("none", 0), ("prior", 384 * 32 + 32 * 32), ("both", 2 * 384 * 32 + 32 * 32)],
)
def test_llama_7b_has_the_number_of_parameters_of_equation_12(instruction, more) -> None:
    """Oracle 14."""
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    options = {"r": 8, "num_atoms": 32, "d_query": 32, "block_size": 4}
    targets = ["q_proj", "v_proj"]
    model = peft.get_peft_model(
        base,
        QueryableLoRAConfig(
            target_modules=targets, instruction=instruction, instruction_width=384, **options
        ),
        low_cpu_mem_usage=True,
    )
    lora = 32 * 2 * 8 * (4096 + 4096)
    assert lora == 4_194_304
    expected = lora + 32 * (8 * 8 + 32) + 2 * 32 * 8 + 32 + 8 * 8 + more
    assert model.get_nb_trainable_parameters()[0] == expected
    if instruction == "none":
        assert expected == 4_194_304 + 2_048 + 1_024 + 512 + 32 + 64


def test_atoms_are_stored_once_for_the_whole_model(tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shared = sorted(name.rpartition("shared.")[2] for name in tensors if "shared." in name)
    assert shared == [
        *("atoms.keys", "atoms.values", "router.b_q", "router.w_b", "router.w_h", "router.w_z")
    ]
    assert tensors["base_model.queryable_lora_shared.atoms.values"].shape == (1, 4, 3, 3)
    assert len(tensors) == len(shared) + 2 * 8


def test_a_memory_for_each_block_is_a_control() -> None:
    model = adapted(shared_memory=False)
    assert memory_of(model).atoms.values.shape == (4, 4, 3, 3)
    assert memory_of(model).atoms.keys.shape == (4, 4, 5)
    before = model(inputs())
    with torch.no_grad():
        memory_of(model).atoms.values[3] += 1
    assert not torch.equal(model(inputs()), before)
    weights = routings(model)[0].weights
    found = routings(model)[0].operator
    expected = torch.eye(3).double() + torch.einsum(
        "btm,mij->btji", weights, memory_of(model).atoms.values[0]
    )
    torch.testing.assert_close(found, expected)


def test_atoms_are_distinct_and_of_the_declared_size() -> None:
    dense = memory_of(adapted(noise=0, num_atoms=400, top_k=2, r=4)).atoms.dense()[0]
    assert dense.var().item() == pytest.approx(0.25 / 4, rel=0.1)
    assert torch.pdist(dense.flatten(1)).min() > 0.1
    thin = memory_of(adapted(noise=0, num_atoms=400, top_k=2, r=4, atom_rank=2)).atoms.dense()[0]
    assert thin.var().item() == pytest.approx(0.25 / 4, rel=0.15)
    assert (torch.linalg.matrix_rank(thin) == 2).all()


# Reductions to LoRA.


def test_one_atom_is_lora_with_another_b() -> None:
    """Oracle 2: B' = B (I + C)."""
    model, x = adapted(num_atoms=1), inputs()
    c = memory_of(model).atoms.dense()[0, 0]
    factors = {n: (a.a, a.b @ (torch.eye(3).double() + c)) for n, a in adapters(model).items()}
    torch.testing.assert_close(model(x), lora_like(model, factors, 3, lora_alpha=16)(x))


def test_one_identity_atom_without_residual_is_lora() -> None:
    """Oracle 2."""
    model, x = adapted(num_atoms=1, residual=False), inputs()
    memory_of(model).atoms.values.data = torch.eye(3).double()[None, None]
    factors = {n: (a.a, a.b) for n, a in adapters(model).items()}
    lora = lora_like(model, factors, 3, lora_alpha=16)
    torch.testing.assert_close(model(x), lora(x), rtol=0, atol=1e-6)


def test_equal_atoms_make_the_router_irrelevant() -> None:
    """Oracle 3."""
    model, x = adapted(), inputs()
    with torch.no_grad():
        memory_of(model).atoms.values[:] = memory_of(model).atoms.values[:, :1]
    before = model(x)
    for name, gradient in gradients(model, x).items():
        if "shared.router" in name or name.endswith("keys"):
            assert gradient is not None
            assert gradient.abs().max() < 1e-11, name
    perturb(memory_of(model).router, scale=3.0)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_distinct_atoms_give_the_router_a_gradient() -> None:
    for name, gradient in gradients(adapted(), inputs()).items():
        assert gradient is not None, name
        assert gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_constant_routing_is_a_lora(make, tmp_path) -> None:
    """Oracle 4: merged and exported to PEFT, the logits are the same."""
    model = adapted(make(), task_type="CAUSAL_LM", routing="constant", lora_alpha=4)
    ids = token_ids()
    expected = model(ids).logits
    freeze_routing(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    assert type(lora.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(lora(ids).logits, expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_router_that_reads_nothing_is_frozen_exactly(tmp_path) -> None:
    """Oracle 4: a constant query found in the data, with W_h and W_z zero."""
    model, ids = language_model(), token_ids()
    with torch.no_grad():
        memory_of(model).router.w_h.zero_()
        memory_of(model).router.w_z.zero_()
    weights = freeze_routing(model, tmp_path / "lora", calibration=[{"input_ids": ids}])
    torch.testing.assert_close(weights[0], weights[1])
    lora = peft.PeftModel.from_pretrained(small_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(lora(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


# The weights over the atoms.


@given(seed=st.integers(0, 2**31), k=st.integers(1, 6), beta=st.floats(0, 4), scale=st.floats(0, 9))
@settings(max_examples=30, deadline=None)
def test_weights_are_a_sparse_distribution(seed: int, k: int, beta: float, scale: float) -> None:
    """Oracle 5."""
    keys, query = drawn(6, 5, seed=seed, scale=scale), drawn(3, 4, 5, seed=seed + 1)
    log_prior = drawn(3, 6, seed=seed + 2).log_softmax(-1)
    weights = router(beta, k).weights(query, keys, log_prior)
    assert (weights >= 0).all()
    assert ((weights > 0).sum(-1) <= k).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4).double())


def test_permuting_atoms_with_their_keys_changes_nothing() -> None:
    """Oracle 5."""
    model, x = adapted(instruction="prior", instruction_width=7, top_k=2), inputs()
    model.set_instruction(torch.randn(7))
    before, atoms = model(x), memory_of(model).atoms
    with torch.no_grad():
        for tensor in (atoms.values, atoms.keys, atoms.prior_keys):
            tensor.copy_(tensor[:, [2, 0, 3, 1]])
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        atoms.keys.copy_(atoms.keys[:, [1, 0, 2, 3]])
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("k", [2, 6])
def test_adding_a_constant_to_logits_or_log_prior_changes_nothing(k) -> None:
    """Oracle 6."""
    one, query, keys = router(k=k), drawn(4, 5), drawn(6, 5, seed=1)
    log_prior = drawn(6, seed=2).log_softmax(-1)
    expected = one.weights(query, keys, log_prior)
    torch.testing.assert_close(one.weights(query, keys, log_prior + 3), expected)
    same_shift = keys + drawn(5, seed=3)  # adds q·v to all logits of a query
    torch.testing.assert_close(one.weights(query, same_shift, log_prior), expected)


def test_a_uniform_prior_is_no_prior() -> None:
    """Oracle 6."""
    query, keys, prior = drawn(4, 5), drawn(6, 5, seed=1), drawn(6, seed=2).log_softmax(-1)
    expected = router().weights(query, keys, None)
    uniform = torch.full((6,), -math.log(6)).double()
    torch.testing.assert_close(router().weights(query, keys, uniform), expected)
    torch.testing.assert_close(router(beta=0).weights(query, keys, prior), expected)
    assert not torch.allclose(router().weights(query, keys, prior), expected)


def test_a_strong_prior_decides_alone() -> None:
    """Oracle 7."""
    prior = drawn(6, seed=2).log_softmax(-1)
    weights = router(beta=1e4).weights(drawn(9, 5, scale=5), drawn(6, 5, seed=1), prior)
    expected = F.one_hot(prior.argmax(), 6).double().expand(9, 6)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 2**31), beta=st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_weights_maximise_the_variational_objective(seed: int, beta: float) -> None:
    """Oracle 8: <p,l> - b KL(p|π) + (1-b) H(p), whose maximum for b = 1 is logsumexp(l + log π)."""
    query, keys = drawn(5, seed=seed), drawn(6, 5, seed=seed + 1)
    logits, log_prior = keys @ query / 5**0.5, drawn(6, seed=seed + 2).log_softmax(-1)

    def objective(p: Tensor) -> Tensor:
        entropy = -torch.special.xlogy(p, p).sum(-1)
        divergence = -entropy - p @ log_prior
        return p @ logits - beta * divergence + (1 - beta) * entropy

    best = objective(router(beta).weights(query, keys, log_prior))
    torch.testing.assert_close(
        best, torch.logsumexp(logits + beta * log_prior, -1), rtol=1e-12, atol=1e-12
    )
    others = drawn(200, 6, seed=seed + 3, scale=3).softmax(-1)
    assert (objective(others) <= best + 1e-12).all()


@given(seed=st.integers(0, 2**31), residual=st.booleans())
@settings(max_examples=20, deadline=None)
def test_updates_obey_the_norm_bound(seed: int, residual: bool) -> None:
    """Oracle 9: (α/r) |B| (1 + max |C|) |A| |x|, with equality for R at the largest atom."""
    model = adapted(Net(depth=1), seed=seed, residual=residual)
    adapter, memory = adapters(model)["blocks.0.up"], memory_of(model)
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.base_model.model.blocks[0].up
    layer.register_forward_hook(
        lambda m, args, out: seen.append((args[0], out - m.base_layer(args[0])))
    )
    model(inputs(seed=seed))
    ((x, delta),) = seen
    atoms = torch.linalg.matrix_norm(memory.atoms.dense()[0], ord=2)
    norm = torch.linalg.matrix_norm
    bound = adapter.scaling * norm(adapter.b, ord=2) * (residual + atoms.max())
    bound = bound * norm(adapter.a, ord=2) * x.norm(dim=-1)
    assert (delta.norm(dim=-1) <= bound * (1 + 1e-5)).all()
    if not residual:
        one_hot = F.one_hot(atoms.argmax(), 4).double()
        a, _ = adapter.factors(one_hot)
        torch.testing.assert_close(
            norm(a @ torch.linalg.pinv(adapter.a), ord=2), atoms.max(), rtol=1e-3, atol=1e-3
        )


def test_dense_top_k_equals_a_plain_softmax() -> None:
    """Oracle 12."""
    query, keys = drawn(4, 5), drawn(6, 5, seed=1)
    expected = (query @ keys.mT / 5**0.5).softmax(-1)
    torch.testing.assert_close(router(k=6).weights(query, keys, None), expected)


def test_routing_stays_in_float32_under_autocast() -> None:
    model = language_model(instruction="prior", instruction_width=7)
    model.set_instruction(torch.randn(7))
    model(token_ids())
    expected = routings(model)[0].weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(token_ids())
    found = routings(model)[0].weights
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 12), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)


def test_query_and_prior_are_those_of_equations_5_and_7() -> None:
    one = router()
    one.w_e = nn.Parameter(drawn(5, 7, seed=9))
    h, z, e, kappa = drawn(3, seed=1), drawn(3, seed=2), drawn(7, seed=3), drawn(6, 5, seed=4)
    expected = one.w_h @ h + one.w_z @ z + one.b_q + one.w_e @ e
    torch.testing.assert_close(one.query(h, z, e), expected)
    torch.testing.assert_close(one.query(h, None, None), one.w_h @ h + one.b_q)
    scores = torch.stack([(one.w_i @ e) @ k / 5**0.5 for k in kappa])
    torch.testing.assert_close(one.log_prior(e, kappa).exp(), scores.exp() / scores.exp().sum())


def test_the_log_prior_has_a_floor() -> None:
    one = router()
    prior = one.log_prior(drawn(7, scale=1e4), drawn(6, 5, seed=1))
    assert prior.min() == -30


# The whole computation, written out token by token.


def by_hand(model: peft.PeftModel, x: Tensor) -> Tensor:
    """Eqs. 1 to 11 for one token of `Net`, with Python loops."""
    memory, options, net = memory_of(model), memory_of(model).config, model.base_model.model
    atoms, router_ = memory.atoms.dense()[0], memory.router
    states: list[Tensor] = []
    averages: list[Tensor] = []
    for layer, block in enumerate(net.blocks):
        up, down = block.up.adapters["default"], block.down.adapters["default"]
        b = layer // options.block_size
        if layer % options.block_size == 0:
            first = (up.a + down.a) / 2 if options.block_state == "mean" else up.a
            h = first @ x
            if options.standardize_state:
                h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
            z = torch.zeros_like(h)
            if options.depth_summary == "attention" and b > 0:
                w_b = torch.zeros_like(h) if router_.w_b is None else router_.w_b[b]
                scores = torch.stack([w_b @ s / options.r**0.5 for s in states])
                for weight, state in zip(scores.softmax(0), states, strict=True):
                    z = z + weight * state
            elif options.depth_summary == "ema" and b > 0:
                z = options.ema_decay * averages[-1] + (1 - options.ema_decay) * states[-1]
            states.append(h)
            averages.append(z)
            q = router_.w_h @ h + router_.b_q
            if options.depth_summary != "none":
                q = q + router_.w_z @ z
            logits = memory.atoms.keys[0] @ q / options.d_query**0.5
            p = torch.zeros_like(logits)
            chosen = sorted(range(options.num_atoms), key=lambda m: -logits[m].item())
            chosen = chosen[: options.active_atoms]
            for m in chosen:
                p[m] = logits[m].exp() / sum(logits[c].exp() for c in chosen)
            mixed = sum(
                (p[m] * atoms[m] for m in range(options.num_atoms)), torch.zeros(3, 3).double()
            )
            operator = mixed + torch.eye(3).double() if options.residual else mixed
        scale = options.lora_alpha / options.r
        hidden = block.up.base_layer(x) + scale * up.b @ operator @ up.a @ x
        hidden = torch.tanh(hidden)
        x = x + block.down.base_layer(hidden) + scale * down.b @ operator @ down.a @ hidden
    return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 2, "top_k": 2},
        {"depth_summary": "ema", "ema_decay": 0.3},
        {"depth_summary": "none", "residual": False},
        {"block_state": "mean", "standardize_state": True},
        {"atom_rank": 2, "top_k": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_batched_computation_equals_a_loop_over_tokens(options) -> None:
    """Oracle 12."""
    model, x = adapted(**options), inputs()
    expected = torch.stack([torch.stack([by_hand(model, token) for token in row]) for row in x])
    torch.testing.assert_close(model(x), expected)


def test_states_are_standardised_from_rank_8_on() -> None:
    assert not memory_of(adapted(r=7)).router.standardize
    assert memory_of(adapted(r=8)).router.standardize
    assert not memory_of(adapted(r=8, standardize_state=False)).router.standardize


def test_one_update_has_rank_r_and_differs_between_inputs() -> None:
    """Oracle 13: the Jacobian with the routing held is B R A; R differs from token to token."""
    model = adapted()
    model(inputs())
    operators = routings(model)[0].operator.flatten(0, 1)
    adapter = adapters(model)["blocks.0.up"]
    updates = adapter.b @ operators.mT @ adapter.a
    assert (torch.linalg.matrix_rank(updates) <= 3).all()
    assert torch.pdist(updates.flatten(1)).min() > 1e-4


# Depth.


def test_the_first_block_has_no_summary_and_one_block_no_numbers_for_it() -> None:
    """Oracle 10."""
    model = adapted()
    model(inputs())
    assert routings(model)[0].summary is None
    assert routings(model)[1].summary is not None
    one = memory_of(adapted(block_size=4)).router
    assert one.w_z is None
    assert one.w_b is None
    two = memory_of(adapted(block_size=2)).router
    assert two.w_z is not None
    assert two.w_b is None
    x = inputs()
    assert torch.equal(adapted(block_size=4)(x), adapted(block_size=4, depth_summary="ema")(x))


def test_later_blocks_never_change_earlier_routing() -> None:
    """Oracle 10."""
    model, x = adapted(), inputs()
    model(x)
    before = {block: r.weights for block, r in routings(model).items()}
    changed = model.base_model.model.blocks[2]
    perturb(changed, scale=2.0)
    model(x)
    after = {block: r.weights for block, r in routings(model).items()}
    assert all(torch.equal(before[b], after[b]) for b in (0, 1))
    assert not torch.allclose(before[2], after[2])
    assert not torch.allclose(before[3], after[3])


def test_the_summary_reads_earlier_blocks() -> None:
    """The weights of the last block depend on the state of the first through W_z alone."""
    model, x = adapted(Net(depth=3)), inputs()
    memory, first = memory_of(model), adapters(model)["blocks.0.up"]
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.b.zero_()
    model(x)
    before = routings(model)[2].weights
    perturb(first, scale=1.0)
    with torch.no_grad():
        first.b.zero_()
    model(x)
    assert not torch.allclose(routings(model)[2].weights, before)
    with torch.no_grad():
        memory.router.w_z.zero_()
    model(x)
    without = routings(model)[2].weights
    perturb(first, scale=1.0, seed=1)
    with torch.no_grad():
        first.b.zero_()
    model(x)
    assert torch.equal(routings(model)[2].weights, without)


def test_layers_are_cut_into_blocks_and_a_shorter_last_one_is_told() -> None:
    names = [f"blocks.{i}.{part}" for i in range(4) for part in ("up", "down")]
    with pytest.warns(UserWarning, match="last block has 1"):
        places = place_layers(Net(), names, 3)
    assert [places[name].block for name in names] == [0] * 6 + [1] * 2
    assert [places[name].opens_block for name in names] == [True] * 2 + [False] * 4 + [True] * 2
    assert places["blocks.3.up"].before == (0,)


def test_stacks_and_outer_layers_are_blocks_of_their_own() -> None:
    base = nn.ModuleDict({"image": Net(2), "text": Net(2), "head": nn.Linear(WIDTH, 3)})
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    places = place_layers(base, names, 1)
    assert places["text.blocks.0.up"].before == ()
    assert places["text.blocks.1.up"].before == (2,)
    assert places["head"].block == 4
    assert places["head"].before == ()


# What cannot work is said so.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "Config.r"),
        ({"r": {"up": 2, "down": 3}}, "for all layers"),
        ({"num_atoms": 0}, "num_atoms"),
        ({"block_size": 0}, "block_size"),
        ({"d_query": 0}, "d_query"),
        ({"atom_rank": 0}, "atom_rank"),
        ({"instruction_width": 0}, "instruction_width"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"top_k": 5}, "num_atoms = 4"),
        ({"top_k": 0}, "top_k"),
        ({"depth_summary": "mean"}, "depth_summary"),
        ({"block_state": "last"}, "block_state"),
        ({"granularity": "word"}, "granularity"),
        ({"routing": "none"}, "routing"),
        ({"instruction": "text"}, "Config.instruction"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"entropy_floor": 1.5}, "entropy_floor"),
        ({"prior_beta": -1}, "prior_beta"),
        ({"balance_weight": -1}, "balance_weight"),
        ({"entropy_weight": -1}, "entropy_weight"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"frozen_atoms": 4}, "frozen_atoms"),
        ({"described_atoms": True}, "described_atoms"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_two_atoms_are_mixed_of_many_and_all_of_few() -> None:
    assert config(num_atoms=16).active_atoms == 16
    assert config(num_atoms=17).active_atoms == 2
    assert config(num_atoms=17, top_k=5).active_atoms == 5


def test_an_encoder_with_a_decoder_is_refused() -> None:
    small = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    with pytest.raises(ConfigError, match="cross-attention"):
        adapted(transformers.T5ForConditionalGeneration(small))


def test_an_adapter_of_another_size_is_refused(tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    for options in ({"r": 2}, {"num_atoms": 5}, {"d_query": 6}):
        with pytest.raises(CheckpointError):
            peft.PeftModel.from_pretrained(Net(), tmp_path, config=config(**options))
