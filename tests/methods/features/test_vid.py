# SPDX-License-Identifier: Apache-2.0
import math
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
from oracles import vid as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.vid import VID, vid

Arrays = dict[str, NDArray[Any]]
TAPS = ("stages[0]", "stages[1]")


def case(rows: int = 6, **options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: VID(student_taps=TAPS, teacher_taps=TAPS, **options),
        student=lambda seed: gaussian(seed, {TAPS[0]: (rows, 4, 6, 6), TAPS[1]: (rows, 4, 3, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {TAPS[0]: (rows, 5, 4, 4), TAPS[1]: (rows, 6, 3, 3)}),
    )


def loaded(student: Tensor, teacher: Tensor, weights: Tensors, **options: Any) -> VID:
    """A term of one layer with these weights, in the tensors' type."""
    term = VID(student_taps=["a"], teacher_taps=["a"], **options)
    term.build(Signals(None, {"a": student.detach()}), Signals(None, {"a": teacher}), Facts())
    term.to(student.dtype)
    term.load_state_dict(weights, strict=bool(weights))
    return term


def value(term: VID, student: Tensor, teacher: Tensor) -> Tensor:
    return term(Signals(None, {"a": student}), Signals(None, {"a": teacher}), case().batch())  # type: ignore[no-any-return]


def theirs(name: str) -> str:
    """The golden files' name of a weight of ours."""
    return "w_" + name.replace("regressors.0.", "regressor.").replace("log_scales.0", "log_scale")


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_feat"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(arrays["t_feat"], dtype=torch.float64)
    fresh = loaded(student, teacher, {}, eps=meta["eps"], initial_variance=meta["init_pred_var"])
    weights = {name: torch.tensor(arrays[theirs(name)], dtype=torch.float64) for name in fresh.state_dict()}
    term = loaded(student, teacher, weights, eps=meta["eps"])
    free = {"s_feat": student, **{theirs(name): weight for name, weight in term.named_parameters()}}
    return with_gradients({"loss": value(term, student, teacher)}, free, arrays)


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.sampled_from([((3, 4), (3, 4)), ((5, 5), (2, 2)), ((2, 2), (3, 3)), ((1, 1), (1, 1))]),
    eps=st.sampled_from([1e-5, 0.1]),
)
def test_equals_the_loops(
    seed: int,
    rows: int,
    widths: tuple[int, int],
    sizes: tuple[tuple[int, int], tuple[int, int]],
    eps: float,
) -> None:
    drawn = gaussian(seed, {"s": (rows, widths[0], *sizes[0]), "t": (rows, widths[1], *sizes[1])})
    student, teacher = drawn["s"].double(), drawn["t"].double()
    torch.manual_seed(seed)
    term = loaded(student, teacher, {}, eps=eps)
    for weight in term.parameters():
        nn.init.normal_(weight)
    weights = {theirs(name).removeprefix("w_"): w.detach().numpy() for name, w in term.named_parameters()}
    expected = oracle.vid(student.numpy(), teacher.numpy(), weights, eps)
    assert value(term, student, teacher).item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_gradcheck() -> None:
    here = case()
    term = here.built(dtype=torch.float64)
    student, teacher = here.tensors(dtype=torch.float64)
    names = [name for name, _ in term.named_parameters()]

    def loss(one: Tensor, other: Tensor, *weights: Tensor) -> Tensor:
        given = (here.signals({TAPS[0]: one, TAPS[1]: other}), here.teach(teacher), here.batch())
        found: Tensor = torch.func.functional_call(term, dict(zip(names, weights, strict=True)), given)
        return found

    free = (*(student[tap] for tap in TAPS), *term.parameters())
    assert torch.autograd.gradcheck(loss, free, fast_mode=True)


# limits and identities


@pytest.mark.parametrize(("variance", "eps"), [(5.0, 1e-5), (1.0, 1e-5), (0.01, 1e-3), (800.0, 0.0)])
def test_the_variance_begins_where_asked(variance: float, eps: float) -> None:
    term = loaded(torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 2, 2), {}, initial_variance=variance, eps=eps)
    found = nn.functional.softplus(term.log_scales[0].double()) + eps
    torch.testing.assert_close(found, torch.full((4,), variance, dtype=torch.float64), rtol=1e-5, atol=0.0)
    if variance == 5:
        assert term.log_scales[0][0].item() == pytest.approx(oracle.initial_log_scale(variance, eps))


def test_the_best_variance_is_the_mean_squared_error() -> None:
    drawn = gaussian(0, {"m": (8, 1, 3, 3), "t": (8, 1, 3, 3)}, 2.0)
    mean, teacher = drawn["m"].double(), drawn["t"].double()
    error = (mean - teacher).square().mean()
    best = torch.log(torch.expm1(error)).reshape(1).requires_grad_()
    loss = vid([mean], [best], [teacher], eps=0.0)
    torch.testing.assert_close(loss, (1 + error.log()) / 2)
    assert torch.autograd.grad(loss, best)[0].abs().max() < 1e-12


def test_at_a_fixed_variance_it_is_a_scaled_squared_error() -> None:
    drawn = gaussian(1, {"m": (4, 3, 2, 2), "n": (4, 3, 2, 2), "t": (4, 3, 2, 2)})
    scale = torch.zeros(3)
    one, other = (vid([drawn[name]], [scale], [drawn["t"]]) for name in "mn")
    errors = [(drawn[name] - drawn["t"]).square().mean() for name in "mn"]
    torch.testing.assert_close(one - other, (errors[0] - errors[1]) / (2 * (math.log(2) + 1e-5)))


def test_a_perfect_prediction_can_be_negative() -> None:
    map_ = torch.ones(2, 1, 2, 2)
    assert vid([map_], [torch.full((1,), -3.0)], [map_]) < 0


def test_layers_add_up() -> None:
    drawn = gaussian(2, {"m": (4, 3, 2, 2), "t": (4, 3, 2, 2)})
    once = vid([drawn["m"]], [torch.zeros(3)], [drawn["t"]])
    twice = vid([drawn["m"]] * 2, [torch.zeros(3)] * 2, [drawn["t"]] * 2)
    torch.testing.assert_close(twice, 2 * once)


def test_the_variances_are_trained() -> None:
    here = case()
    term = here.built()
    trained = {id(p) for group in term.param_groups() for p in group["params"]}
    assert isinstance(term, VID)
    assert all(id(scale) in trained for scale in term.log_scales)
    student, teacher = here.tensors()
    here.loss(term, student, teacher, here.batch()).backward()
    assert all(scale.grad is not None and scale.grad.all() for scale in term.log_scales)


# what is ignored


def test_ignored_places_leave_what_cut_maps_give() -> None:
    one, other = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    scales = [torch.linspace(-1, 2, 4, dtype=torch.float64)] * 2
    keep = torch.zeros(2, 3, 5, dtype=torch.bool)
    keep[..., :2] = True
    found = vid([one, one], scales, [other, other], keep=[keep, None])
    torch.testing.assert_close(found, vid([one[..., :2], one], scales, [other[..., :2], other]))


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    here = case(rows=0)
    term = case().built()
    student, teacher = here.tensors()
    loss = here.loss(term, student, teacher, here.batch())
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in term.parameters())


@pytest.mark.parametrize("scale", [-1e4, -90.0, 90.0, 1e4])
def test_extreme_variances_are_finite(scale: float) -> None:
    free = torch.full((1,), scale, requires_grad=True)
    loss = vid([torch.zeros(1, 1, 1, 1)], [free], [torch.ones(1, 1, 1, 1)])
    assert loss.isfinite()
    assert torch.autograd.grad(loss, free)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    mean = torch.full((2, 3, 2, 2), 1e4, dtype=dtype, requires_grad=True)
    teacher = torch.full((2, 3, 2, 2), -1e4, dtype=dtype)
    loss = vid([mean], [torch.zeros(3, dtype=dtype)], [teacher])
    variance = math.log(2) + 1e-5
    apart = (mean.double() - teacher.double()).detach().square().mean().item()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((apart / variance + math.log(variance)) / 2, rel=1e-5)
    assert torch.autograd.grad(loss, mean)[0].isfinite().all()


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"initial_variance": 1e-6},
            "the variance begins above eps >= 0: not at 1e-06 with eps 1e-05",
        ),
        ({"eps": -1.0}, "the variance begins above eps >= 0: not at 5.0 with eps -1.0"),
        ({"teacher_taps": "map"}, "teacher_taps: expected a list of roles or module paths, not 'map'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        VID(**options)


def test_a_tap_that_is_no_map() -> None:
    with pytest.raises(UserError, match=re.escape("vid compares maps [B, C, H, W], not [2, 4] and [2, 4, 1, 1]")):
        loaded(torch.zeros(2, 4), torch.zeros(2, 4, 1, 1), {})


def test_maps_of_two_shapes() -> None:
    said = "vid compares maps of one shape: the predicted one is [2, 1, 2, 2], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        vid([torch.zeros(2, 1, 2, 2)], [torch.zeros(3)], [torch.zeros(2, 3, 2, 2)])
