# SPDX-License-Identifier: Apache-2.0
"""How long decoding takes: all keypoints at once against a loop over people and keypoints, at 133 keypoints.

python benchmarks/pose/decode.py [--out FILE.json]

Two pairs, which must agree to the last bit: the decoder of evaluation in PyTorch, and the one that serves without
PyTorch in NumPy. The loops take one keypoint of one person after the other with the same library, plainly written.
Logits are labels of random points with a little noise, of crops of 256 x 192 and 384 x 288. Times are those of one
core's own work, the least of several tries.

Results are written as JSON beside this file, with the versions of what was run.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.functional.simcc import decode, encode
from tutelage.serve.simcc import Array, peaks

KEYPOINTS, SPLIT = 133, 2.0
SIZES = ((256, 192), (384, 288))
PEOPLE = (1, 8, 64)
TRIES, LEAST = 5, 0.05  # tries, and seconds that each lasts at least


def by_torch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Decode point after point."""
    points, scores = torch.empty(*x.shape[:2], 2), torch.empty(x.shape[:2])
    for person in range(x.shape[0]):
        for point in range(x.shape[1]):
            top_x, place_x = x[person, point].max(0)
            top_y, place_y = y[person, point].max(0)
            score = torch.minimum(top_x, top_y)
            scores[person, point] = score
            if score > 0:
                points[person, point, 0], points[person, point, 1] = place_x / SPLIT, place_y / SPLIT
            else:
                points[person, point] = -1 / SPLIT
    return points, scores


def by_numpy(x: Array, y: Array) -> tuple[Array, Array]:
    """Decode point after point."""
    points, scores = np.empty((*x.shape[:2], 2), x.dtype), np.empty(x.shape[:2], x.dtype)
    for person in range(x.shape[0]):
        for point in range(x.shape[1]):
            row_x, row_y = x[person, point], y[person, point]
            place_x, place_y = row_x.argmax(), row_y.argmax()
            score = min(row_x[place_x], row_y[place_y])
            scores[person, point] = score
            points[person, point] = (place_x / SPLIT, place_y / SPLIT) if score > 0 else -1 / SPLIT
    return points, scores


def seconds(call: Callable[[], Any]) -> float:
    """Return the least time that a call takes, of its own process."""
    found = []
    for _ in range(TRIES):
        count, begun = 0, time.process_time()
        while (spent := time.process_time() - begun) < LEAST:
            call()
            count += 1
        found.append(spent / count)
    return min(found)


def pair(name: str, at_once: Callable[[], Any], loop: Callable[[], Any]) -> dict[str, Any]:
    """Return the times of two ways that agree."""
    for one, other in zip(at_once(), loop(), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other)), f"{name}: both ways differ"
    fast, slow = seconds(at_once), seconds(loop)
    return {
        "what": name,
        "at_once_ms": round(1e3 * fast, 4),
        "loop_ms": round(1e3 * slow, 3),
        "times": round(slow / fast, 1),
    }


def measured(size: tuple[int, int], people: int) -> list[dict[str, Any]]:
    """Return the times of all pairs."""
    draw = torch.Generator().manual_seed(people)
    sigma = (round((size[1] / 8) ** 0.5, 2), round((size[0] / 8) ** 0.5, 2))
    points = torch.rand(people, KEYPOINTS, 2, generator=draw) * torch.tensor([size[1] - 1.0, size[0] - 1.0])
    labels = encode(points, torch.ones(people, KEYPOINTS), size, sigma=sigma, split=SPLIT)[:2]
    x, y = (label + 0.01 * torch.randn(label.shape, generator=draw) for label in labels)
    x[:, ::7] -= 2.0  # nothing is found there
    own_x, own_y = x.numpy(), y.numpy()
    rows = [
        pair("PyTorch", lambda: decode(x, y, split=SPLIT), lambda: by_torch(x, y)),
        pair("NumPy", lambda: peaks(own_x, own_y, SPLIT), lambda: by_numpy(own_x, own_y)),
    ]
    return [{"size": list(size), "people": people, **row} for row in rows]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in SIZES:
        for people in PEOPLE:
            for row in measured(size, people):
                rows.append(row)
                print(row, flush=True)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    document = {"versions": versions, "device": platform.machine(), "threads": 1, "keypoints": KEYPOINTS, "rows": rows}
    asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
