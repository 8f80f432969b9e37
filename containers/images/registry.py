"""Ask a registry about an image without fetching it: its digest, the size of its layers, its architectures.

The tools that fetch images report none of these before they begin (only skopeo can), so all of them are served here in
one way: https://github.com/opencontainers/distribution-spec (pulling manifests) and
https://distribution.github.io/distribution/spec/auth/token. A tool may still succeed where this fails, because it knows
mirrors, certificates and password helpers that are not consulted here.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from amlaunch.containers.images import credentials
from amlaunch.containers.images.reference import DOCKER_HUB, Reference

DOCKER_HUB_HOST = "registry-1.docker.io"
TIMEOUT_SECONDS = 15.0
"""For a connection, and between two pieces of an answer."""
MAX_ANSWER_BYTES = 16 << 20
"""Longest manifest that is read; the specification asks for at least 4 MiB."""
MAX_IMAGE_BYTES = 1 << 50
"""Largest plausible size of all layers."""
MAX_INDEX_ENTRIES = 1000
MEDIA_TYPES = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
    )
)  # fmt: skip


class RegistryError(Exception):
    """A failed query of a registry; the message says why."""

    def __init__(self, message: str, status: int = 0, summary: str = "", challenge: str = ""):
        super().__init__(message)
        self.status = status
        """HTTP status about the image itself: 404 from a registry that let us in, 401 or 403 from one that did not.

        0 if there was no such answer.
        """
        self.summary = summary
        """The answer in short, such as ``404 Not Found``."""
        self.challenge = challenge
        """The registry's WWW-Authenticate header."""


@dataclass(frozen=True)
class ImageManifest:
    """An image for one architecture, as its registry describes it."""

    digest: str
    size: int
    """Bytes of all layers as they are fetched, compressed."""
    architectures: tuple[str, ...]
    """All architectures that the registry has; empty if it does not say."""
    config: str = ""
    """Digest of the image's configuration."""


class ManifestCache(Protocol):
    """Manifests by their digests, whose meaning never changes."""

    def get(self, digest: str) -> ImageManifest | None:
        """Return the manifest of a digest; None if it is not cached."""

    def put(self, digest: str, manifest: ImageManifest) -> None:
        """Keep a manifest."""


def fetch_manifest(
    image: Reference,
    architecture: str,
    environ: Mapping[str, str],
    *,
    insecure: bool = False,
    seconds: float = TIMEOUT_SECONDS,
    cache: ManifestCache | None = None,
) -> ImageManifest:
    """Ask an image's registry about the image for an architecture, or for the first one that it has.

    ``insecure``: accept bad certificates, and plain HTTP if the registry has no TLS. With a ``cache`` the digest is
    asked for first, which Docker Hub does not count as a pull, and a cached manifest is not fetched again. Raises
    RegistryError.
    """
    with _malformed_answers_reported(image.registry):
        session = _Session(image, environ, insecure, seconds)
        version = image.digest or image.tag
        digest = (image.digest or session.digest(version)) if cache else ""
        cached = cache.get(digest) if cache and digest else None
        if cached:
            return cached

        manifest = parse_manifest(session.manifest(version), architecture, session.manifest_in_index, image.registry)
        if not manifest.architectures:
            manifest = replace(manifest, architectures=_config_architectures(session, manifest.config))
        if cache and digest:
            cache.put(digest, manifest)
        return manifest


def parse_manifest(raw: bytes, architecture: str, fetch: Callable[[str], bytes], registry: str) -> ImageManifest:
    """Read a manifest, or an index: its entry for an architecture, or else its first.

    ``fetch`` returns the manifest of a digest. Raises RegistryError, and what ``fetch`` raises.
    """
    with _malformed_answers_reported(registry):
        manifest, digest = _parse_object(raw), f"sha256:{hashlib.sha256(raw).hexdigest()}"
        architectures: tuple[str, ...] = ()
        if "manifests" in manifest:
            listed = manifest["manifests"][:MAX_INDEX_ENTRIES]
            entries = {name: entry for entry in reversed(listed) if (name := _architecture(entry.get("platform")))}
            # An entry without a platform serves all architectures, so the index then does not list them.
            universal = next((entry for entry in listed if not entry.get("platform")), None)
            digest = _check_digest((entries.get(architecture) or universal or listed[0])["digest"])
            architectures = () if universal else tuple(reversed(entries))
            manifest = _parse_object(fetch(digest))
        config = manifest.get("config") or {}
        config_digest = _check_digest(config["digest"]) if config else ""
        return ImageManifest(digest, _total_size(manifest["layers"]), architectures, config_digest)


@contextmanager
def _malformed_answers_reported(registry: str) -> Iterator[None]:
    """Turn whatever reading a malformed manifest raises into RegistryError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise RegistryError(f"{registry} answers with an unknown kind of manifest") from None


def _total_size(layers: Sequence[Any]) -> int:
    size = sum(int(layer["size"]) for layer in layers)
    if not 0 <= size <= MAX_IMAGE_BYTES:
        raise ValueError(layers)
    return size


def _check_digest(text: Any) -> str:
    """Return a digest that is safe in a URL and in a command. Raises ValueError and TypeError."""
    if not re.fullmatch(r"[A-Za-z0-9+._-]+:[A-Za-z0-9=_-]{1,256}", text):
        raise ValueError(text)
    return str(text)


def _architecture(platform: Any) -> str:
    """Return the architecture of a platform; empty for "unknown", under which indexes list attestations."""
    name = str((platform or {}).get("architecture") or "")
    return "" if name == "unknown" or not re.fullmatch(r"\w{1,32}", name) else name


def _config_architectures(session: _Session, digest: str) -> tuple[str, ...]:
    """Return the architecture of an image's configuration; a manifest alone does not contain it."""
    try:
        with _malformed_answers_reported(session.image.registry):
            name = _architecture(_parse_object(session.blob(digest))) if digest else ""
    except RegistryError:
        return ()
    return (name,) if name else ()


def _parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError and RecursionError."""
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError(value)
    return value


class _Session:
    """A series of requests to one registry about one image."""

    def __init__(self, image: Reference, environ: Mapping[str, str], insecure: bool, seconds: float):
        self.image, self.environ, self.insecure, self.seconds = image, environ, insecure, seconds
        self.registry = image.registry
        self.host = DOCKER_HUB_HOST if image.registry == DOCKER_HUB else image.registry
        self.schemes = ["https", "http"] if insecure else ["https"]
        self.authorization = ""
        context = ssl.create_default_context()
        if insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))

    def digest(self, version: str) -> str:
        """Return the digest of the manifest or index under a tag; empty if the registry does not say."""
        with suppress(RegistryError, ValueError, TypeError):
            return _check_digest(self._request(f"manifests/{version}", "HEAD")[1])
        return ""

    def manifest(self, version: str) -> bytes:
        """Return the manifest or index under a tag or a digest, byte for byte. Raises RegistryError."""
        try:
            return self._request(f"manifests/{version}")[0]
        except RegistryError as error:
            is_anonymous = bool(self.authorization) and not self._login()
            if error.status == 404 and is_anonymous and self._runtime_may_log_in():
                raise RegistryError(
                    f"{self.registry} has no such public image ({error.summary}); credential helpers were not tried",
                    0,
                    error.summary,
                ) from None
            raise

    def manifest_in_index(self, digest: str) -> bytes:
        """Return a manifest that an index lists. If it is missing, that says nothing about the image's name.

        Raises RegistryError.
        """
        try:
            return self._request(f"manifests/{digest}")[0]
        except RegistryError as error:
            raise RegistryError(
                f"{self.registry} does not return a manifest that its index lists ({error.summary})", 0, error.summary
            ) from None

    def blob(self, digest: str) -> bytes:
        """Return a blob, cut off at MAX_ANSWER_BYTES. Raises RegistryError."""
        return self._request(f"blobs/{digest}")[0]

    def _request(self, resource: str, method: str = "GET") -> tuple[bytes, str | None]:
        """Return the content of a resource and its digest header; authenticate if the registry asks for it."""
        try:
            return self._send(self._url(resource), self.authorization, method)
        except RegistryError as error:
            if error.status == 0 and len(self.schemes) > 1:
                self.schemes = self.schemes[1:]
                return self._request(resource, method)
            if error.status not in (401, 404) or self.authorization:
                raise
            refusal = error if error.status == 401 else self._probe_authentication()
            if refusal is None:
                raise
        self.authorization = self._authenticate(refusal)
        return self._send(self._url(resource), self.authorization, method)

    def _url(self, resource: str) -> str:
        return f"{self.schemes[0]}://{self.host}/v2/{self.image.repository}/{resource}"

    def _probe_authentication(self) -> RegistryError | None:
        """Return the challenge of a registry that answers 404 to anonymous requests; None if it has none.

        Raises RegistryError if the host is not a registry.
        """
        try:
            self._send(f"{self.schemes[0]}://{self.host}/v2/", "")
        except RegistryError as error:
            if error.status == 401:
                return error
            raise RegistryError(
                f"{self.registry} does not answer like a registry ({error.summary})", 0, error.summary
            ) from None
        return None

    @property
    def _name(self) -> str:
        return f"{self.registry}/{self.image.repository}"

    def _login(self) -> tuple[str, str] | None:
        return credentials.find_login(self._name, self.environ, self.image.user)

    def _runtime_may_log_in(self) -> bool:
        """Return True if a runtime may have credentials that are not available here."""
        return bool(self.image.user) or credentials.needs_helper(self._name, self.environ)

    def _authenticate(self, refusal: RegistryError) -> str:
        """Return an Authorization header from the token service: for the user's credentials, else anonymous."""
        kind, _, rest = refusal.challenge.partition(" ")
        login = self._login()
        basic = f"Basic {base64.b64encode(':'.join(login).encode()).decode()}" if login else ""
        if kind.lower() == "basic" and basic:
            return basic

        fields = _challenge_fields(rest)
        realm = fields.get("realm", "")
        if kind.lower() != "bearer" or not realm.startswith(tuple(f"{scheme}://" for scheme in self.schemes)):
            raise refusal
        query = urllib.parse.urlencode([(key, fields[key]) for key in ("service", "scope") if key in fields])
        separator = "&" if "?" in realm else "?"
        return f"Bearer {self._fetch_token(realm, f'{realm}{separator}{query}', basic)}"

    def _fetch_token(self, realm: str, url: str, basic: str) -> str:
        """Fetch a token. Only a refusal concerns the credentials; other failures say nothing about the image."""
        try:
            raw, _ = self._send(url, basic)
        except RegistryError as error:
            if error.status in (401, 403):
                raise
            raise RegistryError(
                f"{self.registry}: no token from its token service {realm[:200]!r} ({error.summary})", 0, error.summary
            ) from None
        with suppress(ValueError, RecursionError):
            answer = _parse_object(raw)
            token = answer.get("token") or answer.get("access_token")
            if isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token):
                return token
        raise RegistryError(f"{self.registry}: no token from its token service {realm[:200]!r}") from None

    def _send(self, url: str, authorization: str, method: str = "GET") -> tuple[bytes, str | None]:
        """Send one request. Raises RegistryError."""
        try:
            accept = f"{MEDIA_TYPES}, application/json"
            request = urllib.request.Request(url, method=method, headers={"Accept": accept})
            if authorization:
                # Unredirected: it is for this host only.
                request.add_unredirected_header("Authorization", authorization)
            with self.opener.open(request, timeout=self.seconds) as answer:
                content = bytes(answer.read(MAX_ANSWER_BYTES)) if method == "GET" else b""
                return content, answer.headers.get("Docker-Content-Digest")
        except urllib.error.HTTPError as error:
            with error:
                raise self._http_failure(error, url) from None
        except OSError as error:
            reason = str(getattr(error, "reason", None) or error)[:200]
            raise RegistryError(f"{self.registry} cannot be reached ({reason})", 0, reason) from None
        except (http.client.HTTPException, ValueError) as error:
            # Its text may be a proxy's address with a password, so only its type is quoted.
            reason = type(error).__name__
            raise RegistryError(f"{self.registry} cannot be reached ({reason})", 0, reason) from None

    def _http_failure(self, error: urllib.error.HTTPError, url: str) -> RegistryError:
        summary = f"{error.code} {http.client.responses.get(error.code, '')}".strip()
        # An answer from another host, after a redirect, is not the registry's.
        if error.geturl() != url:
            return RegistryError(f"{self.registry} redirects to a host that fails ({summary})", 0, summary)
        problems = {401: "requires a login", 403: "requires a login", 404: "has no such image"}
        problem = problems.get(error.code, "returned an error")
        return RegistryError(f"{self.registry} {problem} ({summary})", error.code, summary, _challenge(error))


def _challenge(error: urllib.error.HTTPError) -> str:
    """Return the WWW-Authenticate header; a bearer challenge if there are several."""
    challenges = error.headers.get_all("WWW-Authenticate") or [""]
    return next((text for text in challenges if text.lower().startswith("bearer")), challenges[0])


def _challenge_fields(text: str) -> dict[str, str]:
    """Parse ``key="value"`` pairs separated by commas; empty if they are malformed."""
    try:
        return urllib.request.parse_keqv_list([item for item in urllib.request.parse_http_list(text) if "=" in item])
    except (IndexError, ValueError):
        return {}
