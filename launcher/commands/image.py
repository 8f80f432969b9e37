"""``amlaunch image``: import and convert an image once for all nodes, build one, list them, and check one."""

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
from amlaunch.launcher.commands._shared import add_json_option
from amlaunch.launcher.display import wording
from amlaunch.launcher.images.builder import build_image, check_base, default_base, write_context
from amlaunch.launcher.images.importer import ImportRequest, import_image
from amlaunch.launcher.images.tools import ToolFailed, choose_builder, site_format, this_architecture
from amlaunch.launcher.planning.image_folder import image_folder
from amlaunch.recipes.errors import FAILED, OK, BadInput
from amlaunch.recipes.files import write_json
from amlaunch.recipes.version import VERSION

DOCKERFILE = Path(containers.__file__).with_name("Dockerfile")
PLAIN_SECONDS = 5.0
"""Pause between two progress lines outside a terminal."""

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
        help="nvcr.io/nvidia/pytorch:26.06-py3, a tar file of docker save or of an OCI layout, oci:DIR, "
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
    parser.add_argument("--file", metavar="FILE", help="Dockerfile (default: amlaunch's own; --print shows it)")
    parser.add_argument(
        "--packages",
        metavar="NAMES",
        help="packages to install, as pip arguments (default: those of preprocessing and wandb)",
    )
    parser.add_argument("--wheels", metavar="DIR", help="install from this folder of wheels, without a network")
    parser.add_argument("--tag", metavar="NAME", help="name of the image (default: amlaunch:VERSION)")
    parser.add_argument(
        "--tool", metavar="NAME", help="tool that builds: buildah, podman or docker (default: the first installed)"
    )
    parser.add_argument(
        "--no-import", action="store_true", help="do not import the image; it stays in the storage of the tool"
    )
    parser.add_argument(
        "--print", action="store_true", dest="print_only", help="print the Dockerfile and build nothing"
    )
    _add_conversion(parser)


def _add_list(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    add_json_option(parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", help="an image reference, a file, or from amlaunch image list a name or the beginning of a digest"
    )
    _add_folder(parser)
    parser.add_argument("--runtime", metavar="NAME", help="container runtime (default: that of the site)")
    parser.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SRC:DST[:ro]",
        help="also mount this, and report whether it is writable (may be repeated)",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="with --cluster: use a node with this many GPUs")
    parser.add_argument(
        "--has",
        metavar="NAMES",
        help="start nothing; record that the image has these packages, such as tiktoken,datasets",
    )
    add_json_option(parser)


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
    add_json_option(parser, "print the image as JSON on stdout")


def run(options: argparse.Namespace) -> int:
    """Carry out one action; the exit code is 1 if a tool failed, 2 for invalid input."""
    actions = {"import": run_import, "build": run_build, "list": run_list, "check": run_check}
    try:
        with _interrupted_by_signals():
            return actions[options.action](options)
    except ToolFailed as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return FAILED


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, so that running tools are ended and cleaned up."""
    signals = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def image_folder_of(options: argparse.Namespace) -> tuple[ImageFolder, str]:
    """Return the folder of images, and the image format of the site's runtime."""
    if not options.cluster:
        return image_folder(options.images), site_format()
    # Imported here because profiles take a while to import.
    from amlaunch.launcher.specs.cluster_profile import find_cluster

    profile = find_cluster(options.cluster).profile
    runtime = profile.container.runtime
    return image_folder(options.images, profile.images), site_format("" if runtime == "auto" else runtime)


def message_printer(options: argparse.Namespace) -> Say:
    """Return a function that prints messages: on stderr if stdout is for JSON."""
    stream = sys.stderr if options.json else sys.stdout
    return lambda text: print(text, file=stream, flush=True)


# --- import


def run_import(options: argparse.Namespace) -> int:
    """Download and convert an image; an image that exists already is only shown."""
    folder, site_image_format = image_folder_of(options)
    request = ImportRequest(
        options.image,
        folder,
        options.format or site_image_format,
        options.arch or this_architecture(),
        options.tool,
        _work_folder(options),
        options.insecure,
    )
    return _import(request, options, message_printer(options))


def _work_folder(options: argparse.Namespace) -> Path | None:
    return Path(options.tmp).expanduser().absolute() if options.tmp else None


def _import(request: ImportRequest, options: argparse.Namespace, say: Say) -> int:
    """Import an image, and print its path and how to use it."""
    started = time.monotonic()
    try:
        image, is_new = import_image(request, say, _progress_meter(options.json, say))
    except KeyboardInterrupt:
        say(
            f"interrupted; downloads are kept in {request.work or request.folder.root}: "
            "run the same command again to continue"
        )
        raise
    if options.json:
        print(wording.to_json({**dataclasses.asdict(image), "made": is_new}))
        return OK
    duration = f" in {wording.duration(time.monotonic() - started)}" if is_new else ""
    action = "created" if is_new else "already exists:"
    say(f"{action} {image.path} ({wording.size(image.size)}, {image.digest[:19]}){duration}")
    say(f"use it in a recipe: container.image: {image.path}")
    say(f"show its contents: {wording.program()} image check {image.path}")
    return OK


def _progress_meter(json: bool, say: Say) -> Callable[[str, int], Any]:
    """Return how to show progress: a bar in a terminal, a line every five seconds elsewhere."""
    if sys.stdout.isatty() and not json:
        return _progress_bar
    return lambda title, total: _progress_lines(title, total, say)


@contextmanager
def _progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    indicator = BarColumn(24) if total else SpinnerColumn()
    columns = [TextColumn("{task.description}"), indicator, TextColumn("{task.fields[size]}"), TimeElapsedColumn()]
    started = time.monotonic()
    with Progress(*columns, console=wording.console(), transient=True) as progress:
        task = progress.add_task(title, total=total or None, size="")

        def show(done: int) -> None:
            progress.update(task, completed=done, size=_progress_text(done, total, time.monotonic() - started))

        yield show


@contextmanager
def _progress_lines(title: str, total: int, say: Say) -> Iterator[Callable[[int], None]]:
    started = last_printed = time.monotonic()
    say(f"{title} {wording.size(total)}" if total else title)

    def show(done: int) -> None:
        nonlocal last_printed
        now = time.monotonic()
        if now - last_printed >= PLAIN_SECONDS:
            last_printed = now
            parts = [_progress_text(done, total, now - started), wording.duration(now - started)]
            say(f"  {title}: {', '.join(part for part in parts if part)}")

    yield show


def _progress_text(done: int, total: int, seconds: float) -> str:
    """Return ``481.42 MB of 903.71 MB, 48.10 MB/s``; empty if nothing is known yet."""
    if not done:
        return ""
    of_total = f" of {wording.size(total)}" if total else ""
    return f"{wording.size(done)}{of_total}, {wording.size(done / max(seconds, 0.1))}/s"


# --- build


def run_build(options: argparse.Namespace) -> int:
    """Build an image with a tool of this machine, then import it."""
    dockerfile = Path(options.file).expanduser() if options.file else DOCKERFILE
    if not dockerfile.is_file():
        raise BadInput(f"--file {dockerfile}: no such file")
    if options.print_only:
        print(dockerfile.read_text(), end="")
        return OK

    base = base_name(options.base) if options.base else ""
    folder, site_image_format = image_folder_of(options)
    tool, say = choose_builder(options.tool), message_printer(options)
    tag = options.tag or f"localhost/amlaunch:{VERSION}"
    arguments = {"VERSION": VERSION}
    if base:
        arguments["BASE"] = base
    if options.packages is not None:
        arguments["PACKAGES"] = options.packages
    needed_base = base or default_base(dockerfile)
    if needed_base:
        check_base(tool, needed_base, say)
    with tempfile.TemporaryDirectory(prefix="amlaunch-build-") as context:
        write_context(Path(context), dockerfile, Path(options.wheels).expanduser() if options.wheels else None)
        say(f"building {tag} with {tool}")
        build_image(tool, Path(context), tag, arguments, say)
    if options.no_import:
        say(f"built {tag} in the storage of {tool}; not imported")
        return OK

    source = f"docker-daemon:{tag}" if tool == "docker" else f"containers-storage:{tag}"
    request = ImportRequest(
        source,
        folder,
        options.format or site_image_format,
        this_architecture(),
        tool,
        _work_folder(options),
        origin=f"build on {base}" if base else "build",
    )
    return _import(request, options, say)


def base_name(text: str) -> str:
    """Return the name of a base image as a Dockerfile writes it. Raises BadInput for a file or a folder."""
    try:
        reference = parse(text)
    except BadReference as error:
        raise BadInput(f"--base {error}") from None
    if reference.path is not None:
        raise BadInput(
            f"--base {text}: a base cannot be a file or a folder; load it first "
            "(buildah pull, podman load, docker load), then write the name that it prints"
        )
    return reference.name


# --- list


def run_list(options: argparse.Namespace) -> int:
    """Print a row for each image."""
    folder, _ = image_folder_of(options)
    rows = [(image, folder.facts(image.path), folder.check_record(image.path).is_file()) for image in folder.images()]
    if options.json:
        values = [
            {**dataclasses.asdict(image), "whole": image.is_complete, "checked": facts.source if checked else None}
            for image, facts, checked in rows
        ]
        print(wording.to_json({"folder": str(folder.root), "images": values}))
        return OK
    if not rows:
        print(f"no images in {folder.root}; import one with {wording.program()} image import IMAGE")
        return OK

    from rich.table import Table

    table = Table("image", "digest", "size", "created", "source", "checked", box=None, padding=(0, 2, 0, 0))
    for image, facts, checked in rows:
        if image.is_complete:
            state = facts.source.removeprefix("checked ") if checked else "no"
        else:
            state = "the file is incomplete: import it again"
        created = image.date.replace("T", " ")[:16]
        name, size = Path(image.path).name, wording.size(image.size)
        table.add_row(name, short_digest(image.digest), size, created, image.source, state)
    print(folder.root)
    wording.console().print(table)
    return OK


# --- check


def run_check(options: argparse.Namespace) -> int:
    """Start an image, print its contents, and record them; the exit code is 1 if something would not work."""
    from amlaunch.launcher.images import checker
    from amlaunch.launcher.planning.container_plan import merge_mounts, site_image, site_mounts
    from amlaunch.launcher.specs.cluster_profile import find_cluster

    if (options.gpus or 0) < 0:
        raise BadInput(f"--gpus {options.gpus}: expected an integer of at least 0")
    cluster = find_cluster(options.cluster or "local")
    site, folder = checker.container_site(cluster), image_folder(options.images, cluster.profile.images)
    stored = folder.find(options.image)
    try:
        reference = parse(stored.path if stored else options.image)
        mounts = [*site_mounts(site), *(catalog.parse_mount(text, Path.cwd()) for text in options.mount)]
    except (BadReference, catalog.BadMount) as error:
        raise BadInput(str(error)) from None
    name, record_file = reference.name, folder.check_record(stored.path if stored else options.image)
    if options.has:
        write_json(record_file, checker.vouched_record(name, options.has, read_json(record_file)))
        print(f"recorded in {record_file}")
        return OK

    reference = site_image(reference, site)
    if reference.path is not None and not reference.path.exists():
        raise BadInput(f"image file {reference.path} does not exist")
    for mount in mounts:
        if not Path(mount.source).exists() and cluster.profile.executor == "local":
            raise BadInput(f"mount {mount.short}: {mount.source} does not exist on this machine")
    say = message_printer(options)
    runtime = checker.choose_runtime(reference, options.runtime, cluster)
    start = checker.plan_start(reference, runtime, merge_mounts(mounts), cluster, options.gpus)
    contents = checker.run_probe(start, name, record_file.parent, _progress_meter(options.json, say))
    record = checker.probe_record(name, stored.digest if stored else reference.digest, runtime, contents)
    write_json(record_file, record)
    return _report_check(options, record, record_file, f"{name}, started by {runtime}")


def _report_check(options: argparse.Namespace, record: dict[str, Any], record_file: Path, title: str) -> int:
    """Print the findings on a checked image, and return the exit code."""
    from amlaunch.launcher.display.findings import BAD, FindingsReport, worst
    from amlaunch.launcher.images import probe_findings

    findings = list(probe_findings.findings(options.image, record, bool(options.gpus)))
    verdict = worst(findings)
    if options.json:
        values = {"verdict": verdict, "record": str(record_file), **record}
        print(wording.to_json({**values, "findings": probe_findings.as_json(findings)}))
    else:
        report = FindingsReport(json_output=False)
        report.begin("image", title)
        report.add(findings)
        print(f"recorded in {record_file}")
    return FAILED if verdict == BAD else OK
