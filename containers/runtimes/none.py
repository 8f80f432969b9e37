"""No container: the command runs as it is in the environment that submitted it."""

from __future__ import annotations

from collections.abc import Sequence

from amlaunch.containers.runtimes.launch import ContainerSpec, Launch


def launch(spec: ContainerSpec, command: Sequence[str]) -> Launch:
    """Return the command with the variables of ``spec``; its other settings have no meaning here."""
    return Launch(tuple(command), dict(spec.env))
