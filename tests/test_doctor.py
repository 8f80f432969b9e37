"""Test ``amlaunch doctor``: the facts it reads, the profile it writes, and the check of a GPU node."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster

from amlaunch.launcher.commands import doctor
from amlaunch.launcher.display.findings import BAD, OK, WARN, worst
from amlaunch.launcher.doctor import diagnosis, probe, profile_writer
from amlaunch.launcher.doctor.probe import Folder, SitePartition, SlurmSite
from amlaunch.launcher.doctor.profile_writer import Proposal, propose, save
from amlaunch.launcher.doctor.tables import gpu_table
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.slurm import client, sbatch
from amlaunch.launcher.specs.cluster_profile import Cluster as Profiled
from amlaunch.launcher.specs.cluster_profile import check_profile, find_cluster
from amlaunch.launcher.specs.plan import Needs
from amlaunch.recipes.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent

# Recorded on the cluster of tests/slurm/cluster.sh, Slurm 22.05.8.
RECORDED = {
    "sbatch --version": "slurm-wlm 22.05.8\n",
    "scontrol show config": (
        "Configuration data as of 2026-11-24T19:28:20\n"
        "AccountingStorageEnforce = associations,limits,qos\n"
        "ClusterName             = lab\n"
        "JobRequeue              = 1\n"
        "KillWait                = 5 sec\n"
        "MaxArraySize            = 1001\n"
        "MinJobAge               = 3600 sec\n"
        "PreemptMode             = REQUEUE\n"
        "PreemptType             = preempt/partition_prio\n"
        "SLURM_CONF              = /nowhere/slurm.conf\n"
    ),
    "sinfo %P|%a|%l|%D|%c|%m|%G": "cpu*|up|infinite|2|32|64000|(null)\nshort|up|10:00|2|32|64000|(null)\n"
    "closed|up|infinite|2|32|64000|(null)\n"
    "gpu|up|infinite|2|32|64000|gpu:h100:8\ngpu-low|up|infinite|2|32|64000|gpu:h100:8\n",
    "sinfo %R|%T|%D": "cpu|idle|2\nshort|idle~|2\nclosed|idle|2\ngpu|idle|1\ngpu|mixed|1\ngpu-low|allocated|2\n",
    "scontrol show partition": (
        "PartitionName=cpu AllowAccounts=ALL GraceTime=0 Nodes=cpu[1-2] PriorityTier=1 PreemptMode=REQUEUE\n"
        "PartitionName=short AllowAccounts=ALL GraceTime=0 Nodes=cpu[1-2] PriorityTier=1 PreemptMode=REQUEUE\n"
        "PartitionName=closed AllowAccounts=nobody GraceTime=0 Nodes=cpu[1-2] PriorityTier=1 PreemptMode=REQUEUE\n"
        "PartitionName=gpu AllowAccounts=ALL Default=NO GraceTime=0 Nodes=gpu[1-2] PriorityTier=10 PreemptMode=OFF\n"
        "PartitionName=gpu-low AllowAccounts=ALL GraceTime=10 Nodes=gpu[1-2] PriorityTier=1 PreemptMode=REQUEUE\n"
    ),
    "sacctmgr user": "lab|high,low,normal|\n",
    "sacctmgr default": "lab\n",
    "sacctmgr limits": "lab|high,low,normal|||10|200|\n",
    "sacctmgr qos": "normal|||||\nlow||gres/gpu=4|||\nhigh|1-00:00:00|||2|\nstrangers|10:00||||\n",
    "sacct": "1|COMPLETED|None|2026-11-24T19:10:40|cpu1|0:0\n",
    "srun --help": "      --container    Path to OCI bundle\n      --container-image=[USER@]IMAGE[:TAG]|PATH\n",
    "sbatch --help": "  -A, --account=name\n      --exclusive[=user]\n  -C, --constraint=list\n",
    "sbatch --test-only": "",
}
CONFIG, RULES = RECORDED["scontrol show config"], RECORDED["scontrol show partition"]


def question(argv: tuple[str, ...]) -> str:
    words = " ".join(argv)
    if argv[0] == "sacctmgr":
        names = {"DefaultQOS": "user", "DefaultAccount": "default", "show assoc": "limits", "show qos": "qos"}
        return "sacctmgr " + next(name for part, name in names.items() if part in words)
    if argv[0] == "sinfo":
        return f"sinfo {argv[-1]}"
    if argv[:2] == ("sbatch", "--test-only"):
        return "sbatch --test-only"
    if argv[0] == "scontrol":
        return f"scontrol show {argv[-1]}"
    return "sacct" if argv[0] == "sacct" else words


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Replace Slurm by recorded answers; an answer that starts with ``!`` is raised as an error message."""
    recorded = dict(RECORDED)

    def call(*argv: str, **_: Any) -> str:
        answer = recorded[question(argv)]
        if answer.startswith("!"):
            raise SlurmError(argv[0], answer[1:])
        return answer

    monkeypatch.setattr(client, "call", call)
    monkeypatch.setattr(sbatch, "call", call)
    monkeypatch.setattr(client, "available", lambda: True)
    monkeypatch.setattr(sbatch.submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 1))
    monkeypatch.setattr(probe, "SHARED_CANDIDATES", ())
    for name in ("AMLAUNCH_RUNS", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    client.config.cache_clear()
    sbatch.sbatch_options.cache_clear()
    yield recorded
    client.config.cache_clear()
    sbatch.sbatch_options.cache_clear()


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"cluster": None, "gpu": False, "save": None, "json": False, **changes})


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the printed text as one line."""
    return " ".join(capsys.readouterr().out.split())


def amlaunch(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "amlaunch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


# --- a machine without Slurm


def test_a_machine_without_slurm(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apptainer").write_text("#!/bin/sh\n")
    (tools / "apptainer").chmod(0o755)
    done = amlaunch("doctor", cwd=tmp_path, PATH=str(tools))
    assert done.returncode == 0, done.stdout + done.stderr
    cpus = f"{len(os.sched_getaffinity(0))} CPUs"
    for word in (cpus, sys.executable, "apptainer", str(tmp_path / "runs"), "amlaunch local"):
        assert word in done.stdout
    assert not list(tmp_path.glob("runs*")), "a diagnosis must leave no files behind"


def test_json_has_everything_on_stdout_and_torch_is_not_loaded(tmp_path):
    code = (
        "import sys\nfrom amlaunch.launcher.__main__ import main\ncode = main(sys.argv[1:])\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'datasets'} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PATH": ""},
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0 and "HEAVY []" in done.stderr
    assert set(report) == {"verdict", "machine", "folders", "slurm", "profile", "findings"}
    assert report["slurm"] is report["profile"] is None
    assert {finding["topic"] for finding in report["findings"]} == {"machine", "folders", "slurm"}


@pytest.mark.slow
def test_options_that_need_slurm_are_refused_without_it(tmp_path):
    assert amlaunch("doctor", "--save", "x.yaml", cwd=tmp_path, PATH="").returncode == 2
    done = amlaunch("doctor", "--cluster", "slurm", cwd=tmp_path, PATH="")
    assert done.returncode == 1 and "sbatch: not found; run amlaunch on a machine of the cluster" in done.stdout
    done = amlaunch("doctor", "--cluster", "slrum", cwd=tmp_path, PATH="")
    assert done.returncode == 2 and "did you mean 'slurm'?" in done.stderr
    done = amlaunch("doctor", "--cluster", "local", cwd=tmp_path, PATH="")
    assert done.returncode == 0 and "everything runs on this machine" in done.stdout


def test_folders_and_file_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "SHARED_CANDIDATES", (str(tmp_path / "scratch"), str(tmp_path / "nowhere")))
    monkeypatch.setattr(probe.getpass, "getuser", lambda: "ann")
    (tmp_path / "scratch" / "ann").mkdir(parents=True)
    folders = probe.read_folders(tmp_path / "not" / "yet" / "runs")
    assert [(folder.use, folder.path) for folder in folders] == [
        ("runs", str(tmp_path / "not/yet/runs")),
        ("home", str(Path.home())),
        ("candidate", str(tmp_path / "scratch/ann")),
    ]
    assert folders[0].problem == "" and not list(tmp_path.glob("not*"))
    assert [folder.use for folder in probe.read_folders(Path.home())] == ["runs", "candidate"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, OK),
        ({"network": False}, WARN),
        ({"free_bytes": 10**9}, WARN),
        ({"free_files": 10}, WARN),
        ({"problem": "No locks available"}, BAD),
        ({"file_system": "tmpfs"}, BAD),
    ],
)
def test_the_verdict_on_a_folder_for_runs(change, verdict):
    folder = replace(folder_of("/x/runs", kind="nfs4"), **change)
    [finding] = diagnosis.folder_findings([folder], on_cluster=True)
    assert finding.verdict == verdict and bool(finding.advice) == (verdict != OK)


@pytest.mark.parametrize(("kind", "network"), [("ext4", False), ("lustre", True), ("fuse.juicefs", True), ("", False)])
def test_types_of_file_systems(kind, network, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "file_system", lambda path: kind)
    assert probe.read_folder(tmp_path, "home").network == network


def test_gpu_models_of_the_kernel_module(tmp_path):
    for number in range(2):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        about = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 18\n"
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text(about)
    assert probe.gpu_models(tmp_path) == ("NVIDIA H100 80GB HBM3",) * 2
    assert probe.gpu_models(tmp_path / "nowhere") == ()


# --- a site, from recorded answers


def test_host_lists_are_expanded():
    assert client.host_names("gpu[1-2,5],login") == {"gpu1", "gpu2", "gpu5", "login"}
    assert client.host_names("r[1-2]n[1-2],x") == {"r[1-2]n[1-2]", "x"}
    assert client.host_names("(null)") == {"(null)"}


def test_a_recorded_site_is_read(answers):
    site = probe.read_site()
    assert (site.version, site.cluster, site.default_account) == ("22.05.8", "lab", "lab")
    assert (site.accounts, site.qos) == (("lab",), ("high", "low", "normal"))
    assert site.pyxis and not site.oci and not site.sacct_problem and site.min_job_age_s == 3600
    places = {place.name: place for place in site.partitions}
    assert {name: place.preempt for name, place in places.items()} == {
        "cpu": "OFF", "short": "OFF", "closed": "OFF", "gpu": "OFF", "gpu-low": "REQUEUE",
    }  # fmt: skip
    assert places["gpu-low"].grace_seconds == 10 and places["gpu"].usable == 2
    assert (places["short"].limit, places["cpu"].limit, places["gpu"].gpu_summary) == ("10:00", "none", "8 x h100")
    assert not places["closed"].open_to(["lab"]) and places["closed"].open_to(["nobody"])
    assert site.limits == (
        "account lab: MaxJobs 10, MaxSubmit 200",
        "qos low: MaxTRESPU gres/gpu=4",
        "qos high: MaxWall 1-00:00:00, MaxSubmitPU 2",
    )
    assert worst(diagnosis.site_findings(site)) == OK


def test_oci_conf_lies_beside_slurm_conf(answers, tmp_path):
    (tmp_path / "oci.conf").write_text("")
    answers["scontrol show config"] = f"SLURM_CONF = {tmp_path}/slurm.conf\n"
    assert probe.read_site().oci == str(tmp_path / "oci.conf")


@pytest.mark.parametrize(
    ("state", "usable"),
    [("idle", 3), ("allocated+", 3), ("planned", 3), ("idle~", 3), ("idle*", 0), ("draining", 0), ("failing", 0)],
)
def test_nodes_that_can_take_jobs(answers, monkeypatch, state, usable):
    monkeypatch.setitem(answers, "sinfo %R|%T|%D", f"cpu|{state}|3\n")
    assert client.usable_nodes() == {"cpu": usable}


@pytest.mark.parametrize(
    ("key", "answer", "verdict", "words"),
    [
        ("sbatch --version", "slurm 19.05.3\n", BAD, "needs Slurm 20.02"),
        ("sinfo %R|%T|%D", "cpu|idle|2\ngpu|drained|1\ngpu|down*|1\n", WARN, "gpu has 2 nodes, all down or drained"),
        ("sinfo %P|%a|%l|%D|%c|%m|%G", "cpu|up|infinite|2|32|64000|(null)\n", WARN, "no default"),
        ("sinfo %P|%a|%l|%D|%c|%m|%G", "cpu*|inact|infinite|2|32|64000|(null)\n", BAD, "none of 1 is up"),
        ("sacctmgr user", "", BAD, "jobs need an account, and you have none"),
        ("sacct", "!accounting storage is disabled", OK, "sacct does not answer (accounting storage is disabled)"),
        ("scontrol show config", CONFIG.replace("= 1001", "= 0"), BAD, "job arrays are disabled"),
        ("scontrol show config", CONFIG.replace("= 1\n", "= 0\n"), OK, "amlaunch enables it for its jobs"),
        ("scontrol show config", CONFIG.replace("partition_prio", "qos"), OK, "by QOS"),
        ("scontrol show partition", RULES.replace("=REQUEUE", "=CANCEL"), WARN, "gpu-low (CANCEL, 10 s"),
    ],
)  # fmt: skip
def test_problems_of_a_site(answers, key, answer, verdict, words):
    answers[key] = answer
    findings = list(diagnosis.site_findings(probe.read_site()))
    assert worst(findings) == verdict
    [finding] = [finding for finding in findings if words in f"{finding.text} {finding.advice}"]
    assert finding.verdict == verdict and (finding.advice or verdict == OK), "every problem needs advice"


def test_silent_accounting_does_not_mean_that_the_user_has_no_account(answers):
    answers["sacct"] = answers["sacctmgr user"] = "!Unable to contact slurmdbd"
    by_name = {finding.name: finding for finding in diagnosis.site_findings(probe.read_site())}
    assert by_name["accounts"].verdict == WARN and by_name["accounting"].verdict == OK


def test_a_short_min_job_age_without_accounting(answers):
    answers["sacct"] = "!Slurm accounting storage is disabled"
    answers["scontrol show config"] = CONFIG.replace("3600 sec", "2 sec")
    assert worst(diagnosis.site_findings(probe.read_site())) == WARN


# --- the profile


def folder_of(path: str, use: str = "runs", kind: str = "ext4", free: int = 10**12) -> Folder:
    return Folder(path, use, kind, kind in probe.NETWORK_FILE_SYSTEMS, free, None, True)


def read_back(proposed: Proposal, folder: Path) -> Profiled:
    save(proposed, folder / "site.yaml")
    return find_cluster(str(folder / "site.yaml"))


def test_a_saved_profile_can_be_loaded(answers, tmp_path):
    site = probe.read_site()
    cluster = read_back(propose(site, [folder_of("/home/ann/runs")], Path("/home/ann/runs")), tmp_path)
    profile = cluster.profile
    assert (cluster.name, profile.account, profile.runs) == ("lab", "lab", "/home/ann/runs")
    assert (profile.partition, profile.stages.train.partition, profile.gpu_type) == ("cpu", "gpu", "h100")
    assert profile.shared_roots == [] and profile.interface is None and profile.gpus_per_node is None


def test_a_profile_puts_runs_where_all_nodes_see_them(answers, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_writer, "shared_root", lambda path: Path("/", *path.parts[1:2]))
    site = probe.read_site()
    here = folder_of("/var/ann/runs")
    home = folder_of("/home/ann", "home", "nfs4", 10**14)
    scratch = folder_of("/scratch/ann", "candidate", "lustre")
    cluster = read_back(propose(site, [here, home, scratch], Path(here.path)), tmp_path)
    assert cluster.profile.runs == "/scratch/ann/runs" and cluster.profile.shared_roots == ["/scratch", "/home"]
    on_network = replace(here, file_system="gpfs", network=True)
    assert propose(site, [on_network, home, scratch], Path(here.path)).cluster().profile.runs == here.path
    assert propose(site, [here, home], Path(here.path)).cluster().profile.runs == "/home/ann/runs"


def test_a_shared_root_is_spelled_like_the_path_of_runs(tmp_path):
    assert Path("/dev/shm").is_mount()
    (tmp_path / "home").symlink_to("/dev/shm")
    assert profile_writer.shared_root(Path("/dev/shm/ann/runs")) == Path("/dev/shm")
    assert profile_writer.shared_root(tmp_path / "home" / "runs") == tmp_path / "home"


@pytest.mark.parametrize("name", ["on", "123", "null", "a: b", "weiß", "-x", "p#1", "1e3"])
def test_names_that_yaml_would_misread_are_quoted(name, tmp_path):
    part = SitePartition(name, True, True, None, nodes=1, cpus=8, mem_mb=1, gpus=2, gpu_type=name, usable=1)
    site = SlurmSite("23.02.1", name, (part,), accounts=(name, "other"), default_account=name)
    profile = read_back(propose(site, [folder_of(f"/x/{name}/runs")], Path(f"/x/{name}/runs")), tmp_path).profile
    assert (profile.partition, profile.account, profile.gpu_type, profile.runs) == (name, name, name, f"/x/{name}/runs")


def test_a_profile_is_proposed_for_sites_with_few_features():
    part = SitePartition("all", default=False, up=True, minutes=60, nodes=1, cpus=8, mem_mb=1, gpus=0, usable=1)
    proposed = propose(SlurmSite("23.02.1", "", (part,)), [], Path("/x/runs"))
    assert proposed.name == "cluster" and proposed.cluster().profile.partition == "all" and "train" not in proposed.text
    down = propose(SlurmSite("23.02.1", "local", (replace(part, usable=0),)), [], Path("/x"))
    assert down.name == "local-cluster" and down.cluster().profile.partition is None


def test_save_adds_to_a_file_and_overwrites_nothing(answers, tmp_path):
    proposed = propose(probe.read_site(), [], Path("/x/runs"))
    file = tmp_path / "clusters.yaml"
    file.write_text("# mine\nother: {partition: a}  # a remark")
    save(proposed, file)
    assert "# mine\nother: {partition: a}  # a remark\n" in file.read_text()
    assert find_cluster(f"{file}:other").profile.partition == "a" and find_cluster("lab").profile.partition == "cpu"
    before = file.read_text()
    with pytest.raises(
        BadInput,
        match=r"clusters.yaml:5: profile lab exists already and was not changed; .*choose another file with --save",
    ):
        save(proposed, file)
    flow = tmp_path / "flow.yaml"
    flow.write_text("{a: {}}")
    with pytest.raises(BadInput, match="cannot be added"):
        save(proposed, flow)
    assert (file.read_text(), flow.read_text()) == (before, "{a: {}}")


@pytest.mark.parametrize(
    ("place", "words"),
    [("", "is a folder"), ("file/site.yaml", "is a file"), ("shut/site.yaml", "is not writable \\(owner: ")],
)
def test_a_bad_save_path_is_refused_before_slurm_is_asked(answers, tmp_path, monkeypatch, place, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "shut").mkdir(mode=0o555)
    if os.geteuid() == 0 and place.startswith("shut"):
        # Permissions do not stop root.
        monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(probe, "read_site", lambda: pytest.fail("Slurm was asked"))
    with pytest.raises(BadInput, match=words):
        doctor.run(options(save=str(tmp_path / place)))
    assert (tmp_path / "file").read_text() == ""


def test_a_profile_that_cannot_be_written_is_bad_input(answers, tmp_path):
    with pytest.raises(BadInput, match="not writable"):
        save(propose(probe.read_site(), [], Path("/x/runs")), Path("/proc/site.yaml"))


def test_the_command_on_a_recorded_site(answers, tmp_path, capsys):
    assert doctor.run(options(save="site.yaml")) == 0
    text = printed(capsys)
    job = "train: sbatch accepts partition gpu with 8 GPUs"
    for words in ("22.05.8, cluster lab", "8 x h100", job, "submit quickstart --cluster site.yaml:lab"):
        assert words in text
    assert find_cluster("site.yaml").name == "lab"
    assert doctor.run(options(cluster="site.yaml", json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["slurm"]["partitions"][3] == {
        "name": "gpu", "default": False, "up": True, "minutes": None, "nodes": 2, "cpus": 32, "mem_mb": 64000,
        "gpus": 8, "gpu_type": "h100", "most_cpus": 32, "most_mem_mb": 64000,
        "usable": 2, "preempt": "OFF", "grace_seconds": 0, "accounts": "ALL",
    }  # fmt: skip
    assert report["slurm"]["min_job_age_s"] == 3600 and report["profile"]["name"] == "lab"


@pytest.mark.parametrize("silent", ["scontrol show config", "sinfo %P|%a|%l|%D|%c|%m|%G"])
def test_a_controller_that_does_not_answer(answers, capsys, silent):
    answers[silent] = "!Unable to contact slurm controller (connect failure)"
    assert doctor.run(options(gpu=True)) == 1
    text = printed(capsys)
    assert "scontrol ping" in text and "no job was submitted" in text


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("partition: gpuu", "train, export: partition 'gpuu' does not exist on this cluster; did you mean 'gpu'?"),
        ("account: labb", "labb is not one of your accounts -> did you mean 'lab'?"),
        ("qos: hihg", "hihg is not one of your QOS -> did you mean 'high'?"),
        ("sbatch: {exclusiv: true}", "sbatch has no such option; did you mean 'exclusive'?"),
        ("shared_roots: [/shared]", "is not below shared_roots (/shared)"),
    ],
)
def test_problems_of_a_profile(answers, tmp_path, capsys, profile, words):
    (tmp_path / "site.yaml").write_text(f"mine:\n  {profile}\n")
    assert doctor.run(options(cluster="site.yaml")) == 1
    assert words in printed(capsys)


def test_sbatch_decides(answers, tmp_path, capsys):
    answers["sbatch --test-only"] = "!allocation failure: Invalid account or account/partition combination specified"
    assert doctor.run(options(cluster="slurm")) == 1
    assert "sbatch refuses partition cpu: allocation failure: Invalid account" in printed(capsys)


# --- the check of a GPU node


def measured(
    device: str = "NVIDIA H100 80GB HBM3", bus: float = 400.0, right: bool = True, **changed: dict[int, float]
) -> dict[str, Any]:
    """Return measurements of eight healthy GPUs; ``changed`` overrides a figure of some of them."""
    healthy = {"gemm_tflops": 640.0, "copy_gb_s": 2600.0, "memory_free_bytes": 78 << 30, "memory_total_bytes": 79 << 30}
    gpus: list[dict[str, Any]] = [{"rank": rank, "host": "n1", "device": device, **healthy} for rank in range(8)]
    for key, values in changed.items():
        for rank, value in values.items():
            gpus[rank][key] = value
    versions = {"cuda": True, "torch": "2.9.0", "cuda_version": "12.8", "nccl": "2.27.5"}
    return {**versions, "gpus": gpus, "all_reduce": {"bytes": 1 << 30, "bus_gb_s": bus, "right": right}}


@pytest.mark.parametrize(
    ("measurements", "verdict", "words"),
    [
        (measured(), OK, "640 TFLOP/s or more (floor 500)"),
        (measured(gemm_tflops={3: 410.0}), BAD, "GPU 3: 410 TFLOP/s on n1, below the floor of 500"),
        (
            measured(gemm_tflops={3: 560.0, 5: 570.0}),
            WARN,
            "GPU 3: 560, GPU 5: 570 TFLOP/s on n1, more than 10 % below",
        ),
        (measured(copy_gb_s={0: 1500.0}), BAD, "GPU 0: 1,500 GB/s on n1, below the floor of 2,000"),
        (measured(memory_free_bytes={7: 40 << 30}), WARN, "in use before the check: GPU 7: 39 GiB"),
        (measured(bus=50.0), BAD, "50 GB/s bus bandwidth over 8 GPUs on n1, below the floor of 250"),
        (measured(right=False), BAD, "8 GPUs on n1, and the sum was WRONG"),
        (measured(device="NVIDIA H200"), BAD, "below the floor of 3,200"),
        (measured(device="NVIDIA RTX 9000", bus=5.0), OK, "no floor is known for it"),
        (measured(device="NVIDIA H100 PCIe", bus=20.0), OK, "no floor is known for it"),
    ],
)
def test_the_verdict_on_gpus(measurements, verdict, words):
    findings = list(diagnosis.gpu_findings(measurements))
    assert worst(findings) == verdict
    assert any(words in finding.text and finding.verdict == verdict for finding in findings), findings


def test_floors_go_by_the_model():
    assert diagnosis.floors_of("NVIDIA A100-SXM4-80GB")["gemm_tflops"] == 200
    assert diagnosis.floors_of("NVIDIA H200")["copy_gb_s"] == 3200
    others = ("NVIDIA GH200 480GB", "NVIDIA H100 NVL", "NVIDIA A100-PCIE-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    for name in (*others, "CPU"):
        assert diagnosis.floors_of(name) == {}, name


def test_the_table_of_gpus_fits_a_terminal():
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(gpu_table(measured()))
    lines = console.export_text().splitlines()
    assert len(lines) == 10 and " ".join(lines[-1].split()) == "7 NVIDIA H100 80GB HBM3 640 2,600 78.0 of 79.0"


def test_the_gpu_check_takes_all_gpus_of_a_node():
    tree = {"gpu_type": "h100", "stages": {"train": {"mem": "64G"}}}
    cluster = Profiled("c", check_profile(tree, {}), "here", tree)
    cpu = SitePartition("cpu", True, True, None, nodes=2, cpus=64, mem_mb=500_000, gpus=0, usable=2)
    gpu = replace(cpu, name="gpu", default=False, gpus=8, gpu_type="h100")
    train = diagnosis.smallest_job(cluster, [cpu, gpu], "train")
    assert (train.partition, train.needs) == ("gpu", Needs(1, 8, 8, 32, "64G"))
    verify = diagnosis.smallest_job(cluster, [cpu, gpu], "verify")
    assert (verify.partition, verify.needs) == ("cpu", Needs(1, 0, 1, 1))


def gpucheck(out: Path, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "amlaunch.trainer.tools.gpu_check", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "AMLAUNCH_DEVICE": "cpu", **env}
    return subprocess.Popen(
        command, cwd=out.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_the_check_on_two_processes_and_on_one(tmp_path):
    from amlaunch.launcher.execution.rendezvous import free_ports

    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(free_ports(os.getpid())))}
    ranks = [gpucheck(tmp_path / "two.json", RANK=str(rank), LOCAL_RANK=str(rank), **rendezvous) for rank in range(2)]
    for process in ranks:
        assert process.wait(timeout=400) == 0, process.stdout.read()
    assert gpucheck(tmp_path / "one.json").wait(timeout=400) == 0
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert [gpu["rank"] for gpu in two["gpus"]] == [0, 1]
    assert two["all_reduce"]["right"] and two["all_reduce"]["bus_gb_s"] > 0
    assert one["all_reduce"] is None and one["cuda"] is False
    assert one["gpus"][0]["gemm_tflops"] > 0 and one["gpus"][0]["copy_gb_s"] > 0
    assert [finding.name for finding in diagnosis.gpu_findings(one)] == ["device"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]


@pytest.mark.slow
def test_the_check_on_this_machine(tmp_path):
    done = amlaunch("doctor", "--gpu", cwd=tmp_path, PATH="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "no CUDA device, so these are CPU figures and no floor applies" in text
    assert "2 processes (gloo)" in text


@pytest.mark.slow
def test_a_failed_check_shows_the_reason(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nif '-c' not in sys.argv: sys.modules['torch'] = None\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}/src"
    done = amlaunch("doctor", "--gpu", cwd=tmp_path, PATH="", CUDA_VISIBLE_DEVICES="", PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "| ModuleNotFoundError" in text and "the check failed on" in text and "another Python" in text


# --- a real cluster


@pytest.mark.slow
def test_doctor_on_a_cluster(cluster: Cluster):
    folder = cluster.folder("doctor")
    done = cluster.run(cluster.python, "-m", "amlaunch", "doctor", "--save", "site.yaml", cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name in ("cpu", "short", "gpu", "gpu-low"):
        assert name in rows
    assert "8 x h100" in rows["gpu"] and "cluster lab" in done.stdout and "sacct answers" in done.stdout
    assert "train: sbatch accepts partition gpu with 8 GPUs" in done.stdout and "sbatch refuses" not in done.stdout
    again = cluster.run(cluster.python, "-m", "amlaunch", "doctor", "--cluster", "site.yaml", cwd=folder, check=False)
    assert again.returncode == 0 and "profile lab (site.yaml)" in again.stdout, again.stdout + again.stderr


@pytest.mark.slow
def test_the_check_on_a_node_of_a_cluster(cluster: Cluster):
    folder = cluster.folder("doctor-gpu")
    command = [cluster.python, "-m", "amlaunch", "doctor", "--gpu", "--json", "--cluster"]
    refused = cluster.run(*command, "slurm", cwd=folder, timeout=900, check=False)
    (finding,) = (one for one in json.loads(refused.stdout)["findings"] if one["topic"] == "gpu")
    assert refused.returncode == 1 and "has a GPU, but torch cannot use it: torch 2." in finding["text"], finding

    (folder / "site.yaml").write_text("lab: {env: {AMLAUNCH_DEVICE: cpu}}\n")  # its GPUs are files
    done = cluster.run(*command, "site.yaml", cwd=folder, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    gpus = report["gpu_check"]["gpus"]
    assert len(gpus) == 8 and all(gpu["gemm_tflops"] > 0 and gpu["host"].startswith("gpu") for gpu in gpus)
    assert report["gpu_check"]["all_reduce"]["right"]
    by_name = {finding["name"]: finding for finding in report["findings"] if finding["topic"] == "gpu"}
    assert by_name["shared"]["verdict"] == OK and "no CUDA device" in by_name["device"]["text"]
    assert str(folder / "runs" / "doctor") in by_name["shared"]["text"]


@pytest.mark.slow
def test_a_node_that_cannot_see_the_folder(cluster: Cluster):
    command = [cluster.python, "-m", "amlaunch", "doctor", "--gpu"]
    far = {"AMLAUNCH_RUNS": "/dev/shm/doctor/runs"}
    done = cluster.run(*command, cwd=cluster.folder("doctor-far"), env=far, timeout=450, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the node does not see this folder" in " ".join(done.stdout.split()), done.stdout + done.stderr
