"""Refuse a validation set that shares files or documents with the training set: its loss would look too good."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from amlaunch.recipes.errors import BadInput
from amlaunch.trainer.data.token_stream import Shard, folder_manifest


class Documents(NamedTuple):
    """The records of a source that a shard holds, as its folder's manifest says."""

    path: Path
    source: Any
    """The source, cut into parts: only the same cut numbers records in the same way."""
    part: int
    first: int
    end: int

    def overlaps(self, other: Documents) -> bool:
        """Return True if both hold a record; shards of one folder never do."""
        is_same_cut = (self.source, self.part) == (other.source, other.part) and self.path.parent != other.path.parent
        return is_same_cut and self.first < other.end and other.first < self.end


def refuse_shared_data(train_set: Any, validation_sets: Mapping[str, Any]) -> None:
    """Raise BadInput if a validation set shares a file, or documents by the manifests, with the training set.

    Only our own data sets say which shards they read.
    """
    train_shards = shards_of(train_set)
    train_files = {shard.path.resolve() for shard in train_shards}
    train_documents = [documents for shard in train_shards if (documents := documents_of(shard))]
    for name, dataset in validation_sets.items():
        place = f"validation_dataset.{name}" if name else "validation_dataset"
        for shard in shards_of(dataset):
            if shard.path.resolve() in train_files:
                raise BadInput(
                    f"{place}: {shard.path} is also in the training set. Set file_pattern of one of them to other files"
                )
            documents = documents_of(shard)
            shared = next((other for other in train_documents if documents and documents.overlaps(other)), None)
            if shared:
                raise BadInput(
                    f"{place}: {shard.path} has documents that {shared.path}, in the training set, has too. Use both "
                    "splits of one folder"
                )


def shards_of(dataset: Any) -> list[Shard]:
    """Return the shards of a data set; none of a user's own."""
    return [shard for shard in getattr(dataset, "shards", ()) if isinstance(shard, Shard)]


def documents_of(shard: Shard) -> Documents | None:
    """Return the documents of a shard; None if no manifest lists it with its records."""
    path = shard.path.resolve()
    manifest = folder_manifest(path.parent)
    entries = (entry for entries in manifest.get("splits", {}).values() for entry in entries)
    text = next((entry.get("source", "") for entry in entries if entry["file"] == path.name), "")
    match = re.fullmatch(r"part (\d+), records (\d+) to (\d+)", text)
    if match is None or "source" not in manifest:
        return None
    part, first, end = map(int, match.groups())
    return Documents(path, (manifest["source"], manifest.get("options", {}).get("parts")), part, first, end)
