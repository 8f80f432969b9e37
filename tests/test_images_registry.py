"""What a registry says of an image before it is fetched, and with whose credentials it is asked."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from image_helpers import Registry, layer, need, write_layout

from containers import credentials, parse
from containers.layers import NotAnImage
from containers.registry import Unanswered, look

PASSWORD, HASH = "correct horse", "$2b$04$QxIqyGEg9gvPkPfnIj7FQOAkoa70RIMTZnyqrln0Vsak2G8Lvxeo6"


def write_auths(path: Path, **auths: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: {"auth": base64.b64encode(login.encode()).decode()} for name, login in auths.items()}
    path.write_text(json.dumps({"auths": entries}))
    return path


@pytest.fixture
def registry(tmp_path) -> Iterator[Registry]:
    """One that wants a password."""
    need("docker-registry", "skopeo")
    (tmp_path / "registry").mkdir()
    found = Registry(tmp_path / "registry", HASH)
    yield found
    found.process.terminate()
    found.process.wait()


def test_digest_and_size_as_the_registry_has_them(tmp_path, registry):
    layout = write_layout(tmp_path / "oci", [layer([("a", b"1")]), layer([("blob", os.urandom(3 << 20))])])
    image = parse(registry.push(layout, "team/tiny:1", f"me:{PASSWORD}"))
    home = {"HOME": str(tmp_path)}
    with pytest.raises(Unanswered, match="wants credentials") as refused:
        look(image, "amd64", home, insecure=True)
    assert refused.value.status == 401
    auths = write_auths(tmp_path / ".docker" / "config.json", **{image.registry: f"me:{PASSWORD}"})
    found = look(image, "amd64", home, insecure=True)
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads((layout / "blobs" / "sha256" / entry["digest"][7:]).read_text())
    assert found.digest == entry["digest"] and found.size == sum(one["size"] for one in manifest["layers"]) > 3 << 20
    assert look(parse(f"{image.registry}/team/tiny@{found.digest}"), "arm64", home, insecure=True) == found, "an image that is for one alone does not say so in its manifest"
    with pytest.raises(Unanswered, match="has no such image") as missing:
        look(parse(f"{image.registry}/team/tiny:2"), "amd64", home, insecure=True)
    assert missing.value.status == 404
    write_auths(auths, **{image.registry: "me:wrong horse"})
    with pytest.raises(Unanswered, match="wants credentials") as refused:
        look(image, "amd64", home, insecure=True)
    assert "horse" not in str(refused.value)
    with pytest.raises(Unanswered, match="cannot be asked") as unencrypted:
        look(image, "amd64", home)
    assert unencrypted.value.status == 0


class TokenService(BaseHTTPRequestHandler):
    """A registry of an index for two architectures, which gives tokens as Docker Hub and nvcr.io do; and where it sends one on."""

    index: dict
    blobs: dict[str, bytes]
    seen: list[tuple[str, str]]

    def do_GET(self):
        permission = self.headers.get("Authorization", "")
        self.seen.append((self.path, permission))
        host = self.headers["Host"]
        if self.path.startswith("/token"):
            self.answer(200, json.dumps({"token": "good" if permission else "anonymous"}).encode())
        elif self.path.startswith("/elsewhere/"):
            self.answer(200, self.blobs[self.path.rpartition("/")[2]])
        elif not permission.startswith("Bearer"):
            self.answer(401, b"", **{"WWW-Authenticate": f'Bearer realm="http://{host}/token?account=x",service="tests, and more",scope="repository:team/tiny:pull"'})
        elif "sha256" in self.path:
            self.answer(307, b"", Location=f"/elsewhere/{self.path.rpartition('/')[2]}")
        else:
            self.answer(200, json.dumps(self.index).encode())

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *words):
        pass


@pytest.fixture
def service() -> Iterator[tuple[str, type[TokenService]]]:
    sizes = {"amd64": [5, 6], "arm64": [7]}
    raw = {name: json.dumps({"layers": [{"size": size} for size in found]}).encode() for name, found in sizes.items()}
    digests = {name: f"sha256:{hashlib.sha256(one).hexdigest()}" for name, one in raw.items()}
    TokenService.index = {"manifests": [{"digest": digest, "platform": {"architecture": name, "os": "linux"}} for name, digest in digests.items()]}
    TokenService.blobs = {digests[name]: one for name, one in raw.items()}
    TokenService.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), TokenService)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", TokenService
    server.shutdown()
    server.server_close()


def test_a_token_for_anybody_or_for_the_user_of_an_architectures_image(tmp_path, service):
    place, seen = service[0], service[1].seen
    image = parse(f"{place}/team/tiny:1")
    assert [look(image, name, {"HOME": str(tmp_path)}, insecure=True).size for name in ("amd64", "arm64")] == [11, 7]
    token = next(entry for entry in seen if entry[0].startswith("/token"))
    assert token == ("/token?account=x&service=tests%2C+and+more&scope=repository%3Ateam%2Ftiny%3Apull", "")
    assert ("Bearer anonymous" in [permission for _, permission in seen]) and [permission for path, permission in seen if path.startswith("/elsewhere")] == ["", ""]
    with pytest.raises(NotAnImage, match=r"has images for amd64, arm64, none for ppc64le"):
        look(image, "ppc64le", {"HOME": str(tmp_path)}, insecure=True)
    seen.clear()
    write_auths(tmp_path / "auth.json", **{place: f"me:{PASSWORD}"})
    look(image, "amd64", {"HOME": str(tmp_path), "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}, insecure=True)
    basic = f"Basic {base64.b64encode(f'me:{PASSWORD}'.encode()).decode()}"
    assert [permission for path, permission in seen if path.startswith("/token")] == [basic] and "Bearer good" in [permission for _, permission in seen]
    assert not [path for path, permission in seen if permission == basic and not path.startswith("/token")], "the password goes to the service alone"


def test_nothing_is_sent_in_the_clear_that_was_not_asked_for(tmp_path, service):
    """Without --insecure a registry that speaks no TLS hears nothing of a password."""
    write_auths(tmp_path / ".docker" / "config.json", **{service[0]: "me:pw"})
    with pytest.raises(Unanswered):
        look(parse(f"{service[0]}/team/tiny:1"), "amd64", {"HOME": str(tmp_path)})
    assert service[1].seen == []


def test_credentials_lie_where_the_tools_keep_them(tmp_path):
    home = {"HOME": str(tmp_path)}
    assert credentials.login("nvcr.io/a/b", home) is None
    enroot = tmp_path / ".config" / "enroot" / ".credentials"
    enroot.parent.mkdir(parents=True)
    enroot.write_text("machine nvcr.io login $oauthtoken password key1\nmachine x.io login me password $SECRET\n")
    assert credentials.login("nvcr.io/a/b", home) == ("$oauthtoken", "key1") and credentials.login("x.io/a", home) is None
    write_auths(tmp_path / ".docker" / "config.json", **{"https://index.docker.io/v1/": "hub:pw:with:colons", "https://x.io/": "me:pw"})
    assert credentials.login("docker.io/library/debian", home) == ("hub", "pw:with:colons") and credentials.login("x.io/a", home) == ("me", "pw")
    containers_own = tmp_path / "run" / "containers" / "auth.json"
    write_auths(containers_own, **{"nvcr.io": "all:1", "nvcr.io/team": "team:2"})
    session = {**home, "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    assert credentials.login("nvcr.io/team/b", session) == ("team", "2") and credentials.login("nvcr.io/other/b", session) == ("all", "1")
    containers_own.write_text('{"credsStore": "desktop", "auths": {"nvcr.io": {}}}')
    assert credentials.login("nvcr.io/team/b", session) == ("$oauthtoken", "key1"), "a password that a program keeps is not asked for"
