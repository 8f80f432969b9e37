"""``python -m amlaunch.trainer RECIPE``: train as one rank, alone or under torchrun, srun or amlaunch's driver."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from amlaunch.recipes.python_process import die_with_parent
from amlaunch.trainer.process.arguments import parse
from amlaunch.trainer.process.console import drop_output_to_full_disk
from amlaunch.trainer.process.errors import exit_process, run_guarded
from amlaunch.trainer.process.stop_request import StopFlag


def main(arguments: Sequence[str]) -> int:
    """Train and return the exit code: 0 done, 75 stopped on request with everything saved, 1 or 2 an error."""
    stop = StopFlag()
    stop.install()
    die_with_parent()

    def work() -> int:
        options = parse("python -m amlaunch.trainer", "Train the model of a recipe.", arguments)
        # torch takes seconds to load: install handlers and report recipe errors first.
        from amlaunch.trainer.loop.job import run

        return run(options, stop)

    return run_guarded(work)


if __name__ == "__main__":
    drop_output_to_full_disk()
    exit_process(main(sys.argv[1:]))
