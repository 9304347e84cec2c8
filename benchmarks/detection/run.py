# SPDX-License-Identifier: Apache-2.0
"""The published FastestDet on real images: its average precision, and a short distillation from it.

python benchmarks/detection/run.py COCO WEIGHTS OUT

COCO holds `{train,val}_images.tar` and `instances_{train,val}.json.xz`, WEIGHTS `FastestDet.onnx` and
`FastestDet_coco.pth`. Writes `results.json` and `results.md` beside this file; OUT keeps the runs and resumes.
"""

import argparse
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from fastestdet import Answers
from torch import Tensor, nn

from tutelage.core import InputSpec, Model
from tutelage.core.storage import write_text
from tutelage.data.load import load as load_data
from tutelage.models.load import load as load_model
from tutelage.report.environment import environment
from tutelage.run.compare import Compared, arms_of, compare
from tutelage.run.distill import score
from tutelage.run.recipe import parse, read_yaml
from tutelage.tasks.detection import Detection

HOME = Path(__file__).parent
RECIPE = "coco_fastestdet_fcos.yaml"


def unpacked(coco: Path, out: Path) -> Path:
    """Return a folder with images and json files, as COCO lays them out."""
    for split in ("train", "val"):
        home = out / split
        if not home.is_dir():
            with tarfile.open(coco / f"{split}_images.tar") as archive:
                archive.extractall(home, filter="data")
        file = out / "annotations" / f"instances_{split}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with lzma.open(coco / f"instances_{split}.json.xz", "rt") as packed:
                write_text(file, packed.read())
    return out


class Runtime(nn.Module):
    """The ONNX file, called as a detector; one image at a time."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def forward(self, pixels: Tensor, image_size: Tensor) -> Answers:
        """Return the answers of all cells."""
        said = self.session.run(None, {"input.1": pixels.numpy()})[0]
        return Answers(torch.from_numpy(said), (pixels.shape[2], pixels.shape[3]), image_size)


def known_scores(recipe: dict[str, Any], weights: Path) -> dict[str, dict[str, float]]:
    """Return the scores of the ONNX file and of the same network in PyTorch."""
    words = {**recipe["data"], "batch_size": 1}
    loader = load_data(words, task="detection").validation
    task = Detection(80, class_names=loader.class_names)
    module = {**recipe["teacher"], "weights": str(weights / "FastestDet_coco.pth")}
    models = {
        "ONNX Runtime": Model(Runtime(weights / "FastestDet.onnx"), input=InputSpec(bgr=True)),
        "PyTorch": load_model(module, task="detection", num_classes=80, class_names=loader.class_names),
    }
    return {name: score(model, task, loader, torch.device("cpu")) for name, model in models.items()}


def written(known: dict[str, dict[str, float]], compared: Compared | None) -> None:
    """Write what is known so far."""
    plain = None if compared is None else compared.plain()
    result = {"environment": environment(), "teacher": known, "distillation": plain}
    write_text(HOME / "results.json", json.dumps(result, indent=2) + "\n")
    rows = "\n".join(f"| {name} | {100 * row['map']:.1f} | {100 * row['map50']:.1f} |" for name, row in known.items())
    text = (
        "# Detection, as measured\n\nThe published FastestDet on 128 validation images of COCO (320 pixels, stretched "
        "to 352 x 352):\n\n"
        f"| runs in | mAP (%) | AP at 0.50 (%) |\n| :-- | --: | --: |\n{rows}\n"
    )
    if compared is not None:
        text += f"\n{compared.markdown()}\n"
    write_text(HOME / "results.md", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("coco", "weights", "out"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    given = read_yaml((HOME / RECIPE).read_text(), RECIPE)
    given["teacher"] = {"model": f"python:{HOME / 'fastestdet.py'}:fastestdet"}
    given["data"]["source"] = f"coco:{unpacked(asked.coco, asked.out / 'coco')}"
    first = asked.out / "teacher.json"
    if not first.is_file():
        write_text(first, json.dumps(known_scores(given, asked.weights), indent=2))
    known = json.loads(first.read_text())
    written(known, None)
    given["teacher"]["weights"] = str(asked.weights / "FastestDet_coco.pth")
    recipe = parse(given)
    assert recipe.compare is not None
    title = f"FastestDet -> FCOS on 128 images of COCO, {recipe.train.steps} steps"
    written(known, compare(arms_of(recipe), recipe.compare.seeds, asked.out / "compare", title=title, say=print))


if __name__ == "__main__":
    main()
