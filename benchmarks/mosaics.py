# SPDX-License-Identifier: Apache-2.0
"""CIFAR images kept as lossless mosaics, written back into the original binary files that `tutelage` reads.

python benchmarks/mosaics.py FOLDER OUT [--files N]

FOLDER holds `train_NN.webp` and `test_NN.webp` of 1,000 tiles of 32x32 each (25 a row) with their labels. OUT gets
`data_batch_[1-5].bin` and `test_batch.bin` (CIFAR-10) or `train.bin` and `test.bin` (CIFAR-100), with the class names.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def tiles(path: Path) -> NDArray[np.uint8]:
    """Return the images `[N, 3, 32, 32]` of one mosaic."""
    mosaic = np.asarray(Image.open(path).convert("RGB"))
    return mosaic.reshape(-1, 32, 25, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)


def labels(folder: Path, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return fine and coarse labels of a split."""
    if (folder / "labels.npz").exists():
        return np.load(folder / "labels.npz")[f"{split}_label"].astype(np.int64), None
    found = np.load(folder / f"{split}_labels.npz")
    return found["fine"].astype(np.int64), found["coarse"].astype(np.int64)


def write(folder: Path, out: Path, files: int | None = None) -> Path:
    """Write a folder of mosaics as binary files; `files` takes so many mosaics of the training set."""
    out.mkdir(parents=True, exist_ok=True)
    classes = json.loads((folder / "classes.json").read_text())
    for split in ("train", "test"):
        mosaics = sorted(folder.glob(f"{split}_[0-9][0-9].webp"))[: files if split == "train" else None]
        images = np.concatenate([tiles(path) for path in mosaics])
        fine, coarse = (None if row is None else row[: len(images)] for row in labels(folder, split))
        assert fine is not None
        heads = [fine] if coarse is None else [coarse, fine]
        rows = np.concatenate([*(head[:, None] for head in heads), images.reshape(len(images), -1)], axis=1)
        rows = rows.astype(np.uint8)
        if coarse is not None:
            rows.tofile(out / f"{split}.bin")
        elif split == "test":
            rows.tofile(out / "test_batch.bin")
        else:
            for number, part in enumerate(np.array_split(rows, 5), 1):
                part.tofile(out / f"data_batch_{number}.bin")
    if isinstance(classes, dict):
        fine_names = classes.get("fine", next(iter(classes.values())))
        (out / "fine_label_names.txt").write_text("\n".join(fine_names) + "\n")
        (out / "coarse_label_names.txt").write_text("\n".join(classes.get("coarse", [])) + "\n")
    else:
        (out / "batches.meta.txt").write_text("\n".join(classes) + "\n")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=int)
    asked = parser.parse_args()
    print(write(asked.folder, asked.out, asked.files))
