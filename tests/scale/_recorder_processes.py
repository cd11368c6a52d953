"""One process of a run that is recorded: alone, under DDP, or sharded by FSDP2."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparing.scale.fast_hp_transfer import EmaSchedule, TrajectoryRecorder


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def record_in_process(rank: int, kinds: tuple[str, ...], port: int, folder: Path) -> None:
    """Train in each way, and save what was recorded."""
    torch.set_num_threads(1)
    alone = kinds == ("alone",)
    if not alone:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=2)
    for kind in kinds:
        record(rank, 1 if alone else 2, kind, folder)
    if not alone:
        dist.destroy_process_group()


def record(rank: int, world: int, kind: str, folder: Path) -> None:
    """Ten steps on rows that are dealt to the processes."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=draw)
    y = x[:, :3].argmax(1)
    mine = slice(rank, None, world)
    recorder = TrajectoryRecorder(
        model, [(x[mine], y[mine])], loss, width=16, ema=EmaSchedule.constant(0.8, 3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        rows = torch.randint(64, (16,), generator=draw)[mine]
        optimizer.zero_grad()
        loss(model, (x[rows], y[rows])).backward()
        optimizer.step()
        recorder.step()
    recorder.finish().save(folder / f"{kind}-{rank}.safetensors")
