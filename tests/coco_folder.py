# SPDX-License-Identifier: Apache-2.0
"""A folder as COCO lays it out, of scenes with polygons around their boxes."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from tutelage.data.scenes import scenes


def coco_folder(folder: Path, images: int = 6) -> Path:
    """Write so many pictures of 64 x 64 to train and to validate on; return the folder."""
    for split in ("train", "val"):
        rows: list[dict[str, Any]] = []
        things: list[dict[str, Any]] = []
        for number, scene in enumerate(scenes(images, 64, seed=len(split), held_out=split == "val")):
            (folder / split).mkdir(parents=True, exist_ok=True)
            file = f"{number}.png"
            Image.fromarray(scene.image.permute(1, 2, 0).numpy()).save(folder / split / file)
            rows.append({"id": number, "file_name": file, "height": 64, "width": 64})
            for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
                left, top, right, bottom = box
                things.append(
                    {
                        "id": len(things) + 1,
                        "image_id": number,
                        "category_id": label,
                        "bbox": [left, top, right - left, bottom - top],
                        "area": (right - left) * (bottom - top),
                        "iscrowd": 0,
                        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                    }
                )
        categories = [{"id": label, "name": str(label)} for label in range(10)]
        file_ = folder / "annotations" / f"instances_{split}.json"
        file_.parent.mkdir(exist_ok=True)
        file_.write_text(json.dumps({"images": rows, "annotations": things, "categories": categories}))
    return folder
