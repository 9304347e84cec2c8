# SPDX-License-Identifier: Apache-2.0
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from method_case import MethodCase, gaussian, gradient
from oracles import tf_kd as oracle
from tutelage.core import Batch, Distiller, Objective, Signals
from tutelage.core.error import UserError
from tutelage.functional.divergence import soft_cross_entropy
from tutelage.methods.online.tf_kd import CARD, Form, TfKD, tf_kd, virtual_teacher
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
FORMS: dict[Form, str] = {"elements": "code", "samples": "paper"}  # ours, the oracle's


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: TfKD(**options), student=lambda seed: gaussian(seed, {"logits": (6, 5)}), teacher=None
    )


def of_itself(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: TfKD(kind="self", **options),
        student=lambda seed: gaussian(seed, {"logits": (6, 5)}),
        teacher=lambda seed: gaussian(seed + 1000, {"logits": (6, 5)}, 2.0),
    )


def pair(seed: int = 0, rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, 2.0)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double(), target


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    target = torch.tensor(arrays["target"])
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        student = torch.tensor(arrays["s_logits"], dtype=dtype, requires_grad=True)
        teacher = torch.tensor(arrays["t_logits"], dtype=dtype)
        virtual = TfKD(temperature=meta["reg_temperature"], correct=meta["correct_prob"])
        smooth = virtual_teacher(target, student.shape[1], 1 - meta["ls_alpha"]).to(dtype)
        found = {
            "loss": step(
                TfKD(kind="self", temperature=meta["temperature"]),
                *(student, teacher, target, meta["alpha"], meta["multiplier"]),
            ),
            "loss_reg": step(virtual, student, None, target, meta["reg_alpha"], meta["reg_multiplier"]),
            "loss_label_smoothing": soft_cross_entropy(student, smooth).mean(),
        }
        for name, loss in found.items():
            answer[f"{name}{suffix}"] = loss
            answer[f"grad_s_logits{'' if name == 'loss' else f'__{name}'}{suffix}"] = gradient(loss, student)
    return {name: value for name, value in answer.items() if name in arrays}


def step(
    term: TfKD, student: Tensor, teacher: Tensor | None, target: Tensor, alpha: float, multiplier: float
) -> Tensor:
    """(1 - alpha) of the task's loss and alpha times the term, through the Objective."""
    objective = Objective(task=1 - alpha, tf_kd=alpha * multiplier * term)
    sources = {"student": Signals(student, {"logits": student})}
    if teacher is not None:
        sources["teacher"] = Signals(teacher, {"logits": teacher})
    batch = Batch.of(torch.zeros(len(student), 1), target)
    total: Tensor = objective(sources, ["student"], batch, Classification(student.shape[1]), 0).total
    return total


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(2, 9),
    temperature=st.floats(0.5, 40),
    alpha=st.floats(0, 1),
    multiplier=st.floats(0.5, 100),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Form, seed: int, rows: int, classes: int, temperature: float, alpha: float, multiplier: float
) -> None:
    student, teacher, target = pair(seed, rows, classes)
    given_ = (student.detach().numpy(), teacher.numpy(), target.numpy())
    expected = oracle.self_training(*given_, temperature, alpha, multiplier, FORMS[form])
    found = step(TfKD(kind="self", temperature=temperature, form=form), student, teacher, target, alpha, multiplier)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    expected = oracle.regularisation(
        given_[0], given_[2], temperature, alpha, multiplier, correct=0.9, form=FORMS[form]
    )
    term = TfKD(temperature=temperature, correct=0.9, form=form)
    assert step(term, student, None, target, alpha, multiplier).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_label_smoothing_equals_the_loops() -> None:
    student, _, target = pair(3)
    smooth = virtual_teacher(target, 5, 0.9)
    expected = oracle.label_smoothing(student.detach().numpy(), target.numpy(), 0.1)
    assert soft_cross_entropy(student, smooth).mean().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    student, teacher, target = pair(2, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: tf_kd(s, teacher, form=form), student)
    assert torch.autograd.gradcheck(lambda s: tf_kd(s, None, target, form=form), student)


# limits and identities


@pytest.mark.parametrize("kind", ["virtual", "self"])
def test_the_forms_differ_by_the_number_of_classes(kind: str) -> None:
    student, teacher, target = pair(4)
    given_ = (teacher,) if kind == "self" else (None, target)
    torch.testing.assert_close(tf_kd(student, *given_, form="samples"), 5 * tf_kd(student, *given_))


def test_at_high_temperature_the_virtual_teacher_is_even() -> None:
    student, _, target = pair(5)
    expected = -math.log(5) - F.log_softmax(student, dim=1).mean(dim=1).mean()
    torch.testing.assert_close(
        tf_kd(student, None, target, temperature=1e6, form="samples"), expected, rtol=1e-6, atol=0
    )


def test_its_gradient_is_that_of_smoothed_labels() -> None:
    student, _, target = pair(6)
    found = gradient(tf_kd(student, None, target, form="samples"), student)
    smooth = (virtual_teacher(target, 5) / 20).softmax(1)
    torch.testing.assert_close(found, ((student.softmax(1) - smooth) / 6).detach())


def test_nothing_to_learn_from_oneself() -> None:
    student, _, _ = pair(7)
    loss = tf_kd(student, student.detach())
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient(loss, student).abs().max() < 1e-12


def test_the_virtual_teacher_adds_up_to_one() -> None:
    found = virtual_teacher(torch.tensor([0, 3]), 4, 0.7)
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))
    assert found.argmax(1).tolist() == [0, 3]
    assert found[0].tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1])


# with and without a teacher


@pytest.mark.parametrize("kind", ["virtual", "self"])
def test_the_kind_says_what_is_read(kind: Any) -> None:
    term = TfKD(kind=kind)
    assert [tap.name for tap in term.reads.student] == ["logits"]
    assert [tap.name for tap in term.reads.teacher] == (["logits"] if kind == "self" else [])
    assert term.card.averages == ("samples" if kind == "self" else "labelled")


def test_it_trains_without_a_teacher_and_asks_for_one_of_its_own_kind() -> None:
    batch = Batch.of(torch.randn(4, 3), torch.tensor([0, 1, -1, 1]))
    machine = Distiller(torch.nn.Linear(3, 2), Objective(tf_kd=TfKD()), task=Classification(2), sample=batch)
    assert set(machine(batch).parts) == {"task", "tf_kd"}
    objective = Objective(tf_kd=TfKD(kind="self"))
    with pytest.raises(UserError, match="TfKD needs a teacher, and none was given"):
        Distiller(torch.nn.Linear(3, 2), objective, task=Classification(2), sample=batch)
    machine = Distiller(
        torch.nn.Linear(3, 2),
        Objective(tf_kd=TfKD(kind="self")),
        task=Classification(2),
        teacher=torch.nn.Linear(3, 2),
        sample=batch,
    )
    machine(batch, machine.observe(batch)).total.backward()


def test_a_teacher_is_compared_on_unlabelled_rows_too() -> None:
    here = of_itself()
    student, teacher = here.tensors()
    batch = here.batch()
    bare = Batch.of(batch.inputs, torch.full((6,), -1))
    assert here.loss(here.term(), student, teacher, batch) == here.loss(here.term(), student, teacher, bare)


def test_the_virtual_teacher_skips_unlabelled_rows() -> None:
    student, _ = case().tensors()
    batch = case().batch()
    labelled = batch.labelled
    whole = case().loss(TfKD(), student, None, batch)
    kept = tf_kd(student["logits"][labelled], None, batch.target[labelled])
    torch.testing.assert_close(whole, kept)
    assert not gradient(whole, student["logits"])[~labelled].any()


@pytest.mark.parametrize("name", ["scalar", "learns", "zero_at_teacher", "half_batches", "compiled", "half_precision"])
def test_with_a_teacher_it_keeps_the_contract_too(name: str) -> None:
    from test_contract import CHECKS, Method

    here = of_itself()
    CHECKS[name](Method("tf_kd", here.term().card or CARD, here))


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    for loss in (
        tf_kd(student, torch.zeros(0, 5)),
        tf_kd(student, None, torch.zeros(0, dtype=torch.int64)),
    ):
        assert loss.item() == 0
        assert gradient(loss, student).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype)
    for loss in (tf_kd(student, teacher), tf_kd(student, None, torch.tensor([1, 0]))):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert gradient(loss, student).isfinite().all()


def test_a_single_class_has_nothing_to_say() -> None:
    student = torch.tensor([[2.0]], requires_grad=True)
    assert tf_kd(student, None, torch.tensor([0])).item() == 0


# errors


def test_logits_of_two_shapes() -> None:
    said = "tf_kd compares logits of one shape: the student's are [2, 3], the teacher's [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        tf_kd(torch.zeros(2, 3), torch.zeros(2, 4))


def test_neither_teacher_nor_labels() -> None:
    said = "tf_kd without a teacher needs one class a row, [2], not none"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        tf_kd(torch.zeros(2, 3))
    said = "tf_kd without a teacher needs one class a row, [2], not a target of shape [2, 3]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        tf_kd(torch.zeros(2, 3), None, torch.zeros(2, 3))
    said = "tf_kd needs class labels, and this data has dict for a target"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        TfKD()(Signals(None, {"logits": torch.zeros(2, 3)}), None, Batch.of(torch.zeros(2, 1), {"boxes": []}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "reg"}, "kind 'reg' is not known; valid: self, virtual"),
        ({"form": "mean"}, "form 'mean' is not known; valid: elements, samples"),
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"correct": 0}, "correct is a probability in (0, 1], not 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        TfKD(**options)
