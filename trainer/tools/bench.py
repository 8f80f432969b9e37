"""``python -m amlaunch.trainer.tools.bench train|data [RECIPE]``: how fast the trainer is here, by the trainer itself.

``train`` runs the recipe's own loop, data path and optimizer, without
checkpoints and validation: a warm-up, steps that are measured, and some more
under torch's profiler. ``data`` reads the batches that training would read, and
does nothing with them. Works without a GPU, alone or under torchrun; ``--ranks``
starts the ranks itself. The result is on stdout, what training says on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from amlaunch.recipes.errors import BAD_INPUT, FAILED, INTERRUPTED, OK, BadInput
from amlaunch.recipes.files import read_json_lines
from amlaunch.recipes.format.loader import LoadedRecipe, load
from amlaunch.recipes.python_process import PARENT_VARIABLE, die_with_parent, python_command
from amlaunch.recipes.run_layout import ElementDir
from amlaunch.recipes.shipped import find_recipe
from amlaunch.recipes.version import VERSION
from amlaunch.trainer.process.errors import exit_process, print_error, run_guarded
from amlaunch.trainer.process.rank_environment import rank_of, read_rank_environment
from amlaunch.trainer.process.stop_request import StopFlag

FOLDER_VARIABLE = "AMLAUNCH_BENCH_FOLDER"
"""For ranks that were started here: the folder of all, made-up shards included, that another process removes."""
WITHOUT = (
    "--checkpoint.enabled=false",
    "--validation_dataset=null",
    "--export=null",
    "--wandb=null",
    "--tensorboard=null",
)
"""Overrides: what a measurement leaves out."""
SYNTHETIC_TOKENS = 1 << 24
"""The most that is made where the recipe's data is not there: more than any cache holds, and soon written."""
CONVENTION = "6N + 12LTd operations a token (nanoGPT's), against the maker's dense bfloat16 peak"
PATIENCE = 50
"""Tenths of a second that ranks have after one of them has failed."""
CPU_SIDE, CPU_COPY, CPU_TRIES = 512, 64 << 20, 3
"""What a CPU is held against: a product of so many rows, a copy of so many bytes; the best of a few, for others use it too."""


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and return the exit code."""
    die_with_parent()
    return run_guarded(lambda: run(arguments))


def run(arguments: Sequence[str]) -> int:
    """:func:`main`, without its care for errors."""
    given, overrides = parser().parse_known_args(arguments)
    try:
        if given.what == "train" and given.ranks and given.ranks > 1 and "RANK" not in os.environ:
            return start_ranks(given, overrides, list(arguments))
        return data(given, overrides) if given.what == "data" else train(given, overrides)
    except (Stopped, KeyboardInterrupt):
        if rank_of(os.environ) == 0:
            print_error("interrupted: nothing was measured")
        return INTERRUPTED


class Stopped(Exception):
    """A signal came before everything was measured."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """As everything else that a user got wrong."""
        raise BadInput(f"{message}; {self.prog} --help says more")


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know is an override of the recipe."""
    made = Parser(prog="amlaunch bench", description="Measure the trainer on this machine.", allow_abbrev=False)
    what = made.add_subparsers(dest="what", required=True)
    for name, text in (("train", "steps of training"), ("data", "reading what training reads")):
        one = what.add_parser(name, help=text, allow_abbrev=False, epilog="Any key of the recipe: --section.key value")
        one.add_argument(
            "recipe",
            nargs="?",
            default="nanogpt",
            help="a YAML file, or the name of a recipe that comes with amlaunch (nanogpt)",
        )
        one.add_argument(
            "--data", type=Path, metavar="DIR", help="shards and manifest (default: as the recipe says, or made up)"
        )
        one.add_argument("--steps", type=_positive, default=20, metavar="N", help="steps that are measured (20)")
        one.add_argument("--warmup", type=_positive, default=5, metavar="N", help="steps before that (5)")
        one.add_argument(
            "--allow-target", action="append", default=[], metavar="NAME", help="let a _target_ reach NAME"
        )
        one.add_argument("--json", action="store_true", help="the result as JSON on stdout")
        if name == "train":
            one.add_argument("--ranks", type=_positive, metavar="N", help="ranks on this machine (1)")
            one.add_argument(
                "--profiled",
                type=_whole,
                default=3,
                metavar="N",
                help="steps under the profiler after those (3); 0: none",
            )
            one.add_argument("--keep", type=Path, metavar="DIR", help="keep trace and metrics here")
    return made


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A recipe as it is measured."""

    loaded: LoadedRecipe
    folder: Path
    synthetic: bool
    """Whether its shards are made up."""


@contextlib.contextmanager
def folder_of(given: argparse.Namespace) -> Iterator[Path]:
    """Where to measure; removed at the end unless it is to be kept, or another process's."""
    named = os.environ.get(FOLDER_VARIABLE) or getattr(given, "keep", None)
    folder = Path(named or tempfile.mkdtemp(prefix="amlaunch-bench-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not named:
            shutil.rmtree(folder, ignore_errors=True)


def prepared(given: argparse.Namespace, overrides: Sequence[str], folder: Path) -> Bench:
    """The recipe as it is measured; tokens are made up, once for all ranks, where its data is not there."""
    path = find_recipe(given.recipe)
    words = [*overrides, *WITHOUT, *scheduled(given)]
    loaded = load(path, words, allow=given.allow_target, job_start=True)
    if has_data(loaded, given.data):
        return Bench(loaded, folder, synthetic=False)
    if FOLDER_VARIABLE not in os.environ:
        print_error("the recipe's data is not here: tokens are made up, which changes no speed")
        write_synthetic(loaded, folder)
    return Bench(
        load(path, [*words, f"--dataset.file_pattern={folder}/[ab].bin"], allow=given.allow_target, job_start=True),
        folder,
        synthetic=True,
    )


def scheduled(given: argparse.Namespace) -> list[str]:
    """Overrides: how many steps there are, and which of them are profiled."""
    last, profiled = given.warmup + given.steps, getattr(given, "profiled", 0)
    if not profiled:
        return [f"--step_scheduler.max_steps={last}", "--profile=null"]
    # the step between does not count: a step's time ends when the next one has begun
    return [
        f"--step_scheduler.max_steps={last + 1 + profiled}",
        f"--profile={{start_step: {last + 2}, steps: {profiled}}}",
    ]


def has_data(loaded: LoadedRecipe, data: Path | None) -> bool:
    """Whether what the recipe reads is there; a data set of the user's own knows that itself."""
    node = loaded.recipe.dataset
    return (
        data is not None
        or node.get("file_pattern") is not None
        or not node["_target_"].startswith("amlaunch.trainer.data.")
    )


def write_synthetic(loaded: LoadedRecipe, folder: Path) -> None:
    """Two shards of made-up tokens, ``a.bin`` and ``b.bin``, frequent and rare ones as in text (Zipf's law)."""
    import numpy as np

    from amlaunch.preprocess.shards.shard_format import write_shard

    recipe = loaded.recipe
    vocab = int(recipe.loss_fn.get("vocab_size") or recipe.model.get("vocab_size") or 50257)
    length = int(recipe.dataset.get("seq_len", 1024))
    steps = recipe.step_scheduler.max_steps or 1
    count = min(SYNTHETIC_TOKENS, recipe.step_scheduler.global_batch_size * length * steps) + 2 * length + 2
    rng, dtype = np.random.default_rng(0), np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
    for name in ("a", "b"):
        tokens = np.minimum(vocab ** rng.random(count // 2 + 1, dtype=np.float64), vocab).astype(dtype) - dtype.type(1)
        write_shard(folder / f"{name}.bin", [tokens], dtype)


# --- training -------------------------------------------------------------------------------------


def train(given: argparse.Namespace, overrides: Sequence[str]) -> int:
    """``bench train``, on this rank."""
    with folder_of(given) as folder:
        with contextlib.redirect_stdout(sys.stderr):
            report = measured(prepared(given, overrides, folder), given)
        if report is None:
            return OK
        if given.profiled:
            print_error(
                f"trace and metrics are in {folder}"
                if given.keep
                else "the trace is removed again; --keep DIR keeps it"
            )
        print(json.dumps(report, indent=2) if given.json else text_of(report), flush=True)
    return OK


def measured(bench: Bench, given: argparse.Namespace) -> dict[str, Any] | None:
    """Train, and say what came out; None on ranks other than the first. Raises Stopped."""
    from amlaunch.trainer.loop import job as jobs
    from amlaunch.trainer.process.arguments import Options

    ranks = read_rank_environment(os.environ)
    element = ElementDir(bench.folder / f"rank{ranks.rank}")
    element.root.mkdir(exist_ok=True)
    element.metrics.unlink(missing_ok=True)
    options = Options(bench.loaded, element, checkpoints=bench.folder / "none", data=given.data, run_id="bench")
    stop = StopFlag()
    stop.install()
    if jobs.run(options, stop) != OK:
        raise Stopped
    job = jobs.FINISHED[-1]
    rates = rates_of(job)
    return report_of(bench, given, job, rates, element) if job.world.is_main else None


def rates_of(job: Any) -> dict[str, float]:
    """What the device does at best, all ranks at it: a large product's operations and a copy's bytes a second."""
    from amlaunch.trainer.parallel.world import compute_dtype
    from amlaunch.trainer.tools.gpu_check import ON_CPU, ON_GPU, copy, gemm

    cuda, dtype = job.world.device.type == "cuda", compute_dtype(job.recipe.distributed, job.world.device)
    sizes = ON_GPU if cuda else replace(ON_CPU, side=CPU_SIDE, copy_bytes=CPU_COPY)
    tries = range(1 if cuda else CPU_TRIES)
    return {
        "gemm_flops": max(gemm(job.world, sizes, dtype) for _ in tries) * 1e12,
        "copy_bytes": max(copy(job.world, sizes, sizes.copy_bytes) for _ in tries) * 1e9,
    }


def report_of(
    bench: Bench, given: argparse.Namespace, job: Any, rates: dict[str, float], element: ElementDir
) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    import torch

    from amlaunch.trainer.metrics.writers import peak_flops
    from amlaunch.trainer.models.base import flops_per_token, parameter_count
    from amlaunch.trainer.parallel.world import compute_dtype, unwrap
    from amlaunch.trainer.performance.attention_kernels import backend_order
    from amlaunch.trainer.performance.compilation import compile_scope, compile_stats

    recipe, world, model = job.recipe, job.world, unwrap(job.model)
    lines = [line for line in read_json_lines(element.metrics) if line["step"] > given.warmup]
    steady, profiled = lines[: given.steps], lines[given.steps + 1 :]
    times = [line["step_time_s"] for line in steady]
    median = statistics.median(times)
    length = job.batches.step_tokens // job.batches.global_batch
    operations = flops_per_token(model, length)
    rate = job.batches.step_tokens / median
    peak = peak_flops(world.device)
    made = compile_stats()
    return {
        "recipe": recipe.name,
        "device": torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else f"CPU ({torch.get_num_threads()} threads a rank)",
        "host": platform.node(),
        "ranks": world.size,
        "strategy": recipe.distributed.strategy,
        "parameters": parameter_count(model),
        "dtype": str(compute_dtype(recipe.distributed, world.device)).removeprefix("torch."),
        "seq_len": length,
        "global_batch_size": job.batches.global_batch,
        "local_batch_size": recipe.step_scheduler.local_batch_size,
        "synthetic_data": bench.synthetic,
        "steps": len(steady),
        "tokens_per_s": rate,
        "tokens_per_s_per_gpu": rate / world.size,
        "step_time_s": {"median": median, "min": min(times), "max": max(times), "stdev": statistics.pstdev(times)},
        "data_time_share": sum(line["data_time_s"] for line in steady) / sum(times),
        "flops_per_token": operations,
        "mfu": rate * operations / world.size / peak if peak else None,
        "mfu_convention": CONVENTION,
        "peak_flops": peak,
        "measured_gemm_flops": rates["gemm_flops"],
        "measured_copy_bytes_per_s": rates["copy_bytes"],
        "of_measured_gemm": rate * operations / world.size / rates["gemm_flops"],
        "peak_memory_gib": max(line["peak_memory_gib"] for line in steady),
        "loss": {"first": lines[0]["loss"], "last": lines[-1]["loss"]},
        "startup_s": job.metrics.startup["seconds"],
        "compile": {
            **asdict(recipe.compile),
            "scope": compile_scope(recipe.compile, recipe.distributed, world.size),
            **asdict(made),
        },
        "fp8": recipe.fp8.enabled,
        "bf16_residual": recipe.distributed.bf16_residual,
        "loss_fn": recipe.loss_fn["_target_"],
        "attention": {
            "wanted": backend_order(recipe.sdpa_method, world.device)[0] if world.device.type == "cuda" else None,
            "used": [],
        },
        "versions": versions(),
        **(roofline_of(element, job, given, rates, median, len(profiled)) if profiled else {}),
    }


def roofline_of(
    element: ElementDir, job: Any, given: argparse.Namespace, rates: dict[str, float], median: float, steps: int
) -> dict[str, Any]:
    """Where the time went, and what to change first."""
    import torch

    from amlaunch.trainer.metrics.profiling import trace_path
    from amlaunch.trainer.models.base import flops_per_token, vocab_rows
    from amlaunch.trainer.parallel.world import compute_dtype, is_sharded, unwrap
    from amlaunch.trainer.performance import attention_kernels
    from amlaunch.trainer.tools import roofline

    model, recipe, world = unwrap(job.model), job.recipe, job.world
    trace = trace_path(element.root / "profile", job.step, world.rank)
    found = roofline.busy(roofline.read(trace), steps)
    length = job.batches.step_tokens // job.batches.global_batch
    matrices = flops_per_token(model, 0)
    head = 6.0 * (vocab_rows(model) or 0) * (attention_kernels.config_value(model, "hidden_size", "n_embd") or 0)
    least = roofline.least_seconds(
        tokens=job.batches.step_tokens // world.size,
        block_flops=matrices - head,
        attention_flops=(flops_per_token(model, length) - matrices) / 2,  # causal: half of what the convention counts
        head_flops=head,
        parameters=sum(_local(parameter) for parameter in model.parameters()),
        flops=rates["gemm_flops"],
        bandwidth=rates["copy_bytes"],
    )
    lines = read_json_lines(element.metrics)[given.warmup : given.warmup + given.steps]
    waited = statistics.median(line["data_time_s"] for line in lines)
    parts = roofline.rows(found, median, waited, least)
    steps_of, dtype = recipe.step_scheduler, compute_dtype(recipe.distributed, world.device)
    told = roofline.advice(
        parts,
        compiled=recipe.compile.enabled,
        device=found.device,
        backends=found.backends,
        narrow=dtype is not torch.bfloat16 or recipe.distributed.bf16_residual or is_sharded(recipe.distributed),
        waits=found.waits or 0.0,
        micro_batch=steps_of.local_batch_size,
        accumulates=steps_of.local_batch_size * world.dp_size < steps_of.global_batch_size,
    )
    wanted = attention_kernels.backend_order(recipe.sdpa_method, world.device)[0] if found.device else None
    return {
        "attention": {"wanted": wanted, "used": list(found.backends)},
        "host_waits_per_step": found.waits,
        "roofline": [asdict(row) for row in parts],
        "advice": told,
    }


def _local(parameter: Any) -> int:
    """Numbers of a parameter that lie on this rank."""
    return int(parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel())


def versions() -> dict[str, str | None]:
    """Of everything that decides speed."""
    import torch

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    try:
        import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

        compiler = str(triton.__version__)
    except ImportError:
        compiler = None
    found = {
        "amlaunch": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    return {**found, "cudnn": cudnn and str(cudnn), "nccl": nccl, "triton": compiler}


def text_of(report: dict[str, Any]) -> str:
    """The report, for people."""
    from amlaunch.trainer.tools.roofline import Row, table

    step, compiled = report["step_time_s"], report["compile"]
    mfu = (
        f"{report['mfu']:.1%} ({report['mfu_convention']})"
        if report["mfu"] is not None
        else f"not known for a {report['device'].partition(' ')[0]}"
    )
    used = ", ".join(report["attention"]["used"]) or "not seen (--profiled 3 looks)"
    wanted = report["attention"]["wanted"]
    warning = (
        f"; warning: {wanted} was wanted"
        if wanted and report["attention"]["used"] and wanted not in report["attention"]["used"]
        else ""
    )
    graphs = compiled["hits"] + compiled["misses"]
    lines = [
        (
            "recipe",
            f"{report['recipe']}: {report['parameters']:,} parameters, {report['ranks']} x {report['device']}, {report['strategy']}, {report['dtype']}",
        ),
        (
            "batch",
            f"{report['global_batch_size']} windows of {report['seq_len']} tokens a step, {report['local_batch_size']} at once",
        ),
        ("tokens/s", f"{report['tokens_per_s']:,.0f} ({report['tokens_per_s_per_gpu']:,.0f} a rank)"),
        (
            "step",
            f"{step['median'] * 1e3:.1f} ms (median of {report['steps']}; {step['min'] * 1e3:.1f} to {step['max'] * 1e3:.1f}, deviation {step['stdev'] * 1e3:.1f})",
        ),
        ("MFU", mfu),
        (
            "of a large product",
            f"{report['of_measured_gemm']:.1%} of {report['measured_gemm_flops'] / 1e12:.4g} TFLOP/s, measured here; copies {report['measured_copy_bytes_per_s'] / 1e9:.4g} GB/s",
        ),
        ("peak memory", f"{report['peak_memory_gib']:.2f} GiB"),
        (
            "start",
            f"{report['startup_s']:.1f} s to the first step, of which compiling {compiled['seconds']:.1f} s ({compiled['hits']} of {graphs} graphs from the cache)",
        ),
        ("attention", used + warning),
        *(
            [("host waits", f"{waits:.1f} times a step for the device")]
            if (waits := report.get("host_waits_per_step")) is not None
            else []
        ),
        ("versions", ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)),
    ]
    text = "\n".join(f"{name:<19}{value}" for name, value in lines)
    if "roofline" in report:
        text += "\n\n" + table([Row(**row) for row in report["roofline"]]) + f"\n\nadvice: {report['advice']}"
    return text


# --- ranks ----------------------------------------------------------------------------------------


def start_ranks(given: argparse.Namespace, overrides: Sequence[str], arguments: list[str]) -> int:
    """``--ranks N``: this program once a rank, here; the first one speaks. One that fails ends all."""
    with folder_of(given) as folder:
        prepared(given, overrides, folder)  # what is wrong with the recipe is said once, and tokens are made up once
        return wait_for(ranks_in(folder, given.ranks, arguments))


def ranks_in(folder: Path, count: int, arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    """The ranks, started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    shared |= {PARENT_VARIABLE: str(os.getpid()), FOLDER_VARIABLE: str(folder)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [*python_command("amlaunch.trainer.tools.bench"), *arguments]
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=None if rank == 0 else sys.stderr,
        )
        for rank in range(count)
    ]


def wait_for(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of all; none is left. Where one has failed, the others have a moment: the first of them says what all have seen."""
    failing = 0
    try:
        while any([rank.poll() is None for rank in ranks]) and failing < PATIENCE:  # noqa: C419 all are asked
            failing += any(rank.poll() for rank in ranks)
            time.sleep(0.1)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        codes = [rank.wait() for rank in ranks]
    failed = [(number, code) for number, code in enumerate(codes) if code > 0] or [
        (number, code) for number, code in enumerate(codes) if code
    ]
    if not failed:
        return OK
    number, code = failed[0]
    if code not in (BAD_INPUT, INTERRUPTED):  # of which the rank has spoken
        print_error(f"error: rank {number} ended with {code}; nothing was measured")
    return code if code > 0 else FAILED


# --- data -----------------------------------------------------------------------------------------


def data(given: argparse.Namespace, overrides: Sequence[str]) -> int:
    """``bench data``: the batches of training, read ahead and copied to the device as training does, and nothing else."""
    with folder_of(given) as folder:
        with contextlib.redirect_stdout(sys.stderr):
            report = data_report(prepared(given, overrides, folder), given, given.warmup + given.steps)
        if given.json:
            print(json.dumps(report, indent=2), flush=True)
        else:
            print(
                f"{report['tokens_per_s']:,.0f} tokens/s from {report['windows']:,} windows of {report['seq_len']} tokens on {report['device']}: "
                f"{report['step_time_s'] * 1e3:.2f} ms a step of {report['global_batch_size']} windows (median of {given.steps})",
                flush=True,
            )
    return OK


def data_report(bench: Bench, given: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Read ``steps`` batches; the first ones do not count."""
    import torch

    from amlaunch.trainer.data.batches import StepBatches
    from amlaunch.trainer.data.datasets import sample_order_of
    from amlaunch.trainer.loop.job import build_dataset
    from amlaunch.trainer.parallel.world import join_world

    recipe = bench.loaded.recipe
    world = join_world(recipe.distributed, read_rank_environment(os.environ))
    dataset = build_dataset(recipe.dataset, recipe, bench.loaded.policy, given.data)
    order = sample_order_of(dataset, recipe.seed)
    batches = StepBatches(dataset, order, recipe.step_scheduler.global_batch_size, None, world)
    batches.start(0, steps, recipe.dataloader.prefetch_factor, recipe.dataloader.num_workers)
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        batches.next()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    batches.close()
    median = statistics.median(times[given.warmup :])
    return {
        "recipe": recipe.name,
        "device": world.device.type,
        "windows": order.size,
        "seq_len": batches.step_tokens // batches.global_batch,
        "global_batch_size": batches.global_batch,
        "synthetic_data": bench.synthetic,
        "steps": given.steps,
        "step_time_s": median,
        "tokens_per_s": batches.step_tokens / median,
        "versions": versions(),
    }


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
