"""``amlaunch image``: fetch and convert an image once for all nodes, build one, list them, and look into one."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amlaunch import containers
from amlaunch.containers.images.image_store import ImageFolder, read_json, short_digest
from amlaunch.containers.images.reference import BadReference, parse
from amlaunch.containers.runtimes import catalog
from amlaunch.launcher.commands._shared import add_json
from amlaunch.launcher.display import wording
from amlaunch.launcher.images.builder import base_in, build_image, check_base, write_context
from amlaunch.launcher.images.importer import ImportRequest, import_image
from amlaunch.launcher.images.tools import ToolFailed, choose_builder, site_format, this_architecture
from amlaunch.launcher.planning.image_folder import image_folder
from amlaunch.recipes.errors import FAILED, OK, BadInput
from amlaunch.recipes.files import write_json
from amlaunch.recipes.version import VERSION

PLAIN_SECONDS = 5.0
Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of ``amlaunch image`` and their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    _add_import(_action(actions, "import", "import an image and convert it once, for all nodes"))
    _add_build(_action(actions, "build", "build an image with amlaunch and its compiled packages, and import it"))
    _add_list(_action(actions, "list", "list the images with their sizes and the results of checks"))
    text = "start an image and print its contents: Python, torch, CUDA, NCCL, cuDNN, GPUs, writable mounts"
    _add_check(_action(actions, "check", text))


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image",
        help="nvcr.io/nvidia/pytorch:25.08-py3, a tar file of docker save or of an OCI layout, oci:DIR, "
        "podman://NAME, dockerd://NAME",
    )
    _add_conversion(parser)
    parser.add_argument("--arch", metavar="NAME", help="amd64 or arm64, if the nodes differ from this machine")
    parser.add_argument(
        "--tool",
        metavar="NAME",
        help="tool that downloads: skopeo, podman, docker, buildah, enroot, apptainer (default: the first installed)",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="accept a registry with plain HTTP or an untrusted certificate"
    )


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        metavar="IMAGE",
        help="base image; add a digest to pin it: nvcr.io/nvidia/pytorch@sha256:...",
    )
    parser.add_argument("--file", metavar="FILE", help="another Dockerfile (default: amlaunch's own; --print shows it)")
    parser.add_argument(
        "--packages",
        metavar="NAMES",
        help="packages to install, as arguments of pip (default: those of preprocessing and wandb)",
    )
    parser.add_argument("--wheels", metavar="DIR", help="install from this folder of wheels, without a network")
    parser.add_argument("--tag", metavar="NAME", help="name of the image (default: amlaunch:VERSION)")
    parser.add_argument(
        "--tool", metavar="NAME", help="tool that builds: buildah, podman or docker (default: the first installed)"
    )
    parser.add_argument("--no-import", action="store_true", help="leave the image in the storage of the tool")
    parser.add_argument(
        "--print", action="store_true", dest="print_only", help="print the Dockerfile and build nothing"
    )
    _add_conversion(parser)


def _add_list(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    add_json(parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", help="a reference, a file, or a name or the beginning of a digest from amlaunch image list"
    )
    _add_folder(parser)
    parser.add_argument("--runtime", metavar="NAME", help="container runtime (default: that of the site)")
    parser.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SRC:DST[:ro]",
        help="also mount this, and report whether it is writable (repeat it)",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="with --cluster: use a node with this many GPUs")
    parser.add_argument(
        "--has", metavar="NAMES", help="start nothing; record that the image has these packages (tiktoken,datasets)"
    )
    add_json(parser)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="folder of images (default: $AMLAUNCH_IMAGES, the profile's image_folder, or images beside the runs)",
    )
    parser.add_argument("--cluster", metavar="NAME", help="profile whose image folder and runtime to use")


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    parser.add_argument(
        "--format", choices=["sqsh", "sif"], help="format to convert to (default: sif for apptainer, else sqsh)"
    )
    parser.add_argument(
        "--tmp", metavar="DIR", help="folder for downloads and temporary files (default: in the folder of images)"
    )
    add_json(parser, "print the image as JSON on stdout")


def run(options: argparse.Namespace) -> int:
    """Carry out one action; exit code 1 where a tool failed, 2 where what was asked for cannot be."""
    actions = {"import": run_import, "build": run_build, "list": run_list, "check": run_check}
    try:
        with _told_to_end_as_interrupted():
            return actions[options.action](options)
    except ToolFailed as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return FAILED


@contextmanager
def _told_to_end_as_interrupted() -> Iterator[None]:
    """What the tools have begun is ended, however we are told to end."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def folder_of(options: argparse.Namespace) -> tuple[ImageFolder, str]:
    """The folder of images, and the format that the site's runtime starts, of the cluster that was named."""
    if not options.cluster:
        return image_folder(options.images, None), site_format()
    from amlaunch.launcher.specs.cluster_profile import find_cluster  # profiles are read with all that Slurm needs

    profile = find_cluster(options.cluster).profile
    return image_folder(options.images, profile.images), site_format(profile.container.runtime.replace("auto", ""))


# --- import ---------------------------------------------------------------------------------------------


def run_import(options: argparse.Namespace) -> int:
    """Fetch and convert; what is there already is only shown."""
    folder, usual = folder_of(options)
    say = say_for(options)
    work = Path(options.tmp).expanduser().absolute() if options.tmp else None
    request = ImportRequest(
        options.image,
        folder,
        options.format or usual,
        options.arch or this_architecture(),
        options.tool,
        work,
        options.insecure,
    )
    return make(request, options, say)


def make(request: ImportRequest, options: argparse.Namespace, say: Say) -> int:
    """Import, and say where the image is and how to use it."""
    started = time.monotonic()
    try:
        image, made = import_image(request, say, meter_for(options.json, say))
    except KeyboardInterrupt:
        say(
            f"interrupted; what was downloaded stays in {request.work or request.folder.root}, and the same command goes on from it"
        )
        raise
    if options.json:
        print(wording.to_json({**dataclasses.asdict(image), "made": made}))
        return OK
    took = f" in {wording.duration(time.monotonic() - started)}" if made else ""
    say(f"{'made' if made else 'already there:'} {image.path} ({wording.size(image.size)}, {image.digest[:19]}){took}")
    say(f"in a recipe: container.image: {image.path}\nwhat is in it: {wording.program()} image check {image.path}")
    return OK


def say_for(options: argparse.Namespace) -> Say:
    """Words for people; stdout is for JSON where that is asked for."""
    stream = sys.stderr if options.json else sys.stdout
    return lambda text: print(text, file=stream, flush=True)


def meter_for(json: bool, say: Say) -> Callable[[str, int], Any]:
    """How far something is: a bar in a terminal, a line every five seconds elsewhere."""
    return _bar if sys.stdout.isatty() and not json else lambda title, total: _lines(title, total, say)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    shown = BarColumn(24) if total else SpinnerColumn()
    columns = [TextColumn("{task.description}"), shown, TextColumn("{task.fields[size]}"), TimeElapsedColumn()]
    started = time.monotonic()
    with Progress(*columns, console=wording.console(), transient=True) as progress:
        task = progress.add_task(title, total=total or None, size="")
        yield lambda done: progress.update(task, completed=done, size=_how_far(done, total, time.monotonic() - started))


@contextmanager
def _lines(title: str, total: int, say: Say) -> Iterator[Callable[[int], None]]:
    started = spoke = time.monotonic()
    say(f"{title}{f' {wording.size(total)}' if total else ''}")

    def show(done: int) -> None:
        nonlocal spoke
        now = time.monotonic()
        if now - spoke >= PLAIN_SECONDS:
            spoke = now
            say(
                f"  {title}: {_how_far(done, total, now - started)}, {wording.duration(now - started)}".replace(
                    ": ,", ":"
                )
            )

    yield show


def _how_far(done: int, total: int, seconds: float) -> str:
    """``481.42 MB of 903.71 MB, 48.10 MB/s``; empty where nothing can be measured."""
    if not done:
        return ""
    return f"{wording.size(done)}{f' of {wording.size(total)}' if total else ''}, {wording.size(done / max(seconds, 0.1))}/s"


# --- build ----------------------------------------------------------------------------------------------

DOCKERFILE = Path(containers.__file__).with_name("Dockerfile")


def run_build(options: argparse.Namespace) -> int:
    """Build with what is here, then import what was built."""
    dockerfile = Path(options.file).expanduser() if options.file else DOCKERFILE
    if not dockerfile.is_file():
        raise BadInput(f"--file {dockerfile}: there is no such file")
    if options.print_only:
        print(dockerfile.read_text(), end="")
        return OK
    base = base_of(options.base) if options.base else ""
    folder, usual = folder_of(options)
    tool, say = choose_builder(options.tool), say_for(options)
    arguments = {
        "VERSION": VERSION,
        **({"BASE": base} if base else {}),
        **({} if options.packages is None else {"PACKAGES": options.packages}),
    }
    tag = options.tag or f"localhost/amlaunch:{VERSION}"
    needed = base or base_in(dockerfile)
    if needed:
        check_base(tool, needed, say)
    with tempfile.TemporaryDirectory(prefix="amlaunch-build-") as context:
        write_context(Path(context), dockerfile, Path(options.wheels).expanduser() if options.wheels else None)
        say(f"{tool} builds {tag}")
        build_image(tool, Path(context), tag, arguments, say)
    if options.no_import:
        say(f"built {tag}, in the storage of {tool}")
        return OK
    source = f"docker-daemon:{tag}" if tool == "docker" else f"containers-storage:{tag}"
    work = Path(options.tmp).expanduser().absolute() if options.tmp else None
    origin = f"build on {base}" if base else "build"
    return make(
        ImportRequest(source, folder, options.format or usual, this_architecture(), tool, work, origin=origin),
        options,
        say,
    )


def base_of(text: str) -> str:
    """The image to build on as a Dockerfile names it, however it is spelled. Raises BadInput."""
    try:
        reference = parse(text)
    except BadReference as error:
        raise BadInput(f"--base {error}") from None
    if reference.path is not None:
        raise BadInput(
            f"--base {text}: a file or a folder is no base; load it (buildah pull, podman load, docker load) and give the name that it has there"
        )
    return reference.name


# --- list -----------------------------------------------------------------------------------------------


def run_list(options: argparse.Namespace) -> int:
    """A row for each image."""
    folder, _ = folder_of(options)
    rows = [(image, folder.facts(image.path), folder.check_record(image.path).is_file()) for image in folder.images()]
    if options.json:
        found = [
            {**dataclasses.asdict(image), "whole": image.is_complete, "checked": facts.source if checked else None}
            for image, facts, checked in rows
        ]
        print(wording.to_json({"folder": str(folder.root), "images": found}))
        return OK
    if not rows:
        print(f"no images in {folder.root}; {wording.program()} image import IMAGE brings one")
        return OK
    from rich.table import Table

    table = Table("image", "digest", "size", "made", "made of", "checked", box=None, padding=(0, 2, 0, 0))
    for image, facts, checked in rows:
        state = (
            (facts.source.removeprefix("checked ") if checked else "no")
            if image.is_complete
            else "its file is not whole: import it again"
        )
        table.add_row(
            Path(image.path).name,
            short_digest(image.digest),
            wording.size(image.size),
            image.date.replace("T", " ")[:16],
            image.source,
            state,
        )
    print(folder.root)
    wording.console().print(table)
    return OK


# --- check ----------------------------------------------------------------------------------------------


def run_check(options: argparse.Namespace) -> int:
    """Start an image, print what is in it, and write that down; exit code 1 where something would not work."""
    from amlaunch.launcher.display.findings import BAD, FindingsReport, worst
    from amlaunch.launcher.images import checker, probe_findings
    from amlaunch.launcher.planning.stage_container import merge_mounts, site_image, site_mounts
    from amlaunch.launcher.specs.cluster_profile import find_cluster

    if (options.gpus or 0) < 0:
        raise BadInput(f"--gpus {options.gpus}: write a number from 0 on")
    cluster = find_cluster(options.cluster or "local")
    site, folder = checker.container_site(cluster), image_folder(options.images, cluster.profile.images)
    stored = folder.find(options.image)
    try:
        reference = parse(stored.path if stored else options.image)
        mounts = [*site_mounts(site), *(catalog.parse_mount(text, Path.cwd()) for text in options.mount)]
    except (BadReference, catalog.BadMount) as error:
        raise BadInput(str(error)) from None
    name, place = reference.name, folder.check_record(stored.path if stored else options.image)
    if options.has:
        write_json(place, checker.vouched_record(name, options.has, read_json(place)))
        print(f"written down in {place}")
        return OK
    reference = site_image(reference, site)
    if reference.path is not None and not reference.path.exists():
        raise BadInput(f"there is no file {reference.path}")
    for mount in mounts:
        if not Path(mount.source).exists() and cluster.profile.executor == "local":
            raise BadInput(f"mount {mount.short}: there is no {mount.source} on this machine")
    say = say_for(options)
    runtime = checker.choose_runtime(reference, options.runtime, cluster)
    start = checker.plan_start(reference, runtime, merge_mounts(mounts), cluster, options.gpus)
    seen = checker.probe_record(
        name,
        stored.digest if stored else reference.digest,
        runtime,
        checker.run_probe(start, name, place.parent, meter_for(options.json, say)),
    )
    found = list(probe_findings.findings(options.image, seen, bool(options.gpus)))
    write_json(place, seen)
    verdict = worst(found)
    if options.json:
        print(
            wording.to_json(
                {"verdict": verdict, "record": str(place), **seen, "findings": probe_findings.as_json(found)}
            )
        )
    else:
        report = FindingsReport(json_output=False)
        report.begin("image", f"{name}, started by {runtime}")
        report.add(found)
        print(f"written down in {place}")
    return FAILED if verdict == BAD else OK
