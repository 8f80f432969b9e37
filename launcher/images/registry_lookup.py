"""What registries say of a run's images when it is submitted: whether they are there, for which processors, how large."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from amlaunch.containers.images import credentials, registry
from amlaunch.containers.images.registry import Manifest, Unanswered
from amlaunch.containers.runtimes.catalog import Reference, parse
from amlaunch.launcher.images.tools import Say, this_architecture
from amlaunch.launcher.specs.plan import Plan, StageContainer
from amlaunch.recipes.files import fingerprint, read_object, write_json
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.version import VERSION

SECONDS = 3.0
"""Nobody waits longer for all registries: many a login node reaches none, and nodes may know a way that it does not."""
SILENT_SECONDS = 1.0
"""After so long it is said what is waited for."""
FROM_REGISTRY = ("pyxis", "enroot", "apptainer", "singularity")
"""These ask the registry for what is not in a cache; the others may have an image of that name that was made there."""
LEARNT = ("bytes", "architectures")
"""Of an image's facts, those that a registry says."""
Answers = Mapping[str, Manifest | Unanswered]


@dataclass(frozen=True)
class Seen:
    """What came of it."""

    plan: Plan
    """With the sizes and architectures of its images, where they are known."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def ask(loaded: LoadedRecipe, plan: Plan, say: Say, seconds: float = SECONDS) -> Seen:
    """Look the images of a plan up; one that is no file, and whose registry is silent, stays as it is."""
    images = {stage.container.image: parse(stage.container.image) for stage in plan.stages if stage.container}
    asked = {text: image for text, image in images.items() if image.kind == "registry"}
    answers = _answers(asked, say, seconds)
    stages = [
        replace(stage, container=_with_facts(stage.container, answers.get(stage.container.image)))
        if stage.container
        else stage
        for stage in plan.stages
    ]
    where = f"{loaded.lines.get(('container', 'image'), loaded.path)}: container.image"
    runtimes = {stage.container.image: stage.container.runtime for stage in plan.stages if stage.container}
    missing = [text for text, answer in answers.items() if isinstance(answer, Unanswered) and answer.status == 404]
    problems = [
        f"{where}: {answers[text]}: {text}; look at the spelling and the tag"
        for text in missing
        if runtimes[text] in FROM_REGISTRY
    ]
    return Seen(
        replace(plan, stages=stages),
        tuple(problems),
        (*_notes(asked, answers, runtimes), *_silences(asked, answers, seconds)),
    )


def as_before(run: RunDir, plan: Plan) -> Plan:
    """The plan with what was learnt of its images when the run was submitted before: jobs on their way go by it."""
    known = {
        str(one.get("image")): one.get("facts")
        for stage in read_object(run.plan).get("stages") or []
        if (one := stage.get("container"))
    }

    def of(container: StageContainer | None) -> StageContainer | None:
        facts = known.get(container.image) if container else None
        return (
            replace(container, facts={**container.facts, **{name: facts[name] for name in LEARNT if name in facts}})
            if container and facts
            else container
        )

    return replace(plan, stages=[replace(stage, container=of(stage.container)) for stage in plan.stages])


def _answers(images: Mapping[str, Reference], say: Say, seconds: float) -> Answers:
    """What came in time. All are asked at once: a registry that is silent holds no other one up."""
    found: dict[str, Manifest | Unanswered] = {}

    def look(text: str) -> None:
        try:
            memory = _Memory(f"{images[text].registry}/{images[text].repository}")
            found[text] = registry.look(images[text], this_architecture(), os.environ, seconds=seconds, memory=memory)
        except Unanswered as error:
            found[text] = error

    threads = [threading.Thread(target=look, args=(text,), daemon=True) for text in images]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    _join(threads, began + min(SILENT_SECONDS, seconds))
    waited = sorted({image.registry for text, image in images.items() if text not in found})
    if waited:
        say(f"asking {' and '.join(waited)} for images, {seconds:.0f} s at most")
    _join(threads, began + seconds)
    return dict(found)


@dataclass(frozen=True)
class _Memory:
    """What registries said, in the user's cache."""

    name: str

    def _file(self, digest: str) -> Path:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return (
            root
            / "amlaunch"
            / "registries"
            / f"{fingerprint([VERSION, self.name, this_architecture()])}-{digest.replace(':', '-')}.json"
        )

    def find(self, digest: str) -> Manifest | None:
        """One that was kept."""
        with suppress(KeyError, TypeError, ValueError):
            kept = read_object(self._file(digest))
            return Manifest(str(kept["digest"]), int(kept["size"]), tuple(str(name) for name in kept["architectures"]))
        return None

    def keep(self, digest: str, found: Manifest) -> None:
        """A home that cannot be written only makes it slower."""
        with suppress(OSError):
            write_json(
                self._file(digest),
                {"digest": found.digest, "size": found.size, "architectures": list(found.architectures)},
                durable=False,
            )


def _join(threads: Iterable[threading.Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _with_facts(container: StageContainer, answer: Manifest | Unanswered | None) -> StageContainer:
    if not isinstance(answer, Manifest):
        return container
    return replace(
        container, facts={**container.facts, "bytes": answer.size, "architectures": list(answer.architectures)}
    )


def _notes(images: Mapping[str, Reference], answers: Answers, runtimes: Mapping[str, str]) -> Iterator[str]:
    for text, answer in answers.items():
        if isinstance(answer, Manifest):
            if answer.architectures and this_architecture() not in answer.architectures:
                yield f"{text} is made for {' and '.join(answer.architectures)}, this machine is {this_architecture()}; nodes that are like it cannot start it"
        elif answer.status in (401, 403):  # which registries say of what they do not have, too
            where = credentials.where(runtimes[text], images[text].registry, os.environ)
            yield f"{text}: {answer}, or has no image of that name: look at the spelling; where it is not for everybody: {where}"
        elif answer.status == 404 and runtimes[text] not in FROM_REGISTRY:
            yield f"{text}: {answer}; a node that does not have it already cannot start it"


def _silences(images: Mapping[str, Reference], answers: Answers, seconds: float) -> Iterator[str]:
    """Of each way in which a registry did not say, with the images of which nothing is known."""
    silent: dict[str, list[str]] = {}
    for text, image in images.items():
        answer = answers.get(text)
        if answer is None:
            silent.setdefault(f"{image.registry} did not answer in {seconds:.0f} s", []).append(text)
        elif isinstance(answer, Unanswered) and answer.status not in (401, 403, 404):
            silent.setdefault(str(answer), []).append(text)
    for why, texts in silent.items():
        yield f"{why}; whether it has {' and '.join(texts)} is not known, nor the size; nodes may reach it all the same"
