"""Export a checkpoint as a Hugging Face folder.

``python -m amlaunch.trainer.tools.export RECIPE --checkpoints DIR --out DIR``

``transformers.AutoModelForCausalLM.from_pretrained(DIR)`` loads our GPT-2 and
Llama, and every model that transformers built. ``--step N`` or ``--best``
selects another checkpoint than the newest intact one. The folder appears
atomically and replaces an earlier export. Then the model writes a sample.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import reason_not_writable, write_json, write_text
from amlaunch.recipes.format.schema import Export
from amlaunch.recipes.python_process import die_with_parent
from amlaunch.recipes.run_layout import Heartbeat
from amlaunch.trainer.checkpoints.hf_folder import Vocabulary, write_folder
from amlaunch.trainer.process.arguments import Options, parse
from amlaunch.trainer.process.errors import exit_process, run_guarded

SAMPLE = "sample.txt"
OTHER_FOLDER = "Choose another folder with --out DIR"


def main(arguments: Sequence[str]) -> int:
    """Export, write a sample, and return the exit code."""
    die_with_parent()

    def work() -> int:
        program = "python -m amlaunch.trainer.tools.export"
        return run(parse(program, "Export a checkpoint as a Hugging Face folder.", arguments, kind="export"))

    return run_guarded(work)


def run(options: Options) -> int:
    """Export the selected checkpoint. Raises BadInput if there is no intact checkpoint of this model."""
    from amlaunch.trainer.data.token_stream import shards_folder
    from amlaunch.trainer.models.base import parameter_count

    recipe, out = options.loaded.recipe, options.out
    if out is None:
        raise BadInput("--out DIR is missing")
    check_out_folder(out)
    section = recipe.export or Export()
    step, model = load_selected(options)
    vocabulary = Vocabulary.of_model(model, shards_folder(options.data, recipe.dataset))
    print(f"exporting the checkpoint of step {step} to {out}", flush=True)
    write_folder(out, model, vocabulary, section.dtype)

    parameters = parameter_count(model)
    text = sample(model, options, vocabulary, section.prompt) if section.max_new_tokens else None
    if text is not None:
        write_text(out / SAMPLE, text + "\n")
        print(f"--- sample after step {step} ---\n{text}\n---", flush=True)

    if options.writes_result:
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        outputs = {str(path): path.stat().st_size for path in files}
        Heartbeat(options.element.progress).beat(unit="file", done=len(files), total=len(files), last=True)
        write_json(options.element.result, {"outputs": outputs, "sample": text, "parameters": parameters, "step": step})
    return OK


def check_out_folder(out: Path) -> None:
    """Raise BadInput if ``out`` holds anything but an earlier export, because an export replaces the folder."""
    if out.is_dir() and any(out.iterdir()) and not any(out.glob("*.safetensors")):
        raise BadInput(f"{out} holds other files, and an export would replace them. {OTHER_FOLDER}")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file. {OTHER_FOLDER}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out.parent} cannot be created ({error.strerror}). {OTHER_FOLDER}") from None
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{out.parent} is not writable ({reason_not_writable(out.parent)}). {OTHER_FOLDER}")


def load_selected(options: Options) -> tuple[int, Any]:
    """Return ``(step, model)`` of the selected checkpoint. Raises BadInput if it belongs to another model."""
    from amlaunch.trainer.checkpoints import checkpoint
    from amlaunch.trainer.loop.job import build_model, section_identity

    source = checkpoint.select_checkpoint(options.checkpoints, step=options.step, best=options.best)
    # only the model must match; the data may be any
    identity = checkpoint.Identity(section_identity(options.loaded, "model"), source.meta["data"])
    checkpoint.check_identity(source, identity)
    model = build_model(options.loaded.recipe, options.loaded.policy)
    if options.loaded.recipe.distributed.dtype == "float64":
        model.double()
    checkpoint.load_weights(source, model)
    return source.step, model


def sample(model: Any, options: Options, vocabulary: Vocabulary, prompt: str, seed: int | None = None) -> str | None:
    """Return the prompt and its continuation; None, with a note on stdout, without a matching tokenizer.

    If the data's tokenizer is unknown, GPT-2's is used if the vocabulary fits.
    """
    from amlaunch.trainer.models.base import context_length
    from amlaunch.trainer.models.sampling import generate

    recipe = options.loaded.recipe
    section = recipe.export or Export()
    try:
        tokenizer = vocabulary.load_tokenizer()
    except BadInput as error:
        print(f"note: no sample: {error}", flush=True)
        return None
    ids = generate(
        model.float(),
        [tokenizer.bos, *tokenizer.encode(prompt).tolist()],
        section.max_new_tokens,
        context=context_length(model) or recipe.dataset.get("seq_len", 1024),
        vocab_size=min(vocabulary.size, tokenizer.n_vocab),
        temperature=section.temperature,
        top_k=section.top_k,
        seed=recipe.seed if seed is None else seed,
        stop_token=tokenizer.eot,
    )
    return prompt + tokenizer.decode(ids)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
