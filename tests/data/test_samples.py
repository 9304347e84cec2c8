# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tutelage.data.samples import Arrays, Held, Joined, Samples, stratified, to_unit, without


def arrays(labels: list[int], source: str = "set") -> Arrays:
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).to(torch.uint8)
    return Arrays(images, torch.tensor(labels), ("a", "b"), source)


def test_arrays_are_held_samples() -> None:
    samples = arrays([0, 1, 0])
    assert isinstance(samples, Samples)
    assert isinstance(samples, Held)
    assert samples.read(2).unique().tolist() == [2]
    assert samples.read_many(torch.tensor([2, 0]))[:, 0, 0, 0].tolist() == [2, 0]
    assert samples.name(1) == "set[1]"


def test_kept_samples_are_counted_anew() -> None:
    kept = arrays([0, 1, 0]).keep(torch.tensor([2, 1]))
    assert kept.targets.tolist() == [0, 1]
    assert kept.read(0).unique().tolist() == [2]
    assert kept.relabel(torch.tensor([-1, 1])).targets.tolist() == [-1, 1]


def test_joined_sets_are_read_from_their_own_part() -> None:
    joined = Joined.of(arrays([0, 1], "first"), arrays([1, 1, 1], "second"))
    assert len(joined) == 5
    assert joined.class_names == ("a", "b")
    assert [joined.name(index) for index in (1, 2, 4)] == ["first[1]", "second[0]", "second[2]"]
    kept = joined.keep(torch.tensor([4, 0]))
    assert kept.targets.tolist() == [1, 0]
    assert [int(kept.read(index).max()) for index in (0, 1)] == [2, 0]
    assert kept.relabel(torch.tensor([-1, -1])).targets.tolist() == [-1, -1]
    assert not hasattr(joined, "read_many")  # its parts may differ in size


@pytest.mark.parametrize("count", [3, 10, 37, 100])
def test_stratified_choice_keeps_every_class_share(count: int) -> None:
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 10 + [-1] * 50)
    chosen = stratified(targets, count, seed=5)
    assert len(chosen) == count
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    sizes = targets[chosen].bincount(minlength=3)
    assert (sizes >= 1).all()
    if count >= 10:
        assert (sizes - torch.tensor([0.6, 0.3, 0.1]) * count).abs().max() <= 1


def test_stratified_choice_is_a_function_of_its_seed_and_nested() -> None:
    targets = torch.arange(1000) % 10
    small, large = (set(stratified(targets, count, seed=3).tolist()) for count in (50, 200))
    assert small < large
    assert small == set(stratified(targets, 50, seed=3).tolist())
    assert small != set(stratified(targets, 50, seed=4).tolist())


def test_stratified_choice_of_fewer_than_classes_takes_the_largest_shares() -> None:
    assert stratified(torch.tensor([0, 1, 1, 1, 2]), 1, seed=0).tolist()[0] in (1, 2, 3)
    assert stratified(torch.tensor([-1, -1]), 0, seed=0).tolist() == []


def test_without_is_the_complement() -> None:
    assert without(5, torch.tensor([3, 0])).tolist() == [1, 2, 4]


def test_unit_pixels() -> None:
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0.0, 0.2, 1.0])
    same = torch.rand(3)
    assert to_unit(same) is same
