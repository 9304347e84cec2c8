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
from oracles import pkt as oracle
from peak import peak
from tutelage.core.error import UserError
from tutelage.functional import block
from tutelage.methods.relations.pkt import PKT, pkt

Arrays = dict[str, NDArray[Any]]


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: PKT(**options),
        student=lambda seed: gaussian(seed, {"pooled": (6, 4)}),
        teacher=lambda seed: gaussian(seed + 1000, {"pooled": (6, 5)}),
    )


def pair(seed: int = 0, rows: int = 6, widths: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, widths[0]), "teacher": (rows, widths[1])})
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_feat"], requires_grad=True)
    teacher = torch.tensor(arrays["t_feat"])
    answer: dict[str, Any] = {"loss_f32": pkt(student.float(), teacher.float(), eps=meta["eps"])}
    for name, eps in (("loss", meta["eps"]), ("alt_zoo_eps1e-6", 1e-6)):
        loss = case().loss(PKT(eps=eps), {"pooled": student}, {"pooled": teacher}, case().batch())
        answer[name] = loss
        answer["grad_s_feat" if name == "loss" else f"grad_s_feat__{name}"] = gradient(loss, student)
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    eps=st.sampled_from([1e-7, 1e-6, 1e-2]),
    size=st.sampled_from([1, 7, 2**22]),
)
def test_equals_the_loops(seed: int, rows: int, widths: tuple[int, int], eps: float, size: int) -> None:
    student, teacher = pair(seed, rows, widths)
    expected = oracle.pkt(student.detach().numpy(), teacher.numpy(), eps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "SIZE", size)
        assert pkt(student, teacher, eps=eps).item() == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_gradcheck() -> None:
    student, teacher = pair(2, rows=4)
    assert torch.autograd.gradcheck(lambda s: pkt(s, teacher), student)


# limits and identities


def test_turning_and_scaling_features_changes_nothing() -> None:
    student, teacher = pair(3, widths=(4, 4))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(pkt(7 * student @ turn, teacher / 5), pkt(student, teacher), rtol=1e-5, atol=0)
    assert pkt(3 * teacher @ turn, teacher).item() == pytest.approx(0, abs=1e-8)


def test_it_is_the_mean_divergence_of_the_rows_over_their_length() -> None:
    student, teacher = pair(4)

    def rows(vectors: Tensor) -> Tensor:
        n = torch.nn.functional.normalize(vectors, dim=1)
        c = (n @ n.T + 1) / 2
        return c / c.sum(1, keepdim=True)

    expected = torch.nn.functional.kl_div(rows(student).log(), rows(teacher), reduction="batchmean") / 6
    torch.testing.assert_close(pkt(student, teacher), expected, rtol=1e-5, atol=0)


def test_two_samples_by_hand() -> None:
    same, opposite = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
    assert pkt(same, opposite).item() == pytest.approx(0.6931472 / 2, rel=1e-5)  # 2 rows of log 2, over 4 entries


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(4, rows=7)
    whole = pkt(student, teacher)
    monkeypatch.setattr(block, "SIZE", 15)  # two rows a block
    parts = pkt(student, teacher)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, student), gradient(whole, student))


def test_memory_grows_with_the_batch_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "SIZE", 2**14)

    def held(rows: int) -> int:
        student, teacher = torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 4)
        return peak(lambda: pkt(student, teacher).backward())

    assert held(1024) < 2 * held(256)  # four times the samples, sixteen times the pairs


# several processes


def on_a_rank() -> tuple[Tensor, Tensor]:
    start, stop = ((0, 3), (3, 7))[distributed.get_rank()]
    student, teacher = pair(5, rows=7)
    own = student[start:stop].detach().requires_grad_()
    loss = (stop - start) * 2 / 7 * pkt(own, teacher[start:stop], gather=True)
    return loss.detach(), gradient(loss, own)


def test_gathered_it_is_one_process_with_the_whole_batch(gloo: GlooPool) -> None:
    student, teacher = pair(5, rows=7)
    whole = pkt(student, teacher)
    values, gradients = zip(*gloo.run(on_a_rank), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), whole.detach())
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient(whole, student))


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = pkt(student, torch.zeros(0, 3))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


def test_one_sample_is_its_own_neighbour() -> None:
    student, teacher = pair(6, rows=1)
    loss = pkt(student, teacher)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert gradient(loss, student).abs().max() < 1e-12


def test_a_dead_sample_has_every_neighbour_alike() -> None:
    student, teacher = pair(7, rows=3)
    with torch.no_grad():
        student[1] = 0
    loss = pkt(student, teacher)
    assert loss.item() == pytest.approx(oracle.pkt(student.detach().numpy(), teacher.numpy()), rel=1e-9)
    assert gradient(loss, student).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    drawn = gaussian(0, {"s": (4, 64), "t": (4, 64)})
    student = (1e4 * drawn["s"].sign()).to(dtype).requires_grad_()
    teacher = (-1e4 * drawn["t"].sign()).to(dtype)
    loss = pkt(student, teacher)
    expected = oracle.pkt(student.detach().double().numpy(), teacher.double().numpy())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert gradient(loss, student).isfinite().all()


def test_opposite_directions_are_finite() -> None:
    student = torch.tensor([[1e4, 1e4], [-1e4, -1e4]], requires_grad=True)
    loss = pkt(student, torch.ones(2, 2))
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


@pytest.mark.parametrize("value", [1.0, -1e4, 0.0])
def test_constant_features(value: float) -> None:
    student = torch.full((3, 4), value, requires_grad=True)
    loss = pkt(student, torch.full((3, 2), 5.0))
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert gradient(loss, student).isfinite().all()


# errors


def test_other_samples() -> None:
    said = "pkt compares the same samples: the student has 3, the teacher 2"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        pkt(torch.zeros(3, 2), torch.zeros(2, 2))


def test_options() -> None:
    with pytest.raises(UserError, match=re.escape("eps must be > 0, not 0")):
        PKT(eps=0)
