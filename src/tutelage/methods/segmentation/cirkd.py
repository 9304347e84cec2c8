# SPDX-License-Identifier: Apache-2.0
"""Match how a pixel relates to the pixels of other images: those of the batch, and those in a memory.

The memory holds, for each class, pixels and means of regions that the teacher saw. In the released code the chosen
numbers of a class's own pixels are used as positions in the whole image, so that mostly pixels of other classes are
remembered: a defect, offered as `form="image"` for its numbers. There ignored pixels are compared like others, and
only not remembered; here they take no part where class maps say which they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Draw, Facts, Outcome, Reads, Signals, Tap, Term
from tutelage.core.bridge import check_grid, check_maps
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.functional.bank import as_written, write
from tutelage.functional.block import spans, sum_over
from tutelage.functional.collective import gather_rows
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.pairwise import unit
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import class_maps, match_kept, over_kept

CARD = Card(
    name="CIRKD",
    title="Cross-Image Relational Knowledge Distillation for Semantic Segmentation",
    authors="Yang, Zhou, An, Jiang, Xu, Zhang",
    year=2022,
    venue="CVPR",
    paper="arxiv:2204.06986",
    code="github:winycg/CIRKD@dab64db",
    code_licence=None,
    claims="Relations between pixels of different images teach a segmentation network more than those within one.",
    reads={"student": ("logits", "map"), "teacher": ("logits", "map")},
    labels=("hard",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/cirkd",),
)

OBJECTIVE = {"task": 1.0, "cirkd": {"weight": 1.0}}

Form = Literal["class", "image"]


@full_precision
def cirkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_map: Tensor,
    teacher_map: Tensor,
    *,
    lambda_kd: float = 1.0,
    alpha: float = 1.0,
    temperature: float = 0.1,
    gather: bool = False,
    keep: tuple[Tensor | None, Tensor | None] = (None, None),
) -> dict[str, Tensor]:
    """Return the pixel-wise part and the relations within the batch.

        kd    = lambda_kd / (B H W) * sum_p KL( softmax(t_p) || softmax(s_p) )
        batch = alpha / B^2 * sum_{images i, j} 1/P * sum_p KL( softmax_q( <f_ip, f_jq>(t) / tau ) || the same of s )

    with f_ip the features of pixel p of image i, a vector of length one.

    Convention:
        - KL runs from teacher to student; every pair of images counts, an image with itself included
        - no temperature in the first part, no tau^2 in the second
        - beyond 2^22 pairs of pixels it is computed in blocks: memory grows with the pixels, not their square

    Args:
        student_logits: `[B, K, H, W]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K, H, W]`.
        student_map: `[B, C, h, w]`.
        teacher_map: `[B, C', h, w]`.
        lambda_kd: coefficient of the pixel-wise part; 0 leaves it out.
        alpha: coefficient of the relations; 0 leaves them out.
        temperature: tau, > 0.
        gather: relate to the images of all processes instead of this process's own.
        keep: `[B, H, W]` bool for score maps and features: places that take part, the only ones that are averaged
            over; None keeps all, as the released code does.

    Returns:
        `kd` and `batch`: scalars with their coefficients, float32 or wider.

    Raises:
        UserError: if the score maps differ, or the grids of the features.

    Example:
        >>> scores, one = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> parts = cirkd(scores, scores, one, torch.ones(1, 1, 1, 2), temperature=1.0)
        >>> parts["kd"], parts["batch"]
        (tensor(0.), tensor(0.1201))

    Reference: Yang et al., Cross-Image Relational Knowledge Distillation for Semantic Segmentation, CVPR 2022.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"cirkd compares score maps of one shape: the student's is {list(student_logits.shape)}, "
            f"the teacher's {list(teacher_logits.shape)}"
        )
    check_grid(student_map, teacher_map, "cirkd")
    parts = {"kd": student_logits[:, :0].sum(), "batch": student_map[:, :0].sum()}
    if lambda_kd:
        rows = kl_divergence(student_logits.movedim(1, -1), teacher_logits.movedim(1, -1))
        parts["kd"] = lambda_kd * over_kept(rows, keep[0]).sum() / max(rows.numel(), 1)
    if alpha:
        student, teacher = vectors(student_map), vectors(teacher_map)
        students, teachers = (gather_rows(side)[0] if gather else side for side in (student, teacher))
        images, pixels = students.shape[:2]
        own = student.new_ones(student.shape[:2], dtype=torch.bool) if keep[1] is None else keep[1].flatten(1)
        left_out = ~(gather_rows(own.float())[0] > 0 if gather else own)
        share = over_kept(torch.ones_like(own, dtype=student.dtype), own)

        def compare(start: int, stop: int, s: Tensor, t: Tensor, everyone: Tensor, taught: Tensor) -> Tensor:
            ours, theirs = (
                (one.flatten(0, 1)[start:stop] @ all_.flatten(0, 1).T / temperature)
                .unflatten(1, (images, pixels))
                .masked_fill(left_out, -torch.inf)
                for one, all_ in ((s, everyone), (t, taught))
            )
            return (kl_divergence(ours, theirs) * share.flatten()[start:stop, None]).sum()

        count = len(student) * pixels
        pieces = spans(count, images * pixels) or [(0, 0)]
        total = sum_over(pieces, compare, student, teacher, students, teachers)
        parts["batch"] = alpha * total / max(count * images, 1)
    return parts


def vectors(feature_map: Tensor) -> Tensor:
    """Return the features of every pixel as vectors of length one, `[B, C, H, W]` to `[B, H W, C]`."""
    return unit(feature_map.flatten(2).transpose(1, 2))


@full_precision
def contrast(student: Tensor, teacher: Tensor, keys: Tensor, valid: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the mean over valid pixels of KL(teacher || student) of their softmax over remembered keys.

    Args:
        student: `[B, P, D]` unit vectors.
        teacher: `[B, P, D]` unit vectors.
        keys: `[M, D]`.
        valid: `[B, P]` bool.
        temperature: products are divided by it.

    Returns:
        Scalar, a connected zero without valid pixels. Beyond 2^22 products it is computed in blocks.
    """
    kept = valid.flatten()

    def compare(start: int, stop: int, s: Tensor, t: Tensor, keys: Tensor) -> Tensor:
        rows = kl_divergence(s[start:stop] @ keys.T / temperature, t[start:stop] @ keys.T / temperature)
        return rows.where(kept[start:stop], 0.0).sum()

    pieces = spans(len(kept), len(keys)) or [(0, 0)]
    return sum_over(pieces, compare, student.flatten(0, 1), teacher.flatten(0, 1), keys) / kept.sum().clamp(min=1)


@dataclass(frozen=True)
class Sorted:
    """The pixels of each image, class by class.

    Args:
        place: `[B, P]` positions, sorted by class, then by position; ignored pixels last.
        first: `[B, K]` where in it a class begins.
        count: `[B, K]` pixels of a class.
    """

    place: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, labels: Tensor, num_classes: int) -> "Sorted":
        """Sort `[B, P]` labels; those outside [0, K) are ignored."""
        known = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
        count = nn.functional.one_hot(known, num_classes + 1).sum(dim=1)[:, :-1]
        return cls(known.argsort(dim=1, stable=True), count.cumsum(dim=1) - count, count)


def picks(labels: Tensor, noise: Tensor, num_classes: int, number: int) -> Tensor:
    """Return which of a class's own pixels are chosen in each image: the first of a random order.

    Args:
        labels: `[B, P]` classes; others than [0, K) are ignored.
        noise: `[B, P]` in [0, 1), whose order within a class is the random order.
        num_classes: K.
        number: how many to choose.

    Returns:
        `[B, K, number]`: numbers below the class's count, in the order of its pixels; 0 where there are no more.
    """
    by_place = Sorted.of(labels, num_classes)
    known = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    by_noise = (known + noise.double()).argsort(dim=1)
    rank = torch.empty_like(by_place.place).scatter(
        1, by_place.place, torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    )
    turn = torch.arange(number, device=labels.device)
    there = turn < by_place.count[..., None]
    chosen = by_noise.gather(1, (by_place.first[..., None] + turn).where(there, 0).flatten(1))
    within: Tensor = rank.gather(1, chosen).unflatten(1, there.shape[1:]) - by_place.first[..., None]
    return within.where(there, 0)


def laps(pointer: Tensor, count: Tensor, length: int, most: int) -> tuple[Tensor, Tensor]:
    """Return where each image's pixels begin in the queues, and the pointers afterwards.

    An image whose pixels would reach the end of a queue takes its last places, and the pointer goes to 0.

    Args:
        pointer: `[K]` next free places.
        count: `[B, K]` pixels that each image adds, at most `most`.
        length: of a queue.
        most: bound of the counts.

    Returns:
        `[B, K]` first places, and `[K]` pointers.

    Example:
        >>> laps(torch.tensor([5]), torch.tensor([[3], [3], [2]]), 10, 3)
        (tensor([[5],
                [7],
                [0]]), tensor([2]))
    """
    rows = torch.arange(len(count), device=count.device)[:, None]
    total, first = count.cumsum(dim=0), torch.zeros_like(count)
    base, used, begun = pointer, torch.zeros_like(pointer), torch.zeros_like(pointer)
    for _ in range(len(count) * most // length + 2 if len(count) else 0):
        end = base + total - used
        live = rows >= begun
        over = live & (count > 0) & (end >= length)
        any_over, hit = over.any(dim=0), over.int().argmax(dim=0)
        last = torch.where(any_over, hit, len(count))
        first = torch.where(live & (rows < last), end - count, first)
        first = torch.where(rows == last, length - count, first)
        pointer = torch.where(any_over, 0, base + total[-1] - used)
        used = torch.where(any_over, total.gather(0, hit[None])[0], used)
        base = torch.where(any_over, 0, base)
        begun = torch.where(any_over, hit + 1, len(count))
    return first, pointer


@dataclass(frozen=True)
class Writing:
    """Rows that go into the queues of all classes, and the pointers afterwards."""

    index: Tensor
    rows: Tensor
    valid: Tensor
    pointer: Tensor


def pixel_writing(pointer: Tensor, chosen: Tensor, count: Tensor, length: int) -> Writing:
    """Return where the chosen pixels go.

    Args:
        pointer: `[K]`.
        chosen: `[B, K, F, D]` the pixels, of which the first `count` are there.
        count: `[B, K]`.
        length: of a queue.
    """
    most = chosen.shape[2]
    first, after = laps(pointer, count, length, most)
    turn = torch.arange(most, device=count.device)
    valid = turn < count[..., None]
    queue = torch.arange(count.shape[1], device=count.device)[:, None] * length
    index = (queue + first[..., None] + turn).where(valid, 0)
    return Writing(index.flatten(), chosen.flatten(0, 2), valid.flatten(), after)


def region_writing(pointer: Tensor, centroid: Tensor, count: Tensor, length: int) -> Writing:
    """Return where the means of regions go: one place a class that an image shows, round and round.

    Args:
        pointer: `[K]`.
        centroid: `[B, K, D]`.
        count: `[B, K]` pixels of each class.
        length: of a queue.
    """
    there = (count > 0).long()
    place = (pointer + there.cumsum(dim=0) - there) % length
    queue = torch.arange(count.shape[1], device=count.device) * length
    after = (pointer + there.sum(dim=0)) % length
    return Writing((queue + place).flatten(), centroid.flatten(0, 1), there.bool().flatten(), after)


@final
class CIRKD(Term):
    """Term form of :func:`cirkd`, and the memory: the student's features through a projection head.

    Of score maps of two sizes the larger one is averaged to the smaller.

    The queues hold what the teacher saw of each class. A batch is added before it is compared, as published,
    and for good after the optimizer's step, then with the pixels of all micro-batches and processes; images
    follow each other by their ids. The queues are part of the checkpoint.

    Args:
        lambda_kd: see :func:`cirkd`.
        alpha: see :func:`cirkd`.
        beta: coefficient of the contrast with remembered pixels; 0 leaves it out.
        gamma: coefficient of the contrast with remembered regions; 0 leaves it out.
        temperature: see :func:`cirkd`.
        memory_temperature: of both contrasts.
        pixel_memory: pixels remembered of each class.
        region_memory: regions remembered of each class.
        pixels_per_image: of each class, at most, that enter the memory.
        pixel_keys: remembered pixels that are contrasted, over all classes together.
        region_keys: the same of regions.
        form: which pixels are remembered: those of the `class` (the paper), or of the whole `image` (the
            released code, where the projection's batch norm also looks at ignored pixels).
        ignore_label: pixels of this label, and of any outside [0, K), are left out.
        gather: see :func:`cirkd`.
        student_tap: the features that are related.
        teacher_tap: the same of the teacher, on the same grid.
    """

    pixel_queue: Tensor
    pixel_pointer: Tensor
    region_queue: Tensor
    region_pointer: Tensor

    knows_ignored = True

    def __init__(
        self,
        *,
        lambda_kd: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.1,
        gamma: float = 0.1,
        temperature: float = 0.1,
        memory_temperature: float = 0.1,
        pixel_memory: int = 20000,
        region_memory: int = 2000,
        pixels_per_image: int = 16,
        pixel_keys: int = 4096,
        region_keys: int = 1024,
        form: Form = "class",
        ignore_label: int = -1,
        gather: bool = False,
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        if form not in ("class", "image"):
            raise UserError(f"form {form!r} is not known; valid: class, image")
        if temperature <= 0 or memory_temperature <= 0:
            raise UserError(f"temperatures must be > 0, not {temperature} and {memory_temperature}")
        if min(pixel_memory, region_memory, pixels_per_image, pixel_keys, region_keys) < 1:
            raise UserError("sizes of memories and numbers of keys must be at least 1")
        if pixel_memory < pixels_per_image:
            raise UserError(
                f"pixel_memory {pixel_memory} is too short for pixels_per_image {pixels_per_image}: one image fills it"
            )
        self.lambda_kd, self.alpha, self.beta, self.gamma = lambda_kd, alpha, beta, gamma
        self.temperature, self.memory_temperature = temperature, memory_temperature
        self.pixel_memory, self.region_memory = pixel_memory, region_memory
        self.pixels_per_image, self.pixel_keys, self.region_keys = pixels_per_image, pixel_keys, region_keys
        self.form: Form = form
        self.ignore_label, self.gather = ignore_label, gather
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)
        self.num_classes = 0

    @property
    def reads(self) -> Reads:
        """The score maps and the features."""
        return Reads((Tap("logits"), self.student_tap), (Tap("logits"), self.teacher_tap))

    @property
    def remembers(self) -> bool:
        """Whether the memory is used."""
        return bool(self.beta or self.gamma)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the projection head and the memory.

        Raises:
            UserError: if logits or taps are no maps, or the grids differ.
        """
        assert teacher is not None
        source, goal = student[self.student_tap.name], teacher[self.teacher_tap.name]
        check_maps(student.logits, teacher.logits, "cirkd")
        check_maps(source, goal, "cirkd")
        check_grid(source, goal, "cirkd")
        self.num_classes = student.logits.shape[1]
        if not self.remembers:
            return
        width = goal.shape[1]
        self.projection = nn.Sequential(
            nn.Conv2d(source.shape[1], width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
        ).to(source.device)
        for name, length in (("pixel", self.pixel_memory), ("region", self.region_memory)):
            queue = unit(torch.randn(self.num_classes, length, width))
            pointer = torch.zeros(self.num_classes, dtype=torch.int64)
            self.register_buffer(f"{name}_queue", queue.to(source.device))
            self.register_buffer(f"{name}_pointer", pointer.to(source.device))

    def labels(self, batch: Batch, height: int, width: int) -> Tensor:
        """Return `[B, P]` classes of the positions of a feature map, -1 where ignored.

        Raises:
            UserError: if the data has no class maps.
        """
        target = batch.target
        if not (isinstance(target, Tensor) and target.ndim == 3 and not target.is_floating_point()):
            given = f"{list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            raise UserError(f"cirkd remembers pixels by class, and needs class maps [B, H, W], not {given}")
        small = class_maps(target, batch.labelled, self.num_classes, height, width).flatten(1)
        return small.where(small != self.ignore_label, -1)

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Any:
        """Return which pixels are remembered, and which places of the queues are contrasted."""
        if not self.remembers:
            return None
        height, width = student[self.student_tap.name].shape[2:]
        noise = draw.uniform(batch.index, (height * width,))
        chosen = picks(self.labels(batch, height, width), noise, self.num_classes, self.pixels_per_image)
        once, slots = torch.zeros(1, dtype=torch.int64, device=noise.device), []
        for salt, (length, keys) in enumerate(
            ((self.pixel_memory, self.pixel_keys), (self.region_memory, self.region_keys)), start=1
        ):
            order = draw.uniform(once, (length,), salt)[0].argsort()
            slots.append(order[: min(keys // self.num_classes + 1, length)])
        return chosen, slots[0], slots[1]

    def forward(  # type: ignore[override]
        self,
        student: Signals,
        teacher: Signals,
        batch: Batch,
        draws: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Outcome:
        """Return the parts `kd`, `batch`, `pixel` and `region`, and what the memory is to take.

        Raises:
            UserError: if the data has no class maps, or the projection's batch norm gets one value a channel.
        """
        source, goal = student[self.student_tap.name], teacher[self.teacher_tap.name]
        logits = student.logits, teacher.logits
        ours, theirs, compared = match_kept(*logits, known(batch, logits[0]), known(batch, logits[1]))
        places = known(batch, source)
        parts = cirkd(
            ours,
            theirs,
            source,
            goal,
            lambda_kd=self.lambda_kd,
            alpha=self.alpha,
            temperature=self.temperature,
            gather=self.gather,
            keep=(compared, places),
        )
        if draws is None:
            return Outcome(parts)
        if self.training and source.numel() == source.shape[1]:
            raise UserError(
                "cirkd: batch norm cannot train on one value a channel (one image with a 1x1 map); "
                "use a batch size of at least 2, or drop the last incomplete batch"
            )
        chosen, *slots = draws
        labels = self.labels(batch, *source.shape[2:])
        projected = _vectors(self.project(source.to(next(self.projection.parameters()).dtype), places))
        taught = _vectors(goal)
        kept = {"index": batch.index, **remembered(taught, labels, chosen, self.num_classes, self.form)}
        writings = self._writings(kept)
        terms = ("pixel", self.beta, self.pixel_queue), ("region", self.gamma, self.region_queue)
        for (name, coefficient, queue), slot, writing in zip(terms, slots, writings, strict=True):
            place = (torch.arange(len(queue), device=slot.device)[:, None] * queue.shape[1] + slot).flatten()
            keys = as_written(queue.flatten(0, 1), place, writing.index, writing.rows, writing.valid)
            parts[name] = coefficient * contrast(projected, taught, keys, labels >= 0, self.memory_temperature)
        return Outcome(parts, kept)

    def project(self, features: Tensor, keep: Tensor | None) -> Tensor:
        """Return the student's features at the teacher's width; the batch norm looks at the places that are kept.

        As released, with the form `image`, it looks at all.
        """
        first, norm, relu, last = self.projection
        assert isinstance(norm, nn.BatchNorm2d)
        hidden = first(features)
        if keep is None or self.form == "image" or not norm.training:
            hidden = norm(hidden)
        else:
            hidden = normalized(norm, hidden, keep)
        projected: Tensor = last(relu(hidden))
        return projected

    def _writings(self, kept: Mapping[str, Tensor]) -> tuple[Writing, Writing]:
        """Return what goes where, one image after the other in the order of their ids."""
        order = kept["index"].argsort(stable=True)
        pixels, regions, count = (kept[name][order] for name in ("pixels", "regions", "count"))
        added = count.clamp(max=self.pixels_per_image)
        return (
            pixel_writing(self.pixel_pointer, pixels, added, self.pixel_memory),
            region_writing(self.region_pointer, regions, count, self.region_memory),
        )

    def commit(self, kept: Mapping[str, Tensor]) -> None:
        """Add the pixels and regions of this step to the queues."""
        pixel, region = self._writings(kept)
        write(self.pixel_queue.view(-1, self.pixel_queue.shape[2]), pixel.index, pixel.rows, pixel.valid)
        write(self.region_queue.view(-1, self.region_queue.shape[2]), region.index, region.rows, region.valid)
        self.pixel_pointer.copy_(pixel.pointer)
        self.region_pointer.copy_(region.pointer)


def normalized(norm: nn.BatchNorm2d, values: Tensor, keep: Tensor) -> Tensor:
    """Return what a batch norm in training gives if it looks at some places only; its running statistics move.

    Args:
        norm: with weight, bias and running statistics.
        values: `[B, C, H, W]`.
        keep: `[B, H, W]` bool: the places whose mean and variance are taken.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    places, count = keep[:, None], keep.sum().clamp(min=1)
    mean = wide.where(places, 0.0).sum((0, 2, 3), keepdim=True) / count
    apart = wide - mean
    variance = apart.where(places, 0.0).square().sum((0, 2, 3), keepdim=True) / count
    with torch.no_grad():
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, seen in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.lerp_(seen.flatten().to(running.dtype), norm.momentum)
        norm.num_batches_tracked.add_(1)
    scaled = apart * (variance + norm.eps).rsqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    return scaled.to(values.dtype)


@full_precision
def _vectors(feature_map: Tensor) -> Tensor:
    return vectors(feature_map)


def remembered(
    taught: Tensor, labels: Tensor, chosen: Tensor, num_classes: int, form: Form = "class"
) -> dict[str, Tensor]:
    """Return what one batch adds to the memory.

    Args:
        taught: `[B, P, D]` the teacher's unit vectors.
        labels: `[B, P]` classes, -1 where ignored.
        chosen: `[B, K, F]` which of a class's pixels are taken, as `picks` returns them.
        num_classes: K.
        form: whether these numbers count the `class`'s own pixels, or positions in the `image`.

    Returns:
        `pixels` `[B, K, F, D]`, `regions` `[B, K, D]` unit means of each class, `count` `[B, K]`; constants.
    """
    taught = taught.detach()
    known = Sorted.of(labels, num_classes)
    place = chosen
    if form == "class":
        # beyond a class's last pixel stands anything: it is not taken
        index = (known.first[..., None] + chosen).clamp(max=labels.shape[1] - 1)
        place = known.place.gather(1, index.flatten(1)).view_as(chosen)
    width = taught.shape[2]
    rows = taught.gather(1, place.flatten(1)[..., None].expand(-1, -1, width)).unflatten(1, chosen.shape[1:])
    onehot = nn.functional.one_hot(labels.where(labels >= 0, num_classes), num_classes + 1)[..., :-1]
    means = onehot.to(taught.dtype).mT @ taught / known.count.clamp(min=1)[..., None]
    return {"pixels": rows, "regions": unit(means), "count": known.count}
