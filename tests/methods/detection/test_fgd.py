# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from golden_answer import with_gradients
from method_case import MethodCase, gaussian, labelled_batch
from oracles import fgd as oracle
from tutelage.core import Batch, Facts, Signals
from tutelage.core.batch import Frame
from tutelage.core.error import UserError
from tutelage.methods.detection.fgd import FGD, Context, attention, fgd, masks

Arrays = dict[str, NDArray[Any]]
GRIDS = ((6, 8), (3, 4))
BOXES = torch.tensor(
    [
        [3.0, 5.0, 21.0, 30.0],
        [30.0, 10.0, 55.0, 40.0],
        [33.0, 12.0, 41.0, 20.0],
        [5.0, 2.0, 40.0, 44.0],
        [10.0, 20.0, 30.0, 35.0],
    ]
)
IMAGES = torch.tensor([0, 0, 0, 1, 3])  # images 2, 4 and 5 show nothing
UNIT = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "lambda_relation": 1.0}
PARTS = {"foreground": "fg", "background": "bg", "attention": "attention", "relation": "relation"}  # ours, the oracle's


def pyramid(seed: int, width: int) -> dict[str, Tensor]:
    return gaussian(seed, {f"fpn[{n}]": (6, width, *grid) for n, grid in enumerate(GRIDS)})


def dense_batch() -> Batch:
    sizes = torch.tensor([[48, 64], [48, 64], [40, 64], [48, 64], [48, 50], [30, 40]])
    return replace(labelled_batch(), frame=Frame((48, 64), sizes, BOXES, IMAGES))


def case(width: int = 4, **options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: FGD(**{**UNIT, **options}),
        student=lambda seed: pyramid(seed, 4),
        teacher=lambda seed: pyramid(seed + 1000, width),
        batch=dense_batch,
    )


def one_level(
    student: Tensor, teacher: Tensor, batch: Batch, weights: dict[str, Tensor] | None = None, **options: Any
) -> tuple[dict[str, Tensor], FGD]:
    """The term on one level in the tensors' type, with these weights: built as in a run, then loaded."""
    term = FGD(student_taps=["fpn[0]"], teacher_taps=["fpn[0]"], **{**UNIT, **options})
    sides = (Signals(None, {"fpn[0]": student}), Signals(None, {"fpn[0]": teacher}))
    term.build(sides[0].detach(), sides[1], Facts())
    term.to(student.dtype)
    if weights is not None:
        term.levels[0].load_state_dict(weights)
    return term(*sides, batch), term


def framed(boxes: Tensor, image: Tensor, image_size: Tensor, size: tuple[int, int] = (48, 64)) -> Batch:
    inputs = torch.zeros(len(image_size), 1)
    return Batch.of(inputs, frame=Frame(size, image_size, boxes, image))


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        given_ = {name: torch.tensor(array, dtype=dtype) for name, array in arrays.items() if array.dtype == "f4"}
        weights = {n: given_[n] for n in given_ if n.startswith(("align.", "context_")) and not n.endswith("_f32")}
        student, teacher = given_["student_features"].requires_grad_(), given_["teacher_features"]
        image, size = (torch.tensor(arrays[name]) for name in ("box_image_index", "img_shape"))
        batch = framed(given_["boxes"], image, size)
        parts, term = one_level(student, teacher, batch, weights, temperature=meta["temp"])
        coefficients = [meta[f"{name}_fgd"] for name in ("alpha", "beta", "gamma", "lambda")]
        loss = torch.stack([weight * part for weight, part in zip(coefficients, parts.values(), strict=True)]).sum()
        found = {f"loss_{PARTS[name]}": part for name, part in parts.items()}
        free = {"student_features": student, **dict(term.levels[0].named_parameters())}
        ours = student if "align.weight" not in weights else term.levels[0].get_submodule("align")(student)
        grid = (teacher.shape[2], teacher.shape[3])
        ((found["mask_fg"], found["mask_bg"]),) = masks(given_["boxes"], image, size, [grid])
        for side, given_map in (("student", ours), ("teacher", teacher)):
            spatial, channel = attention(given_map, meta["temp"])
            found |= {f"attention_spatial_{side}": spatial, f"attention_channel_{side}": channel}
        answer |= {f"{name}{suffix}": value for name, value in found.items() if f"{name}{suffix}" in arrays}
        for name, value in with_gradients({"loss": loss}, free, [f"grad_{name}" for name in free]).items():
            if not (suffix and name.endswith("conv_mask.bias")):  # 0 but for rounding: a softmax does not see it
                answer[f"{name}{suffix}"] = value
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    count=st.integers(0, 4),
    temperature=st.floats(0.3, 2.0),
)
def test_equals_the_loops(
    seed: int, rows: int, widths: tuple[int, int], grid: tuple[int, int], count: int, temperature: float
) -> None:
    torch.manual_seed(seed)
    student, teacher = (torch.randn(rows, width, *grid, dtype=torch.float64) for width in widths)
    low = torch.rand(count, 2, dtype=torch.float64) * 40
    boxes = torch.cat([low, low + torch.rand(count, 2, dtype=torch.float64) * 30], dim=1)
    image, size = torch.arange(count) % rows, torch.tensor([[48, 64], [40, 50], [48, 30]])[:rows]
    coefficients = {"alpha": 0.3, "beta": 0.7, "gamma": 1.1, "lambda_relation": 0.2}
    batch = framed(boxes, image, size)
    _, term = one_level(student, teacher, batch)
    with torch.no_grad():
        for weight in term.levels[0].parameters():
            weight.copy_(torch.randn_like(weight))  # the context blocks would begin as the identity
    weights = term.levels[0].state_dict()
    parts, _ = one_level(student, teacher, batch, weights, temperature=temperature, **coefficients)
    expected = oracle.fgd(
        student.numpy(),
        teacher.numpy(),
        boxes.numpy(),
        image.numpy(),
        size.double().numpy(),
        {name: weight.numpy() for name, weight in weights.items()},
        temperature,
        *coefficients.values(),
    )
    for (name, part), factor in zip(parts.items(), coefficients.values(), strict=True):
        assert part.item() == pytest.approx(factor * expected[PARTS[name]], rel=1e-9, abs=1e-12)
    assert total(parts).item() == pytest.approx(expected["loss"], rel=1e-9)


def test_gradcheck() -> None:
    maps = torch.randn(4, 2, 3, 2, 3, dtype=torch.float64)
    mask = torch.rand(2, 2, 2, 3, dtype=torch.float64)

    def loss(student: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
        return total(fgd(student, maps[1], ours, theirs, mask[0], mask[1], **UNIT))

    assert torch.autograd.gradcheck(loss, [maps[n].clone().requires_grad_() for n in (0, 2, 3)])


def test_gradcheck_through_the_layers() -> None:
    here = case(width=6)
    term, batch = here.built(dtype=torch.float64), here.batch()
    with torch.no_grad():
        for weight in term.parameters():
            weight.add_(0.3)
    student, teacher = here.tensors(dtype=torch.float64)
    names = [name for name, _ in term.named_parameters()]
    levels = list(student)

    def loss(*free: Tensor) -> Tensor:
        maps, weights = free[: len(levels)], free[len(levels) :]
        sides = (here.signals(dict(zip(levels, maps, strict=True))), here.teach(teacher), batch)
        found: dict[str, Tensor] = torch.func.functional_call(term, dict(zip(names, weights, strict=True)), sides)
        return total(found)

    assert torch.autograd.gradcheck(loss, (*student.values(), *term.parameters()), fast_mode=True)


# limits and identities


def test_attention_has_mean_one() -> None:
    spatial, channel = attention(gaussian(0, {"map": (3, 5, 4, 6)})["map"], 0.5)
    torch.testing.assert_close(spatial.mean((1, 2)), torch.ones(3))
    torch.testing.assert_close(channel.mean(1), torch.ones(3))


def test_attention_of_a_constant_map_and_of_a_hot_softmax_is_one_everywhere() -> None:
    for given_, temperature in ((torch.full((1, 2, 3, 3), 4.0), 0.5), (torch.randn(1, 2, 3, 3), 1e6)):
        for side in attention(given_, temperature):
            torch.testing.assert_close(side, torch.ones_like(side), rtol=1e-4, atol=1e-4)


def test_masks_of_an_image_sum_to_one_each_box_and_background() -> None:
    boxes, image = torch.tensor([[0.0, 0.0, 15.0, 15.0], [32.0, 24.0, 39.0, 31.0]]), torch.tensor([0, 0])
    size = torch.tensor([[48, 64], [48, 64]])
    ((foreground, background),) = masks(boxes, image, size, [(6, 8)])
    torch.testing.assert_close(foreground[0].sum(), torch.tensor(2.0))
    torch.testing.assert_close(background.sum((1, 2)), torch.ones(2))
    assert not foreground[1].any()
    assert not (foreground * background).any()


def test_a_box_over_everything_leaves_no_background() -> None:
    ((foreground, background),) = masks(
        torch.tensor([[0.0, 0.0, 64.0, 48.0]]), torch.tensor([0]), torch.tensor([[48, 64]]), [(6, 8)]
    )
    assert foreground.all()
    assert not background.any()


def test_boxes_are_stretched_over_the_padding() -> None:
    """The released code divides by the unpadded size though the map covers the padding."""
    box, image = torch.tensor([[0.0, 0.0, 19.0, 47.0]]), torch.tensor([0])
    ((padded, _),) = masks(box, image, torch.tensor([[48, 32]]), [(6, 8)])
    ((whole, _),) = masks(box, image, torch.tensor([[48, 64]]), [(6, 8)])
    assert padded[0, 0].count_nonzero() == 6
    assert whole[0, 0].count_nonzero() == 4


def test_context_begins_as_the_identity_and_its_layers_learn_from_the_second_step_on() -> None:
    context, given_ = Context(4), torch.randn(2, 4, 3, 3)
    assert torch.equal(context(given_), given_)
    context(given_).square().sum().backward()
    grads = {name: weight.grad for name, weight in context.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert {name for name, grad in grads.items() if grad is not None and grad.any()} == {
        *("expand.weight", "expand.bias")
    }


def test_the_teachers_context_is_trained_and_its_map_is_not() -> None:
    here = case()
    term = here.built()
    student, teacher = here.tensors()
    with torch.no_grad():
        for weight in term.parameters():
            weight.add_(0.1)
    here.loss(term, student, teacher, here.batch()).backward()
    for name, weight in term.named_parameters():
        assert weight.grad is not None, name
        if "conv_mask.bias" not in name:  # a softmax over positions does not see it
            assert weight.grad.any(), name


def test_every_level_has_layers_of_its_own() -> None:
    names = set(case(width=6).built().state_dict())
    assert {f"levels.{n}.align.weight" for n in (0, 1)} <= names
    assert {f"levels.{n}.context_{side}.reduce.weight" for n in (0, 1) for side in ("student", "teacher")} <= names
    assert not any("align" in name for name in case().built().state_dict())


def test_levels_add_up() -> None:
    here = case()
    term = here.built()
    student, teacher = here.tensors()
    whole = here.outcome(term, student, teacher, here.batch()).parts
    assert teacher is not None
    single = [one_level(student[name], teacher[name], here.batch())[0] for name in student]
    for name, part in whole.items():
        torch.testing.assert_close(part, single[0][name] + single[1][name])


def test_another_size_of_the_images_leaves_the_coefficients_their_meaning() -> None:
    here = case(base_size=(24, 32))
    student, teacher = here.tensors()
    small = here.loss(here.built(), student, teacher, here.batch())
    torch.testing.assert_close(small, case().loss(case().built(), student, teacher, here.batch()) / 4)


def test_without_boxes_everything_is_background() -> None:
    student, teacher = gaussian(0, {"s": (2, 3, 4, 4)})["s"], gaussian(1, {"t": (2, 3, 4, 4)})["t"]
    none = framed(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.tensor([[48, 64]] * 2))
    parts, _ = one_level(student, teacher, none)
    assert parts["foreground"] == 0
    spatial, channel = attention(teacher, 0.5)
    error = (student - teacher).square() * spatial[:, None] * channel[:, :, None, None]
    torch.testing.assert_close(parts["background"], error.sum() / 16 / 2)


# odd cases


def test_no_rows_give_connected_zeros() -> None:
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    parts = fgd(student, torch.zeros(0, 3, 4, 4), student, student, torch.zeros(0, 4, 4), torch.zeros(0, 4, 4))
    assert total(parts) == 0
    assert torch.autograd.grad(total(parts), student)[0].shape == student.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.full((2, 3, 4, 4), 1e4, dtype=dtype)
    student[0, 0, 0, 0] = -1e4
    student.requires_grad_()
    teacher = torch.full((2, 3, 4, 4), -1e4, dtype=dtype)
    mask = torch.full((2, 4, 4), 1 / 16)
    parts = fgd(student, teacher, student, teacher, mask, mask)
    assert total(parts).dtype == torch.float32
    assert total(parts).isfinite()
    assert torch.autograd.grad(total(parts), student)[0].isfinite().all()


def test_constant_maps() -> None:
    flat = torch.full((2, 4, 3, 3), 2.0, requires_grad=True)
    batch = framed(BOXES[:1], IMAGES[:1], torch.tensor([[48, 64]] * 2))
    parts, _ = one_level(flat, torch.zeros(2, 4, 3, 3), batch)
    assert parts["attention"].item() == pytest.approx(0, abs=1e-5)
    assert torch.autograd.grad(total(parts), flat)[0].isfinite().all()


def test_a_box_beyond_its_image_is_on_no_cell() -> None:
    outside = framed(torch.tensor([[70.0, 50.0, 90.0, 60.0]]), torch.tensor([0]), torch.tensor([[48, 64]]))
    maps = gaussian(0, {"s": (1, 3, 4, 4), "t": (1, 3, 4, 4)})
    parts, _ = one_level(maps["s"], maps["t"], outside)
    assert parts["foreground"] == 0


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"base_size": (640,)}, "base_size is [height, width] in pixels, such as [640, 640], not [640]"),
        ({"base_size": (640, 0)}, "base_size is [height, width] in pixels, such as [640, 640], not [640, 0]"),
        ({"student_taps": "fpn[*]"}, "student_taps: expected a list of roles or module paths, not 'fpn[*]'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        FGD(**options)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        pytest.param((2, 4), "fgd compares maps [B, C, H, W], not [2, 4] and [2, 4, 3, 3]", id="vector"),
        pytest.param(
            (2, 4, 6, 6),
            "fgd compares maps of one grid: the student's is (6, 6), the teacher's (3, 3); tap layers of equal stride",
            id="grid",
        ),
    ],
)
def test_maps_that_do_not_fit(shape: tuple[int, ...], said: str) -> None:
    student, teacher = (Signals(None, {"fpn[0]": torch.zeros(size)}) for size in (shape, (2, 4, 3, 3)))
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        FGD().build(student, teacher, Facts())


def test_data_without_boxes() -> None:
    here = case()
    student, teacher = here.tensors()
    said = "fgd weighs cells by the boxes on them, and this data has no boxes: use it for detection"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.loss(here.built(), student, teacher, labelled_batch())


def test_widths_that_differ_in_the_function() -> None:
    one, other, mask = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 3), torch.zeros(1, 3, 3)
    said = "fgd compares maps of one shape: the student's is [1, 2, 3, 3], the teacher's [1, 3, 3, 3]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        fgd(one, other, one, other, mask, mask)


def test_masks_are_those_of_the_loops() -> None:
    frame = dense_batch().frame
    assert frame is not None
    together = masks(frame.boxes.double(), frame.box_image, frame.image_size, GRIDS)
    for grid, found in zip(GRIDS, together, strict=True):
        expected = oracle.masks(
            frame.boxes.double().numpy(), frame.box_image.numpy(), frame.image_size.double().numpy(), *grid
        )
        for mask, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(mask.numpy(), other, rtol=1e-12)
