"""Memorisation and quality are measured as the paper's equations say."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from _networks import small_unet
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparing.errors import ConfigError, DataError
from sparing.train import DivergedError
from sparing.tune import (
    AverageMinimumDistance,
    CopyRate,
    Denoising,
    Extraction,
    FineTuning,
    FrechetDistance,
    GuidedSampler,
    Images,
    MemorizationInformedDistance,
    MemorizationNorm,
    PrincipalComponents,
    Run,
    alike,
    average_minimum_distance,
    frechet_distance,
    kernel_distance,
    mifid,
    noisy_caption,
    tile_distances,
)
from sparing.tune.extraction import scaled_threshold
from sparing.tune.memorization import nearest_distances

SCHEDULER = DDPMScheduler(num_train_timesteps=50)


class Affine(nn.Module):
    """Predicts gain · x + weight · condition."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        self.asked.append(steps)
        return self.gain * x + self.weight * condition.view(-1, 1, 1, 1)


def call(model: nn.Module, x: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
    return model(x, steps, condition)


EMPTY = torch.zeros(1)


def denoising(unconditional: Any = EMPTY) -> Denoising:
    return Denoising(SCHEDULER, unconditional, call)


def images(n: int = 10, size: int = 8, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    return Images(
        torch.rand(n, 1, size, size, generator=generator), torch.rand(n, 1, generator=generator)
    )


# --- equation 4 -------------------------------------------------------------------------------


def test_norm_is_zero_if_the_condition_is_ignored():
    """Oracle 7."""
    assert MemorizationNorm(denoising(), images())(Affine(0.0)) == 0.0


def test_norm_scales_with_the_output():
    """Oracle 7."""
    norm = MemorizationNorm(denoising(), images())
    assert norm(Affine(3.0)) == pytest.approx(3 * norm(Affine(1.0)), rel=1e-5)


def test_max_and_mean_are_averaged_over_batches():
    """For this model ‖ε(c) - ε("")‖ is |c| times the root of the pixels, whatever x and t."""
    data = images(10)
    expected = data.conditions[:, 0].abs() * 8
    found = MemorizationNorm(denoising(), data, batch_size=4)
    torch.testing.assert_close(found.norms(Affine()), expected)
    batches = expected.split(4)
    maxima = sum(b.max().item() for b in batches) / 3
    means = sum(b.mean().item() for b in batches) / 3
    assert found(Affine()) == pytest.approx(maxima)
    assert replace(found, statistic="mean")(Affine()) == pytest.approx(means)
    assert replace(found, per_element=True)(Affine()) == pytest.approx(maxima / 8)
    assert (found.name, replace(found, statistic="mean").name) == ("max_norm", "avg_norm")
    whole = replace(found, batch_size=100)(Affine())
    assert whole == pytest.approx(expected.max().item())
    assert whole > maxima  # why batches must be fixed


def test_noise_and_steps_are_common_to_all_models():
    data = images(6)
    unet = Denoising(SCHEDULER, torch.zeros(1, 8))
    texts = Images(data.images, torch.randn(6, 2, 8))
    norm = MemorizationNorm(unet, texts)
    model = small_unet()
    first = norm(model)
    torch.manual_seed(123)
    assert norm(model) == first
    assert replace(norm, seed=1)(model) != first
    smaller = replace(norm, batch_size=2).norms(model)
    torch.testing.assert_close(smaller, norm.norms(model), atol=1e-5, rtol=1e-5)


def test_strata_spread_the_steps():
    model, data = Affine(), images(8)
    MemorizationNorm(denoising(), data, strata=5)(model)
    steps = torch.stack(model.asked[::2])
    assert steps.shape == (5, 8)
    assert torch.equal(steps // 10, torch.arange(5)[:, None].expand(5, 8))


def test_norm_needs_an_empty_prompt_and_images():
    with pytest.raises(DataError, match="empty prompt"):
        MemorizationNorm(denoising(None), images())
    with pytest.raises(DataError, match="at least one image"):
        images(0)
    with pytest.raises(DataError, match="3 images, found 2 conditions"):
        Images(torch.zeros(3, 1, 2, 2), torch.zeros(2, 1))
    for wrong in ({"statistic": "median"}, {"strata": 51}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MemorizationNorm(denoising(), images(), **wrong)


# --- extraction, equation 5 -------------------------------------------------------------------


def test_one_different_tile_is_no_match():
    """Oracle 9, at the paper's size: images match if the *largest* tile distance is below 20."""
    image = torch.full((3, 224, 224), 0.5)
    other = image.clone()
    other[:, 56:112, 168:] += 21 / (3 * 56 * 56) ** 0.5
    assert tile_distances(image[None], image[None]).item() == 0.0
    found = tile_distances(image[None], other[None]).item()
    assert found == pytest.approx(21, rel=1e-4)
    assert scaled_threshold((3, 224, 224)) == 20.0
    attack = Extraction(lambda model: torch.stack([image] * 3)[None], other[None])
    assert attack(nn.Identity()) == 0.0
    assert replace(attack, training=image[None])(nn.Identity()) == 1.0


@settings(max_examples=20, deadline=None)
@given(grid=st.sampled_from([1, 2, 4]), seed=st.integers(0, 100))
def test_tile_distances_are_the_largest_of_all_tiles(grid, seed):
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.rand(2, 3, 2, 8, 8, generator=generator)
    side = 8 // grid
    for i in range(3):
        for j in range(3):
            gap = one[i] - other[j]
            tiles = [
                gap[:, a : a + side, b : b + side].norm()
                for a in range(0, 8, side)
                for b in range(0, 8, side)
            ]
            expected = torch.stack(tiles).max()
            torch.testing.assert_close(tile_distances(one, other, grid)[i, j], expected)


def test_thresholds_grow_with_the_root_of_the_tile():
    assert scaled_threshold((3, 448, 448)) == pytest.approx(40)
    assert scaled_threshold((1, 8, 8)) == pytest.approx(20 * (4 / 9408) ** 0.5)
    with pytest.raises(ConfigError, match="divisor of height 6"):
        tile_distances(torch.rand(1, 1, 6, 6), torch.rand(1, 1, 6, 6))


CHAIN = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()


def test_a_chain_is_a_component_but_no_clique():
    """Oracle 10: what the released code calls cliques are components."""
    assert alike(CHAIN) == [[0, 1, 2], [3]]
    assert alike(CHAIN, "clique") == [[0, 1], [1, 2], [3]]
    with pytest.raises(ConfigError, match="'component' or 'clique'"):
        alike(CHAIN, "cluster")


def on_a_line(*places: float) -> Tensor:
    """Images of one pixel value, at distance |a - b|·√4 = 2|a - b|."""
    return torch.tensor(places).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


@pytest.mark.parametrize(
    ("places", "law", "memorized"),
    [
        ((0.10, 0.11, 0.12, 0.9), "component", True),  # three that match one another
        ((0.10, 0.11, 0.60, 0.9), "component", False),  # only two
        ((0.10, 0.14, 0.18, 0.9), "component", True),  # a chain
        ((0.10, 0.14, 0.18, 0.9), "clique", False),
        ((0.10, 0.12, 0.14, 0.9), "clique", True),
    ],
)
def test_three_alike_are_memorized(places, law, memorized):
    """Oracle 10."""
    generated = on_a_line(*places)[None]
    attack = Extraction(lambda m: generated, on_a_line(0.12), threshold=0.1, grid=1, law=law)
    found = attack.judge(generated)
    assert found.memorized.tolist() == [memorized]
    assert found.extracted.tolist() == [memorized]
    elsewhere = replace(attack, training=on_a_line(0.5)).judge(generated)
    assert elsewhere.memorized.tolist() == [memorized]
    assert elsewhere.extracted.tolist() == [False]


def test_attack_needs_the_captions_of_the_training_images():
    attack = Extraction(lambda m: on_a_line(0.1, 0.2)[None], on_a_line(0.1, 0.2))
    with pytest.raises(DataError, match="each of 2 captions"):
        attack(nn.Identity())


def test_copy_rate_compares_each_image_with_its_own():
    training = on_a_line(0.1, 0.5, 0.9)
    rate = CopyRate(lambda m: on_a_line(0.12, 0.9, 0.89), training, threshold=0.1)
    assert rate(nn.Identity()) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="each of 3"):
        replace(rate, training=training[:2])(nn.Identity())


# --- nearest neighbours, equation 6 -----------------------------------------------------------


def test_average_minimum_distance_is_the_mean_to_the_nearest():
    generator = torch.Generator().manual_seed(0)
    made, real = torch.rand(7, 5, generator=generator), torch.rand(4, 5, generator=generator)
    expected = np.mean([min(np.linalg.norm(a - b) for b in real.numpy()) for a in made.numpy()])
    assert average_minimum_distance(made, real) == pytest.approx(expected, rel=1e-6)
    assert average_minimum_distance(real, real) == 0.0
    torch.testing.assert_close(nearest_distances(made, real, 2), nearest_distances(made, real))
    reward = AverageMinimumDistance(lambda m: made.view(7, 1, 1, 5), real.view(4, 1, 1, 5))
    assert reward(nn.Identity()) == pytest.approx(expected, rel=1e-6)
    assert reward.maximize
    with pytest.raises(DataError, match="0 and 4"):
        average_minimum_distance(made[:0], real)


# --- quality ----------------------------------------------------------------------------------


def features(n: int, width: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(n, width, generator=generator) @ mixing


def test_frechet_distance_of_a_set_to_itself_is_zero():
    """Oracle 8."""
    assert frechet_distance(features(50), features(50)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_equal_covariances_is_that_of_the_means():
    """Oracle 8."""
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5])
    found = frechet_distance(features(50), features(50) + shift)
    assert found == pytest.approx(shift.square().sum().item(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_frechet_distance_is_the_formula_with_a_matrix_root(seed):
    one, other = features(30, seed=seed), features(40, seed=seed + 1)
    c1, c2 = np.cov(one.double().numpy().T), np.cov(other.double().numpy().T)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    gap = (one.double().mean(0) - other.double().mean(0)).square().sum().item()
    expected = gap + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_too_few_images_are_noted():
    with pytest.warns(UserWarning, match="4 images for 4 features"):
        frechet_distance(features(30), features(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(features(30), features(30))
    with pytest.raises(DataError, match="at least two"):
        frechet_distance(features(30), features(1))
    with pytest.raises(DataError, match="one length"):
        frechet_distance(features(30), features(30, 3))
    assert np.isnan(frechet_distance(features(30), features(30) * float("nan")))


def test_kernel_distance_is_unbiased():
    """Of two samples of one distribution it is zero on average; the plain estimate is not."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 2, 12, 3, generator=generator)
    found = torch.tensor([kernel_distance(a, b) for a, b in draws])
    assert abs(found.mean()) < 3 * found.std() / 200**0.5
    assert kernel_distance(draws[0, 0], draws[0, 1] + 3) > 1


def test_mifid_punishes_nearness_only():
    real, far = features(40), features(40, seed=3)
    directions = torch.eye(4).repeat(10, 1) + 0.01 * features(40)
    near = real + 1e-3 * features(40, seed=2)
    assert mifid(real, near) > 100 * frechet_distance(real, near)
    apart = torch.eye(4)[:2].repeat(20, 1) * far.abs().mean()
    others = torch.eye(4)[2:].repeat(20, 1) + 1e-3 * directions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert mifid(apart, others) == pytest.approx(frechet_distance(apart, others))


def test_principal_components_keep_the_largest_variances():
    data = torch.randn(60, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    found = PrincipalComponents(data, 4)(data)
    variances = torch.linalg.eigvalsh(torch.cov(data.flatten(1).double().T)).flip(0)[:4]
    torch.testing.assert_close(found.var(0), variances)
    with pytest.raises(DataError, match="at least 10 images of as many pixels"):
        PrincipalComponents(data, 10)


def test_rewards_of_generated_images_take_the_same_noise_for_every_model():
    texts = torch.randn(30, 2, 8, generator=torch.Generator().manual_seed(1))
    unet = Denoising(DDIMScheduler(50, clip_sample=False), torch.zeros(1, 8))
    sampler = GuidedSampler(unet, texts, (1, 8, 8), steps=3, guidance=2.0, batch_size=7)
    model = small_unet()
    made = sampler(model)
    assert made.shape == (30, 1, 8, 8)
    torch.testing.assert_close(replace(sampler, batch_size=30)(model), made, atol=1e-4, rtol=1e-4)
    assert not torch.equal(replace(sampler, seed=1)(model), made)
    decoded = replace(sampler, decode=lambda x: x / 2)(model)
    torch.testing.assert_close(decoded, made / 2)
    reward = FrechetDistance(sampler, made, PrincipalComponents(made, 4))
    assert reward(model) == pytest.approx(0, abs=1e-6)
    assert reward.name == "FID"
    informed = MemorizationInformedDistance(sampler, made, PrincipalComponents(made, 4))
    assert informed.name == "MIFID"


def test_guidance_goes_beyond_the_condition():
    """x + w (c - x) at the level of predictions: one step of DDIM, from the same noise."""
    condition = torch.ones(4, 1)
    unet = denoising()
    makes = lambda w, c: GuidedSampler(unet, c, (1, 2, 2), steps=1, guidance=w)(Affine())  # noqa: E731
    empty, given_ = makes(1.0, torch.zeros(4, 1)), makes(1.0, condition)
    torch.testing.assert_close(makes(3.0, condition), empty + 3 * (given_ - empty))
    unguided = GuidedSampler(denoising(None), condition, (1, 2, 2), steps=1, guidance=1.0)
    torch.testing.assert_close(unguided(Affine()), given_)
    with pytest.raises(DataError, match="empty prompt"):
        replace(unguided, guidance=2.0)(Affine())


def test_sampling_follows_a_schedule_given_by_position():
    """diffusers forgets such arguments when a scheduler is made from another's config."""
    model = Affine()
    unet = Denoising(DDIMScheduler(20, 1e-3, 0.2), torch.zeros(1), call)
    GuidedSampler(unet, torch.ones(2, 1), (1, 2, 2), steps=20, guidance=1.0)(model)
    assert max(int(s.max()) for s in model.asked) == 19


def test_schedules_without_noise_levels_are_refused():
    for wrong in (FlowMatchEulerDiscreteScheduler(), DDPMScheduler(prediction_type="sample")):
        with pytest.raises(ConfigError, match="epsilon or v_prediction"):
            Denoising(wrong, None)


# --- the inner level, equation 2 --------------------------------------------------------------


def run_of(model: nn.Module, lr: float = 1e-2, seed: int = 0) -> Run:
    return Run(model, "", lr, [{"params": list(model.parameters()), "lr": lr}], seed)


def test_repeated_images_are_in_the_data_as_often_as_said():
    train = FineTuning(denoising(), images(6), images(2, seed=1), repeats=3, batch_size=4000)
    drawn = train._draw(torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=8) / 4000
    expected = torch.tensor([1.0] * 6 + [3.0] * 2) / 12
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)


def test_fine_tuning_lowers_the_loss_and_repeats_itself():
    train = FineTuning(denoising(), images(20), steps=150, batch_size=16)
    models = [Affine(), Affine()]
    for model in models:
        train(run_of(model))
    assert torch.equal(models[0].weight, models[1].weight)
    assert abs(models[0].weight.item()) < 0.5  # the condition tells nothing of the noise
    assert models[0].gain.item() > 0.5


def test_velocity_is_trained_where_the_schedule_says_so():
    velocity = DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction")
    x, noise, t = torch.rand(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([3, 30])
    level = velocity.alphas_cumprod[t].view(-1, 1, 1, 1)
    expected = level.sqrt() * noise - (1 - level).sqrt() * x
    torch.testing.assert_close(Denoising(velocity, None, call).target(x, noise, t), expected)
    assert denoising().target(x, noise, t) is noise


def test_conditions_are_dropped_at_random():
    """With all of them dropped the weight of the condition gets no gradient."""
    train = FineTuning(denoising(), images(20), steps=5, drop_condition=1.0, weight_decay=0.0)
    model = Affine()
    train(run_of(model))
    assert model.weight.item() == 1.0
    replace(train, drop_condition=0.5)(run_of(model))
    assert model.weight.item() != 1.0


def test_images_with_a_large_norm_are_left_out():
    """Mitigation by threshold: no image is below 0, so that nothing is learned."""
    train = FineTuning(denoising(), images(20), steps=5, norm_limit=-1.0, weight_decay=0.0)
    model = Affine()
    train(run_of(model))
    assert (model.weight.item(), model.gain.item()) == (1.0, 0.5)
    losses = []
    for limit in (None, 1e9):
        model = Affine()
        replace(train, norm_limit=limit)(run_of(model))
        losses.append(model.weight.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_divergence_is_an_error():
    model = Affine(float("inf"))
    with pytest.raises(DivergedError, match="step 1: expected a finite loss"):
        FineTuning(denoising(), images(4), steps=2)(run_of(model))
    with pytest.raises(ConfigError, match="repeats"):
        FineTuning(denoising(), images(4), repeats=0)


def test_captions_get_noise():
    """RWA: the words stay in their order; a word, a number or a repetition is added."""
    caption = "chest x-ray of an adult"
    for kind in ("word", "number", "repeat"):
        made = [
            noisy_caption(caption, kind, generator=torch.Generator().manual_seed(s), times=2)
            for s in (0, 0, 1)
        ]
        assert made[0] == made[1] != made[2]
        words = made[0].split()
        assert len(words) == 7
        left = iter(words)
        assert all(word in left for word in caption.split())
        added = [word for word in words if word not in caption.split()]
        assert len(added) == (0 if kind == "repeat" else 2)
        assert kind != "number" or all(word.isdigit() for word in added)
    generator = torch.Generator().manual_seed(0)
    assert noisy_caption("", "word", generator=generator, words=["lung"]) == "lung"
    with pytest.raises(ConfigError, match="'repeat' of a caption with words"):
        noisy_caption("", "repeat", generator=generator)
