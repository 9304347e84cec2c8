# SPDX-License-Identifier: Apache-2.0
"""One batch of samples, and the facts of a run that are known before its first step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tutelage.core.card import Averages
from tutelage.core.error import UserError, nearest

NONE: Mapping[str, Any] = MappingProxyType({})


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(part, change) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(part, change) for part in value)
    if isinstance(value, Frame):
        return replace(value, **{part.name: _map(getattr(value, part.name), change) for part in fields(value)})
    return value


def _cut(value: Any, span: slice, rows: int) -> Any:
    """Return the rows of a span of whatever has one row a sample; the rest stays whole."""
    if isinstance(value, Mapping):
        return {key: _cut(part, span, rows) for key, part in value.items()}
    by_row = bool(value.ndim) if isinstance(value, Tensor) else type(value) in (list, tuple)
    return value[span] if by_row and len(value) == rows else value


@dataclass(frozen=True)
class Frame:
    """Geometry of a dense batch, in the pixels the network sees.

    Args:
        size: padded (height, width) of the whole batch.
        image_size: `[B, 2]` unpadded (height, width) of each image.
        boxes: `[M, 4]` x1, y1, x2, y2 of all images together.
        box_image: `[M]` the image each box belongs to.
        masks: one mask a box, or None.
    """

    size: tuple[int, int]
    image_size: Tensor
    boxes: Tensor
    box_image: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Samples and what is known of them; never changed after it was made.

    Args:
        inputs: what the models are called with: `[B, C, H, W]` pixels in [0, 1], or a mapping of tensors.
        target: `[B]` int64 classes (-1 unlabelled), `[B, K]` soft labels, or the task's own structure.
        labelled: `[B]` bool; `[B, L]` where every token has a label of its own.
        index: `[B]` int64 sample ids, the key of all randomness about a sample.
        view: `[B]` int64 keys of the augmentations that made these inputs.
        frame: geometry of a dense batch.
        views: further views of the same samples by name, for sources such as `student@strong`.
        mean_count: mean count of each denominator over the micro-batches and ranks of this optimizer step;
            empty when this batch is the whole step.
        extra: whatever else a task carries.
    """

    inputs: Any
    target: Any
    labelled: Tensor
    index: Tensor
    view: Tensor
    frame: Frame | None = None
    views: Mapping[str, Any] = field(default_factory=lambda: NONE)
    mean_count: Mapping[str, Tensor] = field(default_factory=lambda: NONE)
    extra: Mapping[str, Any] = field(default_factory=lambda: NONE)

    @classmethod
    def of(cls, inputs: Any, target: Any = None, *, index: Tensor | None = None, **more: Any) -> "Batch":
        """Return a batch from inputs and targets alone; rows with target -1 count as unlabelled.

        Without targets every row does. The sample ids are 0, 1, ... unless `index` gives them.

        Example:
            >>> batch = Batch.of(torch.zeros(2, 3, 8, 8), torch.tensor([4, -1]))
            >>> batch.labelled
            tensor([ True, False])
        """
        first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
        rows, device = len(first), first.device
        target = torch.full((rows,), -1, device=device) if target is None else target
        if isinstance(target, Tensor) and target.ndim == 1:
            labelled = target >= 0
        elif isinstance(target, Tensor) and target.is_floating_point():
            labelled = target.sum(dim=1) > 0
        else:
            labelled = torch.ones(rows, dtype=torch.bool, device=device)
        index = torch.arange(rows, device=device) if index is None else index
        more = {"labelled": labelled, "view": torch.zeros_like(index), **more}
        return cls(inputs=inputs, target=target, index=index, **more)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def token_mask(self) -> Tensor:
        """`[B, L]` bool: the tokens at which models are compared, the denominator `tokens`.

        Raises:
            UserError: if the batch is not of text.
        """
        if "token_mask" not in self.extra:
            raise UserError("the batch does not say which tokens count: give extra={'token_mask': [B, L] bool}")
        return torch.as_tensor(self.extra["token_mask"]).bool()

    @property
    def attention_mask(self) -> Tensor:
        """`[B, L]` bool: the tokens that are not padding.

        Raises:
            UserError: if the batch is not of text.
        """
        inputs = self.inputs if isinstance(self.inputs, Mapping) else NONE
        found = self.extra.get("attention_mask", inputs.get("attention_mask"))
        if found is None:
            raise UserError("the batch does not say what is padding: give inputs an `attention_mask` [B, L]")
        return torch.as_tensor(found).bool()

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device; copies do not block the host."""
        moved = {f.name: _map(getattr(self, f.name), lambda t: t.to(device, non_blocking=True)) for f in fields(self)}
        return replace(self, **moved)

    def seen_as(self, view: str) -> "Batch":
        """Return the batch with a further view in the place of its inputs.

        Raises:
            UserError: if the data made no such view.
        """
        if view not in self.views:
            known = nearest(view, self.views) or "; the data makes none"
            raise UserError(f"the batch has no view {view!r}{known}")
        return replace(self, inputs=self.views[view])

    def count(self, averages: Averages) -> Tensor:
        """Return how many things a mean over this batch runs over, as a 0-d tensor on the batch's device."""
        if averages == "labelled":
            return self.labelled.sum()
        if averages == "boxes" and self.frame is not None:
            return torch.full((), len(self.frame.boxes), device=self.index.device)
        if averages == "tokens" and "token_mask" in self.extra:
            return torch.as_tensor(self.extra["token_mask"]).sum()
        return torch.full((), len(self), device=self.index.device)

    def split(self, parts: int) -> "list[Batch]":
        """Return the batch cut into consecutive micro-batches of (nearly) equal size.

        Tensors, lists and tuples as long as the batch have one row a sample and are cut.

        Raises:
            ValueError: for a dense batch, whose boxes belong to images: split its samples when loading.
        """
        if self.frame is not None:
            raise ValueError("a batch with a frame cannot be split after collation")
        edges = torch.linspace(0, len(self), parts + 1).round().long().tolist()
        spans = [slice(a, b) for a, b in pairwise(edges) if b > a]
        return [
            replace(self, **{f.name: _cut(getattr(self, f.name), span, len(self)) for f in fields(self)})
            for span in spans
        ]


def share_counts(
    batches: Sequence[Batch],
    averages: Sequence[Averages],
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> list[Batch]:
    """Return the micro-batches of one optimizer step, each knowing the mean counts of the whole step.

    A term returns a mean over its own micro-batch; weighting it with local count / mean count makes the
    mean of the micro-batches (and ranks) equal the mean over the whole step.
    """
    if not averages:
        return list(batches)
    counts = torch.stack([torch.stack([b.count(a) for b in batches]).double().mean() for a in averages])
    if mean_over_ranks is not None:
        counts = mean_over_ranks(counts)
    return [replace(b, mean_count=dict(zip(averages, counts.unbind(), strict=True))) for b in batches]


@dataclass(frozen=True)
class Facts:
    """What is known of a run when its terms are built.

    Args:
        num_classes: or 0 where the task has none.
        class_names: by index.
        num_samples: of the training set.
        targets: `[num_samples]` class by sample id (-1 unlabelled), or None.
        steps_per_epoch: optimizer steps.
        total_steps: optimizer steps of the run or stage.
        seed: of every keyed random choice.
        mixes: augmentations that turn class indices into soft labels, such as `mixup`.
    """

    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    num_samples: int = 0
    targets: Tensor | None = None
    steps_per_epoch: int = 1
    total_steps: int = 1
    seed: int = 0
    mixes: tuple[str, ...] = ()
