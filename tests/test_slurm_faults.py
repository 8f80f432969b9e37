"""Runs on a real Slurm cluster whose daemons, sbatch and submitters fail: no work is repeated, no job left behind."""

from __future__ import annotations

import json
import random
import time

import pytest
from slurm_cluster import Cluster
from slurm_runs import CPU, STEPS, TWO_ON_GPU, Place, at_step, attempts, element, states

pytestmark = pytest.mark.slow


@pytest.fixture
def place(cluster: Cluster) -> Place:
    return Place(cluster, "faults")


def jobs_of(place: Place, name: str) -> list[str]:
    """Every array that Slurm has known of a run."""
    rows = place.cluster.run("squeue", "-h", "-t", "all", "-u", "lab", "-o", "%F|%j|%Z").stdout.splitlines()
    fields = [row.split("|") for row in rows]
    return sorted({job for job, title, folder in fields if title.startswith(name) and folder == str(place.folder)})


def test_the_controller_stops_for_a_while_and_status_stays_true(place: Place, cluster: Cluster) -> None:
    run = place.stand_in(("train", [STEPS], CPU), ("export", [[]], CPU))
    place.amlaunch("retry", "test-1")
    place.wait_until("test-1", lambda found: at_step(found, "train", 3))
    cluster.stop_ctld()
    for path in (place.folder / "cache").rglob("squeue-*.json"):
        path.unlink()
    asked = json.loads(place.amlaunch("status", "test-1", "--json").stdout)[0]
    trained = run.element("train", "0").done.exists()  # squeue takes nine seconds to give up
    assert element(asked, "train")["state"] in (("done",) if trained else ("unknown", "running"))
    assert element(asked, "export")["state"] in ("unknown", "queued")
    refused = place.amlaunch("retry", "test-1", check=False)
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr, (
        "nothing is submitted on a guess"
    )
    deadline = time.monotonic() + 40
    while not run.element("train", "0").done.exists():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    cluster.start_ctld()
    assert states(place.wait("test-1", 90)) == {"train": ["done"], "export": ["done"]}
    assert len(attempts(run, "train")) == 1


def test_without_accounting(place: Place, cluster: Cluster) -> None:
    run = place.stand_in(("train", [["--do", "once"]], CPU), ("export", [[]], CPU))
    cluster.stop_accounting()
    place.amlaunch("retry", "test-1")
    assert states(place.wait("test-1", 60, code=1)) == {"train": ["failed"], "export": ["cancelled"]}
    place.amlaunch("retry", "test-1")
    assert states(place.wait("test-1", 60)) == {"train": ["done"], "export": ["done"]}
    assert len(attempts(run, "train")) == 2


def wrapped(place: Place, body: str) -> dict[str, str]:
    """An environment in which ``sbatch`` is a script of ours around the real one, which still answers questions."""
    tools = place.folder / "tools"
    tools.mkdir(exist_ok=True)
    questions = '[[ " $* " =~ " --test-only "|" --help " ]] && exec /usr/bin/sbatch "$@"'
    place.write("tools/sbatch", f"#!/bin/bash\n{questions}\n{body}\n").chmod(0o755)
    return {"PATH": f"{tools}:{place.cluster.python.parent}:/usr/bin:/bin"}


def test_sbatch_that_times_out_after_it_was_accepted(place: Place) -> None:
    run = place.stand_in(("preprocess", [[], []], CPU), ("train", [[]], CPU))
    message = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    late = f'/usr/bin/sbatch "$@" >/dev/null; echo "{message}" >&2; exit 1'
    place.amlaunch("retry", "test-1", **wrapped(place, late))
    assert states(place.wait("test-1", 60)) == {"preprocess": ["done", "done"], "train": ["done"]}
    assert len(jobs_of(place, "test-1")) == 2 and [len(attempts(run, "preprocess", name)) for name in "01"] == [1, 1]


def test_sbatch_that_refuses_leaves_nothing(place: Place) -> None:
    place.stand_in(("preprocess", [[]], CPU), ("train", [[]], CPU))
    no = 'echo "sbatch: error: Batch job submission failed: Requested node configuration is not available" >&2; exit 1'
    found = place.amlaunch("retry", "test-1", check=False, **wrapped(place, no))
    assert found.returncode == 2 and "Requested node configuration is not available" in found.stderr
    assert not place.queued() and states(place.status("test-1")) == {"preprocess": ["pending"], "train": ["pending"]}
    place.amlaunch("retry", "test-1")
    place.wait("test-1")


def test_a_submitter_killed_at_any_moment_then_the_same_command(place: Place) -> None:
    """Ten runs, each submitter killed at another moment; some before, some between, some after sbatch."""
    chance = random.Random(4)
    slow = 'sleep 0.15; exec /usr/bin/sbatch "$@"'
    env = wrapped(place, slow)
    runs = {}
    for i in range(10):
        runs[f"kill-{i}"] = place.stand_in(("preprocess", [[], []], CPU), ("train", [[]], CPU), name=f"kill-{i}")
        submitter = place.start("retry", f"kill-{i}", **env)
        time.sleep(chance.uniform(0.2, 1.3))
        submitter.kill()
        submitter.wait()
        place.amlaunch("retry", f"kill-{i}")
    for name, run in runs.items():
        assert states(place.wait(name, 120)) == {"preprocess": ["done", "done"], "train": ["done"]}
        begun = [
            len(attempts(run, stage, element))
            for stage, element in (("preprocess", "0"), ("preprocess", "1"), ("train", "0"))
        ]
        assert begun == [1, 1, 1], (name, begun, jobs_of(place, name))
    assert not place.queued()


def test_two_submits_of_one_run_at_once(place: Place) -> None:
    run = place.stand_in(("preprocess", [[], []], CPU), ("train", [[]], CPU))
    both = [place.start("retry", "test-1", "--json") for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert sorted(len(answer["submitted"]) for answer in answers) == [0, 2]
    place.wait("test-1", 60)
    assert len(jobs_of(place, "test-1")) == 2 and [len(attempts(run, "preprocess", name)) for name in "01"] == [1, 1]


def test_an_array_larger_than_slurm_allows_is_cut(place: Place) -> None:
    place.stand_in(("preprocess", [[]] * 1100, CPU), ("train", [[]], CPU), throttle=1)
    made = json.loads(place.amlaunch("retry", "test-1", "--json").stdout)["submitted"]
    assert [(one["stage"], len(one["elements"])) for one in made] == [
        ("preprocess", 1001),
        ("preprocess", 99),
        ("train", 1),
    ]
    train = place.cluster.run("scontrol", "show", "job", f"{made[2]['job']}_0").stdout
    assert all(f"afterok:{one['job']}_*" in train for one in made[:2]), "it waits for both parts"
    found = place.status("test-1")
    assert len(states(found)["preprocess"]) == 1100 and "queued" in states(found)["preprocess"]
    place.amlaunch("cancel", "test-1")
    place.wait_until("test-1", lambda found: not place.queued(), 60)


def test_a_job_that_another_submit_replaced_does_nothing(place: Place) -> None:
    run = place.stand_in(("train", [[]], CPU))
    place.amlaunch("retry", "test-1")
    place.wait("test-1")
    folder = next(run.jobs.glob("001-*"))
    again = place.cluster.run(
        "sbatch", "--parsable", "--wait", folder / "script.sh", cwd=place.folder, env=place.env, check=False, timeout=60
    )
    assert again.returncode != 0 and len(attempts(run, "train")) == 1
    assert "records another job ID" in (folder / f"{again.stdout.strip()}_0.log").read_text()


def test_no_process_is_left_on_any_node(place: Place, cluster: Cluster) -> None:
    place.stand_in(("train", [["--do", "hang"]], TWO_ON_GPU))
    place.amlaunch("retry", "test-1")
    found = place.wait_until("test-1", lambda found: element(found, "train")["attempts"])
    node = element(found, "train")["nodes"]
    place.amlaunch("cancel", "test-1")
    place.wait_until("test-1", lambda found: not place.queued(), 60)
    deadline = time.monotonic() + 20
    while "stand_in" in cluster.on(node, "ps", "-eo", "args").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.5)
