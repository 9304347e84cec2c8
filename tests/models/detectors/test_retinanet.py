# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torchvision.models.detection import RetinaNet as Theirs

from detector_case import CLASSES, SIDE, Maps, pictures, same, sharpened, taps_fire
from tutelage.core.error import UserError
from tutelage.models.detectors.retinanet import RetinaNet


def small(**options: object) -> RetinaNet:
    return RetinaNet(CLASSES, **{"backbone": "tiny4", "width": 8, "anchor": 2.0, **options})  # type: ignore[arg-type]


def theirs(own: RetinaNet) -> Theirs:
    return Theirs(
        Maps(own.backbone),
        CLASSES,
        anchor_generator=own.anchor_generator,
        head=own.head,
        min_size=SIDE,
        max_size=SIDE,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        detections_per_img=100,
    )


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_losses_are_torchvisions(box_loss: str) -> None:
    own = small(box_loss=box_loss)
    sharpened(own)
    own.head.regression_head._loss_type = box_loss
    pixels, targets = pictures()
    other = theirs(own)
    other.training = True
    expected = other(list(pixels), [dict(one) for one in targets])
    found = own(pixels).losses(targets)
    torch.testing.assert_close(found["classes"], expected["classification"])
    torch.testing.assert_close(found["boxes"], expected["bbox_regression"])


def test_detections_are_torchvisions() -> None:
    own = small()
    sharpened(own)
    pixels, _ = pictures()
    assert same(own(pixels).detections(), theirs(own).eval()(list(pixels))) > 50


def test_boxes_end_where_the_image_ends() -> None:
    own = small()
    sharpened(own)
    pixels, _ = pictures(2)
    size = torch.tensor([[64, 40], [32, 64]])
    for found, (height, width) in zip(own(pixels, size).detections(), size.tolist(), strict=True):
        assert found["boxes"][:, 0::2].max() <= width
        assert found["boxes"][:, 1::2].max() <= height


def test_pictures_without_boxes_and_some_rows() -> None:
    own = small()
    sharpened(own)
    pixels, targets = pictures()
    answers = own(pixels)
    none = answers.losses([{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 3)
    assert none["boxes"].item() == 0
    assert none["boxes"].requires_grad
    whole, part = answers.losses(targets), [answers.rows([row]).losses([targets[row]]) for row in range(3)]
    for name, loss in whole.items():
        torch.testing.assert_close(loss, torch.stack([one[name] for one in part]).mean())


def test_taps_are_what_the_roles_say() -> None:
    taken = taps_fire(small())
    assert [taken[f"fpn[{level}]"].shape[-1] for level in range(5)] == [8, 4, 2, 1, 1]
    assert taken["head.cls[1]"].shape == (2, 9 * CLASSES, 4, 4)
    assert taken["head.box[4]"].shape == (2, 36, 1, 1)


def test_options_that_make_no_sense_are_named() -> None:
    with pytest.raises(UserError, match="did you mean giou"):
        small(box_loss="gio")
    with pytest.raises(UserError, match="head_norm 'btch'"):
        small(head_norm="btch")
