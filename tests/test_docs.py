"""The pages speak of what is there: links, files, modules, tests and rooms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PARTS = ("launcher", "trainer", "preprocess", "containers", "recipes", "tests", "benchmarks", "docs")
HISTORY = ("log.md",)
"""Pages about what was once there."""


def name_of(page: Path) -> str:
    return page.name


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=name_of)
def test_files_modules_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(rf"(?<![\w./-])((?:{'|'.join(PARTS)})/[\w./-]+\.(?:py|sh|yaml|md))", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = re.findall(r"python -m (amlaunch(?:\.\w+)*)", text)
    files = [ROOT / "src" / module.replace(".", "/") for module in modules]
    assert [str(file) for file in files if not (file.with_suffix(".py").exists() or file.is_dir())] == []
    targets = re.findall(r"\b(amlaunch\.trainer(?:\.\w+)+)\b", text)
    sources = "\n".join(path.read_text() for path in (ROOT / "trainer").rglob("*.py"))
    assert [name for name in targets if not re.search(rf"\b{name.rpartition('.')[2]}\b", sources)] == []
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    named = re.findall(r"`(test_\w+?)(?:_?\.\.\.)?(?:\[[^`]*\])?`", text)
    assert [name for name in named if not re.search(rf"def {name}", tests)] == []


def test_the_design_page_shows_every_room() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    tree = text[text.index("## The tree") : text.index("## The run directory")]
    for part in PARTS[:5]:
        folders = [path for path in (ROOT / part).iterdir() if (path / "__init__.py").exists()]
        shown = tree[tree.index(f"\n{part}/\n") :]
        for folder in folders:
            assert re.search(rf"^  {folder.name}/ +\S", shown, re.MULTILINE), folder
