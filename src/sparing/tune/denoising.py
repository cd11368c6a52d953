"""How a diffusion model is asked for noise, fine-tuned and sampled from.

One small protocol for diffusers' UNets and for any other network: a function `predict` from
model, noisy images, time steps and conditions to what the model predicts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.errors import ConfigError, DataError, MissingExtraError
from sparing.train import DivergedError

if TYPE_CHECKING:
    from sparing.tune.memcontrol import Run

Predict = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def predict_unet(model: nn.Module, x: Tensor, steps: Tensor, conditions: Tensor) -> Tensor:
    """A model of diffusers with cross-attention: conditions are embeddings of texts.

    Arguments:
        x: (images, channels, height, width).
        steps: (images,) int64.
        conditions: (images, tokens, width).
    """
    return model(x, steps, encoder_hidden_states=conditions).sample


@dataclass(frozen=True)
class Images:
    """Images, or their latents, with the conditions that they go with.

    Arguments:
        images: (images, ...) float.
        conditions: (images, ...), such as embeddings of captions or labels.
        name: for errors.

    Raises:
        DataError: there are none, or not as many conditions as images.
    """

    images: Tensor
    conditions: Tensor
    name: str = "images"

    def __post_init__(self) -> None:
        if len(self.images) == 0:
            raise DataError(
                self.name,
                expected="at least one image",
                found="none",
                mend="Memorisation and quality are measured on images: give some.",
            )
        if len(self.images) != len(self.conditions):
            raise DataError(
                self.name,
                expected=f"a condition for each of {len(self.images)} images",
                found=f"{len(self.conditions)} conditions",
                mend="Give one caption an image.",
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Any) -> tuple[Tensor, Tensor]:
        return self.images[chosen], self.conditions[chosen]


@dataclass(frozen=True)
class Denoising:
    """A noise schedule, the empty prompt, and the way a model is called.

    Arguments:
        scheduler: of diffusers, with `alphas_cumprod`, that predicts "epsilon" or "v_prediction".
        unconditional: the condition of the empty prompt "", (tokens, width) or of the shape that
            one condition has. None if the model has no conditions: then it can be trained, but
            neither guided nor asked for equation 4.
        predict: calls the model; by default as a UNet of diffusers.
    """

    scheduler: Any
    unconditional: Tensor | None
    predict: Predict = predict_unet

    def __post_init__(self) -> None:
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if not hasattr(self.scheduler, "alphas_cumprod") or kind == "sample":
            raise ConfigError(
                "scheduler",
                expected="a schedule with alphas_cumprod that predicts epsilon or v_prediction",
                found=f"{type(self.scheduler).__name__} that predicts {kind}",
                mend="Use DDPMScheduler or DDIMScheduler, or write your own training function.",
            )

    @property
    def steps(self) -> int:
        """T, steps of noise."""
        return len(self.scheduler.alphas_cumprod)

    def empty(self, like: Tensor) -> Tensor:
        """The empty prompt, once for each of the conditions `like`.

        Raises:
            DataError: there is none.
        """
        if self.unconditional is None:
            raise DataError(
                "unconditional",
                expected="the condition of the empty prompt",
                found="None",
                mend="Memorisation by equation 4 and guidance need a model with conditions.",
            )
        return self.unconditional.to(like).expand_as(like)

    def target(self, x: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """What the model should predict: the noise, or the velocity."""
        if self.scheduler.config.get("prediction_type") == "v_prediction":
            return self.scheduler.get_velocity(x, noise, steps)
        return noise

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        conditions: Tensor,
        shape: tuple[int, ...],
        *,
        steps: int = 50,
        guidance: float = 4.0,
        generator: torch.Generator,
        batch_size: int = 256,
    ) -> Tensor:
        """Images by deterministic DDIM with classifier-free guidance; the defaults are the paper's.

        Arguments:
            conditions: (images, ...), on the model's device.
            shape: of one image.
            steps: of the sampler.
            guidance: 1 is none.
            generator: on the CPU; the noise is drawn all at once, whatever the batch size.

        Returns:
            (images, *shape), on the device of the conditions.
        """
        ddim = _ddim(self.scheduler)
        ddim.set_timesteps(steps)
        noise = torch.randn((len(conditions), *shape), generator=generator)
        done = []
        for x, c in zip(noise.split(batch_size), conditions.split(batch_size), strict=True):
            x = x.to(c.device)
            for step in ddim.timesteps:
                x = ddim.step(self._guided(model, x, step, c, guidance), step, x).prev_sample
            done.append(x)
        return torch.cat(done)

    def _guided(
        self, model: nn.Module, x: Tensor, step: Tensor, conditions: Tensor, guidance: float
    ) -> Tensor:
        times = step.expand(len(x)).to(x.device)
        if guidance == 1:
            return self.predict(model, x, times, conditions)
        both = torch.cat([self.empty(conditions), conditions])
        found = self.predict(model, torch.cat([x, x]), torch.cat([times, times]), both)
        without, given = found.chunk(2)
        return without + guidance * (given - without)


@dataclass(frozen=True)
class FineTuning:
    """The inner level: denoising on ordinary images and on repeated ones (eq. 2).

    Call it with a `Run`. Order of data, noise and time steps are the same in every trial.

    Arguments:
        denoising: schedule and model.
        ordinary: D_train.
        repeated: D_mem, each image as often in the data as `repeats` says; None for none.
        repeats: 300 in the paper's script.
        steps: of the optimiser, at a constant rate; 100 in the paper's script.
        batch_size: 64 in the paper's script.
        weight_decay: of AdamW with β = (0.9, 0.999).
        clip: largest norm of the gradient.
        drop_condition: share of conditions that are replaced by the empty prompt.
        norm_limit: leave images out of a step's loss whose norm (eq. 4) is above this: the
            mitigation by threshold of Wen et al. (2024). None is off.
        autocast: bfloat16, or None for the type of the model.
        reports: how often to offer the run to a pruner.
    """

    denoising: Denoising
    ordinary: Images
    repeated: Images | None = None
    repeats: int = 1
    steps: int = 100
    batch_size: int = 64
    weight_decay: float = 1e-2
    clip: float = 1.0
    drop_condition: float = 0.0
    norm_limit: float | None = None
    autocast: torch.dtype | None = None
    reports: int = 1
    _entries: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for option in ("repeats", "steps", "batch_size", "reports"):
            if getattr(self, option) < 1:
                raise ConfigError(
                    option,
                    expected="at least 1",
                    found=repr(getattr(self, option)),
                    mend="Raise it.",
                )
        again = torch.arange(len(self.repeated) if self.repeated else 0) + len(self.ordinary)
        entries = torch.cat([torch.arange(len(self.ordinary)), again.repeat(self.repeats)])
        object.__setattr__(self, "_entries", entries)

    def __call__(self, run: "Run") -> None:
        """Fine-tune `run.model`.

        Raises:
            DivergedError: the loss is no longer finite.
        """
        optimizer = torch.optim.AdamW(run.parameters, weight_decay=self.weight_decay)
        trained = [parameter for group in run.parameters for parameter in group["params"]]
        generator = run.generator("fine-tuning")
        sets = [self.ordinary] + ([self.repeated] if self.repeated else [])
        data = Images(torch.cat([s.images for s in sets]), torch.cat([s.conditions for s in sets]))
        for step in range(1, self.steps + 1):
            loss = self._loss(run.model, *data[self._draw(generator)], generator)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, self.clip)
            if not torch.isfinite(loss) or not torch.isfinite(norm):
                raise DivergedError(
                    f"fine-tuning, step {step}",
                    expected="a finite loss",
                    found=f"loss {loss.item():.3g}, gradient norm {norm.item():.3g}",
                    mend="Lower the learning rate.",
                )
            optimizer.step()
            if step * self.reports // self.steps > (step - 1) * self.reports // self.steps:
                run.report(step)

    def _draw(self, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self._entries), (self.batch_size,), generator=generator)
        return self._entries[chosen]

    def _loss(
        self, model: nn.Module, x: Tensor, conditions: Tensor, generator: torch.Generator
    ) -> Tensor:
        noise = torch.randn(x.shape, generator=generator).to(x)
        steps = torch.randint(self.denoising.steps, (len(x),), generator=generator).to(x.device)
        dropped = torch.rand(len(x), generator=generator).to(x.device) < self.drop_condition
        if self.drop_condition:
            mask = dropped.view(-1, *[1] * (conditions.dim() - 1))
            conditions = torch.where(mask, self.denoising.empty(conditions), conditions)
        noisy = self.denoising.scheduler.add_noise(x, noise, steps)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            found = self.denoising.predict(model, noisy, steps, conditions)
        error = F.mse_loss(
            found.float(), self.denoising.target(x, noise, steps).float(), reduction="none"
        )
        if self.norm_limit is None:
            return error.mean()
        with torch.no_grad():
            empty = self.denoising.predict(model, noisy, steps, self.denoising.empty(conditions))
        norms = (found.detach() - empty).float().flatten(1).norm(dim=1)
        kept = (norms <= self.norm_limit).float()
        return (error.flatten(1).mean(1) * kept).sum() / kept.sum().clamp(min=1)


def _ddim(scheduler: Any) -> Any:
    """A deterministic sampler for a schedule; a DDIM scheduler's own settings are kept."""
    try:
        from diffusers import DDIMScheduler
    except ImportError as error:
        raise MissingExtraError.of("diffusers", "tune") from error
    changes = {} if isinstance(scheduler, DDIMScheduler) else {"clip_sample": False}
    # Arguments given by position are listed as defaults in a config, and would be dropped.
    config = {name: v for name, v in scheduler.config.items() if name != "_use_default_values"}
    return DDIMScheduler.from_config(config, **changes)
