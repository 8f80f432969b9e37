"""``python -m amlaunch.trainer.tools.generate RECIPE --checkpoints DIR --prompt TEXT``: text that a checkpoint's model writes.

The text alone goes to stdout, everything else to stderr. How it is drawn is
the recipe's ``export`` section (``--export.max_new_tokens 200``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.python_process import die_with_parent
from amlaunch.trainer.process.arguments import Options, parse
from amlaunch.trainer.process.errors import exit_process, run_guarded


def main(arguments: Sequence[str]) -> int:
    """Generate, and return the exit code."""
    die_with_parent()
    return run_guarded(
        lambda: run(
            parse(
                "python -m amlaunch.trainer.tools.generate",
                "Write text with a checkpoint's model.",
                arguments,
                kind="generate",
            )
        )
    )


def run(options: Options) -> int:
    """Print prompt and continuation. Raises BadInput where there is no whole checkpoint, or no tokenizer that fits."""
    from amlaunch.trainer.checkpoints.hf_folder import known_vocab, manifest_tokenizer
    from amlaunch.trainer.models.base import vocab_rows
    from amlaunch.trainer.tools.export import load_chosen, sample

    with redirect_stdout(sys.stderr):
        step, model = load_chosen(options)
        vocab = min(known_vocab(options.data), vocab_rows(model) or sys.maxsize)
        print(f"the model after step {step} writes", flush=True)
        text = sample(model, options, manifest_tokenizer(options.data), vocab, options.prompt, options.sample_seed)
    if text is None:
        raise BadInput("without a tokenizer there is no text")
    print(text, flush=True)
    return OK


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
