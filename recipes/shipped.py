"""Find recipes by path, or by the name of one that comes with amlaunch."""

from __future__ import annotations

from pathlib import Path

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.suggestions import did_you_mean

FOLDER = Path(__file__).resolve().parent
ENDINGS = (".yaml", ".yml")


def shipped_recipes() -> dict[str, Path]:
    """Return ``{name: file}`` of the recipes that come with amlaunch."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path, or by the name of one that comes with amlaunch.

    A path to an existing file comes first. ``nanogpt``, ``nanogpt.yaml`` and ``recipes/nanogpt.yaml`` name the
    shipped recipe. Otherwise the ending may be missing or mixed up: ``tiny`` and ``tiny.yml`` find ``tiny.yaml``.
    Raises BadInput with the nearest name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path

    shipped = shipped_recipes()
    base = path.with_suffix("") if path.suffix in ENDINGS else path
    if base.name in shipped and path.parent.name in ("", "recipes"):
        return shipped[base.name]

    for ending in ENDINGS:
        candidate = base.with_name(base.name + ending) if base.name else base
        if candidate.is_file():
            return candidate

    if path.is_dir():
        files = _recipe_files(path)
        example = f", such as {files[0]}" if files else ""
        raise BadInput(f"no recipe {name!r}: it is a folder. Name a YAML file{example}")
    nearby = [file.stem for file in _recipe_files(path.parent)]
    raise BadInput(
        f"no recipe {name!r}: the file does not exist, and no shipped recipe has this name; "
        f"{did_you_mean(base.name, [*shipped, *nearby])} (`amlaunch recipes` lists the shipped ones)"
    )


def _recipe_files(folder: Path) -> list[Path]:
    """Return the YAML files in a folder."""
    return [path for ending in ENDINGS for path in sorted(folder.glob(f"*{ending}")) if path.is_file()]


def recipe_summary(path: Path) -> str:
    """Return the first comment line of a recipe, which says what it trains."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and line.strip("# "):
            return line.strip("# ").rstrip(".")
    return ""
