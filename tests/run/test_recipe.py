# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest
import yaml

from tutelage.core.error import UserError
from tutelage.run.recipe import Recipe, load, locate, parse, read_yaml, shipped

SMALL: dict[str, Any] = {"student": "tutelage:resnet8", "data": "digits", "train": {"epochs": 2}}


def wrong(given: dict[str, Any], *sets: str) -> str:
    """Return what is said of a recipe that is refused."""
    with pytest.raises(UserError) as caught:
        parse(given, sets, where="r.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("r.yaml: ")


def changed(place: str, value: Any) -> dict[str, Any]:
    """Return the small recipe with one value more."""
    section, _, key = place.partition(".")
    words = {"student": "model", "data": "source"}
    before = SMALL.get(section, {})
    before = {words[section]: before} if isinstance(before, str) else dict(before)
    return {**SMALL, section: {**before, key: value} if key else value}


# --- reading -----------------------------------------------------------------------------------------------


def test_sections_may_be_written_as_one_word() -> None:
    found = parse({**SMALL, "task": "classification", "teacher": "tutelage:resnet20"})
    assert found.task.name == "classification"
    assert found.student.model == "tutelage:resnet8"
    assert found.data.source == "digits"
    assert found.teacher is not None
    assert found.teacher.model == "tutelage:resnet20"


def test_what_is_saved_is_whole_and_reads_back_the_same() -> None:
    before = parse({**SMALL, "student": {"model": "tutelage:resnet8", "width": 0.25}, "objective": {"kd": 1e-4}})
    text = before.text()
    assert parse(read_yaml(text, "again")).plain() == before.plain()
    sections = yaml.safe_load(text)
    assert sections["student"]["width"] == 0.25
    assert set(sections["train"]) == set(type(before.train).model_fields)
    assert set(sections["data"]) == set(type(before.data).model_fields)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("5.0e-4", 5e-4), ("1E3", 1e3), (".5", 0.5), ("-2.", -2.0)]
)
def test_a_number_in_powers_of_ten_is_a_number(text: str, value: float) -> None:
    assert read_yaml(f"a: {text}", "x")["a"] == value


@pytest.mark.parametrize("text", ["1-4", "e3", "resnet18", "3 epochs", "0.5x", "12:30:45x"])
def test_a_word_stays_a_word(text: str) -> None:
    assert read_yaml(f"a: {text}", "x")["a"] == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "x: a recipe is a mapping of sections"),
        ("- a\n- b", "x: a recipe is a mapping of sections"),
        ("a: 1\nb: 2\na: 3", "x, line 3, column 1: key 'a' is written twice"),
        ("s:\n  a: 1\n  a: 3", "x, line 3, column 3: key 'a' is written twice"),
        ("a:\n\tb: 1", "x, line 2, column 1: found character '\\t' that cannot start any token"),
        ("a: [1, 2", "x, line 1, column 9: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "x, line 1, column 5: mapping values are not allowed here"),
        ("? [1]\n: 2", "x, line 1, column 3: a key must be a word"),
        ("a: !!python/object:os.system {}", "x, line 1, column 4: could not determine a constructor for the tag"),
        ("a: *b", "x, line 1, column 4: found undefined alias 'b'"),
    ],
)
def test_what_is_no_yaml_is_named_with_its_place(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_yaml(text, "x")
    assert str(caught.value).startswith(said)


def test_keys_that_are_merged_are_not_written_twice() -> None:
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "x")["b"] == {"x": 1, "y": 2}


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("objektive", {}, "objektive: unknown key; did you mean objective?"),
        ("train.epohcs", 3, "train.epohcs: unknown key; did you mean epochs?"),
        ("data.batchsize", 3, "data.batchsize: unknown key; did you mean batch_size?"),
        ("teacher", 5, "teacher: should be a section with keys, not 5"),
        ("train.epochs", "three", "train.epochs: should be a valid number, not 'three'"),
        ("train.epochs", 0, "train.epochs: should be greater than 0, not 0"),
        ("train.epochs", float("inf"), "train.epochs: should be a finite number, not inf"),
        ("train.accumulate", 0, "train.accumulate: should be greater than or equal to 1, not 0"),
        ("train.seed", 0.5, "train.seed: should be a valid integer, not 0.5"),
        ("train.ema", 1.0, "train.ema.decay: should be less than 1, not 1.0"),
        ("train.ema", {"ramp": "2000 steps"}, "train.ema.decay: missing"),
        ("train.ema", {"decay": 0.9, "ramp": 2000}, "train.ema.ramp: cannot read '2000' as a length"),
        ("train.ema", {"decay": 0.9, "rampe": "1 epochs"}, "train.ema.rampe: unknown key; did you mean ramp?"),
        ("train.decay", "cosin", "train.decay: 'cosin' is not known; did you mean cosine?"),
        ("train.precision", "fp61", "train.precision: 'fp61' is not known; did you mean fp16?"),
        ("train.milestones", {"a": 1}, "train.milestones: should be a list, not {'a': 1}"),
        ("train.milestones", [1, "b"], "train.milestones.1: should be a valid number, not 'b'"),
        ("train.warmup", 3, 'train.warmup: cannot read \'3\' as a length: write "20 epochs" or "500 steps"'),
        ("train.save_every", "daily", "train.save_every: cannot read 'daily' as a length"),
        ("data.labels", "many", "data.labels: 'many' is none of int, float"),
        ("data.image_size", [1, 2, 3], "data.image_size: [1, 2, 3] is none of int, tuple"),
        ("data.augment_late", {"epochs": 3}, "data.augment_late.augment: missing"),
        ("data.augment_late", {"epochs": 0, "augment": "none"}, "data.augment_late.epochs: should be greater than or"),
        ("data.augment_late", {"epoch": 3}, "data.augment_late.epochs: missing; data.augment_late.augment: missing"),
        ("optimizer.lr", -1, "optimizer.lr: should be greater than 0, not -1"),
        ("train.steps", 5, "train: give the length once: epochs or steps"),
        ("student", {"width": 1}, "student.model: missing"),
        ("compare.arms", {"kd": 3}, "compare.arms.kd: should be a section with keys, not 3"),
    ],
)
def test_a_fault_is_named_with_its_place(place: str, value: Any, said: str) -> None:
    assert wrong(changed(place, value)).startswith(said)


def test_all_faults_come_in_one_line() -> None:
    assert wrong({"student": "tutelage:resnet8", "train": {"epochs": 0, "sede": 1}}) == (
        "data: missing; train.epochs: should be greater than 0, not 0; train.sede: unknown key; did you mean seed?"
    )


def test_a_long_value_is_cut() -> None:
    assert len(wrong(changed("train.epochs", "x" * 500))) < 130


# --- changes -----------------------------------------------------------------------------------------------


def test_values_are_set_by_their_place() -> None:
    sets = ["optimizer.lr=1e-2", "train.milestones=[3, 4.5]", "train.clip=null", "data.labels=50"]
    sets += ["task.label_smoothing=0.1", "objective.kd.temperature=2", "student.width=0.5"]
    found = parse(SMALL, sets)
    assert found.optimizer.lr == 0.01
    assert list(found.train.milestones) == [3, 4.5]
    assert not found.train.clip
    assert (found.data.source, found.data.labels) == ("digits", 50)
    assert found.task.options == {"label_smoothing": 0.1}
    assert found.objective["kd"] == {"temperature": 2}
    assert (found.student.model, found.student.options) == ("tutelage:resnet8", {"width": 0.5})


def test_a_bare_weight_keeps_its_number_when_an_option_is_set() -> None:
    assert parse({**SMALL, "objective": {"kd": 0.9}}, ["objective.kd.temperature=2"]).objective == {
        "kd": {"weight": 0.9, "temperature": 2}
    }


def test_the_recipe_that_is_changed_stays_as_it_was() -> None:
    given = {**SMALL, "objective": {"kd": {"weight": 0.9}}}
    parse(given, ["objective.kd.weight=0.1", "train.epochs=7"])
    assert given["objective"] == {"kd": {"weight": 0.9}}
    assert SMALL["train"] == {"epochs": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.epochs", "--set takes section.key=value, not 'train.epochs'"),
        ("=5", "--set takes section.key=value, not '=5'"),
        ("train.milestones=[1,", "--set train.milestones=[1,: the value is not YAML (expected the node content"),
        ("train.epohcs=3", "train.epohcs: unknown key; did you mean epochs?"),
        ("trian.epochs=3", "trian: unknown key; did you mean train?"),
        ("lr=3", "lr: unknown key; valid: compare, data"),
        ("data={a: 1, a: 2}", "--set data={a: 1, a: 2}: the value is not YAML (key 'a' is written twice)"),
    ],
)
def test_a_change_that_cannot_be_made_is_named(change: str, said: str) -> None:
    assert wrong(SMALL, change).startswith(said)


def test_a_list_has_no_keys() -> None:
    assert wrong({**SMALL, "train": {"epochs": 1, "milestones": [1]}}, "train.milestones.0=2") == (
        "--set train.milestones.0=2: milestones holds a list, which has no keys; set it as a whole"
    )


# --- files -------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


BASE = """
student: tutelage:resnet8
data: digits
objective: {task: 0.1, kd: {weight: 0.9, temperature: 4}}
train: {epochs: 2, seed: 3}
"""


def test_a_base_is_joined_section_by_section_and_an_objective_replaced(tmp_path: Path) -> None:
    written(tmp_path, "low.yaml", BASE)
    top = "base: low\ndata: {labels: 50}\nobjective: {mgd: 1.0}\ntrain: {epochs: 5}\n"
    found = load(written(tmp_path, "top.yaml", top))
    assert (found.data.source, found.data.labels) == ("digits", 50)
    assert (found.train.epochs, found.train.seed) == (5, 3)
    assert found.objective == {"mgd": 1.0}
    assert load(str(tmp_path / "low.yaml")).objective["kd"] == {"weight": 0.9, "temperature": 4}


def test_options_of_one_model_or_optimizer_are_not_those_of_another(tmp_path: Path) -> None:
    written(
        tmp_path,
        "low.yaml",
        "student: {model: tutelage:resnet8, width: 0.5}\ndata: {source: digits, batch_size: 32}\n"
        "optimizer: {name: sgd, lr: 0.2, momentum: 0.9}\ntrain: {epochs: 2}\n",
    )
    other = "base: low\nstudent: tutelage:vgg8\ndata: elsewhere\noptimizer: {name: adamw, lr: 0.01}\n"
    found = load(written(tmp_path, "other.yaml", other))
    assert found.student.options == {}
    assert found.optimizer.options == {}
    assert (found.data.source, found.data.batch_size) == ("elsewhere", 32)
    same = "base: low\nstudent: {model: tutelage:resnet8, shortcut: B}\noptimizer: {lr: 0.01}\n"
    found = load(written(tmp_path, "same.yaml", same))
    assert found.student.options == {"width": 0.5, "shortcut": "B"}
    assert found.optimizer.options == {"momentum": 0.9}


def test_a_base_may_be_shipped(tmp_path: Path) -> None:
    found = load(written(tmp_path, "top.yaml", "base: digits_few_labels\ntrain: {epochs: 1}\n"))
    assert found.data == load("digits_few_labels").data
    assert found.train.epochs == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: nowhere", "top.yaml: base: no recipe 'nowhere'; valid: "),
        ("base: digits_few_label", "top.yaml: base: no recipe 'digits_few_label'; did you mean digits_few_labels?"),
        ("base: middle", "top.yaml: base: 'middle' has a base itself; one level only"),
        ("base: [a]", "top.yaml: base: no recipe"),
    ],
)
def test_a_base_that_cannot_be_one_is_named(tmp_path: Path, text: str, said: str) -> None:
    written(tmp_path, "middle.yaml", "base: low\n")
    written(tmp_path, "low.yaml", BASE)
    with pytest.raises(UserError) as caught:
        load(written(tmp_path, "top.yaml", text))
    assert str(caught.value).startswith(said)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match=r"a\.yaml cannot be read: it is no text$"):
        load(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").mkdir()
    with pytest.raises(UserError, match=r"b\.yaml cannot be read: Is a directory$"):
        load(str(tmp_path / "b.yaml"))


def test_shipped_recipes_are_found_by_name_and_by_stem() -> None:
    names = shipped()
    assert locate("kd/demo") == names["kd/demo"]
    assert locate("tour") == names["tour"]
    with pytest.raises(UserError, match=r"recipe 'demo' is ambiguous: .*kd/demo, .*mgd/demo"):
        locate("demo")
    with pytest.raises(UserError, match=r"no recipe 'tuor'; did you mean tour\?"):
        locate("tuor")


def test_a_recipe_is_frozen() -> None:
    found = parse(SMALL)
    assert isinstance(found, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        found.train.epochs = 3
