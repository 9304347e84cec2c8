# SPDX-License-Identifier: Apache-2.0
"""Boxes on the grids of feature maps.

Boxes are x1, y1, x2, y2 in pixels. Everything runs over all boxes of a batch at once, without asking the device
how many cells they cover.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tutelage.functional.constant import constant


def coverage(boxes: Tensor, box_image: Tensor, image_size: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return how strongly the boxes of each image claim each cell of its maps: one over the cells of a box.

    Convention:
        - an image of (height, width) pixels fills the map: x becomes x * columns / width
        - a box spans the cells from floor(lower edge) to ceil(upper edge), both included; a span is clipped at the
          map, the number of its cells is not
        - of several boxes on a cell the largest value counts, that of the smallest box

    Args:
        boxes: `[M, 4]`, any float dtype; used in float32 or wider.
        box_image: `[M]` int64, the image of each box.
        image_size: `[B, 2]` (height, width) of each image in the pixels of the boxes.
        grids: (rows, columns) of each map.

    Returns:
        `[B, rows, columns]` of each map, 0 where no box lies.

    Example:
        >>> coverage(torch.tensor([[0.0, 0.0, 10.0, 4.0]]), torch.tensor([0]), torch.tensor([[8, 40]]), [(2, 4)])[0]
        tensor([[[0.2500, 0.2500, 0.0000, 0.0000],
                 [0.2500, 0.2500, 0.0000, 0.0000]]])
    """
    boxes = boxes.float() if boxes.dtype != torch.float64 else boxes
    counts = constant([side for grid in grids for side in grid], boxes).unflatten(0, (-1, 2))  # [L, 2]
    corners = boxes.unflatten(1, (1, 2, 2)).flip(3)  # [M, 1, lower and upper, y and x]
    size = image_size.to(boxes.dtype)[box_image, None, None]
    # multiplied first: an edge on the border of two cells is found there whatever the size
    edges = corners * counts[:, None] / size
    first, last = edges[:, :, 0].floor(), edges[:, :, 1].ceil()  # [M, L, 2]
    cells = (last + 1 - first).prod(dim=2)
    place = torch.arange(max(map(max, grids)), device=boxes.device, dtype=boxes.dtype)
    found = []
    for level, (rows, columns) in enumerate(grids):
        low, high = first[:, level], last[:, level]
        inside_y = (place[:rows] >= low[:, :1]) & (place[:rows] <= high[:, :1])
        inside_x = (place[:columns] >= low[:, 1:]) & (place[:columns] <= high[:, 1:])
        claims = (inside_y / cells[:, level, None])[:, :, None] * inside_x[:, None]
        owner = box_image[:, None, None].expand_as(claims)
        found.append(boxes.new_zeros(len(image_size), rows, columns).scatter_reduce(0, owner, claims, "amax"))
    return found


def iou_of(one: Tensor, other: Tensor) -> Tensor:
    """Return the IoU of boxes with those at the same place, 0 where both have no area.

    Args:
        one: `[..., 4]`.
        other: of the same shape, or one that fits it by broadcasting.

    Returns:
        `[...]`.

    Example:
        >>> iou_of(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([0.3333])
    """
    inner = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    areas = [(side[..., 2:] - side[..., :2]).clamp(min=0).prod(dim=-1) for side in (one, other)]
    inter = inner.prod(dim=-1)
    return inter / (areas[0] + areas[1] - inter).clamp(min=torch.finfo(one.dtype).tiny)
