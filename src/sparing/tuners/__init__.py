"""What every PEFT method of `sparing.adapt` has in common.

A method is three small classes in one file: a config (what the user writes), a `LayerAdapter`
(the trainable numbers of one layer and how they change it) and a `Tuner` (which adapter goes on
which layer). Everything PEFT promises about named adapters, merging, saving and loading is here.
"""

from sparing.tuners.adapters import AdditiveAdapter, LayerAdapter, ModuleAdapter
from sparing.tuners.config import TunerConfig, generator_for, option_for
from sparing.tuners.layers import AdaptedConv2d, AdaptedLinear, AdaptedModule, TunerLayer
from sparing.tuners.matrices import layer_shape, matrix_view, product_type
from sparing.tuners.registration import register_tuner
from sparing.tuners.tuner import Tuner

__all__ = [
    "AdaptedConv2d",
    "AdaptedLinear",
    "AdaptedModule",
    "AdditiveAdapter",
    "LayerAdapter",
    "ModuleAdapter",
    "Tuner",
    "TunerConfig",
    "TunerLayer",
    "generator_for",
    "layer_shape",
    "matrix_view",
    "option_for",
    "product_type",
    "register_tuner",
]
