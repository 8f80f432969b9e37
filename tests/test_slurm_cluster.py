"""The tests' Slurm cluster has the properties that the other tests rely on."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import REPOSITORY, Cluster

pytestmark = pytest.mark.slow

MEET = """
import os, pathlib, socket, time
lines = map(str.split, pathlib.Path("/proc/net/if_inet6").read_text().splitlines())
[own] = [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line[0])) for line in lines if line[-1] == "ib0"]
place = pathlib.Path("address")
if os.environ["SLURM_PROCID"] == "0":
    with socket.create_server((own, 0), family=socket.AF_INET6) as server:
        pathlib.Path("new").write_text(f"{own} {server.getsockname()[1]}")
        os.replace("new", place)
        print("met", server.accept()[1][0])
else:
    while not place.exists():
        time.sleep(0.05)
    address, port = place.read_text().split()
    socket.create_connection((address, int(port)), timeout=10).close()
    print("met", address)
"""


def state_of(cluster: Cluster, job: str) -> str:
    return cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").stdout.strip()


def wait_for(what: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def test_tasks_run_on_two_hosts_as_an_ordinary_user(cluster: Cluster) -> None:
    seen = cluster.run("srun", "--nodes=2", "sh", "-c", "echo $(id -un) $(uname -n)").stdout
    assert sorted(seen.splitlines()) == ["lab cpu1", "lab cpu2"]


def test_sixteen_tasks_see_their_gpus(cluster: Cluster) -> None:
    tasks = ["--partition=gpu", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"]
    show = "echo $SLURM_NODEID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"
    seen = cluster.run("srun", *tasks, "sh", "-c", show).stdout.splitlines()
    assert sorted(seen) == [f"{node} {task} 0,1,2,3,4,5,6,7" for node in range(2) for task in range(8)]


def test_exit_code_reaches_accounting(cluster: Cluster) -> None:
    folder = cluster.folder("exit-code")
    done = cluster.run("sbatch", "--parsable", "--wait", "--wrap=exit 3", cwd=folder, check=False)
    job = done.stdout.strip()
    assert done.returncode == 3, done.stderr
    ask = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State,ExitCode"]
    wait_for(lambda: cluster.run(*ask).stdout == "FAILED|3:0\n")


def test_ib0_carries_ipv6_and_nothing_else(cluster: Cluster) -> None:
    folder = cluster.folder("ipv6")
    (folder / "meet.py").write_text(MEET)
    assert cluster.on("cpu1", "ip", "-4", "addr", "show", "dev", "ib0").stdout == ""
    seen = cluster.run("srun", "--nodes=2", cluster.python, "meet.py", cwd=folder).stdout.splitlines()
    assert sorted(seen) == ["met fd77::11", "met fd77::12"]


def test_python_and_the_checkout_are_there_on_every_node(cluster: Cluster) -> None:
    show = "import amlaunch; print(amlaunch.__file__)"
    nodes = ["--partition=gpu", "--nodes=2", "--ntasks-per-node=1"]
    seen = cluster.run("srun", *nodes, cluster.python, "-P", "-c", show).stdout.splitlines()
    assert seen == [str(REPOSITORY / "src" / "amlaunch" / "__init__.py")] * 2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--account=other"], "Invalid account"),
        (["--array=0-1001"], "Invalid job array specification"),
        (["--partition=nowhere"], "invalid partition"),
    ],
)
def test_what_the_site_forbids_is_refused(cluster: Cluster, flags: list[str], complaint: str) -> None:
    done = cluster.run("sbatch", *flags, "--wrap=true", cwd=cluster.folder("refused"), check=False)
    assert done.returncode == 1
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("flags", "reasons"),
    [
        (
            ["--partition=closed"],
            ["(Job's account not permitted to use this partition (closed allows nobody not lab))"],
        ),
        (["--partition=short", "--time=11"], ["(PartitionConfig)", "(PartitionTimeLimit)"]),
    ],
)
def test_a_job_that_its_partition_never_starts_waits(cluster: Cluster, flags: list[str], reasons: list[str]) -> None:
    folder = cluster.folder("waits")
    job = cluster.run("sbatch", "--parsable", *flags, "--wrap=true", cwd=folder).stdout.strip()
    ask = ["squeue", "--noheader", "--all", f"--jobs={job}", "--format=%R"]
    wait_for(lambda: cluster.run(*ask).stdout.strip() in reasons)
    assert state_of(cluster, job) == "PENDING"


def test_a_job_outlives_the_controller_and_its_own_node(cluster: Cluster) -> None:
    folder = cluster.folder("crash")
    script = '--wrap=uname -n >>starts; [ -n "$SLURM_RESTART_COUNT" ] || sleep 300'
    submit = ["sbatch", "--parsable", "--requeue", "--nodelist=cpu1", script]
    job = cluster.run(*submit, cwd=folder).stdout.strip()
    starts = folder / "starts"
    wait_for(lambda: starts.exists() and starts.read_text())
    cluster.stop_ctld()
    assert "DOWN" in cluster.run("scontrol", "ping", check=False).stdout  # squeue takes nine seconds to find out
    cluster.start_ctld()
    assert state_of(cluster, job) == "RUNNING"
    cluster.crash("cpu1")
    cluster.revive("cpu1")
    wait_for(lambda: state_of(cluster, job) == "COMPLETED")
    assert starts.read_text().split() == ["cpu1", "cpu1"]


def test_accounting_can_fail_alone(cluster: Cluster) -> None:
    cluster.stop_accounting()
    assert cluster.run("sacct", check=False).returncode == 1
    assert cluster.run("srun", "uname", "-n").stdout == "cpu1\n"
    cluster.start_accounting()
    assert cluster.run("sacct").returncode == 0


def test_shell_scripts_are_clean(cluster: Cluster, root: Path) -> None:
    scripts = [root / ".ci" / "run", root / "tests" / "slurm" / "cluster.sh"]
    checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
