"""Measure the trainer's baseline: Hugging Face's GPT-2 in a minimal loop, eager or under ``torch.compile``.

Usage: python benchmarks/baselines.py eager|compile [--micro-batch N] [--steps N] [--warmup N] [--tiny]

Uses bfloat16 autocast, fused AdamW, and random tokens that are already on the
device, without clipping and schedule: less work than the trainer does. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure Hugging Face's GPT-2 in a minimal loop.")
    parser.add_argument("mode", choices=["eager", "compile"])
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="use a model that is small enough for a CPU")
    return parser.parse_args()


def build_model(tiny: bool) -> GPT2LMHeadModel:
    """Build GPT-2 124M with a padded vocabulary, or a tiny one."""
    sizes = {"n_positions": 1024, "vocab_size": 50304}
    if tiny:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 512}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def flops_per_token(model: GPT2LMHeadModel) -> int:
    """Return the operations per token by nanoGPT's convention."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters()) - model.transformer.wpe.weight.numel()
    return 6 * parameters + 12 * config.n_layer * config.n_embd * config.n_positions


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = build_model(options.tiny).to(device)
    forward = torch.compile(model) if options.mode == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    shape = (options.micro_batch, model.config.n_positions)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=device)

    started, times, loss = time.perf_counter(), [], torch.zeros(())
    warmup_seconds = 0.0
    for step in range(options.warmup + options.steps):
        if step == options.warmup:
            warmup_seconds = time.perf_counter() - started
        step_started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - step_started)

    median = statistics.median(times[options.warmup :])
    report = {
        "tokens_per_s": tokens.numel() / median,
        "step_time_s": {"median": median},
        "flops_per_token": flops_per_token(model),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "warmup_s": warmup_seconds,
        "loss": {"last": loss.item()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
