# SPDX-License-Identifier: Apache-2.0
"""One square anchor a position of a feature pyramid, and which of them lie on a box.

Boxes are x1, y1, x2, y2 in pixels. Everything runs over all boxes of a batch at once.

Reference: Zhang et al., Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
Sample Selection, CVPR 2020.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tutelage.functional.constant import constant

Share = Literal["union", "anchor"]
INSIDE = 0.01  # an anchor's centre lies within a box if it is so many pixels from each edge


def grid_anchors(sizes: Sequence[tuple[int, int]], image: tuple[int, int], like: Tensor, scale: float = 8.0) -> Tensor:
    """Return the anchors of all levels, row by row: squares of `scale` strides around (x, y) * stride.

    Args:
        sizes: height and width of each level's map.
        image: height and width of the (padded) image; their ratio to a map's is its stride.
        like: gives device and type.
        scale: side of an anchor, in strides.

    Returns:
        `[A, 4]`.

    Example:
        >>> grid_anchors([(1, 2)], (8, 16), torch.zeros(0), scale=1)
        tensor([[-4., -4.,  4.,  4.],
                [ 4., -4., 12.,  4.]])
    """
    levels = []
    for height, width in sizes:
        steps = image[0] / height, image[1] / width
        y, x = (
            torch.arange(side, device=like.device, dtype=like.dtype) * step
            for side, step in zip((height, width), steps, strict=True)
        )
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
        half = constant((steps[1], steps[0]), centre) * scale / 2
        levels.append(torch.cat([centre - half, centre + half], dim=1))
    return torch.cat(levels)


def overlaps(boxes: Tensor, anchors: Tensor, share: Share = "union") -> tuple[Tensor, Tensor]:
    """Return how much of each box and anchor is common, and that less the distance of their centres.

        IoU = inter / union,  DIoU = inter / union - d^2 / diagonal^2

    with d the distance of the centres and the diagonal that of the box around both.

    Args:
        boxes: `[M, 4]`.
        anchors: `[A, 4]`.
        share: of what the common area is a share in DIoU: the `union`, or the `anchor` (the code of LD).

    Returns:
        two `[M, A]`.

    Example:
        >>> box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> overlaps(box, torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 2.0, 4.0, 4.0]]))
        (tensor([[1., 0.]]), tensor([[ 1.0000, -0.2500]]))
    """
    one, other = boxes[:, None], anchors[None]
    inner = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    outer = torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])
    inter = inner.prod(dim=-1)
    areas = [(side[..., 2:] - side[..., :2]).prod(dim=-1) for side in (one, other)]
    union = areas[0] + areas[1] - inter
    apart = ((one[..., :2] + one[..., 2:] - other[..., :2] - other[..., 2:]) / 2).square().sum(dim=-1)
    tiny = torch.finfo(boxes.dtype).tiny
    whole = union if share == "union" else areas[1].expand_as(union)
    far = apart / outer.square().sum(dim=-1).clamp(min=tiny)
    return inter / union.clamp(min=tiny), inter / whole.clamp(min=tiny) - far


def nearest(boxes: Tensor, anchors: Tensor, level_sizes: Sequence[int], count: int = 9) -> Tensor:
    """Return the anchors of each level whose centres lie nearest to a box's.

    Args:
        boxes: `[M, 4]`.
        anchors: `[A, 4]`, level after level.
        level_sizes: anchors of each level.
        count: of each level, or all it has.

    Returns:
        `[M, N]` int64.
    """
    centres = [(side[:, :2] + side[:, 2:]) / 2 for side in (boxes, anchors)]
    found, start = [], 0
    for size in level_sizes:
        apart = (centres[0][:, None] - centres[1][None, start : start + size]).square().sum(dim=-1)
        found.append(apart.topk(min(count, size), dim=1, largest=False).indices + start)
        start += size
    return torch.cat(found, dim=1)


def threshold(iou: Tensor, candidates: Tensor) -> Tensor:
    """Return what an anchor must share with a box to lie on it: mean and deviation of its candidates' IoU.

    Args:
        iou: `[M, A]`.
        candidates: `[M, N]`.

    Returns:
        `[M]`; the deviation has divisor N - 1.
    """
    near = iou.gather(1, candidates)
    mean = near.mean(dim=1, keepdim=True)
    variance = (near - mean).square().sum(dim=1) / max(near.shape[1] - 1, 1)
    return mean[:, 0] + variance.sqrt()


def on_boxes(boxes: Tensor, anchors: Tensor, level_sizes: Sequence[int], count: int = 9) -> Tensor:
    """Return which anchors learn a box: candidates that share enough with it and have their centre in it.

    Args:
        boxes: `[M, 4]`.
        anchors: `[A, 4]`, level after level.
        level_sizes: anchors of each level.
        count: candidates of each level.

    Returns:
        `[M, A]` bool.
    """
    iou, _ = overlaps(boxes, anchors)
    candidates = nearest(boxes, anchors, level_sizes, count)
    chosen = torch.zeros_like(iou, dtype=torch.bool).scatter(1, candidates, True)
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    margins = torch.cat([centre - boxes[:, None, :2], boxes[:, None, 2:] - centre], dim=2)
    return chosen & (iou >= threshold(iou, candidates)[:, None]) & (margins.amin(dim=2) > INSIDE)


def by_image(values: Tensor, box_image: Tensor, images: int) -> Tensor:
    """Return the largest value of each anchor over the boxes of each image, 0 without a box.

    Args:
        values: `[M, A]`, not negative.
        box_image: `[M]` int64.
        images: how many.

    Returns:
        `[images, A]`.

    Example:
        >>> by_image(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]), 2)
        tensor([[0., 0.],
                [3., 2.]])
    """
    place = box_image[:, None].expand_as(values)
    return values.new_zeros(images, values.shape[1]).scatter_reduce(0, place, values, "amax")


def levels(maps: Sequence[Tensor], groups: int = 1) -> Tensor:
    """Return what is said at every position of every level: `[B, G N, H, W]` maps to `[B, A, G, N]`.

    Positions come in the order of `grid_anchors`.

    Example:
        >>> levels([torch.arange(4.0).view(1, 4, 1, 1), torch.zeros(1, 4, 1, 2)], 2)[0, 0]
        tensor([[0., 1.],
                [2., 3.]])
    """
    return torch.cat([one.flatten(2).transpose(1, 2).unflatten(2, (groups, -1)) for one in maps], dim=1)
