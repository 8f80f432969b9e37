"""Rank and world size of this process, read from environment variables. Uses only the standard library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from amlaunch.recipes.errors import BadInput

LOCALHOST = ("127.0.0.1", "localhost", "::1")
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class RankEnvironment:
    """The place of this process among ``size`` ranks; ``local_rank`` counts the ranks of its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def rank_of(env: Mapping[str, str]) -> int:
    """Return the rank for use in messages; 0 if it cannot be read."""
    text = env.get("RANK") or env.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


def read_rank_environment(env: Mapping[str, str]) -> RankEnvironment:
    """Read the variables of torchrun, or else those of srun; without either, the process is alone.

    Raises BadInput if there are several ranks and no MASTER_ADDR.
    """
    if "RANK" in env:
        names = TORCHRUN_VARIABLES
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        names = SLURM_VARIABLES
    else:
        return RankEnvironment()

    rank, size, local_rank = (_read_number(env, name) for name in names)
    if size > 1 and "MASTER_ADDR" not in env:
        raise BadInput(
            f"MASTER_ADDR is not set, but {names[1]} is {size}: export MASTER_ADDR=<host of rank 0>, "
            f"or unset {names[0]} to train on one rank"
        )
    return RankEnvironment(rank, size, local_rank)


def _read_number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "1" if name == "WORLD_SIZE" else "0")
    if not text.isdigit():
        raise BadInput(f"environment variable {name}: expected a non-negative integer, got {text!r}")
    return int(text)


def prefer_loopback(env: Mapping[str, str]) -> None:
    """Let the ranks of a single machine connect over the loopback interface.

    Otherwise gloo looks up the host name, which many machines cannot resolve.
    """
    if env.get("MASTER_ADDR", LOCALHOST[0]) in LOCALHOST:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
