"""Augmentations of images whose strengths are tuned, a strength for every image (STN, CNN set).

They change a training batch (images, labels) or {"pixel_values": images, …} with images
(rows, channels, height, width) in 0…1, and draw from the generator they are given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparing.errors import DataError
from sparing.tune.stn.hparams import HParam


class Augmentation:
    """A change of images; subclasses say which."""

    def __call__(self, batch: Any, values: Mapping[str, Tensor], generator: torch.Generator) -> Any:
        """The batch with other images."""
        images = batch["pixel_values"] if isinstance(batch, Mapping) else batch[0]
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
            raise DataError(
                type(self).__name__,
                expected="images (rows, channels, height, width), floating",
                found=str(getattr(images, "shape", type(images).__name__)),
                mend="Convert the images to floating tensors in 0…1.",
            )
        changed = self.change(images, values, generator)
        if isinstance(batch, Mapping):
            return {**batch, "pixel_values": changed}
        return (changed, *batch[1:])

    def change(
        self, images: Tensor, values: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """(rows, channels, height, width) to the same shape."""
        raise NotImplementedError


def _uniform(images: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=images.dtype).to(images.device)


def _by_image(strength: Tensor, images: Tensor) -> Tensor:
    strength = strength.to(images.device, images.dtype)
    return strength.expand(len(images)).view(-1, 1, 1, 1)


class PixelDropout(Augmentation):
    """Dropout of the input, with a rate for every image."""

    def __init__(self, rate: str = "input_dropout") -> None:
        self.rate = rate

    def change(
        self, images: Tensor, values: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        keep = 1 - _by_image(values[self.rate], images)
        mask = _uniform(images, generator, *images.shape) < keep
        return images * mask / keep.clamp_min(torch.finfo(keep.dtype).tiny)


class ScaleNoise(Augmentation):
    """Multiplies each image by a number drawn uniformly from 1 / (1 + s) to 1 + s."""

    def __init__(self, strength: str = "input_scale") -> None:
        self.strength = strength

    def change(
        self, images: Tensor, values: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        top = 1 + _by_image(values[self.strength], images)
        share = _uniform(images, generator, len(images), 1, 1, 1)
        return images * (1 / top + (top - 1 / top) * share)


class ColourJitter(Augmentation):
    """Random brightness, contrast, saturation and hue, in an order drawn for the batch.

    Factors are uniform in max(0, 1 - s)…1 + s, the shift of hue in -s…s turns; a name of None
    leaves that part out. Images have three channels. Written for batches with a strength for each
    image, which torchvision's transform does not take.

    Arguments:
        brightness, contrast, saturation, hue: names of hyperparameters; hue at most 0.5.
    """

    def __init__(
        self,
        brightness: str | None = "brightness",
        contrast: str | None = "contrast",
        saturation: str | None = "saturation",
        hue: str | None = "hue",
    ) -> None:
        self.names = {
            part: name
            for part, name in (
                ("brightness", brightness),
                ("contrast", contrast),
                ("saturation", saturation),
                ("hue", hue),
            )
            if name is not None
        }

    def change(
        self, images: Tensor, values: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        parts = list(self.names)
        for index in torch.randperm(len(parts), generator=generator).tolist():
            part = parts[index]
            strength = _by_image(values[self.names[part]], images)
            share = _uniform(images, generator, len(images), 1, 1, 1)
            if part == "hue":
                images = turn_hue(images, strength * (2 * share - 1))
                continue
            low = (1 - strength).clamp_min(0)
            factor = low + (1 + strength - low) * share
            images = (factor * images + (1 - factor) * _anchor(images, part)).clamp(0, 1)
        return images


def _anchor(images: Tensor, part: str) -> Tensor:
    """What an image is blended with: black, its mean grey, or its own grey."""
    if part == "brightness":
        return torch.zeros_like(images)
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = (images * weights).sum(1, keepdim=True)
    return grey.mean(dim=(2, 3), keepdim=True) if part == "contrast" else grey


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue.

    Arguments:
        images: (rows, 3, height, width) in 0…1.
        turns: (rows, 1, 1, 1), in whole turns of the colour circle.

    Returns:
        the same shape; lightness and saturation (of HSV) stay.
    """
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    spread = high - low
    safe = spread.clamp_min(1e-12)
    hue = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue / 6 + turns[:, 0]) % 1.0
    # A channel is the high value less the spread, times a trapezoid of the hue.
    sectors = hue[:, None] * 6 + images.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    sectors = sectors % 6
    trapezoid = torch.minimum(sectors, 4 - sectors).clamp(0, 1)
    return high[:, None] - spread[:, None] * trapezoid


class Cutout(Augmentation):
    """Sets squares of each image to zero; they may reach over its edge.

    Arguments:
        length: hyperparameter for the side of the squares, in pixels.
        holes: hyperparameter for their number.
        most_holes: the highest value of `holes`.
    """

    def __init__(
        self, length: str = "cutout_length", holes: str = "cutout_holes", most_holes: int = 4
    ) -> None:
        self.length, self.holes, self.most_holes = length, holes, most_holes

    def change(
        self, images: Tensor, values: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        rows, _, height, width = images.shape
        side, count = _by_image(values[self.length], images), _by_image(values[self.holes], images)
        y = torch.arange(height, device=images.device).view(1, 1, -1, 1)
        x = torch.arange(width, device=images.device).view(1, 1, 1, -1)
        for hole in range(self.most_holes):
            share = _uniform(images, generator, rows, 2)
            top = (share[:, 0].view(-1, 1, 1, 1) * height).floor() - (side / 2).floor()
            left = (share[:, 1].view(-1, 1, 1, 1) * width).floor() - (side / 2).floor()
            inside = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
            images = images.masked_fill(inside & (hole < count), 0.0)
        return images


def image_hparams(parts: Sequence[str] | None = None) -> list[HParam]:
    """The paper's eight hyperparameters of the input for 32 x 32 colour images, at its starts.

    Arguments:
        parts: names to keep; None for all.
    """
    colours = ("brightness", "contrast", "saturation", "hue")
    jitter = ColourJitter(*(n if parts is None or n in parts else None for n in colours))
    cutout = Cutout()
    found = [
        HParam("input_dropout", 0.05, (0.0, 0.9), PixelDropout()),
        HParam("input_scale", 0.05, (0.0, 0.3), ScaleNoise()),
        HParam("hue", 0.05, (0.0, 0.5), jitter),
        HParam("contrast", 0.05, (0.0, 1.0), jitter),
        HParam("saturation", 0.05, (0.0, 1.0), jitter),
        HParam("brightness", 0.05, (0.0, 1.0), jitter),
        HParam("cutout_length", 4, (0, 24), cutout, discrete=True),
        HParam("cutout_holes", 1, (0, 4), cutout, discrete=True),
    ]
    return [hparam for hparam in found if parts is None or hparam.name in parts]
