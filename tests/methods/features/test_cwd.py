# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from golden_answer import with_gradients
from method_case import MethodCase, Tensors, gaussian
from oracles import cwd as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.cwd import CWD, FORMS, cwd
from tutelage.methods.features.mgd import MGD

Arrays = dict[str, NDArray[Any]]


def case(width: int = 4, **options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: CWD(**options),
        student=lambda seed: gaussian(seed, {"map": (6, 4, 3, 5)}),
        teacher=lambda seed: gaussian(seed + 1000, {"map": (6, width, 3, 5)}, 2.0),
    )


def pair(seed: int, *shape: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"s": shape, "t": shape}, scale)
    return drawn["s"].double().requires_grad_(), drawn["t"].double()


def loaded(term: CWD | MGD, student: Tensor, teacher: Tensor, weights: Tensors) -> Any:
    """The term with these weights, in the tensors' type."""
    sides = Signals(None, {"map": student.detach()}), Signals(None, {"map": teacher})
    term.build(*sides, Facts())
    term.to(student.dtype).load_state_dict(weights)
    return term


def value(term: CWD | MGD, student: Tensor, teacher: Tensor, *noise: Tensor) -> Tensor:
    sides = Signals(None, {"map": student}), Signals(None, {"map": teacher})
    return term(*sides, case().batch(), *noise)  # type: ignore[no-any-return]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    held = {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}
    return segmentation_step(held, meta) if claim == "core/mgd_seg_distiller" else classic(held, meta)


def classic(held: Tensors, meta: dict[str, Any]) -> dict[str, Any]:
    student, teacher = held["s_map"].requires_grad_(), held["t_map"]
    weights = {name.removeprefix("w_"): held[name] for name in held if name.startswith("w_")}
    # with a convolution the recorded loss is CIRKD's; without, both forms are one
    term = loaded(CWD(temperature=meta["temperature"], form="cirkd"), student, teacher, weights)
    losses = {"loss": value(term, student, teacher)}
    if not weights:
        forms: dict[str, Any] = {"loss_spatial_kl": "pixel", "loss_channel_mean_mse": "mean"}
        forms |= {"alt_mmrazor": "paper"}
        losses |= {
            name: cwd(student, teacher, temperature=meta["temperature"], form=form) for name, form in forms.items()
        }
    free = {"s_map": student, **{f"w_{name}": weight for name, weight in term.named_parameters()}}
    return with_gradients(losses, free, held)


def segmentation_step(held: Tensors, meta: dict[str, Any]) -> dict[str, Any]:
    """The authors' whole step for segmentation: MGD on the last map, CWD on the class scores."""
    features, logits = (held[f"student_{part}"].requires_grad_() for part in ("features", "logits"))
    weights = {name: held[name] for name in held if name.startswith(("align.", "generation."))}
    mgd = loaded(MGD(mask="pixel", mask_ratio=meta["lambda_mgd"]), features, held["teacher_features"], weights)
    rebuilt = value(mgd, features, held["teacher_features"], held["mask_noise"])
    scores = loaded(CWD(temperature=meta["logit_temp"]), logits, held["teacher_logits"], {})
    parts = {
        "loss_mgd_fea": meta["alpha_mgd"] * rebuilt,
        "loss_logit": meta["logit_weight"] * value(scores, logits, held["teacher_logits"]),
    }
    losses = {"loss": parts["loss_mgd_fea"] + parts["loss_logit"], **parts}
    return with_gradients(losses, {"student_features": features, "student_logits": logits}, held)


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    width=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    temperature=st.floats(0.25, 20),
    scale=st.floats(0, 30),
)
def test_equals_the_loops(
    seed: int, rows: int, width: int, grid: tuple[int, int], temperature: float, scale: float
) -> None:
    student, teacher = pair(seed, rows, width, *grid, scale=scale)
    arrays = student.detach().numpy(), teacher.numpy()
    expected = {
        "paper": oracle.cwd(*arrays, temperature),
        "cirkd": oracle.cwd(*arrays, temperature, form="code"),
        "pixel": oracle.spatial_kl(*arrays, temperature),
        "mean": oracle.channel_mean(*arrays),
    }
    for form in FORMS:
        found = cwd(student, teacher, temperature=temperature, form=form).item()
        assert found == pytest.approx(expected[form], rel=1e-9, abs=1e-11), form


@pytest.mark.parametrize(("form", "theirs"), [("paper", "paper"), ("cirkd", "code")])
def test_with_a_convolution_it_equals_the_loops(form: Any, theirs: str) -> None:
    drawn = gaussian(3, {"s": (2, 3, 2, 3), "t": (2, 5, 2, 3), "w": (5, 3, 1, 1)})
    student, teacher, kernel = (tensor.double() for tensor in drawn.values())
    term = loaded(CWD(form=form), student, teacher, {"conv.weight": kernel})
    expected = oracle.cwd(student.numpy(), teacher.numpy(), 4.0, kernel.numpy(), theirs)
    assert value(term, student, teacher).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Any) -> None:
    student, teacher = pair(0, 2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda s: cwd(s, teacher, form=form), student)


# limits and identities


def test_equals_the_library() -> None:
    student, teacher = pair(1, 4, 3, 2, 5)
    log_probs = (student / 2).flatten(0, 1).flatten(1).log_softmax(1)
    probs = (teacher / 2).flatten(0, 1).flatten(1).softmax(1)
    expected = 4 * F.kl_div(log_probs, probs, reduction="batchmean")
    torch.testing.assert_close(cwd(student, teacher, temperature=2.0), expected)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_learn_from_oneself(form: Any) -> None:
    student, _ = pair(2, 4, 3, 2, 5)
    loss = cwd(student, student.detach(), form=form)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-14


def test_a_constant_added_to_a_channel_changes_nothing() -> None:
    student, teacher = pair(3, 4, 3, 2, 5)
    shift = torch.tensor([100.0, -3.0, 0.1], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(cwd(student + shift, teacher - shift), cwd(student, teacher))


def test_channels_and_positions_may_be_shuffled_together() -> None:
    student, teacher = pair(4, 4, 3, 2, 5)
    moved = [side[:, [2, 0, 1]].flip(2, 3) for side in (student, teacher)]
    torch.testing.assert_close(cwd(moved[0], moved[1]), cwd(student, teacher))


def test_repeated_positions_change_nothing() -> None:
    student, teacher = pair(5, 4, 3, 2, 5)
    doubled = [side.repeat(1, 1, 2, 1) for side in (student, teacher)]
    torch.testing.assert_close(cwd(doubled[0], doubled[1]), cwd(student, teacher))


def test_at_high_temperature_it_is_the_variance_of_the_difference() -> None:
    student, teacher = pair(6, 4, 3, 2, 5)
    expected = (student - teacher).var((2, 3), correction=0).mean() / 2
    assert cwd(student, teacher, temperature=1e4).item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_bridge_has_no_bias_and_stands_between_other_widths_only() -> None:
    assert not case().built().state_dict()
    weights = case(width=7).built().state_dict()
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {"conv.weight": (7, 4, 1, 1)}


# what is ignored


@pytest.mark.parametrize("form", FORMS)
def test_ignored_places_leave_what_cut_maps_give(form: Any) -> None:
    student, teacher = pair(7, 3, 4, 2, 5)
    keep = torch.ones(3, 2, 5, dtype=torch.bool)
    keep[:, :, 2:] = False
    found, expected = cwd(student, teacher, form=form, keep=keep), cwd(student[..., :2], teacher[..., :2], form=form)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in (found, expected))
    torch.testing.assert_close(*gradients)


def test_each_image_counts_alike_however_much_of_it_is_ignored() -> None:
    student, teacher = pair(8, 2, 4, 2, 3)
    keep = torch.ones(2, 2, 3, dtype=torch.bool)
    keep[0, 1:] = False
    for form in FORMS:
        one, other = cwd(student[:1, :, :1], teacher[:1, :, :1], form=form), cwd(student[1:], teacher[1:], form=form)
        torch.testing.assert_close(cwd(student, teacher, form=form, keep=keep), (one + other) / 2)


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: Any) -> None:
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = cwd(student, torch.zeros(0, 3, 2, 2), form=form)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].shape == (0, 3, 2, 2)


def test_a_constant_channel_is_uniform() -> None:
    student = torch.full((2, 3, 2, 2), 5.0, requires_grad=True)
    loss = cwd(student, torch.zeros(2, 3, 2, 2))
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Any, temperature: float, dtype: torch.dtype) -> None:
    student = torch.tensor([[[[1e4, -1e4, 0.0]], [[-1e4, 0.0, 1e4]]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[[-1e4, 1e4, 0.0]], [[1e4, 1e4, -1e4]]]], dtype=dtype)
    loss = cwd(student, teacher, temperature=temperature, form=form)
    exact = cwd(student.detach().double(), teacher.double(), temperature=temperature, form=form)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert exact > 0
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"form": "channel"}, "form 'channel' is not known; valid: cirkd, mean, paper, pixel"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        CWD(**options)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        pytest.param((2, 4), "cwd compares maps [B, C, H, W], not [2, 4] and [2, 4, 3, 3]", id="class scores"),
        pytest.param((2, 4, 6, 6), "cwd compares maps of one grid: the student's is (6, 6)", id="grid"),
    ],
)
def test_maps_that_do_not_fit(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        loaded(CWD(), torch.zeros(shape), torch.zeros(2, 4, 3, 3), {})


def test_maps_of_two_shapes() -> None:
    said = "cwd compares maps of one shape: the student's is [2, 1, 2, 2], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        cwd(torch.zeros(2, 1, 2, 2), torch.zeros(2, 3, 2, 2))
