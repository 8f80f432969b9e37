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
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from amlaunch.recipes.format.schema import Distributed
from amlaunch.trainer.models.base import blocks, initialize_parameters, parameter_count
from amlaunch.trainer.parallel.context_parallel import apply_context_parallel
from amlaunch.trainer.parallel.tensor_parallel import TensorParallelGroup, apply_tensor_parallel
from amlaunch.trainer.performance.activation_checkpointing import checkpoint_activations
from amlaunch.trainer.process.errors import LocalBadInput, TrainingFailed
from amlaunch.trainer.process.rank_environment import RankEnvironment, prefer_loopback

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
    def is_main(self) -> bool:
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

    @property
    def gradient_average_size(self) -> int:
        """Over how many ranks FSDP2 and DDP average gradients: all that have the same weights."""
        return self.size // self.tp_size

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place, on whatever device ``value`` is."""
        if self.size > 1:  # gloo takes a third of a millisecond to ask nobody
            dist.all_reduce(value)
        return value

    def any(self, mine: bool) -> bool:
        """Whether any rank says yes; goes over the CPU and so waits for no GPU work."""
        if self.size == 1:
            return mine
        flag = torch.tensor([int(mine)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, on all ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)


def join_world(section: Distributed, ranks: RankEnvironment) -> World:
    """The world of this process, its process group made unless there is one.

    It is never taken down: that can wait for peers that are gone, or for ever
    (see ``amlaunch.trainer.loop.job.KEPT``). The process ends through ``amlaunch.trainer.process.errors.leave``.
    """
    device = _device(ranks)
    timeout = timedelta(minutes=section.timeout_minutes)
    if not dist.is_initialized():
        _init_group(ranks, device, timeout)
    return World(ranks.rank, ranks.size, device, timeout, section.tp_size, section.cp_size)


def _device(ranks: RankEnvironment) -> torch.device:
    if os.environ.get("AMLAUNCH_DEVICE") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else ranks.local_rank  # Slurm's --gpus-per-task shows each rank its own GPU alone
    if index >= count:
        raise LocalBadInput(
            f"rank {ranks.rank} on {os.uname().nodename} is local rank {ranks.local_rank}, but sees {count} GPUs"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _init_group(ranks: RankEnvironment, device: torch.device, timeout: timedelta) -> None:
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


def parallelize(model: nn.Module, section: Distributed, world: World, seed: int) -> nn.Module:
    """The model on its device, float32 master weights (float64 where asked), spread as the recipe says.

    All ranks come with the same weights, or without any (on the meta device):
    then each makes those of its own part. Raises BadInput where the model cannot
    be spread so, TrainingFailed where sharding changed the number of parameters:
    then it untied weights that were tied.
    """
    dtype = compute_dtype(section, world.device)
    model.to(dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    before = parameter_count(model)
    if world.cp_size > 1:
        apply_context_parallel(model, _group_of(world, _cp_rows(world)))
    checkpoint_activations(model, section.activation_checkpointing)
    if is_sharded(section):
        mesh = _mesh(section, world)
        if world.tp_size > 1:
            apply_tensor_parallel(model, TensorParallelGroup(mesh["tp"], section.sequence_parallel))
        _fsdp2(model, section, mesh, dtype)
    _settle(model, section, world, seed)
    after = parameter_count(model)
    if after != before:
        raise TrainingFailed(f"sharding made {after:,} parameters of {before:,}: it untied tied weights")
    return _ddp(model, world) if section.strategy == "ddp" and not is_sharded(section) and world.size > 1 else model


def is_sharded(section: Distributed) -> bool:
    """Whether FSDP2 has the model: so it is with tensor parallelism, whose parameters are DTensors that only FSDP2 knows."""
    return section.strategy == "fsdp2" or section.tp_size > 1


def _settle(model: nn.Module, section: Distributed, world: World, seed: int) -> None:
    """Put the weights where they are used; those that do not exist yet are made."""
    device = torch.device("cpu") if section.cpu_offload else world.device
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
        torch.manual_seed(seed)
        initialize_parameters(model)
    elif not is_sharded(section):  # FSDP2 has done it, block by block
        model.to(device)


def _fsdp2(model: nn.Module, section: Distributed, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    half = dtype is torch.bfloat16
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=DTYPES[section.reduce_dtype])
        if half
        else MixedPrecisionPolicy()
    )
    names = mesh.mesh_dim_names or ()
    options: dict[str, Any] = {
        "mesh": mesh[tuple(name for name in names if name != "tp")] if "tp" in names else mesh,
        "mp_policy": policy,
    }
    if section.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=section.reshard_after_forward, **options)
    fully_shard(model, **options)


def _ddp(model: nn.Module, world: World) -> nn.Module:
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _mesh(section: Distributed, world: World) -> DeviceMesh:
    """Replicas of shards of parts, a dimension for each that there is more than one of; shards always.

    Context-parallel ranks are shards like data-parallel ones: they have the same
    weights, and their gradients are added. DDP with tensor parallelism is
    replicas that are not sharded. The groups are our own, for a mesh's have the
    default timeout.
    """
    same = world.dp_size * world.cp_size
    replicas = section.dp_replicate_size or (1 if section.strategy == "fsdp2" else same)
    sizes = {"dp_replicate": replicas, "dp_shard": same // replicas, "tp": world.tp_size}
    kept = {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}
    if len(kept) == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("dp_shard",))
    grid = torch.arange(world.size).view(*kept.values())
    groups = [_group_of(world, grid.movedim(i, -1).flatten(0, -2)) for i in range(grid.dim())]
    return DeviceMesh.from_group(groups, world.device.type, mesh=grid, mesh_dim_names=tuple(kept))


def _cp_rows(world: World) -> torch.Tensor:
    """The ranks that have the positions of one window, a row for each such group."""
    grid = torch.arange(world.size).view(world.dp_size, world.cp_size, world.tp_size)
    return grid.movedim(1, -1).flatten(0, 1)


def _group_of(world: World, rows: torch.Tensor) -> dist.ProcessGroup:
    """The group of the row that holds this rank; every rank makes every group, as torch demands."""
    groups = [dist.new_group(row, timeout=world.timeout) for row in rows.tolist()]
    mine = next(i for i, row in enumerate(rows.tolist()) if world.rank in row)
    return groups[mine]


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def dropout_rank(section: Distributed, world: World) -> int:
    """Ranks of one number draw the same dropout: what tensor-parallel ranks compute all alike must stay alike."""
    return world.rank if section.sequence_parallel else world.rank // world.tp_size


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
    if compute_dtype(section, world.device) is torch.bfloat16 and not is_sharded(section):
        return torch.autocast(world.device.type, dtype=torch.bfloat16)
    return nullcontext()
