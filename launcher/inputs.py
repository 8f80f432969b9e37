"""Whether what a job is made from is done, where Slurm can only promise that it has ended."""

from __future__ import annotations

from launcher.plan import Plan
from launcher.state import missing_output, read_done
from launcher.submissions import Submission
from recipes.rundir import RunDir


def missing_input(run: RunDir, plan: Plan, submission: Submission) -> str:
    """What of the stages before is not done, where Slurm only waited for their end; empty where nothing is missing."""
    for stage in submission.inputs:
        for element in plan.stage(stage).elements:
            done = read_done(run.element(stage, element.name))
            if done is None or missing_output(done) is not None:
                return f"a stage before it did not finish: {stage} {element.name} is not done"
    return ""
