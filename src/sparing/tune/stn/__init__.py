"""STN, self-tuning networks: one run that tunes its regularisation while it trains.

Every layer carries a cheap response of its weights to the hyperparameters. It is learned on
training data under random perturbations; steps on validation data move the hyperparameters through
it. Dropout rates, strengths of augmentation and penalties are tuned so, discrete ones too, and
leave a schedule behind.

MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of
Hyperparameters using Structured Best-Response Functions", arXiv 1903.03088 (ICLR 2019). Equation
numbers are those of our specification, which was made from the released code.
"""

from sparing.tune.stn.augmentation import (
    Augmentation,
    ColourJitter,
    Cutout,
    PixelDropout,
    ScaleNoise,
    image_hparams,
)
from sparing.tune.stn.figure import draw_schedule
from sparing.tune.stn.hparams import HParam
from sparing.tune.stn.network import SelfTuningNetwork
from sparing.tune.stn.regularized import RegularizedNetwork
from sparing.tune.stn.schedule import Record, Schedule, constant, gaussian, sinusoid
from sparing.tune.stn.training import Plan, Run, fit, replay

__all__ = [
    "Augmentation",
    "ColourJitter",
    "Cutout",
    "HParam",
    "PixelDropout",
    "Plan",
    "Record",
    "RegularizedNetwork",
    "Run",
    "ScaleNoise",
    "Schedule",
    "SelfTuningNetwork",
    "constant",
    "draw_schedule",
    "fit",
    "gaussian",
    "image_hparams",
    "replay",
    "sinusoid",
]
