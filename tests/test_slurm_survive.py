"""Runs on a real Slurm cluster whose jobs, ranks and nodes are ended on purpose.

After each fault: every element is done exactly once or failed with its reason,
and no job is left behind.
"""

from __future__ import annotations

import json

import pytest
from slurm_cluster import Cluster
from slurm_runs import CPU, STEPS, TWO_ON_GPU, Place, at_step, attempts, element, states
from test_e2e import TINY, write_text

from amlaunch.launcher.specs.plan import Needs
from amlaunch.recipes.files import read_json_lines
from amlaunch.recipes.run_layout import RunDir

pytestmark = pytest.mark.slow

LAST = 24


@pytest.fixture
def place(cluster: Cluster) -> Place:
    return Place(cluster, "survive")


def steps_made(run: RunDir, stage: str, name: str = "0", rank: int = 0) -> list[int]:
    return [int(line) for line in (run.element(stage, name).root / f"steps{rank}").read_text().split()]


# --- the time limit, preemption, requeue


SLOW_MODEL = """\
import os, time, torch
class Slow(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Embedding(vocab, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, vocab))
    def forward(self, ids):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return self.inner(ids)
def build(vocab: int = 50304):
    return Slow(vocab)
"""


def test_a_time_limit_that_forces_requeues_ends_bitwise_as_if_there_were_none(cluster: Cluster) -> None:
    place = Place(cluster, "limit")
    place.env["TEXT"] = str(place.folder / "text")
    write_text(place.folder / "text")
    place.write("slow.py", SLOW_MODEL)
    recipe = TINY.split("model:")[0].replace("name: tiny", "name: limit") + (
        "model: {_target_: 'slow.py:build'}\ndataset: {seq_len: 16, shuffle_files: true}\nexport: null\n"
        "step_scheduler: {max_steps: 60, global_batch_size: 4, ckpt_every_steps: 30}\n"
        "resources: {train: {tasks_per_node: 2}}\n"
    )
    place.write("limit.yaml", recipe)
    # Slurm checks every half minute, and warns once less than signal_seconds and half a minute are left: an attempt has
    # a minute, and needs part of it to start.
    place.write("clusters.yaml", "lab: {signal_seconds: 30, mem: 3G, time: 2}\n")
    place.amlaunch(
        "submit", "limit.yaml", "--cluster", "lab", "--runs", "reference/runs", "--resources.train.time", "10", SLOW="0"
    )
    place.amlaunch("submit", "limit.yaml", "--cluster", "lab", SLOW="0.8")
    place.wait("limit", 600)
    place.amlaunch("wait", "limit", "--runs", "reference/runs", timeout=200)
    (disturbed,), (plain,) = (
        [RunDir(path) for path in (place.folder / runs).glob("limit-*")] for runs in ("runs", "reference/runs")
    )
    begun = attempts(disturbed, "train")
    assert len(begun) >= 2 and len(attempts(plain, "train")) == 1, "at least one requeue"
    assert {start["job"] for start in begun} == {begun[0]["job"]} and [start["restarts"] for start in begun] == list(
        range(len(begun))
    )
    ends = [line for line in read_json_lines(disturbed.element("train", "0").attempts) if line["event"] == "end"]
    assert all(end["reason"].startswith("the time limit is near") for end in ends[:-1])

    def losses(run: RunDir) -> list[tuple[int, str]]:
        return [
            (line["step"], line["loss"].hex())
            for line in read_json_lines(run.element("train", "0").metrics)
            if "loss" in line
        ]

    assert len(losses(plain)) == 60 and losses(disturbed) == losses(plain)
    saved = [sorted(path.name for path in run.checkpoints("0").glob("step-*"))[-1] for run in (disturbed, plain)]
    assert saved[0] == saved[1] == "step-00000060"


def test_preemption_with_the_users_signal(place: Place) -> None:
    """The site sends the job's own signal: the driver receives USR1, and the job returns after the other one's end."""
    run = place.stand_in(("train", [STEPS], TWO_ON_GPU), stages={"train": {"sbatch": {"nodelist": "gpu1"}}})
    _preempt(place, run, "gpu-low")


def test_preemption_without_the_users_signal(place: Place, cluster: Cluster) -> None:
    """TERM to the ranks alone: they save and stop, although nobody asked the driver."""
    run = place.stand_in(("train", [STEPS], TWO_ON_GPU), stages={"train": {"sbatch": {"nodelist": "gpu1"}}})
    with cluster.without("preempt_send_user_signal"):
        _preempt(place, run, "gpu-low")


def test_preemption_without_a_grace_time(place: Place) -> None:
    """All of the job is told to end at once, and has a few seconds for it; Slurm itself puts it back into the queue."""
    run = place.stand_in(("train", [STEPS], TWO_ON_GPU), stages={"train": {"sbatch": {"nodelist": "gpu1"}}})
    _preempt(place, run, "gpu-now")


def _preempt(place: Place, run: RunDir, partition: str) -> None:
    plan = json.loads(run.plan.read_text())
    plan["stages"][0]["partition"] = partition
    run.plan.write_text(json.dumps(plan))
    place.amlaunch("retry", "test-1")
    place.wait_until("test-1", lambda found: at_step(found, "train", 3))
    place.cluster.run(
        "sbatch", "-p", "gpu", "-w", "gpu1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 4", cwd=place.folder
    )
    place.wait_until("test-1", lambda found: element(found, "train")["state"] == "queued", 40)
    found = place.wait("test-1", 120)
    assert states(found)["train"] == ["done"] and len(attempts(run, "train")) == 2
    for rank in (0, 1):
        assert steps_made(run, "train", rank=rank) == list(range(1, LAST + 1)), "what was saved was not made again"


def test_scontrol_requeue_takes_one_element_of_an_array_alone(place: Place) -> None:
    run = place.stand_in(("train", [STEPS, STEPS], CPU))
    place.amlaunch("retry", "test-1")
    found = place.wait_until("test-1", lambda found: at_step(found, "train", 3) and at_step(found, "train", 3, 1))
    place.cluster.run("scontrol", "requeue", element(found, "train", 1)["job"])
    assert states(place.wait("test-1", 120)) == {"train": ["done", "done"]}
    assert [len(attempts(run, "train", name)) for name in "01"] == [1, 2]


# --- nodes, ranks, memory, silence


def test_a_node_that_crashes_in_training_and_another_in_preprocessing(place: Place, cluster: Cluster) -> None:
    """Two runs at once, because Slurm takes half a minute to miss a node."""
    makes = place.stand_in(("preprocess", [STEPS, []], CPU), ("train", [[]], CPU), name="makes-1")
    trains = place.stand_in(("train", [STEPS], TWO_ON_GPU), name="trains-1")
    for name in ("makes-1", "trains-1"):
        place.amlaunch("retry", name)
    nodes = [
        element(place.wait_until("makes-1", lambda found: at_step(found, "preprocess", 3)), "preprocess")["nodes"],
        element(place.wait_until("trains-1", lambda found: at_step(found, "train", 3)), "train")["nodes"],
    ]
    for node in nodes:
        cluster.crash(node)
    assert states(place.wait("makes-1", 150)) == {"preprocess": ["done", "done"], "train": ["done"]}
    assert states(place.wait("trains-1", 150)) == {"train": ["done"]}
    assert {start["host"] for start in attempts(makes, "preprocess")} == {"cpu1", "cpu2"} and len(
        attempts(makes, "preprocess", "1")
    ) == 1
    assert {start["host"] for start in attempts(trains, "train")} == {"gpu1", "gpu2"}, (
        "it went on on the node that is left"
    )
    for run, stage in ((makes, "preprocess"), (trains, "train")):
        assert steps_made(run, stage) == list(range(1, LAST + 1)), "what was saved was not made again"


def test_a_killed_rank_is_tried_again_where_it_was(place: Place, cluster: Cluster) -> None:
    run = place.stand_in(("train", [STEPS], TWO_ON_GPU))
    place.amlaunch("retry", "test-1")
    found = place.wait_until("test-1", lambda found: at_step(found, "train", 3))
    cluster.on(element(found, "train")["nodes"], "kill", "-9", (run.element("train", "0").root / "pid1").read_text())
    assert states(place.wait("test-1", 120)) == {"train": ["done"]}
    end = next(line for line in read_json_lines(run.element("train", "0").attempts) if line["event"] == "end")
    assert end["rank"] == 1 and end["again"] and "retried automatically (" in end["reason"], end


def test_ranks_that_hang_are_ended_and_tried_elsewhere_but_not_for_ever(place: Place) -> None:
    run = place.stand_in(("train", [["--do", "hang", "--rank", "1"]], Needs(1, 2, 2, 2, "400M", 5, hang_seconds=2.0)))
    place.amlaunch("retry", "test-1")
    failed = element(place.wait("test-1", 150, code=1), "train")
    assert "no sign of life for 2 s" in failed["reason"] and "no progress in 3 attempts" in failed["reason"]
    begun = attempts(run, "train")
    assert len(begun) == 4, "the first got as far as its heartbeat says, the others no further"
    assert begun[0]["host"] != begun[1]["host"], "the second try is on another node"


def test_an_error_of_the_network_is_tried_on_another_node(place: Place) -> None:
    run = place.stand_in(
        ("train", [["--do", "say", "--on", "gpu1", "--words", "ncclRemoteError: a remote process exited"]], TWO_ON_GPU)
    )
    place.amlaunch("retry", "test-1")
    assert states(place.wait("test-1", 90)) == {"train": ["done"]}
    assert [start["host"] for start in attempts(run, "train")] == ["gpu1", "gpu2"]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("OSError: [Errno 28] No space left on device", "amlaunch clean"),
        ("torch.OutOfMemoryError: CUDA out of memory", "local_batch_size"),
        ("ValueError: boom", "exited with code 1"),
    ],
)
def test_what_another_try_cannot_mend_is_not_tried(place: Place, words: str, hint: str) -> None:
    run = place.stand_in(("train", [["--do", "say", "--words", words]], CPU), ("export", [[]], CPU))
    place.amlaunch("retry", "test-1")
    found = place.wait("test-1", 60, code=1)
    assert hint in element(found, "train")["reason"] and len(attempts(run, "train")) == 1
    assert states(found)["export"] == ["cancelled"] and not attempts(run, "export"), (
        "a failed stage never lets its successor start"
    )


def test_more_memory_than_was_asked_for(place: Place) -> None:
    place.stand_in(("train", [["--do", "eat"]], CPU))
    place.amlaunch("retry", "test-1")
    failed = element(place.wait("test-1", 90, code=1), "train")
    assert failed["state"] == "failed" and "raise resources.train.mem" in failed["reason"], failed


def test_a_killed_slurmd_does_not_take_its_job_along(place: Place, cluster: Cluster) -> None:
    run = place.stand_in(("train", [STEPS], CPU))
    place.amlaunch("retry", "test-1")
    found = place.wait_until("test-1", lambda found: at_step(found, "train", 3))
    node = element(found, "train")["nodes"]
    cluster.kill_slurmd(node)
    assert states(place.wait("test-1", 120)) == {"train": ["done"]}
    assert steps_made(run, "train") == list(range(1, LAST + 1))
