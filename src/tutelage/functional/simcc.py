# SPDX-License-Identifier: Apache-2.0
"""Coordinates as two one-dimensional classifications: labels, loss, decoding (SimCC, as RTMPose uses it).

Points are (x, y) in pixels of the network's input; a bin is 1 / `split` pixels wide; x has `int(width * split)`
bins, y `int(height * split)`.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.functional.constant import constant
from tutelage.functional.precision import full_precision

#: What OpenCV takes for its smallest Gaussian kernels in the place of the formula.
SMALL_KERNELS = {
    1: (1.0,),
    3: (0.25, 0.5, 0.25),
    5: (0.0625, 0.25, 0.375, 0.25, 0.0625),
    7: (0.03125, 0.109375, 0.21875, 0.28125, 0.21875, 0.109375, 0.03125),
}


def bins(size: tuple[int, int], split: float = 2.0) -> tuple[int, int]:
    """Return the number of bins of x and y.

    Args:
        size: (height, width) of the network's input.
        split: bins a pixel.

    Example:
        >>> bins((256, 192))
        (384, 512)
    """
    return int(size[1] * split), int(size[0] * split)


def encode(
    keypoints: Tensor,
    visible: Tensor,
    size: tuple[int, int],
    *,
    sigma: tuple[float, float] | None = (4.9, 5.66),
    split: float = 2.0,
    normalize: bool = False,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the labels of both axes, and the weight of every point.

        mu = round(split * coordinate),  label_b = exp( -(b - mu)^2 / (2 sigma^2) )

    Convention:
        - halves round to even; the Gaussian is not cut at three sigmas, its peak is 1
        - points with visibility < 0.5 have labels of zeros and keep their visibility as weight
        - a point whose [mu - 3 sigma, mu + 3 sigma + 1] lies outside in x or in y gets labels of zeros and weight 0

    Args:
        keypoints: `[..., K, 2]` x, y in pixels of the input.
        visible: `[..., K]`, 0 or 1, or a weight between.
        size: (height, width) of the network's input.
        sigma: of x and y, in bins; None gives a one at the centre's bin.
        split: bins a pixel.
        normalize: divide by sigma sqrt(2 pi).
        smoothing: share spread over the other bins, where `sigma` is None.

    Returns:
        `[..., K, Wx]`, `[..., K, Wy]` and `[..., K]`.

    Example:
        >>> x, y, weight = encode(torch.tensor([[4.0, 2.0]]), torch.ones(1), (8, 8), sigma=None)
        >>> x.argmax().item(), y.argmax().item(), weight
        (8, 4, tensor([1.]))

    Reference: Li et al., SimCC: a Simple Coordinate Classification Perspective for Human Pose Estimation, ECCV 2022.
    """
    count = bins(size, split)
    centre = (keypoints * split).round()
    edges = constant(count, centre)
    if sigma is None:
        outside = (centre < 0) | (centre >= edges)
    else:
        reach = 3 * constant(sigma, centre)
        outside = (centre - reach >= edges) | (centre + reach + 1 < 0)
    inside = ~outside.any(-1)
    shown = visible >= 0.5
    weight = torch.where(shown & ~inside, 0.0, visible)
    drawn = (shown & inside)[..., None]
    labels = []
    for axis in (0, 1):
        gap = torch.arange(count[axis], device=centre.device, dtype=centre.dtype) - centre[..., axis, None]
        if sigma is None:
            label = torch.where(gap == 0, 1 - smoothing, smoothing / max(count[axis] - 1, 1))
        else:
            label = torch.exp(-gap.square() / (2 * sigma[axis] ** 2))
            label = label / (sigma[axis] * (2 * torch.pi) ** 0.5) if normalize else label
        labels.append(torch.where(drawn, label, 0.0).to(centre.dtype))
    return labels[0], labels[1], weight


@full_precision
def simcc_kl(
    pred_x: Tensor,
    pred_y: Tensor,
    target_x: Tensor,
    target_y: Tensor,
    weight: Tensor,
    *,
    beta: float = 10.0,
    label_softmax: bool = True,
) -> Tensor:
    """Return each sample's loss: the divergence from labels to predictions, averaged over bins.

        L_n = 1/K sum_axes sum_k weight_nk * mean_b q (log q - log p),  q = softmax(beta label), p = softmax(beta logit)

    Convention:
        - a mean over bins and points; the published loss is the **sum** of the result over the batch
        - points of weight 0 count nothing, and stay in K

    Args:
        pred_x: `[B, K, Wx]` logits.
        pred_y: `[B, K, Wy]`.
        target_x: `[B, K, Wx]` labels of :func:`encode`.
        target_y: `[B, K, Wy]`.
        weight: `[B, K]`.
        beta: multiplies logits and labels.
        label_softmax: turn labels into probabilities; False takes them as they are.

    Returns:
        `[B]`, float32 or wider.

    Example:
        >>> flat = torch.zeros(1, 1, 4)
        >>> simcc_kl(flat, flat, flat, flat, torch.ones(1, 1))
        tensor([0.])
    """
    total = torch.zeros((), device=pred_x.device)
    for pred, label in ((pred_x, target_x), (pred_y, target_y)):
        log_p = F.log_softmax(beta * pred, dim=-1)
        if label_softmax:
            log_q = F.log_softmax(beta * label, dim=-1)
            rows = (log_q.exp() * (log_q - log_p)).mean(-1)
        else:
            rows = (torch.xlogy(label, label) - label * log_p).mean(-1)
        total = total + (rows * weight).sum(-1)
    return total / max(pred_x.shape[1], 1)


def decode(logits_x: Tensor, logits_y: Tensor, *, split: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return points and scores: the largest logit of each axis.

    Convention:
        - the first of equal maxima counts
        - the score is the smaller of both maxima, of raw logits: it is no probability
        - a score <= 0 puts both coordinates at bin -1, that is -1 / split pixels

    Args:
        logits_x: `[..., K, Wx]`.
        logits_y: `[..., K, Wy]`.
        split: bins a pixel.

    Returns:
        `[..., K, 2]` x, y in pixels of the network's input, and `[..., K]` scores.

    Example:
        >>> decode(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([[2.0, 0.0]]))
        (tensor([[0.5000, 0.0000]]), tensor([2.]))
    """
    place, scores = peaks(logits_x, logits_y)
    return place / split, scores


def peaks(logits_x: Tensor, logits_y: Tensor) -> tuple[Tensor, Tensor]:
    """Return `[..., K, 2]` bins of the largest logits, -1 where the score is not positive, and the scores."""
    (top_x, x), (top_y, y) = logits_x.max(-1), logits_y.max(-1)
    scores = torch.minimum(top_x, top_y)
    place = torch.stack([x, y], -1).to(logits_x.dtype)
    return torch.where((scores > 0)[..., None], place, -1.0), scores


def unflip(logits_x: Tensor, logits_y: Tensor, flip_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of a mirrored image as those of the image itself: points change sides, x runs backwards.

    Args:
        logits_x: `[..., K, Wx]`.
        logits_y: `[..., K, Wy]`.
        flip_indices: `[K]` int64, the point that takes each one's place in the mirror.
    """
    return logits_x[..., flip_indices, :].flip(-1), logits_y[..., flip_indices, :]


def decode_dark(
    logits_x: Tensor, logits_y: Tensor, *, sigma: tuple[float, float], split: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Return points between bins: :func:`decode`, and one Newton step on the logarithm of the blurred logits.

    Args:
        logits_x: `[..., K, Wx]`.
        logits_y: `[..., K, Wy]`.
        sigma: of the labels of x and y, in bins.
        split: bins a pixel.

    Returns:
        As :func:`decode`.

    Reference: Zhang et al., Distribution-Aware Coordinate Representation for Human Pose Estimation, CVPR 2020.
    """
    place, scores = peaks(logits_x, logits_y)
    axes = [_newton(logits, place[..., axis], sigma[axis]) for axis, logits in enumerate((logits_x, logits_y))]
    return torch.stack(axes, -1) / split, scores


def _newton(logits: Tensor, place: Tensor, sigma: float) -> Tensor:
    kernel = _gaussian(sigma).to(logits)
    wide = len(kernel) // 2
    rows = logits.flatten(0, -2)[:, None]
    blurred = F.conv1d(F.pad(rows, (wide, wide)), kernel[None, None])
    top = blurred.amax(-1, keepdim=True)
    scale = rows.amax(-1, keepdim=True) / top.where(top != 0, 1.0)
    log = F.pad((blurred * scale).clamp(1e-3, 50.0).log(), (2, 2), mode="replicate").squeeze(1)
    at = (place.flatten() + 2.5).long()
    f = torch.stack([log.gather(1, ((at + step) % log.shape[1])[:, None])[:, 0] for step in (-2, -1, 0, 1, 2)])
    first = (f[3] - f[1]) / 2
    second = 1e-9 + (f[4] - 2 * f[2] + f[0]) / 4
    return place - (first / second).view_as(place)


@cache
def _gaussian(sigma: float) -> Tensor:
    """Return the kernel that blurs labels of this width, as OpenCV makes it from its size alone."""
    size = int((20 * sigma - 7) // 3)
    size = max(size - (size % 2 == 0), 1)
    if size in SMALL_KERNELS:
        return torch.tensor(SMALL_KERNELS[size], dtype=torch.float64)
    width = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    kernel = torch.exp(-(torch.arange(size, dtype=torch.float64) - size // 2).square() / (2 * width**2))
    return kernel / kernel.sum()
