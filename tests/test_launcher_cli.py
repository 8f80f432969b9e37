"""The command line as a user meets it: quick, light, and helpful when something is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amlaunch.launcher.__main__ import main
from amlaunch.launcher.cli import build_parser, split_overrides
from amlaunch.launcher.display.wording import count, duration
from amlaunch.launcher.planning.planner import Site, make_plan
from amlaunch.launcher.runs.snapshot import take_snapshot
from amlaunch.launcher.specs.plan import Plan
from amlaunch.launcher.submission.run_writer import redact
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import write_json
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.shipped import shipped_recipes

ROOT = Path(__file__).resolve().parent.parent


def amlaunch(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-E", "-m", "amlaunch", *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **env},
    )


@pytest.mark.slow
def test_start_is_light(tmp_path):
    """A login node has no torch, and a user has no patience. ``benchmarks/cli_start.py`` measures the time."""
    code = (
        "import sys\nfrom amlaunch.launcher.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'datasets', 'tiktoken', 'submitit', 'numpy', 'transformers', *LATE}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    late = {"rich", "yaml", "subprocess", "hashlib", "asyncio", "multiprocessing"}
    for words, more in (
        (["--help"], {*late, "dataclasses"}),
        (["status"], late),
        (["recipes"], set()),
        (["show", "quickstart"], set()),
    ):
        result = subprocess.run(
            [sys.executable, "-c", f"LATE = {more}\n{code}", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )
        assert "HEAVY []" in result.stdout, (words, result.stdout[-300:], result.stderr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local", "quikstart"], "did you mean 'quickstart'"),
        (["local", "quickstart", "--gpu", "1"], "unknown option --gpu; did you mean '--gpus'"),
        (["local", "quickstart", "--model.n_layr", "6"], "--model.n_layr=6: model.n_layr: unknown key"),
        (["local", "quickstart", "--model.n_layer"], "has no value"),
        (["local", "quickstart", "extra"], "unrecognized arguments: extra; see amlaunch local --help"),
        (["data", "peek", "a", "b"], "unrecognized arguments: b; see amlaunch data peek --help"),
        (
            ["local", "quickstart", "--stepscheduler.max_steps", "3"],
            "unknown option --stepscheduler.max_steps; did you mean '--step_scheduler.max_steps'?",
        ),
        (["resume", "x", "--modl.n_layer=3"], "unknown option --modl.n_layer; did you mean '--model.n_layer'?"),
        (
            ["local", "quickstart", "--sweep", "optimizer.l=1,2"],
            "error: --sweep optimizer.l=1,2: optimizer.l: unknown key of torch.optim.AdamW; did you mean 'lr'?",
        ),
        (["local", "quickstart", "--sweep", "seed=1,1"], "error: --sweep seed=1,1: 1 is listed twice"),
        (["local", "quickstart", "--stage", "trian"], "its stages: preprocess, verify, train, export"),
        (["local", "quickstart", "--gpus", "99"], "to train on the CPU, write --gpus 0"),
        (["local", "quickstart", "--step_scheduler.global_batch_size", "12"], "is not a multiple of 2 ranks"),
        (["local", "quickstart", "--stage", "train"], "needs stage verify, which is not done"),
        (["local", "quickstart", "--container.runtime", "dcker"], "unknown runtime 'dcker'; did you mean 'docker'?"),
        (["status", "nothing"], "no run 'nothing'"),
        (["logs", "nothing"], "start one: amlaunch local or submit"),
        (["clean", "", "--yes"], "the run name is empty"),
        (["clean", "--checkpoints"], "write amlaunch clean RUN --checkpoints"),
        (["frobnicate"], "unknown command 'frobnicate'; valid names: bench"),
        (["plot", "x"], "unknown command 'plot'; valid names: bench"),
        (["compare", "x", "y"], "unknown command 'compare'; valid names: bench"),
        (["statu"], "unknown command 'statu'; did you mean 'status'?"),
        (["data", "pek"], "unknown command 'data pek'; did you mean 'peek'?"),
        (["--runs", "x", "status"], "unknown option --runs; write options after the command: amlaunch COMMAND --runs"),
        (["submit", "quickstart", "-cluster", "lab"], "unknown option -cluster; did you mean '--cluster'?"),
        (["submit", "quickstart", "--clustr", "lab"], "unknown option --clustr; did you mean '--cluster'?"),
        (["submit", "quickstart", "--partition", "gpu"], "set stages.train.partition in clusters.yaml"),
        (["local", "quickstart", "--account=lab"], "unknown option --account; account belongs to the cluster profile"),
        (["local", "quickstart", "--mem", "4G"], "unknown option --mem; did you mean"),
        (["status", "--wach"], "unknown option --wach; did you mean '--watch'?"),
        (["status", "--model.n_layer", "6"], "unknown option --model.n_layer; valid names"),
        (["logs"], "the following arguments are required: run; see amlaunch logs --help"),
        (["logs", "x", "--rank", "one"], "argument --rank: invalid int value: 'one'"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["local", "quickstart", "--runs", "/dev/null/x"], "/dev/null"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    output = capsys.readouterr().err
    assert message in output and len(output.splitlines()) <= 2, output
    assert not (tmp_path / "runs").exists(), "nothing is written before the input is known to be good"


@pytest.mark.parametrize("words", [["status"], ["recipes"], ["show", "quickstart"]])
@pytest.mark.slow
def test_output_that_is_closed_full_or_of_another_time(tmp_path, words):
    """A pipe whose reader is gone, no stdout at all, a full disk, a terminal without our characters."""
    run = [sys.executable, "-m", "amlaunch", *words]
    write_json(
        tmp_path / "runs" / "tiny-1" / "plan.json",
        make_plan(load(shipped_recipes()["quickstart"]), Site(tmp_path / "runs", tmp_path, 0, 2)).to_json(),
    )
    progress = {"time": 1.0, "unit": "step", "done": 3, "total": 9, "loss": 2.5}
    write_json(tmp_path / "runs" / "tiny-1" / "stages" / "train" / "0" / "progress.json", progress)
    with open(tmp_path / "runs" / "tiny-1" / "stages" / "train" / "0" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        for after, code in (("| true", 141), (">&-", 0), ("> /dev/full", 1)):
            done = subprocess.run(
                ["bash", "-c", f'"$@" {after}; exit ${{PIPESTATUS[0]}}', "_", *run],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env=env,
            )
            assert "Traceback" not in done.stderr and (done.returncode == code or after == "| true"), (
                after,
                done,
            )  # which may have been there in time
        ascii_only = subprocess.run(run, capture_output=True, cwd=tmp_path, env={**env, "PYTHONIOENCODING": "ascii"})
        assert ascii_only.returncode == 0 and ascii_only.stdout.isascii()
        assert words != ["status"] or b"step 3/9 ? loss 2.5000" in ascii_only.stdout


def test_a_users_own_modules_do_not_take_our_place(tmp_path):
    for name in ("trainer", "launcher", "recipes", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    result = amlaunch("show", "quickstart", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_show_prints_a_recipe_that_loads_again(tmp_path):
    result = amlaunch("show", "quickstart", "--optimizer.lr", "2e-3", "--json", cwd=tmp_path)
    shown = json.loads(result.stdout)
    assert shown["recipe"]["optimizer"]["lr"] == 2e-3
    assert [stage["name"] for stage in shown["plan"]["stages"]] == ["preprocess", "verify", "train", "export"]
    assert not list(tmp_path.iterdir()), "show writes nothing"


def test_overrides_are_told_from_arguments():
    parser = build_parser(["local"]).commands["local"]
    words = ["--model.n_layer", "6", "nanogpt", "--gpus", "2", "--seed=3", "--json", "--optimizer.betas.0", "-1"]
    assert split_overrides(parser, words) == (
        ["nanogpt", "--gpus", "2", "--json"],
        ["--model.n_layer", "6", "--seed=3", "--optimizer.betas.0", "-1"],
    )


class TestPlan:
    def site(self, tmp_path, **more):
        return Site(**{"runs": tmp_path / "runs", "cwd": tmp_path, "gpus": 0, "cpus": 4, **more})

    def test_it_survives_json(self, tmp_path):
        plan = make_plan(load(shipped_recipes()["quickstart"]), self.site(tmp_path))
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan

    def test_a_sweep_is_an_array_that_shares_its_data(self, tmp_path):
        loaded = load(shipped_recipes()["quickstart"], ["--sweep", "{optimizer.lr: [1e-3, 3e-3], seed: [1, 2]}"])
        plan = make_plan(loaded, self.site(tmp_path))
        assert [len(stage.elements) for stage in plan.stages] == [2, 1, 4, 4]
        assert plan.stage("train").elements[1].arguments[-4:-2] == ["--optimizer.lr=0.001", "--seed=2"]
        alone = make_plan(load(shipped_recipes()["quickstart"], ["--seed=5"]), self.site(tmp_path))
        assert alone.data == plan.data and alone.run_id != plan.run_id

    def test_gpus_are_used_as_far_as_the_batch_divides(self, tmp_path):
        loaded = load(shipped_recipes()["quickstart"], ["--resources.train.gpus_per_node", "null"])
        assert make_plan(loaded, self.site(tmp_path, gpus=8)).stage("train").needs.tasks_per_node == 2
        nanogpt = load(shipped_recipes()["nanogpt"])
        assert make_plan(nanogpt, self.site(tmp_path, gpus=8, requested_gpus=8)).stage("train").needs.gpus_per_node == 8
        assert make_plan(nanogpt, self.site(tmp_path)).stage("train").needs.tasks_per_node == 1

    def test_what_does_not_fit_the_site(self, tmp_path):
        with pytest.raises(BadInput, match=r"nodes is 4, but amlaunch local uses only 1"):
            make_plan(load(shipped_recipes()["llama-1.3b"]), self.site(tmp_path, gpus=8))
        with pytest.raises(BadInput, match="dp_size is 3"):
            make_plan(load(shipped_recipes()["quickstart"], ["--distributed.dp_size=3"]), self.site(tmp_path))
        with pytest.raises(BadInput, match="strategy none"):
            make_plan(load(shipped_recipes()["quickstart"], ["--distributed.strategy=none"]), self.site(tmp_path))


class TestSnapshot:
    def test_it_holds_our_packages_and_the_recipes_own_code(self, tmp_path):
        user = tmp_path / "user"
        (user / "lib").mkdir(parents=True)
        (user / "my.py").write_text("x = 1\n")
        (user / "lib" / "more.py").write_text("y = 2\n")
        (user / ".venv").mkdir()
        (user / ".venv" / "no.py").write_text("z = 3\n")
        take_snapshot(tmp_path / "code", user)
        names = {str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*.py")}
        assert {
            "recipe/my.py",
            "recipe/lib/more.py",
            "amlaunch/__init__.py",
            "amlaunch/trainer/__main__.py",
            "amlaunch/launcher/runs/snapshot.py",
        } <= names
        assert "recipe/.venv/no.py" not in names
        before = (tmp_path / "code").stat().st_ino
        take_snapshot(tmp_path / "code", user)
        assert (tmp_path / "code").stat().st_ino == before, "the same code is not copied again"
        (user / "my.py").write_text("x = 2\n")
        take_snapshot(tmp_path / "code", user)
        assert (tmp_path / "code" / "recipe" / "my.py").read_text() == "x = 2\n"

    def test_a_folder_that_is_not_just_a_recipes_is_refused(self, tmp_path):
        user = tmp_path / "user"
        user.mkdir()
        for i in range(501):
            (user / f"m{i}.py").write_text("")
        with pytest.raises(BadInput, match="into their own folder"):
            take_snapshot(tmp_path / "code", user)


def test_a_command_line_is_stored_without_its_secrets():
    shown = redact(["amlaunch", "local", "--wandb.api_key=abc", "--hf_token", "xyz", "--preprocess.max_tokens", "5M"])
    assert shown == ["amlaunch", "local", "--wandb.api_key=***", "--hf_token", "***", "--preprocess.max_tokens", "5M"]


def test_words_for_numbers():
    assert [duration(s) for s in (4.23, 185, 8049)] == ["4.2 s", "3:05", "2:14:09"]
    assert [count(n) for n in (512, 1250, 2e6, 1.5e9)] == ["512", "1.25K", "2.00M", "1.50B"]
