# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tutelage.functional import simcc
from tutelage.serve.simcc import crops, enlarged, peaks, to_image, to_openpose, warp, whole, widened, with_area
from tutelage.tasks import pose

GOLDEN = ("core/dwpose_inference",)


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    width, height = meta["model_input_size_wh"]
    size = (height, width)
    centre, sides = enlarged(arrays["boxes_xyxy"], meta["padding"])
    fixed = widened(sides, size)
    matrix = warp(centre, fixed, size)
    points, scores = peaks(arrays["simcc_x"], arrays["simcc_y"], meta["simcc_split_ratio"])
    answer = {
        **{"center": centre, "scale": sides, "scale_fixed": fixed, "warp_matrix": matrix},
        **{"image_keypoints": to_image(points, centre, fixed, size), "image_scores": scores},
    }
    if "image_uint8" in arrays:
        image, mean, std = arrays["image_uint8"], np.array(meta["mean"]), np.array(meta["std"])
        answer["network_input_hwc"] = (crops(image, matrix, size) - mean) / std
        centre, sides = enlarged(whole(image), meta["padding"])
        alone = warp(centre, widened(sides, size), size)
        answer |= {"center_no_box": centre, "scale_no_box": widened(sides, size)}
        answer["network_input_hwc_no_box"] = (crops(image, alone, size) - mean) / std
    return answer


def test_it_decodes_as_pytorch_does() -> None:
    x, y = torch.randn(3, 5, 24), torch.randn(3, 5, 32) - 2
    points, scores = simcc.decode(x, y)
    found, own = peaks(x.numpy(), y.numpy())
    assert found == pytest.approx(points.numpy())
    assert own == pytest.approx(scores.numpy())


def test_points_go_to_the_image_and_back() -> None:
    boxes = np.array([[10.0, 20, 60, 90], [0, 0, 30, 10]])
    centre, sides = enlarged(boxes)
    sides = widened(sides, (64, 48))
    matrix = warp(centre, sides, (64, 48))
    points = np.random.default_rng(0).uniform(0, 48, (2, 7, 2))
    there = np.einsum("pij,pkj->pki", matrix[:, :, :2], points) + matrix[:, None, :, 2]
    assert to_image(there, centre, sides, (64, 48)) == pytest.approx(points)


def test_openpose_agrees_with_the_task() -> None:
    points, scores = torch.rand(2, 133, 2), torch.rand(2, 133)
    one, other = to_openpose(points.numpy(), scores.numpy()), pose.to_openpose(points, scores)
    assert one[0] == pytest.approx(other[0].numpy())
    assert one[1] == pytest.approx(other[1].numpy())


def test_boxes_without_area_are_nobodys() -> None:
    boxes = np.array([[0, 0, 4, 4], [3, 3, 3, 9], [5, 5, 4, 9], [0, 0, np.nan, 4], [0, 0, np.inf, 4]])
    assert with_area(boxes).tolist() == [[0, 0, 4, 4]]
    assert with_area(np.zeros((0, 4))).shape == (0, 4)


def test_beyond_the_image_is_black() -> None:
    image = np.full((8, 8, 3), 200, np.uint8)
    matrix = warp(np.array([[4.0, 4.0]]), np.array([[16.0, 16.0]]), (16, 16))
    found = crops(image, matrix, (16, 16))
    assert found[0, 8, 8].tolist() == [200] * 3
    assert not found[0, 0].any()
