"""Whether what a job is made from is done, where Slurm can only promise that it has ended."""

from __future__ import annotations

from amlaunch.launcher.runs.element_state import missing_output, read_done
from amlaunch.launcher.runs.submissions import Submission
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.run_layout import RunDir


def missing_input(run: RunDir, plan: Plan, submission: Submission) -> str:
    """What of the stages before is not done, where Slurm only waited for their end; empty where nothing is missing."""
    for stage in submission.inputs:
        for element in plan.stage(stage).elements:
            done = read_done(run.element(stage, element.name))
            if done is None or missing_output(done) is not None:
                return f"a stage before it did not finish: {stage} {element.name} is not done"
    return ""
