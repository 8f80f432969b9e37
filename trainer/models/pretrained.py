"""Starting weights from a Hugging Face folder of GPT-2 or Llama: ``config.json`` and safetensors.

Any other architecture starts from ``transformers.AutoModelForCausalLM.from_pretrained``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json
from amlaunch.trainer.models.gpt2 import TRANSPOSED_IN_HF, GPT2Config, build_gpt2_model
from amlaunch.trainer.models.llama import LlamaConfig, build_llama_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GPT2_KEYS = {field.name for field in dataclasses.fields(GPT2Config)} - {"dropout", "activation"}
LLAMA_KEYS = {field.name for field in dataclasses.fields(LlamaConfig)} - {"rope_theta"}
VOCABULARY_PARAMETERS = ("wte.weight", "embed_tokens.weight", "lm_head.weight")
ANY_MODEL_TARGET = "transformers.AutoModelForCausalLM.from_pretrained"


def load_pretrained_model(*, path: str, vocab_size: int | None = None, dropout: float = 0.0) -> nn.Module:
    """Build our GPT-2 or Llama with the weights of the Hugging Face folder ``path``.

    ``vocab_size`` may exceed the folder's: the additional rows keep their initial weights (multiples of 128 are
    fastest). Raises BadInput for another architecture, and for tensors that are missing or have another shape.
    """
    folder = Path(path).expanduser()
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise BadInput(
            f"model.path {path}: no config.json in {folder.resolve()}; give a folder that save_pretrained() wrote"
        )
    build = BUILDERS.get(str(config.get("model_type")))
    if build is None:
        raise BadInput(
            f"model.path {path}: model_type is {config.get('model_type')!r}, not one of {', '.join(BUILDERS)}; "
            f"for any other model of transformers, set model._target_ to {ANY_MODEL_TARGET}"
        )
    rows = config.get("vocab_size", 0)
    if vocab_size is not None and vocab_size < rows:
        raise BadInput(f"model.vocab_size {vocab_size} is too small: {folder} has {rows} tokens; set at least {rows}")
    model = build({**config, "vocab_size": vocab_size or rows}, dropout, path)
    copy_weights(model, read_tensors(folder), folder)
    return model


def _build_gpt2(config: Mapping[str, Any], dropout: float, path: str) -> nn.Module:
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise BadInput(
            f"model.path {path}: its attention or MLP differs from GPT-2's; set model._target_ to {ANY_MODEL_TARGET}"
        )
    sizes = {key: config[key] for key in GPT2_KEYS if config.get(key) is not None}
    return build_gpt2_model(**sizes, activation=config.get("activation_function", "gelu_new"), dropout=dropout)


def _build_llama(config: Mapping[str, Any], dropout: float, path: str) -> nn.Module:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    has_scaled_rope = rope.get("rope_type", rope.get("type", "default")) != "default"
    has_biases = config.get("attention_bias") or config.get("mlp_bias")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    has_custom_head_dim = head_dim * config["num_attention_heads"] != config["hidden_size"]
    if has_scaled_rope or has_biases or dropout or has_custom_head_dim:
        raise BadInput(
            f"model.path {path}: amlaunch's Llama does not support scaled rotary positions, biases, dropout or a "
            f"head_dim other than hidden_size / num_attention_heads; set model._target_ to {ANY_MODEL_TARGET}"
        )
    sizes = {key: config[key] for key in LLAMA_KEYS if isinstance(config.get(key), (int, float))}
    return build_llama_model(**sizes, rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)))


BUILDERS = {"gpt2": _build_gpt2, "llama": _build_llama}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a Hugging Face folder, from one file or from several with an index.

    Raises BadInput if a file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = read_json(folder / INDEX)
    names = sorted(set(index["weight_map"].values())) if index else [WEIGHTS]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"cannot read {folder / name}: {error}") from None
    return tensors


@torch.no_grad()
def copy_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copy Hugging Face's ``tensors`` into our ``model``; their names have a prefix that ours lack."""
    sources = {name.removeprefix("transformer.").removeprefix("model."): tensor for name, tensor in tensors.items()}
    transposed = TRANSPOSED_IN_HF if hasattr(model, "wte") else ()
    for name, parameter in model.named_parameters():
        if name not in sources:
            raise BadInput(f"{folder}: the tensor {name!r} is missing")
        source = sources[name].t() if transposed and name.endswith(transposed) else sources[name]
        target = parameter[: len(source)] if name in VOCABULARY_PARAMETERS else parameter
        if target.shape != source.shape:
            raise BadInput(
                f"{folder}: {name} has shape {tuple(source.shape)}, but its config.json requires {tuple(target.shape)}"
            )
        target.copy_(source)
