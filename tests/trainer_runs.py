"""Real training runs for tests: tiny shards, a tiny recipe, and ranks as processes.

Ranks are forked from a server that has already loaded torch, which saves seconds each. They are separate processes, so
tests can kill them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from amlaunch.preprocess.shards.shard_format import write_shard
from amlaunch.recipes.files import read_json_lines

VOCAB = 97
SEQ_LEN = 16
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "amlaunch.trainer.loop.job",
        "amlaunch.trainer.loop.training_loop",
        "amlaunch.trainer.__main__",
        "amlaunch.trainer.models.gpt2",
        "torch._dynamo",
        "numpy.ma",
    ]
)
MODEL = {
    "_target_": "amlaunch.trainer.models.gpt2.build_gpt2_model",
    "vocab_size": VOCAB,
    "n_positions": SEQ_LEN,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_tokens(path: Path, count: int, seed: int = 0) -> None:
    """Write a shard of ``count`` tokens with a pattern that a model can learn."""
    rng = np.random.default_rng(seed)
    tokens = (np.cumsum(rng.integers(1, 4, count)) % VOCAB).astype("<u2")
    write_shard(path, [tokens], np.dtype("<u2"))


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """Return a recipe over two shards and a validation shard in ``folder``, with ``sections`` merged in."""
    for name, count in (("a", 2001), ("b", 1500), ("val", 700)):
        if not (folder / f"{name}.bin").exists():
            write_tokens(folder / f"{name}.bin", count, seed=ord(name[0]))
    shards = [str(folder / "a.bin"), str(folder / "b.bin")]
    tree: dict[str, Any] = {
        "model": dict(MODEL),
        "dataset": {"file_pattern": shards, "seq_len": SEQ_LEN, "shuffle_files": True},
        "validation_dataset": {"file_pattern": str(folder / "val.bin"), "seq_len": SEQ_LEN},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.1},
        "lr_scheduler": {"lr_warmup_steps": 4, "min_lr": 1e-3},
        "step_scheduler": {
            "global_batch_size": 8,
            "local_batch_size": 2,
            "max_steps": 20,
            "ckpt_every_steps": None,
            "val_every_steps": 10,
            "val_batches": 3,
        },
        "distributed": {"strategy": "fsdp2", "dtype": "float64"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


def run_rank(argv: list[str], env: dict[str, str], folder: str, log: str, prepare: Callable[[], None] | None) -> None:
    """Run ``python -m amlaunch.trainer`` with ``argv`` in a forked rank, with its output in ``log``."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(handle, number)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(env)
    os.chdir(folder)
    from amlaunch.trainer.__main__ import main
    from amlaunch.trainer.process.errors import exit_process

    if prepare is not None:
        prepare()
    exit_process(main(argv))


FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def killed_at(number: int | None, step: int, record: str = "") -> None:
    """Kill this process at file operation ``number`` of the save of ``step``; None lists them in ``record``."""
    out = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if record else -1
    count = 0
    saving = False

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, saving
        if event not in FILE_EVENTS or "/checkpoints/" not in str(arguments[0]):
            return
        saving = saving or (event == "os.mkdir" and str(arguments[0]).endswith(f"{step:08d}.tmp"))
        if saving:
            if number is None:
                os.write(out, f"{event} {Path(str(arguments[0])).name}\n".encode())
            elif count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(look)


class Rank:
    """A forked rank with the interface of ``subprocess.Popen``."""

    def __init__(
        self, argv: list[str], env: dict[str, str], folder: Path, log: Path, prepare: Callable[[], None] | None
    ):
        self.log = log
        log.touch()
        self._process = FORKS.Process(target=run_rank, args=(argv, env, str(folder), str(log), prepare), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As in ``Popen``."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As in ``Popen``."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """As in ``Popen``."""
        os.kill(self._process.pid, number)

    def wait(self, timeout: float) -> str:
        """Wait for the process and return its output."""
        self._process.join(timeout)
        assert self.poll() is not None, f"still running after {timeout} s: {self.log.read_text()}"
        return self.log.read_text()


@dataclass
class Run:
    """A training run in a folder, started any number of times."""

    folder: Path
    tree: dict[str, Any]
    processes: list[Rank] = field(default_factory=list)
    starts: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.tree))

    def arguments(self, module: str, *more: str) -> list[str]:
        """Return the command line of one rank."""
        folders = ["--element", str(self.folder), "--checkpoints", str(self.checkpoints)]
        return [sys.executable, "-u", "-m", module, str(self.folder / "recipe.yaml"), *folders, *more]

    def start(self, ranks: int = 1, *overrides: str, prepare: dict[int, Callable[[], None]] | None = None) -> None:
        """Start ``ranks`` processes, as torchrun would; each calls its ``prepare[rank]`` first."""
        shared = environment(ranks)
        argv = self.arguments("amlaunch.trainer", *overrides)[4:]
        self.starts += 1
        self.processes = [
            Rank(
                argv,
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                self.folder,
                self.folder / f"start{self.starts}.rank{rank}.log",
                (prepare or {}).get(rank),
            )
            for rank in range(ranks)
        ]

    def wait(self, timeout: float = 120.0) -> tuple[list[int], str]:
        """Return the exit codes and the output of all ranks; no rank survives."""
        try:
            outputs = [process.wait(timeout) for process in self.processes]
        finally:
            self.signal(signal.SIGKILL)
        return [process.returncode or 0 for process in self.processes], "".join(outputs)

    def train(self, ranks: int = 1, *overrides: str) -> str:
        """Train to the end and return the output; an exit code other than 0 fails the test."""
        self.start(ranks, *overrides)
        codes, output = self.wait()
        assert codes == [0] * ranks, output
        return output

    def train_inline(self, *overrides: str) -> int:
        """Train on one rank in this process, which is faster, and return the exit code."""
        import torch
        import torch.distributed as dist

        from amlaunch.trainer.loop.job import run
        from amlaunch.trainer.process.arguments import parse
        from amlaunch.trainer.process.errors import run_guarded
        from amlaunch.trainer.process.stop_request import StopFlag

        torch.set_num_threads(1)  # as in the processes, for bitwise equality
        stop = StopFlag()
        try:
            return run_guarded(
                lambda: run(parse("amlaunch.trainer", "", [*self.arguments("amlaunch.trainer")[4:], *overrides]), stop)
            )
        finally:
            if dist.is_initialized():
                time.sleep(
                    0.05
                )  # gloo's thread must free the last tensors first: destroying holds the lock that it needs
                dist.destroy_process_group()

    def export(self, out: Path, *more: str) -> int:
        """Export in this process and return the exit code."""
        from amlaunch.trainer.tools.export import main

        return main([*self.arguments("amlaunch.trainer.tools.export")[4:], "--out", str(out), *more])

    def signal(self, number: int) -> None:
        """Send a signal to all running ranks."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def until_step(self, step: int, timeout: float = 60.0) -> None:
        """Wait until ``step`` is in the metrics."""
        deadline = time.monotonic() + timeout
        while not any(line["step"] >= step for line in self.lines()):
            assert time.monotonic() < deadline, "no such step in time"
            assert any(process.poll() is None for process in self.processes), self.wait()[1]
            time.sleep(0.005)

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines of ``metrics.jsonl``."""
        return read_json_lines(self.folder / "metrics.jsonl")

    def column(self, name: str) -> list[float]:
        """Return one field of all lines that have it."""
        return [line[name] for line in self.lines() if name in line]

    def result(self) -> dict[str, Any]:
        """Return ``result.json``."""
        return json.loads((self.folder / "result.json").read_text())

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return self.folder / "checkpoints"


def environment(ranks: int) -> dict[str, str]:
    """Return the environment variables that all ranks of one start share."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "AMLAUNCH_DEVICE": "cpu",
    }
