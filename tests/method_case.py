# SPDX-License-Identifier: Apache-2.0
"""What the contract tests need of one method: a fresh term, the tensors it meets, and how to call it.

Every method's test file has `case() -> MethodCase`; the contract (`test_contract.py`) asks for it. Taking
tensors instead of models keeps one check at a few milliseconds, and makes the student's tensors free: leaves
that a check may descend on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Draw, Facts, Signals, Term
from tutelage.core.batch import Frame
from tutelage.core.term import Outcome

Tensors = dict[str, Tensor]

#: Rows of every case's batch.
ROWS = 6


def labelled_batch(
    target: Tensor | None = None, *, index: Tensor | None = None, extra: Mapping[str, Any] | None = None
) -> Batch:
    """Return a batch of six rows, two of them unlabelled, with distinct sample ids; the inputs are blank."""
    if target is None:
        target = torch.tensor([0, 3, -1, 4, -1, 1])
    if index is None:
        index = torch.tensor([11, 3, 42, 7, 90, 5])[: len(target)]
    return Batch.of(torch.zeros(len(target), 1), target, index=index, extra=dict(extra or {}))


@dataclass(frozen=True)
class MethodCase:
    """One method, small enough for every shared check.

    Args:
        term: returns a fresh term, not yet built.
        student: the student's free tensors by the name signals call them, from a seed; float32, six rows.
        teacher: the same for the teacher, or None for a method without one.
        batch: six rows with distinct sample ids; some unlabelled where the method accepts that.
        facts: what the term is built with.
        borrowed: the modules the teacher lends, by role: fresh modules, the same weights at every call.
    """

    term: Callable[[], Term]
    student: Callable[[int], Tensors]
    teacher: Callable[[int], Tensors] | None
    batch: Callable[[], Batch] = labelled_batch
    facts: Facts = field(default_factory=lambda: Facts(num_classes=5, num_samples=100))
    borrowed: Callable[[], dict[str, nn.Module]] = dict

    def signals(self, tensors: Tensors, *, lend: bool = False) -> Signals:
        """Return signals of these tensors; the output is the logits, where there are any.

        Args:
            tensors: by role.
            lend: add the borrowed modules, frozen and in the tensors' type: the teacher's side.
        """
        kind = next(iter(tensors.values())).dtype if tensors else torch.float32
        lent = {
            role: module.to(kind).eval().requires_grad_(False)
            for role, module in (self.borrowed() if lend else {}).items()
        }
        return Signals(tensors.get("logits"), dict(tensors), lent)

    def teach(self, tensors: Tensors | None) -> Signals | None:
        """Return the teacher's signals, with what it lends, or None for a method without a teacher."""
        return None if tensors is None else self.signals(tensors, lend=True)

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors | None]:
        """Return free student tensors (leaves that require gradients) and constant teacher tensors."""
        student = {
            role: value.detach().to(dtype).requires_grad_() if value.is_floating_point() else value
            for role, value in self.student(seed).items()
        }
        if self.teacher is None:
            return student, None
        teacher = {
            role: value.detach().to(dtype) if value.is_floating_point() else value
            for role, value in self.teacher(seed).items()
        }
        return student, teacher

    def matched(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
        """Return student tensors equal to the teacher's, by role, where it has them."""
        student, teacher = self.tensors(seed, dtype)
        assert teacher is not None
        equal = {
            role: teacher[role].clone().requires_grad_() if role in teacher else value
            for role, value in student.items()
        }
        return equal, teacher

    def built(self, seed: int = 0, dtype: torch.dtype = torch.float32, *, matched: bool = False) -> Term:
        """Return a term built from the case's tensors; its own layers are drawn from the seed.

        Args:
            seed: of the tensors and the layers.
            dtype: of the layers.
            matched: build it for a student that looks like the teacher: bridges are the identity then.
        """
        student, teacher = self.matched(seed) if matched else self.tensors(seed)
        term, sides = self.term(), (self.signals(student).detach(), self.teach(teacher))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            term.build(*sides, self.facts)
        return term.to(dtype)

    def draws(self, term: Term, student: Tensors, teacher: Tensors | None, batch: Batch, step: int = 0) -> Any:
        """Return the random numbers of one forward, or None if the term uses none."""
        return term.draw(self.signals(student), self.teach(teacher), batch, Draw(self.facts.seed, step, "case"))

    def outcome(
        self, term: Term, student: Tensors, teacher: Tensors | None, batch: Batch, draws: Any = None
    ) -> Outcome:
        """Return what the term says, in one shape; draws are made if none are given."""
        if draws is None:
            draws = self.draws(term, student, teacher, batch)
        given = term(self.signals(student), self.teach(teacher), batch, *(() if draws is None else (draws,)))
        if isinstance(given, Outcome):
            return given
        return Outcome({"loss": given} if isinstance(given, Tensor) else given)

    def loss(self, term: Term, student: Tensors, teacher: Tensors | None, batch: Batch, draws: Any = None) -> Tensor:
        """Return the sum of the term's parts, 0-d."""
        parts = list(self.outcome(term, student, teacher, batch, draws).parts.values())
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def rows(self, chosen: Tensor, *sides: Tensors | None) -> tuple[Batch, list[Tensors | None]]:
        """Return the batch and tensors of some rows, in the order given: to shuffle, or to cut in halves.

        Tensors whose leading dimension is not the batch's stay whole.
        """
        batch = self.batch()
        count = len(batch)

        def pick(value: Any) -> Any:
            return value[chosen] if isinstance(value, Tensor) and value.ndim and len(value) == count else value

        cut = replace(
            batch,
            inputs=pick(batch.inputs),
            target=pick(batch.target),
            labelled=batch.labelled[chosen],
            index=batch.index[chosen],
            view=batch.view[chosen],
            frame=framed(batch.frame, chosen),
            views={name: pick(inputs) for name, inputs in batch.views.items()},
            extra={key: pick(value) for key, value in batch.extra.items()},
        )
        picked = [None if side is None else {role: pick(value) for role, value in side.items()} for side in sides]
        return cut, picked


def framed(frame: Frame | None, chosen: Tensor) -> Frame | None:
    """Return the geometry of some images, in the order given; their boxes keep theirs."""
    if frame is None:
        return None
    place = torch.full((len(frame.image_size),), -1).scatter(0, chosen, torch.arange(len(chosen)))
    image = place[frame.box_image]
    kept = image >= 0
    masks = None if frame.masks is None else frame.masks[kept]
    return Frame(frame.size, frame.image_size[chosen], frame.boxes[kept], image[kept], masks)


def gaussian(seed: int, shapes: Mapping[str, tuple[int, ...]], scale: float = 1.0) -> Tensors:
    """Return normal tensors of these shapes, by name: a function of the seed.

    Example:
        >>> gaussian(0, {"logits": (6, 5)})["logits"].shape
        torch.Size([6, 5])
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def gradient(loss: Tensor, tensor: Tensor) -> Tensor:
    """The gradient of a loss on a tensor; the graph stays, so that another can be asked for."""
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0]
