# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.data.load import Spec, load
from tutelage.data.samples import Dense
from tutelage.data.scenes import Scene
from tutelage.data.scenes import scenes as drawn_scenes
from tutelage.data.segmentation import Changes, ClassMaps, Record, changed, images, read, resized
from tutelage.models.load import load as build
from tutelage.tasks.segmentation import Segmentation

SCENES: dict[str, Any] = {"scenes": [6, 3], "side": 48}


def scenes(**words: Any) -> dict[str, ClassMaps]:
    return read("scenes", "", Spec("scenes", segmentation=SCENES, **words))


def alike(height: int = 12, width: int = 10) -> Record:
    """An image whose first channel is ten times the class of the pixel."""
    classes = torch.arange(height * width).view(height, width) % 7
    image = torch.stack([10 * classes, torch.zeros_like(classes), torch.full_like(classes, 50)]).to(torch.uint8)
    return Record(image, classes, (height, width))


def agree(record: Record) -> bool:
    """Whether image and class map still lie on each other; padding is black and ignored."""
    inside = record.classes >= 0
    return bool(
        (record.image[0][inside] == 10 * record.classes[inside]).all() and (record.image[:, ~inside] == 0).all()
    )


# what a record becomes


def test_geometry_moves_image_and_class_map_together() -> None:
    changes = Changes(crop=(8, 14), flip=0.5)
    seen = [changed(alike(), changes, key) for key in range(40)]
    assert all(agree(one) and one.image.shape == (3, 8, 14) for one in seen)
    assert len({tuple(one.classes.flatten().tolist()) for one in seen}) > 6
    mirrored = sum(bool((one.classes[:, 0] < 0).any() and (one.classes[:, -1] >= 0).all()) for one in seen)
    assert 8 < mirrored < 32


def test_a_change_is_a_function_of_its_key() -> None:
    changes = Changes((0.5, 2.0), (9, 9), 0.75, 0.5, 0.4)
    state = torch.get_rng_state()
    one, same, other = (changed(alike(), changes, key) for key in (5, 5, 6))
    assert torch.equal(one.image, same.image)
    assert torch.equal(one.classes, same.classes)
    assert not torch.equal(one.image, other.image)
    assert torch.equal(state, torch.get_rng_state())


def test_sizes_are_drawn_between_both_ends() -> None:
    sides = [changed(alike(20, 10), Changes(scale=(0.5, 2.0)), key).classes.shape for key in range(60)]
    assert all(10 <= height <= 40 and abs(height - 2 * width) <= 2 for height, width in sides)
    assert min(height for height, _ in sides) < 13
    assert max(height for height, _ in sides) > 36


def test_no_class_is_made_up_by_a_change_of_size() -> None:
    record = resized(replace(alike(), classes=torch.tensor([[0, 6], [6, -1]])), (9, 7))
    assert set(record.classes.flatten().tolist()) == {0, 6, -1}


def test_a_crop_avoids_a_class_that_covers_it() -> None:
    classes = torch.zeros(20, 20, dtype=torch.long)
    classes[:, 10:] = torch.arange(10)
    record = Record(torch.zeros(3, 20, 20, dtype=torch.uint8), classes, (20, 20))

    def covered(most: float) -> int:
        seen = [changed(record, Changes(crop=(6, 6), most=most), key).classes for key in range(40)]
        return sum(int(one.flatten().bincount().max()) > 27 for one in seen)

    assert covered(1.0) > 8
    assert covered(0.75) == 0


def test_colours_change_and_classes_do_not() -> None:
    record = alike()
    seen = changed(record, Changes(color=0.4), 3)
    assert torch.equal(seen.classes, record.classes)
    assert not torch.equal(seen.image, record.image)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, Changes(crop=(4, 4))),
        ("none", Changes()),
        ([], Changes()),
        (["flip"], Changes(flip=0.5)),
        (["scale", "crop", "color"], Changes((0.5, 2.0), (4, 4), 1.0, 0.0, 0.4)),
        ({"crop": 8, "flip": 0.3}, Changes(crop=(8, 8), flip=0.3)),
        ({"scale": [0.8, 1.2], "crop": [4, 6], "flip": True}, Changes((0.8, 1.2), (4, 6), 1.0, 0.5)),
    ],
)
def test_words_of_augment(given: Any, expected: Changes) -> None:
    assert Changes.parse(given, Changes(crop=(4, 4))) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("flop", "data.augment.flop is not known; did you mean flip?"),
        ({"crp": 4}, "data.augment.crp is not known; did you mean crop?"),
        ({"scale": 2}, "data.augment.scale is [smallest, largest], both > 0, not 2"),
        ({"scale": [2, 1]}, "data.augment.scale is [smallest, largest]"),
        ({"crop": "large"}, "data.augment.crop is a number of pixels, or [height, width], not 'large'"),
        ({"flip": 2}, "data.augment.flip is a number in [0, 1], not 2"),
        (7, "data.augment: expected words of scale, crop, most, flip, color, hsv, blur, median_blur, not 7"),
    ],
)
def test_words_that_make_no_sense(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        Changes.parse(given, Changes())


# batches


def test_a_batch_is_padded_once_and_padding_is_ignored() -> None:
    samples = scenes()["train"]
    small, large = alike(4, 6), alike(6, 5)
    batch = replace(samples, multiple=4).collate([small, large], torch.tensor([3, 1]), torch.tensor([7, 8]))
    assert batch.inputs.shape == (2, 3, 8, 8)
    assert batch.target.shape == (2, 8, 8)
    assert (batch.target[0, :4, :6] == small.classes).all()
    assert batch.labelled.sum() == 24 + 30
    assert (batch.target[~batch.labelled] == -1).all()
    assert (batch.inputs.movedim(1, -1)[~batch.labelled] == 0).all()
    assert batch.frame is not None
    assert batch.frame.size == (8, 8)
    assert batch.frame.image_size.tolist() == [[4, 6], [6, 5]]
    assert batch.extra["original_size"].tolist() == [[4, 6], [6, 5]]
    assert batch.index.tolist() == [3, 1]
    assert batch.inputs.max() <= 1
    assert batch.count("labelled") == 54


def test_loaders_of_scenes() -> None:
    spec = {"source": "scenes", "batch_size": 2, "segmentation": SCENES, "augment": {"crop": 32}}
    found = load(spec, task="segmentation", seed=1)
    assert isinstance(found.train.samples, Dense)
    assert found.class_names == ("ground", *map(str, range(10)))
    first, again = next(found.train.epoch(0)), next(load(spec, task="segmentation", seed=1).train.epoch(0))
    assert first.inputs.shape == (2, 3, 32, 32)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, next(found.train.epoch(1)).inputs)
    seen = [batch.inputs.shape for batch in found.validation.epoch(0)]
    assert seen == [(2, 3, 48, 48), (1, 3, 48, 48)]
    facts = found.model_facts()
    assert facts["task"] == "segmentation"
    assert facts["num_classes"] == 11
    assert facts["image_size"] == (32, 32)


def test_the_sample_of_a_dry_run_is_no_larger_than_what_is_learnt_from() -> None:
    spec: dict[str, Any] = {"source": "scenes", "batch_size": 2, "segmentation": SCENES}
    for augment, side in (({"crop": 32}, 32), (None, 48)):
        found = load({**spec, "augment": augment}, task="segmentation")
        one, again, single = (found.sample(size) for size in (2, 2, 1))
        assert one.inputs.shape == (2, 3, side, side)
        assert torch.equal(one.inputs, again.inputs)
        assert len(single) == 1


def test_workers_read_the_same_batches() -> None:
    spec = {"source": "scenes", "batch_size": 3, "segmentation": SCENES, "augment": {"crop": 32, "color": 0.3}}
    one, two = (load({**spec, "workers": workers}, task="segmentation") for workers in (0, 1))
    for here, there in zip(one.train.epoch(0), two.train.epoch(0), strict=True):
        assert torch.equal(here.inputs, there.inputs)
        assert torch.equal(here.target, there.target)


def test_few_labels_leave_class_maps_out() -> None:
    spec = {"source": "scenes", "labels": 2, "labelled_per_batch": 1, "batch_size": 3, "segmentation": SCENES}
    found = load(spec, task="segmentation")
    assert int((found.train.samples.targets >= 0).sum()) == 2
    batch = next(found.train.epoch(0))
    assert int(batch.labelled.flatten(1).any(1).sum()) == 1
    assert (batch.target[~batch.labelled] == -1).all()


def test_an_image_is_brought_to_size_and_its_own_is_remembered() -> None:
    samples = scenes(image_size=[32, 40])["validation"]
    seen = samples.seen(samples.read(0), 1, train=False)
    assert seen.image.shape == (3, 32, 40)
    assert seen.classes.shape == (32, 40)
    assert seen.original_size == (48, 48)


def test_images_of_which_nothing_is_known(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (7, 5)).save(file)
    found = images([file], Spec("images", image_size=8), ("x", "y"))
    record = found.read(0)
    assert record.image.shape == (3, 5, 7)
    assert (record.classes == -1).all()
    assert found.seen(record, 0, train=False).image.shape == (3, 8, 8)
    assert found.name(0) == str(file)


@pytest.mark.parametrize(
    ("sides", "size", "together"),
    [
        pytest.param((8, 8, 8, 8), None, [[0, 1, 2], [3]], id="one size"),
        pytest.param((8, 12, 8, 12, 8, 8), None, [[0, 2, 4], [5], [1, 3]], id="two sizes"),
        pytest.param((8, 12, 8, 12), 8, [[0, 1, 2], [3]], id="brought to one size"),
    ],
)
def test_images_of_several_sizes_are_scored_size_by_size(
    tmp_path: Path, sides: tuple[int, ...], size: int | None, together: list[list[int]]
) -> None:
    for split in ("train", "val"):
        for number, side in enumerate(sides):
            for kind, mode in (("images", "RGB"), ("masks", "L")):
                file = tmp_path / kind / split / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new(mode, (side, 8)).save(file)
    section = {"source": f"masks:{tmp_path}", "batch_size": 3, "image_size": size, "segmentation": {"classes": 2}}
    data = load(section, task="segmentation")
    assert [batch.index.tolist() for batch in data.validation.epoch()] == together
    assert len(data.validation) == len(together)
    for batch in data.validation.epoch():
        assert batch.frame is not None
        assert batch.frame.image_size.unique(dim=0).tolist() == [list(batch.frame.size)]


def test_scores_size_by_size_are_those_of_one_image_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for split in ("train", "val"):
        for number, side in enumerate((32, 48, 32, 32, 48)):
            for kind, mode, most in (("images", "RGB", 256), ("masks", "L", 3)):
                file = tmp_path / kind / split / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                shape = (40, side, 3) if mode == "RGB" else (40, side)
                Image.fromarray(torch.randint(0, most, shape, dtype=torch.uint8).numpy(), mode).save(file)
    section = {"source": f"masks:{tmp_path}", "segmentation": {"classes": 3}}
    network = build({"model": "tutelage:pspnet", "backbone": "tiny8", "width": 8}, num_classes=3, task="segmentation")
    network.module.eval()
    task = Segmentation(3)
    found = []
    for size in (1, 2):
        loader = load({**section, "batch_size": size}, task="segmentation").validation
        with torch.no_grad():
            found.append(task.score([(task.answer(network, batch), batch) for batch in loader.epoch()]))
        assert len(loader) == (5 if size == 1 else 3)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_an_image_that_cannot_be_read_is_scored_with_others_that_can(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, side in enumerate((8, 12, 8)):
            for kind, mode in (("images", "RGB"), ("masks", "L")):
                file = tmp_path / kind / split / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new(mode, (side, 8)).save(file)
    section = {"source": f"masks:{tmp_path}", "on_error": "skip", "segmentation": {"classes": 2}}
    loader = load(section, task="segmentation").validation
    (tmp_path / "images" / "val" / "2.png").write_bytes(b"no image")
    samples: Any = loader.samples
    assert [rows.tolist() for rows in samples.together(8)] == [[0, 2], [1]]
    assert [batch.index.tolist() for batch in loader.epoch()] == [[0], [1]]
    assert list(loader.skipped) == [str(tmp_path / "images" / "val" / "2.png")]


def table(size: tuple[int, int] = (4, 6)) -> Any:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"picture": datasets.Image(), "annotation": datasets.Image()})
    rows: dict[str, list[Any]] = {"picture": [], "annotation": []}
    for number in range(4):
        rows["picture"].append(Image.new("RGB", (6, 4), (number, 0, 0)))
        rows["annotation"].append(Image.new("L", size[::-1], number % 3))
    return datasets.Dataset.from_dict(rows, features=kinds)


def test_tables_of_hugging_face(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "set"))
    spec = Spec(f"hf:{tmp_path / 'set'}", segmentation={"classes": ["a", "b"], "ignore": [2]})
    found = read("hf", str(tmp_path / "set"), spec)["train"]
    assert len(found) == 4
    assert found.class_names == ("a", "b")
    values: list[Tensor] = [found.read(number).classes for number in range(4)]
    assert [one.unique().tolist() for one in values] == [[0], [1], [-1], [0]]
    assert found.read(1).image.shape == (3, 4, 6)
    with pytest.raises(UserError, match="say the names of the classes"):
        read("hf", str(tmp_path / "set"), replace(spec, segmentation={}))
    with pytest.raises(UserError, match=r"data.label_column: .* has no column 'mask'; valid: annotation, picture"):
        read("hf", str(tmp_path / "set"), replace(spec, label_column="mask", image_column="picture"))


def test_a_row_whose_mask_has_another_size_is_named(tmp_path: Path) -> None:
    table((3, 6)).save_to_disk(str(tmp_path / "set"))
    spec = Spec(f"hf:{tmp_path / 'set'}", segmentation={"classes": 3})
    with pytest.raises(UserError, match=r"4 masks of another size than their image \(first .*set/train\[0\]: its mask"):
        read("hf", str(tmp_path / "set"), spec)


# points instead of maps


def test_one_pixel_of_each_digit_keeps_its_class() -> None:
    whole = scenes()["train"]
    few = read("scenes", "", Spec("scenes", segmentation={**SCENES, "points": 7}))
    found = few["train"]
    for index in range(len(whole)):
        full, known = whole.read(index).classes, found.read(index).classes
        kept = known >= 0
        assert torch.equal(known[kept], full[kept])
        assert (known == 0).sum() == 7
        things = digits_of(index)
        assert (known > 0).sum() == len(things.masks)
        assert all((known[mask] >= 0).sum() == 1 for mask in things.masks)
        assert torch.equal(known, found.read(index).classes)
    assert (few["validation"].read(0).classes >= 0).all()


def digits_of(index: int) -> Scene:
    return drawn_scenes(SCENES["scenes"][0], SCENES["side"])[index]


def test_a_negative_number_of_points_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("data.segmentation.points counts pixels of the ground, not -1")):
        read("scenes", "", Spec("scenes", segmentation={"points": -1}))
