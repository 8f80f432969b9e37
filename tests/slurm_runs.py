"""Runs on the tests' cluster: a folder of user lab, amlaunch as he types it, and stages that take no time."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm_cluster import REPOSITORY, Cluster

from launcher.plan import Element, Needs, Plan, Stage
from recipes.files import read_json_lines, write_json
from recipes.rundir import RunDir

CPU = Needs(1, 0, 1, 1, "200M", 5)
PROFILE = {"signal_seconds": 60}


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

    def amlaunch(self, *words: str, check: bool = True, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        command = [self.cluster.python, "-P", "-m", "launcher", *words]
        return self.cluster.run(*command, cwd=self.folder, env={**self.env, **env}, timeout=timeout, check=check)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return self.cluster.popen(self.cluster.python, "-P", "-m", "launcher", *words, cwd=self.folder, env={**self.env, **env})

    def write(self, name: str, text: str) -> Path:
        """A file of lab's."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o644)
        return path

    def status(self, run: str, **env: str) -> dict[str, Any]:
        (found,) = json.loads(self.amlaunch("status", run, "--json", **env).stdout)
        return found

    def wait(self, run: str, seconds: float = 120, code: int = 0) -> dict[str, Any]:
        """Until the run has ended, with this exit code."""
        self.wait_until(run, lambda found: found["state"] not in ("running", "queued", "unknown"), seconds)
        done = self.amlaunch("wait", run, "--json", timeout=seconds, check=False)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def wait_until(self, run: str, test: Callable[[dict[str, Any]], Any], seconds: float = 60) -> dict[str, Any]:
        """Until ``test`` of the status is true; Slurm is asked anew each time."""
        began = time.monotonic()
        while True:
            for path in (self.folder / "cache").rglob("s*-*.json"):
                path.unlink(missing_ok=True)
            found = self.status(run)
            if test(found):
                return found
            waited = time.monotonic() - began
            assert waited < seconds, json.dumps(found, indent=1)
            time.sleep(min(0.5 + waited / 20, 2.0))  # a status costs a quarter of a second of a processor, and several tests wait at once

    def stand_in(self, *stages: tuple[str, list[list[str]], Needs], name: str = "test-1", **profile: Any) -> RunDir:
        """A run of stand-in stages (tests/stand_in.py), each after the one before, planned but not submitted."""
        run = RunDir(self.folder / "runs" / name)
        built: list[Stage] = []
        for stage, elements, needs in stages:
            parts = [
                Element(str(i), "stand_in", [*words, "--element", str(run.element(stage, str(i)).root)], f"part {i}")
                for i, words in enumerate(elements)
            ]
            built.append(Stage(stage, parts, [built[-1].name] if built else [], needs, "gpu" if needs.gpus_per_node else "cpu"))
        settings = {"name": "slurm", "profile": {**PROFILE, **profile}}
        plan = Plan(name, built, None, str(self.folder), cluster=settings)
        write_json(run.plan, plan.to_json())
        run.code.mkdir()
        for package in ("recipes", "containers", "launcher"):  # as a snapshot has them
            (run.code / package).symlink_to(REPOSITORY / package)
        subprocess.run(["chown", "-R", "lab:lab", str(self.folder / "runs")], check=True)
        return run

    def queued(self) -> list[str]:
        """The arrays of lab's that have not ended."""
        return self.cluster.run("squeue", "-h", "-u", "lab", "-o", "%F").stdout.split()


def states(found: dict[str, Any]) -> dict[str, list[str]]:
    """``{stage: the states of its elements}`` of a status."""
    return {stage["name"]: [element["state"] for element in stage["elements"]] for stage in found["stages"]}


def element(found: dict[str, Any], stage: str, index: int = 0) -> dict[str, Any]:
    """One element of a status."""
    return next(one for one in found["stages"] if one["name"] == stage)["elements"][index]


def attempts(run: RunDir, stage: str, name: str = "0") -> list[dict[str, Any]]:
    """How often an element began."""
    return [line for line in read_json_lines(run.element(stage, name).attempts) if line["event"] == "start"]
