"""Where each tool looks for a registry's credentials, and what to write there; and what its errors mean."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

REFUSED = (
    "unauthorized",
    "authentication required",
    "access denied",
    "requested access to the resource is denied",
    "denied:",
)
MISSING = ("manifest unknown", "manifest_unknown", "name unknown", "not found", "no such image")
UNREACHABLE = (
    "no such host", "connection refused", "network is unreachable", "i/o timeout", "could not resolve", "timed out", "no route to host",
    "temporary failure in name resolution", "tls handshake", "connection reset", "deadline exceeded",
)  # fmt: skip
PLAIN_HTTP = ("server gave http response to https client", "http: server gave http", "wrong version number")
NO_SPACE = ("no space left on device", "disk quota exceeded")
NGC_USER = "$oauthtoken"
"""The user's name for nvcr.io, for everybody and as it stands; the password is an API key of ngc.nvidia.com (Setup)."""
MACHINES = {"nvcr.io": ("nvcr.io", "authn.nvidia.com"), "docker.io": ("auth.docker.io",)}
"""Under which names enroot looks for a registry's credentials, where it is not the registry's own: the host that gives tokens (its import.md)."""


def registry_of(reference: str) -> str:
    """``nvcr.io`` of ``nvcr.io/nvidia/pytorch:25.08-py3``; docker.io where none is named."""
    first, slash, _ = reference.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"


def where(tool: str, registry: str, environ: Mapping[str, str]) -> str:
    """Where a tool's or runtime's credentials for a registry go, with the form of the line or the command that writes it."""
    home = environ.get("HOME", "~")
    user = NGC_USER if registry == "nvcr.io" else "USER"
    key = "an API key of ngc.nvidia.com" if registry == "nvcr.io" else "the password or a token"
    if tool in ("enroot", "pyxis"):
        first, *others = MACHINES.get(registry, (_host(registry),))
        more = "".join(f", and once more for machine {other}" for other in others)
        nodes = " on the nodes" if tool == "pyxis" else ""
        return f"{enroot_file(environ)} (mode 600){nodes} needs the line: machine {first} login {user} password KEY{more}; KEY is {key}"
    if tool in ("apptainer", "singularity"):
        return f"{tool} registry login --username '{user}' docker://{registry} asks for {key}, and keeps it in {home}/.{tool}/docker-config.json"
    if tool == "docker":
        return f"docker login --username '{user}' {registry} asks for {key}, and keeps it in {environ.get('DOCKER_CONFIG', home + '/.docker')}/config.json"
    if tool == "charliecloud":
        return f"ch-image pull --auth {registry}/…, once, asks for {key}; the user is {user}"
    if tool == "slurm":
        return f"pull the image where {registry} knows you, and unpack it as a bundle"
    run = environ.get("XDG_RUNTIME_DIR")
    lasting = f"{home}/.docker/config.json"
    file = environ.get("REGISTRY_AUTH_FILE") or (
        f"{run}/containers/auth.json, until you log out; --authfile {lasting} keeps it" if run else lasting
    )
    return f"{tool} login --username '{user}' {registry} asks for {key}, and keeps it in {file}"


def login(name: str, environ: Mapping[str, str], user: str = "") -> tuple[str, str] | None:
    """User and password for ``nvcr.io/nvidia/pytorch`` in the files that the tools themselves keep; None where none has any.

    ``user``: of that one alone. A password that a program keeps or makes is not asked for: see :func:`kept_elsewhere`.
    """
    known = (found for found in _known(name, environ) if found and user in ("", found[0]))
    return next(known, None)


def kept_elsewhere(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a file names a program that has or makes the password for it (credsStore, credHelpers, enroot's ``$(…)``)."""
    return any(found is None for found in _known(name, environ))


def _known(name: str, environ: Mapping[str, str]) -> Iterator[tuple[str, str] | None]:
    """All that is known of an image's credentials, the nearest first; None: a program has them."""
    parts = name.split("/")
    wanted = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]  # containers-auth.json(5)
    for file in files("", environ):
        if file.name.endswith(".json"):
            yield from _of_docker(_object(file), wanted)
    with suppress(OSError):
        yield from _of_enroot(
            enroot_file(environ).read_text(errors="replace"), MACHINES.get(parts[0], (_host(parts[0]),))
        )


def _object(file: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _of_docker(found: Mapping[str, Any], wanted: Sequence[str]) -> Iterator[tuple[str, str] | None]:
    """Of a file in docker's form."""
    helpers, auths = found.get("credHelpers"), found.get("auths")
    if isinstance(helpers, dict) and {_key(key) for key in helpers} & set(wanted):
        yield None
    entries = {_key(key): entry for key, entry in auths.items()} if isinstance(auths, dict) else {}
    for entry in (entries[key] for key in wanted if key in entries):
        word = entry.get("auth") if isinstance(entry, dict) else None
        if not word:
            yield None
            continue
        with suppress(ValueError, TypeError):
            user, _, password = base64.b64decode(word).decode().partition(":")
            yield user, password


def _of_enroot(text: str, machines: Sequence[str]) -> Iterator[tuple[str, str] | None]:
    """Of a file in netrc's form, as enroot reads it: with a shell's ``$(…)`` for a password."""
    for entry in re.split(r"^(?=[ \t]*machine\s)", text, flags=re.MULTILINE):
        found = re.findall(r"(?:^|\s)(machine|login|password)\s+(\"[^\"]*\"|\S+)", re.sub(r"(?m)^\s*#.*", "", entry))
        words = {
            key: value.strip('"') for key, value in reversed(found)
        }  # the first of a kind: a command may have such words, too
        if words.get("machine") in machines and words.get("password"):
            yield None if set("$`") & set(words["password"]) else (words.get("login", ""), words["password"])


def _host(registry: str) -> str:
    """Without a port, which netrc does not know."""
    return re.sub(r":\d+$", "", registry)


def enroot_file(environ: Mapping[str, str]) -> Path:
    """enroot's own, in netrc's form."""
    config = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or Path.home(), ".config")
    return Path(environ.get("ENROOT_CONFIG_PATH") or f"{config}/enroot", ".credentials")


def files(tool: str, environ: Mapping[str, str], *, here: bool = True) -> list[Path]:
    """Where a tool looks for credentials, or, of a name that is not known, where any does.

    ``here``: on this machine; nodes see its home, and not its ``/run``.
    """
    home, enroot = Path(environ.get("HOME") or Path.home()), enroot_file(environ)
    docker = Path(environ.get("DOCKER_CONFIG") or home / ".docker", "config.json")
    session = (
        Path(environ["XDG_RUNTIME_DIR"], "containers")
        if environ.get("XDG_RUNTIME_DIR")
        else Path(f"/run/containers/{os.getuid()}")
    )
    podman = [*([session / "auth.json"] if here else []), home / ".config" / "containers" / "auth.json", docker]
    known = {
        "docker": [docker],
        "podman": [Path(environ["REGISTRY_AUTH_FILE"])] if environ.get("REGISTRY_AUTH_FILE") else podman,
        "apptainer": [home / ".apptainer" / "docker-config.json", docker],
        "singularity": [home / ".singularity" / "docker-config.json", docker],
        "charliecloud": [],  # it keeps them in a form of its own
        "pyxis": [enroot],
        "enroot": [enroot],
    }
    return known.get(tool, list(dict.fromkeys(file for found in known.values() for file in found)))


def _key(text: str) -> str:
    """``docker.io`` of ``https://index.docker.io/v1/``, ``nvcr.io`` of ``nvcr.io``; containers' own may name a repository, too."""
    bare = re.sub(r"^https?://|/v[12]/?$|/$", "", text)
    return re.sub(r"^(index|registry-1)\.docker\.io", "docker.io", bare)


def explain(tool: str, reference: str, said: str, environ: Mapping[str, str]) -> str:
    """What a tool's last words mean and what to do; empty where they say it well enough themselves."""
    registry, low = registry_of(reference), said.lower()
    if any(word in low for word in NO_SPACE):
        return "there was no space left while it worked: --images or --tmp name a folder with more, the same command goes on from what is there"
    if reference.startswith("/"):
        return ""
    if any(word in low for word in PLAIN_HTTP):
        return f"{registry} speaks plain HTTP: --insecure allows that"
    if any(word in low for word in UNREACHABLE):
        return (
            f"{registry} cannot be reached from here; on a machine that reaches it: skopeo copy docker://{reference} docker-archive:image.tar, "
            "copy that file here, and import it: amlaunch image import image.tar"
        )
    if any(word in low for word in REFUSED) or _says(low, "40[13]"):
        hint = "" if registry != "docker.io" else " (is the registry missing, as nvcr.io/ before the name?)"
        return f"{registry} does not let you have {reference}{hint}: {where(tool, registry, environ)}"
    if any(word in low for word in MISSING) or _says(low, "404"):
        return f"{registry} has no {reference}: look at the spelling and the tag"
    return ""


def _says(text: str, number: str) -> bool:
    """Whether an answer's number stands there, and no digits of a size or a digest."""
    return re.search(rf"(?<![\w.]){number}(?!\w|\.\d| ?[kmg]i?b\b)", text) is not None


def without_secrets(text: str) -> str:
    """A tool's words, with passwords in addresses and authorization headers blotted out."""
    text = re.sub(r"(https?://)[^/@\s]+@", r"\1***@", text)
    return re.sub(r"(?i)(authorization:\s*\w+|password|token|--creds)([=:\s]+)\S+", r"\1\2***", text)
