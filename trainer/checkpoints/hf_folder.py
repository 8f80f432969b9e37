"""Write a model as a folder that Hugging Face's ``from_pretrained`` loads."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fsync_folder, read_object, write_json

if TYPE_CHECKING:
    from amlaunch.preprocess.tokenizers.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
GPT2_VOCAB = 50257
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


@dataclass(frozen=True)
class Vocabulary:
    """Number of tokens and special ids of an export: those of the tokenizer that made the data."""

    size: int
    """Without padding; ``sys.maxsize`` if neither the data nor the model says it."""
    tokenizer: Mapping[str, Any]
    """The tokenizer entry of the data's manifest; empty without data that amlaunch made."""

    @classmethod
    def of_model(cls, model: Any, data: Path | None) -> Vocabulary:
        """Return the vocabulary of ``model``, trained on the shards in ``data``. Raises BadInput without a manifest."""
        from amlaunch.preprocess.shards.shard_format import read_manifest
        from amlaunch.trainer.models.base import vocab_rows

        tokenizer = dict(read_manifest(data)["tokenizer"]) if data is not None else {}
        return cls(min(int(tokenizer.get("n_vocab", sys.maxsize)), vocab_rows(model) or sys.maxsize), tokenizer)

    def correct(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a Hugging Face config with this vocabulary's size and special ids, and with no other special id.

        If the tokenizer is unknown, only ids beyond the vocabulary are removed.
        """
        if "vocab_size" not in config and isinstance(config.get("text_config"), dict):
            return {**config, "text_config": self.correct(config["text_config"])}
        corrected = {key: value for key, value in config.items() if not key.endswith("_token_id") or self._has(value)}
        if "vocab_size" in config:
            corrected["vocab_size"] = min(self.size, config["vocab_size"])
        return {**corrected, **self.special_ids}

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made the data; GPT-2's if that is unknown and the vocabulary fits.

        Raises BadInput if there is none, and if it is no longer the one that made the data.
        """
        if not self.tokenizer and not GPT2_VOCAB <= self.size < sys.maxsize:
            what = f"the vocabulary size {self.size} is not GPT-2's"
            reason = what if self.size < sys.maxsize else "the model has no vocab_size"
            raise BadInput(f"{reason}. Pass --data DIR to use the tokenizer of its manifest")
        try:
            from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
        except ImportError as error:
            raise BadInput(str(error)) from None
        tokenizer = load_tokenizer(self.tokenizer.get("name", "gpt2"))
        if self.tokenizer and tokenizer.fingerprint != self.tokenizer["fingerprint"]:
            raise BadInput(f"the tokenizer {tokenizer.name} has changed since it made the data; restore its files")
        return tokenizer

    @property
    def special_ids(self) -> dict[str, int]:
        """``bos_token_id`` and ``eos_token_id`` as Hugging Face names them; empty if the tokenizer is unknown."""
        names = {"bos_token_id": "bos", "eos_token_id": "eot"}
        return {key: self.tokenizer[name] for key, name in names.items() if name in self.tokenizer}

    def _has(self, token_id: Any) -> bool:
        """Return True if a config may keep ``token_id``, a number or a list of numbers."""
        ids = token_id if isinstance(token_id, list) else [token_id]
        known = self.special_ids.values()
        return all(isinstance(one, int) and (one in known if known else 0 <= one < self.size) for one in ids)


def write_folder(
    out: Path, model: Any, vocabulary: Vocabulary, dtype: str, weights: dict[str, Any] | None = None
) -> None:
    """Replace ``out`` atomically with a Hugging Face folder of ``model``.

    ``weights`` are stored instead of the model's own if given.
    """
    temp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    try:
        _fill(temp, model, vocabulary, dtype, weights)
        if vocabulary.tokenizer:
            _write_tokenizer(temp, model, vocabulary)
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


def _fill(folder: Path, model: Any, vocabulary: Vocabulary, dtype: str, weights: dict[str, Any] | None) -> None:
    import torch

    torch_dtype = getattr(torch, dtype)
    source = cpu_state(model) if weights is None else weights
    tensors = {
        name: tensor.to(torch_dtype) if tensor.is_floating_point() else tensor for name, tensor in source.items()
    }
    if hasattr(model, "save_pretrained"):
        if weights is None:
            model.to(torch_dtype)  # for the dtype in config.json
        _cut_vocabulary(model, tensors, vocabulary.size)
        model.save_pretrained(folder, state_dict=tensors)
        for path in (folder / CONFIG, folder / GENERATION_CONFIG):
            if path.exists():
                write_json(path, vocabulary.correct(read_object(path)))
        return
    if not hasattr(model, "hf_export"):
        print(
            f"note: {type(model).__name__} has no hf_export(); "
            f"writing only {WEIGHTS}, with the model's own tensor names",
            flush=True,
        )
        save_tensors(folder, tensors)
        return
    config, tensors = model.hf_export(tensors, vocabulary.size)
    save_tensors(folder, tensors)
    config = vocabulary.correct({**config, "torch_dtype": dtype})
    write_json(folder / CONFIG, config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **ids})


def _write_tokenizer(folder: Path, model: Any, vocabulary: Vocabulary) -> None:
    """Write the data's tokenizer, or a note why not: weights without it are worth more than no export."""
    from amlaunch.preprocess.tokenizers.hf_files import write_tokenizer_files
    from amlaunch.trainer.models.base import context_length

    try:
        write_tokenizer_files(folder, vocabulary.load_tokenizer(), context_length(model))
    except BadInput as error:
        print(f"warning: the export has no tokenizer: {error}", flush=True)


def _cut_vocabulary(model: Any, tensors: dict[str, Any], size: int) -> None:
    """Cut the padding rows of a transformers model's embedding and output layer in its ``tensors``."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in ("weight", "bias"):
            name = f"{names.get(id(module), '')}.{parameter}"
            if name in tensors:
                tensors[name] = tensors[name][:size]


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
