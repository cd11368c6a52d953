"""The memory of Queryable LoRA: update atoms and their keys, stored once for all layers."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparing.tuners import generator_for

if TYPE_CHECKING:
    from sparing.adapt.queryable_lora import QueryableLoRAConfig


class Atoms(nn.Module):
    """M atoms C_m, their keys k_m and, for an instruction prior, prior keys κ_m (eq. 2 and 7).

    Each tensor has G groups: one for the whole model, or one a block without `shared_memory`.
    Frozen atoms of earlier tasks come first and are buffers: saved, never trained.

    Arguments:
        config: of the adapter.
        groups: G.
        described: width of the embedded descriptions that stand for κ_m, or 0 if it is learned.

    Attributes:
        values: (G, M, r, r) float32, or `left` U_m and `right` V_m, each (G, M, r, atom_rank).
        keys: (G, M, d_q) float32.
        prior_keys: (G, M, d_q) float32, only with an instruction prior.
        descriptions: (M, d_e) float32, only for described atoms.
    """

    descriptions: Tensor | None

    def __init__(self, config: "QueryableLoRAConfig", groups: int, described: int = 0) -> None:
        super().__init__()
        self.seed, self.groups = config.seed, groups
        self.residual = config.residual
        r, d_q = config.r, config.d_query
        self.shapes: dict[str, tuple[int, ...]] = {"keys": (d_q,)}
        if config.atom_rank is None:
            self.shapes["values"] = (r, r)
        else:
            self.shapes |= {"left": (r, config.atom_rank), "right": (r, config.atom_rank)}
        if config.has_prior and not described:
            self.shapes["prior_keys"] = (d_q,)
        self.num_frozen = 0
        if config.frozen_atoms:
            for name in self.shapes:
                self._freeze(name, self._drawn(name, config.frozen_atoms))
            self.num_frozen = config.frozen_atoms
        for name in self.shapes:
            new = config.num_atoms - config.frozen_atoms
            self.register_parameter(name, nn.Parameter(self._drawn(name, new)))
        shape = (config.num_atoms, described)
        self.register_buffer("descriptions", torch.zeros(shape) if described else None)

    def every(self, name: str) -> Tensor:
        """Frozen and new entries together: (G, M, ...)."""
        new = self.get_parameter(name)
        return torch.cat([self.get_buffer(f"frozen_{name}"), new], 1) if self.num_frozen else new

    def dense(self) -> Tensor:
        """The atoms as matrices: (G, M, r, r) float32."""
        if "values" in self.shapes:
            return self.every("values")
        return self.every("left") @ self.every("right").mT

    def table(self) -> Tensor:
        """The atoms as rows to be mixed: (G, M, r·r) float32.

        Rows are transposed, so that states are multiplied from the left. As weights sum to one,
        adding the identity to every atom adds it to every mixture (eq. 10).
        """
        atoms = self.dense().mT
        if self.residual:
            atoms = atoms + torch.eye(atoms.shape[-1], device=atoms.device)
        return atoms.flatten(2)

    def extend(self, count: int) -> None:
        """Freeze all atoms and append `count` new ones, which alone stay trainable.

        New atoms are drawn with the seed, so extending twice never repeats one.
        """
        old = {name: self.every(name).detach().clone() for name in self.shapes}
        self.num_frozen = old["keys"].shape[1]
        for name, entries in old.items():
            self._freeze(name, entries)
            new = self._drawn(name, count).to(entries)
            self.register_parameter(name, nn.Parameter(new))
        if self.descriptions is not None:
            blank = self.descriptions.new_zeros(count, self.descriptions.shape[1])
            self.register_buffer("descriptions", torch.cat([self.descriptions, blank]))

    def _freeze(self, name: str, entries: Tensor) -> None:
        self.register_buffer(f"frozen_{name}", entries)

    def _drawn(self, name: str, count: int) -> Tensor:
        """Keys ~ N(0, 1); entries of C_m have variance 0.25 / r, also as products."""
        shape = (self.groups, count, *self.shapes[name])
        generator = generator_for(self.seed, f"atoms {self.num_frozen} {name}")
        drawn = torch.randn(shape, generator=generator, device="cpu")
        if name in ("keys", "prior_keys"):
            return drawn
        variance = 0.25 / shape[-2]
        if name != "values":
            variance = (variance / shape[-1]) ** 0.5
        return drawn * variance**0.5
