"""What a hyperparameter can do in training, by name."""

from typing import Literal

Regularizer = Literal[
    "dropout",
    "locked-dropout",
    "dropconnect",
    "embedding-dropout",
    "activation-penalty",
    "temporal-penalty",
    "weight-penalty",
]

# These act on all rows of a batch at once, so rows cannot have values of their own.
BATCH_LEVEL = ("dropconnect", "embedding-dropout", "activation-penalty", "temporal-penalty")
