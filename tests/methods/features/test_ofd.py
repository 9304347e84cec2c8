# SPDX-License-Identifier: Apache-2.0
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from golden_answer import with_gradients
from method_case import MethodCase, Tensors, gaussian
from oracles import ofd as oracle
from tutelage.core import Batch, Distiller, Facts, Live, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.ofd import OFD, batch_margin, norm_margin, ofd
from tutelage.models.load import load
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
TAPS = ("stages[0].pre", "stages[1].pre")
NORMS = ("stages[0].norm", "stages[1].norm")


def norm(width: int, seed: int = 0) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(width)
    drawn = gaussian(seed, {"a": (width,), "b": (width,)})
    layer.load_state_dict({**layer.state_dict(), "weight": drawn["a"], "bias": drawn["b"]})
    return layer


def case(rows: int = 6, **options: Any) -> MethodCase:
    shapes = {TAPS[0]: (rows, 5, 3, 3), TAPS[1]: (rows, 6, 2, 2)}
    return MethodCase(
        term=lambda: OFD(student_taps=TAPS, teacher_taps=TAPS, teacher_norms=NORMS, **options),
        student=lambda seed: gaussian(seed, {TAPS[0]: (rows, 4, 3, 3), TAPS[1]: (rows, 4, 2, 2)}),
        teacher=lambda seed: gaussian(seed + 1000, shapes, 2.0),
        borrowed=lambda: {NORMS[0]: norm(5), NORMS[1]: norm(6, 1)},
    )


def run(student: list[Tensor], teacher: list[Tensor], weights: Tensors) -> tuple[Tensor, OFD]:
    """The term with connectors and margins from the golden files' weights, in the tensors' type."""
    names = [f"stages[{n}]" for n in range(len(student))]
    lent: dict[str, nn.Module] = {}
    for n, name in enumerate(names):
        layer = nn.BatchNorm2d(teacher[n].shape[1]).to(student[0].dtype)
        own = {part: weights[f"teacher_bn{n}.{part}"] for part in ("weight", "bias")}
        layer.load_state_dict({**layer.state_dict(), **own})
        lent[f"{name}.norm"] = layer.requires_grad_(False)
    sides = (
        Signals(None, dict(zip([f"{name}.pre" for name in names], student, strict=True))),
        Signals(None, dict(zip([f"{name}.pre" for name in names], teacher, strict=True)), lent),
    )
    term = OFD()
    term.build(sides[0].detach(), sides[1], Facts())
    term.to(student[0].dtype)
    term.load_state_dict({k: v for k, v in weights.items() if k.startswith("connectors.")}, strict=False)
    return term(*sides, case().batch()), term


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    count = range(sum(name.startswith("s_preact") for name in arrays))
    held = {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}
    student = [held[f"s_preact{n}"].requires_grad_() for n in count]
    weights = {name.removeprefix("w_"): held[name] for name in held if name.startswith("w_")}
    loss, term = run(student, [held[f"t_preact{n}"] for n in count], weights)
    free = {f"s_preact{n}": tensor for n, tensor in enumerate(student)}
    free |= {f"w_{name}": weight for name, weight in term.named_parameters()}
    names = ("loss", "alt_mdistiller_1e-3", "alt_mmrazor")
    losses: dict[str, Tensor] = {name: 1e-3 * loss for name in names if name in arrays}
    margins = {f"out_margin{n}": term.get_buffer(f"margin_{n}").view(1, -1, 1, 1) for n in count}
    return with_gradients(losses, free, arrays) | margins


# the equation, worked out by loops


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 3),
    widths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3),
)
def test_equals_the_loops(seed: int, rows: int, widths: list[tuple[int, int]]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for n, (one, other) in enumerate(widths):
        shapes |= {f"s{n}": (rows, one, 2, 3 - n), f"t{n}": (rows, other, 2, 3 - n)}
        shapes |= {f"connectors.{n}.0.weight": (other, one, 1, 1)}
        shapes |= {f"connectors.{n}.1.{part}": (other,) for part in ("weight", "bias")}
        shapes |= {f"teacher_bn{n}.{part}": (other,) for part in ("weight", "bias")}
    drawn = {name: tensor.double() for name, tensor in gaussian(seed, shapes).items()}
    student, teacher = ([drawn[f"{side}{n}"] for n in range(len(widths))] for side in "st")
    arrays = {name: tensor.numpy() for name, tensor in drawn.items()}
    loss, _ = run(student, teacher, drawn)
    expected = oracle.ofd([s.numpy() for s in student], [t.numpy() for t in teacher], arrays, 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(scale=st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3), shift=st.floats(-10, 10))
def test_margins_equal_the_loops(scale: float, shift: float) -> None:
    values = np.array([scale]), np.array([shift])
    expected = oracle.margins(*values)
    found = norm_margin(*(torch.tensor(v) for v in values))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


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


def test_the_margin_is_the_mean_below_zero() -> None:
    scale, shift = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    drawn = 0.5 + 2 * torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert norm_margin(scale, shift).item() == pytest.approx(drawn[drawn < 0].mean().item(), rel=1e-2)
    torch.testing.assert_close(norm_margin(-scale, shift), norm_margin(scale, shift))
    assert norm_margin(torch.ones(1), torch.zeros(1)).item() == pytest.approx(-math.sqrt(2 / math.pi))


def test_a_batch_norm_without_spread_gives_its_shift_or_nothing() -> None:
    found = norm_margin(torch.zeros(3), torch.tensor([-2.0, 0.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([-2.0, 0.0, 0.0]))


def test_both_margins_agree_on_what_a_batch_norm_gives() -> None:
    layer = norm(3).train()
    torch.nn.init.constant_(layer.bias, -0.3)
    given = layer(torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    expected = norm_margin(layer.weight, layer.bias)
    torch.testing.assert_close(batch_margin(given), expected, rtol=3e-2, atol=0.0)


def test_what_the_activation_forgets_is_forgiven() -> None:
    teacher = torch.tensor([[[[-5.0, -0.5, 2.0]]]])
    margin = [torch.tensor([-1.0])]
    for student, expected in (
        ([-1.0, -0.5, 2.0], 0.0),  # the target itself: the far value is cut at the margin
        ([-9.0, -3.0, 2.0], 0.0),  # below a negative target
        ([-0.5, -0.5, 2.0], 0.25),
        ([-1.0, -0.5, 1.0], 1.0),  # below a positive target counts
        ([-1.0, 0.5, 2.0], 1.0),
    ):
        assert ofd([torch.tensor([[[student]]])], [teacher], margin) == expected


def test_zero_at_the_target_and_without_gradient() -> None:
    teacher = gaussian(0, {"t": (4, 3, 2, 2)})["t"]
    student = torch.maximum(teacher, torch.tensor(-0.5)).requires_grad_()
    loss = ofd([student], [teacher], [torch.full((3,), -0.5)])
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_layers_count_half_with_each_step_from_the_last() -> None:
    one, zero, margin = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([-1.0])
    assert ofd([zero] * 3, [one] * 3, [margin] * 3) == 1 + 0.5 + 0.25


def test_connectors_stand_between_equal_widths_too_and_start_as_published() -> None:
    here = MethodCase(
        term=lambda: OFD(student_taps=["a"], teacher_taps=["a"], margin="batch"),
        student=lambda seed: gaussian(seed, {"a": (2, 64, 2, 2)}),
        teacher=lambda seed: gaussian(seed, {"a": (2, 64, 2, 2)}),
    )
    weights = dict(here.built().named_parameters())
    assert set(weights) == {"connectors.0.0.weight", "connectors.0.1.weight", "connectors.0.1.bias"}
    assert weights["connectors.0.0.weight"].std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_margins_are_kept_and_not_trained() -> None:
    term = case().built()
    assert {name for name in term.state_dict() if name.startswith("margin")} == {"margin_0", "margin_1"}
    assert not any(name.startswith("margin") for name in dict(case(margin="batch").built().state_dict()))
    assert case(margin="batch").term().reads.borrows == ()


def test_in_a_run_the_norms_are_found() -> None:
    student = load({"model": "tutelage:resnet8", "width": 0.5}, num_classes=5, in_channels=1, seed=0)
    teacher = load("tutelage:resnet14", num_classes=5, in_channels=1, seed=1)
    batch = Batch.of(torch.rand(4, 1, 8, 8), torch.arange(4))
    term = OFD()
    machine = Distiller(student, Objective(ofd=term), task=Classification(5), teacher=Live(teacher), sample=batch)
    for number, layer in enumerate(("layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2")):
        own = teacher.module.get_submodule(layer)
        assert isinstance(own, nn.BatchNorm2d)
        torch.testing.assert_close(term.get_buffer(f"margin_{number}"), norm_margin(own.weight, own.bias))
    losses = machine(batch, machine.observe(batch))
    losses.total.backward()
    assert all(p.grad is not None for p in term.parameters())
    machine.close()


# what is ignored


def test_ignored_places_leave_what_cut_maps_give() -> None:
    one, other = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    margins = [torch.full((4,), -0.5, dtype=torch.float64)] * 2
    keep = torch.zeros(2, 3, 5, dtype=torch.bool)
    keep[..., :2] = True
    found = ofd([one, one], [other, other], margins, keep=[keep, None])
    torch.testing.assert_close(found, ofd([one[..., :2], one], [other[..., :2], other], margins))


# odd cases


@pytest.mark.parametrize("margin", ["norm", "batch"])
def test_no_rows_give_a_connected_zero(margin: str) -> None:
    here = case(rows=0, margin=margin)
    term = case(margin=margin).built()
    student, teacher = here.tensors()
    loss = here.loss(term, student, teacher, here.batch())
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in term.parameters())


def test_a_batch_without_negative_values_has_the_margin_0() -> None:
    assert not batch_margin(torch.rand(2, 3, 2, 2)).any()
    assert not batch_margin(torch.zeros(0, 3, 2, 2)).any()


def test_one_value_a_channel_cannot_train() -> None:
    here = MethodCase(
        term=lambda: OFD(student_taps=["a"], teacher_taps=["a"], margin="batch"),
        student=lambda seed: {"a": torch.zeros(1, 4, 1, 1)},
        teacher=lambda seed: {"a": torch.zeros(1, 5, 1, 1)},
    )
    term = here.built()
    student, teacher = here.tensors()
    with pytest.raises(UserError, match=r"^ofd: batch norm cannot train on one value a channel"):
        here.loss(term, student, teacher, here.batch())
    assert here.loss(term.eval(), student, teacher, here.batch()).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.tensor([[[[1e4, -1e4, 1e4, -1e4]]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[[-1e4, 1e4, 1e4, -1e4]]]], dtype=dtype)
    margin = torch.tensor([-2.0], dtype=dtype)
    loss = ofd([student], [teacher], [margin])
    big = student.detach().double()[0, 0, 0, 0].item()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((big + 2) ** 2 + (2 * big) ** 2, rel=1e-5)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


# errors


def test_an_unknown_margin() -> None:
    with pytest.raises(UserError, match=r"^margin 'bn' is not known; valid: batch, norm$"):
        OFD(margin="bn")  # type: ignore[arg-type]


ADVICE = 'name it with teacher_norms, or take margin "batch"'


@pytest.mark.parametrize(
    ("lent", "said"),
    [
        pytest.param(
            {"stages[0].norm": nn.BatchNorm2d(5)},
            'ofd: 2 teacher taps and 1 batch norms before them; name them with teacher_norms, or take margin "batch"',
            id="one is missing",
        ),
        pytest.param(
            {"stages[0].norm": nn.BatchNorm2d(5), "stages[1].norm": nn.BatchNorm2d(7)},
            "ofd: 'stages[1].norm' is no batch norm with scale and shift of the 6 channels of "
            f"'stages[1].pre'; {ADVICE}",
            id="width",
        ),
        pytest.param(
            {"stages[0].norm": nn.BatchNorm2d(5, affine=False), "stages[1].norm": nn.BatchNorm2d(6)},
            "ofd: 'stages[0].norm' is no batch norm with scale and shift of the 5 channels of "
            f"'stages[0].pre'; {ADVICE}",
            id="no scale",
        ),
    ],
)
def test_norms_that_do_not_fit(lent: dict[str, nn.Module], said: str) -> None:
    student, teacher = case().tensors()
    assert teacher is not None
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        OFD().build(Signals(None, student), Signals(None, teacher, lent), Facts())


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        pytest.param((2, 4), "ofd compares maps [B, C, H, W], not [2, 4] and [2, 5, 3, 3]", id="vector"),
        pytest.param((2, 4, 6, 6), "ofd compares maps of one grid: the student's is (6, 6)", id="grid"),
    ],
)
def test_maps_that_do_not_fit(shape: tuple[int, ...], said: str) -> None:
    sides = [Signals(None, {"a": torch.zeros(size)}) for size in (shape, (2, 5, 3, 3))]
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        OFD(student_taps=["a"], teacher_taps=["a"], margin="batch").build(sides[0], sides[1], Facts())


def test_maps_of_two_shapes() -> None:
    said = "ofd compares maps of one shape: the student's is [2, 1, 2, 2], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ofd([torch.zeros(2, 1, 2, 2)], [torch.zeros(2, 3, 2, 2)], [torch.zeros(3)])
