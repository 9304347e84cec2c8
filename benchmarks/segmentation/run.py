# SPDX-License-Identifier: Apache-2.0
"""The published ESPNet of CamVid: its mean IoU on real street scenes, and distillation from it.

python benchmarks/segmentation/run.py CAMVID WEIGHTS OUT

CAMVID holds `{train,val}_{images,labels}.tar`, WEIGHTS is `espnet_p_2_q_8_camvid.pth`. Writes `results.json` and
`results.md` beside this file; OUT keeps the runs and resumes.
"""

import argparse
import json
import tarfile
from pathlib import Path
from typing import Any

import torch

from tutelage.data.load import load as load_data
from tutelage.models.load import load as load_model
from tutelage.report.environment import environment
from tutelage.run.compare import arms_of, compare
from tutelage.run.distill import score
from tutelage.run.recipe import parse, read_yaml
from tutelage.tasks.segmentation import Segmentation

HOME = Path(__file__).parent
RECIPE = "camvid_espnet_pspnet.yaml"
PUBLISHED = 480, 360  # width and height at which the teacher was trained


def unpacked(camvid: Path, out: Path) -> Path:
    """Return a folder with the images and masks, as SegNet lays them out."""
    for split in ("train", "val"):
        for word, name in (("images", split), ("labels", f"{split}annot")):
            home = out / name
            if not home.is_dir():
                with tarfile.open(camvid / f"{split}_{word}.tar") as archive:
                    archive.extractall(home, filter="data")
    return out


def teacher_scores(recipe: dict[str, Any], data: Path) -> dict[str, dict[str, float]]:
    """Return the teacher's scores at the size of the benchmark, and at the one it was trained for."""
    found = {}
    for name, size in (("240 x 180", None), ("480 x 360", [PUBLISHED[1], PUBLISHED[0]])):
        words = {"source": f"camvid:{data}", "batch_size": 4, "image_size": size, "segmentation": {"multiple": 8}}
        loader = load_data(words, task="segmentation").validation
        model = load_model(recipe["teacher"], task="segmentation", num_classes=11, in_channels=3)
        task = Segmentation(11, class_names=loader.class_names)
        found[name] = score(model, task, loader, torch.device("cpu"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("camvid", "weights", "out"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    data = unpacked(asked.camvid, asked.out / "camvid")
    given = read_yaml((HOME / RECIPE).read_text(), RECIPE)
    given["teacher"]["weights"] = str(asked.weights)
    given["data"]["source"] = f"camvid:{data}"
    known = teacher_scores(given, data)
    print(json.dumps(known, indent=2), flush=True)
    recipe = parse(given)
    assert recipe.compare is not None
    title = f"ESPNet -> PSPNet on CamVid at 240 x 180, {recipe.train.steps} steps"
    compared = compare(arms_of(recipe), recipe.compare.seeds, asked.out / "compare", title=title, say=print)
    plain = compared.plain()
    result = {"environment": environment(), "teacher": known, "distillation": plain}
    (HOME / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    rows = "\n".join(
        f"| {name} | {100 * row['miou']:.1f} | {100 * row['pixel_accuracy']:.1f} | {100 * row['boundary_iou']:.1f} |"
        for name, row in known.items()
    )
    (HOME / "results.md").write_text(
        "# Segmentation, as measured\n\nThe published ESPNet on the 101 validation images:\n\n"
        f"| images | mean IoU (%) | pixel accuracy (%) | boundary IoU (%) |\n| :-- | --: | --: | --: |\n{rows}\n\n"
        + compared.markdown()
        + "\n"
    )


if __name__ == "__main__":
    main()
