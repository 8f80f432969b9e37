"""Locate cluster profile files. Their content: :mod:`amlaunch.launcher.specs.cluster_profile`."""

from __future__ import annotations

import os
from pathlib import Path

FILE = "clusters.yaml"


def config_folder() -> Path:
    """Return the folder of the user's settings."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "amlaunch"


def profile_files() -> list[Path]:
    """Return the existing profile files, the nearest first."""
    return [path for path in (Path(FILE), config_folder() / FILE) if path.is_file()]
