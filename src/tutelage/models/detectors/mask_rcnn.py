# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN: Faster R-CNN that tells a mask for each box.

Reference: He et al., Mask R-CNN, ICCV 2017.
"""

from functools import partial
from typing import Any

from tutelage.models.detectors.faster_rcnn import FIRST, SECOND, FasterRCNN

ARCHITECTURES = {"mask_rcnn": partial(FasterRCNN, masks=True)}
#: What weights of mmdetection want.
MMDETECTION: dict[str, dict[str, Any]] = {"mask_rcnn": {"exact": True}}
#: Detectors of torchvision that this is, with their options.
PUBLISHED = {
    "maskrcnn_resnet50_fpn": {"detector": "mask_rcnn", **FIRST},
    "maskrcnn_resnet50_fpn_v2": {"detector": "mask_rcnn", **SECOND},
}
