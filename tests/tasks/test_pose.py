# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from tutelage.cli import app
from tutelage.core import Batch, Model
from tutelage.core.error import UserError
from tutelage.core.keypoints import BODY, WHOLEBODY
from tutelage.core.task import answer
from tutelage.data.load import load as load_data
from tutelage.functional.simcc import encode, unflip
from tutelage.models.load import load
from tutelage.run.distill import distill
from tutelage.run.pictures import draw, task_named
from tutelage.run.recipe import parse
from tutelage.tasks.pose import (
    Pose,
    Scored,
    Skeletons,
    _cut_out,
    average_precision,
    distinct,
    oks,
    person_score,
    to_openpose,
)

GOLDEN = ("core/dwpose_openpose_map",)


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    points, scores = to_openpose(torch.from_numpy(arrays["keypoints_133"]), torch.from_numpy(arrays["scores_133"]))
    return {"keypoints_134": points, "scores_134": scores}


def figures(number: int = 6) -> Any:
    given = {"source": "figures", "batch_size": number, "pose": {"number": number, "held_out": number}}
    return load_data({**given, "augment": "none"}, task="pose", seed=0)


def perfect(batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits that say what the labels say."""
    size = (batch.inputs.shape[2], batch.inputs.shape[3])
    points = batch.target[..., :2]
    x, y, _ = encode(points, torch.ones(points.shape[:2]), size, sigma=(2.0, 2.5))
    return x, y


# --- similarity and precision --------------------------------------------------------------------------------


def loop_oks(found: NDArray[Any], truth: NDArray[Any], area: float, sigmas: NDArray[Any]) -> float:
    """One person, one keypoint after the other, from the definition."""
    total, count = 0.0, 0
    for k in range(len(found)):
        if truth[k, 2] > 0:
            gap = (found[k, 0] - truth[k, 0]) ** 2 + (found[k, 1] - truth[k, 1]) ** 2
            total += float(np.exp(-gap / (2 * area * (2 * sigmas[k]) ** 2)))
            count += 1
    return total / count if count else 0.0


def people(count: int = 12, keypoints: int = 17, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(count, keypoints, 3, generator=generator, dtype=torch.float64) * 100
    truth[..., 2] = (truth[..., 2] > 30).double() * 2
    found = truth[..., :2] + 6 * torch.randn(count, keypoints, 2, generator=generator, dtype=torch.float64)
    return found, truth, 400 + 3000 * torch.rand(count, generator=generator, dtype=torch.float64)


def around(truth: Tensor) -> Tensor:
    """`[G, 4]` boxes around all points."""
    return torch.cat([truth[..., :2].amin(1), truth[..., :2].amax(1)], 1).float()


def test_similarity_equals_the_loop() -> None:
    found, truth, area = people()
    truth[3, :, 2] = 0
    sigmas = torch.tensor(BODY.sigmas, dtype=torch.float64)
    expected = [loop_oks(found[n].numpy(), truth[n].numpy(), float(area[n]), sigmas.numpy()) for n in range(12)]
    assert oks(found, truth, area, sigmas).tolist() == pytest.approx(expected, rel=1e-12)


def test_precision_agrees_with_similarity() -> None:
    found, truth, area = people(40)
    sigmas = torch.tensor(BODY.sigmas)
    images = torch.arange(40)
    scored = Scored(found.float(), torch.ones(40), images, truth.float(), around(truth), area.float(), images)
    near = oks(found, truth, area, sigmas.double())
    scores = average_precision(scored, sigmas)
    recalls = [(near >= threshold).double().mean().item() for threshold in np.arange(0.5, 1, 0.05)]
    assert scores["ar"] == pytest.approx(np.mean(recalls), abs=1e-6)
    exact = average_precision(replace(scored, points=truth[..., :2].float()), sigmas)
    assert exact == pytest.approx({"ap": 1.0, "ap50": 1.0, "ap75": 1.0, "ar": 1.0})


def test_parts_are_scored_by_themselves() -> None:
    data = figures()
    task = Pose(**{k: v for k, v in data.task_facts().items() if k in ("num_keypoints", "layout")})
    batch = next(data.validation.epoch(0))
    x, y = perfect(batch)
    hand = slice(*WHOLEBODY.parts["left_hand"])
    x[:, hand] = x[:, hand].roll(40, -1)  # twenty pixels off
    scores = task.score([((x, y), batch)])
    assert scores["face"] > 0.9
    assert scores["left_hand"] < 0.1
    assert scores["hand"] == pytest.approx((scores["left_hand"] + scores["right_hand"]) / 2)
    assert scores["whole"] == scores["ap"]
    assert all(np.isfinite(value) for value in scores.values())


def test_a_part_that_nobody_shows_scores_nothing_and_no_nan() -> None:
    found, truth, area = (part.float() for part in people(4))
    truth[..., 2] = 0
    scored = Scored(found, torch.ones(4), torch.arange(4), truth, around(truth), area, torch.arange(4))
    assert average_precision(scored, torch.tensor(BODY.sigmas)) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0, "ar": 0.0}
    assert oks(found, truth, area, torch.tensor(BODY.sigmas)).tolist() == [0.0] * 4


def test_an_answer_about_who_shows_nothing_is_neither_right_nor_wrong_near_the_box() -> None:
    """COCO's rule: within twice the box it does not count; farther away it is wrong."""
    _, truth, area = (part.float() for part in people(6))
    boxes, sigmas = around(truth), torch.tensor(BODY.sigmas)
    points, images = truth[..., :2].clone(), torch.arange(6)
    truth[:2] = 0  # nothing is known of the first two, as of a foot that nobody annotated
    scores = torch.tensor([0.9, 0.9, 0.8, 0.8, 0.8, 0.8])
    near = Scored(points, scores, images, truth, boxes, area, images)
    assert average_precision(near, sigmas)["ap"] == pytest.approx(1.0)
    far = replace(near, points=torch.cat([points[:2] + 1000, points[2:]]))
    assert average_precision(far, sigmas)["ap"] < 0.8


def test_who_is_cut_out_larger_is_told_apart_later() -> None:
    """Distances between two answers are over the crops' size, as published: crops hold more than their boxes."""
    batch = next(figures(4).validation.epoch(0))
    height, width = batch.inputs.shape[2:]
    expected = []
    for row in range(4):
        x1, y1, x2, y2 = (1.25 * v for v in batch.extra["box"][row].tolist())
        wide, tall = x2 - x1, y2 - y1
        expected.append(max(wide, tall * width / height) * max(tall, wide * height / width))
    assert _cut_out(batch).tolist() == pytest.approx(expected, rel=1e-4)


def test_of_two_answers_for_one_person_the_worse_goes() -> None:
    _, truth, area = (part.float() for part in people(3))
    twice = torch.cat([truth[..., :2], truth[:1, :, :2] + 0.1])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.7])
    scored = Scored(twice, scores, torch.tensor([4, 4, 5, 4]), truth, around(truth), area, torch.tensor([4, 4, 5]))
    sigmas = torch.tensor(BODY.sigmas)
    stay = distinct(scored, torch.full((4,), 2000.0), sigmas)
    assert stay.tolist() == [1, 3, 2]
    assert average_precision(scored.kept(stay), sigmas)["ap"] > 0.99
    assert average_precision(replace(scored, scores=torch.tensor([0.85, 0.7, 0.6, 0.9])), sigmas)["ap"] < 0.9


def test_models_are_scored_on_the_boxes_of_a_detector(tmp_path: Path) -> None:
    """With the annotated boxes as a detector's, scores are the same; without a person's box it is missed."""
    plain = figures(4).validation.samples
    rows = [
        {"image_id": f"figures[{4 + n}]", "bbox": [x1, y1, x2 - x1, y2 - y1], "score": 0.9}
        for n, (x1, y1, x2, y2) in enumerate(plain.people.boxes.tolist())
    ]

    def scored(kept: list[dict[str, Any]]) -> dict[str, float]:
        (tmp_path / "boxes.json").write_text(json.dumps(kept))
        pose = {"number": 4, "held_out": 4, "boxes": str(tmp_path / "boxes.json")}
        given = {"source": "figures", "batch_size": 2, "augment": "none", "pose": pose}
        data = load_data(given, task="pose", seed=0)
        answers = []
        for batch in data.validation.epoch(0):
            assert len(batch.extra["box_score"]) == len(batch)
            names = [plain.people.image_ids.tolist().index(one) for one in batch.extra["image_id"].tolist()]
            truth = plain.people.points[names]
            matrix = batch.extra["matrix"]
            inside = torch.linalg.solve(matrix[:, None, :, :2], (truth[..., :2] - matrix[:, None, :, 2])[..., None])
            shown = replace(batch, target=torch.cat([inside[..., 0], truth[..., 2:]], -1))
            answers.append((perfect(shown), batch))
        return Pose(133).score(answers)

    whole = scored(rows)
    assert "loss" not in whole
    assert whole["ap"] > 0.9
    assert scored(rows[:2])["ar"] == pytest.approx(0.5, abs=0.05)
    with pytest.raises(UserError, match=r"has no box with a score of 0\.3 for the validation images"):
        scored([])


def test_a_detector_is_not_blamed_for_crowds_but_for_people_who_are_not_there(tmp_path: Path) -> None:
    """As COCO's evaluation of a whole split: crowds and people without keypoints do not count, empty images do."""
    draw = np.random.default_rng(0)
    points = [[v for x, y in draw.integers(5, 45, (17, 2)).tolist() for v in (x, y, 2)] for _ in range(2)]
    images = [{"id": n, "file_name": f"{n}.png", "height": 60, "width": 60} for n in (1, 2, 3)]
    for one in images:
        Image.new("RGB", (60, 60)).save(tmp_path / str(one["file_name"]))
    box = [4, 4, 44, 44]
    rows = [
        {"id": 1, "image_id": 1, "bbox": box, "area": 900, "keypoints": points[0]},
        {"id": 2, "image_id": 2, "bbox": box, "area": 900, "keypoints": [0] * 51},
        {"id": 3, "image_id": 1, "bbox": box, "area": 900, "keypoints": [0] * 51, "iscrowd": 1},
    ]
    category = {"id": 1, "name": "person", "keypoints": list(BODY.names), "skeleton": []}
    for split in ("train", "val"):
        shown = [*rows, {**rows[0], "id": 4}] if split == "train" else rows
        table = {"images": images, "annotations": shown, "categories": [category]}
        (tmp_path / f"person_keypoints_{split}.json").write_text(json.dumps(table))

    def ap(*found: tuple[int, float]) -> float:
        """Of people found in these images with these scores: the first where he is, the others moved a little."""
        boxes = [{"image_id": n, "bbox": box, "score": score} for n, score in found]
        (tmp_path / "boxes.json").write_text(json.dumps(boxes))
        given = {"source": f"coco:{tmp_path}", "image_size": [64, 48], "batch_size": 2}
        data = load_data({**given, "pose": {"boxes": str(tmp_path / "boxes.json")}}, task="pose")
        answers = []
        for batch in data.validation.epoch(0):
            moved = (batch.index > 0)[:, None, None] * 9.0
            places = torch.tensor(points[0]).view(1, 17, 3)[..., :2] + moved
            matrix = batch.extra["matrix"]
            inside = torch.linalg.solve(matrix[:, None, :, :2], (places - matrix[:, None, :, 2])[..., None])[..., 0]
            x, y, _ = encode(inside, torch.ones(inside.shape[:2]), (64, 48), sigma=(2.0, 2.5))
            answers.append(((x, y), batch))
        return Pose(17).score(answers)["ap"]

    assert ap((1, 0.5)) > 0.8
    assert ap((1, 0.5), (1, 0.9), (2, 0.9)) == ap((1, 0.5)), "in the crowd, and on who shows nothing"
    assert ap((1, 0.5), (3, 0.9)) < 0.6 * ap((1, 0.5)), "where nobody is"


# --- loss ----------------------------------------------------------------------------------------------------


def test_the_loss_is_a_mean_over_annotated_people_times_the_published_batch() -> None:
    batch = next(figures().train.epoch(0))
    x, y = (torch.randn(one.shape) for one in perfect(batch))
    task = Pose(133)
    whole = task.loss((x, y), batch)
    each = torch.stack(
        [
            task.loss(
                (x[n : n + 1], y[n : n + 1]),
                replace(
                    batch,
                    inputs=batch.inputs[n : n + 1],
                    target=batch.target[n : n + 1],
                    labelled=batch.labelled[n : n + 1],
                ),
            )
            for n in range(len(batch))
        ]
    )
    assert whole.item() == pytest.approx(each.mean().item(), rel=1e-5)
    assert Pose(133, batch=32).loss((x, y), batch).item() == pytest.approx(whole.item() / 2, rel=1e-6)
    half = replace(batch, labelled=torch.arange(len(batch)) < 3)
    assert task.loss((x, y), half).item() == pytest.approx(each[:3].mean().item(), rel=1e-5)


def test_nobody_annotated_is_a_connected_zero() -> None:
    batch = next(figures().train.epoch(0))
    x, y = (torch.randn(one.shape, requires_grad=True) for one in perfect(batch))
    loss = Pose(133).loss((x, y), replace(batch, labelled=torch.zeros(len(batch), dtype=torch.bool)))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("size", [((256, 192), (4.9, 5.66)), ((384, 288), (6.0, 6.93))])
def test_the_width_of_labels_is_the_published_one(size: Any) -> None:
    assert Pose(17)._sigma(size[0]) == size[1]


# --- answers -------------------------------------------------------------------------------------------------


def test_the_mirrored_answer_is_averaged() -> None:
    data = figures(2)
    model = load({"model": "tutelage:rtmpose_t", "widen": 0.125, "hidden": 32}, **data.model_facts(), seed=0)
    model.module.eval()
    batch = next(data.validation.epoch(0))
    task = Pose(133)
    with torch.no_grad():
        plain, mirrored = model(batch.inputs), model(batch.inputs.flip(3))
        both = answer(task, model, batch)
    back = unflip(mirrored[0], mirrored[1], torch.tensor(WHOLEBODY.swap))
    assert torch.equal(both[0], (plain[0] + back[0]) / 2)
    assert torch.equal(answer(Pose(133, flip=False), model, batch)[0], plain[0])


@pytest.mark.parametrize("dark", [False, True])
def test_points_come_back_in_the_pixels_of_the_image(dark: bool) -> None:
    data = figures()
    batch = next(data.validation.epoch(0))
    task = Pose(133, dark=dark, sigma=(2.0, 2.5))
    points, scores = task.points(perfect(batch), batch)
    scale = torch.linalg.det(batch.extra["matrix"][:, :, :2]).abs().sqrt().max()
    shown = batch.extra["truth"][..., 2] > 0
    gap = torch.linalg.vector_norm(points - batch.extra["truth"][..., :2], dim=-1)
    assert gap[shown & (scores > 0.99)].max() < 0.4 * scale


def test_people_of_one_image_are_drawn_together() -> None:
    batch = next(figures(4).validation.epoch(0))
    joined = replace(batch, index=batch.index[:2], extra={**batch.extra, "owner": torch.tensor([0, 0, 1, 1])})
    found = Pose(133).pictures(perfect(batch), joined)
    assert len(found) == 2
    assert len(found[0].plain()["people"]) == 2
    row = json.loads(json.dumps(found[0].plain()["people"][0]))
    assert len(row["keypoints"]) == 3 * 133
    assert set(row) == {"category_id", "keypoints", "score", "bbox"}


def test_a_skeleton_changes_the_picture_where_it_is() -> None:
    points = torch.full((1, 17, 2), 10.0)
    points[0, 5], points[0, 7] = torch.tensor([10.0, 30.0]), torch.tensor([50.0, 30.0])
    scores = torch.zeros(1, 17)
    scores[0, [5, 7]] = 0.9
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    drawn = Skeletons(points, scores, torch.zeros(1, 4), BODY.links).draw(image)
    assert not image.any()
    assert drawn[:, 30, 30].any(), "the line from shoulder to elbow"
    assert not drawn[:, :20].any(), "points that score low are not shown"


def test_openpose_has_a_neck_between_the_shoulders() -> None:
    points, scores = torch.rand(2, 17, 2), torch.tensor([[0.9] * 17, [0.9] * 6 + [0.1] * 11])
    found, shown = to_openpose(points, scores)
    assert torch.allclose(found[:, 1], (points[:, 5] + points[:, 6]) / 2)
    assert shown[:, 1].tolist() == [1.0, 0.0]
    batch = next(figures(2).validation.epoch(0))
    row = Pose(133, openpose=True).pictures(perfect(batch), batch)[0].plain()["people"][0]
    assert len(row["keypoints"]) == 3 * 134
    assert person_score(torch.tensor([[0.1, 0.4, 0.6]])).tolist() == pytest.approx([0.5])


# --- what a user can get wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0}, "beta must be > 0"),
        ({"layout": "bodyy"}, "did you mean body"),
        ({"num_keypoints": 5, "layout": "body"}, "the layout has 17 keypoints, and num_keypoints is 5"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Pose(**options)


def test_models_that_do_not_fit_are_named() -> None:
    batch = next(figures(2).validation.epoch(0))
    x, y = perfect(batch)
    with pytest.raises(UserError, match="the model has 17 keypoints, the data 133"):
        Pose(133).loss((x[:, :17], y[:, :17]), batch)
    with pytest.raises(UserError, match=r"crops of 96 x 64 with 133 keypoints ask for \[\[133, 128\], \[133, 192\]\]"):
        Pose(133).loss((x[..., :9], y), batch)
    with pytest.raises(UserError, match="is it a pose model"):
        Pose(133).loss(x, batch)
    with pytest.raises(UserError, match="nobody is annotated"):
        Pose(133).score([((x, y), replace(batch, labelled=torch.zeros(2, dtype=torch.bool)))])


def test_a_model_of_ones_own_is_called() -> None:
    class Constant(nn.Module):
        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ones(len(pixels), 3, 8), torch.ones(len(pixels), 3, 8)

    batch = Batch.of(torch.zeros(2, 3, 4, 4))
    assert Pose().call(Model(Constant()), batch)[0].shape == (2, 3, 8)
    assert answer(Pose(), Model(Constant()), batch)[1].shape == (2, 3, 8)


def test_drawings_and_json_of_files(tmp_path: Path) -> None:
    recipe = parse(
        {
            "task": "pose",
            "data": {"source": "figures", "batch_size": 4, "pose": {"number": 8, "held_out": 4}},
            "student": {"model": "tutelage:rtmpose_t", "widen": 0.125, "hidden": 32, "s": 16},
            "train": {"steps": 1},
        }
    )
    distill(recipe, tmp_path / "run", quiet=True)
    Image.new("RGB", (80, 60), (90, 90, 90)).save(tmp_path / "one.png")
    section = task_named(str(tmp_path / "run"), None)
    assert section is not None
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{"image_id": "one", "bbox": [5, 5, 20, 40], "score": 0.9}] * 2))
    found = draw(
        str(tmp_path / "run"), [tmp_path / "one.png"], task=section, out=tmp_path / "out", options={"boxes": str(boxes)}
    )
    people = found.answers[str(tmp_path / "one.png")]["people"]
    assert len(people) == 2
    assert len(people[0]["keypoints"]) == 399
    assert (tmp_path / "out" / "one.png").is_file()
    flags = ["--boxes", str(boxes), "--openpose", "--out", str(tmp_path / "again")]
    asked = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), str(tmp_path / "one.png"), *flags])
    assert asked.exit_code == 0, asked.output
    assert len(json.loads((tmp_path / "again" / "coco.json").read_text())[0]["keypoints"]) == 3 * 134
    rows = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [row["image_id"] for row in rows] == ["one", "one"]
    assert rows[0]["keypoints"] == people[0]["keypoints"]


def test_a_few_figures_are_learned_by_heart() -> None:
    given = {"source": "figures", "image_size": [64, 48], "batch_size": 6, "augment": "none"}
    data = load_data({**given, "pose": {"number": 6, "held_out": 2}}, task="pose", seed=0)
    spec = {"model": "tutelage:rtmpose_t", "widen": 0.125, "stages": 3, "hidden": 64, "s": 32}
    model = load(spec, **data.model_facts(), seed=0)
    task, batch = Pose(133, flip=False), next(data.train.epoch(0))
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    model.module.train()
    losses = []
    for _ in range(60):
        loss = task.loss(model(batch.inputs), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        scores = task.score([(model(batch.inputs), batch)])
    assert scores["ap50"] > 0.7
    assert scores["body"] > 0.7


def test_runs_are_compared_by_the_score_that_is_asked_for() -> None:
    assert (Pose(17).headline, Pose(133, headline="body").headline) == ("ap", "body")
    with pytest.raises(UserError, match="headline: these keypoints have no score 'bdy'; did you mean body"):
        Pose(133, headline="bdy")
    with pytest.raises(UserError, match="headline: these keypoints have no score 'face'; valid: ap"):
        Pose(17, headline="face")
