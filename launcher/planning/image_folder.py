"""Locate the folder of container images that all nodes see (contents: amlaunch.containers.images.image_store)."""

from __future__ import annotations

import os
from pathlib import Path

from amlaunch.containers.images.image_store import ImageFolder
from amlaunch.launcher.runs.find import runs_root
from amlaunch.launcher.specs.profile_files import profile_files


def image_folder(option: str | None = None, profile_folder: str | None = None) -> ImageFolder:
    """Return the folder of images.

    It is ``--images``, else ``AMLAUNCH_IMAGES``, else the profile's (or the one that all profiles of the user agree
    on), else ``images`` beside the runs.
    """
    folder = option or os.environ.get("AMLAUNCH_IMAGES") or profile_folder or _folder_of_all_profiles()
    return ImageFolder(Path(folder).expanduser().absolute() if folder else runs_root().parent / "images")


def _folder_of_all_profiles() -> str | None:
    """Return the folder that the user's profiles name, if they agree on one."""
    if not profile_files():
        return None
    from amlaunch.launcher.specs.cluster_profile import readable_profiles

    folders = {profile.images for profile in readable_profiles()} - {None}
    return folders.pop() if len(folders) == 1 else None
