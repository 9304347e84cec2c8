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
from oracles import fsp as oracle
from tutelage.core import Entry, Facts, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.fsp import FORMS, FSP, OBJECTIVE, flow, fsp

Arrays = dict[str, NDArray[Any]]
TAPS = ("stem", "stages[0]", "stages[1]")
SHAPES = {TAPS[0]: (6, 3, 4, 4), TAPS[1]: (6, 3, 4, 4), TAPS[2]: (6, 5, 2, 2)}


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: FSP(student_taps=TAPS, teacher_taps=TAPS, **options),
        student=lambda seed: gaussian(seed, SHAPES),
        teacher=lambda seed: gaussian(seed + 1000, SHAPES),
    )


def maps(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [m.double() for m in gaussian(seed, {str(n): shape for n, shape in enumerate(shapes)}).values()]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    layers = range(sum(name.startswith("s_feat") for name in arrays))
    student = [torch.tensor(arrays[f"s_feat{n}"], dtype=torch.float64, requires_grad=True) for n in layers]
    teacher = [torch.tensor(arrays[f"t_feat{n}"], dtype=torch.float64) for n in layers]
    names: dict[str, Any] = {"loss": "mean", "alt_zoo": "mean", "alt_torchdistill": "columns"}
    losses = {name: fsp(student, teacher, form=form) for name, form in names.items()}
    matrices = {f"out_fsp_s{n}": flow(student[n], student[n + 1]).mT for n in layers[:-1]}
    free = {f"s_feat{n}": tensor for n, tensor in enumerate(student)}
    return with_gradients(losses, free, arrays) | matrices


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    sizes=st.lists(st.sampled_from([(1, 1), (2, 2), (3, 2), (4, 4), (5, 5)]), min_size=2, max_size=4),
    teacher_sizes=st.permutations([(1, 1), (2, 2), (3, 2), (4, 4)]),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Any, seed: int, rows: int, sizes: list[tuple[int, int]], teacher_sizes: list[tuple[int, int]]
) -> None:
    widths = (2, 3, 1, 2)
    student = maps(seed, *((rows, width, *size) for width, size in zip(widths, sizes, strict=False)))
    teacher = maps(seed + 1, *((rows, w, *size) for w, size in zip(widths, teacher_sizes, strict=True)))
    teacher = teacher[: len(student)]
    expected = oracle.fsp([s.numpy() for s in student], [t.numpy() for t in teacher], form)
    assert fsp(student, teacher, form=form).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Any) -> None:
    one, two = maps(0, (2, 2, 4, 4), (2, 3, 2, 2))
    teacher = maps(1, (2, 2, 4, 4), (2, 3, 2, 2))
    assert torch.autograd.gradcheck(
        lambda a, b: fsp([a, b], teacher, form=form), (one.requires_grad_(), two.requires_grad_())
    )


# limits and identities


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_learn_from_oneself(form: Any) -> None:
    student = maps(2, (4, 2, 4, 4), (4, 3, 2, 2))
    loss = fsp([one.requires_grad_() for one in student], [one.detach() for one in student], form=form)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, student))


def test_the_papers_sum_is_the_mean_times_the_entries() -> None:
    student, teacher = maps(3, (4, 2, 3, 3), (4, 5, 3, 3)), maps(4, (4, 2, 3, 3), (4, 5, 3, 3))
    torch.testing.assert_close(fsp(student, teacher, form="paper"), 10 * fsp(student, teacher))


def test_the_flow_is_a_gram_matrix() -> None:
    (one,) = maps(5, (4, 3, 2, 5))
    found = flow(one, one)
    torch.testing.assert_close(found, found.mT)
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), one.square().mean((2, 3)))


def test_positions_may_be_shuffled_together() -> None:
    one, two = maps(6, (4, 2, 3, 3), (4, 5, 3, 3))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = [m.flatten(2)[:, :, order].unflatten(2, (3, 3)) for m in (one, two)]
    torch.testing.assert_close(flow(*moved), flow(one, two))


def test_sizes_of_the_two_networks_may_differ() -> None:
    student = maps(7, (4, 2, 8, 8), (4, 3, 4, 4))
    doubled = [m.repeat_interleave(2, 2).repeat_interleave(2, 3) for m in student]
    assert fsp(student, doubled) < 1e-25  # averages of doubled pixels are those of the pixels


def test_the_objective_switches_from_flow_to_the_task() -> None:
    section: dict[str, Any] = OBJECTIVE
    objective = Objective({"fsp": Entry(FSP(), section["fsp"]["weight"])}, task=section["task"])
    objective.facts = Facts(steps_per_epoch=1, total_steps=270)
    found = [(objective.weight("task", step), objective.weight("fsp", step)) for step in (0, 29, 30, 269)]
    assert found == [(0, 50), (0, 50), (1, 0), (1, 0)]


def test_the_last_layers_meet() -> None:
    one = {name: torch.zeros(2, 1, 2, 2) for name in ("stem", "stages[0]", "stages[1]", "stages[2]")}
    other = {name: torch.zeros(2, 1, 2, 2) for name in ("stem", "stages[0]", "stages[1]")}
    term = FSP()
    term.build(Signals(None, one), Signals(None, other), Facts())
    assert term.names == (("stages[0]", "stages[1]", "stages[2]"), ("stem", "stages[0]", "stages[1]"))


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: Any) -> None:
    student = [torch.zeros(0, 2, 4, 4, requires_grad=True), torch.zeros(0, 3, 4, 4, requires_grad=True)]
    loss = fsp(student, [torch.zeros(0, 2, 4, 4), torch.zeros(0, 3, 4, 4)], form=form)
    assert loss.item() == 0
    assert [grad.shape[0] for grad in torch.autograd.grad(loss, student)] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Any, dtype: torch.dtype) -> None:
    drawn = gaussian(0, {"s": (2, 2, 3, 3), "t": (2, 2, 3, 3)})
    student = (drawn["s"].sign() * 1e4).to(dtype).requires_grad_()
    teacher = (drawn["t"].sign() * 1e4).to(dtype)
    loss = fsp([student, student], [teacher, teacher], form=form)
    exact = fsp([student.double()] * 2, [teacher.double()] * 2, form=form)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    grad = torch.autograd.grad(loss, student)[0]
    assert not grad.isnan().any()


# errors


def test_an_unknown_form() -> None:
    with pytest.raises(UserError, match=r"^form 'max' is not known; valid: columns, mean, paper$"):
        FSP(form="max")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        pytest.param(
            [(2, 4), (2, 4)],
            [(2, 4, 1, 1), (2, 4, 1, 1)],
            "fsp compares maps [B, C, H, W], not [2, 4] and [2, 4, 1, 1]",
            id="vectors",
        ),
        pytest.param(
            [(2, 2, 4, 4), (2, 3, 4, 4)],
            [(2, 2, 4, 4), (2, 6, 4, 4)],
            "fsp compares networks of equal widths: the student's are [2, 3], the teacher's [2, 6]; choose such "
            "a pair, or tap such layers",
            id="widths",
        ),
        pytest.param(
            [(2, 2, 4, 4)],
            [(2, 2, 4, 4)],
            "fsp compares pairs of layers: 1 of the student and 1 of the teacher were given",
            id="one layer",
        ),
    ],
)
def test_layers_that_do_not_fit(student: list[tuple[int, ...]], teacher: list[tuple[int, ...]], said: str) -> None:
    sides = [
        Signals(None, {f"stages[{n}]": torch.zeros(shape) for n, shape in enumerate(shapes)})
        for shapes in (student, teacher)
    ]
    taps = ["stages[*]"]
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        FSP(student_taps=taps, teacher_taps=taps).build(sides[0], sides[1], Facts())
