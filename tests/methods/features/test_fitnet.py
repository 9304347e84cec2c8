# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from golden_answer import with_gradients
from method_case import MethodCase, Tensors, gaussian
from oracles import fitnet as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.fitnet import FORMS, FitNet, fitnet

Arrays = dict[str, NDArray[Any]]
TAP = "stages[-2]"


def case(student: tuple[int, ...] = (6, 4, 3, 5), rows: int = 6, **options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: FitNet(**options),
        student=lambda seed: gaussian(seed, {TAP: (rows, *student[1:])}),
        teacher=lambda seed: gaussian(seed + 1000, {TAP: (rows, 7, 3, 5)}),
    )


def loaded(form: Any, student: Tensor, teacher: Tensor, weights: Tensors) -> FitNet:
    """The term of a form with these weights (batch-norm statistics among them), in the tensors' type."""
    term = FitNet(form=form)
    term.build(Signals(None, {TAP: student.detach()}), Signals(None, {TAP: teacher}), Facts())
    term.to(student.dtype)
    term.load_state_dict({name: weights[name] for name in term.state_dict() if name in weights}, strict=False)
    return term


def value(term: FitNet, student: Tensor, teacher: Tensor) -> Tensor:
    return term(Signals(None, {TAP: student}), Signals(None, {TAP: teacher}), case().batch())  # type: ignore[no-any-return]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_feat"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(arrays["t_feat"], dtype=torch.float64)
    prefix = "w_reg."
    weights = {
        name.removeprefix(prefix): torch.tensor(array, dtype=torch.float64)
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    answer: dict[str, Any] = {}
    names: dict[str, Any] = {"loss": "conv_bn_relu", "loss_no_relu": "conv_bn", "loss_plain_conv": "conv"}
    for name, form in names.items():
        term = loaded(form, student, teacher, weights)
        free = {"s_feat": student, **{prefix + own: weight for own, weight in term.named_parameters()}}
        answer |= with_gradients({name: value(term, student, teacher)}, free, arrays)
        if name == "loss":
            kept = term.state_dict()
            answer |= {f"out_reg.bn.{part}": kept[f"bn.{part}"] for part in ("running_mean", "running_var")}
            answer["out_regressed"] = loaded(form, student, teacher, weights).regress(student)
    return answer


# the equation, worked out by loops


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 3),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    heights=st.sampled_from([(3, 3), (4, 2), (2, 4), (5, 3), (1, 1), (2, 1)]),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Any, seed: int, rows: int, widths: tuple[int, int], heights: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    student, teacher = (
        torch.randn(rows, width, height, height, dtype=torch.float64)
        for width, height in zip(widths, heights, strict=True)
    )
    term = loaded(form, student, teacher, {})
    for weight in term.parameters():
        nn.init.normal_(weight)
    weights = {name: weight.detach().numpy() for name, weight in term.named_parameters()}
    expected = oracle.fitnet(student.numpy(), teacher.numpy(), weights, form)
    assert value(term, student, teacher).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Any) -> None:
    here = case(form=form)
    term = here.built(dtype=torch.float64)
    student, teacher = here.tensors(dtype=torch.float64)
    names = [name for name, _ in term.named_parameters()]

    def loss(free: Tensor, *weights: Tensor) -> Tensor:
        given = (here.signals({TAP: free}), here.teach(teacher), here.batch())
        found: Tensor = torch.func.functional_call(term, dict(zip(names, weights, strict=True)), given)
        return found

    assert torch.autograd.gradcheck(loss, (student[TAP], *term.parameters()), fast_mode=True)


# limits and identities


def test_the_papers_form_is_half_the_sum() -> None:
    regressed, teacher = gaussian(0, {"r": (4, 3, 2, 5)})["r"], gaussian(1, {"t": (4, 3, 2, 5)})["t"]
    torch.testing.assert_close(fitnet(regressed, teacher, form="paper"), 3 * 2 * 5 / 2 * fitnet(regressed, teacher))


@pytest.mark.parametrize("form", FORMS)
def test_zero_where_the_maps_agree(form: Any) -> None:
    regressed = gaussian(0, {"r": (4, 3, 2, 5)})["r"].requires_grad_()
    loss = fitnet(regressed, regressed.detach(), form=form)
    assert loss == 0
    assert not torch.autograd.grad(loss, regressed)[0].any()


def test_a_rectified_regressor_cannot_reach_a_negative_teacher() -> None:
    here = case()
    term = here.built()
    assert isinstance(term, FitNet)
    student, _ = here.tensors()
    regressed = term.regress(student[TAP])
    assert (regressed >= 0).all()
    assert (regressed > 0).any()


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("conv_bn_relu", {"conv.weight", "conv.bias", "bn.weight", "bn.bias"}),
        ("conv_bn", {"conv.weight", "conv.bias", "bn.weight", "bn.bias"}),
        ("conv", {"conv.weight", "conv.bias"}),
        ("paper", {"conv.weight", "conv.bias"}),
    ],
)
def test_the_regressors_layers(form: str, names: set[str]) -> None:
    assert {name for name, _ in case(form=form).built().named_parameters()} == names


def test_the_hint_lies_one_stage_before_the_last() -> None:
    reads = FitNet().reads
    assert [tap.where for tap in (*reads.student, *reads.teacher)] == [TAP, TAP]
    assert FitNet(student_tap="layer2").reads.student[0].where == "layer2"


# what is ignored


@pytest.mark.parametrize("form", FORMS)
def test_ignored_places_leave_what_cut_maps_give(form: Any) -> None:
    one, other = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    keep = torch.zeros(2, 3, 5, dtype=torch.bool)
    keep[..., :2] = True
    found = fitnet(one, other, form=form, keep=keep)
    torch.testing.assert_close(found, fitnet(one[..., :2], other[..., :2], form=form))


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: str) -> None:
    here = case(form=form, rows=0)
    term = case(form=form).built()
    student, teacher = here.tensors()
    loss = here.loss(term, student, teacher, here.batch())
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in term.parameters())
    assert all(buffer.isfinite().all() for buffer in term.buffers())


def test_one_value_a_channel_cannot_train() -> None:
    student, teacher = torch.zeros(1, 4, 1, 1), torch.zeros(1, 6, 1, 1)
    term = loaded("conv_bn", student, teacher, {})
    said = (
        "fitnet: batch norm cannot train on one value a channel (one sample with a 1x1 map); "
        "use a batch size of at least 2, or drop the last incomplete batch"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        value(term, student, teacher)
    assert value(term.eval(), student, teacher).isfinite()
    assert value(loaded("conv", student, teacher, {}), student, teacher).isfinite()


def test_a_constant_student_has_finite_gradients() -> None:
    here = case()
    term = here.built()
    student, teacher = here.tensors()
    constant = torch.full_like(student[TAP], 3.0).requires_grad_()
    here.loss(term, {TAP: constant}, teacher, here.batch()).backward()
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Any, dtype: torch.dtype) -> None:
    regressed = torch.full((2, 3, 4, 4), 1e4, dtype=dtype, requires_grad=True)
    teacher = torch.full((2, 3, 4, 4), -1e4, dtype=dtype)
    loss = fitnet(regressed, teacher, form=form)
    apart = (regressed.double() - teacher.double()).detach().square()
    expected = apart.sum() / 4 if form == "paper" else apart.mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.autograd.grad(loss, regressed)[0].isfinite().all()


# errors


def test_an_unknown_form() -> None:
    said = "form 'linear' is not known; valid: conv, conv_bn, conv_bn_relu, paper"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        FitNet(form="linear")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        pytest.param((2, 4), "fitnet compares maps [B, C, H, W], not [2, 4] and [2, 7, 3, 5]", id="vector"),
        pytest.param(
            (2, 4, 2, 2),
            "fitnet: no convolution brings a map of 2x2 to 3x5; tap layers of equal, double or half size, or "
            "a larger map of the student",
            id="grid",
        ),
    ],
)
def test_maps_that_do_not_fit(shape: tuple[int, ...], said: str) -> None:
    sides = [Signals(None, {TAP: torch.zeros(size)}) for size in (shape, (2, 7, 3, 5))]
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        FitNet().build(sides[0], sides[1], Facts())


def test_maps_of_two_shapes() -> None:
    said = "fitnet compares maps of one shape: the regressed one is [2, 3, 1, 1], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        fitnet(torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 2, 2))
