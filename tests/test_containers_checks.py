"""Checks before anything is submitted: missing credentials and mounts, and files in a home that is not mounted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import container_pipeline
import pytest
from image_helpers import layer

from amlaunch.containers.runtimes.environment import library_variables
from amlaunch.launcher.checks.containers import check_containers
from amlaunch.launcher.planning.container_plan import SiteRuntimes, containers_of
from amlaunch.launcher.planning.container_start import is_visible_inside
from amlaunch.launcher.planning.planner import Site, make_plan
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.run_layout import RunDir

SECRET = "hunter2-do-not-tell"
RUNTIMES = ("pyxis", "enroot", "apptainer", "singularity", "podman", "docker", "charliecloud")
PRIVATE = ["--container.image", "nvcr.io/org/team/private:1"]
Check = Callable[..., list[str]]


@pytest.fixture
def check(tmp_path, monkeypatch) -> Check:
    """The notes on a recipe, in its own folder and home; ``roots`` of the cluster, None: this machine."""
    for name in (
        *library_variables(os.environ),
        "ENROOT_CONFIG_PATH",
        "XDG_CONFIG_HOME",
        "XDG_CACHE_HOME",
        "XDG_RUNTIME_DIR",
        "DOCKER_CONFIG",
        "REGISTRY_AUTH_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    for name, text in container_pipeline.FILES.items():
        (work / name).write_text(text)

    def made(*words: str, roots: list[str] | None = []) -> list[str]:  # noqa: B006
        loaded = load(work / "inside.yaml", [*PRIVATE, *words])
        inside = containers_of(loaded, SiteRuntimes(RUNTIMES), work)
        plan = make_plan(loaded, Site(work / "runs", work, 0, 2, 1, None, containers=inside), "inside-1")
        return check_containers(
            loaded,
            plan,
            RunDir(work / "runs" / "inside-1"),
            None if roots is None else ClusterProfile(shared_roots=roots),
        )

    return made


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("runtime", "file", "words"),
    [
        ("pyxis", ".config/enroot/.credentials", "machine nvcr.io login $oauthtoken password KEY"),
        ("enroot", ".config/enroot/.credentials", "machine authn.nvidia.com"),
        (
            "apptainer",
            ".apptainer/docker-config.json",
            "apptainer registry login --username '$oauthtoken' docker://nvcr.io",
        ),
        (
            "singularity",
            ".singularity/docker-config.json",
            "singularity registry login --username '$oauthtoken' docker://nvcr.io",
        ),
        ("docker", ".docker/config.json", "docker login --username '$oauthtoken' nvcr.io"),
        ("podman", ".config/containers/auth.json", "podman login --username '$oauthtoken' nvcr.io"),
    ],
)
def test_credentials_of_an_organisations_image(tmp_path, check, runtime, file, words):
    """Where they go is said until they are there, in the place of that runtime; what they are, never."""
    other = ".docker/config.json" if runtime in ("pyxis", "enroot") else ".config/enroot/.credentials"
    put(tmp_path / "home" / other, f"nvcr.io {SECRET}")
    (note,) = check("--container.runtime", runtime)
    assert (
        "nvcr.io/org/team/private:1: no credentials for nvcr.io found on this machine" in note
        and words in note
        and SECRET not in note
    )
    assert check("--container.runtime", runtime, "--container.image", "nvcr.io/nvidia/pytorch:25.08-py3") == [], (
        "everybody has NVIDIA's own"
    )
    put(tmp_path / "home" / file, f"nvcr.io {SECRET}")
    assert check("--container.runtime", runtime) == []


def test_a_login_that_nodes_do_not_see(tmp_path, check, monkeypatch):
    """podman keeps it in the machine's /run."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    put(tmp_path / "containers" / "auth.json", '{"auths": {"nvcr.io": {}}}')
    assert check("--container.runtime", "podman", roots=None) == []
    assert "no credentials for nvcr.io" in check("--container.runtime", "podman")[0]
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "containers" / "auth.json"))
    assert check("--container.runtime", "podman") == []


def test_a_mount_that_is_not_there(tmp_path, check):
    words = ["--container.image", "nvcr.io/nvidia/pytorch:25.08-py3", "--container.mounts", f"[{tmp_path}/no:/data]"]
    assert check(*words) == [
        f"container.mounts: {tmp_path}/no does not exist on this machine; jobs fail at once on nodes that lack it too"
    ]
    for roots in ([str(tmp_path)], None):  # what nodes and this machine see alike, and this machine alone
        with pytest.raises(BadInput, match=f"container.mounts .*: {tmp_path}/no does not exist"):
            check(*words, roots=roots)
    (tmp_path / "no").mkdir()
    assert check(*words) == []


@pytest.mark.parametrize(
    ("runtime", "folder"),
    [
        ("enroot", "a b/c"),
        ("pyxis", "a,b"),
        ("apptainer", "a:b"),
        ("charliecloud", "a:b"),
        ("docker", "a,b"),
        ("podman", "a,b"),
    ],
)
def test_a_folder_of_checkpoints_that_a_runtime_cannot_mount(tmp_path, check, runtime, folder):
    """Like every other that is mounted unasked, it is looked at before a job is."""
    words = [
        "--container.image",
        "nvcr.io/nvidia/pytorch:25.08-py3",
        "--container.runtime",
        runtime,
        "--checkpoint.checkpoint_dir",
    ]
    with pytest.raises(BadInput, match=f"container of train and export: {runtime} cannot mount {tmp_path}/{folder}"):
        check(*words, str(tmp_path / folder))
    assert check(*words, str(tmp_path / "plain")) == []


def test_a_value_that_enroot_cannot_set(check, monkeypatch):
    monkeypatch.setenv("MY_KEY", f"{SECRET}\n{SECRET}")
    with pytest.raises(BadInput, match="enroot cannot set X: the value has a line break") as refused:
        check(
            "--container.image",
            "nvcr.io/nvidia/pytorch:25.08-py3",
            "--container.runtime",
            "enroot",
            "--container.env",
            "{X: '${MY_KEY}'}",
        )
    assert SECRET not in str(refused.value)


def test_a_key_of_wandb_in_a_home_that_is_not_mounted(tmp_path, check, monkeypatch):
    words = ["--container.image", "nvcr.io/nvidia/pytorch:25.08-py3", "--wandb.project", "x"]
    put(tmp_path / "home" / ".netrc", f"machine api.wandb.ai login user password {SECRET}").chmod(0o600)
    with pytest.raises(BadInput, match="which containers do not see; export WANDB_API_KEY=…") as refused:
        check(*words)
    assert SECRET not in str(refused.value)
    assert check(*words, "--container.stages", "{train: none}") == check(*words, "--wandb.mode", "offline") == []
    assert check(*words, "--container.env", "{WANDB_API_KEY: '${MY_KEY}'}") == []
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert check(*words) == []


def test_what_hugging_face_keeps_in_a_home_that_is_not_mounted(tmp_path, check, monkeypatch):
    words = [
        "--container.image",
        "nvcr.io/nvidia/pytorch:25.08-py3",
        "--preprocess.source",
        "null",
        "--preprocess.dataset",
        "allenai/c4",
    ]
    assert check(*words) == [], "nothing there, nothing lost"
    folder = put(tmp_path / "home" / ".cache" / "huggingface" / "token", SECRET).parent
    (note,) = check(*words)
    assert (
        f"stage preprocess uses the Hugging Face Hub, but its container does not see {folder}: export HF_TOKEN=…"
        in note
        and SECRET not in note
    )
    assert check(*words, "--container.stages", "{preprocess: none}") == []
    assert check(*words, "--container.mounts", f"[{folder}:{folder}]") == []
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert "HF_TOKEN" not in check(*words)[0]
    monkeypatch.setenv("HF_HOME", str(folder))
    assert any(
        f"HF_HOME={folder}: not set in containers, because they do not see the path" in note for note in check(*words)
    )
    assert check(*words, "--container.mounts", f"[{folder}:{folder}]") == []


def test_a_key_that_begins_like_a_path_is_none(check, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"/{SECRET}")
    assert is_visible_inside("AWS_SECRET_ACCESS_KEY", f"/{SECRET}", [])
    assert not is_visible_inside("HF_TOKEN_PATH", "/home/me/token", [])
    assert check("--container.image", "nvcr.io/nvidia/pytorch:25.08-py3") == []


def test_a_tar_that_is_no_image_is_refused_before_a_node_tries_it(tmp_path, check):
    (tmp_path / "work" / "system.tar").write_bytes(layer([("etc/name", b"1")]))
    (tmp_path / "work" / "image.tar").write_bytes(layer([("manifest.json", b"[]")]))
    with pytest.raises(
        BadInput,
        match=(
            r"container\.image: \S+system\.tar is a tar archive but not an image .*; create an image archive with "
            r"docker save or skopeo copy"
        ),
    ):
        check("--container.image", str(tmp_path / "work" / "system.tar"), "--container.runtime", "podman", roots=None)
    check("--container.image", str(tmp_path / "work" / "image.tar"), "--container.runtime", "podman", roots=None)
