"""The ranks of a run: their process group, their agreements, and the sharding of the model over them."""

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
from amlaunch.recipes.output import counted
from amlaunch.trainer.models.base import blocks, initialize_parameters, parameter_count
from amlaunch.trainer.parallel.context_parallel import apply_context_parallel
from amlaunch.trainer.parallel.tensor_parallel import TensorParallelGroup, apply_tensor_parallel
from amlaunch.trainer.performance.activation_checkpointing import checkpoint_activations
from amlaunch.trainer.process.errors import LocalBadInput, LocalTrainingFailed, TrainingFailed
from amlaunch.trainer.process.rank_environment import RankEnvironment, prefer_loopback
from amlaunch.trainer.torch_features import sum_gradients_on_cpu

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class World:
    """This rank, its device, and the process group of all ranks.

    Tensor parallelism is innermost in the numbering of ranks, then context parallelism, then data parallelism:
    neighbours communicate most.
    """

    rank: int
    size: int
    device: torch.device
    timeout: timedelta
    tp_size: int = 1
    cp_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes for all ranks."""
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks, which share a global batch."""
        return self.size // (self.tp_size * self.cp_size)

    @property
    def dp_rank(self) -> int:
        """Index among the data-parallel ranks; TP and CP peers have the same one."""
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def cp_rank(self) -> int:
        """Index among the ranks that share the positions of a window."""
        return self.rank // self.tp_size % self.cp_size

    @property
    def tp_rank(self) -> int:
        """Index among the ranks that share the model's matrices."""
        return self.rank % self.tp_size

    @property
    def gradient_average_size(self) -> int:
        """Number of ranks over which FSDP2 and DDP average gradients: all with the same weights."""
        return self.size // self.tp_size

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum ``value`` over all ranks in place, on its device."""
        # Gloo takes a third of a millisecond even for a single rank.
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, condition: bool) -> bool:
        """Return True if ``condition`` is true on any rank; runs on the CPU and so does not wait for GPU work."""
        if self.size == 1:
            return condition
        flag = torch.tensor([int(condition)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` on all ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)


def join_world(section: Distributed, ranks: RankEnvironment) -> World:
    """Return the world of this process; create the process group if there is none.

    The group is never destroyed, because that can wait forever: the process ends through
    :func:`amlaunch.trainer.process.errors.exit_process` instead.
    """
    device = _device(ranks)
    timeout = timedelta(minutes=section.timeout_minutes)
    if not dist.is_initialized():
        _init_group(ranks, device, timeout)
    return World(ranks.rank, ranks.size, device, timeout, section.tp_size, section.cp_size)


def _device(ranks: RankEnvironment) -> torch.device:
    """Return the device of this rank: the one that ``AMLAUNCH_DEVICE`` requires, else a GPU if torch can use one.

    Raises LocalTrainingFailed if a GPU is required and torch cannot use one, which costs GPU hours on the CPU.
    """
    required = os.environ.get("AMLAUNCH_DEVICE")
    if required == "cuda" and not torch.cuda.is_available():
        raise LocalTrainingFailed(
            f"rank {ranks.rank} on {os.uname().nodename} has a GPU, but torch cannot use it: {_cuda_problem()}"
        )
    if required == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Slurm's --gpus-per-task shows each rank only its own GPU.
    index = 0 if count == 1 else ranks.local_rank
    if index >= count:
        raise LocalBadInput(
            f"rank {ranks.rank} on {os.uname().nodename} is local rank {ranks.local_rank}, but sees "
            f"{counted(count, 'GPU')}. Start at most one rank per GPU"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _cuda_problem() -> str:
    """Return torch's own reason why there is no CUDA, with what hides GPUs from this process."""
    if torch.version.cuda is None and torch.version.hip is None:
        remedy = "use a torch or an image with CUDA, or train on the CPU: --gpus 0"
        return f"torch {torch.__version__} is built for the CPU only; {remedy}"
    reason = "it sees no CUDA device"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return reason if visible is None else f"{reason} (CUDA_VISIBLE_DEVICES={visible!r})"


def _init_group(ranks: RankEnvironment, device: torch.device, timeout: timedelta) -> None:
    """Create the process group, with gloo for the CPU: agreements between ranks must not wait for the GPU's queue."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Collectives in NCCL's flight recorder.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    prefer_loopback(os.environ)
    if ranks.size == 1:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
        return
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.size, timeout=timeout)


def dump_flight_record(path: Path) -> None:
    """Write NCCL's flight record for the analyser of ``torch.distributed.flight_recorder``, if there is NCCL."""
    # Only in builds with NCCL.
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None and torch.cuda.is_available() and dist.is_initialized():
        path.write_bytes(dump())
        print(f"NCCL flight record: {path}", file=sys.stderr, flush=True)


def compute_dtype(section: Distributed, device: torch.device) -> torch.dtype:
    """Return the dtype of the model's computation."""
    if section.dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[section.dtype]


def parallelize(model: nn.Module, section: Distributed, world: World, seed: int) -> nn.Module:
    """Move the model to its device with float32 master weights (float64 if requested) and shard it as configured.

    All ranks pass the same weights, or none (on the meta device); then each rank initialises its own shards. Raises
    BadInput if the model does not support the parallelism, and TrainingFailed if sharding changed the number of
    parameters, that is, separated tied weights.
    """
    dtype = compute_dtype(section, world.device)
    model.to(dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    before = parameter_count(model)
    if world.cp_size > 1:
        apply_context_parallel(model, _own_group(world, _context_parallel_ranks(world)))
    checkpoint_activations(model, section.activation_checkpointing)
    if is_sharded(section):
        mesh = _mesh(section, world)
        if world.tp_size > 1:
            apply_tensor_parallel(model, TensorParallelGroup(mesh["tp"], section.sequence_parallel))
        _apply_fsdp2(model, section, mesh, dtype)
    _materialize(model, section, world, seed)
    after = parameter_count(model)
    if after != before:
        raise TrainingFailed(f"sharding separated tied weights: {before:,} parameters became {after:,}")
    if section.strategy == "ddp" and not is_sharded(section) and world.size > 1:
        return _wrap_in_ddp(model, world)
    return model


def is_sharded(section: Distributed) -> bool:
    """Return True if FSDP2 wraps the model; with tensor parallelism it must, because DDP does not support DTensors."""
    return section.strategy == "fsdp2" or section.tp_size > 1


def _materialize(model: nn.Module, section: Distributed, world: World, seed: int) -> None:
    """Move the weights to their device; initialise those on the meta device."""
    device = torch.device("cpu") if section.cpu_offload else world.device
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
        torch.manual_seed(seed)
        initialize_parameters(model)
    elif not is_sharded(section):
        # FSDP2 moves the weights itself, block by block.
        model.to(device)


def _apply_fsdp2(model: nn.Module, section: Distributed, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    policy = MixedPrecisionPolicy()
    if dtype is torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=DTYPES[section.reduce_dtype])
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        mesh = mesh[tuple(name for name in names if name != "tp")]
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    if section.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=section.reshard_after_forward, **options)
    fully_shard(model, **options)
    if mesh.device_type == "cpu":
        sum_gradients_on_cpu(model)


def _wrap_in_ddp(model: nn.Module, world: World) -> nn.Module:
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _mesh(section: Distributed, world: World) -> DeviceMesh:
    """Build the mesh (replicas, shards, tensor parallelism), without dimensions of size 1 other than the shards.

    Context-parallel ranks are shards like data-parallel ones: they have the same weights, and their gradients are
    added. DDP with tensor parallelism has replicas without shards. We create the groups ourselves, because those of a
    mesh have the default timeout.
    """
    weight_peers = world.dp_size * world.cp_size
    replicas = section.dp_replicate_size or (1 if section.strategy == "fsdp2" else weight_peers)
    sizes = {"dp_replicate": replicas, "dp_shard": weight_peers // replicas, "tp": world.tp_size}
    dims = {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}
    if len(dims) == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("dp_shard",))
    grid = torch.arange(world.size).view(*dims.values())
    groups = [_own_group(world, grid.movedim(i, -1).flatten(0, -2)) for i in range(grid.dim())]
    return DeviceMesh.from_group(groups, world.device.type, mesh=grid, mesh_dim_names=tuple(dims))


def _context_parallel_ranks(world: World) -> torch.Tensor:
    """Return a row of ranks for each group that shares the positions of a window."""
    grid = torch.arange(world.size).view(world.dp_size, world.cp_size, world.tp_size)
    return grid.movedim(1, -1).flatten(0, 1)


def _own_group(world: World, rows: torch.Tensor) -> dist.ProcessGroup:
    """Create a group for each row of ranks, as torch requires on every rank, and return the group of this rank."""
    groups = [dist.new_group(row, timeout=world.timeout) for row in rows.tolist()]
    index = next(i for i, row in enumerate(rows.tolist()) if world.rank in row)
    return groups[index]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model without DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def dropout_rank(section: Distributed, world: World) -> int:
    """Return the number that seeds dropout: tensor-parallel ranks that compute the same values share it."""
    return world.rank if section.sequence_parallel else world.rank // world.tp_size


@contextmanager
def micro_step(model: nn.Module, last: bool) -> Iterator[None]:
    """Wrap forward and backward of one micro-batch; only the ``last`` one reduces gradients over the ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def autocast(section: Distributed, world: World) -> AbstractContextManager[Any]:
    """Return the context for bfloat16 compute under DDP and on a single rank; FSDP2 has its own policy."""
    if compute_dtype(section, world.device) is torch.bfloat16 and not is_sharded(section):
        return torch.autocast(world.device.type, dtype=torch.bfloat16)
    return nullcontext()
