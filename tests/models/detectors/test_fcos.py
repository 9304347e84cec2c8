# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torchvision.models.detection import FCOS as Theirs  # noqa: N811

from detector_case import CLASSES, SIDE, Maps, pictures, same, sharpened, taps_fire
from tutelage.core.error import UserError
from tutelage.models.detectors.fcos import FCOS


def small(**options: object) -> FCOS:
    return FCOS(CLASSES, **{"backbone": "tiny4", "width": 32, "levels": (4, 8), **options})  # type: ignore[arg-type]


def theirs(own: FCOS) -> Theirs:
    return Theirs(
        Maps(own.backbone),
        CLASSES,
        anchor_generator=own.anchor_generator,
        head=own.head,
        min_size=SIDE,
        max_size=SIDE,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )


def test_losses_are_torchvisions() -> None:
    own = small()
    sharpened(own)
    pixels, targets = pictures()
    other = theirs(own)
    other.training = True
    expected = other(list(pixels), [dict(one) for one in targets])
    found = own(pixels).losses(targets)
    assert found["centreness"].item() > 0
    for name, theirs_name in (
        ("classes", "classification"),
        ("boxes", "bbox_regression"),
        ("centreness", "bbox_ctrness"),
    ):
        torch.testing.assert_close(found[name], expected[theirs_name])


def test_detections_are_torchvisions() -> None:
    own = small()
    sharpened(own)
    pixels, _ = pictures()
    assert same(own(pixels).detections(), theirs(own).eval()(list(pixels))) > 50


def test_pictures_without_boxes() -> None:
    own = small()
    none = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    losses = own(pictures(2)[0]).losses(none)
    assert losses["boxes"].item() == 0 == losses["centreness"].item()
    sum(losses.values()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in own.parameters())


def test_taps_are_what_the_roles_say() -> None:
    taken = taps_fire(small())
    assert taken["head.cls[0]"].shape == (2, CLASSES, 16, 16)
    assert taken["head.box[1]"].shape == (2, 4, 8, 8)


def test_a_width_without_groups_is_named() -> None:
    with pytest.raises(UserError, match="multiple of 32"):
        small(width=8)
