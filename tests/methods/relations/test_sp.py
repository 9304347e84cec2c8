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
from method_case import MethodCase, gaussian, gradient
from oracles import sp as oracle
from peak import peak
from tutelage.core.error import UserError
from tutelage.functional import block
from tutelage.methods.relations.sp import SP, Form, sp

Arrays = dict[str, NDArray[Any]]
FORMS = {"l2": "paper", "l1": "l1"}  # ours, the oracle's


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: SP(**options),
        student=lambda seed: gaussian(seed, {"map": (6, 4, 3, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {"map": (6, 5, 2, 2)}),
    )


def pair(seed: int = 0, rows: int = 6, widths: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, widths[0]), "teacher": (rows, widths[1])})
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


# the authors' numbers

READINGS: dict[str, Form] = {"loss": "l2", "alt_zoo": "l2", "alt_torchdistill_L1norm": "l1"}


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_feat"], requires_grad=True)
    teacher = torch.tensor(arrays["t_feat"])
    answer: dict[str, Any] = {"loss_f32": sp(student.float(), teacher.float())}
    for name, form in READINGS.items():
        loss = case().loss(SP(form=form), {"map": student}, {"map": teacher}, case().batch())
        answer[name] = loss
        answer["grad_s_feat" if name == "loss" else f"grad_s_feat__{name}"] = gradient(loss, student)
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.sampled_from([1, 7, 2**22]),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Any, seed: int, rows: int, widths: tuple[int, int], size: int) -> None:
    student, teacher = pair(seed, rows, widths)
    expected = oracle.sp(student.detach().numpy(), teacher.numpy(), FORMS[form])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "SIZE", size)
        assert sp(student, teacher, form=form).item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_maps_are_flattened() -> None:
    student, teacher = gaussian(0, {"s": (3, 2, 2, 2)})["s"], gaussian(1, {"t": (3, 5, 1, 2)})["t"]
    torch.testing.assert_close(sp(student, teacher), sp(student.view(3, 8), teacher.view(3, 10)))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Any) -> None:
    student, teacher = pair(2, rows=4)
    assert torch.autograd.gradcheck(lambda s: sp(s, teacher, form=form), student)


# limits and identities


@pytest.mark.parametrize("form", FORMS)
def test_turning_and_scaling_all_features_changes_nothing(form: Any) -> None:
    student, teacher = pair(3, widths=(4, 4))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(sp(7 * student @ turn, teacher / 5, form=form), sp(student, teacher, form=form))
    turned = sp(3 * teacher @ turn, teacher, form=form)
    assert turned.item() == pytest.approx(0, abs=1e-28)


def test_opposite_samples_against_equal_ones() -> None:
    student = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    teacher = torch.tensor([[1.0], [-1.0]])
    assert sp(student, teacher).item() == pytest.approx(1.0)  # two of four entries of 1/sqrt(2) change sign


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(4, rows=7)
    whole = sp(student, teacher)
    monkeypatch.setattr(block, "SIZE", 15)  # two rows a block
    parts = sp(student, teacher)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, student), gradient(whole, student))


def test_memory_grows_with_the_batch_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "SIZE", 2**14)

    def held(rows: int) -> int:
        student, teacher = torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 4)
        return peak(lambda: sp(student, teacher).backward())

    assert held(1024) < 2 * held(256)  # four times the samples, sixteen times the pairs


# several processes


def gathered(start: int, stop: int) -> tuple[Tensor, Tensor]:
    student, teacher = pair(5, rows=7)
    own = student[start:stop].detach().requires_grad_()
    loss = sp(own, teacher[start:stop], gather=True)
    share = (stop - start) * distributed.get_world_size() / 7
    return loss.detach() * share, gradient(share * loss, own)


def on_a_rank() -> tuple[Tensor, Tensor]:
    return gathered(*((0, 3), (3, 7))[distributed.get_rank()])


def test_gathered_it_is_one_process_with_the_whole_batch(gloo: GlooPool) -> None:
    student, teacher = pair(5, rows=7)
    whole = sp(student, teacher)
    values, gradients = zip(*gloo.run(on_a_rank), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), whole.detach())
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient(whole, student))


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = sp(student, torch.zeros(0, 3))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


def test_one_sample_is_like_itself() -> None:
    student, teacher = pair(6, rows=1)
    loss = sp(student, teacher)
    assert loss.item() == pytest.approx(0, abs=1e-30)
    assert gradient(loss, student).abs().max() < 1e-15


def test_a_dead_sample_stays_zero_and_gets_no_gradient() -> None:
    student, teacher = pair(7, rows=3)
    with torch.no_grad():
        student[1] = 0
    loss = sp(student, teacher)
    assert loss.item() == pytest.approx(oracle.sp(student.detach().numpy(), teacher.numpy()), rel=1e-12)
    assert gradient(loss, student).abs().max() < 10
    assert not gradient(sp(torch.zeros_like(student, requires_grad=True) + 0 * student, teacher), student).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    # products of 64 channels of 1e4 are 6e9: beyond what half precision holds
    signs = gaussian(0, {"s": (4, 64), "t": (4, 64)})
    student = (1e4 * signs["s"].sign()).to(dtype).requires_grad_()
    teacher = (-1e4 * signs["t"].sign()).to(dtype)
    loss = sp(student, teacher)
    expected = oracle.sp(student.detach().double().numpy(), teacher.double().numpy())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gradient(loss, student).isfinite().all()


@pytest.mark.parametrize("value", [1.0, -1e4])
def test_constant_features(value: float) -> None:
    student = torch.full((3, 4), value, requires_grad=True)
    loss = sp(student, torch.full((3, 2), 5.0))
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient(loss, student).isfinite().all()


# errors


def test_other_samples() -> None:
    said = "sp compares the same samples: the student has 3, the teacher 2"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        sp(torch.zeros(3, 2), torch.zeros(2, 2))


def test_options() -> None:
    with pytest.raises(UserError, match=re.escape("form 'l3' is not known; valid: l1, l2")):
        SP(form="l3")  # type: ignore[arg-type]
