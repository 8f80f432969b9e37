"""The command line: what can be typed. Each command's work is imported when it is run, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import NoReturn

from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.preprocess_options import add_data_options, add_preprocess_options
from amlaunch.recipes.version import VERSION

EPILOG = """\
Any key of a recipe can be changed on the command line: --model.n_layer 6, --optimizer.betas.0 0.8,
--wandb null. Exit codes: 0 done, 1 something failed, 2 the input cannot work, 75 stopped on request
with everything saved (the same command goes on from there), 130 ended by Ctrl-C.
"""
GUIDE_SECTIONS = ("rng", "dist_env")
CHANGE_RECIPES = ("local", "submit", "show", "resume", "retry", "export", "bench", "plan-memory")
"""Commands that take overrides of a recipe (retry, to say that it does not)."""


class Parser(argparse.ArgumentParser):
    """One whose errors are a line of ours, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raises BadInput."""
        raise BadInput(f"{message}; {self.prog} --help says more")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser: argparse.ArgumentParser = Parser(
        prog="amlaunch",
        description="One YAML recipe from raw text to a trained language model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"amlaunch {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_local(commands)
    _add_submit(commands)
    _add_show(commands)
    _add_preprocess(commands)
    _add_data(commands)
    _add_status(commands)
    _add_logs(commands)
    _add_cancel(commands)
    _add_retry(commands)
    _add_resume(commands)
    _add_wait(commands)
    _add_export(commands)
    _add_generate(commands)
    _add_clean(commands)
    _add_doctor(commands)
    _add_image(commands)
    _add_bench(commands)
    _add_plan_memory(commands)
    _add_recipes(commands)
    _add_completion(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a recipe that comes with amlaunch")
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs to train on; 0 is the CPU (default: as the recipe says, if they are there)",
    )
    parser.add_argument("--stage", metavar="S", help="only this stage")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="train once for each value (repeat it for a grid)",
    )
    parser.add_argument(
        "--allow-target", action="append", default=[], metavar="NAME", help="let _target_ reach NAME too"
    )
    _add_runs(parser)
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.usage = f"amlaunch {parser.prog.split()[-1]} [RECIPE] [options] [--section.key VALUE ...]"


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        metavar="DIR",
        help="where the run directories are (default: $AMLAUNCH_RUNS, the cluster profile's runs, or ./runs)",
    )


def _add_local(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands, "local", "run a recipe on this machine; without one, the quickstart (nanogpt with --gpus N)"
    )
    _add_recipe_arguments(parser)


def _add_submit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "submit", "check a recipe and a cluster, then hand all stages to Slurm")
    _add_recipe_arguments(parser)
    parser.add_argument(
        "--cluster",
        default="slurm",
        metavar="NAME",
        help="a profile of clusters.yaml, a file, or built in: slurm (asks Slurm), local",
    )
    parser.add_argument("--dry-run", action="store_true", help="print exactly the scripts that would be submitted")
    parser.add_argument("--wait", action="store_true", help="stay until the run has ended; the exit code says how")


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands, "show", "print a recipe as it resolves, and the plan: stages, elements, what would be skipped"
    )
    _add_recipe_arguments(parser)


def _add_preprocess(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add_preprocess_options(_command(commands, "preprocess", "turn text into verified token shards, without a run"))


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add_data_options(_command(commands, "data", "look into shards: inspect, verify, peek"))


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "status", "list the runs, or show one with its stages and elements")
    parser.add_argument("run", nargs="*", help="a run's id, the start of it, its recipe's name, or its folder")
    parser.add_argument("--watch", action="store_true", help="redraw until the run has ended (Ctrl-C leaves)")
    parser.add_argument(
        "--all", action="store_true", help="every element of a large stage, not only those that want attention"
    )
    _add_runs(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_logs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "logs", "print what the ranks of a run wrote, each line with its origin")
    parser.add_argument("run", help="a run's id, the start of it, its recipe's name, or its folder")
    parser.add_argument("--stage", metavar="S", help="default: the newest that has logs")
    parser.add_argument("--element", metavar="E", help="default: all")
    parser.add_argument("--rank", type=int, metavar="R", help="default: all")
    parser.add_argument("--attempt", type=int, metavar="N", help="default: the newest of each element")
    parser.add_argument("-f", "--follow", action="store_true", help="go on while the run goes on")
    _add_runs(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's id, the start of it, its recipe's name, or its folder")
    _add_runs(parser)


def _add_cancel(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "cancel", "end what runs and what waits")
    _add_run(parser)
    parser.add_argument("--checkpoint", action="store_true", help="what runs saves first, and is waited for")


def _add_retry(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "retry", "start again what failed, was cancelled or lost, and nothing else")
    _add_run(parser)
    parser.add_argument("--wait", action="store_true", help="stay until the run has ended; the exit code says how")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def _add_resume(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "resume", "go on with a run, with more steps or nodes: --step_scheduler.max_steps 2000")
    _add_run(parser)
    parser.add_argument("--cluster", metavar="NAME", help="another cluster than before")
    parser.add_argument("--wait", action="store_true", help="stay until the run has ended; the exit code says how")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.usage = "amlaunch resume RUN [options] [--section.key VALUE ...]"


def _add_wait(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "wait", "wait until a run has ended; the exit code says how")
    _add_run(parser)
    parser.add_argument("--json", action="store_true", help="the run as JSON on stdout, when it has ended")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--element", metavar="E", help="of a sweep, which of its trainings")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint after this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint of the lowest validation loss")


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "export", "write a checkpoint as a folder that transformers loads")
    _add_checkpoint(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder to write (default: in the run's export folder)")


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "generate", "print text that a checkpoint's model writes")
    _add_checkpoint(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the text begins with")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="how many tokens to write (default: the recipe's)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest (default: the recipe's)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest (default: the recipe's)")
    parser.add_argument("--seed", type=int, metavar="S", help="another seed, another text (default: the recipe's)")


def _add_clean(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "clean", "show what can be removed; --yes removes it")
    parser.add_argument("run", nargs="*", help="whole runs; without one, what no run needs (shards, half-made files)")
    parser.add_argument(
        "--checkpoints", action="store_true", help="of the runs, only the checkpoints before the newest"
    )
    parser.add_argument("--yes", action="store_true", help="remove it")
    _add_runs(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "doctor", "say what this machine or a cluster has, and write a profile of it")
    parser.add_argument("--cluster", metavar="NAME", help="check this profile")
    parser.add_argument(
        "--gpu", action="store_true", help="run a check on one GPU node: matrix products, memory, all-reduce"
    )
    parser.add_argument("--save", metavar="FILE", help="write the profile here (default: print it)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    what = _command(commands, "bench", "measure this machine: train, data, preprocess").add_subparsers(
        dest="what", required=True, metavar="train|data|preprocess"
    )
    for name, text in (
        ("train", "steps of a recipe's training: tokens/s, MFU, memory, and where the time goes"),
        ("data", "reading a recipe's batches, without training"),
    ):
        parser = _command(what, name, text)
        parser.add_argument(
            "recipe", nargs="?", help="a YAML file, or the name of a recipe that comes with amlaunch (nanogpt)"
        )
        parser.add_argument(
            "--gpus",
            type=int,
            metavar="N",
            help="ranks on the GPUs of this machine; 0 is the CPU (default: one, where there is one)",
        )
        parser.add_argument(
            "--data",
            metavar="DIR",
            help="folder of shards (default: what dataset.file_pattern says, else tokens are made up)",
        )
        parser.add_argument("--steps", type=int, metavar="N", help="steps that are measured (20)")
        parser.add_argument("--warmup", type=int, metavar="N", help="steps before those (5)")
        if name == "train":
            parser.add_argument(
                "--profiled", type=int, metavar="N", help="steps under torch's profiler after those (3); 0: none"
            )
            parser.add_argument("--keep", metavar="DIR", help="keep the trace and the metrics here")
        parser.add_argument(
            "--allow-target", action="append", default=[], metavar="NAME", help="let _target_ reach NAME too"
        )
        parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
        parser.usage = f"amlaunch bench {name} [RECIPE] [options] [--section.key VALUE ...]"
    parser = _command(what, "preprocess", "text to verified shards, as a whole process")
    parser.add_argument(
        "recipe", nargs="?", help="whose preprocess section is meant (default: Python sources of this machine)"
    )
    parser.add_argument("--max-tokens", default="20M", metavar="N", help="how much (20M)")
    parser.add_argument("--tokenizer", metavar="NAME", help="as amlaunch preprocess takes it")
    parser.add_argument("--engine", choices=["auto", "tiktoken", "gigatoken"])
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes (one a CPU)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def _add_plan_memory(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "plan-memory",
        "predict what a recipe's training needs of each GPU's memory, and whether it fits, without a GPU",
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with amlaunch")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks in all (default: as the recipe says)")
    parser.add_argument(
        "--gpu-memory", default="80GB", metavar="SIZE", help="of each GPU, such as 80GB or 141GB (80GB)"
    )
    parser.add_argument(
        "--allow-target", action="append", default=[], metavar="NAME", help="let _target_ reach NAME too"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.usage = "amlaunch plan-memory RECIPE [options] [--section.key VALUE ...]"


def _add_completion(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "completion", "print a completion script for the shell")
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def _add_image(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    image = _command(
        commands, "image", "containers' images: fetch and convert once for all nodes, look into them, build one"
    )
    actions = image.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)

    fetch = _command(actions, "import", "fetch an image and convert it once, for all nodes")
    fetch.add_argument(
        "image",
        help="nvcr.io/nvidia/pytorch:25.08-py3, a tar of docker save or of an OCI layout, oci:DIR, a root file system's tar, podman://NAME, dockerd://NAME",
    )
    _add_making(fetch)
    fetch.add_argument("--arch", metavar="NAME", help="amd64 or arm64, where the nodes are not as this machine")
    fetch.add_argument(
        "--tool",
        metavar="NAME",
        help="what fetches it: skopeo, podman, docker, buildah, enroot, apptainer (default: the first that is there)",
    )
    fetch.add_argument(
        "--insecure",
        action="store_true",
        help="let the registry speak plain HTTP, or have a certificate that nobody signed",
    )

    build = _command(actions, "build", "build an image with amlaunch and its compiled packages in, and import it")
    build.add_argument(
        "--base",
        metavar="IMAGE",
        help="the image to build on; give a digest to pin it: nvcr.io/nvidia/pytorch@sha256:...",
    )
    build.add_argument("--file", metavar="FILE", help="another Dockerfile (default: amlaunch's own; --print shows it)")
    build.add_argument(
        "--packages",
        metavar="NAMES",
        help="what to install into it, as pip takes it (default: what preprocessing and wandb need)",
    )
    build.add_argument("--wheels", metavar="DIR", help="install from this folder of wheels, without a network")
    build.add_argument("--tag", metavar="NAME", help="what the image is called (default: amlaunch:VERSION)")
    build.add_argument(
        "--tool", metavar="NAME", help="what builds it: buildah, podman or docker (default: the first that is there)"
    )
    build.add_argument("--no-import", action="store_true", help="leave it in the tool's own storage")
    build.add_argument(
        "--print", action="store_true", dest="print_only", help="print the Dockerfile, and build nothing"
    )
    _add_making(build)

    show = _command(actions, "list", "list the images that are there, with their sizes and what checks saw")
    _add_images(show)
    show.add_argument("--json", action="store_true", help="as JSON")

    check = _command(
        actions,
        "check",
        "start an image and print what is in it: Python, torch, CUDA, NCCL, cuDNN, GPUs, whether the mounts can be written",
    )
    check.add_argument(
        "image", help="a reference, a file, a name or the start of a digest as amlaunch image list shows them"
    )
    _add_images(check)
    check.add_argument("--runtime", metavar="NAME", help="what starts it (default: as the site has it)")
    check.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SRC:DST[:ro]",
        help="mount it too, and say whether it can be written (repeat it)",
    )
    check.add_argument("--gpus", type=int, metavar="N", help="with --cluster: ask for a node with so many GPUs")
    check.add_argument(
        "--has", metavar="NAMES", help="start nothing; write down that these packages are in it (tiktoken,datasets)"
    )
    check.add_argument("--json", action="store_true", help="as JSON")


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="the folder of images (default: $AMLAUNCH_IMAGES, the profile's image_folder, or images beside the runs)",
    )
    parser.add_argument("--cluster", metavar="NAME", help="the profile whose folder and runtime are meant")


def _add_making(parser: argparse.ArgumentParser) -> None:
    _add_images(parser)
    parser.add_argument(
        "--format", choices=["sqsh", "sif"], help="what to convert to (default: sif for apptainer, else sqsh)"
    )
    parser.add_argument(
        "--tmp", metavar="DIR", help="where downloads and half-made files go (default: in the folder of images)"
    )
    parser.add_argument("--json", action="store_true", help="the image as JSON on stdout")


def _add_recipes(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "recipes", "list the recipes that come with amlaunch")
    parser.add_argument("--json", action="store_true", help="as JSON")


def split_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, allowed: bool = True
) -> tuple[list[str], list[str]]:
    """``(arguments for the parser, overrides)``. Raises BadInput for an unknown option, with the nearest one.

    Where overrides are ``allowed``, an option that the parser does not know is
    one if it begins with a section of a recipe, and takes the next word as its
    value, so argparse never mistakes ``6`` in ``--model.n_layer 6`` for the recipe.
    """
    options = {name: action for action in parser._actions for name in action.option_strings}
    ours: list[str] = []
    overrides: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("-") or word == "-" or word[1:2].isdigit():
            ours.append(word)
        elif word == "--":
            return [*ours, word, *words], overrides
        elif name in options:
            ours.append(word)
            if not equals and options[name].nargs is None and words:
                ours.append(words.pop(0))
        else:
            _refuse_unknown(name, list(options), allowed)
            overrides.append(word)
            if not equals and words and not words[0].startswith("--"):
                overrides.append(words.pop(0))
    return ours, overrides


def sweep_overrides(axes: Sequence[str]) -> list[str]:
    """``--sweep optimizer.lr=1e-4,3e-4`` as overrides of the recipe's ``sweep`` section; a mapping is taken as it is."""
    found = []
    for axis in axes:
        key, equals, values = axis.partition("=")
        if axis.lstrip().startswith("{") or axis.strip() in ("null", "none"):
            found.append(f"--sweep={axis}")
        elif not equals or not values or not key.strip():
            raise BadInput(f"--sweep {axis}: an axis is KEY=V1,V2, such as optimizer.lr=1e-4,3e-4")
        else:
            found.append(f"--sweep.{key}=[{values.strip('[]')}]")
    keys = [axis.partition("=")[0] for axis in axes]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise BadInput(f"--sweep {twice} is given twice; one axis takes all its values: --sweep {twice}=V1,V2")
    return found


def _refuse_unknown(name: str, options: list[str], overrides: bool) -> None:
    """A word that is no section of a recipe, or not where those can be changed, was meant as an option."""
    sections = _sections() if overrides else []
    if not name.startswith("--") or name[2:].split(".")[0] not in (*sections, *(GUIDE_SECTIONS if overrides else ())):
        near = did_you_mean(name, [*options, *(f"--{section}" for section in sections)])
        raise BadInput(f"unknown option {name}; {near}")


def _sections() -> list[str]:
    from dataclasses import fields

    from amlaunch.recipes.format.schema import Recipe

    return [field.name for field in fields(Recipe)]


def _parser_of(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[argparse.ArgumentParser, int]:
    """The parser of the command that ``words`` begin with, and how many words name it: ``data inspect`` are two.

    Raises BadInput for a first word that is neither a command nor an option of amlaunch itself.
    """
    depth = 0
    while depth < len(words) and (commands := _commands_of(parser)):
        word = words[depth]
        if word.startswith("-"):
            known = [name for action in parser._actions for name in action.option_strings]
            if word.partition("=")[0] not in known:
                raise BadInput(f"unknown option {word}; the command comes first: amlaunch COMMAND {word}")
            break
        if word not in commands:
            named = " ".join(words[: depth + 1])
            raise BadInput(f"no command {named!r}; {did_you_mean(word, list(commands))}")
        parser, depth = commands[word], depth + 1
    return parser, depth


def _commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(found, {}))


def run(argv: Sequence[str]) -> int:
    """Parse, then hand over to the command's own module; returns the exit code."""
    parser = build_parser()
    words = list(argv)
    own, depth = _parser_of(parser, words)
    words[depth:], overrides = split_overrides(own, words[depth:], allowed=depth > 0 and words[0] in CHANGE_RECIPES)
    options = parser.parse_args(words)
    if options.command is None:
        parser.print_help()
        return 0
    options.overrides = [*overrides, *sweep_overrides(getattr(options, "sweep", []))]
    options.argv = ["amlaunch", *argv]
    options.parser = parser
    module = importlib.import_module(f"amlaunch.launcher.commands.{options.command.replace('-', '_')}")
    return int(module.run(options))
