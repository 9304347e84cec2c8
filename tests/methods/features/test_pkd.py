# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, distributed

from gloo_pool import GlooPool
from golden_answer import with_gradients
from method_case import MethodCase, gaussian, gradient
from oracles import pkd as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.pkd import PKD, pkd, standardized

Arrays = dict[str, NDArray[Any]]
TAPS = ("fpn[0]", "fpn[1]")


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: PKD(student_taps=TAPS, teacher_taps=TAPS, **options),
        student=lambda seed: gaussian(seed, {TAPS[0]: (6, 4, 4, 5), TAPS[1]: (6, 4, 2, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {TAPS[0]: (6, 4, 4, 5), TAPS[1]: (6, 4, 2, 3)}),
    )


def pair(seed: int = 0, shape: tuple[int, ...] = (3, 2, 4, 3), goal: tuple[int, ...] | None = None) -> Any:
    drawn = gaussian(seed, {"student": shape, "teacher": goal or shape})
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    count = sum(name.startswith("s_feat") for name in arrays)
    answer: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32):
        student = {f"s_feat{n}": torch.tensor(arrays[f"s_feat{n}"], dtype=dtype).requires_grad_() for n in range(count)}
        teacher = {f"fpn[{n}]": torch.tensor(arrays[f"t_feat{n}"], dtype=dtype) for n in range(count)}
        signals = Signals(None, {f"fpn[{n}]": student[f"s_feat{n}"] for n in range(count)}), Signals(None, teacher)
        term = PKD(eps=meta["eps"], resize="student" if meta["resize_stu"] else "teacher")
        term.build(*signals, Facts())
        loss = term(*signals, case().batch())
        answer |= with_gradients({"loss": loss}, student, arrays) if dtype == torch.float64 else {"loss_f32": loss}
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    channels=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    goal=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    levels=st.integers(1, 2),
)
@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_equals_the_loops(
    resize: Any, seed: int, rows: int, channels: int, grid: tuple[int, int], goal: tuple[int, int], levels: int
) -> None:
    pairs = [pair(seed + n, (rows, channels, *grid), (rows, channels, *goal)) for n in range(levels)]
    student, teacher = [one for one, _ in pairs], [other for _, other in pairs]
    expected = oracle.pkd(
        [one.detach().numpy() for one in student], [other.numpy() for other in teacher], 1e-6, resize == "student"
    )
    assert pkd(student, teacher, resize=resize).item() == pytest.approx(expected, rel=1e-9)


def test_gradcheck() -> None:
    student, teacher = pair(2)
    assert torch.autograd.gradcheck(lambda s: pkd([s], [teacher]), student)


# limits and identities


def test_scale_and_shift_of_a_channel_change_nothing() -> None:
    student, teacher = pair(3)
    scale, shift = torch.tensor([3.0, 0.2]).view(1, 2, 1, 1), torch.tensor([-5.0, 9.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(pkd([scale * student + shift], [teacher]), pkd([student], [teacher]), rtol=1e-4, atol=0)
    assert pkd([scale * teacher + shift], [teacher]).item() == pytest.approx(0, abs=1e-10)


def test_it_is_one_minus_the_correlation() -> None:
    student, teacher = pair(4)
    count = student[:, 0].numel()
    expected = [
        1 - torch.corrcoef(torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]))[0, 1] for c in range(2)
    ]
    found = pkd([student], [teacher])
    torch.testing.assert_close(found, (count - 1) / count * torch.stack(expected).mean(), rtol=1e-4, atol=0)


def test_levels_add_up() -> None:
    one, other = pair(5), pair(6, (3, 2, 2, 2))
    both = pkd([one[0], other[0]], [one[1], other[1]])
    torch.testing.assert_close(both, pkd([one[0]], [one[1]]) + pkd([other[0]], [other[1]]))


def test_opposite_maps_are_farthest() -> None:
    _, teacher = pair(7, (4, 2, 9, 9))
    assert pkd([-teacher], [teacher]).item() == pytest.approx(2, rel=1e-2)


def test_all_levels_of_a_pyramid_by_default_and_a_bridge_where_widths_differ() -> None:
    term = PKD()
    student = Signals(None, gaussian(0, {"fpn[0]": (2, 3, 4, 4), "fpn[1]": (2, 4, 2, 2)}))
    teacher = Signals(None, gaussian(1, {"fpn[0]": (2, 4, 4, 4), "fpn[1]": (2, 4, 2, 2)}))
    term.build(student, teacher, Facts())
    assert term.names == (("fpn[0]", "fpn[1]"), ("fpn[0]", "fpn[1]"))
    assert [name for name, _ in term.named_parameters()] == ["align.0.weight", "align.0.bias"]
    term(student, teacher, case().batch()).backward()
    assert all(p.grad is not None for p in term.parameters())


# several processes


def on_a_rank() -> tuple[Tensor, Tensor]:
    start, stop = ((0, 1), (1, 3))[distributed.get_rank()]
    student, teacher = pair(8)
    own = student[start:stop].detach().requires_grad_()
    loss = (stop - start) * 2 / 3 * pkd([own], [teacher[start:stop]], gather=True)
    return loss.detach(), gradient(loss, own)


def test_gathered_it_is_one_process_with_the_whole_batch(gloo: GlooPool) -> None:
    student, teacher = pair(8)
    whole = pkd([student], [teacher])
    values, gradients = zip(*gloo.run(on_a_rank), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), whole.detach())
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient(whole, student))


# odd cases


def test_a_single_value_says_nothing() -> None:
    student = torch.ones(1, 3, 1, 1, requires_grad=True)
    loss = pkd([student], [5 * torch.ones(1, 3, 1, 1)])
    assert loss.item() == 0
    assert gradient(loss, student).isfinite().all()


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = pkd([student], [torch.zeros(0, 3, 2, 2)])
    assert loss.item() == 0
    assert gradient(loss, student).shape == student.shape


def test_a_constant_channel_is_finite() -> None:
    student, teacher = pair(9)
    with torch.no_grad():
        student[:, 0] = 3.0
    assert not standardized(student)[:, 0].any()
    loss = pkd([student], [teacher])
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    drawn = gaussian(0, {"s": (2, 3, 4, 4), "t": (2, 3, 4, 4)})
    student = (1e4 * drawn["s"].sign()).to(dtype).requires_grad_()
    teacher = (-1e4 * drawn["t"].sign()).to(dtype)
    loss = pkd([student], [teacher])
    assert loss.dtype == torch.float32
    exact = pkd([student.detach().double()], [teacher.double()])
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert gradient(loss, student).isfinite().all()


# errors


def test_levels_and_widths_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"^pkd compares level by level: the student has 1, the teacher 2$"):
        pkd([torch.zeros(1, 2, 2, 2)], [torch.zeros(1, 2, 2, 2)] * 2)
    said = "pkd compares maps of the same samples and widths: the student's is [1, 2, 2, 2], the teacher's [1, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        pkd([torch.zeros(1, 2, 2, 2)], [torch.zeros(1, 3, 2, 2)])
    vectors = Signals(None, {"fpn[0]": torch.zeros(2, 3)})
    with pytest.raises(UserError, match=re.escape("pkd compares maps [B, C, H, W], not [2, 3] and [2, 3]")):
        PKD().build(vectors, vectors, Facts())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resize": "both"}, "resize 'both' is not known; valid: student, teacher"),
        ({"eps": 0}, "eps must be > 0, not 0"),
        ({"student_taps": "map"}, "student_taps: expected a list of roles or module paths, not 'map'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        PKD(**options)
