# SPDX-License-Identifier: Apache-2.0
import math
import re
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from method_case import MethodCase, gaussian, labelled_batch
from oracles import p2seg as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.functional.affinity import affinity, affinity_loss, random_walk, together
from tutelage.methods.segmentation.p2seg import Form, P2Seg, assign, centers_of, p2seg, points_at, possible

Arrays = dict[str, NDArray[Any]]
FORMS: tuple[Form, ...] = ("paper", "code")


def pointed(rows: int = 6, size: tuple[int, int] = (16, 16), classes: int = 4, points: int = 5) -> Tensor:
    """Class maps with a few labelled pixels; of six images the third has none."""
    generator = torch.Generator().manual_seed(3)
    target = torch.full((rows, size[0] * size[1]), -1)
    place = torch.rand(target.shape, generator=generator).argsort(1)[:, :points]
    target.scatter_(1, place, torch.randint(0, classes, place.shape, generator=generator))
    target[2:3] = -1
    return target.view(rows, *size)


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: P2Seg(**{"width": 6, "sigma": 3.0, "lambda_center": 1.0, **options}),
        student=lambda seed: gaussian(seed, {"logits": (6, 4, 4, 4), "map": (6, 5, 4, 4)}),
        teacher=lambda seed: gaussian(seed + 1000, {"logits": (6, 4, 8, 8)}, 2.0),
        batch=lambda: labelled_batch(pointed()),
    )


class Given(NamedTuple):
    """What :func:`p2seg` compares."""

    scores: Tensor
    weak: Tensor
    points: Tensor
    places: Tensor
    center: Tensor
    offset: Tensor
    embedding: Tensor


def made(seed: int = 0, rows: int = 2, classes: int = 3, grid: tuple[int, int] = (3, 4), width: int = 3) -> Given:
    torch.manual_seed(seed)
    positions = grid[0] * grid[1]
    points = torch.where(torch.rand(rows, positions) < 0.3, torch.randint(0, classes, (rows, positions)), -1)
    points[:, 0] = classes - 1  # every image has one
    allowed = possible(points, classes, 0)
    guess = torch.randn(rows, classes, positions).masked_fill(~allowed[..., None], -1e9).argmax(1)
    weak = torch.where(torch.rand(rows, positions) < 0.2, -1, guess)
    scores, center, offset, embedding = (
        torch.randn(rows, *shape, positions, dtype=torch.float64) for shape in ((classes,), (), (2,), (width,))
    )
    places = centers_of(*grid, (8 * grid[0], 4 * grid[1]), scores)
    return Given(scores, weak, points, places, center, 6 * offset, embedding)


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    features = torch.tensor(arrays["affinity_features"], dtype=torch.float64).requires_grad_()
    likeness = affinity(features)
    masks = torch.tensor(arrays["instance_masks"]).flatten(2) > 0
    target = together(masks)
    loss = affinity_loss(likeness.sigmoid(), target).mean()  # form "code"
    loss.backward()
    scores = torch.tensor(arrays["semantic_logits"], dtype=torch.float64)[None]
    classes = torch.tensor(arrays["valid_classes"])
    valid = torch.zeros(1, scores.shape[1], dtype=torch.bool).index_fill(1, classes, True)
    return {
        "affinity": likeness,
        "affinity_label": target.any(0).long(),
        "affinity_loss": loss,
        "grad_affinity_features": features.grad,
        "refined_semantic": random_walk(scores, likeness, valid)[0, classes],
    }


# the equation, worked out by loops


def expected(given: Given, form: Form, sigma: float, hardest: float) -> dict[str, float]:
    arrays: dict[str, NDArray[Any]] = {name: one.detach().numpy() for name, one in given._asdict().items()}
    places = arrays["places"]
    valid = possible(given.points, given.scores.shape[1], 0)
    total = dict.fromkeys(("semantic", "center", "offset", "affinity"), 0.0)
    rows = len(given.scores)
    for n in range(rows):
        points, weak, offset = (arrays[name][n] for name in ("points", "weak", "offset"))
        a = oracle.likeness(arrays["embedding"][n])
        goals = [oracle.assigned(points, weak, places, moved, 0) for moved in (None, offset)]
        found = {
            "semantic": oracle.semantic(arrays["scores"][n], a, weak, valid[n].tolist(), hardest, form),
            "center": oracle.centers(points, places, arrays["center"][n], sigma, 0),
            "offset": math.fsum(oracle.offsets(goal, places, offset) for goal in goals) / 2,
            "affinity": math.fsum(oracle.affinity(goal, a, form) for goal in goals) / 2,
        }
        total = {part: value + found[part] / rows for part, value in total.items()}
    return total


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 2),
    classes=st.integers(2, 4),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    hardest=st.floats(0.05, 1),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Form, seed: int, rows: int, classes: int, grid: tuple[int, int], hardest: float
) -> None:
    given = made(seed, rows, classes, grid)
    parts = p2seg(
        *given, form=form, hardest=hardest, sigma=5.0, lambda_center=3.0, lambda_offset=0.5, lambda_affinity=2.0
    )
    truth = expected(given, form, 5.0, hardest)
    for part, factor in (("semantic", 1.0), ("center", 3.0), ("offset", 0.5), ("affinity", 2.0)):
        assert parts[part].item() == pytest.approx(factor * truth[part], rel=1e-9, abs=1e-12), part


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    given = made(1, grid=(2, 3))
    free = [getattr(given, name).requires_grad_() for name in ("scores", "center", "offset", "embedding")]

    def loss(scores: Tensor, center: Tensor, offset: Tensor, embedding: Tensor) -> Tensor:
        words: dict[str, Any] = {"scores": scores, "center": center, "offset": offset, "embedding": embedding}
        parts = p2seg(*given._replace(**words), form=form, hardest=1.0)
        return torch.stack(list(parts.values())).sum()

    assert torch.autograd.gradcheck(loss, free)


# what goes where


def test_a_position_goes_to_the_nearest_point_of_its_class() -> None:
    places = centers_of(1, 5, (10, 50), torch.zeros(0))
    weak, things = torch.tensor([[1, 1, 2, 1, 0]]), torch.tensor([[1, -1, 2, -1, 1]])
    still = torch.zeros(1, 2, 5)
    assert assign(weak, things, places, still).tolist() == [[0, 0, 2, 4, -1]]
    still[0, 1, 1] = 30.0  # its offset carries it to the other
    assert assign(weak, things, places, still).tolist() == [[0, 4, 2, 4, -1]]


def test_points_of_the_background_own_nothing() -> None:
    given = made(2)
    ground = given._replace(points=torch.zeros_like(given.points))
    parts = p2seg(*ground, lambda_center=1.0)
    assert parts["offset"] == 0
    torch.testing.assert_close(parts["center"], given.center.square().mean())


def test_points_are_found_in_the_cells_of_a_grid() -> None:
    target = torch.full((1, 5, 7), -1)
    target[0, 4, 6], target[0, 0, 0], target[0, 0, 1] = 2, 0, 3
    assert points_at(target, 2, 3).tolist() == [[3, -1, -1, -1, -1, 2]]
    assert torch.equal(points_at(target, 5, 7), target.flatten(1))


def test_cells_have_their_middle_in_pixels() -> None:
    assert centers_of(2, 2, (8, 4), torch.zeros(0)).tolist() == [[2.0, 1.0], [2.0, 3.0], [6.0, 1.0], [6.0, 3.0]]


def test_refinement_carries_no_gradient() -> None:
    given = made(3)
    offset = given.offset.requires_grad_()
    parts = p2seg(*given._replace(offset=offset))
    touched = torch.autograd.grad(parts["offset"], offset)[0] != 0
    goals = [
        assign(given.weak, given.points.where(given.points != 0, -1), given.places, one) for one in (offset, 0 * offset)
    ]
    assert touched.any()
    assert not touched.movedim(1, -1)[(goals[0] < 0) & (goals[1] < 0)].any()
    assert not parts["affinity"].requires_grad


def test_a_walk_that_follows_the_weak_map_lowers_its_loss() -> None:
    given = made(4, rows=1, classes=2, grid=(3, 3))
    label = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0]])
    kind = torch.nn.functional.one_hot(label, 2).mT.double()
    good, bad = 9 * (2 * kind - 1), 0 * kind
    scores = given.scores + 2 * kind  # mostly right already
    parts = [
        p2seg(*given._replace(scores=scores, weak=label, embedding=one), hardest=1.0)["semantic"] for one in (good, bad)
    ]
    assert parts[0] < parts[1]


def test_the_weak_map_names_only_classes_that_have_a_point() -> None:
    here = case()
    term, (student, teacher) = here.built(), here.tensors()
    assert teacher is not None
    batch = here.batch()
    parts = here.outcome(term, student, teacher, batch).parts
    absent = ~possible(points_at(batch.target, 4, 4), 4, 0)
    louder = teacher["logits"] + 50 * absent[..., None, None]
    again = here.outcome(term, student, {"logits": louder}, batch).parts
    for part, value in parts.items():
        torch.testing.assert_close(again[part], value)


def test_labels_of_ignored_pixels_do_not_matter() -> None:
    here = case()
    term, (student, teacher) = here.built(), here.tensors()
    target = pointed()
    known = target >= 0
    values = []
    for fill in (-1, 1, 3, 255):
        seen = replace(here.batch(), target=target.where(known, fill), labelled=known)
        values.append(torch.stack(list(here.outcome(term, student, teacher, seen).parts.values())))
    for other in values[1:]:
        assert torch.equal(other, values[0])


def test_an_image_without_a_point_teaches_nothing() -> None:
    here = case()
    term, (student, teacher) = here.built(), here.tensors()
    here.loss(term, student, teacher, here.batch()).backward()
    for name in ("logits", "map"):
        grad = student[name].grad
        assert grad is not None
        assert grad[1].any()
        assert not grad[2].any()


def test_larger_maps_are_averaged_to_the_side() -> None:
    here = case(side=2)
    term, (student, teacher) = here.built(), here.tensors()
    assert teacher is not None
    small = {name: torch.nn.functional.adaptive_avg_pool2d(one, 2) for name, one in student.items()}
    before = here.outcome(term, student, teacher, here.batch()).parts
    after = here.outcome(term, small, teacher, here.batch()).parts
    for part, value in before.items():
        torch.testing.assert_close(after[part], value)


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    given = made(5)
    scores = torch.zeros(0, 3, 12, requires_grad=True)
    empty = given._replace(
        scores=scores,
        weak=given.weak[:0],
        points=given.points[:0],
        center=given.center[:0],
        offset=given.offset[:0],
        embedding=given.embedding[:0],
    )
    parts = p2seg(*empty)
    assert all(part == 0 for part in parts.values())
    assert torch.autograd.grad(parts["semantic"], scores)[0].shape == scores.shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype, form: Form) -> None:
    given = made(6)
    scores = torch.full((2, 3, 12), -1e4, dtype=dtype)
    scores[:, 0] = 1e4
    extreme = given._replace(
        scores=scores.requires_grad_(),
        center=given.center.to(dtype),
        offset=(given.offset * 1e3).to(dtype).requires_grad_(),
        embedding=(1e2 * given.embedding).to(dtype).requires_grad_(),
        places=given.places.float(),
    )
    total = torch.stack(list(p2seg(*extreme, form=form).values())).sum()
    assert total.dtype == torch.float32
    assert total.isfinite()
    free = [extreme.scores, extreme.offset, extreme.embedding]
    assert all(one.isfinite().all() for one in torch.autograd.grad(total, free))


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "cod"}, "form 'cod' is not known; did you mean code?"),
        ({"hardest": 0.0}, "hardest is a share in (0, 1], not 0.0"),
        ({"sigma": 0.0}, "sigma must be > 0 pixels, not 0.0"),
        ({"side": 0}, "side and width are at least 1, not 0 and 64"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        P2Seg(**options)


def test_signals_that_do_not_fit() -> None:
    student, teacher = case().tensors()
    assert teacher is not None
    flat = Signals(None, {**student, "map": torch.zeros(6, 5)})
    said = "p2seg compares maps [B, C, H, W], not [6, 5] and [6, 4, 4, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        P2Seg().build(flat, Signals(None, teacher), Facts())
    with pytest.raises(UserError, match=r"^background is one of 4 classes, not 4$"):
        P2Seg(background=4).build(Signals(None, student), Signals(None, teacher), Facts())


def test_data_without_class_maps_are_refused() -> None:
    here = case()
    term, (student, teacher) = here.built(), here.tensors()
    said = "p2seg learns from labelled pixels, and needs class maps [B, H, W], not [6]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.loss(term, student, teacher, labelled_batch())
