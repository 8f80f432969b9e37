"""``amlaunch bench``: measure how fast this machine trains, reads and preprocesses."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from amlaunch.launcher.commands._shared import (
    RECIPE_HELP,
    accept_overrides,
    add_allow_target_option,
    add_json_option,
    process_environment,
    require_packages,
)
from amlaunch.launcher.specs.machine import this_machine
from amlaunch.recipes.errors import BAD_INPUT, INTERRUPTED, OK, BadInput
from amlaunch.recipes.format.units import parse_count
from amlaunch.recipes.output import counted
from amlaunch.recipes.python_process import PARENT_VARIABLE, python_command

MAX_BYTES_PER_TOKEN = 6
"""For source code with GPT-2's tokenizer or a better one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of ``amlaunch bench`` and their arguments."""
    targets = parser.add_subparsers(dest="what", required=True, metavar="train|data|preprocess")
    train = _add_measurement(
        targets, "train", "measure training steps of a recipe: tokens/s, MFU, memory, time by activity"
    )
    train.add_argument(
        "--profiled", type=int, metavar="N", help="steps to profile after the measured ones (default: 3; 0: none)"
    )
    train.add_argument("--keep", metavar="DIR", help="keep the trace and the metrics in this folder")
    _add_measurement(targets, "data", "measure reading the batches of a recipe, without training")
    text = "measure preprocessing in one process, from text to verified shards"
    preprocess = targets.add_parser("preprocess", help=text, description=f"{text[0].upper()}{text[1:]}.")
    preprocess.add_argument(
        "recipe", nargs="?", help="recipe whose preprocess section to use (default: Python sources of this machine)"
    )
    preprocess.add_argument("--max-tokens", default="20M", metavar="N", help="number of tokens (default: 20M)")
    preprocess.add_argument("--tokenizer", metavar="NAME", help="as for amlaunch preprocess")
    preprocess.add_argument("--engine", choices=["auto", "tiktoken", "gigatoken"])
    preprocess.add_argument("--num-workers", type=int, metavar="N", help="processes (default: one per CPU)")
    add_json_option(preprocess, "print the result as JSON on stdout")
    # Accepted only to say that it takes none.
    accept_overrides(preprocess, "[RECIPE]")
    preprocess.usage = f"{preprocess.prog} [RECIPE] [options]"


def _add_measurement(targets: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add the arguments that ``bench train`` and ``bench data`` share."""
    parser: argparse.ArgumentParser = targets.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("recipe", nargs="?", help=f"{RECIPE_HELP} (default: nanogpt)")
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="ranks, each on a GPU of this machine; 0 measures the CPU (default: one GPU, if there is one)",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of shards (default: the recipe's dataset.file_pattern, else synthetic tokens)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps to measure (default: 20)")
    parser.add_argument("--warmup", type=int, metavar="N", help="warm-up steps before the measured ones (default: 5)")
    add_allow_target_option(parser)
    add_json_option(parser, "print the result as JSON on stdout")
    accept_overrides(parser, "[RECIPE]")
    return parser


def run(options: argparse.Namespace) -> int:
    """Measure, and return the exit code."""
    if options.what == "preprocess":
        return _bench_preprocess(options)
    _check_gpus(options)
    require_packages("torch", "numpy", "safetensors")
    arguments = [options.what, options.recipe or "nanogpt", *_trainer_arguments(options), *options.overrides]
    command = [*python_command("amlaunch.trainer.tools.bench"), *arguments]
    gpus = len(this_machine().gpus) if options.gpus is None else options.gpus
    return _run_process(command, process_environment(gpus=gpus))[0]


def _check_gpus(options: argparse.Namespace) -> None:
    """Raise BadInput for more GPUs than this machine has, or than the measurement uses."""
    gpus, available = options.gpus or 0, len(this_machine().gpus)
    if gpus < 0:
        raise BadInput(f"--gpus {gpus}: expected an integer of at least 0")
    if gpus > available:
        remedy = f"; write --gpus {available} or less" if available else "; to measure the CPU, write --gpus 0"
        raise BadInput(f"--gpus {gpus}: this machine has {counted(available, 'GPU')}{remedy}")
    if gpus > 1 and options.what == "data":
        raise BadInput(f"--gpus {gpus}: bench data measures one rank; write --gpus 1, or --gpus 0 for the CPU")


def _trainer_arguments(options: argparse.Namespace) -> list[str]:
    """Return the options as ``python -m amlaunch.trainer.tools.bench`` takes them."""
    arguments = []
    for name in ("steps", "warmup", "profiled"):
        value = getattr(options, name, None)
        if value is not None:
            arguments.append(f"--{name}={value}")
    for name in ("data", "keep"):
        folder = getattr(options, name, None)
        if folder:
            arguments.append(f"--{name}={Path(folder).absolute()}")
    if options.what == "train" and (options.gpus or 0) > 1:
        arguments.append(f"--ranks={options.gpus}")
    arguments += [f"--allow-target={name}" for name in options.allow_target]
    return [*arguments, "--json"] if options.json else arguments


def _run_process(command: Sequence[str], env: Mapping[str, str], stdout: int | None = None) -> tuple[int, bytes]:
    """Run a process; return its exit code, and its output if ``stdout`` is a pipe.

    Ctrl-C also reaches the process, which then cleans up and exits; a third Ctrl-C kills it.
    """
    child = subprocess.Popen(command, env={**env, PARENT_VARIABLE: str(os.getpid())}, stdout=stdout)
    for _ in range(3):
        try:
            output, _ = child.communicate()
            return child.returncode, output or b""
        except KeyboardInterrupt:
            continue
    child.kill()
    return INTERRUPTED, b""


# --- preprocess


def _bench_preprocess(options: argparse.Namespace) -> int:
    """Measure preprocessing from text to verified shards, on a recipe's text or on this machine's Python sources."""
    if options.overrides:
        option = options.overrides[0].partition("=")[0]
        raise BadInput(f"{option}: bench preprocess accepts no recipe overrides; see amlaunch bench preprocess --help")
    with tempfile.TemporaryDirectory(prefix="amlaunch-bench-") as folder:
        command = [*python_command("amlaunch.preprocess"), *_preprocess_arguments(options, Path(folder))]
        started = time.perf_counter()
        code, output = _run_process(command, process_environment(), stdout=subprocess.PIPE)
        seconds = time.perf_counter() - started
    if code:
        # The process has explained invalid input.
        if code != BAD_INPUT:
            print("preprocessing failed; nothing was measured", file=sys.stderr)
        return code

    result = json.loads(output)
    report = {
        "seconds": seconds,
        "tokens": result["tokens"],
        "documents": result["documents"],
        "text_bytes": result["text_bytes"],
        "tokens_per_s": result["tokens"] / seconds,
        "mb_per_s": result["text_bytes"] / seconds / 1e6,
        "tokenizer": result["tokenizer"]["name"],
        "source": options.recipe or "Python sources of this machine",
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(
            f"{report['tokens_per_s']:,.0f} tokens/s, {report['mb_per_s']:.1f} MB/s of text: "
            f"{counted(report['tokens'], 'token')} from {counted(report['documents'], 'document')} "
            f"({report['source']}, {report['tokenizer']}) in {seconds:.1f} s, "
            "from the start of the process to verified shards"
        )
    return OK


def _preprocess_arguments(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the arguments of the measured process; its text, if there is no recipe, is written to ``folder``."""
    arguments = ["--output-dir", f"{folder}/shards", "--max-tokens", options.max_tokens, "--json"]
    if options.recipe:
        arguments.insert(0, options.recipe)
    else:
        text = folder / "text.jsonl"
        _write_text(text, MAX_BYTES_PER_TOKEN * _parse_max_tokens(options.max_tokens))
        arguments += ["--data-files", str(text)]
    for name in ("tokenizer", "engine", "num_workers"):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def _parse_max_tokens(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise BadInput(f"--max-tokens {text!r}: expected {error}") from None


def _write_text(path: Path, size: int) -> None:
    """Write Python's own sources as JSON lines, at least ``size`` bytes of text. Raises BadInput if there are none."""
    written = 0
    with open(path, "w", encoding="utf-8") as out:
        while written < size:
            for text in _python_sources():
                out.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                if written >= size:
                    return
            if not written:
                folder = sysconfig.get_path("stdlib")
                raise BadInput(
                    f"{folder} has no Python sources to measure with; name a recipe: amlaunch bench preprocess RECIPE"
                )


def _python_sources() -> Iterator[str]:
    """Yield the texts of the standard library's modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
