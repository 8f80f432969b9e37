"""Write a model as a folder that Hugging Face's ``from_pretrained`` loads."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from amlaunch.recipes.files import fsync_folder, write_json

WEIGHTS = "model.safetensors"


def manifest_tokenizer(data: Path | None) -> dict[str, Any]:
    """Return the tokenizer entry of the data's manifest; empty without data."""
    from amlaunch.preprocess.shards.shard_format import read_manifest

    return dict(read_manifest(data)["tokenizer"]) if data is not None else {}


def known_vocab(data: Path | None) -> int:
    """Return the vocabulary size of the data's tokenizer, without padding; ``sys.maxsize`` if unknown."""
    return int(manifest_tokenizer(data).get("n_vocab", sys.maxsize))


def write_folder(out: Path, model: Any, vocab: int, dtype: str, weights: dict[str, Any] | None = None) -> None:
    """Replace ``out`` atomically with a Hugging Face folder of ``model``.

    ``weights`` are stored instead of the model's own if given.
    """
    temp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    try:
        _fill(temp, model, vocab, dtype, weights)
        for path in temp.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        fsync_folder(temp)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise

    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(temp, out)
    fsync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fill(folder: Path, model: Any, vocab: int, dtype: str, weights: dict[str, Any] | None) -> None:
    import torch

    torch_dtype = getattr(torch, dtype)
    if hasattr(model, "save_pretrained") and weights is None:
        model.to(torch_dtype).save_pretrained(folder)
        return
    source = cpu_state(model) if weights is None else weights
    tensors = {
        name: tensor.to(torch_dtype) if tensor.is_floating_point() else tensor for name, tensor in source.items()
    }
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, state_dict=tensors)
        return
    if not hasattr(model, "hf_export"):
        print(
            f"note: {type(model).__name__} has no hf_export(); "
            f"writing only {WEIGHTS}, with the model's own tensor names",
            flush=True,
        )
        save_tensors(folder, tensors)
        return
    config, tensors = model.hf_export(tensors, vocab)
    save_tensors(folder, tensors)
    write_json(folder / "config.json", {**config, "torch_dtype": dtype})
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


def cpu_state(model: Any) -> dict[str, Any]:
    """Return parameters and persistent buffers by name on the CPU; tied tensors appear once, under their first name."""
    tensors = model.state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items() if first_names[id(tensor)] == name}


def save_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    """Write ``tensors`` into ``folder`` as one safetensors file."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
