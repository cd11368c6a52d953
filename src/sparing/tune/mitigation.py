"""Mitigations to combine with a mask: noise in captions.

The other one of the paper's comparisons, leaving out images with a large norm, is an option of
`FineTuning`.
"""

import string
from collections.abc import Sequence
from typing import Literal

import torch

from sparing.errors import ConfigError

Noise = Literal["word", "number", "repeat"]


def noisy_caption(
    caption: str,
    kind: Noise = "word",
    *,
    generator: torch.Generator,
    times: int = 1,
    words: Sequence[str] = (),
) -> str:
    """A caption that is new in every epoch, so that it cannot become the key to one image (RWA).

    Arguments:
        caption: the words.
        kind: "word" inserts a random word, "number" a random number below 1,000,000, and "repeat"
            a word of the caption again, each at a random place (Somepalli et al. 2023).
        generator: of the choices.
        times: how many.
        words: to insert; by default five random letters make one.

    Raises:
        ConfigError: an unknown kind, or a caption without words to repeat.
    """
    if kind not in ("word", "number", "repeat") or (kind == "repeat" and not caption.split()):
        raise ConfigError(
            "kind",
            expected="'word', 'number', or 'repeat' of a caption with words",
            found=f"{kind!r} of {caption!r}",
            mend="Choose another kind.",
        )
    found = caption.split()

    def below(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    for _ in range(times):
        if kind == "number":
            fresh = str(below(1_000_000))
        elif kind == "repeat":
            fresh = found[below(len(found))]
        elif words:
            fresh = words[below(len(words))]
        else:
            fresh = "".join(string.ascii_lowercase[below(26)] for _ in range(5))
        found.insert(below(len(found) + 1), fresh)
    return " ".join(found)
