"""Extraction: which training images a model gives back when it is asked for their captions (eq. 5).

Many images are generated for one caption. If some of them are alike, the model repeats itself, and
if what it repeats is the training image, the image was extracted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparing.errors import ConfigError, DataError, MissingExtraError
from sparing.tune.memorization import exact_distances

Law = Literal["component", "clique"]
_PAPER_THRESHOLD = 20.0  # for a tile of 56 x 56 pixels in three colours
_PAPER_TILE = 56 * 56 * 3


def scaled_threshold(shape: tuple[int, ...], grid: int = 4, threshold: float = 20.0) -> float:
    """The paper's threshold for tiles of another size: it grows with the root of the elements.

    Arguments:
        shape: of one image, (channels, height, width).
        grid: tiles a side.
        threshold: for images of 3 x 224 x 224 in 4 x 4 tiles.
    """
    elements = torch.Size(shape).numel() / grid**2
    return threshold * (elements / _PAPER_TILE) ** 0.5


def tile_distances(images: Tensor, others: Tensor, grid: int = 4) -> Tensor:
    """The largest distance among the tiles of two images, for all pairs.

    Arguments:
        images: (n, channels, height, width), in [0, 1].
        others: (m, channels, height, width).
        grid: tiles a side; 1 is the plain distance of whole images.

    Returns:
        (n, m) float32.

    Raises:
        ConfigError: the sides cannot be divided into as many tiles.
    """
    height, width = images.shape[-2:]
    if grid < 1 or height % grid or width % grid:
        raise ConfigError(
            "grid",
            expected=f"a divisor of height {height} and width {width}",
            found=repr(grid),
            mend="Crop the images, or choose another grid.",
        )
    one, other = _tiles(images, grid), _tiles(others, grid)
    return torch.stack([exact_distances(a, b) for a, b in zip(one, other, strict=True)]).amax(0)


def alike(matches: Tensor, law: Law = "component") -> list[list[int]]:
    """Groups of images that match.

    Arguments:
        matches: (n, n) bool, symmetric.
        law: "component" takes two images together if a chain of matches joins them, as the released
            code does; "clique" wants all pairs of a group to match, and groups may overlap.

    Returns:
        positions, the largest group first.
    """
    networkx = _networkx()
    graph = networkx.from_numpy_array(matches.cpu().numpy())
    graph.remove_edges_from(list(networkx.selfloop_edges(graph)))
    if law == "component":
        found = networkx.connected_components(graph)
    elif law == "clique":
        found = networkx.find_cliques(graph)
    else:
        raise ConfigError(
            "law",
            expected="'component' or 'clique'",
            found=repr(law),
            mend="'component' is the released code's.",
        )
    return sorted((sorted(group) for group in found), key=lambda group: (-len(group), group))


@dataclass(frozen=True)
class Extracted:
    """What an attack found.

    Arguments:
        memorized: (captions,) bool: enough generated images of the caption are alike.
        extracted: (captions,) bool: and they are the training image.
    """

    memorized: Tensor
    extracted: Tensor


@dataclass(frozen=True)
class Extraction:
    """The attack; as a reward, the share of captions whose image was extracted.

    Arguments:
        sample: from a model to (captions, images, channels, height, width) in [0, 1]; the paper
            generates 50 images a caption.
        training: (captions, channels, height, width) in [0, 1]: the image of each caption.
        threshold: images match if the largest distance among their tiles is below; None scales the
            paper's 20 to the size of a tile.
        grid: tiles a side.
        smallest: group that counts as memorised.
        law: see `alike`.
    """

    sample: Callable[[nn.Module], Tensor]
    training: Tensor
    threshold: float | None = None
    grid: int = 4
    smallest: int = 3
    law: Law = "component"
    name: str = "extraction"

    def __call__(self, model: nn.Module) -> float:
        """The reward."""
        return self.judge(self.sample(model)).extracted.float().mean().item()

    def judge(self, generated: Tensor) -> Extracted:
        """Which captions were memorised and extracted.

        The group is represented by the member nearest to the others (the released code takes an
        arbitrary one) [rec].

        Arguments:
            generated: (captions, images, channels, height, width).

        Raises:
            DataError: the captions are not those of the training images.
        """
        if len(generated) != len(self.training) or len(generated) == 0:
            raise DataError(
                "generated",
                expected=f"images for each of {len(self.training)} captions",
                found=f"images for {len(generated)}",
                mend="Generate for the captions of the training images, in their order.",
            )
        limit = self.threshold
        if limit is None:
            limit = scaled_threshold(tuple(self.training.shape[1:]), self.grid, _PAPER_THRESHOLD)
        verdicts = [self._judge(g, t, limit) for g, t in zip(generated, self.training, strict=True)]
        memorized, extracted = zip(*verdicts, strict=True)
        return Extracted(torch.tensor(memorized), torch.tensor(extracted))

    def _judge(self, generated: Tensor, target: Tensor, limit: float) -> tuple[bool, bool]:
        distances = tile_distances(generated, generated, self.grid)
        groups = [g for g in alike(distances < limit, self.law) if len(g) >= self.smallest]
        found = False
        for group in groups:
            inside = distances[group][:, group]
            middle = group[int(inside.sum(1).argmin())]
            to_target = tile_distances(generated[middle][None], target[None], self.grid)
            found = found or bool(to_target < limit)
        return bool(groups), found


@dataclass(frozen=True)
class CopyRate:
    """A cheaper reward: the share of generated images that match their own training image.

    Arguments:
        sample: from a model to (images, channels, height, width), or as `Extraction` takes it.
        training: (images, channels, height, width): for each generated image its own.
        threshold: of the largest distance among tiles.
        grid: tiles a side; 1 compares whole images.
    """

    sample: Callable[[nn.Module], Tensor]
    training: Tensor
    threshold: float
    grid: int = 1
    name: str = "extraction"

    def __call__(self, model: nn.Module) -> float:
        """The reward."""
        generated = self.sample(model)
        if len(generated) != len(self.training):
            raise DataError(
                "training",
                expected=f"an image for each of {len(generated)} generated ones",
                found=f"{len(self.training)}",
                mend="Repeat each image as often as its caption is sampled.",
            )
        pairs = [
            tile_distances(g[None], t[None], self.grid).item()
            for g, t in zip(generated, self.training, strict=True)
        ]
        return sum(distance < self.threshold for distance in pairs) / len(pairs)


def _tiles(images: Tensor, grid: int) -> Tensor:
    """(tiles, images, elements)."""
    n, channels, height, width = images.shape
    cut = images.float().reshape(n, channels, grid, height // grid, grid, width // grid)
    return cut.permute(2, 4, 0, 1, 3, 5).reshape(grid * grid, n, -1)


def _networkx():  # type: ignore[no-untyped-def]
    try:
        import networkx
    except ImportError as error:
        raise MissingExtraError.of("networkx", "tune") from error
    return networkx
