# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as oracle

from tutelage.core.error import UserError
from tutelage.data.augment import (
    PRESETS,
    STEPS,
    Affine,
    CenterCrop,
    Erase,
    Flip,
    PadCrop,
    RandomResizedCrop,
    Resize,
    build,
    random_rectangles,
)
from tutelage.functional.noise import keys

EXAMPLES: dict[str, Any] = {"resize": 12, "center_crop": 10, "random_resized_crop": 9}


def images(count: int = 6, height: int = 16, width: int = 14, channels: int = 3, unit: bool = False) -> Tensor:
    found = torch.randint(0, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(0))
    return found / 255 if unit else found.to(torch.uint8)


def view(count: int = 6, key: int = 3) -> Tensor:
    return keys(key, torch.arange(count))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_row_depends_on_its_own_key_alone(name: str, unit: bool) -> None:
    step = build([{name: EXAMPLES[name]} if name in EXAMPLES else name], train=True)
    assert step is not None
    whole, batch = step(images(unit=unit), view()), images(unit=unit)
    assert whole.dtype == (torch.float32 if name == "affine" else batch.dtype)
    assert len(whole) == 6
    for row in range(6):
        assert torch.equal(step(batch[row : row + 1], view()[row : row + 1]), whole[row : row + 1])
    assert torch.equal(step(batch.flip(0), view().flip(0)), whole.flip(0))


@pytest.mark.parametrize("name", sorted(set(STEPS) - {"resize", "center_crop"}))
def test_other_keys_give_other_images(name: str) -> None:
    step = build([{name: EXAMPLES[name]} if name in EXAMPLES else name], train=True)
    assert step is not None
    assert not torch.equal(step(images(16), view(16)), step(images(16), view(16, key=4)))


@pytest.mark.parametrize("name", sorted(STEPS))
def test_an_empty_batch_and_the_process_generator_are_left_alone(name: str) -> None:
    step = build([{name: EXAMPLES[name]} if name in EXAMPLES else name], train=True)
    assert step is not None
    before = torch.get_rng_state()
    assert len(step(images(0), view(0))) == 0
    step(images(), view())
    assert torch.equal(before, torch.get_rng_state())


def test_flip_mirrors_about_half() -> None:
    batch, key = images(400, 4, 4), view(400)
    flipped = Flip()(batch, key)
    mirrored = (flipped == batch.flip(-1)).flatten(1).all(1)
    kept = (flipped == batch).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 160 < int(mirrored.sum()) < 240
    assert torch.equal(Flip(1.0)(batch, key), batch.flip(-1))
    assert torch.equal(Flip(0.0)(batch, key), batch)


def test_pad_crop_cuts_a_window_of_the_padded_image_at_every_place() -> None:
    batch, key = images(400, 5, 6), view(400)
    cut = PadCrop(2)(batch, key)
    padded = torch.nn.functional.pad(batch, (2, 2, 2, 2))
    windows = torch.stack([padded[:, :, y : y + 5, x : x + 6] for y in range(5) for x in range(5)])
    match = (windows == cut).flatten(2).all(2)
    assert match.any(0).all()
    counts = match.int().argmax(0).bincount(minlength=25)
    assert counts.min() > 3
    assert PadCrop(2, mode="reflect")(batch.float(), key).min() >= 0


def test_affine_without_a_change_is_the_identity() -> None:
    batch = images(4, 8, 8, unit=True)
    assert torch.allclose(Affine(degrees=0.0, translate=0.0)(batch, view(4)), batch, atol=1e-5)


def test_affine_rotates_at_most_its_degrees() -> None:
    one = torch.zeros(64, 1, 21, 21)
    one[:, :, 10, 15] = 1.0  # five pixels right of the middle: at most 20 degrees, it stays five away
    moved = Affine(degrees=20.0, translate=0.0)(one, view(64))
    y, x = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), indexing="ij")
    weight = moved[:, 0] / moved[:, 0].sum((1, 2), keepdim=True)
    angle = torch.atan2((weight * y).sum((1, 2)) - 10, (weight * x).sum((1, 2)) - 10).rad2deg()
    assert angle.abs().max() < 21
    assert angle.min() < -10
    assert angle.max() > 10


def test_affine_keeps_circles_round_in_wide_images() -> None:
    wide = torch.zeros(32, 1, 21, 41)
    wide[:, :, 10, 30] = 1.0  # ten pixels right of the middle
    moved = Affine(degrees=40.0, translate=0.0)(wide, view(32))
    y, x = torch.meshgrid(torch.arange(21.0), torch.arange(41.0), indexing="ij")
    weight = moved[:, 0] / moved[:, 0].sum((1, 2), keepdim=True)
    distance = torch.hypot((weight * y).sum((1, 2)) - 10, (weight * x).sum((1, 2)) - 20)
    assert (distance - 10).abs().max() < 0.5


def test_affine_moves_at_most_its_share() -> None:
    one = torch.zeros(64, 1, 20, 20)
    one[:, :, 10, 10] = 1.0
    moved = Affine(degrees=0.0, translate=0.2)(one, view(64))
    y = (moved[:, 0].sum(2) * torch.arange(20.0)).sum(1) / moved[:, 0].sum((1, 2))
    assert (y - 10).abs().max() < 4.01
    assert (y - 10).abs().max() > 3


def test_random_resized_crop_draws_areas_and_shapes_within_bounds() -> None:
    batch = images(500, 40, 30)
    top, left, height, width = random_rectangles(batch, view(500), (0.2, 0.6), (0.5, 2.0), fallback=True).T
    area, ratio = height * width / 1200, width / height
    assert (top >= 0).all()
    assert (top + height <= 40).all()
    assert (left + width <= 30).all()
    assert (area.min() > 0.18) & (area.max() < 0.62)
    assert (ratio.min() > 0.47) & (ratio.max() < 2.15)
    assert area.std() > 0.08


def test_random_resized_crop_is_a_resized_rectangle() -> None:
    batch, key = images(), view()
    found = RandomResizedCrop(8)(batch, key)
    rectangles = random_rectangles(batch, key, (0.08, 1.0), (3 / 4, 4 / 3), fallback=True).tolist()
    for row, (top, left, height, width) in enumerate(rectangles):
        expected = oracle.resized_crop(batch[row], top, left, height, width, [8, 8], antialias=True)
        assert torch.equal(found[row], expected)


def test_a_rectangle_that_never_fits_is_the_middle() -> None:
    tall = images(3, 40, 4)
    found = random_rectangles(tall, view(3), (0.9, 1.0), (3 / 4, 4 / 3), fallback=True)
    assert found.tolist() == [[17, 0, 5, 4]] * 3
    assert random_rectangles(tall, view(3), (0.9, 1.0), (1.0, 1.0), fallback=False).tolist() == [[0, 0, 0, 0]] * 3


def test_erase_paints_one_rectangle() -> None:
    batch = images(300, 16, 16)
    erased = Erase(probability=0.5, value=0.2)(batch, view(300))
    changed = (erased != batch).any(1)
    rows = changed.flatten(1).any(1)
    assert 110 < int(rows.sum()) < 190
    assert (erased[changed[:, None].expand_as(erased)] == 51).all()
    for row in rows.nonzero().flatten().tolist()[:20]:
        y, x = changed[row].nonzero().T
        box = erased[row, :, y.min() : y.max() + 1, x.min() : x.max() + 1]
        assert (box == 51).all()
        assert box[0].numel() / 256 < 0.40


def test_resize_and_center_crop() -> None:
    batch = images(2, 20, 10)
    assert Resize(5)(batch, view(2)).shape == (2, 3, 10, 5)
    assert Resize((4, 6))(batch, view(2)).shape == (2, 3, 4, 6)
    assert torch.equal(CenterCrop((4, 6))(batch, view(2)), batch[..., 8:12, 2:8])
    expected = "augment.center_crop: 12x12 does not fit into images of 20x10; resize first"
    with pytest.raises(UserError, match=f"^{expected}$"):
        CenterCrop(12)(batch, view(2))


@pytest.mark.parametrize("spec", [None, "none", [], {"evaluation": ["flip"]}])
def test_nothing_to_do_is_none(spec: Any) -> None:
    assert build(spec, train=True) is None


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_bring_images_to_the_size_in_training_only(preset: str) -> None:
    for height, width in ((20, 30), (40, 33)):
        batch = images(2, height, width)
        for train in (True, False):
            steps = build(preset, train=train, size=16)
            assert steps is not None
            assert steps(batch, view(2)).shape == (2, 3, 16, 16)
    plain = build(preset, train=False, size=16)
    assert plain is not None
    assert torch.equal(plain(batch, view(2)), plain(batch, view(2, key=8)))


def test_a_mapping_has_steps_for_evaluation() -> None:
    spec = {"train": "cifar", "evaluation": [{"resize": 18}, "center_crop"]}
    evaluation = build(spec, train=False, size=16)
    assert evaluation is not None
    assert [type(step).__name__ for step in evaluation.steps] == ["Resize", "CenterCrop"]
    train = build(spec, train=True)
    assert train is not None
    assert [type(step).__name__ for step in train.steps] == ["PadCrop", "Flip"]


def test_a_rectangular_size_is_filled() -> None:
    steps = build("none", train=True, size=(8, 12))
    assert steps is not None
    assert steps(images(1, 20, 20), view(1)).shape == (1, 3, 8, 12)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["filp"], "augment: no step 'filp'; did you mean flip?"),
        ("cifer", "augment: 'cifer' is neither a list of steps nor a preset; did you mean cifar?"),
        ([3], "augment: 3 is no step: write a name, or {name: options}"),
        ([{"pad_crop": {"paddin": 3}}], "augment.pad_crop.paddin is not known; did you mean padding?"),
        ([{"trivial_augment": 3}], "augment.trivial_augment takes no option"),
        (["center_crop"], "augment.center_crop needs a size: give it, or data.image_size"),
        ([{"auto_augment": "cifar"}], "augment.auto_augment: no policy 'cifar'; did you mean cifar10?"),
        (
            {"flip": 0.5},
            (
                "augment.flip is not known: a mapping has `train` and `evaluation`; steps are a list, "
                "[{pad_crop: 4}, flip]"
            ),
        ),
    ],
)
def test_what_is_wrong_is_said(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build(spec, train=True)
