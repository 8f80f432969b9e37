"""What registries say of a run's images when it is submitted: whether they are there, for which processors, how large."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from containers import Reference, parse, registry
from containers.failures import CREDENTIALS
from containers.registry import Manifest, Unanswered
from launcher.image_tools import this_architecture
from launcher.plan import Container, Plan
from recipes.loader import Loaded

SECONDS = 10.0
"""Nobody waits longer for registries: many a login node reaches none, and nodes may know a way that it does not."""
FROM_REGISTRY = ("pyxis", "enroot", "apptainer", "singularity")
"""These ask the registry for what is not in a cache; the others may have an image of that name that was made there."""
Answers = Mapping[str, Manifest | Unanswered]


@dataclass(frozen=True)
class Seen:
    """What came of it."""

    plan: Plan
    """With the sizes and architectures of its images, where they are known."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def ask(loaded: Loaded, plan: Plan, seconds: float = SECONDS) -> Seen:
    """Look the images of a plan up; one that is no file, and whose registry is silent, stays as it is."""
    images = {stage.container.image: parse(stage.container.image) for stage in plan.stages if stage.container}
    answers = _answers({text: image for text, image in images.items() if image.kind == "registry"}, seconds)
    stages = [replace(stage, container=_with_facts(stage.container, answers.get(stage.container.image))) if stage.container else stage for stage in plan.stages]
    where = f"{loaded.lines.get(('container', 'image'), loaded.path)}: container.image"
    runtimes = {stage.container.image: stage.container.runtime for stage in plan.stages if stage.container}
    missing = [text for text, answer in answers.items() if isinstance(answer, Unanswered) and answer.status == 404]
    problems = [f"{where}: {answers[text]}: {text}; look at the spelling and the tag" for text in missing if runtimes[text] in FROM_REGISTRY]
    return Seen(replace(plan, stages=stages), tuple(problems), tuple(_notes(answers, runtimes)))


def _answers(images: Mapping[str, Reference], seconds: float) -> Answers:
    """What came in time."""
    found: dict[str, Manifest | Unanswered] = {}

    def look() -> None:
        for text, image in images.items():
            try:
                found[text] = registry.look(image, this_architecture(), os.environ, seconds=seconds)
            except Unanswered as error:
                found[text] = error

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    return dict(found)


def _with_facts(container: Container, answer: Manifest | Unanswered | None) -> Container:
    if not isinstance(answer, Manifest):
        return container
    return replace(container, facts={**container.facts, "bytes": answer.size, "architectures": list(answer.architectures)})


def _notes(answers: Answers, runtimes: Mapping[str, str]) -> Iterator[str]:
    for text, answer in answers.items():
        if isinstance(answer, Manifest):
            if answer.architectures and this_architecture() not in answer.architectures:
                yield f"{text} is made for {' and '.join(answer.architectures)}, this machine is {this_architecture()}; nodes that are like it cannot start it"
        elif answer.status in (401, 403):
            yield f"{text}: {answer}; where it is not for everybody: {CREDENTIALS.get(runtimes[text], CREDENTIALS['docker'])}"
        elif answer.status == 404 and runtimes[text] not in FROM_REGISTRY:
            yield f"{text}: {answer}; a node that does not have it already cannot start it"
