"""One array element: the parts that are its own, made by worker processes.

Which parts a budget needs is only known when those before them are counted.
So parts are made from the front, as many as the counts so far say will be
needed, and each with no more tokens than can still be needed;
:mod:`~amlaunch.preprocess.stages.verify` then cuts the last one to the token. What is left in
the end is a function of the source and the options alone.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.shards.output_folder import PART_VERSION, OutputDir, Part
from amlaunch.preprocess.shards.shard_format import MAX_TOKENS, index_path
from amlaunch.preprocess.sources.file_parts import SMALLEST, owners, val_shares
from amlaunch.preprocess.sources.source import Source, open_source
from amlaunch.preprocess.stages.part_writer import Beat, Context, make_part, whole_part
from amlaunch.preprocess.stages.workers import cpus, run_tasks
from amlaunch.preprocess.tokenizers.engine import choose, open_engine
from amlaunch.preprocess.tokenizers.tokenizer import Tokenizer, load_tokenizer
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json, read_object, write_json
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.targets import Policy

MARGIN = 1.03
"""Tokens that the parts before one must have by estimate, over the budget, for it not to be needed."""
REFRESH_SECONDS = 2.0
"""Between two looks at what other elements have finished."""


def check_options(options: Preprocess) -> None:
    """Raise BadInput where the options leave nothing to train on, or no shard can be so large."""
    total, val = options.max_tokens, options.val_tokens
    if not 0 < options.shard_tokens <= MAX_TOKENS:
        raise BadInput(
            f"preprocess.shard_tokens: {options.shard_tokens:,}: a shard holds 1 to {MAX_TOKENS:,} tokens (its count is an int32)"
        )
    if total is not None and total < 1:
        raise BadInput("preprocess.max_tokens: 0 tokens are nothing to train on; null is all of the source")
    if total is not None and val >= total:
        raise BadInput(f"preprocess.val_tokens: {val:,} of max_tokens {total:,} leave nothing to train on")


def check_folder(out: Path) -> None:
    """Raise BadInput where no file can be made in ``out``, before any work: a folder that is not there yet may still be made."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise BadInput(f"preprocess.output_dir: {out}: {there} is a file, and a folder is wanted")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"preprocess.output_dir: {out}: no right to write in {there}")


def prepare(options: Preprocess, out: Path, say: Callable[[str], None], policy: Policy | None = None) -> Context:
    """Open source, tokenizer and engine, and all that the parts of ``out`` have in common.

    Raises BadInput and Failure as :func:`amlaunch.preprocess.sources.source.open_source` and
    :func:`preprocess.tokenizer.load_tokenizer` do.
    """
    check_options(options)
    check_folder(out)
    source = open_source(options, policy)
    tokenizer = load_tokenizer(options.tokenizer)
    engine = choose(options.engine, tokenizer)
    return Context(
        out=OutputDir(out),
        source=source,
        tokenizer=tokenizer,
        engine=lambda: open_engine(engine, tokenizer, options.bos),
        origin=describe(options, source, tokenizer),
        val=val_shares(source.sizes, options.val_tokens),
        shard=options.shard_tokens,
        skip_bad=options.on_error == "skip",
        say=say,
    )


def describe(options: Preprocess, source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the shards' bytes are a function of."""
    names = ("max_tokens", "val_tokens", "shard_tokens", "bos", "on_error")
    limits = {name: getattr(options, name) for name in names}
    made = {"layout": PART_VERSION, "parts": len(source.sizes)}
    return {"source": source.identity(), "tokenizer": tokenizer.identity(), "options": limits, **made}


class Board:
    """What is known of all parts of a folder: which are finished, and with how many tokens."""

    def __init__(self, context: Context, budget: int | None):
        self.context = context
        self.budget = budget
        self.sizes = context.source.sizes
        self.tokens: dict[int, int] = {}
        self.complete: set[int] = set()
        self._looked = -REFRESH_SECONDS

    def note(self, part: Part) -> None:
        """A part is finished."""
        self.tokens[part.part] = part.cursor.tokens
        self.complete.discard(part.part)
        if part.complete:
            self.complete.add(part.part)

    def refresh(self) -> None:
        """See what others have finished, where a budget makes that matter."""
        if self.budget is None or time.monotonic() - self._looked < REFRESH_SECONDS:
            return
        self._looked = time.monotonic()
        for path in self.context.out.root.glob("part-*.json"):
            number = path.stem.removeprefix("part-")
            if number.isdigit() and int(number) not in self.tokens and int(number) < len(self.sizes):
                found = whole_part(self.context, int(number))
                if found is not None:
                    self.note(found)

    def left(self, part: int) -> int | None:
        """The most tokens of a part that can be of use; None without a budget."""
        if self.budget is None:
            return None
        return self.budget - sum(tokens for other, tokens in self.tokens.items() if other < part)

    def needed(self, part: int) -> bool:
        """Whether a part is needed, as far as can be said now: certainly not where the counts before it reach the budget."""
        left = self.left(part)
        if left is None:
            return True
        return left > 0 and self._estimate(part) < MARGIN * (self.budget or 0)

    def expected(self, parts: Sequence[int]) -> int | None:
        """Tokens of the budget that will come from ``parts``, by what is known so far.

        None without a budget. Before any part is complete: their share by size of the whole budget.
        """
        if self.budget is None:
            return None
        rate = self._rate()
        if not rate:
            return round(
                self.budget * sum(self.sizes[part] + 1 for part in parts) / sum(size + 1 for size in self.sizes)
            )
        own, before, found = set(parts), 0.0, 0.0
        for part in range(len(self.sizes)):
            tokens = min(self.tokens.get(part, rate * self.sizes[part]), self.budget - before)
            found += tokens if part in own else 0
            before += tokens
        return round(found)

    def _estimate(self, part: int) -> float:
        """Tokens before ``part``: counted, or as the parts that are complete have them by byte."""
        rate = self._rate()
        return sum(self.tokens.get(other, rate * self.sizes[other]) for other in range(part))

    def _rate(self) -> float:
        """Tokens a byte of the parts that are complete; 0 before there are any."""
        size = sum(self.sizes[other] + 1 for other in self.complete)
        return sum(self.tokens[other] for other in self.complete) / size if size else 0.0


class Element:
    """What one element still has to do, and how far it is."""

    def __init__(self, context: Context, options: Preprocess, index: int, progress: Progress):
        self.context = context
        self.index = index
        self.progress = progress
        self.board = Board(context, options.max_tokens)
        self.mine = [
            part for part, owner in enumerate(owners(context.source.sizes, options.elements)) if owner == index
        ]
        self.waiting = list(self.mine)
        self.made: dict[int, Part] = {}
        self.beats: dict[int, Beat] = {}
        self.before = Beat(-1, 0, 0, 0)
        """What was there at the start."""
        self.workers = 1

    def gather(self) -> None:
        """Take over what earlier runs have finished."""
        self.board.refresh()
        for part in self.mine:
            found = whole_part(self.context, part)
            if found is not None:
                self.board.note(found)
        for part in list(self.waiting):
            found = whole_part(self.context, part)
            if found is not None and self.still_good(found):
                self.take(found)
                self.waiting.remove(part)

    def still_good(self, part: Part) -> bool:
        """Whether a finished part has all that can be needed of it."""
        left = self.board.left(part.part)
        return part.complete or (left is not None and part.cursor.tokens >= left)

    def take(self, part: Part) -> None:
        """A part is finished."""
        self.made[part.part] = part
        self.board.note(part)
        self.beats[part.part] = Beat(
            part.part, part.cursor.tokens, part.documents, sum(entry.text_bytes for entry in part.shards)
        )

    def next_task(self) -> tuple[int, int | None] | None:
        """The next part to make, with the most tokens that are of use; None where none is known to be needed."""
        self.board.refresh()
        while self.waiting and (left := self.board.left(self.waiting[0])) is not None and left <= 0:
            self.waiting.pop(0)
        if not self.waiting or not self.board.needed(self.waiting[0]):
            return None
        part = self.waiting.pop(0)
        return part, self.board.left(part)

    def hear(self, _worker: int, kind: str, value: Any) -> None:
        """What a worker says."""
        if kind == "beat":
            self.beats[value.part] = value
        elif kind == "line":
            self.progress.say(value)
        elif kind == "done":
            self.take(value)
            shards = f"{len(value.shards)} shards" if len(value.shards) != 1 else value.shards[0].file
            self.progress.say(
                f"part {value.part}: {value.cursor.tokens:,} tokens, {value.documents:,} documents, {shards}"
            )

    def totals(self) -> Beat:
        """Over all parts of the element so far."""
        beats = self.beats.values()
        return Beat(-1, sum(b.tokens for b in beats), sum(b.documents for b in beats), sum(b.text_bytes for b in beats))

    def idle(self) -> None:
        """Say how far it is. Raises StopRequested where the element is asked to leave."""
        now = self.totals()
        sizes = self.board.sizes
        done, all_ = (sum(sizes[part] + 1 for part in parts) for parts in (self.made, self.mine))
        expected = self.board.expected(self.mine)
        total = None if expected is None else max(expected, now.tokens)
        speed = (now.text_bytes - self.before.text_bytes) / max(self.progress.seconds(), 1e-9) / 1e6
        self.progress.update(
            now.tokens, total, done / all_ if self.board.budget is None else None,
            documents=now.documents, workers=self.workers, mb_per_s=round(speed, 1),
        )  # fmt: skip

    def work(self, task: tuple[int, int | None], say: Callable[[str, Any], None]) -> Part:
        """Make one part (in a worker)."""
        context = dataclasses.replace(
            self.context, report=lambda beat: say("beat", beat), say=lambda line: say("line", line)
        )
        return make_part(context, self.engine, *task)

    def start(self) -> Callable[[tuple[int, int | None], Callable[[str, Any], None]], Part]:
        """Make a worker ready."""
        self.engine = self.context.engine()
        return self.work

    def run(self, workers: int) -> None:
        """Make all parts that are needed; ``workers`` 0: in this very process."""
        self.gather()
        self.before = self.totals()
        self.progress.begin(self.before.tokens)
        if self.made:
            self.progress.say(
                f"element {self.index}: goes on after {len(self.made)} whole parts ({self.before.tokens:,} tokens)"
            )
        self.workers = max(1, min(workers, len(self.waiting)))
        if workers == 0:
            self._run_here()
        elif self.waiting:
            run_tasks(self.workers, self.next_task, self.start, self.hear, self.idle)

    def _run_here(self) -> None:
        def say(kind: str, value: Any) -> None:
            self.hear(0, kind, value)
            self.idle()

        work = self.start() if self.waiting else None
        while work is not None and (task := self.next_task()) is not None:
            say("done", work(task, say))


def run_element(
    options: Preprocess,
    index: int,
    out: Path,
    progress: Progress,
    workers: int | None = None,
    policy: Policy | None = None,
) -> list[Part]:
    """Make element ``index``'s parts in the folder ``out``, or what is missing of them, and return those that it made.

    ``workers``: processes; None: ``num_workers``, or one a CPU; 0: none but this. Raises BadInput (the recipe, the
    source, or a folder made from something else), Failure, and StopRequested; the same call then goes on.
    """
    if not 0 <= index < options.elements:
        raise BadInput(
            f"--index {index}: preprocess.elements is {options.elements}, so it goes from 0 to {options.elements - 1}"
        )
    context = prepare(options, out, progress.say, policy)
    check_elements(options, context)
    check_origin(context.out, index, context.origin)
    element = Element(context, options, index, progress)
    workers = workers if workers is not None else options.num_workers or cpus()
    if workers > len(element.mine) and sum(context.source.sizes) > workers * SMALLEST:
        wanted = workers * options.elements
        progress.say(
            f"element {index}: {len(element.mine)} of {workers} workers have something to do; more files, or preprocess.parts: {wanted}, keep all busy"
        )
    element.run(workers)
    parts = [element.made[part] for part in sorted(element.made)]
    record = {"element": index, "elements": options.elements, "parts": sorted(element.made)}
    if read_object(context.out.element(index)) != record:
        write_json(context.out.element(index), record)
    progress.finish(
        element.totals().tokens,
        element.totals().tokens,
        f"element {index}: {summary(parts)}",
        documents=element.totals().documents,
    )
    return parts


def check_elements(options: Preprocess, context: Context) -> None:
    """Raise BadInput where there are more elements than parts."""
    if options.elements > (there := len(context.source.sizes)):
        raise BadInput(
            f"preprocess.elements: {options.elements} elements, but the source is cut into {there} parts: set it to at "
            f"most {there}, or preprocess.parts to at least {options.elements}"
        )


def check_origin(folder: OutputDir, index: int, origin: dict[str, Any]) -> None:
    """Write down what this element is made from. Raises BadInput where the folder was made from something else."""
    for path in folder.origins():
        try:
            there = read_json(path)
        except ValueError as error:
            raise BadInput(f"{error}; remove {folder.root} or choose another output_dir") from None
        if there is not None and (differing := differences(there, origin)):
            raise BadInput(
                f"{folder.root}: its shards were made from something else: {'; '.join(differing)}. "
                f"Remove the folder, or choose another preprocess.output_dir"
            )
    if not folder.origin(index).exists():
        write_json(folder.origin(index), origin)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two descriptions, as ``key: this, now that``."""
    found = []
    for key in dict.fromkeys([*there, *here]):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append(f"{path}{key} was {old!r}, is {new!r}")
    return found


def skipped_in(parts: Sequence[Part]) -> dict[str, int]:
    """Records without a document, by reason."""
    found: dict[str, int] = {}
    for part in parts:
        for reason, count in part.cursor.skipped.items():
            found[reason] = found.get(reason, 0) + count
    return found


def summary(parts: Sequence[Part]) -> str:
    """Finished parts in a line."""
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped_in(parts).items()))
    train, val = (sum(getattr(part.cursor, split) for part in parts) for split in ("train", "val"))
    documents, shards = sum(part.documents for part in parts), sum(len(part.shards) for part in parts)
    return f"{train:,} train and {val:,} val tokens, {documents:,} documents, {shards} shards" + (
        f" (skipped: {skipped})" if skipped else ""
    )


def result(parts: Sequence[Part], options: Preprocess, index: int, out: Path) -> dict[str, Any]:
    """What the element says of itself in ``result.json``.

    With a budget its shards may still be cut: verify vouches for them then.
    """
    root = out.absolute()
    paths = [OutputDir(root).element(index)]
    if options.max_tokens is None:
        shards = [root / entry.file for part in parts for entry in part.shards]
        paths += [*shards, *map(index_path, shards), *(OutputDir(root).part(part.part) for part in parts)]
    train, val = (sum(getattr(part.cursor, split) for part in parts) for split in ("train", "val"))
    return {
        "tokens": train + val,
        "documents": sum(part.documents for part in parts),
        "shards": sum(len(part.shards) for part in parts),
        "skipped": skipped_in(parts),
        "train_tokens": train,
        "val_tokens": val,
        "outputs": {str(path): path.stat().st_size for path in paths},
    }
