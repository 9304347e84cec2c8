# SPDX-License-Identifier: Apache-2.0
from detector_case import CLASSES, pictures
from tutelage.models.detection import architectures


def test_it_learns_masks() -> None:
    net = architectures()["mask_rcnn"](CLASSES, backbone="tiny4", width=8, head_width=8, proposals=(20, 20))
    pixels, targets = pictures(2)
    assert "masks" in net(pixels).losses(targets)
