"""What `sparing search` works on: a UNet of diffusers, images that may be copied, others that show
quality. Either small and built in, or the user's own files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparing.checkpoint import atomic_path
from sparing.errors import CheckpointError, DataError, MissingExtraError
from sparing.tune.denoising import Denoising, FineTuning, Images
from sparing.tune.memcontrol import Run
from sparing.tuners import generator_for

SETS = ("ordinary", "repeated", "held_out")
PRIVATE, ORDINARY = 20, 200
_STEPS_OF_NOISE, _WIDTH = 50, 16


@dataclass(frozen=True)
class Task:
    """A base model and its data.

    Arguments:
        model: frozen but for what a mask trains.
        denoising: schedule and empty prompt.
        ordinary: D_train.
        repeated: D_mem.
        held_out: D_val: like D_train, for the quality of what is generated for its conditions.
    """

    model: nn.Module
    denoising: Denoising
    ordinary: Images
    repeated: Images
    held_out: Images

    def save_data(self, path: Path) -> None:
        """Write the data in the format that `load_task` reads, atomically."""
        assert self.denoising.unconditional is not None
        tensors = {"unconditional": self.denoising.unconditional}
        for name in SETS:
            images: Images = getattr(self, name)
            tensors |= {f"{name}.images": images.images, f"{name}.conditions": images.conditions}
        with atomic_path(path) as fresh:
            save_file({name: t.contiguous() for name, t in tensors.items()}, fresh)


def load_task(model: str | Path, data: Path) -> Task:
    """A task from files.

    Arguments:
        model: folder or hub id of a UNet2DConditionModel (subfolder "unet" of a pipeline counts),
            with a scheduler beside it if it is not Stable Diffusion's.
        data: safetensors with `ordinary.images` (images, channels, height, width) as the model
            sees them (latents, or pixels in -1...1), `ordinary.conditions` (images, tokens, width),
            the same for `repeated` and `held_out`, and `unconditional` (tokens, width).

    Raises:
        CheckpointError: the model cannot be loaded.
        DataError: the data cannot be read, or lack a tensor.
    """
    diffusers = require_diffusers()
    try:
        tensors = load_file(data)
    except (OSError, SafetensorError) as error:
        raise DataError(
            str(data),
            expected="a safetensors file",
            found=f"{type(error).__name__}: {error}",
            mend="See sparing.tune.task.load_task for its tensors.",
        ) from error
    names = [f"{name}.{part}" for name in SETS for part in ("images", "conditions")]
    for name in [*names, "unconditional"]:
        if name not in tensors:
            raise DataError(
                str(data),
                expected=f"a tensor {name}",
                found=", ".join(sorted(tensors)) or "no tensor",
                mend="See sparing.tune.task.load_task for what it must hold.",
            )
    unet = _load(diffusers.UNet2DConditionModel, model, "unet")
    scheduler = _load(diffusers.DDIMScheduler, model, "scheduler")
    sets = [Images(tensors[f"{n}.images"], tensors[f"{n}.conditions"], n) for n in SETS]
    return Task(unet, Denoising(scheduler, tensors["unconditional"]), *sets)


def digits_task(
    folder: Path, *, steps: int = 300, seed: int = 0, stage: Callable[[str], None] = lambda _: None
) -> Task:
    """A small UNet on scikit-learn's digits, to be fine-tuned on digits in another style.

    The base learns upright digits; the task has transposed and flipped ones: 200 ordinary images
    with the condition of their class, 20 private ones with a condition of their own, the rest held
    out.

    Arguments:
        folder: for the trained base, which is loaded if it is there.
        steps: of pre-training.
        seed: of split, conditions and base.
        stage: told what is being done.
    """
    diffusers = require_diffusers()
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError.of("scikit-learn", "tune") from error
    found = load_digits()
    order = torch.randperm(len(found.images), generator=generator_for(seed, "split"))
    images = torch.tensor(found.images, dtype=torch.float32)[order][:, None] / 8 - 1
    labels = torch.tensor(found.target, dtype=torch.int64)[order]
    table = torch.randn(11 + PRIVATE, 1, _WIDTH, generator=generator_for(seed, "conditions"))
    source = len(images) - 3 * ORDINARY - PRIVATE
    style = images[source:].transpose(2, 3).flip(3).contiguous()
    classes = table[labels[source:]]
    ordinary, held_out = slice(PRIVATE, PRIVATE + ORDINARY), slice(PRIVATE + ORDINARY, None)
    if not (folder / "unet").is_dir():
        stage("pre-training a small UNet on digits")
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=_STEPS_OF_NOISE, beta_start=1e-3, beta_end=0.2, clip_sample=False
        )
        model = _small_unet(diffusers, seed)
        train = FineTuning(
            Denoising(scheduler, table[10]),
            Images(images[:source], table[labels[:source]]),
            steps=steps,
            drop_condition=0.1,
        )
        parameters = [{"params": list(model.parameters()), "lr": 2e-3}]
        train(Run(model.train(), "", 2e-3, parameters, seed))
        with atomic_path(folder) as fresh:
            model.save_pretrained(fresh / "unet")
            scheduler.save_pretrained(fresh / "scheduler")
    unet = _load(diffusers.UNet2DConditionModel, folder, "unet")
    denoising = Denoising(_load(diffusers.DDIMScheduler, folder, "scheduler"), table[10])
    return Task(
        unet.eval(),
        denoising,
        Images(style[ordinary], classes[ordinary], "ordinary"),
        Images(style[:PRIVATE], table[11:], "repeated"),
        Images(style[held_out], classes[held_out], "held_out"),
    )


def pixels(images: Tensor) -> Tensor:
    """From -1...1 to 0...1, for distances."""
    return (images + 1) / 2


def require_diffusers() -> Any:
    """diffusers.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError.of("diffusers", "tune") from error
    return diffusers


def _small_unet(diffusers: Any, seed: int) -> Any:
    """65,000 parameters, five attention blocks."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=_WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
        )


def _load(kind: Any, model: str | Path, subfolder: str) -> Any:
    folder = Path(model)
    inside = subfolder if not folder.is_dir() or (folder / subfolder).is_dir() else ""
    try:
        return kind.from_pretrained(str(model), subfolder=inside)
    except Exception as error:  # of diffusers, hub and safetensors
        raise CheckpointError(
            f"{model}, {subfolder}",
            expected=f"a {kind.__name__} of diffusers",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}",
            mend="Give a folder with unet and scheduler, as pipelines have them, or 'digits'.",
        ) from error
