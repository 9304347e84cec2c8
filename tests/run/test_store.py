# SPDX-License-Identifier: Apache-2.0
"""A teacher's answers on disk: written once, found again by sample and view."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tutelage.core.error import UserError
from tutelage.data.answers import Answers
from tutelage.models.load import load as load_model
from tutelage.run import store as storing
from tutelage.run.assemble import assemble
from tutelage.run.compare import compare
from tutelage.run.distill import distill
from tutelage.run.recipe import Recipe, parse
from tutelage.run.store import store

CROPS = [{"pad_crop": {"padding": 1}}]


def asked(**changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "teacher": {"model": "tutelage:resnet14", "weights": "teacher.safetensors"},
        "student": "tutelage:resnet8",
        "data": {"source": "digits", "batch_size": 100, "augment": CROPS},
        "objective": {"task": 0.5, "kd": 0.5},
        "train": {"epochs": 2, "save_every": None},
    }
    return parse({**base, **changes})


def with_store(recipe: Recipe, folder: str) -> Recipe:
    return parse({**recipe.plain(), "teacher": {"stored": folder}})


@pytest.fixture(autouse=True)
def _teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher's weights, and files of a few batches each."""
    from safetensors.torch import save_model

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    model = load_model({"model": "tutelage:resnet14"}, num_classes=10, in_channels=1, image_size=(8, 8))
    save_model(model.module, "teacher.safetensors")
    monkeypatch.setattr(storing, "FILE_BYTES", 100 * 40 * 5)  # five batches of ten numbers


def teacher_says(images: torch.Tensor) -> torch.Tensor:
    spec = {"model": "tutelage:resnet14", "weights": "teacher.safetensors"}
    model = load_model(spec, num_classes=10, in_channels=1, image_size=(8, 8))
    model.module.eval()
    with torch.no_grad():
        found: torch.Tensor = model(images)
    return found


@pytest.mark.parametrize("data", [{}, {"labels": 50, "labelled_per_batch": 20}, {"repeats": 2}])
def test_every_batch_finds_the_answers_about_its_own_views(data: dict[str, Any]) -> None:
    kept = store(asked(), Path("s"), quiet=True)
    assert (kept.samples, kept.views) == (1197, 2)
    assert len(list(Path("s").glob("*.safetensors"))) == 5  # 2 x 1,197 rows in files of 500: one crosses the views
    recipe = asked(data={**asked().plain()["data"], **data}, train={"epochs": 3, "seed": 7, "save_every": None})
    made = assemble(with_store(recipe, "s"))
    seen: set[tuple[int, int]] = set()
    for epoch in range(3):
        for batch in made.data.train.epoch(epoch):
            found = made.distiller.observe(batch)["teacher"].logits
            torch.testing.assert_close(found, teacher_says(batch.inputs), rtol=1e-4, atol=1e-4)
            seen.update(zip(batch.index.tolist(), batch.view.tolist(), strict=True))
    made.distiller.close()
    if "repeats" not in data:  # which meets half of the samples an epoch
        assert len({sample for sample, _ in seen}) == 1197
    assert len({view for _, view in seen}) <= 2 * 1197  # the third epoch shows what the first did


def test_without_augmentation_a_run_learns_the_same_as_beside_its_teacher() -> None:
    recipe = asked(data={"source": "digits", "batch_size": 100})
    kept = store(recipe, Path("s"), quiet=True)
    assert kept.views == 1
    live = distill(recipe, Path("live"), quiet=True)
    stored = distill(with_store(recipe, "s"), Path("stored"), quiet=True)
    assert live.scores["loss"] == pytest.approx(stored.scores["loss"], rel=1e-3)
    one, other = load_file("live/student.safetensors"), load_file("stored/student.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-3)
    assert "teacher" not in {path.name for path in Path("stored").iterdir()}


def test_it_goes_on_where_it_stopped() -> None:
    store(asked(), Path("whole"), quiet=True)
    store(asked(), Path("s"), quiet=True)
    finished = json.loads(Path("s/store.json").read_text())
    Path("s/store.json").write_text(json.dumps({k: v for k, v in finished.items() if k != "files"}))
    for number in (1, 4):
        Path(f"s/answers-{number:05d}.safetensors").unlink()
    untouched = Path("s/answers-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="s is an unfinished store: give the `tutelage store` command again"):
        Answers.open(Path("s"))
    store(asked(), Path("s"), quiet=True)
    assert Path("s/answers-00000.safetensors").stat().st_mtime_ns == untouched
    again, whole = (json.loads(Path(name, "store.json").read_text()) for name in ("s", "whole"))
    assert again == whole == finished


def test_a_finished_store_is_held_against_its_hashes() -> None:
    store(asked(), Path("s"), quiet=True)
    said: list[str] = []
    store(asked(), Path("s"), quiet=True, say=said.append)
    assert said[-1] == "s holds these answers already; every file is what it was"
    path = Path("s/answers-00003.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"s/answers-00003.safetensors is damaged: remove it and"):
        store(asked(), Path("s"), quiet=True)
    path.unlink()
    with pytest.raises(UserError, match=r"s/answers-00003.safetensors is missing: remove it and"):
        Answers.open(Path("s"))
    store(asked(), Path("s"), quiet=True)
    Answers.open(Path("s")).verify()
    with pytest.raises(UserError, match=r"s holds other answers \(seed differ\); choose another --out"):
        store(asked(train={"epochs": 2, "seed": 5}), Path("s"), quiet=True)


def test_sparse_answers_and_features() -> None:
    recipe = asked(objective={"task": 0.5, "fkd": 0.5, "at": 10.0, "srrl": 0.1})
    kept = store(recipe, Path("s"), views=1, top=3, quiet=True)
    assert kept.signals["logits.classes"] == "int32 [3]"
    assert kept.signals["stages[0]"] == "bfloat16 [16, 8, 8]"
    assert Path("s/lent.safetensors").exists()
    made = assemble(with_store(recipe, "s"))
    batch = next(iter(made.data.train.epoch(0)))
    signals = made.distiller.observe(batch)["teacher"]
    wanted = teacher_says(batch.inputs).softmax(1)
    assert torch.equal(signals.logits.topk(3).indices, wanted.topk(3).indices)
    torch.testing.assert_close(signals.logits.softmax(1).topk(3).values, wanted.topk(3).values, rtol=1e-4, atol=1e-5)
    weights = load_file("teacher.safetensors")
    assert torch.equal(signals.borrowed["classifier"].weight, weights["linear.weight"])  # type: ignore[arg-type]
    losses = made.distiller(batch, {"teacher": signals})
    losses.total.backward()
    assert set(losses.parts) >= {"task", "fkd", "at"}
    made.distiller.close()


def test_answers_about_texts_are_kept_token_by_token() -> None:
    Path("words.txt").write_text("to be or not to be that is the question\n" * 40)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1}
    recipe = parse(
        {
            "task": "language",
            "teacher": {"model": "hf:gpt2", **sizes, "fit": {"train": {"steps": 2}}},
            "student": {"model": "hf:gpt2", **sizes},
            "data": {"source": "text:words.txt", "batch_size": 16, "text": {"length": 12}},
            "objective": {"task": 1.0, "distillm": 1.0},
            "optimizer": {"name": "adamw", "lr": 0.01},
            "train": {"epochs": 2, "save_every": None},
        }
    )
    kept = store(recipe, Path("s"), top=4, quiet=True)
    assert kept.views == 1
    assert kept.signals["logits.probs"] == "float32 [12, 4]"
    made = assemble(with_store(recipe, "s"))
    live = assemble(recipe, teacher_weights=Path("s/teacher/student.safetensors"))
    batch = next(iter(made.data.train.epoch(1)))
    found = made.distiller.observe(batch)["teacher"].logits.softmax(-1).topk(4)
    wanted = live.distiller.observe(batch)["teacher"].logits.softmax(-1).topk(4)
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-4, atol=1e-5)
    made.distiller(batch, made.distiller.observe(batch)).total.backward()
    made.distiller.close()
    live.distiller.close()


def test_arms_with_stored_answers_go_side_by_side() -> None:
    store(asked(), Path("s"), quiet=True)
    plain = with_store(asked(train={"steps": 3}), "s")
    other = parse({**plain.plain(), "objective": {"task": 0.5, "dkd": 0.5}})
    for place, apart in (("together", False), ("apart", True)):
        compare({"kd": plain, "dkd": other}, (0,), Path(place), title="x", quiet=True, apart=apart)
    for arm in ("kd", "dkd"):
        one, two = (load_file(f"{place}/{arm}-0/student.safetensors") for place in ("together", "apart"))
        assert all(torch.equal(one[name], two[name]) for name in one)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"augment": None}, r"the answers in s are about data.augment = .*pad_crop.*, and the recipe has None"),
        ({"mixup": 0.2}, "data.mixup and data.cutmix: stored answers are about single images"),
        ({"views": {"strong": ["flip"]}}, "data.views: stored answers are about single images"),
    ],
)
def test_other_views_are_refused(data: dict[str, Any], said: str) -> None:
    store(asked(), Path("s"), views=1, quiet=True)
    with pytest.raises(UserError, match=said):
        assemble(with_store(asked(data={**asked().plain()["data"], **data}), "s"))


def test_other_samples_are_refused() -> None:
    from tutelage.data.digits import digits

    store(asked(), Path("s"), views=1, quiet=True)
    answers, words = Answers.open(Path("s")), asked().data.model_dump(mode="json")
    train, validation = digits()
    answers.require(words, train)
    with pytest.raises(UserError, match="are about 1197 samples, and there are 600"):
        answers.require(words, validation)
    inked = type(train)(255 - train.images, train.targets, train.class_names, train.source)
    with pytest.raises(UserError, match=r"digits.*\[0\] is not what it was when the answers in s were stored"):
        answers.require(words, inked)
    renamed = type(train)(train.images, train.targets, train.class_names, "other")
    with pytest.raises(UserError, match="are about samples of other names, or in another order"):
        answers.require(words, renamed)


def test_a_term_that_reads_more_than_was_stored_is_named() -> None:
    store(asked(), Path("s"), views=1, quiet=True)
    recipe = asked(objective={"task": 0.5, "mgd": 0.1})
    with pytest.raises(UserError, match=r"teacher \(objective: mgd\): s holds logits, and a term reads 'map'"):
        assemble(with_store(recipe, "s"))


def test_what_cannot_be_stored_is_said() -> None:
    alone = parse({k: v for k, v in asked(objective={"task": 1.0}).plain().items() if k != "teacher"})
    with pytest.raises(UserError, match="the recipe has no teacher to ask"):
        store(alone, Path("s"), quiet=True)
    moving = asked(teacher={**asked().plain()["teacher"], "mode": "batch_statistics"})
    with pytest.raises(UserError, match="a teacher in mode batch_statistics answers by the batch"):
        store(moving, Path("s"), quiet=True)
    with pytest.raises(UserError, match="--top must be at least 1, not 0"):
        store(asked(), Path("s"), top=0, quiet=True)
    with pytest.raises(UserError, match="mixed images and further views of a batch cannot be stored"):
        store(asked(data={**asked().plain()["data"], "mixup": 0.5}), Path("s"), quiet=True)
    late = {"epochs": 1, "augment": "none"}
    with pytest.raises(UserError, match=r"data\.augment_late: views that come again every epoch have no last epochs"):
        store(asked(data={**asked().plain()["data"], "augment_late": late}), Path("s"), quiet=True)
    with pytest.raises(UserError, match=r"no-such holds no stored answers \(no store.json\): make them with"):
        assemble(with_store(asked(), "no-such"))
