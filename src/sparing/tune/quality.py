"""How good generated images are as a set: Fréchet and kernel distances of their features."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from sparing.errors import DataError
from sparing.tune.denoising import Denoising
from sparing.tuners import generator_for

Features = Callable[[Tensor], Tensor]


class Sampler(Protocol):
    """Generates images with a model."""

    def __call__(self, model: nn.Module) -> Tensor:
        """(images, channels, height, width)."""
        ...


@dataclass(frozen=True)
class GuidedSampler:
    """The same conditions and noise for every model, by deterministic DDIM.

    Arguments:
        denoising: schedule and model.
        conditions: (images, ...), one for each image to generate.
        shape: of one image.
        steps: of DDIM; 50 in the paper.
        guidance: 4 in the paper.
        batch_size: images at once.
        decode: from what the model generates to images, such as a VAE's decoder; None
            for none.
        seed: of the noise.
    """

    denoising: Denoising
    conditions: Tensor
    shape: tuple[int, ...]
    steps: int = 50
    guidance: float = 4.0
    batch_size: int = 256
    decode: Callable[[Tensor], Tensor] | None = None
    seed: int = 0

    def __call__(self, model: nn.Module) -> Tensor:
        """(images, *shape), after `decode`."""
        found = self.denoising.sample(
            model,
            self.conditions,
            self.shape,
            steps=self.steps,
            guidance=self.guidance,
            generator=generator_for(self.seed, "samples"),
            batch_size=self.batch_size,
        )
        return found if self.decode is None else self.decode(found)


@dataclass(frozen=True)
class FrechetDistance:
    """The Fréchet distance between features of real and of generated images (FID).

    A reward, lower being better. With InceptionV3's features it is FID; the paper uses a
    DenseNet-121 trained on chest X-rays for those. Features of the real images are computed once.

    Arguments:
        sampler: generates images.
        real: (images, ...) to be like.
        features: from images to (images, features).
    """

    sampler: Sampler
    real: Tensor
    features: Features
    name: str = "FID"
    _real_features: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            object.__setattr__(self, "_real_features", self.features(self.real))

    def __call__(self, model: nn.Module) -> float:
        """The reward."""
        return frechet_distance(self._real_features, self.features(self.sampler(model)))


@dataclass(frozen=True)
class MemorizationInformedDistance(FrechetDistance):
    """FID divided by the distance to the nearest training image (MiFID, Bai et al. 2021).

    A reward, lower being better: images too near to D_mem are punished.

    Arguments:
        real: D_mem.
        epsilon: distances above count as 1, so that there is no punishment.
    """

    name: str = "MIFID"
    epsilon: float = 0.1

    def __call__(self, model: nn.Module) -> float:
        """The reward."""
        found = self.features(self.sampler(model))
        return mifid(self._real_features, found, self.epsilon)


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """‖μ₁ - μ₂‖² + tr(C₁ + C₂ - 2 (C₁ C₂)^½), of features (images, features), in float64.

    NaN where a feature is no finite number.

    Raises:
        DataError: fewer than two images, or features of different length.
    """
    _check(real, generated)
    fewest, width = min(len(real), len(generated)), real.shape[1]
    if fewest <= width:
        warnings.warn(
            f"{fewest} images for {width} features: their covariance has not full rank, and the "
            f"distance is biased upwards. Use more than {width} images, or fewer features.",
            stacklevel=2,
        )
    one, other = real.double().cpu(), generated.double().cpu()
    if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        return float("nan")
    gap = (one.mean(0) - other.mean(0)).square().sum()
    first, second = torch.cov(one.T), torch.cov(other.T)
    first, second = first.reshape(width, width), second.reshape(width, width)
    # tr (C₁ C₂)^½ is the sum of the roots of the eigenvalues of C₁^½ C₂ C₁^½, which is symmetric.
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return max(0.0, (gap + first.trace() + second.trace() - 2 * shared).item())


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """The unbiased squared MMD with the kernel (x·y / features + 1)³ (KID), in float64.

    For few images, where `frechet_distance` is biased; may be slightly below 0.

    Raises:
        DataError: fewer than two images, or features of different length.
    """
    _check(real, generated)
    one, other = real.double(), generated.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return (within(one) + within(other) - 2 * kernel(one, other).mean()).item()


def mifid(real: Tensor, generated: Tensor, epsilon: float = 0.1) -> float:
    """FID over the mean cosine distance of generated images to the nearest real ones.

    Arguments:
        real: features (images, features) of what must not be replicated.
        generated: features.
        epsilon: distances above count as 1.
    """
    one = nn.functional.normalize(generated.double(), dim=1)
    other = nn.functional.normalize(real.double(), dim=1)
    distance = (1 - (one @ other.T).abs()).min(dim=1).values.mean().item()
    return frechet_distance(real, generated) / (1.0 if distance > epsilon else distance + 1e-15)


class PrincipalComponents:
    """Features by principal components of real images: of no network, for small images.

    Arguments:
        images: (images, ...) to find the components of.
        components: features.

    Raises:
        DataError: there are fewer images or pixels than components.
    """

    def __init__(self, images: Tensor, components: int = 16) -> None:
        rows = images.flatten(1).double()
        if min(rows.shape) < components:
            raise DataError(
                "images",
                expected=f"at least {components} images of as many pixels",
                found=f"{rows.shape[0]} images of {rows.shape[1]} pixels",
                mend="Give more images, or fewer components.",
            )
        self.mean = rows.mean(0)
        self.directions = torch.linalg.svd(rows - self.mean, full_matrices=False).Vh[:components].T

    def __call__(self, images: Tensor) -> Tensor:
        """(images, components) float64."""
        return (images.flatten(1).double().cpu() - self.mean.cpu()) @ self.directions.cpu()


def pixels(images: Tensor) -> Tensor:
    """(images, elements): the images themselves as features."""
    return images.flatten(1)


def _check(real: Tensor, generated: Tensor) -> None:
    if min(len(real), len(generated)) < 2 or real.shape[1:] != generated.shape[1:]:
        raise DataError(
            "features",
            expected="at least two images of each kind, with features of one length",
            found=f"{tuple(real.shape)} real and {tuple(generated.shape)} generated",
            mend="Use the same feature extractor on more images.",
        )
