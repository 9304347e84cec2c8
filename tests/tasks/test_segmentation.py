# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from method_case import MethodCase
from tutelage.core import Batch, Model, Objective
from tutelage.core.batch import Frame, share_counts
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.core.picture import Depicting
from tutelage.core.task import Task
from tutelage.methods import catalogue, entry
from tutelage.run.suits import suited
from tutelage.tasks.segmentation import (
    ClassMap,
    Segmentation,
    boundary_counts,
    cross_entropy,
    palette,
    resized,
    rim,
    windows,
)

SEGMENTATION = Path(__file__).parent.parent / "methods" / "segmentation"


class Scores(NamedTuple):
    logits: Tensor
    auxiliary: Tensor


def batch_of(target: Tensor, pixels: Tensor | None = None, **more: Any) -> Batch:
    pixels = torch.zeros(len(target), 3, *target.shape[1:]) if pixels is None else pixels
    return Batch.of(pixels, target, labelled=target >= 0, **more)


def drawn(seed: int, *shape: int, classes: int = 3, ignored: bool = True) -> Tensor:
    return torch.randint(-int(ignored), classes, shape, generator=torch.Generator().manual_seed(seed))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answered(classes: Tensor, count: int) -> Tensor:
    """Scores whose largest is that of these classes."""
    return F.one_hot(classes.clamp(min=0), count).movedim(-1, 1).double()


def test_it_is_a_task_whose_answers_can_be_looked_at() -> None:
    task = Segmentation(3)
    assert isinstance(task, Task)
    assert isinstance(task, Depicting)


# the loss


def by_loops(logits: Tensor, target: Tensor, smoothing: float, weights: Sequence[float]) -> float:
    scores, truth = np.asarray(logits), np.asarray(target)
    classes, total, count = scores.shape[1], 0.0, 0
    for b in range(len(truth)):
        for y in range(truth.shape[1]):
            for x in range(truth.shape[2]):
                if truth[b, y, x] < 0:
                    continue
                count += 1
                top = max(scores[b, :, y, x])
                norm = top + math.log(sum(math.exp(value - top) for value in scores[b, :, y, x]))
                for k in range(classes):
                    share = (1 - smoothing) * float(k == truth[b, y, x]) + smoothing / classes
                    total -= weights[k] * share * (scores[b, k, y, x] - norm)
    return total / max(count, 1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), smoothing=st.sampled_from([0.0, 0.1]), weighted=st.booleans())
def test_the_loss_equals_loops_over_labelled_pixels(seed: int, smoothing: float, weighted: bool) -> None:
    weights = (0.5, 1.0, 2.0) if weighted else (1.0, 1.0, 1.0)
    logits, target = noise(seed, 2, 3, 3, 4), drawn(seed, 2, 3, 4)
    found = cross_entropy(
        logits,
        target,
        target >= 0,
        label_smoothing=smoothing,
        weight=torch.tensor(weights, dtype=torch.float64) if weighted else None,
    )
    assert found.item() == pytest.approx(by_loops(logits, target, smoothing, weights), rel=1e-10)


def test_low_scores_are_enlarged_to_the_pixels() -> None:
    logits, target = noise(0, 2, 3, 4, 4), drawn(0, 2, 16, 16)
    for corners in (False, True):
        large = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=corners)
        found = Segmentation(3, align_corners=corners).loss(logits, batch_of(target))
        assert torch.equal(torch.as_tensor(found), cross_entropy(large, target, target >= 0))


def test_a_second_head_is_a_part_with_its_coefficient() -> None:
    logits, second, target = noise(0, 2, 3, 4, 4), noise(1, 2, 3, 2, 2), drawn(0, 2, 4, 4)
    batch = batch_of(target)
    found = Segmentation(3, auxiliary=0.25).loss(Scores(logits, second), batch)
    assert isinstance(found, dict)
    assert found["main"] == Segmentation(3).loss(logits, batch)
    assert found["auxiliary"] == 0.25 * torch.as_tensor(Segmentation(3).loss(second, batch))
    assert Segmentation(3, auxiliary=0.0).loss(Scores(logits, second), batch) == found["main"]


def test_a_loss_of_the_models_own_gets_the_class_map() -> None:
    class Own(NamedTuple):
        logits: Tensor

        def losses(self, target: Tensor) -> dict[str, Tensor]:
            return {"own": (target < 0).sum() + self.logits.sum() * 0}

    target = torch.tensor([[[0, 5]]])
    batch = Batch.of(torch.zeros(1, 3, 1, 2), target, labelled=target < 3)
    assert Segmentation(3).loss(Own(noise(0, 1, 3, 1, 2)), batch) == {"own": torch.tensor(1.0)}


def test_without_labels_the_loss_is_a_connected_zero() -> None:
    logits = noise(0, 1, 3, 2, 2).requires_grad_()
    loss = torch.as_tensor(Segmentation(3).loss(logits, batch_of(torch.full((1, 2, 2), -1))))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_micro_batches_weigh_as_their_labelled_pixels_do() -> None:
    task, logits = Segmentation(3), noise(0, 2, 3, 3, 3)
    target = drawn(3, 2, 3, 3)
    target[1, :, 1:] = -1
    parts = [batch_of(target[row : row + 1]) for row in (0, 1)]
    shared = share_counts(parts, ("labelled",))
    losses = [torch.as_tensor(task.loss(logits[row : row + 1], parts[row])) for row in (0, 1)]
    weights = [one.count("labelled") / one.mean_count["labelled"] for one in shared]
    mean = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / 2
    torch.testing.assert_close(mean, torch.as_tensor(task.loss(logits, batch_of(target))))


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), "the model has 4 classes, the data 3"),
        (torch.zeros(1, 3), torch.zeros(1, 2, 2, dtype=torch.long), r"the model gave \[1, 3\]: is it a segmenter"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, dtype=torch.long), r"needs class maps \[B, H, W\], the targets"),
    ],
)
def test_what_does_not_fit_is_named(output: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Segmentation(3).loss(output, Batch.of(torch.zeros(1, 3, 2, 2), target))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is a share"),
        ({"scales": ()}, "scales are sizes"),
        ({"scales": (0.0,)}, "scales are sizes"),
        ({"boundary": 0.5}, "boundary is a share"),
        ({"stride": 4}, "stride is that of a window"),
        ({"window": (1, 2, 3)}, "window is a number of pixels"),
        ({"window": 0}, "window is a number of pixels"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Segmentation(3, **options)


def test_a_batch_may_say_image_by_image_what_is_labelled() -> None:
    task, logits, target = Segmentation(3), noise(0, 2, 3, 4, 4), drawn(0, 2, 4, 4)
    whole = Batch.of(torch.zeros(2, 3, 4, 4), target)
    assert whole.labelled.shape == (2,)
    assert task.loss(logits, whole) == task.loss(logits, batch_of(target))
    half = Batch.of(torch.zeros(2, 3, 4, 4), target, labelled=torch.tensor([True, False]))
    assert task.loss(logits, half) == task.loss(logits[:1], batch_of(target[:1]))
    assert task.score([(logits, half)]) == task.score([(logits[:1], batch_of(target[:1]))])


def test_as_many_weights_as_classes() -> None:
    task = Segmentation(3, class_weights=(1.0, 2.0))
    with pytest.raises(UserError, match=r"task.class_weights gives 2 numbers for 3 classes"):
        task.loss(noise(0, 1, 3, 2, 2), batch_of(drawn(0, 1, 2, 2)))


# what is ignored


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0))
def test_ignored_pixels_influence_neither_loss_nor_gradient_nor_scores(seed: int, share: float) -> None:
    task = Segmentation(3, label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5))
    target = drawn(seed, 2, 6, 5, ignored=False)
    ignored = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < share
    ignored[0, 0, 0] = False
    logits = noise(seed, 2, 3, 6, 5)
    other = torch.where(ignored[:, None], noise(seed + 1, 2, 3, 6, 5), logits)
    seen = []
    for scores, truth in ((logits, target.where(~ignored, -1)), (other, target.where(~ignored, 77))):
        free = scores.clone().requires_grad_()
        batch = Batch.of(torch.zeros(2, 3, 6, 5), truth, labelled=~ignored)
        loss = torch.as_tensor(task.loss(free, batch))
        loss.backward()
        assert free.grad is not None
        assert not free.grad.movedim(1, -1)[ignored].any()
        seen.append((loss, free.grad.movedim(1, -1)[~ignored], task.score([(scores, batch)])))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert seen[0][2] == seen[1][2]


def terms() -> list[tuple[str, MethodCase]]:
    """A case of every method of the family, and of the feature methods that segmenters are taught by."""
    homes = [*sorted(SEGMENTATION.glob("test_*.py")), SEGMENTATION.parent / "features" / "test_cwd.py"]
    return [
        (path.stem.removeprefix("test_"), importlib.import_module(f"methods.{path.parent.name}.{path.stem}").case())
        for path in homes
    ]


@pytest.mark.parametrize(("stem", "case"), [pytest.param(*one, id=one[0]) for one in terms()])
def test_what_stands_in_ignored_pixels_reaches_no_term(stem: str, case: MethodCase) -> None:
    student, teacher = case.tensors(3)
    shape = next((side.shape[2:] for name, side in student.items() if name == "logits" and side.ndim == 4), (4, 4))
    target = drawn(3, 6, *shape, classes=3, ignored=False)
    ignored = torch.rand(target.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    ignored[4] = True  # an image without labels
    found = []
    for filling in (-1, 2, 255):
        batch = case.batch()
        seen = Batch.of(
            batch.inputs, target.where(~ignored, filling), labelled=~ignored, index=batch.index, extra=batch.extra
        )
        term = case.built(seed=3)
        outcome = case.outcome(term, student, teacher, seen)
        found.append(outcome)
        assert all(value.isfinite() for value in outcome.parts.values())
    for one in found[1:]:
        assert all(torch.equal(one.parts[name], value) for name, value in found[0].parts.items())
        assert all(torch.equal(one.kept[name], value) for name, value in found[0].kept.items())


def taught() -> list[str]:
    """The methods that work with segmentation, and the one that does on score maps; p2seg learns of ignored pixels."""
    found = [stem for stem in catalogue() if "segmentation" in suited(entry(stem)) and stem != "p2seg"]
    return [*found, "acam_kd"]


@pytest.mark.parametrize("stem", taught())
def test_what_models_say_of_ignored_pixels_reaches_no_term(stem: str) -> None:
    case: MethodCase = importlib.import_module(f"methods.{entry(stem).family}.test_{stem}").case()
    target = drawn(3, 6, 24, 24, classes=3, ignored=False)
    ignored = torch.rand(target.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    ignored[4] = True  # an image without labels takes part as a whole
    batch = Batch.of(case.batch().inputs, target.where(~ignored, -1), labelled=~ignored, index=case.batch().index)

    def changed(side: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        made = {}
        for name, value in side.items():
            places = known(batch, value)
            if places is not None:
                assert not places.all()
                where = places[:, None] if value.ndim == 4 else places[..., None]
                value = value.detach().where(where, noise(seed, *value.shape).float())
            made[name] = value
        return made

    found = []
    for seed in (10, 20):
        student, teacher = case.tensors(3)
        assert teacher is not None
        if stem == "hfd_bsd":  # scores that are enlarged belong to several pixels
            student["logits"] = student["logits"].repeat_interleave(2, 2).repeat_interleave(2, 3)
        objective = Objective({"it": case.built(seed=3)})
        free = {name: value.detach().requires_grad_() for name, value in changed(student, seed).items()}
        sides = case.signals(free), case.teach(changed(teacher, seed + 1))
        parts, kept = objective.compare("it", *sides, batch, 0)
        weights = list(objective.parameters())
        loss = torch.stack(list(parts.values())).sum()
        assert loss.isfinite()
        gradients = torch.autograd.grad(loss, [*free.values(), *weights], allow_unused=True)
        for (name, value), gradient in zip(free.items(), gradients, strict=False):
            places = known(batch, value)
            if places is not None and gradient is not None:
                at_ignored = gradient.movedim(1, -1)[~places] if value.ndim == 4 else gradient[~places]
                assert not at_ignored.any(), name
        assert any(gradient is not None and gradient.any() for gradient in gradients)
        found.append([*parts.values(), *kept.values(), *gradients, *objective.buffers()])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("stem", [stem for stem in taught() if stem != "hfd_bsd"])
def test_with_nothing_ignored_no_bit_moves(stem: str) -> None:
    case: MethodCase = importlib.import_module(f"methods.{entry(stem).family}.test_{stem}").case()
    target = drawn(3, 6, 24, 24, classes=3, ignored=False)
    batch = Batch.of(case.batch().inputs, target, index=case.batch().index)
    found = []
    for everywhere in (False, True):
        student, teacher = case.tensors(3)
        objective = Objective({"it": case.built(seed=3)})
        with pytest.MonkeyPatch.context() as patch:
            if everywhere:
                patch.setattr("tutelage.core.ignored.taking_part", lambda *_: None)
            parts, _ = objective.compare("it", case.signals(student), case.teach(teacher), batch, 0)
        found.append(parts)
    for name, value in found[0].items():
        # the statistics of cirkd's projection, and the regions of skd, are summed in another order
        tolerance = {"cirkd": 1e-5, "skd": 1e-6}.get(stem, 0.0)
        torch.testing.assert_close(value, found[1][name], rtol=tolerance, atol=0.0)


# scores


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), parts=st.sampled_from([1, 2]))
def test_scores_equal_loops(seed: int, parts: int) -> None:
    target, given_ = drawn(seed, 2, 7, 6, classes=4), drawn(seed + 1, 2, 7, 6, classes=3, ignored=False)
    task, scores = Segmentation(4, class_names=("a", "b", "c", "d")), answered(given_, 4)
    whole = [(scores, batch_of(target))]
    cut = [(scores[row : row + 1], batch_of(target[row : row + 1])) for row in (0, 1)]
    found = task.score(whole if parts == 1 else cut)
    truth, answer = target.numpy(), given_.numpy()
    known = truth >= 0
    iou, recall, edges = [], [], []
    reach = max(1, round(0.02 * math.hypot(7, 6)))
    for kind in range(4):
        both = int(((truth == kind) & (answer == kind) & known).sum())
        either = int((((truth == kind) | (answer == kind)) & known).sum())
        if either:
            iou.append(both / either)
            assert found[f"iou/{'abcd'[kind]}"] == pytest.approx(both / either)
        else:
            assert f"iou/{'abcd'[kind]}" not in found
        if (truth == kind).any():
            recall.append(both / int((truth == kind).sum()))
        one, other = (near(np.where(known, side, -1) == kind, reach) for side in (answer, truth))
        if (one | other).any():
            edges.append((one & other).sum() / (one | other).sum())
    assert found["miou"] == pytest.approx(np.mean(iou))
    assert found["mean_accuracy"] == pytest.approx(np.mean(recall))
    assert found["boundary_iou"] == pytest.approx(np.mean(edges))
    assert found["pixel_accuracy"] == pytest.approx(((truth == answer) & known).sum() / known.sum())
    assert found["loss"] == pytest.approx(by_loops(scores, target, 0.0, (1.0,) * 4))
    json.dumps(found)


def near(masks: np.ndarray[Any, Any], reach: int) -> np.ndarray[Any, Any]:
    """Pixels of masks `[B, H, W]` with a pixel outside within so many rows and columns."""
    found = np.zeros_like(masks)
    for b, y, x in np.argwhere(masks):
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                row, column = y + down, x + right
                inside = 0 <= row < masks.shape[1] and 0 <= column < masks.shape[2]
                found[b, y, x] |= not inside or not masks[b, row, column]
    return found


def test_a_perfect_answer_scores_one_everywhere() -> None:
    target = drawn(0, 2, 12, 9)
    found = Segmentation(3).score([(100 * answered(target, 3), batch_of(target))])
    for word in ("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou", "iou/0", "iou/2"):
        assert found[word] == 1.0
    assert "boundary_iou" not in Segmentation(3, boundary=0).score([(answered(target, 3), batch_of(target))])


def test_padding_moves_no_boundary() -> None:
    coarse = drawn(0, 1, 3, 3), drawn(1, 1, 3, 3, ignored=False)
    target, given_ = (one.repeat_interleave(20, 1).repeat_interleave(20, 2) for one in coarse)
    none = torch.zeros(0)
    frame = Frame((200, 200), torch.tensor([[60, 60]]), none.view(0, 4), none.long())
    room = (0, 140, 0, 140)
    padded = replace(batch_of(F.pad(target, room, value=-1)), frame=frame)
    one = Segmentation(3).score([(answered(given_, 3), batch_of(target))])
    other = Segmentation(3).score([(answered(F.pad(given_, room), 3), padded)])
    assert other["boundary_iou"] == pytest.approx(one["boundary_iou"])
    without = Segmentation(3).score([(answered(F.pad(given_, room), 3), replace(padded, frame=None))])
    assert without["boundary_iou"] != pytest.approx(one["boundary_iou"])  # the rims are those of a larger image


def test_the_boundary_score_sees_what_the_region_score_hardly_does() -> None:
    target = torch.zeros(1, 100, 100, dtype=torch.long)
    target[:, 20:80, 20:80] = 1
    answer = torch.zeros_like(target)
    answer[:, 22:82, 20:80] = 1
    both, either = boundary_counts(answer, target, 2, 0.01)
    found = Segmentation(2, boundary=0.01).score([(answered(answer, 2), batch_of(target))])
    assert found["miou"] > 0.9
    assert found["boundary_iou"] == pytest.approx((both / either).mean().item())
    assert found["boundary_iou"] < 0.75


def test_a_rim_is_the_same_from_one_side_after_the_other() -> None:
    masks = torch.rand(3, 11, 8, generator=torch.Generator().manual_seed(0)) < 0.9
    for width in (1, 2, 3):
        assert np.array_equal(rim(masks, width).numpy(), near(masks.numpy(), width))


def test_nothing_to_score_is_said() -> None:
    with pytest.raises(UserError, match="no labelled pixel"):
        Segmentation(3).score([(torch.zeros(1, 3, 2, 2), batch_of(torch.full((1, 2, 2), -1)))])


# windows, sizes, mirrors


class Pointwise(nn.Module):
    """Sees one pixel at a time: whatever the windows, its answers are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls.append(tuple(pixels.shape[2:]))
        found: Tensor = self.conv(pixels)
        return found


@pytest.mark.parametrize(("window", "stride"), [(4, None), ((4, 6), (3, 5)), (5, 2), (64, None)])
def test_windows_cover_every_pixel(window: Any, stride: Any) -> None:
    module, pixels = Pointwise(), torch.rand(2, 3, 9, 13)
    task = Segmentation(4, window=window, stride=stride)
    found = task.answer(Model(module), Batch.of(pixels, torch.zeros(2, 9, 13, dtype=torch.long)))
    torch.testing.assert_close(found, module.conv(pixels).log_softmax(1))
    side = (window, window) if isinstance(window, int) else window
    assert all(height <= side[0] and width <= side[1] for height, width in module.calls[:-1])


def test_the_last_window_ends_where_the_image_does() -> None:
    found = list(windows((10, 4), (4, 4), (3, 3)))
    assert [(rows.start, rows.stop) for rows, _ in found] == [(0, 4), (3, 7), (6, 10)]
    assert len(list(windows((10, 10), (4, 4)))) == 9
    assert list(windows((3, 3), (4, 4))) == [(slice(0, 3), slice(0, 3))]


def test_mirrors_and_sizes_are_averaged_as_probabilities() -> None:
    module, pixels = nn.Conv2d(3, 4, 3, padding=1), torch.rand(1, 3, 8, 8)
    batch = Batch.of(pixels, torch.zeros(1, 8, 8, dtype=torch.long))
    found = Segmentation(4, flip=True, scales=(1.0, 0.5)).answer(Model(module), batch)
    small = F.interpolate(pixels, (4, 4), mode="bilinear", antialias=True)
    answers = [
        resized(module(one).flip(3) if mirrored else module(one), (8, 8))
        for one, mirrored in ((pixels, False), (pixels.flip(3), True), (small, False), (small.flip(3), True))
    ]
    torch.testing.assert_close(found, torch.stack([one.softmax(1) for one in answers]).mean(0).log())


def test_without_these_options_an_image_is_seen_once() -> None:
    module = Pointwise()
    Segmentation(4).answer(Model(module), Batch.of(torch.zeros(1, 3, 9, 9), torch.zeros(1, 9, 9, dtype=torch.long)))
    assert module.calls == [(9, 9)]


# pictures


def test_pictures_have_the_size_on_disk_without_padding() -> None:
    target = torch.tensor([[[0, 1, -1, -1], [2, 2, -1, -1], [-1, -1, -1, -1]]])
    batch = Batch.of(
        torch.zeros(1, 3, 3, 4),
        target,
        labelled=target >= 0,
        frame=Frame((3, 4), torch.tensor([[2, 2]]), torch.zeros(0, 4), torch.zeros(0).long()),
        extra={"original_size": torch.tensor([[4, 4]])},
    )
    task = Segmentation(3, class_names=("sky", "tree", "road"))
    (answer,), (truth,) = task.pictures(answered(target, 3).float(), batch), task.truths(batch)
    assert isinstance(truth, ClassMap)
    assert truth.classes.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]]
    assert isinstance(answer, ClassMap)
    assert answer.classes.shape == (4, 4)
    assert truth.plain() == {"size": [4, 4], "classes": {"road": 0.5, "sky": 0.25, "tree": 0.25}}
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    painted = truth.draw(image)
    assert painted.dtype == torch.uint8
    assert painted.shape == (3, 4, 4)
    assert len(painted.flatten(1).T.unique(dim=0)) == 3
    assert not image.any()


def test_what_is_ignored_stays_as_it_is_in_a_picture() -> None:
    image = torch.full((3, 2, 2), 200, dtype=torch.uint8)
    painted = ClassMap(torch.tensor([[0, -1], [1, -1]]), ("a", "b")).draw(image)
    assert (painted[:, :, 1] == 200).all()
    assert (painted[:, :, 0] != 200).any()


def test_colours_are_told_apart() -> None:
    colours = palette(20).double()
    apart = torch.cdist(colours, colours) + 1e6 * torch.eye(20)
    assert apart.min() > 20
    assert torch.equal(palette(5), palette(20)[:5])
