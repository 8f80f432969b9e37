"""``python -m trainer.export RECIPE --checkpoints DIR --out DIR``: the newest whole checkpoint as a Hugging Face folder.

``transformers.AutoModelForCausalLM.from_pretrained(DIR)`` loads our GPT-2 and
Llama, and whatever transformers built. The folder appears whole, an earlier
one is replaced. Then the model writes a sample.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.errors import OK, BadInput
from recipes.files import fsync_folder, write_json, write_text
from recipes.process import die_with_parent
from recipes.rundir import Heartbeat
from recipes.schema import Export, Recipe
from trainer.cli import Options, parse
from trainer.errors import guarded, leave

SAMPLE = "sample.txt"
WEIGHTS = "model.safetensors"
GPT2_VOCAB = 50257


def main(arguments: Sequence[str]) -> int:
    """Export and sample, and return the exit code."""
    die_with_parent()

    def work() -> int:
        return run(parse("python -m trainer.export", "Write the newest checkpoint as a Hugging Face folder.", arguments, export=True))

    return guarded(work)


def run(options: Options) -> int:
    """Export what ``options`` name. Raises BadInput where there is no whole checkpoint of this model."""
    from trainer.job import build_model
    from trainer.models import parameter_count, vocab_rows

    recipe, out = options.loaded.recipe, options.out
    if out is None:
        raise BadInput("--out DIR is missing")
    section = recipe.export or Export()
    model = build_model(recipe, options.loaded.policy)
    step = load_newest(options, model)
    tokenizer = manifest_tokenizer(options.data)
    vocab = min(tokenizer.get("n_vocab", sys.maxsize), vocab_rows(model) or sys.maxsize)
    print(f"exporting step {step} to {out}", flush=True)
    write_folder(out, model, vocab, section.dtype)
    count = parameter_count(model)
    text = sample(model, recipe, tokenizer, vocab) if section.max_new_tokens else None
    if text is not None:
        write_text(out / SAMPLE, text + "\n")
        print(f"--- a sample after step {step} ---\n{text}\n---", flush=True)
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    outputs = {str(path): path.stat().st_size for path in files}
    Heartbeat(options.element.progress).beat(unit="file", done=len(files), total=len(files), last=True)
    write_json(options.element.result, {"outputs": outputs, "sample": text, "parameters": count, "step": step})
    return OK


def load_newest(options: Options, model: Any) -> int:
    """Fill ``model`` from the newest whole checkpoint; returns its step. Raises BadInput where it is of another model."""
    from trainer import checkpoint
    from trainer.job import model_identity

    found = checkpoint.newest_whole_alone(options.checkpoints)
    checkpoint.check_identity(found, checkpoint.Identity(model_identity(options.loaded), found.meta["data"]))
    if options.loaded.recipe.distributed.dtype == "float64":
        model.double()
    checkpoint.load_weights(found, model)
    return found.step


def manifest_tokenizer(data: Path | None) -> dict[str, Any]:
    """What the data's manifest says of its tokenizer; empty without data."""
    from preprocess.shards import read_manifest

    return dict(read_manifest(data)["tokenizer"]) if data is not None else {}


def write_folder(out: Path, model: Any, vocab: int, dtype: str) -> None:
    """Replace ``out`` by a Hugging Face folder of ``model``, built beside it."""
    temp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    _fill(temp, model, vocab, dtype)
    for path in temp.iterdir():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_folder(temp)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(temp, out)
    fsync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fill(folder: Path, model: Any, vocab: int, dtype: str) -> None:
    import torch

    kind = getattr(torch, dtype)
    if hasattr(model, "save_pretrained"):
        model.to(kind).save_pretrained(folder)
        return
    tensors = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in state(model).items()}
    if not hasattr(model, "hf_export"):
        print(f"{type(model).__name__} has no hf_export(): only {WEIGHTS} is written, under the model's own names", flush=True)
        _save_tensors(folder, tensors)
        return
    config, tensors = model.hf_export(tensors, vocab)
    _save_tensors(folder, tensors)
    write_json(folder / "config.json", {**config, "torch_dtype": dtype})
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


def state(model: Any) -> dict[str, Any]:
    """Parameters and persistent buffers by name, on the CPU; a tied tensor once, under its first name."""
    first = {id(tensor): name for name, tensor in reversed(list(model.state_dict(keep_vars=True).items()))}
    named = model.state_dict(keep_vars=True)
    return {name: tensor.detach().cpu() for name, tensor in named.items() if first[id(tensor)] == name}


def _save_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def sample(model: Any, recipe: Recipe, tokenizer: dict[str, Any], vocab: int) -> str | None:
    """Prompt and continuation; None, with the reason on stdout, where there is no tokenizer that fits."""
    from trainer.models import context_of
    from trainer.sample import generate

    section = recipe.export or Export()
    if not tokenizer and not GPT2_VOCAB <= vocab < sys.maxsize:
        size = "the model does not state its vocab_size" if vocab == sys.maxsize else f"a vocabulary of {vocab} is not GPT-2's"
        print(f"no sample: {size}, and no --data DIR names the tokenizer", flush=True)
        return None
    try:
        from preprocess.tokenizer import load_tokenizer

        known = load_tokenizer(tokenizer.get("name", "gpt2"))
    except (ImportError, BadInput) as error:
        print(f"no sample: {error}", flush=True)
        return None
    prompt = [known.bos, *known.encode(section.prompt).tolist()]
    ids = generate(
        model.float(),
        prompt,
        section.max_new_tokens,
        context=context_of(model) or recipe.dataset.get("seq_len", 1024),
        vocab_size=min(vocab, known.n_vocab),
        temperature=section.temperature,
        top_k=section.top_k,
        seed=recipe.seed,
        stop_token=known.eot,
    )
    return section.prompt + known.decode(ids)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
