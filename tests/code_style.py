"""Print measures of the code's structure and style, and fail where a rule is broken.

    python tests/code_style.py

``make lint`` runs it. The rules:

* at most 12 modules in a product folder (``launcher/commands``, one module a command, excepted)
* no line over 120 characters
* no docstring that begins with What, Whether, Where, How, Who, Of or When
* no two public classes with one name
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("launcher", "trainer", "preprocess", "containers", "recipes")
ALL = (*PRODUCT, "tests", "benchmarks")
MAX_MODULES = 12
MAX_LINE = 120
EXCEPTED = ("launcher/commands",)
FORBIDDEN_FIRST_WORDS = re.compile(r"(What|Whether|Where|How|Who|Of|When)\b")


def python_files(folders: tuple[str, ...]) -> list[Path]:
    """List the Python files below some top-level folders, as paths relative to the repository."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def crowded_folders(files: list[Path]) -> Iterator[str]:
    """Yield each folder with more than ``MAX_MODULES`` modules; ``__init__`` and ``__main__`` do not count."""
    modules = Counter(str(path.parent) for path in files if path.stem not in ("__init__", "__main__"))
    for folder, count in modules.items():
        if count > MAX_MODULES and folder not in EXCEPTED:
            yield f"{folder}: {count} modules"


def long_lines(files: list[Path]) -> Iterator[str]:
    """Yield ``file:line`` of every line over ``MAX_LINE`` characters."""
    for path in files:
        for number, line in enumerate((ROOT / path).read_text().splitlines(), start=1):
            if len(line) > MAX_LINE:
                yield f"{path}:{number}: {len(line)} characters"


def documented(path: Path) -> Iterator[tuple[int, str]]:
    """Yield ``(line, docstring)`` of a module, its classes and its functions."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield getattr(node, "lineno", 1), docstring


def forbidden_docstrings(files: list[Path]) -> Iterator[str]:
    """Yield ``file:line`` of every docstring that begins with a forbidden word."""
    for path in files:
        for line, docstring in documented(path):
            if FORBIDDEN_FIRST_WORDS.match(docstring):
                yield f"{path}:{line}: {docstring.splitlines()[0][:60]}"


def duplicate_classes(files: list[Path]) -> Iterator[str]:
    """Yield the name of every public class that is defined in more than one module."""
    places: defaultdict[str, set[str]] = defaultdict(set)
    for path in files:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].add(str(path))
    for name, where in sorted(places.items()):
        if len(where) > 1:
            yield f"{name}: {', '.join(sorted(where))}"


def main() -> int:
    """Print each measure, and each breach; return 1 if there are any."""
    product, everything = python_files(PRODUCT), python_files(ALL)
    folders = Counter(str(path.parent) for path in product if path.stem not in ("__init__", "__main__"))
    longest = max(len(line) for path in everything for line in (ROOT / path).read_text().splitlines())
    print(f"{len(product)} product files, {sum(len((ROOT / path).read_text().splitlines()) for path in product)} lines")
    print("modules a folder: " + ", ".join(f"{folder} {count}" for folder, count in folders.most_common()))
    print(f"longest line: {longest} characters")
    checks = {
        "folders with too many modules": crowded_folders(product),
        "lines that are too long": long_lines(everything),
        "docstrings with a forbidden first word": forbidden_docstrings(product),
        "public classes that share a name": duplicate_classes(product),
    }
    failed = False
    for title, breaches in checks.items():
        found = list(breaches)
        print(f"{title}: {len(found)}")
        for breach in found:
            print(f"  {breach}")
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
