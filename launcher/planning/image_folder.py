"""Where the images are that all nodes see. What is in that folder: amlaunch.containers.images.image_store."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from amlaunch.containers.images.image_store import ImageFolder
from amlaunch.launcher.runs.find import runs_root
from amlaunch.launcher.specs.profile_files import profile_files
from amlaunch.recipes.errors import BadInput


def image_folder(given: str | None = None, site: str | None = None) -> ImageFolder:
    """``--images``, else ``AMLAUNCH_IMAGES``, else as a profile says (``site``, or all of the user's together), else ``images`` beside the runs."""
    named = given or os.environ.get("AMLAUNCH_IMAGES") or site or _of_profiles()
    return ImageFolder(Path(named).expanduser().absolute() if named else runs_root().parent / "images")


def _of_profiles() -> str | None:
    """The folder that the user's profiles name, where they agree on one."""
    files = profile_files()
    if not files:
        return None
    from amlaunch.launcher.specs.cluster_profile import check_profile
    from amlaunch.recipes.format.yaml_reader import read_file

    found = set()
    for path in files:
        with suppress(BadInput, AttributeError):  # whoever uses that profile is told what is wrong with it
            found |= {check_profile(profile or {}, {}).images for profile in read_file(path)[0].values()}
    named = found - {None}
    return named.pop() if len(named) == 1 else None
