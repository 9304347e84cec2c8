# SPDX-License-Identifier: Apache-2.0
"""Language methods on real text: next tokens of Shakespeare, hidden tokens of film reviews.

python benchmarks/language/run.py TEXT_LM TEXT_SST2 OUT [--seeds 0,1] [--set train.steps=2000]

TEXT_LM holds `tinyshakespeare.txt.xz`, TEXT_SST2 `train.tsv.xz` and `dev_a.tsv.xz`, of which only the sentences are
read. Models, lengths and coefficients are those of the demos, tokens are bytes; only the text differs. Goes through
`tutelage compare`, writes `results.json` and `results.md` beside this file after every seed; OUT keeps the runs and
resumes. As it stands it takes about ten minutes of one CPU core; `--set` and `--seeds` make it longer.
"""

import argparse
import json
import lzma
from collections.abc import Mapping
from pathlib import Path

from tutelage.report.environment import environment
from tutelage.run.compare import Compared, arms_of, baselines, compare
from tutelage.run.demo import demo_recipe
from tutelage.run.recipe import Recipe, load

HOME = Path(__file__).parent
VALIDATION = 20_000  # characters: a score takes a moment
SPLIT = 0.95  # of Shakespeare's text that is trained on
#: What is trained on what: a shipped recipe, the text, and the methods whose demos stand on it with the same student.
PARTS = {
    "next byte, Shakespeare": ("stdlib_text", "shakespeare", ("distillm", "gkd", "minillm")),
    "hidden bytes, film reviews": ("stdlib_text_hidden", "reviews", ("tinybert", "minilm")),
    "hidden bytes, film reviews, a student of the teacher's width": ("distilbert/demo", "reviews", ("distilbert",)),
}


def unpacked(path: Path) -> str:
    """Return the text of a compressed file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def shakespeare(folder: Path, out: Path) -> None:
    """Write the text as two files; the validation text is the beginning of the last part."""
    text = unpacked(folder / "tinyshakespeare.txt.xz")
    edge = round(SPLIT * len(text))
    (out / "train.txt").write_text(text[:edge], encoding="utf-8")
    (out / "validation.txt").write_text(text[edge : edge + VALIDATION], encoding="utf-8")


def reviews(folder: Path, out: Path) -> None:
    """Write the sentences, one a line, without their labels."""
    for name, file, most in (("train", "train", None), ("validation", "dev_a", VALIDATION)):
        rows = unpacked(folder / f"{file}.tsv.xz").splitlines()[1:]
        text = "\n".join(row.rpartition("\t")[0].strip() for row in rows)
        (out / f"{name}.txt").write_text(text[:most] + "\n", encoding="utf-8")


def arms(recipe: str, stems: tuple[str, ...], sets: list[str]) -> dict[str, Recipe]:
    """Return the baselines and one arm a method, with the objective of its demo."""
    base = load(recipe, sets)
    found = {name: one for name, one in baselines(base).items() if name == "alone"}
    for stem in stems:
        found[stem] = base.model_copy(update={"objective": arms_of(demo_recipe(stem))[stem].objective, "compare": None})
    return found


def save(done: Mapping[str, Compared]) -> None:
    """Write what has been measured so far."""
    plain = {name: one.plain() for name, one in done.items()}
    (HOME / "results.json").write_text(json.dumps({"environment": environment(), "parts": plain}, indent=2) + "\n")
    parts = ["# Language, as measured", *(compared.markdown() for compared in done.values())]
    (HOME / "results.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for word in ("text_lm", "text_sst2", "out"):
        parser.add_argument(word, type=Path)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    asked = parser.parse_args()
    seeds = tuple(int(seed) for seed in asked.seeds.split(","))
    texts = {"shakespeare": asked.out / "shakespeare", "reviews": asked.out / "reviews"}
    for place in texts.values():
        place.mkdir(parents=True, exist_ok=True)
    shakespeare(asked.text_lm, texts["shakespeare"])
    reviews(asked.text_sst2, texts["reviews"])
    done: dict[str, Compared] = {}
    for number, (title, (recipe, text, stems)) in enumerate(PARTS.items(), 1):
        chosen = arms(recipe, stems, [f"data.source=text:{texts[text]}", *asked.sets])
        for count in range(1, len(seeds) + 1):
            place = asked.out / f"part-{number}"
            done[title] = compare(chosen, seeds[:count], place, title=title, say=print)
            save(done)


if __name__ == "__main__":
    main()
