"""Train small language models from scratch, one or a grid of them, by scaling rules."""

from sparing.pretrain.run import Outcome, pretrain
from sparing.pretrain.settings import Settings
from sparing.pretrain.sweep import Grid, sweep

__all__ = ["Grid", "Outcome", "Settings", "pretrain", "sweep"]
