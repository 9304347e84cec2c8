# SPDX-License-Identifier: Apache-2.0
"""Colours of the page: far enough apart for every eye, dark or light enough for their ground."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tutelage.report import page

Vector = NDArray[np.float64]
CSS = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")
LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in CSS.split("@media", 2)[:2])

# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB
SIGHT = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.119192, 0.9503041]]
)


def linear(color: str) -> Vector:
    srgb = np.array([int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: Vector) -> Vector:
    ratio = (TO_XYZ @ rgb) / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(TO_XYZ[1] @ linear(color)) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("sight", list(SIGHT))
def test_series_keep_apart(scheme: dict[str, str], sight: str) -> None:
    series = [color for name, color in scheme.items() if name.startswith("series-")]
    assert len(series) == 6
    seen = [lab(np.clip(SIGHT[sight] @ linear(color), 0, 1)) for color in series]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) >= 20


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read(scheme: dict[str, str]) -> None:
    for name in ("ink", "muted", "accent", "good", "bad", "unsure", "plain"):
        assert contrast(scheme[name], scheme["surface"]) >= 4.5, name
    for name in (f"series-{n}" for n in range(6)):
        assert contrast(scheme[name], scheme["surface"]) >= 4.5, name  # they are names beside lines, too


def test_both_schemes_declare_the_same_names() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(LIGHT) == 17
