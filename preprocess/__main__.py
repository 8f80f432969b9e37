"""``python -m amlaunch.preprocess``: ``amlaunch preprocess``, ``amlaunch data``, and the stages of a run.

The launcher starts ``element RECIPE --index I --out DIR`` and ``verify RECIPE --out DIR``; anything else is the command
line of ``amlaunch preprocess``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amlaunch.preprocess.errors import ExternalFailure, describe_os_error
from amlaunch.preprocess.progress import Progress, StopRequested, stop_on_signals
from amlaunch.recipes.errors import BAD_INPUT, FAILED, OK, RESUMABLE, BadInput
from amlaunch.recipes.files import write_json
from amlaunch.recipes.format.loader import LoadedRecipe, load
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.output import PIPE_CLOSED, tolerate_unreadable_output
from amlaunch.recipes.preprocess_options import add_data_options, add_preprocess_options, refuse_unknown_options
from amlaunch.recipes.python_process import PARENT_VARIABLE, STDIN_VARIABLE, die_with_parent
from amlaunch.recipes.run_layout import ElementDir

OPTIONAL_PACKAGES = ("numpy", "tiktoken", "pyarrow")
"""Packages of the extra ``preprocess``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; for a stage, the arguments after ``--`` are overrides of its recipe."""
    if PARENT_VARIABLE in os.environ or STDIN_VARIABLE in os.environ:
        die_with_parent()
    tolerate_unreadable_output()
    try:
        stop_on_signals()
        code = run(list(sys.argv[1:] if argv is None else argv))
        # Flush here, where errors of stdout are handled.
        sys.stdout.flush()
        return code
    except StopRequested as stop:
        print(f"stopped ({stop}). Finished shards are kept; run the same command again to continue", flush=True)
        return RESUMABLE
    except BadInput as error:
        return _print_error(error, BAD_INPUT)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL_PACKAGES:
            raise
        return _print_error(f'preprocessing needs {error.name}: pip install "amlaunch[preprocess]"', BAD_INPUT)
    except BrokenPipeError:
        # amlaunch data peek … | head
        sys.stderr.close()
        return PIPE_CLOSED
    except OSError as error:
        return _print_error(describe_os_error(error), FAILED)
    except ExternalFailure as error:
        return _print_error(error, FAILED)


def _print_error(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def run(argv: list[str]) -> int:
    """Run a command line and return the exit code."""
    if argv[:1] == ["data"]:
        return run_data(argv[1:])
    if argv[:1] in (["element"], ["verify"]):
        separator = argv.index("--") if "--" in argv else len(argv)
        return run_stage(stage_parser().parse_args(argv[:separator]), argv[separator + 1 :])
    return run_preprocess(argv)


def run_data(argv: list[str]) -> int:
    """Run ``amlaunch data``."""
    parser = argparse.ArgumentParser(prog="amlaunch data", allow_abbrev=False)
    add_data_options(parser)
    from amlaunch.preprocess.stages import inspect_data

    return inspect_data.run(parser.parse_args(argv))


def run_preprocess(argv: list[str]) -> int:
    """Run ``amlaunch preprocess``."""
    parser = argparse.ArgumentParser(
        prog="amlaunch preprocess", description="Tokenise text into verified shards.", allow_abbrev=False
    )
    add_preprocess_options(parser)
    from amlaunch.preprocess.stages import command

    refuse_unknown_options(argv)
    return command.run(parser.parse_args(argv))


def stage_parser() -> argparse.ArgumentParser:
    """Return the parser of the two stages of a run."""
    parser = argparse.ArgumentParser(prog="python -m amlaunch.preprocess", description="Tokenise text into shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    element = commands.add_parser("element", help="make the missing shards of one array element")
    element.add_argument("--index", type=int, required=True, help="element, from 0 to preprocess.elements - 1")
    element.add_argument("--workers", type=int, help="processes (default: preprocess.num_workers, or one per CPU)")
    verify = commands.add_parser("verify", help="check every shard of all elements and write the manifest")
    for command in (element, verify):
        command.add_argument("recipe", type=Path)
        command.add_argument("--out", type=Path, required=True, help="folder of the shards")
        command.add_argument("--element", type=Path, help="folder for progress.json and result.json")
        command.add_argument("--recipe-dir", type=Path, help="folder that file targets are relative to")
        command.add_argument("--allow-target", action="append", default=[], metavar="NAME")
    return parser


def run_stage(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run a stage, and write its result to the element's folder."""
    loaded, options = _load_section(arguments, overrides)
    folder = ElementDir(arguments.element) if arguments.element else None
    stage = _run_element if arguments.command == "element" else _run_verify
    result = stage(arguments, options, loaded, Progress(folder))
    if folder is not None:
        write_json(folder.result, result)
    return OK


def _load_section(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[LoadedRecipe, Preprocess]:
    loaded = load(
        arguments.recipe,
        overrides,
        recipe_dir=arguments.recipe_dir,
        allow=arguments.allow_target,
        job_start=True,
    )
    if loaded.recipe.preprocess is None:
        raise BadInput(f"{arguments.recipe}: this recipe has no preprocess section")
    return loaded, loaded.recipe.preprocess


def _run_element(
    arguments: argparse.Namespace, options: Preprocess, loaded: LoadedRecipe, progress: Progress
) -> dict[str, Any]:
    # Imports tiktoken, which takes a while: only after the signal handlers are installed.
    from amlaunch.preprocess.stages.element import element_result, run_element

    parts = run_element(options, arguments.index, arguments.out, progress, arguments.workers, loaded.policy)
    return element_result(parts, options, arguments.index, arguments.out)


def _run_verify(
    arguments: argparse.Namespace, options: Preprocess, loaded: LoadedRecipe, progress: Progress
) -> dict[str, Any]:
    from amlaunch.preprocess.stages.verify import verify, verify_result

    manifest = verify(options, arguments.out, progress, loaded.policy)
    tokens = manifest["tokens"]
    progress.finish(tokens, tokens, f"{arguments.out}: verified: {tokens:,} tokens")
    return verify_result(manifest, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
