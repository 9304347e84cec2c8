# SPDX-License-Identifier: Apache-2.0
"""The guides say what is there: every verb, section and word, and commands that exist."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import typer.main

from tutelage.cli import app, verbs
from tutelage.data.augment import PRESETS, STEPS
from tutelage.data.load import SOURCES, Spec
from tutelage.models.load import KINDS
from tutelage.run.objective import BINDING, ROLE_OPTIONS
from tutelage.run.recipe import (
    CompareSection,
    DataSection,
    FitSection,
    OptimizerSection,
    Paper,
    Recipe,
    TeacherSection,
    TrainSection,
    parse,
    read_yaml,
)

ROOT = Path(__file__).resolve().parent.parent
GUIDES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
PAGES = {**GUIDES, "README.md": (ROOT / "README.md").read_text(encoding="utf-8")}


def words(text: str) -> set[str]:
    """What stands in backquotes, and the parts of it."""
    found = re.findall(r"`([^`\n]+)`", text)
    return {part for one in found for part in (one, *re.split(r"[^\w-]+", one))}


def commands(text: str) -> Iterator[str]:
    for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
        yield from (line.split("  #")[0].strip() for line in block.splitlines() if line.startswith("tutelage "))


def test_the_guides_are_there() -> None:
    assert {"command_line.md", "data.md", "models.md", "recipes.md"} <= set(GUIDES)


def test_every_verb_is_told() -> None:
    rows = re.findall(r"^\| `(\w+)", GUIDES["command_line.md"], flags=re.MULTILINE)
    assert set(rows) == set(verbs())


@pytest.mark.parametrize(
    "section", [Recipe, TeacherSection, FitSection, OptimizerSection, TrainSection, Paper, CompareSection]
)
def test_every_word_of_a_recipe_is_told(section: type) -> None:
    text = GUIDES["recipes.md"]
    heads = {word for line in re.findall(r"^## (.*)$", text, flags=re.MULTILINE) for word in line.split(", ")}
    missing = [name for name in section.model_fields if name not in words(text) | heads]  # type: ignore[attr-defined]
    assert missing == []


def test_every_word_of_an_objective_is_told() -> None:
    assert {*BINDING, *ROLE_OPTIONS} <= words(GUIDES["recipes.md"])


def test_every_word_of_the_data_is_told() -> None:
    told = words(GUIDES["data.md"])
    assert [one.name for one in fields(Spec) if one.name not in told] == []
    assert set(DataSection.model_fields) == {one.name for one in fields(Spec)}
    assert [name for name in (*STEPS, *PRESETS, *SOURCES) if name not in told] == []


def test_every_kind_of_model_is_told() -> None:
    assert [kind for kind in KINDS if kind not in words(GUIDES["models.md"])] == []


def test_recipes_in_the_guides_are_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDES["recipes.md"], flags=re.DOTALL)
    whole = [block for block in blocks if block.startswith("teacher:")]
    assert whole
    base = read_yaml(whole[0], "guide")
    for block in blocks:
        parse({**base, **read_yaml(block, "guide")}, where="guide")


@pytest.mark.parametrize("page", sorted(PAGES))
def test_commands_in_the_guides_can_be_given(page: str) -> None:
    root = typer.main.get_command(app)
    for line in commands(PAGES[page]):
        _, verb, *arguments = shlex.split(line)
        command = root.commands[verb]  # type: ignore[attr-defined]
        command.make_context(verb, list(arguments), resilient_parsing=False).close()


def test_commands_are_found_at_all() -> None:
    assert len([line for text in GUIDES.values() for line in commands(text)]) > 10
