# SPDX-License-Identifier: Apache-2.0
"""A teacher's answers on disk, as a user asks for them."""

from pathlib import Path

import pytest

from tiny_recipe import recipe, tutelage

CAPSYS = pytest.CaptureFixture[str]


def test_answers_are_stored_and_taught_with(capsys: CAPSYS) -> None:
    path = recipe({"train.steps": 2})
    told = tutelage(capsys, "store", path, "--out", "answers")
    assert told.code == 0
    assert told.err[0].startswith("1 files of 0.")
    assert told.out[-1] == "teach with them: --set teacher.stored=answers"
    assert [line.split()[0] for line in told.out[:2]] == ["map", "logits"]
    assert Path("answers/store.json").exists()
    again = tutelage(capsys, "store", path, "--out", "answers")
    assert again.err == ["answers holds these answers already; every file is what it was"]
    taught = tutelage(capsys, "distill", path, "--out", "run", "--set", "teacher.stored=answers", "--quiet")
    assert taught.code == 0
    assert "stored:answers" in Path("run/recipe.yaml").read_text()


def test_a_place_without_answers_is_said(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "distill", recipe(), "--set", "teacher.stored=nowhere")
    said = "tutelage: nowhere holds no stored answers (no store.json): make them with `tutelage store`"
    assert (told.code, told.err) == (2, [said])


def test_a_recipe_without_a_teacher_is_said(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "store", recipe({"teacher": None}, objective={"task": 1.0}), "--out", "answers")
    assert told.code == 2
    assert told.err[-1] == "tutelage: the recipe has no teacher to ask: its answers are to be stored"
