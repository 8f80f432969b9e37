"""Recognise secrets by the names of their keys and variables, and keep literal ones out of stored recipes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.yaml_reader import KeyPath

SECRET_VARIABLE = re.compile(r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH)(_|$)", re.IGNORECASE)
"""Names of environment variables that hold a secret."""
SECRET_KEY = re.compile(
    r"(^|_)((api|access|private|wandb|secret)_?key|token|secret|passwd|password|credentials?)$", re.IGNORECASE
)
"""Keys of a recipe that hold a secret."""
SPECIAL_TOKEN_KEY = re.compile(r"(^|_)(bos|eos|eot|pad|unk|sep|cls|mask)_token$", re.IGNORECASE)
"""Keys that match :data:`SECRET_KEY` but name a token of the tokenizer."""


def is_secret_variable(name: str) -> bool:
    """Return True if an environment variable holds a secret, judged by its name."""
    return SECRET_VARIABLE.search(name) is not None


def is_secret(key: str) -> bool:
    """Return True if a key of a recipe holds a secret, judged by its name."""
    return SECRET_KEY.search(key) is not None and SPECIAL_TOKEN_KEY.search(key) is None


def refuse_secrets(tree: Any, lines: Mapping[KeyPath, str], path: KeyPath = ()) -> None:
    """Raise BadInput for a literal secret, because the run directory would store it."""
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            refuse_secrets(value, lines, (*path, str(key)))
        return
    if not path or not isinstance(tree, str) or not tree or not is_secret(path[-1]):
        return
    if re.fullmatch(r"\$\{\w+\}", tree):
        return
    name = path[-1].upper()
    # An override's place contains the secret itself.
    place = re.sub("=.*", "", lines.get(path, "recipe"), flags=re.DOTALL)
    raise BadInput(
        f"{place}: {'.'.join(path)}: the run directory would store this secret; export {name}=… and write ${{{name}}}"
    )
