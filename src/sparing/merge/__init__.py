"""Merge many fine-tuned models into one, in the memory of a few tensors."""

from typing import TYPE_CHECKING, Any

from sparing.merge.bank_report import BankReport
from sparing.merge.continual import continue_merge
from sparing.merge.made_it import MadeIt
from sparing.merge.merging import METHODS, merge
from sparing.merge.pcb_merging import PCBWeights, pcb_merge
from sparing.merge.routed import Routing, set_routing
from sparing.merge.search import Found, Space, search

if TYPE_CHECKING:
    from sparing.merge.routed_model import MadeItConfig, MadeItModel

__all__ = [
    "METHODS",
    "BankReport",
    "Found",
    "MadeIt",
    "MadeItConfig",
    "MadeItModel",
    "PCBWeights",
    "Routing",
    "Space",
    "continue_merge",
    "merge",
    "pcb_merge",
    "search",
    "set_routing",
]


def __getattr__(name: str) -> Any:
    # Merging should not wait for the import of transformers' models.
    if name in ("MadeItConfig", "MadeItModel"):
        from sparing.merge import routed_model

        return getattr(routed_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
