# SPDX-License-Identifier: Apache-2.0
"""Give the student the teacher's own classifier, and let it learn nothing but the map this classifier reads.

The student is rebuilt: a projector brings its last map to the teacher's, the frozen classifier of the teacher
follows. Both stay in the exported student, so that it is larger than the network it was made from; a fair
comparison counts them.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Facts, Model, Reads, Rebuild, Signals, Tap, Task, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError
from tutelage.core.reader import Reader
from tutelage.core.tap import Recorder
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import match

CARD = Card(
    name="SimKD",
    title="Knowledge Distillation with the Reused Teacher Classifier",
    authors="Chen, Mei, Zhang, Wang, Feng, Chen",
    year=2022,
    venue="CVPR",
    paper="arxiv:2203.14001",
    code="github:DefangChen/SimKD@2b389c3",
    code_licence=None,
    claims="Reusing the teacher's classifier and aligning one map closes the gap to the teacher.",
    reads={"student": ("map",), "teacher": ("map",), "rebuild": ("classifier",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/simkd",),
)

OBJECTIVE = {"task": 0.0, "simkd": {"weight": 1.0}}


@full_precision
def simkd(projected: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared error of the projected map.

        L = 1 / (B C H W) * sum_{b,c,h,w} ( P(s) - t )^2        (eq. 3)

    Convention:
        - averaged over everything; a larger map of the teacher is first averaged over cells to the size of P(s)

    Args:
        projected: `[B, C, H, W]`, the student's map through the projector.
        teacher_map: `[B, C, H', W']`.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the widths differ: the student was not rebuilt for this teacher.

    Example:
        >>> simkd(torch.zeros(1, 1, 1, 1), torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]]))
        tensor(4.)

    Reference: Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022, eq. 3.
    """
    if projected.shape[1] != teacher_map.shape[1]:
        raise UserError(
            f"simkd compares maps of one width: the student's has {projected.shape[1]} channels, the teacher's "
            f"{teacher_map.shape[1]}; rebuild the student for this teacher (TeacherHead)"
        )
    projected, teacher_map = match(projected, teacher_map)
    return (projected - teacher_map).square().sum() / max(projected.numel(), 1)


@final
class SimKD(Term):
    """Term form of :func:`simkd`, for a student that :class:`TeacherHead` rebuilt.

    Args:
        student_tap: the projected map: the last map of the rebuilt student.
        teacher_tap: the map that the teacher's classifier pools.
    """

    def __init__(
        self,
        *,
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The two maps."""
        return Reads((self.student_tap,), (self.teacher_tap,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Refuse what cannot be compared.

        Raises:
            UserError: if a tap is no map, or the student was not rebuilt for this teacher.
        """
        assert teacher is not None
        projected, goal = student[self.student_tap.name], teacher[self.teacher_tap.name]
        check_maps(projected, goal, "simkd")
        simkd(projected, goal)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the mean squared error of the projected map."""
        return simkd(student[self.student_tap.name], teacher[self.teacher_tap.name])


class Composed(nn.Module):
    """A student up to its last map, a projector, and the teacher's classifier.

    Args:
        student: the network; what follows its last map still runs, and is thrown away.
        place: where that map lies.
        projector: to the teacher's width.
        classifier: the teacher's last linear layer or 1x1 convolution.
        grid: (height, width) to which a larger map is averaged before the projector, or None.
        call: how the network is called, where `student(inputs)` is not enough.
    """

    def __init__(
        self,
        student: nn.Module,
        place: Tap,
        projector: nn.Sequential,
        classifier: nn.Module,
        grid: tuple[int, int] | None,
        call: Any = None,
    ) -> None:
        super().__init__()
        self.student, self.projector, self.classifier = student, projector, classifier
        self.pool: nn.Module = nn.AdaptiveAvgPool2d(grid) if grid else nn.Identity()
        self.call = call
        self.recorder = Recorder(student, {"map": place})
        self.recorder.cloned = frozenset({"map"})  # a later layer may write into it

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the teacher's classifier's scores of the student's projected map."""
        with self.recorder:
            _ = self.call(self.student, inputs) if self.call else self.student(inputs)
        projected = self.projector(self.pool(self.recorder.release()["map"]))
        pooled = projected.mean((2, 3), keepdim=True)
        conv = isinstance(self.classifier, nn.Conv2d)
        scores: Tensor = self.classifier(pooled if conv else pooled.flatten(1))
        return scores.flatten(1)


def make_projector(width: int, goal: int, factor: int) -> nn.Sequential:
    """Return the projector: 1x1 to a `factor`-th of the teacher's width, 3x3, 1x1, each with norm and ReLU."""
    narrow = max(1, goal // factor)
    layers: list[nn.Module] = []
    for one, other, size in ((width, narrow, 1), (narrow, narrow, 3), (narrow, goal, 1)):
        conv = nn.Conv2d(one, other, size, padding=size // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(other), nn.ReLU()]
    return nn.Sequential(*layers)


@final
class TeacherHead(Rebuild):
    """Puts a projector and the teacher's classifier after the student's last map.

    Args:
        factor: how much narrower than the teacher the projector is inside; 2 is the most accurate published,
            8 the smallest.
    """

    def __init__(self, *, factor: int = 2) -> None:
        if factor < 1:
            raise UserError(f"factor is a whole number of at least 1, not {factor}")
        self.factor = factor
        self.built: dict[str, Any] = {}

    def begin(self, student: Model, teacher: Model | None, task: Task, facts: Facts, sample: Batch) -> Model:
        """Return the rebuilt student.

        Raises:
            UserError: without a teacher at hand, or if its classifier does not read its pooled last map.
        """
        if teacher is None:
            raise UserError("simkd needs a teacher whose classifier can be copied, and none was given")
        own, goal = _last_map(student, task, sample), _last_map(teacher, task, sample)
        check_maps(own, goal, "simkd")
        lent = teacher.lend("classifier")
        classifier = copy.deepcopy(lent).requires_grad_(False)
        kind, takes, gives, bias = _described(lent, goal.shape[1])
        larger = tuple(own.shape[2:]) > tuple(goal.shape[2:])
        self.built = {
            **{"width": own.shape[1], "goal": goal.shape[1], "factor": self.factor},
            "grid": list(goal.shape[2:]) if larger else None,
            "map": asdict(student.resolve(Tap("map"))),
            "classifier": {"kind": kind, "takes": takes, "gives": gives, "bias": bias},
        }
        return _composed(student, self.built, classifier)

    def shape(self) -> dict[str, Any]:
        """Return widths, the classifier's kind, and where the student's map lies."""
        return self.built

    @classmethod
    def restore(cls, student: Model, shape: Mapping[str, Any]) -> Model:
        """Return the same composition around a fresh student, its weights blank."""
        said = shape["classifier"]
        if said["kind"] == "linear":
            return _composed(student, shape, nn.Linear(said["takes"], said["gives"], bias=said["bias"]))
        return _composed(student, shape, nn.Conv2d(said["takes"], said["gives"], 1, bias=said["bias"]))

    def report(self) -> str:
        """Return in a line what was changed."""
        built = self.built
        return (
            f"simkd: a projector from {built['width']} to {built['goal']} channels and the teacher's classifier "
            "follow the student's last map; they belong to the exported student"
        )


def _last_map(model: Model, task: Task, sample: Batch) -> Tensor:
    """Return a model's last map of a sample, in evaluation mode; its flags are restored."""
    flags = [(part, part.training) for part in model.module.modules()]
    reader = Reader(model, (Tap("map"),), task)
    place = next(model.module.parameters(), torch.zeros(0)).device
    try:
        model.module.eval()
        with torch.no_grad():
            return reader(sample.to(place))["map"]
    finally:
        reader.close()
        for part, training in flags:
            part.training = training


def _described(classifier: nn.Module, width: int) -> tuple[str, int, int, bool]:
    """Return kind, inputs, outputs and bias of a classifier that reads so many pooled channels."""
    if isinstance(classifier, nn.Linear):
        found = ("linear", classifier.in_features, classifier.out_features, classifier.bias is not None)
    elif isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1):
        found = ("conv", classifier.in_channels, classifier.out_channels, classifier.bias is not None)
    else:
        kind = type(classifier).__name__
        raise UserError(f"simkd reuses a linear layer or a 1x1 convolution; the teacher's classifier is a {kind}")
    if found[1] != width:
        raise UserError(
            f"simkd: the teacher's classifier reads {found[1]} numbers, its last map has {width} channels: "
            "something lies between them that the student would lack"
        )
    return found


def _composed(student: Model, built: Mapping[str, Any], classifier: nn.Module) -> Model:
    """Return a student with projector and classifier; its own classifier is taken out."""
    own = student.modules.get("classifier")
    if own is not None:
        parent, _, name = own.rpartition(".")
        setattr(student.module.get_submodule(parent), name, nn.Identity())
    projector = make_projector(built["width"], built["goal"], built["factor"])
    grid = tuple(built["grid"]) if built["grid"] else None
    module = Composed(student.module, Tap(**built["map"]), projector, classifier, grid, student.call)
    inner = {
        role: replace(tap, where=f"student.{tap.where}" if tap.where else "student")
        for role, tap in student.roles.items()
        if role not in ("map", "pooled")
    }
    roles = {**inner, "map": Tap("projector")}
    if isinstance(classifier, nn.Linear):
        roles["pooled"] = Tap("classifier", "input")
    lent = {role: f"student.{path}" for role, path in student.modules.items() if role != "classifier"}
    return replace(
        student, module=module, roles=roles, modules={**lent, "classifier": "classifier"}, call=None, constants={}
    )
