# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tutelage.serve.yolox import bilinear, corners, decoded, detections, letterbox, overlaps, people, resized

GOLDEN = ("core/yolox_postprocess",)


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    height, width = meta["input_hw"]
    rows = decoded(arrays["raw"][0], (height, width))
    boxes, scores = corners(rows, meta["resize_ratio"])
    found = detections(boxes, scores, overlap=meta["nms_thr"], least=meta["score_thr"])
    return {
        **{"decoded": rows, "boxes_xyxy": boxes, "scores": scores, "nms_detections": found},
        "person_boxes": people(found, least=meta["final_score_thr"], person=meta["person_class"]),
    }


def test_a_box_overlaps_itself_wholly_and_sides_count_both_ends() -> None:
    box = np.array([0.0, 0, 9, 9])
    assert overlaps(box, np.array([[0.0, 0, 9, 9], [5, 0, 14, 9], [10, 0, 12, 9]])).tolist() == pytest.approx(
        [1, 50 / 150, 0]
    )


def test_nothing_found_is_no_error() -> None:
    found = detections(np.zeros((4, 4)), np.zeros((4, 2)))
    assert found.shape == (0, 6)
    assert people(found).shape == (0, 4)


def test_an_image_keeps_its_shape_in_the_letterbox() -> None:
    image = np.full((20, 40, 3), 7, np.uint8)
    padded, ratio = letterbox(image, (32, 32))
    assert ratio == pytest.approx(0.8)
    assert padded.shape == (3, 32, 32)
    assert (padded[:, :16] == 7).all()
    assert (padded[:, 16:] == 114).all()


def test_resizing_to_the_same_size_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    assert resized(image, (5, 7)) == pytest.approx(image.astype(float))
    half = bilinear(image, np.array([[1.5]]), np.array([[2.0]]))
    assert half[0, 0] == pytest.approx((image[2, 1].astype(float) + image[2, 2]) / 2)


def test_other_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="gave 3 boxes; an input of 32 x 32 has 21"):
        decoded(np.zeros((3, 6)), (32, 32))
