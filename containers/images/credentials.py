"""Registry credentials: where each tool keeps them, how to add them, and what a tool's error about a registry means."""

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
    "no such host", "connection refused", "network is unreachable", "i/o timeout", "could not resolve", "timed out",
    "no route to host", "temporary failure in name resolution", "tls handshake", "connection reset",
    "deadline exceeded",
)  # fmt: skip
PLAIN_HTTP = ("server gave http response to https client", "http: server gave http", "wrong version number")
NO_SPACE = ("no space left on device", "disk quota exceeded")
NGC_USER = "$oauthtoken"
"""The user name for nvcr.io, literally and for everyone; the password is an API key of ngc.nvidia.com (Setup)."""
NETRC_MACHINES = {"nvcr.io": ("nvcr.io", "authn.nvidia.com"), "docker.io": ("auth.docker.io",)}
"""Hosts under which enroot looks up credentials of registries whose tokens are issued elsewhere
(enroot doc/cmd/import.md)."""


def registry_of(reference: str) -> str:
    """Return ``nvcr.io`` for ``nvcr.io/nvidia/pytorch:26.06-py3``, and docker.io if no registry is named."""
    first, slash, _ = reference.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"


# --- advice ---------------------------------------------------------------------------------------------


def login_advice(tool: str, registry: str, environ: Mapping[str, str]) -> str:
    """Return how to give a tool or runtime credentials for a registry, as an imperative clause."""
    is_ngc = registry == "nvcr.io"
    user = NGC_USER if is_ngc else "USER"
    password = " (password: an API key from ngc.nvidia.com)" if is_ngc else ""
    if tool in ("enroot", "pyxis"):
        first, *others = NETRC_MACHINES.get(registry, (_without_port(registry),))
        place = f"{enroot_file(environ)}{' on the nodes' if tool == 'pyxis' else ''}"
        same = "".join(f", and the same line for machine {other}" for other in others)
        return f"add to {place} (mode 600): machine {first} login {user} password KEY{same}{password}"
    commands = {
        "apptainer": f"apptainer registry login --username '{user}' docker://{registry}",
        "singularity": f"singularity registry login --username '{user}' docker://{registry}",
        "charliecloud": f"ch-image pull --auth {registry}/…",
    }
    if tool == "slurm":
        return f"pull the image where you have credentials for {registry}, and unpack it as an OCI bundle"
    return f"run {commands.get(tool, f'{tool} login --username {user!r} {registry}')}{password}"


def explain_failure(tool: str, reference: str, output: str, environ: Mapping[str, str]) -> str:
    """Explain the end of a tool's output and give the fix; empty if the output is clear enough."""
    registry, text = registry_of(reference), output.lower()
    if _contains(text, NO_SPACE):
        return (
            "no space left on the disk. Free some space and run the same command again (it continues the download), "
            "or choose another folder with --tmp DIR or --images DIR"
        )
    if reference.startswith("/"):
        return ""
    if _contains(text, PLAIN_HTTP):
        return f"{registry} uses plain HTTP. To allow that, add --insecure"
    if _contains(text, UNREACHABLE):
        return (
            f"{registry} cannot be reached from this machine. On a machine that can reach it, run: "
            f"skopeo copy docker://{reference} docker-archive:image.tar. "
            "Copy the file here and run: amlaunch image import image.tar"
        )
    if _contains(text, REFUSED) or _has_status(text, "40[13]"):
        hint = " If you meant another registry, put it before the name (nvcr.io/…)." if registry == "docker.io" else ""
        return f"{registry} refuses access to {reference}.{hint} To log in, {login_advice(tool, registry, environ)}"
    if _contains(text, MISSING) or _has_status(text, "404"):
        return f"{registry} has no {reference}. Check the name and the tag"
    return ""


def _contains(text: str, phrases: Sequence[str]) -> bool:
    return any(phrase in text for phrase in phrases)


def _has_status(text: str, number: str) -> bool:
    """Return True if the text contains an HTTP status, and not just its digits in a size or a digest."""
    return re.search(rf"(?<![\w.]){number}(?!\w|\.\d| ?[kmg]i?b\b)", text) is not None


def redact(text: str) -> str:
    """Replace passwords in addresses and authorization headers of a tool's output by ``***``."""
    text = re.sub(r"(https?://)[^/@\s]+@", r"\1***@", text)
    return re.sub(r"(?i)(authorization:\s*\w+|password|token|--creds)([=:\s]+)\S+", r"\1\2***", text)


# --- files ----------------------------------------------------------------------------------------------


def find_login(name: str, environ: Mapping[str, str], user: str = "") -> tuple[str, str] | None:
    """Return user and password for an image such as ``nvcr.io/nvidia/pytorch``; None if no file has them.

    ``user``: the only user to look for. Credential helpers are not run: see :func:`needs_helper`.
    """
    entries = (entry for entry in _entries(name, environ) if entry and user in ("", entry[0]))
    return next(entries, None)


def needs_helper(name: str, environ: Mapping[str, str]) -> bool:
    """Return True if the password comes from a helper program (credsStore, credHelpers, enroot's ``$(…)``)."""
    return any(entry is None for entry in _entries(name, environ))


def _entries(name: str, environ: Mapping[str, str]) -> Iterator[tuple[str, str] | None]:
    """Yield all credentials for an image, the most specific first; None stands for a helper program."""
    parts = name.split("/")
    # See containers-auth.json(5).
    keys = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    for file in credential_files("", environ):
        if file.name.endswith(".json"):
            yield from _docker_entries(_read_object(file), keys)
    with suppress(OSError):
        machines = NETRC_MACHINES.get(parts[0], (_without_port(parts[0]),))
        yield from _netrc_entries(enroot_file(environ).read_text(errors="replace"), machines)


def _read_object(file: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(file.read_bytes())
        return value if isinstance(value, dict) else {}
    return {}


def _docker_entries(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, str] | None]:
    """Yield the entries of a file in docker's format."""
    helpers, auths = config.get("credHelpers"), config.get("auths")
    if isinstance(helpers, dict) and {_normal_key(key) for key in helpers} & set(keys):
        yield None
    entries = {_normal_key(key): entry for key, entry in auths.items()} if isinstance(auths, dict) else {}
    for entry in (entries[key] for key in keys if key in entries):
        encoded = entry.get("auth") if isinstance(entry, dict) else None
        if not encoded:
            yield None
            continue
        with suppress(ValueError, TypeError):
            user, _, password = base64.b64decode(encoded).decode().partition(":")
            yield user, password


def _netrc_entries(text: str, machines: Sequence[str]) -> Iterator[tuple[str, str] | None]:
    """Yield the entries of a file in netrc's format as enroot reads it: a password may be a shell's ``$(…)``."""
    for entry in re.split(r"^(?=[ \t]*machine\s)", text, flags=re.MULTILINE):
        pairs = re.findall(r"(?:^|\s)(machine|login|password)\s+(\"[^\"]*\"|\S+)", re.sub(r"(?m)^\s*#.*", "", entry))
        # The first of each kind counts: a command may contain the same words.
        values = {key: value.strip('"') for key, value in reversed(pairs)}
        if values.get("machine") in machines and values.get("password"):
            is_command = bool(set("$`") & set(values["password"]))
            yield None if is_command else (values.get("login", ""), values["password"])


def _without_port(registry: str) -> str:
    """Return a registry's host; netrc has no ports."""
    return re.sub(r":\d+$", "", registry)


def enroot_file(environ: Mapping[str, str]) -> Path:
    """Locate enroot's credentials, a file in netrc's format."""
    config = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or Path.home(), ".config")
    return Path(environ.get("ENROOT_CONFIG_PATH") or f"{config}/enroot", ".credentials")


def credential_files(tool: str, environ: Mapping[str, str], *, here: bool = True) -> list[Path]:
    """List the files in which a tool looks for credentials; for an unknown tool the files of all tools.

    ``here``: True for this machine; False for nodes, which share the home folder but not ``/run``.
    """
    home, enroot = Path(environ.get("HOME") or Path.home()), enroot_file(environ)
    docker = Path(environ.get("DOCKER_CONFIG") or home / ".docker", "config.json")
    session = Path(f"/run/containers/{os.getuid()}")
    if environ.get("XDG_RUNTIME_DIR"):
        session = Path(environ["XDG_RUNTIME_DIR"], "containers")
    podman = [*([session / "auth.json"] if here else []), home / ".config" / "containers" / "auth.json", docker]
    if environ.get("REGISTRY_AUTH_FILE"):
        podman = [Path(environ["REGISTRY_AUTH_FILE"])]
    files = {
        "docker": [docker],
        "podman": podman,
        "apptainer": [home / ".apptainer" / "docker-config.json", docker],
        "singularity": [home / ".singularity" / "docker-config.json", docker],
        # Their format is different.
        "charliecloud": [],
        "pyxis": [enroot],
        "enroot": [enroot],
    }
    return files.get(tool, list(dict.fromkeys(file for tool_files in files.values() for file in tool_files)))


def _normal_key(text: str) -> str:
    """Return ``docker.io`` for ``https://index.docker.io/v1/``; a key may also name a repository."""
    bare = re.sub(r"^https?://|/v[12]/?$|/$", "", text)
    return re.sub(r"^(index|registry-1)\.docker\.io", "docker.io", bare)
