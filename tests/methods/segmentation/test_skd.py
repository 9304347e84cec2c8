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
from method_case import MethodCase, gaussian
from oracles import skd as oracle
from peak import peak
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.functional import block
from tutelage.methods.segmentation.skd import SKD, Form, regions, skd

Arrays = dict[str, NDArray[Any]]
FORMS: dict[Form, str] = {"mean": "mean", "sum": "code"}  # ours, the oracle's
UNIT: dict[str, Any] = {"lambda_pixel": 1.0, "lambda_pair": 1.0}


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: SKD(**options),
        student=lambda seed: gaussian(seed, {"logits": (6, 5, 4, 4), "map": (6, 3, 6, 6)}),
        teacher=lambda seed: gaussian(seed + 1000, {"logits": (6, 5, 4, 4), "map": (6, 4, 6, 6)}, 2.0),
    )


def made(
    seed: int = 0,
    images: int = 2,
    classes: int = 3,
    grid: tuple[int, int] = (4, 3),
    widths: tuple[int, int] = (2, 4),
    size: tuple[int, int] = (6, 5),
) -> list[Tensor]:
    """Score maps of student and teacher, then their features."""
    shapes = {"s": (images, classes, *grid), "t": (images, classes, *grid)}
    shapes |= {"sf": (images, widths[0], *size), "tf": (images, widths[1], *size)}
    drawn = {name: value.double() for name, value in gaussian(seed, shapes).items()}
    return [drawn["s"].requires_grad_(), drawn["t"], drawn["sf"].requires_grad_(), drawn["tf"]]


def total(parts: dict[str, Tensor]) -> Tensor:
    return parts["pixel"] + parts["pair"]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        free = {name: torch.tensor(arrays[name], dtype=dtype).requires_grad_() for name in ("s_logits", "s_feat")}
        sides = (
            {"logits": free["s_logits"], "map": free["s_feat"]},
            {
                "logits": torch.tensor(arrays["t_logits"], dtype=dtype),
                "map": torch.tensor(arrays["t_feat"], dtype=dtype),
            },
        )
        term = SKD(pool_scale=meta["pool_scale"], form="sum", **UNIT)
        parts = case().outcome(term, *sides, case().batch()).parts
        found = {"loss": parts["pair"], "loss_pixelwise": parts["pixel"]}
        answer |= with_gradients(found, free, arrays) if not suffix else {f"{n}_f32": v for n, v in found.items()}
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 3),
    classes=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    scale=st.sampled_from([0.34, 0.5, 1.0]),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Form,
    seed: int,
    images: int,
    classes: int,
    grid: tuple[int, int],
    widths: tuple[int, int],
    size: tuple[int, int],
    scale: float,
) -> None:
    tensors = made(seed, images, classes, grid, widths, size)
    scores, teachers, one, other = (tensor.detach().numpy() for tensor in tensors)
    parts = skd(*tensors, pool_scale=scale, form=form)
    assert parts["pixel"].item() == pytest.approx(
        10 * oracle.pixelwise(scores, teachers, FORMS[form]), rel=1e-9, abs=1e-12
    )
    assert parts["pair"].item() == pytest.approx(oracle.pairwise(one, other, scale), rel=1e-6, abs=1e-12)


def test_gradcheck_of_the_pixels() -> None:
    tensors = made(2)
    fixed = [tensor.detach() for tensor in tensors[1:]]
    assert torch.autograd.gradcheck(lambda s: skd(s, *fixed)["pixel"], tensors[0])


def test_the_gradient_of_the_pairs_takes_the_length_for_constant() -> None:
    _, _, student, teacher = made(3)
    scores = torch.zeros(2, 3, 4, 3, dtype=torch.float64)
    found = torch.autograd.grad(skd(scores, scores, student, teacher)["pair"], student)[0]
    goal = regions(teacher, 0.5)

    def pooled(features: Tensor) -> Tensor:
        found: Tensor = F.max_pool2d(features, (3, 2), (3, 2), ceil_mode=True).flatten(2).transpose(1, 2)
        return found

    length = pooled(student.detach().clone()).norm(dim=2, keepdim=True) + 1e-8

    def with_fixed_length(features: Tensor) -> Tensor:
        unit = pooled(features) / length
        total: Tensor = (unit @ unit.mT - goal @ goal.mT).square().sum() / (2 * length.shape[1] ** 2)
        return total

    assert torch.autograd.gradcheck(with_fixed_length, student)
    torch.testing.assert_close(found, torch.autograd.grad(with_fixed_length(student), student)[0])


# limits and identities


def test_the_pixel_part_is_the_divergence_and_the_teachers_entropy() -> None:
    student, teacher, *maps = made(4)
    pixel = skd(student, teacher, maps[0], maps[1], **UNIT)["pixel"]
    kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1).mean()
    entropy = torch.distributions.Categorical(logits=teacher.movedim(1, -1)).entropy().mean()
    torch.testing.assert_close(pixel, kl + entropy)


def test_the_released_pixel_part_grows_with_the_number_of_images() -> None:
    tensors = made(5, images=3)
    mean, total_ = (skd(*tensors, form=form)["pixel"] for form in ("mean", "sum"))
    torch.testing.assert_close(total_, 3 * mean)


def test_turning_and_scaling_features_changes_no_pair() -> None:
    student, teacher, one, other = made(6)
    # max-pooling does not commute with turning: pool first, by taking one position a region
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    turned = torch.einsum("bchw,cd->bdhw", one, turn) * 5
    scale = 0.16  # regions of one position
    found, expected = (skd(student, teacher, s, other, pool_scale=scale)["pair"] for s in (turned, one))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_teacher_finds_itself_alike() -> None:
    student, teacher, _, other = made(7)
    assert skd(student, teacher, 3 * other, other)["pair"].item() == pytest.approx(0, abs=1e-14)


def test_regions_at_the_edge_may_be_smaller() -> None:
    grid = torch.arange(25.0).view(1, 1, 5, 5)
    size = [max(1, int(5 * 0.5))] * 2
    assert size == [2, 2]
    assert regions(grid, 0.5).shape == (1, 9, 1)


@pytest.mark.parametrize("size", [1, 40, 200])
def test_blocks_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = made(8, size=(8, 8))
    whole = skd(*tensors, pool_scale=0.25)["pair"]
    slope = torch.autograd.grad(whole, tensors[2])[0]
    monkeypatch.setattr(block, "SIZE", size)
    parts = skd(*tensors, pool_scale=0.25)["pair"]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, tensors[2])[0], slope)


def test_memory_of_the_pairs_grows_with_the_positions_and_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block, "SIZE", 2**14)
    scores = torch.zeros(1, 2, 1, 1)

    def held(side: int) -> int:
        student, teacher = torch.randn(1, 4, side, side, requires_grad=True), torch.randn(1, 4, side, side)
        return peak(lambda: skd(scores, scores, student, teacher, pool_scale=1 / side)["pair"].backward())

    assert held(32) < 4 * held(16)  # four times the positions, sixteen times the pairs


# odd cases


def test_no_rows_give_connected_zeros() -> None:
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    features = torch.zeros(0, 2, 4, 4, requires_grad=True)
    parts = skd(student, student.detach(), features, torch.zeros(0, 3, 4, 4))
    assert total(parts).item() == 0
    assert torch.autograd.grad(total(parts), [student, features])[0].shape == student.shape


def test_a_dead_region_has_no_gradient() -> None:
    student, teacher, one, other = made(9)
    with torch.no_grad():
        one.zero_()
    parts = skd(student, teacher, one, other)
    assert parts["pair"].isfinite()
    assert not torch.autograd.grad(parts["pair"], one)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    tensors = [(1e4 * tensor.detach().sign()).to(dtype) for tensor in made(10)]
    tensors[0].requires_grad_()
    tensors[2].requires_grad_()
    loss = total(skd(*tensors))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(loss, [tensors[0], tensors[2]]))


# errors


def test_maps_that_do_not_fit() -> None:
    scores, features = torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 6, 6)
    said = "skd compares score maps of one shape: the student's is [2, 3, 4, 4], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        skd(scores, scores[:, :, :2, :2], features, features)
    said = (
        "skd compares regions: the student's map [2, 2, 6, 6] gives 4, the teacher's [2, 2, 5, 5] gives 9; "
        "tap layers of equal stride"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        skd(scores, scores, features, features[:, :, :5, :5])
    vectors = Signals(None, {"logits": torch.zeros(2, 3), "map": features})
    with pytest.raises(UserError, match=re.escape("skd compares maps [B, C, H, W], not [2, 3] and [2, 3]")):
        SKD().build(vectors, vectors, Facts())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "code"}, "form 'code' is not known; valid: mean, sum"),
        ({"pool_scale": 0}, "pool_scale is a share in (0, 1], not 0"),
        ({"pool_scale": 2}, "pool_scale is a share in (0, 1], not 2"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        SKD(**options)


# what is ignored


def test_ignored_places_leave_what_a_cut_map_gives() -> None:
    parts = made(3, grid=(4, 6), size=(4, 6))
    keep = torch.ones(2, 4, 6, dtype=torch.bool)
    keep[:, :, 3:] = False
    found = skd(*parts, pool_scale=0.5, keep=(keep, keep, keep))
    cut = [one[..., :3] for one in parts]
    assert found["pixel"].item() == pytest.approx(skd(*cut)["pixel"].item(), rel=1e-12)
    regions_left = regions(parts[2], 0.5, keep)
    alone = torch.stack([regions(parts[2][:, :, row : row + 2, :3], 1.0)[:, 0] for row in (0, 2)], dim=1)
    torch.testing.assert_close(regions_left[:, [0, 2]], alone)
    assert not regions_left[:, [1, 3]].any()


def test_each_image_counts_alike_however_much_of_it_is_ignored() -> None:
    parts = made(4)
    keep = torch.ones(2, 4, 3, dtype=torch.bool)
    keep[0, 1:] = False
    found = skd(*parts, keep=(keep, None, None))["pixel"]
    one = skd(*(part[:1, :, :1] if number < 2 else part[:1] for number, part in enumerate(parts)))["pixel"]
    other = skd(*(part[1:] for part in parts))["pixel"]
    assert found.item() == pytest.approx((one + other).item() / 2, rel=1e-12)


def test_score_maps_of_two_sizes_meet_at_the_smaller() -> None:
    student, teacher = case().tensors(0)
    assert teacher is not None
    large = {**teacher, "logits": teacher["logits"].repeat_interleave(2, 2).repeat_interleave(2, 3)}
    term, batch = case().built(), case().batch()
    same, met = (case().outcome(term, student, side, batch).parts for side in (teacher, large))
    assert all(torch.allclose(same[name], met[name]) for name in same)
