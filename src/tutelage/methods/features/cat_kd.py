# SPDX-License-Identifier: Apache-2.0
"""Match class activation maps: what each class's classifier weights see at each place.

The paper turns both classifiers into bias-free convolutions on the last map, whose pooled outputs are the logits.
The same maps are computed here from the last map and the classifier's weights as they are, so that no network is
changed; the bias, which they leave out, stays in the student's logits.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError
from tutelage.functional.precision import full_precision

CARD = Card(
    name="CAT-KD",
    title="Class Attention Transfer Based Knowledge Distillation",
    authors="Guo, Yan, Li, Lin",
    year=2023,
    venue="CVPR",
    paper="arxiv:2304.12777",
    code="github:GzyAftermath/CAT-KD@4467073",
    code_licence=None,
    claims="Class activation maps alone carry what a classifier knows, and transfer it readably.",
    reads={
        "student": ("map", "classifier.weight"),
        "teacher": ("map",),
        "borrows": ("classifier",),
    },
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/cat_kd",),
)

OBJECTIVE = {"task": 1.0, "cat_kd": {"weight": 15.0}}

Form = Literal["paper", "code"]


@full_precision
def cat_kd(
    student_cam: Tensor,
    teacher_cam: Tensor,
    *,
    resolution: int = 2,
    normalize: bool = False,
    binarize: bool = False,
    partial: int | None = None,
    form: Form = "paper",
) -> Tensor:
    """Return the mean squared difference of coarse class activation maps.

        L = 1 / (B K r^2) * sum_{b,k,i,j} ( n(pool_r(s_k)) - n(pool_r(t_k)) )^2        (eq. 4)

    Convention:
        - averaged over samples, classes and the r x r cells; with `partial` over the kept classes
        - n divides by the norm over cells, or is the identity

    Args:
        student_cam: `[B, K, H, W]`, see :func:`class_activation`.
        teacher_cam: `[B, K, H', W']`.
        resolution: r, to which both are averaged.
        normalize: divide each class's cells by their norm (published for unlike architectures).
        binarize: set the teacher's maps to 1 above their mean magnitude and to 0 elsewhere, before pooling.
        partial: number of classes to keep, those of the largest teacher scores; None keeps all.
        form: with `partial`: `paper`, or `code`, which keeps the classes strictly above the last of them.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the classes differ in number, or fewer are there than are to be kept.

    Example:
        >>> one = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]])
        >>> cat_kd(one, torch.zeros(1, 1, 2, 2)), cat_kd(one, one + 1, resolution=1)
        (tensor(5.), tensor(1.))

    Reference: Guo et al., Class Attention Transfer Based Knowledge Distillation, CVPR 2023, eq. 4.
    """
    if student_cam.shape[1] != teacher_cam.shape[1]:
        raise UserError(
            f"cat_kd compares the maps of the same classes: the student has {student_cam.shape[1]}, "
            f"the teacher {teacher_cam.shape[1]}"
        )
    keep = _kept(teacher_cam.mean((2, 3)), partial, form)
    if binarize:
        level = teacher_cam.abs().mean((2, 3), keepdim=True)
        teacher_cam = (teacher_cam > level).to(teacher_cam.dtype)
    student, teacher = (F.adaptive_avg_pool2d(cam, resolution).flatten(2) for cam in (student_cam, teacher_cam))
    if normalize:
        student, teacher = (F.normalize(cells, dim=2, eps=1e-12) for cells in (student, teacher))
    squares = (student - teacher).square().mean(2)
    return (keep * squares).sum() / keep.sum().clamp(min=1)


def _kept(scores: Tensor, partial: int | None, form: Form) -> Tensor:
    """Return 1 for the classes that count, `[B, K]`."""
    if partial is None:
        return torch.ones_like(scores)
    if not 1 <= partial <= scores.shape[1]:
        raise UserError(f"partial is a number of classes from 1 to {scores.shape[1]}, not {partial}")
    values, classes = scores.topk(partial, dim=1)
    if form == "code":
        return (scores > values[:, -1:]).to(scores.dtype)
    return torch.zeros_like(scores).scatter(1, classes, 1.0)


@full_precision
def class_activation(feature_map: Tensor, weight: Tensor) -> Tensor:
    """Return what each class's weights see at each place: the logits without bias are its mean.

    Args:
        feature_map: `[B, C, H, W]`, the map that the classifier pools.
        weight: `[K, C]` of a linear layer, or `[K, C, 1, 1]` of a convolution.

    Returns:
        `[B, K, H, W]`.
    """
    return torch.einsum("bchw,kc->bkhw", feature_map, weight.flatten(1))


@final
class CATKD(Term):
    """Term form of :func:`cat_kd`, on the last maps and the classifiers of both models.

    Args:
        resolution: see :func:`cat_kd`.
        normalize: see :func:`cat_kd`.
        binarize: see :func:`cat_kd`.
        partial: see :func:`cat_kd`.
        form: see :func:`cat_kd`.
        student_tap: the map that the student's classifier pools.
        teacher_tap: the map that the teacher's classifier pools.
        student_weight: the weight of the student's classifier, as a tap.
        classifier: role or path of the teacher's classifier.
    """

    def __init__(
        self,
        *,
        resolution: int = 2,
        normalize: bool = False,
        binarize: bool = False,
        partial: int | None = None,
        form: Form = "paper",
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
        student_weight: str | Mapping[str, Any] | Tap = "classifier.weight",
        classifier: str = "classifier",
    ) -> None:
        super().__init__()
        if resolution < 1:
            raise UserError(f"resolution is a number of cells a side, not {resolution}")
        if form not in ("paper", "code"):
            raise UserError(f"form {form!r} is not known; valid: code, paper")
        self.resolution, self.normalize, self.binarize, self.partial = resolution, normalize, binarize, partial
        self.form: Form = form
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)
        self.student_weight, self.classifier = Tap.parse(student_weight), classifier

    @property
    def reads(self) -> Reads:
        """The maps, the student's classifier's weight, and the teacher's classifier."""
        return Reads((self.student_tap, self.student_weight), (self.teacher_tap,), (self.classifier,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Refuse maps and classifiers that do not belong together.

        Raises:
            UserError: if a tap is no map, a classifier does not read it, or the classes differ.
        """
        assert teacher is not None
        maps = student[self.student_tap.name], teacher[self.teacher_tap.name]
        check_maps(*maps, "cat_kd")
        lent = getattr(teacher.borrowed[self.classifier], "weight", None)
        if not isinstance(lent, Tensor):
            raise UserError(f"cat_kd: the teacher's {self.classifier!r} has no weight; name a linear layer")
        weights = student[self.student_weight.name], lent
        for side, feature_map, weight in zip(("student", "teacher"), maps, weights, strict=True):
            if weight.ndim not in (2, 4) or weight.flatten(1).shape[1] != feature_map.shape[1]:
                raise UserError(
                    f"cat_kd: the {side}'s classifier (weight {list(weight.shape)}) does not read the "
                    f"{feature_map.shape[1]} channels of its map; tap the map that it pools"
                )
        with torch.no_grad():
            self._compare(student, teacher)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the difference of class activation maps."""
        return self._compare(student, teacher)

    def _compare(self, student: Signals, teacher: Signals) -> Tensor:
        lent = teacher.borrowed[self.classifier].weight
        assert isinstance(lent, Tensor)
        return cat_kd(
            class_activation(student[self.student_tap.name], student[self.student_weight.name]),
            class_activation(teacher[self.teacher_tap.name], lent),
            resolution=self.resolution,
            normalize=self.normalize,
            binarize=self.binarize,
            partial=self.partial,
            form=self.form,
        )
