"""Check that the inputs of a job are complete where Slurm can only promise that the jobs before it have ended."""

from __future__ import annotations

from amlaunch.launcher.runs.element_files import is_done
from amlaunch.launcher.runs.slurm_reasons import PREDECESSOR_FAILED
from amlaunch.launcher.runs.submissions import Submission
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.run_layout import RunDir


def missing_input(run: RunDir, plan: Plan, submission: Submission, element: str) -> str:
    """Return a message that names the first unfinished element that ``element`` needs; empty if all are done."""
    elementwise = plan.stage(submission.stage).elementwise
    for stage in submission.inputs:
        names = [element] if elementwise else [needed.name for needed in plan.stage(stage).elements]
        for name in names:
            if not is_done(run.element(stage, name)):
                return f"{PREDECESSOR_FAILED}: {stage} {name} is not done"
    return ""
