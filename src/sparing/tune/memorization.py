"""How much a diffusion model has memorised: by its own predictions, and by nearest neighbours."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparing.errors import ConfigError, DataError
from sparing.tune.denoising import Denoising, Images
from sparing.tune.quality import Features, Sampler, pixels
from sparing.tuners import generator_for


@dataclass(frozen=True)
class MemorizationNorm:
    """‖ε(x_t, t, c) - ε(x_t, t, "")‖₂ on images that were repeated in training (eq. 4).

    A reward, lower being better. It is a proxy: a model that learned nothing but its conditions can
    have a large norm and replicate nothing. Noise and time steps are the same for every model.

    Arguments:
        denoising: schedule and model.
        repeated: D_mem, each image once. Report on other images than those you select on.
        statistic: "max" averages the maxima of the batches (max_norm), "mean" their means
            (avg_norm). The maximum depends on the batch size.
        batch_size: fixed for all models that are compared.
        strata: time steps an image, one from each of as many equal parts of the schedule, whose
            norms are averaged; 1 is the paper's single random step.
        per_element: divide by the root of the elements, to compare images of different size.
        seed: of noise and time steps.

    Raises:
        ConfigError: an option cannot work.
        DataError: the model has no empty prompt.
    """

    denoising: Denoising
    repeated: Images
    statistic: Literal["max", "mean"] = "max"
    batch_size: int = 64
    strata: int = 1
    per_element: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.denoising.empty(self.repeated.conditions[:1])
        if self.statistic not in ("max", "mean"):
            raise ConfigError(
                "statistic",
                expected="'max' or 'mean'",
                found=repr(self.statistic),
                mend="'max' is the paper's max_norm, 'mean' its avg_norm.",
            )
        if self.batch_size < 1 or not 1 <= self.strata <= self.denoising.steps:
            raise ConfigError(
                "batch_size and strata",
                expected=f"at least 1, and strata at most {self.denoising.steps}",
                found=f"{self.batch_size} and {self.strata}",
                mend="See the docstring.",
            )

    @property
    def name(self) -> str:
        """The paper's name of the reward."""
        return "max_norm" if self.statistic == "max" else "avg_norm"

    def __call__(self, model: nn.Module) -> float:
        """The reward."""
        batches = self.norms(model).split(self.batch_size)
        of_each = [batch.max() if self.statistic == "max" else batch.mean() for batch in batches]
        return torch.stack(of_each).mean().item()

    @torch.no_grad()
    def norms(self, model: nn.Module) -> Tensor:
        """(images,) float32: the norm of every image."""
        generator = generator_for(self.seed, "memorization norm")
        totals = torch.zeros(len(self.repeated))
        for stratum in range(self.strata):
            steps = self._steps(stratum, generator)
            noise = torch.randn(self.repeated.images.shape, generator=generator)
            found = []
            for chosen in torch.arange(len(self.repeated)).split(self.batch_size):
                x, c = self.repeated[chosen]
                t = steps[chosen].to(x.device)
                noisy = self.denoising.scheduler.add_noise(x, noise[chosen].to(x), t)
                given = self.denoising.predict(model, noisy, t, c)
                empty = self.denoising.predict(model, noisy, t, self.denoising.empty(c))
                found.append((given - empty).float().flatten(1).norm(dim=1).cpu())
            totals += torch.cat(found)
        norms = totals / self.strata
        return norms / self.repeated.images[0].numel() ** 0.5 if self.per_element else norms

    def _steps(self, stratum: int, generator: torch.Generator) -> Tensor:
        """One random step an image, uniform in the stratum."""
        low = stratum * self.denoising.steps // self.strata
        high = (stratum + 1) * self.denoising.steps // self.strata
        return torch.randint(low, high, (len(self.repeated),), generator=generator)


@dataclass(frozen=True)
class AverageMinimumDistance:
    """Mean distance from generated images to their nearest training image (eq. 6) [rec].

    A reward, higher being better.

    Arguments:
        sampler: generates images.
        training: (images, ...) that must not be replicated.
        features: from images to (images, features); by default the pixels themselves.
    """

    sampler: Sampler
    training: Tensor
    features: Features = pixels
    name: str = "distance"
    maximize: bool = True

    def __call__(self, model: nn.Module) -> float:
        """The reward."""
        found = self.features(self.sampler(model))
        return average_minimum_distance(found, self.features(self.training))


def average_minimum_distance(generated: Tensor, training: Tensor) -> float:
    """Equation 6 on features (images, features)."""
    return nearest_distances(generated, training).mean().item()


def nearest_distances(generated: Tensor, training: Tensor, chunk: int = 1024) -> Tensor:
    """(generated,) float32: Euclidean distances to the nearest row of `training`.

    Raises:
        DataError: there are no rows.
    """
    if len(generated) == 0 or len(training) == 0:
        raise DataError(
            "images",
            expected="generated and training images",
            found=f"{len(generated)} and {len(training)}",
            mend="Give at least one of each.",
        )
    parts = [exact_distances(part, training).amin(dim=1) for part in generated.split(chunk)]
    return torch.cat(parts)


def exact_distances(one: Tensor, other: Tensor) -> Tensor:
    """(n, m) float32: Euclidean distances of all rows, exactly 0 for identical ones."""
    return torch.cdist(one.float(), other.float(), compute_mode="donot_use_mm_for_euclid_dist")
