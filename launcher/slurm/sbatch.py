"""From one array of a stage to the script that Slurm runs, and its submission: both through submitit.

submitit renders the ``#SBATCH`` lines and hands the script to sbatch. What the
script starts is our driver (:mod:`amlaunch.launcher.execution.slurm_job`), not a pickle: that is renamed
only after sbatch has answered, and a job whose submitter was killed in between
would wait for it in vain.
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

from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.slurm.client import call, clean_environment, compress_ranges
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster, ClusterProfile
from amlaunch.launcher.specs.plan import Needs, Stage
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.format.loader import is_secret_variable
from amlaunch.recipes.python_process import python_command


@dataclass(frozen=True)
class Array:
    """Elements of one stage that are submitted together."""

    stage: Stage
    elements: tuple[str, ...]
    folder: Path
    """Its own folder in the run directory: the script, what was submitted, the jobs' own output."""
    token: str
    """In the job's comment: finds it again when sbatch did not say its number."""


class ScriptExecutor(submitit.SlurmExecutor):
    """submitit's executor for a script that is already written, with sbatch options that only its submission knows."""

    def __init__(self, folder: Path, options: Sequence[str]):
        super().__init__(folder)
        self.options = list(options)

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return command

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self.options, str(submission_file_path)]


def script(array: Array, profile: ClusterProfile, run_root: Path, code: Path, run_id: str) -> str:
    """The batch script of an array, complete. Raises BadInput for paths that Slurm cannot take, SlurmError where Slurm is not."""
    if "\n" in f"{run_root}{array.folder}":
        raise BadInput(
            f"{run_root!r}: a path with a line break cannot be given to sbatch; --runs DIR puts runs elsewhere"
        )
    parameters = _parameters(array, profile, run_id)
    try:
        renderer = submitit.SlurmExecutor(array.folder.parent)
    except RuntimeError:  # it looks for srun
        raise SlurmError("srun", "not found: is this a machine of the cluster?") from None
    renderer.update_parameters(**parameters)
    python = os.path.expanduser(profile.python) if profile.python else sys.executable
    command = [
        *python_command("amlaunch.launcher.execution.slurm_job", python, any_version=profile.python is not None),
        str(run_root),
        str(array.folder),
    ]
    return renderer._make_submission_file_text(_command(command, code), "")


def _command(command: Sequence[str], code: Path) -> str:
    """``exec``: the driver becomes the batch shell itself, which is who Slurm sends the warning of the time limit to."""
    path = shlex.quote(str(code))
    return f"export PYTHONSAFEPATH=1 PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}\nexec {shlex.join(command)}"


def _parameters(array: Array, profile: ClusterProfile, run_id: str) -> dict[str, Any]:
    """What submitit's ``update_parameters`` takes; what it has no name for goes through ``additional_parameters``."""
    own = profile.stage(array.stage.name)
    needs = array.stage.needs
    options = {str(key).replace("_", "-"): value for key, value in own.sbatch.items() if value not in (None, False)}
    throttle = f"%{own.throttle}" if own.throttle else ""
    # Where the job starts, and the output: Slurm reads % as a pattern, and %% as one percent sign.
    more = {
        "array": compress_ranges(range(len(array.elements))) + throttle,
        "output": f"{_escaped(array.folder)}/%A_%a.log",
        "signal": f"B:USR1@{profile.signal_seconds}",
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        **({} if "gres" in options else _gpus(needs, profile)),
        **options,
    }
    return {
        "job_name": f"{run_id}.{array.stage.name}",
        "comment": array.token,
        "partition": array.stage.partition,
        "account": own.account,
        "qos": own.qos,
        "time": needs.time_minutes,
        "nodes": needs.nodes,
        "ntasks_per_node": needs.tasks_per_node,
        "cpus_per_task": max(1, needs.cpus // needs.tasks_per_node),
        "stderr_to_stdout": True,
        "setup": profile.setup or None,
        "use_srun": False,
        "wckey": None,
        "additional_parameters": {**more, **({"mem": needs.mem} if needs.mem else {})},
    }


def _escaped(path: Path) -> str:
    return str(path).replace("%", "%%")


def _gpus(needs: Needs, profile: ClusterProfile) -> dict[str, str]:
    if not needs.gpus_per_node:
        return {}
    return {
        "gpus-per-node": f"{profile.gpu_type}:{needs.gpus_per_node}" if profile.gpu_type else str(needs.gpus_per_node)
    }


def submit(text: str, options: Sequence[str]) -> str:
    """Hand a script to sbatch; the job's id. Raises SlurmError with sbatch's words."""
    with tempfile.TemporaryDirectory() as folder, job_environment(), _quiet():
        executor = ScriptExecutor(Path(folder), options)
        try:
            return str(executor._submit_command(text).job_id)
        except (FailedJobError, FailedSubmissionError, UnicodeDecodeError) as error:
            raise SlurmError("sbatch", _plain(str(error)) or "ended without a word") from None


def test_only(text: str, options: Sequence[str] = ()) -> str:
    """What sbatch would say to a script: its estimate of when it starts. Raises SlurmError where it would refuse."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        env = submission_environment()
        return call("sbatch", "--test-only", *options, file.name, env=env)


def _plain(text: str) -> str:
    lines = [line.removeprefix("sbatch: error: ").strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines)


def submission_environment() -> dict[str, str]:
    """What jobs inherit: this shell, without the job it may run in, and without its secrets.

    Slurm keeps a job's environment in its own files and data base, so secrets
    travel in a file that only the user can read (``RunDir.environment``).
    """
    return {name: value for name, value in clean_environment(os.environ).items() if not is_secret_variable(name)}


@contextmanager
def job_environment() -> Iterator[None]:
    """:func:`submission_environment` as this process' own, for libraries that start sbatch themselves."""
    before, during = dict(os.environ), submission_environment()
    os.environ.clear()
    os.environ.update(during)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """submitit prints sbatch's errors; they are in what it raises, too."""
    with redirect_stderr(io.StringIO()):
        yield


@cache
def sbatch_options() -> frozenset[str]:
    """The long names of all options that this site's sbatch knows. Raises SlurmError."""
    return frozenset(re.findall(r"--([a-z][a-z-]+)", call("sbatch", "--help")))


def option_problems(cluster: Cluster) -> Iterator[str]:
    """What sbatch does not know of a profile's ``sbatch`` sections, with the nearest name. Raises SlurmError."""
    profile = cluster.profile
    sections: list[tuple[tuple[str, ...], dict[str, Any]]] = [(("sbatch",), profile.sbatch)]
    sections += [(("stages", name, "sbatch"), getattr(profile.stages, name).sbatch) for name in STAGES]
    for path, given in sections:
        for key in given:
            if str(key).replace("_", "-") not in sbatch_options():
                yield f"{cluster.at((*path, str(key)))}: sbatch has no such option; {did_you_mean(str(key), sbatch_options())}"
