# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from method_case import ROWS, MethodCase, gaussian, gradient, labelled_batch
from oracles import minillm as oracle
from tiny_text import LENGTH as SAMPLE
from tiny_text import causal, text_batch
from tutelage.core import Batch, Draw, Live
from tutelage.core.error import UserError
from tutelage.methods.language.minillm import (
    MiniLLM,
    Rollouts,
    advantages,
    importance,
    log_probs,
    minillm,
    rewards,
    soft_cross_entropy,
)

LENGTH, WORDS, PAD = 5, 7, 6
SHAPE = {"logits": (ROWS, LENGTH, WORDS)}


def batch() -> Batch:
    """Three written rows of four, two and three tokens after a prompt, three rows of plain text."""
    lengths = torch.tensor([5, 3, 4, 5, 2, 0])
    written = torch.tensor([True, True, True, False, False, False])
    generator = torch.Generator().manual_seed(3)
    taken = torch.randint(WORDS, (ROWS, LENGTH), generator=generator)
    place = torch.arange(LENGTH)
    mask = (place < lengths[:, None]) & ((place >= 1) | ~written[:, None])
    old = -1 - torch.rand(ROWS, LENGTH, generator=generator)
    share = torch.full((ROWS,), 0.2)
    extra = {"token_mask": mask, "taken": taken, "old_log_probs": old, "written": written, "teacher_share": share}
    return labelled_batch(extra=extra)


def case() -> MethodCase:
    return MethodCase(
        term=MiniLLM,
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
        batch=batch,
    )


# the authors' numbers


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    single = readings(arrays, meta, torch.float32)
    answer |= {f"{name}_f32": value for name, value in single.items() if f"{name}_f32" in arrays}
    student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
    found = readings(arrays, meta, torch.float64, student)
    for name, value in found.items():
        answer[name] = value
        slope = "grad_s_logits" + ("" if name == "loss" else f"__{name}")
        if slope in arrays:
            answer[slope] = torch.autograd.grad(value, student, retain_graph=True)[0]
    return answer


def readings(
    arrays: dict[str, NDArray[Any]], meta: dict[str, Any], dtype: torch.dtype, student: Tensor | None = None
) -> dict[str, Tensor]:
    """The released form: position P - 1 + j answers for token j of the response."""
    student = torch.tensor(arrays["s_logits"], dtype=dtype) if student is None else student
    teacher, old_logits = (torch.tensor(arrays[name], dtype=dtype) for name in ("t_logits", "s_logits_old"))
    query, response, labels = (torch.tensor(arrays[name]) for name in ("query_ids", "response_ids", "pt_labels"))
    slots = slice(query.shape[1] - 1, query.shape[1] + response.shape[1] - 1)
    mask = torch.cat([query, response], 1)[:, slots] != meta["pad_id"]
    old = log_probs(old_logits[:, slots], response, mask)
    taught = log_probs(teacher[:, slots], response, mask)
    reward = rewards(taught, old, scaling=meta["reward_scaling"], clip=meta["cliprange_reward"])
    parts = minillm(
        student[:, slots],
        teacher[:, slots],
        response,
        mask,
        old,
        teacher_share=meta["teacher_mixed_alpha"],
        gamma=meta["gamma"],
        reward_scaling=meta["reward_scaling"],
        reward_clip=meta["cliprange_reward"],
        ratio_clip=meta["cliprange"],
        form="code",
    )
    hard = F.cross_entropy(student.transpose(1, 2), labels)
    soft = soft_cross_entropy(student, teacher, labels != -100)
    return {
        "loss_policy": parts["policy"],
        "loss_single_step": parts["single_step"],
        "loss": parts["policy"] + (parts["single_step"] if meta["single_step_reg"] else 0),
        "loss_pretrain": (1 - meta["kd_ratio"]) * hard + meta["kd_ratio"] * soft,
        "out_rollout_logprobs": old,
        "out_teacher_rollout_logprobs": taught,
        "out_rewards": reward,
        "out_importance_weight": importance(taught, old, meta["teacher_mixed_alpha"]),
        "out_advantages_whitened": advantages(reward, mask, gamma=meta["gamma"], form="code"),
        "out_response_mask": mask,
    }


# the equations, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    prompt=st.integers(1, 3),
    length=st.integers(2, 5),
    gamma=st.floats(0.3, 1.0),
    share=st.floats(0.0, 0.8),
    clip=st.floats(0.5, 100),
    chunk=st.sampled_from([None, 2]),
)
@pytest.mark.parametrize("form", ["paper", "code"])
def test_equals_the_loops(
    form: Any,
    seed: int,
    rows: int,
    prompt: int,
    length: int,
    gamma: float,
    share: float,
    clip: float,
    chunk: int | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, prompt + length, WORDS)
    student, old_logits, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for _ in range(3))
    ids = torch.randint(PAD, shape[:2], generator=generator)
    stop = torch.randint(1, length + 1, (rows, 1), generator=generator)
    ids[:, prompt:][torch.arange(length) >= stop] = PAD
    query, response = ids[:, :prompt], ids[:, prompt:]
    if form == "paper" and oracle.response_mask(query.numpy(), response.numpy(), PAD).sum() < 2:
        return  # the oracle's variance of one number
    expected = oracle.minillm(
        student.numpy(),
        old_logits.numpy(),
        teacher.numpy(),
        query.numpy(),
        response.numpy(),
        PAD,
        gamma=gamma,
        scaling=0.7,
        reward_clip=clip,
        mixed=share,
        form=form,
    )
    slots = slice(prompt - 1, prompt + length - 1)
    mask = ids[:, slots] != PAD
    old = log_probs(old_logits[:, slots], response, mask)
    found = minillm(
        student[:, slots],
        teacher[:, slots],
        response,
        mask,
        old,
        teacher_share=share,
        gamma=gamma,
        reward_scaling=0.7,
        reward_clip=clip,
        form=form,
        chunk=chunk,
    )
    for name, value in found.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-10), name


def test_gradcheck() -> None:
    given = batch()
    student, teacher = case().tensors(dtype=torch.float64)
    old = log_probs(student["logits"].detach() + 0.01, given.extra["taken"], given.token_mask)

    def loss(logits: Tensor) -> Tensor:
        assert teacher is not None
        parts = minillm(logits, teacher["logits"], given.extra["taken"], given.token_mask, old, ratio_clip=0.9)
        return parts["policy"] + parts["single_step"]

    assert torch.autograd.gradcheck(loss, student["logits"])


# limits and identities


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = case().tensors(seed, torch.float64)
    assert teacher is not None
    given = batch()
    return student["logits"], teacher["logits"], given.extra["taken"], given.token_mask


def test_the_student_at_its_own_probabilities_follows_the_plain_policy_gradient() -> None:
    student, teacher, taken, mask = drawn()
    old = log_probs(student, taken, mask).detach()
    parts = minillm(student, teacher, taken, mask, old, teacher_share=0.0)
    advantage = advantages(rewards(log_probs(teacher, taken, mask), old), mask)
    plain = -(advantage * log_probs(student, taken, mask))[mask].mean()
    torch.testing.assert_close(gradient(parts["policy"], student), gradient(plain, student))


def test_nothing_to_learn_from_oneself() -> None:
    student, _, taken, mask = drawn()
    old = log_probs(student, taken, mask).detach()
    parts = minillm(student, student.detach(), taken, mask, old)
    assert parts["single_step"].item() == pytest.approx(0, abs=1e-12)
    assert parts["policy"].item() == pytest.approx(0, abs=1e-12)


def test_a_discount_of_one_and_no_padding_means_over_what_is_left() -> None:
    reward = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    code, paper = (advantages(reward, mask, gamma=1.0, form=form) for form in ("code", "paper"))
    whiten = lambda x: (x - x.mean()) / (x.var() + 1e-8).sqrt()  # noqa: E731
    torch.testing.assert_close(code, whiten(torch.tensor([[3.0, 4.0, 6.0]], dtype=torch.float64)))
    torch.testing.assert_close(paper, whiten(torch.tensor([[4.0, 6.0, 0.0]], dtype=torch.float64)))


def test_drawn_from_the_student_alone_every_weight_is_one() -> None:
    student, teacher, taken, mask = drawn()
    old, taught = log_probs(student, taken, mask), log_probs(teacher, taken, mask)
    assert torch.equal(importance(taught, old, 0.0), torch.ones_like(old))
    mixture = 0.3 * taught.exp() + 0.7 * old.exp()
    torch.testing.assert_close(importance(taught, old, 0.3), old.exp() / mixture)


def test_plain_rows_get_the_teachers_cross_entropy_and_no_policy() -> None:
    term, given = MiniLLM(kd_ratio=0.5), batch()
    student, teacher = case().tensors(dtype=torch.float64)
    outcome = case().outcome(term, student, teacher, given)
    plain = given.token_mask & ~given.extra["written"][:, None]
    assert teacher is not None
    rows = -(teacher["logits"].softmax(-1) * student["logits"].log_softmax(-1)).sum(-1)
    torch.testing.assert_close(outcome.parts["pretrain"], 0.5 * rows[plain].mean())
    policy = gradient(outcome.parts["policy"] + outcome.parts["single_step"], student["logits"])
    assert not policy[3:].any()


def test_a_batch_of_plain_text_is_learnt_from_the_teacher_alone() -> None:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    student, teacher = case().tensors()
    outcome = case().outcome(MiniLLM(), student, teacher, labelled_batch(extra={"token_mask": mask}))
    assert outcome.parts["policy"] == outcome.parts["single_step"] == 0
    assert outcome.parts["pretrain"] > 0


# padding


@pytest.mark.parametrize("form", ["paper", "code"])
def test_padding_reaches_neither_value_nor_gradient(form: Any) -> None:
    student, teacher, taken, mask = drawn()
    old = log_probs(student, taken, mask).detach() - 0.1

    def loss(logits: Tensor, taught: Tensor, tokens: Tensor, before: Tensor) -> Tensor:
        parts = minillm(logits, taught, tokens, mask, before, form=form)
        return parts["policy"] + parts["single_step"]

    clean = loss(student, teacher, taken, old)
    other, taught, tokens, before = (part.detach().clone() for part in (student, teacher, taken, old))
    other[~mask], taught[~mask], tokens[~mask], before[~mask] = torch.nan, torch.inf, 0, torch.nan
    dirty = loss(other.requires_grad_(), taught, tokens, before)
    assert torch.equal(clean, dirty)
    slope = gradient(dirty, other)
    assert torch.equal(slope, gradient(clean, student))
    assert not slope[~mask].any()


def test_more_padding_changes_nothing_in_the_papers_form() -> None:
    student, teacher, taken, mask = drawn()
    old = log_probs(student, taken, mask).detach() - 0.1
    plain = minillm(student, teacher, taken, mask, old)
    wide = minillm(
        *(F.pad(part, (0, 0, 0, 3)) for part in (student, teacher)),
        *(F.pad(part, (0, 3)) for part in (taken, mask, old)),
    )
    for name, value in plain.items():
        torch.testing.assert_close(wide[name], value)


# odd cases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_half_precision_extremes(dtype: torch.dtype, share: float) -> None:
    student = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]]], dtype=dtype)
    mask, taken = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1, 0]])
    for before in (student.detach(), teacher):
        parts = minillm(student, teacher, taken, mask, log_probs(before, taken, mask), teacher_share=share)
        loss = parts["policy"] + parts["single_step"]
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert gradient(loss, student).isfinite().all()


def test_a_single_token_has_no_advantage() -> None:
    reward = torch.tensor([[3.0, 0.0]])
    assert not advantages(reward, torch.tensor([[True, False]])).any()


# the feeder


def fed(feeder: Rollouts, given: Batch, step: int, seed: int = 0) -> Batch:
    student, teacher = causal(seed=1), Live(causal(seed=2))
    (found,) = feeder.feed(given, {"student": student}, {"teacher": teacher}, Draw(seed, step, "feeder 0"))
    return found


def test_rollouts_come_before_the_rows_of_the_data() -> None:
    given = text_batch(rows=3)
    found = fed(Rollouts(new_tokens=6), given, 0)
    assert len(found) == 6
    assert found.extra["written"].tolist() == [True] * 3 + [False] * 3
    assert found.inputs["input_ids"].shape == (6, SAMPLE)
    assert torch.equal(found.inputs["input_ids"][3:], given.inputs["input_ids"])
    assert torch.equal(found.target[3:], given.target)
    assert not found.labelled[:3].any()
    assert found.token_mask[:3].sum(1).max() <= 6
    kept = found.token_mask & found.extra["written"][:, None]
    student = causal(seed=1)
    expected = log_probs(student(found.inputs), found.extra["taken"], kept)
    torch.testing.assert_close(found.extra["old_log_probs"], expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_set_of_texts_serves_several_steps_and_survives_a_resume() -> None:
    feeder = Rollouts(new_tokens=6, repeats=3)
    found = [fed(feeder, text_batch(rows=3, seed=step), step) for step in range(4)]
    ids = [one.inputs["input_ids"] for one in found]
    assert torch.equal(ids[0][:3], ids[1][:3])
    assert torch.equal(ids[0][:3], ids[2][:3])
    assert not torch.equal(ids[0][:3], ids[3][:3])
    assert not torch.equal(ids[0][3:], ids[1][3:])
    first = Rollouts(new_tokens=6, repeats=3)
    fed(first, text_batch(rows=3, seed=0), 0)
    resumed = Rollouts(new_tokens=6, repeats=3)
    resumed.load({name: tensor.clone() for name, tensor in first.state().items()})
    again = fed(resumed, text_batch(rows=3, seed=1), 1)
    assert torch.equal(again.inputs["input_ids"], ids[1])
    for name, tensor in found[1].extra.items():
        assert torch.equal(again.extra[name], tensor), name


def test_each_micro_batch_of_a_step_has_its_own_texts() -> None:
    feeder = Rollouts(new_tokens=6, repeats=2)
    student, teacher = causal(seed=1), Live(causal(seed=2))

    def step(number: int) -> list[Tensor]:
        draw = Draw(0, number, "feeder 0")
        pieces = text_batch(rows=4, seed=number).split(2)
        made = [next(iter(feeder.feed(one, {"student": student}, {"teacher": teacher}, draw))) for one in pieces]
        return [one.inputs["input_ids"][:2] for one in made]

    first, second = step(0), step(1)
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_without_plain_text() -> None:
    found = fed(Rollouts(new_tokens=6, pretrain=False), text_batch(rows=3), 0)
    assert len(found) == 3
    assert found.extra["written"].all()


# errors


def test_two_vocabularies() -> None:
    said = (
        "minillm compares models of one vocabulary and length: the student's logits are [1, 2, 3], "
        "the teacher's [1, 2, 4]"
    )
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        minillm(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), mask.long(), mask, torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "papr"}, "form 'papr' is not known; did you mean paper?"),
        ({"gamma": 0}, "gamma is a discount in (0, 1], not 0"),
        ({"reward_scaling": 0}, "reward_scaling must be > 0, not 0"),
        ({"reward_clip": -1}, "reward_clip must be > 0, not -1"),
        ({"ratio_clip": 1.0}, "ratio_clip lies in (0, 1), not 1.0"),
        ({"kd_ratio": -0.5}, "kd_ratio must not be negative, as -0.5 is"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        MiniLLM(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher_share": 1.0}, "teacher_share is a share in [0, 1), not 1.0"),
        ({"repeats": 0}, "repeats counts steps, at least 1, not 0"),
    ],
)
def test_options_of_the_feeder(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        Rollouts(**options)
