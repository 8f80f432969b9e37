"""Where the profiles of clusters are kept. What is in them: amlaunch.launcher.specs.cluster_profile."""

from __future__ import annotations

import os
from pathlib import Path

FILE = "clusters.yaml"


def config_folder() -> Path:
    """The user's own settings."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "amlaunch"


def profile_files() -> list[Path]:
    """The files of profiles that are there, the nearest first."""
    return [path for path in (Path(FILE), config_folder() / FILE) if path.is_file()]
