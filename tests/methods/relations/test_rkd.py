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
from oracles import rkd as oracle
from peak import peak
from tutelage.core.error import UserError
from tutelage.functional import block
from tutelage.methods.relations.rkd import RKD, rkd

Arrays = dict[str, NDArray[Any]]
UNIT: dict[str, Any] = {"lambda_distance": 1.0, "lambda_angle": 1.0}
FORMS = {"raw": False, "unit": True}  # ours, the oracle's


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: RKD(**options),
        student=lambda seed: gaussian(seed, {"pooled": (6, 4)}),
        teacher=lambda seed: gaussian(seed + 1000, {"pooled": (6, 5)}),
    )


def pair(seed: int = 0, rows: int = 6, widths: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, widths[0]), "teacher": (rows, widths[1])})
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


def total(parts: dict[str, Tensor]) -> Tensor:
    return parts["distance"] + parts["angle"]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_feat"], requires_grad=True)
    teacher = torch.tensor(arrays["t_feat"])
    weights = {"lambda_distance": meta["distance_weight"], "lambda_angle": meta["angle_weight"]}
    unit = rkd(student, teacher, **UNIT)
    found = {
        "loss": case().loss(RKD(squared=meta["squared"], **weights), *signals(student, teacher)),
        "loss_distance": unit["distance"],
        "loss_angle": unit["angle"],
        "alt_mmrazor_l2norm": case().loss(RKD(form="unit", **weights), *signals(student, teacher)),
    }
    answer: dict[str, Any] = {
        "loss_f32": total(rkd(student.float(), teacher.float(), squared=meta["squared"], **weights))
    }
    for name, loss in found.items():
        answer |= {name: loss, f"grad_s_feat__{name}": gradient(loss, student)}
    answer["grad_s_feat"] = answer.pop("grad_s_feat__loss")
    return {name: value for name, value in answer.items() if name in arrays}


def signals(student: Tensor, teacher: Tensor) -> Any:
    return {"pooled": student}, {"pooled": teacher}, case().batch()


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 5),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    squared=st.booleans(),
    size=st.sampled_from([1, 9, 30, 2**22]),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Any, seed: int, rows: int, widths: tuple[int, int], squared: bool, size: int) -> None:
    student, teacher = pair(seed, rows, widths)
    expected = oracle.rkd(student.detach().numpy(), teacher.numpy(), squared=squared, normalise=FORMS[form])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "SIZE", size)
        parts = rkd(student, teacher, squared=squared, form=form)
    assert parts["distance"].item() == pytest.approx(25 * expected["distance"], rel=1e-9, abs=1e-13)
    assert parts["angle"].item() == pytest.approx(50 * expected["angle"], rel=1e-9, abs=1e-13)
    assert total(parts).item() == pytest.approx(expected["loss"], rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Any, squared: bool) -> None:
    student, teacher = pair(2, rows=4)
    assert torch.autograd.gradcheck(lambda s: total(rkd(s, teacher, form=form, squared=squared)), student)


# limits and identities


def test_moving_turning_and_scaling_an_embedding_changes_nothing() -> None:
    student, teacher = pair(3, widths=(4, 4))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    moved = rkd(7 * student @ turn + 11, teacher / 5 - 2)
    torch.testing.assert_close(total(moved), total(rkd(student, teacher)))
    same = rkd(3 * teacher @ turn + 1, teacher)
    assert total(same).item() == pytest.approx(0, abs=1e-24)


def test_a_line_has_the_angles_of_a_line_whatever_its_distances() -> None:
    even, odd = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [5.0]])
    parts = rkd(even, odd)
    assert parts["angle"] == 0
    assert parts["distance"] > 0


def test_every_model_is_measured_in_its_own_mean() -> None:
    student, teacher = pair(4)
    apart = torch.cdist(student, student)
    mean = apart.sum() / 30
    theirs = torch.cdist(teacher, teacher)
    gap = (apart / mean - theirs / (theirs.sum() / 30)).detach()
    expected = torch.where(gap.abs() < 1, gap.square() / 2, gap.abs() - 0.5).mean()
    torch.testing.assert_close(rkd(student, teacher, **UNIT)["distance"].detach(), expected)


def test_a_coefficient_of_zero_leaves_its_part_out() -> None:
    student, teacher = pair(5)
    both, distance = rkd(student, teacher), rkd(student, teacher, lambda_angle=0.0)
    assert distance["angle"] == 0
    torch.testing.assert_close(distance["distance"], both["distance"])
    assert rkd(student, teacher, lambda_distance=0.0)["distance"] == 0


@pytest.mark.parametrize("size", [1, 20, 40, 200])
def test_blocks_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(4, rows=7)
    whole = total(rkd(student, teacher))
    monkeypatch.setattr(block, "SIZE", size)
    parts = total(rkd(student, teacher))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, student), gradient(whole, student))


def test_memory_grows_with_the_batch_and_not_with_its_cube(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "SIZE", 2**12)

    def held(rows: int) -> int:
        student, teacher = torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 4)
        return peak(lambda: total(rkd(student, teacher)).backward())

    assert held(80) < 4 * held(20)  # four times the samples, 64 times the triples


def test_near_samples_keep_their_distance() -> None:
    base = gaussian(0, {"e": (4, 32)})["e"] + 100
    near = base.clone()
    near[1] = near[0] + 1e-3 * gaussian(1, {"e": (32,)})["e"]
    found = rkd(near, base, **UNIT)["distance"].item()
    exact = rkd(near.double(), base.double(), **UNIT)["distance"].item()
    assert found == pytest.approx(exact, rel=1e-4)


# several processes


def on_a_rank() -> tuple[Tensor, Tensor]:
    start, stop = ((0, 3), (3, 7))[distributed.get_rank()]
    student, teacher = pair(5, rows=7)
    own = student[start:stop].detach().requires_grad_()
    loss = (stop - start) * 2 / 7 * total(rkd(own, teacher[start:stop], gather=True))
    return loss.detach(), gradient(loss, own)


def test_gathered_it_is_one_process_with_the_whole_batch(gloo: GlooPool) -> None:
    student, teacher = pair(5, rows=7)
    whole = total(rkd(student, teacher))
    values, gradients = zip(*gloo.run(on_a_rank), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), whole.detach())
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient(whole, student))


# odd cases


@pytest.mark.parametrize("rows", [0, 1])
def test_without_a_pair_there_is_a_connected_zero(rows: int) -> None:
    student = torch.ones(rows, 5, requires_grad=True)
    loss = total(rkd(student, torch.ones(rows, 3)))
    assert loss.item() == 0
    assert not gradient(loss, student).any()


def test_equal_samples_have_no_gradient_for_each_other() -> None:
    student, teacher = pair(6, rows=4)
    with torch.no_grad():
        student[1] = student[0]
    parts = rkd(student, teacher)
    expected = oracle.rkd(student.detach().numpy(), teacher.numpy())
    assert total(parts).item() == pytest.approx(expected["loss"], rel=1e-9)
    assert gradient(total(parts), student).abs().max() < 100


def test_constant_features() -> None:
    student = torch.full((3, 4), 5.0, requires_grad=True)
    loss = total(rkd(student, torch.zeros(3, 2)))
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert gradient(loss, student).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    drawn = gaussian(0, {"s": (4, 64), "t": (4, 64)})
    student = (1e4 * drawn["s"].sign()).to(dtype).requires_grad_()
    teacher = (-1e4 * drawn["t"].sign()).to(dtype)
    parts = rkd(student, teacher)
    expected = oracle.rkd(student.detach().double().numpy(), teacher.double().numpy())
    assert total(parts).dtype == torch.float32
    assert total(parts).item() == pytest.approx(expected["loss"], rel=1e-4)
    assert gradient(total(parts), student).isfinite().all()


# errors


def test_other_samples() -> None:
    said = "rkd compares the same samples: the student has 3, the teacher 2"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        rkd(torch.zeros(3, 2), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "cosine"}, "form 'cosine' is not known; valid: raw, unit"),
        (
            {"lambda_distance": 0, "lambda_angle": 0},
            "lambda_distance and lambda_angle are both 0: nothing is compared",
        ),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        RKD(**options)
