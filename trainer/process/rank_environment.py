"""Who this process is among the ranks, from the environment. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from amlaunch.recipes.errors import BadInput

LOCALHOST = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class RankEnvironment:
    """One process of ``size``."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def rank_of(env: Mapping[str, str]) -> int:
    """The rank alone, never an error: for messages."""
    text = env.get("RANK") or env.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


def read_rank_environment(env: Mapping[str, str]) -> RankEnvironment:
    """As torchrun sets it (RANK, WORLD_SIZE, LOCAL_RANK), else as srun does; alone where neither did.

    Raises BadInput where several ranks have no MASTER_ADDR to meet at.
    """
    if "RANK" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return RankEnvironment()
    rank, size, local = (_number(env, name) for name in names)
    if size > 1 and "MASTER_ADDR" not in env:
        raise BadInput(
            f"{names[1]} says {size} ranks, but MASTER_ADDR does not say where they meet: "
            f"export MASTER_ADDR=<host of rank 0>, or unset {names[0]} to train on one rank"
        )
    return RankEnvironment(rank, size, local)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "1" if name == "WORLD_SIZE" else "0")
    if not text.isdigit():
        raise BadInput(f"the environment variable {name} is {text!r}; a number was expected")
    return int(text)


def prefer_loopback(env: Mapping[str, str]) -> None:
    """Ranks of one machine meet on its own interface: gloo would look up the host's name, which many cannot resolve."""
    if env.get("MASTER_ADDR", LOCALHOST[0]) in LOCALHOST:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
