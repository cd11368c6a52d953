"""Models: whole language models, and the small ones that serve as baselines everywhere."""

from sparing.models.small import FAMILIES, Shape, build, config_of

__all__ = ["FAMILIES", "Shape", "build", "config_of"]
