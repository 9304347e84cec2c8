# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from tutelage.core.error import UserError
from tutelage.data.digits import digits
from tutelage.data.load import load
from tutelage.data.objects import names_of, samples, sets_of, targets_of


class Photos(Dataset[tuple[Any, int]]):
    """PIL images without a table of classes."""

    classes = ("cat", "dog")

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.new("RGB", (5 + index, 4)), index % 2


class Tabled(Photos):
    """Says its classes; reading an image to find one would fail."""

    targets = [1, 0, 1, 0, 1, 0]  # noqa: RUF012

    def __getitem__(self, index: int) -> tuple[Any, int]:
        raise AssertionError("read")


class Odd(Photos):
    """Gives no pairs."""

    def __getitem__(self, index: int) -> Any:
        return Image.new("RGB", (4, 4))


class Stream(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Any:
        return iter(())


def pairs(count: int = 6) -> TensorDataset:
    return TensorDataset(torch.arange(count * 4.0).view(count, 1, 2, 2) / 100, torch.arange(count) % 3)


def test_targets_come_from_a_table_or_from_the_samples() -> None:
    assert targets_of(pairs(), "data").tolist() == [0, 1, 2, 0, 1, 2]
    assert targets_of(Photos(), "data").tolist() == [0, 1, 0, 1, 0, 1]
    assert targets_of(Tabled(), "data").tolist() == Tabled.targets
    assert targets_of(Subset(pairs(), [4, 0]), "data").tolist() == [1, 0]
    assert targets_of(ConcatDataset([pairs(2), Subset(pairs(), [5])]), "data").tolist() == [0, 1, 2]


def test_names_come_from_the_set() -> None:
    assert names_of(Subset(Photos(), [0])) == ("cat", "dog")
    assert names_of(ConcatDataset([Photos(), Photos()])) == ("cat", "dog")
    assert names_of(pairs()) == ()
    assert samples(pairs()).class_names == ("0", "1", "2")


def test_images_keep_their_places() -> None:
    found = samples(Subset(pairs(), [3, 1]))
    assert torch.equal(found.read(1), pairs()[1][0])
    assert torch.equal(found.keep(torch.tensor([1])).read(0), pairs()[1][0])
    photo = samples(Photos()).read(2)
    assert photo.shape == (3, 4, 7)
    assert photo.dtype == torch.uint8


def test_what_is_samples_already_stays() -> None:
    train, _ = digits()
    assert samples(train) is train


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Odd(), "data: a sample is a pair (image, class), not Image"),
        (TensorDataset(torch.zeros(3, 1, 2, 2), torch.rand(3)), "data: TensorDataset does not give one class an image"),
        (
            TensorDataset(torch.zeros(3, 1, 2, 2), torch.zeros(3, 2).long()),
            "data: TensorDataset does not give one class",
        ),
        (Stream(), "data: expected a data set with a length, or a DataLoader of one, not Stream"),
        (DataLoader(Stream()), "data: expected a data set with a length, or a DataLoader of one, not Stream"),
    ],
)
def test_what_is_no_set_of_pairs(given: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        samples(given)
    assert str(error.value).startswith(said)


def test_labels_out_of_range_are_named() -> None:
    class Three(TensorDataset):
        classes = ("a", "b", "c")

    def made(labels: list[int]) -> Three:
        return Three(torch.zeros(len(labels), 1, 2, 2), torch.tensor(labels))

    load({"source": "object"}, sets=sets_of({"train": made([0, 1, 2, -1, 0, 1, 2]), "validation": made([0, 1, 2])}))
    with pytest.raises(UserError) as error:
        load({"source": "object"}, sets=sets_of((made([0, 1, 2]), made([0, 3, 7]))))
    assert str(error.value) == (
        "validation: Three[1]: class 3 is out of range: the 3 classes are 0 to 2, and -1 stands for no label; "
        "2 samples are wrong"
    )


def test_validation_is_held_out_where_there_is_none() -> None:
    found = load({"source": "object", "validation_share": 0.5}, sets=sets_of(pairs(12)))
    assert (len(found.train.samples), len(found.validation.samples), found.held_out) == (6, 6, True)
    seen: list[Tensor] = [found.train.samples.read(n) for n in range(6)]
    assert not any(torch.equal(one, found.validation.samples.read(n)) for one in seen for n in range(6))
    both = load({"source": "object"}, sets=sets_of({"train": pairs(6), "validation": pairs(3), "test": pairs(3)}))
    assert (both.held_out, both.test is not None) == (False, True)
