# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from tiny_recipe import tutelage
from tutelage import methods
from tutelage.cli.methods import options, published, signals
from tutelage.run.objective import schema

CAPSYS = pytest.CaptureFixture[str]


def test_every_method_stands_under_its_family_once(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "methods")
    assert told.code == 0
    assert told.err == []
    found: dict[str, str] = {}
    family = ""
    for line in told.out[:-1]:
        if line.startswith("   "):
            assert "; reads " in line
        elif line.startswith("  "):
            found[line.split()[0]] = family
        elif line:
            family = line
    assert found == {stem: entry.family for stem, entry in methods.catalogue().items()}
    assert told.out[-1].startswith(f"{len(found)} methods. ")
    assert "  kd " in "\n".join(told.out)


def test_the_list_as_json(capsys: CAPSYS) -> None:
    found = tutelage(capsys, "methods", "--json").document
    assert {one["stem"] for one in found} == set(methods.catalogue())
    assert all(one["title"] and one["reads"] for one in found)
    assert {one["stem"]: one["tasks"] for one in found}["gkd"] == ["language"]


def test_one_method_in_full(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "methods", "kd")
    assert told.out[0] == "KD: Distilling the Knowledge in a Neural Network"
    assert told.out[1] == "Hinton, Vinyals, Dean. NeurIPS Deep Learning Workshop 2014. arxiv:1503.02531"
    assert "tasks:         classification" in told.out
    assert "reads:         logits" in told.out
    taps = "tasks:         detection; with other taps, any task that has them"
    assert taps in tutelage(capsys, "methods", "acam_kd").out
    assert "options:       temperature=4.0, form='kl'" in told.out
    assert "objective:     {task: 0.1, kd: {weight: 0.9}}" in told.out
    found = tutelage(capsys, "methods", "kd", "--json").document
    assert found["options"] == {"temperature": "4.0", "form": "'kl'"}
    assert found["objective"] == {"task": 0.1, "kd": {"weight": 0.9}}


@pytest.mark.parametrize("stem", methods.catalogue())
def test_every_method_can_be_shown_with_the_options_of_its_constructor(capsys: CAPSYS, stem: str) -> None:
    assert tutelage(capsys, "methods", stem).code == 0
    entry = methods.entry(stem)
    found = options(entry, Path(methods.__file__).parent)
    assert list(found) == list(schema(methods.find(stem)).model_fields)
    json.dumps(tutelage(capsys, "methods", stem, "--json").document)


def test_an_unknown_method_names_the_nearest(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "methods", "mdg")
    assert (told.code, told.out, told.err) == (2, [], ["tutelage: unknown method 'mdg'; did you mean mgd?"])


def test_what_both_read_is_told_once() -> None:
    assert signals(methods.entry("at").card) == "stages[*]"
    assert signals(methods.entry("srrl").card) == "map; borrows: classifier"
    assert signals(methods.entry("tf_kd").card) == "student: logits"
    assert signals(methods.entry("cat_kd").card) == "student: map, classifier.weight; teacher: map; borrows: classifier"


def test_a_year_is_told_once() -> None:
    assert published(methods.entry("kd").card) == "NeurIPS Deep Learning Workshop 2014"
    assert published(methods.entry("mgd").card) == "ECCV 2022"
