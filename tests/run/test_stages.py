# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_recipe import KD_MGD, MODEL
from tutelage.core.error import UserError
from tutelage.models.load import load as load_model
from tutelage.run.compare import arms_of
from tutelage.run.distill import distill
from tutelage.run.folder import RunFolder
from tutelage.run.recipe import Recipe, parse
from tutelage.run.stages import assembled, recipes_of

HEAD = {
    "name": "head",
    "teacher": "previous",
    "objective": {"kd": 1.0},
    "train": {"steps": 3},
    "inherit": {"0": "previous.0"},
    "freeze": ["0"],
}


@pytest.fixture(autouse=True)
def model() -> None:
    Path("model.py").write_text(MODEL)


def staged(*stages: Any, **more: Any) -> Recipe:
    return parse({**KD_MGD, "stages": list(stages), **more})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(f"run:{folder}").module.state_dict()


def test_a_stage_is_the_recipe_with_what_it_changes() -> None:
    first, second = recipes_of(staged({"train": {"epochs": 2}, "optimizer": {"lr": 0.5}}, HEAD)).items()
    assert (first[0], second[0]) == ("stage1", "head")
    assert (first[1].train.epochs, first[1].train.steps) == (2, None)
    assert first[1].optimizer.lr == 0.5
    assert first[1].objective == KD_MGD["objective"]
    assert second[1].objective == {"kd": 1.0}
    assert second[1].teacher is not None
    assert second[1].teacher.model == "previous"
    assert second[1].optimizer.lr == KD_MGD["optimizer"]["lr"]
    assert not second[1].stages


def test_a_head_is_trained_on_what_the_stage_before_learnt(tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "run"
    result = distill(staged({"name": "whole"}, HEAD), out, quiet=True, say=said.append)
    before, after = weights(out / "stages" / "whole"), weights(out)
    assert torch.equal(after["0.weight"], before["0.weight"])
    last = [key for key in after if not key.startswith("0.")]
    assert any(not torch.equal(after[key], before[key]) for key in last)
    assert any(line.startswith("inherited: 0: ") for line in said)
    found = RunFolder(out).result()
    assert found is not None
    assert list(found["stages"]) == ["whole", "head"]
    assert found["scores"] == found["stages"]["head"] == dict(result.scores)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert max(steps) == 4 + 3
    assert (out / "report.html").exists()
    assert all(p.requires_grad for p in result.student.module.parameters())


def test_without_inherit_the_same_student_goes_on(tmp_path: Path) -> None:
    distill(staged({"name": "one"}, {"name": "two", "optimizer": {"lr": 1e-12}}), tmp_path / "run", quiet=True)
    one, two = weights(tmp_path / "run" / "stages" / "one"), weights(tmp_path / "run")
    trained = [name for name, _ in load_model(f"run:{tmp_path / 'run'}").module.named_parameters()]
    assert all(torch.allclose(one[name], two[name]) for name in trained)


def test_a_run_killed_between_or_in_stages_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = staged({"name": "whole"}, HEAD)
    distill(recipe, tmp_path / "whole", quiet=True)
    out = tmp_path / "killed"

    def stop_at(word: str) -> Any:
        def say(text: str) -> None:
            if word in text:
                raise KeyboardInterrupt

        return say

    with pytest.raises(KeyboardInterrupt):
        distill(recipe, out, quiet=True, say=stop_at("stage head"))
    assert (out / "stages" / "whole" / "result.json").exists()
    distill(recipe, out, quiet=True)
    expected, found = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_arms_may_have_stages() -> None:
    arms = {"alone": {"task": 1.0}, "kd": {"task": 1.0, "kd": 1.0}, "both": {"stages": [{"name": "whole"}, HEAD]}}
    recipe = parse({**KD_MGD, "compare": {"seeds": [0], "arms": arms}})
    found = arms_of(recipe)
    assert list(recipes_of(found["both"])) == ["whole", "head"]
    assert not found["kd"].stages
    mixed = parse({**KD_MGD, "compare": {"arms": {"odd": {"stages": [HEAD], "kd": 1.0}}}})
    with pytest.raises(UserError, match=r"compare\.arms\.odd: its stages have an objective each"):
        arms_of(mixed)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([HEAD], "stages[0]: there is no stage before the first"),
        ([{"name": "a/b"}], "stages[0].name: 'a/b' is no name of its own"),
        ([{"name": "a"}, {"name": "a"}], "stages[1].name: 'a' is no name of its own"),
        ([{}, {"optimizer": {"lr": -1}}], "stages[1]: optimizer.lr"),
    ],
)
def test_a_mistake_names_the_stage(stages: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        recipes_of(staged(*stages))


def test_a_later_stage_is_built_before_the_first_one_trains(tmp_path: Path) -> None:
    wrong = {**HEAD, "inherit": {"backbone": "previous.0"}}
    with pytest.raises(UserError, match=r"inherit\.backbone: Small has no module 'backbone'"):
        distill(staged({"name": "whole"}, wrong), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    assert [name for name, _ in assembled(staged({"name": "whole"}, HEAD))] == ["whole", "head"]
