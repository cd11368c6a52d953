"""Models in memory, for small ones and for searches."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparing.errors import ConfigError
from sparing.merge.view import Block, View


class InMemory:
    """State dicts of a base and its experts.

    Arithmetic is in float64. Tensors that share memory in the base are one; whole numbers stay
    the base's.

    Arguments:
        base: tensors by name.
        experts: with the same names and shapes.
        block_size: most numbers in a block; None takes whole tensors.

    Attributes:
        view: of the task vectors.

    Raises:
        ConfigError: names, shapes or values do not fit.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        experts: Sequence[Mapping[str, Tensor]],
        block_size: int | None = None,
    ) -> None:
        self._base = base
        self._experts = experts
        self._check()
        owners: dict[tuple[int, torch.Size], str] = {}
        self._owner = {
            name: owners.setdefault((tensor.data_ptr(), tensor.shape), name)
            if tensor.numel()
            else name
            for name, tensor in base.items()
            if tensor.is_floating_point()
        }
        sizes = {name: base[name].numel() for name in dict.fromkeys(self._owner.values())}
        largest = max(sizes.values(), default=1)
        self.view = View(sizes, len(experts), self._read, block_size=block_size or max(largest, 1))

    def _check(self) -> None:
        if not self._experts:
            raise ConfigError(
                "experts", expected="at least one", found="none", mend="Name the models to merge."
            )
        for number, expert in enumerate(self._experts):
            for name in (*self._base, *expert):
                shapes = [tuple(m[name].shape) if name in m else None for m in (self._base, expert)]
                if shapes[0] != shapes[1]:
                    raise ConfigError(
                        f"tensor {name!r} of expert {number}",
                        expected=f"shape {shapes[0]}" if shapes[0] else "no such tensor",
                        found=f"shape {shapes[1]}" if shapes[1] else "none",
                        mend="Experts must be fine-tunes of the base.",
                    )
                if not torch.isfinite(expert[name]).all():
                    raise ConfigError(
                        f"tensor {name!r} of expert {number}",
                        expected="finite numbers",
                        found="NaN or infinity",
                        mend="Leave that expert out, or train it again.",
                    )

    def _read(self, block: Block) -> tuple[Tensor, list[Tensor]]:
        here = slice(block.start, block.stop)
        base = self._base[block.tensor].detach().reshape(-1)[here].double()
        deltas = [e[block.tensor].detach().reshape(-1)[here].double() - base for e in self._experts]
        return base, deltas

    def keep_base(self) -> None:
        """Copy the base and let go of the experts, so that a model whose state dict was given can
        be changed; the view cannot be read any more."""
        self._base = {name: tensor.detach().clone() for name, tensor in self._base.items()}
        self._experts = ()

    def with_update(self, update: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The base plus a flat float64 task vector for every tensor, in the base's types."""
        merged: dict[str, Tensor] = {}
        for name, tensor in self._base.items():
            owner = self._owner.get(name)
            if owner is None:
                merged[name] = tensor.detach().clone()
            elif owner in merged:
                merged[name] = merged[owner]
            else:
                flat = tensor.detach().reshape(-1).double() + update(owner)
                merged[name] = flat.to(tensor.dtype).view(tensor.shape)
        return merged
