"""Render the batch script of one array of a stage, and submit it; both through submitit.

submitit renders the ``#SBATCH`` lines and hands the script to sbatch. The script starts our driver
(:mod:`amlaunch.launcher.execution.slurm_job`) and not a pickle: submitit renames its pickle only after sbatch has
answered, and a job whose submitter was killed in between would wait for it in vain.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from amlaunch.launcher.errors import SlurmError, SlurmNotInstalled, command_error
from amlaunch.launcher.slurm.client import (
    call,
    clean_environment,
    compress_ranges,
    partition_rules,
    partitions,
    usable_nodes,
)
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster, ClusterProfile
from amlaunch.launcher.specs.plan import Needs, Stage
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import is_secret_variable
from amlaunch.recipes.python_process import python_command
from amlaunch.recipes.suggestions import did_you_mean


@dataclass(frozen=True)
class Array:
    """Elements of one stage that are submitted together."""

    stage: Stage
    elements: tuple[str, ...]
    folder: Path
    """The array's folder in the run directory: the script, the submission, and the jobs' own output."""
    token: str
    """The job's comment, which finds the job if sbatch did not return its ID."""


class ScriptExecutor(submitit.SlurmExecutor):
    """submitit's executor for a complete script, with additional options for sbatch."""

    def __init__(self, folder: Path, options: Sequence[str]):
        super().__init__(folder)
        self.options = list(options)

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return command

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self.options, str(submission_file_path)]


def script(array: Array, profile: ClusterProfile, run_root: Path, code: Path, run_id: str) -> str:
    """Return the complete batch script of an array.

    Raises BadInput for paths that Slurm cannot take, and SlurmNotInstalled on a machine without Slurm.
    """
    if "\n" in f"{run_root}{array.folder}":
        raise BadInput(f"{str(run_root)!r}: sbatch does not accept a path with a line break; use another: --runs DIR")
    try:
        renderer = submitit.SlurmExecutor(array.folder.parent)
    except RuntimeError:
        # It looks for srun.
        raise SlurmNotInstalled("srun") from None
    renderer.update_parameters(**_parameters(array, profile, run_id))
    python = os.path.expanduser(profile.python) if profile.python else sys.executable
    driver = python_command("amlaunch.launcher.execution.slurm_job", python, any_version=profile.python is not None)
    return renderer._make_submission_file_text(_command([*driver, str(run_root), str(array.folder)], code), "")


def _command(command: Sequence[str], code: Path) -> str:
    """Return the script's last lines. ``exec``: Slurm sends its warning of the time limit to the batch shell alone."""
    path = shlex.quote(str(code))
    return f"export PYTHONSAFEPATH=1 PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}\nexec {shlex.join(command)}"


def _parameters(array: Array, profile: ClusterProfile, run_id: str) -> dict[str, Any]:
    """Return the arguments of submitit's ``update_parameters``; ``additional_parameters`` takes unnamed options."""
    settings = profile.stage(array.stage.name)
    needs = array.stage.needs
    options = {
        str(key).replace("_", "-"): value for key, value in settings.sbatch.items() if value not in (None, False)
    }
    throttle = f"%{settings.throttle}" if settings.throttle else ""
    additional = {
        "array": compress_ranges(range(len(array.elements))) + throttle,
        # Slurm reads % in a path as the start of a pattern, and %% as a percent sign.
        "output": f"{str(array.folder).replace('%', '%%')}/%A_%a.log",
        "signal": f"B:USR1@{profile.signal_seconds}",
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        **({} if "gres" in options else _gpu_options(needs, profile)),
        **options,
        **({"mem": needs.mem} if needs.mem else {}),
    }
    return {
        "job_name": f"{run_id}.{array.stage.name}",
        "comment": array.token,
        "partition": array.stage.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": needs.time_minutes,
        "nodes": needs.nodes,
        "ntasks_per_node": needs.tasks_per_node,
        "cpus_per_task": max(1, needs.cpus // needs.tasks_per_node),
        "stderr_to_stdout": True,
        "setup": profile.setup or None,
        "use_srun": False,
        "wckey": None,
        "additional_parameters": additional,
    }


def _gpu_options(needs: Needs, profile: ClusterProfile) -> dict[str, str]:
    if not needs.gpus_per_node:
        return {}
    count = str(needs.gpus_per_node)
    return {"gpus-per-node": f"{profile.gpu_type}:{count}" if profile.gpu_type else count}


NOT_NOW = ("Requested node configuration is not available", "Required node not available")
"""What ``sbatch --test-only`` says if the nodes that are up are too few or too small."""


def submit(text: str, options: Sequence[str]) -> str:
    """Submit a script; return the job ID. Raises SlurmError with sbatch's message."""
    with tempfile.TemporaryDirectory() as folder, job_environment(), _without_stderr():
        executor = ScriptExecutor(Path(folder), options)
        try:
            return str(executor._submit_command(text).job_id)
        except (FailedJobError, FailedSubmissionError, UnicodeDecodeError) as error:
            raise command_error("sbatch", _sbatch_message(str(error)) or "failed without a message") from None


def test_only(text: str, options: Sequence[str] = ()) -> str:
    """Return sbatch's estimate of a script's start without submitting it. Raises SlurmError if it is refused."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        return call("sbatch", "--test-only", *options, file.name, env=submission_environment())


def reason_to_wait(text: str, partition: str | None) -> str:
    """Return why Slurm would queue a script and not start it while nodes are missing; empty if it could start it.

    sbatch tests a script with the nodes that are up, and so refuses what it would queue. Raises SlurmError for a script
    that is refused for another reason.
    """
    try:
        test_only(text)
    except SlurmError as error:
        state = _partition_shortage(partition or "")
        if not state or not any(message in error.message for message in NOT_NOW):
            raise
        return f"{state}; sbatch says: {error.message.splitlines()[-1]}"
    return ""


def _partition_shortage(partition: str) -> str:
    """Return what a partition lacks today; empty if all its nodes can take jobs. Raises SlurmError."""
    if partition_rules().get(partition, {}).get("State") == "DOWN":
        return f"partition {partition} is down"
    count = next((known.nodes for known in partitions() if known.name == partition), 0)
    usable = usable_nodes().get(partition, count)
    return f"{count - usable} of {count} nodes of partition {partition} are down or drained" if usable < count else ""


def _sbatch_message(text: str) -> str:
    lines = [line.removeprefix("sbatch: error: ").strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines)


def submission_environment() -> dict[str, str]:
    """Return the environment that jobs inherit: this shell's, without an enclosing job's variables and without secrets.

    Slurm keeps a job's environment in its own files and database, so secrets travel in a file that only the user can
    read (``RunDir.environment``).
    """
    return {name: value for name, value in clean_environment(os.environ).items() if not is_secret_variable(name)}


@contextmanager
def job_environment() -> Iterator[None]:
    """Use :func:`submission_environment` as this process's own, for libraries that start sbatch themselves."""
    before, during = dict(os.environ), submission_environment()
    os.environ.clear()
    os.environ.update(during)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Suppress sbatch's errors on standard error: submitit prints them and raises them, too."""
    with redirect_stderr(io.StringIO()):
        yield


@cache
def sbatch_options() -> frozenset[str]:
    """Return the long names of all options of this site's sbatch. Raises SlurmError."""
    return frozenset(re.findall(r"--([a-z][a-z-]+)", call("sbatch", "--help")))


def option_problems(cluster: Cluster) -> Iterator[str]:
    """Yield an error for each option in a profile's ``sbatch`` sections that does not exist. Raises SlurmError."""
    profile = cluster.profile
    sections: list[tuple[tuple[str, ...], dict[str, Any]]] = [(("sbatch",), profile.sbatch)]
    sections += [(("stages", name, "sbatch"), getattr(profile.stages, name).sbatch) for name in STAGES]
    for path, options in sections:
        for key in options:
            if str(key).replace("_", "-") not in sbatch_options():
                place, hint = cluster.at((*path, str(key))), did_you_mean(str(key), sbatch_options())
                yield f"{place}: sbatch has no such option; {hint}"
