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
from sparing.tune.tuned import export, load_tuned, save_tuned

__all__ = [
    "AverageMinimumDistance",
    "CopyRate",
    "Denoising",
    "Extraction",
    "FineTuning",
    "FrechetDistance",
    "Front",
    "GuidedSampler",
    "Images",
    "LogUniform",
    "MemControl",
    "MemorizationInformedDistance",
    "MemorizationNorm",
    "ParameterGroup",
    "ParameterGroups",
    "PrincipalComponents",
    "Reward",
    "Run",
    "Trial",
    "alike",
    "average_minimum_distance",
    "block_groups",
    "export",
    "frechet_distance",
    "kernel_distance",
    "load_tuned",
    "mifid",
    "noisy_caption",
    "pareto_set",
    "predict_unet",
    "save_tuned",
    "tile_distances",
]
