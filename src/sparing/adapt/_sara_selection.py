"""Which entries of a whole model SaRA trains: the smallest ones, counted exactly.

Every entry gets an integer score that orders like its magnitude (the bits of a non-negative
float32 do). The n-th lowest score is found by two histogram passes over the tensors, so that
nothing as long as the model is ever sorted or concatenated.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sparing.errors import ConfigError
from sparing.sparsity import Pattern
from sparing.tuners import generator_for

Select = Literal["smallest", "largest", "random"]
HIGHEST_SCORE = 2**31 - 1


def magnitude_bits(tensor: Tensor) -> Tensor:
    """int32 scores that order like |tensor| in float32, whatever the tensor's own type."""
    return tensor.detach().float().abs().view(torch.int32)


def level_of(theta: float) -> int:
    """The score of magnitude θ: an entry is below θ exactly if its score is below this."""
    return int(magnitude_bits(torch.tensor(theta)))


def theta_above(level: int) -> float:
    """The smallest float32 above the magnitude with this score, so that `|p| < θ` includes it."""
    return torch.tensor(level + 1, dtype=torch.int32).view(torch.float32).item()


def score(select: Select, seed: int, name: str, tensor: Tensor) -> Tensor:
    """Scores of which the lowest are to be trained.

    Arguments:
        select: lowest magnitude, highest magnitude, or no matter which.
        seed: of the random choice, together with `name`.
        name: of the tensor.
        tensor: floating point.

    Returns:
        int32, not negative, shaped and placed like `tensor`.
    """
    if select == "random":
        generator = generator_for(seed, name)
        drawn = torch.randint(HIGHEST_SCORE, tensor.shape, generator=generator, dtype=torch.int32)
        return drawn.to(tensor.device)
    bits = magnitude_bits(tensor)
    return bits if select == "smallest" else HIGHEST_SCORE - bits


def nth_lowest(scores: Callable[[], Iterable[Tensor]], n: int) -> tuple[int, int]:
    """The n-th lowest of all scores (from 1), and how many are strictly below it.

    Arguments:
        scores: called twice; int32 tensors, not negative, `n` entries or more in all.
    """
    coarse = torch.zeros(2**15, dtype=torch.int64)
    for tensor in scores():
        coarse += torch.bincount(tensor.flatten() >> 16, minlength=2**15).cpu()
    reached = coarse.cumsum(0)
    bucket = int(torch.searchsorted(reached, n))
    below = int(reached[bucket - 1]) if bucket else 0
    fine = torch.zeros(2**16, dtype=torch.int64)
    for tensor in scores():
        inside = tensor[tensor >> 16 == bucket] & 0xFFFF
        fine += torch.bincount(inside, minlength=2**16).cpu()
    reached = fine.cumsum(0)
    rest = int(torch.searchsorted(reached, n - below))
    below += int(reached[rest - 1]) if rest else 0
    return (bucket << 16) + rest, below


def lowest(scores: Mapping[str, Callable[[], Tensor]], level: int, ties: int) -> dict[str, Pattern]:
    """The entries with a score below `level`, and the first `ties` entries exactly at it.

    Arguments:
        scores: by name, in the order in which ties are broken; each (height, width) int32.
        level: exclusive.
        ties: how many of those at the level to take, in all.
    """
    patterns = {}
    for name, compute in scores.items():
        found = compute()
        mask = found < level
        if ties:
            at_level = found == level
            taken = at_level & (at_level.flatten().cumsum(0).view_as(found) <= ties)
            ties -= int(taken.sum())
            mask |= taken
        patterns[name] = Pattern(mask)
    return patterns


def proportional(sizes: Mapping[str, int], n: int) -> dict[str, int]:
    """`n` shared out in proportion to the sizes, by largest remainder, exact in total."""
    total = sum(sizes.values())
    shares = {name: n * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: n * sizes[name] % total, reverse=True)
    for name in by_remainder[: n - sum(shares.values())]:
        shares[name] += 1
    return shares


def choose(
    tensors: Mapping[str, Tensor],
    n_params: int | None,
    theta: float | None,
    select: Select,
    seed: int,
) -> tuple[dict[str, Pattern], float]:
    """The trained entries of each tensor, and the threshold that they are below.

    On the meta device, where magnitudes are unknown, `n_params` is shared out by size instead.

    Arguments:
        tensors: (height, width) floating-point matrices by name, in the order that breaks ties.
        n_params: exact number of entries in all; None to go by `theta`.
        theta: the threshold (SaRA, eq. 1); None to go by `n_params`.
        select: which entries `n_params` takes.
        seed: of the random choice.

    Returns:
        patterns by name; θ, or NaN where the choice has none.

    Raises:
        ConfigError: there are fewer entries than asked for, none below θ, or no values to compare.
    """
    total = sum(tensor.numel() for tensor in tensors.values())
    if n_params is not None and n_params > total:
        raise ConfigError(
            "SaRAConfig.n_params",
            expected=f"at most the {total:,} entries of the target modules",
            found=f"{n_params:,}",
            mend="Ask for fewer, or add target modules.",
        )
    if any(tensor.is_meta for tensor in tensors.values()):
        return _choose_on_meta(tensors, n_params), math.nan
    scores = {name: partial(score, select, seed, name, tensor) for name, tensor in tensors.items()}
    if n_params is None:
        assert theta is not None
        level, ties = level_of(theta), 0
    else:
        level, below = nth_lowest(lambda: (compute() for compute in scores.values()), n_params)
        ties = n_params - below
        theta = theta_above(level) if select == "smallest" else math.nan
    patterns = lowest(scores, level, ties)
    chosen = sum(len(pattern) for pattern in patterns.values())
    if chosen == 0:
        raise ConfigError(
            "SaRAConfig.theta",
            expected="at least one weight below the threshold",
            found=f"none below {theta:g}",
            mend="Raise theta, or give n_params.",
        )
    if chosen > total / 2:
        warnings.warn(
            f"SaRA trains {chosen:,} of {total:,} weights; the method is meant for the smallest "
            "10 to 20 %. Lower theta or n_params.",
            stacklevel=2,
        )
    return patterns, theta


def _choose_on_meta(tensors: Mapping[str, Tensor], n_params: int | None) -> dict[str, Pattern]:
    if n_params is None:
        raise ConfigError(
            "SaRAConfig.theta",
            expected="weights with values",
            found="a model on the meta device",
            mend="Give n_params instead: how many weights are below θ depends on their values.",
        )
    shares = proportional({name: tensor.numel() for name, tensor in tensors.items()}, n_params)
    return {
        name: Pattern.unplaced(share, (tensors[name].shape[0], tensors[name].shape[1]))
        for name, share in shares.items()
    }
