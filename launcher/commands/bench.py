"""``amlaunch bench``: how fast this machine trains, reads and preprocesses, measured by what does that work."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amlaunch.launcher.commands._shared import RECIPE_HELP, accept_overrides, add_allow_target, add_json
from amlaunch.launcher.specs.machine import this_machine
from amlaunch.recipes.errors import BAD_INPUT, INTERRUPTED, OK, BadInput
from amlaunch.recipes.format.units import parse_count
from amlaunch.recipes.python_process import PARENT_VARIABLE, python_command

PASSED = ("steps", "warmup", "profiled")
BYTES_PER_TOKEN = 6
"""At most, of code: what is asked for is then there with any tokenizer that is no worse than GPT-2's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of ``amlaunch bench`` and their arguments."""
    targets = parser.add_subparsers(dest="what", required=True, metavar="train|data|preprocess")
    train = _add_measurement(targets, "train", "training steps of a recipe: tokens/s, MFU, memory, time by activity")
    train.add_argument(
        "--profiled", type=int, metavar="N", help="steps to run under torch's profiler after those (3); 0: none"
    )
    train.add_argument("--keep", metavar="DIR", help="keep the trace and the metrics in this folder")
    _add_measurement(targets, "data", "reading the batches of a recipe, without training")
    text = "text to verified shards, as one process"
    preprocess = targets.add_parser("preprocess", help=text, description=f"{text[0].upper()}{text[1:]}.")
    preprocess.add_argument(
        "recipe", nargs="?", help="recipe whose preprocess section to use (default: Python sources of this machine)"
    )
    preprocess.add_argument("--max-tokens", default="20M", metavar="N", help="number of tokens (20M)")
    preprocess.add_argument("--tokenizer", metavar="NAME", help="as for amlaunch preprocess")
    preprocess.add_argument("--engine", choices=["auto", "tiktoken", "gigatoken"])
    preprocess.add_argument("--num-workers", type=int, metavar="N", help="processes (one per CPU)")
    add_json(preprocess, "print the result as JSON on stdout")
    accept_overrides(preprocess, "[RECIPE]")  # only to say that it takes none
    preprocess.usage = f"{preprocess.prog} [RECIPE] [options]"


def _add_measurement(targets: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add the arguments that ``bench train`` and ``bench data`` share."""
    parser: argparse.ArgumentParser = targets.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("recipe", nargs="?", help=f"{RECIPE_HELP} (nanogpt)")
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
    parser.add_argument("--steps", type=int, metavar="N", help="steps to measure (20)")
    parser.add_argument("--warmup", type=int, metavar="N", help="steps before those (5)")
    add_allow_target(parser)
    add_json(parser, "print the result as JSON on stdout")
    accept_overrides(parser, "[RECIPE]")
    return parser


def run(options: argparse.Namespace) -> int:
    """Measure, and return the exit code."""
    if options.what == "preprocess":
        return preprocess(options)
    check_gpus(options)
    for package in ("torch", "numpy", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(
                f"{package} is not installed here: pip install 'amlaunch[train]', or run this on a node that has it"
            )
    words = [options.what, options.recipe or "nanogpt", *words_of(options), *options.overrides]
    return waited([*python_command("amlaunch.trainer.tools.bench"), *words], environment(options.gpus))[0]


def check_gpus(options: argparse.Namespace) -> None:
    """BadInput where there are not as many GPUs as are asked for."""
    asked, there = options.gpus or 0, len(this_machine().gpus)
    if asked < 0:
        raise BadInput(f"--gpus {asked}: write a number from 0 on")
    if asked > there:
        raise BadInput(
            f"--gpus {asked}: this machine has {there} GPUs" + ("; --gpus 0 measures on the CPU" if there == 0 else "")
        )
    if asked > 1 and options.what == "data":
        raise BadInput(f"--gpus {asked}: one rank's reading is measured; write 1, or 0 for the CPU")


def waited(words: list[str], env: dict[str, str], stdout: int | None = None) -> tuple[int, bytes]:
    """A command's exit code, and what it said where ``stdout`` is a pipe.

    Ctrl-C reaches the command as well, which then ends by itself and leaves nothing behind; a third one does not wait for that.
    """
    child = subprocess.Popen(words, env={**env, PARENT_VARIABLE: str(os.getpid())}, stdout=stdout)
    for _ in range(3):
        try:
            said, _ = child.communicate()
            return child.returncode, said or b""
        except KeyboardInterrupt:
            continue
    child.kill()
    return INTERRUPTED, b""


def words_of(options: argparse.Namespace) -> list[str]:
    """The options that ``python -m amlaunch.trainer.tools.bench`` has too, as it takes them."""
    words = [f"--{name}={getattr(options, name)}" for name in PASSED if getattr(options, name, None) is not None]
    words += [
        f"--{name}={Path(getattr(options, name)).absolute()}"
        for name in ("data", "keep")
        if getattr(options, name, None)
    ]
    words += [f"--ranks={options.gpus}"] if options.what == "train" and (options.gpus or 0) > 1 else []
    words += [f"--allow-target={name}" for name in options.allow_target]
    return [*words, "--json"] if options.json else words


def environment(gpus: int | None) -> dict[str, str]:
    """``--gpus 0`` is the CPU."""
    return {**os.environ, "PYTHONSAFEPATH": "1", **({"AMLAUNCH_DEVICE": "cpu"} if gpus == 0 else {})}


def preprocess(options: argparse.Namespace) -> int:
    """The whole process from text to verified shards: of a recipe, or of text that this machine has."""
    if options.overrides:
        raise BadInput(
            f"{options.overrides[0].partition('=')[0]}: bench preprocess changes no key of a recipe; its own options are in amlaunch bench preprocess --help"
        )
    with tempfile.TemporaryDirectory(prefix="amlaunch-bench-") as folder:
        words = ["--output-dir", f"{folder}/shards", "--max-tokens", options.max_tokens, "--json"]
        if options.recipe:
            words.insert(0, options.recipe)
        else:
            text = Path(folder) / "text.jsonl"
            write_text(text, BYTES_PER_TOKEN * tokens_of(options.max_tokens))
            words += ["--data-files", str(text)]
        for name in ("tokenizer", "engine", "num_workers"):
            if getattr(options, name) is not None:
                words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        began = time.perf_counter()
        code, said = waited([*python_command("amlaunch.preprocess"), *words], environment(None), stdout=subprocess.PIPE)
        seconds = time.perf_counter() - began
        if code:
            if code != BAD_INPUT:  # of which it has spoken
                print("nothing was measured", file=sys.stderr)
            return code
        made = json.loads(said)
    report = {
        "seconds": seconds,
        "tokens": made["tokens"],
        "documents": made["documents"],
        "text_bytes": made["text_bytes"],
        "tokens_per_s": made["tokens"] / seconds,
        "mb_per_s": made["text_bytes"] / seconds / 1e6,
        "tokenizer": made["tokenizer"]["name"],
        "source": options.recipe or "text of this machine",
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(
            f"{report['tokens_per_s']:,.0f} tokens/s, {report['mb_per_s']:.1f} MB/s of text: {report['tokens']:,} tokens of {report['documents']:,} documents "
            f"({report['source']}, {report['tokenizer']}) in {seconds:.1f} s, from the start of the process to verified shards"
        )
    return OK


def tokens_of(text: str) -> int:
    """What ``--max-tokens`` says. Raises BadInput."""
    try:
        return parse_count(text)
    except ValueError as error:
        raise BadInput(f"--max-tokens {text!r}: write {error}") from None


def write_text(path: Path, size: int) -> None:
    """Documents of Python's own sources, as JSON lines, ``size`` bytes of text or a little more."""
    written = 0
    with open(path, "w", encoding="utf-8") as out:
        while written < size:
            for text in sources():
                out.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                if written >= size:
                    return
            if not written:
                raise BadInput(f"{sysconfig.get_path('stdlib')} has no Python sources to measure with; name a recipe")


def sources() -> Iterator[str]:
    """The texts of the standard library's modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
