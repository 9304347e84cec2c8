# SPDX-License-Identifier: Apache-2.0
"""Batches as a function of seed, epoch and position: no state to save."""

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tutelage.core import Batch
from tutelage.core.error import UserError
from tutelage.core.stored import STORED
from tutelage.data.samples import Composed, Dense, Held, Samples, to_unit
from tutelage.functional.noise import keys, mix

#: Images `[B, C, H, W]` and the keys of their augmentation `[B]` to images.
Transform = Callable[[Tensor, Tensor], Tensor]
#: A batch and the key of the choice to a batch.
Mixing = Callable[[Batch, int], Batch]

#: What reading a sample may raise; Pillow raises SyntaxError on a broken PNG.
UNREADABLE = (OSError, ValueError, SyntaxError)
ORDER, LABELLED, VIEW, MIX, PLACE = 1, 2, 3, 4, 5  # salts: what a random choice is about


@dataclass(frozen=True)
class Fetched:
    """What was read for one batch: the rows that could be, and what is wrong with the others."""

    rows: Tensor
    images: Tensor
    views: Mapping[str, Tensor]
    failures: Mapping[int, str]
    records: Sequence[Any] = ()


@dataclass(frozen=True)
class Replay:
    """Views of each sample that come again, a turn each, whatever the seed of a run.

    Args:
        seed: of the views.
        views: how many a sample has; the next epoch shows the next one, and after the last the first again.
        ordered: samples come in their order, also in training: to write down what is said of them.
        answers: what was said of samples `[B]` at turns `[B]`, by name; the batch carries it.
    """

    seed: int
    views: int
    ordered: bool = False
    answers: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Late:
    """What training sees in the last epochs of a run.

    Args:
        epochs: so many.
        samples: the loader's, in its order; they may change themselves in another way.
        transform: in the place of the loader's.
    """

    epochs: int
    samples: Samples
    transform: Transform | None = None


class Loader:
    """Reads samples in batches.

    The order is a function of (seed, epoch), an augmentation of (seed, epoch, sample id): batches do not
    depend on the number of workers, a run resumes from an epoch and a position, and the process's own random
    generators are neither read nor moved.

    Args:
        samples: what is read.
        batch_size: samples a step over all ranks.
        seed: of order and augmentation.
        train: shuffle and augment; otherwise samples come in their order.
        transform: applied to images and keys.
        views: further transforms of the same samples, by the name of the view.
        labelled_per_batch: so many labelled samples a batch, drawn in turn from a shuffled cycle; the others
            are unlabelled, and an epoch is one pass over the unlabelled.
        repeats: views of a sample in one epoch (repeated augmentation; Hoffer et al. 2020). An epoch keeps
            its length, so it meets 1 / repeats of the samples.
        mixing: applied to each batch in training, with a key of (seed, step).
        workers: processes that read and transform.
        drop_last: whether an incomplete last batch is left out; `auto` does so in training where a rank would
            get a single sample, on which batch norm cannot train.
        on_error: what to do about a sample that cannot be read: `raise`, or `skip` and note it in `skipped`.
        rank: of this process; it gets its contiguous part of every batch.
        world_size: number of processes.
        replay: the views that are seen in training, in the place of new ones every epoch.
        late: what is seen in the last epochs; which these are hangs on `epochs`, the length of the run.
        batches: places of the samples of each batch, in the place of so many at a time in their order; not for
            training.

    Raises:
        UserError: if no batch can be formed, or if what is replayed would be mixed.

    Example:
        >>> from tutelage.data.digits import digits
        >>> loader = Loader(digits()[0], 64, seed=0, train=True)
        >>> loader.steps_per_epoch
        19
        >>> next(loader.epoch(0)).inputs.shape
        torch.Size([64, 1, 8, 8])
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        seed: int = 0,
        train: bool,
        transform: Transform | None = None,
        views: Mapping[str, Transform] | None = None,
        labelled_per_batch: int | None = None,
        repeats: int = 1,
        mixing: Mixing | None = None,
        workers: int = 0,
        drop_last: bool | Literal["auto"] = "auto",
        on_error: Literal["raise", "skip"] = "raise",
        rank: int = 0,
        world_size: int = 1,
        replay: Replay | None = None,
        late: Late | None = None,
        batches: Sequence[Tensor] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"data.batch_size must be at least 1, not {batch_size}")
        if not len(samples):
            raise UserError("data: the set holds no sample")
        self.samples, self.batch_size, self.seed, self.train = samples, batch_size, seed, train
        self.transform, self.views, self.mixing = transform, dict(views or {}), mixing
        self.labelled_per_batch, self.repeats, self.workers = labelled_per_batch, repeats, workers
        self.on_error, self.rank, self.world_size, self.replay = on_error, rank, world_size, replay
        self.late = late
        #: of the run, the last one counted whole; not known, no epoch is late
        self.epochs: int | None = None
        if replay is not None and (mixing is not None or views or late is not None):
            word = "augment_late" if late is not None else "views" if views else "mixup and data.cutmix"
            raise UserError(f"data.{word}: stored answers are about single images as they were seen; leave it out")
        #: what could not be read, by the sample's name
        self.skipped: dict[str, str] = {}
        self.labelled = (samples.targets >= 0).nonzero().flatten()
        if labelled_per_batch is None:
            self.pool, self.fresh = torch.arange(len(samples)), batch_size
        else:
            self.pool, self.fresh = (samples.targets < 0).nonzero().flatten(), batch_size - labelled_per_batch
            self._check_parts(labelled_per_batch)
        rest = len(self.pool) % self.fresh
        single = train and 0 < rest + (labelled_per_batch or 0) < 2 * world_size
        dropped = drop_last is True or (drop_last == "auto" and single)
        self._steps = len(self.pool) // self.fresh + (0 if dropped or not rest else 1)
        if not self._steps:
            raise UserError(
                f"data: {len(self.pool)} samples make no batch of {batch_size} for {world_size} processes; "
                "lower data.batch_size or give more samples"
            )
        self.batches = batches
        if batches is not None:
            self._steps = len(batches)
        self._known: tuple[int, Tensor] | None = None
        self._reader: DataLoader[Fetched] | None = None
        self._plan = Plan()

    def _check_parts(self, wanted: int) -> None:
        if not 0 < wanted < self.batch_size:
            raise UserError(f"data.labelled_per_batch must lie between 1 and {self.batch_size - 1}, not {wanted}")
        if not len(self.labelled):
            raise UserError("data.labelled_per_batch: the set holds no labelled sample")
        if not len(self.pool):
            raise UserError("data.labelled_per_batch: the set holds no unlabelled sample; leave the option out")

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch."""
        return self._steps

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index."""
        return self.samples.class_names

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, on the CPU.

        Args:
            epoch: which one, from 0.
            start: position of the first batch, to go on within an epoch.

        Raises:
            UserError: if a sample cannot be read and `on_error` is `raise`, or if a whole batch cannot.
        """
        self._plan.epoch, self._plan.positions = epoch, range(start, self._steps)
        for position, fetched in zip(self._plan.positions, self._fetches(), strict=True):
            batch = self._batch(epoch, position, fetched)
            if batch is not None:
                yield batch

    def _seen_in(self, epoch: int) -> tuple[Samples, Transform | None]:
        """Return the samples of an epoch, and how they are changed."""
        late = self.late
        if late is None or self.epochs is None or epoch < self.epochs - late.epochs:
            return self.samples, self.transform
        return late.samples, late.transform

    # --- what is in a batch ------------------------------------------------------------------------------

    def _order(self, epoch: int) -> Tensor:
        """Return places in the epoch's pool times repeats, shuffled in training."""
        if not self.train or (self.replay is not None and self.replay.ordered):
            return torch.arange(len(self.pool))
        if self._known is None or self._known[0] != epoch:
            shuffled = permutation(len(self.pool), mix(self.seed, ORDER, epoch))
            # neighbours share a sample: its views meet in one batch
            places = shuffled[: -(-len(self.pool) // self.repeats)].repeat_interleave(self.repeats)
            self._known = (epoch, places[: len(self.pool)])
        return self._known[1]

    def rows(self, epoch: int, position: int) -> tuple[Tensor, Tensor]:
        """Return the sample ids `[B]` and augmentation keys `[B]` of this rank's part of a batch."""
        ids, turn = self._places(epoch, position)
        if self.replay is not None:
            return ids, keys(mix(self.replay.seed, VIEW), keys(1, ids) + turn)
        return ids, keys(mix(self.seed, VIEW, epoch), keys(1, ids) + turn)

    def _places(self, epoch: int, position: int) -> tuple[Tensor, Tensor]:
        """Return the sample ids `[B]`, and which view of each it is: in its epoch, or of those replayed."""
        if self.batches is not None:
            return self.batches[position], torch.zeros_like(self.batches[position])
        span = slice(position * self.fresh, (position + 1) * self.fresh)
        ids = self.pool[self._order(epoch)[span]]
        repeat = torch.arange(span.start, span.start + len(ids)) % self.repeats
        if self.replay is not None:
            repeat = (epoch * self.repeats + repeat) % self.replay.views
        if self.labelled_per_batch is not None:
            drawn, cycle = self._labelled(epoch, position)
            if self.replay is not None:
                cycle = cycle % self.replay.views
            ids, repeat = torch.cat([drawn, ids]), torch.cat([cycle, repeat])
            if self.train:  # every rank and micro-batch gets of both
                places = permutation(len(ids), mix(self.seed, PLACE, epoch, position))
                ids, repeat = ids[places], repeat[places]
        edges = torch.linspace(0, len(ids), self.world_size + 1, dtype=torch.float64).round().long()
        part = slice(int(edges[self.rank]), int(edges[self.rank + 1]))
        return ids[part], repeat[part]

    def _labelled(self, epoch: int, position: int) -> tuple[Tensor, Tensor]:
        """Return labelled sample ids in turn, and the number of the cycle each belongs to."""
        number = self.labelled_per_batch or 0
        first = (epoch * self._steps + position) * number
        places = torch.arange(first, first + number)
        cycle, place = places // len(self.labelled), places % len(self.labelled)
        drawn = torch.empty_like(places)
        for turn in range(int(cycle[0]), int(cycle[-1]) + 1):
            order = permutation(len(self.labelled), mix(self.seed, LABELLED, turn))
            drawn[cycle == turn] = self.labelled[order[place[cycle == turn]]]
        return drawn, cycle

    def _batch(self, epoch: int, position: int, fetched: Fetched) -> Batch | None:
        batch = self._composed(epoch, position, fetched)
        if batch is None or self.replay is None or self.replay.answers is None:
            return batch
        ids, turn = self._places(epoch, position)
        stored = self.replay.answers(ids[fetched.rows], turn[fetched.rows])
        return replace(batch, extra={**batch.extra, STORED: stored})

    def _composed(self, epoch: int, position: int, fetched: Fetched) -> Batch | None:
        ids, view = self.rows(epoch, position)
        samples, _ = self._seen_in(epoch)
        for index, what in fetched.failures.items():
            name = samples.name(index)
            if self.on_error == "raise":
                raise UserError(f"{name}: {what}; data.on_error: skip leaves such samples out")
            self.skipped[name] = what
        ids, view = ids[fetched.rows], view[fetched.rows]
        if not len(ids):
            if fetched.failures:  # a step without a batch would put epoch and position out of step
                raise UserError(f"no sample of a whole batch could be read, the first is {next(iter(self.skipped))}")
            return None  # a small last batch of an evaluation leaves this rank nothing
        if isinstance(samples, Dense):
            return samples.collate(fetched.records, ids, view)
        views = {name: to_unit(images) for name, images in fetched.views.items()}
        batch = Batch.of(to_unit(fetched.images), samples.targets[ids], index=ids, view=view, views=views)
        if isinstance(samples, Composed):
            batch = samples.compose(batch, train=self.train)
        if self.train and self.mixing is not None:
            batch = self.mixing(batch, mix(self.seed, MIX, epoch * self._steps + position))
        return batch

    # --- reading -----------------------------------------------------------------------------------------

    def _fetches(self) -> Iterator[Fetched]:
        if not self.workers:
            for epoch, position in self._plan:
                yield self.fetch(epoch, position)
            return
        if self._reader is None:
            self._reader = DataLoader(
                _Fetches(self._reading()),
                sampler=self._plan,
                batch_size=None,
                num_workers=self.workers,
                persistent_workers=True,
                generator=torch.Generator(),  # else the base seed is drawn from the process's generator
            )
        yield from self._reader

    def _reading(self) -> "Loader":
        """Return what a worker needs of this loader: stored answers are looked up here."""
        reader = copy.copy(self)
        if reader.replay is not None:
            reader.replay = replace(reader.replay, answers=None)
        return reader

    def fetch(self, epoch: int, position: int) -> Fetched:
        """Read and transform this rank's part of a batch."""
        ids, view = self.rows(epoch, position)
        samples, transform = self._seen_in(epoch)
        if isinstance(samples, Held):
            held = samples.read_many(ids)
            return Fetched(torch.arange(len(ids)), _changed(held, view, transform), self._further(held, view), {})
        rows: list[int] = []
        records: list[Any] = []
        images: list[Tensor] = []
        further: list[dict[str, Tensor]] = []
        failures: dict[int, str] = {}
        for row, index in enumerate(ids.tolist()):
            try:
                found: Any = samples.read(index)
            except UNREADABLE as error:
                failures[index] = str(error) or type(error).__name__
                continue
            rows.append(row)
            if isinstance(samples, Dense):
                records.append(samples.seen(found, int(view[row]), train=self.train))
                continue
            image, key = found[None], view[row : row + 1]
            images.append(_changed(image, key, transform))
            further.append(self._further(image, key))
        names = [samples.name(int(ids[row])) for row in rows]
        kept = torch.tensor(rows, dtype=torch.long)
        if isinstance(samples, Dense):
            return Fetched(kept, torch.zeros(0), {}, failures, records)
        joined = {name: joined_images([one[name] for one in further], names) for name in self.views}
        return Fetched(kept, joined_images(images, names), joined, failures)

    def _further(self, images: Tensor, view: Tensor) -> dict[str, Tensor]:
        return {
            name: transform(images, keys(zlib.crc32(name.encode()), view)) for name, transform in self.views.items()
        }


class Plan:
    """The epoch and positions that are read next: one sampler for readers that outlive an epoch."""

    epoch = 0
    positions: Sequence[int] = range(0)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, position) for position in self.positions)

    def __len__(self) -> int:
        return len(self.positions)


class _Fetches(Dataset[Fetched]):
    """A loader's batches by (epoch, position), for worker processes."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, place: tuple[int, int]) -> Fetched:
        return self.loader.fetch(*place)


def _changed(images: Tensor, view: Tensor, transform: Transform | None) -> Tensor:
    return images if transform is None else transform(images, view)


def permutation(size: int, key: int) -> Tensor:
    """Return a permutation of `range(size)` that is a function of its key."""
    return keys(key, torch.arange(size)).argsort(stable=True)


def joined_images(images: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Return images `[1, C, H, W]` as one batch.

    Raises:
        UserError: if they differ in shape; two of them are named.
    """
    if not images:
        return torch.zeros(0)
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            first, other = (_words(one) for one in (images[0], image))
            raise UserError(
                f"images of a batch must have one shape: {names[0]} is {first}, {name} is {other}; "
                "give data.image_size or an augmentation that crops"
            )
    return torch.cat(list(images))


def _words(image: Tensor) -> str:
    channels, height, width = image.shape[-3:]
    return f"{height}x{width} with {channels} channels"
