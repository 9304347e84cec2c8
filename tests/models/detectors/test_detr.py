# SPDX-License-Identifier: Apache-2.0
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detector_case import CLASSES, SIDE, framed, pictures
from models.detectors.tiny_detr import KINDS, made
from tutelage.core.error import UserError
from tutelage.core.tap import Recorder
from tutelage.models.detectors.detr import _Ordered
from tutelage.models.load import load
from tutelage.tasks.detection import Detection


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "detr"])  # it is table-transformer's twin
def test_a_detector_of_transformers_learns_and_finds(kind: str) -> None:
    model = made(kind)
    batch = framed(*pictures(2))
    task = Detection(CLASSES)
    model.module.train()
    losses = task.loss(task.call(model, batch), batch)
    losses["matching"].backward()
    assert losses["matching"].isfinite()
    model.module.eval()
    with torch.no_grad():
        answers = task.call(model, batch)
    for one in answers.detections():
        assert one["boxes"].shape[1] == 4
        assert one["labels"].max() < CLASSES
        assert bool((one["scores"].diff() <= 0).all())
        assert bool(((one["boxes"] >= 0) & (one["boxes"] <= SIDE)).all())
    with pytest.raises(UserError, match="given its targets when it is called"):
        answers.losses(batch.target)


@pytest.mark.parametrize("kind", list(KINDS))
def test_images_that_are_not_annotated_have_no_part_in_the_loss(kind: str) -> None:
    still = {"label_noise_ratio": 0.0, "box_noise_scale": 0.0} if kind in ("rt_detr", "d_fine") else {}
    model = made(kind, **still)
    pixels, targets = pictures(4)
    model.module.eval()  # one image does not see another
    if still:  # queries that are to restore boxes
        model.module.net.model.training = model.module.net.model.decoder.training = True
    batch, shown = framed(pixels, targets), [True, False, True, False]
    hidden = [
        one if known else {**one, "boxes": one["boxes"][:0], "labels": one["labels"][:0]}
        for one, known in zip(targets, shown, strict=True)
    ]
    some = replace(batch, target=hidden, labelled=torch.tensor(shown), extra={"annotated": shown})
    task = Detection(CLASSES)
    losses = []
    seen = pixels.clone().requires_grad_()
    for one in (framed(pixels[[0, 2]], [targets[0], targets[2]]), replace(some, inputs=seen)):
        torch.manual_seed(0)
        losses.append(task.loss(task.call(model, one), one)["matching"])
    torch.testing.assert_close(losses[1], losses[0])
    losses[1].backward()
    assert seen.grad is not None
    assert seen.grad.abs().amax((1, 2, 3)).gt(0).tolist() == shown
    assert all(part.grad is None or part.grad.isfinite().all() for part in model.module.parameters())
    none = replace(
        some,
        target=[{**one, "boxes": one["boxes"][:0], "labels": one["labels"][:0]} for one in hidden],
        extra={"annotated": [False] * 4},
    )
    assert task.loss(task.call(model, none), none)["matching"] == 0


def test_boxes_are_those_of_transformers() -> None:
    from transformers.models.rt_detr.image_processing_rt_detr import RTDetrImageProcessor

    model = made("rt_detr")
    model.module.eval()
    pixels, _ = pictures(2)
    with torch.no_grad():
        with _Ordered():  # all queries score alike
            said = model.module.net(pixels)
        found = model(pixels).detections()
    theirs = RTDetrImageProcessor().post_process_object_detection(said, threshold=0.0, target_sizes=[(SIDE, SIDE)] * 2)
    for one, other in zip(found, theirs, strict=True):
        count = len(other["scores"])
        torch.testing.assert_close(one["scores"][:count], other["scores"])
        assert torch.equal(one["labels"][:count], other["labels"])
        torch.testing.assert_close(one["boxes"][:count], other["boxes"].clamp(0, SIDE), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["table-transformer", "yolos"])
def test_a_last_class_for_nothing_is_no_class(kind: str) -> None:
    model = made(kind)
    model.module.eval()
    with torch.no_grad():
        answers = model(pictures(2)[0])
    boxes, scores, labels = answers.candidates_of()
    assert answers.logits.shape[2] == CLASSES + 1
    assert labels.max() < CLASSES
    shares = answers.logits.softmax(2)[..., :-1].flatten(1)
    torch.testing.assert_close(scores, shares.topk(boxes.shape[1])[0])


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine"])
def test_queries_with_noise_are_no_answers(kind: str) -> None:
    model = made(kind)
    batch = framed(*pictures(2))
    recorder = Recorder(model.module, model.roles)
    model.module.train()
    with recorder:
        answers: Any = Detection(CLASSES).call(model, batch)
    taken = recorder.release()
    assert answers.logits.shape[:2] == answers.shares.shape[:2] == (2, 20)
    assert [taken[f"hidden[{layer}]"].shape for layer in range(2)] == [(2, 20, 32)] * 2
    taken["hidden[1]"].sum().backward()
    assert any(part.grad is not None for part in model.module.net.model.decoder.parameters())
    recorder.close()
    copy.deepcopy(model.module)


def test_taps_are_what_the_roles_say() -> None:
    model = made("rt_detr")
    recorder = Recorder(model.module, model.roles)
    with recorder:
        model(pictures(2)[0])
    taken = recorder.release()
    assert [taken[f"fpn[{level}]"].shape[-1] for level in range(3)] == [8, 4, 2]
    assert taken["hidden[1]"].shape == (2, 20, 32)


def test_among_equal_queries_the_first_are_chosen() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.0, 2.0, 1.0] * 20])
    with _Ordered():
        for found in (torch.topk(scores, 41, dim=1), scores.topk(41), torch.topk(scores, k=41)):
            assert found[1][0].tolist() == [place for place in range(100) if place % 5 in (1, 3)] + [0]
            assert found.values[0, -1] == 1


def test_images_may_be_too_small() -> None:
    model = made("deformable_detr")
    model.module.eval()
    with pytest.raises(UserError, match=r"^images of 64 x 64 are too small for hf:deformable_detr, whose coarsest map"):
        model(pictures(1)[0])


def test_one_map_is_the_whole_pyramid() -> None:
    model = made("detr")
    recorder = Recorder(model.module, model.roles)
    with recorder:
        model(pictures(2)[0])
    assert recorder.release()["fpn[0]"].shape == (2, 32, 2, 2)


def test_weights_of_a_folder(tmp_path: Path) -> None:
    model = made("rt_detr")
    model.module.net.save_pretrained(tmp_path)
    again = load(f"hf:{tmp_path}", task="detection", num_classes=CLASSES)
    one, other = model.module.state_dict(), again.module.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(UserError, match=f"tells {CLASSES} classes apart, the data has 2"):
        load(f"hf:{tmp_path}", task="detection", num_classes=2)
    fresh: Any = load({"model": f"hf:{tmp_path}", "head": "fresh"}, task="detection", num_classes=2).module
    assert fresh.net.config.num_labels == 2


def test_what_cannot_be_had_is_named() -> None:
    with pytest.raises(UserError, match="did you mean rt_detr"):
        load("hf:rtdetr", task="detection", num_classes=2)
    with pytest.raises(UserError, match=r"no option 'd_modle'.*did you mean d_model"):
        load({"model": "hf:rt_detr", "d_modle": 3}, task="detection", num_classes=2)
