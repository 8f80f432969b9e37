"""Generate text from a checkpoint.

``python -m amlaunch.trainer.tools.generate RECIPE --checkpoints DIR --prompt TEXT``

Only the text goes to stdout, everything else to stderr. The recipe's ``export``
section controls sampling (``--export.max_new_tokens 200``).
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
    """Generate text and return the exit code."""
    die_with_parent()

    def work() -> int:
        program = "python -m amlaunch.trainer.tools.generate"
        return run(parse(program, "Generate text with a checkpoint's model.", arguments, kind="generate"))

    return run_guarded(work)


def run(options: Options) -> int:
    """Print the prompt and its continuation.

    Raises BadInput if there is no intact checkpoint or no matching tokenizer.
    """
    from amlaunch.trainer.checkpoints.hf_folder import Vocabulary
    from amlaunch.trainer.data.token_stream import shards_folder
    from amlaunch.trainer.tools.export import load_selected, sample

    with redirect_stdout(sys.stderr):
        step, model = load_selected(options)
        vocabulary = Vocabulary.of_model(model, shards_folder(options.data, options.loaded.recipe.dataset))
        print(f"generating with the checkpoint of step {step}", flush=True)
        text = sample(model, options, vocabulary, options.prompt, options.sample_seed)
    if text is None:
        raise BadInput("text generation needs a tokenizer; the note above says why there is none")
    print(text, flush=True)
    return OK


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
