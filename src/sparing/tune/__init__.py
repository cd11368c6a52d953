"""Hyperparameters that are learned or searched."""

from sparing.tune.denoising import Denoising, FineTuning, Images, predict_unet
from sparing.tune.extraction import CopyRate, Extraction, alike, tile_distances
from sparing.tune.front import Front, Trial, pareto_set
from sparing.tune.memcontrol import MemControl, Reward, Run
from sparing.tune.memorization import (
    AverageMinimumDistance,
    MemorizationNorm,
    average_minimum_distance,
)
from sparing.tune.mitigation import noisy_caption
from sparing.tune.parameter_groups import ParameterGroup, ParameterGroups, block_groups
from sparing.tune.quality import (
    FrechetDistance,
    GuidedSampler,
    MemorizationInformedDistance,
    PrincipalComponents,
    frechet_distance,
    kernel_distance,
    mifid,
)
from sparing.tune.samplers import LogUniform
from sparing.tune.stn import (
    Augmentation,
    ColourJitter,
    Cutout,
    HParam,
    PixelDropout,
    Plan,
    RegularizedNetwork,
    ScaleNoise,
    Schedule,
    SelfTuningNetwork,
    constant,
    draw_schedule,
    fit,
    gaussian,
    image_hparams,
    replay,
    sinusoid,
)
from sparing.tune.tuned import export, load_tuned, save_tuned

__all__ = [
    "Augmentation",
    "AverageMinimumDistance",
    "ColourJitter",
    "CopyRate",
    "Cutout",
    "Denoising",
    "Extraction",
    "FineTuning",
    "FrechetDistance",
    "Front",
    "GuidedSampler",
    "HParam",
    "Images",
    "LogUniform",
    "MemControl",
    "MemorizationInformedDistance",
    "MemorizationNorm",
    "ParameterGroup",
    "ParameterGroups",
    "PixelDropout",
    "Plan",
    "PrincipalComponents",
    "RegularizedNetwork",
    "Reward",
    "Run",
    "ScaleNoise",
    "Schedule",
    "SelfTuningNetwork",
    "Trial",
    "alike",
    "average_minimum_distance",
    "block_groups",
    "constant",
    "draw_schedule",
    "export",
    "fit",
    "frechet_distance",
    "gaussian",
    "image_hparams",
    "kernel_distance",
    "load_tuned",
    "mifid",
    "noisy_caption",
    "pareto_set",
    "predict_unet",
    "replay",
    "save_tuned",
    "sinusoid",
    "tile_distances",
]
