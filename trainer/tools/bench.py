"""Measure the speed of training or data loading: ``python -m amlaunch.trainer.tools.bench train|data [RECIPE]``.

``train`` runs the recipe's own loop, data path and optimizer without
checkpoints and validation: warm-up steps, measured steps, and a few steps under
torch's profiler. ``data`` only reads the batches that training would read. Both
work without a GPU, alone or under torchrun; ``--ranks`` starts several ranks.
The result goes to stdout, the output of training to stderr.
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
from typing import TYPE_CHECKING, Any, NoReturn

from amlaunch.recipes.errors import BAD_INPUT, FAILED, INTERRUPTED, OK, BadInput
from amlaunch.recipes.files import read_json_lines
from amlaunch.recipes.format.loader import LoadedRecipe, load
from amlaunch.recipes.python_process import PARENT_VARIABLE, die_with_parent, python_command
from amlaunch.recipes.run_layout import ElementDir
from amlaunch.recipes.shipped import find_recipe
from amlaunch.recipes.version import VERSION
from amlaunch.trainer.process.errors import exit_process, print_error, run_guarded, stdout_to_stderr
from amlaunch.trainer.process.rank_environment import rank_of, read_rank_environment
from amlaunch.trainer.process.stop_request import StopFlag

if TYPE_CHECKING:
    from amlaunch.trainer.loop.training_state import TrainingState

FOLDER_VARIABLE = "AMLAUNCH_BENCH_FOLDER"
"""Folder shared by all ranks of ``--ranks``, with synthetic shards; the parent process removes it."""
MEASUREMENT_OVERRIDES = (
    "--checkpoint.enabled=false",
    "--validation_dataset=null",
    "--export=null",
    "--wandb=null",
    "--tensorboard=null",
)
"""Overrides that disable everything but training."""
MAX_SYNTHETIC_TOKENS = 1 << 24
"""Maximum number of synthetic tokens: more than any cache holds, and quick to write."""
MFU_CONVENTION = "6N + 12LTd operations per token, as nanoGPT counts, against the manufacturer's dense bfloat16 peak"
POLL_SECONDS = 0.1
FAILURE_GRACE_SECONDS = 5.0
"""Time that the other ranks have to end after one has failed."""
CPU_GEMM_SIDE, CPU_COPY_BYTES, CPU_ATTEMPTS = 512, 64 << 20, 3
"""Reference work for a CPU. The best of several attempts counts, because other processes use the CPU, too."""


class MeasurementStopped(Exception):
    """A signal arrived before the measurement was complete."""


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and return the exit code."""
    die_with_parent()
    return run_guarded(lambda: run(arguments))


def run(arguments: Sequence[str]) -> int:
    """Measure and print; errors propagate to :func:`main`."""
    options, overrides = make_parser().parse_known_args(arguments)
    try:
        if options.what == "data":
            return bench_data(options, overrides)
        if (options.ranks or 1) > 1 and "RANK" not in os.environ:
            return bench_train_on_ranks(options, overrides, list(arguments))
        return bench_train(options, overrides)
    except (MeasurementStopped, KeyboardInterrupt):
        if rank_of(os.environ) == 0:
            print_error("interrupted: nothing was measured")
        return INTERRUPTED


# --- the command line -----------------------------------------------------------------------------


class BenchParser(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise BadInput instead of printing the usage."""
        raise BadInput(f"{message}. See {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; arguments that it does not know override recipe keys."""
    parser = BenchParser(prog="amlaunch bench", description="Measure the trainer on this machine.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, text in (("train", "measure training steps"), ("data", "measure reading the training data")):
        command = commands.add_parser(
            name, help=text, allow_abbrev=False, epilog="To override any recipe key, add --section.key value."
        )
        command.add_argument(
            "recipe", nargs="?", default="nanogpt", help="a YAML file or the name of a shipped recipe (nanogpt)"
        )
        command.add_argument(
            "--data", type=Path, metavar="DIR", help="folder of shards (default: the recipe's, else synthetic tokens)"
        )
        command.add_argument("--steps", type=_positive, default=20, metavar="N", help="steps to measure (20)")
        command.add_argument("--warmup", type=_positive, default=5, metavar="N", help="warm-up steps before those (5)")
        command.add_argument(
            "--allow-target", action="append", default=[], metavar="NAME", help="allow a _target_ to load NAME"
        )
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        if name == "train":
            command.add_argument("--ranks", type=_positive, metavar="N", help="ranks on this machine (1)")
            command.add_argument(
                "--profiled",
                type=_non_negative,
                default=3,
                metavar="N",
                help="steps to run under the profiler afterwards (3); 0 disables it",
            )
            command.add_argument("--keep", type=Path, metavar="DIR", help="keep trace and metrics in this folder")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _non_negative(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


# --- the measured recipe --------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchSetup:
    """A recipe prepared for measurement."""

    loaded: LoadedRecipe
    folder: Path
    synthetic: bool
    """True if the shards hold synthetic tokens."""


@contextlib.contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Provide a folder for the measurement; remove it unless the user keeps it or another process owns it."""
    requested_folder = os.environ.get(FOLDER_VARIABLE) or getattr(options, "keep", None)
    folder = Path(requested_folder or tempfile.mkdtemp(prefix="amlaunch-bench-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not requested_folder:
            shutil.rmtree(folder, ignore_errors=True)


def set_up(options: argparse.Namespace, overrides: Sequence[str], folder: Path) -> BenchSetup:
    """Load the recipe for measurement; write synthetic shards, once for all ranks, if its data is missing."""
    path = find_recipe(options.recipe)
    all_overrides = [*overrides, *MEASUREMENT_OVERRIDES, *step_overrides(options)]
    loaded = load(path, all_overrides, allow=options.allow_target, job_start=True, has_shards=True)
    if has_data(loaded, options.data):
        return BenchSetup(loaded, folder, synthetic=False)
    if FOLDER_VARIABLE not in os.environ:
        print_error(
            "note: the recipe names no shards (dataset.file_pattern); using synthetic tokens (same speed). To read a "
            "run's shards, add --data DIR"
        )
        write_synthetic_shards(loaded, folder)
    all_overrides.append(f"--dataset.file_pattern={folder}/[ab].bin")
    loaded = load(path, all_overrides, allow=options.allow_target, job_start=True)
    return BenchSetup(loaded, folder, synthetic=True)


def step_overrides(options: argparse.Namespace) -> list[str]:
    """Return overrides that set the number of steps and the profiled steps.

    The step between measured and profiled ones counts as neither, because a step's time ends when the next one starts.
    """
    measured_steps, profiled_steps = options.warmup + options.steps, getattr(options, "profiled", 0)
    # Else the epochs of a small data set end the measurement early.
    no_epochs = "--step_scheduler.num_epochs=null"
    if not profiled_steps:
        return [no_epochs, f"--step_scheduler.max_steps={measured_steps}", "--profile=null"]
    return [
        no_epochs,
        f"--step_scheduler.max_steps={measured_steps + 1 + profiled_steps}",
        f"--profile={{start_step: {measured_steps + 2}, steps: {profiled_steps}}}",
    ]


def has_data(loaded: LoadedRecipe, data: Path | None) -> bool:
    """Return True if the recipe's data is known; a user's own data set locates its data itself."""
    node = loaded.recipe.dataset
    is_user_dataset = not node["_target_"].startswith("amlaunch.trainer.data.")
    return data is not None or node.get("file_pattern") is not None or is_user_dataset


def write_synthetic_shards(loaded: LoadedRecipe, folder: Path) -> None:
    """Write two shards of random tokens, ``a.bin`` and ``b.bin``, distributed as in text (Zipf's law)."""
    import numpy as np

    from amlaunch.preprocess.shards.shard_format import write_shard

    recipe = loaded.recipe
    vocab = int(recipe.loss_fn.get("vocab_size") or recipe.model.get("vocab_size") or 50257)
    length = int(recipe.dataset.get("seq_len", 1024))
    needed = recipe.step_scheduler.global_batch_size * length * (recipe.step_scheduler.max_steps or 1)
    count = min(MAX_SYNTHETIC_TOKENS, needed) + 2 * length + 2
    rng, dtype = np.random.default_rng(0), np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
    for name in ("a", "b"):
        tokens = np.minimum(vocab ** rng.random(count // 2 + 1, dtype=np.float64), vocab).astype(dtype) - dtype.type(1)
        write_shard(folder / f"{name}.bin", [tokens], dtype)


# --- training -------------------------------------------------------------------------------------


def bench_train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run ``bench train`` on this rank."""
    with work_folder(options) as folder:
        with stdout_to_stderr():
            report = measure_training(set_up(options, overrides, folder), options)
        if report is None:
            return OK
        if options.profiled and options.keep:
            print_error(f"trace and metrics are in {folder}")
        elif options.profiled:
            print_error("the trace will be deleted; use --keep DIR to keep it")
        print(json.dumps(report, indent=2) if options.json else format_report(report), flush=True)
    return OK


def measure_training(setup: BenchSetup, options: argparse.Namespace) -> dict[str, Any] | None:
    """Train and return the report; None on ranks other than 0. Raises MeasurementStopped."""
    from amlaunch.trainer.loop import job
    from amlaunch.trainer.process.arguments import Options

    ranks = read_rank_environment(os.environ)
    element = ElementDir(setup.folder / f"rank{ranks.rank}")
    element.root.mkdir(exist_ok=True)
    element.metrics.unlink(missing_ok=True)
    no_checkpoints = setup.folder / "none"
    job_options = Options(setup.loaded, element, checkpoints=no_checkpoints, data=options.data, run_id="bench")
    stop = StopFlag()
    stop.install()
    if job.run(job_options, stop) != OK:
        raise MeasurementStopped
    state = job.FINISHED[-1]
    rates = measure_device_rates(state)
    return TrainingReport(setup, options, state, rates, element).build() if state.world.is_main else None


@dataclass(frozen=True)
class DeviceRates:
    """Rates of the device, with all ranks working at the same time."""

    gemm_flops: float
    """Operations per second of a large matrix product."""
    copy_bytes: float
    """Bytes per second of a copy, read and write together."""


def measure_device_rates(state: TrainingState) -> DeviceRates:
    """Measure the device's rates in the precision of the run."""
    from amlaunch.trainer.parallel.world import compute_dtype
    from amlaunch.trainer.tools.gpu_check import CPU_SIZES, GPU_SIZES, measure_copy, measure_gemm

    cuda = state.world.device.type == "cuda"
    dtype = compute_dtype(state.recipe.distributed, state.world.device)
    sizes = GPU_SIZES if cuda else replace(CPU_SIZES, side=CPU_GEMM_SIDE, copy_bytes=CPU_COPY_BYTES)
    attempts = range(1 if cuda else CPU_ATTEMPTS)
    return DeviceRates(
        gemm_flops=max(measure_gemm(state.world, sizes, dtype) for _ in attempts) * 1e12,
        copy_bytes=max(measure_copy(state.world, sizes, sizes.copy_bytes) for _ in attempts) * 1e9,
    )


class TrainingReport:
    """The report of ``bench train``, as plain data."""

    def __init__(
        self,
        setup: BenchSetup,
        options: argparse.Namespace,
        state: TrainingState,
        rates: DeviceRates,
        element: ElementDir,
    ):
        from amlaunch.trainer.parallel.world import unwrap

        self._setup = setup
        self._state = state
        self._rates = rates
        self._element = element
        self._model = unwrap(state.model)
        lines = [line for line in read_json_lines(element.metrics) if line["step"] > options.warmup]
        self._measured = lines[: options.steps]
        self._profiled_steps = len(lines[options.steps + 1 :])
        self._first_loss, self._last_loss = lines[0]["loss"], lines[-1]["loss"]
        self._step_seconds = statistics.median(line["step_time_s"] for line in self._measured)
        self._sample_length = state.batches.step_tokens // state.batches.global_batch

    def build(self) -> dict[str, Any]:
        """Return all measurements."""
        return {
            **self._describe_run(),
            **self._speed(),
            "peak_memory_gib": max(line["peak_memory_gib"] for line in self._measured),
            "loss": {"first": self._first_loss, "last": self._last_loss},
            **self._describe_fast_paths(),
            "versions": versions(),
            **(self._roofline() if self._profiled_steps else {}),
        }

    def _describe_run(self) -> dict[str, Any]:
        import torch

        from amlaunch.trainer.models.base import parameter_count
        from amlaunch.trainer.parallel.world import compute_dtype

        recipe, world = self._state.recipe, self._state.world
        if world.device.type == "cuda":
            device = torch.cuda.get_device_name(world.device)
        else:
            device = f"CPU ({torch.get_num_threads()} threads per rank)"
        return {
            "recipe": recipe.name,
            "device": device,
            "host": platform.node(),
            "ranks": world.size,
            "strategy": recipe.distributed.strategy,
            "parameters": parameter_count(self._model),
            "dtype": str(compute_dtype(recipe.distributed, world.device)).removeprefix("torch."),
            "seq_len": self._sample_length,
            "global_batch_size": self._state.batches.global_batch,
            "local_batch_size": recipe.step_scheduler.local_batch_size,
            "synthetic_data": self._setup.synthetic,
        }

    def _speed(self) -> dict[str, Any]:
        from amlaunch.trainer.metrics.writers import peak_flops
        from amlaunch.trainer.models.base import flops_per_token

        world = self._state.world
        times = [line["step_time_s"] for line in self._measured]
        rate = self._state.batches.step_tokens / self._step_seconds
        operations = flops_per_token(self._model, self._sample_length)
        rank_flops = rate * operations / world.size
        peak = peak_flops(world.device)
        return {
            "steps": len(times),
            "tokens_per_s": rate,
            "tokens_per_s_per_gpu": rate / world.size,
            "step_time_s": {
                "median": self._step_seconds,
                "min": min(times),
                "max": max(times),
                "stdev": statistics.pstdev(times),
            },
            "data_time_share": sum(line["data_time_s"] for line in self._measured) / sum(times),
            "flops_per_token": operations,
            "mfu": rank_flops / peak if peak else None,
            "mfu_convention": MFU_CONVENTION,
            "peak_flops": peak,
            "measured_gemm_flops": self._rates.gemm_flops,
            "measured_copy_bytes_per_s": self._rates.copy_bytes,
            "of_measured_gemm": rank_flops / self._rates.gemm_flops,
        }

    def _describe_fast_paths(self) -> dict[str, Any]:
        from amlaunch.trainer.performance.compilation import compile_scope, compile_stats

        recipe = self._state.recipe
        metrics = self._state.metrics
        return {
            "startup_s": metrics.startup["seconds"] if metrics else None,
            "compile": {
                **asdict(recipe.compile),
                "scope": compile_scope(recipe.compile, recipe.distributed, self._state.world.size),
                **asdict(compile_stats()),
            },
            "fp8": recipe.fp8.enabled,
            "bf16_residual": recipe.distributed.bf16_residual,
            "loss_fn": recipe.loss_fn["_target_"],
            "attention": {"wanted": self._preferred_attention(), "used": []},
        }

    def _preferred_attention(self) -> str | None:
        """Return the first choice of attention backend; None on a CPU, where torch chooses."""
        from amlaunch.trainer.performance.attention_kernels import backend_order

        device = self._state.world.device
        return backend_order(self._state.recipe.sdpa_method, device)[0] if device.type == "cuda" else None

    def _roofline(self) -> dict[str, Any]:
        """Return the time of each part of a step, and what to change first."""
        import torch

        from amlaunch.trainer.metrics.profiling import trace_path
        from amlaunch.trainer.parallel.world import compute_dtype, is_sharded
        from amlaunch.trainer.tools import roofline

        recipe, world = self._state.recipe, self._state.world
        trace = trace_path(self._element.root / "profile", self._state.step, world.rank)
        summary = roofline.summarise_trace(roofline.read_trace(trace), self._profiled_steps)
        data_seconds = statistics.median(line["data_time_s"] for line in self._measured)
        parts = roofline.step_parts(summary, self._step_seconds, data_seconds, self._least_seconds())

        steps = recipe.step_scheduler
        has_float32_residual = compute_dtype(recipe.distributed, world.device) is torch.bfloat16 and not (
            recipe.distributed.bf16_residual or is_sharded(recipe.distributed)
        )
        advice = roofline.advise(
            parts,
            compiled=recipe.compile.enabled,
            on_gpu=summary.on_gpu,
            backends=summary.backends,
            has_float32_residual=has_float32_residual,
            host_waits=summary.host_waits or 0.0,
            micro_batch=steps.local_batch_size,
            accumulates=steps.local_batch_size * world.dp_size < steps.global_batch_size,
        )
        return {
            "attention": {"wanted": self._preferred_attention(), "used": list(summary.backends)},
            "host_waits_per_step": summary.host_waits,
            "roofline": [asdict(part) for part in parts],
            "advice": advice,
        }

    def _least_seconds(self) -> dict[str, float]:
        """Return the minimum time of each countable part of a step, on this rank."""
        from amlaunch.trainer.models.base import config_value, flops_per_token, vocab_rows
        from amlaunch.trainer.tools.roofline import least_seconds

        model = self._model
        matrix_flops = flops_per_token(model, 0)
        head_flops = 6.0 * (vocab_rows(model) or 0) * (config_value(model, "hidden_size", "n_embd") or 0)
        # causal attention takes half of the operations that the MFU convention counts
        attention_flops = (flops_per_token(model, self._sample_length) - matrix_flops) / 2
        return least_seconds(
            tokens=self._state.batches.step_tokens // self._state.world.size,
            block_flops=matrix_flops - head_flops,
            attention_flops=attention_flops,
            head_flops=head_flops,
            parameters=sum(_local_size(parameter) for parameter in model.parameters()),
            flops=self._rates.gemm_flops,
            bandwidth=self._rates.copy_bytes,
        )


def _local_size(parameter: Any) -> int:
    """Return the number of elements of a parameter on this rank."""
    return int(parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel())


def versions() -> dict[str, str | None]:
    """Return the versions of all software that affects speed."""
    import torch

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    try:
        import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = None
    return {
        "amlaunch": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn and str(cudnn),
        "nccl": nccl,
        "triton": triton_version,
    }


def format_report(report: dict[str, Any]) -> str:
    """Format the report of ``bench train`` for the console."""
    from amlaunch.trainer.tools.roofline import StepPart, format_table

    lines = [
        (
            "recipe",
            f"{report['recipe']}: {report['parameters']:,} parameters, {report['ranks']} x {report['device']}, "
            f"{report['strategy']}, {report['dtype']}",
        ),
        (
            "batch",
            f"{report['global_batch_size']} samples of {report['seq_len']} tokens per step, "
            f"micro-batches of {report['local_batch_size']}",
        ),
        ("tokens/s", f"{report['tokens_per_s']:,.0f} ({report['tokens_per_s_per_gpu']:,.0f} per rank)"),
        ("step time", _format_step_time(report)),
        ("MFU", _format_mfu(report)),
        (
            "GEMM rate",
            f"{report['of_measured_gemm']:.1%} of the {report['measured_gemm_flops'] / 1e12:.4g} TFLOP/s that a large "
            f"matrix product reaches here; copies reach {report['measured_copy_bytes_per_s'] / 1e9:.4g} GB/s",
        ),
        ("peak memory", f"{report['peak_memory_gib']:.2f} GiB"),
        ("startup", _format_startup(report)),
        ("attention", _format_attention(report["attention"])),
    ]
    host_waits = report.get("host_waits_per_step")
    if host_waits is not None:
        lines.append(("host waits", f"{host_waits:.1f} per step for the device"))
    lines.append(("versions", ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)))

    text = "\n".join(f"{name:<16}{value}" for name, value in lines)
    if "roofline" in report:
        parts = [StepPart(**part) for part in report["roofline"]]
        text += f"\n\n{format_table(parts)}\n\nadvice: {report['advice']}"
    return text


def _format_step_time(report: dict[str, Any]) -> str:
    milliseconds = {name: seconds * 1e3 for name, seconds in report["step_time_s"].items()}
    return (
        f"{milliseconds['median']:.1f} ms (median of {report['steps']}; {milliseconds['min']:.1f} to "
        f"{milliseconds['max']:.1f}, standard deviation {milliseconds['stdev']:.1f})"
    )


def _format_mfu(report: dict[str, Any]) -> str:
    if report["mfu"] is None:
        return f"unknown for this device ({report['device'].partition(' ')[0]})"
    return f"{report['mfu']:.1%} ({report['mfu_convention']})"


def _format_startup(report: dict[str, Any]) -> str:
    compilation = report["compile"]
    graphs = compilation["hits"] + compilation["misses"]
    text = f"{report['startup_s']:.1f} s to the first step"
    if not graphs:
        return f"{text} (nothing was compiled)"
    return (
        f"{text}, including {compilation['seconds']:.1f} s of compilation "
        f"({compilation['hits']} of {graphs} graphs were cached)"
    )


def _format_attention(attention: dict[str, Any]) -> str:
    preferred, used = attention["wanted"], attention["used"]
    if not used:
        return "unknown; run with --profiled 3 to see the kernels"
    text = ", ".join(used)
    return text if preferred is None or preferred in used else f"{text}; warning: {preferred} is unavailable"


# --- several ranks --------------------------------------------------------------------------------


def bench_train_on_ranks(options: argparse.Namespace, overrides: Sequence[str], arguments: list[str]) -> int:
    """Run this program once per rank of ``--ranks``; rank 0 prints the result, and one failure ends all."""
    with work_folder(options) as folder:
        # a wrong recipe is reported once, and synthetic shards are written once
        set_up(options, overrides, folder)
        return wait_for_ranks(start_ranks(folder, options.ranks, arguments))


def start_ranks(folder: Path, count: int, arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    """Start ``count`` ranks on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT_VARIABLE: str(os.getpid()),
        FOLDER_VARIABLE: str(folder),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [*python_command("amlaunch.trainer.tools.bench"), *arguments]
    return [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=None if rank == 0 else sys.stderr,
        )
        for rank in range(count)
    ]


def wait_for_ranks(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all ranks and return the exit code of the first failed one, or OK.

    After a failure, the other ranks have a short time to end, so that the lowest
    rank can report an error that all have seen; then they are killed.
    """
    deadline = None
    try:
        while None in [process.poll() for process in processes]:
            if deadline is None and any(process.returncode for process in processes):
                deadline = time.monotonic() + FAILURE_GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        codes = [process.wait() for process in processes]

    # prefer ranks that failed themselves to ranks that were killed
    failed = [rank for rank, code in enumerate(codes) if code > 0] or [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return OK
    code = codes[failed[0]]
    # the rank itself has reported bad input and interruptions
    if code not in (BAD_INPUT, INTERRUPTED):
        print_error(f"error: rank {failed[0]} ended with exit code {code}; nothing was measured")
    return code if code > 0 else FAILED


# --- data -----------------------------------------------------------------------------------------


def bench_data(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run ``bench data``: read batches ahead and copy them to the device as training does."""
    with work_folder(options) as folder:
        with stdout_to_stderr():
            report = measure_data(set_up(options, overrides, folder), options)
        if options.json:
            print(json.dumps(report, indent=2), flush=True)
        else:
            print(
                f"{report['tokens_per_s']:,.0f} tokens/s from {report['windows']:,} samples of {report['seq_len']} "
                f"tokens to {report['device']}: {report['step_time_s'] * 1e3:.2f} ms per step of "
                f"{report['global_batch_size']} samples (median of {report['steps']})",
                flush=True,
            )
    return OK


def measure_data(setup: BenchSetup, options: argparse.Namespace) -> dict[str, Any]:
    """Read the batches of all steps and return the report; warm-up steps do not count."""
    import torch

    from amlaunch.trainer.data.batches import StepBatches
    from amlaunch.trainer.data.datasets import sample_order_of
    from amlaunch.trainer.loop.job import build_dataset
    from amlaunch.trainer.parallel.world import join_world

    recipe = setup.loaded.recipe
    world = join_world(recipe.distributed, read_rank_environment(os.environ))
    dataset = build_dataset(recipe.dataset, recipe, setup.loaded.policy, options.data)
    order = sample_order_of(dataset, recipe.seed)
    batches = StepBatches(dataset, order, recipe.step_scheduler.global_batch_size, None, world)
    steps = options.warmup + options.steps
    batches.start(0, steps, recipe.dataloader.prefetch_factor, recipe.dataloader.num_workers)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        batches.next()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    batches.close()

    median = statistics.median(times[options.warmup :])
    return {
        "recipe": recipe.name,
        "device": world.device.type,
        "windows": order.size,
        "seq_len": batches.step_tokens // batches.global_batch,
        "global_batch_size": batches.global_batch,
        "synthetic_data": setup.synthetic,
        "steps": options.steps,
        "step_time_s": median,
        "tokens_per_s": batches.step_tokens / median,
        "versions": versions(),
    }


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
