"""What the trainer is compared with: Hugging Face's GPT-2 in a loop of a dozen lines, eager or under ``torch.compile``.

Usage: python benchmarks/baselines.py eager|compile [--micro-batch N] [--steps N] [--warmup N] [--tiny]

bfloat16 autocast, fused AdamW, random tokens that are on the device already, no clipping and no schedule: less work
than the trainer's. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=["eager", "compile"])
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU can do")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes = (
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 512}
        if given.tiny
        else {"n_positions": 1024, "vocab_size": 50304}
    )
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    config._attn_implementation = "sdpa"
    model = GPT2LMHeadModel(config).to(device)
    run = torch.compile(model) if given.how == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, config.vocab_size, (given.micro_batch, config.n_positions), device=device)
    began, times, loss = time.perf_counter(), [], torch.zeros(())
    for step in range(given.warmup + given.steps):
        if step == given.warmup:
            starting = time.perf_counter() - began
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = run(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[given.warmup :])
    rate = tokens.numel() / median
    count = sum(parameter.numel() for parameter in model.parameters()) - model.transformer.wpe.weight.numel()
    flops = 6 * count + 12 * config.n_layer * config.n_embd * config.n_positions
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    print(
        json.dumps(
            {
                "tokens_per_s": rate,
                "step_time_s": {"median": median},
                "flops_per_token": flops,
                "peak_memory_gib": peak,
                "warmup_s": starting,
                "loss": {"last": loss.item()},
            }
        )
    )


if __name__ == "__main__":
    main()
