# SPDX-License-Identifier: Apache-2.0
"""The one trainable module: students, bridges and objective."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.core import ranks
from tutelage.core.batch import Batch, Facts, share_counts
from tutelage.core.error import UserError, nearest
from tutelage.core.feeder import Feeder
from tutelage.core.model import Lent, Model
from tutelage.core.objective import Losses, Objective
from tutelage.core.reader import Reader
from tutelage.core.signals import Signals
from tutelage.core.tap import Tap
from tutelage.core.task import Task, answer
from tutelage.core.teacher import Live, Teacher
from tutelage.core.term import Draw

Observed = Signals | Mapping[str, Signals] | None


@dataclass(frozen=True)
class Build:
    """What the dry run found.

    Args:
        shapes: of every recorded signal, by source and name.
        overwritten: taps that a later in-place operation rewrites; they are cloned.
        frozen: parameters of the students that no loss can reach; they were frozen.
    """

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    overwritten: tuple[str, ...]
    frozen: tuple[str, ...]


class Distiller(nn.Module):
    """Reads the students, compares them with their teachers, and returns the losses.

    Args:
        student: a module or `Model`, or several by name.
        objective: the terms and their weights.
        task: what the student is for.
        teacher: a `Teacher`, a module or `Model` (then `Live`), or several by name; never a child of this
            module.
        sample: a small batch for the dry run at build, which leaves weights, buffers and generators alone.
        facts: what is known of the run.
        feeders: what makes the batches of a step from those of the data.

    Raises:
        UserError: if a term reads what no source has (sources and roles are named), if sources cannot be told
            apart, or if nothing can be trained.

    One step:

        signals = distiller.observe(batch)
        losses = distiller(batch, signals)
        losses.total.backward(); optimizer.step(); optimizer.zero_grad()
        distiller.after_step(losses)
    """

    def __init__(
        self,
        student: nn.Module | Model | Mapping[str, nn.Module | Model],
        objective: Objective,
        *,
        task: Task,
        teacher: Teacher | nn.Module | Model | Mapping[str, Teacher | nn.Module | Model] | None = None,
        sample: Batch,
        facts: Facts | None = None,
        feeders: Sequence[Feeder] = (),
    ) -> None:
        super().__init__()
        named = dict(student) if isinstance(student, Mapping) else {"student": student}
        self.models = {name: Model.of(model) for name, model in named.items()}
        self.students = nn.ModuleDict({name: model.module for name, model in self.models.items()})
        self.objective, self.task, self.feeders = objective, task, tuple(feeders)
        self.objective.facts = facts or Facts()
        given = {} if teacher is None else dict(teacher) if isinstance(teacher, Mapping) else {"teacher": teacher}
        self.teachers: dict[str, Teacher] = {
            name: one if isinstance(one, Teacher) else Live(one) for name, one in given.items()
        }
        self.step = 0
        self.readers: dict[str, Reader] = {}
        self.lent: dict[str, dict[str, nn.Module]] = {}
        self._unreached: list[nn.Parameter] = []
        self._check_sources()
        try:
            self.report = self._build(sample)
        except BaseException:
            self.close()
            raise

    @property
    def student(self) -> nn.Module:
        """The user's own module (the first, if there are several)."""
        return next(iter(self.students.values()))

    @property
    def facts(self) -> Facts:
        """What is known of the run."""
        return self.objective.facts

    # --- build -------------------------------------------------------------------------------------------

    def _check_sources(self) -> None:
        """Refuse names that cannot be told apart, and a teacher that is made of a student's own weights."""
        for name in (*self.models, *self.teachers):
            if not name or "@" in name or "." in name:
                raise UserError(f"source {name!r}: a name has neither '@' nor '.'")
        for name in self.teachers:
            if name in self.models:
                raise UserError(f"source {name!r} is the name of a student and of a teacher; rename one")
        trained = {parameter for model in self.models.values() for parameter in model.module.parameters()}
        for name, teacher in self.teachers.items():
            if any(p in trained for network in teacher.networks() for p in network.parameters()):
                raise UserError(
                    f"teacher {name!r} shares weights with a student, and would freeze them: pass a copy, "
                    "or name the student as the source in the teacher's place"
                )

    def _build(self, sample: Batch) -> Build:
        taps, borrows = self._plan()
        device = next(self.student.parameters()).device
        sample = sample.to(device)
        for name, model in self.models.items():
            with self._reading(name):
                self.readers[name] = Reader(model, taps[name], self.task)
                self.lent[name] = {role: Lent(model.lend(role)) for word in borrows[name] for role in model.lent(word)}
        with self._untouched():
            self.train()
            signals = {}
            for name in self.teachers:
                with self._reading(name):
                    signals[name] = self.teachers[name].plan(taps[name], borrows[name], self.task, sample)
            for source in self._sources():
                name, _, view = source.partition("@")
                seen = sample.seen_as(view) if view else sample
                if name in self.readers:
                    try:
                        with self._reading(name):
                            signals[source] = replace(self.readers[name].rehearse(seen), borrowed=self.lent[name])
                    except ValueError as error:
                        raise _explained(error, sample) from error
                elif view:
                    signals[source] = self.teachers[name].observe(seen)
            for label, entry in self.objective.entries.items():
                entry.term.build(*self.objective.pair(label, signals, self.models), self.facts)
                entry.term.to(device)
        shapes = {
            source: {name: tuple(tensor.shape) for name, tensor in found.taps.items()}
            for source, found in signals.items()
        }
        overwritten = tuple(f"{n}.{tap}" for n, reader in self.readers.items() for tap in reader.overwritten)
        return Build(shapes, overwritten, self._freeze_unreached(sample, signals))

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Say of a mistake which model it is about, and which terms read there."""
        try:
            yield
        except UserError as error:
            said, places = str(error), {}
            for label, entry in self.objective.entries.items():
                sides = ((entry.student, entry.term.reads.student), (entry.teacher, entry.term.reads.teacher))
                places[label] = [
                    tap.where for source, taps in sides if source.partition("@")[0] == name for tap in taps
                ]
            named = [label for label, found in places.items() if any(repr(where) in said for where in found)]
            labels = ", ".join(named or [label for label, found in places.items() if found])
            raise UserError(f"{name}{f' (objective: {labels})' if labels else ''}: {said}") from error

    def _sources(self) -> list[str]:
        """Every source that is read, students first; views after the sources they belong to."""
        names = [*self.models]
        for entry in self.objective.entries.values():
            wanted = entry.term.reads
            names += [entry.student, *_views(entry.student, wanted.student)]
            if wanted.taught:
                names += [entry.teacher, *_views(entry.teacher, wanted.teacher)]
        return list(dict.fromkeys(names))

    def _plan(self) -> tuple[dict[str, list[Tap]], dict[str, list[str]]]:
        """Return the taps of each source and the modules each lends."""
        known = [*self.models, *self.teachers]
        taps: dict[str, list[Tap]] = {name: [] for name in known}
        borrows: dict[str, list[str]] = {name: [] for name in known}
        for label, entry in self.objective.entries.items():
            wanted, card = entry.term.reads, entry.term.card
            if self.facts.mixes and card is not None and not {"soft", "none"} & set(card.labels):
                raise UserError(
                    f"objective.{label}: {card.name} reads class indices only, and {self.facts.mixes[0]} "
                    "makes soft labels; switch the mixing off, or choose a method for soft labels"
                )
            student, teacher = entry.student.partition("@")[0], entry.teacher.partition("@")[0]
            if student not in self.models:
                raise UserError(f"objective.{label}.student: no student {student!r}{nearest(student, self.models)}")
            taps[student] += [tap.plain for tap in wanted.student]
            if not wanted.taught:
                continue
            if teacher not in known:
                if not self.teachers:
                    raise UserError(
                        f"objective.{label}: {type(entry.term).__name__} needs a teacher, and none was given"
                    )
                raise UserError(f"objective.{label}.teacher: no source {teacher!r}{nearest(teacher, known)}")
            taps[teacher] += [tap.plain for tap in wanted.teacher]
            borrows[teacher] += wanted.borrows + wanted.calls
            if wanted.borrows and teacher in self.models:
                raise UserError(f"objective.{label}: modules are lent by a teacher, not by the student {teacher!r}")
        return {name: list(dict.fromkeys(found)) for name, found in taps.items()}, borrows

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Restore buffers and generators, and the students' training flags, after a rehearsal."""
        modules = [*self.students.modules(), *self.objective.modules()]
        flags = [(module, module.training) for module in modules]
        for teacher in self.teachers.values():
            modules += [module for network in teacher.networks() for module in network.modules()]
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        devices = sorted({p.device.index or 0 for p in self.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices):
            try:
                yield
            finally:
                for module, training in flags:
                    module.training = training
                with torch.no_grad():
                    for module, name, buffer, before in buffers:
                        module._buffers[name] = buffer.copy_(before)

    def _freeze_unreached(self, sample: Batch, signals: Mapping[str, Signals]) -> tuple[str, ...]:
        """Freeze parameters of the students that no loss reaches: DDP would wait for their gradients."""
        candidates = {name: p for name, p in self.students.named_parameters() if p.requires_grad}
        unreached = set(candidates)
        for training in (True, False):  # a layer may be skipped at random in training mode
            if not (training or unreached):
                break
            with self._untouched(), torch.enable_grad():
                self.train(training)
                observed = {n: found for n, found in signals.items() if n.partition("@")[0] in self.teachers}
                try:
                    total = self._reaching(self._read(sample, observed), sample)
                except Exception:
                    if training:
                        raise
                    break  # taps and losses of some models are there in training only
                if total is None or not total.requires_grad:
                    raise UserError("nothing learns: no loss with a weight reaches a parameter that is trained")
                if names := sorted(unreached):
                    found = torch.autograd.grad(total, [candidates[n] for n in names], allow_unused=True)
                    unreached = {name for name, grad in zip(names, found, strict=True) if grad is None}
        for name in unreached:
            candidates[name].requires_grad_(False)
            self._unreached.append(candidates[name])
        return tuple(sorted(unreached))

    def _losses(self, sources: Mapping[str, Signals], batch: Batch) -> dict[str, Tensor]:
        """Return the task's loss over all students and each term, before any weight, as in the last step."""
        tasks: list[Tensor] = []
        for name in self.models:
            loss = self.task.loss(sources[name].output, batch)
            tasks += [loss] if isinstance(loss, Tensor) else loss.values()
        losses = {"task": sum(tasks[1:], tasks[0])}
        last = max(self.step, self.facts.total_steps - 1)  # a term may change with the step, as weights do
        for label in self.objective.entries:
            pair = self.objective.pair(label, sources, self.models)
            parts = list(self.objective.compare(label, *pair, batch, last)[0].values())
            losses[label] = sum(parts[1:], parts[0])
        return losses

    def _reaching(self, sources: Mapping[str, Signals], batch: Batch) -> Tensor | None:
        """Sum everything that has a weight at some time."""
        losses = self._losses(sources, batch)
        weighted = [loss for label, loss in losses.items() if self.objective.final_weight(label)]
        return sum(weighted[1:], weighted[0]) if weighted else None

    # --- the step ----------------------------------------------------------------------------------------

    def feed(self, batch: Batch) -> Iterator[Batch]:
        """Return the batch itself, or what the feeders make of it, one after the other."""
        fed: Iterator[Batch] = iter((batch,))
        for number, feeder in enumerate(self.feeders):
            draw = Draw(self.facts.seed, self.step, f"feeder {number}")
            fed = self._fed(fed, feeder, draw)
        return fed

    def _fed(self, batches: Iterator[Batch], feeder: Feeder, draw: Draw) -> Iterator[Batch]:
        for batch in batches:
            made = iter(feeder.feed(batch, self.models, self.teachers, draw))
            while True:
                with torch.no_grad():  # only around the feeder: who takes the batch needs gradients
                    one = next(made, None)
                if one is None:
                    break
                yield one

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the micro-batches of one optimizer step with the step's mean counts, over all ranks."""
        if len(batches) == 1 and ranks.world_size() == 1:
            return list(batches)
        return share_counts(batches, self.objective.averages(self.task), ranks.mean)

    def observe(self, batch: Batch) -> dict[str, Signals]:
        """Return every teacher's signals for a batch, by name."""
        found = {name: teacher.observe(batch) for name, teacher in self.teachers.items()}
        for source in self._sources():
            name, _, view = source.partition("@")
            if view and name in self.teachers:
                found[source] = self.teachers[name].observe(batch.seen_as(view))
        return found

    def forward(self, batch: Batch, signals: Observed = None) -> Losses:
        """Return the losses of a batch: the only call that needs gradients.

        Args:
            batch: on the students' device.
            signals: of the one teacher, or of all by name as `observe` returns them; None without a teacher.

        Raises:
            ValueError: if the signals of a teacher, or of a view of it, are missing.
        """
        sources = self._read(batch, signals)
        losses: Losses = self.objective(sources, tuple(self.models), batch, self.task, self.step)
        return losses

    def _read(self, batch: Batch, signals: Observed) -> dict[str, Signals]:
        if isinstance(signals, Signals):
            signals = {next(iter(self.teachers), "teacher"): signals}
        observed = dict(signals or {})
        read = [source for source in self._sources() if source.partition("@")[0] in self.teachers]
        missing = [source for source in (*self.teachers, *read) if source not in observed]
        if missing:
            raise ValueError(f"no signals of teacher {missing[0]!r}: pass what distiller.observe(batch) returns")
        for source in self._sources():
            name, _, view = source.partition("@")
            if name in self.readers:
                seen = batch.seen_as(view) if view else batch
                try:
                    observed[source] = self.readers[name](seen, self.lent[name])
                except ValueError as error:
                    raise _explained(error, batch) from error
        return observed

    def after_step(self, *losses: Losses) -> None:
        """Commit what the terms kept, move the clock and every teacher that follows the student.

        Args:
            losses: of every micro-batch of the optimizer step.
        """
        for label in self.objective.entries:
            kept = [one.kept[label] for one in losses if label in one.kept]
            if kept:
                joined = {name: ranks.gather(torch.cat([part[name] for part in kept])) for name in kept[0]}
                with torch.no_grad():
                    self.objective.entries[label].term.commit(joined)
        for teacher in self.teachers.values():
            teacher.follow(self.student)
        self.step += 1

    def measure(self, batch: Batch, signals: Observed = None) -> dict[str, tuple[float, float]]:
        """Return each loss's value and the norm of its gradient on the students, before any weight.

        For a look before training, not for a step: it runs one backward a label and waits for the device.

        Args:
            batch: on the students' device.
            signals: as in `forward`.
        """
        sources = self._read(batch, signals)
        trained = [p for p in self.students.parameters() if p.requires_grad]
        found = {}
        for label, loss in self._losses(sources, batch).items():
            gradients: tuple[Tensor | None, ...] = (None,)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            norms = [gradient.norm() for gradient in gradients if gradient is not None]
            found[label] = (loss.item(), torch.stack(norms).norm().item() if norms else 0.0)
        return found

    # --- around the step ---------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "Distiller":
        """Set training mode; wholly frozen parts of the students stay in eval."""
        super().train(mode)
        if mode:
            for module in self.students.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self

    def param_groups(self, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Return what an optimizer is built from: the students' parameters and each term's own groups.

        Args:
            weight_decay: if given, vectors and scalars (norms and biases) form a group without decay; a
                term's own decay holds for all its parameters.
        """
        trained = [p for p in self.students.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained}]
        for entry in self.objective.entries.values():
            groups += entry.term.param_groups()
        if weight_decay is None:
            return [group for group in groups if group["params"]]
        split = []
        for group in groups:
            split.append({"weight_decay": weight_decay, **group, "params": [p for p in group["params"] if p.ndim > 1]})
            split.append({"weight_decay": 0.0, **group, "params": [p for p in group["params"] if p.ndim <= 1]})
        return [group for group in split if group["params"]]

    def answer(self, batch: Batch) -> Any:
        """Return the first student's output, without gradient: evaluation goes through the Distiller."""
        with torch.no_grad():
            return answer(self.task, next(iter(self.models.values())), batch)

    def compile(self, **options: Any) -> None:
        """Compile the students' forwards and the terms, each as a frame of its own."""
        for reader in self.readers.values():
            reader.compile(**options)
        for term in self.objective.terms.values():
            term.compile(**options)

    def get_extra_state(self) -> Tensor:
        """The clock, as a tensor: schedules go on where they were."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the clock from a state dict."""
        self.step = int(state)

    def close(self) -> None:
        """Remove every hook and give unreached parameters their gradient flag back."""
        for reader in self.readers.values():
            reader.close()
        for teacher in self.teachers.values():
            teacher.close()
        for parameter in self._unreached:
            parameter.requires_grad_(True)
        self._unreached = []


def _views(source: str, taps: Sequence[Tap]) -> list[str]:
    """Return the further views of a source that a term reads."""
    return [f"{source.partition('@')[0]}@{tap.view}" for tap in taps if tap.view]


def _explained(error: ValueError, batch: Batch) -> ValueError:
    """Say what to do about a batch norm that got a single value a channel."""
    if "more than 1 value per channel" not in str(error):
        return error
    return UserError(
        f"batch norm cannot train on a batch of {len(batch)} here ({error}): "
        "use a batch size of at least 2, or drop the last incomplete batch"
    )
