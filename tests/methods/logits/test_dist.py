# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from gloo_pool import GlooPool
from method_case import MethodCase, gaussian, gradient
from oracles import dist as oracle
from tutelage.core import ranks
from tutelage.core.error import UserError
from tutelage.methods.logits.dist import DIST, Form, dist, pearson

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}
FORMS: tuple[Form, ...] = ("product", "clamped")


def case() -> MethodCase:
    return MethodCase(
        term=DIST,
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
    )


def pair(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, scale)
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
    options = {"temperature": meta["tau"], "beta": meta["beta"], "gamma": meta["gamma"]}
    term, other = DIST(**options), DIST(form="clamped", **options)
    sides = {"logits": student}, {"logits": teacher}
    unit = dist(student, teacher, temperature=meta["tau"], eps=meta["eps"])
    losses = {
        "loss": case().loss(term, *sides, case().batch()),
        "loss_inter": unit["inter"],
        "loss_intra": unit["intra"],
        "alt_torchdistill": case().loss(other, *sides, case().batch()),
    }
    grads = {f"grad_s_logits__{name}": gradient(loss, student) for name, loss in losses.items()}
    grads["grad_s_logits"] = grads.pop("grad_s_logits__loss")
    return {**losses, **grads}


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(2, 10),
    temperature=st.floats(0.5, 10),
    scale=st.floats(0.1, 5),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Form, seed: int, rows: int, classes: int, temperature: float, scale: float) -> None:
    student, teacher = pair(seed, rows, classes, scale)
    expected = oracle.dist(student.detach().numpy(), teacher.numpy(), temperature, 0.7, 1.9, form=form)
    parts = dist(student, teacher, beta=0.7, gamma=1.9, temperature=temperature, form=form)
    assert parts["inter"].item() == pytest.approx(0.7 * expected["inter"], rel=1e-8, abs=1e-10)
    assert parts["intra"].item() == pytest.approx(1.9 * expected["intra"], rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_the_correlation_is_the_librarys(form: Form) -> None:
    student, teacher = pair(1, 4, 9)
    found = pearson(student.detach(), teacher, 1, form=form)
    expected = [np.corrcoef(student.detach()[n], teacher[n])[0, 1] for n in range(4)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["inter", "intra"])
def test_gradcheck(part: str, form: Form) -> None:
    student, teacher = pair(2, rows=4, classes=4, scale=1.0)
    assert torch.autograd.gradcheck(lambda s: dist(s, teacher, temperature=2.0, form=form)[part], student)


# limits and identities


def test_nothing_to_learn_from_oneself() -> None:
    student, _ = pair(3)
    loss = total(dist(student, student.detach()))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert gradient(loss, student).abs().max() < 1e-6


def test_scale_and_shift_of_the_teachers_rows_change_nothing() -> None:
    student, teacher = (side.detach().softmax(1) for side in pair(4))
    found = pearson(student, 0.3 * teacher + 0.1, 1)
    torch.testing.assert_close(found, pearson(student, teacher, 1), rtol=1e-6, atol=1e-7)


def test_two_rows_correlate_fully_or_not_at_all() -> None:
    student, teacher = pair(5, rows=2)
    rho = pearson(student.detach(), teacher, 0).abs()
    torch.testing.assert_close(rho, torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_one_row_has_no_columns_to_correlate() -> None:
    student, teacher = pair(6, rows=1)
    part = dist(student, teacher, gamma=0.5, temperature=2.0)["intra"]
    assert part.item() == 0.5 * 2**2
    assert not gradient(part, student).any()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_order_and_a_constant_change_nothing(seed: int) -> None:
    student, teacher = pair(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, classes = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    found = dist(student[rows][:, classes] + 3, teacher[rows][:, classes] - 5)
    torch.testing.assert_close(found, dist(student, teacher), rtol=1e-8, atol=1e-9)


def test_only_rows_of_their_own_correlate_across_classes() -> None:
    student, teacher = pair(7)
    each = [dist(student[n : n + 1], teacher[n : n + 1])["inter"] for n in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), dist(student, teacher)["inter"])


# over ranks


def share(gather: bool) -> tuple[Tensor, Tensor]:
    """This rank's part of the loss, and the gradient of its rows under a mean over ranks."""
    student, teacher = pair(8)
    rows = slice(0, 3) if ranks.rank() == 0 else slice(3, 6)
    mine = student[rows].detach().requires_grad_()
    loss = total(dist(mine, teacher[rows], gather=gather))
    return loss.detach(), gradient(loss, mine) / ranks.world_size()


def test_with_gather_the_parts_of_two_ranks_make_the_whole(gloo: GlooPool) -> None:
    student, teacher = pair(8)
    whole = total(dist(student, teacher))
    losses, grads = zip(*gloo.run(share, True), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), whole.detach())
    torch.testing.assert_close(torch.cat(grads), gradient(whole, student))
    apart, _ = zip(*gloo.run(share, False), strict=True)
    assert not torch.allclose(torch.stack(apart).mean(), whole)


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = total(dist(student, torch.zeros(0, 5)))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


@pytest.mark.parametrize("form", FORMS)
def test_constant_logits_are_finite(form: Form) -> None:
    student = torch.zeros(4, 5, requires_grad=True)
    _, teacher = pair(9, rows=4)
    parts = dist(student, teacher.float(), form=form)
    assert total(parts).item() == 2
    assert not gradient(total(parts), student).any()


@pytest.mark.parametrize("value", [0.0, 0.1, 7.3])
def test_what_rounding_leaves_of_a_constant_is_no_slope(value: float) -> None:
    student = torch.full((7, 10), value, requires_grad=True)
    _, teacher = pair(9, rows=7, classes=10)
    rho = pearson(student, teacher.float(), 1)
    assert not rho.any()
    assert not gradient(rho.sum(), student).any()


def test_small_probabilities_are_not_constant() -> None:
    student, teacher = pair(11)
    tiny = student.detach().softmax(1) * 1e-9
    assert pearson(tiny.requires_grad_(), teacher, 0).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 1, 0]], dtype=dtype)
    parts = dist(student, teacher, form=form)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts.values())
    assert gradient(total(parts), student).isfinite().all()


def test_autocast_does_not_reach_the_comparison() -> None:
    student, teacher = (part.detach().float() for part in pair(10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dist(student, teacher)
    torch.testing.assert_close(inside, dist(student, teacher), rtol=0, atol=0)


# errors


@pytest.mark.parametrize(("student", "teacher"), [((2, 3), (2, 4)), ((2, 3, 4, 4), (2, 3, 4, 4))])
def test_logits_that_do_not_fit(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    said = f"dist takes two [B, K] tensors of logits: the student's are {[*student]}, the teacher's {[*teacher]}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        dist(torch.zeros(student), torch.zeros(teacher))


def test_options_that_are_none() -> None:
    with pytest.raises(UserError, match=r"^temperature must be > 0, not 0$"):
        DIST(temperature=0)
    with pytest.raises(UserError, match=r"^form 'eps' is not known; valid: clamped, product$"):
        DIST(form="eps")  # type: ignore[arg-type]
