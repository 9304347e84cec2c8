# SPDX-License-Identifier: Apache-2.0
"""Compare paraphrases: the teacher's map is compressed by an autoencoder, the student's translated to match.

The autoencoder learns first and alone, then it stays as it is and the student follows its code. A widely used
toolkit compares attention maps of the two codes instead; that is not the paper.
"""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Draw, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import check_grid, check_maps
from tutelage.core.error import UserError
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import attention

CARD = Card(
    name="FT",
    title="Paraphrasing Complex Network: Network Compression via Factor Transfer",
    authors="Kim, Park, Kwak",
    year=2018,
    venue="NeurIPS",
    paper="arxiv:1802.04977",
    code="github:Jangho-Kim/Factor-Transfer-pytorch@19cce26",
    code_licence=None,
    claims="A student learns more from a paraphrase of the teacher's map than from the map itself.",
    reads={"student": ("map",), "teacher": ("map",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/ft",),
)

OBJECTIVE = {
    "task": {"step": [0.0, 1.0], "until": 0.111},
    "ft": {"weight": {"step": [1.0, 500.0], "until": 0.111}, "pretraining": 0.111},
}

Form = Literal["paper", "l2", "attention"]
FORMS: tuple[Form, ...] = ("attention", "l2", "paper")
SLOPE = 0.1  # of the leaky ReLU after each layer


@full_precision
def ft(student_factor: Tensor, teacher_factor: Tensor, *, form: Form = "paper") -> Tensor:
    """Return the distance of two factors, each a unit vector.

        L = 1 / (B N) * sum_b || q(s_b) - q(t_b) ||_1,   q(f) = vec(f) / ||vec(f)||_2        (eq. 3, p = 1)
        L = 1 / B * sum_b || q(s_b) - q(t_b) ||_2                                            (l2)

    Convention:
        - `paper` is averaged over a factor's N numbers and over samples, `l2` over samples
        - no gradient is asked of the teacher's factor

    Args:
        student_factor: `[B, C, H, W]`, what the translator made of the student's map.
        teacher_factor: `[B, C, H, W]`, what the paraphraser made of the teacher's.
        form: `paper`; `l2` (p = 2, un-squared); or `attention` (`paper` on the mean of squares over channels).

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes differ: they would broadcast.

    Example:
        >>> ft(torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]]))
        tensor(1.)

    Reference: Kim et al., Paraphrasing Complex Network, NeurIPS 2018, eq. 3.
    """
    if student_factor.shape != teacher_factor.shape:
        raise UserError(
            f"ft compares factors of one shape: the student's is {list(student_factor.shape)}, "
            f"the teacher's {list(teacher_factor.shape)}"
        )
    if form == "attention":
        student, teacher = attention(student_factor), attention(teacher_factor)
    else:
        student, teacher = (F.normalize(side.flatten(1), dim=1, eps=1e-12) for side in (student_factor, teacher_factor))
    if form == "l2":
        lengths: Tensor = torch.linalg.vector_norm(student - teacher, dim=1)
        return lengths.sum() / max(len(student), 1)
    return (student - teacher).abs().sum() / max(student.numel(), 1)


@full_precision
def reconstruction(rebuilt: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared error by which the paraphraser learns (eq. 1).

    Args:
        rebuilt: `[B, C, H, W]`, the teacher's map after encoder and decoder.
        teacher_map: `[B, C, H, W]`.
    """
    return (rebuilt - teacher_map).square().sum() / max(rebuilt.numel(), 1)


@final
class FT(Term):
    """Term form of :func:`ft`, with the paraphraser's own training before it.

    Args:
        rate: width of the factor as a share of the teacher's (k).
        form: see :func:`ft`.
        pretraining: share of the run's steps in which the paraphraser learns and the student does not.
        lr: learning rate of the paraphraser; None takes the optimizer's (published: 0.01 for residual networks,
            a fifth of the student's).
        student_tap: a map of the student.
        teacher_tap: a map of the teacher, of the same height and width.
    """

    def __init__(
        self,
        *,
        rate: float = 0.5,
        form: Form = "paper",
        pretraining: float = 0.111,
        lr: float | None = None,
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        if rate <= 0:
            raise UserError(f"rate must be > 0, not {rate}")
        if form not in FORMS:
            raise UserError(f"form {form!r} is not known; valid: {', '.join(FORMS)}")
        if not 0 <= pretraining < 1:
            raise UserError(f"pretraining is a share of the run in [0, 1), not {pretraining}")
        if lr is not None and lr <= 0:
            raise UserError(f"lr must be > 0, not {lr}")
        self.rate, self.pretraining, self.lr = rate, pretraining, lr
        self.form: Form = form
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The two maps."""
        return Reads((self.student_tap,), (self.teacher_tap,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create paraphraser (encoder and decoder) and translator.

        Raises:
            UserError: if a tap is no map, or the maps differ in height or width.
        """
        assert teacher is not None
        source, goal = student[self.student_tap.name], teacher[self.teacher_tap.name]
        check_maps(source, goal, "ft")
        check_grid(source, goal, "ft")
        own, wide = source.shape[1], goal.shape[1]
        narrow = max(1, int(self.rate * wide))
        self.encoder = _layers("conv", (wide, wide, narrow, narrow), nn.Conv2d)
        self.decoder = _layers("deconv", (narrow, narrow, wide, wide), nn.ConvTranspose2d)
        self.translator = _layers("conv", (own, own, narrow, narrow), nn.Conv2d)
        self.pretraining_steps = self.pretraining * facts.total_steps

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the paraphraser without weight decay, which would go on moving it when it has learned."""
        paraphraser = [*self.encoder.parameters(), *self.decoder.parameters()]
        own = {} if self.lr is None else {"lr": self.lr}
        return [
            {"params": paraphraser, "weight_decay": 0.0, **own},
            {"params": list(self.translator.parameters())},
        ]

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Tensor:
        """Return 0 while the paraphraser learns and 1 afterwards: a function of the step."""
        like = student[self.student_tap.name]
        return torch.full((), float(draw.step >= self.pretraining_steps), device=like.device)

    def forward(  # type: ignore[override]
        self, student: Signals, teacher: Signals, batch: Batch, taught: Tensor
    ) -> dict[str, Tensor]:
        """Return the parts `reconstruction` and `factor`, of which one is 0."""
        teacher_map = teacher[self.teacher_tap.name]
        code = self.encoder(teacher_map)
        rebuilt = reconstruction(self.decoder(code), teacher_map)
        factor = ft(self.translator(student[self.student_tap.name]), code.detach(), form=self.form)
        now = taught.to(factor.dtype)
        return {"reconstruction": (1 - now) * rebuilt, "factor": now * factor}


def _layers(name: str, widths: tuple[int, ...], kind: type[nn.Conv2d] | type[nn.ConvTranspose2d]) -> nn.Sequential:
    """Return 3x3 layers that keep the size, each with a leaky ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (width, goal) in enumerate(pairwise(widths)):
        layers[f"{name}{number}"] = kind(width, goal, 3, padding=1)
        layers[f"relu{number}"] = nn.LeakyReLU(SLOPE)
    return nn.Sequential(layers)
