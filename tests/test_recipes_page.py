"""docs/recipes.md says what the schema says, in cells that can be read."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from amlaunch.recipes.format import schema
from amlaunch.recipes.format.section_checks import Checker
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.recipes.format.yaml_reader import parse

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_recipes_page", DOCS / "generate_recipes_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(generator):
    page = (DOCS / "recipes.md").read_text()
    assert generator.render(page) == page, "run python docs/generate_recipes_page.py"


def test_a_changed_default_would_be_seen(generator, monkeypatch):
    page = (DOCS / "recipes.md").read_text()
    monkeypatch.setitem(generator.EXAMPLES, "seed", "7")
    assert generator.render(page) != page
    with pytest.raises(ValueError, match="expected one"):
        generator.render(page.replace("<!-- end losses -->", ""))


def test_no_cell_is_over_200_characters():
    for line in (DOCS / "recipes.md").read_text().splitlines():
        if line.startswith("|"):
            assert all(len(cell) <= 202 for cell in re.split(r"(?<!\\)\|", line)), line


def test_the_examples_are_valid_and_name_keys_that_exist(generator):
    sections = generator.sections()
    keys = {f"{name}.{field.name}" for name, cls in sections.items() for field in fields(cls)}
    assert set(generator.EXAMPLES) <= keys | {field.name for field in fields(schema.Recipe)}
    for key, example in generator.EXAMPLES.items():
        section, _, name = key.rpartition(".")
        checker = Checker({}, {}, TargetPolicy(allow=("my_data.py",)), job_start=False)
        tree = parse(f"{name}: {example}", "example")[0]
        if name == "source":
            continue  # its file exists only beside a recipe
        if section:
            checker.section(sections[section], tree | ({"match": "x"} if section == "parameter_groups" else {}), ("x",))
        else:
            checker.section(schema.Recipe, {"model": None, "dataset": None} | tree, ())
            checker.problems = [problem for problem in checker.problems if f" {name}: " in problem]
        assert checker.problems == [], key
