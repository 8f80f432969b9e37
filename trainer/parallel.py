"""The ranks: who they are, how the model is spread over them, and the few things they must agree on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from recipes.schema import Distributed
from trainer.errors import LocalBadInput, TrainingFailed
from trainer.models import blocks, parameter_count
from trainer.ranks import Ranks, prefer_loopback

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class World:
    """This rank, its device, and the process group of all ranks.

    Ranks are numbered with tensor parallelism innermost, then context
    parallelism, then data parallelism: neighbours talk most.
    """

    rank: int
    size: int
    device: torch.device
    timeout: timedelta
    tp_size: int = 1
    cp_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Into how many parts a global batch is dealt out."""
        return self.size // (self.tp_size * self.cp_size)

    @property
    def dp_rank(self) -> int:
        """Which of these parts is this rank's; TP and CP peers have the same."""
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def cp_rank(self) -> int:
        """Which part of the positions is this rank's."""
        return self.rank // self.tp_size % self.cp_size

    @property
    def tp_rank(self) -> int:
        """Which part of the heads, and of whatever else is split, is this rank's."""
        return self.rank % self.tp_size

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place, on whatever device ``value`` is."""
        dist.all_reduce(value)
        return value

    def any(self, mine: bool) -> bool:
        """Whether any rank says yes; goes over the CPU and so waits for no GPU work."""
        flag = torch.tensor([int(mine)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def from_main(self, value: Any) -> Any:
        """Rank 0's ``value``, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's ``value``, on all ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)


def join(section: Distributed, ranks: Ranks) -> World:
    """The world of this process, its process group made.

    It is never taken down: that can wait for peers that are gone, or for ever
    (see ``trainer.job.KEPT``). The process ends through ``trainer.errors.leave``.
    """
    device = _device(ranks)
    timeout = timedelta(minutes=section.timeout_minutes)
    _init_group(ranks, device, timeout)
    return World(ranks.rank, ranks.size, device, timeout, section.tp_size, section.cp_size)


def _device(ranks: Ranks) -> torch.device:
    if os.environ.get("AMLAUNCH_DEVICE") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise LocalBadInput(
            f"rank {ranks.rank} on {os.uname().nodename} is local rank {ranks.local_rank}, but sees {torch.cuda.device_count()} GPUs"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


def _init_group(ranks: Ranks, device: torch.device, timeout: timedelta) -> None:
    """Gloo for the CPU on every machine: what the ranks agree on must not wait for the GPU's queue."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that NCCL's flight recorder remembers
    prefer_loopback(os.environ)
    if ranks.size == 1:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
        return
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.size, timeout=timeout)


def dump_flight_record(path: Path) -> None:
    """What NCCL's collectives were doing, for ``torch.distributed.flight_recorder``'s analyser; nothing without NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)  # of builds with NCCL
    if dump is not None and torch.cuda.is_available() and dist.is_initialized():
        path.write_bytes(dump())
        print(f"NCCL's flight record is in {path}", file=sys.stderr, flush=True)


def compute_dtype(section: Distributed, device: torch.device) -> torch.dtype:
    """The type that the model computes in."""
    if section.dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[section.dtype]


def spread(model: nn.Module, section: Distributed, world: World) -> nn.Module:
    """The model on its device, float32 master weights (float64 where asked), spread as the recipe says.

    All ranks come with the same weights. Raises TrainingFailed where sharding
    changed the number of parameters: then it untied weights that were tied.
    """
    dtype = compute_dtype(section, world.device)
    model.to(device=world.device, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    before = parameter_count(model)
    spread_out = STRATEGIES[section.strategy](model, section, world, dtype)
    if parameter_count(spread_out) != before:
        raise TrainingFailed(f"sharding made {parameter_count(spread_out):,} parameters of {before:,}: it untied tied weights")
    return spread_out


def _fsdp2(model: nn.Module, section: Distributed, world: World, dtype: torch.dtype) -> nn.Module:
    half = dtype is torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    mesh = _mesh(section.dp_replicate_size or 1, world)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=section.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _ddp(model: nn.Module, section: Distributed, world: World, dtype: torch.dtype) -> nn.Module:
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _alone(model: nn.Module, section: Distributed, world: World, dtype: torch.dtype) -> nn.Module:
    return model


STRATEGIES = {"fsdp2": _fsdp2, "ddp": _ddp, "none": _alone}


def _mesh(replicas: int, world: World) -> DeviceMesh:
    """All ranks in one dimension, or replicas of shards; groups of our own, for a mesh's have the default timeout."""
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("dp_shard",))
    grid = torch.arange(world.size).view(replicas, -1)
    across = _group_of(world, grid.t())
    within = _group_of(world, grid)
    return DeviceMesh.from_group(
        [across, within], world.device.type, mesh=grid, mesh_dim_names=("dp_replicate", "dp_shard")
    )


def _group_of(world: World, rows: torch.Tensor) -> dist.ProcessGroup:
    """The group of the row that holds this rank; every rank makes every group, as torch demands."""
    groups = [dist.new_group(row, timeout=world.timeout) for row in rows.tolist()]
    mine = next(i for i, row in enumerate(rows.tolist()) if world.rank in row)
    return groups[mine]


def plain(model: nn.Module) -> nn.Module:
    """The model itself, out of DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def micro_step(model: nn.Module, last: bool) -> Iterator[None]:
    """Forward and backward of one micro-batch; gradients are reduced over the ranks in the last one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def autocast(section: Distributed, world: World) -> AbstractContextManager[Any]:
    """bfloat16 compute for DDP and a single rank; FSDP2 has its own policy."""
    if compute_dtype(section, world.device) is torch.bfloat16 and section.strategy != "fsdp2":
        return torch.autocast(world.device.type, dtype=torch.bfloat16)
    return nullcontext()
