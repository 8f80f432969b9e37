"""Start a run: resolve, check, write, submit. The same steps for new, resumed and retried runs.

The two ends of the pipeline are this machine (:mod:`.local_run`) and Slurm (:mod:`.slurm_run`).
"""

from __future__ import annotations

import sys

from amlaunch.launcher.planning.run_request import RunRequest
from amlaunch.launcher.planning.run_sources import RunSource
from amlaunch.launcher.submission.local_run import run_locally
from amlaunch.launcher.submission.preflight import Say, resolve_and_check
from amlaunch.launcher.submission.slurm_run import submit_to_slurm
from amlaunch.recipes.errors import BadInput


def start_run(source: RunSource) -> int:
    """Resolve, check, write and submit a run; return the exit code. Raises BadInput and SlurmError."""
    request = source.request
    say = message_printer(request)
    run, notes = resolve_and_check(source, say)
    if run.cluster is not None:
        return submit_to_slurm(run, run.cluster, request, notes, say)
    if request.dry_run:
        raise BadInput(
            f"--dry-run: cluster {request.cluster!r} is this machine, where no scripts are submitted; "
            "to print the plan, use amlaunch show"
        )
    return run_locally(run, notes, request)


def message_printer(request: RunRequest) -> Say:
    """Return a function that prints messages: on stderr if stdout is for results that a program reads."""
    stream = sys.stderr if request.json or request.dry_run else sys.stdout
    return lambda text: print(text, file=stream, flush=True)
