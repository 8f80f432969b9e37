"""Runs on the tests' cluster: a folder of user lab, amlaunch as he types it, and stages that take no time."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm_cluster import REPOSITORY, Cluster

from amlaunch.launcher.specs.plan import Element, Needs, Plan, Stage
from amlaunch.recipes.files import read_json_lines, write_json
from amlaunch.recipes.run_layout import RunDir

CPU = Needs(1, 0, 1, 1, "200M", 5)
TWO_ON_GPU = Needs(1, 2, 2, 2, "400M", 5)
STEPS = ["--do", "steps"]
"""Words of a stand-in that takes 24 steps, each a fraction of a second."""
PROFILE = {"signal_seconds": 60}
RECIPE = """\
name: test
model: {_target_: amlaunch.trainer.models.gpt2.build_gpt2_model, n_positions: 32, n_embd: 16, n_layer: 2, n_head: 2}
dataset: {file_pattern: "*.bin", seq_len: 32}
step_scheduler: {global_batch_size: 8, local_batch_size: 2, max_steps: 4}
"""
"""The recipe of stand-in runs: it is checked when a run is retried, and nothing reads it."""
ASKED = """\
import contextlib, io, json, sys
from amlaunch.launcher.__main__ import main
for line in sys.stdin:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        main(["status", line.rstrip("\\n"), "--json"])
    print(json.dumps(out.getvalue()), flush=True)
"""
"""A process that prints the status of each run that it reads from stdin: starting Python takes most of the time."""


class Place:
    """Where lab works: ``amlaunch`` runs here."""

    def __init__(self, cluster: Cluster, name: str, **env: str):
        self.cluster = cluster
        self.folder = cluster.folder(name)
        self.env = {
            "PYTHONPATH": str(REPOSITORY / "tests"),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            **env,
        }
        self._asked: subprocess.Popen[str] | None = None

    def amlaunch(
        self, *words: str, check: bool = True, timeout: float = 120, **env: str
    ) -> subprocess.CompletedProcess[str]:
        command = [self.cluster.python, "-P", "-m", "amlaunch", *words]
        return self.cluster.run(*command, cwd=self.folder, env={**self.env, **env}, timeout=timeout, check=check)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return self.cluster.popen(
            self.cluster.python, "-P", "-m", "amlaunch", *words, cwd=self.folder, env={**self.env, **env}
        )

    def write(self, name: str, text: str) -> Path:
        """A file of lab's."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o644)
        return path

    def status(self, run: str) -> dict[str, Any]:
        if self._asked is None or self._asked.poll() is not None:
            self._asked = self.cluster.helper(self.cluster.python, "-P", "-c", ASKED, cwd=self.folder, env=self.env)
        assert self._asked.stdin and self._asked.stdout
        self._asked.stdin.write(f"{run}\n")
        self._asked.stdin.flush()
        answer = json.loads(self._asked.stdout.readline())
        assert answer.startswith("["), answer
        (result,) = json.loads(answer)
        return result

    def wait(self, run: str, seconds: float = 120, code: int = 0) -> dict[str, Any]:
        """Until the run has ended, with this exit code."""
        self.wait_until(run, lambda result: result["state"] not in ("running", "queued", "unknown"), seconds)
        done = self.amlaunch("wait", run, "--json", timeout=seconds, check=False)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def wait_until(self, run: str, test: Callable[[dict[str, Any]], Any], seconds: float = 60) -> dict[str, Any]:
        """Until ``test`` of the status is true; Slurm is asked anew each time."""
        began = time.monotonic()
        while True:
            for path in (self.folder / "cache").rglob("s*-*.json"):
                path.unlink(missing_ok=True)
            result = self.status(run)
            if test(result):
                return result
            waited = time.monotonic() - began
            assert waited < seconds, json.dumps(result, indent=1)
            time.sleep(min(0.5 + waited / 20, 2.0))  # several tests wait at once

    def stand_in(self, *stages: tuple[str, list[list[str]], Needs], name: str = "test-1", **profile: Any) -> RunDir:
        """A run of stand-in stages (tests/stand_in.py), each after the one before, planned but not submitted."""
        run = RunDir(self.folder / "runs" / name)
        built: list[Stage] = []
        for stage, elements, needs in stages:
            parts = [
                Element(str(i), "stand_in", [*words, "--element", str(run.element(stage, str(i)).root)], f"part {i}")
                for i, words in enumerate(elements)
            ]
            built.append(
                Stage(stage, parts, [built[-1].name] if built else [], needs, "gpu" if needs.gpus_per_node else "cpu")
            )
        settings = {"name": "slurm", "profile": {**PROFILE, **profile}}
        plan = Plan(name, built, None, str(self.folder), cluster=settings)
        write_json(run.plan, plan.to_json())
        run.recipe.write_text(RECIPE)
        self.write("tokens.bin", "")
        run.code.mkdir()
        (run.code / "amlaunch").symlink_to(REPOSITORY / "src" / "amlaunch")  # as a snapshot has it
        subprocess.run(["chown", "-R", "lab:lab", str(self.folder / "runs")], check=True)
        return run

    def queued(self) -> list[str]:
        """The arrays of lab's that have not ended."""
        return self.cluster.run("squeue", "-h", "-u", "lab", "-o", "%F").stdout.split()


def states(result: dict[str, Any]) -> dict[str, list[str]]:
    """``{stage: the states of its elements}`` of a status."""
    return {stage["name"]: [element["state"] for element in stage["elements"]] for stage in result["stages"]}


def element(result: dict[str, Any], stage: str, index: int = 0) -> dict[str, Any]:
    """One element of a status."""
    return next(one for one in result["stages"] if one["name"] == stage)["elements"][index]


def at_step(result: dict[str, Any], stage: str, step: int, index: int = 0) -> bool:
    """Whether an element runs and has got that far."""
    one = element(result, stage, index)
    return one["state"] == "running" and (one["progress"].get("done") or 0) >= step


def attempts(run: RunDir, stage: str, name: str = "0") -> list[dict[str, Any]]:
    """How often an element began."""
    return [line for line in read_json_lines(run.element(stage, name).attempts) if line["event"] == "start"]
