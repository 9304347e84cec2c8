# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import pytest
import torch

from tutelage.core import Batch, Draw, Facts, Signals
from tutelage.core.error import UserError
from tutelage.core.labels import check_classes, check_logits, class_target, two_classes
from tutelage.methods import catalogue, find

BATCH = Batch.of(torch.zeros(2, 1), torch.tensor([0, 1]))


def test_the_target_of_a_classifier_is_itself() -> None:
    assert class_target(BATCH, "kd") is BATCH.target
    with pytest.raises(UserError, match=r"^kd needs class labels, and this data has dict for a target$"):
        class_target(replace(BATCH, target={}), "kd")


@pytest.mark.parametrize(
    ("student", "teacher", "classes", "fits"),
    [((2, 3), (2, 3), 2, True), ((2, 1), (2, 1), 1, True), ((2, 1), (2, 1), 2, False), ((2, 3), (2, 4), 1, False)],
)
def test_logits_of_one_shape(student: tuple[int, ...], teacher: tuple[int, ...], classes: int, fits: bool) -> None:
    given = torch.zeros(student), torch.zeros(teacher)
    if fits:
        check_logits(*given, "kd", classes=classes)
        return
    several = " of two classes or more" if classes == 2 else ""
    said = f"kd takes two [B, K] tensors of logits{several}: the student's are {[*student]}, the teacher's {[*teacher]}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        check_logits(*given, "kd", classes=classes)


def test_one_class_a_row() -> None:
    check_classes(torch.tensor([0, 1]), torch.zeros(2, 3), "dkd")
    said = "dkd takes one class a row, [2], not a target of shape [2, 3]; it cannot use soft labels"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        check_classes(torch.zeros(2, 3), torch.zeros(2, 3), "dkd")


def test_two_classes_are_a_caveat() -> None:
    assert two_classes(Facts(num_classes=3)) == ()
    assert len(two_classes(Facts(num_classes=2))) == 1


def readers() -> list[str]:
    """The methods that need nothing but the logits of both models, and can be made without an option."""
    found = []
    for stem, entry in catalogue().items():
        reads = entry.card.reads
        read = {*reads.get("student", ()), *reads.get("teacher", ()), *reads.get("borrows", ())}
        if read == {"logits"} and stem not in ("logit_std", "deit", "mlkd"):  # an inner term, a token, a view
            found.append(stem)
    return found


@pytest.mark.parametrize("stem", readers())
def test_maps_of_logits_are_refused_by_what_compares_rows(stem: str) -> None:
    """Else the softmax would run over the wrong dimension, in silence."""
    term = find(stem)()
    maps = Signals(None, {"logits": torch.zeros(2, 5, 4, 6)})
    batch = Batch.of(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    facts = Facts(num_classes=5, num_samples=2, targets=torch.zeros(2, dtype=torch.long))

    def whole() -> None:
        term.build(maps, maps, facts)
        drawn = term.draw(maps, maps, batch, Draw(0, 0, stem))
        term(maps, maps, batch, *(() if drawn is None else (drawn,)))

    with pytest.raises(UserError):
        whole()
