"""Parse image names and paths, and spell them as each runtime expects.

People write the same image as ``nvcr.io/nvidia/pytorch:26.06-py3``, ``docker://nvcr.io/nvidia/pytorch:26.06-py3`` or
``nvcr.io#nvidia/pytorch:26.06-py3``, or name a file. The grammar of names is
https://pkg.go.dev/github.com/distribution/reference.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

DOCKER_HUB = "docker.io"
DOCKER_HUB_ALIASES = (DOCKER_HUB, "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
KNOWN_REGISTRIES = ("nvcr.io", "ghcr.io", "quay.io", DOCKER_HUB, "gcr.io", "public.ecr.aws", "registry.gitlab.com")
KIND_BY_ENDING = {
    ".sqsh": "sqsh",
    ".squashfs": "sqsh",
    ".sif": "sif",
    ".tar": "archive",
    ".tar.gz": "archive",
    ".tgz": "archive",
}
SCHEMES = ("docker://", "dockerd://", "podman://", "oras://", "library://", "shub://", "http://", "https://", "oci://")
ARCHIVE_TRANSPORTS = ("docker-archive:", "oci-archive:")
EXAMPLE = "nvcr.io/nvidia/pytorch:26.06-py3"

PATH_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REGISTRY = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
DIGEST = r"[A-Za-z][A-Za-z0-9+._-]*:[0-9a-fA-F]{32,}"

Kind = Literal["registry", "sqsh", "sif", "archive", "folder"]


class BadReference(ValueError):
    """An invalid image name; the message says what is wrong and suggests the nearest valid name."""


@dataclass(frozen=True)
class Reference:
    """An image in a registry, or a file or folder that holds one."""

    kind: Kind
    registry: str = ""
    repository: str = ""
    tag: str = ""
    digest: str = ""
    """``sha256:…``."""
    user: str = ""
    """User whose credentials the runtime looks up (``user@registry#image``)."""
    path: Path | None = None
    """Absolute path of a file or folder."""
    layout: str = ""
    """``docker`` or ``oci`` for an archive whose transport was written before it."""

    @property
    def name(self) -> str:
        """The canonical name, such as ``docker.io/library/debian:12``; for a file its path."""
        if self.path is not None:
            return str(self.path)
        return f"{self.registry}/{self.repository}{self.version}"

    @property
    def file(self) -> Path:
        """The path of an image that is not in a registry. Raises ValueError for one that is."""
        if self.path is None:
            raise ValueError(f"{self.name} is in a registry")
        return self.path

    @property
    def short(self) -> str:
        """The name without Docker Hub's default parts, for messages."""
        return self.name.removeprefix(f"{DOCKER_HUB}/library/").removeprefix(f"{DOCKER_HUB}/")

    @property
    def version(self) -> str:
        """``@digest`` if there is one, else ``:tag``; few tools accept both."""
        return f"@{self.digest}" if self.digest else f":{self.tag}"


def parse(text: str, base: Path | None = None) -> Reference:
    """Parse the name or path of an image, without looking at files.

    Relative paths start at ``base``, by default the current folder. Raises BadReference.
    """
    name = text.strip()
    if not name:
        raise BadReference(f"no image given; write for example {EXAMPLE}")
    if name.startswith("file://"):
        return _parse_path(name.removeprefix("file://"), base)
    if re.search(r"\s", name) and not _is_path(name):
        raise BadReference(f"{name!r}: image names contain no spaces; write for example {EXAMPLE}")
    for transport in ARCHIVE_TRANSPORTS:
        if name.startswith(transport):
            path = name.removeprefix(transport).removeprefix("//")
            return _parse_path(path, base, "archive", transport.split("-")[0])
    if _is_path(name):
        return _parse_path(name, base)
    return _parse_name(_strip_scheme(name), name)


def _is_path(text: str) -> bool:
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return True
    return _ending(text) != "" and "://" not in text and not re.search(r":[^/]*$", text)


def _ending(text: str) -> str:
    return next((ending for ending in KIND_BY_ENDING if text.endswith(ending)), "")


def _parse_path(text: str, base: Path | None, kind: str = "", layout: str = "") -> Reference:
    if not text:
        raise BadReference("the path of the image is empty")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise BadReference(f"{text!r}: unknown user; write the absolute path")
    path = Path(os.path.normpath(Path(base or Path.cwd()) / os.path.expanduser(text)))
    kind = kind or KIND_BY_ENDING.get(_ending(text), "folder")
    return Reference(kind, path=path, layout=layout)  # type: ignore[arg-type]


def _strip_scheme(text: str) -> str:
    """Remove ``docker://``, which several runtimes expect. Raises BadReference for other schemes."""
    if text.startswith("docker://"):
        return text.removeprefix("docker://")
    scheme = next((scheme for scheme in SCHEMES if text.startswith(scheme)), None)
    rest = text.removeprefix(scheme or "")
    if scheme in ("dockerd://", "podman://"):
        raise BadReference(f"{text!r}: for an image of the local daemon, leave out the scheme: {rest}")
    if scheme in ("http://", "https://"):
        raise BadReference(f"{text!r}: an image name is not a web address; did you mean {rest.rstrip('/')!r}?")
    if scheme or "://" in text:
        unknown = scheme or text.split("://")[0] + "://"
        raise BadReference(f"{text!r}: unknown scheme {unknown}; use docker:// or none, for example {EXAMPLE}")
    return text


def _parse_name(rest: str, text: str) -> Reference:
    user, registry = "", ""
    # The form of enroot: [USER@]REGISTRY#IMAGE[:TAG].
    if "#" in rest:
        registry, _, rest = rest.partition("#")
        user, _, registry = registry.rpartition("@")
        if not registry:
            raise BadReference(f"{text!r}: no registry before the #; write for example {EXAMPLE}")
    else:
        user, rest = _split_user(rest)
        first, slash, after = rest.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost" or first.startswith("[")):
            registry, rest = first, after

    repository, tag, digest = _split_version(rest, text, registry)
    if registry in DOCKER_HUB_ALIASES:
        registry = ""
    if registry and not re.fullmatch(REGISTRY, registry):
        raise BadReference(f"{text!r}: {registry!r} is not a registry; write its host, and :port if it needs one")
    if not registry and "/" not in repository:
        repository = f"library/{repository}"
    tag = tag or ("" if digest else "latest")
    return Reference("registry", (registry or DOCKER_HUB).lower(), repository, tag, digest, user)


def _split_user(rest: str) -> tuple[str, str]:
    """Split ``user@registry/image``; an ``@`` before a digest separates no user."""
    match = re.match(r"([A-Za-z0-9$._-]+)@(?![a-z0-9]+:[0-9a-f]{32})(.+/.+)$", rest)
    return (match[1], match[2]) if match else ("", rest)


def _split_version(rest: str, text: str, registry: str) -> tuple[str, str, str]:
    """Split ``repository[:tag][@digest]`` into its three parts. Raises BadReference."""
    named, at, digest = rest.partition("@")
    if at and not re.fullmatch(DIGEST, digest):
        raise BadReference(f"{text!r}: {digest!r} is not a digest (sha256: and 64 hexadecimal digits)")
    if at and digest.startswith("sha256:") and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise BadReference(f"{text!r}: a sha256 digest has 64 digits (0-9, a-f), not {len(digest) - 7}")

    repository, colon, tag = named.partition(":")
    if colon and not re.fullmatch(TAG, tag):
        suggestion = _did_you_mean(f"{repository}:{_valid_tag(tag)}", registry)
        raise BadReference(
            f"{text!r}: {tag!r} is not a tag (letters, digits, _ . -, at most 128 characters); {suggestion}"
        )
    if re.fullmatch(rf"{PATH_COMPONENT}(?:/{PATH_COMPONENT})*", repository):
        return repository, tag, digest
    if repository != repository.lower():
        suggestion = _did_you_mean(repository.lower() + rest[len(repository) :], registry)
        raise BadReference(f"{text!r}: image names are in lower case; {suggestion}")
    if not repository:
        raise BadReference(f"{text!r}: the image name is missing; write for example {EXAMPLE}")
    raise BadReference(
        f"{text!r}: {repository!r} is not an image name (lower-case letters and digits, separated by . _ - /); "
        f"for a folder, write ./{rest}"
    )


def _valid_tag(tag: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", tag).strip("-.") or "latest"


def _did_you_mean(image: str, registry: str) -> str:
    name = f"{registry}/{image}" if registry else image
    return f"did you mean {name!r}?"


def name_warnings(reference: Reference) -> list[str]:
    """List what is suspicious about a valid name, such as a registry whose name resembles a known one."""
    if reference.kind != "registry":
        return []
    messages = []
    similar = difflib.get_close_matches(reference.registry, KNOWN_REGISTRIES, 1, 0.75)
    if similar and similar[0] != reference.registry:
        messages.append(f"unknown registry {reference.registry}; did you mean {similar[0]}?")
    organisation = reference.repository.split("/")[0]
    is_on_hub = reference.registry == DOCKER_HUB
    if is_on_hub and organisation in KNOWN_REGISTRIES:
        messages.append(f"{reference.short}: did you mean {reference.repository}?")
    if is_on_hub and reference.repository in ("nvidia/pytorch", "nvidia/nemo"):
        ngc_name = replace(reference, registry="nvcr.io").name
        messages.append(f"{reference.short} names an image on Docker Hub; NVIDIA publishes it as {ngc_name}")
    if reference.registry == "nvcr.io" and reference.tag == "latest":
        messages.append(f"{reference.name}: NVIDIA publishes no tag 'latest'; write one such as 26.06-py3")
    return messages


# --- spelling for each runtime ------------------------------------------------------------------------


def for_pyxis(reference: Reference) -> str:
    """Return the value of ``--container-image``: ``nvcr.io#nvidia/pytorch:26.06-py3``, or a file's absolute path.

    With ``/`` instead of ``#`` pyxis asks Docker Hub (pyxis#39, #168); it takes a relative path for a name (#67).
    """
    return str(reference.file) if reference.path else _enroot_name(reference)


def for_enroot(reference: Reference) -> str:
    """Return the URI for ``enroot import``: ``docker://nvcr.io#nvidia/pytorch:26.06-py3``, or a file's path."""
    return str(reference.file) if reference.path else f"docker://{_enroot_name(reference)}"


def _enroot_name(reference: Reference) -> str:
    """Return ``[USER@][REGISTRY#]IMAGE[:TAG]``; no registry means Docker Hub, and a digest takes the tag's place.

    enroot passes everything after the colon to the registry, colons included (enroot 3.1 to 4, docker.sh).
    """
    user = f"{reference.user}@" if reference.user else ""
    registry = "" if reference.registry == DOCKER_HUB else f"{reference.registry}#"
    repository = reference.repository if registry else reference.repository.removeprefix("library/")
    return f"{user}{registry}{repository}:{reference.digest or reference.tag}"


def for_apptainer(reference: Reference) -> str:
    """Return ``docker://…`` for a registry, ``docker-archive:…`` or ``oci-archive:…`` for a tar, else the path."""
    if reference.kind == "archive":
        return _with_transport(reference)
    return str(reference.file) if reference.path else f"docker://{reference.name}"


def for_podman(reference: Reference) -> str:
    """Return the canonical name; for an archive its path with a transport."""
    return _with_transport(reference) if reference.kind == "archive" else reference.name


def _with_transport(reference: Reference) -> str:
    """Prefix an archive by the transport that the user wrote, else by that of its content; each reads only its own."""
    # Imported late, because the archive reader is slow to import.
    from amlaunch.containers.images.layers import archive_layout

    return f"{reference.layout or archive_layout(reference.file)}-archive:{reference.file}"
