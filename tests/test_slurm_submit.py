"""amlaunch submit and what follows, on a real Slurm cluster, as an ordinary user."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster
from slurm_runs import CPU, TWO_ON_GPU, Place, attempts, element, states
from test_e2e import TINY, write_text

from amlaunch.launcher.specs.plan import Needs
from amlaunch.recipes.files import read_json_lines
from amlaunch.recipes.run_layout import RunDir

pytestmark = pytest.mark.slow

CLUSTERS = """\
lab:
  signal_seconds: 60
  time: 5
  env: {AMLAUNCH_DEVICE: cpu}  # the cluster's GPUs are files
  stages:
    preprocess: {mem: 1G, throttle: 2}
    verify: {mem: 1G}
    train: {partition: gpu, mem: 4G}
    export: {mem: 2G}
"""
ON_GPUS = ["--resources.train.gpus_per_node", "2", "--resources.train.tasks_per_node", "null"]


@pytest.fixture
def place(cluster: Cluster, request: pytest.FixtureRequest) -> Place:
    return Place(cluster, "work")


@pytest.fixture(scope="module")
def tiny(cluster: Cluster) -> Place:
    """A folder with a small recipe, its text, and a profile of the cluster; the first test makes its shards."""
    place = Place(cluster, "tiny")
    place.env["TEXT"] = str(place.folder / "text")
    write_text(place.folder / "text")
    place.write("tiny.yaml", TINY)
    place.write("clusters.yaml", CLUSTERS)
    return place


def run_dir(place: Place, start: str) -> RunDir:
    (result,) = (place.folder / "runs").glob(f"{start}-*")
    return RunDir(result)


def arrays(submission: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The stage and the elements of each array that was submitted, from ``--json``."""
    return [(array["stage"], array["elements"]) for array in submission["submitted"]]


def test_the_whole_pipeline_on_two_cpu_and_two_gpu_nodes(tiny: Place) -> None:
    submission = json.loads(
        tiny.amlaunch(
            "submit", "tiny.yaml", "--cluster", "lab", *ON_GPUS, "--resources.train.nodes", "2", "--json"
        ).stdout
    )
    assert [(one["stage"], len(one["elements"])) for one in submission["submitted"]] == [
        ("preprocess", 2),
        ("verify", 1),
        ("train", 1),
        ("export", 1),
    ]
    again = tiny.amlaunch("submit", "tiny.yaml", "--cluster", "lab", *ON_GPUS, "--resources.train.nodes", "2").stdout
    assert "already queued or running, left unchanged" in again
    assert len(set(tiny.queued())) <= 4, "nothing is submitted twice"
    result = tiny.wait("tiny", 180)
    assert states(result) == {"preprocess": ["done"] * 2, "verify": ["done"], "train": ["done"], "export": ["done"]}
    train = element(result, "train")
    assert train["nodes"] == "gpu[1-2]" and train["gpu_hours"] > 0 and train["progress"]["done"] == 40
    run = run_dir(tiny, "tiny")
    assert "4 x cpu, fsdp2" in run.element("train", "0").log(1, 0).read_text(), "four ranks on two nodes"
    losses = [line["loss"] for line in read_json_lines(run.element("train", "0").metrics) if "loss" in line]
    assert len(losses) == 40 and losses[-1] < losses[0] - 1.5
    log = tiny.amlaunch("logs", "tiny", "--stage", "train").stdout
    assert "[0:0] " in log and "40" in log
    third = tiny.amlaunch("submit", "tiny.yaml", "--cluster", "lab", *ON_GPUS, "--resources.train.nodes", "2").stdout
    assert third.count("already done, skipped") == 4 and not tiny.queued()


def test_a_job_with_gpus_does_not_train_on_the_cpu(tiny: Place) -> None:
    """Its torch is built for the CPU, or finds no driver."""
    tiny.write("gpus.yaml", CLUSTERS.replace("  env: {AMLAUNCH_DEVICE: cpu}", ""))
    words = ["--name", "gpus", "--export", "null", "--resources.train.gpus_per_node", "1"]
    tiny.amlaunch("submit", "tiny.yaml", "--cluster", "gpus.yaml", *words, "--resources.train.tasks_per_node", "null")
    failed = element(tiny.wait("gpus", 120, code=1), "train")
    assert failed["reason"].startswith(f"rank 0 on {failed['host']} has a GPU, but torch cannot use it: torch 2.")
    assert failed["reason"].endswith("use a torch or an image with CUDA, or train on the CPU: --gpus 0")
    assert failed["attempts"] == 1


def test_a_sweep_shares_its_preprocess_stage(tiny: Place) -> None:
    words = [
        "--name",
        "sweep",
        "--sweep",
        "optimizer.lr=1e-2",
        "--sweep",
        "seed=1,2",
        "--step_scheduler.max_steps",
        "2",
    ]
    words += ["--validation_dataset", "null", "--export", "null", "--resources.train.tasks_per_node", "1"]
    submission = json.loads(tiny.amlaunch("submit", "tiny.yaml", "--cluster", "lab", *words, "--json").stdout)
    by_stage = {one["stage"]: one["elements"] for one in submission["submitted"]}
    assert by_stage["train"] == ["0", "1"]
    result = tiny.wait("sweep", 300)
    assert set(states(result)["train"]) == {"done"}
    assert [one["title"] for one in result["stages"][2]["elements"]][1] == "--optimizer.lr=0.01 --seed=2"
    assert all(one["attempts"] == 1 for one in result["stages"][0]["elements"]), (
        "made once, for all runs with the same text"
    )


def test_a_failed_point_of_a_sweep_takes_no_other_with_it(tiny: Place) -> None:
    """A rate that makes every loss not a number fails; the other point is exported, and ``retry`` repeats one alone."""
    words = ["--name", "broken", "--sweep", "optimizer.lr=1e200,1e-2", "--step_scheduler.max_steps", "12"]
    words += ["--resources.train.tasks_per_node", "1", "--validation_dataset", "null"]
    tiny.amlaunch("submit", "tiny.yaml", "--cluster", "lab", *words)
    result = tiny.wait("broken", 300, code=1)
    assert (states(result)["train"], states(result)["export"]) == (["failed", "done"], ["cancelled", "done"])
    again = json.loads(tiny.amlaunch("retry", "broken", "--json").stdout)
    assert arrays(again) == [("train", ["0"]), ("export", ["0"])]
    result = tiny.wait("broken", 300, code=1)
    assert (states(result)["train"], states(result)["export"]) == (["failed", "done"], ["cancelled", "done"])


def test_the_code_that_runs_is_the_code_at_submit_time(tiny: Place) -> None:
    """The model's file is changed while its job waits."""
    model = (
        "import torch\ndef build(vocab: int = 50304):\n    print('MODEL {0}')\n"
        "    return torch.nn.Sequential(torch.nn.Embedding(vocab, 8), torch.nn.Linear(8, vocab))\n"
    )
    tiny.write("my_model.py", model.format("before"))
    tiny.write(
        "mine.yaml",
        TINY.split("model:")[0].replace("name: tiny", "name: mine")
        + "model: {_target_: 'my_model.py:build'}\ndataset: {seq_len: 16}\nexport: null\n"
        + "step_scheduler: {max_steps: 2, global_batch_size: 4}\n",
    )
    tiny.cluster.run(
        "scontrol", "create", "reservation", check=False
    )  # nothing: lab may not; the nodes are kept busy instead
    busy = tiny.cluster.run(
        "sbatch", "--parsable", "-p", "gpu", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 60"
    ).stdout.strip()
    tiny.amlaunch("submit", "mine.yaml", "--cluster", "lab", "--resources.train.tasks_per_node", "1")
    tiny.write("my_model.py", model.format("after"))
    tiny.cluster.run("scancel", busy)
    tiny.wait("mine", 120)
    log = run_dir(tiny, "mine").element("train", "0").log(1, 0).read_text()
    assert "MODEL before" in log and "MODEL after" not in log


def test_a_dry_run_is_what_is_submitted_byte_for_byte(tiny: Place) -> None:
    words = ["submit", "tiny.yaml", "--cluster", "lab", "--name", "dry", "--seed", "9"]
    dry = json.loads(tiny.amlaunch(*words, "--dry-run", "--json").stdout)
    printed = tiny.amlaunch(*words, "--dry-run").stdout
    assert not list((tiny.folder / "runs").glob("dry-*")), "a dry run writes nothing"
    submission = json.loads(tiny.amlaunch(*words, "--json").stdout)
    assert [one["stage"] for one in dry["scripts"]] == [one["stage"] for one in submission["submitted"]]
    for script, job in zip(dry["scripts"], submission["submitted"], strict=True):
        assert script["script"] in printed
        assert Path(script["path"]).read_text() == script["script"]
        held = tiny.cluster.run("scontrol", "write", "batch_script", f"{job['job']}_0", "-").stdout
        assert held.rstrip("\n") == script["script"].rstrip("\n"), "what Slurm itself has"
        for command in (["bash", "-n"], ["shellcheck", "-s", "bash"]):
            checked = subprocess.run([*command, "/dev/stdin"], input=script["script"], text=True, capture_output=True)
            assert checked.returncode == 0, checked.stdout + checked.stderr
    tiny.amlaunch("cancel", "dry")


@pytest.mark.parametrize(
    ("words", "profile", "message"),
    [
        (
            ["--model.n_layr", "6"],
            "",
            "model.n_layr: unknown key of amlaunch.trainer.models.gpt2.build_gpt2_model; did you mean 'n_layer'?",
        ),
        ([], "  partition: gpuu\n", "partition 'gpuu' does not exist on this cluster; did you mean 'gpu'?"),
        ([], "  partition: closed\n", "partition closed accepts only these accounts: nobody; yours is lab"),
        ([], "  account: labb\n", "account 'labb' is not one of your accounts; did you mean 'lab'?"),
        ([], "  qos: hihg\n", "qos 'hihg' is not one of your QOS; did you mean 'high'?"),
        (["--resources.train.time", "00:01:00"], "", "which leaves no time for work"),
        (["--resources.train.time", "20"], "  partition: short\n", "partition short allows at most 10:00"),
        (
            ["--resources.train.gpus_per_node", "16"],
            "  partition: gpu\n",
            "gpus_per_node is 16, but a node of partition gpu has at most 8 GPUs",
        ),
        (["--resources.train.nodes", "3"], "", "resources.train.nodes is 3, but partition cpu has 2 nodes"),
        (["--resources.train.cpus", "99"], "", "cpus is 99, but a node of partition cpu has at most 32 CPUs"),
        (["--resources.train.mem", "900G"], "", "mem is 900G, but a node of partition cpu has at most"),
        ([], "  sbatch: {nise: 10}\n", "sbatch.nise: sbatch has no such option; did you mean 'nice'?"),
        ([], "  sbatch: {array: 0-3}\n", "amlaunch sets this option (it follows from the elements of the stage)"),
        ([], "  partitoin: gpu\n", "partitoin: unknown key; did you mean 'partition'?"),
        ([], "  sbatch: {begin: yesterdayish}\n", "sbatch refused the script"),
        (["--wandb.project", "x"], "", "export WANDB_API_KEY=…"),
        (["--container.image", "/no/such.sqsh"], "", "file /no/such.sqsh does not exist"),
        (["--cluster", "labb"], "", "did you mean 'lab'?"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(
    tiny: Place, words: list[str], profile: str, message: str
) -> None:
    before = {path.name for path in tiny.folder.iterdir()}
    runs = set((tiny.folder / "runs").glob("*"))
    clusters = tiny.write("wrong.yaml", f"lab:\n  signal_seconds: 60\n{profile}")
    cluster = [] if "--cluster" in words else ["--cluster", str(clusters)]
    result = tiny.amlaunch("submit", "tiny.yaml", "--name", "wrong", *cluster, *words, check=False)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not tiny.queued() and set((tiny.folder / "runs").glob("*")) == runs
    assert {path.name for path in tiny.folder.iterdir()} - before <= {"wrong.yaml", "cache"}


NOW = "note: stage train cannot start now, and waits in the queue: {} of 2 nodes of partition gpu are down or drained; "
UNAVAILABLE = [
    ("nodename=gpu[1-2]", "drain", "resume", NOW.format(2)),
    ("nodename=gpu1", "drain", "resume", NOW.format(1)),
    ("nodename=gpu1", "fail", "resume", NOW.format(1)),
    ("partitionname=gpu", "down", "up", "note: partition gpu is down; jobs wait in the queue until it is up"),
]


@pytest.mark.parametrize(("what", "state", "normal", "note"), UNAVAILABLE)
def test_what_slurm_would_queue_is_submitted_with_a_note(
    tiny: Place, what: str, state: str, normal: str, note: str
) -> None:
    """Slurm's own test (sbatch --test-only) refuses all of these."""
    words = ["submit", "tiny.yaml", "--cluster", "lab", *ON_GPUS, "--resources.train.nodes", "2"]
    name = f"{state}-{what[-1]}".strip("]")
    words += ["--name", name, "--validation_dataset", "null", "--export", "null", "--step_scheduler.max_steps", "2"]
    with tiny.cluster.changed(what, state, normal):
        submitted = tiny.amlaunch(*words, "-v", check=False)
        assert submitted.returncode == 0 and note in submitted.stderr + submitted.stdout, submitted.stderr
        assert states(tiny.status(name))["train"] == ["queued"]
    if state == "drain":
        assert states(tiny.wait(name))["train"] == ["done"]
    tiny.amlaunch("cancel", name, check=False)


@pytest.mark.parametrize("state", ["drain", "inactive"])
def test_a_partition_that_takes_no_jobs_is_refused(tiny: Place, state: str) -> None:
    with tiny.cluster.changed("partitionname=gpu", state, "up"):
        refused = tiny.amlaunch("submit", "tiny.yaml", "--cluster", "lab", *ON_GPUS, "--name", state, check=False)
    assert refused.returncode == 2 and f"partition gpu is {state}; choose another one" in refused.stderr


def test_a_full_disk_is_refused_before_anything_is_submitted(tiny: Place) -> None:
    full = tiny.folder / "full"
    full.mkdir()
    tiny.cluster.mount(full, "2m")
    try:
        tiny.cluster.run("dd", "if=/dev/zero", f"of={full}/fill", "bs=1M", "count=3", check=False)
        clusters = tiny.write("roots.yaml", f"lab: {{signal_seconds: 60, shared_roots: [{full}]}}\n")
        words = ["submit", "tiny.yaml", "--cluster", str(clusters), "--runs", f"{full}/runs", "--name", "full"]
        result = tiny.amlaunch(*words, check=False)
        assert result.returncode == 2 and ("No space left" in result.stderr or " is free" in result.stderr), (
            result.stderr
        )
        tiny.cluster.run("rm", f"{full}/fill")
        result = tiny.amlaunch(*words, "--model.n_embd", "4096", "--model.n_layer", "48", check=False)
        assert result.returncode == 2 and "the run needs about" in result.stderr
    finally:
        tiny.cluster.unmount(full)
    assert not tiny.queued()


def test_a_run_that_nodes_cannot_see_is_refused(tiny: Place) -> None:
    clusters = tiny.write("roots.yaml", "lab: {signal_seconds: 60, shared_roots: [/shared]}\n")
    result = tiny.amlaunch("submit", "tiny.yaml", "--cluster", str(clusters), check=False)
    assert result.returncode == 2 and "not below the profile's shared_roots (/shared)" in result.stderr
    result = tiny.amlaunch("submit", "tiny.yaml", "--runs", "/dev/shm/runs", check=False)
    assert result.returncode == 2 and "which nodes cannot see" in result.stderr


def test_a_failed_element_is_retried_alone(place: Place) -> None:
    """While a sibling runs: Slurm can only wait for the end of the failed array, and the job checks its inputs."""
    run = place.stand_in(("preprocess", [[], ["--do", "once"], ["--do", "steps"]], CPU), ("train", [[]], CPU))
    place.amlaunch("retry", "test-1")
    beside = {
        "preprocess": ["done", "failed", "running"],
        "train": ["queued"],
    }  # Slurm sees that it never starts once the array has ended
    result = place.wait_until(
        "test-1", lambda result: states(result) == beside and element(result, "preprocess", 2)["progress"].get("done")
    )
    failed = element(result, "preprocess", 1)
    assert (failed["rank"], failed["host"], failed["reason"]) == (0, failed["nodes"], "rank 0 exited with code 1")
    shown = place.amlaunch("status", "test-1").stdout
    assert "not this time" in shown and "retry test-1" in shown and failed["host"] in shown, (
        "the log's last lines, and what to type"
    )
    submission = json.loads(place.amlaunch("retry", "test-1", "--json").stdout)
    assert [(one["stage"], one["elements"]) for one in submission["submitted"]] == [
        ("preprocess", ["1"]),
        ("train", ["0"]),
    ]
    waits = json.loads((run.jobs / "004-train" / "submission.json").read_text())
    old = failed["job"].split("_")[0]
    assert waits["after"] == [f"afterok:{submission['submitted'][0]['job']}", f"afterany:{old}"] and waits[
        "inputs"
    ] == ["preprocess"]
    place.cluster.run("scancel", f"{old}_2")
    result = place.wait("test-1", code=75)
    assert states(result)["preprocess"][:2] == ["done"] * 2 and states(result)["train"] == ["cancelled"]
    assert element(result, "train")["reason"] == "an earlier stage did not finish: preprocess 2 is not done"
    submission = json.loads(place.amlaunch("retry", "test-1", "--json").stdout)
    assert [(one["stage"], one["elements"]) for one in submission["submitted"]] == [
        ("preprocess", ["2"]),
        ("train", ["0"]),
    ]
    assert states(place.wait("test-1")) == {"preprocess": ["done"] * 3, "train": ["done"]}
    assert [len(attempts(run, "preprocess", name)) for name in "012"] == [1, 2, 2]


def follow_advice(place: Place, run: str) -> None:
    """Type the command that ``status`` prints after "next:"."""
    shown = place.amlaunch("status", run).stdout
    (line,) = (line for line in shown.splitlines() if line.startswith("next: "))
    command = line.removeprefix("next: ").removeprefix("fix the cause, then run ")
    place.cluster.run("sh", "-c", command, cwd=place.folder, env=place.env)


def test_the_next_command_takes_the_corrected_code_and_input(place: Place) -> None:
    """An error in the user's model, then one in a text: ``retry`` would use the run's copy of the model."""
    model = (
        "import torch\ndef build(vocab: int = 257):\n{}"
        "    return torch.nn.Sequential(torch.nn.Embedding(vocab, 8), torch.nn.Linear(8, vocab))\n"
    )
    place.write("own.py", model.format("    raise KeyError('lost')\n"))
    place.write(
        "own.yaml",
        "name: own\npreprocess: {data_files: text.jsonl, tokenizer: byte, max_tokens: 4K}\n"
        "model: {_target_: 'own.py:build'}\ndataset: {seq_len: 16}\nexport: null\n"
        "step_scheduler: {max_steps: 2, global_batch_size: 4}\nresources: {train: {tasks_per_node: 1}}\n",
    )
    place.write("clusters.yaml", "lab: {signal_seconds: 60, time: 5, mem: 1G}\n")
    records = "\n".join(json.dumps({"text": "a word and another one " * 20}) for _ in range(20))
    first = records.splitlines()[0]
    place.write("text.jsonl", f"{first}\n{{broken\n{records}\n")

    place.amlaunch("submit", "own.yaml", "--cluster", "lab")
    failed = element(place.wait("own", code=2), "preprocess")
    assert "text.jsonl" in failed["reason"], failed
    place.write("text.jsonl", f"{records}\n")
    follow_advice(place, "own")
    assert element(place.wait("own", code=1), "train")["reason"] == "KeyError: 'lost'"
    place.write("own.py", model.format(""))
    follow_advice(place, "own")
    assert states(place.wait("own"))["train"] == ["done"]


def test_which_rank_on_which_node_failed(place: Place) -> None:
    place.stand_in(("train", [["--do", "fail", "--rank", "3"]], Needs(2, 2, 2, 2, "400M", 5)))
    place.amlaunch("retry", "test-1")
    failed = element(place.wait("test-1", code=1), "train")
    assert (failed["rank"], failed["host"]) == (3, "gpu2") and failed[
        "reason"
    ] == "RuntimeError: the disk is full of bees"
    assert "last lines of rank 3" in place.amlaunch("status", "test-1").stdout


def test_a_rank_that_leaves_late_is_killed_by_srun_and_that_is_no_failure(place: Place) -> None:
    """--kill-on-bad-exit counts 75, too. All have saved by then."""
    run = place.stand_in(("train", [["--do", "lastword"]], TWO_ON_GPU))
    place.amlaunch("retry", "test-1")
    place.wait_until("test-1", lambda result: element(result, "train")["progress"].get("done"))
    place.amlaunch("cancel", "test-1", "--checkpoint")
    assert states(place.wait("test-1", code=75))["train"] == ["stopped"]
    (end,) = (line for line in read_json_lines(run.element("train", "0").attempts) if line["event"] == "end")
    assert end["exit_codes"] == [75]


def test_bad_input_in_a_job_ends_with_its_own_words(place: Place) -> None:
    place.stand_in(("train", [["--do", "bad"]], CPU))
    place.amlaunch("retry", "test-1")
    assert element(place.wait("test-1", code=2), "train")["reason"] == "r.yaml:3: model.n_layer: expected int"


def test_variables_of_an_enclosing_job_do_not_leak(place: Place) -> None:
    """8 ranks where 1 was meant, on the wrong partition, meeting at somebody else's address."""
    run = place.stand_in(("train", [["--print", "MASTER_ADDR"]], CPU))
    leaks = {
        "SLURM_NTASKS": "8",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "1",
        "SBATCH_PARTITION": "closed",
        "SLURM_EXPORT_ENV": "NONE",
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "elsewhere",
        "SLURM_CPUS_PER_TASK": "7",
        "SBATCH_ARRAY_INX": "0-9",
    }
    place.amlaunch("retry", "test-1", **leaks)
    place.wait("test-1")
    log = run.element("train", "0").log(1, 0).read_text()
    assert "rank 0 of 1 on cpu1" in log and "threads 1" in log and "MASTER_ADDR=127.0.0.1" in log


def test_from_inside_an_allocation(place: Place) -> None:
    run = place.stand_in(("train", [[]], Needs(1, 0, 2, 2, "200M", 5)))
    inside = ["srun", "-p", "gpu", "-N2", "-n2", "--ntasks-per-node=1", "--mem=500M", "sh", "-c"]
    once = f'[ "$SLURM_PROCID" = 0 ] || exit 0; exec {place.cluster.python} -P -m amlaunch.launcher retry test-1'
    place.cluster.run(*inside, once, cwd=place.folder, env=place.env, timeout=90)
    place.wait("test-1")
    assert "rank 1 of 2 on cpu1" in run.element("train", "0").log(1, 1).read_text()


@pytest.mark.parametrize("name", ["a b", "it's", 'say "x"', "50%a%j%%", "$HOME;`id`", "#tag é"])
def test_paths_are_quoted(cluster: Cluster, name: str) -> None:
    place = Place(cluster, "quoting")
    place.folder = place.folder / name
    place.folder.mkdir()
    place.env["XDG_CACHE_HOME"] = str(place.folder / "cache")
    subprocess.run(["chown", "lab:lab", str(place.folder)], check=True)
    run = place.stand_in(("preprocess", [[], []], CPU), ("train", [["--print", "MY_TEXT"]], TWO_ON_GPU))
    value = "two\nlines 'and' \"quotes\" %a $HOME"
    plan = json.loads(run.plan.read_text())
    plan["env"] = {"MY_TEXT": value.replace("$HOME", "$HOME")}
    run.plan.write_text(json.dumps(plan))
    place.amlaunch("retry", "test-1")
    place.wait("test-1")
    assert f"MY_TEXT={value}" in run.element("train", "0").log(1, 1).read_text()
    scripts = list(run.jobs.glob("*/script.sh"))
    assert len(scripts) == 2
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert list(script.parent.glob("[0-9]*_0.log")), "the job's own output is where it belongs"


def test_secrets_are_nowhere_but_in_one_private_file(tiny: Place) -> None:
    secret = "hunter2-do-not-tell"
    tiny.write(
        "secret.yaml", TINY.replace("name: tiny", "name: secret") + "container: {env: {MY_TOKEN: '${SECRET_X}'}}\n"
    )
    words = [
        "submit",
        "secret.yaml",
        "--cluster",
        "lab",
        "--step_scheduler.max_steps",
        "2",
        "--export",
        "null",
        "--validation_dataset",
        "null",
    ]
    words += ["--resources.train.tasks_per_node", "1"]
    env = {"SECRET_X": secret, "WANDB_API_KEY": secret, "HF_TOKEN": secret}
    assert secret not in (dry := tiny.amlaunch(*words, "--dry-run", **env)).stdout + dry.stderr
    submission = tiny.amlaunch(*words, "--json", **env)
    assert secret not in submission.stdout + submission.stderr
    jobs = [one["job"] for one in json.loads(submission.stdout)["submitted"]]
    seen = tiny.wait_until("secret", lambda result: states(result)["train"] == ["running"], 60)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(secret.encode() in command for command in commands), seen
    tiny.wait("secret", 240)
    run = run_dir(tiny, "secret")
    assert (
        stat.S_IMODE(run.environment.stat().st_mode) == 0o600
        and json.loads(run.environment.read_text())["SECRET_X"] == secret
    )
    places = [
        path
        for folder in (run.root, run.shared.resolve())
        for path in folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert places == [run.environment]
    for job in jobs:
        for question in ("--env-vars", "--batch-script"):
            assert secret not in tiny.cluster.run("sacct", "-j", f"{job}_0", question).stdout
        assert secret not in tiny.cluster.run("scontrol", "show", "job", f"{job}_0", check=False).stdout


def test_the_secret_reaches_the_ranks(place: Place) -> None:
    run = place.stand_in(("train", [["--print", "MY_TOKEN"]], CPU))
    plan = json.loads(run.plan.read_text())
    plan["env"] = {"MY_TOKEN": "${SECRET_X}"}
    run.plan.write_text(json.dumps(plan))
    run.environment.write_text(json.dumps({"SECRET_X": "hunter2"}))
    subprocess.run(["chown", "lab:lab", str(run.environment)], check=True)
    place.amlaunch("retry", "test-1")
    place.wait("test-1")
    assert "MY_TOKEN=hunter2" in run.element("train", "0").log(1, 0).read_text()


def test_cancel_and_go_on(place: Place) -> None:
    run = place.stand_in(("preprocess", [["--do", "steps"]] * 2, CPU), ("train", [[]], CPU), throttle=1)
    place.amlaunch("retry", "test-1")
    place.wait_until("test-1", lambda result: (element(result, "preprocess")["progress"].get("done") or 0) >= 2)
    waiting = element(place.status("test-1"), "preprocess", 1)
    assert waiting["state"] == "queued" and waiting["reason"] == "waiting for other elements of the stage (throttle)"
    output = place.amlaunch("cancel", "test-1", "--checkpoint").stdout
    assert "saving finished work, then stopping" in output and "preprocess 0: stopped" in output
    result = place.wait("test-1", code=75)
    assert states(result) == {"preprocess": ["stopped", "cancelled"], "train": ["cancelled"]} and not place.queued()
    saved = int((run.element("preprocess", "0").root / "saved0").read_text())
    place.amlaunch("retry", "test-1")
    place.wait_until("test-1", lambda result: (element(result, "preprocess")["progress"].get("done") or 0) > saved)
    place.amlaunch("cancel", "test-1")
    place.wait_until(
        "test-1", lambda result: result["state"] == "cancelled" or states(result)["preprocess"][0] == "stopped", 40
    )
    begun = len(attempts(run, "preprocess"))
    time.sleep(12)  # longer than a requeue takes
    assert not place.queued() and len(attempts(run, "preprocess")) == begun, "a cancelled job does not come back"
    steps = [int(line) for line in (run.element("preprocess", "0").root / "steps0").read_text().split()]
    assert steps == sorted(set(steps)), "no step was made twice"


def test_scancel_by_hand_is_final_too(place: Place) -> None:
    """Its ranks hear the same signal as preempted ones."""
    run = place.stand_in(("train", [["--do", "steps"]], CPU), ("export", [[]], CPU))
    place.amlaunch("retry", "test-1")
    result = place.wait_until("test-1", lambda result: (element(result, "train")["progress"].get("done") or 0) >= 2)
    place.cluster.run("scancel", element(result, "train")["job"])
    place.wait_until("test-1", lambda result: not place.queued(), 40)
    time.sleep(12)
    result = place.status("test-1")
    assert not place.queued() and len(attempts(run, "train")) == 1
    assert states(result)["train"][0] in ("stopped", "cancelled") and states(result)["export"] == ["cancelled"]


def test_resume_goes_on_with_more_steps(tiny: Place) -> None:
    words = ["--name", "more", "--step_scheduler.max_steps", "4", "--validation_dataset", "null", "--export", "null"]
    words += ["--resources.train.tasks_per_node", "1"]
    tiny.amlaunch("submit", "tiny.yaml", "--cluster", "lab", *words)
    tiny.wait("more", 120)
    refused = tiny.amlaunch("resume", "more", "--model.n_layer", "3", check=False)
    assert refused.returncode == 2 and "resume cannot change the model" in refused.stderr
    tiny.amlaunch("resume", "more", "--step_scheduler.max_steps", "6")
    result = tiny.wait("more", 120)
    run = run_dir(tiny, "more")
    assert states(result)["train"] == ["done"] and element(result, "train")["result"]["step"] == 6
    lines = [line["step"] for line in read_json_lines(run.element("train", "0").metrics) if "loss" in line]
    assert lines == [1, 2, 3, 4, 5, 6], "it went on from step 4"
    again = tiny.amlaunch("submit", "tiny.yaml", "--cluster", "lab", *words, "-v")
    assert "was resumed with" in again.stdout and "already done, skipped" in again.stdout


def test_status_is_one_squeue_and_at_most_one_sacct_for_all_terminals(place: Place) -> None:
    """Wrappers on the search path write down who was called, then call the real one."""
    tools = place.folder / "tools"
    tools.mkdir()
    for name in ("squeue", "sacct"):
        place.write(
            f"tools/{name}", f'#!/bin/sh\necho {name} >> {place.folder}/calls\nexec /usr/bin/{name} "$@"\n'
        ).chmod(0o755)
    env = {"PATH": f"{tools}:{place.cluster.python.parent}:/usr/bin:/bin"}
    (place.folder / "calls").touch()
    os.chmod(place.folder / "calls", 0o666)
    for name in ("one-1", "two-2"):
        place.stand_in(("preprocess", [[]] * 3, CPU), ("train", [["--do", "fail"]], CPU), name=name)
        place.amlaunch("retry", name)
        place.wait(name, code=1)
    for path in (place.folder / "cache").rglob("*.json"):
        path.unlink()
    for _ in range(3):
        place.amlaunch("status", **env)
        place.amlaunch("status", "one-1", "--json", **env)
    assert (place.folder / "calls").read_text().split() == ["squeue"], (
        "nothing to ask accounting about: the driver left its word"
    )


def test_status_without_slurm_says_what_it_knows(place: Place) -> None:
    place.stand_in(("preprocess", [[]], CPU), ("train", [["--do", "steps"]], CPU))
    place.amlaunch("retry", "test-1")
    place.wait_until("test-1", lambda result: (element(result, "train")["progress"].get("done") or 0) >= 1)
    bare = place.folder / "bare"
    bare.mkdir()
    result = place.amlaunch("status", "test-1", "--json", PATH=str(bare), XDG_CACHE_HOME=str(bare))
    lost = element(json.loads(result.stdout)[0], "train")
    assert (
        lost["state"] == "unknown" and "last sign of life" in lost["reason"] and "squeue: not found" in lost["reason"]
    )
    assert states(json.loads(result.stdout)[0])["preprocess"] == ["done"], "markers need no Slurm"


def test_a_vanished_job_is_explained_by_accounting(place: Place) -> None:
    """Killed by Slurm before the driver could say anything: squeue's or sacct's word for it."""
    run = place.stand_in(("train", [["--do", "hang"]], CPU))
    place.amlaunch("retry", "test-1")
    place.wait_until("test-1", lambda result: element(result, "train")["attempts"])
    place.cluster.on("cpu1", "kill", "-9", str(attempts(run, "train")[0]["pid"]))
    result = place.wait_until("test-1", lambda result: element(result, "train")["state"] not in ("running", "queued"))
    assert (
        element(result, "train")["state"] == "failed"
        and "before its driver recorded a result" in element(result, "train")["reason"]
    )


def test_an_environment_that_nodes_do_not_have(place: Place) -> None:
    place.stand_in(("train", [[]], CPU), python="/nowhere/python3")
    place.amlaunch("retry", "test-1")
    place.wait("test-1", code=1)
    shown = place.amlaunch("status", "test-1").stdout
    assert (
        "/nowhere/python3: No such file or directory" in shown and "Python or one of its packages is missing" in shown
    )
    assert "/nowhere/python3" in place.amlaunch("logs", "test-1").stdout


def test_clean_shows_first_and_removes_then(place: Place) -> None:
    run = place.stand_in(("train", [["--do", "sleep"]], CPU))
    place.amlaunch("retry", "test-1")
    refused = place.amlaunch("clean", "test-1", check=False)
    assert refused.returncode == 2 and "has running or pending jobs" in refused.stderr
    place.amlaunch("cancel", "test-1")
    place.wait_until("test-1", lambda result: result["state"] == "cancelled")
    assert "would remove" in place.amlaunch("clean", "test-1").stdout and run.root.exists()
    place.amlaunch("clean", "test-1", "--yes")
    assert not run.root.exists()


class TestRendezvous:
    def test_a_port_that_is_taken_is_replaced(self, place: Place) -> None:
        run = place.stand_in(("train", [["--do", "port"]], TWO_ON_GPU))
        place.amlaunch("retry", "test-1")
        place.wait("test-1")
        assert len(attempts(run, "train")) == 1, "another port is no new attempt"
        assert "EADDRINUSE" in run.element("train", "0").log(1, 0).read_text()

    def test_ports_of_two_jobs_on_one_node_differ(self, place: Place) -> None:
        run = place.stand_in(("train", [["--print", "MASTER_PORT", "--do", "linger"]] * 2, CPU))
        place.amlaunch("retry", "test-1")
        place.wait("test-1")
        ports = {
            line
            for name in "01"
            for line in run.element("train", name).log(1, 0).read_text().splitlines()
            if line.startswith("MASTER_PORT")
        }
        assert len(ports) == 2

    def test_over_an_interface_with_nothing_but_ipv6(self, tiny: Place) -> None:
        tiny.write("ipv6.yaml", CLUSTERS.replace("lab:\n", "lab:\n  interface: ib0\n"))
        words = [
            "--name",
            "ipv6",
            "--resources.train.tasks_per_node",
            "1",
            "--resources.train.gpus_per_node",
            "1",
            "--step_scheduler.max_steps",
            "2",
            "--validation_dataset",
            "null",
            "--export",
            "null",
        ]
        tiny.amlaunch("submit", "tiny.yaml", "--cluster", "ipv6.yaml", *ON_GPUS, "--resources.train.nodes", "2", *words)
        assert states(tiny.wait("ipv6", 120))["train"] == ["done"]
        tiny.write("none.yaml", CLUSTERS.replace("lab:\n", "lab:\n  interface: ib7\n"))
        words[1] = "none"
        tiny.amlaunch("submit", "tiny.yaml", "--cluster", "none.yaml", *ON_GPUS, "--resources.train.nodes", "2", *words)
        failed = element(tiny.wait("none", 60, code=1), "train")
        assert "has no interface 'ib7'" in failed["reason"] and "ib0" in failed["reason"]
