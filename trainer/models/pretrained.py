"""Start from a Hugging Face folder: ``config.json`` and safetensors, of GPT-2 or Llama.

Any other architecture starts from ``transformers.AutoModelForCausalLM.from_pretrained``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json
from amlaunch.trainer.models.gpt2 import TRANSPOSED_IN_HF, build_gpt2_model
from amlaunch.trainer.models.llama import build_llama_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GPT2_KEYS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "layer_norm_epsilon",
    "bos_token_id",
    "eos_token_id",
)
LLAMA_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
)  # fmt: skip
VOCABULARY = ("wte.weight", "embed_tokens.weight", "lm_head.weight")


def load_pretrained_model(*, path: str, vocab_size: int | None = None, dropout: float = 0.0) -> nn.Module:
    """Our GPT-2 or Llama with the weights of the Hugging Face folder ``path``.

    ``vocab_size``: more rows than the folder has, which begin as any fresh ones
    (multiples of 128 are fastest). Raises BadInput for another architecture, and
    where something is missing or has another shape.
    """
    folder = Path(path).expanduser()
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise BadInput(
            f"model.path {path}: no config.json in {folder.resolve()}; a folder that save_pretrained() wrote was expected"
        )
    build = BUILDERS.get(str(config.get("model_type")))
    if build is None:
        raise BadInput(
            f"model.path {path}: a {config.get('model_type')!r}, not one of {', '.join(BUILDERS)}; "
            "model._target_ transformers.AutoModelForCausalLM.from_pretrained starts from any model of transformers"
        )
    rows = config.get("vocab_size", 0)
    if vocab_size is not None and vocab_size < rows:
        raise BadInput(f"model.vocab_size {vocab_size}: {folder} has {rows} tokens; write at least as many")
    model = build({**config, "vocab_size": vocab_size or rows}, dropout, path)
    copy_weights(model, read_tensors(folder), folder)
    return model


def _gpt2(config: Mapping[str, Any], dropout: float, path: str) -> nn.Module:
    known = {key: config[key] for key in GPT2_KEYS if config.get(key) is not None}
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise BadInput(
            f"model.path {path}: its attention or MLP is not GPT-2's; use transformers.AutoModelForCausalLM.from_pretrained"
        )
    return build_gpt2_model(**known, activation=config.get("activation_function", "gelu_new"), dropout=dropout)


def _llama(config: Mapping[str, Any], dropout: float, path: str) -> nn.Module:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    odd = (
        rope.get("rope_type", rope.get("type", "default")) != "default"
        or config.get("attention_bias")
        or config.get("mlp_bias")
    )
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if odd or dropout or head_dim * config["num_attention_heads"] != config["hidden_size"]:
        raise BadInput(
            f"model.path {path}: scaled rotary positions, biases, dropout or odd head sizes; use transformers.AutoModelForCausalLM.from_pretrained"
        )
    known = {key: config[key] for key in LLAMA_KEYS if isinstance(config.get(key), (int, float))}
    return build_llama_model(**known, rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)))


BUILDERS = {"gpt2": _gpt2, "llama": _llama}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, of one file or of several with an index. Raises BadInput where one is missing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = read_json(folder / INDEX)
    names = sorted(set(index["weight_map"].values())) if index else [WEIGHTS]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{folder / name} cannot be read ({error})") from None
    return tensors


@torch.no_grad()
def copy_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copy Hugging Face's ``tensors`` into our ``model``, whose names are theirs without the first part."""
    given = {name.removeprefix("transformer.").removeprefix("model."): tensor for name, tensor in tensors.items()}
    transposed = TRANSPOSED_IN_HF if hasattr(model, "wte") else ()
    for name, parameter in model.named_parameters():
        if name not in given:
            raise BadInput(f"{folder} has no tensor {name!r}")
        found = given[name].t() if transposed and name.endswith(transposed) else given[name]
        room = parameter[: len(found)] if name in VOCABULARY else parameter
        if room.shape != found.shape:
            raise BadInput(f"{folder}: {name} is {tuple(found.shape)}, its config.json says {tuple(room.shape)}")
        room.copy_(found)
