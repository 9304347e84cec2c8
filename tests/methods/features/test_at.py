# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from golden_answer import with_gradients
from method_case import MethodCase, gaussian
from oracles import at as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.at import AT, FORMS, at

Arrays = dict[str, NDArray[Any]]
TAPS = ("stages[0]", "stages[1]")


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: AT(student_taps=TAPS, teacher_taps=TAPS, **options),
        student=lambda seed: gaussian(seed, {TAPS[0]: (6, 4, 6, 6), TAPS[1]: (6, 4, 3, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {TAPS[0]: (6, 4, 6, 6), TAPS[1]: (6, 4, 3, 3)}),
    )


def maps(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [m.double() for m in gaussian(seed, {str(n): shape for n, shape in enumerate(shapes)}).values()]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    layers = range(sum(name.startswith("s_feat") for name in arrays))
    student = [torch.tensor(arrays[f"s_feat{n}"], dtype=torch.float64, requires_grad=True) for n in layers]
    teacher = [torch.tensor(arrays[f"t_feat{n}"], dtype=torch.float64) for n in layers]
    names: dict[str, Any] = {
        **{"loss": "code", "alt_torchdistill_code": "code"},
        **{"alt_torchdistill_paper": "paper", "alt_zoo_sum_eps": "sum_eps"},
    }
    losses = {name: at(student, teacher, power=meta["p"], form=form) for name, form in names.items() if name in arrays}
    return with_gradients(losses, {f"s_feat{n}": tensor for n, tensor in enumerate(student)}, arrays)


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.sampled_from([((3, 4), (3, 4)), ((5, 5), (2, 2)), ((2, 2), (3, 3)), ((6, 4), (3, 3)), ((1, 1), (1, 1))]),
    power=st.sampled_from([1.0, 2.0, 3.0, 4.0]),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Any,
    seed: int,
    rows: int,
    widths: tuple[int, int],
    sizes: tuple[tuple[int, int], tuple[int, int]],
    power: float,
) -> None:
    student = maps(seed, (rows, widths[0], *sizes[0]), (rows, 2, 2, 2))
    teacher = maps(seed + 1, (rows, widths[1], *sizes[1]), (rows, 3, 2, 2))
    expected = oracle.at([s.numpy() for s in student], [t.numpy() for t in teacher], power, form)
    assert at(student, teacher, power=power, form=form).item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Any) -> None:
    (student, teacher) = maps(0, (2, 3, 4, 4), (2, 2, 2, 2))
    student = student + student.sign()  # away from the kink of |f|
    assert torch.autograd.gradcheck(lambda s: at([s], [teacher], form=form), student.requires_grad_())


# limits and identities


def test_the_square_of_a_unit_distance() -> None:
    (student, teacher) = maps(1, (1, 3, 4, 5), (1, 2, 4, 5))
    root = at([student], [teacher], form="paper")
    torch.testing.assert_close(at([student], [teacher]), root**2 / 20)


def test_two_minus_twice_the_cosine() -> None:
    (student, teacher) = maps(2, (4, 3, 2, 2), (4, 3, 2, 2))
    cosine = F.cosine_similarity(student.square().mean(1).flatten(1), teacher.square().mean(1).flatten(1))
    torch.testing.assert_close(at([student], [teacher]), (2 - 2 * cosine).mean() / 4)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_learn_from_oneself(form: Any) -> None:
    (student,) = maps(3, (4, 3, 2, 2))
    loss = at([student.requires_grad_()], [student.detach()], form=form)
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_scale_sign_and_order_of_channels_do_not_matter() -> None:
    (student, teacher) = maps(4, (4, 3, 2, 2), (4, 3, 2, 2))
    moved = -5 * student[:, [2, 0, 1]]
    torch.testing.assert_close(at([moved], [teacher]), at([student], [teacher]))


def test_layers_add_up() -> None:
    student, teacher = maps(5, (4, 3, 4, 4), (4, 3, 2, 2)), maps(6, (4, 2, 4, 4), (4, 2, 2, 2))
    each = [at([s], [t]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(at(student, teacher), each[0] + each[1])


def test_the_last_stages_meet() -> None:
    term = AT()
    one = {f"stages[{n}]": torch.zeros(2, 1, 4 - n, 4 - n) for n in range(3)}
    other = {f"stages[{n}]": torch.zeros(2, 1, 5 - n, 5 - n) for n in range(2)}
    term.build(Signals(None, one), Signals(None, other), Facts())
    assert term.names == (("stages[1]", "stages[2]"), ("stages[0]", "stages[1]"))


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: Any) -> None:
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = at([student], [torch.zeros(0, 3, 4, 4)], form=form)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].shape == (0, 3, 2, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_dead_maps_are_finite(form: Any, power: float) -> None:
    dead = torch.zeros(2, 3, 2, 2, requires_grad=True)
    teacher = torch.ones(2, 3, 2, 2)
    for side in (teacher, torch.zeros_like(teacher)):
        loss = at([dead], [side], power=power, form=form)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, dead)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Any, dtype: torch.dtype) -> None:
    student = torch.tensor([[[[1e4, -1e4], [0.0, 1e4]]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[[-1e4, 0.0], [1e4, 0.0]]]], dtype=dtype)
    loss = at([student], [teacher], form=form)
    expected = oracle.at([student.detach().double().numpy()], [teacher.double().numpy()], 2.0, form)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    grad = torch.autograd.grad(loss, student)[0]
    assert grad.dtype == dtype
    assert grad.isfinite().all()


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "l2"}, "form 'l2' is not known; valid: code, paper, sum_eps"),
        ({"power": 0.5}, "power is at least 1, not 0.5"),
        ({"student_taps": "map"}, "student_taps: expected a list of roles or module paths, not 'map'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        AT(**options)


def test_a_tap_that_is_no_map() -> None:
    sides = [Signals(None, {"a": torch.zeros(shape)}) for shape in ((2, 4), (2, 4, 1, 1))]
    with pytest.raises(UserError, match=re.escape("at compares maps [B, C, H, W], not [2, 4] and [2, 4, 1, 1]")):
        AT(student_taps=["a"], teacher_taps=["a"]).build(sides[0], sides[1], Facts())
