"""Merge many fine-tuned models into one, in the memory of a few tensors."""

from sparing.merge.merging import METHODS, merge
from sparing.merge.pcb_merging import PCBWeights, pcb_merge
from sparing.merge.search import Found, Space, search

__all__ = ["METHODS", "Found", "PCBWeights", "Space", "merge", "pcb_merge", "search"]
