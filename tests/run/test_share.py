# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tiny_recipe import KD_MGD, MODEL
from tutelage.core.error import UserError
from tutelage.run.assemble import assemble
from tutelage.run.check import check
from tutelage.run.distill import distill
from tutelage.run.recipe import Recipe, parse
from tutelage.run.share import settle_shares, shares


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)


def tiny(objective: dict[str, Any], **sections: Any) -> Recipe:
    return parse({**KD_MGD, "objective": objective, **sections})


def test_shares_are_found_by_label() -> None:
    objective = {"task": {"share": 0.2}, "kd": {"weight": {"share": 0.5}, "temperature": 2}, "mgd": 0.1}
    assert shares(objective) == {"task": 0.2, "kd": 0.5}
    assert shares({"task": 1.0, "kd": {"weight": {"linear": [0, 1]}}, "nkd": {}}) == {}


def test_a_measured_share_is_what_was_asked_for() -> None:
    """The first look of `check` is at the same initial weights, the second after one update."""
    made = assemble(
        tiny({"task": 1.0, "kd": {"weight": {"share": 0.5}}, "mgd": {"weight": {"share": 0.2}, "mask": "channel"}})
    )
    recipe = settle_shares(made)
    assert recipe is made.recipe
    assert recipe.objective["task"] == 1.0
    found = check(made).losses
    assert {label: round(one.share, 1) for label, one in found.items()} == {"task": 0.3, "kd": 0.5, "mgd": 0.2}
    for label in ("kd", "mgd"):
        assert recipe.objective[label]["weight"] == found[label].weight
    assert recipe.objective["mgd"]["mask"] == "channel"


def test_the_task_may_ask_for_a_share_too() -> None:
    made = assemble(tiny({"task": {"share": 0.25}, "kd": {"weight": 2.0}}))
    recipe = settle_shares(made)
    assert isinstance(recipe.objective["task"], float)
    assert check(made).losses["task"].share == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            {"task": 0.0, "kd": {"weight": {"share": 0.5}}},
            "objective: the shares of kd are measured against the losses",
        ),
        ({"task": {"share": 0.5}, "kd": {"weight": {"share": 0.5}}, "mgd": 0.1}, "they leave nothing to those"),
        ({"task": 1.0, "kd": {"weight": {"share": 1.5}}}, "objective.kd.weight: a share stands alone and lies between"),
        ({"task": 1.0, "kd": {"weight": {"share": 0.5, "until": 2}}}, "objective.kd.weight: a share stands alone"),
        ({"task": {"share": True}, "kd": 1.0}, "objective.task: a share stands alone"),
    ],
)
def test_shares_that_make_no_sense(objective: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        settle_shares(assemble(tiny(objective)))
    assert said in str(error.value)


def test_the_run_holds_the_number_and_a_resumed_one_agrees() -> None:
    recipe = tiny({"task": 1.0, "kd": {"weight": {"share": 0.5}}}, train={"steps": 4, "save_every": "2 steps"})
    whole = distill(recipe, Path("whole"), quiet=True)
    weight = yaml.safe_load(Path("whole/recipe.yaml").read_text())["objective"]["kd"]["weight"]
    assert isinstance(weight, float)
    assert yaml.safe_load(Path("whole/asked.yaml").read_text())["objective"]["kd"]["weight"] == {"share": 0.5}
    # from the middle
    distill(recipe, Path("part"), quiet=True)
    for name in ("result.json", "student.json", "student.safetensors", "checkpoints/step_000000004.safetensors"):
        Path("part", name).unlink()
    resumed = distill(recipe, Path("part"), quiet=True)
    # from the resolved recipe alone
    again = distill(whole.folder.recipe(), Path("again"), quiet=True)
    assert not Path("again/asked.yaml").exists()
    states = [one.student.module.state_dict() for one in (whole, resumed, again)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(tensor, states[2][name])


def test_another_share_is_another_run() -> None:
    recipe = tiny({"task": 1.0, "kd": {"weight": {"share": 0.5}}}, train={"steps": 1, "save_every": None})
    distill(recipe, Path("run"), quiet=True)
    other = recipe.model_copy(update={"objective": {"task": 1.0, "kd": {"weight": {"share": 0.6}}}})
    with pytest.raises(UserError, match=r"^run holds a run of another recipe \(objective.kd.weight.share was 0.5\)"):
        distill(other, Path("run"), quiet=True)
