"""One spelling of an image: what people write, what each runtime is given, what is said of what cannot be one."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_helpers import layer, need, write_docker_archive, write_layout

from amlaunch.containers.images import reference
from amlaunch.containers.images.reference import BadReference, Reference, parse

BASE = Path("/here/base")
SHA = "sha256:" + "0123456789abcdef" * 4
NGC = Reference("registry", "nvcr.io", "nvidia/pytorch", "25.08-py3")


@pytest.mark.parametrize(
    "text",
    [
        "nvcr.io/nvidia/pytorch:25.08-py3",
        " docker://nvcr.io/nvidia/pytorch:25.08-py3 ",
        "nvcr.io#nvidia/pytorch:25.08-py3",
        "docker://nvcr.io#nvidia/pytorch:25.08-py3",
        "NVCR.IO/nvidia/pytorch:25.08-py3",
    ],
)
def test_every_spelling_of_an_image_in_a_registry_is_the_same_image(text):
    assert parse(text) == NGC


@pytest.mark.parametrize(
    "text, name",
    [
        ("debian", "docker.io/library/debian:latest"),
        ("docker.io/debian:12", "docker.io/library/debian:12"),
        ("index.docker.io/library/debian:12", "docker.io/library/debian:12"),
        ("pytorch/pytorch:2.8.0", "docker.io/pytorch/pytorch:2.8.0"),
        ("localhost/mine", "localhost/mine:latest"),
        ("localhost:5000/team/mine:1", "localhost:5000/team/mine:1"),
        ("[::1]:5000/mine:1", "[::1]:5000/mine:1"),
        (f"nvcr.io/nvidia/pytorch@{SHA}", f"nvcr.io/nvidia/pytorch@{SHA}"),
        (f"nvcr.io/nvidia/pytorch:25.08-py3@{SHA}", f"nvcr.io/nvidia/pytorch@{SHA}"),
    ],
)
def test_short_names_and_digests(text, name):
    assert parse(text).name == name


def test_a_user_of_a_registry_is_kept_for_the_runtime_that_looks_up_the_password():
    for text in ("$oauthtoken@nvcr.io#nvidia/pytorch:1", "docker://$oauthtoken@nvcr.io/nvidia/pytorch:1"):
        found = parse(text)
        assert (found.user, found.name) == ("$oauthtoken", "nvcr.io/nvidia/pytorch:1")
        assert reference.for_enroot(found) == "docker://$oauthtoken@nvcr.io#nvidia/pytorch:1"


@pytest.mark.parametrize(
    "text, kind, path",
    [
        ("/images/a.sqsh", "sqsh", "/images/a.sqsh"),
        ("images/a.squashfs", "sqsh", "/here/base/images/a.squashfs"),
        ("./a.sif", "sif", "/here/base/a.sif"),
        ("../a.tar.gz", "archive", "/here/a.tar.gz"),
        ("docker-archive:a.tar", "archive", "/here/base/a.tar"),
        ("oci-archive:///images/a.tar", "archive", "/images/a.tar"),
        ("./bundle", "folder", "/here/base/bundle"),
        ("file:///images/with space", "folder", "/images/with space"),
        ("/images/Upper:1", "folder", "/images/Upper:1"),
    ],
)
def test_files_are_absolute_from_here_on(text, kind, path):
    found = parse(text, BASE)
    assert (found.kind, str(found.path)) == (kind, path)
    assert reference.for_pyxis(found) == path


def test_a_relative_path_begins_where_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("a.sqsh").path == tmp_path / "a.sqsh"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert parse("~/a.sif").path == tmp_path / "home" / "a.sif"


@pytest.mark.parametrize(
    "text, pyxis, enroot, apptainer, docker",
    [
        (
            "nvcr.io/nvidia/pytorch:25.08-py3",
            "nvcr.io#nvidia/pytorch:25.08-py3",
            "docker://nvcr.io#nvidia/pytorch:25.08-py3",
            "docker://nvcr.io/nvidia/pytorch:25.08-py3",
            "nvcr.io/nvidia/pytorch:25.08-py3",
        ),
        (
            "debian:12",
            "debian:12",
            "docker://debian:12",
            "docker://docker.io/library/debian:12",
            "docker.io/library/debian:12",
        ),
        (
            f"nvcr.io/a/b@{SHA}",
            f"nvcr.io#a/b:{SHA}",
            f"docker://nvcr.io#a/b:{SHA}",
            f"docker://nvcr.io/a/b@{SHA}",
            f"nvcr.io/a/b@{SHA}",
        ),
    ],
)
def test_each_runtime_has_its_own_spelling(text, pyxis, enroot, apptainer, docker):
    found = parse(text)
    assert reference.for_pyxis(found) == pyxis
    assert reference.for_enroot(found) == enroot
    assert reference.for_apptainer(found) == apptainer
    assert reference.for_podman(found) == found.name == docker


def test_archives_have_their_transport():
    assert reference.for_podman(parse("a.tar", BASE)) == "docker-archive:/here/base/a.tar"
    assert reference.for_apptainer(parse("oci-archive:a.tar", BASE)) == "oci-archive:/here/base/a.tar"


@pytest.fixture
def archives(tmp_path) -> dict[str, Path]:
    """Tars of both sorts, by what each is."""
    stack = [layer([("etc/name", b"tiny")])]
    layout = write_layout(tmp_path / "layout", stack)
    found = {"docker": write_docker_archive(tmp_path / "docker.tar", stack), "oci": tmp_path / "oci.tar"}
    subprocess.run(["tar", "-C", layout, "-cf", found["oci"], "."], check=True)
    return found


@pytest.mark.parametrize("layout", ["docker", "oci"])
def test_an_archive_is_looked_into_where_nothing_says_what_it_is(archives, layout):
    """Against what reads it: skopeo has the transports of apptainer and podman, and refuses the wrong one."""
    need("skopeo")
    found = parse(str(archives[layout]))
    spelled = reference.for_apptainer(found)
    assert spelled == reference.for_podman(found) == f"{layout}-archive:{archives[layout]}"
    subprocess.run(["skopeo", "inspect", spelled], check=True, capture_output=True)
    packed = archives[layout].with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(archives[layout].read_bytes()))
    assert reference.for_apptainer(parse(str(packed))) == f"{layout}-archive:{packed}"


def test_what_was_written_before_an_archive_wins_and_a_torn_one_is_dockers(archives, tmp_path):
    assert reference.for_apptainer(parse(f"docker-archive:{archives['oci']}")) == f"docker-archive:{archives['oci']}"
    torn = tmp_path / "torn.tar"
    torn.write_bytes(archives["oci"].read_bytes()[:700])
    assert reference.for_apptainer(parse(str(torn))) == f"docker-archive:{torn}"


def test_a_tar_that_is_both_is_dockers(archives, tmp_path):
    """As docker 25 and newer saves it: a layout with a manifest.json beside it."""
    both = shutil.copy(archives["oci"], tmp_path / "both.tar")
    (tmp_path / "manifest.json").write_text("[]")
    subprocess.run(["tar", "-C", tmp_path, "-rf", both, "manifest.json"], check=True)
    assert reference.for_apptainer(parse(str(both))) == f"docker-archive:{both}"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no image given"),
        ("nvcr.io/nvidia/pytorch 25.08", "contain no spaces"),
        ("nvcr.io/nvidia/PyTorch:25.08-py3", "lower case; did you mean 'nvcr.io/nvidia/pytorch:25.08-py3'?"),
        ("nvcr.io/nvidia/pytorch:25.08+py3", "did you mean 'nvcr.io/nvidia/pytorch:25.08-py3'?"),
        ("nvcr.io/nvidia/pytorch:", "'' is not a tag"),
        (f"debian@{SHA[:-1]}", "has 64 digits (0-9, a-f), not 63"),
        ("debian@12", "not a digest"),
        ("https://nvcr.io/nvidia/pytorch", "did you mean 'nvcr.io/nvidia/pytorch'?"),
        ("dockerd://mine:1", "leave out the scheme: mine:1"),
        ("oras://x/y", "unknown scheme oras://; use docker://"),
        ("#nvidia/pytorch", "no registry before the #"),
        ("my_folder/", "for a folder, write ./my_folder/"),
        ("nvcr.io/", "the image name is missing"),
        ("bad_host_#a/b", "is not a registry"),
    ],
)
def test_what_is_wrong_is_said_with_the_nearest_form(text, words):
    with pytest.raises(BadReference) as caught:
        parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("ncvr.io/nvidia/pytorch:1", "did you mean nvcr.io?"),
        ("nvidia/pytorch:25.08-py3", "NVIDIA publishes it as nvcr.io/nvidia/pytorch:25.08-py3"),
        ("nvcr.io/nvidia/pytorch", "no tag 'latest'"),
    ],
)
def test_doubts_are_said(text, words):
    assert words in " ".join(reference.name_warnings(parse(text)))


def test_a_plain_image_raises_no_doubt():
    assert (
        not reference.name_warnings(NGC)
        and not reference.name_warnings(parse("debian:12"))
        and not reference.name_warnings(parse("/a.sqsh"))
    )


names = st.from_regex(r"[a-z0-9]{1,8}([._-][a-z0-9]{1,5})?", fullmatch=True)


@given(
    registry=st.sampled_from(["", "nvcr.io/", "localhost:5000/", "a.b-c.org:1/"]),
    parts=st.lists(names, min_size=1, max_size=3),
    tag=st.from_regex(r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,20})?", fullmatch=True),
    digest=st.sampled_from(["", f"@{SHA}"]),
)
def test_what_is_written_again_is_read_as_the_same_image(registry, parts, tag, digest):
    # a file's ending makes a path of a name without a tag; a first part with a dot is a registry
    repository = "/".join(part.replace(".", "-") for part in parts)
    found = parse(f"{registry}{repository}{tag}{digest}")
    assert found.repository.removeprefix("library/") == repository or found.repository == repository
    again = parse(found.name)
    assert (again.registry, again.repository, again.digest) == (found.registry, found.repository, found.digest)
    if not digest:
        assert again == found == parse(reference.for_enroot(found)) == parse(reference.for_apptainer(found))
