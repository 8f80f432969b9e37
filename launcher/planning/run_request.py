"""The request to start, resume or retry a run, independent of how it was typed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunRequest:
    """A request to start, resume or retry a run; a command builds it once from its options."""

    recipe: str | None = None
    """A YAML file, or the name of a recipe that comes with amlaunch; None: the default recipe."""
    overrides: tuple[str, ...] = ()
    """Overrides of the recipe as typed: ``--model.n_layer``, ``6``."""
    allow_target: tuple[str, ...] = ()
    """Further modules and files that ``_target_`` may use."""
    runs: str | None = None
    """``--runs``."""
    cluster: str | None = None
    """Name or file of a cluster profile; None: this machine, or for an existing run the place where it is."""
    gpus: int | None = None
    """``--gpus``; None: the recipe's, or the GPUs that are available."""
    stage: str | None = None
    """The only stage to run; None: all."""
    dry_run: bool = False
    wait: bool = False
    json: bool = False
    verbose: bool = False
    """Print all notes, not only the first."""
    argv: tuple[str, ...] = ("amlaunch",)
    """The command line, which the run directory stores."""
