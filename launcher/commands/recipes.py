"""``amlaunch recipes``: list the recipes that come with amlaunch."""

from __future__ import annotations

import argparse
import json

from amlaunch.launcher.commands._shared import add_json_option
from amlaunch.recipes.shipped import recipe_summary, shipped_recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch recipes``."""
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """Print the name and the first line of each recipe; as JSON, its file too."""
    recipes = [
        {"name": name, "path": str(path), "summary": recipe_summary(path)} for name, path in shipped_recipes().items()
    ]
    if options.json:
        print(json.dumps(recipes, indent=2))
        return 0
    for recipe in recipes:
        print(f"{recipe['name']:<12} {recipe['summary']}")
    print("\namlaunch show NAME prints one; amlaunch local NAME runs it on this machine")
    return 0
