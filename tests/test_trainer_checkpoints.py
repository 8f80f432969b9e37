"""Checkpoints under faults: killed processes, damaged files, full disks."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_trainer_runs import OWN_MODEL, TIGHT, make, on_cpu, same_bits, same_weights, weights
from trainer_runs import Run, environment, killed_at, recipe

from amlaunch.recipes.checkpoint_folders import expired_checkpoints
from amlaunch.recipes.errors import BAD_INPUT, FAILED, OK, RESUMABLE, BadInput
from amlaunch.recipes.files import read_json_lines
from amlaunch.recipes.format.loader import load
from amlaunch.trainer.checkpoints import checkpoint, saver
from amlaunch.trainer.loop.job import build_model
from amlaunch.trainer.metrics.full_disk import MetricsFile

pytestmark = pytest.mark.slow  # real runs, each with processes of its own

__all__ = ["on_cpu"]  # an autouse fixture
SHORT: dict[str, Any] = {
    "model": {"dropout": 0.2},
    "step_scheduler": {"max_steps": 6, "ckpt_every_steps": 2, "val_every_steps": 3, "val_batches": 1},
    "lr_scheduler": {"lr_decay_steps": 6},
    "checkpoint": {"max_recent_checkpoints": 1, "keep_best": False},
}


def steps_of(run: Run) -> list[int]:
    return [checkpoint.step_of(folder) for folder in reversed(checkpoint.list_checkpoints(run.checkpoints))]


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """Provide a folder in memory if possible, because dozens of runs save in it."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def test_killed_in_every_phase_of_a_save_it_goes_on_and_ends_the_same(in_memory: Path) -> None:
    tmp_path = in_memory
    straight, watched = make(tmp_path, "straight", **SHORT), make(tmp_path, "watched", **SHORT)
    assert straight.train_inline() == OK
    watched.start(prepare={0: functools.partial(killed_at, None, 4, str(tmp_path / "phases"))})
    assert watched.wait()[0] == [OK]
    phases = (tmp_path / "phases").read_text().splitlines()
    phases = phases[: next(i for i, phase in enumerate(phases) if "00000006" in phase)]  # of the save of step 4 alone
    first = sorted({phase: phases.index(phase) for phase in reversed(phases)}.values())
    assert len(first) > 15 and "os.rename step-00000004.tmp" in phases, phases
    runs = [make(tmp_path, f"killed{number}", **SHORT) for number in first]
    for batch in (
        runs[i : i + 4] for i in range(0, len(runs), 4)
    ):  # a few at once: they wait for processes more than they compute
        for run in batch:
            run.start(prepare={0: functools.partial(killed_at, int(run.folder.name.removeprefix("killed")), 4)})
        assert [run.wait()[0] for run in batch] == [[-signal.SIGKILL]] * len(batch)
        assert {checkpoint.select_checkpoint(run.checkpoints).step for run in batch} <= {2, 4}
        for run in batch:
            run.start()
        assert [run.wait()[0] for run in batch] == [[OK]] * len(batch)
    for number, killed in zip(first, runs, strict=True):
        same_bits(straight, killed)
        assert sorted(path.name for path in killed.checkpoints.iterdir()) == ["latest", "lock", "step-00000006"], (
            phases[number]
        )


@pytest.mark.torch_range
@pytest.mark.parametrize("form", ["torch_save", "safetensors"])
def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before_and_both_go_on(tmp_path: Path, form: str) -> None:
    sections = {**SHORT, "checkpoint": {**SHORT.get("checkpoint", {}), "model_save_format": form}}
    straight, killed = make(tmp_path, "straight", **sections), make(tmp_path, "killed", **sections)
    straight.train(2)
    killed.start(2, prepare={1: functools.partial(killed_at, 3, 4)})
    codes, output = killed.wait()
    assert codes[1] == -signal.SIGKILL and codes[0] in (FAILED, -signal.SIGABRT), output
    assert 4 not in steps_of(killed)
    killed.train(2)
    same_bits(straight, killed)


HARMED: dict[str, Any] = {"step_scheduler": {"ckpt_every_steps": 4}, "lr_scheduler": {"lr_decay_steps": 20}}


@pytest.fixture(scope="module")
def straight_and_half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run of 20 steps, and one that ended after 12 with checkpoints after 8 and 12."""
    folder = tmp_path_factory.mktemp("harmed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLAUNCH_DEVICE", "cpu")
        straight, half = make(folder, "straight", **HARMED), make(folder, "half", **HARMED)
        assert straight.train_inline() == OK
        assert half.train_inline("--step_scheduler.max_steps", "12") == OK
    return straight, half


def copy_of(run: Run, folder: Path) -> Run:
    shutil.copytree(run.folder, folder)
    return Run(folder, run.tree)


def damage(path: Path, harm: str) -> None:
    content = path.read_bytes()
    if harm == "delete":
        path.unlink()
    elif harm == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = max(0, len(content) // 2 - 32)
        path.write_bytes(
            content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 64]) + content[middle + 64 :]
        )


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_falls_back_on_all_ranks_and_ends_the_same(
    straight_and_half: tuple[Run, Run], tmp_path: Path, ranks: int
) -> None:
    straight, half = straight_and_half
    harmed = copy_of(half, tmp_path / "harmed")
    damage(checkpoint.checkpoint_folder(harmed.checkpoints, 12) / "__0_0.distcp", "flip")
    (harmed.checkpoints / "step-00000016.tmp").mkdir()
    output = harmed.train(ranks)
    assert output.count("step-00000012 is damaged (__0_0.distcp: checksum mismatch)") == 1
    assert "resuming after step 8" in output
    if ranks == 1:
        assert [line["loss"] for line in harmed.lines() if "loss" in line] == straight.column("loss")
        assert same_weights(straight, harmed)
    assert np.abs(np.array(harmed.column("loss")) / straight.column("loss") - 1).max() < TIGHT
    assert sorted(path.name for path in harmed.checkpoints.iterdir()) == [
        "best",
        "latest",
        "lock",
        "step-00000016",
        "step-00000020",
    ]
    assert (harmed.checkpoints / "latest").read_text() == "step-00000020\n"


def test_where_all_are_damaged_it_begins_anew(
    straight_and_half: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, half = straight_and_half
    harmed = copy_of(half, tmp_path / "harmed")
    for folder in checkpoint.list_checkpoints(harmed.checkpoints):
        damage(folder / "meta.json", "flip")
    assert harmed.train_inline("--step_scheduler.max_steps", "2", "--checkpoint.restore_from", "latest") == BAD_INPUT
    assert "no intact checkpoint" in capsys.readouterr().err
    assert harmed.train_inline("--step_scheduler.max_steps", "2") == OK
    assert "; starting at step 1" in capsys.readouterr().out
    assert harmed.column("loss")[:2] == straight.column("loss")[:2]


@pytest.fixture(scope="module")
def in_safetensors(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with safetensors and a consolidated folder in its two checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLAUNCH_DEVICE", "cpu")
        section = {"model_save_format": "safetensors", "save_consolidated": True}
        run = make(
            tmp_path_factory.mktemp("formats"),
            "both",
            **{**SHORT, "model": {}, "checkpoint": section},
            distributed={"dtype": "float32"},
        )
        assert run.train_inline() == OK
    return run


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete"])
def test_every_file_of_a_checkpoint_is_verified_and_named(
    in_safetensors: Run, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(in_safetensors, tmp_path / "copy")
    newest, before = checkpoint.list_checkpoints(run.checkpoints)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(files) >= 8
    for path in files:
        content = path.read_bytes()
        damage(path, harm)
        assert checkpoint.select_checkpoint(run.checkpoints).folder == before, path
        output = capsys.readouterr().out
        assert f"{newest} is damaged" in output and path.name in output
        path.write_bytes(content)
    assert checkpoint.select_checkpoint(run.checkpoints).folder == newest


@pytest.mark.torch_range
def test_safetensors_hold_the_same_weights_and_either_format_goes_on_from_the_other(
    in_safetensors: Run, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    plain = make(tmp_path, "plain", **{**SHORT, "model": {}}, distributed={"dtype": "float32"})
    assert plain.train_inline() == OK
    same_bits(plain, in_safetensors)
    crossed = make(tmp_path, "crossed", **{**SHORT, "model": {}, "checkpoint": {}}, distributed={"dtype": "float32"})
    for last, form in ((2, "safetensors"), (4, "torch_save"), (6, "safetensors")):
        assert (
            crossed.train_inline(
                "--step_scheduler.max_steps",
                str(last),
                "--checkpoint.model_save_format",
                form,
                "--validation_dataset",
                "null",
            )
            == OK
        )
    assert crossed.column("loss") == plain.column("loss") and same_weights(plain, crossed)
    loaded = load(plain.folder / "recipe.yaml")
    ours = build_model(loaded.recipe, loaded.policy).eval()
    checkpoint.load_weights(checkpoint.select_checkpoint(plain.checkpoints), ours)
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint.checkpoint_folder(in_safetensors.checkpoints, 6) / "consolidated"
    ).eval()
    ids = torch.randint(97, (2, 16))
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-6


def test_what_is_saved_is_the_step_that_was_saved_however_late_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = make(tmp_path, "four", step_scheduler={"max_steps": 4}, lr_scheduler=None, checkpoint={"is_async": False})
    assert four.train_inline() == OK
    late = make(tmp_path, "late", step_scheduler={"max_steps": 8, "ckpt_every_steps": 4}, lr_scheduler=None)
    save = dcp.save

    def later(*arguments: Any, **keywords: Any) -> Any:
        deadline = time.monotonic() + 10
        while not any(step == 7 for step in late.column("step")) and time.monotonic() < deadline:
            time.sleep(0.01)
        return save(*arguments, **keywords)

    monkeypatch.setattr(dcp, "save", later)
    assert late.train_inline() == OK
    monkeypatch.undo()
    shutil.rmtree(checkpoint.checkpoint_folder(late.checkpoints, 8))
    assert same_weights(four, late)
    assert four.column("loss") == late.column("loss")[:4]


def test_the_newest_the_best_and_every_so_many_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = {"step_scheduler": {"max_steps": 10, "ckpt_every_steps": 1, "val_every_steps": 2}, "lr_scheduler": None}
    run = make(
        tmp_path, **sections, checkpoint={"max_recent_checkpoints": 2, "keep_every_steps": 4}, optimizer={"lr": 0.5}
    )
    assert run.train_inline() == OK
    losses = {line["step"]: line["val_loss"] for line in run.lines() if "val_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert steps_of(run) == sorted({9, 10, 4, 8, best})
    assert (run.checkpoints / "best").read_text() == f"step-{best:08d}\n"
    assert checkpoint.select_checkpoint(run.checkpoints, best=True).step == best
    assert checkpoint.select_checkpoint(run.checkpoints, step=4).step == 4
    with pytest.raises(BadInput, match=r"no checkpoint of step 5. Available steps: 10, 9, 8"):
        checkpoint.select_checkpoint(run.checkpoints, step=5)
    section = load(run.folder / "recipe.yaml", ["--checkpoint.keep_best", "false"]).recipe.checkpoint
    assert checkpoint.checkpoint_folder(run.checkpoints, best) in expired_checkpoints(
        run.checkpoints, section
    ) or best in (4, 8, 9, 10)


def test_a_run_goes_back_to_its_best_once_and_then_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = {
        "step_scheduler": {"max_steps": 8, "ckpt_every_steps": 2, "val_every_steps": 2},
        "lr_scheduler": None,
        "optimizer": {"lr": 0.3},
    }
    run = make(tmp_path, **sections, checkpoint={"max_recent_checkpoints": 9})
    assert run.train_inline() == OK
    losses = {line["step"]: line["val_loss"] for line in run.lines() if "val_loss" in line}
    best = min((2, 4, 6), key=lambda step: losses[step])
    shutil.rmtree(checkpoint.checkpoint_folder(run.checkpoints, 8))
    back = ("--checkpoint.restore_from", "best", "--optimizer.lr", "1e-3")
    assert run.train_inline(*back, "--step_scheduler.max_steps", str(best + 2)) == OK
    assert f"resuming after step {best}" in capsys.readouterr().out
    assert steps_of(run)[-1] == best + 2
    assert run.train_inline(*back) == OK
    assert f"resuming after step {best + 2}" in capsys.readouterr().out, "not back to the best again"
    assert [path.name for path in run.checkpoints.glob("*.replaced")] == []


def test_a_run_begins_from_another_ones_checkpoint(
    straight_and_half: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, half = straight_and_half
    other = Run(tmp_path / "other", half.tree)
    (other.folder / "stop").touch()
    overrides = ("--checkpoint.restore_from", str(half.checkpoints / "step-00000008"))
    assert other.train_inline(*overrides) == RESUMABLE
    assert steps_of(other) == [8], "stopped at once, it saves what it began from"
    (other.folder / "stop").unlink()
    assert other.train_inline(*overrides) == OK
    assert other.column("loss") == straight.column("loss")[8:]
    assert same_weights(straight, other)
    for restore_from, message in (
        (str(tmp_path), f"no intact checkpoint at {tmp_path}"),
        ("bst", "Set it to auto, latest, best, or"),
        ("best", "has no validated checkpoint"),
    ):
        fresh = Run(tmp_path / f"fresh-{len(restore_from)}", half.tree)
        assert fresh.train_inline("--checkpoint.restore_from", restore_from) == BAD_INPUT
        assert message in capsys.readouterr().err
    refused = make(tmp_path, "refused", **HARMED, model={"n_layer": 1})
    assert refused.train_inline(*overrides) == BAD_INPUT
    assert "its model differs (n_layer: 2 in the checkpoint, 1 in the recipe)" in capsys.readouterr().err


def test_a_validation_that_is_made_up_for_marks_its_step_as_the_best(tmp_path: Path) -> None:
    run = make(
        tmp_path,
        step_scheduler={"max_steps": 6, "ckpt_every_steps": 2, "val_every_steps": 2},
        checkpoint={"max_recent_checkpoints": 1},
    )
    assert run.train_inline("--step_scheduler.max_steps", "2", "--validation_dataset", "null") == OK
    assert checkpoint.list_by_validation_loss(run.checkpoints) == []
    assert run.train_inline("--optimizer.lr", "30") == OK  # from here on it gets worse
    assert min(run.column("val_loss")) == run.column("val_loss")[0]
    assert (run.checkpoints / "best").read_text() == "step-00000002\n" and steps_of(run) == [2, 6]
    assert checkpoint.select_checkpoint(run.checkpoints, best=True).step == 2, "and it is whole as it was"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk_is_said_and_training_goes_on_and_saves_once_there_is_room(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, step_scheduler={"max_steps": 8, "ckpt_every_steps": 2}, validation_dataset=None)
    run.checkpoints.symlink_to(small_disk)
    assert run.train_inline("--step_scheduler.max_steps", "2") == OK
    saved_step = checkpoint.select_checkpoint(small_disk).step
    ballast = small_disk / "ballast"
    free_bytes = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(free_bytes - 16384))
    assert run.train_inline() == FAILED
    output, errors = capsys.readouterr()
    assert run.column("step")[-1] == 8, "to the end, though nothing could be saved"
    assert "No space left on device" in output and "the checkpoint of step 2 is intact; training continues" in output
    assert "cannot write the checkpoint of step 8" in errors and "Traceback" not in output + errors
    assert saved_step == checkpoint.select_checkpoint(small_disk).step == 2 and not list(small_disk.glob("*.tmp"))
    ballast.unlink()
    assert run.train_inline() == OK and steps_of(run) == [6, 8]


def test_lines_of_metrics_wait_while_the_disk_is_full(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = MetricsFile(small_disk / "metrics.jsonl")
    file.append({"step": 1})
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as handle:
        while handle.write(bytes(4096)):
            pass
    block = "x" * 3000  # the first line has room for a part of one more
    for step in (2, 3, 4):
        file.append({"step": step, "block": block})
    assert len(file.waiting) >= 2
    ballast.unlink()
    file.append({"step": 5})
    assert [line["step"] for line in read_json_lines(file.path)] == [1, 2, 3, 4, 5] and not file.waiting
    first, second = capsys.readouterr().out.splitlines()
    assert "(No space left on device); its lines wait in memory, and training continues" in first
    assert "can be written again, and has all its lines" in second


def test_a_log_and_metrics_without_room_do_not_end_a_run(small_disk: Path, tmp_path: Path) -> None:
    """Only its result, at the very end, needs room."""
    run = make(tmp_path, step_scheduler={"max_steps": 40, "ckpt_every_steps": 20}, validation_dataset=None)
    command = [*run.arguments("amlaunch.trainer"), "--element", str(small_disk)]
    ballast = small_disk / "ballast"
    free_bytes = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(free_bytes - 12288))
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, stdout=full, stderr=full, env=environment(1))
    assert process.returncode == FAILED
    assert checkpoint.select_checkpoint(run.checkpoints).step == 40
    steps = [line["step"] for line in read_json_lines(small_disk / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1)) and 1 < steps[-1] < 40
    ballast.unlink()
    assert subprocess.run(command, env=environment(1)).returncode == OK
    assert (small_disk / "result.json").exists()


@pytest.mark.parametrize("unreadable", [1, 2], ids=["newest", "all"])
def test_a_checkpoint_that_cannot_be_read(
    straight_and_half: tuple[Run, Run], tmp_path: Path, unreadable: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading a process' memory at 0 is an input/output error. Where no other is left, nothing starts from scratch."""
    _, half = straight_and_half
    run = copy_of(half, tmp_path / "unreadable")
    folders = checkpoint.list_checkpoints(run.checkpoints)
    for folder in folders[:unreadable]:
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").symlink_to("/proc/self/mem")
    result = run.train_inline()
    output, errors = capsys.readouterr()
    assert "step-00000012 is damaged (manifest.json cannot be read: Input/output error)" in output
    if unreadable == 1:
        assert result == OK and "resuming after step 8" in output
    else:
        assert result == FAILED and checkpoint.list_checkpoints(run.checkpoints) == folders, "nothing is set aside"
        assert "Input/output error. Starting from scratch would lose its work" in errors


def test_a_full_disk_in_the_middle_is_said_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, step_scheduler={"max_steps": 8, "ckpt_every_steps": 2}, validation_dataset=None)
    assert run.train_inline("--step_scheduler.max_steps", "2") == OK
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, before[1])
    )  # Python ignores SIGXFSZ: a write fails, as on a full disk
    try:
        assert run.train_inline() == FAILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output, errors = capsys.readouterr()
    assert run.column("step")[-1] == 8, "to the end, though nothing could be saved"
    assert "warning: " in output and "cannot write the checkpoint of step 4 (rank 0: " in output
    assert "File too large" in output and "the checkpoint of step 2 is intact; training continues" in output
    assert "cannot write the checkpoint of step 8" in errors and "Traceback" not in output + errors
    assert [path.name for path in run.checkpoints.iterdir() if path.is_dir()] == ["step-00000002"]
    assert run.train_inline() == OK and steps_of(run) == [6, 8]


def without_safetensors_options() -> None:
    """Take from torch the options of its safetensors writer, as before 2.8."""

    class Writer:
        def __init__(self, path: str):
            pass

    dcp.HuggingFaceStorageWriter = Writer


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_format_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path, ranks: int) -> None:
    run = make(tmp_path, checkpoint={"model_save_format": "safetensors"})
    run.start(ranks, prepare=dict.fromkeys(range(ranks), without_safetensors_options))
    codes, output = run.wait()
    assert codes == [BAD_INPUT] * ranks, output
    assert output.count("set it to torch_save") == 1 and "Traceback" not in output and run.lines() == []
    assert not list(run.checkpoints.glob("step-*"))


def unable_to_list_files(error: Exception) -> None:
    """Let this rank fail after it has written its files."""

    def fail(*_: Any) -> Any:
        raise error

    saver._entries_of_rank = fail


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_for_good_on_one_rank_ends_the_run_at_once(tmp_path: Path, asynchronous: bool) -> None:
    steps = {"max_steps": 40, "ckpt_every_steps": 2, "val_every_steps": None}
    run = make(tmp_path, step_scheduler=steps, checkpoint={"is_async": asynchronous})
    run.start(2, prepare={1: functools.partial(unable_to_list_files, TypeError("an unexpected keyword"))})
    codes, output = run.wait()
    assert codes == [BAD_INPUT] * 2, output
    assert "cannot write the checkpoint of step 2 (rank 1: TypeError: an unexpected keyword)" in output
    assert output.count("every later save would fail") == 1 and "training continues" not in output
    assert asynchronous or run.column("step")[-1] == 2
    assert not list(run.checkpoints.glob("step-*"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a peer is gone")])
def test_a_save_that_fails_and_may_succeed_later_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    run = make(tmp_path, step_scheduler={"max_steps": 6, "ckpt_every_steps": 2}, validation_dataset=None)
    real = saver._entries_of_rank

    def fail_once(folder: Path, rank: int) -> Any:
        if folder.name.startswith("step-00000002"):
            raise error
        return real(folder, rank)

    monkeypatch.setattr(saver, "_entries_of_rank", fail_once)
    assert run.train_inline("--checkpoint.is_async", "false") == OK
    assert "cannot write the checkpoint of step 2" in capsys.readouterr().out and steps_of(run) == [4, 6]


EXPORT = """
    def hf_export(self, tensors, vocab_size):
        if self.fails == "for good":
            raise AttributeError("no such layer")
        raise OSError(28, "No space left on device")
"""


@pytest.mark.parametrize("fails", ["for good", "for now"])
def test_a_failed_consolidation_loses_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    tree = recipe(tmp_path, step_scheduler={"max_steps": 6, "ckpt_every_steps": 2}, validation_dataset=None)
    tree["model"] = {"_target_": "own.py:Own", "vocab": 97, "fails": fails}
    tree["checkpoint"] = {"save_consolidated": True, "is_async": False}
    run = Run(tmp_path / "own", tree)
    model = OWN_MODEL.replace("token: str", "fails: str").replace(
        "__init__()", "__init__()\n        self.fails = fails"
    )
    (run.folder / "own.py").write_text(model + EXPORT)
    code = run.train_inline()
    output, errors = capsys.readouterr()
    assert "Traceback" not in output + errors
    if fails == "for good":
        assert code == BAD_INPUT and run.column("step")[-1:] == [2], errors
        assert "no such layer" in errors and "checkpoint.save_consolidated: false" in errors
    else:
        assert code == FAILED and run.column("step")[-1] == 6, errors
        assert "No space left on device" in output and "step 2 is saved, but not its consolidated folder" in output
        assert "step 6 is saved, but not its consolidated folder" in errors
    newest = checkpoint.select_checkpoint(run.checkpoints)
    assert newest.step == run.column("step")[-1] and not list(newest.folder.glob("*consolidated*"))
    assert run.train_inline("--checkpoint.save_consolidated", "false") == OK
    assert steps_of(run)[-1] == 6 and len(run.column("step")) == 6, "it went on from there"


def as_nobody() -> None:
    """Become another user, because root may write anywhere; first read what only root can read."""
    sysconfig.get_config_vars()
    os.setegid(65534)
    os.seteuid(65534)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_that_cannot_be_written_is_said_before_the_first_step() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        run = make(folder)
        run.checkpoints.mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        run.checkpoints.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        run.start(2, prepare={0: as_nobody, 1: as_nobody})
        codes, output = run.wait()
        assert codes == [BAD_INPUT] * 2, output
        assert output.count("checkpoints cannot be written here (Permission denied)") == 1 and run.lines() == []
    finally:
        shutil.rmtree(folder)


def test_a_file_in_the_folders_place_is_said_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    run.checkpoints.write_text("")
    assert run.train_inline() == BAD_INPUT
    assert "checkpoints cannot be written here (File exists)" in capsys.readouterr().err


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make(tmp_path, step_scheduler={"max_steps": 100_000})
    first.start()
    try:
        first.until_step(1)
        second = Run(tmp_path / "second", first.tree)
        assert (
            second.train_inline("--checkpoint.checkpoint_dir", "x", "--checkpoints", str(first.checkpoints))
            == BAD_INPUT
        )
        assert f"another run (process {first.processes[0].pid} on " in capsys.readouterr().err
        assert second.lines() == []
    finally:
        first.signal(signal.SIGKILL)
    first.processes[0].wait(20)
    assert first.train_inline("--step_scheduler.max_steps", "1") == OK, "killed, it holds nothing any more"


@pytest.mark.torch_range
def test_four_ranks_go_on_as_two_as_one_and_as_four_again_however_the_model_is_spread(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"lr_scheduler": {"lr_decay_steps": 20}, "model": {"vocab_size": 104}}
    straight, resharded = make(tmp_path, "straight", **sections), make(tmp_path, "resharded", **sections)
    assert straight.train_inline() == OK
    layouts: dict[int, tuple[int, dict[str, Any]]] = {
        4: (4, {"dp_replicate_size": 2}),
        7: (2, {"tp_size": 2, "sequence_parallel": "true"}),
        10: (1, {"strategy": "none"}),
        13: (2, {"strategy": "ddp"}),
        16: (2, {"cp_size": 2}),
        20: (4, {"tp_size": 2}),
    }
    for last, (ranks, keys) in layouts.items():
        overrides = [argument for key, value in keys.items() for argument in (f"--distributed.{key}", str(value))]
        # each format is read by another number of ranks
        overrides += ["--checkpoint.model_save_format", "safetensors" if last in (7, 13, 16) else "torch_save"]
        output = resharded.train(ranks, "--step_scheduler.max_steps", str(last), *overrides)
        assert last == 4 or f"resuming after step {max(step for step in layouts if step < last)}" in output
    for name in ("loss", "grad_norm", "val_loss"):
        values = {line["step"]: line[name] for line in resharded.lines() if name in line}
        for step, value in {line["step"]: line[name] for line in straight.lines() if name in line}.items():
            assert abs(values[step] / value - 1) < TIGHT, (name, step)


def poison(step: int) -> None:
    """Make the gradient of one step infinite, on this rank alone."""
    from amlaunch.trainer.loop import forward_backward

    real = forward_backward.batch_loss

    def poisoned(job: forward_backward.TrainingState, batch: Any) -> torch.Tensor:
        loss = real(job, batch)
        return loss * float("inf") if job.step == step and torch.is_grad_enabled() else loss

    forward_backward.batch_loss = poisoned


@pytest.mark.torch_range
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_leave_out_the_same_step_and_muon_does_not_mind_shards(tmp_path: Path, optimizer: str) -> None:
    sections: dict[str, Any] = {"step_scheduler": {"max_steps": 8, "val_every_steps": None}, "lr_scheduler": None}
    if optimizer == "muon":
        sections["optimizer"] = {
            "_target_": "torch.optim.Muon",
            "lr": 0.02,
            "others": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
        }
    alone, spread = make(tmp_path, "alone", **sections), make(tmp_path, "spread", **sections)
    alone.start(prepare={0: functools.partial(poison, 3)})
    spread.start(2, prepare={1: functools.partial(poison, 3)})
    for run in (alone, spread):
        codes, output = run.wait()
        assert codes == [OK] * len(codes) and output.count("warning: step 3: update skipped") == 1, output
        assert run.lines()[2]["loss"] is None and run.column("skipped_steps")[-1] == 1
    finite = [i for i in range(8) if i != 2]
    actual, expected = (np.array([run.column("loss")[i] for i in finite], dtype=float) for run in (spread, alone))
    assert np.abs(actual / expected - 1).max() < TIGHT
    actual_weights, expected_weights = weights(spread), weights(alone)
    assert all((actual_weights[name] - expected_weights[name]).abs().max() < TIGHT for name in actual_weights)


def test_a_checkpoint_says_what_it_is(straight_and_half: tuple[Run, Run]) -> None:
    folder = checkpoint.checkpoint_folder(straight_and_half[1].checkpoints, 12)
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["step"], meta["world_size"], meta["format"], meta["tokens"]) == (12, 1, "torch_save", 12 * 8 * 16)
    assert meta["val_loss"] == straight_and_half[1].column("val_loss")[-1]
    assert load(folder / "recipe.json").recipe.optimizer["lr"] == recipe(folder)["optimizer"]["lr"]
