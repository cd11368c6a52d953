"""Text to train and measure on: what ships in packages, and the user's own files."""

from sparing.data.blocks import Batch, Blocks, TextData, load_blocks, prepare, save_blocks
from sparing.data.corpora import CORPORA, Example, read_examples

__all__ = [
    "CORPORA",
    "Batch",
    "Blocks",
    "Example",
    "TextData",
    "load_blocks",
    "prepare",
    "read_examples",
    "save_blocks",
]
