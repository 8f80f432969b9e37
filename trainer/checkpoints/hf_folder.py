"""A folder as Hugging Face's ``from_pretrained`` reads it: how a model is written as one, whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from amlaunch.recipes.files import fsync_folder, write_json

WEIGHTS = "model.safetensors"


def manifest_tokenizer(data: Path | None) -> dict[str, Any]:
    """What the data's manifest says of its tokenizer; empty without data."""
    from amlaunch.preprocess.shards.shard_format import read_manifest

    return dict(read_manifest(data)["tokenizer"]) if data is not None else {}


def known_vocab(data: Path | None) -> int:
    """How many tokens the data's tokenizer has, beyond which a vocabulary is padding; unlimited where nobody says."""
    return int(manifest_tokenizer(data).get("n_vocab", sys.maxsize))


def write_folder(out: Path, model: Any, vocab: int, dtype: str, weights: dict[str, Any] | None = None) -> None:
    """Replace ``out`` by a Hugging Face folder of ``model``, built beside it; ``weights`` instead of its own."""
    temp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    _fill(temp, model, vocab, dtype, weights)
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


def _fill(folder: Path, model: Any, vocab: int, dtype: str, weights: dict[str, Any] | None) -> None:
    import torch

    kind = getattr(torch, dtype)
    if hasattr(model, "save_pretrained") and weights is None:
        model.to(kind).save_pretrained(folder)
        return
    named = state(model) if weights is None else weights
    tensors = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in named.items()}
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, state_dict=tensors)
        return
    if not hasattr(model, "hf_export"):
        print(
            f"{type(model).__name__} has no hf_export(): only {WEIGHTS} is written, under the model's own names",
            flush=True,
        )
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

    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )
