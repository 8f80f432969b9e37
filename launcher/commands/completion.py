"""``amlaunch completion bash|zsh|tcsh``: print a script that completes commands, options, recipes and runs."""

from __future__ import annotations

import argparse

BASH_FUNCTIONS = """\
_amlaunch_runs() {
  local root="${AMLAUNCH_RUNS:-runs}"
  compgen -W "$(ls -1 "$root" 2>/dev/null)" -- "$1"
}
_amlaunch_recipes() {
  compgen -W "@RECIPES@" -- "$1"
  compgen -f -X '!*.y*ml' -- "$1"
  compgen -d -S / -- "$1"
}
"""
ZSH_FUNCTIONS = """\
_amlaunch_runs() { local -a found; found=(${AMLAUNCH_RUNS:-runs}/*(/N:t)); compadd -a found }
_amlaunch_recipes() { compadd @RECIPES@; _files -g '*.y(a|)ml' }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch completion``."""
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def run(options: argparse.Namespace) -> int:
    """Print the script; ``eval "$(amlaunch completion bash)"`` turns completion on."""
    import shtab

    from amlaunch.recipes.shipped import shipped_recipes

    parser = options.build_parser()
    for command in parser.commands.values():
        for action in command.arguments:
            if action.dest in ("run", "recipe"):
                function = f"_amlaunch_{action.dest}s"
                action.complete = {"bash": function, "zsh": function}

    functions = {"bash": BASH_FUNCTIONS, "zsh": ZSH_FUNCTIONS}.get(options.shell, "")
    preamble = functions.replace("@RECIPES@", " ".join(shipped_recipes()))
    print(shtab.complete(parser, shell=options.shell, preamble=preamble))
    return 0
