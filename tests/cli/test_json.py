# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from PIL import Image

from tiny_recipe import recipe, tutelage
from tutelage.cli import verbs

CAPSYS = pytest.CaptureFixture[str]
#: What each verb is asked, in a folder with a recipe, a finished run and a picture.
ASKED = {
    "check": ["tiny.yaml"],
    "cite": ["tiny.yaml"],
    "compare": ["tiny.yaml", "--seeds", "0", "--set", "train.steps=1", "--quiet"],
    "distill": ["tiny.yaml", "--out", "other", "--quiet"],
    "doctor": [],
    "evaluate": ["runs/tiny"],
    "export": ["runs/tiny", "--to", "safetensors"],
    "inspect": ["runs/tiny"],
    "methods": [],
    "models": ["tutelage:resnet8"],
    "predict": ["runs/tiny", "digit.png"],
    "report": ["runs/tiny"],
    "store": ["tiny.yaml", "--out", "answers", "--quiet"],
    "train": ["tiny.yaml", "--quiet"],
}


def test_every_verb_answers_with_one_document(capsys: CAPSYS) -> None:
    assert set(ASKED) == set(verbs()) - {"demo"}, "demo has a test of its own"
    tutelage(capsys, "distill", recipe())
    Image.new("L", (8, 8), 90).save("digit.png")
    for verb, arguments in ASKED.items():
        told = tutelage(capsys, verb, *arguments, "--json")
        assert told.code == 0, (verb, told.err)
        text = "\n".join(told.out)
        assert json.loads(text, parse_constant=pytest.fail), verb  # no NaN, no Infinity
