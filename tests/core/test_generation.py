# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from torch import nn

from tiny_text import LENGTH, LLAMA, NEXT, causal, masked, text_batch
from tutelage.core import Batch, Draw, Model
from tutelage.core.error import UserError
from tutelage.core.generation import write

DRAW = Draw(seed=0, step=3, label="feeder 0")


def with_prompts(*prompts: int, rows: int = 4) -> Batch:
    batch = text_batch(rows)
    return Batch.of(batch.inputs, batch.target, index=batch.index, extra={"prompt": torch.tensor(prompts)})


def test_a_prompt_is_kept_and_gone_on_with() -> None:
    batch = text_batch()
    found = write(causal(), batch, DRAW, new_tokens=5)
    prompt = LENGTH + 1 - 5
    assert torch.equal(found.inputs["input_ids"][:, :prompt], batch.inputs["input_ids"][:, :prompt])
    assert found.inputs["input_ids"].shape == found.target.shape == found.extra["taken"].shape == (4, LENGTH)
    assert torch.equal(
        found.extra["taken"][:, :-1][found.token_mask[:, :-1]],
        found.inputs["input_ids"][:, 1:][found.token_mask[:, :-1]],
    )
    assert not found.token_mask[:, : prompt - 1].any()
    assert found.token_mask[:, prompt - 1].all()
    assert not found.labelled.any()
    assert (found.target == -1).all()


def test_nothing_is_written_after_the_end() -> None:
    found = write(causal(), text_batch(32), DRAW)
    ended = (found.extra["taken"] == NEXT.end) & found.token_mask
    assert ended.any()
    for row in range(32):
        places = ended[row].nonzero().flatten().tolist()
        if places:
            assert len(places) == 1
            assert found.token_mask[row].nonzero().max() == places[0]
            assert not found.attention_mask[row, places[0] + 2 :].any()


@pytest.mark.parametrize("helped", [False, True])
def test_what_is_written_does_not_depend_on_its_company(helped: bool) -> None:
    batch = with_prompts(2, 3, 6, 5)
    options: dict[str, Any] = {"new_tokens": 6}
    if helped:
        other = causal(seed=4)
        options |= {"other": other, "other_share": 0.3}
    whole = write(causal(), batch, DRAW, **options)
    torch.manual_seed(12)  # the generators are not read
    for part, piece in zip(whole.split(2), batch.split(2), strict=True):
        alone = write(causal(), piece, DRAW, **options)
        assert torch.equal(alone.inputs["input_ids"], part.inputs["input_ids"])
        assert torch.equal(alone.token_mask, part.token_mask)


def test_prompts_of_unequal_length_lie_on_the_left() -> None:
    batch = with_prompts(2, 3, 6, 5)
    found = write(causal(), batch, DRAW, new_tokens=6)
    for row, size in enumerate((2, 3, 6, 5)):
        assert torch.equal(found.inputs["input_ids"][row, :size], batch.inputs["input_ids"][row, :size])
        assert found.token_mask[row].nonzero().min() == size - 1
    assert found.extra["prompt"].tolist() == [2, 3, 6, 5]


def test_a_rotary_teacher_reads_along() -> None:
    from tutelage.models.load import load

    llama = load({"model": "hf:llama", **LLAMA}, text=NEXT, seed=1)
    batch = with_prompts(2, 3, 6, 5)
    whole = write(causal(), batch, DRAW, new_tokens=6, other=llama, other_share=0.9)
    alone = write(causal(), batch.split(4)[0], DRAW, new_tokens=6, other=llama, other_share=0.9)
    assert torch.equal(alone.inputs["input_ids"], whole.inputs["input_ids"][:1])


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.4)])
def test_the_first_token_is_drawn_from_the_models_probabilities(temperature: float, share: float) -> None:
    student, teacher = causal(seed=5, initializer_range=1.0), causal(seed=6, initializer_range=1.0)
    one = text_batch(1)
    many = 4000
    batch = Batch.of({name: tensor.expand(many, -1) for name, tensor in one.inputs.items()}, index=torch.arange(many))
    found = write(student, batch, DRAW, new_tokens=1, temperature=temperature, other=teacher, other_share=share).extra[
        "taken"
    ][:, -1]
    p, q = ((model(one.inputs)[0, -1] / temperature).softmax(0) for model in (student, teacher))
    expected = (1 - share) * p + share * q
    counted = found.bincount(minlength=11) / many
    assert (counted - expected).abs().max() < 4 * (expected * (1 - expected) / many).sqrt().max()
    assert expected.max() < 0.95


def test_steps_and_seeds_write_other_texts() -> None:
    batch = text_batch(8)
    texts = [
        write(causal(), batch, Draw(seed, step, "feeder 0")).extra["taken"] for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert not torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_the_model_is_left_as_it_was() -> None:
    model = causal()
    model.module.train()
    model.module.get_submodule("transformer.drop").eval()
    write(model, text_batch(), DRAW)
    assert model.module.training
    assert not model.module.get_submodule("transformer.drop").training
    assert all(parameter.grad is None for parameter in model.module.parameters())


@pytest.mark.parametrize("count", [0, LENGTH + 1])
def test_no_room(count: int) -> None:
    with pytest.raises(UserError, match=f"^{count} new tokens leave no prompt in samples of {LENGTH} tokens"):
        write(causal(), text_batch(), DRAW, new_tokens=count)


def test_models_that_do_not_write() -> None:
    with pytest.raises(UserError, match=r"^texts are written by causal models"):
        write(masked(), text_batch(), DRAW)
    with pytest.raises(UserError, match=r"^Linear cannot write texts: it has no `generate`"):
        write(Model.of(nn.Linear(2, 2)), text_batch(), DRAW)
