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
from oracles import cc as oracle
from peak import peak
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.functional import block
from tutelage.methods.relations.cc import CC, Form, cc

Arrays = dict[str, NDArray[Any]]
FORMS: dict[Form, str] = {  # ours, the oracle's
    "gaussian": "paper",
    "neighbour": "neighbour",
    "frobenius": "frobenius",
    "bilinear": "bilinear",
}


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: CC(**{"width": 4, **options}),
        student=lambda seed: gaussian(seed, {"pooled": (6, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {"pooled": (6, 5)}),
    )


def pair(seed: int = 0, rows: int = 6, width: int = 4) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, width), "teacher": (rows, width)})
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double().requires_grad_()


# the authors' numbers

READINGS: dict[str, Form] = {
    "loss": "gaussian",
    "alt_repdistiller": "neighbour",
    "alt_torchdistill_gaussian": "frobenius",
    "alt_torchdistill_bilinear": "bilinear",
}


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        student = torch.tensor(arrays["s_feat"], dtype=dtype, requires_grad=True)
        signals = (
            Signals(None, {"pooled": student}),
            Signals(None, {"pooled": torch.tensor(arrays["t_feat"], dtype=dtype)}),
        )
        for name, form in READINGS.items():
            term = CC(gamma=meta["gamma"], order=meta["P_order"], width=meta["feat_dim"], form=form)
            term.build(*signals, Facts())
            weights = {
                f"embed_{side}.{part}": torch.tensor(arrays[f"w_embed_{side[0]}.linear.{part}"])
                for side in ("student", "teacher")
                for part in ("weight", "bias")
            }
            term.to(dtype).load_state_dict(weights)
            loss = term(*signals, case().batch())
            marker = "" if name == "loss" else f"__{name}"
            free = {"s_feat": student} | {
                "w_" + own.replace("student.", "s.linear.").replace("teacher.", "t.linear."): weight
                for own, weight in term.named_parameters()
            }
            answer[f"{name}{suffix}"] = loss
            for own, slope in zip(free, torch.autograd.grad(loss, list(free.values())), strict=True):
                answer[f"grad_{own}{marker}{suffix}"] = slope
            answer[f"out_embed_s{suffix}"] = term.embed_student(signals[0]["pooled"])
            answer[f"out_embed_t{suffix}"] = term.embed_teacher(signals[1]["pooled"])
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 5),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    gamma=st.floats(0.1, 2),
    order=st.integers(1, 4),
    size=st.sampled_from([1, 7, 2**22]),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Form, seed: int, rows: int, widths: tuple[int, int, int], gamma: float, order: int, size: int
) -> None:
    shapes = {
        "student": (rows, widths[0]),
        "teacher": (rows, widths[1]),
        "embed_s.weight": (widths[2], widths[0]),
        "embed_s.bias": (widths[2],),
        "embed_t.weight": (widths[2], widths[1]),
        "embed_t.bias": (widths[2],),
    }
    drawn = {name: value.double() for name, value in gaussian(seed, shapes).items()}
    arrays = {name: value.numpy() for name, value in drawn.items()}
    expected = oracle.cc(arrays["student"], arrays["teacher"], arrays, gamma, order, FORMS[form])
    ours, theirs = (
        drawn[side] @ drawn[f"embed_{side[0]}.weight"].T + drawn[f"embed_{side[0]}.bias"]
        for side in ("student", "teacher")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "SIZE", size)
        found = cc(ours, theirs, gamma=gamma, order=order, form=form)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    assert torch.autograd.gradcheck(lambda s, t: cc(s, t, form=form), pair(2, rows=4))


# limits and identities


def test_the_expansion_tends_to_the_gaussian_kernel() -> None:
    student, teacher = pair(3)

    def kernel(embedding: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(embedding, dim=1)
        return (-0.7 * torch.cdist(unit, unit).square()).exp()

    expected = (kernel(student) - kernel(teacher)).square().mean()
    torch.testing.assert_close(cc(student, teacher, gamma=0.7, order=25), expected)
    far = cc(student, teacher, gamma=0.7, order=1)
    assert not torch.allclose(far, expected, rtol=1e-3)


def test_turning_an_embedding_changes_nothing() -> None:
    student, teacher = pair(4)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    for form in ("gaussian", "frobenius", "bilinear"):
        torch.testing.assert_close(cc(student @ turn, teacher, form=form), cc(student, teacher, form=form))
    torch.testing.assert_close(cc(5 * student, teacher / 3), cc(student, teacher))


@pytest.mark.parametrize("form", FORMS)
def test_equal_embeddings_agree_and_have_no_slope(form: Form) -> None:
    student, _ = pair(5)
    loss = cc(student, student.detach(), form=form)
    assert loss == 0
    assert not gradient(loss, student).any()


def test_consecutive_samples_by_hand() -> None:
    apart = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]])
    assert cc(apart, torch.zeros(3, 2), form="neighbour").item() == (1 * 3 + 2 * 4 + 3 * 5 + 4 * 6) / 2


@pytest.mark.parametrize("form", FORMS)
def test_blocks_change_nothing(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(4, rows=7)
    whole = cc(student, teacher, form=form)
    monkeypatch.setattr(block, "SIZE", 15)  # two rows a block
    parts = cc(student, teacher, form=form)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, student), gradient(whole, student))


def test_memory_grows_with_the_batch_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "SIZE", 2**14)

    def held(rows: int) -> int:
        student, teacher = torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 4)
        return peak(lambda: cc(student, teacher).backward())

    assert held(1024) < 2 * held(256)  # four times the samples, sixteen times the pairs


def test_vectors_and_maps_are_embedded_flat() -> None:
    term = CC(width=4)
    student, teacher = (Signals(None, gaussian(seed, {"pooled": (3, 2, 2, 2)})) for seed in (0, 1))
    term.build(student, teacher, Facts())
    assert term.embed_student.weight.shape == term.embed_teacher.weight.shape == (4, 8)
    assert term(student, teacher, case().batch()).isfinite()


# several processes


def on_a_rank(form: Form) -> tuple[Tensor, Tensor]:
    start, stop = ((0, 3), (3, 7))[distributed.get_rank()]
    student, teacher = (side.detach() for side in pair(5, rows=7))
    own = student[start:stop].requires_grad_()
    loss = (stop - start) * 2 / 7 * cc(own, teacher[start:stop], form=form, gather=True)
    return loss.detach(), gradient(loss, own)


@pytest.mark.parametrize("form", ["gaussian", "frobenius", "bilinear"])
def test_gathered_it_is_one_process_with_the_whole_batch(form: Form, gloo: GlooPool) -> None:
    student, teacher = pair(5, rows=7)
    whole = cc(student, teacher, form=form)
    values, gradients = zip(*gloo.run(on_a_rank, form), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), whole.detach())
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient(whole, student))


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: Form) -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = cc(student, torch.zeros(0, 5), form=form)
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


@pytest.mark.parametrize("form", FORMS)
def test_one_sample(form: Form) -> None:
    student, teacher = pair(6, rows=1)
    loss = cc(student, teacher, form=form)
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()
    assert form not in ("gaussian", "neighbour") or loss.item() == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, dtype: torch.dtype) -> None:
    drawn = gaussian(0, {"s": (4, 64), "t": (4, 64)})
    student = (1e4 * drawn["s"].sign()).to(dtype).requires_grad_()
    teacher = (-1e4 * drawn["t"].sign()).to(dtype)
    loss = cc(student, teacher, form=form)
    assert loss.dtype == torch.float32
    exact = cc(student.detach().double(), teacher.double(), form=form)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert gradient(loss.log(), student).isfinite().all()


@pytest.mark.parametrize("value", [1.0, -1e4, 0.0])
def test_constant_features(value: float) -> None:
    student = torch.full((3, 4), value, requires_grad=True)
    loss = cc(student, torch.full((3, 4), 5.0))
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


# errors


def test_embeddings_of_two_shapes() -> None:
    said = "cc compares embeddings of one shape: the student's is [3, 2], the teacher's [2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        cc(torch.zeros(3, 2), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "rbf"}, "form 'rbf' is not known; valid: bilinear, frobenius, gaussian, neighbour"),
        (
            {"form": "neighbour", "gather": True},
            "form neighbour multiplies samples that follow each other; gather means nothing to it",
        ),
        ({"order": 0}, "order and width must be at least 1, not 0 and 128"),
        ({"width": 0}, "order and width must be at least 1, not 2 and 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        CC(**options)
