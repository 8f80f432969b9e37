"""Where each tool looks for a registry's credentials, and what to write there; and what its errors mean."""

from __future__ import annotations

import base64
import json
import netrc
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

REFUSED = ("401", "403", "unauthorized", "authentication required", "access denied", "requested access to the resource is denied", "denied:")
MISSING = ("manifest unknown", "manifest_unknown", "404", "name unknown", "not found", "no such image")
UNREACHABLE = (
    "no such host", "connection refused", "network is unreachable", "i/o timeout", "could not resolve", "timed out", "no route to host",
    "temporary failure in name resolution", "tls handshake", "connection reset", "deadline exceeded",
)  # fmt: skip
PLAIN_HTTP = ("server gave http response to https client", "http: server gave http", "wrong version number")
NO_SPACE = ("no space left on device", "disk quota exceeded")
NGC_USER = "$oauthtoken"
"""The user's name for nvcr.io, for everybody and as it stands; the password is an API key of ngc.nvidia.com (Setup)."""


def registry_of(reference: str) -> str:
    """``nvcr.io`` of ``nvcr.io/nvidia/pytorch:25.08-py3``; docker.io where none is named."""
    first, slash, _ = reference.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"


def where(tool: str, registry: str, environ: Mapping[str, str]) -> str:
    """Where a tool's credentials for a registry go, with the form of the line or the command that writes it."""
    home = environ.get("HOME", "~")
    user = NGC_USER if registry == "nvcr.io" else "USER"
    key = "an API key of ngc.nvidia.com" if registry == "nvcr.io" else "the password or a token"
    if tool == "enroot":
        more = ", and once more for machine authn.nvidia.com" if registry == "nvcr.io" else ""
        return f"{enroot_file(environ)} (mode 600) needs the line: machine {registry} login {user} password KEY{more}; KEY is {key}"
    if tool in ("apptainer", "singularity"):
        return f"{tool} registry login --username '{user}' docker://{registry} asks for {key}, and keeps it in {home}/.{tool}/docker-config.json"
    if tool == "docker":
        return f"docker login {registry} --username '{user}' asks for {key}, and keeps it in {environ.get('DOCKER_CONFIG', home + '/.docker')}/config.json"
    run = environ.get("XDG_RUNTIME_DIR")
    lasting = f"{home}/.docker/config.json"
    file = environ.get("REGISTRY_AUTH_FILE") or (f"{run}/containers/auth.json, until you log out; --authfile {lasting} keeps it" if run else lasting)
    return f"{tool} login {registry} --username '{user}' asks for {key}, and keeps it in {file}"


def login(name: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """User and password for ``nvcr.io/nvidia/pytorch`` in the files that the tools themselves keep; None where none has any.

    They are for the registry alone. A password that a program keeps (credsStore, credHelpers) is not asked for.
    """
    parts = name.split("/")
    wanted = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]  # the nearest first (containers-auth.json(5))
    for file in files("", environ):
        with suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
            entries = {_key(key): entry for key, entry in json.loads(file.read_bytes())["auths"].items() if entry.get("auth")}
            found = next((entries[key] for key in wanted if key in entries), None)
            if found:
                user, _, password = base64.b64decode(found["auth"]).decode().partition(":")
                return user, password
    with suppress(OSError, ValueError, netrc.NetrcParseError, KeyError):
        name, _, word = netrc.netrc(enroot_file(environ)).hosts[parts[0].partition(":")[0]]
        if word and not set("$`") & set(word):  # else enroot's shell makes a password of it
            return name, word
    return None


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
    session = Path(environ["XDG_RUNTIME_DIR"], "containers") if environ.get("XDG_RUNTIME_DIR") else Path(f"/run/containers/{os.getuid()}")
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
    if any(word in low for word in REFUSED):
        hint = "" if registry != "docker.io" else " (is the registry missing, as nvcr.io/ before the name?)"
        return f"{registry} does not let you have {reference}{hint}: {where(tool, registry, environ)}"
    if any(word in low for word in MISSING):
        return f"{registry} has no {reference}: look at the spelling and the tag"
    if any(word in low for word in UNREACHABLE):
        return (
            f"{registry} cannot be reached from here; on a machine that reaches it: skopeo copy docker://{reference} docker-archive:image.tar, "
            "copy that file here, and import it: amlaunch image import image.tar"
        )
    return ""


def without_secrets(text: str) -> str:
    """A tool's words, with passwords in addresses and authorization headers blotted out."""
    text = re.sub(r"(https?://)[^/@\s]+@", r"\1***@", text)
    return re.sub(r"(?i)(authorization:\s*\w+|password|token|--creds)([=:\s]+)\S+", r"\1\2***", text)
