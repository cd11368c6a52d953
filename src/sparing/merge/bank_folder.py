"""A bank of experts on disk: the folder that a continual merge writes.

```
config.json                    of `MadeItModel`: the base's config, and what experts there are
model.safetensors.index.json   of all shards
weights-*.safetensors          the layers' own weights, the base's; never written again
shared-*.safetensors           everything else, the base plus the running mean
experts-*.safetensors          the experts of all layers
state/means.safetensors        running means in float32, for the next arrival
bank.json                      tasks, members, affinities, thresholds
merge.json, README.md          the record, for programs and for people
```
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparing.errors import CheckpointError
from sparing.merge.layer_experts import LayerExpert, unstacked
from sparing.merge.ledger import LEDGER, Ledger
from sparing.merge.subspaces import Factors
from sparing.shards import Checkpoint

PREFIX = "base."  # what `MadeItModel` calls the model inside
MEANS = Path("state") / "means.safetensors"


def stored_name(module: str, part: str) -> str:
    """Name of a stacked tensor of a layer's experts in the files."""
    return f"{PREFIX}{module}.experts.{part}"


class BankFolder:
    """A bank on disk, opened for reading.

    Arguments:
        folder: that a continual merge wrote.

    Attributes:
        ledger: what it remembers.
        means: running means of tensors that no expert holds, by the base's names.

    Raises:
        CheckpointError: not a bank, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        require_bank(folder)
        self.folder = folder
        self.ledger = Ledger.load(folder)
        self.checkpoint = Checkpoint(folder)
        means = folder / MEANS
        self.means = Checkpoint(means) if means.is_file() else None

    def experts(self, module: str) -> list[LayerExpert]:
        """The experts of one layer."""
        ledger = self.ledger.modules[module]

        def read(part: str, start: int, stop: int) -> Tensor:
            return self.rows(module, part, start, stop)

        return unstacked(read, ledger.ranks, ledger.router_ranks, bias=ledger.bias)

    def rows(self, module: str, part: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a stacked tensor of a layer."""
        name = stored_name(module, part)
        width = self.checkpoint.tensors[name].shape[1]
        return self.checkpoint.read(name, start * width, stop * width).view(-1, width)

    def close(self) -> None:
        """Close its files."""
        self.checkpoint.close()
        if self.means is not None:
            self.means.close()


def require_bank(folder: Path) -> None:
    """Raise a `CheckpointError` unless a folder holds a bank."""
    if not (folder / LEDGER).is_file():
        raise CheckpointError(
            str(folder),
            expected=f"a bank of experts, with its {LEDGER}",
            found="no such file" if folder.is_dir() else "no such folder",
            mend="Begin one with --method made-it, or check the path.",
        )


class Scratch:
    """Experts that are not in the bank yet, one small file a layer.

    Arguments:
        folder: for the files; created.
        modules: names of the layers.
    """

    def __init__(self, folder: Path, modules: Sequence[str]) -> None:
        folder.mkdir()
        self._paths = {name: folder / f"{i}.safetensors" for i, name in enumerate(modules)}

    def put(self, module: str, expert: LayerExpert) -> None:
        """Keep the expert of a layer."""
        tensors = {
            "outputs": expert.factors.outputs.cpu(),
            "inputs": expert.factors.inputs.cpu(),
            "router_rank": torch.tensor(expert.factors.router_rank),
        }
        if expert.bias is not None:
            tensors["bias"] = expert.bias.cpu()
        save_file(tensors, self._paths[module])

    def get(self, module: str) -> LayerExpert:
        """The expert of a layer."""
        tensors = load_file(self._paths[module])
        factors = Factors(tensors["outputs"], tensors["inputs"], int(tensors["router_rank"]))
        return LayerExpert(factors, tensors.get("bias"))
