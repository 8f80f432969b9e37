"""Real training runs for tests: tiny shards, a tiny recipe, and ranks as processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from preprocess.shards import write_shard
from recipes.files import read_json_lines
from recipes.process import PARENT_VARIABLE

REPOSITORY = Path(__file__).resolve().parent.parent
VOCAB = 97
SEQ_LEN = 16
MODEL = {
    "_target_": "trainer.models.gpt2.build_gpt2_model",
    "vocab_size": VOCAB,
    "n_positions": SEQ_LEN,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_tokens(path: Path, count: int, seed: int = 0) -> None:
    """A shard of ``count`` tokens that a model can learn something from."""
    rng = np.random.default_rng(seed)
    tokens = (np.cumsum(rng.integers(1, 4, count)) % VOCAB).astype("<u2")
    write_shard(path, [tokens], np.dtype("<u2"))


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe over two shards and a validation shard in ``folder``; ``sections`` are merged in."""
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


@dataclass
class Run:
    """One training run in a folder of its own, started any number of times."""

    folder: Path
    tree: dict[str, Any]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.tree))

    def arguments(self, module: str, *more: str) -> list[str]:
        """The command of one rank."""
        places = ["--element", str(self.folder), "--checkpoints", str(self.checkpoints)]
        return [sys.executable, "-u", "-m", module, str(self.folder / "recipe.yaml"), *places, *more]

    def start(self, ranks: int = 1, *overrides: str) -> None:
        """Start ``ranks`` processes, as torchrun would."""
        shared = {**os.environ, **environment(ranks)}
        self.processes = [
            subprocess.Popen(
                self.arguments("trainer", *overrides),
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]

    def wait(self, timeout: float = 120.0) -> tuple[list[int], str]:
        """Exit codes, and everything that all ranks said; none is left behind."""
        try:
            said = [process.communicate(timeout=timeout)[0] for process in self.processes]
        finally:
            self.signal(signal.SIGKILL)
        return [process.returncode for process in self.processes], "".join(said)

    def train(self, ranks: int = 1, *overrides: str) -> str:
        """Train to the end; what was said. An exit code other than 0 fails the test."""
        self.start(ranks, *overrides)
        codes, said = self.wait()
        assert codes == [0] * ranks, said
        return said

    def here(self, *overrides: str) -> int:
        """Train on one rank in this process, which is quicker; the exit code."""
        import torch
        import torch.distributed as dist

        from trainer.cli import parse
        from trainer.errors import guarded
        from trainer.job import run
        from trainer.stop import StopFlag

        torch.set_num_threads(1)  # as the processes have it, for equality to the last bit
        stop = StopFlag()
        try:
            return guarded(lambda: run(parse("trainer", "", [*self.arguments("trainer")[4:], *overrides]), stop))
        finally:
            if dist.is_initialized():
                time.sleep(0.05)  # gloo's thread frees the last tensors: it needs the lock that taking down holds
                dist.destroy_process_group()

    def export(self, out: Path, *more: str) -> int:
        """Export in this process; the exit code."""
        from trainer.export import main

        return main([*self.arguments("trainer.export")[4:], "--out", str(out), *more])

    def signal(self, number: int) -> None:
        """Send a signal to all ranks that live."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def until_step(self, step: int, timeout: float = 60.0) -> None:
        """Wait until ``step`` is written down."""
        deadline = time.monotonic() + timeout
        while not any(line["step"] >= step for line in self.lines()):
            assert time.monotonic() < deadline, "no such step in time"
            assert any(process.poll() is None for process in self.processes), self.wait()[1]
            time.sleep(0.005)

    def lines(self) -> list[dict[str, Any]]:
        """All of ``metrics.jsonl``."""
        return read_json_lines(self.folder / "metrics.jsonl")

    def column(self, name: str) -> list[float]:
        """One field of all lines that have it."""
        return [line[name] for line in self.lines() if name in line]

    def result(self) -> dict[str, Any]:
        """``result.json``."""
        return json.loads((self.folder / "result.json").read_text())

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.folder / "checkpoints"


def environment(ranks: int) -> dict[str, str]:
    """What all ranks of one start share."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "AMLAUNCH_DEVICE": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        PARENT_VARIABLE: str(os.getpid()),
    }
