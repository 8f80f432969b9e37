"""What each runtime is told, option by option, against its own documentation; and what is kept out of sight.

pyxis, enroot and apptainer are not packaged by Debian: of them this is all that the tests see. The others also run
(test_containers_local.py, test_containers_slurm.py). The documents are named at each test, as of 2026-11.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from image_helpers import need, write_enroot

from amlaunch.containers.node_setup import check, main, private_folder, verdict_of
from amlaunch.containers.runtimes import catalog
from amlaunch.containers.runtimes.catalog import CannotLaunch, ContainerSpec, Mount, parse
from amlaunch.containers.runtimes.enroot import COMPLETE_MARKER, SCRIPTS, container_name, folders
from amlaunch.containers.runtimes.environment import (
    RUNTIME_VARIABLES,
    library_variables,
    prefixed,
    runtime_variables,
    with_restored_names,
)
from amlaunch.containers.start_failures import FAILURES, failure_of, has_own_output

ROOT = Path(__file__).resolve().parent.parent
NGC = parse("nvcr.io/nvidia/pytorch:25.08-py3")
SQSH = parse("/images/pytorch.sqsh")
MOUNTS = (Mount("/runs/a", "/runs/a"), Mount("/lustre/text", "/text", read_only=True))
HEEDED = {
    "MY_TOKEN": "hunter1",
    "NVIDIA_API_KEY": "hunter2",
    "https_proxy": "http://u:hunter3@proxy:3128",
    "APPTAINER_DOCKER_PASSWORD": "hunter4",
    "SLURM_JWT": "hunter5",
    "DOCKER_HOST": "hunter6",
    "HOME": "/hunter7",
    "PATH": "/hunter8",
    "LD_PRELOAD": "hunter9",
    "ENROOT_LOGIN": "hunter10",
    "ALL_PROXY": "hunter11",
    "SSL_CERT_FILE": "/hunter12",
}
"""Variables of a recipe that runtimes, srun or a shell would heed, too."""
ENV = {"NCCL_DEBUG": "INFO", "MY_TOKEN": "hunter2", "HOME": "/tmp/home", "MASTER_ADDR": "gpu1"}
HOOK = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
COMMAND = ["python3", "-u", "-c", "…", "recipe.yaml"]
INSIDE = [
    "sh",
    "-c",
    'export HOME="$AMLAUNCH_OF_RECIPE_HOME"; unset AMLAUNCH_OF_RECIPE_HOME; exec "$@"',
    "sh",
    *COMMAND,
]
"""HOME is the runtime's own, too: on its way in it bears another name."""


def image(reference=NGC, **more) -> ContainerSpec:
    settings = {
        "mounts": MOUNTS,
        "env": ENV,
        "passed": ("SLURM_PROCID", "CUDA_VISIBLE_DEVICES"),
        "workdir": "/work",
        "gpus": True,
        "on_slurm": True,
    }
    return ContainerSpec(reference, **{**settings, **more})


@pytest.mark.parametrize("runtime", [name for name in catalog.RUNTIMES if name != "none"])
def test_a_value_stands_in_no_argv(tmp_path, runtime):
    """All users of a node can read an argv (ps), and a dry run shows it; a proxy may have a password, too."""
    (tmp_path / "config.json").write_text("{}")
    fitting = next(one for one in (NGC, SQSH, parse(f"{tmp_path}/")) if one.kind in catalog.KINDS[runtime])
    mounts = MOUNTS[:1] if runtime == "charliecloud" else MOUNTS
    found = catalog.launch(runtime, image(fitting, mounts=mounts, env=HEEDED), COMMAND)
    words = " ".join([*found.argv, *found.srun, *(word for command in found.prepare for word in command)])
    told = found.bundle["process"]["env"] if found.bundle else [f"{name}={value}" for name, value in found.env.items()]
    assert "hunter" not in words and all(name in words + " ".join(told) for name in HEEDED)
    assert {entry.partition("=")[2] for entry in told} >= set(HEEDED.values())
    assert not {"HOME", "https_proxy", "DOCKER_HOST", "LD_PRELOAD", "NVIDIA_API_KEY"} & set(found.env), (
        "the runtime's own stay what they are"
    )


def test_inside_every_variable_has_its_own_name_and_value(tmp_path):
    """Whatever signs are in it, and whatever the shell between makes of IFS and its like."""
    odd = {
        **HEEDED,
        "IFS": "a b",
        "ENV": "/no",
        "BASH_ENV": "/no",
        "NVIDIA_API_KEY": "a 'b' \"c\" $(d)\n`e` \\",
        "PATH": "/usr/bin:/bin",
        "XDG_EMPTY": "",
    }
    odd.pop("LD_PRELOAD")
    command = with_restored_names(odd, ["env", "-0"])
    said = subprocess.run(
        command, env={**prefixed(odd), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    ).stdout
    assert (
        dict(
            entry.split("=", 1)
            for entry in said.split("\0")
            if entry and not entry.startswith(("PWD=", "_=", "SHLVL="))
        )
        == odd
    )


def test_pyxis():
    """https://github.com/NVIDIA/pyxis: args.c, the table of options and parse_mount_option."""
    found = catalog.launch("pyxis", image(), COMMAND)
    assert found.srun == (
        "--container-image=nvcr.io#nvidia/pytorch:25.08-py3",  # [USER@][REGISTRY#]IMAGE[:TAG]|PATH
        "--container-mounts=/runs/a:/runs/a,/lustre/text:/text:ro",  # SRC:DST[:FLAGS][,SRC:DST...]
        "--no-container-mount-home",
        "--no-container-remap-root",
        "--container-writable",
        "--container-workdir=/work",
        "--no-container-entrypoint",
        # names to override with the host's, and set at the entrypoint
        "--container-env=AMLAUNCH_OF_RECIPE_HOME,MASTER_ADDR,MY_TOKEN,NCCL_DEBUG",
    )
    assert found.argv == (
        "sh",
        "-c",
        'exec "$@"',
        "sh",
        *INSIDE,
    )  # srun resolves a command with a path on the host (pyxis#104)
    assert (
        found.env
        == {
            "AMLAUNCH_OF_RECIPE_HOME": "/tmp/home",
            "MASTER_ADDR": "gpu1",
            "MY_TOKEN": "hunter2",
            "NCCL_DEBUG": "INFO",
            **HOOK,
        }
        and not found.prepare
    )


@pytest.mark.parametrize("runtime", ["pyxis", "enroot"])
def test_enroots_hook_is_told_whether_there_are_gpus(runtime):
    """github.com/NVIDIA/enroot, conf/hooks/98-nvidia.sh: NGC's images ask for GPUs on any node, others for none."""
    assert catalog.launch(runtime, image(gpus=False), COMMAND).env["NVIDIA_VISIBLE_DEVICES"] == "void"
    own = image(env={**ENV, "NVIDIA_DRIVER_CAPABILITIES": "all"})
    assert catalog.launch(runtime, own, COMMAND).env["NVIDIA_DRIVER_CAPABILITIES"] == "all", "a recipe's own words win"


def test_pyxis_takes_a_file_by_its_whole_path_and_runs_an_entrypoint_that_is_asked_for():
    found = catalog.launch(
        "pyxis", image(SQSH, entrypoint=True, mounts=(), options=("--container-remap-root",)), COMMAND
    )
    assert "--container-image=/images/pytorch.sqsh" in found.srun and "--container-entrypoint" in found.srun
    assert (
        not any(flag.startswith("--container-mounts") for flag in found.srun)
        and found.srun[-1] == "--container-remap-root"
    )


def test_enroot():
    """https://github.com/NVIDIA/enroot: doc/cmd/{import,create,start,list}.md, doc/image-format.md, src/runtime.sh."""
    found = catalog.launch("enroot", image(), COMMAND)
    bash, flag, script, name, *words = found.argv
    assert (bash, flag, name) == ("bash", "-c", "bash")
    assert script == (
        "exec enroot start --rw "
        '${CUDA_VISIBLE_DEVICES+--env CUDA_VISIBLE_DEVICES} ${SLURM_PROCID+--env SLURM_PROCID} "$@"'
    )
    container = words.index(
        next(word for word in words if word.startswith("amlaunch-nvcr-io-nvidia-pytorch-25-08-py3-"))
    )
    assert words[:container] == [
        "--mount",
        "/runs/a:/runs/a:none:x-create=auto,rbind,rw:0:0",
        "--mount",
        "/lustre/text:/text:none:x-create=auto,rbind,ro:0:0",
        "--env",
        "AMLAUNCH_OF_RECIPE_HOME",
        "--env",
        "MASTER_ADDR",
        "--env",
        "MY_TOKEN",
        "--env",
        "NCCL_DEBUG",
        "--rc",
        str(SCRIPTS / "exec.sh"),
    ]
    assert words[container + 1 :] == ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", "/work", *INSIDE]
    ((*_, unpacked, uri),) = found.prepare
    assert (unpacked, uri) == (words[container], "docker://nvcr.io#nvidia/pytorch:25.08-py3")


@pytest.fixture
def enroot(tmp_path, monkeypatch) -> Path:
    """The stand-in's image; its configuration names folders that no variable does, and there is no home."""
    need("unsquashfs", "mksquashfs")
    for name in [name for name in os.environ if name.startswith(("ENROOT_", "XDG_"))] + ["TMPDIR"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/no-home")
    conf = {"DATA": "data/$(id -u)", "TEMP": "temp", "CACHE": "cache", "RUNTIME": "run"}
    lines = [f"ENROOT_{name}_PATH  {tmp_path}/{folder}\n" for name, folder in conf.items()]
    found = write_enroot(tmp_path / "bin", "".join(lines))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return found


def run_prepare(reference: str) -> subprocess.CompletedProcess[str]:
    (command,) = catalog.launch("enroot", image(parse(reference)), COMMAND).prepare
    return subprocess.run(command, capture_output=True, text=True)


def listed() -> list[str]:
    return subprocess.run(["enroot", "list"], capture_output=True, text=True, check=True).stdout.split()


def test_enroot_reads_the_start_script_after_it_has_closed_all_descriptors(enroot):
    found = catalog.launch("enroot", image(workdir=None, env={}), ["echo", "started"])
    done = subprocess.run(found.argv, capture_output=True, text=True)
    assert done.stdout == "started\n", done.stderr


def test_enroot_unpacks_once_where_its_configuration_says(enroot, tmp_path):
    reference = "registry.example/team/tiny:1"
    for _ in range(2):
        assert run_prepare(reference).returncode == 0
    name = container_name(parse(reference))
    assert listed() == [name], "the lock is no container"
    assert (tmp_path / "bin" / "imports").read_text().startswith(f"{tmp_path}/temp/amlaunch-"), "imported once"
    assert not list((tmp_path / "temp").iterdir())
    assert folders(os.environ) == [tmp_path / "data" / str(os.getuid()), tmp_path / "temp"]
    # Another image: what no job has started for a month goes, and so does what a killed job left.
    data = tmp_path / "data" / str(os.getuid())
    (data / "amlaunch-partial").mkdir()
    (data / "of-the-user").mkdir()
    os.utime(data / name / COMPLETE_MARKER, (0, 0))
    assert run_prepare(str(enroot)).returncode == 0
    assert sorted(listed()) == [container_name(parse(str(enroot))), "of-the-user"]


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_enroot_leaves_no_partial_container_and_knows_a_damaged_image(enroot, damage):
    damaged = enroot.with_name("damaged.sqsh")
    content = enroot.read_bytes()
    half = len(content) // 2
    damaged.write_bytes(content[:half] if damage == "cut" else content[:200] + bytes(half) + content[half + 200 :])
    done = run_prepare(str(damaged))
    assert done.returncode and not listed()
    found = failure_of(done.stdout + done.stderr)
    assert found is not None and found[0].kind == "damaged image" and not found[0].restart


@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_apptainer(program):
    """apptainer.org/docs/user/main: cli/apptainer_exec, bind_paths_and_mounts, gpu, environment_and_metadata."""
    found = catalog.launch(program, image(), COMMAND)
    start = found.argv.index(program)
    assert found.argv[start:] == (
        program,
        "exec",
        "--cleanenv",
        "--no-home",
        "--writable-tmpfs",
        "--nv",
        "--bind",
        "/runs/a:/runs/a:rw",
        "--bind",
        "/lustre/text:/text:ro",
        "--pwd",
        "/work",
        "docker://nvcr.io/nvidia/pytorch:25.08-py3",
        *INSIDE,
    )
    prefix = program.upper()
    assert found.env == {
        f"{prefix}ENV_AMLAUNCH_OF_RECIPE_HOME": "/tmp/home",
        f"{prefix}ENV_NCCL_DEBUG": "INFO",
        f"{prefix}ENV_MY_TOKEN": "hunter2",
        f"{prefix}ENV_MASTER_ADDR": "gpu1",
        f"{prefix}_NO_EVAL": "1",
    }
    assert found.prepare == ((program, "exec", "docker://nvcr.io/nvidia/pytorch:25.08-py3", "true"),)
    assert catalog.launch(program, image(parse("/images/a.sif"), gpus=False), COMMAND).prepare == ()
    assert "--nv" not in catalog.launch(program, image(gpus=False), COMMAND).argv
    assert catalog.launch(program, image(entrypoint=True), COMMAND).argv[start + 1] == "run"


def test_who_is_told_to_save_by_the_stop_file_alone():
    """A signal would end what serves an image's files (FUSE), or the container itself (Slurm's own)."""
    sif, folder = parse("/a.sif"), parse("/a/")
    ignores_signals = {
        ("charliecloud", SQSH, True),
        ("charliecloud", SQSH, False),
        ("apptainer", sif, True),
        # pyxis with use_squashfuse=1, for registries as well.
        ("pyxis", SQSH, True),
        ("pyxis", NGC, True),
    }
    for runtime, of, on_slurm in [
        *ignores_signals,
        ("charliecloud", folder, True),
        ("apptainer", sif, False),
        ("enroot", SQSH, True),
        ("podman", folder, True),
        ("docker", NGC, True),
    ]:
        assert catalog.launch(runtime, image(of, mounts=(), on_slurm=on_slurm), COMMAND).ignores_signals == (
            (runtime, of, on_slurm) in ignores_signals
        ), runtime


def test_apptainer_has_what_a_task_alone_knows_under_its_own_names(tmp_path):
    """With --cleanenv it hands on what begins with APPTAINERENV_; a name without a value would hide every GPU."""
    found = catalog.launch("apptainer", image(), COMMAND)
    (tmp_path / "apptainer").write_text("#!/bin/sh\nenv | grep ^APPTAINERENV_ | sort\n")
    (tmp_path / "apptainer").chmod(0o755)
    said = subprocess.run(
        found.argv,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_PROCID": "a 'b' \"c\" $(d)"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "APPTAINERENV_SLURM_PROCID=a 'b' \"c\" $(d)\n"


def test_docker():
    """https://docs.docker.com/reference/cli/docker/container/run; limits and --ipc by NVIDIA's framework guide."""
    found = catalog.launch("docker", image(on_slurm=False), COMMAND)
    argv = list(found.argv)
    groups = [word for group in sorted(set(os.getgroups()) - {os.getgid()}) for word in ("--group-add", str(group))]
    assert argv == [
        "docker",
        "run",
        "--rm",
        "--interactive",
        "--network=host",
        "--ipc=host",
        "--mount",
        "type=bind,source=/runs/a,target=/runs/a",
        "--mount",
        "type=bind,source=/lustre/text,target=/text,readonly",
        "--env",
        "AMLAUNCH_OF_RECIPE_HOME",
        "--env",
        "CUDA_VISIBLE_DEVICES",
        "--env",
        "MASTER_ADDR",
        "--env",
        "MY_TOKEN",
        "--env",
        "NCCL_DEBUG",
        "--env",
        "SLURM_PROCID",
        "--workdir",
        "/work",
        "--entrypoint",
        "",
        "--init",
        "--ulimit",
        "memlock=-1",
        "--ulimit",
        "stack=67108864",
        "--user",
        f"{os.getuid()}:{os.getgid()}",
        *groups,
        "--gpus",
        "all",
        "nvcr.io/nvidia/pytorch:25.08-py3",
        *INSIDE,
    ]
    assert found.stdin, "it lives as long as its input"


def test_docker_in_a_job_uses_the_gpus_of_the_job():
    """Its daemon sees all of the node's GPUs; SLURM_STEP_GPUS has the step's numbers (srun(1))."""
    argv = catalog.launch("docker", image(), COMMAND).argv
    assert (
        argv[:4] == ("sh", "-c", 'CUDA_VISIBLE_DEVICES=${SLURM_STEP_GPUS:-${CUDA_VISIBLE_DEVICES-}} exec "$@"', "sh")
        and argv[4] == "docker"
    )
    assert catalog.launch("docker", image(gpus=False), COMMAND).argv[0] == "docker"


def test_podman(monkeypatch):
    """podman-run(1); NVIDIA's devices by CDI, as the container toolkit documents it for podman."""
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    argv = catalog.launch("podman", image(on_slurm=False), COMMAND).argv
    start = argv.index("--entrypoint")
    assert argv[:2] == ("podman", "run") and argv[start:] == (
        "--entrypoint",
        "",
        "--userns=keep-id",
        "--annotation",
        "run.oci.keep_original_groups=1",
        "--ulimit",
        "host",
        "--pull=never",
        "--security-opt",
        "label=disable",
        "--device",
        "nvidia.com/gpu=all",
        "nvcr.io/nvidia/pytorch:25.08-py3",
        *INSIDE,
    )
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert "--userns=keep-id" not in catalog.launch("podman", image(), COMMAND).argv


@pytest.mark.parametrize(
    ("step", "devices", "visible"),
    [("2,5", "nvidia.com/gpu=2 nvidia.com/gpu=5", "0,1"), ("", "nvidia.com/gpu=all", "7")],
)
def test_podman_in_a_job_has_the_gpus_of_the_job_alone(tmp_path, step, devices, visible):
    """Rootless podman leaves the job's control group (nvidia-container-toolkit#585); the step's GPUs count from 0."""
    found = catalog.launch("podman", image(), COMMAND)
    (tmp_path / "podman").write_text(
        '#!/bin/sh\nfor word in "$@"; do case $word in nvidia*) printf "%s " "$word";; esac; done; echo '
        '"$CUDA_VISIBLE_DEVICES" "$1"\n'
    )
    (tmp_path / "podman").chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "CUDA_VISIBLE_DEVICES": "7",
        **({"SLURM_STEP_GPUS": step} if step else {}),
    }
    said = subprocess.run(found.argv, env=env, capture_output=True, text=True, check=True).stdout
    assert said == f"{devices} {visible} run\n"


def test_charliecloud():
    """ch-run(1) 0.31: --set-env, --unset-env, --bind, --cd; $TMPDIR of the host is its /tmp."""
    found = catalog.launch("charliecloud", image(SQSH, mounts=MOUNTS[:1]), COMMAND)
    assert found.argv == (
        "env",
        "-u",
        "TMPDIR",
        "ch-run",
        "--unset-env=!(AMLAUNCH_OF_RECIPE_*|SLURM_PROCID|CUDA_VISIBLE_DEVICES)",
        "--set-env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "--set-env=HOME=$AMLAUNCH_OF_RECIPE_HOME",
        "--set-env=MASTER_ADDR=$AMLAUNCH_OF_RECIPE_MASTER_ADDR",
        "--set-env=MY_TOKEN=$AMLAUNCH_OF_RECIPE_MY_TOKEN",
        "--set-env=NCCL_DEBUG=$AMLAUNCH_OF_RECIPE_NCCL_DEBUG",
        "--unset-env=AMLAUNCH_OF_RECIPE_*",
        "--bind=/runs/a:/runs/a",
        "--cd=/work",
        "/images/pytorch.sqsh",
        "--",
        *COMMAND,
    )
    with pytest.raises(CannotLaunch, match="read-only"):
        catalog.launch("charliecloud", image(SQSH), COMMAND)


def test_a_file_that_was_imported_keeps_the_variables_of_its_image(tmp_path):
    """The record beside it has them; neither runtime finds any in a plain file system. The recipe and the task win."""
    settings = {"Env": ["PATH=/opt/bin:/bin", "FROM_IMAGE=image", "NCCL_DEBUG=WARN", "CUDA_VISIBLE_DEVICES=9"]}
    (tmp_path / "a.json").write_text(json.dumps({"settings": settings}))
    of_file = image(parse(str(tmp_path / "a.sqsh")), mounts=MOUNTS[:1])
    found = catalog.launch("apptainer", of_file, COMMAND)
    assert (
        found.env["APPTAINERENV_FROM_IMAGE"] == "image"
        and found.env["APPTAINERENV_NCCL_DEBUG"] == "INFO"
        and found.env["APPTAINERENV_AMLAUNCH_OF_RECIPE_PATH"] == "/opt/bin:/bin"
    )
    assert "APPTAINERENV_CUDA_VISIBLE_DEVICES" not in found.env
    found = catalog.launch("charliecloud", of_file, COMMAND)
    told = {name.removeprefix("AMLAUNCH_OF_RECIPE_"): value for name, value in found.env.items()}
    assert told == {**ENV, "PATH": "/opt/bin:/bin", "FROM_IMAGE": "image"} and all(
        f"--set-env={name}=$AMLAUNCH_OF_RECIPE_{name}" in found.argv for name in told
    )


@pytest.mark.parametrize(
    ("runtime", "path", "sign"),
    [
        ("pyxis", "/a:b", "a colon"),
        ("pyxis", "/a b", "a space"),
        ("enroot", "/a b", "a space"),
        ("apptainer", "/a:b", "a colon"),
        ("charliecloud", "/a:b", "a colon"),
        ("docker", "/a:b c", ""),
        ("podman", "/a:b c", ""),
        ("docker", "/a,b", "a comma"),
        ("podman", "/a,b", "a comma"),
        ("podman", '/a"b', "a quote"),
        ("charliecloud", "/a\nb", "a line break"),
    ],
)
def test_a_path_that_a_runtime_would_split_is_refused(runtime, path, sign):
    of_path = image(mounts=(Mount(path, "/data"),))
    if not sign:
        assert f"type=bind,source={path},target=/data" in catalog.launch(runtime, of_path, COMMAND).argv
        return
    with pytest.raises(CannotLaunch, match=f"cannot mount {path} at /data: it misreads {sign}"):
        catalog.launch(runtime, of_path, COMMAND)


@pytest.mark.parametrize("runtime", ["pyxis", "enroot"])
def test_a_value_of_several_lines_is_not_for_enroot(runtime):
    """https://github.com/NVIDIA/enroot, src/runtime.sh: its file of variables has one a line."""
    with pytest.raises(CannotLaunch, match=f"{runtime} cannot set MY_KEY: the value has a line break") as refused:
        catalog.launch(runtime, image(env={**ENV, "MY_KEY": "hunter2\nhunter3"}), COMMAND)
    assert "hunter" not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        '{"process": null, "mounts": null}',
        '{"process": {"env": null, "cwd": null}, "linux": {"namespaces": null, "uidMappings": null}}',
        '{"linux": null}',
    ],
)
@pytest.mark.parametrize("runtime", catalog.runtimes_for(parse("/bundle/")))
def test_a_bundle_may_leave_out_what_it_likes(tmp_path, runtime, config):
    (tmp_path / "config.json").write_text(config)
    found = catalog.launch(runtime, image(parse(f"{tmp_path}/"), mounts=()), COMMAND)
    assert runtime != "slurm" or found.bundle["process"]["cwd"] == "/work"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[]", "expected a JSON object"),
        ("{", "invalid JSON"),
        ('{"process": []}', "process: expected a JSON object"),
        ('{"process": {"env": [1]}}', "process.env: expected a list of strings"),
        ('{"process": {"env": {"A": "1"}}}', "process.env"),
        ('{"mounts": [null]}', "mounts: expected a list of objects"),
        ('{"linux": {"namespaces": 5}}', "linux.namespaces"),
        ("[" * 10**5, "invalid JSON"),
    ],
)
def test_a_bundle_that_is_none_is_refused_where_it_is_read(tmp_path, config, words):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CannotLaunch, match=f"{tmp_path}/config.json: {words}"):
        catalog.launch("slurm", image(parse(f"{tmp_path}/")), COMMAND)
    for runtime in ("podman", "charliecloud", "apptainer"):
        catalog.launch(runtime, image(parse(f"{tmp_path}/"), mounts=()), COMMAND)


def test_a_file_that_was_made_anew_is_another_container_of_enroots(tmp_path):
    file = tmp_path / "a.sqsh"
    file.write_bytes(b"1")
    before = catalog.launch("enroot", image(parse(str(file))), COMMAND).prepare
    file.write_bytes(b"22")
    assert catalog.launch("enroot", image(parse(str(file))), COMMAND).prepare != before


@pytest.mark.parametrize(
    "text, runtimes",
    [
        (
            "nvcr.io/nvidia/pytorch:25.08-py3",
            ["pyxis", "enroot", "apptainer", "singularity", "podman", "docker", "charliecloud"],
        ),
        ("/a.sqsh", ["pyxis", "enroot", "apptainer", "singularity", "charliecloud"]),
        ("/a.sif", ["apptainer", "singularity"]),
        ("/a.tar", ["apptainer", "singularity", "podman", "docker"]),
        ("/bundle", ["apptainer", "singularity", "podman", "charliecloud", "slurm"]),
    ],
)
def test_which_runtime_starts_what(text, runtimes):
    reference = parse(text)
    assert catalog.runtimes_for(reference) == runtimes
    assert catalog.choose(reference, ["docker", "pyxis", "apptainer"]) == next(
        (name for name in runtimes if name in ("pyxis", "apptainer", "docker")), None
    )
    for name in set(catalog.KINDS) - set(runtimes):
        with pytest.raises(CannotLaunch):
            catalog.launch(name, image(reference, mounts=()), COMMAND)


def test_of_the_host_only_what_libraries_read_enters():
    host = {
        "NCCL_DEBUG": "WARN",
        "PYTHONPATH": "/x",
        "LD_LIBRARY_PATH": "/y",
        "CONDA_PREFIX": "/z",
        "WANDB_API_KEY": "k",
        "PATH": "/bin",
        "HOME": "/home/me",
    }
    assert library_variables(host) == {"NCCL_DEBUG": "WARN", "WANDB_API_KEY": "k"}
    stale = {
        "APPTAINERENV_X": "1",
        "PYXIS_CONTAINER_IMAGE": "old",
        "SLURM_EXPORT_ENV": "NONE",
        "ENROOT_CONFIG_PATH": "/c",
    }
    assert runtime_variables({**host, **stale}) == {"PATH": "/bin", "HOME": "/home/me", "ENROOT_CONFIG_PATH": "/c"}
    own = {
        "TMPDIR": "/scratch/1",
        "XDG_RUNTIME_DIR": "/run/user/1",
        "DBUS_SESSION_BUS_ADDRESS": "unix:",
        "APPTAINER_CACHEDIR": "/a",
    }
    assert runtime_variables({**host, **own, "LANG": "de_DE"}) == {"PATH": "/bin", "HOME": "/home/me", **own}
    # pyxis hands on all that srun has, and enroot behind it reads of that ENROOT_*, SLURM_*, HOME and NVIDIA's
    # (pyxis_slurmstepd.c)
    assert runtime_variables({**host, **own, "LANG": "de_DE", "SLURM_JOB_ID": "1"}, is_srun=True) == {
        "PATH": "/bin",
        "HOME": "/home/me",
        "SLURM_JOB_ID": "1",
    }
    assert not any(name.startswith(("PMI", "PYTHON", "LD_")) for name in RUNTIME_VARIABLES)


@pytest.mark.parametrize(
    "line, kind, again",
    [
        (
            "slurmstepd: error: pyxis: failed to import docker image: curl: (22) The requested URL returned error: 401",
            "no credentials for the registry",
            False,
        ),
        ("slurmstepd: error: pyxis:     [ERROR] No such file or directory: /images/x.sqsh", "no such image", False),
        (
            "slurmstepd: error: pyxis:     [ERROR] Command not found: nvidia-container-cli, see "
            "https://github.com/NVIDIA/libnvidia-container",
            "no GPUs in the container",
            False,
        ),
        (
            "slurmstepd: error: pyxis:     mksquashfs: write failed: No space left on device",
            "no space for the image",
            True,
        ),
        (
            "docker: Error response from daemon: manifest for nvcr.io/x:1 not found: manifest unknown",
            "no such image",
            False,
        ),
        (
            'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
            "no GPUs in the container",
            False,
        ),
        (
            "Error: initializing source docker://r/x:1: pinging container registry r: dial tcp: lookup r: no such host",
            "registry unreachable",
            True,
        ),
        (
            "Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=all",
            "no GPUs in the container",
            False,
        ),
        (
            "FATAL:   Unable to handle docker://nvcr.io/x uri: unauthorized: authentication required",
            "no credentials for the registry",
            False,
        ),
        ("FATAL:   could not open image /images/a.sif: failed to retrieve path", "no such image", False),
        (
            "FATAL:   container creation failed: mount /a->/b error: while mounting /a: mount source /a doesn't exist",
            "mount failed",
            False,
        ),
        (
            "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0, please update your driver",
            "driver too old",
            False,
        ),
        (
            "slurmstepd: error: pyxis: failed to import docker image: curl: (28) Operation timed out after 300000 "
            "milliseconds",
            "registry unreachable",
            True,
        ),
        (
            "slurmstepd: error: pyxis: failed to import docker image: curl: (56) OpenSSL SSL_read: unexpected eof "
            "while reading",
            "registry unreachable",
            True,
        ),
        (
            "slurmstepd: error: pyxis:     [ERROR] URL https://nvcr.io/v2/ returned error code: 500 Internal Server "
            "Error",
            "registry unreachable",
            True,
        ),
        (
            "slurmstepd: error: pyxis: failed to import docker image: [ERROR] Could not process JSON input",
            "image import failed",
            True,
        ),
        (
            "slurmstepd: error: pyxis: failed to import docker image: [ERROR] URL https://nvcr.io/v2/ returned error "
            "code: 404 Not Found",
            "no such image",
            False,
        ),
        (
            "slurmstepd: error: pyxis:     mkdir: cannot create directory ‘/scratch/42’: Permission denied",
            "no folder for the image",
            True,
        ),
        ("mkdir: cannot create directory ‘/run/enroot’: Permission denied", "no folder for the image", True),
        ("slurmstepd: error: pyxis: container exited too soon", "container ended at its start", True),
        ("exec /usr/bin/python3: exec format error", "wrong architecture", False),
        ("ch-run[12]: error: can't bind: destination not found: /images/x/work (ch_core.c:88)", "mount failed", False),
        (
            "docker: Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
            "no daemon",
            True,
        ),
        (
            'Error: cannot find newuidmap: exec: "newuidmap": executable file not found in $PATH',
            "no user namespaces",
            False,
        ),
    ],
)
def test_why_a_container_did_not_start(line, kind, again):
    found = failure_of(f"something else\n{line}\n")
    assert found is not None and found[0].kind == kind and found[0].restart == again and found[1] == line
    # Slurm may write the node's name into its prefix.
    named = line.replace("slurmstepd:", "slurmstepd-node-1:")
    assert failure_of(named) == (found[0], named) and not has_own_output(named)


@pytest.mark.parametrize(
    "line",
    [
        "OSError: No space left on device",
        "requests: 404 Client Error: Not Found",
        "error: r.yaml:3: no such image",
        "rank 0: 401",
    ],
)
def test_what_the_trainer_says_is_not_the_runtimes(line):
    assert failure_of(line) is None


def test_every_kind_of_failure_has_advice():
    assert all(len(failure.advice) > 20 for failure in FAILURES) and len({failure.kind for failure in FAILURES}) == len(
        FAILURES
    )


def test_a_node_is_looked_at_before_anything_starts(tmp_path):
    (tmp_path / "a.sqsh").touch()
    spec = {
        "runtime": "podman",
        "image": "x",
        "path": str(tmp_path / "b.sqsh"),
        "mounts": [str(tmp_path), str(tmp_path / "no")],
        "prepare": [],
        "architecture": "s390x",
    }
    found = dict(check(spec))
    assert (
        f"{tmp_path / 'b.sqsh'} does not exist on this node" in found["no such image"]
        and f"{tmp_path / 'no'} does not exist on this node" in found["mount failed"]
    )
    assert "the image is for s390x" in found["wrong architecture"]
    assert not [
        kind
        for kind, _ in check({**spec, "path": str(tmp_path / "a.sqsh"), "mounts": [], "architecture": None})
        if kind != "no runtime"
    ]


@pytest.mark.parametrize(("runtime", "refused"), [("apptainer", True), ("pyxis", False), ("docker", False)])
def test_a_driver_that_is_too_old(tmp_path, monkeypatch, runtime, refused):
    """Not where NVIDIA's container library uses the image's own compatibility libraries."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '| Driver Version: 535.183.01   CUDA Version: 12.2 |'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    spec = {"runtime": runtime, "image": "x", "path": None, "mounts": [], "prepare": [], "cuda": "13.0", "gpus": True}
    assert ("driver too old" in dict(check(spec))) is refused
    assert "driver too old" not in dict(check({**spec, "cuda": "12.9"})), "minor versions are compatible"


def test_a_node_without_room_is_not_asked_to_bring_an_image(monkeypatch):
    spec = {"runtime": "podman", "image": "x", "path": None, "mounts": [], "prepare": [["true"]]}
    room = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room._replace(free=9 * 10**8))
    assert "has 0.9 GB free, and the image needs at least 1.0 GB" in dict(check(spec))["no space for the image"]
    assert "no space for the image" not in dict(check({**spec, "prepare": []}))


def test_what_a_node_says_is_a_file_for_the_driver_and_a_line_for_people(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu1")
    assert verdict_of(tmp_path) is None and verdict_of(tmp_path / "no") is None
    spec = {
        "runtime": "podman",
        "image": "x",
        "path": str(tmp_path / "b.sqsh"),
        "mounts": [],
        "verdicts": str(tmp_path),
    }
    assert main([json.dumps(spec)]) == 1
    verdict = verdict_of(tmp_path)
    assert (
        verdict is not None and verdict["host"] == "gpu1" and verdict["reason"] in capsys.readouterr().err.splitlines()
    )
    assert main([json.dumps({**spec, "verdicts": "/nowhere"})]) == 1, (
        "a node that does not see the folder says it all the same"
    )


def node(tmp_path: Path, script: str, **env: str) -> subprocess.Popen:
    """What looks at a node, while it brings an image there by this script."""
    need("podman")
    spec = {
        "runtime": "podman",
        "image": str(tmp_path),
        "path": None,
        "mounts": [],
        "prepare": [["sh", "-c", script]],
        "verdicts": str(tmp_path),
        "passed": ["HF_HOME"],
    }
    return subprocess.Popen(
        [sys.executable, "-m", "amlaunch.containers.node_setup", json.dumps(spec)],
        cwd=ROOT,
        env={**os.environ, **env},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("number", "script"),
    [
        (signal.SIGTERM, "sleep 50 & sleep 50"),
        (signal.SIGUSR1, "sleep 50 & sleep 50"),
        (signal.SIGKILL, "exec sleep 50"),
    ],
)
def test_what_fetches_an_image_ends_with_what_looks_at_the_node(tmp_path, number, script):
    """With all that it started; or the next start would fetch it a second time, beside the first."""
    pids = tmp_path / "pids"
    looking = node(tmp_path, f"echo $$ >{pids}; {script}")
    deadline = time.monotonic() + 20
    while not (pids.exists() and pids.read_text()):
        assert looking.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    looking.send_signal(number)
    assert looking.wait(10) != 0
    group = looking.pid
    while (
        left := [path for path in Path("/proc").glob("[0-9]*/stat") if of_group(path, group)]
    ) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def of_group(path: Path, group: int) -> bool:
    """Whether a process that has not ended yet is of a process group (proc(5))."""
    try:
        state, _, found = path.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(found) == group and state != "Z"


def test_an_image_is_brought_where_ranks_will_look_for_it(tmp_path):
    """With the environment that the runtime has when it starts them: a storage.conf may name variables."""
    host = {
        "SCRATCH": "/scratch",
        "LD_PRELOAD": "",
        "XDG_DATA_HOME": "/data",
        "SSL_CERT_FILE": "/certs",
        "ALL_PROXY": "x",
        "AWS_CONFIG_FILE": "/home/me/aws",
        "HF_HOME": "/hf",
        "HF_TOKEN": "hunter2",
        "APPTAINER_BIND": "/a",
    }
    assert node(tmp_path, f"env >{tmp_path}/env", **host).wait(20) == 0
    told = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert {name: told.get(name) for name in host if name in told} == {
        name: host[name] for name in ("XDG_DATA_HOME", "SSL_CERT_FILE", "ALL_PROXY", "AWS_CONFIG_FILE", "HF_HOME")
    }


def test_the_folder_of_a_node_is_ours_alone(tmp_path, monkeypatch):
    """Anybody may have taken its name in /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = private_folder()
    assert mine == private_folder() and mine.stat().st_mode & 0o777 == 0o700
    mine.rename(tmp_path / "kept")
    mine.symlink_to(tmp_path)
    other = private_folder()
    assert other != mine and other.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("version", [(3, 10), (3, 13)])
def test_what_runs_inside_is_python_of_every_version(version):
    """The image's Python may be another than the launcher's: no syntax newer than 3.10."""
    for package in ("recipes", "trainer", "preprocess", "containers"):
        for path in (ROOT / package).rglob("*.py"):
            ast.parse(path.read_text(), str(path), feature_version=version)
