"""``python -m amlaunch.trainer.tools.export RECIPE --checkpoints DIR --out DIR``: a checkpoint as a Hugging Face folder.

``transformers.AutoModelForCausalLM.from_pretrained(DIR)`` loads our GPT-2 and
Llama, and whatever transformers built. ``--step N`` or ``--best`` takes another
than the newest whole checkpoint. The folder appears whole, an earlier one is
replaced. Then the model writes a sample.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import write_json, write_text
from amlaunch.recipes.format.schema import Export
from amlaunch.recipes.python_process import die_with_parent
from amlaunch.recipes.run_layout import Heartbeat
from amlaunch.trainer.checkpoints.hf_folder import known_vocab, manifest_tokenizer, write_folder
from amlaunch.trainer.process.arguments import Options, parse
from amlaunch.trainer.process.errors import exit_process, run_guarded

SAMPLE = "sample.txt"
GPT2_VOCAB = 50257


def main(arguments: Sequence[str]) -> int:
    """Export and sample, and return the exit code."""
    die_with_parent()

    def work() -> int:
        return run(
            parse(
                "python -m amlaunch.trainer.tools.export",
                "Write a checkpoint as a Hugging Face folder.",
                arguments,
                kind="export",
            )
        )

    return run_guarded(work)


def run(options: Options) -> int:
    """Export what ``options`` name. Raises BadInput where there is no whole checkpoint of this model."""
    from amlaunch.trainer.models.base import parameter_count, vocab_rows

    recipe, out = options.loaded.recipe, options.out
    if out is None:
        raise BadInput("--out DIR is missing")
    refuse_foreign(out)
    section = recipe.export or Export()
    step, model = load_chosen(options)
    tokenizer = manifest_tokenizer(options.data)
    vocab = min(known_vocab(options.data), vocab_rows(model) or sys.maxsize)
    print(f"exporting step {step} to {out}", flush=True)
    write_folder(out, model, vocab, section.dtype)
    count = parameter_count(model)
    text = sample(model, options, tokenizer, vocab, section.prompt) if section.max_new_tokens else None
    if text is not None:
        write_text(out / SAMPLE, text + "\n")
        print(f"--- a sample after step {step} ---\n{text}\n---", flush=True)
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    outputs = {str(path): path.stat().st_size for path in files}
    if options.writes_result:
        Heartbeat(options.element.progress).beat(unit="file", done=len(files), total=len(files), last=True)
        write_json(options.element.result, {"outputs": outputs, "sample": text, "parameters": count, "step": step})
    return OK


def refuse_foreign(out: Path) -> None:
    """BadInput where ``out`` holds something that no export wrote: it would be replaced."""
    if out.is_dir() and any(out.iterdir()) and not any(out.glob("*.safetensors")):
        raise BadInput(f"--out {out}: holds other files, and an export replaces the folder; name a new one")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file; name a folder")


def load_chosen(options: Options) -> tuple[int, Any]:
    """``(step, model)`` of the checkpoint that was asked for. Raises BadInput where it is of another model."""
    from amlaunch.trainer.checkpoints import checkpoint
    from amlaunch.trainer.loop.job import build_model, model_identity

    found = checkpoint.select_checkpoint(options.checkpoints, step=options.step, best=options.best)
    checkpoint.check_identity(found, checkpoint.Identity(model_identity(options.loaded), found.meta["data"]))
    model = build_model(options.loaded.recipe, options.loaded.policy)
    if options.loaded.recipe.distributed.dtype == "float64":
        model.double()
    checkpoint.load_weights(found, model)
    return found.step, model


def sample(
    model: Any, options: Options, tokenizer: dict[str, Any], vocab: int, prompt: str, seed: int | None = None
) -> str | None:
    """Prompt and continuation; None, with the reason on stdout, where there is no tokenizer that fits."""
    from amlaunch.trainer.models.base import context_length
    from amlaunch.trainer.models.sampling import generate

    recipe = options.loaded.recipe
    section = recipe.export or Export()
    if not tokenizer and not GPT2_VOCAB <= vocab < sys.maxsize:
        size = (
            "the model does not state its vocab_size"
            if vocab == sys.maxsize
            else f"a vocabulary of {vocab} is not GPT-2's"
        )
        print(f"no sample: {size}, and no --data DIR names the tokenizer", flush=True)
        return None
    try:
        from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer

        known = load_tokenizer(tokenizer.get("name", "gpt2"))
    except (ImportError, BadInput) as error:
        print(f"no sample: {error}", flush=True)
        return None
    ids = generate(
        model.float(),
        [known.bos, *known.encode(prompt).tolist()],
        section.max_new_tokens,
        context=context_length(model) or recipe.dataset.get("seq_len", 1024),
        vocab_size=min(vocab, known.n_vocab),
        temperature=section.temperature,
        top_k=section.top_k,
        seed=recipe.seed if seed is None else seed,
        stop_token=known.eot,
    )
    return prompt + known.decode(ids)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
