"""A testbed where transfer is slow, or breaks: two-layer ReLU networks under μP.

f(x) = Σ a_i relu(⟨w_i, x⟩ + b_i), trained with Adam on fresh samples. With the indicator of a ball
as target the paper fits b_n ~ √a_n, which is slow. With the norm of some coordinates the best
learning rate jumps at a large width, unless the second layer learns 50 times more slowly.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.errors import ConfigError
from sparing.scale.fast_hp_transfer._scipy import scipy_part
from sparing.scale.fast_hp_transfer.grid import run_grid
from sparing.tuners import generator_for

Target = Literal["ball", "norm"]

BASE_WIDTH = 128


class TwoLayerReLU(nn.Module):
    """(batch, dimensions) -> (batch,), initialised by μP: the output of a fresh network falls as
    1/√n, and w keeps its scale.

    Arguments:
        dimensions: d of the inputs.
        width: n.
        seed: of the initialisation.
        base_width: at which μP is the standard initialisation.
    """

    def __init__(
        self, dimensions: int, width: int, seed: int = 0, base_width: int = BASE_WIDTH
    ) -> None:
        super().__init__()
        generator = generator_for(seed, "two-layer network")
        self.hidden = nn.Linear(dimensions, width)
        self.output = nn.Linear(width, 1, bias=False)
        with torch.no_grad():
            self.hidden.weight.normal_(generator=generator).div_(math.sqrt(dimensions))
            self.hidden.bias.zero_()
            self.output.weight.normal_(generator=generator).mul_(math.sqrt(base_width) / width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(x)))[..., 0]

    def groups(
        self, lr: float, second_layer: float = 1.0, base_width: int = BASE_WIDTH
    ) -> list[dict[str, Any]]:
        """Parameter groups for Adam: the second layer learns at lr · base_width / n, times
        `second_layer`."""
        rate = lr * second_layer * base_width / self.hidden.out_features
        return [
            {"params": list(self.hidden.parameters()), "lr": lr},
            {"params": list(self.output.parameters()), "lr": rate},
        ]


@dataclass(frozen=True)
class TwoLayerTask:
    """What is learned, and for how long. The defaults are the paper's.

    Arguments:
        target: "ball" is 1 where ‖x‖² is above the median of χ²_d, for x ~ N(0, I), with binary
            cross-entropy; "norm" is √(d/4k · Σ_{i≤k} x_i²) for x ~ N(0, 4 I/d), with the mean
            square.
        dimensions: d.
        relevant: k, of "norm".
        steps: T.
        batch: samples a step, all fresh.
        tests: samples that the final loss is measured on.
        second_layer: factor on its learning rate; 1/50 mends "norm".

    Raises:
        ConfigError: an option out of range.
    """

    target: Target = "ball"
    dimensions: int = 64
    relevant: int = 15
    steps: int = 2**14
    batch: int = 256
    tests: int = 2**13
    second_layer: float = 1.0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("target", self.target in ("ball", "norm"), '"ball" or "norm"'),
            ("relevant", 1 <= self.relevant <= self.dimensions, "from 1 to dimensions"),
            ("steps", self.steps >= 1, "1 or more"),
            ("second_layer", self.second_layer > 0, "above 0"),
        ):
            if not holds:
                raise ConfigError(
                    f"TwoLayerTask.{name}", expected=expected, found=repr(getattr(self, name)),
                    mend="The defaults are the paper's.",
                )  # fmt: skip

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(rows, dimensions) inputs and (rows,) targets, float32."""
        x = torch.randn(rows, self.dimensions, generator=generator)
        if self.target == "ball":
            return x, (
                x.square().sum(1) > scipy_part("special").chdtri(self.dimensions, 0.5)
            ).float()
        x = x * (2 / math.sqrt(self.dimensions))
        y = (self.dimensions / (4 * self.relevant) * x[:, : self.relevant].square().sum(1)).sqrt()
        return x, y

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy, or the mean square."""
        if self.target == "ball":
            return F.binary_cross_entropy_with_logits(output, y)
        return F.mse_loss(output, y)

    def train(self, width: int, lr: float, seed: int = 0, device: str = "cpu") -> float:
        """The final test loss of one run; nan if it diverged. Data do not depend on the width."""
        network = TwoLayerReLU(self.dimensions, width, seed).to(device)
        optimizer = torch.optim.Adam(network.groups(lr, self.second_layer))
        data = generator_for(seed, "two-layer data")
        for _ in range(self.steps):
            x, y = (t.to(device) for t in self.draw(self.batch, data))
            loss = self.loss(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, y = (t.to(device) for t in self.draw(self.tests, generator_for(seed, "two-layer tests")))
        with torch.no_grad():
            final = float(self.loss(network(x), y))
        return final if math.isfinite(final) else math.nan

    def sweep(
        self,
        widths: Sequence[int],
        rates: Sequence[float],
        seeds: Sequence[int] = (0,),
        *,
        device: str = "cpu",
        on_run: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> list[dict[str, Any]]:
        """Rows of a table as `analyze_transfer` reads it, one for each run."""

        def train(width: int, lr: float, seed: int) -> float:
            return self.train(width, lr, seed, device)

        return run_grid(train, widths, rates, seeds, on_run=on_run)
