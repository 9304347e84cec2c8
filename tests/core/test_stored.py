# SPDX-License-Identifier: Apache-2.0
"""Answers that come with the batch."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from core.networks import CLASSES, Small, small_batch
from tutelage.core import Distiller, Objective, Stored, Tap
from tutelage.core.error import UserError
from tutelage.core.stored import STORED, pack, unpack
from tutelage.methods.features.srrl import SRRL
from tutelage.methods.logits.fkd import fkd
from tutelage.methods.logits.kd import KD
from tutelage.methods.logits.tinyvit import tinyvit
from tutelage.tasks.classification import Classification

TASK = Classification(CLASSES)
SCORES = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)) * 3


def taught(**first: torch.Tensor) -> Stored:
    return Stored(first or {"logits": torch.randn(2, CLASSES)}, CLASSES, {}, "answers")


def test_logits_are_kept_exactly_and_features_in_half_the_bytes() -> None:
    taps = {"logits": SCORES, "map": torch.randn(6, 3, 2, 2)}
    kept = pack(taps)
    assert kept["map"].dtype == torch.bfloat16
    found = unpack(kept, 40)
    assert torch.equal(found["logits"], SCORES)
    torch.testing.assert_close(found["map"], taps["map"], rtol=2**-8, atol=0)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40)])
def test_the_softmax_of_sparse_answers_gives_back_what_was_kept(shape: tuple[int, ...]) -> None:
    scores = SCORES.view(shape)
    kept = pack({"logits": scores}, top=7)
    assert kept["logits.classes"].shape == kept["logits.probs"].shape == (*shape[:-1], 7)
    found, true = unpack(kept, 40)["logits"].softmax(-1), scores.softmax(-1)
    for row, wanted in zip(found.view(-1, 40), true.view(-1, 40), strict=True):
        order = sorted(range(40), key=lambda k: (-float(wanted[k]), k))
        rest = (1 - sum(float(wanted[k]) for k in order[:7])) / 33
        for rank, k in enumerate(order):
            assert float(row[k]) == pytest.approx(float(wanted[k]) if rank < 7 else rest, abs=1e-6)


def test_a_method_of_stored_labels_does_not_see_the_difference() -> None:
    student = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    sparse = unpack(pack({"logits": SCORES}, top=10), 40)["logits"]
    for one in (fkd(student, sparse, k=10) - fkd(student, SCORES, k=10), fkd(student, sparse) - fkd(student, SCORES)):
        assert abs(float(one)) < 1e-5
    assert abs(float(tinyvit(student, sparse, k=10) - tinyvit(student, SCORES, k=10))) < 1e-3  # float16 inside


def test_all_classes_kept_or_certain_answers_stay_finite() -> None:
    certain = torch.tensor([[500.0, 0.0, -500.0]])
    for top in (1, 3, 5):
        found = unpack(pack({"logits": certain}, top=top), 3)["logits"]
        assert found.isfinite().all()
        torch.testing.assert_close(found.softmax(-1), certain.softmax(-1))


def test_a_distiller_learns_from_what_the_batch_carries() -> None:
    batch, answers = small_batch(), torch.randn(len(small_batch()), CLASSES)
    batch = replace(batch, extra={STORED: {"logits": answers}})
    distiller = Distiller(Small(), Objective(kd=KD()), task=TASK, teacher=taught(), sample=small_batch())
    signals = distiller.observe(batch)
    assert torch.equal(signals["teacher"].logits, answers)
    distiller(batch, signals).total.backward()
    assert distiller.student.get_parameter("head.weight").grad is not None
    half = distiller.observe(batch.split(2)[1])
    assert torch.equal(half["teacher"].logits, answers[len(answers) // 2 :])
    distiller.close()


def test_a_lent_module_is_frozen_and_passes_gradients() -> None:
    head = nn.Linear(4, CLASSES)
    teacher = Stored(
        {"logits": torch.randn(2, CLASSES), "map": torch.randn(2, 4, 3, 3)}, CLASSES, {"classifier": head}, "answers"
    )
    student = Small()
    distiller = Distiller(
        student, Objective(srrl=SRRL(student_tap="mix")), task=TASK, teacher=teacher, sample=small_batch()
    )
    kept = {"logits": torch.randn(len(small_batch()), CLASSES), "map": torch.randn(len(small_batch()), 4, 3, 3)}
    batch = replace(small_batch(), extra={STORED: kept})
    distiller(batch, distiller.observe(batch)).total.backward()
    assert student.mix.weight.grad is not None
    assert head.weight.grad is None
    assert teacher.networks() == (head,)
    distiller.close()


def test_what_was_not_stored_is_named() -> None:
    with pytest.raises(UserError, match=r"answers holds logits, and a term reads 'map'.*: store again"):
        taught().plan([Tap("map")], [], TASK, small_batch())
    with pytest.raises(UserError, match=r"answers holds nothing of that kind, and a term reads 'classifier'"):
        taught().plan([Tap("logits")], ["classifier"], TASK, small_batch())


def test_patterns_stand_for_what_was_stored() -> None:
    first = {"logits": torch.zeros(2, CLASSES), "stages[1]": torch.zeros(2, 3), "stages[0]": torch.zeros(2, 2)}
    found = taught(**first).plan([Tap("stages[*]")], [], TASK, small_batch())
    assert list(found.taps) == ["stages[0]", "stages[1]", "logits"]


def test_a_batch_without_answers_is_refused() -> None:
    teacher = taught()
    teacher.plan([Tap("logits")], [], TASK, small_batch())
    with pytest.raises(UserError, match="the batch carries no answers of answers: they come with the batches"):
        teacher.observe(small_batch())
