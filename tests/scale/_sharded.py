"""For two processes: singular values of sharded weights, and what they exchanged."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparing.scale.singular import largest_singular_values

CASES = {
    "plain": ((40, 30), {}),
    "uneven": ((41, 30), {}),
    "transposed": ((30, 40), {"transposed": True}),
    "fused": ((30, 39), {"transposed": True, "blocks": 3}),
    "fused rows": ((36, 20), {"blocks": 3}),
    "experts": ((4, 24, 16), {}),
    "fused experts": ((4, 24, 16), {"blocks": 2}),
}


class Exchanged(TorchDispatchMode):
    """The largest tensor that went over the wire."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("_c10d_functional", "c10d") and isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def weight(name: str) -> torch.Tensor:
    return torch.randn(CASES[name][0], generator=torch.Generator().manual_seed(1))


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)  # a fork has lost the parent's threads
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, (_, options) in CASES.items():
        sharded = distribute_tensor(weight(name), mesh, [Shard(0)])
        with Exchanged() as wire:
            values = largest_singular_values(sharded, **options).values
        found[name] = {"values": values.tolist(), "exchanged": wire.largest}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
