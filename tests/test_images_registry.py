"""What a registry says of an image before it is fetched, and with whose credentials it is asked."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from image_helpers import Registry, layer, make_certificate, need, write_layout

from containers import credentials, node, parse
from containers.registry import Unanswered, look
from launcher import image_registry
from launcher.plan import Container, Needs, Plan, Stage
from recipes.loader import load

ROOT = Path(__file__).resolve().parent.parent
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
    assert found.architectures == ("amd64",) and look(parse(f"{image.registry}/team/tiny@{found.digest}"), "arm64", home, insecure=True) == found
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
    entries = [{"digest": digest, "platform": {"architecture": name, "os": "linux"}} for name, digest in digests.items()]
    TokenService.index = {"manifests": [*entries, {"digest": "sha256:0", "platform": {"architecture": "unknown", "os": "unknown"}}]}
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
    other = look(image, "ppc64le", {"HOME": str(tmp_path)}, insecure=True)
    assert other.architectures == ("amd64", "arm64") and other.size == 11, "it has none for that one, and says so"
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


# --- when a run is submitted --------------------------------------------------------------------------------


@pytest.fixture
def trusted(tmp_path, monkeypatch) -> Iterator[Registry]:
    """A registry with a certificate, which this machine trusts."""
    need("docker-registry", "skopeo")
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(make_certificate(folder)))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = Registry(folder, tls=True)
    yield found
    found.process.terminate()
    found.process.wait()


def planned(tmp_path: Path, runtime: str, *images: str, seconds: float = 5.0) -> image_registry.Seen:
    """What is said of a plan with these images."""
    (tmp_path / "r.yaml").write_text(f"container:\n  image: {images[0]}\n{(ROOT / 'recipes' / 'quickstart.yaml').read_text()}")
    stages = [Stage(f"stage{number}", [], [], Needs(1, 0, 1, 1), None, Container(image, runtime, facts={"cuda": "13.0"})) for number, image in enumerate(images)]
    return image_registry.ask(load(tmp_path / "r.yaml"), Plan("run", stages, None, str(tmp_path)), seconds)


def test_a_submit_learns_how_large_an_image_is_and_for_what(tmp_path, trusted, capsys):
    layout = write_layout(tmp_path / "oci", [layer([("blob", os.urandom(3 << 20))])])
    place = trusted.push(layout, "team/tiny:1")
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    size = sum(one["size"] for one in json.loads((layout / "blobs" / "sha256" / entry["digest"][7:]).read_text())["layers"])
    seen = planned(tmp_path, "pyxis", place, "/images/a.sqsh", place)
    assert [stage.container.facts for stage in seen.plan.stages if stage.container] == [{"cuda": "13.0", "bytes": size, "architectures": ["amd64"]}, {"cuda": "13.0"}, {"cuda": "13.0", "bytes": size, "architectures": ["amd64"]}]
    assert not seen.problems and not seen.notes
    trusted.put_index("team/tiny", "other", "1", "s390x")
    other = planned(tmp_path, "pyxis", place.replace("tiny:1", "tiny:other"))
    assert other.notes == (f"{place.replace('tiny:1', 'tiny:other')} is made for s390x, this machine is amd64; nodes that are like it cannot start it",) and not other.problems
    [stage] = other.plan.stages
    assert stage.container
    spec = {"runtime": "docker", "image": "x", "path": None, "mounts": [], "prepare": [], "architecture": None, **stage.container.facts}
    assert dict(node.check(spec))["wrong architecture"] == "the image is for s390x, the node is amd64"


def test_a_submit_refuses_an_image_that_its_registry_does_not_have(tmp_path, trusted):
    place = trusted.push(write_layout(tmp_path / "oci", [layer([("a", b"1")])]), "team/tiny:1").replace("tiny:1", "tiny:2")
    words = f"{trusted.name} has no such image (404 Not Found)"
    assert planned(tmp_path, "enroot", place).problems == (f"{tmp_path / 'r.yaml'}:2: container.image: {words}: {place}; look at the spelling and the tag",)
    local = planned(tmp_path, "podman", place)
    assert not local.problems and local.notes == (f"{place}: {words}; a node that does not have it already cannot start it",), "it may have been built there"


def test_a_submit_says_what_wants_credentials_and_minds_no_silent_registry(tmp_path, trusted):
    place = trusted.push(write_layout(tmp_path / "oci", [layer([("a", b"1")])]), "team/tiny:1")
    trusted.restart(HASH)
    [note] = planned(tmp_path, "pyxis", place).notes
    assert note.startswith(f"{place}: {trusted.name} wants credentials (401 Unauthorized); where it is not for everybody: ~/.config/enroot/.credentials")
    write_auths(tmp_path / "home" / ".docker" / "config.json", **{trusted.name: f"me:{PASSWORD}"})
    assert not planned(tmp_path, "pyxis", place).notes
    trusted.process.terminate()
    trusted.process.wait()
    silent = planned(tmp_path, "pyxis", place)
    assert not silent.notes and not silent.problems and silent.plan.stages[0].container.facts == {"cuda": "13.0"}  # type: ignore[union-attr]


def test_a_submit_does_not_wait_for_a_registry_that_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began = time.monotonic()
        seen = planned(tmp_path, "pyxis", *(f"127.0.0.1:{deaf.getsockname()[1]}/team/tiny:{tag}" for tag in range(5)), seconds=1.0)
        assert time.monotonic() - began < 3 and not seen.notes and not seen.problems
