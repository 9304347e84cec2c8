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
from method_case import MethodCase, gaussian
from oracles import cat_kd as oracle
from tutelage.core import Batch, Distiller, Facts, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.cat_kd import CATKD, cat_kd, class_activation
from tutelage.models.load import load
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]


def classifier(width: int = 4, classes: int = 5) -> nn.Linear:
    layer = nn.Linear(width, classes)
    drawn = gaussian(7, {"weight": (classes, width), "bias": (classes,)})
    layer.load_state_dict(drawn)
    return layer


def case(**options: Any) -> MethodCase:
    weight = classifier().weight.detach()
    return MethodCase(
        term=lambda: CATKD(**options),
        student=lambda seed: {**gaussian(seed, {"map": (6, 4, 3, 3)}), "classifier.weight": weight.clone()},
        teacher=lambda seed: gaussian(seed + 1000, {"map": (6, 4, 3, 3)}),
        borrowed=lambda: {"classifier": classifier()},
    )


def cams(seed: int, rows: int = 4, classes: int = 5, student: int = 4, teacher: int = 4) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"s": (rows, classes, student, student), "t": (rows, classes, teacher, teacher)})
    return drawn["s"].double().requires_grad_(), drawn["t"].double()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_cam"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(arrays["t_cam"], dtype=torch.float64)
    loss = cat_kd(
        student,
        teacher,
        resolution=meta["cam_resolution"],
        normalize=meta["normalize"],
        binarize=meta["binarize"],
        partial=meta["cams_nums"] if meta["partial"] else None,
        form="code",
    )
    batch = Batch.of(torch.zeros(len(student), 1), torch.tensor(arrays["target"]))
    task = Classification(student.shape[1])
    losses = {"loss": loss, "loss_ce": task.loss(student.mean((2, 3)), batch)}
    return with_gradients(losses, {"s_cam": student}, arrays)


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    classes=st.integers(2, 5),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    resolution=st.integers(1, 4),
    normalize=st.booleans(),
    binarize=st.booleans(),
    partial=st.sampled_from([None, 2]),
    form=st.sampled_from(["paper", "code"]),
)
def test_equals_the_loops(
    seed: int,
    rows: int,
    classes: int,
    sizes: tuple[int, int],
    resolution: int,
    normalize: bool,
    binarize: bool,
    partial: int | None,
    form: Any,
) -> None:
    student, teacher = cams(seed, rows, classes, *sizes)
    found = cat_kd(
        student,
        teacher,
        resolution=resolution,
        normalize=normalize,
        binarize=binarize,
        partial=partial,
        form=form,
    )
    arrays = student.detach().numpy(), teacher.numpy()
    expected = oracle.cat_kd(*arrays, resolution, normalize, binarize, partial, form)
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize: bool) -> None:
    student, teacher = cams(0, 2, 3)
    assert torch.autograd.gradcheck(lambda s: cat_kd(s, teacher, normalize=normalize), student)


def test_gradcheck_through_the_classifier() -> None:
    here = case()
    student, teacher = here.tensors(dtype=torch.float64)
    term = here.built()

    def loss(feature_map: Tensor, weight: Tensor) -> Tensor:
        signals = here.signals({"map": feature_map, "classifier.weight": weight})
        found: Tensor = term(signals, here.teach(teacher), here.batch())
        return found

    assert torch.autograd.gradcheck(loss, (student["map"], student["classifier.weight"]))


# limits and identities


@pytest.mark.parametrize("conv", [False, True])
def test_the_mean_of_a_class_activation_map_is_the_logit_without_bias(conv: bool) -> None:
    layer = classifier()
    feature_map = gaussian(1, {"m": (4, 4, 3, 5)})["m"]
    weight = layer.weight[:, :, None, None] if conv else layer.weight
    found = class_activation(feature_map, weight).mean((2, 3)) + layer.bias
    torch.testing.assert_close(found, layer(feature_map.mean((2, 3))))


def test_nothing_to_learn_from_oneself() -> None:
    student, _ = cams(2)
    for options in ({}, {"normalize": True}, {"partial": 2}):
        loss = cat_kd(student, student.detach(), **options)
        assert loss == 0
        assert not torch.autograd.grad(loss, student)[0].any()


def test_one_cell_compares_the_logits() -> None:
    student, teacher = cams(3)
    expected = (student.mean((2, 3)) - teacher.mean((2, 3))).square().mean()
    torch.testing.assert_close(cat_kd(student, teacher, resolution=1), expected)


def test_normalised_maps_have_no_scale() -> None:
    student, teacher = cams(4)
    scale = torch.tensor([2.0, 0.1, 7.0, 1.0, 3.0], dtype=torch.float64).view(1, 5, 1, 1)
    torch.testing.assert_close(
        cat_kd(student * scale, teacher, normalize=True), cat_kd(student, teacher, normalize=True)
    )


def test_all_classes_kept_is_none_left_out() -> None:
    student, teacher = cams(5)
    torch.testing.assert_close(cat_kd(student, teacher, partial=5), cat_kd(student, teacher))


def test_the_code_keeps_one_class_less() -> None:
    student, teacher = cams(6)
    torch.testing.assert_close(cat_kd(student, teacher, partial=3, form="code"), cat_kd(student, teacher, partial=2))
    assert cat_kd(student, teacher, partial=1, form="code") == 0


def test_classes_left_out_get_no_gradient() -> None:
    student, teacher = cams(7)
    grad = torch.autograd.grad(cat_kd(student, teacher, partial=2), student)[0]
    assert (grad.flatten(2).any(2).sum(1) == 2).all()


def test_a_binarised_teacher_has_no_scale_and_lies_between_0_and_1() -> None:
    student, teacher = cams(8)
    torch.testing.assert_close(cat_kd(student, 9 * teacher, binarize=True), cat_kd(student, teacher, binarize=True))
    nothing = torch.zeros_like(teacher)
    assert 0 < cat_kd(nothing, teacher, binarize=True) < 1


def test_in_a_run_map_and_classifier_learn() -> None:
    student = load({"model": "tutelage:resnet8", "width": 0.25}, num_classes=5, in_channels=1, seed=0)
    teacher = load("tutelage:resnet8", num_classes=5, in_channels=1, seed=1)
    batch = Batch.of(torch.rand(4, 1, 8, 8), torch.arange(4))
    objective = Objective(task=0.0, cat_kd=CATKD())
    machine = Distiller(student, objective, task=Classification(5), teacher=teacher, sample=batch)
    losses = machine(batch, machine.observe(batch))
    losses.total.backward()
    weight, bias = (student.module.get_parameter(f"linear.{part}") for part in ("weight", "bias"))
    assert weight.grad is not None
    assert weight.grad.any()
    assert bias.grad is None
    assert machine.report.frozen == ("student.linear.bias",)
    signals = machine._read(batch, machine.observe(batch))
    cam = class_activation(signals["student"]["map"], signals["student"]["classifier.weight"])
    torch.testing.assert_close(cam.mean((2, 3)) + bias, signals["student"].logits)
    machine.close()


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    for partial in (None, 2):
        loss = cat_kd(student, torch.zeros(0, 3, 4, 4), partial=partial)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, student)[0].shape == (0, 3, 2, 2)


@pytest.mark.parametrize("binarize", [False, True])
def test_dead_maps_are_finite(binarize: bool) -> None:
    dead = torch.zeros(2, 3, 2, 2, requires_grad=True)
    for teacher in (torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)):
        loss = cat_kd(dead, teacher, normalize=True, binarize=binarize)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, dead)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_half_precision_extremes(normalize: bool, dtype: torch.dtype) -> None:
    student = torch.tensor([[[[1e4, -1e4], [0.0, 1e4]]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[[-1e4, 0.0], [1e4, -1e4]]]], dtype=dtype)
    loss = cat_kd(student, teacher, normalize=normalize)
    exact = cat_kd(student.detach().double(), teacher.double(), normalize=normalize)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_half_precision_maps_meet_full_precision_weights() -> None:
    feature_map = torch.full((1, 4, 2, 2), 1e4, dtype=torch.float16)
    found = class_activation(feature_map, torch.full((3, 4), 1e3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((1, 3, 2, 2), 4e7))


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": 0}, "resolution is a number of cells a side, not 0"),
        ({"form": "official"}, "form 'official' is not known; valid: code, paper"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        CATKD(**options)


def build(student: tuple[int, ...], weight: tuple[int, ...], lent: nn.Module, **options: Any) -> None:
    one = Signals(None, {"map": torch.zeros(student), "classifier.weight": torch.zeros(weight)})
    other = Signals(None, {"map": torch.zeros(2, 6, 2, 2)}, {"classifier": lent.requires_grad_(False)})
    CATKD(**options).build(one, other, Facts())


@pytest.mark.parametrize(
    ("student", "weight", "lent", "said"),
    [
        pytest.param(
            (2, 4),
            (5, 4),
            nn.Linear(6, 5),
            "cat_kd compares maps [B, C, H, W], not [2, 4] and [2, 6, 2, 2]",
            id="vector",
        ),
        pytest.param(
            (2, 4, 3, 3),
            (5, 8),
            nn.Linear(6, 5),
            "cat_kd: the student's classifier (weight [5, 8]) does not read the 4 channels of its map; tap the "
            "map that it pools",
            id="student's width",
        ),
        pytest.param(
            (2, 4, 3, 3),
            (5, 4),
            nn.Linear(24, 5),
            "cat_kd: the teacher's classifier (weight [5, 24]) does not read the 6 channels of its map; tap the "
            "map that it pools",
            id="teacher's width",
        ),
        pytest.param(
            (2, 4, 3, 3),
            (5, 4),
            nn.Sequential(nn.Linear(6, 5)),
            "cat_kd: the teacher's 'classifier' has no weight; name a linear layer",
            id="no layer",
        ),
        pytest.param(
            (2, 4, 3, 3),
            (3, 4),
            nn.Linear(6, 5),
            "cat_kd compares the maps of the same classes: the student has 3, the teacher 5",
            id="classes",
        ),
    ],
)
def test_models_that_do_not_fit(student: tuple[int, ...], weight: tuple[int, ...], lent: nn.Module, said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        build(student, weight, lent)


@pytest.mark.parametrize("partial", [0, 6])
def test_a_number_of_classes_that_cannot_be_kept(partial: int) -> None:
    with pytest.raises(UserError, match=f"^partial is a number of classes from 1 to 5, not {partial}$"):
        build((2, 4, 3, 3), (5, 4), nn.Linear(6, 5), partial=partial)
