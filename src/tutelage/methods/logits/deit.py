# SPDX-License-Identifier: Apache-2.0
"""A head of its own, on a token of its own, learns what the teacher says; the class head learns the label.

The student is rebuilt: a distillation token runs through its blocks beside the class token. The released soft
form divides by the number of classes too, and the released network averages the two heads' logits where the
paper averages their probabilities.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Model, Reads, Rebuild, Signals, Tap, Task, Term
from tutelage.core.error import UserError
from tutelage.core.reader import Reader
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision

CARD = Card(
    name="DeiT",
    title="Training data-efficient image transformers & distillation through attention",
    authors="Touvron, Cord, Douze, Massa, Sablayrolles, Jégou",
    year=2021,
    venue="ICML",
    paper="arxiv:2012.12877",
    code="github:facebookresearch/deit@7e160fe",
    code_licence="Apache-2.0",
    claims="A distillation token that learns a convolutional teacher's decisions beats distilling into the class one.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/deit",),
)

OBJECTIVE = {"task": 0.5, "deit": {"weight": 0.5}}

Form = Literal["hard", "soft", "soft_mean"]
Fusion = Literal["probabilities", "logits"]
HEAD = "head_dist"


@full_precision
def deit(
    distillation_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 3.0, form: Form = "hard"
) -> Tensor:
    """Return what the distillation head makes of the teacher's answer.

        hard:  L = 1/B sum_b CE( d_b, argmax t_b )
        soft:  L = T^2 / B * sum_b KL( softmax(t_b / T) || softmax(d_b / T) )

    Convention:
        - KL runs from teacher to student: KL(teacher || student); the hard form has no temperature
        - `soft_mean` divides the soft form by the number of classes besides, as the released code does
        - alpha of the paper is the weight of the term in the objective, 1 - alpha that of the task

    Args:
        distillation_logits: `[B, K]` of the student's distillation head, any float dtype; compared in float32 or
            wider.
        teacher_logits: `[B, K]`.
        temperature: of the soft forms, > 0 (tau).
        form: `hard`, `soft` or `soft_mean`.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes differ.

    Example:
        >>> deit(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor(0.6931)

    Reference: Touvron et al., Training data-efficient image transformers, ICML 2021, eq. 2-3.
    """
    if distillation_logits.ndim != 2 or distillation_logits.shape != teacher_logits.shape:
        raise UserError(
            "deit takes two [B, K] tensors of logits: those of the student's distillation head are "
            f"{list(distillation_logits.shape)}, the teacher's {list(teacher_logits.shape)}"
        )
    if form == "hard":
        rows = F.cross_entropy(distillation_logits, teacher_logits.argmax(dim=1), reduction="none")
    else:
        rows = temperature**2 * kl_divergence(distillation_logits / temperature, teacher_logits / temperature)
    classes = distillation_logits.shape[1] if form == "soft_mean" else 1
    return rows.sum() / (max(len(distillation_logits), 1) * classes)


def fused(class_logits: Tensor, distillation_logits: Tensor, fusion: Fusion = "probabilities") -> Tensor:
    """Return the logits of both heads together.

    Args:
        class_logits: `[B, K]`.
        distillation_logits: `[B, K]`.
        fusion: `probabilities` gives the logarithm of the mean softmax (the paper), `logits` the mean of the
            logits (the released code).

    Example:
        >>> fused(torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 3.0]]).log()).exp()
        tensor([[0.6250, 0.3750]])
    """
    if fusion == "logits":
        return (class_logits + distillation_logits) / 2
    halves = torch.stack([F.log_softmax(logits, dim=1) for logits in (class_logits, distillation_logits)])
    return halves.logsumexp(dim=0) - torch.log(halves.new_tensor(2.0))


@final
class DeiT(Term):
    """Term form of :func:`deit`. Reads the logits of the student's distillation head; labels do not matter.

    Args:
        temperature: see :func:`deit`.
        form: see :func:`deit`.
        student_tap: the module that gives the distillation head's logits.
    """

    def __init__(
        self,
        *,
        temperature: float = 3.0,
        form: Form = "hard",
        student_tap: str | Mapping[str, Any] | Tap = HEAD,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if form not in ("hard", "soft", "soft_mean"):
            raise UserError(f"form {form!r} is not known; valid: hard, soft, soft_mean")
        self.temperature = temperature
        self.form: Form = form
        self.student_tap = Tap.parse(student_tap)

    @property
    def reads(self) -> Reads:
        """The distillation head's logits and the teacher's."""
        return Reads((self.student_tap,), (Tap("logits"),))

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the comparison of the distillation head with the teacher."""
        return deit(student[self.student_tap.name], teacher.logits, temperature=self.temperature, form=self.form)


class Distilled(nn.Module):
    """A transformer with one more token in its blocks, and a head that reads it.

    The token enters before the first block, behind the tokens that lead already, and is taken out behind the
    final norm: the network's own classifier sees what it is used to.

    Args:
        student: the network.
        width: of its tokens.
        classes: K.
        first: path of the first block.
        last: path of what gives the final tokens.
        prefix: number of tokens that lead already.
        fusion: see :func:`fused`.
        call: how the network is called, where `student(inputs)` is not enough.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        width: int,
        classes: int,
        first: str,
        last: str,
        prefix: int,
        fusion: Fusion,
        call: Any = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.dist_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.head_dist = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head_dist.weight, std=0.02)
        nn.init.zeros_(self.head_dist.bias)
        self.prefix, self.call = prefix, call
        self.fusion: Fusion = fusion
        self.taken: list[Tensor] = []
        student.get_submodule(first).register_forward_pre_hook(self._insert, with_kwargs=True)
        student.get_submodule(last).register_forward_hook(self._take)

    def _insert(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        name = None if args else next(name for name, given in kwargs.items() if isinstance(given, Tensor))
        tokens = args[0] if name is None else kwargs[name]
        token = self.dist_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        longer = torch.cat([tokens[:, : self.prefix], token, tokens[:, self.prefix :]], dim=1)
        return ((longer, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: longer})

    def _take(self, norm: nn.Module, args: Any, output: Any) -> Any:
        tokens = output[0] if isinstance(output, tuple) else output
        self.taken.append(tokens[:, self.prefix])
        kept = torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix + 1 :]], dim=1)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits of both heads while training, of both together otherwise."""
        self.taken = []
        scores: Tensor = self.call(self.student, inputs) if self.call else self.student(inputs)
        (token,), self.taken = self.taken, []
        distilled = self.head_dist(token)
        return (scores, distilled) if self.training else fused(scores, distilled, self.fusion)


@final
class DistillationToken(Rebuild):
    """Adds a distillation token and its head to a transformer that has none.

    timm's distilled transformers have both already: they are told to give both answers while training. So has
    a network with a module of the name `head`: it is left as it is.

    Args:
        head: name of the module that gives the distillation head's logits.
        fusion: what the trained student answers: see :func:`fused`.
    """

    def __init__(self, *, head: str = HEAD, fusion: Fusion = "probabilities") -> None:
        if fusion not in ("probabilities", "logits"):
            raise UserError(f"fusion {fusion!r} is not known; valid: logits, probabilities")
        self.head, self.fusion = head, fusion
        self.built: dict[str, Any] = {}

    def begin(self, student: Model, teacher: Model | None, task: Task, facts: Facts, sample: Batch) -> Model:
        """Return the rebuilt student.

        Raises:
            UserError: if the student is no transformer with tokens that can be named.
        """
        if self.head in dict(student.module.named_modules()):
            switch = getattr(student.module, "set_distilled_training", None)
            if callable(switch):
                switch(True)
            return student
        if "blocks[0]" not in student.roles or "tokens" not in student.roles:
            raise UserError(
                f"deit adds a distillation token to a transformer, and {type(student.module).__name__} has no roles "
                "blocks[0] and tokens; name the head your network has (student_tap, rebuild.head)"
            )
        tokens, logits = _answers(student, task, sample)
        first, last = student.resolve(Tap("blocks[0]")), student.resolve(Tap("tokens"))
        self.built = {
            **{"width": tokens.shape[-1], "classes": logits.shape[1], "prefix": last.prefix},
            **{"first": first.where, "last": last.where, "fusion": self.fusion},
        }
        return _composed(student, self.built)

    def shape(self) -> dict[str, Any]:
        """Return widths and places, or nothing where nothing was added."""
        return self.built

    @classmethod
    def restore(cls, student: Model, shape: Mapping[str, Any]) -> Model:
        """Return the same composition around a fresh student, its own weights blank."""
        return _composed(student, shape) if shape else student

    def report(self) -> str:
        """Return in a line what was changed."""
        if not self.built:
            return "deit: the student has a distillation head already; it answers with both heads while training"
        return "deit: a distillation token and its head were added; both belong to the exported student"


def _answers(model: Model, task: Task, sample: Batch) -> tuple[Tensor, Tensor]:
    """Return a model's final tokens and logits of a sample, in evaluation mode; its flags are restored."""
    flags = [(part, part.training) for part in model.module.modules()]
    reader = Reader(model, (Tap("tokens"), Tap("logits")), task)
    place = next(model.module.parameters(), torch.zeros(0)).device
    try:
        model.module.eval()
        with torch.no_grad():
            found = reader(sample.to(place))
        return found["tokens"], found.logits
    finally:
        reader.close()
        for part, training in flags:
            part.training = training


def _composed(student: Model, built: Mapping[str, Any]) -> Model:
    """Return a student with token and head; taps within its blocks leave the new token out."""
    module = Distilled(student.module, call=student.call, **built)
    place = next(student.module.parameters(), torch.zeros(0))
    roles = {}
    for role, tap in student.roles.items():
        within = role.startswith("blocks[") and tap.where != built["last"]
        roles[role] = replace(
            tap, where=f"student.{tap.where}" if tap.where else "student", prefix=tap.prefix + int(within)
        )
    lent = {role: f"student.{path}" for role, path in student.modules.items()}
    return replace(student, module=module.to(place.device), roles=roles, modules=lent, call=None, constants={})
