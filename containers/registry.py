"""What a registry says of an image without fetching it: its digest, and the bytes of its layers.

The tools that fetch images say neither before they begin (skopeo does), so the question is asked here, one way for all:
https://github.com/opencontainers/distribution-spec (pulling manifests) and https://distribution.github.io/distribution/spec/auth/token.
A tool may still get what this does not: it knows mirrors, certificates and helpers for passwords that are not looked for here.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from containers import credentials
from containers.reference import DOCKER_HUB, Reference

HOST_OF_HUB = "registry-1.docker.io"
SECONDS = 15.0
"""For a connection, and between two pieces of an answer."""
MOST = 16 << 20
"""Bytes of a manifest; the specification allows 4 MiB at least."""
KINDS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
    )
)  # fmt: skip


class Unanswered(Exception):
    """A registry that did not say; the message is why."""

    def __init__(self, why: str, status: int = 0, challenge: str = ""):
        super().__init__(why)
        self.status = status
        """The answer's number; 0: there was none."""
        self.challenge = challenge


@dataclass(frozen=True)
class Manifest:
    """An image for one architecture, as a registry has it."""

    digest: str
    size: int
    """Bytes of all layers, as they are fetched: compressed."""
    architectures: tuple[str, ...]
    """All that the registry has it for; empty: it does not say."""


def look(image: Reference, architecture: str, environ: Mapping[str, str], *, insecure: bool = False, seconds: float = SECONDS) -> Manifest:
    """Ask an image's registry about it for an architecture, or, where it has none for that one, for the first that it has.

    ``insecure``: without certificates, or without TLS, where it has none. Raises Unanswered.
    """
    session = _Session(image, environ, insecure, seconds)
    raw = session.manifest(image.digest or image.tag)
    found, digest = _object(raw), f"sha256:{hashlib.sha256(raw).hexdigest()}"
    try:
        if "manifests" in found:
            entries = {name: entry for entry in reversed(found["manifests"]) if (name := _architecture(entry.get("platform")))}
            entry = entries.get(architecture) or found["manifests"][0]
            digest, named = str(entry["digest"]), tuple(reversed(entries))
            found = _object(session.manifest(digest))
        else:
            named = _of_config(session, str(found["config"]["digest"]))
        return Manifest(digest, sum(int(layer["size"]) for layer in found["layers"]), named)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise Unanswered(f"{image.registry} answers with a manifest of a kind that is not known here") from None


def _architecture(platform: Any) -> str:
    """Empty for what is no image: indexes list attestations for an unknown one."""
    name = str((platform or {}).get("architecture") or "")
    return "" if name == "unknown" else name


def _of_config(session: _Session, digest: str) -> tuple[str, ...]:
    """A manifest alone does not say for which architecture it is; the configuration that it names does."""
    try:
        name = _architecture(_object(session.blob(digest)))
    except Unanswered:
        return ()
    return (name,) if name else ()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Unanswered("the answer is not a manifest")
    return found


class _Session:
    """One registry, and its permission once it was given."""

    def __init__(self, image: Reference, environ: Mapping[str, str], insecure: bool, seconds: float):
        self.image, self.environ, self.insecure, self.seconds = image, environ, insecure, seconds
        host = HOST_OF_HUB if image.registry == DOCKER_HUB else image.registry
        self.place = f"{host}/v2/{image.repository}"
        self.schemes = ["https", "http"] if insecure else ["https"]
        self.permission = ""
        context = ssl.create_default_context()
        if insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))

    def manifest(self, version: str) -> bytes:
        """The manifest or index under a tag or a digest, byte for byte. Raises Unanswered."""
        return self._ask(f"manifests/{version}")

    def blob(self, digest: str) -> bytes:
        """What a manifest names; the beginning of it, where it is long. Raises Unanswered."""
        return self._ask(f"blobs/{digest}")

    def _ask(self, what: str) -> bytes:
        try:
            return self._get(f"{self.schemes[0]}://{self.place}/{what}", self.permission)
        except Unanswered as error:
            if error.status == 0 and len(self.schemes) > 1:
                self.schemes = self.schemes[1:]
                return self._ask(what)
            if error.status != 401 or self.permission:
                raise
            self.permission = self._ask_permission(error)
        return self._get(f"{self.schemes[0]}://{self.place}/{what}", self.permission)

    def _ask_permission(self, refusal: Unanswered) -> str:
        """A token of the service that the registry names, for the user whose credentials lie here, else for anybody."""
        kind, _, rest = refusal.challenge.partition(" ")
        login = credentials.login(f"{self.image.registry}/{self.image.repository}", self.environ)
        basic = f"Basic {base64.b64encode(':'.join(login).encode()).decode()}" if login else ""
        if kind.lower() == "basic" and basic:
            return basic
        said = urllib.request.parse_keqv_list([one for one in urllib.request.parse_http_list(rest) if "=" in one])
        realm = said.get("realm", "")
        if kind.lower() != "bearer" or not realm.startswith(tuple(f"{scheme}://" for scheme in self.schemes)):
            raise refusal
        query = urllib.parse.urlencode([(key, value) for key, value in said.items() if key in ("service", "scope")])
        answer = _object(self._get(f"{realm}{'&' if '?' in realm else '?'}{query}", basic))
        return f"Bearer {answer.get('token') or answer.get('access_token')}"

    def _get(self, url: str, permission: str) -> bytes:
        request = urllib.request.Request(url, headers={"Accept": f"{KINDS}, application/json"})
        if permission:
            request.add_unredirected_header("Authorization", permission)  # it is for this host alone
        try:
            with self.opener.open(request, timeout=self.seconds) as answer:
                return bytes(answer.read(MOST))
        except urllib.error.HTTPError as error:
            with error:
                words = {401: "wants credentials", 403: "wants credentials", 404: "has no such image"}.get(error.code, "does not say")
                raise Unanswered(f"{self.image.registry} {words} ({error.code} {error.reason})", error.code, _challenge(error)) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unanswered(f"{self.image.registry} cannot be asked ({getattr(error, 'reason', None) or error})") from None


def _challenge(error: urllib.error.HTTPError) -> str:
    """How a registry wants to be asked; of several ways the token."""
    found = error.headers.get_all("WWW-Authenticate") or [""]
    return next((one for one in found if one.lower().startswith("bearer")), found[0])
