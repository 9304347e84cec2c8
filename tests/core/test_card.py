# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest

from tutelage import methods
from tutelage.core.card import Card, read
from tutelage.core.error import UserError, nearest
from tutelage.methods.logits.kd import KD

TEXT = """
from tutelage.core import Card
CARD = Card(
    name="XYZ", title="T", authors="A", year=2024, venue="V", paper="arxiv:2401.00000", claims="C",
    reads={reads}, golden=("core/xyz",),
)
OBJECTIVE = {objective}
"""


def write(folder: Path, **words: Any) -> Path:
    path = folder / "xyz.py"
    given = {"reads": {"student": ("map",)}, "objective": {"xyz": {"weight": 2.0}}, **words}
    text = TEXT
    for name, value in given.items():
        text = text.replace(f"{{{name}}}", value if isinstance(value, str) else repr(value))
    path.write_text(text, encoding="utf-8")
    return path


def test_a_card_is_read_without_running_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + "\nraise RuntimeError\n", encoding="utf-8")
    entry = read(path)
    assert entry is not None
    assert (entry.stem, entry.family) == ("xyz", tmp_path.name)
    assert entry.objective == {"xyz": {"weight": 2.0}}
    assert entry.card.reads == {"student": ("map",)}
    assert entry.card.golden == ("core/xyz",)
    assert (entry.card.averages, entry.card.batch, entry.card.labels) == ("samples", "independent", ("none",))


def test_a_file_without_a_card_is_no_method(tmp_path: Path) -> None:
    path = tmp_path / "xyz.py"
    path.write_text("OBJECTIVE = {'xyz': 1.0}\n", encoding="utf-8")
    assert read(path) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"reads": "dict(student=('map',))"}, "xyz.py: CARD must be made of literals only"),
        ({"objective": "{'xyz': 1 + WEIGHT}"}, "xyz.py: OBJECTIVE must be made of literals only"),
        ({"reads": "{}, averagse='samples'"}, "xyz.py: CARD must be made of literals only"),
    ],
)
def test_what_is_not_literal_is_named(tmp_path: Path, words: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(write(tmp_path, **words))


@pytest.mark.parametrize(
    ("reads", "needed"),
    [
        ({"student": ("map",)}, False),
        ({"student": ("map",), "teacher": ()}, False),
        ({"student": ("map",), "teacher": ("map",)}, True),
        ({"student": ("map",), "borrows": ("classifier",)}, True),
    ],
)
def test_a_teacher_is_needed_by_what_is_read(tmp_path: Path, reads: dict[str, Any], needed: bool) -> None:
    entry = read(write(tmp_path, reads=reads))
    assert entry is not None
    assert entry.card.needs_teacher is needed


def test_a_card_is_made_of_keywords() -> None:
    with pytest.raises(TypeError):
        Card("KD")  # type: ignore[call-arg]


def test_the_catalogue_finds_by_stem_and_by_path() -> None:
    assert methods.find("kd") is methods.find("tutelage.methods.logits.kd:KD") is KD
    assert methods.family("kd") == "logits"
    assert methods.entry("kd").card is methods.cards()["kd"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kdd", "unknown method 'kdd'; did you mean kd?"),
        ("no.such:KD", "method 'no.such:KD': cannot import 'no.such'"),
        (
            "tutelage.methods.logits.kd:KDD",
            "method 'tutelage.methods.logits.kd:KDD': tutelage.methods.logits.kd has no",
        ),
        ("tutelage.methods.logits.kd:kd", "method 'tutelage.methods.logits.kd:kd' is not a Term"),
    ],
)
def test_an_unknown_method_is_named(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        methods.find(name)
    assert str(error.value).startswith(said)


def test_the_nearest_word() -> None:
    assert nearest("temprature", ("temperature", "form")) == "; did you mean temperature?"
    assert nearest("x", ("b", "a", "b")) == "; valid: a, b"
    assert nearest("x", ()) == ""
    assert nearest("#", map(str, range(40))).endswith(", ...")
