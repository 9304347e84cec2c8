# SPDX-License-Identifier: Apache-2.0
"""Pictures side by side: a row an image, a column for the truth and for each model."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

WIDTH = 360  # pixels of a picture on the page
QUALITY = 82  # of JPEG: the drawings in full lie beside the page


@dataclass(frozen=True)
class Gallery:
    """What a page shows of them.

    Args:
        heads: of the columns.
        rows: files of the pictures, one a column; None where there is none.
        names: of the images, one a row.
    """

    heads: tuple[str, ...] = ()
    rows: Sequence[Sequence[Path | None]] = ()
    names: Sequence[str] = field(default=())

    @classmethod
    def of(cls, folder: Path, columns: Mapping[str, str], names: Sequence[str] = ()) -> "Gallery":
        """Return the pictures of a folder, which are called `NUMBER-COLUMN.png`.

        Args:
            folder: may be missing.
            columns: what stands above the pictures of each column.
            names: of the images.
        """
        there = [column for column in columns if any(folder.glob(f"*-{column}.png"))]
        numbers = sorted({int(file.stem.partition("-")[0]) for file in folder.glob("*-*.png")})
        rows = [
            [file if (file := folder / f"{number}-{column}.png").exists() else None for column in there]
            for number in numbers
        ]
        return cls(tuple(columns[column] for column in there), rows, names or [f"image {n}" for n in numbers])

    def cells(self) -> Iterator[tuple[str, list[str | None]]]:
        """Yield the name of each image and its pictures as addresses that need nothing else."""
        for name, row in zip(self.names, self.rows, strict=True):
            yield name, [None if file is None else embedded(file) for file in row]


def embedded(file: Path) -> str:
    """Return a picture as an address that holds it, no wider than the page shows it."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
