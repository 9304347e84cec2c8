# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import yaml

from tiny_recipe import recipe, tree, tutelage
from tutelage.run import demo
from tutelage.run import recipe as recipes

CAPSYS = pytest.CaptureFixture[str]
ARMS = {"alone": {"task": 1.0}, "kd": {"task": 0.1, "kd": 0.9}}


@pytest.fixture
def shipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand a demo of two seeds and three steps in the place of those of the package."""
    home = folder / "shipped"
    monkeypatch.setattr(demo, "SHIPPED", home)
    monkeypatch.setattr(recipes, "SHIPPED", home)
    (home / "kd").mkdir(parents=True)
    teacher = {"model": "python:model.py:small", "width": 6, "fit": {"train": {"steps": 2}}}
    recipe({"train.steps": 3}, name="shipped/few.yaml", teacher=teacher)
    for name in ("kd/demo", "tour"):
        compare = {"seeds": [0, 1], "arms": ARMS}
        (home / f"{name}.yaml").write_text(yaml.safe_dump({"base": "few", "compare": compare}))
    return home


@pytest.mark.usefixtures("shipped")
def test_a_demo_prints_both_arms_with_their_difference(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "demo", "kd")
    assert told.code == 0
    text = "\n".join(told.out)
    for word in ("teacher", "alone", "kd", "difference", "95 % interval", "better / equal / worse", "±"):
        assert word in text
    assert told.out[-1] == "runs/demo-kd/report.html"
    assert Path("runs/demo-kd/report.html").exists()
    assert [line.partition(":")[0] for line in told.err] == [
        "teacher",
        "alone, seed 0",
        "kd, seed 0",
        "alone, seed 1",
        "kd, seed 1",
    ]


@pytest.mark.usefixtures("shipped")
def test_arms_of_a_seed_start_alike_and_share_their_teacher(capsys: CAPSYS) -> None:
    tutelage(capsys, "demo")
    alone, kd = (yaml.safe_load(Path(f"runs/demo/{arm}-1/recipe.yaml").read_text()) for arm in ("alone", "kd"))
    assert {key for key in {**alone, **kd} if alone.get(key) != kd.get(key)} == {"objective", "teacher"}
    assert alone["train"]["seed"] == kd["train"]["seed"] == 1
    teachers = [path.parent for path in Path("runs/demo").rglob("student.safetensors") if "teacher" in str(path)]
    assert teachers == [Path("runs/demo/teacher")]


@pytest.mark.usefixtures("shipped")
def test_json_is_one_document_and_finished_runs_are_kept(capsys: CAPSYS) -> None:
    first = tutelage(capsys, "demo", "kd", "--json", "--quiet")
    assert first.err == []
    assert set(first.document["scores"]) == {"alone", "kd"}
    assert set(first.document["scores"]["kd"]) == {"0", "1"}
    assert first.document["differences"]["kd"]["n"] == 2
    before = {name: text for name, text in tree("runs").items() if "metrics" in name or "safetensors" in name}
    again = tutelage(capsys, "demo", "kd", "--json", "--quiet")
    assert again.document == first.document
    assert before.items() <= tree("runs").items()
    for arm, scores in first.document["scores"].items():
        for seed, value in scores.items():
            result = json.loads(Path(f"runs/demo-kd/{arm}-{seed}/result.json").read_text())
            assert result["scores"]["top1"] == value


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("stem", "said"), [("kdd", "unknown method 'kdd'; did you mean kd?"), ("mgd", "mgd has no demo yet")]
)
def test_what_has_no_demo_is_one_line(capsys: CAPSYS, stem: str, said: str) -> None:
    told = tutelage(capsys, "demo", stem)
    assert (told.code, told.out, told.err) == (2, [], [f"tutelage: {said}"])
    assert not Path("runs").exists()
