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
from oracles import nst as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.nst import NST, nst

Arrays = dict[str, NDArray[Any]]
TAPS = ("stages[0]", "stages[1]")
SHAPES = {TAPS[0]: (6, 4, 6, 6), TAPS[1]: (6, 4, 2, 2)}  # one layer for either Gram matrix


def case() -> MethodCase:
    return MethodCase(
        term=lambda: NST(student_taps=TAPS, teacher_taps=TAPS),
        student=lambda seed: gaussian(seed, SHAPES),
        teacher=lambda seed: gaussian(seed + 1000, SHAPES),
    )


def pair(seed: int, student: tuple[int, ...], teacher: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": student, "teacher": teacher})
    return drawn["student"].double(), drawn["teacher"].double()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    layers = range(sum(name.startswith("s_feat") for name in arrays))
    student = [torch.tensor(arrays[f"s_feat{n}"], dtype=torch.float64, requires_grad=True) for n in layers]
    teacher = [torch.tensor(arrays[f"t_feat{n}"], dtype=torch.float64) for n in layers]
    losses: dict[str, Tensor] = {name: nst(student, teacher) for name in ("loss", "alt_zoo") if name in arrays}
    return with_gradients(losses, {f"s_feat{n}": tensor for n, tensor in enumerate(student)}, arrays)


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    sizes=st.sampled_from([((3, 4), (3, 4)), ((5, 5), (2, 2)), ((2, 2), (3, 3)), ((1, 1), (1, 1))]),
)
def test_equals_the_loops(
    seed: int, rows: int, widths: tuple[int, int], sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    student, teacher = pair(seed, (rows, widths[0], *sizes[0]), (rows, widths[1], *sizes[1]))
    more = pair(seed + 1, (rows, 2, 2, 2), (rows, 5, 2, 2))
    given = [student, more[0]], [teacher, more[1]]
    expected = oracle.nst(*([side.numpy() for side in sides] for sides in given))
    assert nst(*given).item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradcheck(size: int) -> None:
    student, teacher = pair(0, (2, 3, size, size), (2, 2, size, size))
    assert torch.autograd.gradcheck(lambda s: nst([s], [teacher]), student.requires_grad_())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), widths=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_the_linear_kernel_equals_the_loops(seed: int, widths: tuple[int, int]) -> None:
    sides = pair(seed, (3, widths[0], 2, 3), (3, widths[1], 2, 3))
    total = 0.0
    for n in range(3):
        one, other = ([c.flatten() / c.norm() for c in side[n]] for side in sides)
        for left, right, sign in ((one, one, 1), (other, other, 1), (one, other, -2)):
            total += sign * sum(float(x @ y) for x in left for y in right) / (len(left) * len(right)) / 3
    found = nst([sides[0]], [sides[1]], kernel="linear")
    assert found.item() == pytest.approx(total, rel=1e-10, abs=1e-14)


# limits and identities


@pytest.mark.parametrize("size", [2, 5])
def test_nothing_to_learn_from_oneself_in_another_order(size: int) -> None:
    student, _ = pair(1, (4, 6, size, size), (4, 6, size, size))
    loss = nst([student.requires_grad_()], [student.detach()[:, [5, 3, 0, 1, 2, 4]]])
    assert abs(loss.item()) < 1e-15
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-15


@pytest.mark.parametrize("size", [2, 5])
def test_doubled_channels_are_the_same_distribution(size: int) -> None:
    student, teacher = pair(2, (4, 6, size, size), (4, 5, size, size))
    torch.testing.assert_close(nst([torch.cat([student] * 2, 1)], [teacher]), nst([student], [teacher]))


def test_scale_and_sign_of_a_channel_do_not_matter() -> None:
    student, teacher = pair(3, (4, 6, 3, 3), (4, 5, 3, 3))
    factors = torch.tensor([2.0, -1.0, 0.1, -7.0, 1.0, 3.0], dtype=torch.float64).view(1, 6, 1, 1)
    torch.testing.assert_close(nst([student * factors], [teacher]), nst([student], [teacher]))


@pytest.mark.parametrize("size", [2, 5])
def test_it_is_never_negative(size: int) -> None:
    for seed in range(20):
        student, _ = pair(seed, (2, 6, size, size), (1,))
        near = student + 1e-4 * torch.randn_like(student)
        assert nst([near.float()], [student.float()]) >= (0 if size == 2 else -1e-7)


def test_orthogonal_channels_are_farthest() -> None:
    student, teacher = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
    student[..., 0] = teacher[..., 2] = 5.0
    assert nst([student], [teacher]) == 2


def test_layers_add_up() -> None:
    one, other = pair(4, (4, 3, 4, 4), (4, 5, 4, 4)), pair(5, (4, 3, 2, 2), (4, 5, 2, 2))
    torch.testing.assert_close(
        nst([one[0], other[0]], [one[1], other[1]]), nst([one[0]], [one[1]]) + nst([other[0]], [other[1]])
    )


# odd cases


@pytest.mark.parametrize("size", [1, 4])
def test_no_rows_give_a_connected_zero(size: int) -> None:
    student = torch.zeros(0, 3, size, size, requires_grad=True)
    loss = nst([student], [torch.zeros(0, 3, size, size)])
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].shape == (0, 3, size, size)


@pytest.mark.parametrize("size", [1, 4])
def test_dead_channels_are_finite(size: int) -> None:
    dead = torch.zeros(2, 3, size, size, requires_grad=True)
    for teacher in (torch.ones(2, 3, size, size), torch.zeros(2, 3, size, size)):
        loss = nst([dead], [teacher])
        assert loss.item() == pytest.approx(float(teacher.any()))
        assert torch.autograd.grad(loss, dead)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [2, 5])
def test_half_precision_extremes(columns: int, dtype: torch.dtype) -> None:
    drawn = gaussian(0, {"s": (2, 3, 1, columns), "t": (2, 3, 1, columns)})
    student = (drawn["s"].sign() * 1e4).to(dtype).requires_grad_()
    teacher = (drawn["t"].sign() * 1e4).to(dtype)
    loss = nst([student], [teacher])
    expected = oracle.nst([student.detach().double().numpy()], [teacher.double().numpy()])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_an_unknown_kernel() -> None:
    with pytest.raises(UserError, match=r"^kernel 'gaussian' is not known; valid: linear, polynomial$"):
        NST(kernel="gaussian")  # type: ignore[arg-type]


def test_a_tap_that_is_no_map() -> None:
    sides = [Signals(None, {"a": torch.zeros(shape)}) for shape in ((2, 4), (2, 4, 1, 1))]
    with pytest.raises(UserError, match=re.escape("nst compares maps [B, C, H, W], not [2, 4] and [2, 4, 1, 1]")):
        NST(student_taps=["a"], teacher_taps=["a"]).build(sides[0], sides[1], Facts())
