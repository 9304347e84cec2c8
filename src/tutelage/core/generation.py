# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes, as a function of keys; and the batch it makes."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core.batch import Batch
from tutelage.core.error import UserError
from tutelage.core.model import Model
from tutelage.core.teacher import Teacher
from tutelage.core.term import Draw


def write(
    model: Model,
    batch: Batch,
    draw: Draw,
    *,
    new_tokens: int | None = None,
    temperature: float = 1.0,
    other: Model | None = None,
    other_share: float = 0.0,
) -> Batch:
    """Return the batch with its texts gone on with by a model.

    Each row keeps its prompt, `extra["prompt"]` tokens of it, or what leaves room for the new ones where the data
    names none. Tokens are drawn one by one; what is drawn depends on the draw's key, the sample's id and the place
    alone, and the models' own random generators are not used.

    Args:
        model: a causal language model with `generate` of transformers; it writes in eval mode.
        batch: of text, for the next token.
        draw: the source of randomness.
        new_tokens: at most so many; by default half of a sample.
        temperature: softening of what is drawn from, > 0.
        other: draw from a mixture with this model's probabilities (a teacher that helps writing).
        other_share: share of the other model in the mixture, in [0, 1).

    Returns:
        A batch of the same shape without labels (`target` is -1). `extra`: `token_mask`, positions that answer for
        a written token, the first token for the end included; `taken` `[B, L]` int64, the token that follows each
        position; `prompt` `[B]`.

    Raises:
        UserError: if the model cannot write, or there is no room for a prompt.
    """
    if model.text is not None and not model.text.causal:
        raise UserError("texts are written by causal models: leave data.text.masking out, or the method")
    ids, real = batch.inputs["input_ids"], batch.attention_mask
    length = ids.shape[1] + 1  # with the token that the last position answers for
    count = length // 2 if new_tokens is None else new_tokens
    space = length - count
    if not 1 <= count < length:
        raise UserError(f"{count} new tokens leave no prompt in samples of {length - 1} tokens: lower new_tokens")
    named = batch.extra.get("prompt", torch.zeros_like(batch.index))
    size = torch.where(named > 0, named, real.sum(1).clamp(max=space))
    place = torch.arange(space, device=ids.device) - space + size[:, None]  # the last tokens, to the right
    given = place >= 0
    prompt = ids.gather(1, place.clamp(min=0)).where(given, _pad(model))
    whole = _go_on(model, prompt, given, batch.index, draw, count, temperature, other, other_share)
    end = _end(model)
    over = torch.zeros_like(whole[:, space:], dtype=torch.bool) if end is None else whole[:, space:] == end
    there = torch.cat([given, over.cumsum(1) - over.long() == 0], 1)
    return _aligned(batch, whole, there, size.clamp(max=space), _pad(model))


def _aligned(batch: Batch, whole: Tensor, there: Tensor, prompt: Tensor, pad: int) -> Batch:
    """Return the batch of texts `[B, L + 1]` that begin wherever, moved to the left."""
    length = whole.shape[1]
    place = torch.arange(length, device=whole.device)
    moved = place + there.long().argmax(1, keepdim=True)
    inside = moved < length
    moved = moved.clamp(max=length - 1)
    real = there.gather(1, moved) & inside
    tokens = whole.gather(1, moved).where(real, pad)
    mask = real[:, 1:] & (place[1:] >= prompt[:, None])
    return replace(
        batch,
        inputs={"input_ids": tokens[:, :-1], "attention_mask": real[:, :-1].long()},
        target=torch.full_like(tokens[:, 1:], -1),
        labelled=torch.zeros_like(mask),
        views={},
        extra={"token_mask": mask, "taken": tokens[:, 1:], "prompt": prompt},
    )


def _go_on(
    model: Model,
    prompt: Tensor,
    given: Tensor,
    index: Tensor,
    draw: Draw,
    count: int,
    temperature: float,
    other: Model | None,
    share: float,
) -> Tensor:
    """Return `[B, P + count]` tokens."""
    module: Any = model.module
    if not callable(getattr(module, "generate", None)):
        raise UserError(
            f"{type(module).__name__} cannot write texts: it has no `generate`; use a causal model of transformers"
        )
    end = _end(model)
    pick = _Pick(draw, index, prompt.shape[1], temperature, _vocabulary(model))
    if other is not None and share:
        pick.other, pick.share = _Follower(other, given), share
    with resting(module), resting(other.module if other is not None else None), torch.no_grad():
        found: Tensor = module.generate(
            input_ids=prompt,
            attention_mask=given.long(),
            max_new_tokens=count,
            do_sample=False,  # the largest of log-probabilities with keyed Gumbel noise is an exact draw
            logits_processor=[pick],
            pad_token_id=_pad(model) if end is None else end,  # what follows the end is masked below
            eos_token_id=end,
        )
    return F.pad(found, (0, prompt.shape[1] + count - found.shape[1]), value=_pad(model))


class _Pick:
    """Adds keyed noise to the scores of a step, so that the largest is a draw from their softmax."""

    other: "_Follower | None" = None
    share: float = 0.0

    def __init__(self, draw: Draw, index: Tensor, start: int, temperature: float, vocabulary: int | None) -> None:
        self.draw, self.index, self.start = draw, index, start
        self.temperature, self.vocabulary = temperature, vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores[:, : self.vocabulary].float() / self.temperature
        if self.other is not None:
            aside = self.other(input_ids)[:, : self.vocabulary].float() / self.temperature
            scores = torch.logaddexp(
                scores.log_softmax(1) + math.log(1 - self.share), aside.log_softmax(1) + math.log(self.share)
            )
        noise = self.draw.uniform(self.index, scores.shape[1:], salt=input_ids.shape[1] - self.start)
        return scores - (-noise.clamp(min=2.0**-25).log()).log()


class _Follower:
    """A second model that reads along, token by token."""

    def __init__(self, model: Model, given: Tensor) -> None:
        self.module: Any = model.module
        self.given = given
        self.cache: Any = None
        self.seen = 0
        self.places = "position_ids" in inspect.signature(self.module.forward).parameters

    def __call__(self, input_ids: Tensor) -> Tensor:
        new = input_ids.shape[1] - self.given.shape[1]
        mask = F.pad(self.given.long(), (0, new), value=1)
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, self.seen :]} if self.places else {}
        output = self.module(
            input_ids=input_ids[:, self.seen :],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **positions,
        )
        self.cache, self.seen = output.past_key_values, input_ids.shape[1]
        logits: Tensor = output.logits[:, -1]
        return logits


@contextmanager
def resting(module: nn.Module | None) -> Iterator[None]:
    """Put a module into eval mode, and every part of it back as it was."""
    flags = [(part, part.training) for part in module.modules()] if module is not None else []
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _vocabulary(model: Model) -> int | None:
    return model.text.vocabulary if model.text is not None else None


def _pad(model: Model) -> int:
    return model.text.pad if model.text is not None else 0


def _end(model: Model) -> int | None:
    if model.text is not None:
        return model.text.end
    found = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    return found[0] if isinstance(found, list) else found


def network_of(teacher: Teacher) -> Model:
    """Return the model of a teacher that answers live.

    Raises:
        UserError: if its answers are stored, or it is not one model.
    """
    if teacher.model is None:
        raise UserError(f"a {type(teacher).__name__} teacher cannot write texts: use a live one")
    return teacher.model
