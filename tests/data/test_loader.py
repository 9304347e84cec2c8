# SPDX-License-Identifier: Apache-2.0
import pickle
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Frame
from tutelage.core.error import UserError
from tutelage.data import augment
from tutelage.data.folder import Files
from tutelage.data.loader import Late, Loader, Replay
from tutelage.data.mix import Mix
from tutelage.data.samples import Arrays, Dense


def numbered(count: int, labelled: int | None = None, classes: int = 3) -> Arrays:
    """Images whose every pixel is their sample id."""
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    targets = torch.arange(count) % classes
    targets[count if labelled is None else labelled :] = -1
    return Arrays(images, targets, tuple("abc"[:classes]))


def noise(images: Tensor, view: Tensor) -> Tensor:
    """An augmentation that only the key decides."""
    return images + view[:, None, None, None] % 997


@pytest.fixture
def files(tmp_path: Path) -> Files:
    draw = np.random.default_rng(0)
    paths = []
    for number in range(9):
        path = tmp_path / f"{number}.png"
        Image.fromarray(draw.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return Files(tuple(paths), torch.arange(9) % 3, ("a", "b", "c"))


def equal(first: Batch, second: Batch) -> bool:
    names = ("inputs", "target", "labelled", "index", "view")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def ids(loader: Loader, epoch: int = 0) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader.epoch(epoch)]


def test_every_sample_comes_once_an_epoch_with_its_own_target() -> None:
    samples = numbered(100)
    loader = Loader(samples, 16, seed=3, train=True)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch == len(loader) == 7
    assert sorted(number for batch in batches for number in batch.index.tolist()) == list(range(100))
    for batch in batches:
        assert torch.equal(batch.inputs[:, 0, 0, 0].long(), batch.index)
        assert torch.equal(batch.target, samples.targets[batch.index])
        assert batch.labelled.all()


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first, again = (Loader(numbered(64), 16, seed=3, train=True) for _ in range(2))
    assert ids(first, 0) == ids(again, 0)
    assert ids(first, 5) == ids(again, 5)
    assert ids(first, 0) != ids(first, 1)
    assert ids(first, 0) != ids(Loader(numbered(64), 16, seed=4, train=True), 0)


def test_order_is_mixed_well() -> None:
    """A place holds any sample about equally often over seeds: chi-square over 64 cells, far from both ends."""
    counts = torch.zeros(8, 8)
    for seed in range(400):
        order = torch.tensor(ids(Loader(numbered(8), 8, seed=seed, train=True))[0])
        counts[torch.arange(8), order] += 1
    chi_square = ((counts - 50) ** 2 / 50).sum()
    assert 20 < chi_square < 95  # 49 degrees of freedom


def test_evaluation_keeps_the_order_and_the_last_batch() -> None:
    loader = Loader(numbered(33), 16, train=False)
    assert ids(loader) == [list(range(16)), list(range(16, 32)), [32]]


def test_an_epoch_goes_on_from_any_position() -> None:
    loader = Loader(numbered(50), 8, seed=1, train=True, transform=noise)
    whole = list(loader.epoch(2))
    for start in (0, 3, len(whole) - 1, len(whole)):
        rest = list(Loader(numbered(50), 8, seed=1, train=True, transform=noise).epoch(2, start))
        assert len(rest) == len(whole) - start
        assert all(equal(one, other) for one, other in zip(rest, whole[start:], strict=True))


def test_augmentation_is_a_function_of_seed_epoch_and_sample() -> None:
    big, small = (Loader(numbered(40), size, seed=1, train=True, transform=noise) for size in (40, 7))

    def by_sample(loader: Loader, epoch: int) -> dict[int, float]:
        batches = list(loader.epoch(epoch))
        return {int(i): float(x[0, 0, 0]) for b in batches for i, x in zip(b.index, b.inputs, strict=True)}

    assert by_sample(big, 0) == by_sample(small, 0)
    assert by_sample(big, 0) != by_sample(big, 1)


def test_a_stored_view_is_replayed_from_its_key() -> None:
    samples = numbered(20)
    batch = next(Loader(samples, 8, seed=1, train=True, transform=noise).epoch(4))
    assert torch.equal(noise(samples.read_many(batch.index), batch.view), batch.inputs)


def test_further_views_have_keys_of_their_own() -> None:
    batch = next(Loader(numbered(20), 8, train=True, transform=noise, views={"strong": noise}).epoch())
    assert batch.views["strong"].shape == batch.inputs.shape
    assert (batch.views["strong"] != batch.inputs).any()
    assert torch.equal(batch.seen_as("strong").inputs, batch.views["strong"])


def test_workers_change_nothing(files: Files) -> None:
    transform = augment.build([{"pad_crop": 2}, "flip", "rand_augment"], train=True)
    alone = Loader(files, 4, seed=2, train=True, transform=transform)
    helped = Loader(files, 4, seed=2, train=True, transform=transform, workers=2)
    for epoch, start in ((0, 0), (1, 0), (1, 1)):
        pairs = zip(alone.epoch(epoch, start), helped.epoch(epoch, start), strict=True)
        assert all(equal(one, other) for one, other in pairs)


def test_workers_outlive_an_epoch_that_was_left_early(files: Files) -> None:
    helped = Loader(files, 2, seed=2, train=True, workers=2)
    left = next(helped.epoch(0))
    again = list(helped.epoch(0))
    assert equal(left, again[0])
    alone = list(Loader(files, 2, seed=2, train=True).epoch(0))
    assert all(equal(one, other) for one, other in zip(again, alone, strict=True))


def test_a_loader_can_be_sent_to_a_process(files: Files) -> None:
    transform = augment.build([{"pad_crop": 2}, "rand_augment"], train=True)
    loader = Loader(files, 4, train=True, transform=transform, mixing=Mix(3, mixup=1.0))
    again = pickle.loads(pickle.dumps(loader))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(loader.epoch(), again.epoch(), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_process_generators_are_left_alone(files: Files, workers: int) -> None:
    transform = augment.build(["rand_augment", "affine"], train=True)
    loader = Loader(files, 4, seed=2, train=True, transform=transform, workers=workers)
    before = (torch.get_rng_state(), str(np.random.get_state()), random.getstate())  # noqa: NPY002
    list(loader.epoch(0))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == str(np.random.get_state())  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.parametrize("labelled_per_batch", [None, 4])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_are_one_process(labelled_per_batch: int | None, world_size: int) -> None:
    def made(rank: int, world: int) -> list[Batch]:
        parts = {"labelled_per_batch": labelled_per_batch, "rank": rank, "world_size": world}
        samples = numbered(64, labelled=None if labelled_per_batch is None else 10)
        return list(Loader(samples, 16, seed=7, train=True, transform=noise, **parts).epoch(1))  # type: ignore[arg-type]

    whole = made(0, 1)
    parts = [made(rank, world_size) for rank in range(world_size)]
    assert len(whole) > 2
    assert [len(part) for part in parts] == [len(whole)] * world_size
    for step, batch in enumerate(whole):
        for name in ("inputs", "target", "index", "view"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part[step], name) for part in parts]))


def test_a_rank_without_samples_in_the_last_evaluation_batch_yields_nothing() -> None:
    parts = [Loader(numbered(17), 8, train=False, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(len(batch) for part in parts for batch in part.epoch()) == [1, 4, 4, 4, 4]


def test_every_batch_holds_so_many_labelled_samples() -> None:
    loader = Loader(numbered(70, labelled=10), 16, seed=1, train=True, labelled_per_batch=4)
    assert loader.steps_per_epoch == 5
    drawn: list[int] = []
    for epoch in range(4):
        fresh: list[int] = []
        for batch in loader.epoch(epoch):
            assert int(batch.labelled.sum()) == 4
            drawn += batch.index[batch.labelled].tolist()
            fresh += batch.index[~batch.labelled].tolist()
        assert sorted(fresh) == list(range(10, 70))
    # 80 draws of 10 samples: the cycle runs on over epochs, so each comes exactly 8 times
    assert np.bincount(drawn).tolist() == [8] * 10
    assert sorted(drawn[:10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]


def test_labelled_samples_drawn_twice_in_an_epoch_look_different() -> None:
    loader = Loader(numbered(34, labelled=2), 16, seed=1, train=True, labelled_per_batch=8, transform=noise)
    batch = next(loader.epoch(0))
    assert len(batch.view.unique()) == 16


def test_labelled_samples_are_spread_over_the_batch() -> None:
    batch = next(Loader(numbered(74, labelled=10), 32, train=True, labelled_per_batch=16).epoch())
    assert 0 < int(batch.labelled[:16].sum()) < 16


@pytest.mark.parametrize(
    ("count", "drop_last", "train", "world_size", "steps"),
    [
        (33, "auto", True, 1, 2),
        (34, "auto", True, 1, 3),
        (33, "auto", False, 1, 3),
        (35, "auto", True, 2, 2),
        (36, "auto", True, 2, 3),
        (34, True, True, 1, 2),
        (33, False, True, 1, 3),
        (32, "auto", True, 1, 2),
    ],
)
def test_incomplete_last_batches(count: int, drop_last: bool, train: bool, world_size: int, steps: int) -> None:
    loader = Loader(numbered(count), 16, train=train, drop_last=drop_last, world_size=world_size)
    assert loader.steps_per_epoch == steps
    assert len(list(loader.epoch())) == steps


def test_repeated_augmentation_keeps_the_length_and_differs_in_the_key() -> None:
    loader = Loader(numbered(48), 12, seed=1, train=True, repeats=3, transform=noise)
    batches = list(loader.epoch())
    assert len(batches) == 4
    for batch in batches:
        assert sorted(np.bincount(batch.index)[np.unique(batch.index)].tolist()) == [3] * 4
        assert len(batch.view.unique()) == 12
    assert len({number for batch in batches for number in batch.index.tolist()}) == 16


def test_mixing_sees_training_batches_with_a_key_of_the_step() -> None:
    seen: list[int] = []

    def mixing(batch: Batch, key: int) -> Batch:
        seen.append(key)
        return batch

    list(Loader(numbered(32), 16, seed=1, train=True, mixing=mixing).epoch(1))
    list(Loader(numbered(32), 16, seed=1, train=False, mixing=mixing).epoch(1))
    assert len(seen) == len(set(seen)) == 2


def test_pixels_of_files_are_unit_floats(files: Files) -> None:
    batch = next(Loader(files, 3, train=False).epoch())
    assert batch.inputs.dtype == torch.float32
    assert torch.equal(batch.inputs[1], files.read(1) / 255)


def spoil(files: Files, *numbers: int) -> None:
    for number in numbers:
        files.paths[number].write_bytes(files.paths[number].read_bytes()[:40])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_named(files: Files, workers: int) -> None:
    spoil(files, 5)
    expected = re.escape(f"{files.paths[5]}: ") + ".*; data.on_error: skip leaves such samples out"
    with pytest.raises(UserError, match=expected):
        list(Loader(files, 4, train=False, workers=workers).epoch())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_skipped_and_noted(files: Files, workers: int) -> None:
    spoil(files, 5)
    files.paths[2].unlink()
    loader = Loader(files, 4, train=False, on_error="skip", workers=workers)
    assert ids(loader) == [[0, 1, 3], [4, 6, 7], [8]]
    assert list(loader.skipped) == [str(files.paths[2]), str(files.paths[5])]
    assert "No such file" in loader.skipped[str(files.paths[2])]
    ids(loader)
    assert len(loader.skipped) == 2


def test_a_batch_of_nothing_readable_is_an_error(files: Files) -> None:
    spoil(files, 0, 1)
    with pytest.raises(
        UserError, match=re.escape(f"no sample of a whole batch could be read, the first is {files.paths[0]}")
    ):
        list(Loader(files, 2, train=False, on_error="skip").epoch())


def test_images_of_different_size_are_named(files: Files) -> None:
    Image.new("RGB", (5, 6)).save(files.paths[1])
    expected = (
        f"images of a batch must have one shape: {files.paths[0]} is 10x12 with 3 channels, {files.paths[1]} is "
        "6x5 with 3 channels; give data.image_size or an augmentation that crops"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        next(Loader(files, 4, train=False).epoch())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Loader(numbered(4), 0, train=True), "data.batch_size must be at least 1, not 0"),
        (lambda: Loader(numbered(0), 4, train=True), "data: the set holds no sample"),
        (
            lambda: Loader(numbered(1), 4, train=True),
            "data: 1 samples make no batch of 4 for 1 processes; lower data.batch_size or give more samples",
        ),
        (
            lambda: Loader(numbered(8, 4), 4, train=True, labelled_per_batch=4),
            "data.labelled_per_batch must lie between 1 and 3, not 4",
        ),
        (
            lambda: Loader(numbered(8, 0), 4, train=True, labelled_per_batch=2),
            "data.labelled_per_batch: the set holds no labelled sample",
        ),
        (
            lambda: Loader(numbered(8), 4, train=True, labelled_per_batch=2),
            "data.labelled_per_batch: the set holds no unlabelled sample; leave the option out",
        ),
    ],
)
def test_what_cannot_be_loaded_is_said(make: Callable[[], Loader], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make()


@dataclass(frozen=True)
class Marked:
    """Images with one box each, which moves with its image."""

    targets: Tensor
    class_names: tuple[str, ...] = ("thing",)
    broken: int = -1
    move: int = 7

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> Any:
        if index == self.broken:
            raise OSError("cut short")
        return torch.full((3, 4 + index, 6), index / 100), torch.tensor([0.0, 0.0, 2.0, 1.0])

    def name(self, index: int) -> str:
        return f"marked[{index}]"

    def keep(self, index: Tensor) -> "Marked":
        return replace(self, targets=self.targets[index])

    def relabel(self, targets: Tensor) -> "Marked":
        return replace(self, targets=targets)

    def augmented(self, augment: Any) -> "Marked":
        return replace(self, move=augment)

    def model_facts(self) -> dict[str, Any]:
        return {"task": "detection", "num_classes": 1}

    def seen(self, record: tuple[Tensor, Tensor], key: int, *, train: bool) -> tuple[Tensor, Tensor]:
        image, box = record
        return image, box + key % self.move if train else box

    def collate(self, records: Sequence[tuple[Tensor, Tensor]], index: Tensor, view: Tensor) -> Batch:
        sizes = torch.tensor([image.shape[-2:] for image, _ in records])
        height, width = sizes.amax(dim=0).tolist()
        inputs = torch.stack([F.pad(image, (0, 0, 0, height - image.shape[1])) for image, _ in records])
        boxes = torch.stack([box for _, box in records])
        frame = Frame((height, width), sizes, boxes, torch.arange(len(records)))
        return Batch.of(inputs, self.targets[index], index=index, view=view, frame=frame)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_dense_samples_change_and_pad_by_themselves(workers: int) -> None:
    samples = Marked(torch.zeros(10, dtype=torch.long))
    assert isinstance(samples, Dense)
    loader = Loader(samples, 4, seed=3, train=True, workers=workers)
    batch = next(loader.epoch(0))
    assert batch.frame is not None
    assert torch.equal(batch.frame.boxes[:, 0], (batch.view % 7).float())
    assert torch.equal(batch.frame.image_size[:, 0], 4 + batch.index)
    assert batch.inputs.shape[2] == batch.frame.size[0] == int(batch.index.max()) + 4
    still = next(Loader(samples, 4, seed=3, train=False).epoch(0))
    assert still.frame is not None
    assert not still.frame.boxes[:, :2].any()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_last_epochs_are_seen_otherwise(workers: int) -> None:
    samples = Marked(torch.zeros(10, dtype=torch.long))
    early = Loader(samples, 4, seed=3, train=True)
    late = Loader(samples.augmented(2), 4, seed=3, train=True)
    loader = Loader(samples, 4, seed=3, train=True, workers=workers, late=Late(2, samples.augmented(2)))
    loader.epochs = 5
    for epoch in (0, 2, 3, 4):
        other = late if epoch >= 3 else early
        for start in (0, 2):
            pairs = list(zip(loader.epoch(epoch, start), other.epoch(epoch, start), strict=True))
            assert len(pairs) == 3 - start
            for one, same in pairs:
                assert one.frame is not None
                assert same.frame is not None
                assert torch.equal(one.index, same.index)
                assert torch.equal(one.frame.boxes, same.frame.boxes)


def test_the_last_epochs_of_plain_images_are_changed_otherwise() -> None:
    samples = numbered(10)
    loader = Loader(samples, 4, seed=3, train=True, transform=noise, late=Late(1, samples))
    assert loader.epochs is None
    unknown = next(loader.epoch(3))
    loader.epochs = 4
    early, late = next(loader.epoch(2)), next(loader.epoch(3))
    assert torch.equal(early.inputs[:, 0, 0, 0], early.index + early.view % 997)
    assert torch.equal(late.inputs[:, 0, 0, 0], late.index.float())
    assert torch.equal(unknown.inputs, noise(late.inputs, late.view)), "without a length no epoch is late"
    with pytest.raises(UserError, match=r"data\.augment_late: stored answers are about single images"):
        Loader(samples, 4, train=True, replay=Replay(3, 1), late=Late(1, samples))


def test_a_dense_sample_that_cannot_be_read_is_named_or_skipped() -> None:
    samples = Marked(torch.zeros(6, dtype=torch.long), broken=2)
    with pytest.raises(UserError, match=re.escape("marked[2]: cut short")):
        list(Loader(samples, 3, train=False).epoch(0))
    loader = Loader(samples, 3, train=False, on_error="skip")
    assert [batch.index.tolist() for batch in loader.epoch(0)] == [[0, 1], [3, 4, 5]]
    assert loader.skipped == {"marked[2]": "cut short"}
