# SPDX-License-Identifier: Apache-2.0
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tiny_text import causal, text_batch
from tutelage.core import Batch, Distiller, Objective, Task
from tutelage.core.error import UserError
from tutelage.methods.language.distillm import DistiLLM
from tutelage.tasks.language import Language, cross_entropy

LENGTHS = (13, 6, 2, 9)


def logits_for(batch: Batch, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch.target.shape, 11, generator=generator)


def test_it_is_a_task() -> None:
    task = Language()
    assert isinstance(task, Task)
    assert task.headline == "perplexity"


def test_the_loss_is_the_mean_over_labelled_tokens() -> None:
    batch = text_batch(lengths=LENGTHS)
    logits = logits_for(batch).requires_grad_()
    loss = Language().loss(logits, batch)
    plain = F.cross_entropy(logits.transpose(1, 2), batch.target, ignore_index=-1)
    torch.testing.assert_close(loss, plain)
    for smoothing in (0.1,):
        smooth = Language(label_smoothing=smoothing).loss(logits, batch)
        flat = F.cross_entropy(logits[batch.labelled], batch.target[batch.labelled], label_smoothing=smoothing)
        torch.testing.assert_close(smooth, flat)


@pytest.mark.parametrize("chunk", [None, 7])
def test_padding_reaches_neither_loss_nor_gradient(chunk: int | None) -> None:
    batch = text_batch(lengths=LENGTHS)
    clean = logits_for(batch).requires_grad_()
    spoiled = clean.detach().clone()
    spoiled[~batch.labelled] = torch.nan
    spoiled.requires_grad_()
    task = Language(chunk=chunk)
    losses = [task.loss(logits, batch) for logits in (clean, spoiled)]
    assert torch.equal(*losses)
    slopes = [torch.autograd.grad(loss, logits)[0] for loss, logits in zip(losses, (clean, spoiled), strict=True)]
    assert torch.equal(*slopes)


def test_no_labelled_token_is_a_connected_zero() -> None:
    batch = text_batch(lengths=(1, 1, 1, 1))
    logits = logits_for(batch).requires_grad_()
    loss = Language().loss(logits, batch)
    assert loss == 0
    loss.backward()


def test_scores_run_over_all_tokens_together() -> None:
    batches = [text_batch(seed=1), text_batch(seed=2, lengths=LENGTHS)]
    answers = [logits_for(batch, seed) for seed, batch in enumerate(batches)]
    found = Language(label_smoothing=0.2).score(zip(answers, batches, strict=True))
    rows = torch.cat([one[batch.labelled] for one, batch in zip(answers, batches, strict=True)])
    truth = torch.cat([batch.target[batch.labelled] for batch in batches])
    loss = F.cross_entropy(rows, truth).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert found["token_accuracy"] == pytest.approx((rows.argmax(1) == truth).float().mean().item())


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary() -> None:
    batch = text_batch()
    assert Language().score([(torch.zeros(4, 12, 11), batch)])["perplexity"] == pytest.approx(11)
    assert math.isfinite(Language().score([(torch.eye(11)[(batch.target + 1) % 11] * 1e6, batch)])["perplexity"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    rows = cross_entropy(torch.full((1, 2, 3), 1e4, dtype=dtype), torch.zeros(1, 2).long(), torch.ones(1, 2).bool())
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.full((1, 2), math.log(3)))


def step(pieces: int) -> dict[str, Tensor]:
    """Gradients of one optimizer step in micro-batches of unequal numbers of tokens."""
    student, teacher = causal(seed=1), causal(seed=2)
    batch = text_batch(lengths=LENGTHS)
    objective = Objective(task=1.0, distillm=1.0 * DistiLLM())
    distiller = Distiller(student, objective, task=Language(), teacher=teacher, sample=batch)
    distiller.eval()
    shared = distiller.share(batch.split(pieces))
    for part in shared:
        (distiller(part, distiller.observe(part)).total / len(shared)).backward()
    distiller.close()
    return {name: p.grad for name, p in student.module.named_parameters() if p.grad is not None}


def test_accumulation_changes_nothing() -> None:
    whole = step(1)
    for pieces in (2, 4):
        for name, gradient in step(pieces).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


# errors


def test_targets_that_are_no_text() -> None:
    batch = Batch.of(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    said = "language needs a target [B, L] for logits [B, L, V]: the targets are [2], the logits [2, 5]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        Language().loss(torch.zeros(2, 5), batch)


def test_nothing_to_score() -> None:
    with pytest.raises(UserError, match=r"^nothing to score: no labelled token in this split$"):
        Language().score([])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is a share in [0, 1), not 1.0"),
        ({"chunk": 0}, "chunk counts tokens, at least 1, not 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        Language(**options)
