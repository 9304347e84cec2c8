# SPDX-License-Identifier: Apache-2.0
"""Tell the teacher's answer to a sample from its answers to thousands of others, kept in a memory.

Either model has a memory of one vector a training sample: the student's vector is scored against the teacher's
memory and the other way round. Negatives come from other classes; a sample without a label has all others for
negatives. The normaliser of the scores is taken from the first step and then stays, as the authors' code does.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tutelage.core import Batch, Card, Draw, Facts, Outcome, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.functional.bank import write
from tutelage.functional.block import spans
from tutelage.functional.noise import subset
from tutelage.functional.pairwise import unit
from tutelage.functional.precision import full_precision

CARD = Card(
    name="CRD",
    title="Contrastive Representation Distillation",
    authors="Tian, Krishnan, Isola",
    year=2020,
    venue="ICLR",
    paper="arxiv:1910.10699",
    code="github:HobbitLong/RepDistiller@b84f547",
    code_licence="BSD-2-Clause",
    claims="A contrastive objective transfers more of the teacher's representation than KD and feature matching.",
    reads={"student": ("pooled",), "teacher": ("pooled",)},
    labels=("hard",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/crd",),
)

OBJECTIVE = {"task": 1.0, "crd": {"weight": 0.8}}

Positive = Literal["self", "class"]
EPS = 1e-7  # of the authors' code
DENSE = 16  # up to so many samples a contrasted one, scoring all of them and picking is faster than picking first


def _picked(anchors: Tensor, memory: Tensor, index: Tensor) -> Tensor:
    return (memory[index] * anchors[:, None]).sum(dim=2)


@full_precision
def scores(anchors: Tensor, memory: Tensor, contrast_index: Tensor, temperature: float = 0.07) -> Tensor:
    """Return the logarithm of each anchor's score against some rows of a memory, < m, e > / temperature.

    Args:
        anchors: `[B, D]` unit vectors.
        memory: `[N, D]`.
        contrast_index: `[B, K + 1]` int64, which rows.
        temperature: > 0.

    Returns:
        `[B, K + 1]`. Where the memory is large, blocks of anchors are computed one after the other, and again
        in backward.
    """
    if len(memory) <= DENSE * contrast_index.shape[1]:
        return (anchors @ memory.T).gather(1, contrast_index) / temperature
    pieces = spans(len(anchors), contrast_index.shape[1] * memory.shape[1])
    if len(pieces) <= 1:
        return _picked(anchors, memory, contrast_index) / temperature
    rows: list[Tensor] = [
        checkpoint(_picked, anchors[a:b], memory, contrast_index[a:b], use_reentrant=False, preserve_rng_state=False)
        for a, b in pieces
    ]
    return torch.cat(rows) / temperature


@full_precision
def normalizer(log_scores: Tensor, num_samples: int) -> Tensor:
    """Return the logarithm of the number of samples times the mean score: the constant Z of one side."""
    return log_scores.detach().flatten().logsumexp(0) - math.log(max(log_scores.numel(), 1)) + math.log(num_samples)


@full_precision
def crd(student_scores: Tensor, teacher_scores: Tensor, log_z: Tensor, *, num_samples: int) -> dict[str, Tensor]:
    """Return the loss of the student's and of the teacher's anchors.

        o_bk = exp( < m_bk, e_b > / tau ), x = o / Z, k = 0 the positive, 1..K the negatives
        L = - 1/B sum_b [ log x_b0 / (x_b0 + K/N + eps) + sum_k log (K/N) / (x_bk + K/N + eps) ]

    once with the student's vectors e against the teacher's memory m, once the other way round.

    Convention:
        - summed over the K negatives, averaged over samples; both sides have coefficient 1
        - computed from logarithms: no temperature overflows
        - gradients reach the anchors of both sides, through them both models' embeddings; memories are constants

    Args:
        student_scores: `[B, K + 1]`, log o of the student's anchors, the positive first.
        teacher_scores: `[B, K + 1]`, log o of the teacher's anchors.
        log_z: `[2]`, log Z of the student's and of the teacher's anchors, constants.
        num_samples: N, rows of a memory.

    Returns:
        `student_anchor` and `teacher_anchor`, scalars, float32 or wider; their sum is the loss. A batch
        without rows gives connected zeros.

    Example:
        >>> even = torch.zeros(1, 2)  # the positive and one negative, both with score 1
        >>> crd(even, even, torch.full((2,), math.log(4)), num_samples=4)["student_anchor"]
        tensor(1.3863)

    Reference: Tian et al., Contrastive Representation Distillation, ICLR 2020.
    """
    noise = (student_scores.shape[1] - 1) / num_samples
    floor = math.log(noise + EPS)
    parts = {}
    for side, given, constant in zip(("student", "teacher"), (student_scores, teacher_scores), log_z, strict=True):
        x = given - constant
        both = torch.logaddexp(x, torch.full_like(x, floor))
        rows = (both[:, 0] - x[:, 0]) + (both[:, 1:] - math.log(noise)).sum(dim=1)
        parts[f"{side}_anchor"] = rows.sum() / max(len(rows), 1)
    return parts


@final
class CRD(Term):
    """Term form of :func:`crd`: two linear embeddings, two memories, negatives drawn by sample id and step.

    The memories move after the optimizer's step, with the samples of all micro-batches and processes: memory
    = unit( momentum * memory + (1 - momentum) * embedding ). A sample met twice in a step counts once, the
    last time. They are part of the checkpoint, as the normalisers are.

    Args:
        negatives: K.
        temperature: tau, > 0.
        momentum: of the memories, in [0, 1).
        width: of the embeddings.
        positive: `self`, the sample itself, or `class`, a random sample of its class (`exact` and `relax` in
            the authors' code).
        student_tap: a vector a sample; what is more is flattened.
        teacher_tap: the same of the teacher.
    """

    memory_student: Tensor
    memory_teacher: Tensor
    log_z: Tensor
    started: Tensor
    order: Tensor
    span: Tensor

    def __init__(
        self,
        *,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        width: int = 128,
        positive: Positive = "self",
        student_tap: str | Mapping[str, Any] | Tap = "pooled",
        teacher_tap: str | Mapping[str, Any] | Tap = "pooled",
    ) -> None:
        super().__init__()
        if positive not in ("class", "self"):
            raise UserError(f"positive {positive!r} is not known; valid: class, self")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum is a share in [0, 1), not {momentum}")
        if negatives < 1 or width < 1:
            raise UserError(f"negatives and width must be at least 1, not {negatives} and {width}")
        self.negatives, self.temperature, self.momentum, self.width = negatives, temperature, momentum, width
        self.positive: Positive = positive
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)
        self.populations = (0, 0)

    @property
    def reads(self) -> Reads:
        """The two vectors."""
        return Reads((self.student_tap,), (self.teacher_tap,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the embeddings and the memories.

        Raises:
            UserError: if the number of samples is not known, or a sample has no negative.
        """
        assert teacher is not None
        source, goal = (s[tap.name].flatten(1) for s, tap in ((student, self.student_tap), (teacher, self.teacher_tap)))
        self.embed_student = nn.Linear(source.shape[1], self.width).to(source.device)
        self.embed_teacher = nn.Linear(goal.shape[1], self.width).to(goal.device)
        if not facts.num_samples:
            raise UserError("crd remembers every training sample, and needs a data set of known size")
        bound = math.sqrt(3 / self.width)
        for name in ("memory_student", "memory_teacher"):
            memory = torch.empty(facts.num_samples, self.width).uniform_(-bound, bound)
            self.register_buffer(name, memory.to(source.device))
        self.register_buffer("log_z", torch.zeros(2, device=source.device))
        self.register_buffer("started", torch.tensor(False, device=source.device))
        self._arrange(facts, source.device)

    def _arrange(self, facts: Facts, device: torch.device) -> None:
        """Lay the samples out by class, so that a sample's negatives are all places but one span."""
        count = facts.num_samples
        targets = torch.full((count,), -1) if facts.targets is None else facts.targets.cpu()
        order = targets.argsort(stable=True)
        own = order.argsort()  # an unlabelled sample is a class of its own
        edges = [torch.searchsorted(targets[order], targets, right=right) for right in (False, True)]
        first = torch.where(targets >= 0, edges[0], own)
        size = torch.where(targets >= 0, edges[1], own + 1) - first
        self.populations = int(count - size.max()), int(count - size.min())
        if not self.populations[0]:
            raise UserError("crd contrasts samples of different classes, and all samples are of one class")
        self.register_buffer("order", order.to(device), persistent=False)
        self.register_buffer("span", torch.stack([first, size], dim=1).to(device), persistent=False)

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Tensor:
        """Return the samples to contrast, `[B, K + 1]`: the positive, then distinct negatives."""
        chance = draw.uniform(batch.index, (3,)).double()
        key = (chance[:, :2] * 2**24).long()
        first, size = self.span[batch.index].T
        smallest, largest = self.populations
        population = len(self.order) - size
        key = key[:, 0] + (key[:, 1] << 24)
        place = subset(key, self.negatives, population, smallest=smallest, largest=largest)
        place = torch.where(place < first[:, None], place, place + size[:, None])
        positive = batch.index
        if self.positive == "class":
            positive = self.order[first + (chance[:, 2] * size).long()]
        return torch.cat([positive[:, None], self.order[place]], dim=1)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, contrast_index: Tensor) -> Outcome:  # type: ignore[override]
        """Return the parts `student_anchor` and `teacher_anchor`, and what the memories are to take."""
        pairs = (
            (self.embed_student, student[self.student_tap.name], self.memory_teacher),
            (self.embed_teacher, teacher[self.teacher_tap.name], self.memory_student),
        )
        anchors, found = [], []
        for embed, vector, memory in pairs:
            anchors.append(_embedded(embed(vector.flatten(1).to(embed.weight.dtype))))
            found.append(scores(anchors[-1], memory, contrast_index, self.temperature))
        count = len(self.memory_student)
        fresh = torch.stack([normalizer(side, count) for side in found])
        log_z = torch.where(self.started, self.log_z.to(fresh.dtype), fresh)
        kept = {
            "index": batch.index,
            **{side: anchor.detach() for side, anchor in zip(("student", "teacher"), anchors, strict=True)},
            "scores": torch.stack([rows.detach().logsumexp(1) for rows in found], dim=1),
        }
        return Outcome(crd(found[0], found[1], log_z, num_samples=count), kept)

    def commit(self, kept: Mapping[str, Tensor]) -> None:
        """Move the memories, and fix the normalisers after the first step."""
        index = kept["index"]
        if not len(index):
            return
        for memory, rows in ((self.memory_student, kept["student"]), (self.memory_teacher, kept["teacher"])):
            write(memory, index, unit(self.momentum * memory[index] + (1 - self.momentum) * rows.to(memory.dtype)))
        count = len(index) * (self.negatives + 1) / len(self.memory_student)
        fresh = kept["scores"].logsumexp(0) - math.log(count)
        self.log_z.copy_(torch.where(self.started, self.log_z, fresh))
        self.started.fill_(True)


@full_precision
def _embedded(vector: Tensor) -> Tensor:
    return unit(vector)
