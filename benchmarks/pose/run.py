# SPDX-License-Identifier: Apache-2.0
"""Two-stage distillation of pose on real images: teacher, student alone, student after each stage.

python benchmarks/pose/run.py COCO_PERSON OUT

COCO_PERSON holds `{train,val}_images.tar` and `person_keypoints_{train,val}.json.xz`. Writes `results.json` and
`results.md` beside this file; OUT keeps the runs and resumes.
"""

import argparse
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

from tutelage.report.environment import environment
from tutelage.run.compare import arms_of, compare
from tutelage.run.recipe import parse, read_yaml

HOME = Path(__file__).parent
SCORES = ("ap", "ap50", "ar", "oks")


def unpacked(source: Path, place: Path) -> Path:
    """Return the folder with images and annotations, made once."""
    if not (place / "done").exists():
        for split in ("train", "val"):
            with tarfile.open(source / f"{split}_images.tar") as archive:
                archive.extractall(place / "images", filter="data")
            packed = source / f"person_keypoints_{split}.json.xz"
            (place / f"person_keypoints_{split}.json").write_bytes(lzma.decompress(packed.read_bytes()))
        (place / "done").touch()
    return place


def last(run: Path) -> dict[str, Any]:
    """Return the last scores of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in reversed(rows) if row["kind"] == "evaluation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("coco_person", "out"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    data = unpacked(asked.coco_person, asked.out / "data")
    given = read_yaml((HOME / "coco_person.yaml").read_text(), "coco_person.yaml")
    given["data"]["source"] = f"coco:{data}"
    recipe = parse(given)
    assert recipe.compare is not None
    home = asked.out / "compare"
    compared = compare(arms_of(recipe), recipe.compare.seeds, home, title="COCO person, 64 x 48", say=print)
    runs = {
        "student alone": next(home.glob("alone-*")),
        "student, stage 1": next(home.glob("dwpose-*")) / "stages" / "first",
        "student, stage 1 + 2": next(home.glob("dwpose-*")) / "stages" / "second",
    }
    rows: dict[str, dict[str, Any]] = {name: last(run) for name, run in runs.items()}
    teacher = compared.plain()["teacher"]
    early = (
        "The teacher itself finds hardly anybody yet: this says that both stages run on real images, and nothing of "
    )
    note = early + "the method." if teacher < 0.05 else ""
    result = {"environment": environment(), "scores": rows, "comparison": compared.plain()}
    (HOME / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [f"| {name} | " + " | ".join(f"{100 * row[s]:.1f}" for s in SCORES) + " |" for name, row in rows.items()]
    (HOME / "results.md").write_text(
        "# Pose on 400 COCO images, as measured\n\n"
        f"Input 64 x 48, no pretrained weights, {recipe.train.epochs:g} epochs, one seed. Teacher: AP "
        f"{100 * teacher:.1f}. {note}\n\n"
        "| | AP | AP50 | AR | mean OKS |\n| :-- | --: | --: | --: | --: |\n" + "\n".join(lines) + "\n"
    )
    print((HOME / "results.md").read_text())


if __name__ == "__main__":
    main()
