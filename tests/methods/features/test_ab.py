# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from golden_answer import with_gradients
from method_case import MethodCase, gaussian
from oracles import ab as oracle
from tutelage.core import Entry, Facts, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.ab import AB, FORMS, OBJECTIVE, ab

Arrays = dict[str, NDArray[Any]]
TAPS = ("stages[0].pre", "stages[1].pre")


def case(rows: int = 6, **options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: AB(student_taps=TAPS, teacher_taps=TAPS, **options),
        student=lambda seed: gaussian(seed, {TAPS[0]: (rows, 4, 6, 6), TAPS[1]: (rows, 4, 3, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {TAPS[0]: (rows, 5, 3, 3), TAPS[1]: (rows, 4, 3, 3)}),
    )


def layers(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    drawn = gaussian(seed, {str(n): shape for n, shape in enumerate(shapes)}, 2.0)
    return [tensor.double() for tensor in drawn.values()]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    count = range(sum(name.startswith("s_preact") for name in arrays))
    student = [torch.tensor(arrays[f"s_preact{n}"], dtype=torch.float64, requires_grad=True) for n in count]
    teacher = [torch.tensor(arrays[f"t_preact{n}"], dtype=torch.float64) for n in count]
    names: dict[str, tuple[float, Any]] = {
        "loss": (meta["scale"], "released"),
        "alt_zoo_mean": (1.0, "mean"),
        "alt_torchdistill": (1.0, "sum"),
    }
    losses = {
        name: weight * ab(student, teacher, margin=meta["margin"], form=form) for name, (weight, form) in names.items()
    }
    return with_gradients(losses, {f"s_preact{n}": tensor for n, tensor in enumerate(student)}, arrays)


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    count=st.integers(1, 3),
    margin=st.floats(0.1, 3),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Any, seed: int, rows: int, count: int, margin: float) -> None:
    shapes = [(rows, 3, 2, 3), (rows, 2, 1, 1), (rows, 4, 2, 2)][:count]
    student, teacher = layers(seed, *shapes), layers(seed + 1, *shapes)
    teacher[0][0, 0] = 0.0  # on the boundary
    scale = 3e-3 if form == "released" else 1.0
    expected = oracle.ab([s.numpy() for s in student], [t.numpy() for t in teacher], margin, form)
    found = ab(student, teacher, margin=margin, form=form)
    assert scale * found.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Any) -> None:
    (student, teacher) = layers(0, (2, 3, 2, 2), (2, 3, 2, 2))
    assert torch.autograd.gradcheck(lambda s: ab([s], [teacher], form=form), student.requires_grad_())


# limits and identities


def test_neurons_beyond_the_margin_are_left_alone() -> None:
    teacher = layers(1, (4, 3, 2, 2))[0]
    student = torch.where(teacher > 0, 1.5, -1.0).requires_grad_()
    loss = ab([student], [teacher])
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_the_boundary_belongs_to_the_inactive_side() -> None:
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert ab([zero], [zero]) == 1  # a teacher at 0 is inactive: the student must fall to -1
    assert ab([one], [one]) == 0  # the student at the margin has arrived
    assert ab([-one], [zero]) == 0


def test_the_teachers_values_do_not_matter_beyond_their_sign() -> None:
    (student, teacher) = layers(2, (4, 3, 2, 2), (4, 3, 2, 2))
    torch.testing.assert_close(ab([student], [teacher]), ab([student], [7 * teacher]))


def test_mirrored_signs_mirror_the_loss() -> None:
    (student, teacher) = layers(3, (4, 3, 2, 2), (4, 3, 2, 2))
    torch.testing.assert_close(ab([-student], [-teacher]), ab([student], [teacher]))


def test_layers_count_half_with_each_step_from_the_last() -> None:
    one = torch.zeros(1, 1, 1, 1)
    assert ab([one] * 3, [one] * 3) == 1 + 0.5 + 0.25
    assert ab([one] * 3, [one] * 3, form="sum") == 3


def test_the_forms_differ_by_counts() -> None:
    (student, teacher) = layers(4, (4, 3, 2, 5), (4, 3, 2, 5))
    mean = ab([student], [teacher], form="mean")
    torch.testing.assert_close(ab([student], [teacher]), 30 * mean)
    torch.testing.assert_close(ab([student], [teacher], form="sum"), 30 * mean)


def test_maps_of_one_shape_need_no_connector() -> None:
    names = {name for name, _ in case().built().named_parameters()}
    assert names == {*("connectors.0.0.weight", "connectors.0.0.bias", "connectors.0.1.weight", "connectors.0.1.bias")}


def test_the_connector_has_no_activation() -> None:
    here = case()
    term = here.built()
    assert isinstance(term, AB)
    student, _ = here.tensors()
    assert (term.connectors[0](student[TAPS[0]]) < 0).any()


def test_the_objective_switches_from_boundaries_to_the_task() -> None:
    section: dict[str, Any] = OBJECTIVE
    objective = Objective({"ab": Entry(AB(), section["ab"]["weight"])}, task=section["task"])
    objective.facts = Facts(steps_per_epoch=1, total_steps=270)
    found = [(objective.weight("task", step), objective.weight("ab", step)) for step in (0, 29, 30, 269)]
    assert found == [(0, 3e-3), (0, 3e-3), (1, 0), (1, 0)]


# what is ignored


@pytest.mark.parametrize("form", FORMS)
def test_ignored_places_leave_what_cut_maps_give(form: Any) -> None:
    one, other = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    keep = torch.zeros(2, 3, 5, dtype=torch.bool)
    keep[..., :2] = True
    found = ab([one, one], [other, other], form=form, keep=[keep, None])
    torch.testing.assert_close(found, ab([one[..., :2], one], [other[..., :2], other], form=form))


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: str) -> None:
    here = case(rows=0, form=form)
    term = case(form=form).built()
    student, teacher = here.tensors()
    loss = here.loss(term, student, teacher, here.batch())
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in term.parameters())


def test_one_value_a_channel_cannot_train() -> None:
    here = MethodCase(
        term=lambda: AB(student_taps=["a"], teacher_taps=["a"]),
        student=lambda seed: {"a": torch.zeros(1, 4, 1, 1)},
        teacher=lambda seed: {"a": torch.zeros(1, 5, 1, 1)},
    )
    term = here.built()
    student, teacher = here.tensors()
    with pytest.raises(UserError, match=r"^ab: batch norm cannot train on one value a channel"):
        here.loss(term, student, teacher, here.batch())
    assert here.loss(term.eval(), student, teacher, here.batch()).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Any, dtype: torch.dtype) -> None:
    student = torch.tensor([[[[1e4, -1e4, 1e4, -1e4]]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[[-1e4, 1e4, 1e4, -1e4]]]], dtype=dtype)
    loss = ab([student], [teacher], form=form)
    expected = oracle.ab([student.detach().double().numpy()], [teacher.double().numpy()], 1.0, form)
    scale = 3e-3 if form == "released" else 1.0
    assert loss.dtype == torch.float32
    assert scale * loss.item() == pytest.approx(expected, rel=1e-5)
    grad = torch.autograd.grad(loss, student)[0]
    assert grad.isfinite().all()
    assert not grad[..., 2:].any()


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"margin": 0}, "margin must be > 0, not 0"),
        ({"form": "released_code"}, "form 'released_code' is not known; valid: mean, released, sum"),
        ({"student_taps": ["a", "b"], "teacher_taps": ["a"]}, "student_taps names 2 layers and teacher_taps 1"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        AB(**options)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        pytest.param((2, 4), "ab compares maps [B, C, H, W], not [2, 4] and [2, 5, 3, 3]", id="vector"),
        pytest.param((2, 4, 2, 2), "ab: no convolution brings a map of 2x2 to 3x3", id="grid"),
    ],
)
def test_maps_that_do_not_fit(student: tuple[int, ...], said: str) -> None:
    sides = [Signals(None, {"a": torch.zeros(shape)}) for shape in (student, (2, 5, 3, 3))]
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        AB(student_taps=["a"], teacher_taps=["a"]).build(sides[0], sides[1], Facts())


def test_maps_of_two_shapes() -> None:
    said = "ab compares maps of one shape: the student's is [2, 1, 2, 2], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ab([torch.zeros(2, 1, 2, 2)], [torch.zeros(2, 3, 2, 2)])
