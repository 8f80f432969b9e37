"""The room that an import takes, by what fetches the image: what lies where while it is fetched, saved and converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from amlaunch.containers import disk_space
from amlaunch.containers.disk_space import SPARE, Lack, Need, Phase
from amlaunch.launcher.display import wording
from amlaunch.launcher.images.tools import Say
from amlaunch.recipes.errors import BadInput

ONE_TOOL = ("enroot", "apptainer", "singularity")
"""These fetch and convert in one go, and unpack the layers meanwhile."""


@dataclass(frozen=True)
class Room:
    """One import: where its files go, and how it converts."""

    images: Path
    """The folder of images."""
    work: Path | None
    """Where downloads and half-made files go, where that is another one."""
    unpacks: bool
    """Whether the converting tool wants the files on disk."""
    image: str
    """What it is called."""

    def _need(self, size: float, what: str) -> Need:
        return Need(self.work or self.images, size, what, self._instead)

    @property
    def _instead(self) -> str:
        return "--tmp DIR" if self.work else "--images DIR"

    def to_convert(self, size: float) -> Phase:
        """What comes to layers of that size that are here."""
        found = [self._need(SPARE * size, "the image")]
        found += (
            [disk_space.unpacked(self.work or self.images, size, self.image, "the unpacked files", self._instead)]
            if self.unpacks
            else []
        )
        if self.work and not disk_space.same_disk(self.work, self.images):
            found.append(Need(self.images, SPARE * size, "the image", "--images DIR"))
        return found

    def to_fetch(self, tool: str, size: float, done: int, environ: Mapping[str, str]) -> list[Phase]:
        """Everything, from the registry to the image; ``done``: bytes of the layers that are here from an earlier try."""
        if tool == "skopeo" or tool in ONE_TOOL:
            return [[self._need(max(0.0, size - done), "the download"), *self.to_convert(size)]]
        storage = disk_space.storage_of(tool, environ)
        pulled = [] if storage is None or disk_space.has(tool, self.image) else storage.to_pull(size, self.image)
        kept = pulled[:1]
        archive = self._need(size, "the archive that it is saved to")
        if tool == "docker":  # which does not compress it
            archive = disk_space.unpacked(archive.folder, size, self.image, archive.what, archive.instead)
        saving = storage.to_save(size) if storage else []
        return [pulled, [*kept, *saving, archive], [*kept, archive, *self.to_convert(size)]]


def check(phases: Sequence[Phase], say: Say) -> None:
    """Raises BadInput with how much is needed where; what is only likely to lack is said."""
    for lack in sorted(disk_space.lacks(phases), key=lambda lack: not lack.certain):
        if lack.certain:
            raise BadInput(words(lack))
        say(f"{words(lack)}. It is tried all the same, for some images compress less than most")


def words(lack: Lack) -> str:
    """For people: what is needed, where, and what to do."""
    instead = " or ".join(dict.fromkeys(need.instead for need in lack.needs if need.instead))
    return f"{lack.folders}: {lack.what} will need about {wording.size(int(lack.size))} there, {wording.size(lack.free)} are free; {instead} names another folder"
