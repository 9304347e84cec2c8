# SPDX-License-Identifier: Apache-2.0
from detector_case import CLASSES, pictures
from tutelage.models.source import listed


def test_it_learns_masks() -> None:
    net = listed("detectors")["mask_rcnn"](CLASSES, backbone="tiny4", width=8, head_width=8, proposals=(20, 20))
    pixels, targets = pictures(2)
    assert "masks" in net(pixels).losses(targets)
