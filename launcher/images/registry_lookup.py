"""Look up a run's images in their registries when it is submitted: existence, architectures and sizes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from amlaunch.containers.images import credentials, registry
from amlaunch.containers.images.registry import ImageManifest, RegistryError
from amlaunch.containers.runtimes.catalog import Reference, parse
from amlaunch.launcher.images.tools import Say, this_architecture
from amlaunch.launcher.specs.plan import Plan, StageContainer
from amlaunch.recipes.files import fingerprint, read_object, write_json
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.version import VERSION

LOOKUP_SECONDS = 3.0
"""Longest wait for all registries together: many login nodes reach none, and nodes may know another way."""
NOTICE_SECONDS = 1.0
"""Waits that take longer are announced."""
PULLING_RUNTIMES = ("pyxis", "enroot", "apptainer", "singularity")
"""Runtimes that ask the registry for an image that they have not cached; others may have one that was built locally."""
REGISTRY_FACTS = ("bytes", "architectures")
"""An image's facts that come from its registry."""
Answers = Mapping[str, ImageManifest | RegistryError]


@dataclass(frozen=True)
class LookupResult:
    """The plan with the registries' facts, and the messages for the user."""

    plan: Plan
    """With sizes and architectures of its images where they are known."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def look_up_images(loaded: LoadedRecipe, plan: Plan, say: Say, seconds: float = LOOKUP_SECONDS) -> LookupResult:
    """Look up the images of a plan; files, and images whose registry does not answer, stay as they are."""
    runtimes = {stage.container.image: stage.container.runtime for stage in plan.stages if stage.container}
    references = {text: parse(text) for text in runtimes}
    images = {text: image for text, image in references.items() if image.kind == "registry"}
    answers = _ask_registries(images, say, seconds)

    stages = []
    for stage in plan.stages:
        container = stage.container
        if container:
            container = _with_facts(container, answers.get(container.image))
        stages.append(replace(stage, container=container))

    where = f"{loaded.lines.get(('container', 'image'), loaded.path)}: container.image"
    missing = [text for text, answer in answers.items() if isinstance(answer, RegistryError) and answer.status == 404]
    problems = tuple(
        f"{where}: {answers[text]}: {text}. Check the name and the tag"
        for text in missing
        if runtimes[text] in PULLING_RUNTIMES
    )
    notes = (*_notes(images, answers, runtimes), *_unanswered_notes(images, answers, seconds))
    return LookupResult(replace(plan, stages=stages), problems, notes)


def with_earlier_facts(run: RunDir, plan: Plan) -> Plan:
    """Return the plan with the facts about its images from the run's earlier submission, whose jobs still use them."""
    earlier = {
        str(container.get("image")): container.get("facts") or {}
        for stage in read_object(run.plan).get("stages") or []
        if (container := stage.get("container"))
    }

    def update(container: StageContainer | None) -> StageContainer | None:
        facts = earlier.get(container.image) if container else None
        if container is None or not facts:
            return container
        known = {name: facts[name] for name in REGISTRY_FACTS if name in facts}
        return replace(container, facts={**container.facts, **known})

    return replace(plan, stages=[replace(stage, container=update(stage.container)) for stage in plan.stages])


def _ask_registries(images: Mapping[str, Reference], say: Say, seconds: float) -> Answers:
    """Ask all registries at once, so that a silent one does not delay the others; return the answers in time."""
    answers: dict[str, ImageManifest | RegistryError] = {}

    def ask(text: str) -> None:
        image = images[text]
        cache = _UserCache(f"{image.registry}/{image.repository}")
        try:
            answers[text] = registry.fetch_manifest(
                image, this_architecture(), os.environ, seconds=seconds, cache=cache
            )
        except RegistryError as error:
            answers[text] = error

    threads = [threading.Thread(target=ask, args=(text,), daemon=True) for text in images]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    _join(threads, started + min(NOTICE_SECONDS, seconds))
    waiting = sorted({image.registry for text, image in images.items() if text not in answers})
    if waiting:
        say(f"asking {' and '.join(waiting)} about images ({seconds:.0f} s at most)")
    _join(threads, started + seconds)
    return dict(answers)


@dataclass(frozen=True)
class _UserCache:
    """Manifests of one repository in the user's cache folder."""

    repository: str

    def _file(self, digest: str) -> Path:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        name = f"{fingerprint([VERSION, self.repository, this_architecture()])}-{digest.replace(':', '-')}.json"
        return root / "amlaunch" / "registries" / name

    def get(self, digest: str) -> ImageManifest | None:
        """Return a cached manifest; None if there is none."""
        with suppress(KeyError, TypeError, ValueError):
            entry = read_object(self._file(digest))
            architectures = tuple(str(name) for name in entry["architectures"])
            return ImageManifest(str(entry["digest"]), int(entry["size"]), architectures)
        return None

    def put(self, digest: str, manifest: ImageManifest) -> None:
        """Cache a manifest, unless the home folder cannot be written."""
        entry = {
            "digest": manifest.digest,
            "size": manifest.size,
            "architectures": list(manifest.architectures),
        }
        with suppress(OSError):
            write_json(self._file(digest), entry, durable=False)


def _join(threads: Iterable[threading.Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _with_facts(container: StageContainer, answer: ImageManifest | RegistryError | None) -> StageContainer:
    if not isinstance(answer, ImageManifest):
        return container
    facts = {**container.facts, "bytes": answer.size, "architectures": list(answer.architectures)}
    return replace(container, facts=facts)


def _notes(images: Mapping[str, Reference], answers: Answers, runtimes: Mapping[str, str]) -> Iterator[str]:
    for text, answer in answers.items():
        if isinstance(answer, ImageManifest):
            yield from _architecture_note(text, answer)
        elif answer.status in (401, 403):
            # Registries also give this answer for images that do not exist.
            advice = credentials.login_advice(runtimes[text], images[text].registry, os.environ)
            yield f"{text}: {answer}, or has no image of that name. Check the name. If the image is private, {advice}"
        elif answer.status == 404 and runtimes[text] not in PULLING_RUNTIMES:
            yield f"{text}: {answer}. Only nodes that already have it can start it"


def _architecture_note(text: str, manifest: ImageManifest) -> Iterator[str]:
    if manifest.architectures and this_architecture() not in manifest.architectures:
        yield (
            f"{text} is for {' and '.join(manifest.architectures)}, and this machine is {this_architecture()}; "
            f"{this_architecture()} nodes cannot start it"
        )


def _unanswered_notes(images: Mapping[str, Reference], answers: Answers, seconds: float) -> Iterator[str]:
    """Yield one note for each reason why registries did not answer, with all images that it concerns."""
    texts_by_reason: dict[str, list[str]] = {}
    for text, image in images.items():
        answer = answers.get(text)
        if answer is None:
            texts_by_reason.setdefault(f"{image.registry} did not answer within {seconds:.0f} s", []).append(text)
        elif isinstance(answer, RegistryError) and answer.status not in (401, 403, 404):
            texts_by_reason.setdefault(str(answer), []).append(text)
    for reason, texts in texts_by_reason.items():
        yield f"{reason}; could not check {' and '.join(texts)}. Nodes may still be able to fetch it"
