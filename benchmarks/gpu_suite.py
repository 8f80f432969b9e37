"""Everything about speed that wants a GPU, measured in one go: our trainer, baselines, ablations, larger models, device checks.

Usage: benchmarks/gpu_suite.sh [--dry] [--minutes N] [--only PART,PART] [--list] [--out FILE]

Each part is a process of its own. One that fails is said, with its last lines, and the next one begins; one for which
no time is left is said too. The parts come in the order of their importance, so that the time limit cuts what matters
least. At the end: one table. ``--dry``: the same with models that a CPU can do, to see that it works, without what only
a GPU can do; its figures mean nothing. Exit code 1 where a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PEAK = 989e12
"""Dense bfloat16 operations a second of H100 SXM and H200, for the baselines' MFU."""
LEAST_SECONDS = 25.0
"""A part that has less time than that is not begun."""
TINY = ["--model.n_layer=2", "--model.n_embd=64", "--model.n_head=2", "--model.vocab_size=512", "--model.n_positions=64", "--dataset.seq_len=64", "--loss_fn.vocab_size=500", "--preprocess.tokenizer=byte", "--step_scheduler.global_batch_size=8", "--step_scheduler.local_batch_size=4", "--compile.enabled=false", "--distributed.dtype=float32"]
TINY_LLAMA = ["--model.num_hidden_layers=2", "--model.hidden_size=64", "--model.intermediate_size=128", "--model.num_attention_heads=2", "--model.num_key_value_heads=2", "--model.vocab_size=512", "--dataset.seq_len=64", "--loss_fn.vocab_size=500", "--preprocess.tokenizer=byte", "--step_scheduler.global_batch_size=8", "--step_scheduler.local_batch_size=4", "--compile.enabled=false", "--distributed.dtype=float32"]
SMALL = ("--step_scheduler.global_batch_size=64",)
"""Ablations take one micro-batch a step: differences show, and the time is for more of them."""
TORCH_LOSS = "--loss_fn={_target_: trainer.loss.LinearCrossEntropy, implementation: torch}"
"""Knows no ``vocab_size``."""


@dataclass
class Part:
    """One line of the table."""

    name: str
    run: Callable[[Part, Suite], dict[str, Any]]
    words: Sequence[str] = ()
    limit: float = 120.0
    """Seconds after which it is ended."""
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass
class Suite:
    """All parts, and what they share."""

    dry: bool
    folder: Path
    deadline: float

    def process(self, words: Sequence[str], limit: float, fine: Sequence[int] = (0,)) -> subprocess.CompletedProcess[str]:
        """Run a command in time. Raises Failed with what it said last where its exit code is not ``fine``."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compile"), **({"AMLAUNCH_DEVICE": "cpu"} if self.dry else {})}
        left = max(1.0, min(limit * (5 if self.dry else 1), self.deadline - time.monotonic()))
        try:
            done = subprocess.run(words, cwd=self.folder, env=env, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            raise Failed(f"ended after {left:.0f} s") from None
        if done.returncode not in fine:
            said = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.strip()]
            raise Failed(next((line for line in reversed(said) if "rror" in line), said[-1] if said else f"exit code {done.returncode}"))
        return done


def module(name: str, *words: str) -> list[str]:
    """The command that runs one of our modules, with any Python that we support."""
    from recipes.process import python_command

    return [*python_command(name), *words]


class Failed(Exception):
    """A part came to nothing; the message says why."""


# --- the parts ------------------------------------------------------------------------------------


def bench(part: Part, suite: Suite) -> dict[str, Any]:
    """``trainer.bench train`` with the part's words: a recipe, then overrides."""
    if suite.dry and "--fp8.enabled=true" in part.words:
        raise Skipped("8-bit products are for GPUs")
    tiny = TINY_LLAMA if part.words[0].startswith("llama") else TINY
    if TORCH_LOSS in part.words:
        tiny = [word for word in tiny if not word.startswith("--loss_fn.")]
    done = suite.process(module("trainer.bench", "train", *part.words, *(tiny if suite.dry else ()), "--json"), part.limit)
    return dict(json.loads(done.stdout))


def baseline(part: Part, suite: Suite) -> dict[str, Any]:
    """Hugging Face's GPT-2."""
    how = "eager" if suite.dry else part.words[0]
    size = ["--tiny", "--micro-batch", "4", "--steps", "3"] if suite.dry else ["--micro-batch", part.words[1]]
    done = suite.process([sys.executable, str(ROOT / "benchmarks/baselines.py"), how, *size], part.limit)
    found = dict(json.loads(done.stdout.strip().splitlines()[-1]))
    return {**found, "mfu": None if suite.dry else found["tokens_per_s"] * found["flops_per_token"] / PEAK}


def device(part: Part, suite: Suite) -> dict[str, Any]:
    """Matrix products and copies, as ``doctor --gpu`` has a node do."""
    out = suite.folder / "gpucheck.json"
    suite.process(module("trainer.gpucheck", "--out", str(out)), part.limit)
    found = json.loads(out.read_text())
    gpu = found["gpus"][0]
    return {"note": f"{gpu['device']}: {gpu['gemm_tflops']:.4g} TFLOP/s, copies {gpu['copy_gb_s']:.4g} GB/s, torch {found['torch']}, NCCL {found['nccl']}"}


def doctor(part: Part, suite: Suite) -> dict[str, Any]:
    """``amlaunch doctor --gpu``, where the launcher's packages are; what is bad here is its answer, no failure."""
    missing = [name for name in ("submitit", "rich", "yaml", "shtab") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} not installed here")
    done = suite.process(module("launcher", "doctor", "--json", *([] if suite.dry else ["--gpu"])), part.limit, fine=(0, 1))
    found = json.loads(done.stdout)
    bad = [finding["name"] for finding in found["findings"] if finding["verdict"] == "bad"]
    return {"note": f"verdict: {found['verdict']}" + (f" ({', '.join(bad)})" if bad else "")}


class Skipped(Exception):
    """A part cannot be done here; the message says why."""


def text_recipe(suite: Suite) -> list[str]:
    """Overrides that have nanogpt read this machine's Python sources, byte by byte: real text, and no download."""
    import numpy as np

    from preprocess.shards import write_shard

    shard = suite.folder / "text.bin"
    if not shard.exists():
        raw, room = bytearray(), 1 << 19 if suite.dry else 1 << 25
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
            raw += path.read_bytes()
            if len(raw) > room:
                break
        write_shard(shard, [np.frombuffer(bytes(raw), dtype=np.uint8).astype("<u2")], np.dtype("<u2"))
    return [f"--dataset.file_pattern={shard}", "--validation_dataset=null", "--export=null", "--preprocess.tokenizer=byte", "--model.vocab_size=384", "--loss_fn.vocab_size=257"]


def trained(part: Part, suite: Suite, name: str, *words: str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of a run of the trainer itself."""
    element = suite.folder / name
    element.mkdir(exist_ok=True)
    tiny = [word for word in TINY if "vocab_size" not in word] if suite.dry else []
    command = ["nanogpt", "--element", str(element), "--checkpoints", str(element / "checkpoints"), *text_recipe(suite), *tiny, *words]
    suite.process(module("trainer", *command), part.limit)
    return [json.loads(line) for line in (element / "metrics.jsonl").read_text().splitlines()]


def checkpoints(part: Part, suite: Suite) -> dict[str, Any]:
    """Saves from pinned memory beside the training, and goes on from one: the losses must be those of a run without a break."""
    size = "8" if suite.dry else "32"
    common = ["--step_scheduler.ckpt_every_steps=3", f"--step_scheduler.global_batch_size={size}", f"--step_scheduler.local_batch_size={size}"]
    common += ["--lr_scheduler=null", "--compile.enabled=false"]
    whole = trained(part, suite, "whole", *common, "--step_scheduler.max_steps=6")
    trained(part, suite, "halves", *common, "--step_scheduler.max_steps=3")
    halves = trained(part, suite, "halves", *common, "--step_scheduler.max_steps=6")
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, halves, strict=True))
    if len(halves) != 6 or worst > 5e-3:
        raise Failed(f"the loss differs by {worst:.2g} after going on")
    stood = max(line["checkpoint_time_s"] for line in whole)
    return {"note": f"went on after step 3 (loss within {worst:.1g}); training stood still for {stood * 1e3:.0f} ms for a save"}


def residual(part: Part, suite: Suite) -> dict[str, Any]:
    """Loss curves with the residual stream in float32 and in bfloat16, over the same data."""
    steps = "12" if suite.dry else "150"
    common = [f"--step_scheduler.max_steps={steps}", "--step_scheduler.global_batch_size=64", "--checkpoint.enabled=false", "--lr_scheduler.lr_warmup_steps=10"]
    common += ["--step_scheduler.global_batch_size=8", "--distributed.dtype=bfloat16"] if suite.dry else []
    curves = {
        name: [line["loss"] for line in trained(part, suite, f"residual-{name}", *common, f"--distributed.bf16_residual={value}")]
        for name, value in (("float32", "false"), ("bfloat16", "true"))
    }
    ends = {name: sum(curve[-10:]) / 10 for name, curve in curves.items()}
    return {"note": f"mean loss of the last 10 of {steps} steps: float32 {ends['float32']:.4f}, bfloat16 {ends['bfloat16']:.4f}", "curves": curves}


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
        Part("residual-curves", residual, limit=120),
        Part("350M", bench, (*middle, "--step_scheduler.local_batch_size=16"), 120),
        Part("1.3B", bench, (*large, "--profiled=1", "--step_scheduler.local_batch_size=8"), 150),
        Part("checkpoints", checkpoints, limit=90),
        Part("350M-32", bench, (*middle, "--step_scheduler.local_batch_size=32"), 120),
        Part("1.3B-16", bench, (*large, "--profiled=1", "--step_scheduler.local_batch_size=16"), 150),
        Part("micro-64", bench, ("nanogpt", *quick), 90),
        Part("loss-logits", bench, ("nanogpt", *quick, "--loss_fn={_target_: trainer.loss.MaskedCrossEntropy, vocab_size: 50257}"), 90),
        Part("loss-torch", bench, ("nanogpt", *quick, TORCH_LOSS), 90),
        Part("residual-bf16", bench, ("nanogpt", *quick, "--distributed.bf16_residual=true"), 90),
        Part("attention-flash", bench, ("nanogpt", *quick, "--sdpa_method=[flash_attention, efficient_attention, math]"), 90),
        Part("blocks", bench, ("nanogpt", *quick, "--compile.scope=blocks"), 90),
        Part("micro-32", bench, ("nanogpt", *quick, "--step_scheduler.local_batch_size=32"), 90),
        Part("fp8-124M", bench, ("nanogpt", *quick, "--fp8.enabled=true"), 90),
        Part("fp8-1.3B", bench, (*large, "--profiled=0", "--step_scheduler.local_batch_size=8", "--fp8.enabled=true"), 150),
        Part("eager", bench, ("nanogpt", *quick, "--compile.enabled=false", "--step_scheduler.local_batch_size=32"), 60),
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
    try:
        part.outcome = {**part.run(part, suite), "state": "done"}
    except Skipped as reason:
        part.outcome = {"state": f"skipped: {reason}"}
    except Failed as reason:
        part.outcome = {"state": f"FAILED: {reason}"}
    except Exception as error:
        part.outcome = {"state": f"FAILED: {type(error).__name__}: {error}"}
    part.outcome["seconds"] = round(time.monotonic() - began, 1)
    print(f"{part.name}: {part.outcome['state']} after {part.outcome['seconds']} s", file=sys.stderr, flush=True)


def line_of(part: Part) -> str:
    """A part's line of the table."""
    found = part.outcome
    if found["state"] != "done" or "tokens_per_s" not in found:
        return f"{part.name:<16}{found.get('note') or found['state']}"
    mfu = f"{found['mfu']:.1%}" if found.get("mfu") else ""
    peak = f"{found['peak_memory_gib']:.1f}" if found.get("peak_memory_gib") else ""
    start = found.get("startup_s", found.get("warmup_s", 0.0))
    used = ", ".join(found.get("attention", {}).get("used", []))
    return f"{part.name:<16}{found['tokens_per_s']:>12,.0f}{mfu:>8}{found['step_time_s']['median'] * 1e3:>10.1f}{peak:>8}{start:>8.0f}  {used}"


def main() -> int:
    """Run the parts, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description="Everything about speed that wants a GPU.")
    parser.add_argument("--dry", action="store_true", help="with models that a CPU can do")
    parser.add_argument("--minutes", type=float, default=8.7, help="after which no part goes on (8.7)")
    parser.add_argument("--only", help="these parts, with commas between")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    given = parser.parse_args()
    chosen = [part for part in parts() if not given.only or part.name in given.only.split(",")]
    unknown = set(given.only.split(",")) - {part.name for part in chosen} if given.only else set()
    if unknown:
        print(f"error: no part is called {', '.join(sorted(unknown))}; --list prints the names", file=sys.stderr)
        return 2
    if given.list:
        print("\n".join(part.name for part in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
        suite = Suite(given.dry, Path(folder), time.monotonic() + 60 * given.minutes)
        for part in chosen:
            carry_out(part, suite)
    print(f"{'part':<16}{'tokens/s':>12}{'MFU':>8}{'step ms':>10}{'GiB':>8}{'start':>8}  attention" + ("   (dry: these figures mean nothing)" if given.dry else ""))
    for part in chosen:
        print(line_of(part))
        for told in ("advice",):
            if told in part.outcome:
                print(f"{'':<16}{told}: {part.outcome[told]}")
    if given.out:
        given.out.write_text(json.dumps({part.name: part.outcome for part in chosen}, indent=2))
    return 1 if any("FAILED" in part.outcome["state"] for part in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
