# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tutelage.core.error import UserError
from tutelage.run.folder import RunFolder, differences
from tutelage.run.recipe import Recipe, parse


def recipe(**train: object) -> Recipe:
    return parse({"student": "tutelage:resnet8", "data": "digits", "train": {"epochs": 2, **train}})


def test_a_folder_is_claimed_once() -> None:
    home = RunFolder(Path("runs/a"))
    assert not home.holds(recipe())
    assert not home.path.exists()
    home.claim(recipe())
    assert home.recipe().plain() == recipe().plain()
    before = home.recipe_path.stat().st_mtime_ns
    home.claim(recipe())
    assert home.holds(recipe())
    assert home.recipe_path.stat().st_mtime_ns == before


def test_another_recipe_is_refused_with_what_differs() -> None:
    home = RunFolder(Path("runs/a"))
    home.claim(recipe())
    with pytest.raises(UserError) as caught:
        home.holds(recipe(epochs=3, seed=1, clip=2.0, ema=0.9, accumulate=2))
    assert str(caught.value) == (
        "runs/a holds a run of another recipe (train.epochs was 2.0, train.accumulate was 1, train.clip was absent "
        "and 2 more); choose another --out, or remove the folder"
    )
    assert home.recipe().plain() == recipe().plain()


def test_a_folder_of_other_things_is_refused() -> None:
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="full is not empty and holds no run; choose another --out"):
        RunFolder(Path("full")).claim(recipe())
    with pytest.raises(UserError, match=r"notes\.txt is a file; choose another --out"):
        RunFolder(Path("full/notes.txt")).claim(recipe())
    assert [path.name for path in Path("full").iterdir()] == ["notes.txt"]
    Path("empty").mkdir()
    RunFolder(Path("empty")).claim(recipe())


def test_differences_name_the_place_and_what_was_there() -> None:
    before = {"a": {"b": 1, "c": [1, 2], "d": {"e": 1}}, "f": "x"}
    after = {"a": {"b": 2, "c": [1, 2], "d": 3}, "g": "y"}
    assert list(differences(before, after)) == ["a.b was 1", "a.d was a section", "f was x", "g was absent"]
    assert list(differences(before, before)) == []


def test_weights_that_are_tied_are_saved_once_and_nothing_is_left_behind() -> None:
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    two.weight = one.weight
    module = nn.ModuleDict({"one": one, "two": two})
    home = RunFolder(Path("runs/a"))
    home.save_student(module, {"model": {"model": "tutelage:resnet8"}})
    found = load_file(home.weights)
    assert len(found) == 1
    assert torch.equal(next(iter(found.values())), one.weight)
    assert sorted(path.name for path in home.path.iterdir()) == ["student.json", "student.safetensors"]
    assert RunFolder.existing(home.path).path == home.path


def test_the_result_is_the_sign_of_a_finished_run() -> None:
    home = RunFolder(Path("runs/a"))
    assert home.result() is None
    home.save_result({"scores": {"top1": 0.5}})
    assert home.result() == {"scores": {"top1": 0.5}}
    assert json.loads(home.result_path.read_text()) == home.result()
    home.result_path.write_text("{")
    with pytest.raises(UserError, match=r"runs/a/result\.json is damaged .*; remove it"):
        home.result()
    with pytest.raises(UserError, match=r"nowhere holds no finished run \(no student.json\)"):
        RunFolder.existing(Path("nowhere"))
