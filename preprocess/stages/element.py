"""One array element of the preprocess stage: its parts, made by worker processes.

Whether a budget needs a part is known only after the parts before it are counted. So parts are made from the front, as
many as the counts so far suggest, and each with no more tokens than can still be needed;
:mod:`amlaunch.preprocess.stages.verify` then cuts the last one to the token. The final output depends only on the
source and the options.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.shards.output_folder import PART_VERSION, FinishedPart, OutputDir
from amlaunch.preprocess.shards.shard_format import MAX_TOKENS, index_path
from amlaunch.preprocess.sources.file_parts import MIN_PART_BYTES, assign_parts, assign_val_tokens
from amlaunch.preprocess.sources.source import Source, open_source
from amlaunch.preprocess.stages.part_writer import (
    PartProgress,
    PreprocessContext,
    make_part,
    read_finished_part,
)
from amlaunch.preprocess.stages.workers import Send, Work, available_cpus, run_tasks
from amlaunch.preprocess.tokenizers.engine import choose_engine, open_engine
from amlaunch.preprocess.tokenizers.tokenizer import Tokenizer, load_tokenizer
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json, read_object, reason_not_writable, write_json
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.recipes.output import counted

ESTIMATE_MARGIN = 1.03
"""A part is not needed if the estimate for the parts before it exceeds the budget by this factor."""
REFRESH_SECONDS = 2.0
"""Between two looks at the parts that other elements have finished."""

PartTask = tuple[int, int | None]
"""A part to make, and the most tokens of it that are needed (None: all)."""


def check_options(options: Preprocess) -> None:
    """Raise BadInput if the options leave nothing to train on, or if the format has no such large shards."""
    max_tokens, val_tokens = options.max_tokens, options.val_tokens
    if not 0 < options.shard_tokens <= MAX_TOKENS:
        raise BadInput(
            f"preprocess.shard_tokens: expected 1 to {MAX_TOKENS:,} (the header counts tokens in an int32), got "
            f"{options.shard_tokens:,}"
        )
    if max_tokens is not None and max_tokens < 1:
        raise BadInput("preprocess.max_tokens: 0 leaves nothing to train on. For the entire source, set it to null")
    if max_tokens is not None and val_tokens >= max_tokens:
        raise BadInput(
            f"preprocess.val_tokens: {val_tokens:,} of max_tokens {max_tokens:,} leaves nothing to train on; "
            "lower val_tokens"
        )


def check_output_dir(out: Path) -> None:
    """Raise BadInput if ``out`` cannot be created or written to, before any work; does not create it."""
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir():
        raise BadInput(f"preprocess.output_dir: {out}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"preprocess.output_dir: {out}: {existing} is not writable ({reason_not_writable(existing)})")


def open_context(
    options: Preprocess, out: Path, log: Callable[[str], None], policy: TargetPolicy | None = None
) -> PreprocessContext:
    """Open source, tokenizer and everything else that the parts of ``out`` share.

    Raises BadInput and ExternalFailure like :func:`amlaunch.preprocess.sources.source.open_source` and
    :func:`amlaunch.preprocess.tokenizers.tokenizer.load_tokenizer`.
    """
    check_options(options)
    check_output_dir(out)
    source = open_source(options, policy)
    tokenizer = load_tokenizer(options.tokenizer)
    engine = choose_engine(options.engine, tokenizer)
    return PreprocessContext(
        out=OutputDir(out),
        source=source,
        tokenizer=tokenizer,
        open_engine=lambda: open_engine(engine, tokenizer, options.bos),
        origin=origin_of(options, source, tokenizer),
        val_tokens=assign_val_tokens(source.sizes, options.val_tokens),
        shard_tokens=options.shard_tokens,
        skip_damaged=options.on_error == "skip",
        log=log,
    )


def origin_of(options: Preprocess, source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe everything that the shards' bytes depend on."""
    names = ("max_tokens", "val_tokens", "shard_tokens", "bos", "on_error")
    return {
        "source": source.identity(),
        "tokenizer": tokenizer.identity(),
        "options": {name: getattr(options, name) for name in names},
        "layout": PART_VERSION,
        "parts": len(source.sizes),
    }


class BudgetTracker:
    """Decides which parts a budget needs, from the token counts of the parts that are finished."""

    def __init__(self, context: PreprocessContext, budget: int | None):
        self.context = context
        self.budget = budget
        self.sizes = context.source.sizes
        self.tokens: dict[int, int] = {}
        """Tokens of each finished part."""
        self.complete: set[int] = set()
        """Finished parts that the budget did not cut."""
        self._last_refresh = -REFRESH_SECONDS

    def add(self, part: FinishedPart) -> None:
        """Count a finished part."""
        self.tokens[part.number] = part.cursor.tokens
        self.complete.discard(part.number)
        if part.complete:
            self.complete.add(part.number)

    def refresh(self) -> None:
        """Count the parts that other elements have finished, if there is a budget."""
        if self.budget is None or time.monotonic() - self._last_refresh < REFRESH_SECONDS:
            return
        self._last_refresh = time.monotonic()
        for path in self.context.out.root.glob("part-*.json"):
            number = path.stem.removeprefix("part-")
            if not number.isdigit() or int(number) in self.tokens or int(number) >= len(self.sizes):
                continue
            part = read_finished_part(self.context, int(number))
            if part is not None:
                self.add(part)

    def tokens_left(self, part: int) -> int | None:
        """Return the most tokens of a part that can be needed; None without a budget."""
        if self.budget is None:
            return None
        return self.budget - sum(tokens for other, tokens in self.tokens.items() if other < part)

    def is_spent_before(self, part: int) -> bool:
        """Return True if the finished parts before this one fill the budget."""
        tokens_left = self.tokens_left(part)
        return tokens_left is not None and tokens_left <= 0

    def is_needed(self, part: int) -> bool:
        """Return False if the parts before this one fill the budget, as counted or, with a margin, as estimated."""
        if self.budget is None:
            return True
        return not self.is_spent_before(part) and self._estimate_tokens_before(part) < ESTIMATE_MARGIN * self.budget

    def expected_tokens(self, parts: Sequence[int]) -> int | None:
        """Estimate the tokens of the budget that will come from ``parts``.

        None without a budget. Before any part is complete: the budget's share by size.
        """
        if self.budget is None:
            return None
        rate = self._tokens_per_byte()
        if not rate:
            share = sum(self.sizes[part] + 1 for part in parts) / sum(size + 1 for size in self.sizes)
            return round(self.budget * share)

        selected, before, expected = set(parts), 0.0, 0.0
        for part in range(len(self.sizes)):
            tokens = min(self.tokens.get(part, rate * self.sizes[part]), self.budget - before)
            before += tokens
            if part in selected:
                expected += tokens
        return round(expected)

    def _estimate_tokens_before(self, part: int) -> float:
        """Sum the tokens before ``part``: counted, or estimated by size."""
        rate = self._tokens_per_byte()
        return sum(self.tokens.get(other, rate * self.sizes[other]) for other in range(part))

    def _tokens_per_byte(self) -> float:
        """Return the average of the complete parts; 0 before there are any."""
        size = sum(self.sizes[part] + 1 for part in self.complete)
        return sum(self.tokens[part] for part in self.complete) / size if size else 0.0


class ElementWork:
    """The work of one element: parts finished and parts waiting, and its progress."""

    def __init__(self, context: PreprocessContext, options: Preprocess, index: int, progress: Progress):
        self.context = context
        self.index = index
        self.progress = progress
        self.budget = BudgetTracker(context, options.max_tokens)
        owners = assign_parts(context.source.sizes, options.elements)
        self.parts = [part for part, owner in enumerate(owners) if owner == index]
        """All parts of this element."""
        self.waiting = list(self.parts)
        self.finished: dict[int, FinishedPart] = {}
        self.workers = 1
        self._part_progress: dict[int, PartProgress] = {}
        self._totals_at_start = PartProgress(-1, 0, 0, 0)

    def run(self, workers: int) -> None:
        """Make all parts that are needed; ``workers`` 0: in this process."""
        self.collect_finished()
        self._totals_at_start = self.totals()
        self.progress.begin(self._totals_at_start.tokens)
        if self.finished:
            self.progress.log(
                f"element {self.index}: resuming after {counted(len(self.finished), 'finished part')} "
                f"({self._totals_at_start.tokens:,} tokens)"
            )
        self.workers = max(1, min(workers, len(self.waiting)))
        if not self.waiting:
            return
        if workers:
            run_tasks(self.workers, self.next_task, self.start_worker, self.on_message, self.report)
        else:
            self._run_in_this_process()

    def _run_in_this_process(self) -> None:
        def send(kind: str, value: Any) -> None:
            self.on_message(kind, value)
            self.report()

        work = self.start_worker()
        while (task := self.next_task()) is not None:
            send("done", work(task, send))

    def collect_finished(self) -> None:
        """Take over the parts that earlier runs have finished."""
        self.budget.refresh()
        on_disk = [part for number in self.parts if (part := read_finished_part(self.context, number))]

        # All of them are counted before the first is judged.
        for part in on_disk:
            self.budget.add(part)
        for part in on_disk:
            if self.has_all_needed(part):
                self.add_finished(part)
                self.waiting.remove(part.number)

    def has_all_needed(self, part: FinishedPart) -> bool:
        """Return True if a finished part holds all tokens of it that can be needed."""
        tokens_left = self.budget.tokens_left(part.number)
        return part.complete or (tokens_left is not None and part.cursor.tokens >= tokens_left)

    def add_finished(self, part: FinishedPart) -> None:
        """Record a finished part."""
        self.finished[part.number] = part
        self.budget.add(part)
        self._part_progress[part.number] = PartProgress(
            part.number, part.cursor.tokens, part.documents, part.text_bytes
        )

    def next_task(self) -> PartTask | None:
        """Return the next part to make; None if no further one is known to be needed."""
        self.budget.refresh()
        while self.waiting and self.budget.is_spent_before(self.waiting[0]):
            self.waiting.pop(0)
        if not self.waiting or not self.budget.is_needed(self.waiting[0]):
            return None
        part = self.waiting.pop(0)
        return part, self.budget.tokens_left(part)

    def on_message(self, kind: str, value: Any) -> None:
        """Handle a worker's message."""
        if kind == "progress":
            self._part_progress[value.part] = value
        elif kind == "log":
            self.progress.log(value)
        elif kind == "done":
            self.add_finished(value)
            shards = value.shards[0].file if len(value.shards) == 1 else counted(len(value.shards), "shard")
            self.progress.log(
                f"part {value.number}: {value.cursor.tokens:,} tokens, {counted(value.documents, 'document')}, {shards}"
            )

    def totals(self) -> PartProgress:
        """Sum the progress of all parts of the element."""
        parts = self._part_progress.values()
        return PartProgress(
            part=-1,
            tokens=sum(part.tokens for part in parts),
            documents=sum(part.documents for part in parts),
            text_bytes=sum(part.text_bytes for part in parts),
        )

    def report(self) -> None:
        """Report progress. Raises StopRequested if the element is asked to stop."""
        totals = self.totals()
        expected = self.budget.expected_tokens(self.parts)
        total = fraction = None
        if expected is not None:
            total = max(expected, totals.tokens)
        else:
            sizes = self.context.source.sizes
            fraction = sum(sizes[part] + 1 for part in self.finished) / sum(sizes[part] + 1 for part in self.parts)

        new_bytes = totals.text_bytes - self._totals_at_start.text_bytes
        mb_per_s = round(new_bytes / max(self.progress.seconds(), 1e-9) / 1e6, 1)
        self.progress.update(
            totals.tokens, total, fraction, documents=totals.documents, workers=self.workers, mb_per_s=mb_per_s
        )

    def start_worker(self) -> Work:
        """Create the engine of a worker process, and return the function that makes parts in it."""
        engine = self.context.open_engine()

        def work(task: PartTask, send: Send) -> FinishedPart:
            context = dataclasses.replace(
                self.context,
                report=lambda progress: send("progress", progress),
                log=lambda line: send("log", line),
            )
            return make_part(context, engine, *task)

        return work


def run_element(
    options: Preprocess,
    index: int,
    out: Path,
    progress: Progress,
    workers: int | None = None,
    policy: TargetPolicy | None = None,
) -> list[FinishedPart]:
    """Make the missing parts of element ``index`` in the folder ``out``; return all its finished parts.

    ``workers``: processes; None: ``num_workers``, or one per CPU; 0: only this process. Raises BadInput (the recipe,
    the source, or a folder with another origin), ExternalFailure and StopRequested; the same call then continues.
    """
    if not 0 <= index < options.elements:
        raise BadInput(
            f"--index {index}: must be 0 to {options.elements - 1}, because preprocess.elements is {options.elements}"
        )
    context = open_context(options, out, progress.log, policy)
    check_elements(options, context)
    check_origin(context.out, index, context.origin)

    element = ElementWork(context, options, index, progress)
    workers = workers if workers is not None else options.num_workers or available_cpus()
    if workers > len(element.parts) and sum(context.source.sizes) > workers * MIN_PART_BYTES:
        progress.log(
            f"element {index}: only {len(element.parts)} of {workers} workers have work. To use all of them, set "
            f"preprocess.parts: {workers * options.elements}, or provide more files"
        )
    element.run(workers)

    record = {"element": index, "elements": options.elements, "parts": sorted(element.finished)}
    if read_object(context.out.element(index)) != record:
        write_json(context.out.element(index), record)

    parts = [element.finished[number] for number in sorted(element.finished)]
    totals = element.totals()
    message = f"element {index}: {summarize(parts)}"
    progress.finish(totals.tokens, totals.tokens, message, documents=totals.documents)
    return parts


def check_elements(options: Preprocess, context: PreprocessContext) -> None:
    """Raise BadInput if there are more elements than parts."""
    parts = len(context.source.sizes)
    if options.elements > parts:
        raise BadInput(
            f"preprocess.elements: {options.elements}, but the source has only {counted(parts, 'part')}. Set it "
            f"to at most {parts}, or set preprocess.parts to at least {options.elements}"
        )


def check_origin(folder: OutputDir, index: int, origin: dict[str, Any]) -> None:
    """Write the origin of this element. Raises BadInput if the folder holds shards of another origin.

    An attempt that made no shard may have met a damaged text, which is corrected by now: its origin is dropped.
    """
    has_shards = bool(folder.shards_on_disk())
    for path in folder.origins():
        try:
            existing = read_json(path)
        except ValueError as error:
            raise BadInput(f"{error}. Remove {folder.root}, or set another preprocess.output_dir") from None
        changes = list_changes(existing, origin) if existing is not None else []
        if changes and has_shards:
            raise BadInput(different_origin_message(folder.root, f"{folder.root}: its shards were", changes))
        if changes:
            path.unlink(missing_ok=True)
    if not folder.origin(index).exists():
        write_json(folder.origin(index), origin)


def different_origin_message(folder: Path, subject: str, changes: Sequence[str]) -> str:
    """Return the message for shards of another origin in ``folder``; ``subject`` is their noun and verb."""
    return (
        f"{subject} made with a different source, tokenizer or options: {'; '.join(changes)}. "
        f"If no other run needs them: rm -r {shlex.quote(str(folder))}; else set another preprocess.output_dir"
    )


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """List the differences between two origins, as ``key was this, is now that``."""
    changes = []
    for key in dict.fromkeys([*old, *new]):
        old_value, new_value = old.get(key), new.get(key)
        if isinstance(old_value, Mapping) and isinstance(new_value, Mapping):
            changes += list_changes(old_value, new_value, f"{path}{key}.")
        elif old_value != new_value:
            changes.append(f"{path}{key} was {old_value!r}, is now {new_value!r}")
    return changes


def skipped_records(parts: Sequence[FinishedPart]) -> dict[str, int]:
    """Count the records without a document, by reason."""
    counts: dict[str, int] = {}
    for part in parts:
        for reason, count in part.cursor.skipped.items():
            counts[reason] = counts.get(reason, 0) + count
    return counts


def summarize(parts: Sequence[FinishedPart]) -> str:
    """Describe finished parts in one line."""
    train, val = sum(part.cursor.train for part in parts), sum(part.cursor.val for part in parts)
    documents, shards = sum(part.documents for part in parts), sum(len(part.shards) for part in parts)
    counts = f"{counted(documents, 'document')}, {counted(shards, 'shard')}"
    text = f"{train:,} train and {val:,} val tokens, {counts}"
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped_records(parts).items()))
    return f"{text} (skipped: {skipped})" if skipped else text


def element_result(parts: Sequence[FinishedPart], options: Preprocess, index: int, out: Path) -> dict[str, Any]:
    """Return the contents of the element's ``result.json``.

    With a budget, verify may still cut the shards, so they are outputs of verify then.
    """
    folder = OutputDir(out.absolute())
    outputs = [folder.element(index)]
    if options.max_tokens is None:
        shards = [folder.root / entry.file for part in parts for entry in part.shards]
        outputs += [*shards, *map(index_path, shards), *(folder.part(part.number) for part in parts)]
    train, val = sum(part.cursor.train for part in parts), sum(part.cursor.val for part in parts)
    return {
        "tokens": train + val,
        "documents": sum(part.documents for part in parts),
        "shards": sum(len(part.shards) for part in parts),
        "skipped": skipped_records(parts),
        "train_tokens": train,
        "val_tokens": val,
        "outputs": {str(path): path.stat().st_size for path in outputs},
    }
