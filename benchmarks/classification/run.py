# SPDX-License-Identifier: Apache-2.0
"""Published CIFAR-10 weights: their accuracy on real images, and distillation from the real teacher.

python benchmarks/classification/run.py CIFAR10_MOSAICS WEIGHTS OUT

Writes `results.json` and `results.md` beside this file; OUT keeps the runs and resumes.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from mosaics import write as write_mosaics

from tutelage.data.load import load as load_data
from tutelage.models.load import load as load_model
from tutelage.report.environment import environment
from tutelage.run.compare import arms_of, compare
from tutelage.run.distill import score
from tutelage.run.recipe import parse, read_yaml
from tutelage.tasks.classification import Classification

HOME = Path(__file__).parent
PUBLISHED = {"resnet20": ("resnet20-12fca82f.th", 0.9173), "resnet56": ("resnet56-4bfd9763.th", 0.9339)}


def accuracies(data: Path, weights: Path) -> dict[str, dict[str, float]]:
    """Return the accuracy of the published weights on the images, beside what was published for all 10,000."""
    loader = load_data({"source": f"cifar10:{data}", "batch_size": 250}).validation
    found = {}
    for name, (file, published) in PUBLISHED.items():
        model = load_model(
            {"model": f"tutelage:{name}", "weights": str(weights / file)},
            num_classes=10,
            in_channels=3,
            image_size=(32, 32),
        )
        scores = score(model, Classification(10), loader, torch.device("cpu"))
        found[name] = {"top1": scores["top1"], "published": published, "images": len(loader.samples)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("mosaics", "weights", "out"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    data = write_mosaics(asked.mosaics, asked.out / "cifar10")
    known = accuracies(data, asked.weights)
    print(json.dumps(known, indent=2))
    text = (HOME / "cifar10_resnet56_resnet8.yaml").read_text()
    given = read_yaml(text, "cifar10_resnet56_resnet8.yaml")
    given["teacher"]["weights"] = str(asked.weights / PUBLISHED["resnet56"][0])
    given["data"]["source"] = f"cifar10:{data}"
    recipe = parse(given)
    assert recipe.compare is not None
    title = "ResNet-56 -> ResNet-8, CIFAR-10, 1,000 images, 100 labels"
    compared = compare(arms_of(recipe), recipe.compare.seeds, asked.out / "compare", title=title, say=print)
    plain = compared.plain()
    result = {"environment": environment(), "published weights": known, "distillation": plain}
    (HOME / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    rows = "\n".join(
        f"| {name} | {100 * row['published']:.2f} | {100 * row['top1']:.1f} | {row['images']} |"
        for name, row in known.items()
    )
    (HOME / "results.md").write_text(
        "# Classification, as measured\n\nPublished CIFAR-10 weights on the images at hand:\n\n"
        f"| network | published, 10,000 images (%) | ours (%) | images |\n| :-- | --: | --: | --: |\n{rows}\n\n"
        + compared.markdown()
        + "\n"
    )


if __name__ == "__main__":
    main()
