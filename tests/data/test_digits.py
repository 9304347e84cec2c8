# SPDX-License-Identifier: Apache-2.0
import torch
from sklearn.datasets import load_digits

from tutelage.data.digits import digits


def test_split_is_whole_disjoint_and_stratified() -> None:
    train, validation = digits()
    assert (len(train), len(validation)) == (1197, 600)
    rows = {tuple(image.flatten().mul(16).int().tolist()) for image in torch.cat([train.images, validation.images])}
    found = load_digits()
    assert rows == {tuple(map(int, row)) for row in found.data}
    assert (
        torch.cat([train.targets, validation.targets]).bincount().tolist()
        == torch.tensor(found.target).bincount().tolist()
    )
    share = validation.targets.bincount() / torch.tensor(found.target).bincount()
    assert (share - 600 / 1797).abs().max() < 0.01


def test_images_lie_in_the_unit_interval_and_belong_to_their_label() -> None:
    train, _ = digits()
    found = load_digits()
    table = {tuple(map(int, row)): int(label) for row, label in zip(found.data, found.target, strict=True)}
    assert train.images.min() == 0
    assert train.images.max() == 1
    for index in range(0, len(train), 97):
        assert table[tuple(train.read(index).flatten().mul(16).int().tolist())] == train.targets[index]


def test_split_is_always_the_same() -> None:
    torch.manual_seed(1)
    first = digits()[1].images
    torch.manual_seed(2)
    assert torch.equal(first, digits()[1].images)
