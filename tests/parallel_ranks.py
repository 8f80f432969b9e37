"""A group of ranks that runs many tasks in one start: training runs, collectives, sharded models.

Each rank is a process with one process group for all tasks. The results of each rank are saved for the tests to read.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_runs import FORKS, Run, environment


@dataclass(frozen=True)
class Task:
    """A call ``do(*args)`` of a module's function in every rank of a group."""

    name: str
    do: Callable[..., Any]
    args: tuple[Any, ...] = ()


def in_ranks(size: int, folder: Path, tasks: list[Task], timeout: float = 500.0) -> dict[str, list[Any]]:
    """Run the tasks and return each task's results by rank; an exception's text if it raised one."""
    folder.mkdir(parents=True)
    shared = environment(size)
    processes = [
        FORKS.Process(
            target=_run_tasks, args=({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, folder, tasks), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    output = "".join((folder / f"rank{rank}.log").read_text() for rank in range(size))
    for process in processes:
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * size, output[-5000:]
    results = [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(size)]
    return {task.name: [of_rank[task.name] for of_rank in results] for task in tasks}


def _run_tasks(env: dict[str, str], folder: Path, tasks: list[Task]) -> None:
    log = os.open(folder / f"rank{env['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ.update(env)
    import torch
    import torch.distributed as dist

    from amlaunch.recipes.format.schema import Distributed
    from amlaunch.trainer.parallel.world import join_world
    from amlaunch.trainer.process.errors import exit_process
    from amlaunch.trainer.process.rank_environment import read_rank_environment

    torch.set_num_threads(1)
    join_world(Distributed(timeout_minutes=8), read_rank_environment(os.environ))
    results: dict[str, Any] = {}
    for task in tasks:
        print(f"--- {task.name}", flush=True)
        try:
            results[task.name] = task.do(*task.args)
        except Exception as error:
            traceback.print_exc()
            results[task.name] = f"{type(error).__name__}: {error}"
    (folder / f"rank{env['RANK']}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()  # the first rank hosts the store that the others may still use
    sys.stdout.flush()
    exit_process(0)


def train(run: Run, *overrides: str) -> int:
    """Train on the ranks of this group and return the exit code."""
    from amlaunch.trainer.loop.job import run as train_here
    from amlaunch.trainer.process.arguments import parse
    from amlaunch.trainer.process.errors import run_guarded
    from amlaunch.trainer.process.stop_request import StopFlag

    stop = StopFlag()
    return run_guarded(
        lambda: train_here(parse("amlaunch.trainer", "", [*run.arguments("amlaunch.trainer")[4:], *overrides]), stop)
    )
