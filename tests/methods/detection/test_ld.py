# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from golden_answer import with_gradients
from method_case import MethodCase, gaussian, labelled_batch
from oracles import ld as oracle
from tutelage.core import Batch, Facts, Signals
from tutelage.core.batch import Frame
from tutelage.core.error import UserError
from tutelage.functional.anchors import by_image, grid_anchors, on_boxes, overlaps
from tutelage.methods.detection.ld import LD, Form, class_distance, edge_distance, ld, valuable_region

Arrays = dict[str, NDArray[Any]]
FORMS: dict[Form, str] = {"union": "paper", "anchor": "code"}  # ours, the oracle's
GRIDS = ((6, 8), (3, 4))
BOXES = torch.tensor(
    [
        [3.0, 5.0, 21.0, 30.0],
        [30.0, 10.0, 55.0, 40.0],
        [5.0, 2.0, 40.0, 44.0],
        [10.0, 20.0, 30.0, 35.0],
        [40.0, 3.0, 60.0, 20.0],
    ]
)
IMAGES = torch.tensor([0, 0, 1, 3, 5])  # images 2 and 4 show nothing


def tensors(seed: int, scale: float) -> dict[str, Tensor]:
    shapes = {f"head.box[{n}]": (6, 20, *grid) for n, grid in enumerate(GRIDS)}
    return gaussian(seed, {**shapes, **{f"head.cls[{n}]": (6, 3, *grid) for n, grid in enumerate(GRIDS)}}, scale)


def dense_batch() -> Batch:
    frame = Frame((48, 64), torch.tensor([[48, 64]]).repeat(6, 1), BOXES, IMAGES)
    return replace(labelled_batch(), frame=frame)


def places(kind: str) -> tuple[str, ...]:
    return tuple(f"head.{kind}[{n}]" for n in range(len(GRIDS)))


def case(**options: Any) -> MethodCase:
    taps = {
        **{f"{side}_box_taps": places("box") for side in ("student", "teacher")},
        **{f"{side}_class_taps": places("cls") for side in ("student", "teacher")},
    }
    return MethodCase(
        term=lambda: LD(**{"anchor_scale": 2.0, **taps, **options}),
        student=lambda seed: tensors(seed, 1.0),
        teacher=lambda seed: tensors(seed + 1000, 2.0),
        batch=dense_batch,
    )


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        given_ = {name: torch.tensor(array) for name, array in arrays.items() if not name.startswith(("loss", "grad"))}
        given_ = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given_.items()}
        found = region(given_, meta) if meta.get("kind") == "vlr_region" else rows(given_, meta, arrays)
        answer |= {f"{name}{suffix}": value for name, value in found.items() if f"{name}{suffix}" in arrays}
    return answer


def rows(given_: dict[str, Tensor], meta: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
    free = {name: given_[name].requires_grad_() for name in ("s_corners", "s_cls")}
    count = len(given_["s_cls"])
    corners = given_["s_corners"].view(count, 4, -1), given_["t_corners"].view(count, 4, -1)
    classes = class_distance(free["s_cls"], given_["t_cls"], given_["label_weights"], meta["kd_T"])
    main, ring, plain = (
        edge_distance(*corners, weight, meta["T"])
        for weight in (given_["weight_pos"], given_["vlr_iou"], torch.ones_like(given_["weight_pos"]))
    )
    losses = {
        "loss": meta["ld_weight"] * main / meta["ld_avg_factor"],
        "loss_vlr": meta["vlr_weight"] * ring / meta["vlr_avg_factor"],
        "loss_kd_cls": meta["kd_weight"] * classes / count,
        "loss_mean_reduction": plain / (4 * count),
    }
    return with_gradients(losses, free, arrays)


def region(given_: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Any]:
    anchors, boxes = given_["anchors"], given_["gt_boxes"]
    sizes = given_["num_level_anchors"].tolist()
    image = torch.zeros(len(boxes), dtype=torch.int64)
    options = {"share": meta["alpha_vlr"], "count": meta["topk"]}
    maps = {form: by_image(valuable_region(boxes, anchors, sizes, form=form, **options), image, 1)[0] for form in FORMS}
    iou, diou = overlaps(boxes, anchors, "anchor")
    return {
        "loss": maps["anchor"].sum(),
        "out_vlr_region": maps["anchor"],
        "out_vlr_region_true_diou": maps["union"],
        "out_iou": iou.T,
        "out_diou": diou.T,
    }


# the equations, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 5),
    bins=st.integers(2, 6),
    classes=st.integers(1, 5),
    temperature=st.floats(1, 12),
)
def test_edges_and_classes_equal_the_loops(seed: int, count: int, bins: int, classes: int, temperature: float) -> None:
    shapes = {"s": (count, 4, bins), "t": (count, 4, bins), "sc": (count, classes), "tc": (count, classes)}
    drawn = {name: value.double() for name, value in gaussian(seed, shapes, 2.0).items()}
    weight = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    edges = drawn["s"].view(-1, bins).numpy(), drawn["t"].view(-1, bins).numpy()
    expected = oracle.ld(*edges, weight.numpy(), 4.0, temperature)
    found = 0.25 / 4 * edge_distance(drawn["s"], drawn["t"], weight, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-13)
    expected = oracle.class_term(drawn["sc"].numpy(), drawn["tc"].numpy(), weight.numpy(), count, temperature)
    found = 10 * class_distance(drawn["sc"], drawn["tc"], weight, temperature) / count
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-13)
    plain = edge_distance(drawn["s"], drawn["t"], torch.ones(count), temperature) / (4 * count)
    assert plain.item() == pytest.approx(oracle.ld_mean(*edges, temperature), rel=1e-9, abs=1e-13)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 3), near=st.integers(1, 9), share=st.floats(0.1, 0.6))
@pytest.mark.parametrize("form", FORMS)
def test_the_ring_equals_the_loops(form: Form, seed: int, count: int, near: int, share: float) -> None:
    drawn = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low = drawn[:, :2] * torch.tensor([44.0, 28.0])
    boxes = torch.cat([low, low + 4 + 16 * drawn[:, 2:]], dim=1)
    anchors = grid_anchors(GRIDS, (48, 64), boxes, 2.0) + 0.3  # no two centres equally far
    expected = oracle.valuable_region(anchors.numpy(), boxes.numpy(), [48, 12], max(near, 2), share, FORMS[form])
    found = valuable_region(boxes, anchors, [48, 12], share=share, count=max(near, 2), form=form)
    torch.testing.assert_close(by_image(found, torch.zeros(count, dtype=torch.int64), 1)[0], torch.tensor(expected))


def test_the_term_is_the_sum_over_boxes() -> None:
    """From the heads' maps and the batch's boxes, anchor by anchor."""
    here = case()
    student, teacher = here.tensors(dtype=torch.float64)
    assert teacher is not None
    batch = here.batch()
    assert batch.frame is not None
    found = here.outcome(here.built(dtype=torch.float64), student, teacher, batch).parts
    boxes = batch.frame.boxes
    anchors = grid_anchors(GRIDS, (48, 64), boxes, 2.0)
    main, ring, classes, learned = 0.0, 0.0, 0.0, 0
    for image in range(6):
        own = boxes[image == IMAGES]
        positive = on_boxes(own, anchors, [48, 12]).any(dim=0)
        values = oracle.valuable_region(anchors.double().numpy(), own.double().numpy(), [48, 12])
        number = 0
        for level, (height, width) in enumerate(GRIDS):
            for y in range(height):
                for x in range(width):
                    edges = [
                        side[f"head.box[{level}]"][image, :, y, x].detach().view(4, 5).numpy()
                        for side in (student, teacher)
                    ]
                    scores, taught = (
                        side[f"head.cls[{level}]"][image, :, y, x].detach()[None].numpy() for side in (student, teacher)
                    )
                    apart = sum(4 * oracle.ld_mean(one[None], two[None]) for one, two in zip(*edges, strict=True)) / 4
                    if positive[number]:
                        sure = torch.tensor(scores).sigmoid().max().item()
                        main += sure * apart
                        classes += oracle.class_term(scores, taught, torch.ones(1).numpy(), 1.0, weight=1.0)
                        learned += 1
                    ring += values[number] * apart
                    number += 1
    assert learned > 3
    assert ring > 0
    assert found["main"].item() == pytest.approx(0.25 * main / 4 / 6, rel=1e-6)
    assert found["vlr"].item() == pytest.approx(0.25 * ring / 16 / 6, rel=1e-6)
    assert found["cls"].item() == pytest.approx(10 * classes / learned, rel=1e-6)


def test_gradcheck() -> None:
    drawn = gaussian(2, {"s": (2, 3, 4, 5), "t": (2, 3, 4, 5), "sc": (2, 3, 4), "tc": (2, 3, 4)})
    boxes, taught, scores, answers = (value.double() for value in drawn.values())
    positive = torch.tensor([[True, False, True], [False, False, True]])
    value = torch.tensor([[0.0, 0.4, 0.0], [0.2, 0.0, 0.0]])

    def edges(free: Tensor) -> Tensor:
        return total(ld(free, taught, scores, answers, positive, value))

    def classes(free: Tensor) -> Tensor:
        return ld(boxes, taught, free, answers, positive, value)["cls"]

    assert torch.autograd.gradcheck(edges, boxes.requires_grad_())
    assert torch.autograd.gradcheck(classes, scores.requires_grad_())


# limits and identities


def test_the_certainty_is_a_constant() -> None:
    here = case(lambda_cls=0.0)
    student, teacher = here.tensors()
    here.loss(here.built(), student, teacher, here.batch()).backward()
    slopes = {name: tensor.grad for name, tensor in student.items()}
    assert not any(slope.any() for name, slope in slopes.items() if slope is not None and "cls" in name)
    assert all(slope is not None and slope.any() for name, slope in slopes.items() if "box" in name)


def test_nothing_to_learn_from_oneself() -> None:
    here = case()
    student, teacher = here.matched(dtype=torch.float64)
    loss = here.loss(here.built(dtype=torch.float64), student, teacher, here.batch())
    assert loss.item() == pytest.approx(0, abs=1e-14)


def test_positions_away_from_boxes_do_not_count() -> None:
    here = case()
    term = here.built()
    student, teacher = here.tensors()
    batch = here.batch()
    here.loss(term, student, teacher, batch).backward()
    for name in student:
        slope = student[name].grad
        assert slope is not None
        assert not slope[[2, 4]].any()  # images without a box
        assert slope[0].any()
    touched = (student["head.box[0]"].grad != 0).any(dim=1)[0]  # type: ignore[union-attr]
    assert 0 < int(touched.sum()) < 48


def test_the_ring_lies_around_what_learns() -> None:
    anchors = grid_anchors(GRIDS, (48, 64), BOXES, 2.0)
    learned, ring = on_boxes(BOXES, anchors, [48, 12]), valuable_region(BOXES, anchors, [48, 12]) > 0
    assert bool(ring.any())
    assert not bool((learned & ring).all(dim=1).any())


def test_coefficients() -> None:
    student, teacher = case().tensors()
    unit = case(lambda_main=1.0, lambda_vlr=1.0, lambda_cls=1.0)
    other = case(lambda_main=2.0, lambda_vlr=3.0, lambda_cls=0.0)
    batch = case().batch()
    one = unit.outcome(unit.built(), student, teacher, batch).parts
    two = other.outcome(other.built(), student, teacher, batch).parts
    torch.testing.assert_close(two["main"], 2 * one["main"])
    torch.testing.assert_close(two["vlr"], 3 * one["vlr"])
    assert two["cls"] == 0


# odd cases


def test_no_boxes_give_connected_zeros() -> None:
    here = case()
    student, teacher = here.tensors()
    frame = Frame((48, 64), torch.tensor([[48, 64]]).repeat(6, 1), BOXES[:0], IMAGES[:0])
    loss = here.loss(here.built(), student, teacher, replace(here.batch(), frame=frame))
    assert loss.item() == 0
    loss.backward()
    assert all(tensor.grad is not None for tensor in student.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    here = case()
    student, teacher = here.tensors()
    assert teacher is not None
    free = {name: (1e4 * value.detach().sign()).to(dtype).requires_grad_() for name, value in student.items()}
    taught = {name: (-1e4 * value.sign()).to(dtype) for name, value in teacher.items()}
    loss = here.loss(here.built(), free, taught, here.batch())
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in free.values())


# errors


def test_data_without_boxes() -> None:
    here = case()
    student, teacher = here.tensors()
    said = "ld looks at the anchors on and around boxes, and this data has no boxes"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.loss(here.built(), student, teacher, labelled_batch())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"head.box[0]": (6, 4, 6, 8)},
            "ld compares distributions, 4 (n + 1) numbers a position: the student has 4, the teacher 20",
        ),
        (
            {"head.box[1]": (6, 20, 5, 5)},
            "ld compares maps of one grid at each level, not [6, 20, 5, 5], [6, 20, 3, 4], [6, 3, 3, 4], [6, 3, 3, 4]",
        ),
    ],
)
def test_heads_that_do_not_fit(changed: dict[str, tuple[int, ...]], said: str) -> None:
    student, teacher = case().tensors()
    assert teacher is not None
    one = Signals(None, {**student, **gaussian(0, changed)})
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        case().term().build(one, Signals(None, teacher), Facts())


def test_heads_of_two_numbers_of_classes() -> None:
    boxes, scores = torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 3)
    said = "ld compares heads of one shape: the student's scores are [1, 2, 3], the teacher's [1, 2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ld(boxes, boxes, scores, torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "code"}, "form 'code' is not known; valid: anchor, union"),
        ({"temperature": 0}, "temperatures must be > 0, not 0 and 2.0"),
        ({"candidates": 0}, "candidates must be at least 1 and anchor_scale > 0, not 0 and 8.0"),
        ({"student_box_taps": "fpn"}, "student_taps: expected a list of roles or module paths, not 'fpn'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        LD(**options)
