# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_recipe import KD_MGD, MODEL
from tutelage.data.digits import digits
from tutelage.models.load import load
from tutelage.report.number import MISSING
from tutelage.run.assemble import assemble
from tutelage.run.closing import closing
from tutelage.run.distill import distill
from tutelage.run.page import class_table, scored_classes
from tutelage.run.recipe import Recipe, parse
from tutelage.tasks.classification import agreement, by_class


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)


def tiny(**sections: Any) -> Recipe:
    return parse({**KD_MGD, **sections})


def test_agreement_counts_equal_answers() -> None:
    assert agreement(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])) == 1.0
    assert agreement(torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 0, 2])) == 0.5


def test_classes_are_counted_over_labelled_samples() -> None:
    answer = torch.tensor([0, 1, 2, 2, 1, 0])
    target = torch.tensor([0, 1, 1, 2, -1, -1])
    right, there = by_class(answer, target, 4)
    counts = [[0, 0], [0, 0], [0, 0], [0, 0]]
    for said, true in zip(answer.tolist(), target.tolist(), strict=True):
        if true >= 0:
            counts[true][1] += 1
            counts[true][0] += said == true
    assert [list(pair) for pair in zip(right.tolist(), there.tolist(), strict=True)] == counts


def test_the_closing_look_agrees_with_a_look_by_hand() -> None:
    made = assemble(tiny())
    found = closing(made)
    _, held_out = digits()
    answers = {}
    for name, model in (("student", made.student), ("teacher", made.distiller.teachers["teacher"].model)):
        assert model is not None
        model.module.eval()
        with torch.no_grad():
            answers[name] = model(held_out.images).argmax(1)
    assert found.agreement == pytest.approx((answers["student"] == answers["teacher"]).double().mean().item())
    assert found.teacher is not None
    assert found.teacher["top1"] == pytest.approx((answers["teacher"] == held_out.targets).float().mean().item())
    assert list(found.classes) == list("0123456789")
    for label, (right, there) in enumerate(found.classes.values()):
        mine = held_out.targets == label
        assert there == int(mine.sum())
        assert right == int((answers["student"][mine] == label).sum())


def test_a_look_does_not_move_a_teacher_in_training_mode() -> None:
    small = {"model": "python:model.py:small", "norm": True}
    made = assemble(tiny(student=small, teacher={**small, "mode": "train"}))
    (network,) = made.distiller.teachers["teacher"].networks()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    closing(made)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training


def test_without_a_teacher_there_is_no_agreement() -> None:
    result = distill(tiny(objective={"task": 1.0}, teacher=None, train={"steps": 1}), Path("run"), quiet=True)
    assert set(result.scores) == {"top1", "top5", "loss", "ece"}
    kept = json.loads(Path("run/result.json").read_text())
    assert kept["teacher"] is None
    assert sum(right for right, _ in kept["classes"].values()) / 600 == pytest.approx(kept["scores"]["top1"])


def test_the_result_gives_the_student() -> None:
    result = distill(tiny(train={"steps": 1}), Path("run"), quiet=True)
    assert not result.student.module.training
    again = distill(tiny(train={"steps": 1}), Path("run"), quiet=True)  # was finished
    pixels = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(result.student(pixels), again.student(pixels))
        assert torch.equal(result.student(pixels), load("run:run")(pixels))


def test_of_many_classes_the_lowest_are_shown() -> None:
    few = class_table({"a": (1, 2), "b": (0, 0), "c": (3, 3)})
    assert [row[0] for row in few.rows] == ["a", "c"]  # of b there is nothing to say
    assert few.note == ""
    many = class_table({str(n): (n % 7, 7) for n in range(30)})
    assert len(many.rows) == 20
    assert [row[2] for row in many.rows] == sorted((row[2] for row in many.rows), key=lambda cell: float(cell or 0))
    assert many.note == "The 20 lowest of 30; all are in result.json."


def test_scores_of_classes_have_a_table_of_their_own() -> None:
    student = {"miou": 0.25, "iou/road": 0.5, "iou/sky": 0.0}
    table = scored_classes(student, {"miou": 0.5, "iou/road": 1.0})
    assert table.columns == ("class", "IoU (%)", "teacher's IoU (%)")
    assert table.rows == [("road", "50.0", "100.0"), ("sky", "0.0", MISSING)]
    assert scored_classes(student, {}).columns == ("class", "IoU (%)")
    assert not scored_classes({"top1": 1.0}, {}).rows
