"""``amlaunch completion bash|zsh|tcsh``: completion of commands, options, recipes and runs, for the shell to read."""

from __future__ import annotations

import argparse

RUNS_BASH = """\
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
RUNS_ZSH = """\
_amlaunch_runs() { local -a found; found=(${AMLAUNCH_RUNS:-runs}/*(/N:t)); compadd -a found }
_amlaunch_recipes() { compadd @RECIPES@; _files -g '*.y(a|)ml' }
"""


def run(options: argparse.Namespace) -> int:
    """Print the script; ``eval "$(amlaunch completion bash)"`` turns it on."""
    import shtab

    from amlaunch.recipes.shipped import shipped_recipes

    names = " ".join(shipped_recipes())
    parser = options.parser
    for command in parser._subparsers._group_actions[0].choices.values():
        for action in command._actions:
            if action.dest in ("run", "recipe"):
                action.complete = {"bash": f"_amlaunch_{action.dest}s", "zsh": f"_amlaunch_{action.dest}s"}
    preamble = {"bash": RUNS_BASH, "zsh": RUNS_ZSH}.get(options.shell, "")
    print(shtab.complete(parser, shell=options.shell, preamble=preamble.replace("@RECIPES@", names)))
    return 0
