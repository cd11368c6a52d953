"""For two processes: Muon++ with DDP and with weights sharded by FSDP2; and the same in one."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sparing.scale import MuonPlusPlus

STEPS, ROWS = 6, 8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 9, bias=False))


def optimizer_of(model: nn.Module, watched: nn.Module) -> MuonPlusPlus:
    """Every option that keeps a state, and a split matrix."""
    named = dict(watched.named_parameters())
    matrices = {"lr": 0.05, "radius": 2.0, "exact_update": True, "orthogonalizer": "ns5"}
    groups = [
        {"params": [named["0.weight"]], "reference": "init", "adaptive": True, **matrices},
        {"params": [named["2.weight"]], "split": [4, 5], **matrices},
        {"params": [named["0.bias"]], "algorithm": "adamw"},
    ]
    optimizer = MuonPlusPlus(groups)
    optimizer.watch(model, every=2)
    return optimizer


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 6, generator=generator), torch.randn(ROWS, 9, generator=generator)


def trained(model: nn.Module, optimizer: MuonPlusPlus, rows: slice) -> None:
    for step in range(STEPS):
        x, y = data(step)
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alone() -> dict[str, Tensor]:
    model = network()
    trained(model, optimizer_of(model, model), slice(None))
    return {name: value.detach() for name, value in model.named_parameters()}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)  # a fork has lost the parent's threads
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    plain = network()
    together = DistributedDataParallel(plain)
    trained(together, optimizer_of(together, plain), rows)
    sharded = network()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    trained(sharded, optimizer_of(sharded, sharded), rows)
    found = {
        way: {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).tolist()
            for name, value in model.named_parameters()
        }
        for way, model in (("ddp", plain), ("fsdp", sharded))
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
