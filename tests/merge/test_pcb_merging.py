"""PCB merging. Oracle numbers are those of the specification's "Invariants and oracles"."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparing.errors import ConfigError
from sparing.merge import PCBWeights, pcb_merge
from sparing.merge.memory import InMemory
from sparing.merge.pcb_merging import PCBOptions, survey, weigh

VARIANTS = ("paper", "vision_es", "vision", "reference")
CODE = VARIANTS[1:]


def vectors(count: int = 3, size: int = 400, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, size, generator=generator, dtype=torch.float64)


def task_vector(taus: Tensor, **options: Any) -> Tensor:
    """τ_m of task vectors on a base of zeros."""
    base = {"theta": torch.zeros(taus.shape[1], dtype=torch.float64)}
    return pcb_merge(base, [{"theta": tau} for tau in taus], **options)["theta"]


def betas(taus: Tensor, **options: Any) -> tuple[list[Tensor], Any]:
    chosen = PCBOptions(**options)
    models = InMemory({"t": torch.zeros_like(taus[0])}, [{"t": tau} for tau in taus])
    known = survey(models.view, chosen)["t"]
    return weigh(list(taus), chosen, known), known


def independent(taus: np.ndarray, options: PCBOptions) -> np.ndarray:
    """Another implementation, straight from the equations."""
    n, size = taus.shape

    def norm(row: np.ndarray) -> np.ndarray:
        span = row.max() - row.min()
        return (row - row.min()) / span if span > 0 else np.zeros_like(row)

    def softmax(row: np.ndarray) -> np.ndarray:
        return np.exp(row) / np.exp(row).sum()

    rank = int(np.floor((1 - options.keep) * size + 1e-6))
    rows = taus
    if options.variant == "paper":
        intra = np.stack([softmax(n * norm(t * t)) for t in taus])
        inter = np.stack([sum(softmax(norm(t * other)) for other in taus) for t in taus])
        beta = intra * inter
        cut = np.sort(beta, 1)[:, rank : rank + 1]
        weight = np.where(beta >= cut, beta, 0)
    else:
        low = int(options.quantile * size)
        sizes = np.sort(np.abs(taus), 1)
        a = np.clip(np.abs(taus), sizes[:, [low]], sizes[:, [size - 1 - low]])
        rows = np.sign(taus) * a
        signed = np.sign(taus) * np.stack([norm(row) for row in a])
        if options.variant == "reference":
            inter = np.tanh(taus * taus.sum(0))
        elif options.variant == "vision":
            inter = np.tanh(taus * signed.sum(0))
        else:
            inter = sum(np.tanh(signed * other) for other in signed)
        beta = np.exp(n * signed**2) * inter
        cut = np.sort(beta, 1)[:, rank : rank + 1]
        weight = np.stack([norm(row) for row in np.maximum(beta, cut)])
    total = weight.sum(0)
    lams = np.array([1.0] * n)[:, None]
    return np.divide((weight * lams * rows).sum(0), total, np.zeros(size), where=total > 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_equals_an_independent_implementation(variant: str, ratio: float) -> None:
    """Oracle 13, n = 3, D = 16 and more."""
    for size in (16, 400):
        taus = vectors(size=size)
        taus[0, 3] = 0
        expected = independent(taus.numpy(), PCBOptions(variant=variant, ratio=ratio))
        found = task_vector(taus, variant=variant, ratio=ratio)
        assert np.allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_one_model_kept_whole_is_returned_at_lambda() -> None:
    """Oracle 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taus = vectors(1)
        assert torch.allclose(task_vector(taus, ratio=1.0, lam=1.7), 1.7 * taus[0], rtol=1e-12)


def test_copies_of_one_model_keep_their_entries_in_full() -> None:
    """Oracle 1."""
    taus = vectors(1).repeat(4, 1)
    merged = task_vector(taus, ratio=0.25, lam=0.9)
    kept = merged != 0
    assert kept.sum() == 100
    assert torch.allclose(merged[kept], 0.9 * taus[0][kept], rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_that_equal_the_base_give_the_base(variant: str) -> None:
    """Oracle 2: a constant row is no division by zero."""
    assert torch.equal(task_vector(torch.zeros(3, 50), variant=variant), torch.zeros(50).double())
    taus = vectors(3)
    taus[1] = 0
    assert torch.isfinite(task_vector(taus, variant=variant)).all()


def test_disjoint_supports_are_task_arithmetic() -> None:
    """Oracle 3."""
    taus = torch.zeros(4, 400, dtype=torch.float64)
    for i in range(4):
        taus[i, 100 * i : 100 * (i + 1)] = 1 + vectors(1, 100, seed=i)[0].abs()
    assert torch.allclose(task_vector(taus, ratio=0.25, lam=1.3), 1.3 * taus.sum(0), rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_competition_it_is_the_mean(variant: str) -> None:
    """Oracle 4."""
    taus = vectors(3)
    plain = {"intra": False, "inter": False, "ratio": 1.0, "variant": variant, "clip_q": 0.0}
    assert torch.allclose(task_vector(taus, lam=0.7, **plain), 0.7 * taus.mean(0), rtol=1e-12)


@pytest.mark.parametrize("variant", CODE)
def test_opposite_signs_lose_against_agreement(variant: str) -> None:
    """Oracle 5: half of the entries agree and half are opposite; r is below the half."""
    size = 1 + vectors(1, 200)[0].abs()
    taus = torch.stack((size, torch.where(torch.arange(200) < 100, size, -size)))
    weights, _ = betas(taus, variant=variant, clip_q=0.0, include_self=False)
    assert all((weight[100:] <= 0).all() for weight in weights)
    merged = task_vector(taus, variant=variant, ratio=0.3)
    assert torch.equal(merged[100:], torch.zeros(100).double())


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(VARIANTS), st.permutations(range(4)), st.integers(0, 50))
def test_permutations_of_tasks_and_of_parameters_commute(
    variant: str, order: list[int], seed: int
) -> None:
    """Oracle 6."""
    taus = vectors(4, seed=seed)
    places = torch.randperm(taus.shape[1], generator=torch.Generator().manual_seed(seed))
    merged = task_vector(taus, variant=variant)
    assert torch.allclose(task_vector(taus[order], variant=variant), merged, atol=1e-9)
    permuted = task_vector(taus[:, places], variant=variant)
    assert torch.allclose(permuted, merged[places], atol=1e-9)


@pytest.mark.parametrize("variant", ["paper", "vision_es"])
def test_scale_does_not_matter(variant: str) -> None:
    """Oracle 7."""
    taus = vectors()
    small = task_vector(taus * 2.0**-10, variant=variant)
    assert torch.allclose(small * 2.0**10, task_vector(taus, variant=variant), rtol=1e-9)


def test_the_reference_variant_depends_on_scale() -> None:
    """Oracle 7, the violation."""
    taus = vectors()
    small = task_vector(taus * 1e-3, variant="reference", ratio=0.5)
    change = (small * 1e3 - task_vector(taus, variant="reference", ratio=0.5)).abs().max()
    assert change > 0.05


@settings(deadline=None, max_examples=20)
@given(st.integers(10, 300), st.floats(0.01, 1.0), st.integers(0, 20))
def test_kept_counts(size: int, ratio: float, seed: int) -> None:
    """Oracle 8."""
    taus = vectors(size=size, seed=seed)
    weights, known = betas(taus, ratio=ratio)
    expected = size - min(int((1 - ratio) * size + 1e-6), size - 1)
    for weight, cut in zip(weights, known.cuts, strict=True):
        assert (weight >= cut).sum() == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lam", [1.0, [0.8, 1.0, 1.3]])
def test_the_result_lies_between_the_tasks(variant: str, lam: Any) -> None:
    """Oracle 9."""
    taus = vectors()
    scaled = taus * torch.tensor(lam, dtype=torch.float64).expand(3)[:, None]
    merged = task_vector(taus, variant=variant, lam=lam, clip_q=0.0)
    lowest, highest = scaled.amin(0).clamp(max=0), scaled.amax(0).clamp(min=0)
    assert ((merged >= lowest - 1e-12) & (merged <= highest + 1e-12)).all()


def test_softmax_denominators_matter_to_the_merge() -> None:
    """Oracle 10: rows with other denominators, so plain exponentials would weigh differently."""
    taus = vectors(2)
    taus[1, 0] = 30  # an outlier flattens its row
    weights, _ = betas(taus, ratio=1.0)
    squares = [tau * tau for tau in taus]
    plain = [torch.exp(2 * (s - s.min()) / (s.max() - s.min())) for s in squares]
    ratio = (weights[0] / weights[1]).median() / (plain[0] / plain[1]).median()
    assert abs(float(ratio) - 1) > 0.05
    assert sum(float(weight.sum()) for weight in betas(taus, inter=False)[0]) == pytest.approx(2)


def test_a_task_alone_has_nobody_to_compete_with() -> None:
    """Oracle 12."""
    with pytest.raises(ConfigError, match="include_self"):
        task_vector(vectors(1), include_self=False)
    with pytest.warns(UserWarning, match="single expert"):
        task_vector(vectors(1))


@pytest.mark.parametrize(
    "options",
    [
        {"intra": False},
        {"inter": False},
        {"drop": False},
        {"rescale": False},
        {"include_self": False},
        {"clip_q": 0.1},
        {"dare_drop": 0.5},
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_does_something(variant: str, options: dict[str, Any]) -> None:
    taus = vectors()
    changed = task_vector(taus, variant=variant, ratio=0.3, **options)
    assert torch.isfinite(changed).all()
    assert not torch.allclose(changed, task_vector(taus, variant=variant, ratio=0.3), atol=1e-6)


def test_scope_tensor_competes_in_each_tensor() -> None:
    base = {"a": torch.zeros(100), "b": torch.zeros(100)}
    experts = [{"a": v[:100].float(), "b": 100 * v[100:].float()} for v in vectors(2, 200)]
    whole = pcb_merge(base, experts, ratio=0.2)
    each = pcb_merge(base, experts, ratio=0.2, scope="tensor")
    alone = pcb_merge({"a": base["a"]}, [{"a": e["a"]} for e in experts], ratio=0.2)
    assert torch.count_nonzero(whole["a"]) < 5
    assert torch.equal(each["a"], alone["a"])


def test_lambdas_need_no_new_competition() -> None:
    taus = vectors()
    base = {"t": torch.zeros(400, dtype=torch.float64)}
    weights = PCBWeights.compute(base, [{"t": tau} for tau in taus], ratio=0.2)
    for lam in (1.0, [0.5, 1.0, 2.0]):
        assert torch.equal(weights.merge(lam)["t"], task_vector(taus, ratio=0.2, lam=lam))
    with pytest.raises(ConfigError, match="lam"):
        weights.merge([1.0])


def test_merging_into_the_base_model_does_not_change_the_next_merge() -> None:
    taus = vectors()
    model = torch.nn.Linear(400, 1, bias=False).double()
    experts = [{"weight": model.weight.detach() + tau} for tau in taus]
    weights = PCBWeights.compute(model.state_dict(), experts)
    first = weights.merge()
    model.load_state_dict(first)
    assert torch.equal(weights.merge()["weight"], first["weight"])


def test_tied_weights_compete_once_and_whole_numbers_stay() -> None:
    def model(seed: int) -> dict[str, Tensor]:
        table = vectors(1, 60, seed)[0].float().view(6, 10)
        return {"embed": table, "head": table, "steps": torch.tensor(seed)}

    base, experts = model(0), [model(1), model(2)]
    models = InMemory(base, experts)
    assert models.view.sizes == {"embed": 60}
    merged = pcb_merge(base, experts)
    assert merged["head"] is merged["embed"]
    assert merged["steps"] == 0


def test_many_tasks_do_not_overflow() -> None:
    for variant in VARIANTS:
        assert torch.isfinite(task_vector(vectors(20, 50), variant=variant, ratio=0.5)).all()
