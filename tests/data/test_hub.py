# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tutelage.core.error import UserError
from tutelage.data.hub import hub

datasets: Any = pytest.importorskip("datasets")


def table(labels: list[Any], *, label: str = "label", image: str = "image", named: bool = True) -> Any:
    pictures = [Image.fromarray(np.full((6, 5, 3), number, np.uint8)) for number in range(len(labels))]
    columns: dict[str, Any] = {image: datasets.Image()}
    if named:
        columns[label] = datasets.ClassLabel(names=["cat", "dog"])
    elif labels and isinstance(labels[0], str):
        columns[label] = datasets.Value("string")
    else:
        columns[label] = datasets.Value("int64")
    return datasets.Dataset.from_dict({image: pictures, label: labels}, features=datasets.Features(columns))


def saved(root: Path, **tables: Any) -> str:
    datasets.DatasetDict(tables).save_to_disk(str(root / "set"))
    return str(root / "set")


def test_splits_images_and_names(tmp_path: Path) -> None:
    sets = hub(saved(tmp_path, train=table([0, 1, 1]), test=table([1])))
    assert list(sets) == ["train", "validation"]
    train = sets["train"]
    assert len(train) == 3
    assert train.class_names == ("cat", "dog")
    assert train.targets.tolist() == [0, 1, 1]
    assert train.read(2).shape == (3, 6, 5)
    assert train.read(2).unique().tolist() == [2]
    kept = train.keep(torch.tensor([2, 0]))
    assert kept.read(0).unique().tolist() == [2]
    assert kept.targets.tolist() == [1, 0]
    assert kept.relabel(torch.tensor([-1, 0])).targets.tolist() == [-1, 0]
    assert train.name(1).endswith("set/train[1]")


def test_a_single_table_is_the_training_set(tmp_path: Path) -> None:
    table([0, 1]).save_to_disk(str(tmp_path / "one"))
    assert list(hub(str(tmp_path / "one"))) == ["train"]


def test_columns_are_told_by_type_and_by_name(tmp_path: Path) -> None:
    assert hub(saved(tmp_path / "a", train=table([0, 1], label="kind", image="img")))["train"].image == "img"
    numbers = hub(saved(tmp_path / "b", train=table([0, 2], label="target", named=False)))["train"]
    assert numbers.class_names == ("0", "1", "2")


def test_words_are_classes_in_sorted_order(tmp_path: Path) -> None:
    words = {"train": table(["b", "a", "b"], named=False), "validation": table(["a"], named=False)}
    sets = hub(saved(tmp_path, **words))
    assert sets["train"].class_names == sets["validation"].class_names == ("a", "b")
    assert sets["train"].targets.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ({"test": [0]}, {}, " has no split train; it has test"),
        ({"train": [0]}, {"label": "lable"}, "has no column 'lable'; did you mean label?"),
        ({"train": [0]}, {"image": "img"}, "data.image_column: "),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, tables: dict[str, Any], options: dict[str, str], message: str) -> None:
    place = saved(tmp_path, **{split: table(labels) for split, labels in tables.items()})
    with pytest.raises(UserError, match=re.escape(message)):
        hub(place, **options)  # type: ignore[arg-type]


def test_columns_that_cannot_be_told(tmp_path: Path) -> None:
    place = saved(tmp_path, train=table([0, 1], label="x", named=False))
    message = f"{place}/train: which column is the label? Say data.label_column; columns: image (Image), x (Value)"
    with pytest.raises(UserError, match=re.escape(message)):
        hub(place)
    assert hub(place, label="x")["train"].targets.tolist() == [0, 1]


def test_a_strange_word_in_validation(tmp_path: Path) -> None:
    place = saved(tmp_path, train=table(["cat"], named=False), validation=table(["cats"], named=False))
    with pytest.raises(UserError, match=r"class 'cats' is not among the training classes; did you mean cat\?"):
        hub(place)


def test_a_folder_that_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"data.source: 'hf:{tmp_path}' cannot be had (")):
        hub(str(tmp_path))
