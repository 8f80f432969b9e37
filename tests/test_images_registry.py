"""What a registry says of an image before it is fetched, and with whose credentials it is asked."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from image_helpers import Registry, layer, make_certificate, need, write_layout

from amlaunch.containers import node_setup
from amlaunch.containers.images import credentials
from amlaunch.containers.images.registry import RegistryError, fetch_manifest
from amlaunch.containers.runtimes.catalog import parse
from amlaunch.containers.start_failures import FAILURES, advice
from amlaunch.launcher.__main__ import main
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.images import registry_lookup
from amlaunch.launcher.planning.run_sources import ResolvedRun, StartKind
from amlaunch.launcher.specs.cluster_profile import find_cluster
from amlaunch.launcher.specs.plan import Element, Needs, Plan, Stage, StageContainer
from amlaunch.launcher.submission.preflight import add_registry_facts
from amlaunch.recipes.files import write_json
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.run_layout import RunDir

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
    with pytest.raises(RegistryError, match="requires a login") as refused:
        fetch_manifest(image, "amd64", home, insecure=True)
    assert refused.value.status == 401
    auths = write_auths(tmp_path / ".docker" / "config.json", **{image.registry: f"me:{PASSWORD}"})
    found = fetch_manifest(image, "amd64", home, insecure=True)
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads((layout / "blobs" / "sha256" / entry["digest"][7:]).read_text())
    assert found.digest == entry["digest"] and found.size == sum(one["size"] for one in manifest["layers"]) > 3 << 20
    assert (
        found.architectures == ("amd64",)
        and fetch_manifest(parse(f"{image.registry}/team/tiny@{found.digest}"), "arm64", home, insecure=True) == found
    )
    with pytest.raises(RegistryError, match="has no such image") as missing:
        fetch_manifest(parse(f"{image.registry}/team/tiny:2"), "amd64", home, insecure=True)
    assert missing.value.status == 404
    write_auths(auths, **{image.registry: "me:wrong horse"})
    with pytest.raises(RegistryError, match="requires a login") as refused:
        fetch_manifest(image, "amd64", home, insecure=True)
    assert "horse" not in str(refused.value)
    with pytest.raises(RegistryError, match="cannot be reached") as unencrypted:
        fetch_manifest(image, "amd64", home)
    assert unencrypted.value.status == 0


class TokenService(BaseHTTPRequestHandler):
    """A registry with an index for two architectures and a token service, as Docker Hub has; it redirects."""

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
            self.answer(
                401,
                b"",
                **{
                    "WWW-Authenticate": (
                        f'Bearer realm="http://{host}/token?account=x",service="tests, and '
                        'more",scope="repository:team/tiny:pull"'
                    )
                },
            )
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
    entries = [
        {"digest": digest, "platform": {"architecture": name, "os": "linux"}} for name, digest in digests.items()
    ]
    TokenService.index = {
        "manifests": [*entries, {"digest": "sha256:0", "platform": {"architecture": "unknown", "os": "unknown"}}]
    }
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
    assert [
        fetch_manifest(image, name, {"HOME": str(tmp_path)}, insecure=True).size for name in ("amd64", "arm64")
    ] == [11, 7]
    token = next(entry for entry in seen if entry[0].startswith("/token"))
    assert token == ("/token?account=x&service=tests%2C+and+more&scope=repository%3Ateam%2Ftiny%3Apull", "")
    assert ("Bearer anonymous" in [permission for _, permission in seen]) and [
        permission for path, permission in seen if path.startswith("/elsewhere")
    ] == ["", ""]
    other = fetch_manifest(image, "ppc64le", {"HOME": str(tmp_path)}, insecure=True)
    assert other.architectures == ("amd64", "arm64") and other.size == 11, "it has none for that one, and says so"
    seen.clear()
    write_auths(tmp_path / "auth.json", **{place: f"me:{PASSWORD}"})
    fetch_manifest(
        image, "amd64", {"HOME": str(tmp_path), "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}, insecure=True
    )
    basic = f"Basic {base64.b64encode(f'me:{PASSWORD}'.encode()).decode()}"
    assert [permission for path, permission in seen if path.startswith("/token")] == [basic] and "Bearer good" in [
        permission for _, permission in seen
    ]
    assert not [path for path, permission in seen if permission == basic and not path.startswith("/token")], (
        "the password goes to the service alone"
    )


def test_nothing_is_sent_in_the_clear_that_was_not_asked_for(tmp_path, service):
    """Without --insecure a registry that speaks no TLS hears nothing of a password."""
    write_auths(tmp_path / ".docker" / "config.json", **{service[0]: "me:pw"})
    with pytest.raises(RegistryError):
        fetch_manifest(parse(f"{service[0]}/team/tiny:1"), "amd64", {"HOME": str(tmp_path)})
    assert service[1].seen == []


def test_credentials_lie_where_the_tools_keep_them(tmp_path):
    home = {"HOME": str(tmp_path)}
    assert credentials.find_login("nvcr.io/a/b", home) is None
    enroot = tmp_path / ".config" / "enroot" / ".credentials"
    enroot.parent.mkdir(parents=True)
    enroot.write_text("machine nvcr.io login $oauthtoken password key1\nmachine x.io login me password $SECRET\n")
    assert (
        credentials.find_login("nvcr.io/a/b", home) == ("$oauthtoken", "key1")
        and credentials.find_login("x.io/a", home) is None
    )
    write_auths(
        tmp_path / ".docker" / "config.json",
        **{"https://index.docker.io/v1/": "hub:pw:with:colons", "https://x.io/": "me:pw"},
    )
    assert credentials.find_login("docker.io/library/debian", home) == (
        "hub",
        "pw:with:colons",
    ) and credentials.find_login("x.io/a", home) == ("me", "pw")
    containers_own = tmp_path / "run" / "containers" / "auth.json"
    write_auths(containers_own, **{"nvcr.io": "all:1", "nvcr.io/team": "team:2"})
    session = {**home, "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    assert credentials.find_login("nvcr.io/team/b", session) == ("team", "2") and credentials.find_login(
        "nvcr.io/other/b", session
    ) == ("all", "1")
    containers_own.write_text('{"credsStore": "desktop", "auths": {"nvcr.io": {}}}')
    assert credentials.find_login("nvcr.io/team/b", session) == ("$oauthtoken", "key1"), (
        "a password that a program keeps is not asked for"
    )


def test_enroots_credentials_as_enroot_reads_them(tmp_path):
    """Its doc/cmd/import.md: Docker Hub's host is that of the tokens, and a password may be a command's output."""
    lines = (
        "# machine x.io login no password no\nmachine 1.dkr.ecr.aws login AWS password $(aws ecr "
        "get-login-password --region x)\nmachine auth.docker.io login hub password pw\n"
    )
    home = {"HOME": str(tmp_path), "ENROOT_CONFIG_PATH": str(tmp_path)}
    (tmp_path / ".credentials").write_text(
        f"{lines}machine nvcr.io\n  login $oauthtoken\n  password key1\nmachine x.io login one password 1\nmachine "
        "x.io login other password 2\n"
    )
    assert credentials.find_login("nvcr.io/a", home) == ("$oauthtoken", "key1") and credentials.find_login(
        "docker.io/library/debian", home
    ) == ("hub", "pw")
    assert (
        credentials.find_login("1.dkr.ecr.aws/a", home) is None
        and credentials.needs_helper("1.dkr.ecr.aws/a", home)
        and not credentials.needs_helper("x.io/a", home)
    )
    assert [credentials.find_login("x.io:5000/a", home, user) for user in ("", "other", "third")] == [
        ("one", "1"),
        ("other", "2"),
        None,
    ], "user@registry#image means one of them"
    assert "machine auth.docker.io login USER" in credentials.login_advice("enroot", "docker.io", home)


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


def planned(
    tmp_path: Path, runtime: str, *images: str, seconds: float = 5.0, said: Callable[[str], None] = print
) -> registry_lookup.LookupResult:
    """What is said of a plan with these images."""
    (tmp_path / "r.yaml").write_text(
        f"container:\n  image: {images[0]}\n{(ROOT / 'recipes' / 'quickstart.yaml').read_text()}"
    )
    stages = [
        Stage(f"stage{number}", [], [], Needs(1, 0, 1, 1), None, StageContainer(image, runtime, facts={"cuda": "13.0"}))
        for number, image in enumerate(images)
    ]
    return registry_lookup.look_up_images(
        load(tmp_path / "r.yaml"), Plan("run", stages, None, str(tmp_path)), said, seconds
    )


def test_a_submit_learns_how_large_an_image_is_and_for_what(tmp_path, trusted, capsys):
    layout = write_layout(tmp_path / "oci", [layer([("blob", os.urandom(3 << 20))])])
    place = trusted.push(layout, "team/tiny:1")
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    size = sum(
        one["size"] for one in json.loads((layout / "blobs" / "sha256" / entry["digest"][7:]).read_text())["layers"]
    )
    seen = planned(tmp_path, "pyxis", place, "/images/a.sqsh", place)
    assert [stage.container.facts for stage in seen.plan.stages if stage.container] == [
        {"cuda": "13.0", "bytes": size, "architectures": ["amd64"]},
        {"cuda": "13.0"},
        {"cuda": "13.0", "bytes": size, "architectures": ["amd64"]},
    ]
    assert not seen.problems and not seen.notes
    trusted.put_index("team/tiny", "other", "1", "s390x")
    other = planned(tmp_path, "pyxis", place.replace("tiny:1", "tiny:other"))
    assert (
        other.notes
        == (
            f"{place.replace('tiny:1', 'tiny:other')} is for s390x, and this machine is amd64; "
            "amd64 nodes cannot start it",
        )
        and not other.problems
    )
    [stage] = other.plan.stages
    assert stage.container
    spec = {
        "runtime": "docker",
        "image": "x",
        "path": None,
        "mounts": [],
        "prepare": [],
        "architecture": None,
        **stage.container.facts,
    }
    assert dict(node_setup.check(spec))["wrong architecture"] == "the image is for s390x, the node is amd64"


def test_a_submit_asks_of_what_it_knows_for_the_digest_alone(tmp_path, trusted, monkeypatch):
    """Docker Hub counts each GET of a manifest as a pull, and no HEAD. A tag that moves is another image."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def asked() -> list[str]:
        lines = [
            line
            for line in trusted.log.read_text().splitlines()
            if "http.request.uri" in line and "http.response.status" in line and "/manifests/" in line
        ]
        return [method for line in lines for method in ("GET", "HEAD") if f"http.request.method={method}" in line]

    place = trusted.push(write_layout(tmp_path / "oci", [layer([("a", b"1")])]), "team/tiny:1")
    index = json.loads((tmp_path / "oci" / "index.json").read_text())
    pinned = f"{place.removesuffix(':1')}@{index['manifests'][0]['digest']}"
    first, before = planned(tmp_path, "pyxis", place), asked()
    assert (
        planned(tmp_path, "pyxis", place).plan == first.plan
        and asked() == [*before, "HEAD"]
        and before[-2:] == ["HEAD", "GET"]
    )
    assert (
        planned(tmp_path, "pyxis", pinned).plan.stages[0].container.facts == first.plan.stages[0].container.facts
        and len(asked()) == len(before) + 1
    )  # type: ignore[union-attr]
    trusted.push(write_layout(tmp_path / "newer", [layer([("blob", os.urandom(1 << 20))])]), "team/tiny:1")
    container = planned(tmp_path, "pyxis", place).plan.stages[0].container
    assert container is not None and container.facts["bytes"] > 1 << 20
    for kept in (tmp_path / "home" / ".cache" / "amlaunch" / "registries").iterdir():
        kept.write_text('{"size": "x"')
    assert planned(tmp_path, "pyxis", place).plan.stages[0].container.facts["bytes"] > 1 << 20, (
        "a damaged file is as none"
    )  # type: ignore[union-attr]


def test_a_submit_refuses_an_image_that_its_registry_does_not_have(tmp_path, trusted):
    place = trusted.push(write_layout(tmp_path / "oci", [layer([("a", b"1")])]), "team/tiny:1").replace(
        "tiny:1", "tiny:2"
    )
    words = f"{trusted.name} has no such image (404 Not Found)"
    assert planned(tmp_path, "enroot", place).problems == (
        f"{tmp_path / 'r.yaml'}:2: container.image: {words}: {place}. Check the name and the tag",
    )
    local = planned(tmp_path, "podman", place)
    assert not local.problems and local.notes == (f"{place}: {words}. Only nodes that already have it can start it",), (
        "it may have been built there"
    )


def test_a_submit_says_what_wants_credentials_and_minds_no_silent_registry(tmp_path, trusted):
    place = trusted.push(write_layout(tmp_path / "oci", [layer([("a", b"1")])]), "team/tiny:1")
    trusted.restart(HASH)
    [note] = planned(tmp_path, "podman", place).notes
    assert note.startswith(
        f"{place}: {trusted.name} requires a login (401 Unauthorized), or has no image of that name. Check the name. "
        "If the image is private, run podman login "
    )
    assert f"run podman login --username 'USER' {trusted.name}" in note and "nvcr.io" not in note
    [note] = planned(tmp_path, "pyxis", place).notes
    assert ".config/enroot/.credentials on the nodes (mode 600): machine 127.0.0.1 login USER password KEY" in note
    write_auths(tmp_path / "home" / ".docker" / "config.json", **{trusted.name: f"me:{PASSWORD}"})
    assert not planned(tmp_path, "pyxis", place).notes
    trusted.process.terminate()
    trusted.process.wait()
    silent = planned(tmp_path, "pyxis", place)
    assert not silent.problems and silent.plan.stages[0].container.facts == {"cuda": "13.0"}  # type: ignore[union-attr]
    [note] = silent.notes
    assert note.startswith(f"{trusted.name} cannot be reached ([Errno") and note.endswith(
        f"; could not check {place}. Nodes may still be able to fetch it"
    )


def test_what_a_node_says_of_credentials_names_the_images_registry():
    refused = next(failure for failure in FAILURES if failure.kind == "no credentials for the registry")
    assert "docker login --username 'USER' localhost:5444" in advice(refused, "docker", "localhost:5444/x/y:1")
    assert "machine authn.nvidia.com" in advice(refused, "pyxis", "nvcr.io#org/x:1") and "nvcr.io" not in advice(
        refused, "docker", "/images/x.sqsh"
    )


def test_a_submit_does_not_wait_for_a_registry_that_never_answers(tmp_path):
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        place = f"127.0.0.1:{deaf.getsockname()[1]}"
        images = [f"{place}/team/tiny:{tag}" for tag in range(5)]
        began = time.monotonic()
        seen = planned(tmp_path, "pyxis", *images, seconds=1.2, said=said.append)
        assert time.monotonic() - began < 2.5 and not seen.problems and registry_lookup.LOOKUP_SECONDS <= 3
    assert said == [f"asking {place} about images (1 s at most)"]
    assert seen.notes == (
        f"{place} did not answer within 1 s; could not check {' and '.join(images)}. Nodes may still be able to "
        "fetch it",
    )


def test_a_submit_of_which_nothing_is_left_asks_no_registry(tmp_path):
    """What was learnt the first time stays in the plan, for jobs on their way."""
    (tmp_path / "r.yaml").write_text((ROOT / "recipes" / "quickstart.yaml").read_text())
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        container = StageContainer(f"127.0.0.1:{deaf.getsockname()[1]}/team/tiny:1", "pyxis", facts={"cuda": "13.0"})
        plan = Plan(
            "run", [Stage("train", [Element("0", "", [])], [], Needs(1, 0, 1, 1), None, container)], None, str(tmp_path)
        )
        run, loaded = RunDir(tmp_path / "runs" / "run"), load(tmp_path / "r.yaml")
        stored = plan.to_json()
        stored["stages"][0]["container"]["facts"] |= {"bytes": 7, "architectures": ["amd64"]}
        write_json(run.plan, stored)
        write_json(run.element("train", "0").done, {"outputs": {}})
        began = time.monotonic()
        start = ResolvedRun(StartKind.NEW, run, loaded, plan, plan.stages, find_cluster("slurm"))
        again, notes = add_registry_facts(start, print, ErrorCollector())
        assert time.monotonic() - began < 0.5 and not notes
    assert again.plan.stages == again.stages
    assert again.stages[0].container and again.stages[0].container.facts == {
        "cuda": "13.0",
        "bytes": 7,
        "architectures": ["amd64"],
    }


# --- odd answers ---------------------------------------------------------------------------------------------

Answer = tuple[int, bytes | str | dict, dict[str, str]]
DIGEST = f"sha256:{'0' * 64}"
MANIFEST: Answer = (200, {"layers": [{"size": 5}]}, {})
INDEX: Answer = (200, {"manifests": [{"digest": DIGEST, "platform": {"architecture": "amd64"}}]}, {})
WANTED, NOT_THERE = "/v2/team/tiny/manifests/1", (404, "", {})
BASIC, BEARER = (
    (401, "", {"WWW-Authenticate": "Basic realm=x"}),
    (401, "", {"WWW-Authenticate": 'Bearer realm="https://PLACE/token",service=x'}),
)
KEEPS = {"credHelpers": {"PLACE": "gcloud"}}


class Scripted(BaseHTTPRequestHandler):
    """Answers by path, to strangers and to those who come with a permission; what is not in the table is not there."""

    strangers: dict[str, Answer]
    known: dict[str, Answer]

    def do_GET(self):
        host, table = (
            self.headers["Host"],
            self.known
            if self.headers.get("Authorization", "").startswith(("Bearer good", "Basic"))
            else self.strangers,
        )
        code, body, headers = table.get(self.path.partition("?")[0], NOT_THERE)
        raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value.replace("PLACE", host))
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format, *words):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[ThreadingHTTPServer, Path]]:
    folder = tmp_path_factory.mktemp("certificate")
    certificate = make_certificate(folder)
    found = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, folder / "key")
    found.socket = context.wrap_socket(found.socket, server_side=True)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found, certificate
    found.shutdown()
    found.server_close()


@pytest.fixture
def scripted(server, tmp_path, monkeypatch) -> Callable[..., str]:
    """Sets the answers; the image."""
    monkeypatch.setenv("SSL_CERT_FILE", str(server[1]))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)

    def made(strangers: dict[str, Answer], known: dict[str, Answer] | None = None, config: dict | None = None) -> str:
        Scripted.strangers, Scripted.known = strangers, known or {}
        place = f"127.0.0.1:{server[0].server_port}"
        if config:
            (tmp_path / "home" / ".docker").mkdir(parents=True)
            (tmp_path / "home" / ".docker" / "config.json").write_text(json.dumps(config).replace("PLACE", place))
        return f"{place}/team/tiny:1"

    return made


TOKEN = {"/token": (200, {"token": "good"}, {})}


@pytest.mark.parametrize(
    ("strangers", "known", "config", "words"),
    [
        ({"/v2/": (200, "{}", {})}, {}, None, "REFUSED"),
        ({WANTED: BEARER, **TOKEN}, {}, None, "REFUSED"),
        ({WANTED: BASIC}, {}, {"auths": {"PLACE": {"auth": "bWU6cHc="}}}, "REFUSED"),
        ({WANTED: BEARER}, {}, None, "no token from its token service 'https://PLACE/token' (404 Not Found)"),
        (
            {WANTED: BEARER, **TOKEN},
            {},
            KEEPS,
            "has no such public image (404 Not Found); credential helpers were not tried",
        ),
        ({"/v2/": BASIC}, {}, None, "requires a login (401 Unauthorized)"),
        ({"/v2/": BASIC}, {WANTED: MANIFEST}, {"auths": {"PLACE": {"auth": "bWU6cHc="}}}, ""),
        ({"/v2/": BEARER, **TOKEN}, {WANTED: MANIFEST}, None, ""),
        ({}, {}, None, "does not answer like a registry (404 Not Found)"),
        ({WANTED: INDEX}, {}, None, "does not return a manifest that its index lists (404 Not Found)"),
        (
            {WANTED: (307, "", {"Location": "/elsewhere"}), "/v2/": (200, "{}", {})},
            {},
            None,
            "redirects to a host that fails (404 Not Found)",
        ),
    ],
    ids=[
        "open",
        "token",
        "login",
        "no-tokens",
        "helper",
        "hidden",
        "hidden-known",
        "hidden-token",
        "website",
        "torn",
        "sent-on",
    ],
)
def test_a_run_is_refused_only_where_the_registry_let_us_in(tmp_path, scripted, strangers, known, config, words):
    image = scripted(strangers, known, config)
    seen = planned(tmp_path, "enroot", image)
    assert [f"has no such image (404 Not Found): {image}. Check the name" in problem for problem in seen.problems] == (
        [True] if words == "REFUSED" else []
    )
    assert (
        (not seen.notes)
        if words in ("REFUSED", "")
        else (len(seen.notes) == 1 and words.replace("PLACE", image.partition("/")[0]) in seen.notes[0])
    ), seen.notes
    assert words or seen.plan.stages[0].container.facts["bytes"] == 5  # type: ignore[union-attr]


ODD = {
    "nested": "[" * 100_000,
    "list": "[]",
    "latin": b"\xff",
    "layers": '{"layers": 5}',
    "layer": '{"layers": [1]}',
    "word": '{"layers": [{"size": "x"}]}',
    **{
        name: f'{{"config": {{"digest": "sha256:0"}}, "layers": [{{"size": {size}}}]}}'
        for name, size in (("endless", "1e400"), ("long", "9" * 400), ("longest", "9" * 5000), ("less", "-5"))
    },
    "index": '{"manifests": 5}',
    "null": '{"manifests": [null]}',
    "none": '{"manifests": []}',
    "digest": '{"manifests": [{"digest": "sha256:../../x"}]}',
    "number": '{"manifests": [{"digest": 5}]}',
}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
def test_an_odd_manifest_is_no_answer(tmp_path, scripted, body):
    image = scripted({WANTED: (200, body, {})})
    with pytest.raises(RegistryError, match="answers with an unknown kind of manifest"):
        fetch_manifest(parse(image), "amd64", {"HOME": str(tmp_path)})


@pytest.mark.parametrize("name", ["layer", "layers", "null", "index", "word", "endless", "digest"])
def test_an_import_of_an_odd_manifest_ends_with_the_tools_own_words(tmp_path, scripted, monkeypatch, capsys, name):
    """What skopeo brings goes through the same parser; how large the image is, is then not known."""
    need("skopeo")
    image = scripted(
        {
            "/v2/": (200, "{}", {}),
            WANTED: (200, ODD[name], {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}),
        }
    )
    assert main(["image", "import", image, "--tool", "skopeo", "--images", str(tmp_path / "images")]) == 1
    out, error = capsys.readouterr()
    assert f"the size of {image} is unknown (127.0.0.1" in out and "skopeo" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("challenge", "token"),
    [
        ('Bearer realm="https://[bad"', ""),
        ('Bearer ,=,"=,realm=', ""),
        ("Bearer", ""),
        ('Bearer realm="https://PLACE/token"', '{"token": "hush\\r\\nX: y"}'),
        ('Bearer realm="https://PLACE/token"', '{"token": ["hush"]}'),
        ('Bearer realm="https://PLACE/token"', "[" * 100_000),
        ('Bearer realm="https://PLACE/token"', "hush"),
    ],
)
def test_an_odd_way_to_give_permission_is_no_answer(tmp_path, scripted, challenge, token):
    """What came for a token stands in no message."""
    image = scripted({WANTED: (401, "", {"WWW-Authenticate": challenge}), "/token": (200, token, {})})
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_text("[" * 100_000)
    with pytest.raises(RegistryError) as refused:
        fetch_manifest(parse(image), "amd64", {"HOME": str(tmp_path)})
    assert "hush" not in str(refused.value)


def test_a_proxy_whose_address_cannot_be_read_is_not_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://me:hush")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(RegistryError, match="cannot be reached") as refused:
        fetch_manifest(parse("registry.example/team/tiny:1"), "amd64", {"HOME": str(tmp_path)})
    assert "hush" not in str(refused.value)
