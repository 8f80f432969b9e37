"""What submit, status and the driver decide, without a cluster: profiles, scripts, parsing, causes, retries."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_doctor import RECORDED, question
from test_e2e import TINY

from amlaunch.launcher.__main__ import main
from amlaunch.launcher.checks.files_and_disk import check_python, checkpoint_bytes
from amlaunch.launcher.checks.slurm_limits import megabytes
from amlaunch.launcher.commands._shared import sweep_overrides
from amlaunch.launcher.errors import SlurmError, command_error
from amlaunch.launcher.execution.attempt_end import failure_of, signal_name
from amlaunch.launcher.execution.attempt_limit import futile_attempts, limit_attempts
from amlaunch.launcher.execution.rendezvous import free_ports, interface_address
from amlaunch.launcher.execution.srun_step import TaskFailure, first_failure, task_ends
from amlaunch.launcher.execution.stage_inputs import missing_input
from amlaunch.launcher.runs.attempt_record import AttemptEnd, AttemptHistory, AttemptStart
from amlaunch.launcher.runs.element_state import read_runs
from amlaunch.launcher.runs.failure_causes import cause_of
from amlaunch.launcher.runs.slurm_reasons import JobEnd, explain_end, pending_reason
from amlaunch.launcher.runs.snapshot import take_snapshot
from amlaunch.launcher.runs.states import Outcome, State
from amlaunch.launcher.runs.submissions import Submission, next_folder, read_submission, submissions_of, token_of
from amlaunch.launcher.slurm import client, sbatch
from amlaunch.launcher.slurm import queue as queue_module
from amlaunch.launcher.slurm.client import JobInfo, compress_ranges, expand_ranges, limit_minutes, parse_gres
from amlaunch.launcher.slurm.queue import Queue
from amlaunch.launcher.slurm.sbatch import Array, job_environment, script, submission_environment
from amlaunch.launcher.specs.cluster_profile import find_cluster
from amlaunch.launcher.specs.plan import Element, Needs, Plan, Stage
from amlaunch.launcher.submission.array_drafts import dependency_options, draft_arrays
from amlaunch.launcher.submission.slurm_submission import check_moved, known_states
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import append_json_line, fingerprint, write_json
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.shipped import find_recipe


@given(st.sets(st.integers(0, 5000), min_size=1))
def test_ranges_there_and_back(numbers: set[int]) -> None:
    assert expand_ranges(compress_ranges(numbers)) == sorted(numbers)


@pytest.mark.parametrize(
    ("gres", "found"),
    [
        ("(null)", (0, "")),
        ("gpu:8", (8, "")),
        ("gpu:h100:8(S:0-1)", (8, "h100")),
        ("gpu", (1, "")),
        ("gpu:h100", (1, "h100")),
        ("tmpfs:1T,gpu:a100:4(S:0,1),shard:16", (4, "a100")),
        ("gpu:2080ti:4", (4, "2080ti")),
        ("gpu:1g.10gb:7", (7, "1g.10gb")),
        ("gpu:a100:2,gpu:h100:6", (8, "a100")),
        ("gpu:nvidia_h100_80gb_hbm3:8(IDX:0-7)", (8, "nvidia_h100_80gb_hbm3")),
    ],
)
def test_gres(gres: str, found: tuple[int, str]) -> None:
    assert parse_gres(gres) == found


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("infinite", None), ("30:00", 30), ("4:00:00", 240), ("2-00:30:00", 2910), ("n/a", None), ("", None)],
)
def test_time_limits(limit: str, minutes: int | None) -> None:
    assert limit_minutes(limit) == minutes


def test_ranges_of_an_array_that_sacct_never_saw_start() -> None:
    assert client._array_tasks("12_[0-2,7%4]") == ["12_0", "12_1", "12_2", "12_7"] and client._array_tasks("12_3") == [
        "12_3"
    ]


class TestProfiles:
    def test_the_nearest_file_wins_and_a_name_is_enough(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        (tmp_path / "config" / "amlaunch").mkdir(parents=True)
        (tmp_path / "config" / "amlaunch" / "clusters.yaml").write_text(
            "lab: {partition: far}\nhome: {partition: mine}\n"
        )
        assert find_cluster("home").profile.partition == "mine"
        assert find_cluster("lab").profile.partition == "far"
        (tmp_path / "clusters.yaml").write_text(
            "lab: {partition: near, stages: {train: {partition: gpu, sbatch: {nice: 5}}}, sbatch: {nice: 1}}\n"
        )
        found = find_cluster("lab").profile
        assert found.stage("export").partition == "near" and found.stage("train").partition == "gpu"
        assert found.stage("train").sbatch == {"nice": 5} and found.stage("export").sbatch == {"nice": 1}
        assert find_cluster("slurm").source == "built in" and find_cluster("local").profile.executor == "local"

    def test_the_shells_defaults_for_sbatch_count_below_the_profile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shell = {"ACCOUNT": "mine", "PARTITION": "slow", "QOS": "low", "TIMELIMIT": "90", "RESERVATION": "course"}
        for name, value in shell.items():
            monkeypatch.setenv(f"SBATCH_{name}", value)
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        path = tmp_path / "site.yaml"
        path.write_text("lab: {partition: fast, stages: {train: {qos: high}}, sbatch: {nice: 1}}\n")
        cluster = find_cluster(str(path))
        train, export = (cluster.profile.stage(stage) for stage in ("train", "export"))
        assert (train.account, train.partition, train.qos, train.time) == ("mine", "fast", "high", 90)
        assert export.qos == "low" and export.sbatch == {"nice": 1, "reservation": "course"}
        assert cluster.where("train", "account") == "$SBATCH_ACCOUNT: account"
        assert cluster.shell_note() == (
            "from your shell, because the profile does not set them: $SBATCH_ACCOUNT (account mine), "
            "$SBATCH_QOS (qos low), $SBATCH_TIMELIMIT (time 90), $SBATCH_RESERVATION (sbatch.reservation course)"
        )
        assert find_cluster("slurm").profile.partition == "slow" and not find_cluster("local").shell_note()
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert find_cluster(str(path)).profile.account is None, "inside a job they may be that job's"

    def test_a_file_with_one_or_several(self, tmp_path: Path) -> None:
        path = tmp_path / "sites.yaml"
        path.write_text("a: {partition: x}\n")
        assert find_cluster(str(path)).name == "a"
        path.write_text("a: {partition: x}\nb: {partition: y}\n")
        assert find_cluster(f"{path}:b").profile.partition == "y"
        with pytest.raises(BadInput, match="2 clusters; choose one with --cluster"):
            find_cluster(str(path))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("lab: {partitoin: x}", "clusters.yaml:1: partitoin: unknown key; did you mean 'partition'"),
            ("lab:\n  stages: {trian: {}}", "stages.trian: unknown key; did you mean 'train'"),
            ("lab: {throttle: 0}", "throttle: expected an integer of at least 1"),
            (
                "lab: {sbatch: {job-name: x}}",
                "amlaunch sets this option (it follows from the name of the run); remove it",
            ),
            (
                "lab: {stages: {train: {sbatch: {output: x}}}}",
                "stages.train.sbatch.output: amlaunch sets this option (logs go into the run directory)",
            ),
            ("lab: {sbatch: {mail-user: [a]}}", "expected one line of text"),
            ('lab: {sbatch: {"nice\\nx": 3}}', "sbatch: 'nice\\nx': expected the long name of an sbatch option"),
            ("lab: {sbatch: {--nice: 3}}", "without leading dashes"),
            (
                'lab: {stages: {train: {account: "a\\n#SBATCH --hold"}}}',
                "stages.train.account: expected one line of text",
            ),
            ("lab: {stages: [a]}", "stages: expected a section with keys, got a list"),
            ("lab: {stages: {train: gpu}}", "stages.train: expected a section with keys"),
            ("lab: {shared_roots: [.]}", "shared_roots: '.': expected an absolute path"),
            ("lab: {signal_seconds: 70000}", "signal_seconds: sbatch accepts at most 65535"),
            ("lab: {env: {HF_TOKEN: hf_abcdef}}", "export HF_TOKEN=…"),
            ("lab: {time: soon}", "expected a time such as"),
            ("lab:\n  time: 99:99", "clusters.yaml:2: time: expected a time such as"),
            ("lab: {mem: lots}", "mem: expected memory such as 64G"),
            ("lab:\n  stages: {train: {mem: 4X}}", "clusters.yaml:2: stages.train.mem: expected memory such as 64G"),
            ("lab: {runs: '${NO_SUCH_VARIABLE}/runs'}", "a variable in it is not set"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "clusters.yaml").write_text(text + "\n")
        with pytest.raises(BadInput) as caught:
            find_cluster("lab")
        assert message in str(caught.value)

    def test_secrets_are_not_filled_in_where_scripts_are_made_of(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MY_TOKEN", "hunter2")
        monkeypatch.setenv("WHO", "ann")
        (tmp_path / "clusters.yaml").write_text(
            "lab:\n  runs: /shared/${WHO}\n  setup: ['export X=${MY_TOKEN}']\n  env: {T: '${MY_TOKEN}'}\n"
            "  sbatch: {mail-user: '${WHO}', nice: '${MY_TOKEN}'}\n  srun: ['${MY_TOKEN}']\n"
        )
        found = find_cluster("lab").profile
        assert found.runs == "/shared/ann" and found.sbatch["mail-user"] == "ann"
        assert (
            "hunter2" not in repr(found)
            and found.setup == ["export X=${MY_TOKEN}"]
            and found.env == {"T": "${MY_TOKEN}"}
        )


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder with a recipe, on a login node whose Slurm gives recorded answers.

    Partition cpu has nodes with 32 CPUs and 64 GB, partition gpu also 8 GPUs.
    """
    told = {**RECORDED, "squeue": "", "sbatch --help": "  --nice=x\n  --begin=x\n"}

    def call(*argv: str, **_: object) -> str:
        return told["squeue" if argv[0] == "squeue" else question(argv)]

    monkeypatch.setattr(client, "call", call)
    monkeypatch.setattr(sbatch, "call", call)
    for name in ("AMLAUNCH_RUNS", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in (("HOME", "home"), ("XDG_CONFIG_HOME", "config"), ("XDG_CACHE_HOME", "cache")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text")
    monkeypatch.setenv("TEXT", str(tmp_path / "text"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    for ask in (client.config, sbatch.sbatch_options):
        ask.cache_clear()
    yield tmp_path
    for ask in (client.config, sbatch.sbatch_options):
        ask.cache_clear()


def refused(site: Path, capsys: pytest.CaptureFixture[str], profile: str, *words: str, recipe: str = TINY) -> list[str]:
    """What submit says is wrong, a line each, the folder left out; nothing is written."""
    (site / "clusters.yaml").write_text(profile)
    (site / "tiny.yaml").write_text(recipe)
    there = sorted(site.rglob("*"))
    assert main(["submit", "tiny.yaml", "--cluster", "lab", "--runs", str(site / "runs"), *words]) == 2
    assert [path for path in sorted(site.rglob("*")) if path.is_file()] == [path for path in there if path.is_file()]
    return [line.removeprefix("error: ").replace(f"{site}/", "") for line in capsys.readouterr().err.splitlines()]


class TestEveryProblemIsSaidAtOnce:
    def test_of_a_recipe_that_cannot_be_read_and_of_its_cluster(
        self, site: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        profile = (
            "lab:\n  account: labb\n  qos: hihg\n  python: /nowhere/python\n  sbatch: {nise: 1}\n"
            "  stages: {train: {partition: gpuu, sbatch: {beginn: now}}}\n"
        )
        assert refused(site, capsys, profile, recipe=TINY.replace("n_layer", "n_layr")) == [
            "tiny.yaml:13: model.n_layr: unknown key of amlaunch.trainer.models.gpt2.build_gpt2_model; "
            "did you mean 'n_layer'?",
            "clusters.yaml:5: sbatch.nise: sbatch has no such option; did you mean 'nice'?",
            "clusters.yaml:6: stages.train.sbatch.beginn: sbatch has no such option; did you mean 'begin'?",
            "clusters.yaml:6: stages.train.partition 'gpuu' does not exist on this cluster; did you mean 'gpu'?",
            "clusters.yaml:2: account 'labb' is not one of your accounts; did you mean 'lab'?",
            "clusters.yaml:3: qos 'hihg' is not one of your QOS; did you mean 'high'?",
        ]

    def test_of_a_profile_that_cannot_be_read_and_of_the_recipe(
        self, site: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = refused(
            site,
            capsys,
            "lab:\n  mem: 4X\n  partitoin: x\n",
            "--wandb.project",
            "x",
            "--container.image",
            "/no/such.sqsh",
        )
        assert [line.split(":")[0] for line in found] == [
            "clusters.yaml",
            "clusters.yaml",
            "--container.image=/no/such.sqsh",
            "--wandb.project=x",
        ]

    def test_of_sizes_times_and_files_at_the_line_that_set_them(
        self, site: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The profile's where the recipe says nothing: else a user looks for it in the wrong file."""
        profile = "lab:\n  partition: short\n  time: 30\n  stages:\n    verify: {mem: 900G, cpus: 99}\n"
        recipe = TINY.replace(
            "train: {tasks_per_node: 2, cpus: 2}", "train: {tasks_per_node: 64, cpus: 2, nodes: 3, time: '5:00'}"
        ).replace("${TEXT}", "${TEXT}/none")
        assert refused(
            site, capsys, profile, recipe=recipe.replace("global_batch_size: 8", "global_batch_size: 384")
        ) == [
            f"tiny.yaml:3: preprocess.data_files: no file matches 'text/none/**/*.txt' (relative to {site})",
            "clusters.yaml:3: time is 30:00, but partition short allows at most 10:00",
            "clusters.yaml:5: stages.verify.cpus is 99, but a node of partition short has at most 32 CPUs",
            "clusters.yaml:5: stages.verify.mem is 900G, but a node of partition short has at most 64000 MB",
            "tiny.yaml:27: resources.train.nodes is 3, but partition short has 2 nodes",
            "tiny.yaml:27: resources.train.tasks_per_node is 64, but a node of partition short has at most 32 CPUs",
            "tiny.yaml:27: resources.train.time is 5 min, but jobs are asked to save 300 s before the limit, "
            "which leaves no time for work; set a longer time, or a smaller signal_seconds in the profile",
        ]

    def test_of_gpus(self, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert refused(site, capsys, "lab: {partition: cpu}\n", "--gpus", "1") == [
            "--gpus is 1, but a node of partition cpu has at most 0 GPUs; partitions with GPUs: gpu (8), gpu-low (8)"
        ]
        words = [
            "--resources.train.gpus_per_node",
            "16",
            "--resources.train.tasks_per_node",
            "null",
            "--step_scheduler.global_batch_size",
            "32",
        ]
        assert refused(site, capsys, "lab: {partition: gpu}\n", *words)[0].startswith(
            "--resources.train.gpus_per_node=16: resources.train.gpus_per_node is 16, "
            "but a node of partition gpu has at most 8 GPUs"
        )

    def test_of_a_folder_that_is_a_file_and_of_several_partitions(
        self, site: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = refused(site, capsys, "lab: {partition: cpu}\n", "--runs", "text/a.txt")
        assert found[0] == "text/a.txt: not a folder; choose another folder with --runs DIR"
        assert refused(site, capsys, "lab: {partition: 'cpu,gpu'}\n")[0].startswith(
            "clusters.yaml:1: partition 'cpu,gpu' lists several partitions; write one"
        )

    def test_of_a_run_that_is_somebody_elses(
        self, site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not after half of it is written."""
        clusters = "lab: {mem: 1G, time: 10}\n"
        (site / "clusters.yaml").write_text(clusters)
        assert (
            main(["submit", "tiny.yaml", "--cluster", "lab", "--runs", str(site / "runs"), "--dry-run", "--json"]) == 0
        )
        run = Path(json.loads(capsys.readouterr().out)["path"])
        run.parent.mkdir()
        run.write_text("")
        assert (
            refused(site, capsys, clusters)[-1]
            == f"runs/{run.name} is not a folder; start another run with --name NAME"
        )
        run.unlink()
        run.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run)
        problem = f"runs/{run.name} is not writable (owner: {run.owner()})"
        assert refused(site, capsys, clusters)[-1] == f"{problem}; start another run with --name NAME"
        read_only = SimpleNamespace(f_flag=os.ST_RDONLY)
        statvfs = os.statvfs
        monkeypatch.setattr(os, "statvfs", lambda path: read_only if Path(path) == run else statvfs(path))
        assert refused(site, capsys, clusters)[-1].startswith(
            f"runs/{run.name} is not writable (read-only file system)"
        )

    def test_a_silent_slurm_has_refused_nothing(
        self, site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (site / "clusters.yaml").write_text("lab: {mem: 1G, time: 10}\n")
        for words, code in (
            ("Unable to contact slurm controller (connect failure)", 1),
            ("allocation failure: Invalid qos", 2),
        ):
            monkeypatch.setattr(
                sbatch, "test_only", lambda *_, words=words: (_ for _ in ()).throw(SlurmError("sbatch", words))
            )
            assert main(["submit", "tiny.yaml", "--cluster", "lab", "--runs", str(site / "runs")]) == code
            said = capsys.readouterr().err.splitlines()[-1]
            assert words in said and ("sbatch refused the script" in said) == (code == 2)

    def test_python_where_it_can_be_seen(self, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
        profile = f"lab:\n  shared_roots: ['{site}']\n  python: {site}/venv/bin/python\n  partition: nowhere\n"
        assert refused(site, capsys, profile)[1].startswith(
            "clusters.yaml:3: python: venv/bin/python does not exist, here or on the nodes"
        )
        (site / "clusters.yaml").write_text("lab: {python: /nowhere/python}\n")
        assert check_python(find_cluster("lab")) == [
            "clusters.yaml:1: python: /nowhere/python does not exist on this machine; "
            "jobs fail at once on nodes that lack it too"
        ]


class TestDryRunsOfContainers:
    WORDS = (
        "submit",
        "tiny.yaml",
        "--cluster",
        "lab",
        "--runs",
        "runs",
        "--dry-run",
        "--container.image",
        "./bundle/",
        "--container.runtime",
    )

    @pytest.fixture
    def bundle(self, site: Path) -> Path:
        (site / "bundle" / "rootfs").mkdir(parents=True)
        (site / "bundle" / "config.json").write_text("{}")
        (site / "clusters.yaml").write_text(
            "lab: {mem: 1G, time: 10, env: {https_proxy: 'http://u:${WORD_X}@proxy:1', SLURM_X: '${WORD_X}'}}\n"
        )
        return site / "bundle"

    @pytest.mark.parametrize("runtime", ["podman", "apptainer", "charliecloud"])
    def test_no_value_is_shown(
        self, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runtime: str
    ) -> None:
        monkeypatch.setenv("WORD_X", "hunter2")
        assert (
            main(
                [
                    *self.WORDS,
                    runtime,
                    "--container.env",
                    "{NVIDIA_API_KEY: '${WORD_X}', NO_PROXY: '${WORD_X}', LD_PRELOAD: '${WORD_X}'}",
                ]
            )
            == 0
        )
        said = capsys.readouterr()
        assert (
            "AMLAUNCH_OF_RECIPE_NVIDIA_API_KEY" in said.out
            and "AMLAUNCH_OF_RECIPE_https_proxy" in said.out
            and "hunter2" not in said.out + said.err
        )

    def test_of_what_only_nodes_know(
        self, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORD_X", "hunter2")
        (bundle.parent / "bin").mkdir()
        (bundle.parent / "bin" / "srun").write_text("#!/bin/sh\n")
        (bundle.parent / "bin" / "srun").chmod(0o755)
        monkeypatch.setenv("PATH", str(bundle.parent / "bin"))
        assert main([*self.WORDS, "auto"]) == 0
        assert "# each node chooses its container runtime" in capsys.readouterr().out

    def test_of_a_variable_that_a_profile_names_and_nobody_has(
        self, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("WORD_X", raising=False)
        assert main([*self.WORDS, "podman"]) == 2
        assert (
            "the variable WORD_X is not set (container.env, or env of the profile); export it"
            in capsys.readouterr().err
        )


def test_of_a_partition_with_several_kinds_of_nodes_the_best_counts_for_each_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        client,
        "call",
        lambda *_, **__: (
            "all*|up|infinite|2|32|64000|gpu:8\n"
            "all*|up|infinite|90|128|32000|(null)\n"
            "all*|up|infinite|1|16|900000|(null)\n"
        ),
    )
    (part,) = client.partitions()
    assert (part.nodes, part.gpus, part.cpus, part.most_cpus, part.most_mem_mb) == (93, 8, 32, 128, 900000)


def test_room_for_checkpoints_is_for_the_kept_the_best_and_the_one_that_is_written() -> None:
    def kept(*overrides: str) -> float:
        return checkpoint_bytes(load(find_recipe("nanogpt"), list(overrides))) / checkpoint_bytes(
            load(find_recipe("nanogpt"), ["--checkpoint.max_recent_checkpoints=1", "--checkpoint.keep_best=false"])
        )

    assert [kept(f"--checkpoint.max_recent_checkpoints={n}") for n in (1, 2, 5)] == [1.5, 2.0, 3.5]
    assert kept("--checkpoint.enabled=false", "--export=null") == 0


@pytest.mark.parametrize(
    ("text", "mega"), [("64G", 65536), ("1T", 1 << 20), ("900", 900), ("900M", 900), ("1500K", 2), ("0", 0)]
)
def test_memory(text: str, mega: int) -> None:
    assert megabytes(text) == mega


def make_plan(run: RunDir, *stages: tuple[str, int], cluster: bool = True) -> Plan:
    built: list[Stage] = []
    for name, count in stages:
        after = [built[-1].name] if built else []
        built.append(Stage(name, [Element(str(i), "m", []) for i in range(count)], after, Needs(1, 0, 1, 1), "cpu"))
    plan = Plan(run.root.name, built, None, "/", cluster={"name": "x", "profile": {}} if cluster else None)
    write_json(run.plan, plan.to_json())
    return plan


needs_srun = pytest.mark.skipif(
    subprocess.run(["which", "srun"], capture_output=True).returncode != 0, reason="submitit renders only where srun is"
)


@needs_srun
class TestScripts:
    def rendered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: Needs, **profile: object) -> str:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "clusters.yaml").write_text(json.dumps({"lab": profile}))
        array = Array(
            Stage("train", [], [], needs, "gpu"), ("0", "1", "2"), tmp_path / "a b%" / "jobs" / "001-train", "token"
        )
        return script(array, find_cluster("lab").profile, tmp_path / "a b%", tmp_path / "a b%" / "code", "run-1")

    def test_what_a_job_asks_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = self.rendered(
            tmp_path,
            monkeypatch,
            Needs(2, 8, 8, 64, "256G", 240),
            account="ml",
            throttle=2,
            gpu_type="h100",
            setup=["module load cuda"],
            sbatch={"exclusive": True, "nice": 3, "hold": False},
        )
        options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
        expected = {
            "account=ml",
            "array=0-2%2",
            "comment=token",
            "cpus-per-task=8",
            "exclusive",
            "gpus-per-node=h100:8",
            "job-name=run-1.train",
            "kill-on-invalid-dep=yes",
            "mem=256G",
            "nice=3",
            "nodes=2",
            "ntasks-per-node=8",
            "open-mode=append",
            "partition=gpu",
            "requeue",
            "signal=B:USR1@300",
            "time=240",
        }
        assert expected <= set(options) and not any(option.startswith(("hold", "wckey")) for option in options)
        output = next(option for option in options if option.startswith("output="))
        assert shlex.split(output)[0] == f"output={tmp_path}/a b%%/jobs/001-train/%A_%a.log", "Slurm reads %% as %"
        assert text.splitlines().index("module load cuda") < next(
            i for i, line in enumerate(text.splitlines()) if line.startswith("exec ")
        )
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)

    def test_gres_of_the_profile_takes_the_place_of_ours(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = self.rendered(tmp_path, monkeypatch, Needs(1, 4, 4, 4), sbatch={"gres": "gpu:v100:4"})
        assert "--gres=gpu:v100:4" in text and "gpus-per-node" not in text


def test_jobs_inherit_neither_the_job_that_submits_nor_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SBATCH_PARTITION",
        "PMIX_RANK",
        "RANK",
        "MASTER_ADDR",
        "MY_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    monkeypatch.setenv("MY_TEXT", "kept")
    found = submission_environment()
    assert found["SLURM_CONF"] == "/etc/x" and found["MY_TEXT"] == "kept" and found["PATH"]
    assert not {
        "SLURM_JOB_ID",
        "SBATCH_PARTITION",
        "PMIX_RANK",
        "RANK",
        "MASTER_ADDR",
        "MY_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
    } & set(found)
    before = dict(os.environ)
    with job_environment():
        assert dict(os.environ) == found
    assert dict(os.environ) == before


class TestRetries:
    def history(self, *done: int, budget: str = "1_0") -> AttemptHistory:
        starts = [AttemptStart(i + 1, done=value, budget=budget) for i, value in enumerate(done)]
        return AttemptHistory(tuple(starts))

    def test_progress_resets_the_budget(self) -> None:
        assert futile_attempts(self.history(0, 10, 20), 30) == 0
        assert futile_attempts(self.history(0, 10, 10, 10), 10) == 3
        earlier, later = self.history(0, 0, budget="1_0"), self.history(0, budget="2_0")
        both = AttemptHistory(earlier.starts + later.starts)
        assert futile_attempts(both, 0) == 1, "another submit has its own budget"

    def test_only_some_ends_are_restarted(self) -> None:
        stopped = AttemptEnd(Outcome.STOPPED, "limit", restart=True)
        continued = limit_attempts(self.history(0, 10), stopped, 20)
        assert continued.restart and continued.reason == "limit; continues automatically from the saved state"
        futile = limit_attempts(self.history(5, 5, 5), stopped, 5)
        assert not futile.restart and futile.reason == "limit; no progress in 3 attempts"
        killed = AttemptEnd(Outcome.FAILED, "killed", restart=True)
        retried = limit_attempts(self.history(5, 5), killed, 5)
        assert retried.restart and retried.reason == "killed; retried automatically (attempt 3 of 3 without progress)"
        for end in (stopped, killed):
            unpromised = limit_attempts(self.history(5, 5), end, 5, restart_is_certain=False)
            assert unpromised.restart and unpromised.reason == end.reason
        final = AttemptEnd(Outcome.FAILED, "boom")
        assert limit_attempts(self.history(5), final, 5) == final

    def test_a_signal_without_a_name(self) -> None:
        assert signal_name(9) == "SIGKILL" and signal_name(60).startswith(("signal 60", "SIG"))
        assert failure_of(-127, 0).restart


@pytest.mark.parametrize(
    ("text", "kind", "restart", "avoid_host"),
    [
        ("RuntimeError: [enforce fail] No space left on device", "full disk", False, False),
        ("OSError: [Errno 122] Disk quota exceeded: 'x'", "full disk", False, False),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "out of GPU memory", False, False),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=3.0", "out of memory", False, False),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "broken GPU", True, True),
        ("error: rank 0 on n1 has a GPU, but torch cannot use it: Found no NVIDIA driver", "broken GPU", True, True),
        ("NCCL error in: ProcessGroupNCCL.cpp: ncclRemoteError", "network", True, True),
        ("[Rank 3] Watchdog caught collective operation timeout", "network", True, True),
        ("Connection closed by peer [10.0.0.1]:3342", "network", True, True),
        ("OSError: [Errno 116] Stale file handle", "node", True, True),
    ],
)
def test_causes(text: str, kind: str, restart: bool, avoid_host: bool) -> None:
    found = cause_of(f"Traceback\n  line\n{text}\nmore")
    assert found is not None and (found.kind, found.restart, found.avoid_host) == (kind, restart, avoid_host)
    assert cause_of("ValueError: boom in step 3") is None


@pytest.mark.parametrize(
    "text",
    [
        "/var/spool/slurmd/job00012/slurm_script: line 20: /nowhere/python3: No such file or directory",
        "/bin/sh: line 20: exec: /nowhere/python3: cannot execute: No such file or directory",
        "ModuleNotFoundError: No module named 'yaml'",
    ],
)
def test_a_job_without_its_python_says_so(text: str) -> None:
    found = cause_of(f"some module is loaded\n{text}\n")
    assert (
        found is not None
        and found.kind == "no environment"
        and "python and setup in the cluster profile" in found.remedy
    )
    assert cause_of("FileNotFoundError: [Errno 2] No such file or directory: 'text.txt'") is None


def test_nodes_are_avoided_for_an_hour() -> None:
    lines = [
        {"event": "end", "elsewhere": True, "host": "n1", "time": 1000.0},
        {"event": "end", "elsewhere": True, "host": "n2", "time": 4000.0},
        {"event": "end", "host": "n3", "time": 4000.0},
    ]
    history = AttemptHistory.from_json(lines)
    assert history.hosts_to_avoid(now=4100.0) == ["n1", "n2"]
    assert history.hosts_to_avoid(now=4700.0) == ["n2"]
    assert history.hosts_to_avoid(now=9000.0) == []


def test_which_rank_srun_saw_fail_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "srun: error: n1: tasks 0-1: Exited with exit code 75\n"
        "srun: error: n2: task 3: Exited with exit code 1\n"
        "srun: error: n1: task 0: Killed\n"
    )
    assert first_failure(log) == TaskFailure("n2", 3, "Exited with exit code 1")
    assert [end.exit_code for end in task_ends(log)] == [75, 1, None]
    log.write_text("srun: error: gpu-a.site: tasks 4,6-7: Segmentation fault (core dumped)\n")
    assert first_failure(log) == TaskFailure("gpu-a.site", 4, "Segmentation fault (core dumped)")
    log.write_text("srun: error: Unable to create step\n")
    assert first_failure(log) is None


def test_slurm_reasons_are_explained() -> None:
    assert pending_reason("Dependency") == "waiting for the stage before it"
    assert pending_reason("SomethingNew") == "SomethingNew"
    assert pending_reason("ReqNodeNotAvail, UnavailableNodes:n1") == "the requested nodes are not available"
    cancelled = explain_end(JobInfo("1_0", "CANCELLED", "Dependency"), started=False)
    assert cancelled == JobEnd(State.CANCELLED, "an earlier stage did not finish", dependency_failed=True)
    assert explain_end(JobInfo("1_0", "TIMEOUT", nodes="n1"), started=False).state == State.FAILED
    assert "0:9" in explain_end(JobInfo("1_0", "FAILED", exit_code="0:9"), started=False).reason


def answers(
    folder: Path,
    jobs: dict[str, JobInfo] | None,
    accounting: dict[str, JobInfo] | None = None,
    asked: float | None = None,
) -> Queue:
    """A queue that finds these answers where another call has left them."""
    queue = Queue(max_age=1e9, cache=folder / "cache" / "queue")
    asked = time.time() if asked is None else asked
    problem = "" if jobs is not None else "squeue: no answer in 30 s"
    for name, asked_for, found in (("squeue", "", jobs), ("sacct", "11", accounting or {})):
        rows = None if found is None else [dataclasses.astuple(job) for job in found.values()]
        kept = {"time": asked, "question": asked_for, "problem": problem if name == "squeue" else "", "jobs": rows}
        write_json(queue.file.with_name(f"{name}-{fingerprint(asked_for)}.json"), kept)
    return queue


class TestStates:
    def run(self, tmp_path: Path, stages=(("train", 1),)) -> tuple[RunDir, Plan]:
        run = RunDir(tmp_path / "runs" / "r-1")
        plan = make_plan(run, *stages)
        for stage in plan.stages:
            names = tuple(element.name for element in stage.elements)
            folder = next_folder(run.jobs, stage.name)
            Submission(
                folder, stage.name, names, str(run.root), "x", token_of(folder), time.time() - 50, job="11"
            ).write()
        return run, plan

    def state(self, run: RunDir, plan: Plan, queue: Queue):
        return read_runs([(run, plan)], queue)[0][0]

    def attempt(self, run: RunDir, number: int = 1, job: str = "11_0", end: dict | None = None) -> None:
        attempts = run.element("train", "0").attempts
        append_json_line(
            attempts, {"event": "start", "attempt": number, "time": time.time() - 10, "job": job, "host": "n1"}
        )
        if end:
            append_json_line(attempts, {"event": "end", "attempt": number, "time": time.time(), **end})

    def test_the_queue_is_believed_before_an_old_word_and_a_new_word_before_the_queue(self, tmp_path: Path) -> None:
        run, plan = self.run(tmp_path)
        assert (
            self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "PENDING", "Priority")})).state
            == State.QUEUED
        )
        self.attempt(run, end={"outcome": "stopped", "again": True, "reason": "limit"})
        assert (
            self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "PENDING", "BeginTime")})).state
            == State.QUEUED
        )
        assert self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "RUNNING")})).state == State.RUNNING
        self.attempt(run, 2, end={"outcome": "failed", "reason": "boom"})
        assert self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "RUNNING")})).state == State.FAILED, (
            "the driver has spoken; Slurm still clears up"
        )
        assert (
            self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "PENDING")}, asked=time.time() - 60)).state
            == State.FAILED
        ), "an answer from before"

    def test_a_start_that_is_younger_than_the_answer_is_believed(self, tmp_path: Path) -> None:
        run, plan = self.run(tmp_path)
        self.attempt(run)
        waits = {"11_0": JobInfo("11_0", "PENDING", "Priority")}
        assert self.state(run, plan, answers(tmp_path, waits, asked=time.time() - 60)).state == State.RUNNING
        assert self.state(run, plan, answers(tmp_path, waits)).state == State.QUEUED, (
            "that attempt was ended without a word, and the job waits again"
        )

    def test_a_job_that_was_ended_from_outside_is_what_slurm_says_while_slurm_has_it(self, tmp_path: Path) -> None:
        """Preempted without a grace time: the driver cannot know that Slurm requeues it.

        The next attempt needs some seconds before it records its start.
        """
        run, plan = self.run(tmp_path)
        self.attempt(run, end={"outcome": "cancelled", "reason": "ended from outside"})
        for word, state in (
            ("COMPLETING", State.RUNNING),
            ("PENDING", State.QUEUED),
            ("RUNNING", State.RUNNING),
            ("CANCELLED", State.CANCELLED),
        ):
            assert self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", word)})).state == state, word
        assert self.state(run, plan, answers(tmp_path, {})).state == State.CANCELLED
        assert (
            self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "PENDING")}, asked=time.time() - 60)).state
            == State.QUEUED
        )

    def test_a_requeued_job_that_came_to_nothing_is_not_what_it_was_before(self, tmp_path: Path) -> None:
        run, plan = self.run(tmp_path)
        self.attempt(run, end={"outcome": "stopped", "again": True, "reason": "limit"})
        assert self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "CANCELLED")})).state == State.CANCELLED
        assert (
            self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "NODE_FAIL", nodes="n1")})).state
            == State.FAILED
        )

    def test_without_an_answer_a_job_that_meant_to_go_on_is_not_called_stopped(self, tmp_path: Path) -> None:
        run, plan = self.run(tmp_path)
        self.attempt(run, end={"outcome": "stopped", "again": True, "reason": "limit"})
        assert self.state(run, plan, answers(tmp_path, None)).state == State.UNKNOWN

    def test_without_an_answer_nothing_is_claimed(self, tmp_path: Path) -> None:
        run, plan = self.run(tmp_path)
        found = self.state(run, plan, answers(tmp_path, None))
        assert (
            found.state == State.UNKNOWN
            and "no sign of life yet" in found.reason
            and "no answer in 30 s" in found.reason
        )
        assert self.state(run, plan, answers(tmp_path, {})).state == "died"
        assert self.state(
            run, plan, answers(tmp_path, {}, {"11_0": JobInfo("11_0", "OUT_OF_MEMORY", nodes="n1")})
        ).reason.startswith("job 11_0 on n1 ran out of memory")
        assert self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "COMPLETED")})).state == State.FAILED, (
            "completed without a marker is not done"
        )

    def test_a_colleagues_job_is_not_called_dead(self, tmp_path: Path) -> None:
        if os.getuid() != 0:
            pytest.skip("needs root, to give a folder to somebody else")
        run, plan = self.run(tmp_path)
        for path in run.jobs.glob("*"):
            os.chown(path, 65534, 65534)
        assert self.state(run, plan, answers(tmp_path, {})).state == State.UNKNOWN

    def test_only_the_newest_submission_counts_and_abandoned_ones_do_not(self, tmp_path: Path) -> None:
        run, plan = self.run(tmp_path)
        folder = next_folder(run.jobs, "train")
        assert folder.name == "002-train"
        late = Submission(folder, "train", ("0",), str(run.root), "x", token_of(folder), 0.0, job="12")
        late.write()
        jobs = {"11_0": JobInfo("11_0", "FAILED"), "12_0": JobInfo("12_0", "RUNNING")}
        assert self.state(run, plan, answers(tmp_path, jobs)).state == State.RUNNING, "by its number, not by a clock"
        Submission(folder, "train", ("0",), str(run.root), "x", late.token, 0.0, abandoned=True).write()
        assert self.state(run, plan, answers(tmp_path, jobs)).state == State.FAILED
        assert next_folder(run.jobs, "train").name == "003-train", "no folder is used twice"
        (folder / "submission.json").write_text("{")
        with pytest.raises(BadInput, match="the submission is damaged"):
            submissions_of(run, plan, strict=True)

    def test_a_job_of_another_cluster_is_neither_dead_nor_somebody_elses(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two clusters with one home: here its number is unknown, or belongs to another job."""
        run, plan = self.run(tmp_path)
        (one,) = submissions_of(run, plan)["train"]
        dataclasses.replace(one, slurm="north").write()
        monkeypatch.setattr(client, "cluster_name", lambda: "south")
        for jobs in ({}, {"11_0": JobInfo("11_0", "FAILED")}, {"11_0": JobInfo("11_0", "RUNNING")}):
            found = self.state(run, plan, answers(tmp_path, jobs))
            assert found.state == State.UNKNOWN and "belongs to Slurm cluster north" in found.reason, jobs
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        monkeypatch.setattr(client, "squeue", dict)
        with pytest.raises(
            SlurmError, match="the state of job 11_0 is unknown: job 11_0 belongs to Slurm cluster north"
        ):
            known_states(run, plan)
        self.attempt(run, end={"outcome": "failed", "reason": "boom"})
        assert self.state(run, plan, answers(tmp_path, {})).state == State.FAILED, (
            "the driver's last word is on the disk that both see"
        )

    def test_its_own_clusters_jobs_are_as_ever_and_its_name_is_asked_for_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, plan = self.run(tmp_path)
        (one,) = submissions_of(run, plan)["train"]
        dataclasses.replace(one, slurm="north").write()
        asked: list[int] = []
        monkeypatch.setattr(client, "cluster_name", lambda: asked.append(1) or "north")
        for _ in range(3):
            assert self.state(run, plan, answers(tmp_path, {"11_0": JobInfo("11_0", "RUNNING")})).state == State.RUNNING
        assert asked == [1], "an hour's worth"

    def test_a_run_does_not_change_its_cluster_unsaid_nor_while_jobs_of_it_are_there(self, tmp_path: Path) -> None:
        run, plan = self.run(tmp_path)
        states = read_runs([(run, plan)], answers(tmp_path, {"11_0": JobInfo("11_0", "RUNNING")}))[0]
        assert check_moved(run, plan, "x", states) == ""
        with pytest.raises(
            BadInput, match=r"is active on cluster x \(train 0: job 11_0\); continue with --cluster x, or stop it first"
        ):
            check_moved(run, plan, "y", states)
        states = read_runs([(run, plan)], answers(tmp_path, {"11_0": JobInfo("11_0", "CANCELLED")}))[0]
        assert check_moved(run, plan, "y", states) == "r-1 moves from cluster x to y; finished elements are kept"
        folder = next_folder(run.jobs, "train")
        Submission(folder, "train", ("0",), str(run.root), "y", token_of(folder), time.time(), job="12").write()
        assert check_moved(run, plan, "y", states) == "", "it has been said"

    def test_submissions_survive_the_disk(self, tmp_path: Path) -> None:
        folder = tmp_path / "001-train"
        one = Submission(
            folder, "train", ("0", "1"), "/r", "x", "t", 1.5, ("7",), "9", needs={"nodes": 1}, env={"A": "${B}"}
        )
        one.write()
        assert read_submission(folder) == one and one.tasks() == {"0": "9_0", "1": "9_1"}


@needs_srun
class TestDrafts:
    def test_dependencies_reach_back_over_done_stages(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path / "runs" / "r-1")
        plan = make_plan(run, ("preprocess", 2), ("verify", 1), ("train", 1))
        profile = find_cluster("slurm").profile
        states = read_runs([(run, plan)], answers(tmp_path, {}))[0]
        found = draft_arrays(run, plan, profile, states, plan.stages, 1000)
        assert [(draft.array.stage.name, draft.after_drafts) for draft in found] == [
            ("preprocess", ()),
            ("verify", ("001-preprocess",)),
            ("train", ("001-preprocess", "002-verify")),
        ]
        marker = run.element("verify", "0").done
        write_json(marker, {"outputs": {}})
        states = read_runs([(run, plan)], answers(tmp_path, {}))[0]
        assert [state.state for state in states] == [State.PENDING, State.PENDING, State.DONE, State.PENDING]
        found = draft_arrays(run, plan, profile, states, plan.stages, 1000)
        assert [draft.array.stage.name for draft in found] == ["preprocess", "train"] and found[1].after_drafts == (
            "001-preprocess",
        ), "verify is done, its input is not"

    @pytest.mark.slow
    def test_after_a_failure_in_a_huge_array_its_end_is_waited_for_and_the_job_looks_itself(
        self, tmp_path: Path
    ) -> None:
        """afterok never holds for it any more, and thousands of tasks are more than sbatch takes."""
        run = RunDir(tmp_path / "runs" / "r-1")
        plan = make_plan(run, ("preprocess", 5000), ("verify", 1), ("train", 3))
        names = tuple(map(str, range(5000)))
        for job, mine in (("11", names[:2500]), ("12", names[2500:])):
            folder = next_folder(run.jobs, "preprocess")
            Submission(folder, "preprocess", mine, str(run.root), "x", token_of(folder), time.time(), job=job).write()
        jobs = {f"{job}_{i}": JobInfo(f"{job}_{i}", "RUNNING") for job in ("11", "12") for i in range(2500)}
        jobs["11_7"] = JobInfo("11_7", "FAILED")
        states = read_runs([(run, plan)], answers(tmp_path, jobs))[0]
        found = draft_arrays(run, plan, find_cluster("slurm").profile, states, plan.stages, 1000)
        assert [(draft.array.stage.name, draft.array.elements) for draft in found] == [
            ("preprocess", ("7",)),
            ("verify", ("0",)),
            ("train", ("0", "1", "2")),
        ]
        numbers = {draft.array.folder.name: str(20 + i) for i, draft in enumerate(found)}
        assert [dependency_options(draft, numbers) for draft in found] == [
            [],
            ["--dependency=afterok:12:20,afterany:11"],
            ["--dependency=afterok:12:20:21,afterany:11"],
        ]
        assert [draft.after.checked_stages for draft in found] == [(), ("preprocess",), ()], (
            "train waits for verify, which has looked"
        )
        submission = Submission(tmp_path, "verify", ("0",), str(run.root), "x", "t", 0.0, inputs=("preprocess",))
        for name in names[:-1]:
            marker = run.element("preprocess", name).done
            marker.parent.mkdir(parents=True)
            marker.write_text('{"outputs": {}}')
        assert (
            missing_input(run, plan, submission, "0") == "an earlier stage did not finish: preprocess 4999 is not done"
        )
        write_json(run.element("preprocess", "4999").done, {"outputs": {str(tmp_path / "gone"): 4}})
        assert missing_input(run, plan, submission, "0"), "nor is it while its output is not there"
        write_json(run.element("preprocess", "4999").done, {"outputs": {}})
        assert missing_input(run, plan, submission, "0") == ""

    def test_each_point_of_a_sweep_waits_for_itself_alone(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path / "runs" / "r-1")
        plan = make_plan(run, ("train", 4), ("export", 4))
        plan = dataclasses.replace(
            plan, stages=[plan.stage("train"), dataclasses.replace(plan.stage("export"), elementwise=True)]
        )

        def drafts(train: list[str], export: list[str]) -> list[tuple[str, tuple[str, ...], list[str]]]:
            jobs = {f"11_{i}": JobInfo(f"11_{i}", state) for i, state in enumerate(train)}
            jobs |= {f"12_{i}": JobInfo(f"12_{i}", state) for i, state in enumerate(export)}
            states = read_runs([(run, plan)], answers(tmp_path, jobs))[0]
            found = draft_arrays(run, plan, find_cluster("slurm").profile, states, plan.stages, 1000)
            numbers = {draft.array.folder.name: str(20 + i) for i, draft in enumerate(found)}
            return [
                (draft.array.stage.name, draft.array.elements, dependency_options(draft, numbers)) for draft in found
            ]

        states = read_runs([(run, plan)], answers(tmp_path, {}))[0]
        first, second = draft_arrays(run, plan, find_cluster("slurm").profile, states, plan.stages, 1000)
        assert dependency_options(second, {first.array.folder.name: "11"}) == ["--dependency=aftercorr:11"]
        names = ("0", "1", "2", "3")
        for stage, job in (("train", "11"), ("export", "12")):
            folder = next_folder(run.jobs, stage)
            Submission(folder, stage, names, str(run.root), "x", token_of(folder), time.time(), job=job).write()

        running, failed, waiting, cancelled = "RUNNING", "FAILED", "PENDING", "CANCELLED"
        assert drafts([running] * 4, [waiting] * 4) == []
        assert drafts([failed, running, running, running], [cancelled, waiting, waiting, waiting]) == [
            ("train", ("0",), []),
            ("export", ("0",), ["--dependency=aftercorr:20"]),
        ], "the others wait for their own points, and stay"
        assert drafts([running] * 4, [cancelled] * 4) == [("export", names, ["--dependency=aftercorr:11"])]
        assert drafts([running] * 4, [waiting, cancelled, waiting, cancelled]) == [
            ("export", ("1", "3"), ["--dependency=afterany:11"])
        ], "not the same indices: each job looks itself"
        write_json(run.element("train", "2").done, {"outputs": {}})
        assert drafts([failed, running, "COMPLETED", running], [cancelled] * 4) == [
            ("train", ("0",), []),
            ("export", ("0",), ["--dependency=aftercorr:20"]),
            ("export", ("2",), []),
            ("export", ("1", "3"), ["--dependency=afterany:11"]),
        ]
        submission = Submission(tmp_path, "export", names, str(run.root), "x", "t", 0.0, inputs=("train",))
        assert missing_input(run, plan, submission, "2") == ""
        assert missing_input(run, plan, submission, "1") == "an earlier stage did not finish: train 1 is not done"

    def test_arrays_are_cut_at_slurms_limit(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path / "runs" / "r-1")
        plan = make_plan(run, ("preprocess", 25))
        states = read_runs([(run, plan)], answers(tmp_path, {}))[0]
        found = draft_arrays(run, plan, find_cluster("slurm").profile, states, plan.stages, 10)
        assert [len(draft.array.elements) for draft in found] == [10, 10, 5]
        assert len({draft.array.folder for draft in found}) == len({draft.array.token for draft in found}) == 3


def test_answers_are_shared_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "squeue"
    tool.parent.mkdir()
    tool.write_text(
        f"#!/bin/sh\necho called >> {tmp_path}/calls\n"
        "echo '1_0|RUNNING|None|2026-01-01T00:00:00|n1|2026-01-01T00:00:00|odd | comment'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def calls() -> int:
        return len((tmp_path / "calls").read_text().splitlines())

    assert Queue().jobs == Queue().jobs and calls() == 1
    assert Queue().jobs["1_0"].comment == "odd | comment"
    queue_module.invalidate_cache()
    time.sleep(0.02)
    assert Queue().jobs and calls() == 2
    assert Queue(max_age=0).jobs and calls() == 3


def test_sweeps_as_people_type_them() -> None:
    assert sweep_overrides(["optimizer.lr=1e-4,3e-4", "seed=[1,2]"]) == [
        "--sweep.optimizer.lr=[1e-4,3e-4]",
        "--sweep.seed=[1,2]",
    ]
    assert sweep_overrides(["{seed: [1]}"]) == ["--sweep={seed: [1]}"]
    with pytest.raises(BadInput, match="expected KEY=V1,V2"):
        sweep_overrides(["optimizer.lr"])
    with pytest.raises(BadInput, match="expected KEY=V1,V2"):
        sweep_overrides(["=1,2"])
    with pytest.raises(BadInput, match="--sweep seed is listed twice"):
        sweep_overrides(["seed=1", "optimizer.lr=1", "seed=2"])


def test_ports_that_are_taken_are_passed_over() -> None:
    first = next(free_ports(7))
    with socket.create_server(("", first)):
        assert next(free_ports(7)) != first
    assert len(set(zip(range(5), free_ports(3), strict=False))) == 5


def test_the_address_of_an_interface() -> None:
    assert interface_address("lo") == "127.0.0.1"
    with pytest.raises(OSError, match=r"no interface 'nope0' with an address; its interfaces: .*lo"):
        interface_address("nope0")


def test_a_snapshot_of_a_checkout_has_what_git_does_not_ignore(tmp_path: Path) -> None:
    user = tmp_path / "user"
    (user / "runs").mkdir(parents=True)
    for name, text in {
        "kept.py": "x = 1\n",
        "table.json": "{}",
        "new.py": "y = 2\n",
        "secret.env": "no",
        ".gitignore": "*.env\n",
        "runs/log.py": "no",
    }.items():
        (user / name).write_text(text)
    git = ["git", "-C", str(user), "-c", "user.email=a@b", "-c", "user.name=a"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "kept.py", "table.json", ".gitignore"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    (user / "kept.py").write_text("x = 'uncommitted'\n")
    take_snapshot(tmp_path / "code", user)
    there = {
        str(path.relative_to(tmp_path / "code" / "recipe"))
        for path in (tmp_path / "code" / "recipe").rglob("*")
        if path.is_file()
    }
    assert there == {"kept.py", "table.json", "new.py", ".gitignore"}
    assert "uncommitted" in (tmp_path / "code" / "recipe" / "kept.py").read_text()
    (user / "large.bin").write_bytes(b"0" * 21_000_000)
    with pytest.raises(BadInput, match=r"too much to copy.*large.bin \(21.0 MB\)"):
        take_snapshot(tmp_path / "code", user)


def test_completion_scripts_are_for_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "amlaunch", "completion", "bash"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "src")},
        check=True,
    )
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    assert "quickstart" in done.stdout and "--dry-run" in done.stdout


def test_signals_before_the_driver_listens_are_not_lost(tmp_path: Path) -> None:
    """USR1 in the first instant of a job would end Python."""
    code = (
        "from amlaunch.launcher.execution import slurm_job; import os, signal; os.kill(os.getpid(), signal.SIGUSR1); "
        "import time; time.sleep(0.05); print(slurm_job.EARLY_SIGNALS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "src")},
    )
    assert done.returncode == 0 and done.stdout.strip() == str([int(signal.SIGUSR1)])


@pytest.mark.parametrize(
    ("message", "report"),
    [
        (
            "sinfo: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
            "sinfo: error: fetch_config: DNS SRV lookup failed\n"
            "sinfo: fatal: Could not establish a configuration source",
            "Slurm did not answer (sinfo: fatal: Could not establish a configuration source). "
            "Check it with: amlaunch doctor",
        ),
        (
            "slurm_load_partitions: Unable to contact slurm controller (connect failure)",
            "Slurm did not answer (sinfo: slurm_load_partitions: Unable to contact slurm controller (connect failure))"
            ". Check it with: amlaunch doctor",
        ),
        ("sinfo: error: Invalid user: nobody", "sinfo: Invalid user: nobody"),
        (
            "sinfo: error: please contact support@example.org, or connect to the portal before the timeout\n"
            "sinfo: error: Batch job submission failed: Job violates accounting/QOS policy",
            "sinfo: Batch job submission failed: Job violates accounting/QOS policy",
        ),
    ],
)
def test_an_error_of_slurm_is_one_line(message: str, report: str) -> None:
    error = command_error("sinfo", message)
    assert error.report == report and error.message == message and "\n" not in str(error)


def test_submit_to_a_slurm_that_cannot_be_reached_says_how_to_check_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for every command, which prints what Slurm prints if it is configured nowhere."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sinfo", "scontrol", "squeue", "sbatch", "sacctmgr", "sacct"):
        script = commands / name
        script.write_text(
            f"#!/bin/sh\necho '{name}: error: fetch_config: DNS SRV lookup failed' >&2\n"
            f"echo '{name}: fatal: Could not establish a configuration source' >&2\nexit 1\n"
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clusters.yaml").write_text("lab: {mem: 1G, time: 10}\n")
    client.config.cache_clear()
    assert main(["submit", "quickstart", "--cluster", "lab"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == [errors[-1]]
    assert errors[-1].startswith("error: Slurm did not answer (")
    assert errors[-1].endswith(": fatal: Could not establish a configuration source). Check it with: amlaunch doctor")
