"""One spelling of an image, and each runtime's own.

People write the same image as ``nvcr.io/nvidia/pytorch:25.08-py3``,
``docker://nvcr.io/nvidia/pytorch:25.08-py3`` or ``nvcr.io#nvidia/pytorch:25.08-py3``,
or name a file of it. All are read here, and each runtime is given the form that it knows.

The grammar of names is that of https://pkg.go.dev/github.com/distribution/reference.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

DOCKER_HUB = "docker.io"
HUB_NAMES = (DOCKER_HUB, "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
"""What people call Docker Hub."""
KNOWN_REGISTRIES = ("nvcr.io", "ghcr.io", "quay.io", DOCKER_HUB, "gcr.io", "public.ecr.aws", "registry.gitlab.com")
ENDINGS = {
    ".sqsh": "sqsh",
    ".squashfs": "sqsh",
    ".sif": "sif",
    ".tar": "archive",
    ".tar.gz": "archive",
    ".tgz": "archive",
}
"""What a file is, by its name."""
SCHEMES = ("docker://", "dockerd://", "podman://", "oras://", "library://", "shub://", "http://", "https://", "oci://")
ARCHIVES = ("docker-archive:", "oci-archive:")
EXAMPLE = "nvcr.io/nvidia/pytorch:25.08-py3, say"

PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REGISTRY = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
DIGEST = r"[A-Za-z][A-Za-z0-9+._-]*:[0-9a-fA-F]{32,}"

Kind = Literal["registry", "sqsh", "sif", "archive", "folder"]


class BadReference(ValueError):
    """An image that cannot be one; the message says what is wrong with it and what comes nearest."""


@dataclass(frozen=True)
class Reference:
    """An image: in a registry, or a file or folder."""

    kind: Kind
    registry: str = ""
    repository: str = ""
    tag: str = ""
    digest: str = ""
    """``sha256:…``."""
    user: str = ""
    """Whose credentials are meant (``user@registry#image``); the runtime looks them up."""
    path: Path | None = None
    """Of a file or a folder, absolute."""
    layout: str = ""
    """Of an archive whose scheme said it: ``docker`` or ``oci``."""

    @property
    def name(self) -> str:
        """The spelling that docker and podman know, complete: ``docker.io/library/debian:12``; of a file its path."""
        if self.path is not None:
            return str(self.path)
        return f"{self.registry}/{self.repository}{self.version}"

    @property
    def file(self) -> Path:
        """The path of what is not in a registry. Raises ValueError for what is."""
        if self.path is None:
            raise ValueError(f"{self.name} is in a registry")
        return self.path

    @property
    def short(self) -> str:
        """For people: without what is understood."""
        return self.name.removeprefix(f"{DOCKER_HUB}/library/").removeprefix(f"{DOCKER_HUB}/")

    @property
    def version(self) -> str:
        """``:tag`` or ``@digest``; a digest says more than a tag does, and few tools take both."""
        return f"@{self.digest}" if self.digest else f":{self.tag}"


def parse(text: str, base: Path | None = None) -> Reference:
    """The image that ``text`` means; a relative path begins at ``base``, by default the current folder.

    No file is looked at. Raises BadReference.
    """
    given = text.strip()
    if not given:
        raise BadReference(f"no image is named; write {EXAMPLE}")
    if given.startswith("file://"):
        return _of_path(given.removeprefix("file://"), base)
    if re.search(r"\s", given) and not _is_path(given):
        raise BadReference(f"{given!r}: a name of an image has no spaces; write {EXAMPLE}")
    for scheme in ARCHIVES:
        if given.startswith(scheme):
            return _of_path(given.removeprefix(scheme).removeprefix("//"), base, "archive", scheme.split("-")[0])
    if _is_path(given):
        return _of_path(given, base)
    return _of_name(_without_scheme(given), text.strip())


def _is_path(text: str) -> bool:
    return (
        text.startswith(("/", "./", "../", "~"))
        or text in (".", "..")
        or (_ending(text) != "" and "://" not in text and not re.search(r":[^/]*$", text))
    )


def _ending(text: str) -> str:
    return next((ending for ending in ENDINGS if text.endswith(ending)), "")


def _of_path(text: str, base: Path | None, kind: str = "", layout: str = "") -> Reference:
    if not text:
        raise BadReference("the path of an image is empty")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise BadReference(f"{text!r}: no such user; write the path from the root")
    path = Path(os.path.normpath(Path(base or Path.cwd()) / os.path.expanduser(text)))
    found = kind or ENDINGS.get(_ending(text), "folder")
    return Reference(found, path=path, layout=layout)  # type: ignore[arg-type]


def _without_scheme(text: str) -> str:
    """``docker://`` is what several runtimes want; of the other schemes it is said what to write."""
    if text.startswith("docker://"):
        return text.removeprefix("docker://")
    scheme = next((scheme for scheme in SCHEMES if text.startswith(scheme)), None)
    rest = text.removeprefix(scheme or "")
    if scheme in ("dockerd://", "podman://"):
        raise BadReference(f"{text!r}: an image of the local daemon is written without a scheme: {rest}")
    if scheme in ("http://", "https://"):
        raise BadReference(
            f"{text!r}: an image is not named by an address of the web; did you mean {rest.rstrip('/')!r}?"
        )
    if scheme or "://" in text:
        raise BadReference(
            f"{text!r}: {scheme or text.split('://')[0] + '://'} is not known; docker:// is, or no scheme at all: {EXAMPLE}"
        )
    return text


def _of_name(rest: str, text: str) -> Reference:
    user, registry = "", ""
    if "#" in rest:  # enroot's form: [USER@]REGISTRY#IMAGE[:TAG]
        registry, _, rest = rest.partition("#")
        user, _, registry = registry.rpartition("@")
        if not registry:
            raise BadReference(f"{text!r}: nothing stands before the #; write {EXAMPLE}")
    else:
        user, rest = _user(rest)
        first, slash, after = rest.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost" or first.startswith("[")):
            registry, rest = first, after
    repository, tag, digest = _parts(rest, text, registry)
    if registry in HUB_NAMES:
        registry = ""
    if registry and not re.fullmatch(REGISTRY, registry):
        raise BadReference(
            f"{text!r}: {registry!r} is not the name of a registry (a host, with :port where it has one)"
        )
    if not registry and "/" not in repository:
        repository = f"library/{repository}"
    return Reference(
        "registry", (registry or DOCKER_HUB).lower(), repository, tag or ("" if digest else "latest"), digest, user
    )


def _user(rest: str) -> tuple[str, str]:
    """``user@registry/image``; an ``@`` further on is a digest's."""
    match = re.match(r"([A-Za-z0-9$._-]+)@(?![a-z0-9]+:[0-9a-f]{32})(.+/.+)$", rest)
    return (match[1], match[2]) if match else ("", rest)


def _parts(rest: str, text: str, registry: str) -> tuple[str, str, str]:
    """``(repository, tag, digest)``."""
    named, at, digest = rest.partition("@")
    if at and not re.fullmatch(DIGEST, digest):
        raise BadReference(f"{text!r}: {digest!r} is not a digest (sha256: and 64 hexadecimal digits)")
    if at and digest.startswith("sha256:") and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise BadReference(f"{text!r}: a sha256 digest has 64 digits, 0-9 and a-f; this one has {len(digest) - 7}")
    repository, colon, tag = named.partition(":")
    if colon and not re.fullmatch(TAG, tag):
        raise BadReference(
            f"{text!r}: {tag!r} is not a tag (letters, digits, _ . -, at most 128); {_did_you_mean(text, f'{repository}:{_clean_tag(tag)}', registry)}"
        )
    wrong = not re.fullmatch(rf"{PART}(?:/{PART})*", repository)
    if wrong and repository != repository.lower():
        raise BadReference(
            f"{text!r}: names of images are in lower case; {_did_you_mean(text, repository.lower() + rest[len(repository) :], registry)}"
        )
    if wrong and not repository:
        raise BadReference(f"{text!r}: the image itself is missing; write {EXAMPLE}")
    if wrong:
        raise BadReference(
            f"{text!r}: {repository!r} is not the name of an image (lower-case letters and digits, with . _ - / between them); a folder is written ./{rest}"
        )
    return repository, tag, digest


def _clean_tag(tag: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", tag).strip("-.") or "latest"


def _did_you_mean(text: str, image: str, registry: str) -> str:
    return f"did you mean {f'{registry}/{image}' if registry else image!r}?"


def doubts(reference: Reference) -> list[str]:
    """What is odd about an image that is not wrong: a registry that is nearly a known one, a tag that NVIDIA does not have."""
    if reference.kind != "registry":
        return []
    found = []
    near = difflib.get_close_matches(reference.registry, KNOWN_REGISTRIES, 1, 0.75)
    if near and near[0] != reference.registry:
        found.append(f"{reference.registry} is not a registry that is known here; did you mean {near[0]}?")
    organisation = reference.repository.split("/")[0]
    if reference.registry == DOCKER_HUB and organisation in KNOWN_REGISTRIES:
        found.append(f"{reference.short}: did you mean {reference.repository}?")
    if (
        reference.registry == DOCKER_HUB
        and organisation == "nvidia"
        and reference.repository in ("nvidia/pytorch", "nvidia/nemo")
    ):
        found.append(
            f"{reference.short} would be looked for on Docker Hub; NVIDIA has it at {replace(reference, registry='nvcr.io').name}"
        )
    if reference.registry == "nvcr.io" and reference.tag == "latest":
        found.append(f"{reference.name}: NVIDIA gives its images no tag 'latest'; name one, such as 25.08-py3")
    return found


# --- each runtime's spelling --------------------------------------------------------------------------


def for_pyxis(reference: Reference) -> str:
    """srun's ``--container-image``: ``nvcr.io#nvidia/pytorch:25.08-py3``, or the absolute path of a squashfs file.

    With ``/`` instead of ``#`` Docker Hub would be asked (pyxis#39, #168), a relative file taken for a name (#67).
    """
    return str(reference.file) if reference.path else _of_enroot(reference)


def for_enroot(reference: Reference) -> str:
    """``enroot import``'s URI: ``docker://nvcr.io#nvidia/pytorch:25.08-py3``; of a file its path."""
    return str(reference.file) if reference.path else f"docker://{_of_enroot(reference)}"


def _of_enroot(reference: Reference) -> str:
    """``[USER@][REGISTRY#]IMAGE[:TAG]``; without a registry it is Docker Hub's. A digest takes the tag's place.

    enroot hands what follows the colon on to the registry as it stands, colons included (enroot 3.1 to 4, docker.sh).
    """
    user = f"{reference.user}@" if reference.user else ""
    registry = "" if reference.registry == DOCKER_HUB else f"{reference.registry}#"
    repository = reference.repository if registry else reference.repository.removeprefix("library/")
    return f"{user}{registry}{repository}:{reference.digest or reference.tag}"


def for_apptainer(reference: Reference) -> str:
    """``docker://…`` for a registry, ``docker-archive:``/``oci-archive:`` for a tar, else the path."""
    if reference.kind == "archive":
        return _with_transport(reference)
    return str(reference.file) if reference.path else f"docker://{reference.name}"


def for_docker(reference: Reference) -> str:
    """The plain name; a tar has to be loaded first."""
    return reference.name


def for_podman(reference: Reference) -> str:
    """The plain name; an archive by its transport."""
    return _with_transport(reference) if reference.kind == "archive" else reference.name


def _with_transport(reference: Reference) -> str:
    """``docker-archive:`` or ``oci-archive:``, as it was written, else as the file is: neither reads the other's."""
    from amlaunch.containers.images.layers import archive_layout  # what reads archives takes a while to load

    return f"{reference.layout or archive_layout(reference.file)}-archive:{reference.file}"


def for_charliecloud(reference: Reference) -> str:
    """ch-image's name of an image, or the path of a folder or squashfs file."""
    return reference.name
