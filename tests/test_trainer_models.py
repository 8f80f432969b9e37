"""Our models equal transformers' with the same random weights, and meet the trainer's model interface."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.trainer.loss import MaskedCrossEntropy, compute_loss
from amlaunch.trainer.models.base import (
    blocks,
    context_length,
    enable_router_loss,
    flops_per_token,
    parameter_count,
    vocab_rows,
)
from amlaunch.trainer.models.gpt2 import TRANSPOSED_IN_HF, build_gpt2_model
from amlaunch.trainer.models.llama import build_llama_model
from amlaunch.trainer.models.pretrained import load_pretrained_model

TIGHT = 1e-12
GPT2_SIZES: dict[str, Any] = {"vocab_size": 97, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rope_theta": 500.0,
}


def randomized(model: nn.Module) -> nn.Module:
    """Convert to float64 and randomise every parameter: initial biases and norms would hide a mistake."""
    torch.manual_seed(1)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def losses_and_grads(ours: nn.Module, theirs: nn.Module) -> None:
    ids, labels = torch.randint(97, (2, 3, 16)).unbind()
    logits, reference_logits = ours(ids), theirs(ids).logits
    assert relative(logits, reference_logits) < TIGHT
    loss = MaskedCrossEntropy()(logits, labels)
    reference = F.cross_entropy(reference_logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert abs(loss.item() / reference.item() - 1) < TIGHT
    loss.backward()
    reference.backward()


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.slow
def test_gpt2_equals_transformers(activation: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = randomized(build_gpt2_model(**GPT2_SIZES, activation=activation))
    theirs = GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, activation_function=activation, bos_token_id=0, eos_token_id=0))
    theirs.double().eval()
    _, tensors = ours.hf_export(dict(ours.state_dict()), 97)
    missing = theirs.load_state_dict(tensors, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert not missing.unexpected_keys
    losses_and_grads(ours, theirs)
    grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = grads[f"transformer.{name}"].grad
        assert relative(parameter.grad, other.t() if name.endswith(TRANSPOSED_IN_HF) else other) < TIGHT, name


@pytest.mark.parametrize("tied", [False, True])
def test_llama_equals_transformers(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = randomized(build_llama_model(**LLAMA_SIZES, tie_word_embeddings=tied))
    config, tensors = ours.hf_export(dict(ours.state_dict()), 97)
    theirs = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in config.items() if key != "architectures"}))
    for name, module in list(theirs.named_modules()):  # transformers' norm rounds float64 to float32
        if type(module).__name__ == "LlamaRMSNorm":
            theirs.set_submodule(name, nn.RMSNorm(32, eps=config["rms_norm_eps"]))
    theirs.double().eval()
    assert set(theirs.load_state_dict(tensors, strict=False).missing_keys) <= {"lm_head.weight"}
    losses_and_grads(ours, theirs)
    grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = grads[name if name.startswith("lm_head") else f"model.{name}"].grad
        assert relative(parameter.grad, other) < TIGHT, name


def test_llama_equals_transformers_as_it_is_in_float32() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = randomized(build_llama_model(**LLAMA_SIZES)).float()
    config, tensors = ours.hf_export(dict(ours.state_dict()), 97)
    theirs = LlamaForCausalLM(
        LlamaConfig(**{key: value for key, value in config.items() if key != "architectures"})
    ).eval()
    theirs.load_state_dict(tensors)
    ids = torch.randint(97, (3, 16))
    assert relative(ours(ids), theirs(ids).logits) < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("files", ["one file", "several"])
def test_a_folder_of_transformers_is_a_start_with_the_same_logits(family: str, files: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    theirs = (
        GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)) if family == "gpt2" else LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES))
    )
    randomized(theirs).float().save_pretrained(tmp_path, max_shard_size="20KB" if files == "several" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (files == "several")
    ours = load_pretrained_model(path=str(tmp_path), vocab_size=128).eval()
    ids = torch.randint(97, (3, 16))
    assert ours(ids).shape[-1] == 128
    assert relative(ours(ids)[..., :97], theirs(ids).logits) < 1e-5


def test_a_folder_that_is_no_start_says_why(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(BadInput, match=r"no config.json in .*nothing"):
        load_pretrained_model(path=str(tmp_path / "nothing"))
    GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"model.vocab_size 96 is too small: .* has 97 tokens"):
        load_pretrained_model(path=str(tmp_path), vocab_size=96)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "opt"}, "model_type is 'opt', not one of gpt2, llama"),
        ({"n_layer": 3}, "the tensor 'h.2"),
        ({"n_embd": 64}, "its config.json requires"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BadInput, match=message):
            load_pretrained_model(path=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(BadInput, match=r"cannot read .*model.safetensors"):
        load_pretrained_model(path=str(tmp_path))


def test_a_fresh_gpt2_knows_nothing_and_its_residual_projections_are_small() -> None:
    torch.manual_seed(0)
    model = build_gpt2_model(vocab_size=512, n_positions=16, n_embd=64, n_layer=8, n_head=2)
    ids, labels = torch.randint(512, (2, 8, 16)).unbind()
    loss = MaskedCrossEntropy()(model(ids), labels) / labels.numel()
    assert abs(loss.item() - math.log(512)) < 0.1
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    model = build_gpt2_model(**GPT2_SIZES, dropout=0.5)
    ids = torch.randint(97, (2, 16))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_gpt2_124m_counts_855_megaflop_a_token() -> None:
    with torch.device("meta"):
        model = build_gpt2_model(vocab_size=50257, n_positions=1024)
    assert parameter_count(model) == 124_439_808
    assert flops_per_token(model, 1024) / 1e6 == pytest.approx(855, abs=1)


def test_an_embedding_that_is_only_looked_up_costs_no_flops() -> None:
    untied = build_llama_model(**LLAMA_SIZES)
    tied = build_llama_model(**LLAMA_SIZES, tie_word_embeddings=True)
    assert flops_per_token(untied, 16) == flops_per_token(tied, 16)


def test_blocks_are_the_longest_list_that_lies_in_no_other() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.ModuleList([nn.Linear(1, 1)])
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1)] * 8)}) for _ in range(3)
            )

    model = Mixture()
    assert blocks(model) == list(model.layers)
    model.wrap_blocks = ["few"]
    assert blocks(model) == list(model.few)
    assert blocks(nn.Linear(1, 1)) == []


def test_transformers_models_state_their_sizes() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(**GPT2_SIZES, bos_token_id=0, eos_token_id=0))
    assert (vocab_rows(model), context_length(model), len(blocks(model))) == (97, 16, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_transformers_counts_the_flops_of_ours(tied: bool) -> None:
    """Tables that are only looked up cost nothing: untied embeddings, and positions."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    more = {"tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    for config, ours in (
        (GPT2Config(**GPT2_SIZES, **more), build_gpt2_model(**GPT2_SIZES)),
        (LlamaConfig(**LLAMA_SIZES, **more), build_llama_model(**LLAMA_SIZES, tie_word_embeddings=tied)),
    ):
        assert flops_per_token(AutoModelForCausalLM.from_config(config), 16) == flops_per_token(ours, 16)


@pytest.mark.parametrize(
    ("build", "wrong", "word"),
    [
        (build_gpt2_model, {"n_embd": 30, "n_head": 4}, "n_embd 30"),
        (build_gpt2_model, {"n_embd": 32, "n_head": 4, "activation": "relu"}, "gelu_new"),
        (build_gpt2_model, {"n_embd": 32, "n_head": 4, "attn_implementation": "eager"}, "sdpa"),
        (build_llama_model, {"num_attention_heads": 16, "num_key_value_heads": 3}, "num_key_value_heads 3"),
        (build_llama_model, {"hidden_size": 1000}, "hidden_size 1000"),
    ],
)
def test_sizes_that_cannot_work_are_refused(build: Any, wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        build(**wrong)


def test_masked_cross_entropy_is_a_sum_over_the_labels_that_count() -> None:
    logits, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[1, -100, 2], [-100, -100, 4]])
    chosen = torch.log_softmax(logits, -1)
    expected = -(chosen[0, 0, 1] + chosen[0, 2, 2] + chosen[1, 2, 4])
    assert MaskedCrossEntropy()(logits, labels).item() == pytest.approx(expected.item(), rel=TIGHT)
    half = logits.bfloat16()
    assert torch.equal(MaskedCrossEntropy()(half, labels), MaskedCrossEntropy()(half.float(), labels))
    assert MaskedCrossEntropy(fp32_upcast=False)(half, labels).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("build", "sizes"), [(build_gpt2_model, GPT2_SIZES), (build_llama_model, LLAMA_SIZES)], ids=["gpt2", "llama"]
)
def test_documents_in_a_window_are_as_if_each_ran_alone(build: Any, sizes: dict[str, Any]) -> None:
    model = randomized(build(**sizes))
    lengths = ((5, 1, 10), (16,), (9, 7))
    ids = torch.randint(97, (3, 16))
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    ).int()
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    packed = model(ids, positions, documents)
    alone = [
        torch.cat([model(part) for part in row.split(list(cut), -1)], 1)
        for row, cut in zip(ids.split(1), lengths, strict=True)
    ]
    assert relative(packed, torch.cat(alone)) < TIGHT
    assert relative(packed, model(ids)) > 1e-3
    assert torch.equal(model(ids), model(ids, torch.arange(16).expand(3, 16)))


def test_a_mixture_of_experts_trains_its_router_and_counts_the_experts_that_work() -> None:
    """The oracle is transformers' own loss, a mean over labels with the router's part."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=97, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=1, **sizes)
    config.router_aux_loss_coef = 0.5
    model = MixtralForCausalLM(config)
    enable_router_loss(model)
    ids, labels = torch.randint(97, (2, 3, 8))
    labels[0, :5] = -100
    loss = compute_loss(model, model, MaskedCrossEntropy(), ids, labels)
    plain = MaskedCrossEntropy()(model(ids).logits, labels)
    theirs = model(ids, labels=torch.cat([ids[:, :1], labels[:, :-1]], dim=1))
    router_part = theirs.loss - F.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), labels[:, :-1].flatten())
    count = (labels != -100).sum()
    assert abs((loss - plain) / count - router_part) < 1e-5 and router_part > 0.1
    model.eval()
    assert compute_loss(model, model, MaskedCrossEntropy(), ids, labels) == MaskedCrossEntropy()(
        model(ids).logits, labels
    )

    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts == 2 * 4 * 3 * 16 * 32
    used = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel() - 0.75 * experts
    assert flops_per_token(model, 8) == 6 * used + 12 * 2 * 16 * 8
