"""Everything about speed that wants a GPU, measured in one go: our trainer, baselines, ablations, larger models, device checks.

Usage: benchmarks/gpu_suite.sh [--dry] [--minutes N] [--only PART,PART] [--list] [--out FILE]

Each part is a process of its own, or a few. One that fails, or takes longer than its limit, is ended with all that it
started and said, and the next one begins; one for which no time is left is said too. The parts come in the order of
their importance, so that the time limit cuts what matters least. At the end, also where a signal (Ctrl-C, SIGTERM) or
the time brought it: one table. ``--out`` is written after each part. ``--dry``: the same with models that a CPU can
do, to see that it works, without what only a GPU can do; its figures mean nothing. Exit code 1 where a part failed,
130 after a signal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
PEAK = 989e12
"""Dense bfloat16 operations a second of H100 SXM and H200, for the baselines' MFU."""
LEAST_SECONDS = 25.0
"""A part that has less time than that is not begun."""
GRACE_SECONDS = 5.0
"""For a process that was killed to be gone; and after the end of all time, until what goes on is left, and the table printed."""
LOSS_BOUND, NORM_BOUND = 2e-3, 2e-2
"""Of everything fast at once against float64 (docs/performance.md)."""
TINY = [
    "--model.n_layer=2",
    "--model.n_embd=64",
    "--model.n_head=2",
    "--model.vocab_size=512",
    "--model.n_positions=64",
    "--dataset.seq_len=64",
    "--loss_fn.vocab_size=500",
    "--preprocess.tokenizer=byte",
    "--step_scheduler.global_batch_size=8",
    "--step_scheduler.local_batch_size=4",
    "--compile.enabled=false",
    "--distributed.dtype=float32",
]
TINY_LLAMA = [
    "--model.num_hidden_layers=2",
    "--model.hidden_size=64",
    "--model.intermediate_size=128",
    "--model.num_attention_heads=2",
    "--model.num_key_value_heads=2",
    "--model.vocab_size=512",
    "--dataset.seq_len=64",
    "--loss_fn.vocab_size=500",
    "--preprocess.tokenizer=byte",
    "--step_scheduler.global_batch_size=8",
    "--step_scheduler.local_batch_size=4",
    "--compile.enabled=false",
    "--distributed.dtype=float32",
]
SMALL = ("--step_scheduler.global_batch_size=64",)
"""Ablations take one micro-batch a step: differences show, and the time is for more of them."""
TORCH_LOSS = "--loss_fn={_target_: amlaunch.trainer.loss.LinearCrossEntropy, implementation: torch}"
"""Knows no ``vocab_size``."""


@dataclass
class Part:
    """One line of the table."""

    name: str
    run: Callable[[Part, Suite], dict[str, Any]]
    words: Sequence[str] = ()
    limit: float = 120.0
    """Seconds after which it is ended, however many processes it has; five times that on a CPU."""
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass
class Suite:
    """All parts, and what they share."""

    dry: bool
    folder: Path
    deadline: float
    part_ends: float = float("inf")
    """When the part that is being carried out has to be done."""

    def begin(self, part: Part) -> None:
        """Its time counts from now."""
        self.part_ends = min(self.deadline, time.monotonic() + part.limit * (5 if self.dry else 1))

    def process(self, words: Sequence[str], fine: Sequence[int] = (0,)) -> str:
        """What a command says on stdout. Raises Failed or OutOfTime, with what it said last, where its exit code is not ``fine``, or it is late."""
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compile"),
            **({"AMLAUNCH_DEVICE": "cpu"} if self.dry else {}),
        }
        left = max(1.0, min(self.part_ends, self.deadline) - time.monotonic())
        # Files, for a pipe stays open, and would be waited for, while anything lives that a process has started.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = subprocess.Popen(
                words,
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                code = child.wait(left)
            except subprocess.TimeoutExpired:
                said = f"it said last: {last_line(contents(out) + contents(err))}"
                if self.part_ends >= self.deadline:
                    raise OutOfTime(said) from None
                raise Failed(f"ended, for it took longer than {left:.0f} s; {said}") from None
            finally:
                end_all(child)
            said, errors = contents(out), contents(err)
        if code not in fine:
            raise Failed(last_line(said + errors, "rror") or f"exit code {code}")
        return said


def contents(file: Any) -> str:
    """What was written into it."""
    file.seek(0)
    return str(file.read())


def last_line(text: str, word: str = "") -> str:
    """The last line that has ``word``, else the last."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if word in line), lines[-1] if lines else "")


def end_all(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and whatever of its session is left."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that a driver holds is left behind
        child.wait(GRACE_SECONDS)


def module(name: str, *words: str) -> list[str]:
    """The command that runs one of our modules, with any Python that we support."""
    from amlaunch.recipes.python_process import python_command

    return [*python_command(name), *words]


class Failed(Exception):
    """A part came to nothing; the message says why."""


class OutOfTime(Exception):
    """All time was over before a part was done; the message says how far it was."""


# --- the parts ------------------------------------------------------------------------------------


def bench(part: Part, suite: Suite) -> dict[str, Any]:
    """``amlaunch.trainer.tools.bench train`` with the part's words: a recipe, then overrides."""
    if suite.dry and "--fp8.enabled=true" in part.words:
        raise Skipped("8-bit products are for GPUs")
    tiny = TINY_LLAMA if part.words[0].startswith("llama") else TINY
    if TORCH_LOSS in part.words:
        tiny = [word for word in tiny if not word.startswith("--loss_fn.")]
    return dict(
        json.loads(
            suite.process(
                module("amlaunch.trainer.tools.bench", "train", *part.words, *(tiny if suite.dry else ()), "--json")
            )
        )
    )


def baseline(part: Part, suite: Suite) -> dict[str, Any]:
    """Hugging Face's GPT-2."""
    how = "eager" if suite.dry else part.words[0]
    size = ["--tiny", "--micro-batch", "4", "--steps", "3"] if suite.dry else ["--micro-batch", part.words[1]]
    said = suite.process([sys.executable, str(ROOT / "benchmarks/baselines.py"), how, *size])
    found = dict(json.loads(last_line(said)))
    return {**found, "mfu": None if suite.dry else found["tokens_per_s"] * found["flops_per_token"] / PEAK}


def device(part: Part, suite: Suite) -> dict[str, Any]:
    """Matrix products and copies, as ``doctor --gpu`` has a node do."""
    out = suite.folder / "gpucheck.json"
    suite.process(module("amlaunch.trainer.tools.gpu_check", "--out", str(out)))
    found = json.loads(out.read_text())
    gpu = found["gpus"][0]
    return {
        "note": f"{gpu['device']}: {gpu['gemm_tflops']:.4g} TFLOP/s, copies {gpu['copy_gb_s']:.4g} GB/s, torch {found['torch']}, NCCL {found['nccl']}"
    }


def doctor(part: Part, suite: Suite) -> dict[str, Any]:
    """``amlaunch doctor --gpu``, where the launcher's packages are; what is bad here is its answer, no failure."""
    missing = [name for name in ("submitit", "rich", "yaml", "shtab") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} not installed here")
    found = json.loads(
        suite.process(module("amlaunch", "doctor", "--json", *([] if suite.dry else ["--gpu"])), fine=(0, 1))
    )
    bad = [finding["name"] for finding in found["findings"] if finding["verdict"] == "bad"]
    return {"note": f"verdict: {found['verdict']}" + (f" ({', '.join(bad)})" if bad else "")}


class Skipped(Exception):
    """A part cannot be done here; the message says why."""


def text_recipe(suite: Suite) -> list[str]:
    """Overrides that have nanogpt read this machine's Python sources, byte by byte: real text, and no download; paragraphs are documents."""
    import numpy as np

    from amlaunch.preprocess.shards.shard_format import write_shard

    shard = suite.folder / "text.bin"
    if not shard.exists():
        raw, room = bytearray(), 1 << 19 if suite.dry else 1 << 25
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
            raw += path.read_bytes()
            if len(raw) > room:
                break
        paragraphs = [text + b"\n\n" for text in bytes(raw).split(b"\n\n")]
        write_shard(shard, [np.frombuffer(text, dtype=np.uint8).astype("<u2") for text in paragraphs], np.dtype("<u2"))
    return [
        f"--dataset.file_pattern={shard}",
        "--validation_dataset=null",
        "--export=null",
        "--preprocess.tokenizer=byte",
        "--model.vocab_size=384",
        "--loss_fn.vocab_size=257",
    ]


def trained(suite: Suite, name: str, *words: str, recipe: str = "nanogpt") -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of a run of the trainer itself."""
    element = suite.folder / name
    element.mkdir(exist_ok=True)
    tiny = (
        [word for word in (TINY if recipe == "nanogpt" else TINY_LLAMA) if "vocab_size" not in word]
        if suite.dry
        else []
    )
    command = [
        recipe,
        "--element",
        str(element),
        "--checkpoints",
        str(element / "checkpoints"),
        *text_recipe(suite),
        *tiny,
        *words,
    ]
    suite.process(module("amlaunch.trainer", *command))
    return [json.loads(line) for line in (element / "metrics.jsonl").read_text().splitlines()]


def checkpoints(part: Part, suite: Suite) -> dict[str, Any]:
    """Saves from pinned memory beside the training, and goes on from one: the losses must be those of a run without a break."""
    size = "8" if suite.dry else "32"
    common = [
        "--step_scheduler.ckpt_every_steps=3",
        f"--step_scheduler.global_batch_size={size}",
        f"--step_scheduler.local_batch_size={size}",
    ]
    common += ["--lr_scheduler=null", "--compile.enabled=false"]
    whole = trained(suite, "whole", *common, "--step_scheduler.max_steps=6")
    trained(suite, "halves", *common, "--step_scheduler.max_steps=3")
    halves = trained(suite, "halves", *common, "--step_scheduler.max_steps=6")
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, halves, strict=True))
    if len(halves) != 6 or worst > 5e-3:
        raise Failed(f"the loss differs by {worst:.2g} after going on")
    stood = max(line["checkpoint_time_s"] for line in whole)
    return {
        "note": f"went on after step 3 (loss within {worst:.1g}); training stood still for {stood * 1e3:.0f} ms for a save"
    }


def residual(part: Part, suite: Suite) -> dict[str, Any]:
    """Loss curves with the residual stream in float32 and in bfloat16, over the same data."""
    steps = "12" if suite.dry else "150"
    common = [
        f"--step_scheduler.max_steps={steps}",
        "--step_scheduler.global_batch_size=64",
        "--checkpoint.enabled=false",
        "--lr_scheduler.lr_warmup_steps=10",
    ]
    common += ["--step_scheduler.global_batch_size=8", "--distributed.dtype=bfloat16"] if suite.dry else []
    curves = {
        name: [
            line["loss"] for line in trained(suite, f"residual-{name}", *common, f"--distributed.bf16_residual={value}")
        ]
        for name, value in (("float32", "false"), ("bfloat16", "true"))
    }
    ends = {name: sum(curve[-10:]) / 10 for name, curve in curves.items()}
    return {
        "note": f"mean loss of the last 10 of {steps} steps: float32 {ends['float32']:.4f}, bfloat16 {ends['bfloat16']:.4f}",
        "curves": curves,
    }


FAST = (
    "--distributed.dtype=bfloat16",
    "--distributed.bf16_residual=true",
    "--compile.scope=model",
    "--step_scheduler.local_batch_size=4",
)
EXACT = (
    "--distributed.dtype=float64",
    "--compile.enabled=false",
    "--step_scheduler.local_batch_size=8",
    "--loss_fn={_target_: amlaunch.trainer.loss.MaskedCrossEntropy, vocab_size: 257}",
)
FAMILIES = {
    "nanogpt": ("--model.n_layer=2", "--model.n_embd=256", "--model.n_head=4"),
    "llama-350m": (
        "--model.num_hidden_layers=2",
        "--model.hidden_size=256",
        "--model.intermediate_size=512",
        "--model.num_attention_heads=4",
        "--model.num_key_value_heads=2",
    ),
}


def parity(part: Part, suite: Suite) -> dict[str, Any]:
    """Everything fast at once, by this device's own kernels, against float64 with nothing of it: GPT-2, and Llama over packed documents."""
    common = (
        "--step_scheduler.max_steps=12",
        "--step_scheduler.global_batch_size=8",
        "--step_scheduler.val_every_steps=null",
        "--checkpoint.enabled=false",
        "--lr_scheduler=null",
        "--optimizer.lr=3e-4",
        "--distributed.strategy=none",
    )
    errors, length = {}, 64 if suite.dry else 512
    for recipe, sizes in FAMILIES.items():
        rows = (
            f"--dataset.seq_len={length}",
            f"--packed_sequence.packed_sequence_size={length if recipe.startswith('llama') else 0}",
        )
        fast, exact = (
            trained(suite, f"{recipe}-{way}", *sizes, *common, *rows, *words, recipe=recipe)
            for way, words in (("fast", FAST), ("exact", EXACT))
        )
        for column in ("loss", "grad_norm"):
            errors[f"{recipe} {column}"] = max(abs(a[column] / b[column] - 1) for a, b in zip(fast, exact, strict=True))
    note = "bfloat16 and all fast paths against float64 over 12 steps, at most: " + ", ".join(
        f"{name} {error:.1e}" for name, error in errors.items()
    )
    if any(error > (LOSS_BOUND if name.endswith("loss") else NORM_BOUND) for name, error in errors.items()):
        raise Failed(note)
    return {"note": note, "errors": errors}


def parts() -> list[Part]:
    """All parts, the most important first: what the others are compared with, larger models, ablations, what is slow to start."""
    quick = ("--steps=8", "--warmup=3", "--profiled=0", *SMALL)
    middle = ("llama-350m", "--steps=8", "--warmup=3", "--profiled=1", "--step_scheduler.global_batch_size=64")
    large = ("llama-1.3b", "--steps=6", "--warmup=3", "--step_scheduler.global_batch_size=32")
    return [
        Part("device", device, limit=60),
        Part("124M", bench, ("nanogpt", "--steps=10", "--warmup=3", "--profiled=2"), 150),
        Part("hf-compile", baseline, ("compile", "32"), 100),
        Part("hf-eager", baseline, ("eager", "32"), 60),
        Part("residual-curves", residual, limit=150),
        Part("350M", bench, (*middle, "--step_scheduler.local_batch_size=16"), 120),
        Part("1.3B", bench, (*large, "--profiled=1", "--step_scheduler.local_batch_size=8"), 150),
        Part("checkpoints", checkpoints, limit=120),
        Part("350M-32", bench, (*middle, "--step_scheduler.local_batch_size=32"), 120),
        Part("1.3B-16", bench, (*large, "--profiled=1", "--step_scheduler.local_batch_size=16"), 150),
        Part("parity", parity, limit=120),
        Part("micro-64", bench, ("nanogpt", *quick), 90),
        Part(
            "loss-logits",
            bench,
            ("nanogpt", *quick, "--loss_fn={_target_: amlaunch.trainer.loss.MaskedCrossEntropy, vocab_size: 50257}"),
            90,
        ),
        Part("loss-torch", bench, ("nanogpt", *quick, TORCH_LOSS), 90),
        Part("residual-f32", bench, ("nanogpt", *quick, "--distributed.bf16_residual=false"), 90),
        Part(
            "attention-flash",
            bench,
            ("nanogpt", *quick, "--sdpa_method=[flash_attention, efficient_attention, math]"),
            90,
        ),
        Part("blocks", bench, ("nanogpt", *quick, "--compile.scope=blocks"), 90),
        Part("micro-32", bench, ("nanogpt", *quick, "--step_scheduler.local_batch_size=32"), 90),
        Part("fp8-124M", bench, ("nanogpt", *quick, "--fp8.enabled=true"), 90),
        Part(
            "fp8-1.3B",
            bench,
            (*large, "--profiled=0", "--step_scheduler.local_batch_size=8", "--fp8.enabled=true"),
            150,
        ),
        Part(
            "eager", bench, ("nanogpt", *quick, "--compile.enabled=false", "--step_scheduler.local_batch_size=32"), 60
        ),
        Part("doctor", doctor, limit=120),
        Part("autotune", bench, ("nanogpt", *quick, "--compile.mode=max-autotune-no-cudagraphs"), 200),
    ]


# --- running them ---------------------------------------------------------------------------------


def carry_out(part: Part, suite: Suite) -> None:
    """Run one part; its outcome, whatever it is, is in it."""
    began = time.monotonic()
    if suite.deadline - began < (1.0 if suite.dry else LEAST_SECONDS):
        part.outcome = {"state": "no time left"}
        return
    suite.begin(part)
    try:
        part.outcome = {**part.run(part, suite), "state": "done"}
    except Skipped as reason:
        part.outcome = {"state": f"skipped: {reason}"}
    except OutOfTime as reason:
        part.outcome = {"state": f"no time left; {reason}"}
    except Failed as reason:
        part.outcome = {"state": f"FAILED: {reason}"}
    except KeyboardInterrupt:
        part.outcome = {"state": "interrupted"}
        raise
    except Exception as error:
        part.outcome = {"state": f"FAILED: {type(error).__name__}: {error}"}
    finally:
        part.outcome["seconds"] = round(time.monotonic() - began, 1)
    print(f"{part.name}: {part.outcome['state']} after {part.outcome['seconds']} s", file=sys.stderr, flush=True)


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """KeyboardInterrupt at a signal, as at Ctrl-C, and a moment after the ``deadline``, whatever is going on."""

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_REAL, max(0.1, deadline - time.monotonic() + GRACE_SECONDS))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out_all(chosen: Sequence[Part], suite: Suite, out: Path | None) -> bool:
    """All parts in turn; False where something came between."""
    for part in chosen:
        part.outcome = {"state": "not begun"}
    try:
        with until(suite.deadline):
            for part in chosen:
                try:
                    carry_out(part, suite)
                finally:
                    write_all(chosen, out)
    except KeyboardInterrupt:
        return False
    return True


def write_all(chosen: Sequence[Part], out: Path | None) -> None:
    """Every figure there is so far."""
    if out is not None:
        from amlaunch.recipes.files import write_json

        write_json(out, {part.name: part.outcome for part in chosen})


def line_of(part: Part) -> str:
    """A part's line of the table."""
    found = part.outcome
    if found["state"] != "done" or "tokens_per_s" not in found:
        return f"{part.name:<16}{found.get('note') or found['state']}"
    mfu = f"{found['mfu']:.1%}" if found.get("mfu") else ""
    peak = f"{found['peak_memory_gib']:.1f}" if found.get("peak_memory_gib") else ""
    start = found.get("startup_s", found.get("warmup_s", 0.0))
    used = ", ".join(found.get("attention", {}).get("used", []))
    waits = f"  host waits {found['host_waits_per_step']:.1f} times a step" if found.get("host_waits_per_step") else ""
    return f"{part.name:<16}{found['tokens_per_s']:>12,.0f}{mfu:>8}{found['step_time_s']['median'] * 1e3:>10.1f}{peak:>8}{start:>8.0f}  {used}{waits}"


def table(chosen: Sequence[Part], dry: bool) -> str:
    """All parts, for people."""
    head = f"{'part':<16}{'tokens/s':>12}{'MFU':>8}{'step ms':>10}{'GiB':>8}{'start':>8}  attention" + (
        "   (dry: these figures mean nothing)" if dry else ""
    )
    lines = [
        [line_of(part), *([f"{'':<16}advice: {part.outcome['advice']}"] if "advice" in part.outcome else [])]
        for part in chosen
    ]
    return "\n".join([head, *(line for some in lines for line in some)])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Everything about speed that wants a GPU.")
    parser.add_argument("--dry", action="store_true", help="with models that a CPU can do")
    parser.add_argument("--minutes", type=float, default=8.7, help="after which no part goes on (8.7)")
    parser.add_argument("--only", help="these parts, with commas between")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    return parser.parse_args()


def main() -> int:
    """Run the parts, print the table, return the exit code."""
    began, given = time.monotonic(), parsed()
    chosen = [part for part in parts() if not given.only or part.name in given.only.split(",")]
    unknown = set(given.only.split(",")) - {part.name for part in chosen} if given.only else set()
    if unknown:
        print(f"error: no part is called {', '.join(sorted(unknown))}; --list prints the names", file=sys.stderr)
        return 2
    if given.list:
        print("\n".join(part.name for part in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu-suite-", ignore_cleanup_errors=True) as folder:
        whole = carry_out_all(chosen, Suite(given.dry, Path(folder), began + 60 * given.minutes), given.out)
        print(table(chosen, given.dry), flush=True)  # before gigabytes are removed
    if not whole:
        return 130
    return 1 if any("FAILED" in part.outcome["state"] for part in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
