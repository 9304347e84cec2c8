# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's softened answers at every token and the direction of its last hidden states.

The third of the three losses is the task's own. The student begins with every k-th layer of the teacher, and needs
the teacher's width for it: the paper finds that this matters more than the cosine.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Model, Reads, Rebuild, Signals, Tap, Task, Term
from tutelage.core.error import UserError
from tutelage.functional.attention import blanked
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision
from tutelage.functional.tokens import over_tokens, token_mean

CARD = Card(
    name="DistilBERT",
    title="DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
    authors="Sanh, Debut, Chaumond, Wolf",
    year=2019,
    venue="NeurIPS EMC2 Workshop",
    paper="arxiv:1910.01108",
    code="github:huggingface/transformers-research-projects@fccd0cd",
    code_licence="Apache-2.0",
    claims="Half the layers, begun from the teacher's, keep 97 % of its language understanding after pretraining.",
    reads={"student": ("logits", "hidden[-1]"), "teacher": ("logits", "hidden[-1]")},
    labels=("none",),
    averages="tokens",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/distilbert",),
)

OBJECTIVE = {"task": 2.0, "distilbert": {"weight": 1.0, "alpha_ce": 5.0, "alpha_cos": 1.0}}


@full_precision
def _soft_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return temperature**2 * kl_divergence(student / temperature, teacher / temperature)


@full_precision
def _square_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum(-1)


@full_precision
def _cosine_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def distilbert(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_hidden: Tensor | None,
    teacher_hidden: Tensor | None,
    mask: Tensor,
    *,
    temperature: float = 2.0,
    alpha_ce: float = 5.0,
    alpha_mse: float = 0.0,
    alpha_cos: float = 1.0,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Return the weighted parts of the loss beside the task's own.

        ce  = alpha_ce  T^2 mean KL( softmax(t / T) || softmax(s / T) )
        mse = alpha_mse mean sum_v (s - t)^2
        cos = alpha_cos mean ( 1 - cos(h_s, h_t) )        (section 2)

    Convention:
        - means over the tokens of `mask`, of all rows together; KL runs from teacher to student
        - a part whose coefficient is 0 is left out
        - no gradient is asked of the teacher

    Args:
        student_logits: `[B, L, V]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, L, V]`.
        student_hidden: `[B, L, D]` last hidden states, or None without the cosine.
        teacher_hidden: `[B, L, D]`.
        mask: `[B, L]` bool, true where a token counts.
        temperature: softening, > 0.
        alpha_ce: coefficient of the divergence.
        alpha_mse: of the squared distance of logits.
        alpha_cos: of the cosine distance.
        chunk: tokens compared at a time; by default as memory allows.

    Returns:
        `ce`, `mse` and `cos`, scalars, without those whose coefficient is 0.

    Raises:
        UserError: if the shapes differ.

    Reference: Sanh et al., DistilBERT, 2019, section 2.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"distilbert compares models of one vocabulary and length: the student's logits are "
            f"{list(student_logits.shape)}, the teacher's {list(teacher_logits.shape)}"
        )

    def soft(student: Tensor, teacher: Tensor) -> Tensor:
        return _soft_rows(student, teacher, temperature)

    parts = {}
    if alpha_ce:
        parts["ce"] = alpha_ce * token_mean(over_tokens(soft, student_logits, teacher_logits, mask, chunk=chunk), mask)
    if alpha_mse:
        squares = over_tokens(_square_rows, student_logits, teacher_logits, mask, chunk=chunk)
        parts["mse"] = alpha_mse * token_mean(squares, mask)
    if alpha_cos and student_hidden is not None and teacher_hidden is not None:
        if student_hidden.shape != teacher_hidden.shape:
            raise UserError(
                f"distilbert compares hidden states of one width: the student's are {student_hidden.shape[-1]} wide, "
                f"the teacher's {teacher_hidden.shape[-1]}; give the student the teacher's width, or alpha_cos: 0"
            )
        cosine = _cosine_rows(blanked(student_hidden, mask), blanked(teacher_hidden, mask))
        parts["cos"] = alpha_cos * token_mean(cosine, mask)
    return parts


@final
class DistilBERT(Term):
    """Term form of :func:`distilbert`. Reads logits and, for the cosine, the last hidden states."""

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        alpha_ce: float = 5.0,
        alpha_mse: float = 0.0,
        alpha_cos: float = 1.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        coefficients = {"alpha_ce": alpha_ce, "alpha_mse": alpha_mse, "alpha_cos": alpha_cos}
        for word, value in coefficients.items():
            if value < 0:
                raise UserError(f"{word} must not be negative, as {value} is")
        if not any(coefficients.values()):
            raise UserError("distilbert: alpha_ce, alpha_mse and alpha_cos are all 0; leave the term out")
        if chunk is not None and chunk < 1:
            raise UserError(f"chunk counts tokens, at least 1, not {chunk}")
        self.temperature, self.chunk = temperature, chunk
        self.alpha_ce, self.alpha_mse, self.alpha_cos = alpha_ce, alpha_mse, alpha_cos

    @property
    def reads(self) -> Reads:
        """The logits, and the hidden states if they are compared."""
        taps = tuple(Tap(role) for role in (("logits", "hidden[-1]") if self.alpha_cos else ("logits",)))
        return Reads(taps, taps)

    def forward(  # type: ignore[override]
        self, student: Signals, teacher: Signals, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the parts over the batch's tokens."""
        return distilbert(
            student.logits,
            teacher.logits,
            student["hidden[-1]"] if self.alpha_cos else None,
            teacher["hidden[-1]"] if self.alpha_cos else None,
            batch.token_mask,
            temperature=self.temperature,
            alpha_ce=self.alpha_ce,
            alpha_mse=self.alpha_mse,
            alpha_cos=self.alpha_cos,
            chunk=self.chunk,
        )


@final
class EveryOther(Rebuild):
    """Begins with the teacher's weights: its embeddings and answers, and every k-th of its layers.

    Args:
        initialise: do so; without it the student keeps its own weights.
    """

    def __init__(self, *, initialise: bool = True) -> None:
        self.initialise = initialise
        self.said = "the student keeps its own first weights"

    @torch.no_grad()
    def begin(self, student: Model, teacher: Model | None, task: Task, facts: Facts, sample: Batch) -> Model:
        """Copy the weights, and return the student.

        Raises:
            UserError: if the two models are not of one architecture and width, or the layers are no multiple.
        """
        if not self.initialise:
            return student
        hint = "; rebuild: {initialise: false} keeps the student's own first weights"
        if teacher is None:
            raise UserError(f"distilbert begins with the weights of a live teacher, and there is none{hint}")
        own, lent = _layers(student), _layers(teacher)
        if not own or len(lent) % len(own):
            raise UserError(
                f"distilbert begins with every k-th layer: the teacher's {len(lent)} are no multiple of the "
                f"student's {len(own)}{hint}"
            )
        step = len(lent) // len(own)
        state, given = student.module.state_dict(), teacher.module.state_dict()
        for name, tensor in state.items():
            place = next((n for n, path in enumerate(own) if name.startswith(f"{path}.")), None)
            source = name if place is None else lent[place * step] + name.removeprefix(own[place])
            if source not in given or given[source].shape != tensor.shape:
                found = list(given[source].shape) if source in given else "missing"
                raise UserError(
                    f"distilbert begins with the teacher's weights: {name} is {list(tensor.shape)} in the student, "
                    f"{source} is {found} in the teacher; give both one architecture and width{hint}"
                )
            tensor.copy_(given[source])
        self.said = f"the student begins with layers {', '.join(str(n * step) for n in range(len(own)))} of the teacher"
        return student

    def shape(self) -> dict[str, Any]:
        """Return nothing: the structure is the student's own."""
        return {}

    @classmethod
    def restore(cls, student: Model, shape: Mapping[str, Any]) -> Model:
        """Return the student, whose weights are loaded later."""
        return student

    def report(self) -> str:
        """Return which layers were copied."""
        return self.said


def _layers(model: Model) -> list[str]:
    """Return the paths of a model's blocks: each is what takes a hidden state."""
    return [tap.where for role, tap in model.roles.items() if role.startswith("hidden[") and tap.side == "input"]
