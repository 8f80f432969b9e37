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

HOST_OF_HUB = "registry-1.docker.io"
SECONDS = 15.0
"""For a connection, and between two pieces of an answer."""
MOST = 16 << 20
"""Bytes of a manifest; the specification allows 4 MiB at least."""
LARGEST = 1 << 50
"""Bytes of layers; what says more is no image."""
MANY = 1000
"""Of an index no more is looked at."""
KINDS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
    )
)  # fmt: skip


class Unanswered(Exception):
    """A registry that did not say; the message is why."""

    def __init__(self, why: str, status: int = 0, said: str = "", challenge: str = ""):
        super().__init__(why)
        self.said = said
        """The answer in short: ``404 Not Found``."""
        self.status = status
        """The number of its answer about the image: 404 where it let us in and has none, 401 or 403 where it did not; 0: there was no such answer."""
        self.challenge = challenge


@dataclass(frozen=True)
class Manifest:
    """An image for one architecture, as a registry has it."""

    digest: str
    size: int
    """Bytes of all layers, as they are fetched: compressed."""
    architectures: tuple[str, ...]
    """All that the registry has it for; empty: it does not say."""
    config: str = ""
    """The digest of its configuration, which says more."""


class Memory(Protocol):
    """What was said before of an image's digest, which stands for the same for ever."""

    def find(self, digest: str) -> Manifest | None:
        """None: nothing is known."""

    def keep(self, digest: str, found: Manifest) -> None:
        """For the next time."""


def look(
    image: Reference,
    architecture: str,
    environ: Mapping[str, str],
    *,
    insecure: bool = False,
    seconds: float = SECONDS,
    memory: Memory | None = None,
) -> Manifest:
    """Ask an image's registry about it for an architecture, or, where it has none for that one, for the first that it has.

    ``insecure``: without certificates, or without TLS, where it has none. With a ``memory`` its digest is asked for first, which Docker
    Hub does not count as a pull, and what is known of that digest is not asked again. Raises Unanswered.
    """
    with _odd(image.registry):
        session = _Session(image, environ, insecure, seconds)
        version = image.digest or image.tag
        digest = (image.digest or session.digest(version)) if memory else ""
        known = memory.find(digest) if memory and digest else None
        if known:
            return known
        found = read(session.manifest(version), architecture, session.part, image.registry)
        found = found if found.architectures else replace(found, architectures=_of_config(session, found.config))
        if memory and digest:
            memory.keep(digest, found)
        return found


def read(raw: bytes, architecture: str, fetch: Callable[[str], bytes], who: str) -> Manifest:
    """What a manifest says, or an index: of the architecture, or, where it has none for that one, of the first that it has.

    ``fetch`` brings the manifest of a digest. ``who`` answers. Raises Unanswered, and what ``fetch`` does.
    """
    with _odd(who):
        found, digest = _object(raw), f"sha256:{hashlib.sha256(raw).hexdigest()}"
        named: tuple[str, ...] = ()
        if "manifests" in found:
            listed = found["manifests"][:MANY]
            entries = {name: entry for entry in reversed(listed) if (name := _architecture(entry.get("platform")))}
            # One without a word about it is for any, and the index then does not say for which.
            plain = next((entry for entry in listed if not entry.get("platform")), None)
            digest = _digest((entries.get(architecture) or plain or listed[0])["digest"])
            named = () if plain else tuple(reversed(entries))
            found = _object(fetch(digest))
        config = found.get("config") or {}
        return Manifest(digest, _size(found["layers"]), named, _digest(config["digest"]) if config else "")


@contextmanager
def _odd(who: str) -> Iterator[None]:
    """Whatever else than a manifest came, nested a thousand times or without an end, is no answer."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise Unanswered(f"{who} answers with a manifest of a kind that is not known here") from None


def _size(listed: Sequence[Any]) -> int:
    size = sum(int(layer["size"]) for layer in listed)
    if not 0 <= size <= LARGEST:
        raise ValueError(listed)
    return size


def _digest(text: Any) -> str:
    """One that an address and a command can have in them. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9+._-]+:[A-Za-z0-9=_-]{1,256}", text):
        raise ValueError(text)
    return str(text)


def _architecture(platform: Any) -> str:
    """Empty for what is no image: indexes list attestations for an unknown one."""
    name = str((platform or {}).get("architecture") or "")
    return "" if name == "unknown" or not re.fullmatch(r"\w{1,32}", name) else name


def _of_config(session: _Session, digest: str) -> tuple[str, ...]:
    """A manifest alone does not say for which architecture it is; the configuration that it names does."""
    try:
        with _odd(session.image.registry):
            name = _architecture(_object(session.blob(digest))) if digest else ""
    except Unanswered:
        return ()
    return (name,) if name else ()


def _object(raw: bytes) -> dict[str, Any]:
    """Raises ValueError, and RecursionError."""
    found = json.loads(raw)
    if not isinstance(found, dict):
        raise ValueError(found)
    return found


class _Session:
    """One registry, and its permission once it was given."""

    def __init__(self, image: Reference, environ: Mapping[str, str], insecure: bool, seconds: float):
        self.image, self.environ, self.insecure, self.seconds = image, environ, insecure, seconds
        self.host = HOST_OF_HUB if image.registry == DOCKER_HUB else image.registry
        self.schemes = ["https", "http"] if insecure else ["https"]
        self.permission = ""
        context = ssl.create_default_context()
        if insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))

    def digest(self, version: str) -> str:
        """Of the manifest or index under a tag; empty where the registry does not say, or not in this way."""
        with suppress(Unanswered, ValueError, TypeError):
            return _digest(self._ask(f"manifests/{version}", "HEAD")[1])
        return ""

    def manifest(self, version: str) -> bytes:
        """The manifest or index under a tag or a digest, byte for byte. Raises Unanswered."""
        try:
            return self._ask(f"manifests/{version}")[0]
        except Unanswered as error:
            if error.status == 404 and self.permission and not self._login() and self._may_be_known():
                raise Unanswered(
                    f"{self.image.registry} has no such image for everybody ({error.said}), and a password that a program keeps is not asked for",
                    0,
                    error.said,
                ) from None
            raise

    def part(self, digest: str) -> bytes:
        """The manifest that an index names. That one is missing says nothing of the image's name. Raises Unanswered."""
        try:
            return self._ask(f"manifests/{digest}")[0]
        except Unanswered as error:
            raise Unanswered(
                f"{self.image.registry} does not say what its index names ({error.said})", 0, error.said
            ) from None

    def blob(self, digest: str) -> bytes:
        """What a manifest names; the beginning of it, where it is long. Raises Unanswered."""
        return self._ask(f"blobs/{digest}")[0]

    def _ask(self, what: str, method: str = "GET") -> tuple[bytes, str | None]:
        """The answer, and the digest that is said of it."""
        try:
            return self._get(self._address(what), self.permission, method)
        except Unanswered as error:
            if error.status == 0 and len(self.schemes) > 1:
                self.schemes = self.schemes[1:]
                return self._ask(what, method)
            if error.status not in (401, 404) or self.permission:
                raise
            refusal = error if error.status == 401 else self._door()
            if refusal is None:
                raise
        self.permission = self._ask_permission(refusal)
        return self._get(self._address(what), self.permission, method)

    def _address(self, what: str) -> str:
        return f"{self.schemes[0]}://{self.host}/v2/{self.image.repository}/{what}"

    def _door(self) -> Unanswered | None:
        """How the registry wants to be asked, where it says 404 to strangers; None: it wants nothing. Raises Unanswered for what is no registry."""
        try:
            self._get(f"{self.schemes[0]}://{self.host}/v2/", "")
        except Unanswered as error:
            if error.status == 401:
                return error
            raise Unanswered(
                f"{self.image.registry} does not answer as a registry does ({error.said})", 0, error.said
            ) from None
        return None

    @property
    def _name(self) -> str:
        return f"{self.image.registry}/{self.image.repository}"

    def _login(self) -> tuple[str, str] | None:
        return credentials.login(self._name, self.environ, self.image.user)

    def _may_be_known(self) -> bool:
        """Whether the runtimes may come with a name that we do not have."""
        return bool(self.image.user) or credentials.kept_elsewhere(self._name, self.environ)

    def _ask_permission(self, refusal: Unanswered) -> str:
        """A token of the service that the registry names, for the user whose credentials lie here, else for anybody."""
        kind, _, rest = refusal.challenge.partition(" ")
        login = self._login()
        basic = f"Basic {base64.b64encode(':'.join(login).encode()).decode()}" if login else ""
        if kind.lower() == "basic" and basic:
            return basic
        said = _fields(rest)
        realm = said.get("realm", "")
        if kind.lower() != "bearer" or not realm.startswith(tuple(f"{scheme}://" for scheme in self.schemes)):
            raise refusal
        query = urllib.parse.urlencode([(key, value) for key, value in said.items() if key in ("service", "scope")])
        token = self._token(realm, f"{realm}{'&' if '?' in realm else '?'}{query}", basic)
        return f"Bearer {token}"

    def _token(self, realm: str, url: str, basic: str) -> str:
        """What that service answers is no word of the image, but that it does not know us."""
        try:
            raw, _ = self._get(url, basic)
        except Unanswered as error:
            if error.status in (401, 403):
                raise
            raise Unanswered(
                f"{self.image.registry} gives permission at {realm[:200]!r}, and no token came from there ({error.said})",
                0,
                error.said,
            ) from None
        with suppress(ValueError, RecursionError):
            found = _object(raw)
            token = found.get("token") or found.get("access_token")
            if isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token):
                return token
        raise Unanswered(
            f"{self.image.registry} gives permission at {realm[:200]!r}, and no token came from there"
        ) from None

    def _get(self, url: str, permission: str, method: str = "GET") -> tuple[bytes, str | None]:
        try:
            request = urllib.request.Request(url, method=method, headers={"Accept": f"{KINDS}, application/json"})
            if permission:
                request.add_unredirected_header("Authorization", permission)  # it is for this host alone
            with self.opener.open(request, timeout=self.seconds) as answer:
                return bytes(answer.read(MOST)) if method == "GET" else b"", answer.headers.get("Docker-Content-Digest")
        except urllib.error.HTTPError as error:
            with error:
                said = f"{error.code} {http.client.responses.get(error.code, '')}".strip()
                words = {401: "wants credentials", 403: "wants credentials", 404: "has no such image"}.get(
                    error.code, "does not say"
                )
                own = (
                    error.geturl() == url
                )  # what another host says, to which we were sent on, is not the registry's word
                raise Unanswered(
                    f"{self.image.registry} {words if own else 'does not say'} ({said})",
                    error.code if own else 0,
                    said,
                    _challenge(error),
                ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            # What cannot be read may be a proxy's address, with a password in it: it is not quoted.
            said = (
                str(getattr(error, "reason", None) or error)[:200]
                if isinstance(error, OSError)
                else type(error).__name__
            )
            raise Unanswered(f"{self.image.registry} cannot be asked ({said})", 0, said) from None


def _challenge(error: urllib.error.HTTPError) -> str:
    """How a registry wants to be asked; of several ways the token."""
    found = error.headers.get_all("WWW-Authenticate") or [""]
    return next((one for one in found if one.lower().startswith("bearer")), found[0])


def _fields(text: str) -> dict[str, str]:
    """``key="value"`` with commas between; empty where it is not written so."""
    try:
        return urllib.request.parse_keqv_list([one for one in urllib.request.parse_http_list(text) if "=" in one])
    except (IndexError, ValueError):
        return {}
