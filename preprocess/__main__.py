"""``python -m amlaunch.preprocess``: ``amlaunch preprocess`` and ``amlaunch data``, and the stages of a run.

``element RECIPE --index I --out DIR`` and ``verify RECIPE --out DIR`` are what the launcher starts; anything else is
the command line of ``amlaunch preprocess``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amlaunch.preprocess.errors import Failure, what_the_disk_says
from amlaunch.preprocess.progress import Progress, StopRequested, stop_on_signals
from amlaunch.recipes.errors import BAD_INPUT, FAILED, GO_ON_LATER, OK, BadInput
from amlaunch.recipes.files import write_json
from amlaunch.recipes.format.loader import Loaded, load
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.output import PIPE_CLOSED, forgive_output
from amlaunch.recipes.preprocess_options import add_data_options, add_preprocess_options, refuse_unknown
from amlaunch.recipes.python_process import PARENT_VARIABLE, STDIN_VARIABLE, die_with_parent
from amlaunch.recipes.run_layout import ElementDir


def stage_parser() -> argparse.ArgumentParser:
    """The two stages of a run."""
    top = argparse.ArgumentParser(prog="python -m amlaunch.preprocess", description="Text to token shards.")
    commands = top.add_subparsers(dest="command", required=True)
    element = commands.add_parser("element", help="make one array element's shards, or what is missing of them")
    element.add_argument("--index", type=int, required=True, help="which of preprocess.elements, from 0")
    element.add_argument("--workers", type=int, help="processes (default: preprocess.num_workers, or one a CPU)")
    check = commands.add_parser("verify", help="check every shard of all elements and write the manifest")
    for command in (element, check):
        command.add_argument("recipe", type=Path)
        command.add_argument("--out", type=Path, required=True, help="folder of the shards")
        command.add_argument("--element", type=Path, help="folder for progress.json and result.json")
        command.add_argument("--recipe-dir", type=Path, help="what file targets are relative to")
        command.add_argument("--allow-target", action="append", default=[], metavar="NAME")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What follows ``--`` are overrides of a stage's recipe."""
    if PARENT_VARIABLE in os.environ or STDIN_VARIABLE in os.environ:
        die_with_parent()
    forgive_output()
    try:
        stop_on_signals()
        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where what goes wrong is told
        return code
    except StopRequested as stop:
        print(f"stopped ({stop}); whole shards are kept, the same command goes on from there", flush=True)
        return GO_ON_LATER
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("numpy", "tiktoken", "pyarrow"):
            raise
        print(
            f'error: preprocessing needs {error.name}: pip install "amlaunch[preprocess]"', file=sys.stderr, flush=True
        )
        return BAD_INPUT
    except BrokenPipeError:  # amlaunch data peek … | head
        sys.stderr.close()
        return PIPE_CLOSED
    except (Failure, OSError) as error:
        print(
            f"error: {what_the_disk_says(error) if isinstance(error, OSError) else error}", file=sys.stderr, flush=True
        )
        return FAILED


def run(words: list[str]) -> int:
    """Carry out a command line."""
    if words[:1] == ["data"]:
        parser = argparse.ArgumentParser(prog="amlaunch data", allow_abbrev=False)
        add_data_options(parser)
        from amlaunch.preprocess.stages import inspect_data

        return inspect_data.run(parser.parse_args(words[1:]))
    if words[:1] in (["element"], ["verify"]):
        cut = words.index("--") if "--" in words else len(words)
        return run_stage(stage_parser().parse_args(words[:cut]), words[cut + 1 :])
    parser = argparse.ArgumentParser(
        prog="amlaunch preprocess", description="Text to token shards, verified.", allow_abbrev=False
    )
    add_preprocess_options(parser)
    from amlaunch.preprocess.stages import command

    refuse_unknown(parser, words)
    return command.run(parser.parse_args(words))


def run_stage(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """A stage's work, and its result in the element's folder."""
    loaded, options = _section(arguments, overrides)
    folder = ElementDir(arguments.element) if arguments.element else None
    work = _element if arguments.command == "element" else _verify
    result = work(arguments, options, loaded, Progress(folder))
    if folder is not None:
        write_json(folder.result, result)
    return OK


def _section(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[Loaded, Preprocess]:
    allow = arguments.allow_target
    loaded = load(arguments.recipe, overrides, recipe_dir=arguments.recipe_dir, allow=allow, job_start=True)
    if loaded.recipe.preprocess is None:
        raise BadInput(f"{arguments.recipe}: there is no preprocess section to run")
    return loaded, loaded.recipe.preprocess


def _element(arguments: argparse.Namespace, options: Preprocess, loaded: Loaded, progress: Progress) -> dict[str, Any]:
    from amlaunch.preprocess.stages.element import (  # tiktoken comes in here, behind the signal handlers
        result,
        run_element,
    )

    parts = run_element(options, arguments.index, arguments.out, progress, arguments.workers, loaded.policy)
    return result(parts, options, arguments.index, arguments.out)


def _verify(arguments: argparse.Namespace, options: Preprocess, loaded: Loaded, progress: Progress) -> dict[str, Any]:
    from amlaunch.preprocess.stages.verify import result, verify

    whole = verify(options, arguments.out, progress, loaded.policy)
    progress.finish(whole["tokens"], whole["tokens"], f"{arguments.out}: whole: {whole['tokens']:,} tokens")
    return result(whole, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
