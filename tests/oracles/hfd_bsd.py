# SPDX-License-Identifier: Apache-2.0
"""HFD + BSD: a CNN and a transformer that teach each other segmentation (Zhu et al. 2023); the direction peer -> own.

* low features: mean((P own - peer)^2) on the grid of the lower map, the other averaged over cells, over channels and
  the places of an image that take part, then over images;
* regions (the pixels of a class, or the cells of a grid): where the peer's mean cross-entropy inside is lower than
  one's own, 1 - cos of the regions' mean high features; summed over regions, averaged over images;
* pixels: where the peer is right and its cross-entropy is lower, T^2 KL(peer || own); averaged over such pixels of an
  image, then over images.

Score maps of two grids meet on the larger, the other enlarged bilinearly (done by the caller here). Labels are brought
to a grid by taking, for position (i, j), pixel (floor(i H / h), floor(j W / w)); -1 is unknown. A place takes part if
it is known, or if no place of its image is.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - lse for v in values]


def _averaged(x: Array, height: int, width: int, target: Labels) -> Array:
    """Return the means over cells of the places that take part, no number where there are none."""
    out = np.full((*x.shape[:2], height, width), np.nan)
    for n, i, j in np.ndindex(len(x), height, width):
        rows = range(i * x.shape[2] // height, -(-(i + 1) * x.shape[2] // height))
        columns = range(j * x.shape[3] // width, -(-(j + 1) * x.shape[3] // width))
        size = (x.shape[2], x.shape[3])
        places = [(r, c) for r in rows for c in columns if takes_part(target[n], r, c, size)]
        if places:
            out[n, :, i, j] = sum(x[n, :, r, c] for r, c in places) / len(places)
    return out


def low(own: Array, peer: Array, target: Labels) -> float:
    if own.shape[2:] > peer.shape[2:]:
        own = _averaged(own, peer.shape[2], peer.shape[3], target)
    elif own.shape[2:] < peer.shape[2:]:
        peer = _averaged(peer, own.shape[2], own.shape[3], target)
    total = 0.0
    for n in range(len(own)):
        size = (own.shape[2], own.shape[3])
        there = ~np.isnan(own[n] + peer[n]).any(0)
        places = [(i, j) for i, j in np.ndindex(*size) if takes_part(target[n], i, j, size) and there[i, j]]
        apart = (float(((own[n, :, i, j] - peer[n, :, i, j]) ** 2).mean()) for i, j in places)
        total += math.fsum(apart) / max(len(places), 1)
    return total / len(own)


def takes_part(labels: Labels, i: int, j: int, size: tuple[int, int]) -> bool:
    anywhere = any(label_at(labels, row, column, size) >= 0 for row, column in np.ndindex(*size))
    return label_at(labels, i, j, size) >= 0 or not anywhere


def label_at(labels: Labels, i: int, j: int, size: tuple[int, int]) -> int:
    return int(labels[i * labels.shape[0] // size[0], j * labels.shape[1] // size[1]])


def _cross_entropy(scores: Array, label: int) -> float:
    return -_log_softmax([float(v) for v in scores])[label]


def _region(labels: Labels, i: int, j: int, size: tuple[int, int], cells: int | None, for_features: bool) -> int | None:
    label = label_at(labels, i, j, size)
    if cells is None:
        return label if label >= 0 else None
    if not (takes_part(labels, i, j, size) if for_features else label >= 0):
        return None
    return (i * cells // size[0]) * cells + j * cells // size[1]


def regions(
    own: Array, peer: Array, own_logits: Array, peer_logits: Array, target: Labels, cells: int | None = None
) -> float:
    """`cells` a side, or None for the regions of the classes."""
    total = 0.0
    for n in range(len(own)):
        losses: dict[int, list[tuple[float, float]]] = {}
        size = (own_logits.shape[2], own_logits.shape[3])
        for i, j in np.ndindex(*size):
            region = _region(target[n], i, j, size, cells, False)
            if region is not None:
                label = label_at(target[n], i, j, size)
                pair = tuple(_cross_entropy(side[n, :, i, j], label) for side in (own_logits, peer_logits))
                losses.setdefault(region, []).append((pair[0], pair[1]))
        means: list[dict[int, Array]] = []
        for side in (own, peer):
            found: dict[int, list[Array]] = {}
            size = (side.shape[2], side.shape[3])
            for i, j in np.ndindex(*size):
                region = _region(target[n], i, j, size, cells, True)
                if region is not None:
                    found.setdefault(region, []).append(side[n, :, i, j])
            means.append({region: np.mean(vectors, axis=0) for region, vectors in found.items()})
        for region, pairs in losses.items():
            ours, theirs = (math.fsum(pair[k] for pair in pairs) / len(pairs) for k in (0, 1))
            if theirs < ours and region in means[0] and region in means[1]:
                one, other = means[0][region], means[1][region]
                total += 1 - float(one @ other) / (math.sqrt(float(one @ one)) * math.sqrt(float(other @ other)))
    return total / len(own)


def pixels(own_logits: Array, peer_logits: Array, target: Labels, temperature: float = 1.0) -> float:
    total = 0.0
    size = (own_logits.shape[2], own_logits.shape[3])
    for n in range(len(own_logits)):
        taught: list[float] = []
        for i, j in np.ndindex(*size):
            label = label_at(target[n], i, j, size)
            if label < 0:
                continue
            ours, theirs = own_logits[n, :, i, j], peer_logits[n, :, i, j]
            if int(theirs.argmax()) == label and _cross_entropy(theirs, label) < _cross_entropy(ours, label):
                s, t = (_log_softmax([float(v) / temperature for v in side]) for side in (ours, theirs))
                taught.append(temperature**2 * math.fsum(math.exp(b) * (b - a) for a, b in zip(s, t, strict=True)))
        total += math.fsum(taught) / max(len(taught), 1)
    return total / len(own_logits)
