"""The recorder splits the fall of the loss exactly, and leaves training as it was."""

import copy
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from _recorder_processes import record_in_process
from conftest import small_gpt2, small_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    Qwen3Config,
    Trainer,
    TrainingArguments,
)

from sparing.errors import CheckpointError, ConfigError, DataError
from sparing.scale import TrajectoryRecorder
from sparing.scale.fast_hp_transfer import (
    EmaSchedule,
    Trajectory,
    alignment_matrix,
    easy_and_hard,
    leading,
    mean_component_index,
    partial_sums,
    spectrum,
    splits,
)
from sparing.scale.fast_hp_transfer.alignment import by_magnitude

RAW = EmaSchedule.constant(0.0)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def phi(gradient: Tensor, change: Tensor, side: str = "inputs") -> Tensor:
    return partial_sums(spectrum(alignment_matrix(gradient, change, side)))  # type: ignore[arg-type]


def msign(matrix: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


# The alignment matrix


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_eigenvalues_sum_to_the_inner_product_on_both_sides(rows, columns, seed):
    g, w = numbers(rows, columns, seed=seed), numbers(rows, columns, seed=seed + 1)
    for side in ("inputs", "outputs"):
        assert float(phi(g, w, side)[-1]) == pytest.approx(float((g * w).sum()), abs=1e-10)


def test_a_gradient_step_gives_squared_singular_values():
    g = numbers(5, 7)
    expected = -0.3 * torch.linalg.svdvals(g).square().cumsum(0)
    torch.testing.assert_close(phi(g, -0.3 * g)[1:6], expected)
    assert (spectrum(alignment_matrix(g, -0.3 * g)) <= 1e-12).all()


def test_an_orthogonalised_step_gives_singular_values():
    g = numbers(7, 5)
    torch.testing.assert_close(
        phi(g, -0.3 * msign(g))[1:], -0.3 * torch.linalg.svdvals(g).cumsum(0)
    )


def test_sides_agree_for_aligned_steps_and_differ_otherwise():
    g = numbers(6, 6)
    for step in (-g, -msign(g)):
        torch.testing.assert_close(phi(g, step), phi(g, step, "outputs"))
    other = numbers(6, 6, seed=5)
    inputs, outputs = phi(g, other), phi(g, other, "outputs")
    torch.testing.assert_close(inputs[-1], outputs[-1])
    assert not torch.allclose(inputs[1:-1], outputs[1:-1], rtol=1e-2)


def test_gauge_symmetry():
    g, w = numbers(6, 4), numbers(6, 4, seed=1)
    left, right = msign(numbers(6, 6, seed=2)), msign(numbers(4, 4, seed=3))
    torch.testing.assert_close(alignment_matrix(left @ g, left @ w), alignment_matrix(g, w))
    torch.testing.assert_close(phi(g @ right, w @ right), phi(g, w))


def test_the_order_is_by_magnitude_and_the_sums_are_signed():
    found = by_magnitude(torch.tensor([1.0, -3.0, 2.0]))
    assert found.tolist() == [-3.0, 2.0, 1.0]
    assert partial_sums(found).tolist() == [0.0, -3.0, -1.0, 0.0]


def test_sixteen_bits_are_widened_before_the_products():
    g, w = (numbers(64, 48, seed=s).bfloat16() for s in (0, 1))
    exact = alignment_matrix(g.double(), w.double())
    assert (alignment_matrix(g, w) - exact).abs().max() < 1e-4
    assert alignment_matrix(g, w).dtype == torch.float32


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_lanczos_finds_the_leading_eigenvalues(side):
    g, w = numbers(40, 60), numbers(40, 60, seed=1)
    expected = spectrum(alignment_matrix(g, w, side))[:5]
    torch.testing.assert_close(leading(g, w, 5, side), expected)
    assert torch.equal(leading(0 * g, w, 5, side), torch.zeros(5, dtype=torch.float64))
    assert len(leading(g, w, 100, "outputs")) == 40


# Which side of which matrix


def test_every_matrix_is_split_on_the_models_width():
    found = splits(small_llama())
    sides = {
        name.split(".", 2)[-1]: split.side for name, split in found.items() if ".1." not in name
    }
    assert sides["0.mlp.down_proj.weight"] == "outputs"
    assert sides["0.mlp.up_proj.weight"] == "inputs"
    assert sides["0.self_attn.k_proj.weight"] == "inputs"  # 16 outputs: not the model's width
    assert sides["weight"] == "inputs" or found["model.embed_tokens.weight"].side == "inputs"
    assert found["model.norm.weight"].side is None
    assert "lm_head.weight" not in found  # tied: counted once, as the embedding


def test_fused_attention_of_gpt2_is_three_matrices_and_conv1d_is_transposed():
    model = small_gpt2()
    split = splits(model)["transformer.h.0.attn.c_attn.weight"]
    weight = model.transformer.h[0].attn.c_attn.weight
    assert split.view(weight).shape == (3, 32, 32)
    torch.testing.assert_close(split.view(weight)[1], weight[:, 32:64].T)
    assert splits(model)["transformer.wte.weight"].side == "inputs"  # never the vocabulary


def mlp(width: int = 16, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )


def test_bad_widths_and_names_are_refused():
    with pytest.raises(ConfigError, match="width"):
        splits(mlp())
    with pytest.raises(ConfigError, match=r"0\.weight.*2\.weight"):
        splits(mlp(), width=5)
    with pytest.raises(ConfigError, match="nowhere"):
        splits(mlp(), width=16, sides={"nowhere": "whole"})
    assert splits(mlp(), width=16, sides={"2.weight": "whole"})["2.weight"].side is None


# The recorder in a plain loop


def data(rows: int = 64) -> tuple[Tensor, Tensor]:
    x = numbers(rows, 8, seed=7).float()
    return x, (x[:, :3].argmax(1))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, recorder: TrajectoryRecorder | None, steps: int = 20, lr: float = 0.05):
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(x), (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(F.dropout(model(x[rows]), 0.1), y[rows]).backward()
        optimizer.step()
        if recorder:
            recorder.step()
    return recorder.finish() if recorder else None


def recorder_for(model: nn.Module, **options) -> TrajectoryRecorder:
    x, y = data()
    batches = [(x[:32], y[:32]), (x[32:], y[32:])]
    return TrajectoryRecorder(model, batches, cross_entropy, width=16, **options)


def test_all_directions_together_are_phi_and_none_are_the_vectors():
    model = mlp().double()
    batches = [(x.double() if x.is_floating_point() else x) for x in data()]
    recorder = TrajectoryRecorder(model, [tuple(batches)], cross_entropy, width=16, ema=RAW)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(model, tuple(batches)).backward()
        optimizer.step()
        recorder.step()
    found = recorder.finish()
    assert found.directions.shape == (5, 17)
    torch.testing.assert_close(found.directions[:, -1], found.whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.directions[:, 0], found.vectors)
    total = sum(part[-1] for part in found.by_parameter.values()) + found.vectors.sum()
    assert float(total) == pytest.approx(found.total, abs=1e-10)
    assert found.linearization_error < 0.2
    # Plain descent on the loss that is recorded: all of it falls, in every direction.
    assert (found.by_parameter["2.weight"].diff() <= 1e-12).all()


def test_the_linearisation_error_of_a_quadratic_is_its_curvature_along_the_way():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False)).double()
    x, y = numbers(32, 4), numbers(32, 6, seed=1)

    def squares(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (network(batch[0]) - batch[1]).square().sum(1).mean()

    recorder = TrajectoryRecorder(model, [(x, y)], squares, width=6, ema=RAW)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    weights = [model[0].weight.detach().clone()]
    for _ in range(6):
        optimizer.zero_grad()
        squares(model, (x, y)).backward()
        optimizer.step()
        recorder.step()
        weights.append(model[0].weight.detach().clone())
    found = recorder.finish()
    hessian = x.T @ x / len(x)
    bend = sum(
        0.5 * float(((b - a) @ hessian * (b - a)).sum()) for a, b in itertools.pairwise(weights)
    )
    assert found.loss_change == pytest.approx(found.total + bend, abs=1e-10)
    assert abs(bend) > 1e-3  # so that an exact φ alone would not pass


def test_decay_zero_and_stride_one_follow_the_raw_weights():
    model = mlp()
    recorder = recorder_for(model, ema=RAW)
    train(model, recorder, steps=3)
    for mean, parameter in zip(recorder.average, model.parameters(), strict=True):
        assert torch.equal(mean, parameter)
    assert recorder.trajectory.steps.tolist() == [0, 1, 2, 3]


def test_training_is_the_same_to_the_bit_with_the_recorder():
    alone, watched = mlp(), mlp()
    torch.manual_seed(3)  # dropout draws from the global generator
    train(alone, None)
    after = torch.random.get_rng_state()
    torch.manual_seed(3)
    train(watched, recorder_for(watched, per_sample=True))
    assert torch.equal(torch.random.get_rng_state(), after)
    for a, b in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert watched.training


def test_gradients_are_taken_at_the_averaged_weights():
    model = mlp()
    recorder = recorder_for(model, ema=EmaSchedule.constant(0.9, 4))
    start = copy.deepcopy(model)
    found = train(model, recorder, steps=8)
    x, y = data()
    with torch.no_grad():
        for parameter, mean in zip(start.parameters(), recorder.average, strict=True):
            parameter.copy_(mean)
        averaged = float(F.cross_entropy(start(x), y))
        raw = float(F.cross_entropy(model(x), y))
    assert float(found.losses[-1]) == pytest.approx(averaged, rel=1e-5)
    assert abs(averaged - raw) > 1e-3
    assert found.steps.tolist() == [0, 4, 8]


def test_what_is_left_after_the_last_stride_is_recorded():
    model = mlp()
    found = train(model, recorder_for(model, ema=EmaSchedule.constant(0.5, 4)), steps=6)
    assert found.steps.tolist() == [0, 4, 6]
    assert len(found.losses) == 3


def test_the_schedule_rises_linearly_in_the_window():
    schedule = EmaSchedule()
    assert schedule.decay_at(0) == pytest.approx(0.98)
    assert 1 / (1 - schedule.decay_at(1000)) == pytest.approx((50 + 2000) / 2)
    assert schedule.decay_at(9999) == pytest.approx(0.9995)
    assert [schedule.stride_at(step) for step in (0, 1000, 2000, 5000)] == [2, 6, 10, 10]
    with pytest.raises(ConfigError, match="decay"):
        EmaSchedule(decay=1.0)
    with pytest.raises(ConfigError, match="stride"):
        EmaSchedule(stride=0)


def test_leading_directions_are_those_of_the_full_spectrum():
    runs = []
    for top in (None, 4):
        model = mlp()
        torch.manual_seed(0)
        runs.append(train(model, recorder_for(model, top=top), steps=6))
    torch.testing.assert_close(runs[0].directions[:, :5], runs[1].directions, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(runs[0].whole, runs[1].whole)


def test_a_resumed_recorder_goes_on_as_if_it_had_not_stopped():
    models = mlp(), mlp()
    recorders = [recorder_for(m, ema=EmaSchedule.constant(0.9, 3)) for m in models]

    def steps(model, recorder, count, seed):
        x, y = data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            rows = torch.randint(len(x), (16,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(model, (x[rows], y[rows])).backward()
            optimizer.step()
            recorder.step()

    for seed, count in enumerate((5, 7)):
        steps(models[0], recorders[0], count, seed)
    steps(models[1], recorders[1], 5, 0)
    state = copy.deepcopy(recorders[1].state_dict())
    resumed = recorder_for(models[1], ema=EmaSchedule.constant(0.9, 3))
    resumed.load_state_dict(state)
    steps(models[1], resumed, 7, 1)
    whole, pieces = recorders[0].finish(), resumed.finish()
    assert torch.equal(whole.directions, pieces.directions)
    assert torch.equal(whole.losses, pieces.losses)
    with pytest.raises(CheckpointError, match="other names"):
        recorder_for(mlp()).load_state_dict({**state, "average": {"x": torch.zeros(1)}})


def test_a_trajectory_survives_a_file(tmp_path):
    model = mlp()
    found = train(model, recorder_for(model, per_sample=True, about={"lr": 0.05}), steps=4)
    found.save(tmp_path / "run.safetensors")
    again = Trajectory.load(tmp_path / "run.safetensors")
    assert torch.equal(found.directions, again.directions)
    assert torch.equal(found.samples, again.samples)
    assert again.about == {"lr": 0.05}
    assert again.by_parameter.keys() == found.by_parameter.keys()
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    for name in ("bad.safetensors", "none.safetensors"):
        with pytest.raises(CheckpointError, match="trajectory"):
            Trajectory.load(tmp_path / name)


def test_bad_recorders_are_refused():
    with pytest.raises(ConfigError, match="eval_batches"):
        TrajectoryRecorder(mlp(), [], cross_entropy, width=16)
    with pytest.raises(ConfigError, match="top"):
        recorder_for(mlp(), top=0)
    with pytest.raises(DataError, match="no step"):
        recorder_for(mlp()).finish()
    with pytest.raises(ConfigError, match="embed_tokens"):
        TrajectoryRecorder(small_llama(), [{}], per_sample=True)


def test_a_diverged_run_is_an_error_that_says_so():
    model = mlp()
    recorder = recorder_for(model, ema=RAW)
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(DataError, match="diverged"):
        recorder.step()


# Per sample


def test_contributions_of_samples_average_to_those_of_the_loss():
    model = mlp()
    found = train(model, recorder_for(model, ema=RAW, per_sample=True), steps=6)
    matrices = found.whole.sum() - found.vectors.sum()
    assert found.samples.shape == (64, 16)
    assert float(found.samples.sum(1).mean()) == pytest.approx(float(matrices), rel=1e-4)
    per_direction = found.phi.diff()
    torch.testing.assert_close(found.samples.mean(0), per_direction, rtol=1e-3, atol=1e-5)


def test_contributions_match_per_sample_gradients():
    model, (x, y) = mlp().double(), data(6)
    x = x.double()
    recorder = TrajectoryRecorder(
        model, [(x, y)], cross_entropy, width=16, ema=RAW, per_sample=True
    )
    before = copy.deepcopy(model)
    with torch.no_grad():
        model[2].weight.add_(numbers(16, 16, seed=4), alpha=0.01)
    change = model[2].weight.detach() - before[2].weight.detach()
    recorder.step()
    found = recorder.finish()
    full = torch.autograd.grad(cross_entropy(before, (x, y)), before[2].weight)[0]
    values, vectors = torch.linalg.eigh(alignment_matrix(full, change))
    vectors = vectors[:, values.abs().argsort(descending=True)]
    for i in range(6):
        one = torch.autograd.grad(
            cross_entropy(before, (x[i : i + 1], y[i : i + 1])), before[2].weight
        )
        expected = (vectors * (one[0].T @ change @ vectors)).sum(0)
        torch.testing.assert_close(found.samples[i], expected, atol=1e-10, rtol=1e-6)


def test_contributions_of_a_model_with_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    model = model.double()
    x = numbers(5, 3, 8)

    def loss(network: nn.Module, batch: Tensor) -> Tensor:
        return network(batch).square().mean()

    recorder = TrajectoryRecorder(model, [x], loss, width=8, ema=RAW, per_sample=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
        recorder.step()
    found = recorder.finish()
    assert found.samples.shape == (5, 8)
    assert float(found.samples.sum(1).mean()) == pytest.approx(found.total, rel=1e-9)


@given(st.integers(2, 30), st.data())
@settings(max_examples=20, deadline=None)
def test_mci_of_one_direction_is_its_number_and_of_all_the_middle(n, draw):
    j = draw.draw(st.integers(1, n))
    single = torch.zeros(1, n)
    single[0, j - 1] = -0.3
    assert float(mean_component_index(single)) == pytest.approx(j)
    signs = torch.tensor([[(-1.0) ** i for i in range(n)]])
    assert float(mean_component_index(signs)) == pytest.approx((n + 1) / 2)


def test_easy_samples_have_the_least_index():
    psi = torch.eye(20).flip(0)
    easy, hard = easy_and_hard(psi)
    assert sorted(easy.tolist()) == [15, 16, 17, 18, 19]
    assert hard.tolist() == [0]
    with pytest.raises(DataError, match="sample 2"):
        mean_component_index(torch.tensor([[1.0, 0], [0, 1], [0, 0]]))


# Models of transformers


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = token_ids(16, 8, seed=1)[i]
        return {"input_ids": ids, "labels": ids}


def trainer(model: nn.Module, folder, callbacks: list) -> Trainer:
    model.config.attention_dropout = 0.1
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=3e-3,
        report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Tokens(), callbacks=callbacks)


@pytest.mark.parametrize("build", [small_llama, small_gpt2])
def test_trainer_takes_the_recorder_as_a_callback_and_trains_as_without(build, tmp_path):
    ids = token_ids(16, 8, seed=1)
    alone, watched = build(), build()
    trainer(alone, tmp_path / "a", []).train()
    recorder = TrajectoryRecorder(
        watched, [{"input_ids": ids, "labels": ids}], ema=EmaSchedule.constant(0.5, 2)
    )
    trainer(watched, tmp_path / "b", [recorder]).train()
    for a, b in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    found = recorder.trajectory
    assert found.steps.tolist() == [0, 2, 4]
    assert found.directions.shape == (2, 33)
    torch.testing.assert_close(found.directions[:, -1], found.whole, rtol=1e-3, atol=1e-5)
    assert found.loss_change < 0
    assert found.linearization_error < 0.5


def test_two_processes_record_what_one_does_under_ddp_and_fsdp2(tmp_path):
    port = 29500 + os.getpid() % 400
    torch.multiprocessing.spawn(record_in_process, (("ddp", "fsdp"), port, tmp_path), nprocs=2)
    record_in_process(0, ("alone",), port, tmp_path)
    expected = Trajectory.load(tmp_path / "alone-0.safetensors")
    for name in ("ddp-0", "ddp-1", "fsdp-0", "fsdp-1"):
        found = Trajectory.load(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(found.losses, expected.losses, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.directions, expected.directions, atol=1e-6, rtol=1e-4)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_all_directions_are_phi_for_experts_and_untied_heads(kind):
    torch.manual_seed(0)
    config = {
        "mixtral": MixtralConfig(
            **SMALL, intermediate_size=24, num_key_value_heads=1, num_local_experts=4
        ),
        "qwen3": Qwen3Config(**SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8),
    }[kind]
    model = AutoModelForCausalLM.from_config(config)
    ids = token_ids(2, 8) % 40
    recorder = TrajectoryRecorder(model, [{"input_ids": ids, "labels": ids}], ema=RAW)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    recorder.step()
    found = recorder.finish()
    assert found.directions.shape == (1, 17)
    torch.testing.assert_close(found.directions[:, -1], found.whole, rtol=1e-3, atol=1e-6)
    experts = [name for name in found.by_parameter if "experts" in name]
    assert bool(experts) == (kind == "mixtral")
    assert "lm_head.weight" in found.by_parameter


def test_a_bfloat16_model_is_averaged_in_float32():
    model = small_llama(torch.bfloat16)
    ids = token_ids(2, 8)
    recorder = TrajectoryRecorder(model, [{"input_ids": ids, "labels": ids}], ema=RAW)
    assert all(mean.dtype == torch.float32 for mean in recorder.average)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    recorder.step()
    found = recorder.finish()
    torch.testing.assert_close(found.directions[:, -1], found.whole, rtol=1e-3, atol=1e-5)
