# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector_case import CLASSES, SIDE, Maps, pictures, same, sharpened, taps_fire, unresized
from tutelage.core.error import UserError
from tutelage.models.detectors.faster_rcnn import FasterRCNN


def small(**options: object) -> FasterRCNN:
    given = {"backbone": "tiny4", "width": 8, "anchor": 4.0, "head_width": 16, "regions": 32, "proposed": 64}
    return FasterRCNN(CLASSES, **{**given, "proposals": (60, 40), **options})  # type: ignore[arg-type]


def theirs(own: FasterRCNN) -> GeneralizedRCNN:
    return GeneralizedRCNN(Maps(own.backbone), own.rpn, own.roi_heads, unresized())


@pytest.mark.parametrize(
    "options", [{}, {"masks": True}, {"masks": True, "box_head": "convolutions", "proposal_depth": 2}]
)
def test_losses_are_torchvisions(options: dict[str, object]) -> None:
    own = small(**options)
    sharpened(own)
    pixels, targets = pictures()
    other = theirs(own)
    for part in (other, own.rpn, own.roi_heads):  # batch norms stay as they are
        part.training = True
    torch.manual_seed(3)  # regions are drawn
    expected = other(list(pixels), [{**one, "labels": one["labels"] + 1} for one in targets])
    torch.manual_seed(3)
    found = own(pixels).losses(targets)
    names = {"objectness": "loss_objectness", "proposals": "loss_rpn_box_reg", "classes": "loss_classifier"}
    names |= {"boxes": "loss_box_reg"} | ({"masks": "loss_mask"} if options else {})
    assert found.keys() == names.keys()
    for name, theirs_name in names.items():
        torch.testing.assert_close(found[name], expected[theirs_name])


def test_detections_are_torchvisions() -> None:
    own = small(masks=True)
    sharpened(own)
    pixels, _ = pictures()
    found, expected = own(pixels).detections(), theirs(own).eval()(list(pixels))
    assert same(found, [{**one, "labels": one["labels"] - 1} for one in expected]) > 50
    for one, other in zip(found, expected, strict=True):
        assert one["masks"].shape == (len(one["scores"]), SIDE, SIDE)
        assert torch.equal(one["masks"], other["masks"][:, 0] > 0.5)


def test_a_forward_looks_at_no_region() -> None:
    own = small()
    looked: list[bool] = []
    own.roi_heads.box_head.register_forward_hook(lambda *_: looked.append(True))
    answers = own.eval()(pictures(2)[0])
    assert not looked
    answers.detections()
    assert looked


def test_data_without_masks_is_named() -> None:
    pixels, targets = pictures(2)
    bare = [{name: one[name] for name in ("boxes", "labels")} for one in targets]
    with pytest.raises(UserError, match="masks to true"):
        small(masks=True)(pixels).losses(bare)
    losses = small()(pixels).losses([{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2)
    assert losses["boxes"].item() == 0


def test_some_rows() -> None:
    own = small()
    sharpened(own)
    pixels, _ = pictures()
    answers = own(pixels)
    assert same(answers.rows([1]).detections(), [answers.detections()[1]]) > 5


def test_taps_are_what_the_roles_say() -> None:
    taken = taps_fire(small())
    assert [taken[f"fpn[{level}]"].shape[-1] for level in range(5)] == [16, 8, 4, 2, 1]
    assert taken["head.cls[0]"].shape == (2, 3, 16, 16)


def test_options_that_make_no_sense_are_named() -> None:
    with pytest.raises(UserError, match="box_head"):
        small(box_head="layer")
    with pytest.raises(UserError, match="extra is pool or none"):
        small(extra="p6p7")
