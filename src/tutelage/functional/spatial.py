# SPDX-License-Identifier: Apache-2.0
"""Maps over positions: bringing two to one size, where a map looks, what is said at each place."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.functional.divergence import kl_divergence


def match(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps at the size of the lower one, the other averaged over cells of its own.

    Args:
        student_map: `[B, C, H, W]`.
        teacher_map: `[B, C', H', W']`; the lower map is the one with fewer rows, then with fewer columns.

    Example:
        >>> import torch
        >>> one, two = match(torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 2, 2))
        >>> one.shape, two.shape
        (torch.Size([1, 1, 2, 2]), torch.Size([1, 3, 2, 2]))
    """
    student, teacher, _ = match_kept(student_map, teacher_map, None, None)
    return student, teacher


def match_kept(
    student_map: Tensor, teacher_map: Tensor, student_keep: Tensor | None, teacher_keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both maps at the size of the lower one, and which places are compared.

    Args:
        student_map: `[B, C, H, W]`.
        teacher_map: `[B, C', H', W']`; see :func:`match`.
        student_keep: `[B, H, W]` bool, places of the student's map; None keeps all.
        teacher_keep: `[B, H', W']` bool, of the teacher's; None if and only if the other is.

    Returns:
        The maps, the larger averaged over its kept places, and `[B, h, w]` bool: the kept places of the lower map
        that hold kept places of the other; or None.
    """
    (height, width), (rows, columns) = student_map.shape[2:], teacher_map.shape[2:]
    if (height, width) > (rows, columns):
        student_map, cells = pooled(student_map, (rows, columns), student_keep)
        return student_map, teacher_map, None if cells is None or teacher_keep is None else teacher_keep & cells
    if (height, width) < (rows, columns):
        teacher_map, cells = pooled(teacher_map, (height, width), teacher_keep)
        return student_map, teacher_map, None if cells is None or student_keep is None else student_keep & cells
    return student_map, teacher_map, student_keep


def pooled(
    feature_map: Tensor, size: int | tuple[int, int], keep: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the means of a map over cells of a coarser grid, and which cells there are.

    Args:
        feature_map: `[B, C, H, W]`.
        size: of the grid: (height, width), or of both sides.
        keep: `[B, H, W]` bool, the places that are averaged over; None takes all.

    Returns:
        `[B, C, h, w]`, 0 in a cell without a place that is kept, and `[B, h, w]` bool, or None without `keep`.

    Example:
        >>> import torch
        >>> pooled(torch.tensor([[[[1.0, 3.0]]]]), 1, torch.tensor([[[True, False]]]))
        (tensor([[[[1.]]]]), tensor([[[True]]]))
    """
    if keep is None:
        return F.adaptive_avg_pool2d(feature_map, size), None
    share = F.adaptive_avg_pool2d(keep[:, None].to(feature_map.dtype), size)
    mean = F.adaptive_avg_pool2d(feature_map.where(keep[:, None], 0.0), size)
    return mean / share.where(share > 0, 1.0), share[:, 0] > 0


def at_grid(feature_map: Tensor, size: tuple[int, int], keep: Tensor | None = None) -> Tensor:
    """Return a map at a grid: averaged over cells of a coarser one, bilinear on a finer one.

    Args:
        feature_map: `[B, C, H, W]`.
        size: (height, width) of the grid.
        keep: `[B, H, W]` bool, the places that are averaged over; None takes all.
    """
    if tuple(feature_map.shape[2:]) == size:
        return feature_map
    if all(side >= goal for side, goal in zip(feature_map.shape[2:], size, strict=True)):
        return pooled(feature_map, size, keep)[0]
    return F.interpolate(feature_map, size, mode="bilinear", align_corners=False)


def over_kept(values: Tensor, keep: Tensor | None) -> Tensor:
    """Return values whose mean over all places of an image is that over its kept places; others become 0.

    Args:
        values: `[B, ...]`.
        keep: `[B, ...]` bool that broadcasts to the values; None keeps all.

    Example:
        >>> import torch
        >>> over_kept(torch.tensor([[1.0, 5.0]]), torch.tensor([[True, False]]))
        tensor([[2., 0.]])
    """
    if keep is None:
        return values
    flat = keep.flatten(1)
    factor = flat.shape[1] / flat.sum(1).clamp(min=1).to(values.dtype)
    return values.where(keep, 0.0) * factor.view(-1, *[1] * (values.ndim - 1))


def as_grid(tokens: Tensor, like: tuple[int, int]) -> Tensor:
    """Return tokens as a map: row by row, on the grid of these proportions.

    Args:
        tokens: `[B, L, D]`, without prefix tokens.
        like: (height, width) of the grid, or of another with its proportions, such as the image's.

    Returns:
        `[B, D, H, W]` with `H W = L`.

    Raises:
        ValueError: if no such grid has L cells.

    Example:
        >>> import torch
        >>> as_grid(torch.zeros(1, 6, 5), (20, 30)).shape
        torch.Size([1, 5, 2, 3])
    """
    length = tokens.shape[1]
    height = max(round(math.sqrt(length * like[0] / like[1])), 1)
    if length % height:
        raise ValueError(f"{length} tokens fill no grid of the proportions {like[0]}x{like[1]}")
    grid: Tensor = tokens.transpose(1, 2).unflatten(2, (height, length // height))
    return grid


def attention(feature_map: Tensor, power: float = 2.0) -> Tensor:
    """Return where a map is active: the mean of |f|^power over channels, as a unit vector over positions.

    Args:
        feature_map: `[B, C, H, W]`.
        power: of the magnitudes.

    Returns:
        `[B, H W]`; zeros where the map is zero everywhere.

    Example:
        >>> import torch
        >>> attention(torch.tensor([[[[3.0, 0.0]], [[1.0, 0.0]]]]))
        tensor([[1., 0.]])
    """
    return F.normalize(feature_map.abs().pow(power).mean(1).flatten(1), dim=1, eps=1e-12)


def channelwise_divergence(
    student_map: Tensor, teacher_map: Tensor, temperature: float = 4.0, keep: Tensor | None = None
) -> Tensor:
    """Return T^2 KL(teacher || student) of each channel's softmax over positions.

    Args:
        student_map: `[B, C, H, W]`.
        teacher_map: `[B, C, H, W]`.
        temperature: softening, > 0.
        keep: `[B, H, W]` bool, the positions of the softmax, at least one an image; None takes all.

    Returns:
        `[B, C]`, summed over positions.

    Example:
        >>> import torch
        >>> channelwise_divergence(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 1.0]]]]), temperature=1.0)
        tensor([[0.1109]])
    """
    student, teacher = (side.flatten(2) / temperature for side in (student_map, teacher_map))
    if keep is not None:
        left_out = ~keep.flatten(1)[:, None]
        student, teacher = (side.masked_fill(left_out, -torch.inf) for side in (student, teacher))
    return temperature**2 * kl_divergence(student, teacher)


def hierarchical_distance(student_map: Tensor, teacher_map: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return the mean squared distance of two maps at several scales.

        [ mse(s, t) + sum_j w_j mse( pool_{k_j}(s), pool_{k_j}(t) ) ] / ( 1 + sum_j w_j )

    with k_j the sizes among 4, 2, 1 that are smaller than the map's height, and w_j = 2^-j, j = 1, 2, ...

    Args:
        student_map: `[B, C, H, W]`.
        teacher_map: `[B, C, H, W]`.
        keep: `[B, H, W]` bool, the places that are compared and pooled; None takes all. Each image counts alike.

    Returns:
        Scalar, averaged over everything; without rows a connected zero.

    Example:
        >>> hierarchical_distance(torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 1.0], [1.0, -1.0]]]]))
        tensor(0.7500)
    """
    apart, weight, weights = student_map - teacher_map, 1.0, 1.0
    loss = mean_square(apart, keep)
    for size in (4, 2, 1):
        if size < student_map.shape[2]:
            weight /= 2
            weights += weight
            # pooling is linear: the difference of the pooled maps is the pooled difference
            loss = loss + weight * mean_square(*pooled(apart, size, keep))
    return loss / weights


def mean_square(apart: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return the mean of squares; of nothing, a connected zero.

    Args:
        apart: `[B, C, H, W]`, or any shape where all places are kept.
        keep: `[B, H, W]` bool, the places that are averaged over; None takes all. Each image counts alike.
    """
    square = apart.square() if keep is None else over_kept(apart.square(), keep[:, None])
    return square.sum() / max(apart.numel(), 1)


def kept_sum(values: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return the sum of a map over its kept places.

    Args:
        values: `[B, C, H, W]`, or any shape where all places are kept.
        keep: `[B, H, W]` bool; None keeps all.
    """
    return values.sum() if keep is None else values.where(keep[:, None], 0.0).sum()


def small_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Return class maps at the size of a feature map, each position the nearest pixel above and left of it.

    Args:
        labels: `[B, H, W]` int64.
        height: of the result.
        width: of the result.

    Example:
        >>> small_labels(torch.arange(16).view(1, 4, 4), 2, 2)
        tensor([[[ 0,  2],
                 [ 8, 10]]])
    """
    rows = torch.arange(height, device=labels.device) * labels.shape[1] // height
    columns = torch.arange(width, device=labels.device) * labels.shape[2] // width
    small: Tensor = labels[:, rows][:, :, columns]
    return small


def class_maps(target: Tensor, labelled: Tensor, num_classes: int, height: int, width: int) -> Tensor:
    """Return class maps at the size of a feature map, -1 where nothing is known.

    Args:
        target: `[B, H, W]` int64.
        labelled: `[B, H, W]` or `[B]` bool.
        num_classes: K; labels outside [0, K) are not known.
        height: of the result.
        width: of the result.

    Returns:
        `[B, height, width]` int64.

    Example:
        >>> class_maps(torch.tensor([[[0, 7, 2, 1]]]), torch.tensor([True]), 3, 1, 4)
        tensor([[[ 0, -1,  2,  1]]])
    """
    rows = labelled if labelled.ndim == 3 else labelled[:, None, None]
    return small_labels(target.where(rows & (target >= 0) & (target < num_classes), -1), height, width)


def taking_part(target: Any, labelled: Tensor, height: int, width: int) -> Tensor | None:
    """Return which places of a map are compared: all but those of ignored pixels.

    An image of which no place is known, such as one without labels, takes part as a whole.

    Args:
        target: `[B, H, W]` int64 classes, negative where ignored; anything else has nothing to ignore.
        labelled: `[B]` or `[B, H, W]` bool.
        height: of the map.
        width: of the map.

    Returns:
        `[B, height, width]` bool, or None where there are no class maps.

    Example:
        >>> taking_part(torch.tensor([[[0, -1], [-1, 2]]]), torch.tensor([True]), 2, 1).flatten()
        tensor([ True, False])
    """
    if not isinstance(target, Tensor) or target.ndim != 3 or target.is_floating_point():
        return None
    known = (target >= 0) & labelled.view(len(labelled), *((1, 1) if labelled.ndim == 1 else labelled.shape[1:]))
    small = small_labels(known, height, width)
    return small | ~small.flatten(1).any(1)[:, None, None]
