"""The recipes that come with amlaunch, found by name from any folder."""

from __future__ import annotations

from pathlib import Path

from amlaunch.recipes.errors import BadInput, did_you_mean

FOLDER = Path(__file__).resolve().parent


def shipped() -> dict[str, Path]:
    """``{name: file}`` of the recipes that come with amlaunch."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by the name of one that comes with amlaunch.

    ``recipes/nanogpt.yaml`` is both: a path where there is such a file, else the
    shipped one. Raises BadInput with the nearest name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped()
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if stem in known and path.parent.name in ("", "recipes"):
        return known[stem]
    raise BadInput(
        f"there is no file {name!r} and no recipe of that name; {did_you_mean(stem, known)} (amlaunch recipes lists them)"
    )


def summary(path: Path) -> str:
    """The first comment line of a recipe: what it is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and line.strip("# "):
            return line.strip("# ").rstrip(".")
    return ""
