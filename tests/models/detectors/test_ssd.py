# SPDX-License-Identifier: Apache-2.0
import torch
from torchvision.models.detection.ssd import SSD as Theirs  # noqa: N811

from detector_case import CLASSES, SIDE, Maps, pictures, same, sharpened, taps_fire
from tutelage.models.detectors.ssd import SSD


def small(**options: object) -> SSD:
    given = {"backbone": "tiny4", "width": 8, "levels": (4, 8, 16), "extra": "none", "candidates": 5000}
    return SSD(CLASSES, **{**given, **options})  # type: ignore[arg-type]


def theirs(own: SSD) -> Theirs:
    return Theirs(
        Maps(own.backbone),
        own.anchor_generator,
        (SIDE, SIDE),
        CLASSES + 1,
        head=own.head,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        topk_candidates=5000,
    )


def test_losses_are_torchvisions() -> None:
    own = small()
    sharpened(own)
    pixels, targets = pictures()
    other = theirs(own)
    other.training = True
    expected = other(list(pixels), [{**one, "labels": one["labels"] + 1} for one in targets])
    found = own(pixels).losses(targets)
    torch.testing.assert_close(found["classes"], expected["classification"])
    torch.testing.assert_close(found["boxes"], expected["bbox_regression"])


def test_detections_are_torchvisions() -> None:
    own = small()
    sharpened(own)
    pixels, _ = pictures()
    expected = [{**one, "labels": one["labels"] - 1} for one in theirs(own).eval()(list(pixels))]
    assert same(own(pixels).detections(), expected) > 50


def test_pictures_without_boxes() -> None:
    none = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    losses = small()(pictures(2)[0]).losses(none)
    assert losses["boxes"].item() == 0 == losses["classes"].item()


def test_taps_are_what_the_roles_say() -> None:
    taken = taps_fire(small())
    assert taken["fpn[0]"].shape == (2, 8, 16, 16)
    assert taken["head.cls[2]"].shape == (2, 6 * (CLASSES + 1), 4, 4)
