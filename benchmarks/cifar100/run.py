# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-100 protocol: a cut of it that ends within an hour on two CPU cores, or all of its 240 epochs.

python benchmarks/cifar100/run.py CIFAR100_MOSAICS WEIGHTS OUT [--pair NAME] [--full] [--device cuda]

Both go through the shipped recipes and `tutelage compare`: arms of one seed side by side, one teacher forward for
all of them. Writes `results.json` and `results.md` (`full.json`, `full.md`) beside this file after every seed of
every pair; OUT keeps the runs and resumes, so that two processes may each do one pair, and a last call without
`--pair` writes both.

The cut, fixed before any student of it was scored: 4,000 training images and 2,000 test images of the class-balanced
files, 8 epochs, milestones and warm-ups of weights scaled with the length, bf16 autocast, three seeds. The teachers
learn for 12 epochs; that of the first pair starts from published CIFAR-10 weights (WEIGHTS), since a ResNet-56 learns
next to nothing in so few steps. The full run trains both teachers as the protocol says, on all images,
with every method of the logit, feature and relation families that fits the pair.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from mosaics import write as write_mosaics

from tutelage import methods
from tutelage.report.environment import environment
from tutelage.run.compare import Compared, baselines, compare, with_objective
from tutelage.run.folder import RunFolder
from tutelage.run.objective import of_methods
from tutelage.run.recipe import Recipe, load, parse

HOME = Path(__file__).parent
PROTOCOL = 240  # epochs
EPOCHS, SEEDS, TRAIN_FILES, TEST_IMAGES = 8, (0, 1, 2), 4, 2000
TEACHERS = {"deeper": 12, "wider": 12}  # epochs of their fit in the cut
METHODS = {
    "resnet56_resnet20": ("kd", "dkd", "dist", "at", "sp", "rkd"),
    "wrn_16_2_wrn_16_1": ("kd", "dkd", "at"),
}  # of the cut
RECORD = 2 + 3 * 32 * 32  # bytes of an image with its two labels
CIFAR10 = "resnet56-4bfd9763.th"
CUT = (
    f"{1000 * TRAIN_FILES:,} training images, {TEST_IMAGES:,} test images, {EPOCHS} epochs, bf16. Published numbers "
    "stand beside: they are of 50,000 images and 240 epochs, and these here do not come near them."
)


def data(mosaics: Path, out: Path, *, full: bool) -> Path:
    """Return the folder of the original files, or of the cut's."""
    if full:
        return write_mosaics(mosaics, out / "cifar100")
    folder = write_mosaics(mosaics, out / "cifar100-cut", TRAIN_FILES)
    test = folder / "test.bin"
    test.write_bytes(test.read_bytes()[: TEST_IMAGES * RECORD])
    return folder


def pairs(source: Path, weights: Path, *, full: bool, device: str | None) -> dict[str, Recipe]:
    """Return a recipe of each pair: a deeper teacher and a wider one."""
    sets = [f"data.source=cifar100:{source}", *([f"train.device={device}"] if device else [])]
    if full:
        names = ("resnet56_resnet20", "wrn_40_2_wrn_40_1")
        return {name: load(f"cifar100/{name}", sets) for name in names}
    sets += [f"train.{word}={value}" for word, value in length(EPOCHS).items()]
    sets += ["train.evaluate_every=null", "train.precision=bf16", "data.workers=0"]
    deeper = load("cifar100/resnet56_resnet20", sets).plain()
    known = {"model": "tutelage:resnet56", "weights": str(weights / CIFAR10), "head": "fresh"}
    deeper["teacher"] = {**known, "fit": {"train": length(TEACHERS["deeper"])}}
    wider = load("cifar100/wrn_40_2_wrn_40_1", sets).plain() | {"expected": {}, "student": "tutelage:wrn_16_1"}
    wider["teacher"] = {"model": "tutelage:wrn_16_2", "fit": {"train": length(TEACHERS["wider"])}}
    return {"resnet56_resnet20": parse(deeper), "wrn_16_2_wrn_16_1": parse(wider)}


def length(epochs: int) -> dict[str, Any]:
    """Return the words of a shorter training, its steps of the rate at the same shares."""
    milestones = [epoch * epochs / PROTOCOL for epoch in (150, 180, 210)]
    return {"epochs": epochs, "milestones": milestones, "save_every": f"{epochs} epochs"}


def scaled(value: Any, factor: float) -> Any:
    """Return an objective whose warm-ups, written in epochs, keep their share of the training."""
    if isinstance(value, Mapping):
        return {key: scaled(part, factor) for key, part in value.items()}
    found = re.fullmatch(r"(\d+) epochs", value) if isinstance(value, str) else None
    return f"{int(found[1]) * factor:.4g} epochs" if found else value


def arms(recipe: Recipe, stems: tuple[str, ...]) -> dict[str, Recipe]:
    """Return the baselines and one arm a method with the weights of its paper."""
    assert recipe.train.epochs is not None
    factor = recipe.train.epochs / PROTOCOL
    found = {stem: with_objective(recipe, scaled(of_methods(stem), factor)) for stem in stems}
    return baselines(recipe) | found


def every_method() -> tuple[str, ...]:
    """Return the methods of the three families whose teacher may be shared."""
    entries = methods.catalogue().values()
    return tuple(
        entry.stem
        for entry in entries
        if entry.family in ("logits", "features", "relations") and methods.needs_teacher(entry.stem)
    )


def best(compared: Compared) -> dict[str, float]:
    """Return the mean over seeds of each arm's best score on the test set, where it was looked at more than once."""
    key, found = compared.comparison.metric.key, {}
    for arm, runs in compared.runs.items():
        seen = []
        for folder in runs.values():
            lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]
            seen.append([line[key] for line in lines if line["kind"] == "evaluation"])
        if all(len(one) > 1 for one in seen):
            found[arm] = sum(max(one) for one in seen) / len(seen)
    return found


def save(done: Mapping[str, Compared], recipes: Mapping[str, Recipe], *, full: bool) -> None:
    """Write what has been measured so far."""
    plain = {name: {**one.plain(), "best on test": best(one)} for name, one in done.items()}
    name = "full" if full else "results"
    (HOME / f"{name}.json").write_text(json.dumps({"environment": environment(), "pairs": plain}, indent=2) + "\n")
    parts = [f"# CIFAR-100, {'the protocol' if full else 'a cut of the protocol'}, as measured"]
    if not full:
        parts.append(CUT)
    for pair, compared in done.items():
        settings = recipes[pair].train
        parts += [f"## {pair}", f"{settings.epochs:g} epochs, last-epoch top-1 on the test images."]
        parts += [table.markdown() for table in compared.tables]
        if highest := best(compared):
            rows = "\n".join(f"| {arm} | {100 * value:.2f} |" for arm, value in highest.items())
            parts.append("Best epoch on the test set, for tables that print it:")
            parts.append(f"| method | best epoch (%) |\n| :-- | --: |\n{rows}")
        parts.append(" ".join((compared.verdict.sentence, *compared.verdict.details)))
    (HOME / f"{name}.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for word in ("mosaics", "weights", "out"):
        parser.add_argument(word, type=Path)
    parser.add_argument("--pair", help="this pair alone")
    parser.add_argument("--full", action="store_true", help="all images, 240 epochs, every method, three seeds")
    parser.add_argument("--device")
    asked = parser.parse_args()
    source = data(asked.mosaics, asked.out, full=asked.full)
    recipes = pairs(source, asked.weights, full=asked.full, device=asked.device)
    if asked.pair is not None:
        if asked.pair not in recipes:
            parser.error(f"--pair is one of {', '.join(recipes)}")
        recipes = {asked.pair: recipes[asked.pair]}
    chosen = {pair: arms(recipe, every_method() if asked.full else METHODS[pair]) for pair, recipe in recipes.items()}
    done: dict[str, Compared] = {}
    for pair, recipe in chosen.items():
        for count in range(1, len(SEEDS) + 1):
            place = asked.out / ("full" if asked.full else "cut") / pair
            done[pair] = compare(recipe, SEEDS[:count], place, title=f"{pair}, CIFAR-100", lenient=True, say=print)
            save(done, recipes, full=asked.full)


if __name__ == "__main__":
    main()
