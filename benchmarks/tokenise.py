"""A preprocess element as a whole process, against a bare tiktoken loop over the same documents in memory.

The loop is the limit of the engine on one core: no reading, no writing, no
start-up. Text: the standard library's sources, repeated under other names.

Usage: python benchmarks/tokenise.py [COPIES]
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from preprocess.tokenizer import load_tokenizer

RECIPE = """\
model: {{_target_: trainer.models.gpt2.build_gpt2_model}}
dataset: {{seq_len: 1024}}
preprocess: {{data_files: "{text}/**/*.py", encoding: python, encoding_errors: skip}}
"""
ROUNDS = 3


def write_text(folder: Path, copies: int) -> list[str]:
    """Copies of the standard library's top-level modules; returns their texts."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for copy in range(copies):
            (folder / f"{copy}").mkdir(exist_ok=True)
            (folder / f"{copy}" / path.name).write_text(text, encoding="utf-8")
            texts.append(text)
    return texts


def bare_loop(texts: list[str]) -> tuple[float, int]:
    """Seconds and tokens of ``encode`` alone."""
    tokenizer = load_tokenizer("gpt2")
    began = time.perf_counter()
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    return time.perf_counter() - began, tokens


def element(folder: Path) -> float:
    """Seconds of ``python -m preprocess element``, start-up included."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "preprocess", "element", str(folder / "r.yaml"), "--index", "0", "--out", str(out)]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Interleaved rounds; prints both rates and their ratio."""
    copies = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        texts = write_text(folder / "text", copies)
        (folder / "r.yaml").write_text(RECIPE.format(text=folder / "text"))
        ratios = []
        for _ in range(ROUNDS):
            alone, tokens = bare_loop(texts)
            whole = element(folder)
            ratios.append(alone / whole)
            print(f"{tokens:,} tokens: bare loop {tokens / alone / 1e6:.2f}, element {tokens / whole / 1e6:.2f} million tokens/s, ratio {ratios[-1]:.2f}", flush=True)
        print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
